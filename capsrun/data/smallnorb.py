"""smallNORB, from its official files: its own binary matrix format, whose names end in `.mat`.

Shapes: N pairs of images, C = 2 cameras, H and W pixels.
"""

import math
from functools import partial
from pathlib import Path

import torch
from torch import Tensor
from torch.nn import functional as F

from capsrun.data.batches import to_pixels
from capsrun.data.files import (
    Home,
    RawData,
    Source,
    damaged,
    labelled,
    obtain,
    read_file,
    unpacked,
    verify,
)
from capsrun.data_config import DatasetConfig
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
STORED_PX = 96
RESIZED_PX = 48  # §7
BYTES, INTEGERS = 0x1E3D4C55, 0x1E3D4C54
"""Magic numbers of matrices of bytes and of 32-bit integers."""
INSTEAD = "put the four files …-dat.mat and …-cat.mat of training and testing there, or their .gz"


def load(config: DatasetConfig) -> RawData:
    """Read the files from `data_dir/smallNORB`, compressed or not, downloading them if need be.

    The images are resized to 48×48. Raises UserError when they cannot be had or are damaged.
    """
    home = Home(Path(config.data_dir), "smallNORB", "smallNORB", INSTEAD)
    arrays, sources = [], []
    for name, (md5, gzip_md5) in MD5.items():
        read = partial(read_matrix, BYTES if "-dat" in name else INTEGERS, md5)
        array, source = obtain(home, f"{name}.gz", [f"{URL}{name}.gz"], gzip_md5, read)
        arrays.append(array)
        sources.append(source)
    folder = home.data_dir / home.folder
    train, test = (
        labelled(images, labels, (2, STORED_PX, STORED_PX), 5, folder)
        for images, labels in (arrays[:2], arrays[2:])
    )
    train, test = (part._replace(images_NCHW=resize(part.images_NCHW)) for part in (train, test))
    return RawData(train, test, tuple(sources))


def read_matrix(magic: int, md5: str, path: Path) -> tuple[Tensor, Source]:
    """The matrix in a file, verified. Raises UserError for another file."""
    content = unpacked(path, read_file(path))
    source = verify(path, content, md5)
    return parse(content, magic, str(path)), source


def parse(content: bytes, magic: int, name: str) -> Tensor:
    """A matrix: magic number, number of dimensions, at least three sizes, then the numbers.

    All of it is little-endian. Raises UserError, naming the file, for another kind of matrix or a
    length that does not fit.
    """

    def integer(place: int) -> int:
        return int.from_bytes(content[4 * place : 4 * place + 4], "little")

    dimensions = integer(1)
    if integer(0) != magic or not 1 <= dimensions <= 4:
        raise UserError(
            f"{name} is not smallNORB: it begins with {integer(0):#x} and {dimensions} dimensions, "
            f"not the magic number {magic:#x} and 1 to 4"
        )
    sizes = [integer(2 + place) for place in range(dimensions)]
    header = 4 * (2 + max(3, dimensions))
    expected = header + (1 if magic == BYTES else 4) * math.prod(sizes)
    if len(content) != expected or expected == header:
        raise damaged(name, f"its header promises {expected:,} bytes, and it has {len(content):,}")
    kind = torch.uint8 if magic == BYTES else torch.int32
    return torch.frombuffer(bytearray(content), dtype=kind, offset=header).reshape(sizes)


def resize(images_NCHW: Tensor) -> Tensor:
    """Halve the size, each pixel the mean of four, rounded.

    Paper: silent about how. The authors' code takes every second pixel.
    """
    factor = STORED_PX // RESIZED_PX
    pieces = (F.avg_pool2d(to_pixels(piece), factor) for piece in images_NCHW.split(2048))
    return torch.cat([(255 * piece).round().to(torch.uint8) for piece in pieces])
