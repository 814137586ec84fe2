"""The data sets, found by name. Their images are uint8 and live on the device."""

from collections.abc import Callable

import torch

from capsrun.config import DatasetConfig
from capsrun.data import (
    affnist,
    affnist_like,
    cifar10,
    mnist,
    mnist5k,
    mnist_padded,
    multimnist,
    smallnorb,
    svhn,
)
from capsrun.data.files import RawData
from capsrun.data.splits import Dataset, Split, stored_dataset
from capsrun.errors import UserError

__all__ = ["Dataset", "Split", "is_part_of", "load_dataset"]

# Images on disk, and how they are read.
STORED: dict[str, Callable[[DatasetConfig], RawData]] = {
    "mnist": mnist.load,
    "fashion_mnist": mnist.load,
    "kmnist": mnist.load,
    "mnist5k": mnist5k.load,
    "cifar10": cifar10.load,
    "svhn": svhn.load,
    "smallnorb": smallnorb.load,
}
# Data sets that are made of the images of one of these four, and how.
SOURCES = ("mnist", "mnist5k", "fashion_mnist", "kmnist")
MADE: dict[str, Callable[[RawData, DatasetConfig, torch.device], Dataset]] = {
    "mnist_padded": mnist_padded.make,
    "affnist_like": affnist_like.make,
    "multimnist": multimnist.make,
}
# Data sets of which dataset.test chooses some of the test images or all of them.
SAMPLED = ("mnist_padded", "multimnist")
# Data sets whose test images are picked by split_seed.
TESTS_BY_SEED = ("mnist5k",)
# Data sets of which there are test images only.
FOR_TESTING = ("affnist", "affnist_like")
# Data sets that consist of training images of another.
PART_OF = {"mnist5k": "mnist"}


def load_dataset(config: DatasetConfig, device: torch.device) -> Dataset:
    """Find (or download), verify and split a data set, and move it to the device.

    Raises UserError when it cannot be had, is damaged, or is not what `config` says.
    """
    if config.test == "sample" and config.name not in SAMPLED:
        raise UserError(f"dataset.test=sample is for {' and '.join(SAMPLED)}, not {config.name}")
    digits = 2 if config.name == "multimnist" else 1
    if config.digits != digits:
        raise UserError(
            f"images of {config.name} have {digits} digit(s) each, but dataset.digits is "
            f"{config.digits}"
        )
    if config.name == "affnist":
        return affnist.load(config, device)
    if config.name in MADE:
        if config.source not in SOURCES:
            raise UserError(
                f"dataset.source is {config.source}; {config.name} is made of the images of one "
                f"of: {', '.join(SOURCES)}"
            )
        return MADE[config.name](STORED[config.source](config), config, device)
    if config.name not in STORED:
        names = ", ".join([*STORED, *MADE, "affnist"])
        raise UserError(f"there is no data set {config.name!r}; there are {names}")
    if config.source is not None:
        raise UserError(f"dataset.source is for {', '.join(MADE)}; {config.name} has its own files")
    return stored_dataset(STORED[config.name](config), config, device)


def is_part_of(config: DatasetConfig, other: DatasetConfig) -> bool:
    """Whether the test images of one data set are, or are made of, training images of the other."""
    ours, theirs = (c.source or c.name for c in (config, other))
    return PART_OF.get(ours) == theirs
