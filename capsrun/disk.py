"""Files: written whole or not at all, read up to a size, and kept by one process at a time.

Nothing here imports PyTorch.
"""

import contextlib
import errno
import json
import math
import os
import platform
import re
import stat
import tempfile
from collections.abc import Callable, Iterable, Iterator, Mapping
from datetime import datetime
from pathlib import Path
from typing import Any

from filelock import FileLock, Timeout

from capsrun.errors import Busy, UserError, notice
from capsrun.terminal import size

PART = ".capsrun-part"
LOCK = ".lock"
ELSEWHERE = "choose another out_dir=…"
# `holder` takes a lock for a moment, to see whether it can; whoever wants it then tries again.
RETRY_SECONDS, PAUSE_SECONDS = 0.5, 0.02
# The largest text that capsrun writes is the metrics.jsonl of a long run, with a few MB.
MOST_TEXT_BYTES, MOST_YAML_BYTES, MOST_OWNER_BYTES = 50_000_000, 100_000, 1_000


@contextlib.contextmanager
def replacing(path: Path) -> Iterator[Path]:
    """Give a temporary path to write to, then rename it to `path`, which is never half-written.

    An OSError names `path`, where the system does not say which file it is about. Raises UserError
    for what is no file: root would rename over a device, which all other programs use too.
    """
    if path.exists() and not path.is_file():
        raise UserError(f"{path} is there, and is no file that could be replaced")
    # Short enough for any file system, though the name itself may be as long as it allows.
    temporary = path.with_name(f".{path.name[:40]}.{os.getpid()}{PART}")
    try:
        yield temporary
        with open(temporary, "rb") as stream:
            os.fsync(stream.fileno())
        with contextlib.suppress(OSError):  # who may read it, as before, where there was one
            temporary.chmod(stat.S_IMODE(path.stat().st_mode))
        temporary.replace(path)
        with contextlib.suppress(OSError):  # the new name too, where the system can: power may fail
            descriptor = os.open(path.parent, os.O_RDONLY)
            try:
                os.fsync(descriptor)
            finally:
                os.close(descriptor)
    except OSError as error:
        if error.errno is not None:  # it is of the system, and not of a network, say
            error.filename = error.filename or str(path)
        raise
    finally:
        with contextlib.suppress(OSError):  # what went wrong before is what the user is to hear of
            temporary.unlink(missing_ok=True)


def remove_leftovers(folder: Path) -> None:
    """Delete what killed processes left of `replacing` in a folder; only its owner may do that."""
    for path in folder.iterdir():
        match = re.fullmatch(rf"\..+\.(\d+){re.escape(PART)}", path.name)
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
        status = Path(f"/proc/{process}/stat").read_bytes()  # its name may be any bytes
        return status.rpartition(b")")[2].split()[0] != b"Z"
    except OSError:  # not Linux
        return True


def write_json(path: Path, values: Mapping[str, Any]) -> None:
    """Write indented JSON, with lists of numbers on one line; what is not finite becomes null."""
    text = json.dumps(finite(values), indent=2, ensure_ascii=False, allow_nan=False)
    text = re.sub(r"\[[\d\s.,e+-]*\]", lambda numbers: " ".join(numbers[0].split()), text)
    write_file(path, text + "\n")


def write_file(path: Path, text: str) -> None:
    """Write a text file, in UTF-8 whatever the locale; see `replacing`."""
    with replacing(path) as temporary:
        # It may name folders, whose names may be any bytes.
        temporary.write_text(text, encoding="utf-8", errors="replace", newline="")


def finite(values: Any) -> Any:
    """The same with None in place of NaN and infinity, which JSON does not have."""
    if isinstance(values, Mapping):
        return {key: finite(value) for key, value in values.items()}
    if isinstance(values, list | tuple):
        return [finite(value) for value in values]
    return None if isinstance(values, float) and not math.isfinite(values) else values


def make_folder(folder: Path) -> None:
    """Make a folder to write to. Raises UserError when that is not possible."""
    try:
        folder.mkdir(parents=True, exist_ok=True)
        with tempfile.TemporaryFile(dir=folder):
            pass  # permissions alone do not tell: the file system may be read-only or full
    except OSError as error:
        raise UserError(f"folder {folder} cannot be written to: {error.strerror}") from error


def is_plain(path: Path) -> bool:
    """Whether there is a file of this name, and no link to one, which may be of anybody."""
    return path.is_file() and not path.is_symlink()


def read_bytes(path: Path, most_bytes: int) -> bytes:
    """The content of a file.

    Raises OSError for one that cannot be opened, and ValueError, with the end of a sentence that
    begins with its name, for what is no regular file or is larger than `most_bytes`.
    """

    def at_once(name: str, flags: int) -> int:
        """A pipe would else be waited for until somebody writes to it."""
        return os.open(name, flags | os.O_NONBLOCK)

    with open(path, "rb", opener=at_once) as stream:
        status = os.fstat(stream.fileno())
        if not stat.S_ISREG(status.st_mode):
            raise ValueError("is no regular file")
        if status.st_size > most_bytes:
            raise ValueError(f"holds more than {size(most_bytes)}")
        return stream.read(status.st_size)


def read_json(path: Path) -> Any:
    """What a JSON file holds. Raises OSError or ValueError; see `read_bytes`."""
    return parse_json(read_bytes(path, MOST_TEXT_BYTES))


def parse_json(text: str | bytes) -> Any:
    """What a JSON text holds. Raises ValueError where it is none, or has what JSON does not."""

    def refuse(constant: str) -> None:
        raise ValueError(f"holds {constant}")

    try:
        return json.loads(text, parse_constant=refuse)
    except RecursionError:
        raise ValueError("is nested too deeply") from None


def read_yaml(path: Path) -> Any:
    """What a YAML file holds, as plain values. Raises OSError or ValueError; see `read_bytes`."""
    import yaml

    class Loader(yaml.SafeLoader):
        def compose_node(self, parent: Any, index: Any) -> Any:
            if self.check_event(yaml.AliasEvent):  # a few of them can stand for billions of values
                raise ValueError("has aliases")
            return super().compose_node(parent, index)

    try:
        return yaml.load(read_bytes(path, MOST_YAML_BYTES), Loader)
    except (yaml.YAMLError, RecursionError) as error:
        raise ValueError(f"is no YAML: {' '.join(str(error).split())}") from error


@contextlib.contextmanager
def locked(path: Path, doing: str | None = None) -> Iterator[Callable[[], bool]]:
    """Hold the lock that is a file of this path; the system takes it back from a dead process.

    Gives a function that tells whether it is still held: who deletes the file lets others take it.

    doing: what its owner does meanwhile: then whoever holds it now is waited for, and a line says
    so. Else raises Busy, naming the owner, if it is taken; UserError where something else than a
    plain file is there, a link say; and OSError for a lock that this user may not take.
    """
    refuse_unless_plain(path)
    lock = FileLock(path, poll_interval=PAUSE_SECONDS, thread_local=False)
    try:
        try:
            lock.acquire(timeout=RETRY_SECONDS)
        except Timeout:
            if doing is None:
                raise Busy(_taken(path)) from None
            print(f"{_taken(path)}, which is {doing}; waiting for it", flush=True)
            lock.acquire(timeout=-1)
    except OSError as error:
        if error.errno in (errno.EACCES, errno.EPERM, errno.EROFS):
            raise  # who may not take it cannot know that no other process is at work there
        notice(
            f"the file system of {path.parent} has no locks ({error.strerror}): nothing keeps two "
            "processes from writing there at once"
        )
    mine = _identity(path)
    try:
        since = f"{datetime.now().astimezone():%Y-%m-%d %H:%M:%S %Z}"
        # A full disk, of which others will tell. Replaced, so that no link is followed.
        with contextlib.suppress(OSError), replacing(_owner(path)) as temporary:
            owner = f"process {os.getpid()} on {platform.node()} since {since}"
            temporary.write_text(owner, encoding="utf-8")
        yield lambda: _identity(path) == mine
    finally:
        with contextlib.suppress(OSError):  # the folder may be gone, or the disk full
            # Else the file that says whose it is is another's; a lock may be gone before its end.
            if _identity(path) in (mine, None):
                _owner(path).unlink(missing_ok=True)
            lock.release()


@contextlib.contextmanager
def own_folder(folder: Path, *made: str, command: str | None = None) -> Iterator[None]:
    """Make a folder for what a command writes, and be the only process to write to it.

    made: patterns of the files that it writes. Where such are there, but not the lock that every
    folder has that capsrun made, they are somebody else's, and a UserError says so. command: where
    the first of them, which is JSON, has this `command`, they were only copied without their lock.
    Raises Busy while another process writes to the folder.
    """
    make_folder(folder)
    if command is None or not _is_of(folder / made[0], command):
        refuse_foreign(folder, made, ELSEWHERE)
    with locked(folder / LOCK):
        yield


def refuse_foreign(folder: Path, made: Iterable[str], instead: str) -> None:
    """Raise UserError for files of some patterns in a folder that has not capsrun's lock."""
    found = [path for pattern in made for path in folder.glob(pattern)]
    if found and not (folder / LOCK).exists():
        raise UserError(f"{min(found)} is there already, and capsrun did not make it; {instead}")


def _is_of(file: Path, command: str) -> bool:
    try:
        return read_json(file)["command"] == command
    except (OSError, ValueError, LookupError, TypeError):
        return False


def refuse_unless_plain(path: Path) -> None:
    """Raise UserError for a link, a pipe or the like: what is written there would go elsewhere."""
    if os.path.lexists(path) and not stat.S_ISREG(os.lstat(path).st_mode):
        raise UserError(f"{path} is no plain file, as those of capsrun are; delete it")


def refuse_if_locked(path: Path) -> None:
    """Raise Busy, naming its owner, if the lock that is a file of this path is taken."""
    if holder(path) is not None:
        raise Busy(_taken(path))


def holder(path: Path) -> str | None:
    """Which process holds the lock that is a file of this path; None if none does."""
    if not path.exists():
        return None
    try:
        with FileLock(path, thread_local=False).acquire(timeout=0):
            return None
    except Timeout:
        return _owner_of(path)
    except OSError:  # no locks here, or none that this user may take
        return None


def _taken(path: Path) -> str:
    return f"{path.parent} is in use by {_owner_of(path)}"


def _identity(path: Path) -> tuple[int, int] | None:
    """Which file this is, whatever it is called; None where there is none."""
    try:
        status = os.lstat(path)
    except OSError:
        return None
    return status.st_dev, status.st_ino


def _owner_of(path: Path) -> str:
    try:
        return read_bytes(_owner(path), MOST_OWNER_BYTES).decode() or "another process"
    except (OSError, ValueError):
        return "another process"


def _owner(path: Path) -> Path:
    """Where the owner of a lock is said: another program may empty the lock's own file."""
    return path.with_name(path.name + "-owner")
