"""How the code of papers' authors draws new weights."""

import math

import torch
from torch import Tensor, nn

TRUNCATED = 0.87962566
"""Standard deviation of a normal distribution with σ = 1 that is truncated at ±2."""


@torch.no_grad()
def initialise_as_authors(network: nn.Module, std: float = 0.1) -> None:
    """Weights from a normal truncated at ±2σ, every bias 0.1 (authors' code; Paper: silent).

    std: σ, which is 0.05 in the first convolutions.
    """
    for name, parameter in network.named_parameters():
        if name.endswith("bias"):
            parameter.fill_(0.1)
        else:
            nn.init.trunc_normal_(parameter, std=std, a=-2 * std, b=2 * std)


@torch.no_grad()
def he_normal(weights: Tensor, inputs: int) -> None:
    """Variance 2 / `inputs` (He et al. 2015), from a normal distribution truncated at ±2 of its σ.

    As Keras draws it, and so that the variance is this after it is truncated.
    """
    std = math.sqrt(2 / inputs) / TRUNCATED
    nn.init.trunc_normal_(weights, std=std, a=-2 * std, b=2 * std)
