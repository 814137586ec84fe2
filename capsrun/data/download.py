"""Downloads that show how far they are and go on where they were interrupted."""

import contextlib
import hashlib
import urllib.error
import urllib.request
from http.client import HTTPException
from pathlib import Path

from tqdm import tqdm

from capsrun.disk import locked
from capsrun.errors import UserError
from capsrun.terminal import size

TIMEOUT_SECONDS = 30
CHUNK_BYTES = 1 << 20


def obtain(url: str, path: Path, md5: str | None, title: str, otherwise: str) -> Path:
    """Make sure that `path` is there, downloading it from `url` when it is not; returns it.

    What has come so far is in `path` with `.part` at its end, and the next call goes on from there.
    md5: the published checksum of the file, or None. otherwise: what the user can do instead, for
    the message of the UserError that is raised when it cannot be had.
    """
    if path.is_file():
        return path
    part = path.with_name(path.name + ".part")
    new_folders = [folder for folder in path.parents if not folder.exists()]
    try:
        path.parent.mkdir(parents=True, exist_ok=True)
        with locked(path.with_name(path.name + ".lock"), f"downloading {title}"):
            if not path.is_file():  # else whoever was waited for has brought it
                print(f"{title} is not in {path.parent}; downloading {url}")
                _download(url, part)
                _keep(part, path, md5, url, otherwise)
    except (OSError, HTTPException) as error:
        reason = getattr(error, "reason", None) or error
        kept = part.stat().st_size if part.exists() else 0
        if not kept:  # a mistyped CAPSRUN_DATA leaves no empty folders behind
            with contextlib.suppress(OSError):
                for folder in new_folders:
                    folder.rmdir()
        resume = f" ({size(kept)} of it are kept: the same command goes on)" if kept else ""
        raise UserError(
            f"{title} is not in {path.parent} and could not be downloaded: {reason}{resume}; "
            f"{otherwise}"
        ) from error
    return path


def _keep(part: Path, path: Path, md5: str | None, url: str, otherwise: str) -> None:
    """Give a whole download its name. Raises UserError, and deletes it, if it is another file."""
    is_right = md5 is None or file_md5(part) == md5
    if is_right:
        part.replace(path)
    else:
        part.unlink()
    _version_file(part).unlink(missing_ok=True)
    if not is_right:
        raise UserError(
            f"what came from {url} does not have the published MD5 checksum and was deleted; "
            f"{otherwise}"
        )
    print(f"downloaded: {path} ({size(path.stat().st_size)})")


def _version_file(part: Path) -> Path:
    """Where it is kept of which version of the file on the server a part is."""
    return part.with_name(part.name + ".version")


def file_md5(path: Path) -> str:
    """MD5 of a file, in hexadecimal."""
    with path.open("rb") as stream:
        return hashlib.file_digest(stream, lambda: hashlib.md5(usedforsecurity=False)).hexdigest()


def _download(url: str, part: Path) -> None:
    """Fetch `url` into `part`, after what is there of it already. Raises OSError when it fails."""
    have = part.stat().st_size if part.exists() else 0
    request = urllib.request.Request(url, headers={"User-Agent": "capsrun"})
    version_file = _version_file(part)
    if have:
        request.add_header("Range", f"bytes={have}-")
        if version_file.exists():  # the rest is sent only if the file is still the same
            request.add_header("If-Range", version_file.read_text())
    try:
        answer = urllib.request.urlopen(request, timeout=TIMEOUT_SECONDS)
    except urllib.error.HTTPError as error:
        if error.code != 416 or not have:
            raise
        if error.headers.get("Content-Range") == f"bytes */{have}":
            return None  # all of it had come already
        part.unlink()  # it is of another file
        return _download(url, part)
    with answer:
        version = answer.headers.get("ETag") or answer.headers.get("Last-Modified")
        if version and not version.startswith("W/"):
            version_file.write_text(version)
        goes_on = answer.status == 206 and answer.headers.get("Content-Range", "").startswith(
            f"bytes {have}-"
        )
        start = have if goes_on else 0
        length = answer.headers.get("Content-Length")
        total = None if length is None else start + int(length)
        bar = tqdm(
            total=total,
            initial=start,
            unit="B",
            unit_scale=True,
            desc=part.name.removesuffix(".part"),
            leave=False,
            disable=None,
            dynamic_ncols=True,
        )
        with open(part, "ab" if goes_on else "wb") as stream, bar:
            while chunk := answer.read(CHUNK_BYTES):
                stream.write(chunk)
                bar.update(len(chunk))
            have = stream.tell()
    if total is not None and have != total:
        raise OSError(f"the connection broke after {size(have)} of {size(total)}")
    return None
