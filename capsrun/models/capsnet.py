"""CapsNet: two convolutions, one layer of routed capsules, and a decoder (§4 of the paper).

Shapes: B batch, C channels, H and W pixels, I input capsules, J output capsules (classes),
K input dimension, D output dimension, T digits in one image.
"""

import copy
import importlib
from typing import Any, NamedTuple

import torch
from torch import Tensor, nn

from capsrun.errors import UserError, did_you_mean
from capsrun.experiments import defaults
from capsrun.model_config import (
    ROUTINGS,
    CapsNetConfig,
    CapsuleModelConfig,
    DynamicRoutingConfig,
    ModelConfig,
    RoutingConfig,
    algorithm_of,
)
from capsrun.models import fast
from capsrun.models.initialisation import initialise_as_authors
from capsrun.models.inputs import check_images, check_labels, check_sizes
from capsrun.models.layers import (
    PRIMARY_STRIDE,
    Decoder,
    Layer,
    PrimaryCaps,
    RoutedLayer,
    capsnet_config,
    convolved,
    padded,
    primary_scale,
    routing_config,
)
from capsrun.models.routing import RoutingIteration


def layer_of(routing: RoutingConfig) -> type[RoutedLayer]:
    """The layer of class capsules of a routing. Raises UserError for one that there is not."""
    name = algorithm_of(routing)
    if name not in ROUTINGS:
        hint, names = did_you_mean(name, ROUTINGS), ", ".join(ROUTINGS)
        raise UserError(f"routing.algorithm is {name!r}{hint}; it can be one of: {names}")
    file, layer = ROUTINGS[name].layer.split(".")
    return getattr(importlib.import_module(f"capsrun.models.{file}"), layer)


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


def sizes_of(config: CapsNetConfig, px: int) -> tuple[tuple[int, int], tuple[int, int], int]:
    """The padding of both convolutions, and how many places an axis of PrimaryCaps' grid has.

    px: of the images. Raises ValueError where they are too small for the convolutions.
    """
    kernel_px, padding = config.kernel_px, config.padding
    conv1_pads, conv1_px = convolved(px, kernel_px, 1, padding)
    primary_pads, grid_px = convolved(conv1_px, kernel_px, PRIMARY_STRIDE, padding)
    if grid_px < 1:
        raise ValueError(
            f"images of {px} px are too small for two {kernel_px}×{kernel_px} convolutions: at "
            f"least {2 * kernel_px - 1} px"
        )
    return conv1_pads, primary_pads, grid_px


class CapsNet(Layer, nn.Module):
    """The network of §4, in the authors' variant or the paper's, as `config` and `routing` say.

    Takes square images of `image_px` pixels with `channels` channels and tells `classes` classes
    apart. A call takes images (B, C, H, W) with pixels in [0, 1] (where it is `standardised`, with
    mean 0 and standard deviation 1) and, for reconstructions, the labels (B, T) whose capsules are
    to be drawn; see `forward` and `CapsNetOutput`. It consists of `conv1`, `primarycaps`,
    `digitcaps` and `decoder` (or None); see `PrimaryCaps`, `CapsuleLayer` and `Decoder`.
    config, routing: of `capsrun.training_config(…)`, and where they are None, and `image_px`, those
    of `capsrun.training_config()`; every value and its source in the paper is in
    `configs/model/capsnet.yaml`. Weights are drawn from torch's global generator.
    Raises ValueError when the image is too small for the two convolutions, and UserError for a
    routing algorithm that there is not.

    >>> import capsrun, torch
    >>> model = capsrun.CapsNet(image_px=28)
    >>> sum(weights.numel() for weights in model.parameters())
    8215728
    >>> output = model(torch.rand(2, 1, 28, 28), labels_BT=torch.tensor([[3], [5]]))
    >>> output.lengths_BJ.shape, output.capsules_BJD.shape
    (torch.Size([2, 10]), torch.Size([2, 10, 16]))
    >>> output.reconstructions_BTCHW.shape
    torch.Size([2, 1, 1, 28, 28])
    >>> config = capsrun.training_config("model=capsnet_small", "routing.iterations=1")
    >>> capsrun.CapsNet(config.model, config.routing, image_px=36).primary_capsules
    800
    """

    settings: type[CapsuleModelConfig] = CapsNetConfig
    config: Any
    """Of `settings`."""
    primarycaps: Any
    """The layer of the input capsules."""

    def __init__(
        self,
        config: ModelConfig | None = None,
        routing: RoutingConfig | None = None,
        image_px: int | None = None,
        channels: int = 1,
        classes: int = 10,
        standardised: bool = False,
    ) -> None:
        config = copy.deepcopy(capsnet_config()) if config is None else config
        routing = routing_config() if routing is None else routing
        image_px = defaults().dataset.image_px if image_px is None else image_px
        if not isinstance(config, self.settings):
            name = type(self).__name__
            hint = f": {name}(image_px={config})" if isinstance(config, int) else ""
            raise ValueError(f"settings of a {name} are wanted, not {type(config).__name__}{hint}")
        check_sizes(image_px=image_px, channels=channels, classes=classes)
        super().__init__()
        self.config = config
        self.image_px, self.channels, self.classes = image_px, channels, classes
        self.standardised = standardised
        layer = layer_of(routing)
        self._make_encoder(routing, layer.takes_activations)
        with torch.random.fork_rng(devices=[]):  # a seed gives the weights that it always gave
            self.digitcaps = layer.from_config(routing, config, self.primary_capsules, classes)
        self.decoder: Decoder | None = None
        if config.reconstruction:
            given = classes, config.digit_dimensions, image_px, channels, config.decoder_widths
            self.decoder = Decoder(*given, initialisation="pytorch")
        self.initialisation = getattr(config, "initialisation", self.initialisation)
        self.reset_parameters()

    def _make_encoder(self, routing: RoutingConfig, with_activations: bool) -> None:
        """The layers below the class capsules; the weights are drawn later.

        with_activations: see `RoutedLayer.takes_activations`.
        """
        config = self.config
        self.conv1_pads, self.primary_pads, grid_px = sizes_of(config, self.image_px)
        self.primary_capsules = config.primary_types * grid_px**2
        # Where the stride does not come out even, the last row and column reach no capsule.
        reached_px = PRIMARY_STRIDE * (grid_px - 1) + 2 * config.kernel_px - 1
        self.seen_px = min(reached_px - sum(self.conv1_pads + self.primary_pads), self.image_px)
        self.conv1 = nn.Conv2d(self.channels, config.conv1_channels, config.kernel_px)
        leaky = isinstance(routing, DynamicRoutingConfig) and routing.leaky
        self.primarycaps = PrimaryCaps(
            config.conv1_channels,
            config.primary_types,
            config.primary_dimensions + with_activations,
            config.kernel_px,
            padding=config.padding,
            scale=primary_scale(config.primary_scale, config.primary_types, leaky),
            squashed=not with_activations,
            initialisation="pytorch",
        )

    @property
    def routing(self) -> RoutingConfig:
        """How DigitCaps are routed."""
        return self.digitcaps.routing

    def reset_parameters(self) -> None:
        """Draw new weights from torch's global generator, as `config.initialisation` says.

        `authors`: see `initialise_as_authors`, σ = 0.05 in Conv1. `pytorch`: each layer's default.
        """
        above = [self.primarycaps] + ([] if self.decoder is None else [self.decoder])
        for layer in (self.digitcaps, *above):
            layer.initialisation = self.initialisation
        if self.initialisation == "authors":
            self.digitcaps.reset_parameters()
            initialise_as_authors(self.conv1, std=0.05)
        else:
            self.conv1.reset_parameters()
        for layer in above:
            layer.reset_parameters()
        if self.initialisation != "authors":
            self.digitcaps.reset_parameters()

    def primary_poses(self, images_BCHW: Tensor) -> Tensor:
        """Images with pixels in [0, 1] to PrimaryCaps outputs u of shape (B, I, K).

        Squashed, or with the logit of an activation as one more number; see `RoutedLayer`.
        Input capsules are ordered (type, row, column), and the K numbers of a capsule are K
        channels at one place of the grid.
        """
        sizes = self.channels, self.image_px
        check_images(images_BCHW, *sizes, self.standardised, self.conv1.weight)
        seen_BCHW = images_BCHW[..., : self.seen_px, : self.seen_px]
        maps = padded(seen_BCHW, self.conv1_pads, self.conv1_pads)
        return self.primarycaps(fast.conv2d(self.conv1, maps, self.fast))

    def encode(self, images_BCHW: Tensor, history: list[RoutingIteration] | None = None) -> Tensor:
        """Images (B, C, H, W), pixels in [0, 1], to class capsules v (B, J, D).

        history: see `route`.
        """
        return self.digitcaps(self.primary_poses(images_BCHW), history)

    def decode(self, capsules_BJD: Tensor, labels: Tensor) -> Tensor:
        """Draw the classes `labels`, each from its capsule, all others masked out (§4.1).

        Of labels (B,) images (B, C, H, W), of (B, T) images (B, T, C, H, W), one a class, with
        pixels in [0, 1]. Raises ValueError without a decoder.
        """
        if self.decoder is None:
            raise ValueError("this CapsNet was made without a decoder (reconstruction=false)")
        return self.decoder(capsules_BJD, labels)

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
            check_labels(labels_BT, images_BCHW.shape[0], self.classes, self.primarycaps.weight)
        capsules_BJD = self.encode(images_BCHW)
        lengths_BJ = torch.linalg.vector_norm(capsules_BJD, dim=2)
        reconstructions = None
        if labels_BT is not None and self.decoder is not None:
            reconstructions = self.decode(capsules_BJD, labels_BT)
        return CapsNetOutput(capsules_BJD, lengths_BJ, reconstructions)
