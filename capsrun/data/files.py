"""The files of data sets: downloaded where they are missing, read, and checked.

Shapes: N images, C channels, H and W pixels.
"""

import contextlib
import gzip
import hashlib
import io
import sys
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import Any, NamedTuple

import torch
from torch import Tensor

from capsrun import disk
from capsrun.errors import UserError

# The largest, affNIST's test set, has about 600 MB.
MOST_BYTES = 1_000_000_000


class Part(NamedTuple):
    """The images and labels of one part of a data set."""

    images_NCHW: Tensor
    """uint8."""
    labels_N: Tensor


class Source(NamedTuple):
    """Where some of the data came from and what vouches for it."""

    name: str
    md5: str
    verified: bool
    """False where only the structure could be checked, no published checksum."""


class RawData(NamedTuple):
    """A data set as it is on disk."""

    train: Part
    test: Part
    class_names: tuple[str, ...]
    sources: tuple[Source, ...]


def obtain(path: Path, urls: Sequence[str], md5: str | None, title: str, instead: str) -> Path:
    """Find a file, if it is a `.gz` compressed or not, or download it; returns where it is.

    urls: its addresses, of which the first that answers is taken. md5: its published checksum, or
    None. instead: what the user can do otherwise, for the message of the UserError that is raised
    when it cannot be had. A file that is downloaded is whole or not there at all.
    """
    folder = path.parent
    plain = path.with_suffix("") if path.suffix == ".gz" else path
    try:
        for found in (path, plain):
            if found.is_file():
                return found
        new_folders = [parent for parent in path.parents if not parent.exists()]
    except OSError as error:
        raise UserError(f"{folder} cannot be read: {error.strerror}") from error
    try:
        disk.make_folder(folder)
        lock = folder / f".{path.name}.lock"
        with disk.locked(lock, f"downloading {title}"):
            try:
                if not path.is_file():  # else whoever was waited for has brought it
                    _download(path, urls, md5, title)
            finally:
                lock.unlink(missing_ok=True)
    except (OSError, ValueError, UserError) as error:
        with contextlib.suppress(OSError):  # a mistyped CAPSRUN_DATA leaves no empty folder behind
            for parent in new_folders:
                parent.rmdir()
        raise UserError(
            f"{title} is not in {folder} and could not be downloaded: {error}; {instead}"
        ) from error
    return path


def _download(path: Path, urls: Sequence[str], md5: str | None, title: str) -> None:
    """Raises OSError when no address answers, and ValueError for a file of another checksum."""
    import pooch  # late: it takes a tenth of a second

    pooch.get_logger().setLevel("WARNING")
    for url in urls:
        print(f"{title} is not in {path.parent}; downloading {url}")
        # What the server compresses on the way would have another length and checksum.
        plainly = {"Accept-Encoding": "identity"}
        fetch = pooch.HTTPDownloader(sys.stderr.isatty(), chunk_size=1 << 20, headers=plainly)
        known_hash = None if md5 is None else f"md5:{md5}"
        try:
            pooch.retrieve(url, known_hash, path.name, path.parent, downloader=fetch)
            return
        except ValueError:
            failure: Exception = ValueError(f"{url} does not have the published MD5 checksum")
        except OSError as error:
            failure = OSError(f"{url}: {_cause(error)}")
    raise failure


def _cause(error: BaseException) -> BaseException:
    """What a failed request comes from: the system says it in fewer words than those around it."""
    while inner := error.__cause__ or error.__context__:
        error = inner
    return error


@contextlib.contextmanager
def parsing(name: object) -> Iterator[None]:
    """Turn whatever goes wrong with the content of a file into one sentence.

    The libraries that take files apart fail in many ways on those that are damaged.
    """
    try:
        yield
    except UserError:
        raise
    except Exception as error:
        raise damaged(name, " ".join(str(error).split()) or type(error).__name__) from error


def damaged(name: object, why: str) -> UserError:
    """The message about a file that cannot be used."""
    return UserError(
        f"{name} is damaged or cut short: {why}; delete it and run the command again to download it"
    )


def read_file(path: Path) -> bytes:
    """The content of a file as it is stored. Raises UserError where it cannot be read."""
    try:
        return disk.read_bytes(path, MOST_BYTES)
    except OSError as error:
        raise UserError(f"{path} cannot be read: {error.strerror}") from error
    except ValueError as error:
        raise UserError(f"{path} {error}") from error


def unpacked(path: Path, stored: bytes) -> bytes:
    """The content of a file that may be compressed as `.gz`. Raises UserError for a damaged one."""
    with parsing(path):
        return gzip.decompress(stored) if path.suffix == ".gz" else stored


def md5_of(content: bytes) -> str:
    """MD5 in hexadecimal."""
    return hashlib.md5(content, usedforsecurity=False).hexdigest()


def verify(path: Path, content: bytes, md5: str) -> Source:
    """The file as a verified source. Raises UserError where its content has another checksum."""
    found = md5_of(content)
    if found != md5:
        raise damaged(path, "it does not have the published MD5 checksum")
    return Source(path.name, found, verified=True)


def read_mat(content: bytes, name: object) -> dict[str, Any]:
    """The variables of a MATLAB file, structs as dicts. Raises UserError for a damaged one."""
    from scipy.io import loadmat  # late: it takes a third of a second

    with parsing(name):
        return loadmat(io.BytesIO(content), simplify_cells=True)


def labelled(
    images_NCHW: Tensor, labels_N: Tensor, shape: Sequence[int], classes: int, name: object
) -> Part:
    """Images with their labels.

    shape: C, H and W that they should have. Raises UserError, naming the file, for others, and for
    labels that do not belong to them.
    """
    if tuple(images_NCHW.shape[1:]) != tuple(shape):
        expected = "×".join(map(str, shape))
        found = "×".join(map(str, images_NCHW.shape[1:]))
        raise UserError(f"{name} holds images of {found}, not {expected}")
    if labels_N.shape != images_NCHW.shape[:1]:
        raise UserError(f"{name} holds {len(images_NCHW)} images but {labels_N.numel()} labels")
    if not len(labels_N) or int(labels_N.min()) < 0 or int(labels_N.max()) >= classes:
        raise UserError(f"{name} holds labels other than 0 to {classes - 1}, or none")
    return Part(images_NCHW, labels_N.to(torch.uint8))
