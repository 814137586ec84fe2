"""Networks on other images than those of training, over seeds.

Those of another data set, and changed ones, as `capsrun eval rotate=…`, `attack=…`, … found.
"""

import statistics
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any

from capsrun.data_config import title_of
from capsrun.names import run_of
from capsrun.report.questions import FEWEST_SEEDS, key_of, network
from capsrun.report.rows import Group, grouped
from capsrun.report.tables import length, mean_and_spread, shown, table
from capsrun.runs.reader import Result
from capsrun.settings import deciding

TRANSFORMS = {"rotate": "rotated, degrees", "shift": "moved, pixels", "scale": "scaled, factor"}
HEADER = ("network", "routing", "trained for", "seeds")
BASE = "dynamic, 3 iterations"
Points = dict[str, float]


def sections(results: Iterable[Result]) -> Iterator[str]:
    """A table for each kind of change, with what it is of above it."""
    results = list(results)
    own = {same_run(r): r.error_percent for r in results if r.command == "train"}
    kinds: dict[str, list[tuple[Result, Points]]] = {}
    for result in (each for each in results if each.command == "eval"):
        for title, points in (*on_another_set(result, own), *found_by(result)):
            kinds.setdefault(title, []).append((result, points))
    for title in sorted(kinds):
        by_folder = {result.folder: points for result, points in kinds[title]}
        groups = grouped(result for result, _ in kinds[title])
        yield f"**{title}**"
        yield table(*of_groups(groups, by_folder))
        yield from (f"{remark}." for group in groups for remark in group.remarks)


def of_groups(
    groups: Sequence[Group], found: Mapping[Path, Points]
) -> tuple[list[str], list[list[str]]]:
    """The header and the lines: networks against values, means over seeds.

    Below another routing, where three seeds of both were trained alike, is what it has more than
    dynamic routing: the mean of the differences, seed by seed, and its standard error.
    found: what each result has, by its folder.
    """
    heads = [(network(g), routing_of(g.first.settings), length(None, g)) for g in groups]
    by_seed = [{result.seed: found[result.folder] for result in g.results} for g in groups]
    labels = list(dict.fromkeys(label for runs in by_seed for r in runs.values() for label in r))
    lines = []
    for head, runs in zip(heads, by_seed):
        lines.append([*head, _seeds(runs), *_cells(list(runs.values()), labels, mean_and_spread)])
        of_base = dict(zip(heads, by_seed)).get((head[0], BASE, head[2]), {})
        paired = {
            seed: {label: run[label] - of_base[seed][label] for label in run.keys() & of_base[seed]}
            for seed, run in runs.items()
            if seed in of_base and head[1] != BASE
        }
        if len(paired) >= FEWEST_SEEDS:
            cells = _cells(list(paired.values()), labels, mean_and_error)
            lines.append(["", "difference from dynamic, paired", "", _seeds(paired), *cells])
    return [*HEADER, *labels], lines


def mean_and_error(differences: Sequence[float]) -> str:
    """With the standard error of the mean."""
    error = statistics.stdev(differences) / len(differences) ** 0.5
    return f"{statistics.fmean(differences):+.2f} ± {error:.2f}"


def _seeds(runs: Iterable[int]) -> str:
    return " ".join(map(str, runs))


def _cells(
    runs: Sequence[Points], labels: Iterable[str], text: Callable[[Sequence[float]], str]
) -> list[str]:
    return [
        text([run[label] for run in runs]) if all(label in run for run in runs) else "–"
        for label in labels
    ]


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
