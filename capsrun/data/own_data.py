"""Images of one's own: found out about, checked, brought to one size, and split.

The reader of each kind has `look(config)`, which returns `Facts`, and `read(config)`, which returns
the `Labelled` images of `train` and, where there are any, of `test`.

Shapes: N images, C channels, H and W pixels.
"""

import collections
import dataclasses
import hashlib
import importlib
import os
import re
from collections.abc import Iterable, Sequence
from pathlib import Path
from typing import Any, NamedTuple, TypeVar

import torch
from torch import Tensor
from torch.nn import functional as F

from capsrun.data import files
from capsrun.data.files import Part, RawData, Source
from capsrun.data.sets import known
from capsrun.data_config import OwnDataConfig
from capsrun.errors import UserError, did_you_mean, notice
from capsrun.terminal import counted, printable

T = TypeVar("T")
# So many images are resized at once.
AT_ONCE = 1000


class Facts(NamedTuple):
    """What is known of images of one's own before all of them are read."""

    class_names: list[str]
    """As the folders or labels are called."""
    channels: int
    image_px: int
    """0: the images have no size of their own."""
    counts: list[int]
    """How many training images there are of each class."""
    tested: int
    """How many test images there are; 0: some of the others are split off."""


class Labelled(NamedTuple):
    """Images and the names of their classes."""

    images_NCHW: Tensor
    """uint8."""
    names: Sequence[str]
    order: Sequence[str] = ()
    """All classes in the order of their numbers, where these are known."""

    @property
    def classes(self) -> list[str]:
        """The names of the classes that there are, each once."""
        there = {*self.names}
        return [name for name in self.order if name in there] + natural(there - {*self.order})

    @property
    def counts(self) -> list[int]:
        """How many images each of them has."""
        return [*collections.Counter(self.names).values()]


def _of_kind(function: str, config: OwnDataConfig) -> Any:
    """What `look` or `read` of the reader of these images returns."""
    reader = importlib.import_module(f"capsrun.data.{known(config.name).reader}")
    try:
        return getattr(reader, function)(config)
    except UserError as error:  # nobody's files but one's own are downloaded again
        raise UserError(printable(str(error).removesuffix(files.AGAIN))) from error
    except OSError as error:
        raise UserError(f"{error.filename} cannot be read: {error.strerror}") from error


def found(config: OwnDataConfig) -> OwnDataConfig:
    """The settings with classes, channels and size as they are, where nothing is said about them.

    Raises UserError for what cannot be used, and for settings that do not fit.
    """
    if config.train_images and config.class_names and config.channels and config.image_px:
        return config
    facts = _of_kind("look", config)
    names = config.class_names or facts.class_names
    if len(facts.class_names) < 2:
        raise UserError(
            f"{config.path} has one class only, {facts.class_names[0]}: there is nothing to tell "
            "apart"
        )
    if len(names) != len(facts.class_names):
        raise UserError(
            f"{config.path} has the {len(facts.class_names)} classes {listed(facts.class_names)}, "
            f"but dataset.class_names are {len(names)}"
        )
    if len(set(names)) != len(names):
        raise UserError("dataset.class_names names a class twice")
    if not (config.image_px or facts.image_px):
        raise UserError("pictures have no size of their own: say it, as in dataset.image_px=28")
    for name in names:
        if "${" in name:
            raise UserError(f"a class cannot be called {name}: rename it, or dataset.class_names=…")
    percent = 0 if facts.tested else config.test_percent
    drawn = 0 if facts.tested else sum(share(count, percent) for count in facts.counts)
    return dataclasses.replace(
        config,
        class_names=list(names),
        classes=config.classes or len(names),
        channels=config.channels or facts.channels,
        image_px=config.image_px or facts.image_px,
        train_images=sum(facts.counts) - drawn,
        test_images=facts.tested or drawn,
        test_percent=percent,
    )


def share(count: int, percent: float) -> int:
    """How many of the images of a class are tested on."""
    return max(1, round(count * percent / 100))


def train_and_test(parts: dict[str, T], path: str) -> dict[str, T]:
    """The parts of a data set without that for validation, which is tested on if nothing else is.

    Raises UserError where there is nothing to train on.
    """
    if "train" not in parts:
        raise UserError(f"{path} has no training images")
    held_out = parts.pop("validation", None)
    if held_out is None:
        return parts
    if "test" in parts:
        notice(
            f"the validation images of {path} are left out; dataset.validation=… holds out some of "
            "the training images"
        )
        return parts
    notice(f"{path} has no test images: its validation images are tested on")
    return {**parts, "test": held_out}


def load(config: OwnDataConfig) -> RawData:
    """Read the images, and split some off for testing where there are none for that.

    config: as `found` returns it. Raises UserError for images, labels or settings that do not fit.
    """
    parts = _of_kind("read", config)
    class_names = parts["train"].classes
    given = config.class_names
    # The same names are in another order; others are new names of the classes in their order.
    order = given if {*given} == {*class_names} else class_names
    if config.classes != len(order):
        raise UserError(f"{config.path} has {len(order)} classes, not {config.classes}")
    numbers = {name: number for number, name in enumerate(order)}
    for name in {*parts.get("test", parts["train"]).names} - {*numbers}:
        raise UserError(f"test images of {config.path} are of class {name}, which is not trained")
    made = {
        name: Part(sized(part.images_NCHW, config), torch.tensor([numbers[n] for n in part.names]))
        for name, part in parts.items()
    }
    if "test" not in made:
        made["train"], made["test"] = split_off(made["train"], config)
    made["train"] = without_tested(made["train"], made["test"], config)
    arrays = [array for part in made.values() for array in part]
    md5 = files.md5_of(b"".join(array.numpy().tobytes() for array in arrays))
    return RawData(made["train"], made["test"], (Source(config.path, md5, verified=False),))


def check_there(path: Path, kind: str) -> None:
    """Raise UserError where there is nothing at `dataset.path`. kind: what is looked for."""
    if not path.exists():
        near = os.listdir(path.parent) if path.parent.is_dir() else []
        raise UserError(f"there is no {kind} {path}{did_you_mean(path.name, near)}")


def natural(names: Iterable[str]) -> list[str]:
    """Names in the order in which people count: 9 before 10."""
    return sorted(
        names,
        key=lambda name: [
            (not part.isdecimal(), int(part) if part.isdecimal() else 0, part)
            for part in re.split(r"(\d+)", name)
            if part
        ],
    )


def listed(names: Sequence[str], most: int = 12) -> str:
    """Some names, and how many more there are."""
    more = f" and {len(names) - most} more" if len(names) > most else ""
    return printable(", ".join(names[:most]) + more)


def part_named(name: str) -> str | None:
    """Whether a file or array is called after training, test or validation images, or none."""
    for word in re.split(r"[\W_]+", name.lower()):
        if word.startswith("train"):
            return "train"
        if word.startswith(("test", "t10k")):
            return "test"
        if word.startswith("val"):
            return "validation"
    return None


def sized(images_NCHW: Tensor, config: OwnDataConfig) -> Tensor:
    """Images with the channels and the size that the settings say, uint8.

    What is not square gets black borders. Raises UserError for colours that cannot be made.
    """
    if config.transposed:
        images_NCHW = images_NCHW.transpose(2, 3)
    stored, channels = images_NCHW.shape[1], config.channels
    if stored != channels and {stored, channels} != {1, 3}:
        raise UserError(
            f"images of {config.path} have {stored} channel(s), of which dataset.channels="
            f"{channels} cannot be made"
        )
    height, width = images_NCHW.shape[2:]
    px, side = config.image_px, max(images_NCHW.shape[2:])
    if stored == channels and height == width == px:
        return images_NCHW.contiguous()
    borders = [(side - width) // 2, -(-(side - width) // 2), (side - height) // 2]
    borders.append(side - height - borders[2])
    pieces = []
    for piece_BCHW in images_NCHW.split(AT_ONCE):
        pixels_BCHW = F.pad(piece_BCHW.float(), borders)
        if stored == 3 and channels == 1:
            luma_C = torch.tensor([0.299, 0.587, 0.114])  # as ITU-R BT.601 and Pillow have it
            pixels_BCHW = torch.einsum("bchw,c->bhw", pixels_BCHW, luma_C)[:, None]
        if side != px:
            size = (px, px)
            pixels_BCHW = F.interpolate(pixels_BCHW, size=size, mode="bilinear", antialias=True)
        pixels_BCHW = pixels_BCHW.expand(-1, channels, -1, -1)
        pieces.append(pixels_BCHW.round().clamp(0, 255).to(torch.uint8))
    return torch.cat(pieces)


def digests(images_NCHW: Tensor) -> list[bytes]:
    """What is the same for the same images only."""
    return [hashlib.blake2b(image.tobytes()).digest() for image in images_NCHW.numpy()]


def split_off(part: Part, config: OwnDataConfig) -> tuple[Part, Part]:
    """Training and test images: of each class `test_percent` are drawn by `split_seed`.

    The same image in several files is on one side. Raises UserError for a class of one image.
    """
    tested: list[int] = []
    classes = same_images(part, config)
    for same, name in zip(classes, config.class_names):
        groups = list(same.values())
        if len(groups) < 2:
            raise UserError(
                f"class {name} of {config.path} has one image only, which cannot be trained and "
                "tested on; add some, or give folders train and test"
            )
        wanted = share(sum(map(len, groups)), config.test_percent)
        # By what they show, so that nearly the same are drawn where some are added or taken away.
        key = config.split_seed.to_bytes(8, "little")
        drawn = sorted(same, key=lambda digest: hashlib.blake2b(digest, key=key).digest())
        chosen: list[int] = []
        for digest in drawn[:-1]:  # one is left to train on
            if len(chosen) >= wanted:
                break
            chosen += same[digest]
        tested += chosen
    used = {n for same in classes for group in same.values() for n in group}
    train, test = (
        Part(*(array[torch.tensor(sorted(numbers))] for array in part))
        for numbers in (used - {*tested}, tested)
    )
    return train, test


def same_images(part: Part, config: OwnDataConfig) -> list[dict[bytes, list[int]]]:
    """The numbers of the same images of each class, by their digest.

    Raises UserError for an image that is of two classes, or leaves it out of the latter.
    """
    found: list[dict[bytes, list[int]]] = [{} for _ in config.class_names]
    first: dict[bytes, int] = {}
    for number, (label, digest) in enumerate(
        zip(part.labels_N.tolist(), digests(part.images_NCHW))
    ):
        if first.setdefault(digest, label) == label:
            found[label].setdefault(digest, []).append(number)
        elif config.faulty == "refuse":
            names = [config.class_names[of] for of in (first[digest], label)]
            raise UserError(
                f"an image of class {names[0]} of {config.path} is of class {names[1]}, too; "
                "dataset.faulty=skip keeps it in one of them"
            )
    return found


def without_tested(train: Part, test: Part, config: OwnDataConfig) -> Part:
    """The training images, or those of them that are not tested on where such are to be left out.

    Raises UserError where they are not.
    """
    tested = {*digests(test.images_NCHW)}
    unseen_N = torch.tensor([digest not in tested for digest in digests(train.images_NCHW)])
    if unseen_N.all():
        return train
    count = len(unseen_N) - int(unseen_N.sum())
    if config.faulty == "refuse":
        raise UserError(
            f"{counted(count, 'training image')} of {config.path} are test images, too (the first "
            f"of class {config.class_names[train.labels_N[~unseen_N][0]]}); dataset.faulty=skip "
            "does not train on them"
        )
    notice(f"left out: {counted(count, 'training image')} that are test images, too")
    return Part(train.images_NCHW[unseen_N], train.labels_N[unseen_N])
