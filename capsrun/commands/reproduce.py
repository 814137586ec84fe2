"""`capsrun reproduce`: run the paper's experiments, as far as they are not finished."""

import contextlib
import datetime
import heapq
import itertools
import math
import os
import re
import subprocess
import sys
import time
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass, field
from functools import partial
from pathlib import Path

from tabulate import tabulate

from capsrun.errors import Stopped, Unfinished, UserError, notice
from capsrun.experiments import Experiments
from capsrun.names import command, folder_words, suggest
from capsrun.runs.jobs import THREADS, Cost, Job, ReproduceConfig, make_jobs, threads_each
from capsrun.runs.progress import StopRequest, stop_requests
from capsrun.terminal import counted, duration
from capsrun.yaml_files import own_option

POLL_SECONDS = 0.2
# How long a job may take to save when the time is over: until its step, or batch of a test, ends.
GRACE_SECONDS = 60.0
# How many jobs are named in a line that is no plan.
FEW = 5


@dataclass
class Outcome:
    """How the jobs ended."""

    finished: list[Job] = field(default_factory=list)
    failed: list[Job] = field(default_factory=list)
    interrupted: list[Job] = field(default_factory=list)
    """Running when the time was over; they can go on."""
    waiting: list[Job] = field(default_factory=list)
    """Not begun: the time was over, or what they need failed."""


def main(config: ReproduceConfig, overrides: Sequence[str]) -> None:
    """`capsrun reproduce`: run what is asked for, and say what can be done with it."""
    refuse_unused(config, overrides)
    reproduce(config, Experiments())
    if config.only_plan:
        suggest(["reproduce", *(word for word in overrides if not word.startswith("only_plan="))])
    else:
        suggest(["list", *folder_words(config)], ["report", *folder_words(config)])


def refuse_unused(config: ReproduceConfig, overrides: Sequence[str]) -> None:
    """Raise UserError where a queue says itself what was asked for on the command line."""
    if not any(word.startswith("queue=") and word != "queue=targets" for word in overrides):
        return
    unused = ["targets", "seeds"]
    unused += ["budget"] if all(entry.length is not None for entry in config.queue.entries) else []
    for key in unused:
        if any(word.startswith(f"{key}=") for word in overrides):
            raise UserError(f"each entry of this queue has its own {key}: leave {key}= away")


def reproduce(config: ReproduceConfig, experiments: Experiments) -> Outcome:
    """Say what is to be run and how long it will take, then run it, each job in its own process.

    A job that fails does not stop the others. Raises Unfinished, naming them, when some failed,
    UserError for an unknown target, and Stopped, with everything saved, on Ctrl-C.
    """
    deadline = None if config.minutes is None else time.monotonic() + 60 * config.minutes
    jobs = make_jobs(config, experiments)
    left = [job for job in jobs if not job.finished]
    costs: dict[Job, Cost] = {}
    if config.timing and left:
        from capsrun.bench.estimate import job_costs  # it needs PyTorch, as nothing else here does

        costs = job_costs(left, experiments, config.device, config.parallel)
    if len(jobs) > 1 or config.timing or config.only_plan:
        show_plan(jobs, costs, config, deadline)
    if config.only_plan or not left:
        return Outcome(waiting=left)
    needs_gb = {job: cost.memory_gb for job, cost in costs.items()}
    with stop_requests() as stop:
        outcome = run(left, config.parallel, deadline, stop, needs_gb)
    show_outcome(outcome)
    if stop.asked:
        raise Stopped("stopped; what was running is saved", stop.signal_number)
    if outcome.failed:
        names = ", ".join(map(str, outcome.failed))
        raise Unfinished(f"failed: {names}; why is said above, or in log.txt in the job's folder")
    return outcome


def run(
    jobs: Iterable[Job],
    parallel: int,
    deadline: float | None,
    stop: StopRequest,
    needs_gb: Mapping[Job, float] = {},
) -> Outcome:
    """Run jobs in order, as many at once as `parallel` says, each when those it needs are done.

    On `stop` and at the deadline what runs is asked to save and end; what has not a minute after
    the deadline is killed, and loses at most what it did since its last checkpoint.
    needs_gb: the memory that each takes, where it is known; see `with_ready`.
    """
    free_gb, over = available_memory_gb(), False
    outcome, running = Outcome(waiting=list(jobs)), dict[Job, subprocess.Popen]()
    try:
        while True:
            late = 0.0 if deadline is None else time.monotonic() - deadline
            if not over and (stop.asked or late > 0):
                over = True
                for process in running.values():
                    process.terminate()
            if late > GRACE_SECONDS:
                for process in running.values():
                    process.kill()
            sort_ended(outcome, running, over)
            elsewhere = used_elsewhere(outcome.waiting)
            ready = [
                job
                for job in outcome.waiting
                if job not in elsewhere and all(need.finished for need in job.needs)
            ]
            most = 0 if over else parallel - len(running)
            together = with_ready(list(running), ready[:most], needs_gb, free_gb)
            for job in together[len(running) :]:
                outcome.waiting.remove(job)
                running[job] = start(job, len(together), quiet=parallel > 1)
            if not running and (over or not elsewhere):  # nothing can be begun any more
                return outcome
            time.sleep(POLL_SECONDS)
    finally:
        for process in running.values():  # after a second Ctrl-C, say
            process.kill()


def sort_ended(outcome: Outcome, running: dict[Job, subprocess.Popen], over: bool) -> None:
    """Note how jobs have ended, also those that other processes have finished meanwhile.

    over: whether they were asked to end.
    """
    for job in [job for job, process in running.items() if process.poll() is not None]:
        code = running.pop(job).returncode
        if code == os.EX_TEMPFAIL or (code == 0 and job.finished):  # taken by another process
            outcome.waiting.append(job)
        else:
            (outcome.interrupted if over else outcome.failed).append(job)
    for job in [job for job in outcome.waiting if job.finished]:
        outcome.waiting.remove(job)
        outcome.finished.append(job)


def with_ready(
    running: list[Job], ready: Sequence[Job], needs_gb: Mapping[Job, float], free_gb: float
) -> list[Job]:
    """The running jobs, and those that can be begun beside them.

    Together they get no more memory than `free_gb`, nor is one begun beside others when less than
    it takes is left; a job that is too large runs alone.
    """
    together = list(running)
    for job in ready:
        held_gb = sum(needs_gb.get(other, 0) for other in [*together, job])
        if together and (held_gb > free_gb or needs_gb.get(job, 0) > available_memory_gb()):
            break
        together.append(job)
    return together


def used_elsewhere(jobs: Iterable[Job]) -> list[Job]:
    """The jobs at which other processes are at work; says so, once for each of them."""
    owners = {job: owner for job in jobs if (owner := job.owner) is not None}
    for job, owner in owners.items():
        notice(f"{job} is left to {owner}")
    return list(owners)


def available_memory_gb() -> float:
    """How much memory there is for what is started now, in 10⁹ bytes."""
    limits, group = [math.inf], Path("/sys/fs/cgroup")
    with contextlib.suppress(OSError):  # not a Linux
        kilobytes = re.search(rb"MemAvailable:\s+(\d+) kB", Path("/proc/meminfo").read_bytes())
        limits += [int(kilobytes[1]) * 1024] if kilobytes else []
    with contextlib.suppress(OSError, ValueError):  # no control group, or no limit ("max")
        most, held = ((group / f"memory.{name}").read_bytes() for name in ("max", "current"))
        # Files that were read are in it, and make room when it is needed.
        cached = re.search(rb"\binactive_file (\d+)", (group / "memory.stat").read_bytes())
        limits.append(int(most) - int(held) + int(cached[1] if cached else 0))
    return min(limits) / 1e9


def start(job: Job, beside: int, quiet: bool) -> subprocess.Popen:
    """Begin a job; what it prints goes to the screen or, when it is to be quiet, into its folder.

    beside: how many, with this one, share the cores. A small network that has a core for itself
    makes more steps than half of what two cores give it.
    It has a process group of its own, so that Ctrl-C does not reach it: it is told once, by `run`,
    as a second signal would end it at once.
    """
    print(f"\n{job}: {command(*job.arguments)}", flush=True)
    words = [sys.executable, "-m", "capsrun", *job.arguments, *own_option()]
    shared = {THREADS: str(threads_each(beside))} if beside > 1 else {}
    begin = partial(subprocess.Popen, words, process_group=0)
    if not quiet:
        return begin(env={**os.environ, **shared})
    job.folder.mkdir(parents=True, exist_ok=True)
    utf8 = {"PYTHONIOENCODING": "utf-8"}  # of its log, whatever the screen's encoding is
    with open(job.folder / "log.txt", "ab") as log:
        return begin(env={**os.environ, **shared, **utf8}, stdout=log, stderr=subprocess.STDOUT)


def show_outcome(outcome: Outcome) -> None:
    """Print how many jobs ended in which way, and which did not end well."""
    print(f"\n{len(outcome.finished)} finished")
    for what, jobs in (
        ("failed", outcome.failed),
        ("interrupted, to go on next time", outcome.interrupted),
        ("not begun", outcome.waiting),
    ):
        if jobs:
            names = ", ".join(map(str, jobs[:FEW]))
            print(f"{what}: {names}" + (f" and {len(jobs) - FEW} more" if jobs[FEW:] else ""))


def show_plan(
    jobs: Sequence[Job], costs: Mapping[Job, Cost], config: ReproduceConfig, deadline: float | None
) -> None:
    """Print a line for each experiment, how long all takes, and what fits into the minutes.

    The times are those of jobs that begin in this order, `parallel` at once.
    """
    if any(job.name.startswith(f"{config.budget.name}/") for job in jobs):
        print(f"budget {config.budget.name}: {' '.join(config.budget.train)}")
    now, ends = datetime.datetime.now(), when_done(jobs, costs, config.parallel)
    rows, latest = [], ""
    for name, group in itertools.groupby(jobs, key=lambda job: job.name):
        own = list(group)
        rows.append([name, " ".join(str(job.seed) for job in own), states(own)])
        left = [job for job in own if job in costs]
        if left:
            bound = "at most " if any(costs[job].may_stop_early for job in left) else ""
            latest = latest or (bound and " at the latest")
            at = now + datetime.timedelta(seconds=max(ends[job] for job in left))
            takes = duration(sum(costs[job].seconds for job in left))
            rows[-1] += [bound + takes, f"{at:%a %d %b %Y %H:%M}{latest}"]
    heads = ["experiment", "seeds", "state", *(["takes", "finished by"] if costs else [])]
    print(tabulate(rows, heads, "plain", disable_numparse=True))
    line = f"{counted(len(jobs), 'job')}, {sum(job.finished for job in jobs)} of them finished"
    if costs:
        total = duration(max(ends.values()))
        line += f"; the rest takes {'at most' if latest else 'about'} {total}"
    print(line)
    if costs and deadline is not None:
        seconds_left = deadline - time.monotonic()
        fit = ", ".join(str(job) for job, seconds in ends.items() if seconds <= seconds_left)
        fit = fit or "nothing, but what is begun goes on next time"
        print(f"expected to finish in {config.minutes:g} minutes: {fit}")


def states(jobs: Sequence[Job]) -> str:
    """How many of an experiment's jobs are finished, begun and new."""
    finished = sum(job.finished for job in jobs)
    begun = [job.steps_made() for job in jobs if not job.finished and job.steps_made()]
    parts = [f"{finished} finished"] if finished else []
    parts += [f"{len(begun)} past step {', '.join(f'{step:,}' for step in begun)}"] if begun else []
    new = len(jobs) - finished - len(begun)
    return ", ".join(parts + ([f"{new} to run"] if new else []))


def when_done(jobs: Iterable[Job], costs: Mapping[Job, Cost], parallel: int) -> dict[Job, float]:
    """In how many seconds each job that has a cost will be done, as many at once as `parallel`.

    What the memory may forbid is not looked at.
    """
    ends, free_at = dict[Job, float](), [0.0] * parallel
    for job in jobs:
        if job in costs:
            begins = max([heapq.heappop(free_at), *(ends.get(need, 0.0) for need in job.needs)])
            ends[job] = begins + costs[job].seconds
            heapq.heappush(free_at, ends[job])
    return ends
