"""affNIST: the official files (www.cs.toronto.edu/~tijmen/affNIST), for testing only.

They are MATLAB files that hold a struct `affNISTdata` with, for N images, `image` (1600, N) uint8,
`label_int` (1, N) and `label_one_of_n` (10, N).

Shapes: N images, H and W pixels.
"""

import io
import zipfile
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import numpy as np
import torch
from tqdm import tqdm

from capsrun.data.files import (
    Home,
    Part,
    RawData,
    Source,
    md5_of,
    obtain,
    parsing,
    read_file,
    read_mat,
)
from capsrun.data.splits import refuse_changes
from capsrun.data_config import DatasetConfig
from capsrun.errors import UserError

URL = "https://www.cs.toronto.edu/~tijmen/affNIST/32x/transformed/test.mat.zip"
SIDE_PX = 40
BATCHES = 32
"""Into how many files the test set is divided where it is not one."""
CLASS_COUNTS = tuple(32 * n for n in (980, 1135, 1032, 1010, 982, 892, 958, 1028, 974, 1009))
"""Images of each class: 32 of each of MNIST's test digits."""
INSTEAD = (
    "put test.mat (or 1.mat to 32.mat), zipped or not, there, or test on dataset=affnist_like, "
    "which is made from MNIST and is not affNIST"
)


def load(config: DatasetConfig) -> RawData:
    """Find (or download), check and read the test images; there are none to train on.

    Raises UserError when they cannot be had or a file is not what it should be.
    """
    refuse_changes(config, "shift_px", "validation")
    if (config.image_px, config.channels, config.classes) != (SIDE_PX, 1, 10):
        raise UserError("affnist has images of 1×40×40 in 10 classes; leave the dataset's sizes")
    home = Home(Path(config.data_dir), "affNIST", "affNIST", INSTEAD)
    folder = home.data_dir / home.folder
    files = tqdm(find(folder), "reading affNIST", unit=" file", leave=False, disable=None)
    read = [read_stored(path) for path in files]
    read = read or [obtain(home, "test.mat.zip", [URL], None, read_stored)]
    pieces = [piece for of_file, _ in read for piece in of_file]
    images_NHW, labels_N = map(np.concatenate, zip(*pieces))
    sources = tuple(source for _, source in read)
    check(images_NHW, labels_N, sources[0].name if len(sources) == 1 else folder)
    test = Part(torch.from_numpy(images_NHW)[:, None], torch.from_numpy(labels_N))
    nothing = Part(test.images_NCHW[:0], test.labels_N[:0])
    return RawData(nothing, test, sources)


def find(folder: Path) -> list[Path]:
    """The files of the test set that are in a folder: one, or one for each batch; maybe none.

    Raises UserError when only some of the batches are there.
    """
    for name in ("test.mat", "test.mat.zip", "test_batches.zip"):
        if (folder / name).is_file():
            return [folder / name]
    for place in (folder, folder / "test_batches"):
        names = [f"{number}.mat" for number in range(1, BATCHES + 1)]
        found = sorted(place.glob("*.mat*"), reverse=True)  # 1.mat rather than 1.mat.zip
        paths = {path.name.removesuffix(".zip"): path for path in found}
        missing = [name for name in names if name not in paths]
        if not missing:
            return [paths[name] for name in names]
        if len(missing) < BATCHES:
            raise UserError(
                f"{place} lacks {', '.join(missing)}: all of 1.mat to {BATCHES}.mat are needed"
            )
    return []


def read_stored(path: Path) -> tuple[list[tuple[np.ndarray, np.ndarray]], Source]:
    """Images and labels of each `.mat` in a file. Raises UserError as `read_images` does."""
    stored = read_file(path)
    pieces = [read_images(content, name) for name, content in mat_files(path, stored)]
    return pieces, Source(str(path), md5_of(stored), verified=False)


def mat_files(path: Path, stored: bytes) -> Iterator[tuple[str, bytes]]:
    """Name and content of a `.mat` file, or of those in a zip, in the order of their numbers.

    Nothing is unpacked to disk. Raises UserError for an archive that is damaged or has no such
    files.
    """
    if path.suffix != ".zip":
        yield str(path), stored
        return
    with parsing(path), zipfile.ZipFile(io.BytesIO(stored)) as archive:
        names = [n for n in archive.namelist() if n.endswith(".mat") and "__MACOSX" not in n]
        if not names:
            raise UserError(f"{path} holds no .mat file")
        for name in sorted(names, key=lambda name: (len(name), name)):
            yield f"{path}/{name}", archive.read(name)


def read_images(content: bytes, name: str) -> tuple[np.ndarray, np.ndarray]:
    """Images (N, H, W) uint8 and labels (N,) int64 of the struct in a `.mat` file.

    Raises UserError, naming the file, for one that is damaged, holds something else, or whose
    labels contradict each other.
    """
    struct: Any = read_mat(content, name).get("affNISTdata")
    if not isinstance(struct, dict) or not {"image", "label_int"} <= struct.keys():
        raise UserError(f"{name} is not affNIST: it lacks affNISTdata with image and label_int")
    with parsing(name):
        images, labels = np.asarray(struct["image"]), np.asarray(struct["label_int"])
        if images.dtype != np.uint8 or images.ndim != 2 or len(images) != SIDE_PX**2:
            raise UserError(
                f"{name} holds images as an array of {images.shape}, {images.dtype}; affNIST's is "
                f"({SIDE_PX**2}, N), uint8"
            )
        if labels.shape != images.shape[1:] or not np.isin(labels, range(10)).all():
            raise UserError(
                f"{name} holds {images.shape[1]} images and an array of {labels.shape} labels, or "
                "labels other than 0 to 9"
            )
        labels = labels.astype(np.int64)
        one_of_n = struct.get("label_one_of_n")
        if one_of_n is not None and not np.array_equal(one_of_n, np.eye(10)[labels].T):
            raise UserError(f"{name}: its label_int and label_one_of_n contradict each other")
    # MATLAB keeps an image column by column, and the images were written row by row.
    return images.T.reshape(-1, SIDE_PX, SIDE_PX), labels


def check(images_NHW: np.ndarray, labels_N: np.ndarray, name: object) -> None:
    """Refuse another set, and images that are turned or belong to other labels.

    By what all handwriting shares: ones have little ink and are higher than they are wide; sevens
    lean to the right and are wider above. Raises UserError, naming the file.
    """
    counts = tuple(np.bincount(labels_N, minlength=10).tolist())
    if counts != CLASS_COUNTS:
        raise UserError(
            f"{name} holds {len(labels_N):,} images, of the ten classes {counts}; affNIST's test "
            f"set has {sum(CLASS_COUNTS):,}, {CLASS_COUNTS}: this is another set, its labels are "
            f"in another order, or parts of it are missing; {INSTEAD}"
        )
    if images_NHW.max() < 128:
        raise UserError(
            f"{name} holds no pixel brighter than {images_NHW.max()}; affNIST's are 0 to 255"
        )
    ones, sevens = (images_NHW[labels_N == digit] for digit in (1, 7))
    if ones.mean() > 0.8 * images_NHW.mean():
        raise UserError(f"{name}: its labels do not belong to its images (ones have the least ink)")
    upright = moment(ones, 2, 0) > moment(ones, 0, 2)
    if not upright or moment(sevens, 1, 1) > 0 or moment(sevens, 1, 2) > 0:
        raise UserError(f"{name}: its images are turned, mirrored or transposed")


def moment(images_NHW: np.ndarray, row_power: int, column_power: int) -> float:
    """Central moment of the ink, mean over the first images."""
    ink = images_NHW[:1000].astype(np.float64) + 1e-9
    ink /= ink.sum((1, 2), keepdims=True)
    places = np.arange(ink.shape[1])
    rows_NH, columns_NW = (places - (ink.sum(axis) @ places)[:, None] for axis in (2, 1))
    powers = rows_NH**row_power, columns_NW**column_power
    return float(np.einsum("nhw,nh,nw->n", ink, *powers).mean())
