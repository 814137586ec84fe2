"""Routing by agreement as a layer: the DigitCaps of §4.

Shapes: B batch, I input capsules, J output capsules, K input dimension, D output dimension.
"""

import dataclasses
from typing import Any

import torch
from torch import Tensor, nn

from capsrun.model_config import CapsuleModelConfig, DynamicRoutingConfig
from capsrun.models import fast
from capsrun.models.inputs import check_sizes
from capsrun.models.layers import RoutedLayer, capsnet_config, routing_config
from capsrun.models.routing import RoutingIteration, capsule_votes, route


class CapsuleLayer(RoutedLayer):
    """Capsules to which those of the layer below are routed by agreement (Procedure 1).

    Takes capsules u (B, I, K) and returns capsules v (B, J, D), of lengths in [0, 1), in float32.
    Its parameters are `weight`, W (I, K, J, D), and `bias` (J, D), or None.

    inputs: I. input_dim: K. outputs: J. output_dim: D. iterations: how often votes are weighed.
    leaky, detach: see `route`. bias: whether there is one, added inside every iteration.
    initialisation: `authors` (truncated normal, σ = 0.1, bias 0.1) or `pytorch` (as in `nn.Linear`,
    but a zero bias). What is None is as `configs/model/capsnet.yaml` has it.
    Raises ValueError for sizes below 1, and capsules of another shape or type.

    >>> import capsrun, torch
    >>> parts = capsrun.CapsuleLayer(inputs=1152, input_dim=8, outputs=20, output_dim=12)
    >>> wholes = capsrun.CapsuleLayer(20, 12, outputs=10, output_dim=16, iterations=2)
    >>> capsules = wholes(parts(torch.rand(2, 1152, 8) / 8))
    >>> capsules.shape
    torch.Size([2, 10, 16])
    """

    def __init__(
        self,
        inputs: int,
        input_dim: int,
        outputs: int,
        output_dim: int,
        iterations: int = 3,
        *,
        leaky: bool | None = None,
        detach: bool | None = None,
        bias: bool | None = None,
        initialisation: str | None = None,
    ) -> None:
        check_sizes(iterations=iterations)
        super().__init__(inputs, input_dim, outputs, output_dim)
        said = {"iterations": iterations, "leaky": leaky, "detach": detach}
        values: dict[str, Any] = dataclasses.asdict(routing_config())
        values |= {key: value for key, value in said.items() if value is not None}
        self.routing: DynamicRoutingConfig = DynamicRoutingConfig(**values)
        self.weight = nn.Parameter(torch.empty(inputs, input_dim, outputs, output_dim))
        has_bias = capsnet_config().digit_bias if bias is None else bias
        self.bias = nn.Parameter(torch.empty(outputs, output_dim)) if has_bias else None
        self.reset_parameters()
        self._initialise(initialisation)

    @classmethod
    def from_config(
        cls, routing: DynamicRoutingConfig, model: CapsuleModelConfig, inputs: int, classes: int
    ) -> "CapsuleLayer":
        """See `RoutedLayer`; there is a bias where the network has the setting `digit_bias`."""
        return cls(
            inputs,
            model.primary_dimensions,
            classes,
            model.digit_dimensions,
            **dataclasses.asdict(routing),
            bias=getattr(model, "digit_bias", False),
            initialisation="pytorch",
        )

    def extra_repr(self) -> str:
        """What PyTorch shows of it."""
        sizes = f"{self.inputs}, {self.input_dim}, {self.outputs}, {self.output_dim}"
        settings = {**dataclasses.asdict(self.routing), "bias": self.bias is not None}
        return ", ".join([sizes, *(f"{key}={value}" for key, value in settings.items())])

    def fused(self, capsules_BIK: Tensor) -> Tensor | None:
        """Votes and routing in one kernel."""
        given = capsules_BIK, self.weight, self.bias, self.routing
        return fast.class_capsules(*given, self.triton)

    def route(self, capsules_BIK: Tensor, history: list[RoutingIteration] | None) -> Tensor:
        """See `route` of `routing.py`, whose votes are made here."""
        how = self.routing.iterations, self.routing.leaky, self.routing.detach
        return route(capsule_votes(capsules_BIK, self.weight), self.bias, *how, history)
