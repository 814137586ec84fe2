"""While a run goes on: how far it is, how long it took, and whether it is asked to stop."""

import signal
import sys
import threading
import time
from collections.abc import Iterable, Iterator, Mapping
from contextlib import contextmanager
from typing import Any

from tqdm import tqdm

from capsrun.errors import Stopped, process_rank
from capsrun.terminal import duration


class ProgressLine:
    """How far the run is: a tqdm bar on a terminal, a plain line now and then elsewhere."""

    PLAIN_EVERY_SECONDS = 10.0

    def __init__(self, start: int, total: int, batch_size: int, shown: bool = True) -> None:
        """batch_size: images of a step. shown: whether there is a bar; lines go to stdout."""
        self.total, self.batch_size, self.step = total, batch_size, start
        self.bar = tqdm(
            initial=start,
            total=total,
            unit="img",
            unit_scale=batch_size,
            disable=None if shown else True,
            dynamic_ncols=True,
        )
        # When and after which step the last plain line was printed.
        self.printed_at, self.printed_step = time.monotonic(), start

    def advance(self, steps: int) -> None:
        self.step += steps
        self.bar.update(steps)

    def show(self, values: Mapping[str, float], images_per_second: float) -> None:
        """Show the latest numbers, and how fast training is while it is not tested."""
        text = ", ".join(f"{name} {value:.4f}" for name, value in values.items())
        self.bar.set_postfix_str(text, refresh=False)
        now = time.monotonic()
        passed = now - self.printed_at
        last = self.step == self.total
        if self.bar.disable and (last or passed >= self.PLAIN_EVERY_SECONDS):
            rate = (self.step - self.printed_step) / max(passed, 1e-9)
            self.printed_at, self.printed_step = now, self.step
            left = duration((self.total - self.step) / max(rate, 1e-9))
            speed = f"{images_per_second:.0f} images/s"
            print(f"step {self.step:,} of {self.total:,}: {text}, {speed}, {left} left", flush=True)

    def say(self, line: str) -> None:
        """Print a line that stays, without breaking the bar."""
        if self.bar.disable:
            print(line, flush=True)
        else:
            self.bar.write(line)

    def close(self) -> None:
        self.bar.close()


def bar(items: Iterable[Any], unit: str = "batch", doing: str | None = None) -> Iterable[Any]:
    """Show a progress bar over batches, on a terminal only; it disappears when they are done.

    unit: what one of the items is. doing: what is done with them.
    """
    return tqdm(items, unit=f" {unit}", desc=doing, leave=False, disable=None, dynamic_ncols=True)


class StopRequest:
    """Whether the user or the system has asked the run to stop, and with which signal."""

    signal_number: int = 0

    @property
    def asked(self) -> bool:
        return self.signal_number != 0


def stoppable(items: Iterable[Any], stop: StopRequest) -> Iterator[Any]:
    """The same items, as long as nobody asks to stop. Raises Stopped then."""
    for item in items:
        if stop.asked:
            raise Stopped(
                "stopped while it was tested; what was trained is saved", stop.signal_number
            )
        yield item


class Stopwatch:
    """Counts seconds while it runs; goes on from those of an interrupted run."""

    def __init__(self, seconds: float = 0.0) -> None:
        self._before = seconds
        self._started: float | None = None

    @property
    def seconds(self) -> float:
        running = 0.0 if self._started is None else time.perf_counter() - self._started
        return self._before + running

    @contextmanager
    def running(self) -> Iterator[None]:
        self._started = time.perf_counter()
        try:
            yield
        finally:
            self._before, self._started = self.seconds, None

    @contextmanager
    def paused(self) -> Iterator[None]:
        self._before, self._started = self.seconds, None
        try:
            yield
        finally:
            self._started = time.perf_counter()


@contextmanager
def stop_requests() -> Iterator[StopRequest]:
    """Turn Ctrl-C, SIGTERM and a closed terminal into a request that is seen between two steps.

    A second one stops at once. Elsewhere than in the main thread signals are not ours.
    """
    request = StopRequest()
    in_main = threading.current_thread() is threading.main_thread()
    numbers = [signal.SIGINT, signal.SIGTERM] if in_main else []
    if in_main and signal.getsignal(signal.SIGHUP) != signal.SIG_IGN:  # as nohup has it
        numbers.append(signal.SIGHUP)

    def ask(number: int, _: Any) -> None:
        request.signal_number = number
        restore()
        if process_rank()[0] == 0:
            said = "\nstopping after this step; once more stops at once"
            print(said, file=sys.stderr, flush=True)

    def restore() -> None:
        for number, handler in before.items():
            signal.signal(number, handler)

    before = {number: signal.signal(number, ask) for number in numbers}
    try:
        yield request
    finally:
        restore()
