"""One optimisation step: forward pass, losses, gradients and Adam.

Shapes: B batch, T digits in one image, C channels, H and W pixels.
"""

import copy
from collections.abc import Callable
from typing import Any, NamedTuple, TypeVar

import torch
from torch import Tensor, nn
from torch.optim.swa_utils import get_ema_multi_avg_fn

from capsrun.config import RecipeConfig
from capsrun.data.batches import Batch
from capsrun.data.splits import TrainingBatches
from capsrun.model_config import LossConfig
from capsrun.models import Model, Output
from capsrun.models.layers import take
from capsrun.training.device import autocast, keep_freed_memory
from capsrun.training.distributed import ALONE, Ranks, peers
from capsrun.training.losses import Losses, model_losses
from capsrun.training.schedule import adam_rate

SomeModel = TypeVar("SomeModel", bound=Model)

# A step count at which β^t is 0 for every β, so that PyTorch's Adam finds no bias to correct; in
# float32 it stays the same when 1 is added. So ε and all else that Adam is given are constants, but
# for the rate, as a captured graph needs it.
CORRECTED = 2.0**60


def to_device(model: SomeModel, device: torch.device, fast: bool) -> SomeModel:
    """Move a model to the device, in the memory order in which training and testing run it.

    fast: see `Layer.fast`. Channels-last convolutions are 5 to 15 % faster on a CPU, and what
    GPUs compute natively.
    """
    take(model, fast=fast)
    if fast and device.type == "cpu":
        keep_freed_memory()
    model.to(device)
    for module in model.modules():
        if isinstance(module, nn.Conv2d):  # only these: the capsules' weights have four axes too
            module.to(memory_format=torch.channels_last)
    return model


def make_optimizer(model: Model, recipe: RecipeConfig, device: torch.device) -> torch.optim.Adam:
    """Adam in the recipe's form; its state is there before the first step."""
    optimizer = torch.optim.Adam(
        model.parameters(),
        # On a GPU it is read there by every step: a captured graph always reads the same place.
        lr=torch.zeros((), device=device) if device.type == "cuda" else 0.0,
        betas=(recipe.adam_beta1, recipe.adam_beta2),
        eps=recipe.adam_epsilon,
        fused=True,
    )
    steps_made = CORRECTED if recipe.adam_form == "tensorflow" else 0.0
    for parameter in model.parameters():
        optimizer.state[parameter] = {
            "step": torch.tensor(steps_made, device=parameter.device),
            "exp_avg": torch.zeros_like(parameter),
            "exp_avg_sq": torch.zeros_like(parameter),
        }
    return optimizer


def tensors_of(network: nn.Module) -> list[Tensor]:
    """The weights of a network, and its buffers."""
    return [*network.parameters(), *network.buffers()]


class Update(NamedTuple):
    """What one update saw and computed, before it changed the weights."""

    batch: Batch
    output: Output
    losses: Losses


class Trainer:
    """A model and its optimiser on one device; `step` makes one update, `advance` several."""

    def __init__(
        self,
        model: Model,
        loss: LossConfig,
        recipe: RecipeConfig,
        steps: int,
        device: torch.device,
        precision: str,
        fast: bool,
        ranks: Ranks = ALONE,
    ) -> None:
        """steps: length of the run. precision: 'fp32' or 'bf16', already resolved.

        fast: compute the same numbers, to rounding, with the fastest kernels of `models/` that are
        known for the device. ranks: the processes that train the model together; each is given its
        share of a batch.
        """
        self.model = to_device(model, device, fast)
        self.ranks = ranks
        self._network = ranks.share_model(self.model, device)
        self.loss, self.recipe, self.steps = loss, recipe, steps
        self.device, self.precision = device, precision
        self.optimizer = make_optimizer(self.model, recipe, device)
        self.progress = torch.zeros((), device=device)
        """How much of the run is made, from 0 to 1: where a captured graph reads it."""
        self.averaged: Model | None = None
        """A model whose weights are the moving average of the trained one's, if there is to be."""
        if recipe.average is not None:
            self.averaged = copy.deepcopy(self.model).requires_grad_(False)
        self.compute: Callable[[Batch], tuple[Output, Losses]] = self.forward
        """`forward`, or the same compiled."""
        self.steps_at_once = 1
        """How many updates `advance` makes best in one call."""
        self.ways_ms: dict[str, float] = {}
        """Milliseconds of an update in each way that was measured; see `training/graph.py`."""

    def changing_tensors(self) -> list[Tensor]:
        """Everything that an update changes: the weights, their average, the optimiser's state.

        Of both networks the buffers too, as the running statistics of a batch normalisation are.
        """
        moments = [value for state in self.optimizer.state.values() for value in state.values()]
        averages = [] if self.averaged is None else tensors_of(self.averaged)
        return [*tensors_of(self.model), *moments, *averages]

    def set_progress(self, step: int | Tensor) -> None:
        """Set which update is the next, for a loss that changes during a run."""
        self.progress.copy_(torch.as_tensor(step / self.steps))

    def set_rate(self, rate: float | Tensor) -> None:
        """Set Adam's rate for the next update; see `adam_rate`."""
        group = self.optimizer.param_groups[0]
        if self.device.type == "cuda":
            group["lr"].copy_(torch.as_tensor(rate))  # in place: a captured graph reads this one
        else:
            group["lr"] = float(rate)

    def fits_optimizer(self, state: dict[str, Any]) -> bool:
        """Whether this is the optimiser's state of a run with this network."""

        def shapes(state: dict[str, Any]) -> dict[tuple[int, str], torch.Size]:
            moments = state.get("state", {}).items()
            return {(n, key): value.shape for n, values in moments for key, value in values.items()}

        return shapes(state) == shapes(self.optimizer.state_dict())

    def load_optimizer(self, state: dict[str, Any]) -> None:
        """Go on with the optimiser's state of a checkpoint, of a run on any device."""
        ours = self.optimizer.state_dict()["param_groups"]
        self.optimizer.load_state_dict({"state": state["state"], "param_groups": ours})

    def advance(self, batches: TrainingBatches, step: int, count: int) -> Update:
        """Make `count` updates from number `step` (from 0) on; returns the last one.

        Raises as `step` does.
        """
        for number in range(step, step + count):
            with torch.profiler.record_function("capsrun::batch"):  # a name for profiles
                batch = batches.batch(number)
            update = self.step(batch, number)
        return update

    def step(self, batch: Batch, step: int) -> Update:
        """Make update number `step` (from 0).

        Raises FloatingPointError, before a weight is updated, for a loss that is not finite; on a
        CPU only, as a GPU would have to be waited for.
        """
        self.set_rate(adam_rate(self.recipe, step, self.steps))
        self.set_progress(step)
        return self.update(batch)

    def update(self, batch: Batch) -> Update:
        """Make one update at the rate that is set; see `step`."""
        self._network.train()  # it may have been tested since
        output, losses = self.compute(batch)
        if self.device.type == "cpu":
            total = self.mean(losses.total, batch)
            if not total.isfinite():
                raise FloatingPointError(f"the loss is {total.item()}")
        self.optimizer.zero_grad()
        loss = losses.total
        if self.ranks.count > 1:
            # The mean over processes is then the mean over images, however many each has.
            share = len(batch.labels_BT) / self.recipe.batch_size
            loss = loss * (share * self.ranks.count)
        with peers():
            loss.backward()
        self.optimizer.step()
        self._average()
        return Update(batch, output, losses)

    def forward(self, batch: Batch) -> tuple[Output, Losses]:
        """What the model says about a batch, and its losses."""
        with peers(), autocast(self.device, self.precision):
            output = self._network(batch.images_BCHW, batch.labels_BT, batch.noise_B)
        given = output, batch.labels_BT, batch.targets_BTCHW, self.loss
        return output, model_losses(*given, self.progress)

    @torch.no_grad()
    def _average(self) -> None:
        """Move the average of the weights: a ← decay · a + (1 − decay) · w, from the initial w.

        That of running statistics likewise; counters are as they are.
        """
        if self.averaged is not None:
            assert self.recipe.average is not None
            # Not AveragedModel.update_parameters, which looks at its count: a GPU waits for that.
            move = get_ema_multi_avg_fn(self.recipe.average)
            pairs = list(zip(tensors_of(self.averaged), tensors_of(self.model)))
            averages, values = zip(*(pair for pair in pairs if pair[0].is_floating_point()))
            move(list(averages), list(values), 0)
            for ours, theirs in pairs:
                if not ours.is_floating_point():
                    ours.copy_(theirs)

    def mean(self, values: Tensor, batch: Batch) -> Tensor:
        """Means over the step's whole batch of what are means over this process's share of it."""
        return self.ranks.mean(values, len(batch.labels_BT), self.recipe.batch_size)
