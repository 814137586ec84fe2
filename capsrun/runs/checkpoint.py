"""Checkpoints: tensors and plain types, written whole or not at all, read without running code."""

import errno
import hashlib
import io
import os
import re
import shlex
import warnings
import zipfile
from collections.abc import Mapping
from pathlib import Path
from typing import Any, NamedTuple

import torch

from capsrun.config import CheckpointConfig, TrainConfig
from capsrun.data import is_part_of
from capsrun.data.sets import class_names
from capsrun.data_config import DatasetConfig, OwnDataConfig
from capsrun.disk import replacing
from capsrun.errors import UserError, did_you_mean, notice
from capsrun.models import MOST_PARAMETERS, Model, build_model, plan_model
from capsrun.models.capsnet import CapsNet
from capsrun.names import (
    SMALL,
    WEIGHTS,
    dataset_words,
    default_run,
    must_match,
    packaged,
    train_command,
)
from capsrun.runs.foreign import kind_of_content, kind_of_file
from capsrun.runs.shapes import check_shape
from capsrun.settings import from_dict
from capsrun.training.device import checked_device

FORMAT = "capsrun checkpoint 1"
FILE_NAME = "checkpoint.pt"
# The weights of the largest network that is made, their average and Adam's moments.
MOST_BYTES = 16 * MOST_PARAMETERS
# What a checkpoint holds at least; see `check_shape`.
SHAPE: dict[str, Any] = {"config": dict, "step": (int, 0), "model": dict, "optimizer?": dict}
SHAPE |= {"train_seconds": (int | float, 0), "data?": [str]}
SHAPE["seen?"] = [{"dataset": dict, "data": [str]}]


# What decides which of the images of a data set are tested on.
OF_THE_SAME = "split_seed", "validation", "test_percent", "transposed"


class Trained(NamedTuple):
    """A model from a checkpoint, and the run that made it."""

    model: Model
    config: TrainConfig
    """The settings of the run: `config.routing.iterations`, `config.dataset.name`, …."""
    step: int
    """How many updates the run had made."""
    train_seconds: float
    finished: bool
    """Whether these were all that the run was to make."""
    seen: tuple[dict[str, Any], ...] = ()
    """What its weights were trained on, the last first: of each the settings of the `dataset`, and
    as `data` the MD5 of each file that nobody vouches for."""

    def __repr__(self) -> str:
        of = f"{self.config.model.name}, trained on {self.config.dataset.title}"
        return f"Trained({of}: {self.step:,} steps, {'' if self.finished else 'not '}finished)"


def write_checkpoint(path: Path, config: dict[str, Any], step: int, **state: Any) -> None:
    """Write a checkpoint after `step` updates.

    config: the `TrainConfig` as a dict. state: at least `model`, a state dict; `optimizer`, None in
    a finished run; `train_seconds`; `averaged`, a state dict where the weights are averaged.
    """
    # To memory first: where the disk is full, PyTorch's own writer ends the program.
    content = io.BytesIO()
    torch.save({"format": FORMAT, "config": config, "step": step, **state}, content)
    with replacing(path) as temporary:
        temporary.write_bytes(content.getbuffer())


def read_checkpoint(path: Path, shape: Mapping[str, Any] = {}) -> dict[str, Any]:
    """Read what `write_checkpoint` wrote, onto the CPU.

    shape: of what it has to hold beside `SHAPE`.
    Raises UserError for a file that is missing, damaged or not a capsrun checkpoint. A file that
    holds anything but tensors and plain types is refused before any of it is run.
    """
    try:
        if path.stat().st_size > MOST_BYTES or not path.is_file():  # a pipe is waited for
            raise ValueError("too large, or no file")
        if zipfile.is_zipfile(path):
            with zipfile.ZipFile(path) as archive:
                if archive.testzip() is not None:  # which PyTorch does not look at
                    raise ValueError("a checksum does not fit")
        with warnings.catch_warnings(action="ignore"):  # of PyTorch, about other files
            checkpoint = torch.load(path, map_location="cpu", weights_only=True)
    except Exception as error:  # torch.load fails in many ways on a damaged or hostile file
        if isinstance(error, OSError) and error.errno != errno.EINVAL:  # which a short file gives
            why = error.strerror or error
            raise UserError(f"checkpoint {path} cannot be read: {why}") from error
        kind = kind_of_file(path)
        text = f"{path} is no checkpoint of capsrun but {kind}; nothing in it was run"
        if kind is None:
            text = f"{path} is damaged or cut short, or no checkpoint; nothing in it was run"
        raise UserError(text) from error
    if not isinstance(checkpoint, dict) or "format" not in checkpoint:
        raise UserError(f"{path} is no checkpoint of capsrun but {kind_of_content(checkpoint)}")
    if checkpoint["format"] != FORMAT:
        raise UserError(f"{path} is not a checkpoint of capsrun, or of another version of it")
    try:
        check_shape(checkpoint, {**SHAPE, **shape})
        if "optimizer" not in checkpoint:  # None is that of a finished run
            raise ValueError("no sound 'optimizer'")
    except ValueError as error:
        raise UserError(f"checkpoint {path} is incomplete or damaged: it has {error}") from error
    return checkpoint


def find_model(config: CheckpointConfig, split: str = "test") -> Path:
    """The checkpoint that a command is told of, or that of the run which train makes for its data.

    Raises UserError, with the command that makes it, when there is none.
    """
    if config.checkpoint is not None:
        return find_checkpoint(config.checkpoint)
    usual = Path(config.runs_dir) / default_run(config.dataset, split, config.seed)
    command = train_command(config.dataset, split, config.seed, config.runs_dir)
    return find_checkpoint(str(usual / FILE_NAME), command)


def find_checkpoint(path: str, train_command: str | None = None) -> Path:
    """The checkpoint file that `path` (a file or a run's folder) means.

    train_command: what makes it, where that is known, for the message of the UserError when there
    is none.
    """
    found = checkpoint_file(path)
    if not found.is_file():
        instead = "`capsrun list` shows the runs that there are"
        if train_command is not None:
            instead = f"make it with `{train_command}`, or say checkpoint=…"
        raise UserError(f"there is no checkpoint {found}{near_run(Path(path))}; {instead}")
    return found


def checkpoint_file(path: str | os.PathLike[str]) -> Path:
    """The file that is meant by a file or a run's folder, whether or not it is there.

    Raises UserError for what is on another machine.
    """
    if re.match(r"\w+://", os.fspath(path)):
        raise UserError(f"{path} is to be downloaded first: a checkpoint is a file or a folder")
    meant = Path(os.path.expanduser(path))
    if os.fspath(path) == SMALL and not meant.exists():
        return packaged()
    if not meant.exists() and Path(f"{meant}.index").is_file():  # as TensorFlow's are named
        return Path(f"{meant}.index")
    return meant / FILE_NAME if meant.is_dir() else meant


def near_run(path: Path) -> str:
    """A hint at the run whose folder is most like a path at which there is none; maybe nothing."""
    there = next((parent for parent in path.parents if parent.is_dir()), None)
    if there in (None, Path(), Path("/")):  # who mistyped the first folder: not all is searched
        there = Path("runs")
    found = (file for depth in ("*", "*/*", "*/*/*") for file in there.glob(f"{depth}/{FILE_NAME}"))
    return did_you_mean(str(path), [str(file.parent) for file in found])


def output_folder(checkpoint: Path, runs_dir: str) -> Path:
    """Where what is made of a model goes: its run's folder; of a lone file, one named after it.

    Files of one name, in two folders, have folders of their own.
    """
    if checkpoint.name == FILE_NAME:
        return checkpoint.parent
    if checkpoint.parent == WEIGHTS:
        return Path(runs_dir) / checkpoint.stem
    place = hashlib.sha256(os.fsencode(checkpoint.resolve())).hexdigest()[:6]
    return Path(runs_dir) / f"{checkpoint.stem}-{place}"


def load_checkpoint(
    path: str | os.PathLike[str], device: str | torch.device = "cpu", averaged: bool = False
) -> Trained:
    """Rebuild the trained model of a checkpoint, ready to be used, with the settings of its run.

    path: a checkpoint file, or the folder of a run. device: as PyTorch names it.
    averaged: with the moving average of the weights, in place of the last ones.
    Nothing in the file is run. Raises UserError when checkpoint or device cannot be used.

    >>> import capsrun
    >>> trained = capsrun.load_checkpoint("results/capsnet-mnist.pt")
    >>> trained.step, trained.config.dataset.name, trained.config.routing.iterations
    (4688, 'mnist', 3)
    >>> digits = capsrun.load_dataset("mnist5k")
    >>> batch = digits.test.batch(digits.test.indices(0, 5))
    >>> trained.model(batch.images_BCHW).lengths_BJ.argmax(1).equal(batch.labels_BT[:, 0])
    True
    """
    file, place = checkpoint_file(path), checked_device(device)
    checkpoint = read_checkpoint(file)
    weights = checkpoint.get("averaged") if averaged else checkpoint["model"]
    if weights is None:
        raise UserError(f"checkpoint {file} holds no averaged weights; train with recipe.average=…")
    try:
        config = from_dict(TrainConfig, checkpoint["config"])
        # A configuration can ask for more memory than there is, so its sizes are looked at first.
        plan = plan_model(config.model, config.routing, config.dataset)
        check_weights(plan, weights, "it")
        model = build_model(config.model, config.routing, config.dataset)
    except UserError as error:
        raise UserError(f"checkpoint {file} cannot be used: {error}") from error
    model.load_state_dict(weights)
    model.to(place).eval()
    finished = checkpoint["optimizer"] is None
    made = checkpoint["step"], checkpoint["train_seconds"], finished
    last = {"dataset": vars(config.dataset), "data": checkpoint.get("data") or []}
    return Trained(model, config, *made, (last, *(checkpoint.get("seen") or ())))


def load_weights(model: Model, weights: Any, path: Path) -> None:
    """Put the weights into the model. Raises UserError, naming what differs, if they do not fit."""
    check_weights(model, weights, f"checkpoint {path}")
    model.load_state_dict(weights)


def check_weights(model: Model, weights: Any, whose: str) -> None:
    """Raise UserError, naming what differs, for weights that are not those of this network.

    And for those that are not finite, of which every answer would be nonsense. whose: they are, for
    the message.
    """
    ours = model.state_dict()
    if not isinstance(weights, dict) or weights.keys() != ours.keys():
        raise UserError(f"{whose} holds the weights of another network")
    for name, tensor in weights.items():
        if not isinstance(tensor, torch.Tensor) or tensor.shape != ours[name].shape:
            raise UserError(
                f"{whose} holds the weights of another network: {name} has shape "
                f"{tuple(getattr(tensor, 'shape', ()))}, not {tuple(ours[name].shape)}"
            )
        is_other = tensor.is_floating_point() != ours[name].is_floating_point()
        if is_other or tensor.layout != torch.strided or tensor.is_meta:
            kind = "without values" if tensor.is_meta else f"of {tensor.layout}, {tensor.dtype}"
            raise UserError(f"{whose} is damaged: {name} is {kind}, and no weights")
        if not bool(tensor.isfinite().all()):
            raise UserError(
                f"{whose} holds numbers that are not finite, in {name}: its training has failed, "
                "and nothing can be said of this network"
            )


def check_dataset(dataset: DatasetConfig, trained: TrainConfig, split: str) -> None:
    """Refuse images that the model cannot take, and test images that it was trained on.

    Says so where the model was trained on another data set than is usual for this one.
    """
    ours, theirs = (
        (d.channels, d.image_px, d.image_px, d.classes) for d in (dataset, trained.dataset)
    )
    if ours != theirs:
        text = "the checkpoint is of a model for images of {}×{}×{} and {} classes (trained on {})"
        text += ", but dataset={} has {}×{}×{} and {}; {}"
        raise UserError(
            text.format(
                *theirs, trained.dataset.name, dataset.name, *ours, instead(dataset, trained, split)
            )
        )
    if dataset.digits != trained.dataset.digits:
        counts = {1: "one digit", 2: "two digits"}
        raise UserError(
            f"the model was trained on images of {counts[trained.dataset.digits]} "
            f"({trained.dataset.name}), but those of dataset={dataset.name} have "
            f"{counts[dataset.digits]}; {instead(dataset, trained, split)}"
        )
    refuse_other_classes(dataset, trained, split)
    ours_from, theirs_from = (origin(d) for d in (dataset, trained.dataset))
    if split == "test" and is_part_of(dataset, trained.dataset):
        raise UserError(
            f"the images of {ours_from} are training images of {theirs_from}, on which the model "
            f"was trained; test it with dataset={trained.dataset.name}"
        )
    pair = (dataset, trained.dataset), (trained.dataset, dataset)
    if split == "validation" and any(is_part_of(*both) for both in pair):
        raise UserError(
            f"those images of {ours_from} were held out of another data set than {theirs_from}, on "
            f"which the model was trained, and may be among its training images; test it on "
            f"dataset={trained.dataset.name}"
        )
    for key in must_match(dataset, split):
        value, unseen = getattr(trained.dataset, key, None), key in OF_THE_SAME
        if getattr(dataset, key) != value and (ours_from == theirs_from or not unseen):
            raise UserError(
                f"the model was trained with dataset.{key}={value}: say the same here"
                + (", or images that it was trained on are counted as unseen" if unseen else "")
            )
    usual = dataset.trained_on in (trained.dataset.name, trained.dataset.trained_on)
    wanted = dataset.trained_on
    if isinstance(dataset, OwnDataConfig):  # any files of the same classes are as good
        usual, wanted = ours_from == theirs_from, dataset.path
    if not usual:
        notice(f"this model was trained on {trained.dataset.title}, not on {wanted}")


def refuse_other_classes(dataset: DatasetConfig, trained: TrainConfig, split: str) -> None:
    """Raise UserError for images of one's own of other classes than a model was trained on."""
    ours, theirs = class_names(dataset), class_names(trained.dataset)
    if isinstance(dataset, OwnDataConfig) and ours != theirs:
        raise UserError(
            f"the classes of {dataset.path} are {', '.join(ours)}, but the model was trained on "
            f"{', '.join(theirs)}; {instead(dataset, trained, split)}"
        )


def instead(dataset: DatasetConfig, trained: TrainConfig, split: str) -> str:
    """What can be done where a model is not for the images of a data set."""
    others = shlex.join(dataset_words(trained.dataset) or ["dataset=mnist"])
    command = train_command(dataset, split)
    return f"train one for such images (`{command}`), or test this one on {others}"


def origin(dataset: DatasetConfig) -> str:
    """The data set, or the files, that images are from or are made of."""
    if isinstance(dataset, OwnDataConfig):
        return os.path.realpath(dataset.path)
    return dataset.source or dataset.name


def load_drawing_model(path: Path) -> tuple[Trained, CapsNet]:
    """A trained CapsNet with a decoder, to look at what its capsules make it draw.

    Raises UserError for a checkpoint that cannot be used, or is of another network.
    """
    trained = load_checkpoint(path)
    model = trained.model
    if not isinstance(model, CapsNet):
        raise UserError(
            f"checkpoint {path} is of model={trained.config.model.name}, which has no capsules to "
            "look into; train with model=capsnet"
        )
    if model.decoder is None:
        raise UserError(
            f"checkpoint {path} has no decoder, and without one there is nothing to draw; train "
            "with model.reconstruction=true"
        )
    return trained, model
