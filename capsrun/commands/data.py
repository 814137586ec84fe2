"""`capsrun data`: fetch, verify and show a data set."""

import time
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import numpy as np
import torch
from matplotlib.figure import Figure
from tabulate import tabulate

from capsrun import disk
from capsrun.config import DataConfig
from capsrun.data import load_dataset
from capsrun.data.affnist_like import VERSIONS, TransformedDigits, Transforms
from capsrun.data.multimnist import DigitPairs, ink_overlap
from capsrun.data.sets import known
from capsrun.data.splits import Dataset, Split
from capsrun.names import dataset_words, suggest
from capsrun.report import figures
from capsrun.report.pictures import displayed, in_colours
from capsrun.runs.progress import bar
from capsrun.terminal import counted, duration

FILES = STATISTICS, SHEET, TRANSFORMS = "statistics.json", "contact_sheet.png", "transforms.npz"
AT_ONCE = 2000
# Test images among which those of each class are looked for.
LOOKED_THROUGH = 10_000


def main(config: DataConfig, overrides: Sequence[str]) -> None:
    """`capsrun data`: print counts, checksums and statistics, and draw a contact sheet.

    Raises UserError when the data set cannot be had or is damaged.
    """
    dataset = load_dataset(config.dataset, torch.device("cpu"))
    folder = Path(config.out_dir or Path(config.runs_dir) / f"data-{dataset.name}")
    with disk.own_folder(folder, *FILES, command="data"):
        show(config, dataset, folder)
    use = "eval" if known(config.dataset.name).for_testing else "train"
    words = ["checkpoint=small"] if config.dataset.name == "mnist1k" else []
    suggest([use, *dataset_words(config.dataset), *words])


def show(config: DataConfig, dataset: Dataset, folder: Path) -> None:
    """Print what a data set is like, and leave that and a contact sheet in a folder."""
    own = known(config.dataset.name).reader is not None
    why = "your own" if own else "no published checksum for it"
    for source in dataset.sources:
        state = "verified" if source.verified else f"not verified: {why}"
        print(f"{source.name}: MD5 {source.md5} ({state})")
    print_counts(dataset)
    statistics: dict[str, Any] = {"command": "data", "dataset": dataset.name}
    for name, split in (("train", dataset.train), ("test", dataset.test)):
        if len(split):
            statistics[name] = split_statistics(split, config.statistics_images)
            print_statistics(name, statistics[name])
    if isinstance(dataset.test, TransformedDigits):
        statistics["transforms"] = keep_transforms(dataset.test, folder / TRANSFORMS)
    disk.write_json(folder / STATISTICS, statistics)
    figures.save(contact_sheet(dataset, config.dataset.name, config.samples), folder / SHEET)
    print(f"contact sheet: {folder / SHEET}")


def print_counts(dataset: Dataset) -> None:
    """Images (or digits, where an image has two) of each class in each split."""
    named = {"train": dataset.train, "validation": dataset.validation, "test": dataset.test}
    splits = {name: split for name, split in named.items() if len(split)}
    counts = [class_counts(split, len(dataset.class_names)) for split in splits.values()]
    rows = list(zip(dataset.class_names, *counts, strict=True))
    rows.append(("images", *map(len, splits.values())))
    right = ["right"] * len(rows[0])
    print(tabulate(rows, ["class", *splits], tablefmt="plain", intfmt=",", colalign=right))
    shape = dataset.test.batch(torch.tensor([0])).images_BCHW.shape[1:]
    print(f"images of {'×'.join(map(str, shape))}")
    if dataset.test.digits > 1:
        print(
            f"with {dataset.test.digits} digits each; the classes are those of their first digits"
        )


def class_counts(split: Split, classes: int) -> list[int]:
    """How many images have each class as that of their (first) digit."""
    times = len(split) // len(split.labels_N)  # images that are made of each that is stored
    labels = split.labels(torch.arange(len(split) // times))[:, 0]
    return (times * labels.bincount(minlength=classes)).tolist()


def split_statistics(split: Split, most: int) -> dict[str, Any]:
    """What the pixels of the first images of a split are like, and how fast they are made."""
    count = min(most, len(split))
    sums = torch.zeros(3, dtype=torch.float64)
    brightest, frames, boxes = 0.0, [], []
    began = time.perf_counter()
    for start in bar(range(0, count, AT_ONCE), doing="pixels"):
        indices = split.indices(start, min(start + AT_ONCE, count))
        batch = split.batch(indices)
        pixels = batch.targets_BTCHW.sum(1).clamp(max=1)
        sums += torch.stack([pixels.sum(), pixels.square().sum(), (pixels > 0).sum()]).double()
        brightest = max(brightest, pixels.max().item())
        if isinstance(split, DigitPairs):
            frames.append(split.frame_overlap(indices))
            boxes.append(ink_overlap(batch.targets_BTCHW))
    seconds = time.perf_counter() - began
    mean, square, ink = (sums / (count * pixels[0].numel())).tolist()
    found = {
        "images": count,
        "of": len(split),
        "mean": mean,
        "standard_deviation": max(square - mean**2, 0.0) ** 0.5,
        "ink_percent": 100 * ink,
        "brightest": brightest,
        "seconds": seconds,
    }
    if frames:
        found["frame_overlap_percent"] = 100 * torch.cat(frames).mean().item()
        found["ink_box_overlap_percent"] = 100 * torch.cat(boxes).mean().item()
    return found


def print_statistics(name: str, found: dict[str, Any]) -> None:
    """Say what `split_statistics` found."""
    first = "the first " if found["images"] < found["of"] else ""
    print(
        f"{name}: {first}{counted(found['images'], 'image')} in {duration(found['seconds'])}; "
        f"pixels in [0, 1]: mean {found['mean']:.4f}, standard deviation "
        f"{found['standard_deviation']:.4f}, {found['ink_percent']:.1f} % not black, "
        f"brightest {found['brightest']:.3f}"
    )
    if "frame_overlap_percent" in found:
        print(
            f"{name}: the frames (28×28) of the two digits overlap by "
            f"{found['frame_overlap_percent']:.1f} % (§6: 80 %, with shifts of up to 4 px), the "
            f"boxes of their ink by {found['ink_box_overlap_percent']:.1f} % of the smaller one"
        )


def keep_transforms(split: TransformedDigits, path: Path) -> dict[str, dict[str, float]]:
    """Write how each image of a split is made; returns range and mean of each number, printed."""
    pieces = [
        split.transforms(split.indices(start, start + AT_ONCE))
        for start in bar(range(0, len(split), AT_ONCE), doing="transforms")
    ]
    transforms = Transforms(*map(torch.cat, zip(*pieces)))._asdict()
    found = {}
    for field, values in transforms.items():
        low, high, mean = values.min().item(), values.max().item(), values.mean().item()
        name = field.removesuffix("_B")
        found[name] = {"min": low, "max": high, "mean": mean}
        print(f"{name:>17}: {low:7.3f} to {high:6.3f}, mean {mean:6.3f}")
    arrays = {field: values.numpy() for field, values in transforms.items()}
    with disk.replacing(path) as temporary, open(temporary, "wb") as stream:
        np.savez_compressed(stream, **arrays)
    print(f"how each image was made: {path}")
    return found


def contact_sheet(dataset: Dataset, name: str, samples: int) -> Figure:
    """Images of each class, a row a class; two digits in their colours too.

    name: which kind of data set it is.
    """
    split: Split = dataset.train
    kind = "the first training images of each class"
    if known(name).read is None or not len(split):  # as they are made for testing
        split, kind = dataset.test, "the first test images of each class"
    if isinstance(split, TransformedDigits):
        kind = "one digit of each class in many versions"
    rows = []
    first_labels = split.labels(split.indices(0, LOOKED_THROUGH))[:, 0]
    for label, class_name in enumerate(dataset.class_names):
        members = (first_labels == label).nonzero().squeeze(1)[:samples]
        if not len(members):
            continue
        if isinstance(split, TransformedDigits):
            members = members[0] + len(split.labels_N) * torch.arange(min(samples, VERSIONS))
        targets_BTCHW = split.batch(members).targets_BTCHW
        rows.append((class_name, list(displayed(targets_BTCHW.sum(1).clamp(max=1)))))
        if split.digits > 1:
            rows.append(("", list(in_colours(targets_BTCHW))))
    return figures.image_grid(rows, title=f"{dataset.name}: {kind}")
