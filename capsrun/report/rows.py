"""What finished runs found, and which experiment of the paper each belongs to.

A run belongs to an experiment because of its settings, not of its name: so a run that somebody made
by hand counts, and one with another network never does.
"""

import math
import statistics
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import asdict, dataclass, field
from typing import Any

from capsrun.experiments import GROUPS, Experiment, Experiments, Published
from capsrun.runs.reader import Result
from capsrun.settings import deciding, deciding_test, role

SEEDS = 3  # as many trials as the paper made


def whole_test(dataset: Mapping[str, Any], models: int = 1) -> dict[str, Any]:
    """What decides an eval on all test images of a data set, of so many models together."""
    whole = {"split": "test", "images": None, "weights": "last", "ensemble": models}
    return {**deciding_test(dataset), **whole}


def of_network(settings: Mapping[str, Any]) -> dict[str, Any]:
    """The settings of which network is trained on which images, not of how long."""
    return {k: v for k, v in settings.items() if k != "precision" and not role(k).length}


@dataclass(frozen=True)
class Group:
    """Results that differ in nothing but their seed."""

    results: Sequence[Result]
    """One for each seed, in the order of the seeds."""
    twice: Sequence[int] = ()
    """Seeds of which there are several, different results; the latest counts."""
    earlier: Sequence[Result] = ()
    """The others, which do not count."""

    @property
    def first(self) -> Result:
        return self.results[0]

    @property
    def names(self) -> list[str]:
        """Those of all its runs, each once."""
        return list(dict.fromkeys(r.values["name"] for r in (*self.results, *self.earlier)))

    @property
    def remarks(self) -> list[str]:
        """What is to be said of seeds that were run twice."""
        said = "was run more than once, with different results; the latest counts"
        return [f"{', '.join(self.names)}: seed {seed} {said}" for seed in self.twice]

    @property
    def errors(self) -> list[float]:
        return [result.error_percent for result in self.results]

    @property
    def average(self) -> float | None:
        """How slowly all these runs averaged their weights; None: not all, or not alike."""
        found = {r.training["recipe"]["average"] for r in self.results}
        tested = all("test_averaged" in r.values.get("scores", {}) for r in self.results)
        return found.pop() if tested and len(found) == 1 else None

    @property
    def averaged_errors(self) -> list[float]:
        """Those of the averaged weights; empty without an `average`."""
        if self.average is None:
            return []
        return [r.values["scores"]["test_averaged"]["error_percent"] for r in self.results]

    @property
    def by_seed(self) -> dict[int, float]:
        return {result.seed: result.error_percent for result in self.results}

    @property
    def mean(self) -> float:
        return statistics.fmean(self.errors)

    @property
    def steps(self) -> list[int]:
        return [result.values["steps"] for result in self.results]

    @property
    def metrics(self) -> list[list[dict[str, Any]]]:
        """What each seed recorded, where that is at hand and it was not only tested."""
        return [r.metrics for r in self.results if r.command == "train" and r.metrics]


@dataclass(frozen=True)
class Row:
    """An experiment, what a result must be to belong to it, and what was found for it."""

    name: str
    about: Experiment
    settings: Mapping[str, Any]
    """Those of the training run, at the paper's length."""
    tested: Mapping[str, Any]
    """What decides the test; empty: training itself tests."""
    groups: list[Group] = field(default_factory=list)
    """What has the paper's length first, then the longest training."""

    def fits(self, result: Result) -> bool:
        """Whether a result is of this network, these images and this test, whatever the length.

        Experiments of one's own may differ in nothing but the length: of another length are those
        that were made for this one, as their name says.
        """
        named = result.values["name"].rpartition("/")[2] == self.name
        if self.about.group == "own" and not named and not self.is_full(Group([result])):
            return False
        return (
            result.command != "perturb"
            and result.tested == self.tested
            and result.members_alike
            and of_network(result.settings) == of_network(self.settings)
        )

    def is_full(self, group: Group) -> bool:
        """Whether a group was trained with the recipe and length that the experiment asks for."""
        return all(
            result.reached_target
            and result.settings == {**self.settings, "precision": result.settings["precision"]}
            for result in group.results
        )

    @property
    def best(self) -> Group | None:
        """What stands for the row: the paper's length where there is one, else the longest."""
        return next(iter(self.groups), None)

    @property
    def asked(self) -> int:
        """How many seeds there should be at the paper's length."""
        return SEEDS if self.about.models == 1 else 1

    @property
    def missing(self) -> int:
        """How many of them are not there yet."""
        full = next((group for group in self.groups if self.is_full(group)), None)
        return max(self.asked - (len(full.results) if full else 0), 0)

    @property
    def tested_on(self) -> str:
        """The name of the data set whose images it is tested on."""
        return self.tested.get("name") or self.settings["dataset.name"].strip("'")

    @property
    def label(self) -> str:
        """Its title, after the data set where a table has none."""
        _, _, dataset = GROUPS[self.about.group].partition("Table 1: ")
        return f"{dataset}: {self.about.title}" if dataset else self.about.title


def make_row(name: str, experiments: Experiments, results: Iterable[Result]) -> Row:
    """An experiment, with the results that belong to it."""
    about = experiments.about(name)
    training = experiments.training([f"experiment={name}"])
    test = experiments.tested((about.command or "train").split())
    tested = {} if test is None else whole_test(asdict(test.dataset), about.models)
    row = Row(name, about, deciding(asdict(training)), tested)
    row.groups.extend(grouped(result for result in results if row.fits(result)))
    # The sort is stable: within both, the longest training stays first.
    row.groups.sort(key=lambda group: not row.is_full(group))
    return row


def of_group(group: str, rows: Iterable[Row]) -> list[Row]:
    """The rows of a group of experiments, in their order."""
    own = [row for row in rows if row.about.group == group]
    return sorted(own, key=lambda row: (row.about.order, row.name))


def grouped(results: Iterable[Result]) -> list[Group]:
    """Put together what differs in the seed only, the longest training first."""
    by_settings: dict[str, list[Result]] = {}
    for result in results:
        key = repr((sorted(result.settings.items()), sorted(result.tested.items())))
        by_settings.setdefault(key, []).append(result)
    groups = [one_of_each_seed(members) for members in by_settings.values()]
    return sorted(groups, key=lambda group: (-max(group.steps), -len(group.results)))


def one_of_each_seed(results: Sequence[Result]) -> Group:
    """One result of each seed, the latest: a second one would not be another sample."""
    newest: dict[int, Result] = {}
    twice, earlier = set(), []
    for result in sorted(results, key=lambda r: (r.values["date"], r.values.get("time", ""))):
        before = newest.get(result.seed)
        if before is not None and before.values["errors"] != result.values["errors"]:
            twice.add(result.seed)
        earlier += [before] if before is not None else []
        newest[result.seed] = result
    return Group([newest[seed] for seed in sorted(newest)], sorted(twice), earlier)


def standard_error(group: Group, other: Published) -> float | None:
    """Of the difference between the mean of a group and what is published: √(s²/n + s'²/n').

    The part of what is published is left out where it gives no spread; None for one seed.
    """
    if len(group.errors) == 1:
        return None
    spread, trials = other.spread, other.trials
    published = 0.0 if spread is None or trials is None else spread**2 / trials
    return math.sqrt(statistics.variance(group.errors) / len(group.errors) + published)
