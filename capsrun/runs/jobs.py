"""The paper's experiments as jobs: which command makes which result, and what is left to do.

A job is one experiment with one seed and one budget. Its folder is
`<runs_dir>/<budget>/<experiment>/seed<k>`, and it is finished when `result.json` is there.
"""

import contextlib
import dataclasses
import os
import re
from collections.abc import Iterable, Sequence
from dataclasses import dataclass, replace
from pathlib import Path

from capsrun.config import setting
from capsrun.disk import LOCK, MOST_TEXT_BYTES, holder, parse_json, read_bytes, read_json
from capsrun.errors import UserError, did_you_mean
from capsrun.experiments import GROUPS, Experiment, Experiments
from capsrun.names import quoted, word

# What says how many threads a program takes.
THREADS = "OMP_NUM_THREADS"


@dataclass(kw_only=True)
class BudgetConfig:
    """How long the experiments are made to run. Values: `configs/budget/`."""

    name: str
    train: list[str]
    """Overrides of `capsrun train`."""
    eval: list[str]
    """Overrides of `capsrun eval`."""
    stand_ins: dict[str, list[str]]
    """Overrides that take a smaller data set in place of one, by its name."""
    members: int = setting(minimum=1)
    """How many models an ensemble has at most."""
    seeds: list[int] = setting(minimum=0)
    """The seeds to run if none are said."""


@dataclass(kw_only=True)
class QueueEntry:
    """Some experiments, each with some seeds."""

    targets: list[str]
    seeds: list[int] = setting(minimum=0)
    length: str | None = None
    """Name of the folder of its runs, in place of the budget's; None: as long as that says."""
    train: list[str] = dataclasses.field(default_factory=list)
    """Overrides of `capsrun train`, in place of the budget's; only with a length of its own."""


@dataclass(kw_only=True)
class QueueConfig:
    """What to run, in this order. Values: `configs/queue/`."""

    entries: list[QueueEntry]


@dataclass(frozen=True)
class Job:
    """One command and the result that it makes."""

    experiment: str
    seed: int
    folder: Path
    arguments: tuple[str, ...]
    """What follows `capsrun`."""
    needs: tuple["Job", ...] = ()
    """The jobs whose models it uses."""
    budget: str = ""
    """The name of its budget."""

    @property
    def result(self) -> Path:
        """The file that is there when the job is done."""
        return self.folder / "result.json"

    @property
    def finished(self) -> bool:
        return self.result.exists()

    @property
    def ready(self) -> bool:
        """Whether all that it needs is there."""
        return all(need.finished for need in self.needs)

    @property
    def owner(self) -> str | None:
        """The process that is at work on it, if there is one."""
        return holder(self.folder / LOCK)

    @property
    def trains(self) -> bool:
        """Whether it trains a model, and does not only use some."""
        return self.arguments[0] == "train"

    @property
    def name(self) -> str:
        """The experiment after its budget, as in the path of its folder."""
        return "/".join(filter(None, (self.budget, self.experiment)))

    def __str__(self) -> str:
        return f"{self.name} seed {self.seed}"

    def steps_made(self) -> int:
        """How many steps of training were recorded in an interrupted job."""
        if not (self.folder / "checkpoint.pt").exists():
            return 0
        try:
            last = read_bytes(self.folder / "metrics.jsonl", MOST_TEXT_BYTES).splitlines()[-1]
            return int(parse_json(last)["step"])
        except (OSError, LookupError, ValueError, TypeError, OverflowError):
            return 0

    def others_ended(self) -> float | None:
        """The mean step at which other seeds of this run ended; None while none has."""
        steps = []
        for path in self.folder.parent.glob("seed*/result.json"):
            with contextlib.suppress(OSError, LookupError, TypeError, ValueError):
                steps.append(int(read_json(path)["steps"]))
        return sum(steps) / len(steps) if steps else None


def threads_each(jobs: int) -> int:
    """How many threads each of so many jobs has: what the environment says, or its share."""
    said = os.environ.get(THREADS, "")
    own = int(said) if re.fullmatch("[1-9][0-9]*", said) else 0
    return own or max(1, len(os.sched_getaffinity(0)) // jobs)


@dataclass(frozen=True)
class JobMaker:
    """Turns names and seeds into jobs of one budget."""

    experiments: Experiments
    budget: BudgetConfig
    runs_dir: str
    device: str

    def queue(self, entries: Iterable[QueueEntry]) -> list[Job]:
        """Every job that is asked for, in order, each after those whose models it uses.

        Raises UserError for a target that is neither an experiment nor a group of them, or none.
        """
        jobs: dict[Path, Job] = {}
        for entry in entries:
            maker = self.of_entry(entry)
            for name in maker.chosen(entry.targets):
                # An ensemble has one result, whatever the seeds.
                seeds = entry.seeds if self.experiments.about(name).models == 1 else [0]
                for seed in seeds:
                    for job in maker.with_needs(name, seed):
                        if jobs.setdefault(job.folder, job).arguments != job.arguments:
                            raise UserError(
                                f"two entries of the queue ask for different runs in {job.folder}: "
                                "one of them needs another `length`"
                            )
        if not jobs:
            raise UserError("there is nothing to run: say targets=[all] and seeds=[0], for example")
        return list(jobs.values())

    def of_entry(self, entry: QueueEntry) -> "JobMaker":
        """What makes the jobs of an entry, which may have a length of its own."""
        if entry.length is None:
            if entry.train:
                raise UserError(
                    "an entry of a queue that has `train` needs a `length`, the folder of its runs"
                )
            return self
        # Nothing of the budget is left: with its smaller data sets the results would be others.
        own = replace(self.budget, name=entry.length, train=entry.train, eval=[], stand_ins={})
        return replace(self, budget=own)

    def chosen(self, targets: Iterable[str]) -> list[str]:
        """The experiments that are meant by names and groups."""
        names = self.experiments.names()
        found: dict[str, None] = {}
        for target in targets:
            if target in names:
                found[target] = None
            elif target == "all" or target in GROUPS:
                groups = GROUPS if target == "all" else (target,)
                members = {group: self.members(group) for group in groups}
                found |= dict.fromkeys(name for group in groups for name in members[group])
            else:
                raise UserError(
                    f"there is no experiment {target!r}"
                    f"{did_you_mean(target, ['all', *GROUPS, *names])}; there are all, "
                    f"{', '.join(GROUPS)} and {', '.join(names)}"
                )
        return list(found)

    def members(self, group: str) -> list[str]:
        """The experiments of a group."""
        about = self.experiments.about
        return [name for name in self.experiments.names() if about(name).group == group]

    def with_needs(self, name: str, seed: int) -> list[Job]:
        """The job of an experiment after the jobs that it needs.

        An experiment without a command of its own is done when those that it uses are.
        """
        about = self.experiments.about(name)
        members = min(about.models, self.budget.members)
        seeds = [seed] if about.models == 1 else range(members)
        chains = [self.with_needs(used, k) for used in about.uses for k in seeds]
        before = [job for chain in chains for job in chain]
        if about.command is None:
            return before
        models = tuple(chain[-1] for chain in chains)
        folder = self.folder(name, seed)
        words = self.arguments(name, about, seed, models)
        return [*before, Job(name, seed, folder, words, models, self.budget.name)]

    def folder(self, name: str, seed: int) -> Path:
        return Path(self.runs_dir) / self.budget.name / name / f"seed{seed}"

    def arguments(
        self, name: str, about: Experiment, seed: int, models: Sequence[Job]
    ) -> tuple[str, ...]:
        """The command that makes the result of an experiment, without `capsrun`."""
        assert about.command is not None
        words = about.command.split()
        device = [] if self.device == "auto" else [f"device={self.device}"]
        if words[0] == "train":
            words += [f"experiment={name}", *self.budget.train, *device]
            if self.budget.stand_ins:
                dataset = self.experiments.training([f"experiment={name}"]).dataset.name
                words += self.budget.stand_ins.get(dataset, [])
            words += about.smoke if self.budget.name == "smoke" else []
            words += [f"name={self.budget.name}/{name}", f"seed={seed}"]
            return (*words, *([] if self.runs_dir == "runs" else [word("runs_dir", self.runs_dir)]))
        dataset = words[1].removeprefix("dataset=")
        words += [
            *self.budget.stand_ins.get(dataset, []),
            word("checkpoint", models[0].folder),
            *device,
            *(self.budget.eval if words[0] == "eval" else []),
        ]
        if len(models) > 1:
            words.append(f"ensemble=[{','.join(quoted(job.folder) for job in models[1:])}]")
        return (*words, word("out_dir", self.folder(name, seed)))
