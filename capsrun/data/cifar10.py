"""CIFAR-10, from its official binary version, which holds nothing that could be run."""

import hashlib
import io
import tarfile
import zlib
from pathlib import Path

import torch
from torch import Tensor

from capsrun.config import DatasetConfig
from capsrun.data.download import obtain
from capsrun.data.files import RawData, Source, stored_bytes
from capsrun.errors import UserError

URL = "https://www.cs.toronto.edu/~kriz/cifar-10-binary.tar.gz"
MD5 = "c32a1d4ab5d03f1284b67883e8d87530"
FOLDER = "cifar-10-batches-bin"
TRAIN = tuple(f"data_batch_{number}.bin" for number in range(1, 6))
TEST = ("test_batch.bin",)
RECORDS = 10_000
"""Images in each file: a byte for the class, then 32×32 bytes each of red, green and blue."""
RECORD_BYTES = 1 + 3 * 32 * 32
MAX_BYTES = 200_000_000
"""Most that the archive may have; it has 170 MB."""
CLASS_NAMES = (
    "airplane",
    "automobile",
    "bird",
    "cat",
    "deer",
    "dog",
    "frog",
    "horse",
    "ship",
    "truck",
)
INSTEAD = "put cifar-10-binary.tar.gz or the folder cifar-10-batches-bin there"


def load(config: DatasetConfig) -> RawData:
    """Read the files from `data_dir`, in their folder or in the archive, downloading it if need be.

    Raises UserError when they cannot be had or are damaged.
    """
    data_dir = Path(config.data_dir).expanduser()
    names = (*TRAIN, *TEST)
    folder = data_dir / FOLDER
    if all((folder / name).is_file() for name in names):
        contents = {name: stored_bytes(folder / name, RECORDS * RECORD_BYTES) for name in names}
        md5 = hashlib.md5(b"".join(contents.values()), usedforsecurity=False).hexdigest()
        source = Source(FOLDER, md5, verified=False)
    else:
        archive = obtain(URL, data_dir / "cifar-10-binary.tar.gz", MD5, "CIFAR-10", INSTEAD)
        contents, source = _unpacked(archive, names)
    pieces = {name: parse(content, name) for name, content in contents.items()}
    train_images, train_labels = (torch.cat([pieces[n][i] for n in TRAIN]) for i in range(2))
    test_images, test_labels = pieces[TEST[0]]
    return RawData(train_images, train_labels, test_images, test_labels, CLASS_NAMES, (source,))


def _unpacked(archive: Path, names: tuple[str, ...]) -> tuple[dict[str, bytes], Source]:
    """The named files of the archive, read without unpacking it to disk."""
    content = stored_bytes(archive, MAX_BYTES)
    md5 = hashlib.md5(content, usedforsecurity=False).hexdigest()
    if md5 != MD5:
        raise UserError(
            f"{archive} is damaged: it does not have the published MD5 checksum; delete it and run "
            "the command again to download it"
        )
    contents = {}
    try:
        with tarfile.open(fileobj=io.BytesIO(content)) as tar:
            for name in names:
                member = tar.extractfile(f"{FOLDER}/{name}")
                contents[name] = b"" if member is None else member.read()
    except (tarfile.TarError, KeyError, OSError, EOFError, zlib.error) as error:
        raise UserError(f"{archive} is damaged: {error}") from error
    return contents, Source(archive.name, md5, verified=True)


def parse(content: bytes, name: str) -> tuple[Tensor, Tensor]:
    """Images (N, 3, 32, 32) and labels (N,), uint8, of one file.

    Raises UserError, naming it, when it has another size or a class beyond the ten.
    """
    if len(content) != RECORDS * RECORD_BYTES:
        raise UserError(
            f"{FOLDER}/{name} is damaged or cut short: it has {len(content):,} bytes, not "
            f"{RECORDS * RECORD_BYTES:,}"
        )
    records = torch.frombuffer(bytearray(content), dtype=torch.uint8).reshape(-1, RECORD_BYTES)
    labels = records[:, 0].clone()
    if int(labels.max()) >= len(CLASS_NAMES):
        raise UserError(f"{FOLDER}/{name} is damaged: it holds class {int(labels.max())} of ten")
    return records[:, 1:].reshape(-1, 3, 32, 32).clone(), labels
