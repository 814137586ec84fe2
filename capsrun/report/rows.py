"""What finished runs found, and which experiment of the paper each belongs to.

A run belongs to an experiment because of its settings, not of its name: so a run that somebody made
by hand counts, and one with another network never does.
"""

import math
import statistics
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import asdict, dataclass
from typing import Any

from capsrun.config import DatasetConfig, TrainConfig
from capsrun.experiments import Published
from capsrun.runs.reader import Result
from capsrun.settings import deciding, deciding_test, role


def own_test(training: Mapping[str, Any]) -> dict[str, Any]:
    """What an eval on the test images of its training run is."""
    dataset = training["dataset"]
    whole = {"split": "test", "images": None, "weights": "last", "ensemble": 1}
    return {**deciding_test(dataset), **whole}


def of_network(settings: Mapping[str, Any]) -> dict[str, Any]:
    """The settings of which network is trained on which images, not of how long."""
    return {k: v for k, v in settings.items() if k != "precision" and not role(k).length}


@dataclass(frozen=True)
class Wanted:
    """What a result must be to belong to an experiment."""

    settings: Mapping[str, Any]
    """Those of the training run, at the paper's length."""
    tested: Mapping[str, Any]
    """Empty: tested by training itself."""
    models: int = 1
    """How many are tested together."""

    @classmethod
    def of(cls, training: TrainConfig, tested: DatasetConfig | None, models: int) -> "Wanted":
        """tested: the data set of an eval; None for what training found itself."""
        other = (
            {}
            if tested is None
            else {
                **deciding_test(asdict(tested)),
                "split": "test",
                "images": None,
                "weights": "last",
            }
        )
        return cls(deciding(asdict(training)), other, models)

    def fits(self, result: Result) -> bool:
        """Whether a result is of this network, these images and this test, whatever the length."""
        if result.command not in ("train", "eval"):
            return False
        tested = dict(result.tested)
        models = tested.pop("ensemble", 1)
        return (
            tested == dict(self.tested)
            and models == self.models
            and result.members_alike
            and of_network(result.settings) == of_network(self.settings)
        )

    def is_of_full_length(self, result: Result) -> bool:
        """Whether a result that fits was trained with the recipe, and as long, as is asked for."""
        settings = {k: v for k, v in result.settings.items() if k != "precision"}
        return settings == self.settings and result.reached_target


@dataclass(frozen=True)
class Group:
    """Results that differ in nothing but their seed."""

    results: Sequence[Result]
    """One for each seed, in the order of the seeds."""
    twice: Sequence[int] = ()
    """Seeds of which there are several, different results; the one of the latest day counts."""

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
    def spread(self) -> float | None:
        """Standard deviation over the seeds (n − 1); None for one seed."""
        return statistics.stdev(self.errors) if len(self.errors) > 1 else None

    @property
    def variance_of_mean(self) -> float | None:
        """s²/n; None for one seed."""
        return None if self.spread is None else self.spread**2 / len(self.results)

    @property
    def steps(self) -> list[int]:
        return [result.values["steps"] for result in self.results]

    @property
    def devices(self) -> list[str]:
        return sorted({result.values["device"] for result in self.results})

    @property
    def dates(self) -> list[str]:
        return sorted({result.values["date"] for result in self.results})


def grouped(results: Iterable[Result]) -> list[Group]:
    """Put together what differs in the seed only, the longest training first."""
    by_settings: dict[str, list[Result]] = {}
    for result in results:
        key = repr((sorted(result.settings.items()), sorted(result.tested.items())))
        by_settings.setdefault(key, []).append(result)
    groups = [one_of_each_seed(members) for members in by_settings.values()]
    return sorted(groups, key=lambda group: (-max(group.steps), -len(group.results)))


def one_of_each_seed(results: Sequence[Result]) -> Group:
    """One result of each seed, of the latest day: a second one would not be another sample."""
    newest: dict[int, Result] = {}
    twice = set()
    for result in sorted(results, key=lambda r: r.values["date"]):
        before = newest.get(result.seed)
        if before is not None and before.values["errors"] != result.values["errors"]:
            twice.add(result.seed)
        newest[result.seed] = result
    return Group([newest[seed] for seed in sorted(newest)], sorted(twice))


def standard_error(group: Group, other: Published) -> float | None:
    """Of the difference between the mean of a group and what is published: √(s²/n + s'²/n').

    The part of what is published is left out where it gives no spread; None for one seed.
    """
    if group.variance_of_mean is None:
        return None
    spread, trials = other.spread, other.trials
    published = 0.0 if spread is None or trials is None else spread**2 / trials
    return math.sqrt(group.variance_of_mean + published)
