"""The paper's experiments as jobs: which command makes which result, and what is left to do.

A job is one experiment with one seed and one budget. Its folder is
`<runs_dir>/<budget>/<experiment>/seed<k>`, and it is finished when `result.json` is there.
"""

import dataclasses
import os
import re
from collections.abc import Iterable
from dataclasses import dataclass
from pathlib import Path
from typing import NamedTuple

from capsrun.disk import LOCK, holder
from capsrun.errors import UserError, did_you_mean
from capsrun.experiments import GROUPS, Experiments
from capsrun.fields import setting
from capsrun.names import folder_words, quoted, word
from capsrun.runs.reader import find_results, read_metrics

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


@dataclass(kw_only=True)
class ReproduceConfig:
    """Everything that `capsrun reproduce` needs. Values: `configs/reproduce.yaml`."""

    targets: list[str]
    seeds: list[int] = setting(minimum=0)
    budget: BudgetConfig
    queue: QueueConfig
    only_plan: bool
    timing: bool
    minutes: float | None = setting(above=0)
    parallel: int = setting(minimum=1, maximum=1_000)
    runs_dir: str = setting(path=True)
    device: str = setting(choices=("auto", "cpu", "cuda"))


@dataclass(frozen=True)
class Job:
    """One command and the result that it makes."""

    name: str
    """The experiment after its budget, as in the path of its folder."""
    seed: int
    folder: Path
    arguments: tuple[str, ...]
    """What follows `capsrun`."""
    needs: tuple["Job", ...] = ()
    """The jobs whose models it uses."""

    def __str__(self) -> str:
        return f"{self.name} seed {self.seed}"

    @property
    def result(self) -> Path:
        """The file that is there when the job is done."""
        return self.folder / "result.json"

    @property
    def finished(self) -> bool:
        return self.result.exists()

    @property
    def owner(self) -> str | None:
        """The process that is at work on it, if there is one."""
        return holder(self.folder / LOCK)

    @property
    def trains(self) -> bool:
        """Whether it trains a model, and does not only use some."""
        return self.arguments[0] == "train"

    def steps_made(self) -> int:
        """How many steps of training were recorded in an interrupted job."""
        if not (self.folder / "checkpoint.pt").exists():
            return 0
        return max((row["step"] for row in read_metrics(self.folder)), default=0)

    def others_ended(self) -> float | None:
        """The mean step at which other seeds of this run ended; None while none has."""
        results = find_results([self.folder.parent])
        steps = [result.values["steps"] for result in results if result.command == "train"]
        return sum(steps) / len(steps) if steps else None


class Cost(NamedTuple):
    """What a job takes."""

    seconds: float
    """About how long, with its share of the cores."""
    memory_gb: float
    """Of this machine's memory, in 10⁹ bytes, not of a GPU's."""
    may_stop_early: bool = False
    """Whether no seed has shown yet where such a run ends: the seconds are to its last step."""


def threads_each(jobs: int) -> int:
    """How many threads each of so many jobs has: what the environment says, or its share."""
    said = os.environ.get(THREADS, "")
    own = int(said) if re.fullmatch("[1-9][0-9]*", said) else 0
    return own or max(1, len(os.sched_getaffinity(0)) // jobs)


def make_jobs(config: ReproduceConfig, experiments: Experiments) -> list[Job]:
    """Every job that is asked for, in order, each after those whose models it uses.

    Raises UserError for a target that is neither an experiment nor a group of them, or none.
    """
    jobs: dict[Path, Job] = {}
    for entry in config.queue.entries:
        budget = budget_of(entry, config.budget)
        for name in chosen(entry.targets, experiments):
            # An ensemble has one result, whatever the seeds, where there are any.
            seeds = entry.seeds if experiments.about(name).models == 1 else entry.seeds and [0]
            for seed in seeds:
                for job in jobs_of(name, seed, budget, config, experiments):
                    if jobs.setdefault(job.folder, job).arguments != job.arguments:
                        raise UserError(
                            f"two entries of the queue ask for different runs in {job.folder}: "
                            "one of them needs another `length`"
                        )
    if not jobs:
        raise UserError("there is nothing to run: say targets=all and seeds=0, for example")
    return list(jobs.values())


def budget_of(entry: QueueEntry, budget: BudgetConfig) -> BudgetConfig:
    """The budget of an entry, which may have a length of its own."""
    if entry.length is None:
        if entry.train:
            raise UserError(
                "an entry of a queue that has `train` needs a `length`, the folder of its runs"
            )
        return budget
    # Nothing of the budget is left: with its smaller data sets the results would be others.
    return dataclasses.replace(budget, name=entry.length, train=entry.train, eval=[], stand_ins={})


def chosen(targets: Iterable[str], experiments: Experiments) -> list[str]:
    """The experiments that are meant by names and groups."""
    names = experiments.names()
    meant = {name: [name] for name in names}
    meant |= {group: experiments.of_group(group) for group in GROUPS}
    meant = {name: those for name, those in meant.items() if those}  # none need be of one's own
    meant["all"] = [name for group in GROUPS for name in meant.get(group, [])]
    for target in targets:
        if target == "own" and target not in meant:
            raise UserError(
                "there is no experiment of your own; --config-dir FOLDER says in which folder the "
                "files experiment/*.yaml are"
            )
        if target not in meant:
            raise UserError(
                f"there is no experiment {target!r}{did_you_mean(target, meant)}; there are all, "
                f"{', '.join(group for group in GROUPS if group in meant)} and {', '.join(names)}"
            )
    return list(dict.fromkeys(name for target in targets for name in meant[target]))


def jobs_of(
    name: str, seed: int, budget: BudgetConfig, config: ReproduceConfig, experiments: Experiments
) -> list[Job]:
    """The job of an experiment after the jobs that it needs.

    An experiment without a command of its own is done when those that it uses are.
    """
    about = experiments.about(name)
    seeds = [seed] if about.models == 1 else range(min(about.models, budget.members))
    chains = [jobs_of(used, k, budget, config, experiments) for used in about.uses for k in seeds]
    before = [job for chain in chains for job in chain]
    if about.command is None:
        return before
    needs = tuple(chain[-1] for chain in chains)
    folder = Path(config.runs_dir) / budget.name / name / f"seed{seed}"
    device = [] if config.device == "auto" else [f"device={config.device}"]
    words = about.command.split()
    if words[0] == "train":
        words += [f"experiment={name}", *budget.train, *device]
        if budget.stand_ins:
            dataset = experiments.training([f"experiment={name}"]).dataset.name
            words += budget.stand_ins.get(dataset, [])
        words += about.smoke if budget.name == "smoke" else []
        words += [f"name={budget.name}/{name}", f"seed={seed}", *folder_words(config)]
    else:
        words += budget.stand_ins.get(words[1].removeprefix("dataset="), [])
        words += [word("checkpoint", needs[0].folder), *device]
        words += budget.eval if words[0] == "eval" else []
        if needs[1:]:
            words.append(f"ensemble=[{','.join(quoted(job.folder) for job in needs[1:])}]")
        words.append(word("out_dir", folder))
    return [*before, Job(f"{budget.name}/{name}", seed, folder, tuple(words), needs)]
