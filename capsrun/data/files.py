"""The files of data sets: downloaded where they are missing, read, and checked.

Shapes: N images, C channels, H and W pixels.
"""

import contextlib
import gzip
import hashlib
import io
import re
import sys
from collections.abc import Callable, Iterator, Sequence
from pathlib import Path
from typing import Any, NamedTuple, TypeVar

import torch
from torch import Tensor

from capsrun import disk
from capsrun.errors import UserError

# The largest, affNIST's test set, has about 600 MB.
MOST_BYTES = 1_000_000_000
AGAIN = "; delete it and run the command again to download it"

T = TypeVar("T")


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
    sources: tuple[Source, ...]


class Home(NamedTuple):
    """Where the files of a data set belong, and what is said when they cannot be had."""

    data_dir: Path
    folder: str
    """Of the data set, in `data_dir`; empty: that folder itself."""
    title: str
    instead: str
    """What the user can do otherwise."""

    @property
    def names(self) -> frozenset[str]:
        """What folders of the data set are called, as `plain` has it."""
        return frozenset(map(plain, (*Path(self.folder).parts[:1], self.title)))


def obtain(
    home: Home, name: str, urls: Sequence[str], md5: str | None, read: Callable[[Path], T]
) -> T:
    """What `read` makes of a file of a data set, which is downloaded where it is not at hand.

    name: what the file is called in its folder; others are tried after it, see `alike`. urls: its
    addresses, of which the first that answers is taken. md5: its published checksum, or None.
    read: raises UserError for another file. A file that is downloaded is whole or not there at all.
    Raises UserError where the file in its place is not the right one, or it cannot be had.
    """
    path = home.data_dir / home.folder / name
    folder = path.parent
    try:
        own = [found for found in (path, folder / without_gz(name)) if found.is_file()]
        new_folders = [parent for parent in path.parents if not parent.exists()]
    except OSError as error:
        raise UserError(f"{folder} cannot be read: {error.strerror}") from error
    refused = []
    for found in (*own, *(other for other in alike(home, name) if other not in own)):
        try:
            return read(found)
        except UserError as error:
            refused.append(error)
    if own:
        raise refused[0]
    try:
        disk.make_folder(folder)
        lock = folder / f".{path.name}.lock"
        with disk.locked(lock, f"downloading {home.title}"):
            try:
                if not path.is_file():  # else whoever was waited for has brought it
                    _download(path, urls, md5, home.title)
            finally:
                lock.unlink(missing_ok=True)
    except (OSError, UserError) as error:
        with contextlib.suppress(OSError):  # a mistyped CAPSRUN_DATA leaves no empty folder behind
            for parent in new_folders:
                parent.rmdir()
        others = "".join(f"{str(other).removesuffix(AGAIN)}; " for other in refused[:1])
        raise UserError(
            f"{home.title} is not in {folder} and could not be downloaded: {error}; "
            f"{others}{home.instead}"
        ) from error
    return read(path)


def alike(home: Home, name: str) -> Iterator[Path]:
    """Files in or near the folder of a data set that may be the one called `name`.

    They are called like it but for case, punctuation, compression and the number of a copy:
    `train-images.idx3-ubyte`, `train-images-idx3-ubyte (1).gz`. They are in `data_dir`, or in
    folders in it that are called like the data set, the file, `data` or `raw`.
    """
    shown = Path(without_gz(name).removesuffix(".zip"))
    copy, packed = r"(copy)?\d{0,2}", "(gz|zip)?"
    pattern = f"{plain(shown.stem)}{copy}{plain(shown.suffix)}{packed}{copy}{packed}"
    return _alike(home.data_dir, pattern, home.names | {"data", "raw"}, 4)


def _alike(folder: Path, pattern: str, names: frozenset[str], levels: int) -> Iterator[Path]:
    with contextlib.suppress(OSError):  # what cannot be read is not at hand
        for path in sorted(folder.iterdir()):
            is_file_name = bool(re.fullmatch(pattern, plain(path.name)))
            if path.name.startswith(".") or not (is_file_name or plain(path.name) in names):
                continue
            if is_file_name and path.is_file():
                yield path
            elif levels and path.is_dir():
                yield from _alike(path, pattern, names, levels - 1)


def plain(name: str) -> str:
    """A name without case and punctuation, by which names are compared."""
    return re.sub(r"[\W_]", "", name.lower())


def without_gz(name: str) -> str:
    """The name of a file when it is not compressed."""
    return name.removesuffix(".gz")


def _download(path: Path, urls: Sequence[str], md5: str | None, title: str) -> None:
    """Raises OSError, which says why, when no address gives the file or it cannot be written."""
    import pooch  # late: it takes a tenth of a second
    from requests import RequestException

    # What the server compresses on the way would have another length and checksum.
    plainly = {"Accept-Encoding": "identity"}
    fetch = pooch.HTTPDownloader(sys.stderr.isatty(), chunk_size=1 << 20, headers=plainly)
    failures: dict[str, list[str]] = {}
    for url in urls:
        print(f"{title} is not in {path.parent}; downloading {url}")
        try:
            with disk.replacing(path) as temporary:
                fetch(url, temporary, None)
                _check_download(disk.read_bytes(temporary, MOST_BYTES), md5)
            return
        except (RequestException, ValueError) as error:
            failures.setdefault(_cause(error), []).append(url)
        except OSError as error:
            if error.errno is not None:  # of the disk; else of a file of certificates, say
                raise
            failures.setdefault(_cause(error), []).append(url)
    raise OSError(", and ".join(f"{' and '.join(of)}: {why}" for why, of in failures.items()))


def _check_download(content: bytes, md5: str | None) -> None:
    """Raise ValueError where it is not the file: networks answer with pages of their own."""
    if is_web_page(content):
        raise ValueError("a web page came instead of the file, of the network's login perhaps")
    if md5 is not None and md5_of(content) != md5:
        raise ValueError("the file does not have the published MD5 checksum")


def _cause(error: BaseException) -> str:
    """What a failed request comes from: the system says it in fewer words than those around it."""
    from requests.exceptions import ProxyError

    of = "the proxy: " if isinstance(error, ProxyError) else ""
    while inner := error.__cause__ or error.__context__:
        error = inner
    said = " ".join(str(error).partition(" for url: ")[0].split()).rstrip(".")
    return f"{of}{said or type(error).__name__}"


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
    return UserError(f"{name} is damaged or cut short: {why}{AGAIN}")


def read_file(path: Path) -> bytes:
    """The content of a file as it is stored. Raises UserError where it cannot be read.

    So it does for a web page, which a download without a look at its result leaves.
    """
    try:
        content = disk.read_bytes(path, MOST_BYTES)
    except OSError as error:
        raise UserError(f"{path} cannot be read: {error.strerror}") from error
    except ValueError as error:
        raise UserError(f"{path} {error}") from error
    if is_web_page(content):
        raise UserError(f"{path} is a web page, not the file that it is named after{AGAIN}")
    return content


def is_web_page(content: bytes) -> bool:
    """Whether it is HTML or XML: a login or an error in place of what was asked for."""
    beginning = content[:200].removeprefix(b"\xef\xbb\xbf").lstrip().lower()
    return beginning.startswith((b"<!doctype", b"<html", b"<?xml"))


def unpacked(path: Path, stored: bytes) -> bytes:
    """The content of a file that may be compressed, whatever its name says of that.

    Raises UserError for a damaged one.
    """
    with parsing(path):
        return gzip.decompress(stored) if is_gzip(stored) else stored


def is_gzip(stored: bytes) -> bool:
    """Whether a file is compressed as `.gz`."""
    return stored.startswith(b"\x1f\x8b")


def md5_of(content: bytes) -> str:
    """MD5 in hexadecimal."""
    return hashlib.md5(content, usedforsecurity=False).hexdigest()


def verify(path: Path, content: bytes, md5: str) -> Source:
    """The file as a verified source. Raises UserError where its content has another checksum."""
    found = md5_of(content)
    if found != md5:
        raise damaged(path, "it does not have the published MD5 checksum")
    return Source(str(path), found, verified=True)


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
