"""The same numbers as the plain functions of `models/`, to rounding, faster.

This is what `layers.py` and `capsnet.py` call: each step of a network in the fastest way that there
is for it on the device at hand, where one is known; the functions that return None leave it to the
plain way.

Shapes: B batch, C channels, H and W pixels, I input capsules, J output capsules, K input dimension,
D output dimension.
"""

import contextlib
from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn import functional as F

from capsrun.model_config import DynamicRoutingConfig
from capsrun.models.fast import frequency_conv, frequency_gpu, routing_cpu
from capsrun.models.fast.patch_conv import image_conv2d, patch_conv2d
from capsrun.models.fast.strided_conv import relu_strided_conv2d
from capsrun.models.inputs import is_traced
from capsrun.models.routing import RoutingIteration

# Images do not depend on each other, and the votes of about this many capsules for ten others stay
# in a processor's cache while they are routed: about a quarter less time than for a whole batch.
ROUTED_AT_ONCE_ON_CPU = 8 * 1152


def _on_cpu(tensor: Tensor) -> bool:
    # What is compiled, exported or transformed consists of PyTorch's operations only.
    return tensor.device.type == "cpu" and not is_traced()


def without_autocast(device: torch.device) -> contextlib.AbstractContextManager[Any]:
    """Compute in the precision of what is given, whatever the code around asks for."""
    if not torch.amp.is_autocast_available(device.type):  # on "meta"
        return contextlib.nullcontext()
    return torch.autocast(device.type, enabled=False)


def conv2d(layer: nn.Conv2d, images_BCHW: Tensor, fast: bool) -> Tensor:
    """A convolution of images."""
    which = images_BCHW.requires_grad, layer.weight.requires_grad
    if fast and torch.is_grad_enabled() and _on_cpu(images_BCHW):
        assert layer.bias is not None
        if which == (False, True):
            return patch_conv2d(images_BCHW, layer.weight, layer.bias)
        if which == (True, False) and not torch.is_autocast_enabled("cpu"):
            return image_conv2d(images_BCHW, layer.weight, layer.bias)
    return layer(images_BCHW)


def relu_conv2d(
    maps_BCHW: Tensor, weight_OCMN: Tensor, stride: int, fast: bool, frequency: bool
) -> Tensor:
    """`F.conv2d(F.relu(maps), weight, stride=stride)`.

    frequency: in training, by PyTorch's operations in the frequency domain.
    """
    square = all(len({*tensor.shape[2:]}) == 1 for tensor in (maps_BCHW, weight_OCMN))
    if frequency and square and torch.is_grad_enabled():
        return frequency_gpu.frequency_conv2d(F.relu(maps_BCHW), weight_OCMN, stride)
    if not (fast and _on_cpu(maps_BCHW)):
        return F.conv2d(F.relu(maps_BCHW), weight_OCMN, stride=stride)
    if torch.is_autocast_enabled("cpu") and maps_BCHW.dtype != torch.float64:
        # Those of a convolution are of this type; others, of a normalisation say, need not be.
        maps_BCHW = maps_BCHW.to(torch.get_autocast_dtype("cpu"))
    if square and frequency_conv.is_faster(maps_BCHW, weight_OCMN, stride):
        outputs = frequency_conv.relu_frequency_conv2d(maps_BCHW, weight_OCMN, stride)
        if outputs is not None:
            return outputs
    return relu_strided_conv2d(maps_BCHW, weight_OCMN, stride)


def primary_capsules(
    maps_BCHW: Tensor, bias_C: Tensor, scale: float, dimensions: int
) -> Tensor | None:
    """PrimaryCaps' capsules (B, I, K) of its maps, see `routing_cpu.squash_fused`; or None."""
    if not _on_cpu(maps_BCHW):
        return None
    return routing_cpu.squash_fused(maps_BCHW, bias_C, scale, dimensions)


def class_capsules(
    poses_BIK: Tensor,
    weights_IKJD: Tensor,
    bias_JD: Tensor | None,
    routing: DynamicRoutingConfig,
    triton: bool,
) -> Tensor | None:
    """Votes and dynamic routing in one, (B, J, D), see `routing_cpu.route_fused`; or None.

    triton: on a GPU, as Triton kernels.
    """
    if routing.detach:  # a gradient that only the plain functions can leave out
        return None
    given = poses_BIK, weights_IKJD, bias_JD, routing.iterations, routing.leaky
    if _on_cpu(poses_BIK):
        return routing_cpu.route_fused(*given)
    # Not asked here whether this is an export: PyTorch 2.11 says so of what it compiles, too.
    if triton and poses_BIK.device.type == "cuda":
        from capsrun.models.fast import routing_gpu  # not everywhere is there a Triton to import

        return routing_gpu.route_fused(*given)
    return None


def in_pieces(
    routed: Callable[[Tensor, list[RoutingIteration] | None], Tensor],
    poses_BIK: Tensor,
    history: list[RoutingIteration] | None,
) -> Tensor:
    """`routed(poses_BIK, history)`, on a CPU for a few images at a time."""
    if not _on_cpu(poses_BIK):  # an export is for any batch, so cannot count on a number of pieces
        return routed(poses_BIK, history)
    pieces = poses_BIK.split(max(1, ROUTED_AT_ONCE_ON_CPU // poses_BIK.shape[1]))
    histories: list[list[RoutingIteration]] = [[] for _ in pieces]
    capsules = [
        routed(piece_BIK, None if history is None else mine)
        for piece_BIK, mine in zip(pieces, histories)
    ]
    if history is not None:
        for parts in zip(*histories):
            fields: list[Any] = [None if of[0] is None else torch.cat(of) for of in zip(*parts)]
            history.append(RoutingIteration(*fields))
    return torch.cat(capsules)
