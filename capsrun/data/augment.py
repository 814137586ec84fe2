"""Digits turned, moved, squeezed and partly erased at random, as Efficient-CapsNet is trained.

Mazzia, Salvetti and Chiaberge, "Efficient-CapsNet: Capsule Network with Self-Attention Routing"
(2021); what the paper leaves open is as in the authors' code. All on the device.

Shapes: B batch, C channels, H and W pixels, P pixels along an axis, 2: row and column.
"""

import math
from functools import lru_cache
from typing import NamedTuple

import torch
from torch import Tensor
from torch.nn import functional as F

from capsrun.data.batches import AUGMENT, place, random_unit
from capsrun.data_config import DatasetConfig
from capsrun.errors import UserError

SPREAD, MOST = 0.33, 0.9999
"""σ of the normal distribution of mean 0 that amounts are drawn from, and the largest of them."""
ROTATION_DEGREES = 30
NARROWER = 1 / 4
"""Share of the width by which an image becomes narrower at most."""
ERASED_PX, KEPT_PX = 4, 4
"""Side of the square that is erased, and how far it stays from the top and the left."""
LANCZOS = 3
"""Lobes of the kernel with which images become narrower."""


class Changes(NamedTuple):
    """How some images are changed, in this order."""

    degrees_B: Tensor
    """Rotation, counter-clockwise, whole numbers; 0 for half of the images."""
    back_B2: Tensor
    """Whether they are moved up, and to the left, or else down, and to the right."""
    share_B2: Tensor
    """By how much of the empty rows and columns on that side."""
    narrower_px_B: Tensor
    """Columns that are lost as an image is squeezed, from 1."""
    later_px_B: Tensor
    """Columns, 0 or 1, by which it is then to the right of the middle."""
    erased_px_B2: Tensor
    """The top left corner of a square that becomes black."""


def check_augment(config: DatasetConfig) -> None:
    """Raise UserError where images cannot be augmented as `config` says."""
    if config.augment is not None and config.shift_px:
        raise UserError(
            f"dataset.augment={config.augment} moves images in its own way: say dataset.shift_px=0"
        )
    least_px = KEPT_PX + ERASED_PX + 2
    if config.augment is not None and config.image_px < least_px:
        raise UserError(
            f"dataset.augment={config.augment} is for images of at least {least_px} px, and "
            f"dataset.image_px is {config.image_px}"
        )


def augment(pixels_BCHW: Tensor, positions_B: Tensor, seed: int) -> Tensor:
    """Turn, move, squeeze and partly erase square images, pixels in [0, 1] from 0 for empty ones.

    A pure function of the seed and each position. What is squeezed may leave [0, 1] a little.

    Paper: the authors' code draws everything from TensorFlow's generator; here each image has its
    own numbers, so that a resumed run sees what an uninterrupted one would have seen.
    """
    changes = draw_changes(positions_B, seed, pixels_BCHW.shape[-1])
    turned_BCHW = turn(pixels_BCHW, changes.degrees_B)
    moved_BCHW = move(turned_BCHW, changes.back_B2, changes.share_B2)
    squeezed_BCHW = squeeze(moved_BCHW, changes.narrower_px_B, changes.later_px_B)
    return erase(squeezed_BCHW, changes.erased_px_B2)


def draw_changes(positions_B: Tensor, seed: int, px: int) -> Changes:
    """How images of `px` pixels are changed; see `augment`."""
    counters_BN = positions_B[:, None] * 10 + torch.arange(10, device=positions_B.device)
    drawn_BN = random_unit(counters_BN, seed, AUGMENT)
    # The quantiles of a normal distribution, and of its absolute value.
    scale = SPREAD * math.sqrt(2)
    signed_B = (scale * torch.erfinv(2 * drawn_BN[:, 0] - 1)).clamp(-MOST, MOST)
    amounts_B4 = (scale * torch.erfinv(drawn_BN[:, 4:8])).clamp(max=MOST)
    return Changes(
        degrees_B=(ROTATION_DEGREES * signed_B).trunc() * (drawn_BN[:, 1] < 0.5),
        back_B2=drawn_BN[:, 2:4] < 0.5,
        share_B2=amounts_B4[:, :2],
        narrower_px_B=(amounts_B4[:, 2] * (px * NARROWER) + 1).long(),
        later_px_B=(2 * amounts_B4[:, 3]).long(),
        # As the authors' squares, two pixels or more from the bottom and the right.
        erased_px_B2=KEPT_PX + (drawn_BN[:, 8:] * (px - KEPT_PX - ERASED_PX - 1)).long(),
    )


def turn(images_BCHW: Tensor, degrees_B: Tensor) -> Tensor:
    """Rotate images bilinearly, counter-clockwise, about (P/2, P/2); black moves in.

    Paper: silent about the point. That of the authors' code is half a pixel to the right of the
    middle and below it.
    """
    px = images_BCHW.shape[-1]
    line_P = torch.arange(px, device=images_BCHW.device) - px / 2
    angle_B11 = torch.deg2rad(degrees_B)[:, None, None]
    cos_B11, sin_B11 = angle_B11.cos(), angle_B11.sin()
    rows_P1, columns_P = line_P[:, None], line_P
    from_columns_BPP = cos_B11 * columns_P - sin_B11 * rows_P1 + px / 2
    from_rows_BPP = sin_B11 * columns_P + cos_B11 * rows_P1 + px / 2
    # −1 and 1 at the middle of the first and last pixel.
    grid_BPP2 = torch.stack([from_columns_BPP, from_rows_BPP], dim=3) / ((px - 1) / 2) - 1
    turned_BCHW = F.grid_sample(images_BCHW, grid_BPP2, align_corners=True)
    # Those of 0° would have traces of rounding in the empty pixels around the ink.
    return torch.where((degrees_B == 0)[:, None, None, None], images_BCHW, turned_BCHW)


def move(images_BCHW: Tensor, back_B2: Tensor, share_B2: Tensor) -> Tensor:
    """Move images along both axes by a share of the room on that side, so that all ink stays.

    Paper: as in the authors' code, room is the empty rows or columns before the ink, of which a
    share is rounded up, and one more than those after it, of which it is rounded down.
    """
    ink_BHW = images_BCHW.amax(1) > 0
    lines_B2P = torch.stack([ink_BHW.any(2), ink_BHW.any(1)], dim=1).int()
    before_B2, after_B2 = lines_B2P.argmax(2), lines_B2P.flip(2).argmax(2)
    moves_B2 = torch.where(back_B2, -share_B2 * before_B2, share_B2 * (after_B2 + 1)).floor()
    return place(images_BCHW, moves_B2.long(), images_BCHW.shape[-1])


def squeeze(images_BCHW: Tensor, narrower_px_B: Tensor, later_px_B: Tensor) -> Tensor:
    """Make images narrower, the black at both sides wider: resampled with Lanczos' kernel."""
    matrices_N2PP = squeezing(images_BCHW.shape[-1], images_BCHW.device)
    return images_BCHW @ matrices_N2PP[narrower_px_B - 1, later_px_B][:, None]


@lru_cache(maxsize=4)
def squeezing(px: int, device: torch.device) -> Tensor:
    """What lines of `px` pixels are multiplied by, (N, 2, px, px), to lose 1 to N of them.

    The second axis: by how many pixels they are then later than in the middle.
    """
    matrices = torch.zeros(int(MOST * px * NARROWER + 1), 2, px, px, dtype=torch.float64)
    for narrower_px, pair in enumerate(matrices, 1):
        weights = lanczos_weights(px, px - narrower_px)
        for later_px, matrix in enumerate(pair):
            start = narrower_px // 2 + later_px
            matrix[:, start : start + px - narrower_px] = weights
    return matrices.float().to(device)


def lanczos_weights(px: int, narrow_px: int) -> Tensor:
    """How much each of `px` pixels (rows) has in each of the fewer ones (columns), in float64."""
    scale = px / narrow_px
    centres = (torch.arange(narrow_px, dtype=torch.float64) + 0.5) * scale
    places = torch.arange(px, dtype=torch.float64) + 0.5
    x = (places[:, None] - centres) / scale
    weights = torch.sinc(x) * torch.sinc(x / LANCZOS) * (x.abs() < LANCZOS)
    return weights / weights.sum(0)


def erase(images_BCHW: Tensor, corners_px_B2: Tensor) -> Tensor:
    """Make a square of each image black. corners_px_B2: its first row and column."""
    line_P = torch.arange(images_BCHW.shape[-1], device=images_BCHW.device)
    from_corner_B2P = line_P - corners_px_B2[..., None]
    rows_BP, columns_BP = ((from_corner_B2P >= 0) & (from_corner_B2P < ERASED_PX)).unbind(1)
    return images_BCHW.masked_fill((rows_BP[:, :, None] & columns_BP[:, None])[:, None], 0)
