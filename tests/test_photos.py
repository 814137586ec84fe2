"""CIFAR-10, SVHN and smallNORB: tiny data sets in the real formats, whole and damaged."""

import gzip
import hashlib
import io
import struct
import tarfile

import numpy as np
import pytest
import torch
from conftest import load_data as load
from conftest import make_model, train_config
from scipy.io import savemat
from torchvision import datasets

from capsrun import cli
from capsrun.data import official, smallnorb
from capsrun.data.splits import standardise
from capsrun.errors import UserError


@pytest.fixture
def data_dir(tmp_path, monkeypatch):
    monkeypatch.setenv("CAPSRUN_DATA", str(tmp_path))
    return tmp_path


def random_bytes(*shape):
    return np.random.default_rng(0).integers(0, 256, shape, dtype=np.uint8)


# CIFAR-10


@pytest.fixture
def cifar_files(data_dir, monkeypatch):
    """The content of each file, of 20 images."""
    monkeypatch.setattr(official, "CIFAR_RECORDS", 20)
    files = {}
    for number, name in enumerate(official.CIFAR_FILES):
        labels = (np.arange(20) + number).astype(np.uint8)[:, None] % 10
        files[name] = np.concatenate([labels, random_bytes(20, 3072)], 1).tobytes()
    return files


@pytest.fixture
def small_cifar(data_dir, monkeypatch, cifar_files):
    """The archive with its 20 images in each file, whose checksum is taken for CIFAR-10's."""
    stream = io.BytesIO()
    with tarfile.open(fileobj=stream, mode="w:gz") as tar:
        for name, content in cifar_files.items():
            info = tarfile.TarInfo(f"{official.CIFAR_FOLDER}/{name}")
            info.size = len(content)
            tar.addfile(info, io.BytesIO(content))
    path = data_dir / "cifar-10-binary.tar.gz"
    path.write_bytes(stream.getvalue())
    monkeypatch.setattr(official, "CIFAR_MD5", hashlib.md5(stream.getvalue()).hexdigest())
    return path


def test_cifar10_is_read_as_it_is_written(small_cifar):
    dataset = load("cifar10")
    assert (len(dataset.train), len(dataset.test)) == (100, 20)
    assert dataset.class_names[9] == "truck"
    assert dataset.train.labels_N[20:23].tolist() == [1, 2, 3]
    assert dataset.sources[0].verified
    # Red, green, blue planes, each row by row; of a test image its middle.
    first = random_bytes(20, 3072)[0].reshape(3, 32, 32)
    assert torch.equal(dataset.train.images_NCHW[0], torch.from_numpy(first))
    batch = dataset.test.batch(torch.tensor([0]))
    assert batch.images_BCHW.shape == (1, 3, 24, 24)
    middle = dataset.test.images_NCHW[0, :, 4:28, 4:28]
    torch.testing.assert_close(batch.targets_BTCHW[0, 0] * 255, middle.float())


def test_cifar10_from_its_folder(data_dir, cifar_files):
    folder = data_dir / official.CIFAR_FOLDER
    folder.mkdir()
    for name, content in cifar_files.items():
        (folder / name).write_bytes(content)
    dataset = load("cifar10")
    assert len(dataset.train) == 100
    assert not dataset.sources[0].verified
    good = cifar_files["data_batch_3.bin"]
    for content, message in ((good[:-1], "61,459 bytes"), (b"\x0a" + good[1:], "0 to 9")):
        (folder / "data_batch_3.bin").write_bytes(content)
        with pytest.raises(UserError, match=rf"data_batch_3\.bin .*{message}"):
            load("cifar10")


@pytest.mark.parametrize("place", [".", "CIFAR-10", f"data/cifar10/{official.CIFAR_FOLDER}"])
def test_cifar10_from_where_people_have_its_folder(data_dir, cifar_files, place):
    folder = data_dir / place
    folder.mkdir(parents=True, exist_ok=True)
    for name, content in cifar_files.items():
        (folder / name).write_bytes(content)
    dataset = load("cifar10")
    assert len(dataset.train) == 100
    assert dataset.sources[0].name == str(folder)


def test_cifar10_that_a_browser_unpacked(small_cifar):
    small_cifar.write_bytes(gzip.decompress(small_cifar.read_bytes()))
    dataset = load("cifar10")
    assert len(dataset.train) == 100
    assert not dataset.sources[0].verified


def test_damaged_cifar10_is_refused_by_name(small_cifar, monkeypatch):
    cut = small_cifar.read_bytes()[:-100]
    small_cifar.write_bytes(cut)
    with pytest.raises(UserError, match=r"cifar-10-binary.tar.gz is damaged.*MD5"):
        load("cifar10")
    # With the right checksum, but not the right content.
    monkeypatch.setattr(official, "CIFAR_MD5", hashlib.md5(cut).hexdigest())
    with pytest.raises(UserError, match=r"cifar-10-binary.tar.gz is damaged.*end"):
        load("cifar10")


# SVHN


def svhn_labels(count):
    return (np.arange(count) % 10 + 1)[:, None].astype(np.uint8)


def svhn_mat(count=30, **changes):
    values = {"X": random_bytes(32, 32, 3, count), "y": svhn_labels(count)}
    stream = io.BytesIO()
    savemat(stream, {k: v for k, v in (values | changes).items() if v is not None})
    return stream.getvalue()


@pytest.fixture
def put_svhn(data_dir, monkeypatch):
    """Writes the same for training and testing, and takes its checksum for SVHN's."""

    def put(content):
        folder = data_dir / "SVHN"
        folder.mkdir()
        for split in ("train", "test"):
            name = f"{split}_32x32.mat"
            (folder / name).write_bytes(content)
            resource = ["http://127.0.0.1:9/", name, hashlib.md5(content).hexdigest()]
            monkeypatch.setitem(datasets.SVHN.split_list, split, resource)
        return folder

    return put


def test_svhn_is_read_as_it_is_written(put_svhn):
    folder = put_svhn(svhn_mat())
    dataset = load("svhn")
    assert (len(dataset.train), len(dataset.test)) == (30, 30)
    assert dataset.train.labels_N[:10].tolist() == [1, 2, 3, 4, 5, 6, 7, 8, 9, 0]
    assert dataset.train.images_NCHW.shape == (30, 3, 32, 32)
    pixels = random_bytes(32, 32, 3, 30)
    assert dataset.train.images_NCHW[7, 2, 5, 9] == pixels[5, 9, 2, 7], "row, column, colour, image"
    assert all(source.verified for source in dataset.sources)
    (folder / "test_32x32.mat").write_bytes(svhn_mat(31))
    with pytest.raises(UserError, match=r"test_32x32\.mat is damaged"):
        load("svhn")


def test_svhn_from_where_torchvision_has_it(put_svhn, data_dir):
    folder = put_svhn(svhn_mat())
    for path in list(folder.iterdir()):
        path.rename(data_dir / path.name.replace(".", " (1)."))
    dataset = load("svhn")
    assert len(dataset.train) == 30
    assert dataset.sources[0].name == str(data_dir / "train_32x32 (1).mat")


@pytest.mark.parametrize(
    ("content", "message"),
    [
        (b"<!DOCTYPE html><title>404", "train_32x32.mat is a web page"),
        (svhn_mat()[:-500], "damaged or cut short"),
        (svhn_mat(X=None), "lacks X"),
        (svhn_mat(X=random_bytes(30, 32, 32, 3)), "images of 32×30×32, not 3×32×32"),
        (svhn_mat(y=np.full((30, 1), 11, np.uint8)), "y of 1 to 10"),
        (svhn_mat(29, y=svhn_labels(30)), "29 images but 30 labels"),
    ],
    ids=["web page", "cut", "no images", "other order", "class 11", "count"],
)
def test_what_is_not_svhn_is_refused_by_name(put_svhn, content, message):
    put_svhn(content)
    with pytest.raises(UserError, match=message) as caught:
        load("svhn")
    assert "train_32x32.mat" in str(caught.value)


# smallNORB


def matrix(array, magic=None):
    """smallNORB's own format, as its page describes it."""
    magic = magic or (smallnorb.BYTES if array.dtype == np.uint8 else smallnorb.INTEGERS)
    sizes = [*array.shape, *[1] * (3 - array.ndim)]
    return struct.pack(f"<II{len(sizes)}I", magic, array.ndim, *sizes) + array.tobytes()


IMAGES = random_bytes(4, 2, 96, 96)
LABELS = np.arange(4).astype("<i4")


def norb_files(images=None, labels=None, count=10):
    images = random_bytes(count, 2, 96, 96) if images is None else images
    labels = (np.arange(count) % 5).astype("<i4") if labels is None else labels
    return {name: matrix(images if "-dat" in name else labels) for name in smallnorb.MD5}


def put_norb(folder, monkeypatch, files):
    """Write the files, compressed, and take their checksums for smallNORB's."""
    for name, content in files.items():
        (folder / f"{name}.gz").write_bytes(gzip.compress(content))
        monkeypatch.setitem(smallnorb.MD5, name, (hashlib.md5(content).hexdigest(), "0" * 32))


@pytest.fixture
def small_norb(data_dir, monkeypatch):
    folder = data_dir / "smallNORB"
    folder.mkdir()
    put_norb(folder, monkeypatch, norb_files())
    return folder


def test_smallnorb_is_read_as_it_is_written(small_norb):
    dataset = load("smallnorb")
    assert (len(dataset.train), len(dataset.test)) == (10, 10)
    assert dataset.class_names == ("animal", "human", "airplane", "truck", "car")
    assert dataset.train.labels_N.tolist() == [0, 1, 2, 3, 4] * 2
    assert dataset.train.images_NCHW.shape == (10, 2, 48, 48)
    # Half the size, by the mean of four pixels; the two cameras apart.
    pixels = random_bytes(10, 2, 96, 96)[3, 1, 20:22, 40:42].astype(float)
    assert abs(int(dataset.train.images_NCHW[3, 1, 10, 20]) - pixels.mean()) <= 0.5
    batch = dataset.test.batch(torch.tensor([3]))
    assert batch.images_BCHW.shape == (1, 2, 32, 32)
    middle = dataset.test.images_NCHW[3, :, 8:40, 8:40]
    torch.testing.assert_close(batch.targets_BTCHW[0, 0] * 255, middle.float())


def test_smallnorb_uncompressed_and_with_another_checksum(small_norb):
    for path in list(small_norb.iterdir()):
        path.with_suffix("").write_bytes(gzip.decompress(path.read_bytes()))
        path.unlink()
    assert len(load("smallnorb").train) == 10
    name = f"{smallnorb.TEST}-dat.mat"
    (small_norb / name).unlink()
    (small_norb / f"{name}.gz").write_bytes(gzip.compress(norb_files(count=11)[name]))
    with pytest.raises(UserError, match="published MD5"):
        load("smallnorb")


@pytest.mark.parametrize(
    ("content", "message"),
    [
        (matrix(IMAGES, 0x1E3D4C51), "magic number"),
        (matrix(IMAGES)[:-1], "promises"),
        (b"", "magic number"),
        (struct.pack("<II4I", smallnorb.BYTES, 4, 10**9, 2, 96, 96), "promises"),
        (struct.pack("<II3I", smallnorb.BYTES, 400, 1, 1, 1), "400 dimensions"),
        (struct.pack("<II4I", smallnorb.BYTES, 4, 0, 2, 96, 96), "promises"),
    ],
    ids=["other type", "cut", "empty", "huge", "many dimensions", "no images"],
)
def test_damaged_matrices_are_refused_by_name(content, message):
    with pytest.raises(UserError, match=message) as caught:
        smallnorb.parse(content, smallnorb.BYTES, "some-dat.mat")
    assert "some-dat.mat" in str(caught.value)


@pytest.mark.parametrize(
    ("images", "labels", "message"),
    [
        (IMAGES[:, :1], LABELS, "images of 1×96×96, not 2×96×96"),
        (IMAGES[:3], LABELS, "3 images but 4 labels"),
        (IMAGES, LABELS + 2, "labels other than 0 to 4"),
    ],
)
def test_images_and_labels_of_smallnorb_must_belong_together(
    small_norb, monkeypatch, images, labels, message
):
    put_norb(small_norb, monkeypatch, norb_files(images, labels))
    with pytest.raises(UserError, match=message):
        load("smallnorb")


# The commands


@pytest.mark.parametrize(
    ("name", "files"), [("cifar10", "small_cifar"), ("smallnorb", "small_norb")]
)
def test_the_commands_on_photos(name, files, tmp_path, capsys, request):
    request.getfixturevalue(files)
    small = ["model.conv1_channels=4", "model.primary_types=2", "model.decoder_widths=[8]"]
    small += ["recipe.batch_size=4", "recipe.epochs=null", "recipe.steps=3"]
    dataset, run = f"dataset={name}", tmp_path / "runs" / "run"
    where = f"checkpoint={run / 'seed0'}"
    for arguments in (
        ["train", dataset, *small, f"runs_dir={run.parent}", "name=run"],
        ["eval", dataset, where],
        ["perturb", dataset, where, "perturb.digit=1"],
        ["data", dataset, f"out_dir={tmp_path / 'sheet'}"],
    ):
        assert cli.main(arguments) == 0, arguments
        assert "Traceback" not in capsys.readouterr().err
    assert (run / "seed0" / "pictures" / "confusion.png").exists()
    assert (tmp_path / "sheet" / "contact_sheet.png").exists()


# The networks of §7


@pytest.mark.parametrize(
    ("dataset", "model", "capsules", "parameters"),
    [
        # Conv1 9·9·3·256 + 256, PrimaryCaps 9·9·256·512 + 512, DigitCaps 9216·8·160 + 160
        ("cifar10", "capsnet_cifar10", 9216, 62_464 + 10_617_344 + 11_796_640),
        # 9·9·3·64 + 64, 9·9·64·96 + 96, 1024·6·80 + 80, and the decoder of 80 to 3·32·32 numbers
        ("svhn", "capsnet_svhn", 1024, 15_616 + 497_760 + 491_600 + 3_715_584),
        ("smallnorb", "capsnet", 2048, 41_728 + 5_308_672 + 1_310_800 + 2_665_984),
    ],
)
def test_the_networks_for_photos(dataset, model, capsules, parameters):
    config = train_config(f"dataset={dataset}", f"model={model}")
    network = make_model(config)
    assert network.primary_capsules == capsules
    assert sum(p.numel() for p in network.parameters()) == parameters
    px, channels = config.dataset.image_px, config.dataset.channels
    images = torch.rand(1, channels, px, px)
    images = standardise(images) if config.dataset.standardise else images
    output = network(images, torch.tensor([[1]]))
    assert output.lengths_BJ.shape == (1, config.dataset.classes)
    if config.model.reconstruction:
        assert output.reconstructions_BTCHW.shape == (1, 1, channels, px, px)
