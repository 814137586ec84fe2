"""Files on disk: find, fetch, verify and parse the idx format of MNIST.

Shapes: N images, C channels, H and W pixels.
"""

import contextlib
import gzip
import hashlib
import io
import math
import tempfile
import zlib
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from capsrun.disk import locked, read_bytes
from capsrun.errors import UserError
from capsrun.terminal import size

# The largest of the files is 47 MB; more than this is no MNIST file, whatever its header says.
MAX_FILE_BYTES = 200_000_000


@dataclass(frozen=True)
class RawData:
    """A data set as it is on disk."""

    train_images: Tensor
    """(N, C, H, W) uint8."""
    train_labels: Tensor
    """(N,) uint8."""
    test_images: Tensor
    test_labels: Tensor
    class_names: tuple[str, ...]
    sources: tuple["Source", ...]


@dataclass(frozen=True)
class Source:
    """Where some of the data came from and what vouches for it."""

    name: str
    md5: str
    verified: bool
    """False where only the structure could be checked, no published checksum."""


@dataclass(frozen=True)
class IdxFile:
    """One of the four files of an MNIST-like data set, with the checksums that are published."""

    name: str
    """File name without `.gz`."""
    content_md5: str | None
    """MD5 of the uncompressed file, where it is known."""
    gzip_md5: str | None
    """MD5 of the published `.gz`, where it is known."""


def read_idx(folder: Path, file: IdxFile, dimensions: int) -> tuple[Tensor, Source]:
    """Read `file` from `folder`, compressed or not, verify it, and parse it to a uint8 tensor.

    dimensions: 1 for labels, 3 for images. Raises UserError for a file that is missing, cannot be
    read, is damaged, or is not of this kind.
    """
    path = find_idx(folder, file)
    if path is None:
        raise UserError(f"{folder / file.name} is missing, with and without .gz")
    stored = stored_bytes(path, MAX_FILE_BYTES)
    content = _decompress(path, stored) if path.suffix == ".gz" else stored
    array = parse_idx(content, dimensions, path)
    md5 = hashlib.md5(content, usedforsecurity=False).hexdigest()
    if file.content_md5 is not None:
        verified = md5 == file.content_md5
    elif path.suffix == ".gz" and file.gzip_md5 is not None:
        verified = hashlib.md5(stored, usedforsecurity=False).hexdigest() == file.gzip_md5
    else:
        # Only the compressed file has a published checksum and it is not here.
        return array, Source(path.name, md5, verified=False)
    if not verified:
        raise UserError(
            f"{path} is damaged: its content does not have the published MD5 checksum; "
            "delete it and run the command again to download it"
        )
    return array, Source(path.name, md5, verified=True)


def read_at_most(stream: Any, most_bytes: int) -> bytes:
    """All that an unpacked stream gives, piece by piece. Raises ValueError where it is too much."""
    content = bytearray()
    while piece := stream.read(1 << 20):
        content += piece
        if len(content) > most_bytes:
            raise ValueError(f"holds more than {size(most_bytes)}")
    return bytes(content)


def stored_bytes(path: Path, most_bytes: int) -> bytes:
    """The content of a file. Raises UserError where it cannot be read or is not to be believed."""
    try:
        return read_bytes(path, most_bytes)
    except OSError as error:
        raise UserError(f"{path} cannot be read: {error.strerror}") from error
    except ValueError as error:
        raise UserError(f"{path} {error}") from error


def find_idx(folder: Path, file: IdxFile) -> Path | None:
    """The file as .gz or not, whichever is there."""
    candidates = [folder / f"{file.name}.gz", folder / file.name]
    try:
        return next((path for path in candidates if path.is_file()), None)
    except PermissionError as error:
        raise UserError(f"{folder} cannot be read: {error.strerror}") from error


def _decompress(path: Path, stored: bytes) -> bytes:
    try:
        with gzip.GzipFile(fileobj=io.BytesIO(stored)) as stream:
            return read_at_most(stream, MAX_FILE_BYTES)
    except ValueError as error:
        raise UserError(f"{path} {error}: it is not an MNIST file") from error
    except (OSError, EOFError, zlib.error) as error:
        raise UserError(
            f"{path} is damaged or cut short ({error}); delete it and run the command again to "
            "download it"
        ) from error


def parse_idx(content: bytes, dimensions: int, path: Path) -> Tensor:
    """Parse idx: two zero bytes, type 8 (uint8), the number of dimensions, each size, the data.

    Raises UserError, naming `path`, for another magic number or a length that does not fit.
    """
    magic = bytes([0, 0, 8, dimensions])
    if content[:4] != magic:
        found = content[:4].hex() or "nothing"
        raise UserError(
            f"{path} is not an idx file of {dimensions} dimension(s): it begins with {found}, not "
            f"{magic.hex()}"
        )
    header = 4 + 4 * dimensions
    sizes = [int.from_bytes(content[i : i + 4], "big") for i in range(4, header, 4)]
    expected = header + math.prod(sizes)
    if len(content) != expected:
        raise UserError(
            f"{path} is damaged: its header promises {expected} bytes, and it has {len(content)}"
        )
    if len(content) == header:
        raise UserError(f"{path} is empty: it holds no images")
    return torch.frombuffer(bytearray(content), dtype=torch.uint8, offset=header).reshape(sizes)


def fetch(
    download: Callable[[Path], None],
    is_there: Callable[[], bool],
    raw_folder: str,
    data_dir: Path,
    title: str,
) -> None:
    """Download a data set into a temporary folder, then move its files to `data_dir/raw_folder`.

    download: puts files below the folder it is given, under `raw_folder`; OSError and
    RuntimeError mean that it failed. So an interrupted download leaves no file that looks whole.
    is_there: whether it has come meanwhile, as another process was downloading it.
    Raises UserError when the download fails or the folder cannot be written.
    """
    target = data_dir / raw_folder
    is_new = not data_dir.exists()
    try:
        data_dir.mkdir(parents=True, exist_ok=True)
        lock = locked(data_dir / f".{title}.lock", f"downloading {title}")
        with lock, tempfile.TemporaryDirectory(dir=data_dir, prefix=".download-") as temporary:
            if is_there():
                return
            print(f"{title} is not in {target}; downloading it")
            try:
                download(Path(temporary))
            except (OSError, RuntimeError) as error:
                raise UserError(
                    f"{title} is not in {target} and could not be downloaded ({_short(error)}); "
                    "put its four .gz files there, or set CAPSRUN_DATA to the folder that holds "
                    f"{raw_folder}; dataset=mnist5k works without a download"
                ) from error
            target.mkdir(parents=True, exist_ok=True)
            for path in (Path(temporary) / raw_folder).iterdir():
                path.replace(target / path.name)
    except UserError:
        if is_new:  # a mistyped CAPSRUN_DATA leaves no empty folder behind
            with contextlib.suppress(OSError):
                data_dir.rmdir()
        raise
    except OSError as error:
        raise UserError(
            f"{title} is not in {target}, and that folder cannot be written: {error.strerror}; "
            "set CAPSRUN_DATA to a folder that holds it or can be written; dataset=mnist5k works "
            "without a download"
        ) from error


def _short(error: Exception) -> str:
    return str(error).split("\n")[0].rstrip(":") or type(error).__name__
