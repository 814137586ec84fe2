"""Reads an image of one's own as the images of a data set are: of digits, light ink on black.

Shapes: C channels, H and W pixels.
"""

import importlib.util
import io
import warnings
from pathlib import Path

import numpy as np
import torch
from numpy.typing import NDArray
from PIL import Image, ImageOps, UnidentifiedImageError
from torch import Tensor

from capsrun.data.ink import as_digit, ink_of, resized
from capsrun.data.sets import made_of
from capsrun.data_config import DatasetConfig
from capsrun.errors import UserError

Pixels = NDArray[np.float32]
"""From 0 to 255."""

# Pillow knows more formats, for some of which it runs other programs.
FORMATS = ("PNG", "JPEG", "GIF", "BMP", "TIFF", "WEBP", "PPM", "AVIF", "HEIF")
MOST_SIDE_PX = 8192
TOO_LARGE = f"it has more than {MOST_SIDE_PX:,} pixels on a side; make it smaller"
# As large as an image is looked through for its ink.
LOOKED_THROUGH_PX = 1024
# Of 255: what differs less from its background is noise.
LEAST_CONTRAST = 25
INVERTED = "inverted to light on dark"


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
    of_ink, digit_px = made_of(config)
    is_drawing = invert != "false" and of_ink
    image, remarks = opened(path)
    if is_drawing and digit_px is not None and image.size != (config.image_px,) * 2:
        digits_px = digit_px + (config.digits - 1) * config.shift_px  # two are moved apart
        read = _digit(image, config.image_px, digits_px, True if invert == "true" else None)
    else:
        image = image.convert("L" if config.channels == 1 else "RGB")
        read = _whole(image, config.image_px, is_drawing, invert == "true")
    if read is None:
        raise UserError(f"there is no ink in {path}: nothing in it stands out from its background")
    return read[0], remarks + read[1]


def _digit(
    image: Image.Image, side: int, digits_px: int, dark: bool | None
) -> tuple[Tensor, list[str]] | None:
    """The ink of an image as a digit of MNIST, and remarks; None without ink, see `ink_of`."""
    resizing = _resizing(image, side)
    image.thumbnail((LOOKED_THROUGH_PX, LOOKED_THROUGH_PX))
    found = ink_of(np.asarray(image, np.float32), dark)
    if found is None:
        return None
    ink_HW, is_dark, on_sheet = found
    remarks = ["the sheet cut out of what it lies on"] if on_sheet else []
    remarks += [INVERTED] if is_dark else []
    remarks.append(f"{resizing}: its ink, {digits_px} pixels long, centred by its mass")
    return torch.from_numpy(as_digit(ink_HW, side, digits_px))[None], remarks


def _whole(
    image: Image.Image, side: int, is_drawing: bool, dark: bool
) -> tuple[Tensor, list[str]] | None:
    """The image padded to a square and resized, and remarks; None where it has one shade only.

    A drawing is made light on black. dark: whether its ink surely is dark.
    """
    remarks = []
    pixels_HWC = np.asarray(image, np.float32).reshape(image.height, image.width, -1)
    ink_HWC = pixels_HWC - _background(pixels_HWC)
    if dark or (is_drawing and -ink_HWC.min() > ink_HWC.max()):
        pixels_HWC, ink_HWC = 255 - pixels_HWC, -ink_HWC
        remarks.append(INVERTED)
    if (ink_HWC.max() if is_drawing else np.ptp(ink_HWC)) < (LEAST_CONTRAST if is_drawing else 1):
        return None
    background_C = _background(pixels_HWC)
    if is_drawing and background_C.any():
        pixels_HWC, background_C = ink_HWC.clip(min=0) * (255 / ink_HWC.max()), 0 * background_C
        remarks.append("the shade of its background taken away")
    if image.size != (side, side):
        padding = "" if image.width == image.height else "padded to a square and "
        remarks.append(padding + _resizing(image, side))
    return _to_square(pixels_HWC, side, background_C), remarks


def _resizing(image: Image.Image, side: int) -> str:
    return f"resized from {image.width}×{image.height} to {side}×{side} pixels"


def opened(path: Path | io.BytesIO, called: str | None = None) -> tuple[Image.Image, list[str]]:
    """The image of a file, and remarks. Raises UserError, see `read_image`.

    called: what it is in messages, its path if that is not said.
    """
    called = called or str(path)
    if isinstance(path, Path) and path.exists() and not path.is_file():
        raise UserError(f"{path} is no image file")
    try:
        with warnings.catch_warnings():
            warnings.simplefilter("error", Image.DecompressionBombWarning)
            with Image.open(path, formats=_formats()) as opened:
                return _as_paper(opened)
    except FileNotFoundError:
        raise UserError(f"there is no image {path}") from None
    except UnidentifiedImageError:
        raise UserError(f"{called} cannot be read as an image: {_advice(path)}") from None
    except (Image.DecompressionBombWarning, Image.DecompressionBombError):
        raise UserError(f"{called} cannot be read as an image: {TOO_LARGE}") from None
    except Exception as error:  # Pillow fails in many ways on a damaged file
        raise UserError(f"{called} cannot be read as an image (PNG, JPEG, …): {error}") from error


def _formats() -> tuple[str, ...]:
    """Those that can be read here: AVIF from Pillow 11.3 on, HEIC with the package pillow-heif."""
    if importlib.util.find_spec("pillow_heif") is not None:
        importlib.import_module("pillow_heif").register_heif_opener()
    Image.init()
    return tuple(name for name in FORMATS if name in Image.OPEN)


def _advice(path: Path | io.BytesIO) -> str:
    """What to do about a file that is no image, or of a format that Pillow does not know."""
    content = path.read_bytes() if isinstance(path, Path) else path.getvalue()
    start = content[:12]
    if not start:
        return "it is empty"
    if start[4:8] == b"ftyp" and start[8:12] in (b"avif", b"avis"):
        return "save it as JPEG or PNG (AVIF needs Pillow 11.3 or newer)"
    if start[4:8] == b"ftyp":
        return "save it as JPEG or PNG, or pip install pillow-heif"
    return "it is no picture, or of a format that is not read; save it as JPEG or PNG"


def _as_paper(opened: Image.Image) -> tuple[Image.Image, list[str]]:
    """The image upright, opaque and with 8 bits, and remarks. Raises ValueError where it cannot."""
    if max(opened.size) > MOST_SIDE_PX:
        raise ValueError(f"{opened.width:,}×{opened.height:,} pixels: {TOO_LARGE}")
    image: Image.Image = ImageOps.exif_transpose(opened)
    if image.mode.startswith("I;16"):
        values_HW = np.asarray(image)
        full = 4095 if values_HW.max() <= 4095 else 65535  # 12 bits, as many cameras have
        image = Image.fromarray((values_HW * (255 / full)).astype(np.uint8))
    if image.mode in ("I", "F"):
        raise ValueError("pixels of 32 bits have no known range")
    if "A" not in image.getbands() and "transparency" not in image.info:
        return image.convert("RGB"), []
    image = image.convert("RGBA")
    opacity_HW = np.asarray(image.getchannel("A"), np.float32)
    if opacity_HW.min() == 255:
        return image.convert("RGB"), []
    # What is drawn in light ink would not be seen on white.
    ink_HW = np.asarray(image.convert("RGB").convert("L"), np.float32)
    colour = "black" if (opacity_HW * (ink_HW - 127.5)).sum() > 0 else "white"
    paper = Image.new("RGBA", image.size, colour)
    remarks = [f"transparent parts taken as {colour} paper"]
    return Image.alpha_composite(paper, image).convert("RGB"), remarks


def _background(pixels_HWC: Pixels) -> Pixels:
    """The shade (C) of the paper: the median along the border."""
    edges = pixels_HWC[0], pixels_HWC[-1], pixels_HWC[:, 0], pixels_HWC[:, -1]
    return np.median(np.concatenate(edges), axis=0)


def _to_square(pixels_HWC: Pixels, side_px: int, background_C: Pixels) -> Tensor:
    """Pad with the background to a square, and resize it: (C, H, W) in [0, 1]."""
    height, width, channels = pixels_HWC.shape
    side = max(height, width)
    square_HWC = np.full((side, side, channels), background_C, np.float32)
    top, left = (side - height) // 2, (side - width) // 2
    square_HWC[top : top + height, left : left + width] = pixels_HWC
    return (resized(torch.from_numpy(square_HWC).permute(2, 0, 1), side_px, side_px) / 255).clamp(
        0, 1
    )
