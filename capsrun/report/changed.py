"""Networks on other images than those of training, over seeds, and against dynamic routing."""

import statistics
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from functools import cached_property
from pathlib import Path
from typing import Any

from matplotlib.figure import Figure
from scipy.special import stdtr
from scipy.stats import false_discovery_control

from capsrun.report import plots
from capsrun.report.evaluations import TRANSFORMS, Points, found_by, on_another_set, same_run
from capsrun.report.questions import FEWEST_SEEDS, error_of_mean, key_of, network
from capsrun.report.rows import Group, grouped
from capsrun.report.tables import NOT_RUN, length, mean_and_spread, shown, table
from capsrun.runs.reader import Result

HEADER = ("network", "routing", "trained for", "seeds")
BASE = "dynamic, 3 iterations"
FALSE_DISCOVERIES = 0.05
OF_ROUTING = ("model.primary_dimensions", "model.digit_dimensions")  # which go with some of them
# What may differ within a line of the summary: the images, and how long a network was trained.
NOT_OF_A_NETWORK = ("dataset.", "precision", "recipe.steps", "recipe.epochs")
# What stands in the summary: the name of a column, the title of a table, and which of its points.
ROTATED, MOVED, SCALED = (f"mnist, 10,000 images, {how}: error %" for how in TRANSFORMS.values())
ELSEWHERE = "affnist_like, 320,000 images, trained on mnist_padded: error %"
FROM = "steps, from random starts, by the scores' difference: "
ATTACKED = f"mnist, 1,000 images, pgd, 10 {FROM}"
DISGUISED = f"mnist, 1,000 images, reconstructive pgd, 30 {FROM}"
SUMMARY = (
    ("test error %", ROTATED, "0"),
    ("rotated by 30°", ROTATED, "30"),
    ("moved by 4 px", MOVED, "4"),
    ("shrunk to 0.75", SCALED, "0.75"),
    ("affnist_like", ELSEWHERE, "affnist_like"),
    ("attacked, ε = 0.1", f"{ATTACKED}error % within ε", "0.1"),
    ("and not flagged", f"{ATTACKED}fooled and not flagged, %, within ε", "0.1"),
    ("the detector attacked too", f"{DISGUISED}fooled and not flagged, %, within ε", "0.1"),
    (
        "Fashion-MNIST not flagged",
        "mnist, 10,000 images, not flagged by reconstruction, %",
        "fashion_mnist",
    ),
)


@dataclass(frozen=True)
class Line:
    """What networks that differ in their seed only have found about a kind of change."""

    group: Group
    runs: Mapping[int, Points]
    """By their seeds."""

    @cached_property
    def settings(self) -> Mapping[str, Any]:
        return self.group.first.settings

    @property
    def name(self) -> list[str]:
        """The network, and what routes its capsules."""
        return [network(self.group), routing_of(self.settings)]

    def values(self, label: str) -> list[float]:
        """What each seed has at a point; empty where one of them has nothing there."""
        found = [run[label] for run in self.runs.values() if label in run]
        return found if len(found) == len(self.runs) else []

    def less(self, other: "Line") -> "Line":
        """What each seed has more than the same of another line, where both have something."""
        runs = {
            seed: {k: run[k] - other.runs[seed][k] for k in run.keys() & other.runs[seed].keys()}
            for seed, run in self.runs.items()
            if seed in other.runs
        }
        return Line(self.group, runs)


@dataclass(frozen=True)
class Kind:
    """What was found about one kind of change, or another data set."""

    title: str
    lines: Sequence[Line]

    @cached_property
    def labels(self) -> list[str]:
        """Of the points that any of them has."""
        runs = [points for line in self.lines for points in line.runs.values()]
        return list(dict.fromkeys(label for points in runs for label in points))

    @property
    def table(self) -> str:
        """Networks against values, means over seeds.

        Below another routing, where three seeds of both were trained alike, is what it has more
        than dynamic routing: the mean of the differences, seed by seed, and its standard error.
        """
        rows = []
        for line, name in zip(self.lines, distinct_names(self.lines, ignored=("recipe.",))):
            cells = [_text(line.values(label), mean_and_spread) for label in self.labels]
            rows.append([*name, length(None, line.group), _seeds(line), *cells])
            paired = self.paired(line)
            if paired is not None:
                cells = [_text(paired.values(label), mean_and_error) for label in self.labels]
                rows.append(["", "difference from dynamic, paired", "", _seeds(paired), *cells])
        return table([*HEADER, *self.labels], rows)

    def paired(self, line: Line) -> Line | None:
        """What another routing has more than dynamic routing.

        None where that has too few seeds, or where several of them might be meant.
        """
        bases = [other for other in self.lines if is_base(other, line)]
        if routing_of(line.settings) == BASE or len(bases) != 1:
            return None
        less = line.less(bases[0])
        return less if len(less.runs) >= FEWEST_SEEDS else None

    def cell(self, of: str, label: str) -> tuple[str, float]:
        """What the network `of` (see `network_key`) has at a point: that of most seeds.

        And how often chance alone brings it as far from dynamic routing; 1: they are not compared.
        """
        own = [each for each in self.lines if network_key(each.settings) == of]
        own = [each for each in own if each.values(label)]
        if not own:
            return "–", 1.0
        line = max(own, key=lambda each: len(each.runs))
        paired = self.paired(line)
        text = f"{mean_and_spread(line.values(label))} ({len(line.runs)})"
        return text, by_chance(paired.values(label)) if paired else 1.0

    @property
    def curves(self) -> dict[str, dict[float, list[float]]]:
        """What networks with several seeds found at several values, if these are numbers."""
        if len(self.labels) < 2 or not all(map(is_number, self.labels)):
            return {}
        return {
            ", ".join(name): {float(label): line.values(label) for label in self.labels}
            for line, name in zip(self.lines, distinct_names(self.lines))
            if len(line.runs) > 1 and all(map(line.values, self.labels))
        }


def network_key(settings: Mapping[str, Any]) -> str:
    """The same for the same network and recipe, whatever it was trained on, and how long."""
    return key_of({key: v for key, v in settings.items() if not key.startswith(NOT_OF_A_NETWORK)})


def distinct_names(lines: Sequence[Line], ignored: tuple[str, ...] = ()) -> list[list[str]]:
    """The name of each line, with as many settings as tell it from lines of the same name.

    ignored: the first characters of settings that are not named, as they are told beside it.
    """
    names = []
    for line in lines:
        alike = [each.settings for each in lines if each.name == line.name]
        told = []
        for key in sorted(line.settings, key=lambda key: key != "recipe.name"):  # which says most
            same = [each for each in alike if each.get(key) == line.settings[key]]
            if len(same) < len(alike) and not key.startswith(ignored):
                told.append(f"{key}={shown(line.settings[key])}")
                alike = same
        network_name, routing = line.name
        names.append([network_name, ", ".join([routing, *told])])
    return names


def is_base(other: Line, line: Line) -> bool:
    """Whether one is the same but for its dynamic routing, and what belongs to it."""
    first, second = (
        {k: v for k, v in each.settings.items() if not k.startswith(("routing", "loss."))}
        | dict.fromkeys(OF_ROUTING)
        for each in (other, line)
    )
    return routing_of(other.settings) == BASE and first == second


def kinds(results: Iterable[Result]) -> list[Kind]:
    """All there are, in the order of their titles."""
    results = list(results)
    own = {same_run(r): r.error_percent for r in results if r.command == "train"}
    found: dict[str, dict[Path, Points]] = {}
    tested = {result.folder: result for result in results if result.command == "eval"}
    for result in tested.values():
        for title, points in (*on_another_set(result, own), *found_by(result)):
            found.setdefault(title, {})[result.folder] = points
    return [
        Kind(
            title,
            [
                Line(group, {r.seed: found[title][r.folder] for r in group.results})
                for group in grouped(tested[folder] for folder in found[title])
            ],
        )
        for title in sorted(found)
    ]


def sections(found: Iterable[Kind]) -> Iterator[str]:
    """A table for each kind, with what it is of above it."""
    for kind in found:
        yield f"**{kind.title}**"
        yield kind.table
        yield from (f"{remark}." for line in kind.lines for remark in line.group.remarks)


def summary(found: Iterable[Kind]) -> str:
    """A row for each network and routing, with the points of `SUMMARY`.

    A star is at what differs from dynamic routing, so that of all stars of the table one in twenty
    is expected to be chance's (Benjamini and Hochberg 1995).
    """
    by_title = {kind.title: kind for kind in found}
    columns = [(name, by_title[t], label) for name, t, label in SUMMARY if t in by_title]
    if not columns:
        return NOT_RUN
    _, first, _ = columns[0]
    lines: dict[str, Line] = {}
    for line in first.lines:
        lines.setdefault(network_key(line.settings), line)
    names = distinct_names([*lines.values()], NOT_OF_A_NETWORK)
    rows = [[kind.cell(key, label) for _, kind, label in columns] for key in lines]
    compared = [chance for row in rows for _, chance in row if chance < 1]
    adjusted = dict(zip(compared, false_discovery_control(compared))) if compared else {}
    starred = {chance for chance, value in adjusted.items() if value <= FALSE_DISCOVERIES}
    cells = [[f"{text}*" if chance in starred else text for text, chance in row] for row in rows]
    header = [*HEADER[:2], *(name for name, _, _ in columns)]
    return table(header, [[*name, *row] for name, row in zip(names, cells)])


def by_chance(differences: Sequence[float]) -> float:
    """How often the mean of so many numbers is as far from 0 if they are from around 0.

    Student's t, in either direction; 1 for too few of them.
    """
    if len(differences) < FEWEST_SEEDS:
        return 1.0
    mean, error = abs(statistics.fmean(differences)), error_of_mean(differences)
    return float(2 * stdtr(len(differences) - 1, -mean / error)) if error else float(mean == 0)


def figure(found: Iterable[Kind]) -> Figure | None:
    """The curves of all kinds; None where nothing has several seeds."""
    panels = {kind.title: kind.curves for kind in found if kind.curves}
    return plots.by_value(panels) if panels else None


def is_number(text: str) -> bool:
    """Whether a label is a value that images were changed by."""
    return text.replace(".", "", 1).isdigit()


def mean_and_error(differences: Sequence[float]) -> str:
    """With the standard error of the mean."""
    return f"{statistics.fmean(differences):+.2f} ± {error_of_mean(differences):.2f}"


def _text(values: Sequence[float], text: Callable[[Sequence[float]], str]) -> str:
    return text(values) if values else "–"


def _seeds(line: Line) -> str:
    return " ".join(map(str, line.runs))


def routing_of(settings: Mapping[str, Any]) -> str:
    """What routes the capsules of a network, from its settings with dots.

    The paper's scale of the margin loss is named, as networks differ in it alone; that of the
    authors' code, and the losses of other routings, go without saying.
    """
    if "routing.algorithm" in settings:
        shared = ", shared" if settings.get("routing.shared") == "True" else ""
        return shown(settings["routing.algorithm"]) + shared
    if "routing.iterations" not in settings:
        return "none: no capsules"
    iterations = settings["routing.iterations"]
    name = "uniform" if iterations == 1 else f"dynamic, {iterations:g} iterations"
    return name + (", loss=paper" if shown(settings["loss.name"]) == "paper" else "")
