"""MNIST test digits, transformed at random in the way of affNIST, on the device. It is not affNIST.

Shapes: N digits, B batch, H and W pixels, P pixels of a digit's image.
"""

from dataclasses import dataclass
from typing import NamedTuple

import torch
from torch import Tensor
from torch.nn import functional as F

from capsrun.data.batches import WARP, Batch, random_unit, to_pixels
from capsrun.data.files import RawData
from capsrun.data.sets import class_names
from capsrun.data.splits import Dataset, OfDigits, StoredImages, parts, refuse_changes
from capsrun.data_config import DatasetConfig
from capsrun.errors import UserError

VERSIONS = 32
"""Transformed versions of each digit."""
ROTATION_DEGREES, SHEAR, SCALE = 20.0, 0.2, (0.8, 1.2)
"""Ranges: ± rotation, ± shear, and the scale of each axis; drawn uniformly."""
ATTEMPTS = 20
"""Draws for a digit that is too large for the canvas in all earlier ones."""


class Transforms(NamedTuple):
    """How some digits are transformed: scaled, sheared, rotated and moved, in this order."""

    rotation_degrees_B: Tensor
    """Counter-clockwise."""
    shear_B: Tensor
    """Columns to the right for each row downwards."""
    row_scale_B: Tensor
    column_scale_B: Tensor
    row_shift_px_B: Tensor
    """From the middle of the canvas."""
    column_shift_px_B: Tensor

    def matrices(self) -> Tensor:
        """The linear part (B, 2, 2), which maps (row, column) of a digit to those of the canvas."""
        angle_B = torch.deg2rad(self.rotation_degrees_B)
        cos_B, sin_B, zero_B = angle_B.cos(), angle_B.sin(), torch.zeros_like(angle_B)
        rotation = _matrix(cos_B, -sin_B, sin_B, cos_B)
        shear = _matrix(zero_B + 1, zero_B, self.shear_B, zero_B + 1)
        scale = _matrix(self.row_scale_B, zero_B, zero_B, self.column_scale_B)
        return rotation @ shear @ scale


def _matrix(a_B: Tensor, b_B: Tensor, c_B: Tensor, d_B: Tensor) -> Tensor:
    return torch.stack([a_B, b_B, c_B, d_B], dim=1).unflatten(1, (2, 2))


@dataclass(frozen=True, repr=False)
class TransformedDigits(OfDigits):
    """32 versions of each of N digits; image k is version k div N.

    A pure function of (seed, k). Rotation, shear and scale are uniform in their ranges, and then
    the place is uniform among those at which no ink leaves the canvas.
    """

    def __len__(self) -> int:
        return VERSIONS * len(self.labels_N)

    def batch(self, indices_B: Tensor) -> Batch:
        digits_BCHW = self.digits_NCHW[self.numbers(indices_B)[0]]
        transforms = self.transforms(indices_B)
        warped_BCHW = warp(digits_BCHW.float(), transforms, self.config.image_px)
        pixels_BCHW = to_pixels(warped_BCHW.round())  # bytes, as those of affNIST are
        return Batch(pixels_BCHW, self.labels(indices_B), pixels_BCHW[:, None])

    def transforms(self, indices_B: Tensor) -> Transforms:
        """How each image is made.

        Raises UserError for a digit that is too large for the canvas.
        """
        drawn_B8 = self._draw(indices_B, 0)
        for attempt in range(1, ATTEMPTS):
            too_large_B = (drawn_B8[:, 6:] < 0).any(1)
            if not too_large_B.any():
                break
            again_B8 = self._draw(indices_B, attempt)
            drawn_B8 = torch.where(too_large_B[:, None], again_B8, drawn_B8)
        if (drawn_B8[:, 6:] < 0).any():
            raise UserError(
                f"some digits do not fit on {self.config.name}'s canvas of "
                f"{self.config.image_px} px; choose a larger dataset.image_px"
            )
        return Transforms(*drawn_B8[:, :6].unbind(1))

    def _draw(self, indices_B: Tensor, attempt: int) -> Tensor:
        """The numbers (B, 6) of `Transforms`, and the room (B, 2) that the places are drawn from.

        The room, of rows and columns, is below 0 where a digit is too large.
        """
        counters_B6 = indices_B[:, None] * 6 + torch.arange(6, device=self.device)
        drawn_B6 = random_unit(counters_B6, self.config.split_seed, WARP, attempt)
        low, high = SCALE
        linear_B4 = torch.stack(
            [
                ROTATION_DEGREES * (2 * drawn_B6[:, 0] - 1),
                SHEAR * (2 * drawn_B6[:, 1] - 1),
                low + (high - low) * drawn_B6[:, 2],
                low + (high - low) * drawn_B6[:, 3],
            ],
            dim=1,
        )
        unmoved = Transforms(*linear_B4.unbind(1), *torch.zeros_like(drawn_B6[:, 4:]).unbind(1))
        low_B2, room_B2 = self.places(indices_B, unmoved)
        return torch.cat([linear_B4, low_B2 + drawn_B6[:, 4:] * room_B2, room_B2], dim=1)

    def places(self, indices_B: Tensor, transforms: Transforms) -> tuple[Tensor, Tensor]:
        """The first place (B, 2) at which no ink leaves the canvas, and the room (B, 2) from there.

        Of rows and columns, as the shifts of `Transforms`, whatever those are here. The room is
        below 0 where a digit is too large.
        """
        digits_BCHW = self.digits_NCHW[self.numbers(indices_B)[0]]
        first_B2, last_B2 = ink_extent(digits_BCHW, transforms.matrices())
        # Ink may touch the pixels that surround the canvas, where bilinear interpolation makes
        # nothing of it, but not reach over them.
        middle = (self.config.image_px - 1) / 2
        low_B2 = -1 - middle - first_B2
        return low_B2, self.config.image_px - middle - last_B2 - low_B2


def ink_extent(digits_BCHW: Tensor, matrices_B22: Tensor) -> tuple[Tensor, Tensor]:
    """First and last row and column (B, 2) that the ink of transformed digits reaches.

    In pixels from the middle. A pixel of ink reaches one pixel further before it is transformed, as
    it is interpolated with its neighbours.
    """
    ink_BP = digits_BCHW.amax(1).flatten(1) > 0
    positions_P2 = _positions(digits_BCHW.shape[-1], digits_BCHW.device).flatten(0, 1)
    moved_BP2 = positions_P2 @ matrices_B22.transpose(1, 2)
    reach_B12 = matrices_B22.abs().sum(2)[:, None]
    infinity = torch.inf
    first_B2 = (moved_BP2 - reach_B12).masked_fill(~ink_BP[..., None], infinity).amin(1)
    last_B2 = (moved_BP2 + reach_B12).masked_fill(~ink_BP[..., None], -infinity).amax(1)
    blank_B1 = ~ink_BP.any(1, keepdim=True)  # an image without ink fits anywhere
    return first_B2.masked_fill(blank_B1, 0), last_B2.masked_fill(blank_B1, 0)


def warp(images_BCHW: Tensor, transforms: Transforms, canvas_px: int) -> Tensor:
    """Transform square images onto a black canvas, bilinearly: (B, C, canvas_px, canvas_px)."""
    side = images_BCHW.shape[-1]
    shifts_B2 = torch.stack([transforms.row_shift_px_B, transforms.column_shift_px_B], dim=1)
    canvas_HW2 = _positions(canvas_px, images_BCHW.device)
    centred_BHW2 = canvas_HW2 - shifts_B2[:, None, None]
    inverse_B22 = torch.linalg.inv(transforms.matrices())
    sources_BHW2 = torch.einsum("bij,bhwj->bhwi", inverse_B22, centred_BHW2)
    # grid_sample wants (column, row), −1 and 1 at the middle of the first and last pixel.
    grid_BHW2 = sources_BHW2.flip(3) / ((side - 1) / 2)
    return F.grid_sample(images_BCHW, grid_BHW2, align_corners=True)


def _positions(side: int, device: torch.device) -> Tensor:
    """Row and column (side, side, 2) of each pixel, from the middle."""
    line = torch.arange(side, device=device) - (side - 1) / 2
    return torch.stack(torch.meshgrid(line, line, indexing="ij"), dim=2)


def make(raw: RawData, config: DatasetConfig, device: torch.device) -> Dataset:
    """Transform the test digits; there is nothing to train on."""
    refuse_changes(config, "shift_px", "validation")
    _, validation, test = parts(raw, config, device)
    nothing = StoredImages(*validation, config)
    digits = TransformedDigits(*test, config)
    return Dataset(config.name, class_names(config), nothing, nothing, digits, raw.sources)
