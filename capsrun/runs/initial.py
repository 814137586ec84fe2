"""The weights that a new run begins with, where they are those of another one."""

import re
from collections.abc import Iterable, Mapping, Sequence
from pathlib import Path
from typing import Any, NamedTuple

from capsrun.config import TrainConfig
from capsrun.data import is_part_of
from capsrun.data.files import md5_of
from capsrun.data_config import DatasetConfig, dataset_schema
from capsrun.errors import UserError, notice
from capsrun.models import Model
from capsrun.names import must_match
from capsrun.runs.checkpoint import OF_THE_SAME, find_checkpoint, load_checkpoint, origin
from capsrun.terminal import counted, printable


class Initial(NamedTuple):
    """What a run began with."""

    md5: str | None = None
    """Of the file of its weights; None: they were drawn."""
    seen: tuple[dict[str, Any], ...] = ()
    """What these were trained on; see `Trained.seen`."""


def begin_with_weights(
    model: Model, config: TrainConfig, data: Sequence[str], checkpoint: Path
) -> Initial:
    """Put the weights of `config.init` into the layers that they fit; say which these are.

    data: see `Dataset.unverified`. checkpoint: the run's own; where it exists, the run goes on with
    that, and nothing is read. Raises UserError for weights that cannot be used, that fit no layer
    but the decoder's, or whose training has seen the images of the test.
    """
    if config.init is None or checkpoint.exists():
        return Initial()
    file = find_checkpoint(config.init)
    trained = load_checkpoint(file)
    refuse_seen_images(config.dataset, data, trained.seen, "init=…")
    tell_of_held_out(config.dataset, trained.config.dataset)
    ours, theirs = model.state_dict(), trained.model.state_dict()
    layers = dict.fromkeys(map(layer_of, ours))
    fits = {key: key in theirs and theirs[key].shape == ours[key].shape for key in ours}
    anew = dict.fromkeys(layer_of(key) for key in ours if not fits[key])
    taken = [layer for layer in layers if layer not in anew]
    if type(trained.model) is not type(model) or all(name.startswith("decoder") for name in taken):
        raise UserError(
            f"the weights of init={config.init} are of another network (model="
            f"{trained.config.model.name}), and none fit this one (model={config.model.name}) but "
            "perhaps in its decoder; choose the model and the settings of that run"
        )
    model.load_state_dict({key: (ours if layer_of(key) in anew else theirs)[key] for key in ours})
    of = f"{file}, after {counted(trained.step, 'step')}"
    which = f"{', '.join(taken)}; begun anew: {', '.join(anew)}" if anew else "all layers"
    print(printable(f"begins with the weights of {of}: {which}"))
    return Initial(md5_of(file.read_bytes()), trained.seen)


def layer_of(key: str) -> str:
    """The layer of something in a state dict: `decoder.0` of `decoder.0.weight`."""
    statistics = "running_mean|running_var|num_batches_tracked"
    return re.sub(f"[._](weight|bias|{statistics})$", "", key)


def refuse_seen_images(
    dataset: DatasetConfig, data: Sequence[str], seen: Iterable[Mapping[str, Any]], what: str
) -> None:
    """Raise UserError for test images that weights were trained on, or may have been.

    data: see `Dataset.unverified`. seen: see `Trained.seen`. what: was trained, for the message.
    """
    for entry in seen:
        earlier = dataset_schema(entry["dataset"])(**entry["dataset"])
        if is_part_of(dataset, earlier):
            raise UserError(
                f"the test images of {dataset.source or dataset.name} are training images of "
                f"{earlier.source or earlier.name}, on which {what} was trained, so the test error "
                f"would say nothing; take dataset={earlier.name}, or other weights"
            )
        if origin(dataset) != origin(earlier):
            continue
        drawn_by = [key for key in must_match(dataset, "test") if key in OF_THE_SAME]
        differing = [
            key for key in drawn_by if getattr(dataset, key) != getattr(earlier, key, None)
        ]
        if differing:
            said = " ".join(f"dataset.{key}={getattr(earlier, key, None)}" for key in differing)
            raise UserError(
                f"other test images are drawn here than where {what} was trained, which has seen "
                f"some of these: say {said}"
            )
        if getattr(dataset, "test_percent", 0) and entry["data"] and entry["data"] != list(data):
            raise UserError(
                f"the images of {dataset.title} are not those that {what} was trained on any more, "
                "and some that would be tested on now may be among these; bring the old ones back, "
                "or give folders (or files) train and test"
            )


def tell_of_held_out(dataset: DatasetConfig, seen: DatasetConfig) -> None:
    """Say where images that are held out were trained on before, on the data set `seen`."""
    held_out = [(d.validation, d.split_seed) for d in (dataset, seen)]
    ours, theirs = map(origin, (dataset, seen))
    shared = is_part_of(seen, dataset) or (ours == theirs and held_out[0] != held_out[1])
    if dataset.validation and shared:
        notice(
            f"some of the images that are held out here are among those of {theirs} on which the "
            "weights of init=… were trained, so the error on them is too low"
        )
