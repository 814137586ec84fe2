"""`capsrun data`: fetch, verify and show a data set."""

from pathlib import Path

import torch
from matplotlib.figure import Figure

from capsrun.config import DataConfig
from capsrun.data import Dataset, load_dataset
from capsrun.data.batches import to_pixels
from capsrun.runs import figures, record


def show_data(config: DataConfig) -> Path:
    """Print counts and checksums, and write a contact sheet of training images; returns its path.

    Raises UserError when the data set cannot be had or is damaged.
    """
    dataset = load_dataset(config.dataset, torch.device("cpu"))
    out_dir = Path(config.out_dir or Path(config.runs_dir) / f"data-{dataset.name}")
    record.make_folder(out_dir)
    for source in dataset.sources:
        state = "verified" if source.verified else "not verified: no published checksum for it"
        print(f"{source.name}: MD5 {source.md5} ({state})")
    print_counts(dataset)
    sheet = out_dir / "contact_sheet.png"
    figures.save(contact_sheet(dataset, config.samples), sheet)
    print(f"contact sheet: {sheet}")
    return sheet


def print_counts(dataset: Dataset) -> None:
    """Images of each class in each split."""
    splits = {"train": dataset.train, "validation": dataset.validation, "test": dataset.test}
    splits = {name: split for name, split in splits.items() if len(split)}
    width = max(8, *map(len, dataset.class_names))
    print(f"{'class':>{width}} " + " ".join(f"{name:>10}" for name in splits))
    counts = [
        split.labels_N.bincount(minlength=len(dataset.class_names)).tolist()
        for split in splits.values()
    ]
    for name, *row in zip(dataset.class_names, *counts, strict=True):
        print(f"{name:>{width}} " + " ".join(f"{count:>10,}" for count in row))
    print(f"{'all':>{width}} " + " ".join(f"{len(split):>10,}" for split in splits.values()))
    shape = "×".join(str(size) for size in dataset.train.images_NCHW.shape[1:])
    print(f"images of {shape}, uint8")


def contact_sheet(dataset: Dataset, samples: int) -> Figure:
    """The first training images of each class, a row a class."""
    rows = []
    for label, name in enumerate(dataset.class_names):
        members = (dataset.train.labels_N == label).nonzero().squeeze(1)[:samples]
        rows.append((name, list(to_pixels(dataset.train.images_NCHW[members]))))
    return figures.image_grid(
        rows, title=f"{dataset.name}: the first training images of each class"
    )
