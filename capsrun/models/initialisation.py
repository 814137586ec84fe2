"""How the authors' code draws new weights."""

import torch
from torch import nn


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
