"""`capsrun predict`: classes for images of one's own.

Shapes: N images, J classes, T digits in one image, C channels, H and W pixels.
"""

import csv
import dataclasses
import json
import os
import sys
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import torch
from matplotlib.figure import Figure
from tabulate import tabulate
from torch import Tensor

from capsrun import disk
from capsrun.commands.models import (
    find_or_packaged,
    images_of,
    model_facts,
    say_network,
)
from capsrun.config import PredictConfig
from capsrun.data.own_data import natural
from capsrun.data.own_folder import ENDINGS
from capsrun.data.own_image import read_image
from capsrun.data.sets import class_names
from capsrun.data.splits import standardise
from capsrun.data_config import DatasetConfig
from capsrun.errors import UserError, notice
from capsrun.model_config import ROUTINGS, algorithm_of
from capsrun.models import Model
from capsrun.models.capsnet import CapsNet
from capsrun.names import model_words, packaged, suggest, word
from capsrun.report import figures
from capsrun.report.pictures import displayed
from capsrun.runs.checkpoint import Trained, load_checkpoint, output_folder
from capsrun.runs.progress import bar
from capsrun.terminal import counted, printable
from capsrun.training.device import resolve_device
from capsrun.training.step import to_device

# So many images are classified at once.
AT_ONCE = 100
# Of so many, from the first, the sheet shows what was seen.
MOST_SHOWN = 48
CSV = "image", "class", "runner_up", "doubt"
RECORD, SHEET = "predictions.json", "sheet.png"
# A shorter capsule, or lower probability, says that the model knows nothing like it, and so does a
# drawing that misses the image by so many times what those of test images do on average. Of MNIST's
# test digits the networks of `results/` and `weights/` have 1 % beyond each. Of scores that add up
# to 1, as probabilities do, the digits of an image share it.
LEAST_LENGTH = 0.6
MOST_TIMES_USUAL = 3


@dataclasses.dataclass(frozen=True)
class Prediction:
    """What a model sees in an image."""

    path: Path
    pixels_CHW: Tensor
    """As prepared, in [0, 1]."""
    remarks: list[str]
    """What was done to it."""
    scores_J: Tensor
    seen: list[int]
    """The T classes that are seen most, the surest first."""
    second: int
    """The next one."""
    drawn_CHW: Tensor | None
    """What the decoder makes of the classes that are seen."""
    least: float
    """A lower score is a doubt."""
    usual_error: float | None
    """By how much drawings of test images miss them, in squares; None: not known."""

    @property
    def doubt(self) -> str:
        """Why the answer is worth little; empty where nothing speaks against it."""
        if float(self.scores_J[self.seen].min()) < self.least:
            return "unlike all that the model knows"
        if self.drawn_CHW is not None and self.usual_error is not None:
            error = float((self.drawn_CHW - self.pixels_CHW).square().sum())
            if error > MOST_TIMES_USUAL * self.usual_error:
                return "unlike what the model draws of it"
        return ""


def main(config: PredictConfig, overrides: Sequence[str]) -> None:
    """`capsrun predict`: print what is seen in each image, and draw a sheet of them.

    Raises UserError, once all others are answered, where some images cannot be used.
    """
    paths = paths_of(config.images, Path(config.runs_dir))
    table = Path(config.csv) if config.csv else None
    if table is not None:
        refuse_another_table(table)
    checkpoint = find_or_packaged(config)
    device = resolve_device(config.device)
    trained = load_checkpoint(checkpoint)
    # For programs there is nothing but JSON.
    say_network(checkpoint, trained, sys.stderr if config.json else sys.stdout)
    model = to_device(trained.model, device, fast=False).eval()
    dataset = trained.config.dataset
    names = class_names(dataset)
    given = model, dataset, config.invert, device, usual_error(checkpoint)
    predictions, faults = predict(paths, *given)
    if config.json:
        plain = [as_plain(prediction, names) for prediction in predictions]
        print(json.dumps(plain, indent=2, ensure_ascii=False))
    else:
        show(predictions, names, "length" if isinstance(model, CapsNet) else "probability")
    if table is not None:
        write_csv(table, predictions, names)
    if predictions and not config.json:
        keep(config, predictions, trained, checkpoint)
    if faults:
        of = f"{counted(faults, 'image')} of {len(paths)}"
        raise UserError(f"{of} could not be used, as is said above")
    if isinstance(model, CapsNet) and model.decoder is not None and not config.json:
        config.dataset = images_of(trained, checkpoint)
        words = model_words(config, checkpoint)
        suggest(["perturb", *words, word("perturb.image", predictions[0].path)])


def keep(
    config: PredictConfig, predictions: list[Prediction], trained: Trained, checkpoint: Path
) -> None:
    """Write the sheet, and what was seen for programs, and say where."""
    names = class_names(trained.config.dataset)
    folder = Path(config.out_dir or output_folder(checkpoint, config.runs_dir) / "predict")
    with disk.own_folder(folder, RECORD, SHEET, command="predict"):
        facts = {"command": "predict", **model_facts(trained, checkpoint)}
        facts["predictions"] = [as_plain(prediction, names) for prediction in predictions]
        disk.write_json(folder / RECORD, facts)
        figures.save(sheet(predictions, names), folder / SHEET)
    print(f"what it saw, and what it draws: {folder / SHEET}")


def usual_error(checkpoint: Path) -> float | None:
    """By how much the drawings of a model's test images miss them on average, where it is known."""
    result = checkpoint.with_name("result.json")
    if checkpoint == packaged():
        result = checkpoint.with_suffix(".json")
    try:
        return disk.read_json(result)["reconstruction_squared_error"]
    except (OSError, ValueError, LookupError, TypeError):  # of an unfinished run there is none
        return None


def paths_of(images: Sequence[str], runs_dir: Path) -> list[Path]:
    """The images, and those in folders among them, but for pictures of runs.

    Raises UserError where there are none.
    """
    if not all(images) or not images:
        raise UserError("give images, or folders of them: capsrun predict IMAGE …")
    found = []
    for image in images:
        path = Path(os.path.expanduser(image))
        inside = pictures_below(path, runs_dir.resolve()) if path.is_dir() else [path]
        if not inside:
            raise UserError(f"there are no pictures in {path}")
        found += inside
    return found


def pictures_below(folder: Path, runs_dir: Path) -> list[Path]:
    """The pictures in a folder and those in it, in natural order; none that are hidden."""
    found: dict[str, Path] = {}
    for place, folders, names in os.walk(folder):
        folders[:] = [
            name
            for name in folders
            if not name.startswith(".") and Path(place, name).resolve() != runs_dir
        ]
        found |= {str(path): path for path in (Path(place, name) for name in names)}
    return [
        path
        for path in (found[name] for name in natural(found))
        if path.suffix.lower() in ENDINGS and not path.name.startswith(".") and path.is_file()
    ]


@torch.inference_mode()
def predict(
    paths: Sequence[Path],
    model: Model,
    dataset: DatasetConfig,
    invert: str,
    device: torch.device,
    usual_error: float | None,
) -> tuple[list[Prediction], int]:
    """What the model sees in each image; how many cannot be used, why is said of each.

    dataset: what the model was trained on. usual_error: see `Prediction`.
    """
    found: list[Prediction] = []
    faults = 0
    for start in bar(range(0, len(paths), AT_ONCE), doing="predicting"):
        read = []
        for path in paths[start : start + AT_ONCE]:
            try:
                read.append((path, *read_image(path, dataset, invert)))
            except UserError as error:
                if len(paths) == 1:
                    raise
                notice(printable(str(error)))
                faults += 1
        if not read:
            continue
        usual = LEAST_LENGTH / (dataset.digits if add_up_to_1(model) else 1), usual_error
        pixels_BCHW = torch.stack([pixels for _, pixels, _ in read]).to(device)
        seen_BCHW = standardise(pixels_BCHW) if dataset.standardise else pixels_BCHW
        output = model(seen_BCHW)
        scores_BJ = output.scores_BJ
        order_BJ = scores_BJ.argsort(dim=1, descending=True, stable=True)
        drawn = [None] * len(read)
        if isinstance(model, CapsNet) and model.decoder is not None:
            drawn_BTCHW = model.decode(output.capsules_BJD, order_BJ[:, : dataset.digits])
            drawn = list(drawn_BTCHW.sum(1).clamp(max=1).cpu())
        for number, (path, pixels_CHW, remarks) in enumerate(read):
            *seen, second = order_BJ[number, : dataset.digits + 1].tolist()
            scores_J = scores_BJ[number].cpu()
            found.append(
                Prediction(path, pixels_CHW, remarks, scores_J, seen, second, drawn[number], *usual)
            )
    return found, faults


def add_up_to_1(model: Model) -> bool:
    """Whether the scores of the classes do, as probabilities."""
    return not isinstance(model, CapsNet) or ROUTINGS[algorithm_of(model.routing)].shares


def show(predictions: Sequence[Prediction], names: Sequence[str], measure: str) -> None:
    """Print a line for each image."""
    rows = []
    for found in predictions:
        classes = " and ".join(names[label] for label in found.seen)
        lengths = " and ".join(f"{found.scores_J[label]:.2f}" for label in found.seen)
        runner_up = f"{names[found.second]} ({found.scores_J[found.second]:.2f})"
        rows.append((printable(str(found.path)), classes, lengths, runner_up, found.doubt))
    if rows:
        header = ["image", "class", measure, "runner-up", ""]
        print(tabulate(rows, header, tablefmt="plain", disable_numparse=True))
    if len(predictions) == 1:
        for remark in predictions[0].remarks:
            print(remark)


def as_plain(found: Prediction, names: Sequence[str]) -> dict[str, Any]:
    """A prediction for programs."""
    scores = {name: round(float(score), 6) for name, score in zip(names, found.scores_J)}
    return {
        "image": str(found.path).encode(errors="replace").decode(),
        "classes": [names[label] for label in found.seen],
        "runner_up": names[found.second],
        "scores": scores,
        "doubt": found.doubt or None,
        "remarks": found.remarks,
    }


def refuse_another_table(path: Path) -> None:
    """Raise UserError where something is that `write_csv` did not write."""
    disk.refuse_unless_plain(path)
    if path.is_file():
        head = ",".join(CSV).encode()
        with open(path, "rb") as stream:
            if stream.read(len(head)) not in (b"", head):
                raise UserError(f"{path} holds no scores of capsrun's; choose another csv=…")


def write_csv(path: Path, predictions: Sequence[Prediction], names: Sequence[str]) -> None:
    """A line for each image: its file, what is seen, the runner-up, and every score."""
    disk.make_folder(path.parent)
    with disk.replacing(path) as temporary, open(temporary, "w", encoding="utf-8") as stream:
        lines = csv.writer(stream, lineterminator="\n")
        lines.writerow([*CSV, *names])
        for plain in (as_plain(found, names) for found in predictions):
            scores = [f"{score:.4f}" for score in plain["scores"].values()]
            classes = " ".join(plain["classes"])
            lines.writerow([plain["image"], classes, plain["runner_up"], plain["doubt"], *scores])
    print(f"scores: {path}", file=sys.stderr)


def sheet(predictions: Sequence[Prediction], names: Sequence[str]) -> Figure:
    """What the network saw of each image, above what its decoder draws, if it has one."""
    blocks = []
    for found in predictions[:MOST_SHOWN]:
        images = [found.pixels_CHW[None]]
        images += [] if found.drawn_CHW is None else [found.drawn_CHW[None]]
        classes = " and ".join(f"{names[k]} {found.scores_J[k]:.2f}" for k in found.seen)
        name = printable(found.path.name)
        short = name if len(name) < 20 else f"{name[:17]}…"
        blocks.append((f"{short}: {classes}", [list(displayed(torch.cat(images)))]))
    shown = f", the first {MOST_SHOWN}" if len(predictions) > MOST_SHOWN else ""
    title = f"What the network saw, and what its decoder draws of that{shown}"
    return figures.sheet(blocks, [""], [], title, scale=3)
