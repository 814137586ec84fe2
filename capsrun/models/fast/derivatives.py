"""What keeps second derivatives away from kernels that have none."""

import functools
from collections.abc import Callable
from typing import Any

import torch


def only_first(backward: Callable[..., Any]) -> Callable[..., Any]:
    """A backward pass through which there is no other one.

    Raises RuntimeError where autograd would go on (`create_graph=True`). PyTorch's own
    `once_differentiable` says nothing where the derivative is asked for by `torch.autograd.grad`,
    which then leaves out what came through here.
    """

    @functools.wraps(backward)
    def checked(ctx: Any, *gradients: torch.Tensor) -> Any:
        if torch.is_grad_enabled():
            raise RuntimeError(
                "the fast kernels have no second derivatives: set `fast = False` of these layers, "
                "with capsrun.models.layers.take(network, fast=False)"
            )
        return backward(ctx, *gradients)

    return checked
