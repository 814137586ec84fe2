"""The data sets, found by name, as uint8 images that live on the device.

Shapes: N images, C channels, H and W pixels.
"""

from collections.abc import Callable
from dataclasses import dataclass

import torch
from torch import Tensor

from capsrun.config import DatasetConfig
from capsrun.data import mnist, mnist5k
from capsrun.data.batches import SPLIT, random_bits
from capsrun.data.files import RawData, Source
from capsrun.errors import UserError

LOADERS: dict[str, Callable[[DatasetConfig], RawData]] = {
    "mnist": mnist.load,
    "fashion_mnist": mnist.load,
    "kmnist": mnist.load,
    "mnist5k": mnist5k.load,
}

# Data sets that consist of training images of another.
PART_OF = {"mnist5k": "mnist"}


@dataclass(frozen=True)
class Split:
    """Some images and what they show."""

    images_NCHW: Tensor
    """uint8, 0 is black."""
    labels_N: Tensor
    """int64 class numbers."""

    def __len__(self) -> int:
        return len(self.labels_N)


@dataclass(frozen=True)
class Dataset:
    """A data set on a device, with the validation images taken out of the training images."""

    name: str
    class_names: tuple[str, ...]
    train: Split
    validation: Split
    """Empty unless the configuration asks for one."""
    test: Split
    sources: tuple[Source, ...]
    """Where it came from, and what vouches for it."""

    def split(self, name: str) -> Split:
        """The split called `name`. Raises UserError when it is empty."""
        split = {"train": self.train, "validation": self.validation, "test": self.test}[name]
        if not len(split):
            raise UserError(
                f"no training images of {self.name} are held out, so there is no {name} split; "
                "train with dataset.validation=10000, and say so here too"
            )
        return split


def load_dataset(config: DatasetConfig, device: torch.device) -> Dataset:
    """Find (or download), verify and split a data set, and move it to the device.

    Raises UserError when it cannot be had, is damaged, or is not what `config` says.
    """
    if config.name not in LOADERS:
        raise UserError(f"there is no data set {config.name!r}; there are {', '.join(LOADERS)}")
    raw = LOADERS[config.name](config)
    shape = tuple(raw.train_images.shape[1:])
    expected = (config.channels, config.image_px, config.image_px)
    if shape != expected:
        raise UserError(
            f"{config.name} has images of shape {shape}, but dataset.channels and "
            f"dataset.image_px say {expected}"
        )
    if len(raw.class_names) != config.classes:
        raise UserError(
            f"{config.name} has {len(raw.class_names)} classes, but dataset.classes is "
            f"{config.classes}"
        )
    train, validation = _hold_out(raw, config)

    def on_device(images: Tensor, labels: Tensor) -> Split:
        return Split(images.to(device), labels.long().to(device))

    return Dataset(
        config.name,
        raw.class_names,
        on_device(raw.train_images[train], raw.train_labels[train]),
        on_device(raw.train_images[validation], raw.train_labels[validation]),
        on_device(raw.test_images, raw.test_labels),
        raw.sources,
    )


def _hold_out(raw: RawData, config: DatasetConfig) -> tuple[Tensor, Tensor]:
    """Indices of the training and the validation images, each in the order of the file."""
    count = len(raw.train_labels)
    if config.validation >= count:
        raise UserError(
            f"dataset.validation is {config.validation}, but {config.name} has only {count} "
            "training images"
        )
    order = random_bits(torch.arange(count), config.split_seed, SPLIT).argsort()
    kept = count - config.validation
    return order[:kept].sort().values, order[kept:].sort().values
