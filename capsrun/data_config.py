"""The settings of data sets. Values: `configs/dataset/`."""

import os
import re
from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

from capsrun.fields import setting


@dataclass(kw_only=True)
class DatasetConfig:
    """Which images, and how training changes them. Values: `configs/dataset/`."""

    name: str
    data_dir: str = setting(path=True)
    """Folder that holds (or will hold) the data sets."""
    image_px: int = setting(minimum=1)
    channels: int = setting(minimum=1)
    classes: int = setting(minimum=2)
    shift_px: int = setting(minimum=0)
    """Training images are moved by up to this many pixels along each axis."""
    validation: int = setting(minimum=0)
    """How many training images are held out for choosing between models; 0 trains on all."""
    split_seed: int = setting(minimum=0, maximum=2**63 - 1)
    """Decides which images are held out, and how images that are made of others are made."""
    trained_on: str
    """The data set on which the model to evaluate on this one was trained."""
    trained_by: str
    """Model and recipe of that run, as in its name: `capsnet-quick`."""
    digits: int = setting(minimum=1, maximum=2)
    """How many digits one image shows."""
    source: str | None
    """The data set of whose images these are made; None: they are on disk as they are."""
    test: str = setting(choices=("sample", "all"))
    """Which of the possible test images are used; see the data set's file."""
    flip: bool
    """Whether training images are mirrored, left to right, half of the time."""
    brightness: float = setting(minimum=0, maximum=1)
    """Training images become lighter or darker by up to this share of the range of pixels."""
    contrast: float = setting(minimum=0, maximum=1)
    """The contrast of training images is multiplied by 1 − this to 1 + this."""
    augment: str | None = setting(choices=("efficient_capsnet",), default=None)
    """Whose way training images are changed in, in place of `shift_px`; see `data/augment.py`."""
    standardise: bool
    """Whether the network sees each image with mean 0 and standard deviation 1."""

    @property
    def title(self) -> str:
        """What it is called in names and pictures."""
        return title_of(vars(self))


@dataclass(kw_only=True)
class OwnDataConfig(DatasetConfig):
    """Images of one's own. Values: `configs/dataset/folder.yaml`, `idx.yaml`, `table.yaml`."""

    path: str = setting(path=True)
    """A folder or a file; see `data/own_data.py`."""
    image_px: int = setting(minimum=0)
    """0: as large as the images are; see `own_data.found`, and so the next ones."""
    channels: int = setting(minimum=0)
    classes: int = setting(minimum=0)
    class_names: list[str]
    """In the order of their numbers; empty: as the folders or labels are called."""
    train_images: int = setting(minimum=0)
    """How many there are, those that cannot be used among them; 0: found out, as the next one."""
    test_images: int = setting(minimum=0)
    test_percent: float = setting(minimum=0, below=100)
    """How much of each class is tested on, where there are no test images, else 0."""
    transposed: bool
    """Whether rows and columns of the stored images are exchanged, as EMNIST's are."""
    drawn: bool
    """Whether an image file of one's own is made as MNIST was; see `own_image.read_image`."""
    faulty: str = setting(choices=("refuse", "skip"))
    """What is done about images that cannot be used, and test images that are trained on."""


def dataset_schema(values: Mapping[str, Any]) -> type[DatasetConfig]:
    """The kind of data set that some settings are about."""
    return OwnDataConfig if "path" in values else DatasetConfig


def title_of(dataset: Mapping[str, Any]) -> str:
    """What a data set is called in names and pictures: of one's own, as its folder or file is."""
    if "path" not in dataset:
        return dataset["name"]
    stem = os.path.basename(os.path.abspath(dataset["path"])).partition(".")[0]
    return re.sub(r"[^\w-]+", "_", stem) or dataset["name"]
