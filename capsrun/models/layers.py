"""The layers of CapsNet (§4), to be stacked with each other and with PyTorch's own.

Shapes: B batch, C channels, H and W pixels, I input capsules, J output capsules, K input dimension,
D output dimension, T digits in one image.
"""

import abc
import itertools
import math
from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn import functional as F

from capsrun.experiments import defaults
from capsrun.model_config import (
    CapsNetConfig,
    CapsuleModelConfig,
    DynamicRoutingConfig,
    RoutingConfig,
)
from capsrun.models import fast
from capsrun.models.initialisation import initialise_as_authors
from capsrun.models.inputs import (
    check_capsules,
    check_choice,
    check_labels,
    check_maps,
    check_positive,
    check_sizes,
    one_or_several,
)
from capsrun.models.routing import RoutingIteration, squash

PRIMARY_STRIDE = 2
"""Of the convolution of PrimaryCaps (§4)."""


def capsnet_config() -> CapsNetConfig:
    """The layers' values where none are said: those of `configs/model/capsnet.yaml`."""
    model = defaults().model
    assert isinstance(model, CapsNetConfig)
    return model


def routing_config() -> DynamicRoutingConfig:
    """And those of the routing."""
    routing = defaults().routing
    assert isinstance(routing, DynamicRoutingConfig)
    return routing


def same_padding(size_px: int, kernel_px: int, stride: int) -> tuple[int, int]:
    """Zeros before and after, so that ⌈size / stride⌉ places result, as TensorFlow has it."""
    places = -(-size_px // stride)
    total = max((places - 1) * stride + kernel_px - size_px, 0)
    return total // 2, total - total // 2


def convolved(
    size_px: int, kernel_px: int, stride: int, padding: str
) -> tuple[tuple[int, int], int]:
    """The zeros before and after an axis, and how many places a convolution has along it.

    padding: `valid` or `same`. Fewer than 1 place: the axis is too short.
    """
    pads = same_padding(size_px, kernel_px, stride) if padding == "same" else (0, 0)
    return pads, (size_px + sum(pads) - kernel_px) // stride + 1


def padded(maps_BCHW: Tensor, rows: tuple[int, int], columns: tuple[int, int]) -> Tensor:
    """Maps with so many rows and columns of zeros before and after."""
    return F.pad(maps_BCHW, (*columns, *rows)) if any(rows + columns) else maps_BCHW


def primary_scale(how: str, types: int, leaky: bool) -> float:
    """What the PrimaryCaps convolution is multiplied by, before its bias: `authors` or `one`.

    Paper: no such factor. The authors' code sends the convolution through one routing iteration, a
    softmax over the capsule types of zero logits: with 32 types 1/32, and 1/33 with leaky routing,
    whose extra logit takes an equal share.
    """
    return 1.0 if how == "one" else 1 / (types + leaky)


class Layer:
    """What the layers have in common."""

    fast = True
    """Whether to compute with the kernels of `models/fast/` on a CPU: the same numbers, to
    rounding. They are compiled when first used, which takes a C++ compiler and a second or two, and
    have no second derivatives. What `torch.compile` or `torch.export` traces, and `torch.func`
    transforms, is computed by PyTorch's operations in any case."""
    triton = frequency = False
    """Whether a GPU computes by Triton's kernels, and in the frequency domain."""
    initialisation = "pytorch"  # while PyTorch makes its part of a layer

    reset_parameters: Callable[[], None]

    def _initialise(self, initialisation: str | None) -> None:
        """Draw the weights, which were drawn as PyTorch does, as is said, or in `configs/`."""
        how = initialisation or capsnet_config().initialisation
        check_choice("initialisation", how, "authors", "pytorch")
        self.initialisation = how
        if how != "pytorch":
            self.reset_parameters()


def take(network: nn.Module, **ways: bool) -> None:
    """Have all layers of a network compute in these ways: `fast`, `triton`, `frequency`.

    >>> import capsrun
    >>> model = capsrun.CapsNet()
    >>> take(model, fast=False)
    >>> model.primarycaps.fast, model.digitcaps.fast
    (False, False)
    """
    for module in network.modules():
        if isinstance(module, Layer):
            for name, value in ways.items():
                setattr(module, name, value)


class PrimaryCaps(Layer, nn.Conv2d):
    """The first capsules (§4): a convolution whose channels are grouped into vectors, and squashed.

    Takes maps (B, C, H, W) and returns capsules u (B, I, K), ordered (type, row, column); the K
    numbers of a capsule are K channels at one place. Its parameters are those of the convolution.

    channels: C. types: how many capsules there are at each place. output_dim: K. kernel_px, stride,
    padding (`valid`, or `same` for zeros around): of the convolution. scale: what it is multiplied
    by before its bias is added; see `primary_scale`. relu: the ReLU of the layer before is computed
    here, in one with the convolution, so that all maps below 0 count as 0 (a ReLU before it changes
    nothing); False: maps of either sign are convolved, by PyTorch. squashed: False: the capsules
    are the K numbers as they are. initialisation: `authors` (truncated normal, σ = 0.1, biases 0.1)
    or `pytorch`. What is None is as `configs/model/capsnet.yaml` has it.
    Raises ValueError for sizes below 1, and maps of another shape or type.

    >>> import capsrun, torch
    >>> layer = capsrun.PrimaryCaps(channels=64)
    >>> layer.types, layer.output_dim, layer.kernel_size, layer.stride, layer.scale
    (32, 8, (9, 9), (2, 2), 0.03125)
    >>> layer(torch.rand(2, 64, 20, 20)).shape
    torch.Size([2, 1152, 8])
    >>> layer.count(20), layer.count((20, 12))  # capsules of maps of 20×20, of 20×12
    (1152, 384)
    """

    def __init__(
        self,
        channels: int,
        types: int | None = None,
        output_dim: int | None = None,
        kernel_px: int | None = None,
        stride: int = PRIMARY_STRIDE,
        padding: str | None = None,
        *,
        scale: float | None = None,
        relu: bool = True,
        squashed: bool = True,
        initialisation: str | None = None,
    ) -> None:
        values = capsnet_config()
        types = values.primary_types if types is None else types
        output_dim = values.primary_dimensions if output_dim is None else output_dim
        kernel_px = values.kernel_px if kernel_px is None else kernel_px
        sizes = {"channels": channels, "types": types, "output_dim": output_dim}
        check_sizes(**sizes, kernel_px=kernel_px, stride=stride)
        super().__init__(channels, types * output_dim, kernel_px, stride)
        self.types, self.output_dim, self.relu, self.squashed = types, output_dim, relu, squashed
        self.zeros = values.padding if padding is None else padding
        check_choice("padding", self.zeros, "valid", "same")
        if scale is None:
            scale = primary_scale(values.primary_scale, types, routing_config().leaky)
        check_positive("scale", scale)
        self.scale = float(scale)
        self._initialise(initialisation)

    def reset_parameters(self) -> None:
        """Draw new weights from torch's global generator, as `initialisation` says."""
        if self.initialisation == "authors":
            initialise_as_authors(self)
        else:
            super().reset_parameters()

    def extra_repr(self) -> str:
        """What PyTorch shows of it."""
        sizes = f"{self.in_channels}, types={self.types}, output_dim={self.output_dim}, "
        sizes += f"kernel_px={self.kernel_size[0]}, stride={self.stride[0]}, padding={self.zeros}"
        return f"{sizes}, scale={self.scale:.4g}, relu={self.relu}, squashed={self.squashed}"

    def _grid(self, *sizes_px: int) -> list[tuple[tuple[int, int], int]]:
        """See `convolved`, for each axis. Raises ValueError for maps that are too small."""
        kernel_px, stride = self.kernel_size[0], self.stride[0]
        grid = [convolved(size, kernel_px, stride, self.zeros) for size in sizes_px]
        if min(places for _, places in grid) < 1:
            found = "×".join(map(str, sizes_px))
            raise ValueError(f"maps of {found} are too small for a {kernel_px}×{kernel_px} kernel")
        return grid

    def count(self, maps_px: int | tuple[int, int]) -> int:
        """How many capsules maps of so many pixels become: I, `inputs` of the layer that follows.

        maps_px: their height and width, or one number for both.
        """
        height, width = height_and_width("maps_px", maps_px)
        return self.types * math.prod(places for _, places in self._grid(height, width))

    def forward(self, maps_BCHW: Tensor) -> Tensor:
        """Maps (B, C, H, W) to capsules u (B, I, K)."""
        check_maps(maps_BCHW, self.in_channels, self.weight)
        (rows, _), (columns, _) = self._grid(*maps_BCHW.shape[2:])
        maps, stride = padded(maps_BCHW, rows, columns), self.stride[0]
        if self.relu:
            maps = fast.relu_conv2d(maps, self.weight, stride, self.fast, self.frequency)
        else:
            maps = F.conv2d(maps, self.weight, stride=stride)
        # Capsules compute in the precision of their weights (float32), whatever autocast does.
        maps = maps.to(self.weight.dtype)
        bias = self.bias
        assert bias is not None
        if self.fast and self.squashed:
            poses_BIK = fast.primary_capsules(maps, bias, self.scale, self.output_dim)
            if poses_BIK is not None:
                return poses_BIK
        maps = maps * self.scale + bias[:, None, None]
        maps_BTKHW = maps.unflatten(1, (self.types, self.output_dim))
        capsules_BIK = maps_BTKHW.permute(0, 1, 3, 4, 2).flatten(1, 3)
        return squash(capsules_BIK) if self.squashed else capsules_BIK


class RoutedLayer(Layer, nn.Module, abc.ABC):
    """What layers of capsules have in common to which those of the layer below are routed.

    One of them says how by `route`, and may be in `ROUTINGS`; the class capsules of a network are
    then such a layer where `routing.algorithm` says so. The lengths of its capsules are in [0, 1].
    """

    takes_activations = False
    """Whether a capsule below tells by its last number how sure it is that what it stands for is
    there (the logit of that), and its pose by the others; else the length of its K numbers does."""

    def __init__(self, inputs: int, input_dim: int, outputs: int, output_dim: int) -> None:
        """I, K (with the activation), J, D. Raises ValueError for sizes below 1."""
        check_sizes(inputs=inputs, input_dim=input_dim, outputs=outputs, output_dim=output_dim)
        super().__init__()
        self.inputs, self.input_dim = inputs, input_dim
        self.outputs, self.output_dim = outputs, output_dim
        self.routing: RoutingConfig

    @classmethod
    def from_config(
        cls, routing: Any, model: CapsuleModelConfig, inputs: int, classes: int
    ) -> "RoutedLayer":
        """The class capsules of a network, as its settings and those of the routing say."""
        layer = cls(inputs, model.primary_dimensions, classes, model.digit_dimensions)
        layer.routing = routing
        return layer

    @torch.no_grad()
    def reset_parameters(self) -> None:
        """Draw new weights from torch's global generator, as `initialisation` says."""
        if self.initialisation == "authors":
            initialise_as_authors(self)
            return
        bound = 1 / math.sqrt(self.input_dim)
        for name, parameter in self.named_parameters():
            if name.endswith("bias"):
                parameter.zero_()
            else:
                parameter.uniform_(-bound, bound)

    @abc.abstractmethod
    def route(self, capsules_BIK: Tensor, history: list[RoutingIteration] | None) -> Tensor:
        """Capsules u (B, I, K), in the precision of the weights, to v (B, J, D)."""

    def fused(self, capsules_BIK: Tensor) -> Tensor | None:
        """The same, to rounding, by a kernel that is faster; None where there is none."""
        return None

    def activations(self, capsules_BIK: Tensor) -> Tensor:
        """How sure each of the capsules below is, (B, I), in [0, 1]."""
        if self.takes_activations:
            return capsules_BIK[:, :, -1].sigmoid()
        return torch.linalg.vector_norm(capsules_BIK, dim=2)

    def forward(
        self, capsules_BIK: Tensor, history: list[RoutingIteration] | None = None
    ) -> Tensor:
        """Input capsules u (B, I, K) to capsules v (B, J, D), in the precision of the weights.

        history: a list to which each iteration appends what it computed; it changes no result.
        Raises ValueError for capsules of another shape or type.
        """
        weight = next(self.parameters())
        check_capsules(capsules_BIK, self.inputs, self.input_dim, weight)
        with fast.without_autocast(capsules_BIK.device):
            capsules_BIK = capsules_BIK.to(weight.dtype)
            if self.fast and history is None:
                capsules_BJD = self.fused(capsules_BIK)
                if capsules_BJD is not None:
                    return capsules_BJD
            return fast.in_pieces(self.route, capsules_BIK, history)


def with_length(poses: Tensor, lengths: Tensor) -> Tensor:
    """Vectors (…, D) in the same directions, of the lengths (…), as class capsules have them."""
    return F.normalize(poses, dim=-1) * lengths[..., None]


class Decoder(Layer, nn.Sequential):
    """Draws an image from one of its capsules (§4.1, figure 2): fully connected layers.

    Takes capsules v (B, J, D) and the classes to be drawn, whose capsules it sees, all others being
    set to 0: labels (B,), or (B, T) for T images of each, one a class. Returns images (B, C, H, W)
    or (B, T, C, H, W) with pixels in [0, 1].

    inputs: J. input_dim: D. image_px: height and width of the images, or one number for both.
    channels: C. widths: of the hidden layers; None, and so for `initialisation`: as
    `configs/model/capsnet.yaml` has it.
    Raises ValueError for sizes below 1, and capsules and labels of another shape or type.

    >>> import capsrun, torch
    >>> decoder = capsrun.Decoder(inputs=10, input_dim=16, image_px=28)
    >>> capsules, labels = torch.rand(2, 10, 16) / 4, torch.tensor([3, 5])
    >>> decoder(capsules, labels).shape
    torch.Size([2, 1, 28, 28])
    >>> decoder(capsules, torch.tensor([[3, 4], [5, 0]])).shape
    torch.Size([2, 2, 1, 28, 28])
    """

    def __init__(
        self,
        inputs: int,
        input_dim: int,
        image_px: int | tuple[int, int],
        channels: int = 1,
        widths: list[int] | None = None,
        *,
        initialisation: str | None = None,
    ) -> None:
        hidden = capsnet_config().decoder_widths if widths is None else list(widths)
        shape = channels, *height_and_width("image_px", image_px)
        check_sizes(inputs=inputs, input_dim=input_dim, channels=channels)
        check_sizes(**{f"widths[{number}]": width for number, width in enumerate(hidden)})
        widths = [inputs * input_dim, *hidden]
        layers: list[nn.Module] = []
        for width_in, width_out in itertools.pairwise(widths):
            layers += [nn.Linear(width_in, width_out), nn.ReLU()]
        super().__init__(*layers, nn.Linear(widths[-1], math.prod(shape)), nn.Sigmoid())
        self.inputs, self.input_dim, self.shape = inputs, input_dim, shape
        self._initialise(initialisation)

    def __getitem__(self, index: Any) -> Any:
        """One of the layers, or some of them, which are no decoder."""
        return nn.Sequential(*self)[index]

    def reset_parameters(self) -> None:
        """Draw new weights from torch's global generator, as `initialisation` says."""
        if self.initialisation == "authors":
            initialise_as_authors(self)
            return
        for layer in self:
            if isinstance(layer, nn.Linear):
                layer.reset_parameters()

    def forward(  # type: ignore[override]  # two arguments
        self, capsules_BJD: Tensor, labels: Tensor
    ) -> Tensor:
        """Draw the classes `labels`, (B,) or (B, T), each from its capsule alone."""
        check_capsules(capsules_BJD, self.inputs, self.input_dim, self[0].weight)
        labels_BT = one_or_several(labels)
        check_labels(labels_BT, capsules_BJD.shape[0], self.inputs, capsules_BJD)
        drawn = [self._draw(capsules_BJD, labels_B) for labels_B in labels_BT.unbind(1)]
        return torch.stack(drawn, dim=1) if labels.dim() == 2 else drawn[0]

    def _draw(self, capsules_BJD: Tensor, labels_B: Tensor) -> Tensor:
        mask_BJ = F.one_hot(labels_B, self.inputs).to(capsules_BJD.dtype)
        pixels = super().forward((capsules_BJD * mask_BJ[..., None]).flatten(1))
        return pixels.to(capsules_BJD.dtype).unflatten(1, self.shape)


def height_and_width(name: str, px: int | tuple[int, int]) -> tuple[int, int]:
    """Both of them, of which one number stands for two. Raises ValueError for other sizes."""
    height, width = px if isinstance(px, tuple | list) and len(px) == 2 else (px, px)
    check_sizes(**{name: height})
    check_sizes(**{name: width})
    return height, width
