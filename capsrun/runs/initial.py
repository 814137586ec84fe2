"""The weights that a new run begins with, where they are those of another one."""

import re
from pathlib import Path

from capsrun.config import DatasetConfig, TrainConfig
from capsrun.data import is_part_of
from capsrun.data.files import md5_of
from capsrun.errors import UserError, notice
from capsrun.models import Model
from capsrun.names import must_match
from capsrun.runs.checkpoint import OF_THE_SAME, find_checkpoint, load_checkpoint, origin
from capsrun.terminal import counted, printable


def begin_with_weights(model: Model, config: TrainConfig, checkpoint: Path) -> str | None:
    """Put the weights of `config.init` into the layers that they fit; say which these are.

    checkpoint: the run's own; where it exists, the run goes on with that, and nothing is read.
    Returns the MD5 of their file, or None where there is nothing to do. Raises UserError for
    weights that cannot be used, that fit no layer but the decoder's, or whose training has seen
    the images of the test.
    """
    if config.init is None or checkpoint.exists():
        return None
    file = find_checkpoint(config.init)
    trained = load_checkpoint(file)
    refuse_seen_images(config.dataset, trained.config.dataset)
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
    return md5_of(file.read_bytes())


def layer_of(key: str) -> str:
    """The layer of a weight or a bias in a state dict: `decoder.0` of `decoder.0.weight`."""
    return re.sub("[._](weight|bias)$", "", key)


def refuse_seen_images(dataset: DatasetConfig, seen: DatasetConfig) -> None:
    """Refuse test images among those that weights were trained on; tell of held-out ones.

    seen: what the weights were trained on.
    """
    ours, theirs = map(origin, (dataset, seen))
    if is_part_of(dataset, seen):
        raise UserError(
            f"the test images of {ours} are training images of {theirs}, on which the weights of "
            f"init=… were trained, so its test error would say nothing; train on "
            f"dataset={seen.name}, or begin with other weights"
        )
    drawn_by = [key for key in must_match(dataset, "test") if key in OF_THE_SAME]
    differing = [key for key in drawn_by if getattr(dataset, key) != getattr(seen, key, None)]
    if ours == theirs and differing:
        said = " ".join(f"dataset.{key}={getattr(seen, key, None)}" for key in differing)
        raise UserError(
            "other test images are drawn here than where the weights of init=… were trained, which "
            f"have seen some of these: say {said}"
        )
    held_out = [(d.validation, d.split_seed) for d in (dataset, seen)]
    shared = is_part_of(seen, dataset) or (ours == theirs and held_out[0] != held_out[1])
    if dataset.validation and shared:
        notice(
            f"some of the images that are held out here are among those of {theirs} on which the "
            "weights of init=… were trained, so the error on them is too low"
        )
