"""CapsNet: two convolutions, one layer of routed capsules, and a decoder (§4 of the paper).

Shapes: B batch, C channels, H and W pixels, I input capsules, J output capsules (classes),
K input dimension, D output dimension, T digits in one image.
"""

import importlib
import itertools
import math
from collections.abc import Callable
from typing import NamedTuple

import torch
from torch import Tensor, nn
from torch.nn import functional as F

from capsrun.config import CapsNetConfig, OtherRoutingConfig, RoutingConfig
from capsrun.errors import UserError, did_you_mean
from capsrun.models import fast
from capsrun.models.initialisation import initialise_as_authors
from capsrun.models.inputs import check_images, check_labels
from capsrun.models.routing import RoutingIteration, capsule_votes, route, squash

ROUTINGS = {
    "dynamic": "routing.route",
}
"""Routing algorithms by their name, which is `routing.algorithm` for all but the paper's: as
`file.function` of this folder, with the arguments of `route`, in their order."""


def algorithm_of(routing: RoutingConfig) -> Callable[..., Tensor]:
    """The function for `routing`. Raises UserError for an algorithm that there is not."""
    name = routing.algorithm if isinstance(routing, OtherRoutingConfig) else "dynamic"
    if name not in ROUTINGS:
        hint, names = did_you_mean(name, ROUTINGS), ", ".join(ROUTINGS)
        raise UserError(f"routing.algorithm is {name!r}{hint}; it can be one of: {names}")
    file, function = ROUTINGS[name].split(".")
    return getattr(importlib.import_module(f"capsrun.models.{file}"), function)


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


def sizes_of(config: CapsNetConfig, px: int) -> tuple[tuple[int, int], tuple[int, int], int]:
    """The padding of both convolutions, and how many places an axis of PrimaryCaps' grid has.

    px: of the images. Raises ValueError where they are too small for the convolutions.
    """
    kernel_px = config.kernel_px
    conv1_pads = primary_pads = (0, 0)
    if config.padding == "same":
        conv1_pads, primary_pads = (same_padding(px, kernel_px, stride) for stride in (1, 2))
    conv1_px = px + sum(conv1_pads) - kernel_px + 1
    grid_px = (conv1_px + sum(primary_pads) - kernel_px) // 2 + 1
    if grid_px < 1:
        raise ValueError(
            f"images of {px} px are too small for two {kernel_px}×{kernel_px} convolutions: at "
            f"least {2 * kernel_px - 1} px"
        )
    return conv1_pads, primary_pads, grid_px


def padded(maps: Tensor, pads: tuple[int, int]) -> Tensor:
    """Maps with so many zeros before and after, along both axes."""
    return F.pad(maps, 2 * pads) if any(pads) else maps


class CapsNet(nn.Module):
    """The network of §4, in the authors' variant or the paper's, as `config` and `routing` say.

    Takes square images of `image_px` pixels with `channels` channels and tells `classes` classes
    apart. A call takes images (B, C, H, W) with pixels in [0, 1] (where it is `standardised`, with
    mean 0 and standard deviation 1) and, for reconstructions, the labels (B, T) whose capsules are
    to be drawn; see `forward` and `CapsNetOutput`.
    config, routing: of `capsrun.training_config(…)`; every value and its source in the paper is in
    `configs/model/capsnet.yaml`. Weights are drawn from torch's global generator.
    Raises ValueError when the image is too small for the two convolutions, and UserError for a
    routing algorithm that there is not.

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

    fast = triton = frequency = False
    """Which ways of `models/fast/` to take: they compute the same numbers, to rounding."""

    def __init__(
        self,
        config: CapsNetConfig,
        routing: RoutingConfig,
        image_px: int,
        channels: int = 1,
        classes: int = 10,
        standardised: bool = False,
    ) -> None:
        if not isinstance(config, CapsNetConfig):
            raise ValueError(f"settings of a CapsNet are wanted, not {type(config).__name__}")
        super().__init__()
        self.config, self.routing, self.algorithm = config, routing, algorithm_of(routing)
        self.image_px, self.channels, self.classes = image_px, channels, classes
        self.standardised = standardised
        self.conv1_pads, self.primary_pads, grid_px = sizes_of(config, image_px)
        self.primary_capsules = config.primary_types * grid_px**2
        # Where the stride does not come out even, the last row and column reach no capsule.
        reached_px = 2 * (grid_px - 1) + 2 * config.kernel_px - 1
        self.seen_px = min(reached_px - sum(self.conv1_pads + self.primary_pads), image_px)
        self.conv1 = nn.Conv2d(channels, config.conv1_channels, config.kernel_px)
        maps = config.primary_types * config.primary_dimensions
        self.primarycaps = nn.Conv2d(config.conv1_channels, maps, config.kernel_px, stride=2)
        capsules_JD = classes, config.digit_dimensions
        self.digitcaps_weight = nn.Parameter(
            torch.empty(self.primary_capsules, config.primary_dimensions, *capsules_JD)
        )
        self.digitcaps_bias = nn.Parameter(torch.empty(capsules_JD)) if config.digit_bias else None
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
        sizes = self.channels, self.image_px
        check_images(images_BCHW, *sizes, self.standardised, self.conv1.weight)
        maps = padded(images_BCHW[..., : self.seen_px, : self.seen_px], self.conv1_pads)
        maps = padded(fast.conv2d(self.conv1, maps, self.fast), self.primary_pads)
        maps = fast.relu_conv2d(maps, self.primarycaps.weight, 2, self.fast, self.frequency)
        # Capsules compute in the precision of their weights (float32), whatever autocast does.
        maps = maps.to(self.digitcaps_weight.dtype)
        bias = self.primarycaps.bias
        assert bias is not None
        if self.fast:
            poses_BIK = fast.primary_capsules(maps, bias, self.primary_scale, self.digitcaps_weight)
            if poses_BIK is not None:
                return poses_BIK
        maps = maps * self.primary_scale + bias[:, None, None]
        maps_BTKHW = maps.unflatten(1, (self.config.primary_types, self.config.primary_dimensions))
        return squash(maps_BTKHW.permute(0, 1, 3, 4, 2).flatten(1, 3))

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
        weights_IKJD, bias_JD, settings = self.digitcaps_weight, self.digitcaps_bias, self.routing

        def routed(poses_BIK: Tensor, history: list[RoutingIteration] | None) -> Tensor:
            votes_BIJD = capsule_votes(poses_BIK, weights_IKJD)
            how = settings.iterations, settings.leaky, settings.detach
            return self.algorithm(votes_BIJD, bias_JD, *how, history)

        with torch.autocast(poses_BIK.device.type, enabled=False):
            if self.fast and self.algorithm is route and history is None:
                given = poses_BIK, weights_IKJD, bias_JD, settings
                capsules_BJD = fast.class_capsules(*given, self.triton)
                if capsules_BJD is not None:
                    return capsules_BJD
            return fast.in_pieces(routed, poses_BIK, history)

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
        Raises ValueError for images and labels that this network was not made for.
        """
        if labels_BT is not None:
            check_labels(labels_BT, len(images_BCHW), self.classes)
        capsules_BJD = self.encode(images_BCHW)
        lengths_BJ = torch.linalg.vector_norm(capsules_BJD, dim=2)
        reconstructions = None
        if labels_BT is not None and self.decoder is not None:
            reconstructions = self.decode_all(capsules_BJD, labels_BT)
        return CapsNetOutput(capsules_BJD, lengths_BJ, reconstructions)
