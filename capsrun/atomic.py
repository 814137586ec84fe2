"""Files that are there whole or not at all, whatever happens while they are written."""

import contextlib
import os
import re
from collections.abc import Iterator
from pathlib import Path

SUFFIX = ".capsrun-part"


@contextlib.contextmanager
def replacing(path: Path) -> Iterator[Path]:
    """Give a temporary path to write to, then rename it to `path`, which is never half-written."""
    temporary = path.with_name(f".{path.name}.{os.getpid()}{SUFFIX}")
    try:
        yield temporary
        with open(temporary, "rb") as stream:
            os.fsync(stream.fileno())
        temporary.replace(path)
        _sync_folder(path.parent)
    finally:
        with contextlib.suppress(OSError):  # what went wrong before is what the user is to hear of
            temporary.unlink(missing_ok=True)


def _sync_folder(folder: Path) -> None:
    """Have the new name on the disk too, where the system can: a power cut may come now."""
    with contextlib.suppress(OSError):
        descriptor = os.open(folder, os.O_RDONLY)
        try:
            os.fsync(descriptor)
        finally:
            os.close(descriptor)


def remove_leftovers(folder: Path) -> None:
    """Delete what killed processes left of `replacing` in a folder; only its owner may do that."""
    for path in folder.iterdir():
        match = re.fullmatch(rf"\..+\.(\d+){re.escape(SUFFIX)}", path.name)
        if match and path.is_file() and not is_alive(int(match[1])):
            path.unlink(missing_ok=True)


def is_alive(process: int) -> bool:
    """Whether a process of this machine runs; one whose end was not looked at yet does not."""
    try:
        os.kill(process, 0)
    except (ProcessLookupError, OverflowError):
        return False
    except PermissionError:  # it is somebody else's
        return True
    try:
        return Path(f"/proc/{process}/stat").read_text().rpartition(")")[2].split()[0] != "Z"
    except OSError:  # not Linux
        return True
