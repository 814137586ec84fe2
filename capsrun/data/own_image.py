"""Reads an image of one's own as the images of a data set are: of digits, light ink on black.

Shapes: C channels, H and W pixels.
"""

from pathlib import Path

import numpy as np
import torch
from numpy.typing import NDArray
from PIL import Image, ImageOps
from scipy import ndimage
from torch import Tensor
from torch.nn import functional as F

from capsrun.data.sets import made_of
from capsrun.data_config import DatasetConfig
from capsrun.errors import UserError

Pixels = NDArray[np.float32]
"""From 0 to 255."""

# Pillow knows more formats, for some of which it runs other programs.
FORMATS = ("PNG", "JPEG", "GIF", "BMP", "TIFF", "WEBP", "PPM")
MOST_SIDE_PX = 8192
# As large as an image is looked through for its ink.
LOOKED_THROUGH_PX = 512
# Of 255: what differs less from its background is noise.
LEAST_CONTRAST = 25
# MNIST was made of ink and no ink: the share of the darkest at which one passes into the other.
NO_INK, INK = 0.4, 0.6
# How much of the rectangle around it a sheet of paper on a table fills, and a digit does not.
SHEET = 0.8


def read_image(path: Path, config: DatasetConfig, invert: str) -> tuple[Tensor, list[str]]:
    """Read an image file as pixels (C, H, W) in [0, 1], as those of the data set of `config` are.

    invert: `auto` finds out whether the ink is dark, and takes away the shade of the paper; digits
    are cropped, resized and centred as MNIST's were, unless the image has the data set's size
    already. `true` takes the ink to be dark. `false` leaves an image as it is, and so does `auto`
    for photographs: it is padded to a square with its background, and resized.
    Returns what was done to it, too. Raises UserError for a file that is missing, no image or
    without ink, and for a number of channels that no such file has.
    """
    if config.channels not in (1, 3):
        raise UserError(
            "an image of one's own is for models of grey or colour images, not of images of "
            f"{config.channels} channels"
        )
    image, remarks = opened(path, "L" if config.channels == 1 else "RGB")
    side, width, height = config.image_px, *image.size
    of_ink, digit_px = made_of(config)
    is_drawing = invert != "false" and of_ink
    if not is_drawing or image.size == (side, side):
        digit_px = None
    if digit_px is not None:
        image.thumbnail((LOOKED_THROUGH_PX, LOOKED_THROUGH_PX))
    pixels_HWC = np.asarray(image, np.float32).reshape(image.height, image.width, -1)
    if digit_px is not None and (sheet_HW := _sheet(pixels_HWC[..., 0])) is not None:
        pixels_HWC = sheet_HW[..., None]
        remarks.append("the sheet cut out of what it lies on")

    ink_HWC = pixels_HWC - _background(pixels_HWC)
    if invert == "true" or (is_drawing and -ink_HWC.min() > ink_HWC.max()):
        pixels_HWC, ink_HWC = 255 - pixels_HWC, -ink_HWC
        remarks.append("inverted to light on dark (perturb.invert=false keeps it)")
    if (ink_HWC.max() if is_drawing else np.ptp(ink_HWC)) < (LEAST_CONTRAST if is_drawing else 1):
        raise UserError(f"there is no ink in {path}: nothing in it stands out from its background")
    background_C = _background(pixels_HWC)
    resized = f"resized from {width}×{height} to {side}×{side} pixels"
    if digit_px is not None:
        digits_px = digit_px + (config.digits - 1) * config.shift_px  # two are moved apart
        remarks.append(f"{resized}: its ink, {digits_px} pixels long, centred by its mass")
        return torch.from_numpy(_as_digit(pixels_HWC[..., 0], side, digits_px))[None], remarks
    if is_drawing and background_C.any():
        pixels_HWC, background_C = ink_HWC.clip(min=0) * (255 / ink_HWC.max()), 0 * background_C
        remarks.append("the shade of its background taken away")
    if (width, height) != (side, side):
        remarks.append(("" if width == height else "padded to a square and ") + resized)
    return _to_square(pixels_HWC, side, background_C), remarks


def opened(path: Path, mode: str) -> tuple[Image.Image, list[str]]:
    """The image of a file, and remarks. Raises UserError, see `read_image`."""
    if path.exists() and not path.is_file():
        raise UserError(f"{path} is no image file")
    try:
        with Image.open(path, formats=FORMATS) as opened:
            return _as_paper(opened, mode)
    except FileNotFoundError:
        raise UserError(f"there is no image {path}") from None
    except Exception as error:  # Pillow fails in many ways on a damaged file
        raise UserError(f"{path} cannot be read as an image (PNG, JPEG, …): {error}") from error


def _as_paper(opened: Image.Image, mode: str) -> tuple[Image.Image, list[str]]:
    """The image upright, opaque and with 8 bits, and remarks. Raises ValueError where it cannot."""
    if max(opened.size) > MOST_SIDE_PX:
        raise ValueError(
            f"{opened.width:,}×{opened.height:,} pixels are more than {MOST_SIDE_PX:,} on "
            "a side; make it smaller"
        )
    image: Image.Image = ImageOps.exif_transpose(opened)
    if image.mode.startswith("I;16"):
        values_HW = np.asarray(image)
        full = 4095 if values_HW.max() <= 4095 else 65535  # 12 bits, as many cameras have
        image = Image.fromarray((values_HW * (255 / full)).astype(np.uint8))
    if image.mode in ("I", "F"):
        raise ValueError("pixels of 32 bits have no known range")
    if "A" not in image.getbands() and "transparency" not in image.info:
        return image.convert(mode), []
    image = image.convert("RGBA")
    opacity_HW = np.asarray(image.getchannel("A"), np.float32)
    if opacity_HW.min() == 255:
        return image.convert(mode), []
    # What is drawn in light ink would not be seen on white.
    ink_HW = np.asarray(image.convert("RGB").convert("L"), np.float32)
    colour = "black" if (opacity_HW * (ink_HW - 127.5)).sum() > 0 else "white"
    paper = Image.new("RGBA", image.size, colour)
    remarks = [f"transparent parts taken as {colour} paper"]
    return Image.alpha_composite(paper, image).convert(mode), remarks


def _background(pixels_HWC: Pixels) -> Pixels:
    """The shade (C) of the paper: the median along the border."""
    edges = pixels_HWC[0], pixels_HWC[-1], pixels_HWC[:, 0], pixels_HWC[:, -1]
    return np.median(np.concatenate(edges), axis=0)


def _sheet(pixels_HW: Pixels) -> Pixels | None:
    """The sheet of paper with something on it that lies on a table, upright; None without one."""
    difference_HW = np.abs(pixels_HW - _background(pixels_HW[..., None]))
    stands_out_HW = difference_HW > difference_HW.max() / 2
    for rows, columns in ndimage.find_objects(stands_out_HW.astype(int)):
        box_HW, sheet_HW = stands_out_HW[rows, columns], pixels_HW[rows, columns]
        filled_HW = ndimage.binary_fill_holes(box_HW)
        if box_HW.mean() > SHEET and (filled_HW & ~box_HW).any():
            inside_HW = ndimage.binary_erosion(filled_HW, iterations=1 + len(sheet_HW) // 50)
            return np.where(inside_HW, sheet_HW, np.median(sheet_HW[inside_HW]))
    return None


def _as_digit(pixels_HW: Pixels, side_px: int, longest_px: int) -> Pixels:
    """Light ink as a digit of MNIST, in [0, 1]: cropped, resized, its centre of mass in the middle.

    As bright as it is against the paper around it, which may be lit unevenly.
    """
    window_px = 1 + max(pixels_HW.shape) // 3  # wider than a line
    halfway = (
        pixels_HW.max() + _background(pixels_HW[..., None])
    ) / 2  # what is lighter is no paper
    paper_HW = ndimage.grey_opening(pixels_HW, size=(window_px, window_px)).clip(max=halfway)
    ink_HW = (pixels_HW - paper_HW) / (255 - paper_HW).clip(min=1)
    ink_HW = ((ink_HW / ink_HW.max() - NO_INK) / (INK - NO_INK)).clip(0, 1)
    ink_HW = ink_HW[ndimage.find_objects((ink_HW > 0.5).astype(int))[0]]
    scale = longest_px / max(ink_HW.shape)
    height, width = (max(1, round(scale * length)) for length in ink_HW.shape)
    digit_HW = _resized(torch.from_numpy(ink_HW)[None], height, width)[0].clamp(0, 1).numpy()
    corner = [
        min(max(round(side_px / 2 - centre - 0.5), 0), side_px - length)
        for centre, length in zip(ndimage.center_of_mass(digit_HW), digit_HW.shape)
    ]
    canvas_HW = np.zeros((side_px, side_px), np.float32)
    canvas_HW[corner[0] : corner[0] + height, corner[1] : corner[1] + width] = digit_HW
    return canvas_HW


def _to_square(pixels_HWC: Pixels, side_px: int, background_C: Pixels) -> Tensor:
    """Pad with the background to a square, and resize it: (C, H, W) in [0, 1]."""
    height, width, channels = pixels_HWC.shape
    side = max(height, width)
    square_HWC = np.full((side, side, channels), background_C, np.float32)
    top, left = (side - height) // 2, (side - width) // 2
    square_HWC[top : top + height, left : left + width] = pixels_HWC
    return (_resized(torch.from_numpy(square_HWC).permute(2, 0, 1), side_px, side_px) / 255).clamp(
        0, 1
    )


def _resized(pixels_CHW: Tensor, height: int, width: int) -> Tensor:
    """With antialiasing."""
    size = (height, width)
    return F.interpolate(pixels_CHW[None], size=size, mode="bilinear", antialias=True)[0]
