"""For use from Python: the values of `configs/`, and the data sets by name.

The code has no values of its own, so whoever makes a network asks for those that `capsrun train`
would take, changes what is to be another, and hands them over.
"""

import dataclasses
import os
from collections.abc import Sequence
from pathlib import Path
from typing import TYPE_CHECKING

import torch

from capsrun import data as data_sets
from capsrun import disk, experiments
from capsrun.compose import compose
from capsrun.config import DataConfig, TrainConfig
from capsrun.data_config import DatasetConfig
from capsrun.errors import UserError
from capsrun.models import CapsNet, Model, plan_model
from capsrun.names import as_chosen
from capsrun.runs import checkpoint
from capsrun.settings import from_dict
from capsrun.training.device import checked_device

if TYPE_CHECKING:
    from capsrun.data.splits import Dataset


def training_config(*overrides: str) -> TrainConfig:
    """The settings of `capsrun train` with these overrides: `config.model`, `config.loss`, ….

    Raises UserError for what the command would refuse, too.

    >>> import capsrun
    >>> config = capsrun.training_config("dataset=mnist5k", "routing.iterations=1")
    >>> config.routing
    DynamicRoutingConfig(iterations=1, leaky=False, detach=False)
    >>> config.model.primary_types, config.model.decoder_widths
    (32, [512, 1024])
    >>> capsrun.training_config("iterations=1")
    Traceback (most recent call last):
        ...
    capsrun.errors.UserError: there is no setting 'iterations', did you mean ...
    """
    refuse_lists(overrides)
    config = experiments.training_config(overrides)
    config.dataset = as_chosen(config.dataset, overrides)
    return config


def refuse_lists(overrides: Sequence[str]) -> None:
    """Raise UserError for overrides that are no strings."""
    if not all(isinstance(word, str) for word in overrides):
        raise UserError("overrides are strings, each by itself: f(*overrides) for a list of them")


def load_dataset(
    dataset: str | DatasetConfig, *overrides: str, device: str | torch.device = "cpu"
) -> "Dataset":
    """Find (or download), verify and split a data set, and move it to the device.

    dataset: a name of `configs/dataset/`, with `overrides` such as `"dataset.validation=500"`; or
    the `dataset` of a configuration. Files are looked for where the commands look: in `data/`, or
    in the folder that the environment variable CAPSRUN_DATA names.

    The splits `train`, `validation` and `test` give batches by index: images with pixels in [0, 1]
    and shape (B, C, H, W), and the labels (B, T) of the T digits in each.
    Raises UserError when there is no such data set or device, it cannot be had, or is damaged.

    >>> import capsrun
    >>> digits = capsrun.load_dataset("mnist5k")
    >>> len(digits.train), len(digits.test)
    (4000, 1000)
    >>> batch = digits.test.batch(digits.test.indices(0, 3))
    >>> batch.images_BCHW.shape
    torch.Size([3, 1, 28, 28])
    >>> batch.labels_BT.shape
    torch.Size([3, 1])
    """
    if not isinstance(dataset, str | DatasetConfig):
        raise UserError("give the name of a data set, or the `dataset` of a configuration")
    refuse_lists(overrides)
    if isinstance(dataset, str):
        composed = compose("data", [f"dataset={dataset}", *overrides])
        dataset = from_dict(DataConfig, composed).dataset
    elif overrides:
        raise UserError("overrides go with the name of a data set; a configuration has its values")
    return data_sets.load_dataset(data_sets.found(dataset), checked_device(device))


def save_checkpoint(
    model: "Model", path: str | os.PathLike[str], config: TrainConfig | None = None
) -> None:
    """Write a network, trained or filled here, as a checkpoint that `capsrun eval` and others take.

    config: that it was made with. None: it is made of what the network knows itself (its layers,
    its routing, the size of its images), and else as `training_config()` says: on MNIST. Say it
    where it was trained on others, so that it is not tested on those. An earlier file of this name
    is replaced.
    Raises UserError when it is another network's, or a weight is not finite.

    >>> import capsrun, tempfile
    >>> model = capsrun.CapsNet(capsrun.training_config("model=capsnet_small").model)
    >>> path = tempfile.mkdtemp() + "/mine.pt"
    >>> capsrun.save_checkpoint(model, path)
    >>> capsrun.load_checkpoint(path)
    Trained(capsnet_small, trained on mnist: 0 steps, finished)
    """
    if not isinstance(model, Model):
        raise UserError(f"a CapsNet or a CNN is saved, the module itself, not a {type(model)}")
    if not isinstance(path, str | os.PathLike):
        raise UserError(f"path is to be that of a file, not a {type(path)}")
    if config is not None and not isinstance(config, TrainConfig):
        raise UserError("config is to be what `training_config` gives")
    config = _config_of(model) if config is None else config
    facts = dataclasses.asdict(config)
    from_dict(TrainConfig, facts)  # it may have been changed since
    weights, file = model.state_dict(), Path(os.path.expanduser(path))
    plan = plan_model(config.model, config.routing, config.dataset)
    checkpoint.check_weights(plan, weights, "this model")
    for key in ("config", "routing", "standardised"):  # which no weight shows
        ours, theirs = getattr(model, key, None), getattr(plan, key, None)
        if ours != theirs:
            raise UserError(f"the network was made with {key} {ours}, and not with {theirs}")
    if type(model) is not type(plan) or repr(model) != repr(plan):
        raise UserError(
            "a layer of the network is not as its settings say, or its class is one of your own, "
            "which a checkpoint cannot tell; keep its `state_dict()` with torch.save"
        )
    rest = {"optimizer": None, "train_seconds": 0.0}
    disk.make_folder(file.parent)
    checkpoint.write_checkpoint(file, facts, 0, model=weights, **rest)


def _config_of(model: "Model") -> TrainConfig:
    """What a network knows of the settings that it was made with, and the usual ones."""
    routing = model.routing if isinstance(model, CapsNet) else None
    usual = training_config(*(["model=cnn_baseline"] if routing is None else []))  # and its loss
    if (model.channels, model.classes) != (usual.dataset.channels, usual.dataset.classes):
        raise UserError(
            f"a network for images of {model.channels} channel(s) and {model.classes} classes is "
            "not for MNIST: say what it is for, config=training_config('dataset=…')"
        )
    dataset = dataclasses.replace(
        usual.dataset,
        image_px=model.image_px,
        channels=model.channels,
        classes=model.classes,
        standardise=model.standardised,
    )
    return dataclasses.replace(usual, model=model.config, routing=routing, dataset=dataset)
