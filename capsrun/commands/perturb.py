"""`capsrun perturb`: move each dimension of a class capsule, draw what comes out (§5.1, figure 4).

Shapes: C channels, H and W pixels, D dimensions of a capsule, V values, J classes.
"""

import dataclasses
import hashlib
import math
import re
from collections.abc import Sequence
from dataclasses import dataclass
from functools import partial
from pathlib import Path

import torch
from matplotlib.figure import Figure
from torch import Tensor

from capsrun.commands.models import (
    find_or_packaged,
    images_of,
    load_test_images,
    model_facts,
    result_folder,
    say_network,
    write_result,
)
from capsrun.config import PerturbConfig, SweepConfig
from capsrun.data.batches import in_class_order
from capsrun.data.own_image import read_image
from capsrun.data.sets import class_names
from capsrun.data.splits import Dataset, Split, standardise
from capsrun.data_config import DatasetConfig
from capsrun.errors import UserError, did_you_mean
from capsrun.models.capsnet import CapsNet
from capsrun.names import folder_words, model_words, suggest
from capsrun.report import figures
from capsrun.report.pictures import displayed
from capsrun.runs.checkpoint import load_drawing_model
from capsrun.runs.progress import bar
from capsrun.terminal import counted
from capsrun.training.device import provenance, resolve_device
from capsrun.training.metrics import predicted_classes
from capsrun.training.step import to_device

MOST_VALUES = 101
# How many images of a class are looked through for one that is classified rightly.
LOOK_THROUGH = 100
# Among how many test images they are looked for, where there are millions.
LOOK_THROUGH_TEST = 100_000


@dataclass(frozen=True)
class Subject:
    """An image whose capsule is perturbed."""

    image_CHW: Tensor
    """As the network sees it."""
    pixels_CHW: Tensor
    """As it is shown."""
    label: int
    class_name: str
    title: str
    file_name: str


Swept = list[tuple[Subject, Tensor]]
"""Subjects, each with what `perturbed` draws of it (D, V, C, H, W)."""


def main(config: PerturbConfig, overrides: Sequence[str]) -> None:
    """`capsrun perturb`: draw, and say what else can be done with the model."""
    checkpoint = find_or_packaged(config)
    perturb(config, checkpoint)
    suggest(["explore", *model_words(config, checkpoint)], ["report", *folder_words(config)])


def perturb(config: PerturbConfig, checkpoint: Path) -> list[Path]:
    """Draw a picture of each subject, and one of all where they are several; returns their paths.

    Raises UserError when checkpoint, data, image or settings cannot be used.
    """
    values = sweep_values(config.perturb)
    device = resolve_device(config.device)
    trained, model = load_drawing_model(checkpoint)
    say_network(checkpoint, trained)
    to_device(model, device, fast=False).eval()
    names, dataset = class_names(trained.config.dataset), None
    digit = None if config.perturb.digit is None else class_called(config.perturb.digit, names)
    if config.perturb.image is not None:
        config.dataset = images_of(trained, checkpoint)
        subjects = [own_image(config.perturb, digit, model, trained.config.dataset, device)]
    else:
        dataset = load_test_images(config, trained, device)
        subjects = chosen_images(config.perturb.index, digit, model, dataset)
    name = f"perturb-{dataset.name if dataset else 'own-image'}"
    with result_folder(config, checkpoint, name) as folder:
        swept = [(s, perturbed(model, s.image_CHW, s.label, values)) for s in subjects]
        stills = {s.file_name: still_of_one(model, s, images, values) for s, images in swept}
        paths = write_pictures(folder / "pictures", config.perturb.format, stills, swept, values)
        for path in paths:
            print(path)
        result = {
            "command": "perturb",
            **model_facts(trained, checkpoint),
            "dataset": dataset.name if dataset else None,
            "pictures": [path.name for path in paths],
            **provenance(device, "fp32"),
            "config": dataclasses.asdict(config),
        }
        drawn = {name: {f"perturb/{name}": still} for name, still in stills.items()}
        print(f"page: {write_result(folder, result, drawn)}")
    return paths


def class_called(said: str, names: Sequence[str]) -> int:
    """The number of the class that a name, or a number, means. Raises UserError for no class."""
    if said in names:
        return names.index(said)
    if said.isdecimal() and int(said) < len(names):
        return int(said)
    numbers = [str(number) for number in range(len(names))]
    classes = f"0 to {numbers[-1]}" if list(names) == numbers else ", ".join(names)
    hint = did_you_mean(said, names)
    raise UserError(f"perturb.digit is {said}{hint}; the classes are {classes}")


def sweep_values(sweep: SweepConfig) -> list[float]:
    """From `low` to `high` in steps of `step`, both ends included where the step fits."""
    if sweep.low > sweep.high:
        raise UserError(
            f"perturb.low={sweep.low} and perturb.high={sweep.high}: low may not be above high"
        )
    if (sweep.high - sweep.low) / MOST_VALUES > sweep.step:
        raise UserError(
            f"from {sweep.low} to {sweep.high} in steps of {sweep.step} are more than "
            f"{MOST_VALUES} values; choose a larger perturb.step"
        )
    count = math.floor((sweep.high - sweep.low) / sweep.step + 1e-6) + 1
    return [sweep.low + number * sweep.step for number in range(count)]


@torch.inference_mode()
def perturbed(model: CapsNet, image_CHW: Tensor, label: int, values: list[float]) -> Tensor:
    """Reconstruct with each dimension d of the label's capsule moved by each value.

    Returns (D, V, C, H, W).
    """
    capsules_1JD = model.encode(image_CHW[None])
    dimensions = capsules_1JD.shape[2]
    moves_DVD = (
        torch.eye(dimensions, device=capsules_1JD.device)[:, None]
        * torch.tensor(values, device=capsules_1JD.device)[:, None]
    )
    moved = capsules_1JD.repeat(dimensions * len(values), 1, 1)
    moved[:, label] += moves_DVD.flatten(0, 1)
    labels = torch.full((len(moved),), label, device=moved.device)
    return model.decode(moved, labels).unflatten(0, (dimensions, len(values)))


def write_pictures(
    folder: Path, file_format: str, stills: dict[str, Figure], swept: Swept, values: list[float]
) -> list[Path]:
    """Write a picture of each subject, and one of all where they are several; returns the paths."""
    # An animation shows the values up, and down again.
    order = [*range(len(values)), *range(len(values) - 2, 0, -1)]
    frames = {subject.file_name: partial(frame_of_one, subject, drawn) for subject, drawn in swept}
    if len(swept) > 1:
        frames["all_classes"] = partial(frame_of_all, swept)
    paths = []
    for name, frame in bar(frames.items(), "picture", "drawing"):
        paths.append(folder / f"{name}.{file_format}")
        if file_format == "png":
            still = stills[name] if name in stills else still_of_all(swept, values)
            figures.save(still, paths[-1])
        else:
            figures.save_animation([frame(v, values[v]) for v in order], paths[-1])
    return paths


def still_of_one(
    model: CapsNet, subject: Subject, images_DVCHW: Tensor, values: list[float]
) -> Figure:
    """A row for each dimension, and at the bottom the input and its plain reconstruction."""
    plain_CHW = perturbed(model, subject.image_CHW, subject.label, [0.0])[0, 0]
    rows = [(f"dimension {d}", list(displayed(row))) for d, row in enumerate(images_DVCHW)]
    rows.append(("input, output", list(displayed(torch.stack([subject.pixels_CHW, plain_CHW])))))
    return figures.image_grid(rows, [f"{value:+.2f}" for value in values], subject.title)


def still_of_all(swept: Swept, values: list[float]) -> Figure:
    """The rows of `still_of_one` for each subject, beside and below each other."""
    blocks = [
        (subject.title, [list(displayed(row)) for row in images_DVCHW])
        for subject, images_DVCHW in swept
    ]
    dimensions = [f"dimension {d}" for d in range(len(swept[0][1]))]
    # More than these would not be read: every other value, or only the ends.
    shown = [
        f"{value:+.2f}" if number % max(1, (len(values) - 1) // 5) == 0 else ""
        for number, value in enumerate(values)
    ]
    return figures.sheet(blocks, dimensions, shown, "Each dimension of each class capsule, moved")


def frame_of_one(subject: Subject, images_DVCHW: Tensor, number: int, value: float) -> Figure:
    """All dimensions of one subject, each moved by the value of this number."""
    images = list(displayed(images_DVCHW[:, number]))
    rows = [
        (f"dimensions {d} to {min(d + 8, len(images)) - 1}", images[d : d + 8])
        for d in range(0, len(images), 8)
    ]
    return figures.image_grid(rows, title=f"{subject.title}: {value:+.2f}", scale=4)


def frame_of_all(swept: Swept, number: int, value: float) -> Figure:
    """A row for each subject and a column for each dimension, moved by the value of this number."""
    rows = [
        (f"class {subject.class_name}", list(displayed(images_DVCHW[:, number])))
        for subject, images_DVCHW in swept
    ]
    title = f"Each dimension of each class capsule, moved by {value:+.2f}"
    return figures.image_grid(rows, [f"{d}" for d in range(len(swept[0][1]))], title)


def chosen_images(
    index: int | None, digit: int | None, model: CapsNet, dataset: Dataset
) -> list[Subject]:
    """The test image of one class, `digit`, or of each.

    index: which one; None: the first that is classified rightly.
    """
    names, test = dataset.class_names, dataset.test
    # With two digits in an image it is the first one that is perturbed.
    labels_N = test.labels(test.indices(0, LOOK_THROUGH_TEST))[:, 0]
    subjects = []
    for label in range(len(names)) if digit is None else [digit]:
        members = (labels_N == label).nonzero().squeeze(1)
        if index is not None and index >= len(members):
            raise UserError(
                f"perturb.index is {index}, but class {names[label]} has only "
                f"{counted(len(members), 'test image')} (from 0)"
            )
        if not len(members):
            raise UserError(f"{dataset.name} has no test image of class {names[label]}")
        nth = first_right(model, test, members[:LOOK_THROUGH]) if index is None else index
        batch = test.batch(members[nth : nth + 1])
        pixels = batch.targets_BTCHW[0].sum(0).clamp(max=1)
        title = f"{dataset.name}: class {names[label]}, its test image {nth}"
        name = file_name(label, names) + (f"_index_{index}" if index is not None else "")
        seen = batch.images_BCHW[0]
        subjects.append(Subject(seen, pixels, label, names[label], title, name))
    return subjects


def file_name(label: int, names: Sequence[str]) -> str:
    """What the picture of a class is called: `digit_5`, `class_0_cat`."""
    if names[label] == str(label):
        return f"digit_{label}"
    return f"class_{label}_" + re.sub(r"[^\w-]+", "_", names[label])[:100]


@torch.inference_mode()
def first_right(model: CapsNet, test: Split, members: Tensor) -> int:
    """Which of some images is the first that the model classifies rightly; 0 when there is none."""
    batch = in_class_order(test.batch(members))
    predicted_BT = predicted_classes(model(batch.images_BCHW).scores_BJ, test.digits)
    right_B = (predicted_BT == batch.labels_BT).all(1)
    return int(right_B.int().argmax())


@torch.inference_mode()
def own_image(
    sweep: SweepConfig,
    digit: int | None,
    model: CapsNet,
    dataset: DatasetConfig,
    device: torch.device,
) -> Subject:
    """The image `perturb.image`, as a class, or as the one that the model sees in it.

    dataset: what the model was trained on. Says which classes, as many as its images show, are
    seen most.
    """
    assert sweep.image is not None
    if sweep.index is not None:
        raise UserError("perturb.index chooses a test image; leave it out with perturb.image")
    path = Path(sweep.image)
    pixels, remarks = read_image(path, dataset, sweep.invert)
    for remark in remarks:
        print(f"{path}: {remark}")
    pixels = pixels.to(device)
    image = standardise(pixels[None])[0] if dataset.standardise else pixels
    lengths_BJ = model(image[None]).lengths_BJ
    seen = predicted_classes(lengths_BJ, dataset.digits)[0].tolist()
    seen.sort(key=lambda label: -lengths_BJ[0, label])
    names = class_names(dataset)
    found = [f"class {names[label]} (capsule length {lengths_BJ[0, label]:.2f})" for label in seen]
    print(f"{path}: looks most like {' and '.join(found)}")
    label = seen[0] if digit is None else digit
    # Two images of one name, in two folders, have pictures of their own.
    place = hashlib.sha256(str(path.resolve()).encode()).hexdigest()[:6]
    stem = path.stem.encode(errors="replace")[:150].decode(errors="ignore")
    name = f"{stem}-{place}_as_{label}"
    title = f"{path.name}: as {names[label]}"
    return Subject(image, pixels, label, names[label], title, name)
