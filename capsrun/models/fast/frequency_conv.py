"""ReLU and a strided convolution through discrete Fourier transforms: 4 to 6 times fewer products.

With stride S the rows and columns of maps and kernel, taken modulo S, are S² phases, and the
convolution is a sum over phases of convolutions with stride 1, of T taps an axis. On a circle of
N = G + T − 1 samples an axis these give the G outputs of an axis exactly: what wraps around reaches
only outputs that are left out. There a convolution is a product of spectra (the convolution
theorem), for each frequency one complex matrix product over phases and channels.

Here that is done by the kernels of `frequency_conv.cpp`, on a CPU.

Shapes: B batch, C input channels, O output channels, H and W pixels, M kernel rows and columns,
G output rows and columns, N samples of an axis, P phases, F frequencies.
"""

import contextlib
import ctypes
import functools
import math
import threading
from collections.abc import Iterator
from pathlib import Path
from typing import Any, NamedTuple

import torch
from torch import Tensor

from capsrun.models.fast.derivatives import only_first
from capsrun.models.fast.native import address, cpu_features, load_library

SOURCE = Path(__file__).with_suffix(".cpp")
SUFFIXES = {torch.float32: "fp32", torch.bfloat16: "bf16"}  # of the kernels, by the maps' type
MOST_SAMPLES = 32  # an axis; kernels for more take long to build, and were never measured
# With fewer images the kernel's transforms weigh more than what they save, and with fewer taps an
# axis there is little to save (`benchmarks/notes.md`).
LEAST_IN_TRAINING, LEAST_IN_TESTING, LEAST_TAPS = 4, 32, 3


class Sizes(NamedTuple):
    """What the kernels have to know of a convolution, all in pixels of an axis or counts."""

    batch: int
    px: int
    channels: int
    outputs: int
    kernel_px: int
    stride: int

    @classmethod
    def of(cls, maps_BCHW: Tensor, weight_OCMN: Tensor, stride: int) -> "Sizes":
        """Raises ValueError for maps or kernels that are not square, or maps that are too small."""
        batch, channels, *pixels = maps_BCHW.shape
        outputs, _, *kernel = weight_OCMN.shape
        if len({*pixels}) > 1 or len({*kernel}) > 1 or pixels[0] < kernel[0]:
            raise ValueError(f"maps of {pixels} pixels and a kernel of {kernel} are not square")
        return cls(batch, pixels[0], channels, outputs, kernel[0], stride)

    @property
    def grid_px(self) -> int:
        return (self.px - self.kernel_px) // self.stride + 1

    @property
    def seen_px(self) -> int:
        """Pixels of the maps that reach an output."""
        return (self.grid_px - 1) * self.stride + self.kernel_px

    @property
    def taps(self) -> int:
        """Of the kernel in a phase, at most."""
        return math.ceil(self.kernel_px / self.stride)

    @property
    def samples(self) -> int:
        return self.grid_px + self.taps - 1


def is_faster(maps_BCHW: Tensor, weight_OCMN: Tensor, stride: int) -> bool:
    """Whether these are convolved faster here than directly (in training if gradients are on).

    A rule, not a measurement, so that a run that goes on computes as it did before. What backs it
    was measured with AMX and with AVX2 alone (`benchmarks/notes.md`).
    """
    least = LEAST_IN_TRAINING if torch.is_grad_enabled() else LEAST_IN_TESTING
    sizes = Sizes.of(maps_BCHW, weight_OCMN, stride)
    enough = sizes.batch >= least and sizes.taps >= LEAST_TAPS
    return enough and "avx2" in cpu_features()


def relu_frequency_conv2d(maps_BCHW: Tensor, weight_OCMN: Tensor, stride: int) -> Tensor | None:
    """`F.conv2d(F.relu(maps), weight, stride=stride)` on a CPU, in float32; (B, O, G, G).

    Products are of the type of `maps_BCHW`, float32 or bfloat16; transforms and sums are float32.
    None where the kernels cannot be built (which is said once), or do not take these tensors.
    """
    sizes = Sizes.of(maps_BCHW, weight_OCMN, stride)
    if (
        maps_BCHW.dtype not in SUFFIXES
        or weight_OCMN.dtype != torch.float32
        or sizes.samples > MOST_SAMPLES
    ):
        return None
    kernels = load_kernels(sizes.samples, sizes.taps)
    if kernels is None:
        return None
    seen_BCHW = maps_BCHW[..., : sizes.seen_px, : sizes.seen_px]
    return _ReluFrequencyConv.apply(seen_BCHW, weight_OCMN, stride, kernels)


class _ReluFrequencyConv(torch.autograd.Function):
    @staticmethod
    def forward(
        ctx: Any, maps_BCHW: Tensor, weight_OCMN: Tensor, stride: int, kernels: ctypes.CDLL
    ) -> Tensor:
        maps_BCHW = maps_BCHW.contiguous(memory_format=torch.channels_last)
        sizes = Sizes.of(maps_BCHW, weight_OCMN, stride)
        outputs = maps_BCHW.new_empty(
            (sizes.batch, sizes.grid_px, sizes.grid_px, sizes.outputs), dtype=torch.float32
        )
        ctx.save_for_backward(maps_BCHW, weight_OCMN)
        ctx.sizes, ctx.kernels = sizes, kernels
        ctx.written = _transform(maps_BCHW, weight_OCMN, sizes, kernels, outputs)
        return outputs.permute(0, 3, 1, 2)

    @staticmethod
    @only_first
    def backward(ctx: Any, *gradients: Tensor) -> tuple[Tensor, Tensor, None, None]:
        maps_BCHW, weight_OCMN = ctx.saved_tensors
        sizes, kernels, buffers = ctx.sizes, ctx.kernels, _buffers
        if buffers.written is not ctx.written:  # another batch came between
            ctx.written = _transform(maps_BCHW, weight_OCMN, sizes, kernels, None)
        gradient = gradients[0].float().contiguous(memory_format=torch.channels_last)
        to_maps = torch.empty_like(maps_BCHW)
        to_weight = torch.empty_like(weight_OCMN, memory_format=torch.channels_last)
        batch, outputs, depth = _blocks(sizes, kernels.lanes())
        size, dtype = kernels.matrix_size, maps_BCHW.dtype
        products = max(size(batch, depth), size(outputs, depth))
        getattr(kernels, f"backward_{SUFFIXES[dtype]}")(
            address(gradient),
            buffers.take("masks", 0, torch.int16),
            *sizes,
            torch.get_num_threads(),
            *(buffers.take(name, 0, dtype) for name in ("maps", "weight")),
            buffers.take("gradient", size(batch, 2 * outputs), dtype),
            buffers.take("adjoint gradient", size(outputs, 2 * batch), dtype),
            buffers.take("products", products, dtype),
            *map(address, (to_maps, to_weight)),
        )
        return to_maps, to_weight, None, None


def _transform(
    maps_BCHW: Tensor,
    weight_OCMN: Tensor,
    sizes: Sizes,
    kernels: ctypes.CDLL,
    outputs_BGGO: Tensor | None,
) -> object:
    """Write the spectra of maps and kernel, and the outputs when asked; returns a mark of these."""
    buffers, dtype = _buffers, maps_BCHW.dtype
    batch, outputs, depth = _blocks(sizes, kernels.lanes())
    # Tensors of inference mode do not count their changes.
    version = object() if weight_OCMN.is_inference() else weight_OCMN._version
    weight = (weight_OCMN.data_ptr(), version, sizes[2:], sizes.samples, dtype)
    known = buffers.weights_stay and buffers.weight == weight
    buffers.weight = buffers.written = None  # until all of it is there
    kernel = weight_OCMN.contiguous(memory_format=torch.channels_last)
    getattr(kernels, f"forward_{SUFFIXES[dtype]}")(
        *map(address, (maps_BCHW, kernel)),
        *sizes,
        int(not known),
        torch.get_num_threads(),
        buffers.take("masks", kernels.lanes() * batch * depth * sizes.samples**2, torch.int16),
        buffers.take("maps", kernels.matrix_size(batch, depth), dtype),
        buffers.take("weight", kernels.matrix_size(outputs, depth), dtype),
        buffers.take("outputs", kernels.matrix_size(batch, outputs), torch.float32),
        address(outputs_BGGO),
    )
    buffers.weight, buffers.written = weight, object()
    return buffers.written


def _blocks(sizes: Sizes, lanes: int) -> tuple[int, int, int]:
    """Vectors of so many lanes that hold the batch, the outputs, and channels and phases."""
    batch, outputs, channels = (
        -(-count // lanes) for count in (sizes.batch, sizes.outputs, sizes.channels)
    )
    return batch, outputs, sizes.stride**2 * channels


class _Buffers(threading.local):
    """Memory for spectra, taken once: pages that are new in each step cost as much as the products.

    The last batch's spectra are there for its backward pass; `written` says whose they are.
    """

    def __init__(self) -> None:
        self.memory: dict[str, Tensor] = {}
        self.written: object = None
        self.weight: object = None
        self.weights_stay = False

    def take(self, name: str, count: int, dtype: torch.dtype) -> ctypes.c_void_p:
        """The address of memory for so many numbers, which keeps what is in it if it is enough."""
        size = count * dtype.itemsize
        if name not in self.memory or self.memory[name].numel() < size:
            self.memory.pop(name, None)
            self.memory[name] = torch.empty(size, dtype=torch.uint8)
        return address(self.memory[name])


_buffers = _Buffers()


@contextlib.contextmanager
def weights_stay() -> Iterator[None]:
    """Within this, a kernel that was just transformed is not transformed again.

    For testing, where nothing changes weights; a change that goes around PyTorch's count of them
    (`weight.data`) would not be seen. One kernel is remembered, not each of several networks'.
    """
    before = _buffers.weights_stay
    _buffers.weight, _buffers.weights_stay = None, True
    try:
        yield
    finally:
        _buffers.weights_stay = before


@functools.cache
def load_kernels(samples: int, taps: int) -> ctypes.CDLL | None:
    """The kernels for N samples and T taps; None, having said why once, where there are none."""
    macros = f"N={samples}", f"T={taps}"
    kernels = load_library(SOURCE, *macros)
    if kernels is not None and not kernels.ready():  # Linux does not lend the tile registers
        kernels = load_library(SOURCE, *macros, "NO_AMX")
    if kernels is not None:
        kernels.matrix_size.restype = ctypes.c_size_t
    return kernels
