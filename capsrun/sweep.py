"""The jobs of a sweep, wherever they run: how each ended, and how they are told to stop.

A launcher may run jobs in other processes or on other machines, so that all that they share with
the command that began them is a folder. Each job writes there how it ended and what it printed; a
file named `stop` in it asks those that run to save and end, and the others not to begin.
"""

import contextlib
import json
import os
import shutil
import signal
import socket
import sys
import threading
import time
import traceback
from collections import Counter
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from dataclasses import asdict, dataclass, field, replace
from pathlib import Path
from types import FrameType
from typing import Any

from capsrun.compose import compose, start_hydra, task_words
from capsrun.disk import is_alive, replacing
from capsrun.errors import Busy, Noisy, Stopped, Unfinished, UserError
from capsrun.runs.reader import read_metrics
from capsrun.terminal import BOLD, duration, styled

RUNNING, FINISHED, FAILED, INTERRUPTED, WAITING = (
    "running",
    "finished",
    "failed",
    "interrupted",
    "not begun",
)
POLL_SECONDS = 0.3
# How it is said that a job did not finish.
NOT_FINISHED = {
    FAILED: "failed",
    INTERRUPTED: "interrupted",
    RUNNING: "ended without a word (killed? out of memory?)",
    WAITING: "not begun",
}
# What is called with the number of a signal and where it came.
Handler = Callable[[int, FrameType | None], Any]
# What the user has set for capsrun, for workers that do not inherit it.
VARIABLES = "CAPSRUN_"


@dataclass(frozen=True)
class Done:
    """What a command says about a job that it has done."""

    objective: float | None = None
    """What a sweep that searches is to make small."""
    already: bool = False
    """Whether it was done before."""


@dataclass(frozen=True)
class Outcome:
    """How one job ended, or that it is running."""

    job: str
    state: str
    message: str = ""
    user_error: bool = False
    """Whether it failed by a mistake that the user can mend."""
    already: bool = False
    apart: bool = True
    """Whether it runs in another process than the command; its output is then in a file."""
    signal_number: int = 0
    """What interrupted it."""
    objective: float | None = None
    """The error in percent on the validation images, if there are any."""


def _place() -> tuple[str, str]:
    """The machine, and the job of Slurm if there is one: where process numbers can be compared."""
    return socket.gethostname(), os.environ.get("SLURM_JOB_ID", "")


def _variables() -> dict[str, str]:
    return {name: value for name, value in os.environ.items() if name.startswith(VARIABLES)}


@dataclass(frozen=True)
class Sweep:
    """A sweep as its jobs know it: they take it along to where they run."""

    folder: Path
    """Absolute, and on a file system that every machine sees."""
    pid: int = field(default_factory=os.getpid)
    process_group: int = field(default_factory=lambda: os.getpgid(0))
    place: tuple[str, str] = field(default_factory=_place)
    working_folder: str = field(default_factory=os.getcwd)
    variables: dict[str, str] = field(default_factory=_variables)

    @property
    def stop_file(self) -> Path:
        return self.folder / "stop"

    def run(self, number: int, job: str, work: Callable[[], Done | None]) -> float | None:
        """Do the work of a job here and write down how it ended; returns its objective.

        No mistake and no fault leaves this function, as each launcher would do something else
        about it, and the other jobs are to go on. A job that failed has no objective.
        """
        apart = os.getpid() != self.pid
        if self.told_to_stop():
            self.write(number, Outcome(job, WAITING, apart=apart))
            return None
        self.write(number, Outcome(job, RUNNING, apart=apart))
        if not apart:
            print(f"\n{styled(f'{job}:', BOLD)}", flush=True)
        with self.settled_here(number) if apart else handling(signal.default_int_handler):
            outcome = outcome_of(job, work)
        self.write(number, replace(outcome, apart=apart))
        if outcome.state == FAILED and not apart:
            print(f"failed: {outcome.message}", file=sys.stderr, flush=True)
        if outcome.state == INTERRUPTED and not apart:  # only this job was told
            self.ask_to_stop(outcome.signal_number)
        if apart and self.command_is_gone():
            os._exit(1)  # a worker would wait minutes for more work from nobody
        return outcome.objective

    def ask_to_stop(self, signal_number: int) -> None:
        """Ask every job to save and end, or not to begin."""
        self.folder.mkdir(parents=True, exist_ok=True)
        self.stop_file.write_text(str(signal_number))

    def told_to_stop(self) -> bool:
        """Whether somebody asked for that, or the command that began the sweep is gone."""
        return self.stop_file.exists() or self.command_is_gone()

    def command_is_gone(self) -> bool:
        """Whether the command that began the sweep has died, where that can be seen."""
        return self.place == _place() and not is_alive(self.pid)

    @contextlib.contextmanager
    def settled_here(self, number: int) -> Iterator[None]:
        """Make a worker's process like the one that began the sweep, and put it back after that.

        Its output goes into a file. It is told to stop by way of the folder alone: it leaves the
        process group that a terminal sends Ctrl-C to, as a second signal would end it unsaved.
        """
        if self.place == _place() and os.getpgid(0) == self.process_group:
            os.setpgid(0, 0)
        os.environ.update(self.variables)
        before = os.getcwd()
        os.chdir(self.working_folder)
        try:
            with (
                open(self.folder / f"{number}.log", "a", buffering=1) as log,
                contextlib.redirect_stdout(log),
                contextlib.redirect_stderr(log),
                self.heeding_stop(),
            ):
                yield
        finally:
            os.chdir(before)

    @contextlib.contextmanager
    def heeding_stop(self) -> Iterator[None]:
        """Turn a request to stop into SIGTERM, on which training saves and everything else ends."""
        over = threading.Event()

        def watch() -> None:
            while not over.wait(POLL_SECONDS):
                if self.told_to_stop():
                    return os.kill(os.getpid(), signal.SIGTERM)

        watcher = threading.Thread(target=watch, daemon=True)
        with handling(signal.default_int_handler):
            watcher.start()
            try:
                yield
            finally:
                over.set()
                watcher.join()

    def write(self, number: int, outcome: Outcome) -> None:
        """Write down how a job ended, or that it runs; the file is never half-written."""
        self.folder.mkdir(parents=True, exist_ok=True)
        with replacing(self.folder / f"{number}.json") as temporary:
            temporary.write_text(json.dumps(asdict(outcome)))

    def outcomes(self) -> dict[int, Outcome]:
        """How the jobs that were begun ended, by their numbers."""
        files = sorted(self.folder.glob("*.json"), key=lambda file: int(file.stem))
        return {int(file.stem): Outcome(**json.loads(file.read_text())) for file in files}

    def last_line_of(self, number: int) -> str:
        """The last line that a job printed."""
        try:
            return (self.folder / f"{number}.log").read_text().strip().split("\n")[-1].strip()
        except OSError:
            return ""

    def log_of(self, number: int) -> str:
        """Where the output of a job is, as seen from here."""
        return os.path.relpath(self.folder / f"{number}.log")


def outcome_of(job: str, work: Callable[[], Done | None]) -> Outcome:
    """Do the work of a job; returns how it ended."""
    began = time.monotonic()
    try:
        done = work() or Done()
    except Stopped as stopped:
        return Outcome(job, INTERRUPTED, str(stopped), signal_number=stopped.signal_number)
    except KeyboardInterrupt:
        return Outcome(job, INTERRUPTED, "stopped at once", signal_number=signal.SIGINT)
    except UserError as error:
        return Outcome(job, FAILED, str(error), user_error=True)
    except (Busy, Noisy, Unfinished, OSError) as error:
        return Outcome(job, FAILED, str(error))
    except Exception as error:  # a fault of ours, but the other jobs go on all the same
        traceback.print_exc()
        return Outcome(job, FAILED, first_line(error))
    message = "already" if done.already else f"in {duration(time.monotonic() - began)}"
    return Outcome(job, FINISHED, message, already=done.already, objective=done.objective)


@contextlib.contextmanager
def handling(handler: Handler) -> Iterator[None]:
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


@contextlib.contextmanager
def insisting(handler: Handler, sweep: Sweep) -> Iterator[None]:
    """Take SIGTERM back from whoever takes it over: Ray does, when it begins, to end at once.

    Only the main thread may say who handles a signal, so another one, which looks, calls it by
    SIGUSR1.
    """
    if threading.current_thread() is not threading.main_thread():
        yield
        return
    over, main = threading.Event(), threading.get_ident()

    def look() -> None:
        while not over.wait(POLL_SECONDS) and not sweep.stop_file.exists():
            if signal.getsignal(signal.SIGTERM) is not handler:
                signal.pthread_kill(main, signal.SIGUSR1)

    def take_back(number: int, frame: FrameType | None) -> None:
        if not sweep.stop_file.exists():
            signal.signal(signal.SIGTERM, handler)

    before = signal.signal(signal.SIGUSR1, take_back)
    looking = threading.Thread(target=look, daemon=True)
    looking.start()
    try:
        yield
    finally:
        over.set()
        looking.join()
        signal.signal(signal.SIGUSR1, before)


@contextlib.contextmanager
def conducted(sweep: Sweep) -> Iterator[None]:
    """While its jobs run: say what they do and pass Ctrl-C on to them; then say how they ended.

    Raises Stopped when they were asked to stop; else UserError when jobs failed, all by mistakes
    that the user can mend; else Unfinished when some did not finish.
    """

    def ask(number: int, frame: FrameType | None) -> None:
        for name in (signal.SIGINT, signal.SIGTERM):
            signal.signal(name, signal.default_int_handler)
        sweep.ask_to_stop(number)
        print("\nstopping the jobs; once more stops at once", file=sys.stderr, flush=True)

    early: Exception | None = None
    over = threading.Event()
    reporter = threading.Thread(target=report_until, args=(sweep, over), daemon=True)
    reporter.start()
    try:
        with handling(ask), insisting(ask, sweep):
            yield
    except Exception as error:
        early = error if isinstance(error, UserError) else Unfinished(first_line(error))
    finally:
        over.set()
        reporter.join()
        show_summary(sweep.outcomes())
    if early is not None and not sweep.outcomes():  # no job was begun
        raise early
    if early is not None:
        print(f"the sweep ended early: {early}", file=sys.stderr)
    settle(sweep)
    if early is not None:
        raise early


def first_line(error: Exception) -> str:
    """What an error of somebody else's says, in short."""
    return f"{type(error).__name__}: {next(iter(str(error).strip().splitlines()), '')}"


def report_until(sweep: Sweep, over: threading.Event) -> None:
    """Print a line when a job begins or ends elsewhere, until `over` is set."""
    shown: dict[int, Outcome] = {}
    while True:
        last = over.wait(POLL_SECONDS)  # then look once more
        for number, outcome in sweep.outcomes().items():
            if outcome.apart and outcome != shown.get(number):
                print(line_about(sweep, number, outcome), flush=True)
                shown[number] = outcome
        if last:
            return


def line_about(sweep: Sweep, number: int, outcome: Outcome) -> str:
    """What is said when a job begins or ends in another process."""
    if outcome.state == RUNNING:
        return f"{outcome.job}: running, its output is in {sweep.log_of(number)}"
    if outcome.state == FINISHED:
        answer = sweep.last_line_of(number)
        return f"{outcome.job}: finished {outcome.message}{f': {answer}' if answer else ''}"
    return f"{outcome.job}: {outcome.state}{f': {outcome.message}' if outcome.message else ''}"


def show_summary(outcomes: Mapping[int, Outcome]) -> None:
    """Print how many jobs ended in which way, and why those that did not finish did not."""
    if not outcomes:
        return
    states = Counter(outcome.state for outcome in outcomes.values())
    already = sum(outcome.already for outcome in outcomes.values())
    finished = f"{states[FINISHED]} finished" + (f" ({already} already)" if already else "")
    others = [f"{states[state]} {said}" for state, said in NOT_FINISHED.items() if states[state]]
    print(flush=True)
    show_objectives(outcomes.values())
    print(f"sweep: {', '.join([finished, *others])}", flush=True)
    for outcome in outcomes.values():
        if outcome.state in (FAILED, INTERRUPTED):
            print(f"{outcome.job}: {outcome.state}: {outcome.message}", file=sys.stderr)
        elif outcome.state == RUNNING:
            print(f"{outcome.job}: {NOT_FINISHED[RUNNING]}", file=sys.stderr)


def show_objectives(outcomes: Iterable[Outcome]) -> None:
    """Print a table of the jobs that have been tested on validation images, the best first."""
    tested = [
        (outcome.objective, outcome.job) for outcome in outcomes if outcome.objective is not None
    ]
    if not tested:
        return
    words = [set(job.split()) for _, job in tested]
    shared = set.intersection(*words) if len(words) > 1 else set()
    print("validation error  job")
    for error, job in sorted(tested):
        own = " ".join(word for word in job.split() if word not in shared)
        print(f"{error:>14.2f} %  {own}")


def settle(sweep: Sweep) -> None:
    """Raise what the whole sweep comes to, or forget how its jobs ended if all of them finished."""
    outcomes = sweep.outcomes().values()
    if sweep.stop_file.exists():
        raise Stopped("stopped; what was running is saved", int(sweep.stop_file.read_text()))
    if all(outcome.state == FINISHED for outcome in outcomes):
        return shutil.rmtree(sweep.folder, ignore_errors=True)
    failed = [outcome for outcome in outcomes if outcome.state == FAILED]
    left = sum(outcome.state not in (FINISHED, FAILED) for outcome in outcomes)
    again = "the same command runs what is not finished"
    if left == 0 and all(outcome.user_error for outcome in failed):
        raise UserError(f"{counted(len(failed))} of the sweep failed, as said above; {again}")
    raise Unfinished(f"{counted(len(failed) + left)} of the sweep did not finish; {again}")


def counted(jobs: int) -> str:
    return "1 job" if jobs == 1 else f"{jobs} jobs"


def last_validation_error(run: Path) -> float | None:
    """The error in percent on the validation images as a run found it last; None without them."""
    key = "error_percent/validation"
    errors = [row[key] for row in read_metrics(run) if key in row]
    return errors[-1] if errors else None


@dataclass(frozen=True)
class SweepJob:
    """What Hydra calls with the configuration of each job of a sweep, wherever that runs."""

    command: str
    arguments: tuple[str, ...]
    """Of the sweep."""
    sweep: Sweep

    def __call__(self, cfg: Any) -> float | None:
        from hydra.core.hydra_config import HydraConfig

        from capsrun.cli import run_command

        words = task_words()
        said = {word.replace(" ", "") for word in self.arguments}
        number = HydraConfig.get().job.num
        own = [word for word in words if word.replace(" ", "") not in said]
        return self.sweep.run(
            number, " ".join(own) or f"job {number}", lambda: run_command(self.command, cfg, words)
        )


def run_sweep(name: str, arguments: Sequence[str]) -> None:
    """Let Hydra run the jobs of a sweep. Raises what `conducted` does."""
    told = [word for word in arguments if word.startswith("runs_dir=")]
    try:
        runs_dir = compose(name, told).runs_dir
    except UserError:  # several of them, say, or what Hydra will refuse
        runs_dir = "runs"
    stamp = f"{time.strftime('%Y%m%d-%H%M%S')}-{os.getpid()}"
    sweep = Sweep(Path(runs_dir).absolute() / ".multirun" / stamp)
    with conducted(sweep):
        start_hydra(name, arguments, SweepJob(name, tuple(arguments), sweep))
