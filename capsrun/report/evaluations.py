"""What evaluations found on other images than those of training, as percentages with a title.

Those of another data set, and changed ones, as of `capsrun eval rotate=…`, `attack=…`, ….
"""

from collections.abc import Iterator, Mapping
from typing import Any

from capsrun.data_config import title_of
from capsrun.names import run_of
from capsrun.report.questions import key_of
from capsrun.runs.reader import Result
from capsrun.settings import deciding

TRANSFORMS = {"rotate": "rotated, degrees", "shift": "moved, pixels", "scale": "scaled, factor"}
Points = dict[str, float]


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
    tested, count = result.tested, result.values["count"]
    split = "" if tested["split"] == "test" else f"{tested['split']} "
    weights = "" if tested["weights"] == "last" else f", {tested['weights']} weights"
    together = "" if tested["ensemble"] == 1 else f", {tested['ensemble']} networks together"
    images = f"{result.tested_on}, {count:,} {split}images{weights}{together}"
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
    name = f"reconstructive {name}" if attack.get("reconstructive") else name
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
