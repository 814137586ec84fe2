"""Locks between processes, which the system takes back from a process that dies.

They are of the kind `flock`, which works between processes of one machine, and on shared folders
between machines.
"""

import contextlib
import fcntl
import os
import platform
import time
from collections.abc import Iterator
from datetime import datetime
from pathlib import Path
from typing import TextIO

from capsrun.errors import Busy, notice

NAME = ".lock"
# `holder` takes the lock for a moment, to see whether it can; whoever wants it then tries again.
RETRY_SECONDS, PAUSE_SECONDS = 0.5, 0.02
WAIT_SECONDS = 1.0


@contextlib.contextmanager
def locked(path: Path) -> Iterator[None]:
    """Hold the lock that is a file of this path. Raises Busy, naming its owner, if it is taken."""
    stream = _take(path, RETRY_SECONDS)
    try:
        yield
    finally:
        _give_back(path, stream)


@contextlib.contextmanager
def locked_in_turn(path: Path, doing: str) -> Iterator[None]:
    """Hold the lock that is a file of this path, after whoever holds it now.

    doing: what its owner does meanwhile, for the line that says what is waited for.
    """
    try:
        stream = _take(path, RETRY_SECONDS)
    except Busy as busy:
        print(f"{busy}, which is {doing}; waiting for it", flush=True)
        stream = _take(path, None)
    try:
        yield
    finally:
        _give_back(path, stream)


def refuse_if_locked(path: Path) -> None:
    """Raise Busy, naming its owner, if the lock that is a file of this path is taken."""
    owner = holder(path)
    if owner is not None:
        raise Busy(_taken(path, owner))


def _taken(path: Path, owner: str) -> str:
    return f"{path.parent} is in use by {owner}"


def holder(path: Path) -> str | None:
    """Which process holds the lock that is a file of this path; None if none does."""
    try:
        stream = open(path)
    except OSError:
        return None
    with stream:
        try:
            fcntl.flock(stream, fcntl.LOCK_SH | fcntl.LOCK_NB)
        except BlockingIOError:
            return stream.read().strip() or "another process"
        except OSError:  # no locks here, so nobody has one
            return None
    return None


def _take(path: Path, patience_seconds: float | None) -> TextIO:
    """Create and lock a file; the lock is kept until it is closed. None: wait without end."""
    began = time.monotonic()
    while True:
        stream = open(path, "a+")
        try:
            fcntl.flock(stream, fcntl.LOCK_EX | fcntl.LOCK_NB)
            if _is_at(stream, path):
                break
            stream.close()  # its last owner has deleted it between the two lines
            continue
        except BlockingIOError:
            stream.seek(0)
            owner = stream.read().strip() or "another process"
            stream.close()
        except OSError as error:
            notice(
                f"the file system of {path.parent} has no locks ({error.strerror}): nothing keeps "
                "two processes from writing there at once"
            )
            break
        if patience_seconds is not None and time.monotonic() - began > patience_seconds:
            raise Busy(_taken(path, owner))
        time.sleep(PAUSE_SECONDS if patience_seconds is not None else WAIT_SECONDS)
    stream.truncate(0)
    now = datetime.now().astimezone()
    stream.write(f"process {os.getpid()} on {platform.node()} since {now:%Y-%m-%d %H:%M:%S %Z}\n")
    stream.flush()
    return stream


def _is_at(stream: TextIO, path: Path) -> bool:
    try:
        return os.path.samestat(os.fstat(stream.fileno()), path.stat())
    except FileNotFoundError:
        return False


def _give_back(path: Path, stream: TextIO) -> None:
    with contextlib.suppress(OSError):  # the folder may be gone
        if _is_at(stream, path):
            path.unlink()
    with contextlib.suppress(OSError):  # a disk may be full, even for this line
        stream.close()
