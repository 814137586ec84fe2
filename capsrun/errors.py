"""How mistakes and remarks reach the user."""

import contextlib
import difflib
import os
import re
import signal
import sys
import threading
from collections.abc import Callable, Iterable, Iterator
from types import FrameType
from typing import Any

from capsrun.terminal import YELLOW, printable_lines, styled


class UserError(Exception):
    """A mistake that the user can mend; its message is one sentence that says what to do.

    `cli.py` prints the message without a traceback and ends with exit code 2.
    """


class Noisy(Exception):
    """The machine was too busy with other things for a measurement to be quoted."""


class Busy(Exception):
    """Another process writes to the same place; the message names it."""


class Unfinished(Exception):
    """Some of the runs that were asked for failed; the others are done."""


class Stopped(Exception):
    """The user or the system asked a run to stop; its work so far is saved."""

    def __init__(self, message: str, signal_number: int) -> None:
        super().__init__(message)
        self.signal_number = signal_number

    def __reduce__(self) -> tuple[Any, ...]:
        """One process tells it to others; exceptions know only their first argument."""
        return Stopped, (str(self), self.signal_number)


def process_rank() -> tuple[int, int]:
    """Which of how many processes of a `torchrun` job this is; (0, 1) without one.

    Other launchers leave one of the two variables, or what is no number; that says nothing.
    """
    said = [os.environ.get(name, "") for name in ("RANK", "WORLD_SIZE")]
    if not all(re.fullmatch("[0-9]{1,9}", value) for value in said):
        return 0, 1
    rank, count = map(int, said)
    return (rank, count) if rank < count else (0, 1)


def is_out_of_memory(error: Exception) -> bool:
    """Whether it says that there is not enough memory; PyTorch has no class for that on the CPU."""
    said = ("can't allocate memory", "out of memory", "Storage size calculation overflowed")
    return isinstance(error, MemoryError) or any(words in str(error) for words in said)


# What the user was told during this run: its result repeats it.
notices: list[str] = []


def begin_run() -> None:
    """Forget what was told during an earlier run of this process, in a sweep say."""
    notices.clear()


def notice(message: str) -> None:
    """Tell the user something that they need not act upon, once a run."""
    if message not in notices:
        notices.append(message)
        if process_rank()[0] == 0:  # of several processes the first says what all of them find
            remark(message)


def remark(message: str) -> None:
    """Tell the user something about one run, which is not kept for others of this process."""
    print(f"{styled('note:', YELLOW, sys.stderr)} {printable_lines(message)}", file=sys.stderr)


@contextlib.contextmanager
def handling(handler: Callable[[int, FrameType | None], Any]) -> Iterator[None]:
    """Let Ctrl-C and SIGTERM call `handler`, where signals are this thread's business."""
    if threading.current_thread() is not threading.main_thread():
        yield
        return
    before = {number: signal.signal(number, handler) for number in (signal.SIGINT, signal.SIGTERM)}
    try:
        yield
    finally:
        for number, earlier in before.items():
            signal.signal(number, earlier or signal.SIG_DFL)  # None where it was set from C


def did_you_mean(word: str, known: Iterable[str]) -> str:
    """A hint such as `, did you mean 'seed'?`, or nothing when no known word is like this one."""
    known = list(known)
    # `iterations` is most likely meant for `routing.iterations`.
    ending = [name for name in known if name.endswith("." + word)]
    close = ending or difflib.get_close_matches(word, known, n=1)
    return f", did you mean {close[0]!r}?" if close else ""
