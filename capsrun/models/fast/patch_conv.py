"""A convolution of few channels on a CPU, as one matrix product over patches.

Shapes: B batch, C input channels, O output channels, H and W pixels, M kernel rows and columns,
Y and X output pixels, P = B · Y · X patches, K = C · M² + 1 numbers of a patch, rounded up.
"""

from typing import Any

import torch
from torch import Tensor
from torch.nn import functional as F

from capsrun.models.fast.derivatives import only_first

ROUNDED_TO = 32  # what bfloat16 instructions multiply at once


def patch_conv2d(images_BCHW: Tensor, weight_OCMN: Tensor, bias_O: Tensor) -> Tensor:
    """`F.conv2d(images, weight, bias)`, (B, O, Y, X), for images without a gradient.

    Computes in autocast's type where that is on. The gradients of weight and bias are one product
    with the patches of the forward pass: four times as fast as a library's convolution backward.
    """
    device, dtype = images_BCHW.device.type, images_BCHW.dtype
    if torch.is_autocast_enabled(device):
        dtype = torch.get_autocast_dtype(device)
    return _PatchConv.apply(images_BCHW.detach().to(dtype), weight_OCMN, bias_O)


class _PatchConv(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, images_BCHW: Tensor, weight_OCMN: Tensor, bias_O: Tensor) -> Tensor:
        channels, kernel_px = weight_OCMN.shape[1:3]
        patches_BYXCMN = images_BCHW.unfold(2, kernel_px, 1).unfold(3, kernel_px, 1)
        patches_BYXCMN = patches_BYXCMN.permute(0, 2, 3, 1, 4, 5)
        batch, height, width = patches_BYXCMN.shape[:3]
        used = channels * kernel_px**2
        size = -(-(used + 1) // ROUNDED_TO) * ROUNDED_TO
        patches = images_BCHW.new_zeros(batch, height, width, size)
        patches[..., :used].unflatten(3, (channels, kernel_px, kernel_px)).copy_(patches_BYXCMN)
        patches[..., used] = 1  # the bias's factor
        patches_PK = patches.flatten(0, 2)
        weight_OK = F.pad(
            torch.cat([weight_OCMN.flatten(1), bias_O[:, None]], dim=1), (0, size - used - 1)
        )
        ctx.save_for_backward(patches_PK)
        ctx.shape, ctx.dtype = weight_OCMN.shape, weight_OCMN.dtype
        maps_PO = torch.mm(patches_PK, weight_OK.to(images_BCHW.dtype).t())
        return maps_PO.unflatten(0, (batch, height, width)).permute(0, 3, 1, 2)

    @staticmethod
    @only_first
    def backward(ctx: Any, *gradients: Tensor) -> tuple[None, Tensor, Tensor]:
        (patches_PK,) = ctx.saved_tensors
        gradient_PO = gradients[0].permute(0, 2, 3, 1).flatten(0, 2)
        both_KO = torch.mm(patches_PK.t(), gradient_PO).to(ctx.dtype)
        used = ctx.shape[1:].numel()
        to_weight = both_KO[:used].t().reshape(ctx.shape)
        return None, to_weight, both_KO[used]


def image_conv2d(images_BCHW: Tensor, weight_OCMN: Tensor, bias_O: Tensor) -> Tensor:
    """`F.conv2d(images, weight, bias)`, (B, O, Y, X), for images with a gradient, as in attacks.

    There is none for weight and bias. That of the images is a matrix product, of which each patch's
    part is added to its place. With a small CapsNet that takes a quarter off a gradient.
    """
    return _ImageConv.apply(images_BCHW, weight_OCMN, bias_O)


class _ImageConv(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, images_BCHW: Tensor, weight_OCMN: Tensor, bias_O: Tensor) -> Tensor:
        ctx.save_for_backward(weight_OCMN)
        ctx.size = images_BCHW.shape[2:]
        return F.conv2d(images_BCHW, weight_OCMN, bias_O)

    @staticmethod
    @only_first
    def backward(ctx: Any, *gradients: Tensor) -> tuple[Tensor, None, None]:
        (weight_OCMN,) = ctx.saved_tensors
        gradient_BOP = gradients[0].flatten(2)
        # In the order of a patch, whatever that of the memory is.
        patches_BKP = torch.matmul(weight_OCMN.flatten(1).t(), gradient_BOP)
        return F.fold(patches_BKP, ctx.size, weight_OCMN.shape[2:]), None, None
