"""Images of one's own in tables: CSV as Kaggle's, npz as Keras', parquet as Hugging Face's."""

import csv
import functools
import io
import json
import math
import re
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import numpy as np
import torch
from numpy.typing import NDArray

from capsrun.data import files
from capsrun.data.own_data import Facts, Labelled, check_there, part_named, train_and_test
from capsrun.data.own_image import opened
from capsrun.data_config import OwnDataConfig
from capsrun.errors import UserError, notice
from capsrun.terminal import printable

Array = NDArray[Any]
# What the images, and the labels, are called in CSV, npz and parquet.
IMAGES = ("image", "images", "x", "data", "img", "pixels", "arr_0")
LABELS = ("label", "labels", "y", "class", "target", "digit", "arr_1")
ENDINGS = (".csv", ".csv.gz", ".npz", ".parquet")
# Hugging Face puts the names of the classes there.
FEATURES = b"huggingface"


def look(config: OwnDataConfig) -> Facts:
    """See `own_data.py`."""
    parts = read(config)
    train, test = parts["train"], parts.get("test")
    _, channels, *sides = train.images_NCHW.shape
    tested = len(test.names) if test else 0
    return Facts(train.classes, channels, max(sides), train.counts, tested)


def read(config: OwnDataConfig) -> dict[str, Labelled]:
    """See `own_data.py`. Raises UserError for files that are missing, damaged or others."""
    found: dict[str, list[Labelled]] = {}
    root = Path(config.path)
    for path in files_of(root):
        place = str(path.relative_to(root)) if root.is_dir() else path.name
        for part, labelled in read_file(path, place, path.stat().st_mtime_ns).items():
            found.setdefault(part, []).append(labelled)
    parts = {part: joined(pieces, config.path) for part, pieces in found.items()}
    return train_and_test(parts, config.path)


def joined(pieces: list[Labelled], path: str) -> Labelled:
    """What several files hold of one part. Raises UserError for images of several sizes."""
    sizes = {"×".join(map(str, piece.images_NCHW.shape[1:])) for piece in pieces}
    if len(sizes) > 1:
        raise UserError(f"the files of {path} hold images of several sizes: {', '.join(sizes)}")
    names = [name for piece in pieces for name in piece.names]
    return Labelled(torch.cat([piece.images_NCHW for piece in pieces]), names, pieces[0].order)


def files_of(path: Path) -> list[Path]:
    """The file, or those of a folder. Raises UserError where there is none."""
    check_there(path, "file or folder")
    found = [path]
    if path.is_dir():  # of which what is hidden is none, nor is what is there uncompressed, too
        found = [
            file for file in sorted(path.rglob("*")) if "/." not in f"/{file.relative_to(path)}"
        ]
        found = [f for f in found if f.suffix != ".gz" or f.with_suffix("") not in found]
    found = [file for file in found if file.name.lower().endswith(ENDINGS)]
    if not found:
        raise UserError(f"{path} is, or has, no table: {', '.join(ENDINGS)}")
    return found


@functools.lru_cache(maxsize=8)
def read_file(path: Path, place: str, modified: int) -> Mapping[str, Labelled]:
    """The labelled images of each part in a file.

    place: what it is called, which says the part. modified: when it was, in ns.
    """
    content = files.read_file(path)
    with files.parsing(path):
        if path.name.lower().endswith(".npz"):
            return parse_npz(content, path)
        part = part_named(place) or "train"
        if path.name.lower().endswith(".parquet"):
            labelled = parse_parquet(content, path)
        else:
            labelled = parse_csv(files.unpacked(path, content), path)
    return {} if labelled is None else {part: labelled}


def parse_csv(content: bytes, path: Path) -> Labelled | None:
    """A row an image: the label, then the pixels row by row. None: without labels.

    The label is in the column that is called so, or in the first one where they have no names.
    """
    lines = content.decode("utf-8-sig").splitlines()
    text = "\n".join(line for line in lines if line.strip())
    first = text.partition("\n")[0]
    if not text.strip():
        raise ValueError("it is empty")
    separator = max(",;\t", key=first.count)
    cells = next(csv.reader([first], delimiter=separator))
    # A row of an image has numbers, but for its label.
    label = next((i for i, cell in enumerate(cells) if cell.strip().lower() in LABELS), None)
    has_header = label is not None or sum(not is_number(cell) for cell in cells) > 1
    if not has_header:
        label = 0
    elif label is None:
        notice(f"{path} has no column {' or '.join(LABELS[:3])}, and is left out")
        return None
    pixels = [column for column in range(len(cells)) if column != label]
    if len(pixels) < 2 or text.count("\n") < has_header:
        notice(f"{path} holds no images, and is left out")
        return None
    how: dict[str, Any] = {"delimiter": separator, "skiprows": int(has_header), "ndmin": 2}
    how["comments"] = None  # a label may be C#
    names = np.loadtxt(io.StringIO(text), str, usecols=[label], quotechar='"', **how)[:, 0]
    values = np.loadtxt(io.StringIO(text), np.float32, usecols=pixels, quotechar='"', **how)
    return labelled_images(values, names, path)


def is_number(text: str) -> bool:
    """Whether a cell holds a number."""
    try:
        float(text)
    except ValueError:
        return False
    return True


def parse_npz(content: bytes, path: Path) -> dict[str, Labelled]:
    """Arrays of images and labels, called as Keras does (x_train, y_train) or similarly.

    Raises UserError for pickled objects, which are programs.
    """
    parts: dict[str, Labelled] = {}
    with np.load(io.BytesIO(content), allow_pickle=False) as arrays:
        for part in ("train", "test", "validation", None):
            keys = [key for key in arrays.files if part_named(key) == part]
            kinds = [kind_of(key) for key in keys]
            if "images" not in kinds or "labels" not in kinds:
                continue
            try:
                images, labels = (arrays[keys[kinds.index(k)]] for k in ("images", "labels"))
            except ValueError as error:
                raise UserError(
                    f"{path} holds pickled objects, which could be programs and are not read: save "
                    "plain arrays of numbers"
                ) from error
            parts.setdefault(part or "train", labelled_images(images, labels, path))
        if not parts:
            raise UserError(
                f"{path} holds {printable(', '.join(arrays.files)) or 'nothing'}, and no arrays of "
                "images and labels: x_train, y_train, x_test, y_test, or images, labels"
            )
    return parts


def kind_of(key: str) -> str | None:
    """Whether an array is called after images or labels, or neither."""
    words = {key.lower(), *key.lower().split("_")}
    if words & {*LABELS}:
        return "labels"
    return "images" if words & {*IMAGES} else None


def parse_parquet(content: bytes, path: Path) -> Labelled | None:
    """A row an image: image files as Hugging Face has them, or lists of pixels; and labels.

    None: without labels, all of them being −1 or missing. Raises UserError without pyarrow.
    """
    try:
        from pyarrow import parquet
    except ImportError:
        raise UserError(f"{path} needs the package pyarrow: pip install pyarrow") from None
    table = parquet.read_table(io.BytesIO(content))
    columns = {kind_of(name): name for name in reversed(table.column_names)}
    if not {"images", "labels"} <= columns.keys():
        raise UserError(
            f"{path} has the columns {printable(', '.join(table.column_names))}, and none called "
            "image and label"
        )
    rows, labels = (table[columns[kind]].to_pylist() for kind in ("images", "labels"))
    info = json.loads((table.schema.metadata or {}).get(FEATURES, "{}"))
    feature = info.get("info", {}).get("features", {}).get(columns["labels"], {})
    if all(label in (None, -1) for label in labels):
        notice(f"{path} has no labels, and is left out")
        return None
    named = feature.get("names", ())
    for number, label in enumerate(labels):
        if label is None or (named and label not in range(len(named))):
            raise UserError(f"row {number} of {path} has the label {label}, which is no class")
    labels = [named[label] for label in labels] if named else labels
    images = [pixels_of(row, number, path) for number, row in enumerate(rows)]
    if len({image.shape for image in images}) > 1:
        raise UserError(
            f"{path} holds images of several sizes; write them out as files for dataset=folder"
        )
    if images[0].shape[2:] == (3,) and all(np.ptp(image, axis=2).max() == 0 for image in images):
        images = [image[..., 0] for image in images]  # grey
    return labelled_images(np.stack(images), np.asarray(labels), path)._replace(order=named)


def pixels_of(row: Any, number: int, path: Path) -> Array:
    """An image of a row: the bytes of an image file, or its pixels."""
    if isinstance(row, dict):
        row = row.get("bytes")
    if not isinstance(row, bytes):
        return np.asarray(row, np.float32)
    image, _ = opened(io.BytesIO(row), f"image {number} of {path}")
    return np.asarray(image)


def labelled_images(images: Array, labels: Array, path: Path) -> Labelled:
    """Images of numbers as uint8 (N, C, H, W), with their labels as names.

    Raises UserError for shapes and values that are not those of images and labels.
    """
    if images.dtype == object or labels.dtype == object or not len(images):
        raise UserError(f"{path} holds no images and labels, or arrays of several sizes")
    if labels.ndim == 2 and labels.shape[1] > 1 and ((labels != 0).sum(1) == 1).all():
        labels = labels.argmax(1)  # one-hot
    labels = labels.reshape(len(labels), -1)
    if labels.shape != (len(images), 1):
        raise UserError(f"{path} holds {len(images)} images, but labels of shape {labels.shape}")
    if labels.dtype.kind == "f":
        if not (labels == labels.round()).all():
            raise UserError(f"{path} holds labels that are no whole numbers")
        labels = labels.astype(np.int64)
    # 5.0 is the class 5 in whichever file.
    names = [re.sub(r"\.0+$", "", f"{label}".strip()) for label in labels[:, 0].tolist()]
    if "" in names:
        raise UserError(f"row {names.index('')} of {path}, counted from 0, has no label")
    return Labelled(torch.from_numpy(as_bytes(in_order(images, path), path)), names)


def in_order(images: Array, path: Path) -> Array:
    """Images as (N, C, H, W), whichever way they are stored."""
    if images.ndim == 2:
        channels = next(
            (c for c in (1, 3) if math.isqrt(images.shape[1] // c) ** 2 * c == images.shape[1]), 0
        )
        if not channels:
            raise UserError(
                f"{path} has {images.shape[1]:,} pixels in an image, which are no square; other "
                "sizes are for npz"
            )
        side = math.isqrt(images.shape[1] // channels)
        images = images.reshape(-1, side, side, channels)
    if images.ndim == 3:
        return images[:, None]
    if images.ndim != 4:
        raise UserError(f"{path} holds images of shape {images.shape}, not (N, H, W, C)")
    return images if images.shape[1] in (1, 3) else images.transpose(0, 3, 1, 2)


def as_bytes(images: Array, path: Path) -> NDArray[np.uint8]:
    """Pixels of 0 to 255, of whichever type, or from 0 to 1. Raises UserError for others."""
    if images.dtype != np.uint8:
        images = images.astype(np.float32)
        low, high = float(images.min()), float(images.max())
        if low >= 0 and high <= 1:  # 0 and 1 are ink and no ink
            images, high = images * 255, high * 255
        if not (low >= 0 and high <= 255):
            raise UserError(
                f"{path} holds pixels from {low:g} to {high:g}; they are to be 0 to 255, or 0 to 1"
            )
    if images.max() < 64:
        notice(f"{path} is dark: the brightest pixel is {images.max():g} of 255")
    return np.ascontiguousarray(np.rint(images).astype(np.uint8))
