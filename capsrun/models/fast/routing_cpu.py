"""PrimaryCaps' capsules, votes and routing on a CPU as kernels of `routing_cpu.cpp`.

Ten times faster than the operations of `routing.py`, which it equals to float32 rounding. It needs
a C++ compiler and takes a second to build; the result is kept in the user's cache folder.

Shapes: B batch, I input capsules, J output capsules, K input dimension, D output dimension,
R routing iterations.
"""

import ctypes
import functools
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from capsrun.errors import notice
from capsrun.models.fast.derivatives import only_first
from capsrun.models.fast.native import address, load_library

SOURCE = Path(__file__).with_suffix(".cpp")
# A thread has vectors of K and of J · D numbers for up to 16 images on its stack: with these limits
# about a megabyte. The K · J · D weights of an input capsule, read for each group of images, stay
# in a cache.
LARGEST_INPUT, LARGEST_OUTPUT, LARGEST_WEIGHT = 1024, 2048, 2**17


def route_fused(
    inputs_BIK: Tensor, weights_IKJD: Tensor, bias_JD: Tensor | None, iterations: int, leaky: bool
) -> Tensor | None:
    """Votes (Eq. 2) and routing (Procedure 1) in one; returns v of shape (B, J, D).

    Equals `route(capsule_votes(inputs, weights), bias, iterations, leaky)` to float32 rounding, and
    has the same gradients. None, having said why once, where this machine cannot compile it or the
    kernel does not take these tensors.
    """
    tensors = [inputs_BIK, weights_IKJD] + ([] if bias_JD is None else [bias_JD])
    kernels = _kernels_for(weights_IKJD) if _are_taken(*tensors) else None
    if kernels is None:
        return None
    keep = torch.is_grad_enabled() and any(tensor.requires_grad for tensor in tensors)
    return _Route.apply(inputs_BIK, weights_IKJD, bias_JD, iterations, leaky, kernels, keep)


def squash_fused(maps_BCHW: Tensor, bias_C: Tensor, scale: float, dimensions: int) -> Tensor | None:
    """PrimaryCaps' outputs to its capsules, `squash(maps * scale + bias)`; (B, I, K).

    Input capsules are in the order of types, rows and columns. dimensions: K.
    None as in `route_fused`.
    """
    if not _are_taken(maps_BCHW, bias_C) or dimensions > LARGEST_INPUT:
        return None
    kernels = load_kernels(dimensions, 1, 1)  # for capsules of any layer above
    if kernels is None:
        return None
    return _Squash.apply(maps_BCHW, bias_C, scale, dimensions, kernels)


def _are_taken(*tensors: Tensor) -> bool:
    """Whether the kernels take these; else nothing that a user could mend: double precision, say"""
    return all(tensor.dtype == torch.float32 and tensor.device.type == "cpu" for tensor in tensors)


def _kernels_for(weights_IKJD: Tensor) -> ctypes.CDLL | None:
    """The kernels for these weights of the votes, if they are not too large."""
    _, dimensions, outputs, output_dimensions = weights_IKJD.shape
    output_size = outputs * output_dimensions
    if (
        dimensions > LARGEST_INPUT
        or output_size > LARGEST_OUTPUT
        or dimensions * output_size > LARGEST_WEIGHT
    ):
        notice(
            f"routing from {dimensions} dimensions to {outputs} capsules of {output_dimensions} is "
            "too large for the fast way, so it takes ten times longer"
        )
        return None
    return load_kernels(dimensions, outputs, output_dimensions)


class _Squash(torch.autograd.Function):
    @staticmethod
    def forward(
        ctx: Any,
        maps_BCHW: Tensor,
        bias_C: Tensor,
        scale: float,
        dimensions: int,
        kernels: ctypes.CDLL,
    ) -> Tensor:
        maps_BCHW = maps_BCHW.contiguous(memory_format=torch.channels_last)
        batch, channels, height, width = maps_BCHW.shape
        sizes = batch, height * width, channels // dimensions
        inputs_BIK = maps_BCHW.new_empty(batch, sizes[1] * sizes[2], dimensions)
        kernels.poses_forward(
            *map(address, (maps_BCHW, bias_C)),
            ctypes.c_float(scale),
            *sizes,
            torch.get_num_threads(),
            address(inputs_BIK),
        )
        ctx.save_for_backward(maps_BCHW, bias_C)
        ctx.scale, ctx.sizes, ctx.kernels = scale, sizes, kernels
        return inputs_BIK

    @staticmethod
    @only_first
    def backward(ctx: Any, *gradients: Tensor) -> tuple[Tensor | None, ...]:
        maps_BCHW, bias_C = ctx.saved_tensors
        to_inputs_BIK = gradients[0].contiguous()
        to_maps_BCHW = torch.empty_like(maps_BCHW)
        ctx.kernels.poses_backward(
            *map(address, (maps_BCHW, bias_C)),
            ctypes.c_float(ctx.scale),
            address(to_inputs_BIK),
            *ctx.sizes,
            torch.get_num_threads(),
            address(to_maps_BCHW),
        )
        return to_maps_BCHW, to_maps_BCHW.sum((0, 2, 3)) / ctx.scale, None, None, None


class _Route(torch.autograd.Function):
    @staticmethod
    def forward(
        ctx: Any,
        inputs_BIK: Tensor,
        weights_IKJD: Tensor,
        bias_JD: Tensor | None,
        iterations: int,
        leaky: bool,
        kernels: ctypes.CDLL,
        keep: bool,
    ) -> Tensor:
        """keep: keep what the backward pass needs; autograd does not tell while testing."""
        inputs_BIK, weights_IKJD = inputs_BIK.contiguous(), weights_IKJD.contiguous()
        bias_JD = None if bias_JD is None else bias_JD.contiguous()
        batch, count = inputs_BIK.shape[:2]
        outputs, dimensions = weights_IKJD.shape[2:]
        capsules_BJD = inputs_BIK.new_empty(batch, outputs, dimensions)
        sums_BRJD = couplings = None
        if keep:
            lanes = kernels.lanes()
            groups = -(-batch // lanes)
            sums_BRJD = inputs_BIK.new_empty(batch, iterations, outputs, dimensions)
            couplings = inputs_BIK.new_empty(groups, iterations - 1, count, outputs, lanes)
        kernels.route_forward(
            *map(address, (inputs_BIK, weights_IKJD, bias_JD)),
            *(batch, count, iterations, int(leaky), torch.get_num_threads()),
            *map(address, (capsules_BJD, sums_BRJD, couplings)),
        )
        ctx.save_for_backward(inputs_BIK, weights_IKJD, sums_BRJD, couplings)
        ctx.iterations, ctx.leaky, ctx.kernels = iterations, leaky, kernels
        return capsules_BJD

    @staticmethod
    @only_first
    def backward(ctx: Any, *gradients: Tensor) -> tuple[Tensor | None, ...]:
        inputs_BIK, weights_IKJD, sums_BRJD, couplings = ctx.saved_tensors
        batch, count = inputs_BIK.shape[:2]
        outputs, dimensions = weights_IKJD.shape[2:]
        to_capsules_BJD = gradients[0].contiguous()
        to_couplings = torch.empty_like(couplings)
        numbers = batch * (2 * ctx.iterations - 1) * outputs * dimensions
        terms = inputs_BIK.new_empty(numbers + ctx.kernels.lanes())
        to_inputs_BIK, to_weights_IKJD = map(torch.empty_like, (inputs_BIK, weights_IKJD))
        to_sums_BRJD = torch.empty_like(sums_BRJD)
        ctx.kernels.route_backward(
            *map(address, (inputs_BIK, weights_IKJD, sums_BRJD, couplings, to_capsules_BJD)),
            *(batch, count, ctx.iterations, int(ctx.leaky), torch.get_num_threads()),
            *map(address, (to_couplings, terms, to_inputs_BIK, to_weights_IKJD, to_sums_BRJD)),
        )
        to_bias_JD = to_sums_BRJD.sum((0, 1)) if ctx.needs_input_grad[2] else None
        return to_inputs_BIK, to_weights_IKJD, to_bias_JD, None, None, None, None


@functools.cache
def load_kernels(dimensions: int, outputs: int, output_dimensions: int) -> ctypes.CDLL | None:
    """The kernels for these sizes (K, J, D); None, having said why once, where there are none."""
    return load_library(SOURCE, f"K={dimensions}", f"J={outputs}", f"D={output_dimensions}")
