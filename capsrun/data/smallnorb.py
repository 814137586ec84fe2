"""smallNORB, from its official files: its own binary matrix format, whose names end in `.mat`.

Shapes: N pairs of images, C = 2 cameras, H and W pixels.
"""

import gzip
import hashlib
import io
import math
import zlib
from pathlib import Path

import torch
from torch import Tensor
from torch.nn import functional as F

from capsrun.config import DatasetConfig
from capsrun.data.batches import to_pixels
from capsrun.data.download import obtain
from capsrun.data.files import RawData, Source, read_at_most, stored_bytes
from capsrun.errors import UserError

URL = "https://cs.nyu.edu/~ylclab/data/norb-v1.0-small/"
TRAIN, TEST = (
    "smallnorb-5x46789x9x18x6x2x96x96-training",
    "smallnorb-5x01235x9x18x6x2x96x96-testing",
)
MD5 = {  # of the files as they are and as they are downloaded, compressed
    f"{TRAIN}-dat.mat": ("8138a0902307b32dfa0025a36dfa45ec", "66054832f9accfe74a0f4c36a75bc0a2"),
    f"{TRAIN}-cat.mat": ("fd5120d3f770ad57ebe620eb61a0b633", "23c8b86101fbf0904a000b43d3ed2fd9"),
    f"{TEST}-dat.mat": ("e9920b7f7b2869a8f1a12e945b2c166c", "e4ad715691ed5a3a5f138751a4ceb071"),
    f"{TEST}-cat.mat": ("fd5120d3f770ad57ebe620eb61a0b633", "5aa791cd7e6016cf957ce9bdb93b8603"),
}
CLASS_NAMES = ("animal", "human", "airplane", "truck", "car")
STORED_PX = 96
RESIZED_PX = 48  # §7
BYTES, INTEGERS = 0x1E3D4C55, 0x1E3D4C54
"""Magic numbers of matrices of bytes and of 32-bit integers."""
MAX_BYTES = 1_000_000_000
INSTEAD = "put the four files …-dat.mat and …-cat.mat of training and testing there, or their .gz"


def load(config: DatasetConfig) -> RawData:
    """Read the files from `data_dir/smallNORB`, compressed or not, downloading them if need be.

    The images are resized to 48×48. Raises UserError when they cannot be had or are damaged.
    """
    folder = Path(config.data_dir).expanduser() / "smallNORB"
    contents, sources = {}, []
    for name, (md5, gzip_md5) in MD5.items():
        path = folder / name
        if not path.is_file():
            path = obtain(f"{URL}{name}.gz", folder / f"{name}.gz", gzip_md5, "smallNORB", INSTEAD)
        contents[name] = _content(path)
        found = hashlib.md5(contents[name], usedforsecurity=False).hexdigest()
        if found != md5:
            raise UserError(
                f"{path} is damaged: its content does not have the published MD5 checksum; delete "
                "it and run the command again to download it"
            )
        sources.append(Source(name, found, verified=True))
    arrays: list[Tensor] = []
    for prefix in (TRAIN, TEST):
        dat, cat = f"{prefix}-dat.mat", f"{prefix}-cat.mat"
        images = parse(contents[dat], BYTES, dat)
        labels = parse(contents[cat], INTEGERS, cat)
        check_pair(images, labels, dat)
        arrays += [resize(images), labels.to(torch.uint8)]
    train_images, train_labels, test_images, test_labels = arrays
    return RawData(
        train_images, train_labels, test_images, test_labels, CLASS_NAMES, tuple(sources)
    )


def _content(path: Path) -> bytes:
    stored = stored_bytes(path, MAX_BYTES)
    if path.suffix != ".gz":
        return stored
    try:
        with gzip.GzipFile(fileobj=io.BytesIO(stored)) as stream:
            return read_at_most(stream, MAX_BYTES)
    except ValueError as error:
        raise UserError(f"{path} {error}: it is not smallNORB") from error
    except (OSError, EOFError, zlib.error) as error:
        raise UserError(f"{path} is damaged, cut short or cannot be read: {error}") from error


def parse(content: bytes, magic: int, name: str) -> Tensor:
    """A matrix: magic number, number of dimensions, at least three sizes, then the numbers.

    All of it is little-endian. Raises UserError, naming the file, for another kind of matrix or a
    length that does not fit.
    """

    def integer(place: int) -> int:
        return int.from_bytes(content[4 * place : 4 * place + 4], "little")

    if integer(0) != magic:
        raise UserError(
            f"{name} is not smallNORB: it begins with {integer(0):#x}, not the magic number "
            f"{magic:#x}"
        )
    dimensions = integer(1)
    if not 1 <= dimensions <= 4:
        raise UserError(f"{name} is damaged: it claims {dimensions} dimensions")
    sizes = [integer(2 + place) for place in range(dimensions)]
    header = 4 * (2 + max(3, dimensions))
    width = 1 if magic == BYTES else 4
    expected = header + width * math.prod(sizes)
    if len(content) != expected or not math.prod(sizes):
        raise UserError(
            f"{name} is damaged: its header promises {expected:,} bytes, and it has "
            f"{len(content):,}"
        )
    kind = torch.uint8 if magic == BYTES else torch.int32
    return torch.frombuffer(bytearray(content), dtype=kind, offset=header).reshape(sizes)


def check_pair(images_NCHW: Tensor, labels_N: Tensor, name: str) -> None:
    """Refuse images of another size, and labels that do not belong to them."""
    if images_NCHW.shape[1:] != (2, STORED_PX, STORED_PX):
        shape = tuple(images_NCHW.shape)
        raise UserError(f"{name} holds images of {shape}; smallNORB's are (N, 2, 96, 96)")
    if labels_N.shape != images_NCHW.shape[:1]:
        raise UserError(
            f"{name} holds {len(images_NCHW)} pairs but there are {len(labels_N)} labels"
        )
    if int(labels_N.min()) < 0 or int(labels_N.max()) >= len(CLASS_NAMES):
        raise UserError(f"the labels of {name} are not all 0 to 4")


def resize(images_NCHW: Tensor) -> Tensor:
    """Halve the size, each pixel the mean of four, rounded.

    Paper: silent about how. The authors' code takes every second pixel.
    """
    factor = STORED_PX // RESIZED_PX
    pieces = (F.avg_pool2d(to_pixels(piece), factor) for piece in images_NCHW.split(2048))
    return torch.cat([(255 * piece).round().to(torch.uint8) for piece in pieces])
