"""Timing that can be trusted: in turns, with medians and spread, refused where it is noisy."""

import statistics
import time
from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any

import torch

from capsrun.training.graph import capture, own_stream


@dataclass
class Task:
    """Something to be timed."""

    run: Callable[[int], None]
    """Does the work so many times."""
    repeats: int = 1
    """How often the work is done in one turn."""
    seconds: list[float] = field(default_factory=list)
    """Of doing it once, from each turn."""

    @property
    def median_seconds(self) -> float:
        return statistics.median(self.seconds)

    @property
    def spread_percent(self) -> float:
        return spread_percent(self.seconds)


def spread_percent(values: Sequence[float]) -> float:
    """Interquartile range in percent of the median; 0 for a single value."""
    if len(values) < 2:
        return 0.0
    low, _, high = statistics.quantiles(values, n=4, method="inclusive")
    return 100 * (high - low) / statistics.median(values)


def wait_for(device: torch.device) -> None:
    """Wait until the device has done what it was told to do."""
    if device.type == "cuda":
        torch.cuda.synchronize(device)


def timed(run: Callable[[int], None], repeats: int, device: torch.device) -> float:
    """Seconds of doing it once, when it is done `repeats` times in a row."""
    wait_for(device)
    began = time.perf_counter()
    run(repeats)
    wait_for(device)
    return (time.perf_counter() - began) / repeats


def warm_up(task: Task, turn_seconds: float, device: torch.device) -> float:
    """Choose how often a turn does the work; returns the seconds of doing it for the first time."""
    first = timed(task.run, 1, device)
    if first > 10 * turn_seconds:  # what the start added is little, and waiting is long
        return first
    for _ in range(2):  # the first guess may still hold something of the start
        once = timed(task.run, task.repeats, device)
        task.repeats = max(1, round(turn_seconds / once))
    return first


def time_in_turns(
    tasks: Mapping[str, Task],
    rounds: int,
    device: torch.device,
    progress: Callable[[Iterable[Any]], Iterable[Any]] = iter,
) -> None:
    """Give each task its turn, `rounds` times: what disturbs the machine disturbs them all."""
    for _ in progress(range(rounds)):
        for task in tasks.values():
            task.seconds.append(timed(task.run, task.repeats, device))


def ratio(slower: Task, faster: Task) -> float:
    """How many times faster: the median over rounds, each of which compares its own two turns."""
    return statistics.median(a / b for a, b in zip(slower.seconds, faster.seconds))


def captured(once: Callable[[], Any], device: torch.device) -> Callable[[int], None]:
    """Repeat some work; on a GPU as a captured graph, so that the host's time does not count."""
    repeat: Callable[[], Any] = once
    if device.type == "cuda":
        with own_stream(device):
            repeat = capture(once).replay

    def run(count: int) -> None:
        for _ in range(count):
            repeat()

    return run
