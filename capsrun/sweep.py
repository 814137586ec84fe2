"""Sweeps: Hydra's launchers run the jobs of `--multirun`; here is said what became of them.

A job may run in another process or on another machine, so it writes how it ended into a folder of
the sweep; a file `stop` in that folder keeps the jobs that have not begun from beginning.
"""

import contextlib
import os
import platform
import shutil
import signal
import sys
import time
import traceback
from collections.abc import Callable, Sequence
from dataclasses import asdict, dataclass, field
from pathlib import Path
from typing import Any, NoReturn

from tabulate import tabulate

from capsrun.compose import compose, for_hydra, start_hydra, task_words
from capsrun.disk import read_json, write_json
from capsrun.errors import Busy, Noisy, Stopped, Unfinished, UserError, handling
from capsrun.names import with_choices
from capsrun.terminal import BOLD, counted, styled
from capsrun.yaml_files import own_dir, use_own_dir

# Checks the composed settings of a command, does its work, and returns what its `main` does.
RunCommand = Callable[[str, Any, list[str]], Any]


@dataclass
class Outcome:
    """How a job ended, or that it runs."""

    job: str
    code: int | None = None
    """The exit code that it would have alone; None: it runs, or was killed."""
    message: str = "ended without a word (killed? out of memory?)"
    error_percent: float | None = None
    validation_error_percent: float | None = None
    process: tuple[str, int] = field(default_factory=lambda: (platform.node(), os.getpid()))


@dataclass(frozen=True)
class Sweep:
    """What Hydra calls, wherever that is, with the configuration of each job."""

    command: str
    shared: Sequence[str]
    """The words that all jobs have, among others."""
    run_command: RunCommand
    folder: Path
    """Absolute, on a file system that every machine sees; made when it is needed."""
    working_folder: str = field(default_factory=os.getcwd)
    config_dir: Path | None = field(default_factory=own_dir)
    pid: int = field(default_factory=os.getpid)

    @property
    def stop_file(self) -> Path:
        return self.folder / "stop"

    def __call__(self, cfg: Any) -> float | None:
        """Do a job; returns its error on validation images, which a search makes small.

        A failure does not leave this function, as the other jobs are to go on.
        """
        from hydra.core.hydra_config import HydraConfig

        if self.stop_file.exists():
            return None
        os.chdir(self.working_folder)
        use_own_dir(self.config_dir)
        words, number = task_words(), HydraConfig.get().job.num
        own = [str(word) for word in words if word not in self.shared]
        outcome = Outcome(" ".join(own) or f"job {number}")
        self.folder.mkdir(parents=True, exist_ok=True)
        write_json(self.folder / f"{number}.json", asdict(outcome))
        print(f"\n{styled(f'{outcome.job}:', BOLD)}", flush=True)
        if cfg.get("name") is not None and self.command == "train":
            cfg.name = with_choices(str(cfg.name), own)  # else the jobs would share a folder
        with handling(interrupt):
            finish(outcome, lambda: self.run_command(self.command, cfg, words))
        write_json(self.folder / f"{number}.json", asdict(outcome))
        if outcome.code:
            print(f"{outcome.job}: {outcome.message}", file=sys.stderr, flush=True)
        if outcome.code and outcome.code > 128 and os.getpid() == self.pid:
            self.stop_file.write_bytes(b"%d" % (outcome.code - 128))
            raise KeyboardInterrupt  # which Hydra does not take for a failure of the job
        return outcome.validation_error_percent

    def outcomes(self) -> list[Outcome]:
        """How the jobs that were begun ended, in their order."""
        files = sorted(self.folder.glob("*.json"), key=lambda file: int(file.stem))
        return [Outcome(**read_json(file)) for file in files]

    def stop(self, number: int, _: Any) -> None:
        """On a signal: begin no further job, and let those in other processes save and end."""
        if self.stop_file.exists():
            raise KeyboardInterrupt
        self.folder.mkdir(parents=True, exist_ok=True)
        self.stop_file.write_bytes(b"%d" % number)
        print("\nstopping the jobs; once more stops at once", file=sys.stderr, flush=True)
        for machine, pid in (job.process for job in self.outcomes() if job.code is None):
            with contextlib.suppress(ProcessLookupError):
                # Ctrl-C in a terminal reaches the processes of this group without help.
                reached = number == signal.SIGINT and os.getpgid(pid) == os.getpgrp()
                if machine == platform.node() and not reached:
                    os.kill(pid, signal.SIGTERM)


def interrupt(number: int, _: Any) -> NoReturn:
    """What a signal does where nobody else takes care of it."""
    raise KeyboardInterrupt(number)


def finish(outcome: Outcome, work: Callable[[], Any]) -> None:
    """Do the work of a job, and keep in `outcome` how it ended."""
    try:
        result = work()
    except Stopped as stopped:
        outcome.code, outcome.message = 128 + stopped.signal_number, str(stopped)
    except KeyboardInterrupt as stopped:
        outcome.code, outcome.message = 128 + stopped.args[0], "stopped at once"
    except UserError as error:
        outcome.code, outcome.message = 2, f"failed: {error}"
    except (Busy, Noisy, Unfinished, OSError) as error:
        outcome.code, outcome.message = 1, f"failed: {error}"
    except Exception as error:  # a fault of ours, but the other jobs go on all the same
        traceback.print_exc()
        outcome.code, outcome.message = 1, f"failed: {first_line(error)}"
    else:
        outcome.code, outcome.message = 0, "finished"
        if isinstance(result, dict) and result.get("split", "test") == "test":
            outcome.error_percent = result.get("error_percent")
            validation = result.get("scores", {}).get("validation", {})
            outcome.validation_error_percent = validation.get("error_percent")


def first_line(error: Exception) -> str:
    """What an error of another program says, in short."""
    return f"{type(error).__name__}: {next(iter(str(error).strip().splitlines()), '')}"


def show_summary(outcomes: Sequence[Outcome]) -> None:
    """Print what each job found, how many finished, and why the others did not.

    In the order of their errors on validation images, where there are some; else as they were made:
    the one of the lowest test error is no result.
    """
    tested = [job for job in outcomes if job.error_percent is not None]
    tested.sort(key=lambda job: job.validation_error_percent or 0.0)
    rows = [[job.validation_error_percent, job.error_percent, job.job] for job in tested]
    heads = ["validation error (%)", "test error (%)", "job"]
    if all(row[0] is None for row in rows):
        rows, heads = [row[1:] for row in rows], heads[1:]
    if rows:
        table = tabulate(rows, heads, "plain", floatfmt=".2f", disable_numparse=[len(heads) - 1])
        print(f"\n{table}")
    others = [outcome for outcome in outcomes if outcome.code != 0]
    rest = f", {len(others)} not" if others else ""
    print(f"\nsweep: {len(outcomes) - len(others)} finished{rest}", flush=True)
    for job in others:
        print(f"{job.job}: {job.message}", file=sys.stderr)


def run_sweep(name: str, arguments: Sequence[str], run_command: RunCommand) -> None:
    """Let Hydra run the jobs of a sweep.

    Raises Stopped when it was asked to stop; else UserError when jobs failed, all by mistakes that
    the user can mend; else Unfinished when some did not finish.
    """
    try:
        runs_dir = compose(name, [w for w in arguments if w.startswith("runs_dir=")]).runs_dir
    except UserError:  # several of them, say, or what Hydra will refuse
        runs_dir = "runs"
    stamp = f"{time.strftime('%Y%m%d-%H%M%S')}-{os.getpid()}"
    shared = for_hydra(name, arguments, several=True)
    sweep = Sweep(name, shared, run_command, Path(runs_dir).absolute() / ".multirun" / stamp)
    early: Exception | None = None
    try:
        with handling(sweep.stop):
            start_hydra(name, arguments, sweep)
    except KeyboardInterrupt:
        pass  # the file `stop` is there
    except Exception as error:  # of the launcher, or a mistake in the settings of a later job
        early = error if isinstance(error, UserError) else Unfinished(first_line(error))
        if isinstance(error, OSError) and error.strerror:  # a full disk, say
            early = Unfinished(f"{error.filename or sweep.folder.parent}: {error.strerror}")
    if outcomes := sweep.outcomes():
        show_summary(outcomes)
    if sweep.stop_file.exists():  # it stays for jobs that wait in a queue
        number = int(sweep.stop_file.read_bytes())
        raise Stopped("stopped; what was running is saved", number)
    shutil.rmtree(sweep.folder, ignore_errors=True)
    if early is not None:
        raise early
    if failed := [outcome.code for outcome in outcomes if outcome.code != 0]:
        kind = UserError if set(failed) == {2} else Unfinished
        jobs = counted(len(failed), "job")
        raise kind(f"{jobs} of the sweep failed; the same command runs what is not finished")
