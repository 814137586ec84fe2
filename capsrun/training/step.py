"""One optimisation step: device, precision, schedule and Adam.

Shapes: B batch, T digits in one image, C channels, H and W pixels.
"""

import math
from collections.abc import Callable, Iterable
from contextlib import AbstractContextManager
from pathlib import Path
from typing import Any

import torch

from capsrun.config import LossConfig, RecipeConfig
from capsrun.data.batches import Batch
from capsrun.errors import UserError
from capsrun.models.capsnet import CapsNet, CapsNetOutput
from capsrun.models.routing import RoutingIteration
from capsrun.training.losses import Losses, capsnet_losses

Progress = Callable[[Iterable[Any]], Iterable[Any]]


def resolve_device(name: str) -> torch.device:
    """`auto` is the GPU where there is one. Raises UserError for a GPU that is not there."""
    if name == "auto":
        name = "cuda" if torch.cuda.is_available() else "cpu"
    if name == "cuda" and not torch.cuda.is_available():
        raise UserError(
            "device=cuda, but PyTorch finds no CUDA GPU here; use device=cpu or device=auto"
        )
    return torch.device(name)


def resolve_precision(name: str, device: torch.device) -> str:
    """`auto` is bf16 where the processor computes it in hardware, else fp32."""
    if name != "auto":
        return name
    if device.type == "cuda":
        return "bf16" if torch.cuda.get_device_capability(device) >= (8, 0) else "fp32"
    return "bf16" if {"avx512_bf16", "amx_bf16"} & _cpu_flags() else "fp32"


def _cpu_flags() -> set[str]:
    """What Linux says the CPU can do; empty on other systems."""
    try:
        lines = Path("/proc/cpuinfo").read_text().splitlines()
    except OSError:
        return set()
    return {flag for line in lines if line.startswith("flags") for flag in line.split()}


def to_device(model: CapsNet, device: torch.device) -> CapsNet:
    """Move a model to the device, in the memory order in which training and testing run it.

    Channels-last convolutions are 5 to 15 % faster on a CPU, and what GPUs compute natively.
    """
    return model.to(device=device, memory_format=torch.channels_last)  # type: ignore[call-overload]


def autocast(device: torch.device, precision: str) -> AbstractContextManager:
    """Convolutions and the decoder in bf16 or not; capsules and losses are float32 in any case."""
    return torch.autocast(device.type, torch.bfloat16, enabled=precision == "bf16")


def total_steps(recipe: RecipeConfig, training_images: int) -> int:
    """Length of the run in steps; a last batch that is begun is a whole one."""
    if recipe.steps is not None:
        return recipe.steps
    assert recipe.epochs is not None  # checked in config.py
    return max(1, math.ceil(recipe.epochs * training_images / recipe.batch_size))


def learning_rate(recipe: RecipeConfig, step: int, steps: int) -> float:
    """The rate of a step, from 0: lr · decay_rate^(step / decay_steps), never below the floor.

    steps: length of the whole run. With `hold_fraction` h the decay begins after h · steps, and
    with `decay_periods` its period is what fits so often into the rest.
    """
    held = recipe.hold_fraction * steps
    period = recipe.decay_steps
    if period is None:
        assert recipe.decay_periods is not None  # checked in config.py
        period = (steps - held) / recipe.decay_periods
    decayed = recipe.learning_rate * recipe.decay_rate ** (max(0.0, step - held) / period)
    return max(decayed, recipe.learning_rate_floor)


def adam_epsilon(recipe: RecipeConfig, step: int) -> float:
    """PyTorch's ε that gives this step (from 0) the recipe's form of Adam.

    TensorFlow adds ε to sqrt(v) before the bias of v is corrected, PyTorch after it. So PyTorch
    computes TensorFlow's update with ε / sqrt(1 − β₂^t) at step t, counted from 1.
    """
    if recipe.adam_form == "pytorch":
        return recipe.adam_epsilon
    return recipe.adam_epsilon / math.sqrt(1 - recipe.adam_beta2 ** (step + 1))


class Trainer:
    """A model and its optimiser on one device; `step` makes one update."""

    def __init__(
        self,
        model: CapsNet,
        loss: LossConfig,
        recipe: RecipeConfig,
        steps: int,
        device: torch.device,
        precision: str,
    ) -> None:
        """steps: length of the run. precision: 'fp32' or 'bf16', already resolved."""
        self.model = to_device(model, device)
        self.loss, self.recipe, self.steps = loss, recipe, steps
        self.device, self.precision = device, precision
        self.optimizer = torch.optim.Adam(
            model.parameters(), betas=(recipe.adam_beta1, recipe.adam_beta2), fused=True
        )

    def step(
        self, batch: Batch, step: int, history: list[RoutingIteration] | None = None
    ) -> tuple[CapsNetOutput, Losses]:
        """Make update number `step` (from 0); returns output and losses from before the update.

        history: see `capsrun.models.routing.route`. Raises FloatingPointError, before anything is
        updated, for a loss that is not finite; on a CPU only, as a GPU would have to be waited for.
        """
        group = self.optimizer.param_groups[0]
        group["lr"] = learning_rate(self.recipe, step, self.steps)
        group["eps"] = adam_epsilon(self.recipe, step)
        with autocast(self.device, self.precision):
            output = self.model(batch.images_BCHW, batch.labels_BT, history)
        losses = capsnet_losses(output, batch.labels_BT, batch.targets_BTCHW, self.loss)
        if self.device.type == "cpu" and not losses.total.isfinite():
            raise FloatingPointError(f"the loss is {losses.total.item()}")
        self.optimizer.zero_grad(set_to_none=True)
        losses.total.backward()
        self.optimizer.step()
        return output, losses
