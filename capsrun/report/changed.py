"""Networks on changed images: what `capsrun eval rotate=…`, `attack=…`, … found, over seeds."""

from collections.abc import Iterable, Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any

from capsrun.names import run_of
from capsrun.report.questions import network
from capsrun.report.rows import Group, grouped
from capsrun.report.tables import length, mean_and_spread, shown, table
from capsrun.runs.reader import Result

TRANSFORMS = {"rotate": "rotated, degrees", "shift": "moved, pixels", "scale": "scaled, factor"}
HEADER = ("network", "routing", "trained for", "seeds")
Points = dict[str, float]


def sections(results: Iterable[Result]) -> Iterator[str]:
    """A table for each kind of change, with what it is of above it."""
    tested = [result for result in results if result.command == "eval"]
    kinds: dict[str, list[tuple[Result, Points]]] = {}
    for result in tested:
        for title, points in found_by(result):
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

    found: what each result has, by its folder.
    """
    points = [[found[result.folder] for result in group.results] for group in groups]
    labels = list(dict.fromkeys(label for runs in points for run in runs for label in run))
    lines = []
    for group, runs in zip(groups, points):
        seeds = " ".join(str(result.seed) for result in group.results)
        cells = [
            mean_and_spread([run[label] for run in runs]) if all(label in r for r in runs) else "–"
            for label in labels
        ]
        head = [network(group), routing_of(group.first.settings), length(None, group), seeds]
        lines.append([*head, *cells])
    return [*HEADER, *labels], lines


def routing_of(settings: Mapping[str, Any]) -> str:
    """What routes the capsules of a network, from its settings with dots."""
    if "routing.algorithm" in settings:
        return shown(settings["routing.algorithm"])
    if "routing.iterations" not in settings:
        return "none: no capsules"
    iterations = settings["routing.iterations"]
    return "uniform" if iterations == 1 else f"dynamic, {iterations:g} iterations"


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
