"""Images of a split that are rotated, moved or scaled for a test, and images of noise.

Shapes: B batch, T digits in one image, C channels, H and W pixels.
"""

from dataclasses import dataclass

import torch
from torch import Tensor

from capsrun.data.affnist_like import Transforms, warp
from capsrun.data.batches import PIXELS, Batch, random_unit
from capsrun.data.splits import Split, standardise
from capsrun.data_config import DatasetConfig

# What can be done to images, with the value that leaves them as they are.
UNCHANGED = {"rotate": 0.0, "shift": 0.0, "scale": 1.0}
UNITS = {"rotate": "degrees counter-clockwise", "shift": "pixels", "scale": "times the size"}
BORDER = "what leaves the canvas is cut off, and what comes in is black"
# Rows and columns: image number k moves to the right, down, left or up, as k mod 4 says.
DIRECTIONS = ((0.0, 1.0), (1.0, 0.0), (0.0, -1.0), (-1.0, 0.0))


def pixels_of(batch: Batch, config: DatasetConfig) -> Tensor:
    """The images of a batch with pixels in [0, 1], also where the network sees others."""
    return batch.targets_BTCHW[:, 0] if config.standardise else batch.images_BCHW


def as_seen(pixels_BCHW: Tensor, config: DatasetConfig) -> Tensor:
    """What the network sees of images with pixels in [0, 1]."""
    return standardise(pixels_BCHW) if config.standardise else pixels_BCHW


@dataclass(frozen=True, repr=False)
class Warped(Split):
    """The images of another split, changed in one way, bilinearly, on the same black canvas."""

    images: Split
    labels_N: Tensor
    config: DatasetConfig
    how: str
    """`rotate`, `shift` or `scale`; about the middle of the canvas."""
    value: float
    digits: int

    def __len__(self) -> int:
        return len(self.images)

    def labels(self, indices_B: Tensor) -> Tensor:
        return self.images.labels(indices_B)

    def batch(self, indices_B: Tensor) -> Batch:
        batch = self.images.batch(indices_B)
        transforms, targets = self.transforms(indices_B), batch.targets_BTCHW
        moved = [self._warp(digit_BCHW, transforms) for digit_BCHW in targets.unbind(1)]
        pixels_BCHW = moved[0] if len(moved) == 1 else self._warp(batch.images_BCHW, transforms)
        seen_BCHW = as_seen(pixels_BCHW, self.config)
        return Batch(seen_BCHW, batch.labels_BT, torch.stack(moved, dim=1))

    def _warp(self, pixels_BCHW: Tensor, transforms: Transforms) -> Tensor:
        return warp(pixels_BCHW, transforms, self.config.image_px).clamp(0, 1)

    def transforms(self, indices_B: Tensor) -> Transforms:
        """How each image is changed."""
        zero_B = torch.zeros(len(indices_B), device=self.device)
        degrees = self.value if self.how == "rotate" else 0.0
        factor = self.value if self.how == "scale" else 1.0
        px = self.value if self.how == "shift" else 0.0
        directions_42 = torch.tensor(DIRECTIONS, device=self.device)
        moves_B2 = px * directions_42[indices_B % len(DIRECTIONS)]
        sizes_B = zero_B + factor
        return Transforms(zero_B + degrees, zero_B, sizes_B, sizes_B, *moves_B2.unbind(1))


def warped(images: Split, how: str, value: float) -> Split:
    """The images rotated, moved or scaled by so much; themselves where that changes nothing."""
    if value == UNCHANGED[how]:
        return images
    return Warped(images, images.labels_N, images.config, how, value, images.digits)


@dataclass(frozen=True, repr=False)
class Noise(Split):
    """Images whose pixels are uniform in [0, 1), a pure function of (`split_seed`, number)."""

    labels_N: Tensor
    """Zeros: these images show nothing."""
    config: DatasetConfig

    def batch(self, indices_B: Tensor) -> Batch:
        shape = self.config.channels, self.config.image_px, self.config.image_px
        pixels_BCHW = uniform_pixels(indices_B, shape, self.config.split_seed, PIXELS)
        seen_BCHW = as_seen(pixels_BCHW, self.config)
        return Batch(seen_BCHW, self.labels(indices_B), pixels_BCHW[:, None])


def uniform_pixels(numbers_B: Tensor, shape: tuple[int, ...], *keys: int) -> Tensor:
    """Numbers uniform in [0, 1) for each pixel (C, H, W) of some images, by `random_unit`."""
    places_CHW = torch.arange(torch.Size(shape).numel(), device=numbers_B.device).view(shape)
    counters_BCHW = numbers_B.view(-1, 1, 1, 1) * places_CHW.numel() + places_CHW
    return random_unit(counters_BCHW, *keys)
