"""The convolutional networks that CapsNet is compared with (§5, §6 of the paper).

Shapes: B batch, C channels, H and W pixels, J classes, T digits in one image, U hidden units.
"""

import itertools
from typing import NamedTuple

import torch
from torch import Tensor, nn

from capsrun.data.batches import random_unit
from capsrun.model_config import CNNConfig
from capsrun.models.initialisation import initialise_as_authors
from capsrun.models.inputs import check_images


class CNNOutput(NamedTuple):
    """What a convolutional network says about a batch."""

    logits_BJ: Tensor

    @property
    def scores_BJ(self) -> Tensor:
        """How much each class is seen in each image, in [0, 1]: the softmax, whatever the loss."""
        return self.logits_BJ.softmax(1)

    @property
    def reconstructions_BTCHW(self) -> None:
        """These networks do not reconstruct."""
        return None


class CNN(nn.Module):
    """Convolutions with ReLU and max-pooling, hidden layers with ReLU, one linear layer.

    Takes square images of `image_px` pixels with `channels` channels and tells `classes` classes
    apart. Raises ValueError when the image is too small for its layers.
    """

    decoder = None

    def __init__(
        self,
        config: CNNConfig,
        image_px: int,
        channels: int = 1,
        classes: int = 10,
        standardised: bool = False,
    ) -> None:
        super().__init__()
        self.config, self.image_px = config, image_px
        self.channels, self.classes, self.standardised = channels, classes, standardised
        side, width = image_px, channels
        convolutions: list[nn.Module] = []
        for out, kernel_px, pool_px in zip(config.channels, config.kernels_px, config.pools_px):
            convolutions += [nn.Conv2d(width, out, kernel_px, padding=config.padding), nn.ReLU()]
            side = (side if config.padding == "same" else side - kernel_px + 1) // pool_px
            if side < 1:
                raise ValueError(
                    f"images of {image_px} px are too small for the layers of {config.name}"
                )
            if pool_px > 1:
                convolutions.append(nn.MaxPool2d(pool_px))
            width = out
        self.convolutions = nn.Sequential(*convolutions)
        hidden: list[nn.Module] = []
        widths = [width * side**2, *config.hidden]
        for units_in, units_out in itertools.pairwise(widths):
            hidden += [nn.Linear(units_in, units_out), nn.ReLU()]
        self.hidden = nn.Sequential(*hidden)
        self.last = nn.Linear(widths[-1], classes)
        if config.initialisation == "authors":
            initialise_as_authors(self.convolutions, std=0.05)
            initialise_as_authors(self.hidden)
            initialise_as_authors(self.last)
        elif config.initialisation == "glorot":
            self._initialise_as_glorot()

    @torch.no_grad()
    def _initialise_as_glorot(self) -> None:
        """Uniform within ±√(6 / (inputs + outputs)), biases 0: TensorFlow's default in 2017."""
        for name, parameter in self.named_parameters():
            if name.endswith("bias"):
                parameter.zero_()
            else:
                nn.init.xavier_uniform_(parameter)

    def forward(
        self, images_BCHW: Tensor, labels_BT: Tensor | None = None, noise_B: Tensor | None = None
    ) -> CNNOutput:
        """Classify images.

        labels_BT: not used. noise_B: a random number for each image, int64, from which follows what
        dropout drops; None, as in testing: it drops nothing.
        Raises ValueError for images that this network was not made for.
        """
        sizes = self.channels, self.image_px
        check_images(images_BCHW, *sizes, self.standardised, self.last.weight)
        hidden_BU = self.hidden(self.convolutions(images_BCHW).flatten(1))
        if noise_B is not None and self.config.dropout > 0:
            hidden_BU = drop_out(hidden_BU, self.config.dropout, noise_B)
        return CNNOutput(self.last(hidden_BU).float())


def drop_out(hidden_BU: Tensor, share: float, noise_B: Tensor) -> Tensor:
    """Set a random `share` of the units to 0 and scale the others so that their mean stays.

    Which ones is a function of each image's own random number, so that an interrupted run goes on
    as if it had not been, on every device.
    """
    units_U = torch.arange(hidden_BU.shape[1], device=hidden_BU.device)
    kept_BU = random_unit(noise_B[:, None] + units_U) >= share
    return hidden_BU * kept_BU / (1 - share)
