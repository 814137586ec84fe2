"""Reads an image of one's own as the images of the data sets are: light ink on black, square.

Shapes: C channels, H and W pixels.
"""

from pathlib import Path

import numpy as np
import torch
from PIL import Image, ImageOps
from torch import Tensor
from torch.nn import functional as F

from capsrun.errors import UserError

# Pillow knows more formats, for some of which it runs other programs.
FORMATS = ("PNG", "JPEG", "GIF", "BMP", "TIFF", "WEBP", "PPM")
MOST_SIDE_PX = 8192


def read_image(path: Path, image_px: int, channels: int, invert: str) -> tuple[Tensor, list[str]]:
    """Read an image file as pixels (C, H, W) in [0, 1], light ink on black as in the data sets.

    Another size is padded to a square with its background and resized; dark ink on light paper is
    inverted (`invert`: auto, true or false). Returns what was done to it, too.
    Raises UserError for a file that is missing or no image, and for a number of channels that no
    such file has.
    """
    if channels not in (1, 3):
        raise UserError(
            "an image of one's own is for models of grey or colour images, not of images of "
            f"{channels} channels"
        )
    if path.exists() and not path.is_file():
        raise UserError(f"{path} is no image file")
    try:
        with Image.open(path, formats=FORMATS) as opened:
            image, remarks = _as_paper(opened, "L" if channels == 1 else "RGB")
    except FileNotFoundError:
        raise UserError(f"there is no image {path}") from None
    except Exception as error:  # Pillow fails in many ways on a damaged file
        raise UserError(f"{path} cannot be read as an image (PNG, JPEG, …): {error}") from error

    pixels_HWC = np.asarray(image, dtype=np.float32).reshape(image.height, image.width, channels)
    border = np.concatenate([pixels_HWC[0], pixels_HWC[-1], pixels_HWC[:, 0], pixels_HWC[:, -1]])
    if invert == "true" or (invert == "auto" and border.mean() > 127.5):
        pixels_HWC, border = 255 - pixels_HWC, 255 - border
        remarks.append(
            "inverted, for the model knows light ink on black (perturb.invert=false keeps it)"
        )
    if image.size != (image_px, image_px):
        square = "padded to a square and " if image.width != image.height else ""
        size = f"{image.width}×{image.height} to {image_px}×{image_px} pixels"
        remarks.append(f"{square}resized from {size}")
    pixels_CHW = torch.from_numpy(pixels_HWC).permute(2, 0, 1)
    return _to_square(pixels_CHW, image_px, float(np.median(border))).clamp(0, 255) / 255, remarks


def _as_paper(opened: Image.Image, mode: str) -> tuple[Image.Image, list[str]]:
    """The image upright, opaque and with 8 bits, and remarks. Raises ValueError where it cannot."""
    if max(opened.size) > MOST_SIDE_PX:
        raise ValueError(
            f"{opened.width:,}×{opened.height:,} pixels are more than {MOST_SIDE_PX:,} on "
            "a side; make it smaller"
        )
    image: Image.Image = ImageOps.exif_transpose(opened)
    if image.mode.startswith("I;16"):
        image = Image.fromarray((np.asarray(image) // 257).astype(np.uint8))
    if image.mode in ("I", "F"):
        raise ValueError("pixels of 32 bits have no known range")
    if "A" not in image.getbands() and "transparency" not in image.info:
        return image.convert(mode), []
    paper = Image.new("RGBA", image.size, "white")
    image = Image.alpha_composite(paper, image.convert("RGBA"))
    return image.convert(mode), ["transparent parts taken as white paper"]


def _to_square(pixels_CHW: Tensor, image_px: int, background: float) -> Tensor:
    """Pad with the background to a square, and resize it with antialiasing."""
    height, width = pixels_CHW.shape[1:]
    side = max(height, width)
    top, left = (side - height) // 2, (side - width) // 2
    margins = (left, side - width - left, top, side - height - top)
    square_CHW = F.pad(pixels_CHW, margins, value=background)
    size = (image_px, image_px)
    return F.interpolate(square_CHW[None], size=size, mode="bilinear", antialias=True)[0]
