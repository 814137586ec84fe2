"""Data sets by their name. Their images are uint8 and live on the device.

Nothing here imports PyTorch, until a data set is loaded: what the table says is needed at once.
"""

import importlib
from typing import TYPE_CHECKING, Any

from capsrun.data.sets import DATASETS, class_names, known
from capsrun.data_config import DatasetConfig, OwnDataConfig
from capsrun.errors import UserError, did_you_mean, notice

if TYPE_CHECKING:
    import torch

    from capsrun.data.splits import Dataset


def found(config: DatasetConfig) -> DatasetConfig:
    """The settings with what is to be found out about images of one's own: classes and sizes.

    Raises UserError where that cannot be, or is not what the settings say.
    """
    if not isinstance(config, OwnDataConfig):
        return config
    return _function("own_data.found")(config)


def sizes(config: DatasetConfig) -> tuple[int, int]:
    """How many training images an epoch and how many test images a test has.

    Known without reading anything, so that a plan can be made where the data set is not at hand;
    `dataset.test=all` is not thought of.
    """
    if isinstance(config, OwnDataConfig):
        return config.train_images - config.validation, config.test_images
    entry = known(config.name)
    train, test = entry.images or known(config.source or "mnist").images or (0, 0)
    return train - config.validation, test * entry.copies


def load_dataset(config: DatasetConfig, device: "torch.device") -> "Dataset":
    """Find (or download), verify and split a data set, and move it to the device.

    Raises UserError when it cannot be had, is damaged, or is not what `config` says.
    """
    entry = known(config.name)
    if config.test == "sample" and not entry.sampled:
        names = " and ".join(name for name, other in DATASETS.items() if other.sampled)
        raise UserError(f"dataset.test=sample is for {names}, not {config.name}")
    if config.digits != entry.digits:
        raise UserError(
            f"images of {config.name} have {entry.digits} digit(s) each, but dataset.digits is "
            f"{config.digits}"
        )
    if (count := len(class_names(config))) != config.classes:
        raise UserError(
            f"{config.title} has {count} classes, but dataset.classes is {config.classes}"
        )
    raw = _function(_reader(config))(config)
    for source in raw.sources:
        if not (source.verified or isinstance(config, OwnDataConfig)):
            notice(f"{source.name} cannot be verified: no checksum of it is published")
    return make_dataset(raw, config, device)


def make_dataset(raw: Any, config: DatasetConfig, device: "torch.device") -> "Dataset":
    """What becomes of the images, a `RawData`, that were read."""
    return _function(known(config.name).make)(raw, config, device)


def _function(place: str) -> Any:
    """What `file.function` of this folder is."""
    file, name = place.split(".")
    return getattr(importlib.import_module(f"capsrun.data.{file}"), name)


def _reader(config: DatasetConfig) -> str:
    """What reads the images of a data set: its own files, or those of its source."""
    read = known(config.name).read
    if read is not None:
        if config.source is not None:
            made = ", ".join(name for name, entry in DATASETS.items() if entry.read is None)
            raise UserError(f"dataset.source is for {made}; {config.name} has its own files")
        return read
    sources = {name: entry.read for name, entry in DATASETS.items() if entry.is_source}
    read = sources.get(config.source or "")
    if read is None:
        raise UserError(
            f"dataset.source is {config.source}{did_you_mean(config.source or '', sources)}; "
            f"{config.name} is made of the images of one of: {', '.join(sources)}"
        )
    return read


def is_part_of(config: DatasetConfig, other: DatasetConfig) -> bool:
    """Whether the test images of one data set are, or are made of, training images of the other."""
    ours, theirs = (c.source or c.name for c in (config, other))
    return known(ours).picked_from == theirs
