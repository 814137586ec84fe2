"""What `capsrun eval` finds out about changed images: rotated, moved, scaled, attacked, others.

Each part returns what is drawn, and what `result.json` holds, in the same order.
"""

import dataclasses
import hashlib
import json
import re
import time
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from functools import partial
from typing import Any

import torch
from matplotlib.figure import Figure
from torch import Tensor

from capsrun.attack_config import AttackConfig
from capsrun.compose import compose
from capsrun.config import EvalConfig
from capsrun.data import load_dataset
from capsrun.data.sets import DATASETS, known
from capsrun.data.splits import Dataset, Split
from capsrun.data.warped import BORDER, UNCHANGED, UNITS, Noise, pixels_of, warped
from capsrun.data_config import DatasetConfig
from capsrun.errors import UserError, did_you_mean
from capsrun.models import Model
from capsrun.names import usual_dataset
from capsrun.report import robustness as report
from capsrun.report.pictures import counts
from capsrun.runs import checkpoint as checkpoints
from capsrun.runs.checkpoint import Trained
from capsrun.runs.progress import bar
from capsrun.settings import from_dict
from capsrun.terminal import counted, duration
from capsrun.training import detection
from capsrun.training.attacks import SHOWN, Attack, Network, Outcome, attack_split
from capsrun.training.metrics import Score, score_split
from capsrun.training.step import to_device
from capsrun.yaml_files import choices_of

NOISE = "noise"
PICTURES = tuple(f"{name}*" for name in (*UNCHANGED, "attack", "detect"))
Found = tuple[dict[str, Figure], dict[str, Any]]


def asked(config: EvalConfig) -> bool:
    """Whether more than the images as they are is to be tested."""
    return bool(config.rotate or config.shift or config.scale or config.attack or config.detect)


def folder_parts(config: EvalConfig) -> list[str]:
    """What tells the folder of such an evaluation from others.

    Where its settings are not those of its name, with a short digest of them.
    """
    parts = [how for how in UNCHANGED if getattr(config, how)]
    said: dict[str, Any] = {how: getattr(config, how) for how in parts}
    if config.attack is not None:
        name = config.attack.name
        parts += ["attack", re.sub(r"[^\w-]+", "_", name)]
        ours = dataclasses.asdict(config.attack)
        if name not in choices_of("attack") or ours != attack_values(name):
            said["attack"] = ours
    if config.detect:
        parts.append("detect")
        said["detect"] = config.detect
    if said:
        text = json.dumps(said, sort_keys=True)
        parts.append(hashlib.md5(text.encode(), usedforsecurity=False).hexdigest()[:6])
    return parts


def attack_values(name: str) -> dict[str, Any]:
    """The settings of an attack where nothing is said about it."""
    attack = from_dict(EvalConfig, compose("eval", [f"attack={name}"])).attack
    assert attack is not None
    return dataclasses.asdict(attack)


def check(config: EvalConfig, ensemble: Sequence[Trained]) -> None:
    """Raise UserError for what cannot be found out about these models."""
    for name in ("attack", "detect"):
        if getattr(config, name) and len(ensemble) > 1:
            raise UserError(f"{name}= is of one network, and ensemble=… of several: leave one out")
    if config.attack is not None:
        check_attack(config.attack, config.dataset)
        if config.attack.reconstructive and not config.attack.source:
            check_decoder("attack.reconstructive=true", ensemble[0], "this network")
    if config.detect:
        check_decoder("detect=", ensemble[0], "this network")
    for name in config.detect:
        if name == NOISE:
            continue
        if name not in DATASETS:
            hint = did_you_mean(name, (NOISE, *DATASETS))
            raise UserError(f"detect=: there is no data set {name!r}{hint}")
        own = known(name).reader is not None
        if own or {name, known(name).picked_from} & of_the_same(config.dataset):
            what = "of one's own" if own else "that which is tested, or of the same images"
            raise UserError(f"detect=[{name}]: this data set is {what}; name another one, or noise")


def check_attack(attack: AttackConfig, dataset: DatasetConfig) -> None:
    """Raise UserError for settings that contradict each other."""
    if not attack.epsilon:
        raise UserError("attack.epsilon is empty: say how far pixels may be moved, as [0,0.1]")
    if attack.restarts > 1 and not attack.random_start:
        raise UserError(
            "attack.restarts are from random places: attack=pgd, or attack.random_start=true"
        )
    if attack.seed and not (attack.random_start or attack.targeted):
        raise UserError(
            "attack.seed is of random starts and targets, and this attack has neither: leave it out"
        )
    if attack.targeted and dataset.digits > 1:
        raise UserError("attack.targeted=true is for images of one digit: leave it out")


def of_the_same(dataset: DatasetConfig) -> set[str]:
    """The names of data sets with the same images, of one digit, as some images have."""
    source = dataset.source if dataset.digits == 1 else None
    return {*filter(None, (dataset.name, source, known(dataset.name).picked_from))}


def check_decoder(setting: str, trained: Trained, which: str) -> None:
    """Raise UserError where a setting needs reconstructions that there are not."""
    if trained.model.decoder is None:
        raise UserError(
            f"{setting} needs reconstructions, and {which} has no decoder: train a CapsNet with "
            "model.reconstruction=true"
        )


@dataclass(frozen=True)
class Others:
    """What is needed beside the tested network and images."""

    source: Trained | None
    """The network on which images are perturbed, if it is another."""
    sets: Mapping[str, Split]
    """Images that are to be told from the tested ones."""


def find_others(config: EvalConfig, split: Split) -> Others:
    """Read that before anything takes long. Raises UserError for what is not there, or unfit."""
    source = None
    if config.attack is not None and config.attack.source is not None:
        try:
            path = checkpoints.find_checkpoint(config.attack.source)
            source = checkpoints.load_checkpoint(path)
            checkpoints.check_dataset(config.dataset, source.config, config.split)
            if config.attack.reconstructive:
                check_decoder("attack.reconstructive=true", source, "it")
        except UserError as error:
            raise UserError(f"attack.source={config.attack.source}: {error}") from error
        print(f"perturbed on: {path}")
    if config.detect and min(len(split), config.images or 2) < 2:
        raise UserError("detect= needs two images at least: half of them may give the threshold")
    return Others(source, {name: other_images(config, split, name) for name in config.detect})


@dataclass(frozen=True)
class Tested:
    """A network that was tested on the images as they are, and what came out."""

    config: EvalConfig
    trained: Trained
    models: Sequence[Model]
    """On the device; several are averaged."""
    dataset: Dataset
    precision: str
    plain: Score
    others: Others

    @property
    def split(self) -> Split:
        return self.dataset.split(self.config.split)

    @property
    def title(self) -> str:
        return f"{self.trained.config.model.name}, {self.config.dataset.title}"

    def examples(self) -> tuple[Tensor, Tensor]:
        """The numbers and the labels of the images that are drawn."""
        few = min(SHOWN, self.plain.count)
        return self.split.indices(0, few), self.plain.labels_NT[:few]


def find(tested: Tested) -> Found:
    """All that is asked for beside the plain test: figures, and what `result.json` holds of it."""
    config = tested.config
    attack = None if config.attack is None else make_attack(tested)
    drawn, facts = transformed(tested)
    outcomes: list[Outcome] = []
    rows: list[dict[str, Any]] = []
    if attack is not None:
        began, progress = time.perf_counter(), partial(bar, doing=attack.config.name)
        options = config.images, progress, bool(config.detect)
        outcomes = attack_split(attack, tested.models[0], *options)
        rows = [attack_row(outcome, attack.config.targeted) for outcome in outcomes]
        facts |= {"attack": rows, "attack_seconds": time.perf_counter() - began}
    if config.detect:
        drawn_detection, found = detected(tested, outcomes)
        drawn |= drawn_detection
        facts["detection"] = found
    if attack is not None:
        report.print_rows(f"ε of {attack.config.name}", rows, "epsilon")
        took = duration(facts["attack_seconds"])
        what = counted(rows[0]["count"], "image"), counted(len(rows), "value")
        print(f"attacked: {what[0]}, {what[1]} of ε, in {took}")
        parts = facts["detection"]["attack"] if config.detect else rows
        drawn |= attack_figures(tested, outcomes, [{**p, **row} for p, row in zip(parts, rows)])
    return drawn, facts


def transformed(tested: Tested) -> Found:
    """The error with the images rotated, moved and scaled by each value; `curves`."""
    config, split, names = tested.config, tested.split, tested.dataset.class_names
    drawn: dict[str, Figure] = {}
    curves: dict[str, Any] = {}
    numbers_S, labels_ST = tested.examples()
    for how, plain_value in UNCHANGED.items():
        rows, pictures = [], []
        for value in getattr(config, how):
            images, score = warped(split, how, value), tested.plain
            if value != plain_value:
                progress = partial(bar, doing=f"{how} {value:g}")
                options = None, progress, config.images
                score = score_split(tested.models, images, tested.precision, *options)
            rows.append({"value": value, **counts(score)})
            shown = pixels_of(images.batch(numbers_S), config.dataset).cpu()
            pictures.append((f"{value:g}", shown, score.predicted_NT[: len(labels_ST)]))
        if rows:
            report.print_rows(how, rows, "value")
            title = f"{how} ({UNITS[how]}): label above; red: what it is wrongly taken for"
            drawn[how] = report.error_curve(how, rows, config.split, tested.title)
            drawn[f"{how}_images"] = report.taken_for(pictures, labels_ST, names, title)
            curves[how] = rows
    return drawn, {"curves": curves, "border": BORDER} if curves else {}


def make_attack(tested: Tested) -> Attack:
    """The attack on the tested network, or on another one."""
    config, source = tested.config, tested.others.source
    assert config.attack is not None
    network = Network(tested.models[0], tested.trained.config.loss)
    if source is not None:
        device = tested.split.device
        network = Network(to_device(source.model, device, config.compile), source.config.loss)
    return Attack(network, tested.split, config.attack)


def attack_row(outcome: Outcome, targeted: bool) -> dict[str, Any]:
    """What `result.json` holds of an attack within one ε."""
    count, errors = len(outcome.wrong_N), int(outcome.wrong_N.sum())
    row = {"epsilon": outcome.epsilon, "errors": errors, "count": count}
    row["error_percent"] = 100 * errors / count
    if targeted:
        row["success"] = int(outcome.fooled_N.sum())
        row["success_percent"] = 100 * row["success"] / count
    return row | {"flat": int(outcome.flat_N.sum())}


def attack_figures(
    tested: Tested, outcomes: Sequence[Outcome], rows: Sequence[Mapping[str, Any]]
) -> dict[str, Figure]:
    """The error against ε, and some perturbed images."""
    assert tested.config.attack is not None
    attack = tested.config.attack
    name = f"{attack.name}, loss {attack.loss}{', targeted' if attack.targeted else ''}"
    _, labels_ST = tested.examples()
    pictures = [
        (f"ε {outcome.epsilon:g}", outcome.shown_SCHW, outcome.predicted_NT[: len(labels_ST)])
        for outcome in outcomes
    ]
    title = f"{name}: label above; red: what it is wrongly taken for"
    names = tested.dataset.class_names
    return {
        "attack": report.attack_curve(rows, tested.config.split, f"{tested.title}: {name}"),
        "attack_images": report.taken_for(pictures, labels_ST, names, title),
    }


def held_out(tested: Tested) -> Split | None:
    """The validation images of the run, if it has some that are of the tested data set."""
    ours, theirs = tested.config.dataset, tested.trained.config.dataset
    if not theirs.validation or ours.title != theirs.title or tested.config.split == "validation":
        return None
    same = dataclasses.replace(ours, validation=theirs.validation, split_seed=theirs.split_seed)
    return load_dataset(same, tested.split.device).validation


def other_images(config: EvalConfig, split: Split, name: str) -> Split:
    """The test images of another data set on the same canvas, or noise.

    Raises UserError where the network cannot take them.
    """
    ours, device = config.dataset, split.device
    if name == NOISE:
        return Noise(torch.zeros(len(split), dtype=torch.int64, device=device), ours)
    usual = usual_dataset(name)
    if usual.channels != ours.channels or usual.image_px > ours.image_px:
        raise UserError(
            f"detect=[{name}]: its images have {usual.channels}×{usual.image_px}×{usual.image_px}, "
            f"but the network takes {ours.channels}×{ours.image_px}×{ours.image_px}"
        )
    kept = {key: getattr(ours, key) for key in ("data_dir", "image_px", "standardise")}
    return load_dataset(dataclasses.replace(usual, shift_px=0, **kept), device).test


def detected(tested: Tested, outcomes: Sequence[Outcome]) -> Found:
    """How well other and attacked images are told from real ones by their reconstructions."""
    config, model = tested.config, tested.models[0]

    def distances(split: Split, doing: str) -> Tensor:
        progress = partial(bar, doing=doing)
        return detection.split_distances(model, split, config.dataset, config.images, progress)

    real_N = distances(tested.split, "reconstructing")
    validation, measured = held_out(tested), slice(None)
    if validation is not None:
        held_N, came = distances(validation, "validation"), "the validation images of the run"
    else:
        # Not the first half: that of MNIST's test images is of other writers than the second.
        held_N, measured = real_N[::2], slice(1, None, 2)
        came = "every second of the tested images, which are not measured"
    threshold, measured_N = detection.threshold_of(held_N), real_N[measured]
    sets = {
        name: found_of(distances(split, name), measured_N, threshold)
        for name, split in tested.others.sets.items()
    }
    found = {
        "description": f"flagged is what differs from its reconstruction by more than "
        f"{threshold:.2f}, as do {100 - detection.PERCENTILE} % of {came}",
        "threshold": threshold,
        "percentile": detection.PERCENTILE,
        "threshold_from": "every_second" if validation is None else "validation",
        "threshold_images": len(held_N),
        "measured_images": len(measured_N),
        "real_flagged_percent": detection.flagged_percent(measured_N, threshold),
        "sets": sets,
        "attack": [undetected(each, measured, measured_N, threshold) for each in outcomes],
    }
    report.print_detection(found)
    return {"detect": report.roc_curves(found, f"flagged by reconstruction: {tested.title}")}, found


def found_of(other_N: Tensor, real_N: Tensor, threshold: float) -> dict[str, Any]:
    """How well images are told from real ones, from the distances of both."""
    return {
        "count": len(other_N),
        "flagged_percent": detection.flagged_percent(other_N, threshold),
        "roc_area": detection.roc_area(real_N, other_N),
        "roc": detection.roc_curve(real_N, other_N),
    }


def undetected(
    outcome: Outcome, measured: slice, real_N: Tensor, threshold: float
) -> dict[str, Any]:
    """Of the measured images: how many fool the network, and how many of these are not flagged.

    And how well those that fool it are told from the real ones, if there are some.
    """
    distances_N, fooled_N = outcome.distances_N[measured], outcome.fooled_N[measured]
    missed = int((fooled_N & (distances_N <= threshold)).sum())
    found: dict[str, Any] = {
        "epsilon": outcome.epsilon,
        "count": len(fooled_N),
        "fooled": int(fooled_N.sum()),
        "undetected": missed,
        "fooled_percent": 100 * int(fooled_N.sum()) / len(fooled_N),
        "undetected_percent": 100 * missed / len(fooled_N),
        "flagged_percent": detection.flagged_percent(distances_N, threshold),
    }
    if bool(fooled_N.any()):
        found["fooled_detection"] = found_of(distances_N[fooled_N], real_N, threshold)
    return found
