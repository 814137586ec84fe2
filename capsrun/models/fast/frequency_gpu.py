"""A strided convolution in the frequency domain by PyTorch's operations, meant for GPUs.

How fast that is on a GPU was never measured: there a run tries it when training starts, see
`training/graph.py`. The algebra, and the shapes, are those of `frequency_conv.py`.
"""

import torch
from torch import Tensor
from torch.nn import functional as F

from capsrun.models.fast.frequency_conv import Sizes


def frequency_conv2d(maps_BCHW: Tensor, weight_OCMN: Tensor, stride: int) -> Tensor:
    """`F.conv2d(maps, weight, stride=stride)` by the convolution theorem; (B, O, G, G).

    Square maps and kernels. Products are computed in the type of `maps_BCHW`, transforms in float32
    at least; differentiable.
    """
    sizes = Sizes.of(maps_BCHW, weight_OCMN, stride)
    exact = torch.promote_types(maps_BCHW.dtype, torch.float32)
    spectra = []
    for samples, pixels in ((maps_BCHW, sizes.seen_px), (weight_OCMN, sizes.kernel_px)):
        phases = _phases(samples[..., :pixels, :pixels].to(exact), stride, sizes.samples)
        spectra.append(torch.fft.rfft2(phases).permute(3, 4, 0, 1, 2).flatten(3).flatten(0, 1))
    maps_FBK, weight_FOK = spectra
    # A complex product as a real one: [re, im] · [re, im]ᵀ is the real part of x · conj(w).
    maps, weight = torch.view_as_real(maps_FBK), torch.view_as_real(weight_FOK)
    turned = torch.stack([-weight[..., 1], weight[..., 0]], dim=-1)  # by i, for the imaginary part
    right = torch.cat([weight, turned], dim=1).flatten(2).to(maps_BCHW.dtype)
    products = torch.bmm(maps.flatten(2).to(maps_BCHW.dtype), right.transpose(1, 2)).to(exact)
    spectrum_FBO = torch.complex(*products.chunk(2, dim=2))
    spectrum = spectrum_FBO.unflatten(0, (sizes.samples, -1)).permute(2, 3, 0, 1)
    outputs = torch.fft.irfft2(spectrum, s=(sizes.samples, sizes.samples))
    return outputs[..., : sizes.grid_px, : sizes.grid_px].to(maps_BCHW.dtype)


def _phases(images_BCHW: Tensor, stride: int, samples: int) -> Tensor:
    """(B, C, H, W) to (B, P, C, N, N), with zeros where a phase has fewer samples."""
    missing = stride * samples - images_BCHW.shape[-1]
    padded = F.pad(images_BCHW, (0, missing, 0, missing))
    phases = padded.unflatten(3, (samples, stride)).unflatten(2, (samples, stride))
    return phases.permute(0, 3, 5, 1, 2, 4).flatten(1, 2)
