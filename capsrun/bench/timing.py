"""Timing that can be trusted: in turns, with medians and spread, refused where it is noisy."""

import logging
import statistics
from collections.abc import Callable, Iterable, Mapping
from dataclasses import dataclass, field
from typing import Any

# With the CUDA compiler but no GPU, the import would warn of C++ extensions, which are not built.
logging.getLogger("torch.utils.cpp_extension").setLevel(logging.ERROR)
from torch.utils.benchmark import Measurement, TaskSpec, timer  # noqa: E402


@dataclass
class Task:
    """Something to be timed."""

    run: Callable[[int], None]
    """Does the work so many times."""
    amount: float = 0.0
    """Operations, or bytes, of doing it once."""
    repeats: int = 1
    """How often the work is done in one turn."""
    first_seconds: float = 0.0
    """Of doing it for the first time."""
    turns_seconds: list[float] = field(default_factory=list)
    """Of doing it once, from each turn."""

    def timed(self) -> float:
        """Seconds of doing it once, when it is done `repeats` times in a row."""
        began = timer()  # which waits for a GPU
        self.run(self.repeats)
        return (timer() - began) / self.repeats

    def warm_up(self, turn_seconds: float) -> None:
        """Do it for the first time, and choose how often a turn of about so long does it."""
        self.first_seconds = self.timed()
        if self.first_seconds > 10 * turn_seconds:  # the start is little of it, and waiting is long
            return
        for _ in range(2):  # the first guess may still hold something of the start
            self.repeats = max(1, round(turn_seconds / self.timed()))

    @property
    def median_seconds(self) -> float:
        return self._measurement.median

    @property
    def rate(self) -> float:
        """10⁹ operations, or bytes, a second."""
        return self.amount / 1e9 / self.median_seconds

    @property
    def spread_percent(self) -> float:
        """Interquartile range of the turns in percent of their median."""
        return 100 * self._measurement.iqr / self._measurement.median

    @property
    def _measurement(self) -> Measurement:
        return Measurement(1, self.turns_seconds, TaskSpec("", ""))


def time_in_turns(
    tasks: Mapping[str, Task],
    rounds: int,
    progress: Callable[[Iterable[Any]], Iterable[Any]] = iter,
) -> None:
    """Give each task its turn, `rounds` times: what disturbs the machine disturbs them all."""
    for _ in progress(range(rounds)):
        for task in tasks.values():
            task.turns_seconds.append(task.timed())


def ratio(slower: Task, faster: Task) -> float:
    """How many times faster: the median over rounds, each of which compares its own two turns."""
    return statistics.median(a / b for a, b in zip(slower.turns_seconds, faster.turns_seconds))
