"""What one changed setting does: runs that differ in nothing else are compared, seed by seed.

Runs of the same seed have the same images, shifts and first weights, unless these are what is
changed or, as drawing a decoder moves the generator, it is there in only one of them; so their
differences vary less from seed to seed than their errors do.
"""

import statistics
from collections.abc import Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

from capsrun.report.rows import Group, Row
from capsrun.report.tables import NOT_RUN, length, mean_and_spread

HEADER = (
    "one thing changed",
    "network",
    "trained for",
    "without it, test error %",
    "with it",
    "difference ± standard error, paired by seed",
    "in the paper",
    "seeds",
)
FEWEST_SEEDS = 3  # of two, the standard error is itself hardly known
REFERENCE = "ablation_iterations_3"


@dataclass(frozen=True)
class Question:
    """A change of some settings."""

    title: str
    change: Mapping[str, Any]
    """The changed settings, by their names with dots."""
    paper: str = ""
    """The difference that the paper reports, if any."""


AVERAGED = Question("the average of the weights (recipe.average) instead of the last ones", {})


@dataclass(frozen=True)
class Answer:
    """The errors in percent of some runs without and with a change, by their seeds."""

    question: Question
    base: Group
    after: Mapping[int, float]
    changed: Group | None = None
    """The runs with the change; None where they are those without it, tested otherwise."""

    @property
    def seeds(self) -> list[int]:
        """The seeds that both have."""
        return sorted(self.base.by_seed.keys() & self.after.keys())

    @property
    def differences(self) -> list[float]:
        """The error with the change minus that without it, of each seed."""
        return [self.after[seed] - self.base.by_seed[seed] for seed in self.seeds]

    def line(self, title: str) -> list[str]:
        """The cells of `HEADER`."""
        before, after = ([by[k] for k in self.seeds] for by in (self.base.by_seed, self.after))
        return [
            title,
            network(self.base),
            length(None, self.base),
            mean_and_spread(before),
            mean_and_spread(after),
            difference(self.differences),
            self.question.paper,
            " ".join(map(str, self.seeds)),
        ]


def questions_and_answers(
    rows: Iterable[Row], groups: Sequence[Group]
) -> tuple[list[Question], list[Answer]]:
    """What the ablations change in the reference, and what some trained runs say of that."""
    ablations = [row for row in rows if row.about.group == "ablations"]
    reference = next(row for row in ablations if row.name == REFERENCE)
    asked = questions(ablations, reference)
    return asked, answers(asked, reference, groups)


def questions(rows: Iterable[Row], reference: Row) -> list[Question]:
    """What each row changes in the reference; of rows that change the same the first one."""
    found: dict[str, Question] = {}
    settings, published = reference.settings, reference.about.paper
    for row in rows:
        keys = sorted({*row.settings, *settings})
        change = {k: row.settings.get(k) for k in keys if row.settings.get(k) != settings.get(k)}
        paper = row.about.paper
        both = paper and published and f"{paper.error_percent - published.error_percent:+.2f}"
        if change:
            found.setdefault(repr(change), Question(row.about.title, change, both or ""))
    return [*found.values(), AVERAGED]


def answers(asked: Sequence[Question], reference: Row, groups: Sequence[Group]) -> list[Answer]:
    """Every pair of groups that differ in what a question changes, and in nothing else.

    Only groups on the reference's images count, in which no other question has changed anything;
    network and length may be any.
    """
    by_settings = {key_of(group.first.settings): group for group in groups}
    settings = reference.settings
    kept = {key for question in asked for key in question.change}
    kept |= {key for key in settings if key.startswith("dataset.")}
    bases = [
        group
        for group in groups
        if all(group.first.settings.get(key) == settings.get(key) for key in kept)
    ]
    found = []
    for question in asked:
        for base in bases:
            changed = by_settings.get(key_of({**base.first.settings, **question.change}))
            if question is AVERAGED:
                found.append(Answer(question, base, dict(zip(base.by_seed, base.averaged_errors))))
            elif changed is not None:
                found.append(Answer(question, base, changed.by_seed, changed))
    return [answer for answer in found if answer.seeds]


def key_of(settings: Mapping[str, Any]) -> str:
    """The same for the same settings."""
    return repr(sorted((key, value) for key, value in settings.items() if value is not None))


def lines(asked: Sequence[Question], found: Sequence[Answer]) -> Iterator[list[str]]:
    """The table of `HEADER`: each question with its answers, and those not asked of any runs."""
    for question in asked:
        own = [answer for answer in found if answer.question is question]
        for answer in own:
            yield answer.line(question.title if answer is own[0] else "")
        if not own:
            yield [question.title, NOT_RUN, "", "", "", "", question.paper, ""]


def network(group: Group) -> str:
    """The name of a network, and how large it is."""
    values = group.first.values
    size = f", {values['parameters'] / 1e6:.1f} M parameters" if "parameters" in values else ""
    return f"{values['model']}{size}"


def difference(differences: Sequence[float]) -> str:
    """The mean of paired differences, with its standard error where there are several."""
    mean, seeds = statistics.fmean(differences), len(differences)
    if seeds == 1:
        return f"{mean:+.3f}; one seed has no standard error"
    error = error_of_mean(differences)
    certain = seeds >= FEWEST_SEEDS and error >= 1e-9  # it is rounding where all are alike
    far = f" ({abs(mean) / error:.1f} standard errors)" if certain else ""
    return f"{mean:+.3f} ± {error:.3f}{far}"


def error_of_mean(values: Sequence[float]) -> float:
    """The standard error of the mean of several."""
    return statistics.stdev(values) / len(values) ** 0.5


def most_asked(found: Sequence[Answer]) -> tuple[Group, dict[str, list[float]]] | None:
    """The runs of which most is asked with several seeds, and the differences of each change.

    None where nothing has several seeds.
    """
    asked: dict[str, tuple[Group, dict[str, list[float]]]] = {}
    for answer in found:
        if len(answer.seeds) > 1:
            key = key_of(answer.base.first.settings)
            _, points = asked.setdefault(key, (answer.base, {}))
            points[answer.question.title] = answer.differences
    if not asked:
        return None
    return max(asked.values(), key=lambda one: sum(map(len, one[1].values())))


def by_iterations(found: Sequence[Answer]) -> tuple[Group, dict[int, list[float]]] | None:
    """The errors of each number of routing iterations, of the runs that have most of them.

    Returns the runs from which the others differ, too; None where nothing can be compared.
    """
    points: dict[str, tuple[Group, dict[int, list[float]]]] = {}
    for answer in found:
        if answer.changed is not None and {*answer.question.change} == {"routing.iterations"}:
            key = key_of(answer.base.first.settings)
            _, errors = points.setdefault(key, (answer.base, {}))
            for group in (answer.base, answer.changed):
                errors[int(group.first.settings["routing.iterations"])] = group.errors
    if not points:
        return None
    return max(points.values(), key=lambda p: (len(p[1]), sum(map(len, p[1].values()))))
