"""Networks on other images than those of training, over seeds.

Those of another data set, and changed ones, as `capsrun eval rotate=…`, `attack=…`, … found.
"""

import statistics
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from functools import cached_property
from pathlib import Path
from typing import Any

from matplotlib.figure import Figure

from capsrun.data_config import title_of
from capsrun.names import run_of
from capsrun.report import plots
from capsrun.report.questions import FEWEST_SEEDS, key_of, network
from capsrun.report.rows import Group, grouped
from capsrun.report.tables import length, mean_and_spread, shown, table
from capsrun.runs.reader import Result
from capsrun.settings import deciding

TRANSFORMS = {"rotate": "rotated, degrees", "shift": "moved, pixels", "scale": "scaled, factor"}
HEADER = ("network", "routing", "trained for", "seeds")
BASE = "dynamic, 3 iterations"
Points = dict[str, float]


@dataclass(frozen=True)
class Kind:
    """What was found about one kind of change, or another data set."""

    title: str
    groups: Sequence[Group]
    found: Mapping[Path, Points]
    """Of each result, by its folder."""

    @cached_property
    def heads(self) -> list[tuple[str, str, str]]:
        """Of each group the first cells of `HEADER`."""
        of = [(group, group.first.settings) for group in self.groups]
        return [(network(g), routing_of(settings), length(None, g)) for g, settings in of]

    @cached_property
    def by_seed(self) -> list[dict[int, Points]]:
        """What each group has found, by its seeds."""
        return [{r.seed: self.found[r.folder] for r in group.results} for group in self.groups]

    @cached_property
    def labels(self) -> list[str]:
        """Of the points that any of them has."""
        runs = [points for of_group in self.by_seed for points in of_group.values()]
        return list(dict.fromkeys(label for points in runs for label in points))

    @property
    def table(self) -> str:
        """Networks against values, means over seeds.

        Below another routing, where three seeds of both were trained alike, is what it has more
        than dynamic routing: the mean of the differences, seed by seed, and its standard error.
        """
        lines = []
        for head, runs in zip(self.heads, self.by_seed):
            lines.append([*head, _seeds(runs), *self._cells(runs, mean_and_spread)])
            of_base = dict(zip(self.heads, self.by_seed)).get((head[0], BASE, head[2]), {})
            paired = {k: less(run, of_base[k]) for k, run in runs.items() if k in of_base}
            if head[1] != BASE and len(paired) >= FEWEST_SEEDS:
                cells = self._cells(paired, mean_and_error)
                lines.append(["", "difference from dynamic, paired", "", _seeds(paired), *cells])
        return table([*HEADER, *self.labels], lines)

    @property
    def curves(self) -> dict[str, dict[float, list[float]]]:
        """Of networks with several seeds, what these found at each value; empty: no numbers."""
        if not all(map(is_number, self.labels)):
            return {}
        return {
            f"{head[0]}, {head[1]}": {
                float(label): [run[label] for run in runs.values()] for label in self.labels
            }
            for head, runs in zip(self.heads, self.by_seed)
            if len(runs) >= FEWEST_SEEDS
            and all({*self.labels} == run.keys() for run in runs.values())
        }

    def _cells(
        self, runs: Mapping[int, Points], text: Callable[[Sequence[float]], str]
    ) -> list[str]:
        return [
            text([run[label] for run in runs.values()])
            if all(label in run for run in runs.values())
            else "–"
            for label in self.labels
        ]


def kinds(results: Iterable[Result]) -> list[Kind]:
    """All there are, in the order of their titles."""
    results = list(results)
    own = {same_run(r): r.error_percent for r in results if r.command == "train"}
    found: dict[str, dict[Path, Points]] = {}
    tested = {result.folder: result for result in results if result.command == "eval"}
    for result in tested.values():
        for title, points in (*on_another_set(result, own), *found_by(result)):
            found.setdefault(title, {})[result.folder] = points
    return [Kind(t, grouped(tested[f] for f in found[t]), found[t]) for t in sorted(found)]


def sections(results: Iterable[Result]) -> Iterator[str]:
    """A table for each kind, with what it is of above it."""
    for kind in kinds(results):
        yield f"**{kind.title}**"
        yield kind.table
        yield from (f"{remark}." for group in kind.groups for remark in group.remarks)


def figure(results: Iterable[Result]) -> Figure | None:
    """The curves of all kinds; None where nothing has enough seeds."""
    panels = {kind.title: kind.curves for kind in kinds(results) if kind.curves}
    return plots.by_value(panels) if panels else None


def is_number(text: str) -> bool:
    """Whether a label is a value that images were changed by."""
    return text.replace(".", "", 1).isdigit()


def less(run: Points, other: Points) -> Points:
    """What one has more than the other, where both have something."""
    return {label: run[label] - other[label] for label in run if label in other}


def mean_and_error(differences: Sequence[float]) -> str:
    """With the standard error of the mean."""
    error = statistics.stdev(differences) / len(differences) ** 0.5
    return f"{statistics.fmean(differences):+.2f} ± {error:.2f}"


def _seeds(runs: Iterable[int]) -> str:
    return " ".join(map(str, runs))


def routing_of(settings: Mapping[str, Any]) -> str:
    """What routes the capsules of a network, from its settings with dots."""
    if "routing.algorithm" in settings:
        return shown(settings["routing.algorithm"])
    if "routing.iterations" not in settings:
        return "none: no capsules"
    iterations = settings["routing.iterations"]
    return "uniform" if iterations == 1 else f"dynamic, {iterations:g} iterations"


def same_run(result: Result) -> tuple[str, int]:
    """What a run and the evaluations of it have in common."""
    return key_of(deciding(result.training)), result.seed


def on_another_set(
    result: Result, own: Mapping[tuple[str, int], float]
) -> Iterator[tuple[str, Points]]:
    """The error of an evaluation on another data set, with that of `own` where it is known."""
    trained_on = title_of(result.training["dataset"])
    if result.tested_on != trained_on:
        points = {trained_on: own[same_run(result)]} if same_run(result) in own else {}
        points[result.tested_on] = result.error_percent
        count = result.values["count"]
        yield f"{result.tested_on}, {count:,} images, trained on {trained_on}: error %", points


def found_by(result: Result) -> Iterator[tuple[str, Points]]:
    """What an evaluation found about each kind of change: its title, and percentages by a label."""
    images = f"{result.tested_on}, {result.values['count']:,} images"
    for how, rows in result.values.get("curves", {}).items():
        points = {f"{row['value']:g}": row["error_percent"] for row in rows}
        yield f"{images}, {TRANSFORMS[how]}: error %", points
    attacked = result.values.get("attack")
    if attacked:
        how = attack_text(result.values["config"]["attack"])
        yield (
            f"{images}, {how}: error % within ε",
            {f"{row['epsilon']:g}": row["error_percent"] for row in attacked},
        )
        if "success_percent" in attacked[0]:
            success = {f"{row['epsilon']:g}": row["success_percent"] for row in attacked}
            yield f"{images}, {how}: taken for the target, %, within ε", success
    yield from detected_by(result, images)


def detected_by(result: Result, images: str) -> Iterator[tuple[str, Points]]:
    """The same of detection by reconstruction."""
    detection = result.values.get("detection")
    if not detection:
        return
    sets = detection["sets"]
    points = {"the digits": 100 - detection["real_flagged_percent"]}
    points |= {name: 100 - found["flagged_percent"] for name, found in sets.items()}
    yield f"{images}, not flagged by reconstruction, %", points
    areas = {name: 100 * found["roc_area"] for name, found in sets.items()}
    yield f"{images}, area under the ROC curve of reconstruction, %", areas
    if detection["attack"]:
        how = attack_text(result.values["config"]["attack"])
        missed = {f"{row['epsilon']:g}": row["undetected_percent"] for row in detection["attack"]}
        yield f"{images}, {how}: fooled and not flagged, %, within ε", missed


def attack_text(attack: Mapping[str, Any]) -> str:
    """How images were attacked."""
    name = attack["name"] + (" to a target" if attack["targeted"] else "")
    source = attack["source"]
    starts = "from random starts" if attack["restarts"] == 1 else f"{attack['restarts']} starts"
    size, seed = attack["step_size"], attack["seed"]
    words = [
        f"{name} on {run_of(source)}" if source else name,
        "" if attack["steps"] == 1 else f"{attack['steps']} steps",
        "" if size is None else f"of {size:g}",
        starts if attack["random_start"] else "",
        f"seed {seed}" if seed else "",
    ]
    loss = "the loss of training" if attack["loss"] == "trained" else "the scores' difference"
    return f"{', '.join(filter(None, words))}, by {loss}"
