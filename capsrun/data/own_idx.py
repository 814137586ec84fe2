"""Images of one's own in idx files, as MNIST's, EMNIST's and others are."""

from pathlib import Path

from capsrun.data import files
from capsrun.data.official import parse_idx
from capsrun.data.own_data import Facts, Labelled, check_there, part_named, train_and_test
from capsrun.data_config import OwnDataConfig
from capsrun.errors import UserError

KINDS = {"images": 3, "labels": 1}
"""What the files are called after, and how many dimensions they have."""


def look(config: OwnDataConfig) -> Facts:
    """See `own_data.py`."""
    parts = read(config)
    train, test = parts["train"], parts.get("test")
    tested = len(test.names) if test else 0
    return Facts(train.classes, 1, max(train.images_NCHW.shape[2:]), train.counts, tested)


def read(config: OwnDataConfig) -> dict[str, Labelled]:
    """See `own_data.py`. Raises UserError for files that are missing or damaged."""
    found = files_of(Path(config.path))
    names = mapping(Path(config.path))
    parts = {}
    for part in sorted({part for part, _ in found}, reverse=True):
        arrays = []
        for kind, dimensions in KINDS.items():
            file = found.get((part, kind))
            if file is None:
                raise UserError(f"{config.path} has no idx file of the {kind} of its {part} images")
            content = files.unpacked(file, files.read_file(file))
            arrays.append(parse_idx(content, dimensions, file))
        images, labels = arrays
        if len(images) != len(labels):
            raise UserError(f"{config.path}: {len(images)} {part} images but {len(labels)} labels")
        of_images = [names.get(label, str(label)) for label in labels.tolist()]
        parts[part] = Labelled(images[:, None], of_images, [*names.values()])
    return train_and_test(parts, config.path)


def files_of(path: Path) -> dict[tuple[str, str], Path]:
    """The file of each part and kind, in a folder or beginning with a path.

    Raises UserError where there are none, or several of one kind.
    """
    folder, start = (path, "") if path.is_dir() else (path.parent, path.name)
    check_there(folder, "folder")
    found: dict[tuple[str, str], list[Path]] = {}
    for file in sorted(folder.iterdir()):
        kind = next((kind for kind in KINDS if kind[:-1] in file.name.lower()), None)
        if kind and file.name.startswith(start) and file.is_file() and "idx" in file.name.lower():
            found.setdefault((part_named(file.name) or "train", kind), []).append(file)
    if not found:
        raise UserError(
            f"{path} has no idx files, which are called like train-images-idx3-ubyte and "
            "train-labels-idx1-ubyte, or end in .gz"
        )
    for several in found.values():
        contents = {files.without_gz(file.name) for file in several}
        if len(contents) > 1:
            raise UserError(
                f"{path} has files of several data sets, {several[0].name} and {several[1].name}: "
                f"say how the names of one begin, dataset.path={folder / several[0].name[:14]}…"
            )
    return {key: several[0] for key, several in found.items()}


def mapping(path: Path) -> dict[int, str]:
    """The character of each label where EMNIST's file that says so is there, else nothing."""
    folder, start = (path, "") if path.is_dir() else (path.parent, path.name)
    found = [file for file in sorted(folder.glob("*-mapping.txt")) if file.name.startswith(start)]
    if len(found) != 1:
        return {}
    with files.parsing(found[0]):
        lines = [line.split() for line in files.read_file(found[0]).decode().splitlines()]
        # Of the letters both forms are given, the capital one first.
        return {int(label): chr(int(code)) for label, code, *_ in lines}
