"""Pictures of one's own, in a folder for each class.

Shapes: N pictures, C channels, H and W pixels.
"""

import os
import re
from collections.abc import Iterator, Mapping
from pathlib import Path

import numpy as np
import torch

from capsrun.data.batches import SPLIT, random_bits
from capsrun.data.own_data import Facts, Labelled, check_there, natural, train_and_test
from capsrun.data.own_image import opened, read_image
from capsrun.data_config import OwnDataConfig
from capsrun.errors import UserError, notice
from capsrun.settings import is_encodable
from capsrun.terminal import counted, printable

# Other files in a folder, notes and thumbnails say, are no pictures.
ENDINGS = (
    *(".png", ".jpg", ".jpeg", ".jpe", ".jfif", ".webp", ".bmp", ".dib", ".gif", ".tif", ".tiff"),
    *(".pgm", ".ppm", ".pnm", ".pbm", ".avif", ".heic", ".heif"),
)
# How the folders of a split are called.
PART = re.compile(r"(train|test|val|valid)(ing|idation)?(set|images|data|pictures)?")
# Among so many pictures of each class, spread over all, colours are looked for.
LOOKED_AT = 20
# By how much, of 255, the channels of a colour differ: JPEG makes greys a little colourful.
LEAST_COLOUR = 16
MOST_NAMED = 3

Files = Mapping[str, Mapping[str, tuple[Path, ...]]]
"""The pictures of each part and class."""


def look(config: OwnDataConfig) -> Facts:
    """See `own_data.py`."""
    found = files_of(Path(config.path), config.faulty)
    train = found["train"]
    counts = [len(train[name]) for name in natural(train)]
    tested = sum(map(len, found.get("test", {}).values()))
    channels = config.channels or (3 if any(map(has_colour, sample(train))) else 1)
    return Facts(natural(train), channels, 0, counts, tested)


def sample(classes: Mapping[str, tuple[Path, ...]]) -> Iterator[Path]:
    """Some pictures of each class."""
    for paths in classes.values():
        yield from paths[:: -(-len(paths) // LOOKED_AT)]


def has_colour(path: Path) -> bool:
    """Whether a picture is not grey; what cannot be read is not."""
    try:
        image = opened(path)[0].convert("RGB")
    except UserError:  # which is said when all are read
        return False
    image.thumbnail((256, 256))
    return bool(np.ptp(np.asarray(image, np.int16), axis=2).max() >= LEAST_COLOUR)


def read(config: OwnDataConfig) -> dict[str, Labelled]:
    """See `own_data.py`. The pictures of each part are in one random order.

    Raises UserError, naming it, for a picture that cannot be used; where these are to be left out,
    for a class of which none is left.
    """
    parts = {}
    for part, classes in files_of(Path(config.path), config.faulty).items():
        pixels: list[torch.Tensor] = []
        names: list[str] = []
        faults: list[str] = []
        for name, paths in classes.items():
            before = len(names)
            for path in paths:
                try:
                    pixels.append((read_image(path, config, "auto")[0] * 255).round().byte())
                    names.append(name)
                except UserError as error:
                    if config.faulty == "refuse":
                        raise UserError(f"{error}; dataset.faulty=skip leaves such out") from error
                    faults.append(str(error))
            if len(names) == before:
                raise UserError(
                    f"class {name} of {config.path} has no {part} picture that can be read"
                )
        if faults:
            more = f"; and {len(faults) - MOST_NAMED} more" if len(faults) > MOST_NAMED else ""
            said = "; ".join(faults[:MOST_NAMED])
            notice(printable(f"left out: {counted(len(faults), 'picture')}: {said}{more}"))
        order = random_bits(torch.arange(len(names)), 0, SPLIT).argsort()
        parts[part] = Labelled(torch.stack(pixels)[order], [names[n] for n in order.tolist()])
    return parts


def files_of(root: Path, faulty: str) -> Files:
    """The pictures in a folder. Raises UserError where there are none, or some lead elsewhere."""
    check_there(root, "folder")
    if not root.is_dir():
        raise UserError(f"{root} is no folder; a table of images is for dataset=table")
    parts = {
        part: folder
        for folder in visible(root)
        # A class may have such a name, too; there are pictures in its folder, and not folders.
        if (part := part_of(folder)) and any(path.is_dir() for path in visible(folder))
    }
    if not parts:
        return {"train": classes_of(root, root, faulty)}
    found = {part: classes_of(folder, root, faulty) for part, folder in parts.items()}
    return train_and_test(found, str(root))


def part_of(folder: Path) -> str | None:
    """Which part of a split a folder is called after, if any."""
    called = PART.fullmatch(re.sub(r"[\W_]", "", folder.name.lower()))
    if called is None or not folder.is_dir():
        return None
    return "validation" if called[1].startswith("val") else called[1]


def visible(folder: Path) -> list[Path]:
    """What is in a folder and not hidden, in natural order."""
    by_name = {path.name: path for path in folder.iterdir() if not path.name.startswith(".")}
    return [by_name[name] for name in natural(by_name)]


def classes_of(folder: Path, root: Path, faulty: str) -> dict[str, tuple[Path, ...]]:
    """The pictures of each class of a part.

    Raises UserError for a class without any, and for links that lead out of `root` where those are
    not to be left out.
    """
    found = {}
    for path in visible(folder):
        if not path.is_dir() or leads_out(path, root, faulty):
            continue
        if not is_encodable(path.name):
            raise UserError(
                f"the folder {printable(str(path))} has a name that is no text in UTF-8, and is to "
                "be a class: rename it"
            )
        pictures = tuple(pictures_in(path, root, faulty))
        if not pictures:
            raise UserError(
                f"the folder {path} has no pictures ({', '.join(e[1:] for e in ENDINGS[:4])}, …): "
                "there is nothing of this class"
            )
        found[path.name] = pictures
    if not found:
        loose = [path for path in visible(folder) if path.suffix.lower() in ENDINGS]
        what = f"{counted(len(loose), 'picture')} but no folders" if loose else "no folders"
        raise UserError(f"{folder} has {what}: give the pictures of each class a folder in it")
    return found


def pictures_in(folder: Path, root: Path, faulty: str) -> Iterator[Path]:
    """The pictures in a folder and those in it. Raises UserError, see `classes_of`."""
    for path in visible(folder):
        if leads_out(path, root, faulty):
            continue
        if path.is_dir() and not path.is_symlink():
            yield from pictures_in(path, root, faulty)
        elif path.suffix.lower() in ENDINGS and path.is_file():
            yield path


def leads_out(path: Path, root: Path, faulty: str) -> bool:
    """Whether it is a link to nothing in `root`. Raises UserError where such are refused."""
    if not path.is_symlink():
        return False
    real = Path(os.path.realpath(path))
    if real.exists() and real.is_relative_to(os.path.realpath(root)):
        return False
    if faulty == "refuse":
        raise UserError(
            f"{printable(str(path))} is a link that leads out of {root}, or nowhere; copy what it "
            "means, or dataset.faulty=skip leaves such out"
        )
    return True
