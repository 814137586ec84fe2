"""affNIST: the official files (www.cs.toronto.edu/~tijmen/affNIST), for testing only.

They are MATLAB files that hold a struct `affNISTdata` with, for N images, `image` (1600, N) uint8,
`label_int` (1, N) and `label_one_of_n` (10, N).

Shapes: N images, H and W pixels, J classes.
"""

import math
import stat
import zipfile
from collections.abc import Iterator
from pathlib import Path, PurePosixPath

import numpy as np
import torch
from tqdm import tqdm

from capsrun.config import DatasetConfig
from capsrun.data import matlab
from capsrun.data.download import file_md5, obtain
from capsrun.data.files import RawData, Source, read_at_most, stored_bytes
from capsrun.data.splits import OF_PHOTOS, refuse_changes
from capsrun.errors import UserError

URL = "https://www.cs.toronto.edu/~tijmen/affNIST/32x/transformed/test.mat.zip"
SIDE_PX = 40
BATCHES = 32
"""Into how many files the test set is divided where it is not one."""
CLASS_COUNTS = tuple(32 * n for n in (980, 1135, 1032, 1010, 982, 892, 958, 1028, 974, 1009))
"""Images of each class: 32 of each of MNIST's test digits."""
MAX_BYTES = 2_000_000_000
"""Most that a file in a zip may have; the whole test set has about 600 MB."""
INSTEAD = (
    "put test.mat (or 1.mat to 32.mat), zipped or not, there, or test on dataset=affnist_like, "
    "which is made from MNIST and is not affNIST"
)


def load(config: DatasetConfig) -> RawData:
    """Find (or download), check and read the test images; there are none to train on.

    Raises UserError when they cannot be had or a file is not what it should be.
    """
    refuse_changes(config, (*OF_PHOTOS, "shift_px", "validation"))
    if (config.image_px, config.channels, config.classes) != (SIDE_PX, 1, 10):
        raise UserError("affnist has images of 1×40×40 in 10 classes; leave the dataset's sizes")
    folder = Path(config.data_dir).expanduser() / "affNIST"
    files = find(folder)
    if not files:
        files = [obtain(URL, folder / "test.mat.zip", None, "affNIST", INSTEAD)]
    pieces = []
    for path in tqdm(files, "reading affNIST", unit=" file", leave=False, disable=None):
        for name, content in mat_files(path):
            pieces.append(read_mat(content, name))
            if len(pieces[-1][1]) not in (sum(CLASS_COUNTS), sum(CLASS_COUNTS) // BATCHES):
                raise UserError(
                    f"{name} holds {len(pieces[-1][1]):,} images; a whole file of affNIST's test "
                    f"set has {sum(CLASS_COUNTS):,}, and each of 1.mat to {BATCHES}.mat "
                    f"{sum(CLASS_COUNTS) // BATCHES:,}; {INSTEAD}"
                )
    sources = [Source(str(path), file_md5(path), verified=False) for path in files]
    images, labels = zip(*pieces)
    images_NHW = images[0] if len(images) == 1 else np.concatenate(images)
    labels_N = np.concatenate(labels)
    where = files[0] if len(files) == 1 else folder
    counts = tuple(np.bincount(labels_N, minlength=10).tolist())
    if counts != CLASS_COUNTS:
        raise UserError(
            f"{where} holds {len(labels_N):,} images, of the ten classes {counts}; affNIST's test "
            f"set has {sum(CLASS_COUNTS):,}, {CLASS_COUNTS}: this is another set, its labels are "
            f"in another order, or parts of it are missing; {INSTEAD}"
        )
    check_digits(images_NHW, labels_N, str(where))
    test_images = torch.from_numpy(images_NHW)[:, None]
    test_labels = torch.from_numpy(labels_N)
    return RawData(
        test_images[:0],
        test_labels[:0],
        test_images,
        test_labels,
        tuple("0123456789"),
        tuple(sources),
    )


def find(folder: Path) -> list[Path]:
    """The files of the test set that are in a folder: one, or one for each batch; maybe none.

    Raises UserError when only some of the batches are there.
    """
    for name in ("test.mat", "test.mat.zip", "test_batches.zip"):
        if (folder / name).is_file():
            return [folder / name]
    for place in (folder, folder / "test_batches"):
        numbers = range(1, BATCHES + 1)
        candidates = [[place / f"{n}.mat", place / f"{n}.mat.zip"] for n in numbers]
        found = [next((path for path in pair if path.is_file()), None) for pair in candidates]
        missing = [f"{n}.mat" for n, path in zip(numbers, found) if path is None]
        if not missing:
            return [path for path in found if path is not None]
        if len(missing) < BATCHES:
            raise UserError(
                f"{place} lacks {', '.join(missing)}: all of 1.mat to {BATCHES}.mat are needed"
            )
    return []


def mat_files(path: Path) -> Iterator[tuple[str, bytes]]:
    """Name and content of a `.mat` file, or of those in a zip, in the order of their numbers.

    Nothing is unpacked to disk. Raises UserError for an archive that is damaged, has no such files,
    holds more than `MAX_BYTES`, whatever it claims, or has links or files that would be unpacked
    elsewhere.
    """
    if path.suffix != ".zip":
        yield str(path), stored_bytes(path, MAX_BYTES)
        return
    try:
        with zipfile.ZipFile(path) as archive:
            members = [info for info in archive.infolist() if not info.is_dir()]
            for info in members:
                inside = PurePosixPath(info.filename.replace("\\", "/"))
                if inside.is_absolute() or ".." in inside.parts or ":" in info.filename:
                    raise UserError(
                        f"{path} holds a file {info.filename!r}, which is outside its folder; it "
                        "is not to be trusted, and nothing in it was used"
                    )
                if stat.S_ISLNK(info.external_attr >> 16):
                    raise UserError(
                        f"{path} holds a link, {info.filename!r}, to another file; it is not to be "
                        "trusted, and nothing in it was used"
                    )
            members = [
                info
                for info in members
                if info.filename.endswith(".mat") and "__MACOSX" not in info.filename
            ]
            if not members:
                raise UserError(f"{path} holds no .mat file")
            # Other methods unpack a piece to any size at once.
            if any(
                i.compress_type not in (zipfile.ZIP_STORED, zipfile.ZIP_DEFLATED) for i in members
            ):
                raise UserError(f"{path} is compressed in another way than zip files mostly are")
            if sum(info.file_size for info in members) > MAX_BYTES:
                raise UserError(f"{path} holds more than {MAX_BYTES:,} bytes: it is not affNIST")
            members.sort(key=lambda info: (len(info.filename), info.filename))
            for info in members:
                with archive.open(info) as stream:
                    yield f"{path}/{info.filename}", read_at_most(stream, info.file_size)
    except UserError:
        raise
    except Exception as error:  # zipfile fails in many ways on a damaged or encrypted archive
        raise UserError(
            f"{path} is damaged, cut short or cannot be read ({error}); delete it and run the "
            "command again to download it"
        ) from error


def read_mat(content: bytes, name: str) -> tuple[np.ndarray, np.ndarray]:
    """Images (N, H, W) uint8 and labels (N,) int64 of the struct in a `.mat` file.

    Raises UserError, naming the file, for one that is damaged, holds something else, or whose
    labels contradict each other.
    """
    struct = _struct(content, name)
    missing = [key for key in ("image", "label_int") if key not in struct]
    if missing:
        raise UserError(f"{name} is not affNIST: its struct lacks {', '.join(missing)}")
    images, labels = struct["image"].numbers, struct["label_int"].numbers.ravel()
    pixels = SIDE_PX**2
    if not images.dtype == struct["image"].kind == np.uint8:
        kind = struct["image"].kind
        raise UserError(f"{name} is not affNIST: its pixels are {kind}, not uint8")
    if images.ndim != 2 or images.shape[0] != pixels:
        hint = " (transposed)" if images.ndim == 2 and images.shape[1] == pixels else ""
        raise UserError(
            f"{name} holds images as an array of {images.shape}{hint}; affNIST's is ({pixels}, N)"
        )
    if images.shape[1] != len(labels):
        raise UserError(f"{name} holds {images.shape[1]} images but {len(labels)} labels")
    if not len(labels) or not np.isin(labels, range(10)).all():
        raise UserError(f"{name} holds labels other than 0 to 9, or none")
    one_of_n = struct.get("label_one_of_n")
    expected = np.eye(10, dtype=np.uint8)[labels.astype(int)].T
    if one_of_n is not None and not np.array_equal(one_of_n.numbers, expected):
        raise UserError(f"{name} is damaged: label_int and label_one_of_n contradict each other")
    if images.max() < 128:
        raise UserError(
            f"{name} holds no pixel brighter than {images.max()}; affNIST's pixels are 0 to 255"
        )
    # MATLAB keeps an image column by column, and the images were written row by row.
    return np.array(images.T, order="C").reshape(-1, SIDE_PX, SIDE_PX), labels.astype(np.int64)


def _struct(content: bytes, name: str) -> dict[str, matlab.Array]:
    """The fields of `affNISTdata` that are arrays of numbers."""
    try:
        data = matlab.read(content).get("affNISTdata")
    except ValueError as error:
        raise UserError(
            f"{name} is damaged, cut short, or no MATLAB file ({error}); delete it and run the "
            "command again to download it"
        ) from error
    if not isinstance(data, dict):
        raise UserError(f"{name} is not affNIST: it holds no struct affNISTdata")
    return data


def check_digits(images_NHW: np.ndarray, labels_N: np.ndarray, name: str) -> None:
    """Refuse images that are turned or belong to other labels, by what all handwriting shares.

    Of all digits ones have the least ink, and they are higher than they are wide; sevens are wider
    in their upper half than in their lower, and lean to the right. Raises UserError, naming the
    file.
    """
    ink = [images_NHW[labels_N == digit].mean() for digit in range(10) if (labels_N == digit).any()]
    ones, sevens = images_NHW[labels_N == 1], images_NHW[labels_N == 7]
    if not len(ones) or not len(sevens) or len(ink) < 10:
        raise UserError(f"{name} does not hold all ten digits: it is not affNIST's test set")
    if int(np.argmin(ink)) != 1:
        raise UserError(f"{name}: its labels do not belong to its images (ones have the least ink)")
    height, width = (math.sqrt(_spread(ones, axis).mean()) for axis in (1, 2))
    upper, lower = _width_of_halves(sevens)
    if height < width or upper < lower or _lean(sevens) > 0:
        raise UserError(f"{name}: its images are turned, mirrored or transposed")


def _spread(images_NHW: np.ndarray, axis: int) -> np.ndarray:
    """Variance (N,) of the ink's place along an axis, in px²."""
    profile = images_NHW.sum(3 - axis, dtype=np.float64) + 1e-9
    profile /= profile.sum(1, keepdims=True)
    places = np.arange(profile.shape[1])
    mean = (profile * places).sum(1, keepdims=True)
    return (profile * (places - mean) ** 2).sum(1)


def _lean(images_NHW: np.ndarray) -> float:
    """Covariance of the ink's row and column, mean over images, in px²; below 0: to the right."""
    ink = images_NHW.astype(np.float64) + 1e-9
    ink /= ink.sum((1, 2), keepdims=True)
    places = np.arange(ink.shape[1])
    rows, columns = (ink.sum(axis) @ places for axis in (2, 1))
    both = np.einsum("nhw,h,w->n", ink, places, places)
    return float((both - rows * columns).mean())


def _width_of_halves(images_NHW: np.ndarray) -> tuple[float, float]:
    """Mean variance along the rows of the ink above and below its middle row."""
    profile = images_NHW.sum(2, dtype=np.float64) + 1e-9
    places = np.arange(profile.shape[1])
    middle = (profile * places).sum(1) / profile.sum(1)
    above = places[None] < middle[:, None]
    upper, lower = (images_NHW * half[..., None] for half in (above, ~above))
    return float(_spread(upper, 2).mean()), float(_spread(lower, 2).mean())
