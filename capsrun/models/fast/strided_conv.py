"""ReLU and a strided convolution, whose backward pass on a CPU is made of forward convolutions.

Shapes: B batch, C input channels, O output channels, H and W pixels, Y and X output pixels,
M kernel rows, N kernel columns.
"""

from typing import Any

import torch
from torch import Tensor
from torch.nn import functional as F

from capsrun.models.fast.derivatives import only_first


def relu_strided_conv2d(maps_BCHW: Tensor, weight_OCMN: Tensor, stride: int) -> Tensor:
    """`F.conv2d(F.relu(maps), weight, stride=stride)` with a faster backward pass; (B, O, Y, X).

    Computes in the type of `maps_BCHW`, and returns the weight's gradient in the weight's own.

    The two gradients of a strided convolution are convolutions again, and CPU libraries run those
    as fast as matrix products, which their own backward pass of a strided convolution is not.
    """
    return _ReluStridedConv.apply(maps_BCHW, weight_OCMN, stride)


class _ReluStridedConv(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, maps_BCHW: Tensor, weight_OCMN: Tensor, stride: int) -> Tensor:
        features_BCHW = F.relu(maps_BCHW).contiguous(memory_format=torch.channels_last)
        kernel_OCMN = weight_OCMN.to(maps_BCHW.dtype, memory_format=torch.channels_last)
        ctx.save_for_backward(features_BCHW, kernel_OCMN, weight_OCMN)
        ctx.stride = stride
        return F.conv2d(features_BCHW, kernel_OCMN, stride=stride)

    @staticmethod
    @only_first
    def backward(ctx: Any, *gradients: Tensor) -> tuple[Tensor, Tensor, None]:
        features_BCHW, kernel_OCMN, weight_OCMN = ctx.saved_tensors
        gradient_BOYX = gradients[0].contiguous(memory_format=torch.channels_last)
        to_maps = maps_gradient(gradient_BOYX, kernel_OCMN, features_BCHW, ctx.stride)
        to_weight = weight_gradient(gradient_BOYX, features_BCHW, weight_OCMN, ctx.stride)
        return to_maps, to_weight, None


def maps_gradient(
    gradient_BOYX: Tensor, kernel_OCMN: Tensor, features_BCHW: Tensor, stride: int
) -> Tensor:
    """Gradient with respect to what goes into the ReLU, (B, C, H, W); it is 0 where that is.

    Pixels whose row and column leave the same remainders after division by the stride have met the
    same kernel elements. Each of these stride² sets is a transposed convolution with stride 1.
    """
    result_BCHW = torch.empty_like(features_BCHW)
    for row in range(stride):
        for column in range(stride):
            part_OCMN = kernel_OCMN[:, :, row::stride, column::stride]
            target_BCHW = result_BCHW[:, :, row::stride, column::stride]
            if part_OCMN.numel() == 0:  # the kernel is smaller than the stride
                target_BCHW.zero_()
                continue
            part_OCMN = part_OCMN.contiguous(memory_format=torch.channels_last)
            part_BCHW = F.conv_transpose2d(gradient_BOYX, part_OCMN)
            height, width = part_BCHW.shape[2:]
            target_BCHW[:, :, :height, :width] = part_BCHW
            # Pixels beyond the last place of the kernel have met nothing.
            target_BCHW[:, :, height:].zero_()
            target_BCHW[:, :, :, width:].zero_()
    torch.ops.aten.threshold_backward.grad_input(
        result_BCHW, features_BCHW, 0, grad_input=result_BCHW
    )
    return result_BCHW


def weight_gradient(
    gradient_BOYX: Tensor, features_BCHW: Tensor, weight_OCMN: Tensor, stride: int
) -> Tensor:
    """Gradient with respect to the weight, in its type and memory order.

    The sum over the batch and the output pixels is a convolution of the features with the gradient
    as the kernel, dilated by the stride, in which batch and channels have changed places.
    """
    height, width = (
        (pixels - 1) * stride + kernel
        for pixels, kernel in zip(gradient_BOYX.shape[2:], weight_OCMN.shape[2:])
    )
    features_CBHW = features_BCHW[:, :, :height, :width].transpose(0, 1)
    result_COMN = F.conv2d(
        features_CBHW.contiguous(memory_format=torch.channels_last),
        gradient_BOYX.transpose(0, 1).contiguous(memory_format=torch.channels_last),
        dilation=stride,
    )
    return torch.empty_like(weight_OCMN).copy_(result_COMN.transpose(0, 1))
