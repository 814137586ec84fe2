"""How the authors' code draws new weights."""

import torch
from torch import nn


@torch.no_grad()
def initialise_as_authors(network: nn.Module, narrow: str) -> None:
    """Weights from a normal truncated at ±2σ, every bias 0.1 (authors' code; Paper: silent).

    σ is 0.05 for the weights whose names begin with `narrow`, and 0.1 for all others.
    """
    for name, parameter in network.named_parameters():
        if name.endswith("bias"):
            parameter.fill_(0.1)
        else:
            std = 0.05 if name.startswith(narrow) else 0.1
            nn.init.trunc_normal_(parameter, std=std, a=-2 * std, b=2 * std)
