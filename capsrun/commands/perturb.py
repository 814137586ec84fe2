"""`capsrun perturb`: move each dimension of a class capsule, draw what comes out (§5.1, figure 4).

Shapes: C channels, H and W pixels, D dimensions of a capsule, V values, J classes.
"""

import dataclasses
import math
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path

import numpy as np
import torch
from matplotlib.figure import Figure
from PIL import Image, ImageOps
from torch import Tensor

from capsrun import disk
from capsrun.config import PerturbConfig, SweepConfig
from capsrun.data import Dataset, Split, load_dataset
from capsrun.data.batches import in_class_order
from capsrun.data.splits import standardise
from capsrun.errors import UserError
from capsrun.models.capsnet import CapsNet
from capsrun.names import folder_words, model_words, suggest
from capsrun.report import figures
from capsrun.report.pictures import displayed
from capsrun.report.run_page import write_run_page
from capsrun.runs.checkpoint import check_dataset, find_model, load_drawing_model, output_folder
from capsrun.runs.folder import output
from capsrun.runs.progress import bar
from capsrun.runs.recorder import show_in_tensorboard
from capsrun.training.device import provenance, resolve_device
from capsrun.training.metrics import predicted_classes
from capsrun.training.step import to_device

MOST_VALUES = 101
# Formats of an image of one's own. Pillow knows more, for some of which it runs other programs.
FORMATS = ("PNG", "JPEG", "GIF", "BMP", "TIFF", "WEBP", "PPM")
MOST_SIDE_PX = 8192
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
    title: str
    file_name: str


def main(config: PerturbConfig, overrides: Sequence[str]) -> None:
    """`capsrun perturb`: draw, and say what else can be done with the model."""
    checkpoint = find_model(config)
    perturb(config, checkpoint)
    suggest(["explore", *model_words(config, checkpoint)], ["report", *folder_words(config)])


def perturb(config: PerturbConfig, checkpoint: Path) -> list[Path]:
    """Draw a picture of each subject, and one of all where they are several; returns their paths.

    Raises UserError when checkpoint, data, image or settings cannot be used.
    """
    values = sweep_values(config.perturb)
    device = resolve_device(config.device)
    trained, model = load_drawing_model(checkpoint)
    to_device(model, device, fast=False).eval()
    if config.perturb.image is not None:
        place = "own-image"
        standardised = trained.config.dataset.standardise
        subjects = [own_image(config.perturb, model, standardised, device)]
    else:
        place = config.dataset.name
        check_dataset(config.dataset, trained.config, "test")
        dataset = load_dataset(config.dataset, device)
        subjects = chosen_images(config.perturb, model, dataset)

    folder = output_folder(checkpoint, config.runs_dir)
    out_dir = Path(config.out_dir or folder / f"perturb-{place}")
    with output(out_dir):
        swept = [perturbed(model, subject.image_CHW, subject.label, values) for subject in subjects]
        paths = write_pictures(out_dir, config.perturb.format, model, subjects, swept, values)
        for path in paths:
            print(path)
        result = {
            "command": "perturb",
            "name": trained.config.name,
            "dataset": None if config.perturb.image else config.dataset.name,
            "model": trained.config.model.name,
            "seed": trained.config.seed,
            "steps": trained.step,
            "pictures": [path.name for path in paths],
            **provenance(device, "fp32"),
            "checkpoint": str(checkpoint),
            "config": dataclasses.asdict(config),
            "trained": dataclasses.asdict(trained.config),
        }
        disk.write_json(out_dir / "result.json", result)
        print(f"page: {write_run_page(out_dir)}")
    return paths


def sweep_values(sweep: SweepConfig) -> list[float]:
    """From `low` to `high` in steps of `step`, both ends included where the step fits."""
    if not (math.isfinite(sweep.low) and math.isfinite(sweep.high) and sweep.low <= sweep.high):
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
    out_dir: Path,
    file_format: str,
    model: CapsNet,
    subjects: list[Subject],
    swept: list[Tensor],
    values: list[float],
) -> list[Path]:
    """Write a picture of each subject, and one of all where they are several; returns the paths.

    swept: for each subject what `perturbed` returned.
    """
    paths = []
    for subject, images_DVCHW in bar(list(zip(subjects, swept)), "picture", "drawing"):
        still = draw(model, subject, images_DVCHW, values)
        path = out_dir / "pictures" / f"{subject.file_name}.{file_format}"
        if file_format == "png":
            figures.save(still, path)
        else:
            figures.save_animation(frames_of_one(subject, images_DVCHW, values), path)
        name = subject.file_name
        show_in_tensorboard(out_dir, name, {f"perturb/{name}": still})
        paths.append(path)
    if len(subjects) > 1:
        paths.append(out_dir / "pictures" / f"all_classes.{file_format}")
        if file_format == "png":
            figures.save(sheet_of_all(subjects, swept, values), paths[-1])
        else:
            figures.save_animation(frames_of_all(subjects, swept, values), paths[-1])
    return paths


@torch.inference_mode()
def draw(model: CapsNet, subject: Subject, images_DVCHW: Tensor, values: list[float]) -> Figure:
    """A row for each dimension, and at the bottom the input and its plain reconstruction."""
    plain_CHW = perturbed(model, subject.image_CHW, subject.label, [0.0])[0, 0]
    rows = [(f"dimension {d}", list(displayed(row))) for d, row in enumerate(images_DVCHW)]
    rows.append(("input, output", list(displayed(torch.stack([subject.pixels_CHW, plain_CHW])))))
    titles = [f"{value:+.2f}" for value in values]
    return figures.image_grid(rows, titles, subject.title)


def sheet_of_all(subjects: list[Subject], swept: list[Tensor], values: list[float]) -> Figure:
    """What `draw` shows of each subject, beside and below each other."""
    blocks = [
        (subject.title, [list(displayed(row)) for row in images_DVCHW])
        for subject, images_DVCHW in zip(subjects, swept)
    ]
    dimensions = [f"dimension {d}" for d in range(len(swept[0]))]
    # More than these would not be read: every other value, or only the ends.
    shown = [
        f"{value:+.2f}" if number % max(1, (len(values) - 1) // 5) == 0 else ""
        for number, value in enumerate(values)
    ]
    return figures.sheet(blocks, dimensions, shown, "Each dimension of each class capsule, moved")


def there_and_back(values: list[float]) -> list[int]:
    """In which order an animation shows the values: up, and down again."""
    return [*range(len(values)), *range(len(values) - 2, 0, -1)]


def frames_of_one(subject: Subject, images_DVCHW: Tensor, values: list[float]) -> list[Figure]:
    """An animation of one subject: all dimensions at once, each in a picture of its own."""
    dimensions = len(images_DVCHW)
    frames = []
    for number in there_and_back(values):
        images = list(displayed(images_DVCHW[:, number]))
        rows = [
            (f"dimensions {d} to {min(d + 8, dimensions) - 1}", images[d : d + 8])
            for d in range(0, dimensions, 8)
        ]
        title = f"{subject.title}: {values[number]:+.2f}"
        frames.append(figures.image_grid(rows, title=title, scale=4))
    return frames


def frames_of_all(
    subjects: list[Subject], swept: list[Tensor], values: list[float]
) -> list[Figure]:
    """An animation of all subjects, a row for each and a column for each dimension."""
    columns = [f"{d}" for d in range(len(swept[0]))]
    frames = []
    for number in there_and_back(values):
        rows = [
            (f"class {subject.label}", list(displayed(images_DVCHW[:, number])))
            for subject, images_DVCHW in zip(subjects, swept)
        ]
        title = f"Each dimension of each class capsule, moved by {values[number]:+.2f}"
        frames.append(figures.image_grid(rows, columns, title))
    return frames


def chosen_images(sweep: SweepConfig, model: CapsNet, dataset: Dataset) -> list[Subject]:
    """The asked-for test image of one class or of each."""
    names, test = dataset.class_names, dataset.test
    # With two digits in an image it is the first one that is perturbed.
    labels_N = test.labels(test.indices(0, LOOK_THROUGH_TEST))[:, 0]
    if sweep.digit is not None and sweep.digit >= len(names):
        raise UserError(f"perturb.digit is {sweep.digit}; the classes are 0 to {len(names) - 1}")
    subjects = []
    for label in range(len(names)) if sweep.digit is None else [sweep.digit]:
        members = (labels_N == label).nonzero().squeeze(1)
        if sweep.index is not None and sweep.index >= len(members):
            raise UserError(
                f"perturb.index is {sweep.index}, but class {names[label]} has only "
                f"{len(members)} test images (from 0)"
            )
        if not len(members):
            raise UserError(f"{dataset.name} has no test image of class {names[label]}")
        index = sweep.index
        if index is None:
            index = _first_right(model, test, members[:LOOK_THROUGH])
        batch = test.batch(members[index : index + 1])
        pixels = batch.targets_BTCHW[0].sum(0).clamp(max=1)
        title = f"{dataset.name}: class {names[label]}, its test image {index}"
        name = f"digit_{label}" + (f"_index_{index}" if sweep.index is not None else "")
        subjects.append(Subject(batch.images_BCHW[0], pixels, label, title, name))
    return subjects


@torch.inference_mode()
def _first_right(model: CapsNet, test: Split, members: Tensor) -> int:
    """Which of some images is the first that the model classifies rightly; 0 when there is none."""
    batch = in_class_order(test.batch(members))
    predicted_BT = predicted_classes(model(batch.images_BCHW).scores_BJ, test.digits)
    right_B = (predicted_BT == batch.labels_BT).all(1)
    return int(right_B.int().argmax())


@torch.inference_mode()
def own_image(
    sweep: SweepConfig, model: CapsNet, standardised: bool, device: torch.device
) -> Subject:
    """The image `perturb.image`, as `perturb.digit` or as the class that the model sees in it."""
    assert sweep.image is not None
    if sweep.index is not None:
        raise UserError("perturb.index chooses a test image; leave it out with perturb.image")
    if sweep.digit is not None and sweep.digit >= model.classes:
        raise UserError(f"perturb.digit is {sweep.digit}; the classes are 0 to {model.classes - 1}")
    path = Path(sweep.image).expanduser()
    if model.channels not in (1, 3):
        raise UserError(
            "perturb.image is for models of grey or colour images, not of images of "
            f"{model.channels} channels"
        )
    pixels, remarks = read_image(path, model.image_px, model.channels, sweep.invert)
    for remark in remarks:
        print(f"{path}: {remark}")
    pixels = pixels.to(device)
    image = standardise(pixels[None])[0] if standardised else pixels
    lengths = model(image[None]).lengths_BJ[0]
    longest = int(lengths.argmax())
    print(f"{path}: looks like a {longest} (capsule length {lengths[longest]:.2f})")
    label = longest if sweep.digit is None else sweep.digit
    return Subject(image, pixels, label, f"{path.name}: as {label}", f"{path.stem}_as_{label}")


def read_image(path: Path, image_px: int, channels: int, invert: str) -> tuple[Tensor, list[str]]:
    """Read an image file as pixels (C, H, W) in [0, 1], light ink on black as in the data sets.

    Another size is padded to a square with its background and resized; dark ink on light paper is
    inverted (`invert`: auto, yes or no). Returns what was done to it, too. Raises UserError for a
    file that is missing or no image.
    """
    remarks = []
    if path.exists() and not path.is_file():
        raise UserError(f"{path} is no image file")
    try:
        with Image.open(path, formats=FORMATS) as opened:
            if max(opened.size) > MOST_SIDE_PX:
                raise ValueError(
                    f"{opened.width:,}×{opened.height:,} pixels are more than {MOST_SIDE_PX:,} on "
                    "a side; make it smaller"
                )
            image: Image.Image = ImageOps.exif_transpose(opened)
            if image.mode.startswith("I;16"):
                image = Image.fromarray((np.asarray(image) // 257).astype(np.uint8))
            if image.mode in ("I", "F"):
                raise ValueError("pixels of 32 bits have no known range")
            if "A" in image.getbands() or "transparency" in image.info:
                paper = Image.new("RGBA", image.size, "white")
                image = Image.alpha_composite(paper, image.convert("RGBA"))
                remarks.append("transparent parts taken as white paper")
            image = image.convert("L" if channels == 1 else "RGB")
    except FileNotFoundError:
        raise UserError(f"there is no image {path}") from None
    except Exception as error:  # Pillow fails in many ways on a damaged file
        raise UserError(f"{path} cannot be read as an image (PNG, JPEG, …): {error}") from error

    pixels = np.asarray(image, dtype=np.float32).reshape(image.height, image.width, channels)
    border = np.concatenate([pixels[0], pixels[-1], pixels[:, 0], pixels[:, -1]])
    if invert == "yes" or (invert == "auto" and border.mean() > 127.5):
        pixels, border = 255 - pixels, 255 - border
        remarks.append(
            "inverted, for the model knows light ink on black (perturb.invert=no keeps it)"
        )
    if pixels.shape[:2] != (image_px, image_px):
        remarks.append(f"resized from {image.width}×{image.height} to {image_px}×{image_px} pixels")
    pixels_CHW = torch.from_numpy(pixels).permute(2, 0, 1)
    return _to_square(pixels_CHW, image_px, float(np.median(border))).clamp(0, 255) / 255, remarks


def _to_square(pixels_CHW: Tensor, image_px: int, background: float) -> Tensor:
    """Pad with the background to a square, and resize it with antialiasing."""
    height, width = pixels_CHW.shape[1:]
    side = max(height, width)
    top, left = (side - height) // 2, (side - width) // 2
    square = torch.full((len(pixels_CHW), side, side), background)
    square[:, top : top + height, left : left + width] = pixels_CHW
    if side == image_px:
        return square
    resized = torch.nn.functional.interpolate(
        square[None], size=(image_px, image_px), mode="bilinear", antialias=True
    )
    return resized[0]
