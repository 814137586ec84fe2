"""CapsNet: two convolutions, one layer of routed capsules, and a decoder (§4 of the paper).

Shapes: B batch, C channels, H and W pixels, I input capsules, J output capsules (classes),
K input dimension, D output dimension, T digits in one image.
"""

import itertools
import math
from collections.abc import Callable
from typing import NamedTuple

import torch
from torch import Tensor, nn
from torch.nn import functional as F

from capsrun.config import CapsNetConfig, RoutingConfig
from capsrun.models.fast import frequency_conv, routing_cpu
from capsrun.models.fast.patch_conv import patch_conv2d
from capsrun.models.fast.strided_conv import relu_strided_conv2d
from capsrun.models.initialisation import initialise_as_authors
from capsrun.models.routing import RoutingIteration, capsule_votes, route, squash

# Images do not depend on each other, and the votes of this many stay in a processor's cache while
# they are routed: less than half the time of routing a batch of 128 as a whole.
ROUTED_AT_ONCE_ON_CPU = 8


class CapsNetOutput(NamedTuple):
    """What CapsNet says about a batch."""

    capsules_BJD: Tensor
    """v_j: one vector a class."""
    lengths_BJ: Tensor
    """‖v_j‖ in [0, 1): how sure the network is that class j is present."""
    reconstructions_BTCHW: Tensor | None
    """What the decoder draws for each asked-for class, pixels in [0, 1]; None when not asked."""

    @property
    def scores_BJ(self) -> Tensor:
        """How much each class is seen in each image, in [0, 1): the lengths."""
        return self.lengths_BJ


def same_padding(size_px: int, kernel_px: int, stride: int) -> tuple[int, int]:
    """Zeros before and after, so that ⌈size / stride⌉ places result, as TensorFlow has it."""
    places = -(-size_px // stride)
    total = max((places - 1) * stride + kernel_px - size_px, 0)
    return total // 2, total - total // 2


class CapsNet(nn.Module):
    """The network of §4, in the authors' variant or the paper's, as `config` and `routing` say.

    Takes square images of `image_px` pixels with `channels` channels and tells `classes` classes
    apart. A call takes images (B, C, H, W) with pixels in [0, 1] and, for reconstructions, the
    labels (B, T) whose capsules are to be drawn; see `forward` and `CapsNetOutput`.
    config, routing: of `capsrun.training_config(…)`; every value and its source in the paper is in
    `configs/model/capsnet.yaml`. Weights are drawn from torch's global generator.
    Raises ValueError when the image is too small for the two convolutions.

    >>> import capsrun, torch
    >>> config = capsrun.training_config()
    >>> model = capsrun.CapsNet(config.model, config.routing, image_px=28)
    >>> sum(weights.numel() for weights in model.parameters())
    8215728
    >>> output = model(torch.rand(2, 1, 28, 28), labels_BT=torch.tensor([[3], [5]]))
    >>> output.lengths_BJ.shape, output.capsules_BJD.shape
    (torch.Size([2, 10]), torch.Size([2, 10, 16]))
    >>> output.reconstructions_BTCHW.shape
    torch.Size([2, 1, 1, 28, 28])
    """

    fast = False
    """Whether to compute the same numbers, to rounding, in the fastest way that is known here."""
    direct = False
    """Whether a fast network on a CPU convolves directly all the same, and makes its capsules with
    PyTorch's operations; `capsrun bench` compares with this."""
    frequency = False
    """Whether PrimaryCaps is `frequency_conv2d` of PyTorch's operations in training: on a GPU if it
    is faster there, which was not measured yet."""
    triton = False
    """Whether a fast network routes with Triton kernels on a GPU, not with PyTorch's operations."""

    def __init__(
        self,
        config: CapsNetConfig,
        routing: RoutingConfig,
        image_px: int,
        channels: int = 1,
        classes: int = 10,
    ) -> None:
        super().__init__()
        kernel_px = config.kernel_px
        self.conv1_pads = self.primary_pads = (0, 0)
        if config.padding == "same":
            self.conv1_pads = same_padding(image_px, kernel_px, 1)
            self.primary_pads = same_padding(image_px, kernel_px, 2)
        conv1_px = image_px + sum(self.conv1_pads) - kernel_px + 1
        grid_px = (conv1_px + sum(self.primary_pads) - kernel_px) // 2 + 1
        if grid_px < 1:
            raise ValueError(
                f"images of {image_px} px are too small for two {kernel_px}×"
                f"{kernel_px} convolutions: at least {2 * kernel_px - 1} px"
            )
        self.config, self.routing = config, routing
        self.image_px, self.channels, self.classes = image_px, channels, classes
        self.primary_capsules = config.primary_types * grid_px**2
        # Where the stride does not come out even, the last row and column reach no capsule.
        padded = sum(self.conv1_pads) + sum(self.primary_pads)
        self.seen_px = min(2 * (grid_px - 1) + 2 * kernel_px - 1 - padded, image_px)

        self.conv1 = nn.Conv2d(channels, config.conv1_channels, config.kernel_px)
        self.primarycaps = nn.Conv2d(
            config.conv1_channels,
            config.primary_types * config.primary_dimensions,
            config.kernel_px,
            stride=2,
        )
        self.digitcaps_weight = nn.Parameter(
            torch.empty(
                self.primary_capsules, config.primary_dimensions, classes, config.digit_dimensions
            )
        )
        self.digitcaps_bias = (
            nn.Parameter(torch.empty(classes, config.digit_dimensions))
            if config.digit_bias
            else None
        )
        self.decoder = self._make_decoder() if config.reconstruction else None
        self.reset_parameters()

    def _make_decoder(self) -> nn.Sequential:
        """§4.1 and figure 2: the masked capsules through fully connected layers to pixels."""
        widths = [self.classes * self.config.digit_dimensions, *self.config.decoder_widths]
        layers: list[nn.Module] = []
        for width_in, width_out in itertools.pairwise(widths):
            layers += [nn.Linear(width_in, width_out), nn.ReLU()]
        layers += [nn.Linear(widths[-1], self.channels * self.image_px**2), nn.Sigmoid()]
        return nn.Sequential(*layers)

    @torch.no_grad()
    def reset_parameters(self) -> None:
        """Draw new weights from torch's global generator, as `config.initialisation` says.

        `authors`: see `initialise_as_authors`, σ = 0.05 in Conv1. `pytorch`: each layer's default,
        and for DigitCaps the same rule, uniform within ±1/√K, with a zero bias.
        """
        if self.config.initialisation == "authors":
            initialise_as_authors(self, narrow="conv1.")
            return
        for module in self.modules():
            if isinstance(module, nn.Conv2d | nn.Linear):
                module.reset_parameters()
        bound = 1 / math.sqrt(self.config.primary_dimensions)
        self.digitcaps_weight.uniform_(-bound, bound)
        if self.digitcaps_bias is not None:
            self.digitcaps_bias.zero_()

    def primary_poses(self, images_BCHW: Tensor) -> Tensor:
        """Images with pixels in [0, 1] to PrimaryCaps outputs u of shape (B, I, K), squashed.

        Input capsules are ordered (type, row, column), and the K numbers of a capsule are K
        channels at one place of the grid.
        """
        seen_BCHW = images_BCHW[..., : self.seen_px, : self.seen_px]
        if self.config.padding == "same":
            maps = F.pad(self._conv1(F.pad(seen_BCHW, 2 * self.conv1_pads)), 2 * self.primary_pads)
        else:
            maps = self._conv1(seen_BCHW)
        # Capsules compute in the precision of their weights (float32), whatever autocast does.
        maps = self._relu_primary_conv(maps).to(self.digitcaps_weight.dtype)
        bias = self.primarycaps.bias
        assert bias is not None
        if self._on_fast_cpu(maps.device) and not self.direct:
            poses = routing_cpu.squash_fused(maps, bias, self.primary_scale, self.digitcaps_weight)
            if poses is not None:
                return poses
        maps = maps * self.primary_scale + bias[:, None, None]
        maps_BTKHW = maps.unflatten(1, (self.config.primary_types, self.config.primary_dimensions))
        return squash(maps_BTKHW.permute(0, 1, 3, 4, 2).flatten(1, 3))

    def _conv1(self, images_BCHW: Tensor) -> Tensor:
        """Conv1 without its ReLU."""
        weight, bias = self.conv1.weight, self.conv1.bias
        training = (
            torch.is_grad_enabled() and weight.requires_grad and not images_BCHW.requires_grad
        )
        if training and self._on_fast_cpu(images_BCHW.device) and not self.direct:
            assert bias is not None
            return patch_conv2d(images_BCHW, weight, bias)
        return self.conv1(images_BCHW)

    def _on_fast_cpu(self, device: torch.device) -> bool:
        # What is exported consists of PyTorch's operations only.
        return self.fast and device.type == "cpu" and not torch.compiler.is_exporting()

    def _relu_primary_conv(self, maps_BCHW: Tensor) -> Tensor:
        """ReLU and the PrimaryCaps convolution, in the fastest way that there is for them here."""
        weight = self.primarycaps.weight
        if self.frequency and torch.is_grad_enabled():
            return frequency_conv.frequency_conv2d(F.relu(maps_BCHW), weight, stride=2)
        if not self._on_fast_cpu(maps_BCHW.device):
            return F.conv2d(F.relu(maps_BCHW), weight, stride=2)
        found = None
        if not self.direct and frequency_conv.is_faster(maps_BCHW, weight, stride=2):
            found = frequency_conv.relu_frequency_conv2d(maps_BCHW, weight, stride=2)
        return relu_strided_conv2d(maps_BCHW, weight, stride=2) if found is None else found

    @property
    def primary_scale(self) -> float:
        """What the PrimaryCaps convolution is multiplied by, before its bias.

        Paper: no such factor. The authors' code sends the convolution through one routing
        iteration, a softmax over the capsule types of zero logits: with 32 types 1/32, and 1/33
        with leaky routing, whose extra logit takes an equal share.
        """
        if self.config.primary_scale == "one":
            return 1.0
        return 1 / (self.config.primary_types + self.routing.leaky)

    def encode(self, images_BCHW: Tensor, history: list[RoutingIteration] | None = None) -> Tensor:
        """Images (B, C, H, W), pixels in [0, 1], to class capsules v (B, J, D).

        history: see `route`.
        """
        return self.route_poses(self.primary_poses(images_BCHW), history)

    def route_poses(
        self, poses_BIK: Tensor, history: list[RoutingIteration] | None = None
    ) -> Tensor:
        """Input capsules u (B, I, K) to class capsules v (B, J, D), in float32; see `route`."""
        with torch.autocast(poses_BIK.device.type, enabled=False):
            fused = None if history is not None else self._fused_routing(poses_BIK.device)
            if fused is not None:
                routed_BJD = fused(
                    poses_BIK,
                    self.digitcaps_weight,
                    self.digitcaps_bias,
                    self.routing.iterations,
                    self.routing.leaky,
                )
                if routed_BJD is not None:
                    return routed_BJD
            return self._route_plainly(poses_BIK, history)

    def _fused_routing(self, device: torch.device) -> Callable[..., Tensor | None] | None:
        """Votes and routing as one function, where there is one for the device."""
        if self.routing.detach:
            return None  # a gradient that only the plain functions can leave out
        if self._on_fast_cpu(device):
            return routing_cpu.route_fused
        # Not asked here whether this is an export: PyTorch 2.11 says so of what it compiles, too.
        if self.fast and self.triton and device.type == "cuda":
            from capsrun.models.fast import (
                routing_gpu,  # not everywhere is there a Triton to import
            )

            return routing_gpu.route_fused
        return None

    def _route_plainly(self, poses_BIK: Tensor, history: list[RoutingIteration] | None) -> Tensor:
        """Votes and routing as the functions of `routing.py`."""
        # An exported program is for batches of any size, so it cannot count on a number of pieces.
        in_pieces = poses_BIK.device.type == "cpu" and not torch.compiler.is_exporting()
        pieces = poses_BIK.split(ROUTED_AT_ONCE_ON_CPU) if in_pieces else [poses_BIK]
        capsules: list[Tensor] = []
        histories: list[list[RoutingIteration]] = []
        for piece_BIK in pieces:
            histories.append([])
            capsules_BJD = route(
                capsule_votes(piece_BIK, self.digitcaps_weight),
                self.digitcaps_bias,
                self.routing.iterations,
                self.routing.leaky,
                self.routing.detach,
                None if history is None else histories[-1],
            )
            capsules.append(capsules_BJD)
        if history is not None:
            for parts in zip(*histories):
                history.append(RoutingIteration(*map(torch.cat, zip(*parts))))
        return torch.cat(capsules)

    def decode(self, capsules_BJD: Tensor, labels_B: Tensor) -> Tensor:
        """Draw each image's `labels_B` class from its capsule, all others masked out (§4.1).

        Returns images (B, C, H, W) with pixels in [0, 1]. Raises ValueError without a decoder.
        """
        if self.decoder is None:
            raise ValueError("this CapsNet was made without a decoder (reconstruction=false)")
        mask_BJ = F.one_hot(labels_B, self.classes).to(capsules_BJD.dtype)
        pixels = self.decoder((capsules_BJD * mask_BJ[..., None]).flatten(1))
        return pixels.to(capsules_BJD.dtype).unflatten(
            1, (self.channels, self.image_px, self.image_px)
        )

    def decode_all(self, capsules_BJD: Tensor, labels_BT: Tensor) -> Tensor:
        """Draw each of the `labels_BT` classes by itself: (B, T, C, H, W); see `decode`."""
        drawn = [self.decode(capsules_BJD, labels_B) for labels_B in labels_BT.unbind(1)]
        return torch.stack(drawn, dim=1)

    def forward(
        self,
        images_BCHW: Tensor,
        labels_BT: Tensor | None = None,
        noise_B: Tensor | None = None,
    ) -> CapsNetOutput:
        """Classify images, and reconstruct each class in `labels_BT` where there is a decoder.

        noise_B: not used, as nothing in this network is drawn at random.
        """
        capsules_BJD = self.encode(images_BCHW)
        lengths_BJ = torch.linalg.vector_norm(capsules_BJD, dim=2)
        reconstructions = None
        if labels_BT is not None and self.decoder is not None:
            reconstructions = self.decode_all(capsules_BJD, labels_BT)
        return CapsNetOutput(capsules_BJD, lengths_BJ, reconstructions)
