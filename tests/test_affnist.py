"""The official files of affNIST: read as they are, refused by name when they are not what they
should be. They are made here of real digits, in the real format."""

import functools
import io
import zipfile

import numpy as np
import pytest
import torch
from conftest import MNIST_DIR, TINY, load_data, train_config
from scipy.io import savemat

from capsrun import cli
from capsrun.commands.train import train
from capsrun.data import affnist
from capsrun.errors import UserError

COUNT = 320
load = functools.partial(load_data, "affnist")


@pytest.fixture(scope="module")
def digits():
    """320 digits of 40×40 px in random places: images (N, 40, 40), labels (N,)."""
    test = load_data("affnist_like", "dataset.source=mnist5k").test
    batch = test.batch(test.indices(0, COUNT))
    images = (batch.images_BCHW[:, 0] * 255).round().to(torch.uint8)
    return images.numpy(), batch.labels_BT[:, 0].numpy()


def mat(images, labels, name="affNISTdata", compress=True, **changes):
    """A file with the struct of affNIST; a change to None leaves a field out."""
    fields = {
        "image": images.reshape(len(images), -1).T,
        "label_int": labels[None].astype(np.uint8),
        "label_one_of_n": np.eye(10)[labels].T,
        "human_readable_transform": np.zeros((6, len(labels))),
    } | changes
    stream = io.BytesIO()
    struct = {key: value for key, value in fields.items() if value is not None}
    savemat(stream, {name: struct}, do_compression=compress)
    return stream.getvalue()


def zipped(files):
    stream = io.BytesIO()
    with zipfile.ZipFile(stream, "w", zipfile.ZIP_DEFLATED) as archive:
        for name, content in files.items():
            archive.writestr(name, content)
    return stream.getvalue()


@pytest.fixture
def folder(tmp_path, monkeypatch, digits):
    """Where the files are looked for, and a data set of 320 images is taken for the whole one."""
    counts = np.bincount(digits[1], minlength=10).tolist()
    monkeypatch.setattr(affnist, "CLASS_COUNTS", tuple(counts))
    monkeypatch.setenv("CAPSRUN_DATA", str(tmp_path / "data"))
    path = tmp_path / "data" / "affNIST"
    path.mkdir(parents=True)
    return path


@pytest.fixture(scope="module")
def batches(digits):
    pieces = zip(*(np.split(array, 32) for array in digits))
    return {f"{n}.mat": mat(*piece) for n, piece in enumerate(pieces, 1)}


def in_folder(files):
    return {f"test_batches/{name}": content for name, content in files.items()}


# The whole as one file, or as 32 batches in the order of their numbers.
FORMS = {
    "compressed": lambda whole, _: {"test.mat": mat(*whole)},
    "plain": lambda whole, _: {"test.mat": mat(*whole, compress=False)},
    "zipped": lambda whole, _: {
        "test.mat.zip": zipped({"test.mat": mat(*whole), "__MACOSX/t.mat": b""})
    },
    "batches": lambda _, batches: batches,
    "zipped batches": lambda _, batches: {f"{n}.zip": zipped({n: b}) for n, b in batches.items()},
    "zip of batches": lambda _, batches: {"test_batches.zip": zipped(in_folder(batches))},
    "subfolder": lambda _, batches: in_folder(batches),
}


@pytest.mark.parametrize("form", FORMS)
def test_each_form_of_the_files_is_read(folder, digits, batches, form):
    (folder / "test_batches").mkdir()
    files = FORMS[form](digits, batches)
    for name, content in files.items():
        (folder / name).write_bytes(content)
    dataset, (images, labels) = load(), digits
    assert dataset.test.images_NCHW.dtype == torch.uint8
    assert torch.equal(dataset.test.images_NCHW[:, 0], torch.from_numpy(images))
    assert dataset.test.labels_N.tolist() == labels.tolist()
    assert len(dataset.train) == len(dataset.validation) == 0
    assert not any(source.verified for source in dataset.sources)
    with pytest.raises(UserError, match="for testing"):
        dataset.split("train")
    found = sum(path.is_file() for path in folder.rglob("*"))
    assert found == len(files), "nothing is unpacked to disk"


@pytest.mark.parametrize("place", ["test.mat (1).zip", "affnist/test.mat", "data/affNIST/Test.mat"])
def test_the_file_is_taken_where_people_have_it(folder, digits, place):
    (folder.parent / "test.mat").write_bytes(mat(*digits, "somethingElse"))
    path = folder.parent / place
    path.parent.mkdir(parents=True, exist_ok=True)
    content = mat(*digits)
    path.write_bytes(zipped({"test.mat": content}) if "zip" in place else content)
    dataset = load()
    assert len(dataset.test) == 320
    assert dataset.sources[0].name == str(path)


def test_missing_batches_are_named(folder, batches):
    for name, content in batches.items():
        if name not in ("7.mat", "31.mat"):
            (folder / name).write_bytes(content)
    with pytest.raises(UserError, match=r"lacks 7\.mat, 31\.mat"):
        load()


def shuffled(labels):
    return np.random.default_rng(0).permutation(labels)


THREE_AND_FIVE = np.array([0, 1, 2, 5, 4, 3, 6, 7, 8, 9])
TURNED = "turned, mirrored or transposed"


@pytest.mark.parametrize(
    ("damage", "message"),
    [
        (lambda i, n: mat(i, n)[:-1000], "damaged or cut short"),
        (lambda i, n: b"", "damaged or cut short"),
        (lambda i, n: b"no matlab file" * 99, "damaged or cut short"),
        (lambda i, n: mat(i, n, "somethingElse"), "lacks affNISTdata"),
        (lambda i, n: mat(i, n, image=None), "lacks affNISTdata with image"),
        (lambda i, n: mat(i, n, label_int=None), "lacks affNISTdata with image and label_int"),
        (lambda i, n: mat(i, n, image=i.reshape(len(i), -1)), r"array of \(320, 1600\)"),
        (lambda i, n: mat(i, n, image=i.reshape(len(i), -1).T / 255), "float64"),
        (lambda i, n: mat(i, n, image=np.array([["a", "b"]], object)), "images as an array of"),
        (lambda i, n: mat(i // 255, n), "no pixel brighter than 1"),
        (lambda i, n: mat(i[:-1], n), r"319 images and an array of \(320,\) labels"),
        (lambda i, n: mat(i, n, label_int=n[None] + 1), "labels other than 0 to 9"),
        (lambda i, n: mat(i, n, label_int=n[None] * 1.5), "labels other than 0 to 9"),
        (lambda i, n: mat(i, n, label_int=(n[None] + 1) % 10), "contradict each other"),
        (lambda i, n: mat(i, n, label_one_of_n=np.ones((10, len(n)))), "contradict each other"),
        (lambda i, n: mat(i[:310], n[:310]), "310 images.*has 320.*parts of it are missing"),
        (lambda i, n: mat(i, THREE_AND_FIVE[n]), "another order"),
        (lambda i, n: mat(i, np.where(n == 7, 3, n)), "another order"),
        (lambda i, n: mat(i, shuffled(n)), "labels do not belong"),
        (lambda i, n: mat(i[:, :, ::-1], n), TURNED),
        (lambda i, n: mat(i.transpose(0, 2, 1), n), TURNED),
        (lambda i, n: mat(i[:, ::-1], n), TURNED),
        (lambda i, n: mat(i[:, ::-1, ::-1], n), TURNED),
        (lambda i, n: mat(np.rot90(i, axes=(1, 2)), n), TURNED),
        (lambda i, n: zipped({"test.mat": mat(i, n)[:-99]}), "damaged or cut short"),
        (lambda i, n: zipped({"readme.txt": b"hello"}), r"holds no \.mat file"),
        (lambda i, n: zipped({"test.mat": mat(i, n)})[:-300], "damaged or cut short"),
        (lambda i, n: b"PK no zip", "damaged or cut short"),
    ],
    ids=[
        *("cut", "empty", "text", "other struct", "no images", "no labels", "matrix transposed"),
        *("floats", "cells", "0 to 1", "counts", "label 10", "fractions", "label orders"),
        *("all classes at once", "part", "3 and 5 exchanged", "nine digits", "labels shuffled"),
        *("mirrored", "transposed", "upside down", "half a turn", "quarter of a turn"),
        *("zip of cut", "zip of no mat", "zip cut", "no zip"),
    ],
)
def test_what_is_not_affnist_is_refused_by_name(folder, digits, damage, message, request):
    name = "test.mat.zip" if "zip" in request.node.callspec.id else "test.mat"
    (folder / name).write_bytes(damage(*digits))
    with pytest.raises(UserError, match=message) as caught:
        load()
    assert name in str(caught.value)


def test_a_file_that_is_too_large_is_not_read(folder, digits, monkeypatch):
    monkeypatch.setattr("capsrun.data.files.MOST_BYTES", 1000)
    (folder / "test.mat").write_bytes(mat(*digits))
    with pytest.raises(UserError, match=r"test\.mat holds more than 1\.0 kB"):
        load()


@pytest.mark.skipif(not MNIST_DIR.is_dir(), reason=f"no MNIST in {MNIST_DIR}")
def test_the_class_counts_are_those_of_mnist(monkeypatch):
    monkeypatch.setenv("CAPSRUN_DATA", str(MNIST_DIR))
    labels_N = load_data("mnist").test.labels_N
    assert tuple((32 * labels_N.bincount()).tolist()) == affnist.CLASS_COUNTS


def test_eval_and_data_of_affnist(folder, digits, tmp_path, capsys, monkeypatch):
    """From a checkpoint of padded MNIST, as a user does it; without the files nothing else."""
    run = train_config(*TINY, "dataset=mnist_padded", "dataset.source=mnist5k", "recipe.steps=2")
    train(run, tmp_path / "run")
    words = ["eval", "dataset=affnist", f"checkpoint={tmp_path / 'run'}"]
    monkeypatch.setattr(affnist, "URL", "http://127.0.0.1:9/test.mat.zip")
    assert cli.main(words) == 2
    message = capsys.readouterr().err
    assert "could not be downloaded" in message
    assert "dataset=affnist_like, which is made from MNIST and is not affNIST" in message
    assert not list(tmp_path.rglob("eval-*"))
    (folder / "test.mat").write_bytes(mat(*digits))
    assert cli.main(words) == 0
    assert capsys.readouterr().out.strip().splitlines()[-1].endswith("of 320)")
    assert (tmp_path / "run" / "eval-affnist-test" / "pictures" / "failures.png").exists()
    assert cli.main(["data", "dataset=affnist", f"out_dir={tmp_path / 'data-out'}"]) == 0
    assert "test.mat: MD5" in capsys.readouterr().out
    assert (tmp_path / "data-out" / "contact_sheet.png").exists()


@pytest.mark.parametrize("setting", ["dataset.shift_px=2", "dataset.image_px=28"])
def test_settings_that_do_not_fit(setting):
    with pytest.raises(UserError, match=r"no effect|sizes"):
        load(setting)
