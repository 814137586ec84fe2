"""Images of one's own: folders of pictures, idx files, tables; and what is wrong with some."""

import gzip
import io
import json
import os
import shutil
import struct
from pathlib import Path

import numpy as np
import pytest
import torch
from conftest import MNIST_DIR, TINY, load_data, train_config
from PIL import Image

import capsrun
from capsrun.data import found, load_dataset, own_data
from capsrun.errors import UserError
from capsrun.names import default_run, run_name, train_command

CPU = torch.device("cpu")
TINIER = [word for word in TINY if not word.startswith("dataset")] + ["recipe.steps=4"]


def picture(shade: int = 0, size: tuple[int, int] = (28, 28), mode: str = "L") -> Image.Image:
    """Random pixels, in shades of their own, so that no two are the same."""
    rows = np.random.default_rng(shade).integers(0, 256, (size[1], size[0], 3), np.uint8)
    if mode in ("L", "LA"):
        rows[:] = rows[..., :1]
    return Image.fromarray(rows).convert(mode)


def folder(root: Path, counts: dict[str, int], **of_pictures) -> Path:
    """A folder of so many pictures of each class; `train/cat`, say."""
    for number, (name, count) in enumerate(counts.items()):
        (root / name).mkdir(parents=True)
        for index in range(count):
            picture(10_000 * number + index, **of_pictures).save(root / name / f"{index}.png")
    return root


@pytest.fixture
def pets(tmp_path) -> Path:
    """Ten pictures each of two classes."""
    return folder(tmp_path / "pets", {"cat": 10, "dog": 10})


def config_of(kind: str, path: Path, *overrides: str):
    words = [f"dataset={kind}", f"dataset.path={path}", *overrides]
    return found(train_config(*words).dataset)


def load(kind: str, path: Path, *overrides: str):
    return load_dataset(config_of(kind, path, *overrides), CPU)


def message_of(kind: str, path: Path, *overrides: str) -> str:
    with pytest.raises(UserError) as error:
        load(kind, path, *overrides)
    assert "\n" not in str(error.value)
    return str(error.value)


def write_idx(path: Path, array: np.ndarray) -> None:
    sizes = b"".join(struct.pack(">I", size) for size in array.shape)
    content = struct.pack(">HBB", 0, 8, array.ndim) + sizes + array.astype(np.uint8).tobytes()
    path.write_bytes(gzip.compress(content) if path.suffix == ".gz" else content)


def some_digits(count: int = 40) -> tuple[np.ndarray, np.ndarray]:
    """Images (N, 28, 28) and labels, all ten classes among them."""
    train = load_data("mnist5k").train
    return train.images_NCHW[:count, 0].numpy(), train.labels_N[:count].numpy()


# ---- folders


def test_classes_channels_and_counts_are_found_out(pets):
    config = config_of("folder", pets)
    assert config.class_names == ["cat", "dog"]
    assert (config.classes, config.channels, config.image_px) == (2, 1, 28)
    assert (config.train_images, config.test_images) == (16, 4)
    data = load_dataset(config, CPU)
    assert (data.name, data.class_names) == ("pets", ("cat", "dog"))
    assert len(data.train) == 16
    assert data.test.labels_N.bincount().tolist() == [2, 2]


def test_pictures_of_the_size_of_the_network_keep_every_pixel(pets):
    data = load("folder", pets)
    pixels = {image.tobytes() for image in data.train.images_NCHW.numpy()}
    pixels |= {image.tobytes() for image in data.test.images_NCHW.numpy()}
    assert pixels == {np.asarray(Image.open(path)).tobytes() for path in pets.rglob("*.png")}


def test_the_folders_train_and_test_are_the_split(tmp_path):
    root = folder(tmp_path / "p", {"train/b": 3, "train/a": 4, "Test/a": 2, "Test/b": 2})
    (root / "train/a/notes.txt").write_text("no picture")
    (root / ".DS_Store").write_bytes(b"?")
    data = load("folder", root)
    assert data.class_names == ("a", "b")
    assert data.train.labels_N.bincount().tolist() == [4, 3]
    assert data.test.labels_N.bincount().tolist() == [2, 2]


def test_the_split_follows_split_seed_and_test_percent(pets):
    tested = load("folder", pets).test.images_NCHW
    assert load("folder", pets).test.images_NCHW.equal(tested)
    assert not load("folder", pets, "dataset.split_seed=1").test.images_NCHW.equal(tested)
    assert len(load("folder", pets, "dataset.test_percent=50").test) == 10


def test_classes_are_in_the_order_in_which_people_count(tmp_path):
    root = folder(tmp_path / "p", dict.fromkeys(("10", "9", "1", "b2", "b10"), 2))
    assert config_of("folder", root).class_names == ["1", "9", "10", "b2", "b10"]


def test_classes_may_be_renamed_and_put_in_order(pets):
    data = load("folder", pets)
    renamed = load("folder", pets, "dataset.class_names=[tom,rex]")
    assert renamed.class_names == ("tom", "rex")
    assert renamed.test.labels_N.equal(data.test.labels_N)
    turned = load("folder", pets, "dataset.class_names=[dog,cat]")
    assert turned.train.images_NCHW.equal(data.train.images_NCHW)
    assert turned.train.labels_N.equal(1 - data.train.labels_N)
    assert "are 3" in message_of("folder", pets, "dataset.class_names=[a,b,c]")
    assert "twice" in message_of("folder", pets, "dataset.class_names=[a,a]")


def test_mixed_modes_and_sizes_are_brought_to_one(tmp_path):
    root = folder(tmp_path / "p", {"a": 2, "b": 2})
    for number, mode in enumerate(("L", "LA", "1", "P", "RGBA", "CMYK", "I;16")):
        path = root / "ab"[number % 2] / f"mixed{number}.{'tif' if mode == 'CMYK' else 'png'}"
        if mode == "I;16":
            Image.fromarray(np.arange(1200, dtype=np.uint16).reshape(30, 40) * 50).save(path)
        else:
            picture(50 + number, (20 + 5 * number, 33), "RGB").convert(mode).save(path)
    config = config_of("folder", root, "dataset.image_px=32")
    assert config.channels == 3  # some are colourful
    assert load_dataset(config, CPU).train.images_NCHW.shape[1:] == (3, 32, 32)
    grey = load("folder", root, "dataset.channels=1")
    assert grey.train.images_NCHW.shape[1:] == (1, 28, 28)


def test_thousands_of_tiny_pictures_and_a_huge_one(tmp_path):
    root = folder(tmp_path / "p", {"a": 1000, "b": 1000}, size=(3, 2))
    Image.new("L", (6000, 4000), 200).save(root / "a/huge.jpg")
    Image.new("L", (20, 20), 200).resize((6000, 4000)).save(root / "b/huge.png")
    message = message_of("folder", root)
    assert "nothing in it stands out" in message  # it has one shade only
    data = load("folder", root, "dataset.faulty=skip")
    assert len(data.train) + len(data.test) == 2000
    for path in (root / "a/huge.jpg", root / "b/huge.png"):
        image = Image.new("L", (6000, 4000), 200)
        image.paste(0, (100, 100, 4000, 500))
        image.save(path)
    (root / "b/huge.png").unlink()
    data = load("folder", root)
    assert len(data.train) + len(data.test) == 2001


def test_the_same_picture_twice_is_on_one_side(tmp_path):
    root = folder(tmp_path / "p", {"a": 6, "b": 6})
    for path in sorted(root.rglob("*.png")):
        shutil.copy(path, path.with_name(f"copy_of_{path.name}"))
    data = load("folder", root)
    sides = [{*own_data.digests(part.images_NCHW)} for part in (data.train, data.test)]
    assert not sides[0] & sides[1]
    assert [len(side) for side in sides] == [10, 2]


def test_a_picture_of_two_classes_is_refused_or_kept_in_one(pets):
    shutil.copy(pets / "cat/3.png", pets / "dog/30.png")
    assert "of class cat" in message_of("folder", pets)
    assert "dog, too" in message_of("folder", pets)
    data = load("folder", pets, "dataset.faulty=skip")
    assert len(data.train) + len(data.test) == 20


def test_a_test_picture_that_is_trained_on_is_refused_or_left_out(tmp_path):
    root = folder(tmp_path / "p", {"train/a": 4, "train/b": 4, "test/a": 2, "test/b": 2})
    shutil.copy(root / "test/b/1.png", root / "train/b/again.png")
    message = message_of("folder", root)
    assert "1 training image of" in message
    assert "class b" in message
    assert "faulty=skip" in message
    assert len(load("folder", root, "dataset.faulty=skip").train) == 8


def test_a_damaged_picture_is_named_and_left_out_if_asked_for(pets, capsys):
    path = pets / "dog/3.png"
    path.write_bytes(path.read_bytes()[:300])
    (pets / "cat/4.png").write_bytes(b"")
    message = message_of("folder", pets)
    assert "cat/4.png" in message
    assert "dataset.faulty=skip" in message
    data = load("folder", pets, "dataset.faulty=skip")
    assert len(data.train) + len(data.test) == 18
    said = capsys.readouterr().err
    assert "left out: 2 pictures" in said
    assert "dog/3.png" in said


EMPTY = [
    ({}, (), "has no folders"),
    ({"a": 3}, (), "one class only, a"),
    ({"a": 3, "b": 0}, (), "the folder .*b has no pictures"),
    ({"a": 3, "b": 1}, (), "class b .* has one image only"),
    ({"train/a": 2, "train/b": 2, "test/a": 1, "test/c": 1}, (), "class c, which is not trained"),
    ({"test/a": 2, "test/b": 2}, (), "has no training images"),
    ({"a": 2, "b": 2}, ("dataset.classes=3",), "has 2 classes, but dataset.classes is 3"),
    ({"a": 2, "b": 2}, ("dataset.validation=2",), "has only 2"),
    ({"a": 2, "b": 2}, ("dataset.shift_px=28",), "can be moved by at most 27 px"),
]


@pytest.mark.parametrize(("counts", "overrides", "words"), EMPTY)
def test_folders_that_cannot_be_used(tmp_path, counts, overrides, words):
    (tmp_path / "p").mkdir()
    with pytest.raises(UserError, match=words):
        load("folder", folder(tmp_path / "p", counts), *overrides)


def test_pictures_without_folders_and_a_folder_that_is_not_there(tmp_path, pets):
    picture().save(tmp_path / "a.png")
    (tmp_path / "loose").mkdir()
    picture().save(tmp_path / "loose/a.png")
    assert "1 picture but no folders" in message_of("folder", tmp_path / "loose")
    assert "did you mean 'pets'" in message_of("folder", tmp_path / "pet")
    assert "is no folder" in message_of("folder", tmp_path / "a.png")
    with pytest.raises(UserError, match=r"dataset.path has no value: dataset.path=…"):
        train_config("dataset=folder")


def test_links_that_lead_out_are_refused_and_others_are_followed(tmp_path, pets):
    outside = folder(tmp_path / "outside", {"x": 2})
    (pets / "cat/inside.png").symlink_to(pets / "cat/0.png")
    assert len(load("folder", pets).train) == 17
    (pets / "cat/out.png").symlink_to(outside / "x/0.png")
    message = message_of("folder", pets)
    assert "cat/out.png is a link that leads out of" in message
    (pets / "cat/out.png").unlink()
    (pets / "bird").symlink_to(outside / "x")
    (pets / "cat/loop").symlink_to(pets)
    assert "bird is a link" in message_of("folder", pets)
    assert load("folder", pets, "dataset.faulty=skip").class_names == ("cat", "dog")


def test_names_that_are_not_utf8(pets):
    name = os.fsencode(pets) + b"/cat/caf\xe9.png"
    with open(name, "wb") as stream:
        picture(999).save(stream, "PNG")
    assert len(load("folder", pets).train) == 17
    with open(name, "wb") as stream:
        stream.write(b"no picture")
    message_of("folder", pets).encode()  # it can be printed
    os.rename(os.fsencode(pets) + b"/cat", os.fsencode(pets) + b"/ch\xe2t")
    assert "no text in UTF-8" in message_of("folder", pets)


# ---- idx


@pytest.mark.parametrize(
    ("prefix", "test", "ending"),
    [
        ("", "t10k", "-idx{}-ubyte"),
        ("", "t10k", "-idx{}-ubyte.gz"),
        ("", "test", ".idx{}-ubyte"),
        ("emnist-letters-", "test", "-idx{}-ubyte.gz"),
    ],
)
def test_idx_files_under_their_usual_names(tmp_path, prefix, test, ending):
    images, labels = some_digits()
    turned = prefix != ""
    for part, chosen in (("train", slice(0, 30)), (test, slice(30, 40))):
        stored = images[chosen].transpose(0, 2, 1) if turned else images[chosen]
        write_idx(tmp_path / f"{prefix}{part}-images{ending.format(3)}", stored)
        write_idx(tmp_path / f"{prefix}{part}-labels{ending.format(1)}", labels[chosen] + turned)
    if turned:
        lines = "".join(f"{n} {64 + n} {96 + n}\n" for n in range(1, 27))
        (tmp_path / "emnist-letters-mapping.txt").write_text(lines)
    data = load("idx", tmp_path, f"dataset.transposed={str(turned).lower()}")
    assert data.class_names == (tuple("ABCDEFGHIJ") if turned else tuple("0123456789"))
    assert data.train.images_NCHW[:, 0].equal(torch.from_numpy(images[:30]))
    assert data.train.labels_N.tolist() == labels[:30].tolist()
    assert len(data.test) == 10


@pytest.mark.skipif(not (MNIST_DIR / "MNIST").is_dir(), reason="needs MNIST's files")
def test_mnists_own_files_are_the_same_images_in_the_same_order():
    official = load_data("mnist", f"dataset.data_dir={MNIST_DIR}")
    ours = load("idx", MNIST_DIR / "MNIST" / "raw")
    for split in ("train", "test"):
        for part in ("images_NCHW", "labels_N"):
            stored = [getattr(getattr(data, split), part) for data in (official, ours)]
            assert torch.equal(*stored)


def test_idx_files_that_cannot_be_used(tmp_path):
    images, labels = some_digits()
    assert "has no idx files" in message_of("idx", tmp_path)
    write_idx(tmp_path / "train-images-idx3-ubyte", images)
    assert "no idx file of the labels of its train images" in message_of("idx", tmp_path)
    write_idx(tmp_path / "train-labels-idx1-ubyte", labels[:-1])
    assert "40 train images but 39 labels" in message_of("idx", tmp_path)
    write_idx(tmp_path / "train-labels-idx1-ubyte", labels)
    (tmp_path / "t10k-images-idx3-ubyte").write_bytes(b"\0\0\x08\x03")
    write_idx(tmp_path / "t10k-labels-idx1-ubyte", labels)
    message = message_of("idx", tmp_path)
    assert "damaged or cut short" in message
    assert "download" not in message
    assert "delete" not in message
    write_idx(tmp_path / "t10k-images-idx3-ubyte", images[::-1] // 2)
    write_idx(tmp_path / "t10k-labels-idx1-ubyte", labels + 20)
    assert "which is not trained" in message_of("idx", tmp_path)
    write_idx(tmp_path / "other-train-images-idx3-ubyte", images)
    assert "files of several data sets" in message_of("idx", tmp_path)


# ---- tables


def write_csv(path: Path, rows, header: list[str] | None = None) -> Path:
    lines = [header] if header else []
    path.write_text("\n".join(",".join(map(str, line)) for line in [*lines, *rows]) + "\n")
    return path


def csv_rows(labels, images) -> list[list]:
    return [[label, *image.reshape(-1)] for label, image in zip(labels, images)]


@pytest.mark.parametrize("header", [True, False])
def test_csv_with_a_header_or_without(tmp_path, header):
    images, labels = some_digits(60)
    names = ["label", *(f"pixel{n}" for n in range(784))] if header else None
    data = load("table", write_csv(tmp_path / "t.csv", csv_rows(labels, images), names))
    assert data.class_names == tuple("0123456789")
    assert len(data.train) + len(data.test) == 60
    both = torch.cat([data.train.images_NCHW, data.test.images_NCHW])
    assert {*own_data.digests(both[:, 0])} == {*own_data.digests(torch.from_numpy(images))}


def test_csv_with_words_as_labels_and_the_label_in_another_column(tmp_path):
    images, labels = some_digits()
    words = np.where(labels % 2, "odd", "even")
    rows = [[*image.reshape(-1), word] for image, word in zip(images, words)]
    path = write_csv(tmp_path / "t.csv", rows, [*map(str, range(784)), "class"])
    assert load("table", path).class_names == ("even", "odd")
    path = write_csv(tmp_path / "u.csv", csv_rows(words, images))
    assert load("table", path).class_names == ("even", "odd")


def test_kaggle_tests_without_labels_are_left_out(tmp_path, capsys):
    images, labels = some_digits()
    names = [f"pixel{n}" for n in range(784)]
    write_csv(tmp_path / "train.csv", csv_rows(labels, images), ["label", *names])
    write_csv(tmp_path / "test.csv", [image.reshape(-1) for image in images], names)
    data = load("table", tmp_path)
    assert len(data.train) + len(data.test) == 40
    assert "test.csv has no column label" in capsys.readouterr().err


def test_csv_that_cannot_be_used(tmp_path):
    images, labels = some_digits(20)
    rows = csv_rows(labels, images)
    path = write_csv(tmp_path / "t.csv", [*rows, rows[0][:100]])
    assert "damaged or cut short" in message_of("table", path)
    assert "no square" in message_of("table", write_csv(path, [row[:700] for row in rows]))
    rows[3][5] = 300
    assert "pixels from 0 to 300" in message_of("table", write_csv(path, rows))
    path.write_text("")
    assert "t.csv" in message_of("table", path)


@pytest.mark.parametrize("as_floats", [False, True])
def test_keras_npz(tmp_path, as_floats):
    images, labels = some_digits()
    stored = (images / 255).astype(np.float32)[..., None] if as_floats else images
    path = tmp_path / "mnist.npz"
    arrays = {"x_train": stored[:30], "y_train": labels[:30], "x_test": stored[30:]}
    np.savez(path, **arrays, y_test=np.eye(10)[labels[30:]] if as_floats else labels[30:])
    data = load("table", path)
    assert data.train.images_NCHW[:, 0].equal(torch.from_numpy(images[:30]))
    assert data.test.labels_N.tolist() == labels[30:].tolist()


def test_npz_with_pickled_objects_is_refused(tmp_path):
    class Planted:
        def __reduce__(self):
            return os.mkdir, (str(tmp_path / "planted"),)

    path = tmp_path / "t.npz"
    np.savez(path, x_train=np.array([Planted(), None]), y_train=np.array([0, 1]))
    assert "pickled objects" in message_of("table", path)
    assert not (tmp_path / "planted").exists()


def test_npz_that_cannot_be_used(tmp_path):
    images, labels = some_digits()
    path = tmp_path / "t.npz"
    np.savez(path, a=images)
    assert "holds a, and no arrays of images and labels" in message_of("table", path)
    np.savez(path, images=images, labels=labels[:-1])
    assert "40 images, but labels of shape (39, 1)" in message_of("table", path)
    np.savez(path, images=images.astype(np.float32) - 1, labels=labels)
    assert "pixels from -1 to" in message_of("table", path)
    np.savez(path, images=images, labels=labels + 0.5)
    assert "no whole numbers" in message_of("table", path)
    path.write_bytes(b"PK\x03\x04 cut short")
    assert "damaged or cut short" in message_of("table", path)


def test_labels_beyond_the_classes(tmp_path):
    images, labels = some_digits()
    path = tmp_path / "t.npz"
    np.savez(path, images=images, labels=labels + 7 * (labels == 9))
    assert load("table", path).class_names == (*"012345678", "16")
    path2 = tmp_path / "u.npz"
    np.savez(path2, x_train=images, y_train=labels % 5, x_test=255 - images, y_test=labels)
    assert "which is not trained" in message_of("table", path2)
    assert "dataset.classes is 3" in message_of("table", path, "dataset.classes=3")


def test_parquet_of_hugging_face(tmp_path):
    pyarrow = pytest.importorskip("pyarrow", reason="needs pyarrow")
    from pyarrow import parquet

    images, labels = some_digits()

    def as_file(image):
        stream = io.BytesIO()
        Image.fromarray(image).save(stream, "PNG")
        return {"bytes": stream.getvalue(), "path": None}

    names = ["zero", "one", "two", "three", "four", "five", "six", "seven", "eight", "nine"]
    features = {"image": {"_type": "Image"}, "label": {"names": names, "_type": "ClassLabel"}}
    (tmp_path / "data").mkdir()
    for part, chosen in (("train", slice(0, 30)), ("test", slice(30, 40))):
        columns = {"image": [as_file(i) for i in images[chosen]], "label": labels[chosen]}
        table = pyarrow.table(columns).replace_schema_metadata(
            {"huggingface": json.dumps({"info": {"features": features}})}
        )
        parquet.write_table(table, tmp_path / f"data/{part}-00000-of-00001.parquet")
    data = load("table", tmp_path)
    assert data.class_names == tuple(names)
    assert data.train.images_NCHW[:, 0].equal(torch.from_numpy(images[:30]))
    assert data.test.labels_N.tolist() == labels[30:].tolist()
    assert "no table" in message_of("table", folder(tmp_path / "empty", {"a": 1}))


def test_colours_and_other_shapes_of_arrays(tmp_path):
    rng = np.random.default_rng(0)
    images = rng.integers(0, 256, (12, 20, 30, 3), np.uint8)
    path = tmp_path / "t.npz"
    np.savez(path, images=images, labels=np.arange(12) % 2)
    config = config_of("table", path)
    assert (config.channels, config.image_px) == (3, 30)
    data = load_dataset(config, CPU)
    image = data.train.images_NCHW[0]
    assert image.shape == (3, 30, 30)
    assert not image[:, :5].any()
    assert not image[:, -5:].any()
    assert load("table", path, "dataset.channels=1").train.images_NCHW.shape[1:] == (1, 30, 30)
    assert load("table", path, "dataset.image_px=16").train.images_NCHW.shape[1:] == (3, 16, 16)


# ---- what becomes of them


def test_a_run_is_named_after_the_folder(pets):
    words = ["dataset=folder", f"dataset.path={pets}", "dataset.image_px=32"]
    config = capsrun.training_config(*words)
    name = run_name(config, words)
    assert name == "pets-capsnet-quick+dataset.image_px-32"
    assert default_run(config.dataset, "test", 0) == f"{name}/seed0"
    command = f"capsrun train dataset=folder dataset.path={pets} dataset.image_px=32"
    assert train_command(config.dataset) == command


def test_the_commands_from_a_folder_to_predictions(in_tmp, printed, refused, pets):
    chosen = ["dataset=folder", f"dataset.path={pets}"]
    assert any("cat" in line for line in printed("data", *chosen))
    lines = printed("train", *chosen, *TINIER, "name=pets")
    assert lines[-1].startswith("test error")
    assert printed("train", *chosen, *TINIER, "name=pets")[0].endswith("delete it to train anew")
    run = ["checkpoint=runs/pets/seed0"]
    assert printed("eval", *chosen, *run)[-1].startswith("test error")
    result = json.loads(Path("runs/pets/seed0/result.json").read_text())
    assert result["dataset"] == "pets"
    assert set(result["errors_by_class"]) == {"cat", "dog"}
    assert result["config"]["dataset"]["class_names"] == ["cat", "dog"]
    lines = printed("perturb", *chosen, *run, "perturb.digit=dog", "perturb.step=0.25")
    assert any("class_1_dog.png" in line for line in lines)
    assert "the classes are cat, dog" in refused("perturb", *chosen, *run, "perturb.digit=bird")
    printed("explore", *chosen, *run)
    assert '"classNames": ["cat", "dog"]' in Path("runs/pets/seed0/explore-pets.html").read_text()
    lines = printed("predict", str(pets / "cat/0.png"), str(pets / "dog"), *run)
    assert sum(str(pets) in line for line in lines if ".png" in line) >= 11
    assert any("pets" in line for line in printed("list"))
    # Without the pictures there are still the report, and the network that can be used.
    shutil.rmtree(pets / "cat")
    printed("report")
    assert "Trained on pets" in Path("runs/report/report.md").read_text()
    assert printed("predict", str(pets / "dog/0.png"), *run)


def test_a_network_is_tested_on_what_it_was_made_for(in_tmp, printed, refused, pets):
    chosen = ["dataset=folder", f"dataset.path={pets}"]
    printed("train", *chosen, *TINIER, "name=pets")
    run = ["checkpoint=runs/pets/seed0"]
    others = folder(pets.parent / "others", {"cat": 4, "cow": 4})
    message = refused("eval", "dataset=folder", f"dataset.path={others}", *run)
    assert "the classes of" in message
    assert "cat, cow" in message
    message = refused("eval", *chosen, *run, "dataset.split_seed=3")
    assert "dataset.split_seed=0" in message
    message = refused("eval", *run)
    assert f"dataset=folder dataset.path={pets}" in message
    # Other pictures of the same classes are as good; that they are others is said.
    more = folder(pets.parent / "more", {"cat": 6, "dog": 4})
    printed("eval", "dataset=folder", f"dataset.path={more}", *run, "dataset.split_seed=3")
    # More pictures in the same place make another run.
    picture(5000).save(pets / "cat/new.png")
    assert "train_images" in refused("train", *chosen, *TINIER, "name=pets")


def test_a_file_of_ones_own_for_a_data_set(in_tmp, printed, refused, pets):
    Path("conf/dataset").mkdir(parents=True)
    text = f"defaults: [folder, _self_]\npath: {pets}\nimage_px: 32\n"
    Path("conf/dataset/animals.yaml").write_text(text)
    words = ["dataset=animals", "--config-dir", "conf"]
    message = refused("eval", *words)
    assert "no checkpoint runs/animals-capsnet-quick/seed0" in message
    assert "`capsrun train dataset=animals" in message
    printed("train", *words, *TINIER, "name=animals-capsnet-quick")
    assert printed("eval", *words)[-1].startswith("test error")


def test_files_that_changed_since_are_not_tested_on(in_tmp, printed, refused, pets):
    """Of other files others are drawn, of which some were trained on."""
    chosen = ["dataset=folder", f"dataset.path={pets}"]
    printed("train", *chosen, *TINIER, "name=pets")
    run = ["checkpoint=runs/pets/seed0"]
    before = load("folder", pets)
    (pets / "cat/3.png").unlink()
    for words in (["eval", *chosen, *run], ["explore", *chosen, *run]):
        assert "are not those that the model was trained on" in refused(*words)
    message = refused("train", *chosen, *TINIER, "name=more", "init=runs/pets/seed0")
    assert "are not those that init=… was trained on" in message
    # Hardly another image is drawn than before.
    tested = {*own_data.digests(load("folder", pets).test.images_NCHW)}
    trained = {*own_data.digests(before.train.images_NCHW)}
    assert len(tested & trained) <= 1


def test_what_weights_have_seen_is_known_after_another_training(in_tmp, printed, refused, pets):
    chosen = ["dataset=folder", f"dataset.path={pets}"]
    others = folder(pets.parent / "others", {"a": 4, "b": 4}, size=(20, 20))
    printed("train", *chosen, *TINIER, "name=first")
    words = ["dataset=folder", f"dataset.path={others}", *TINIER, "init=runs/first/seed0"]
    printed("train", *words, "name=second")
    again = ["train", *chosen, *TINIER, "init=runs/second/seed0", "name=third"]
    assert "say dataset.split_seed=0" in refused(*again, "dataset.split_seed=1")
    printed(*again)


def test_a_model_is_tested_where_its_pictures_are_not_any_more(in_tmp, printed, pets):
    printed("train", "dataset=folder", f"dataset.path={pets}", *TINIER, "name=pets")
    shutil.copytree(pets, "copy")
    shutil.rmtree(pets)
    lines = printed("eval", "dataset=folder", "dataset.path=copy", "checkpoint=runs/pets/seed0")
    assert lines[-1].startswith("test error")


@pytest.mark.parametrize("name", ["training_set", "trainImages", "Training", "train-data"])
def test_folders_of_a_split_under_other_names(tmp_path, name):
    test = name.replace("rain", "est").replace("Testing", "Testing")
    root = folder(tmp_path / "p", {f"{name}/a": 3, f"{name}/b": 3, f"{test}/a": 1, f"{test}/b": 1})
    data = load("folder", root)
    assert (data.class_names, len(data.train), len(data.test)) == (("a", "b"), 6, 2)


def test_a_class_may_be_called_train(tmp_path):
    root = folder(tmp_path / "p", {"bus": 3, "car": 3, "train": 3})
    assert load("folder", root).class_names == ("bus", "car", "train")


def test_validation_images_are_tested_on_where_there_are_no_others(tmp_path, capsys):
    counts = {f"{part}/{name}": 3 for part in ("train", "val") for name in "ab"}
    root = folder(tmp_path / "p", counts)
    assert len(load("folder", root).test) == 6
    assert "validation images are tested on" in capsys.readouterr().err
    folder(root, {"test/a": 1, "test/b": 1}, size=(9, 9))
    assert len(load("folder", root).test) == 2
    images, labels = some_digits()
    parts = {"x_train": images[:20], "y_train": labels[:20], "x_val": images[20:]}
    np.savez(tmp_path / "t.npz", **parts, y_val=labels[20:] % 5 * 0 + labels[0])
    assert len(load("table", tmp_path / "t.npz").test) == 20


def test_odd_names_and_sizes_of_classes(tmp_path):
    root = folder(tmp_path / "p", {"${x}": 2, "b": 2})
    assert "a class cannot be called ${x}" in message_of("folder", root)
    assert load("folder", root, "dataset.class_names=[a,b]").class_names == ("a", "b")
    assert "as in dataset.image_px=28" in message_of("folder", root, "dataset.image_px=0")


def test_labels_that_csv_readers_stumble_over(tmp_path):
    images, _ = some_digits()
    labels = np.array(["C#", "C", "D"])[np.arange(40) % 3]
    rows = csv_rows(labels, images)
    assert load("table", write_csv(tmp_path / "t.csv", rows)).class_names == ("C", "C#", "D")
    text = (tmp_path / "t.csv").read_text().replace("\n", "\n\n")
    (tmp_path / "t.csv").write_text("\n" + text)
    assert load("table", tmp_path / "t.csv").class_names == ("C", "C#", "D")
    rows[5][0] = ""
    assert "row 5 of" in message_of("table", write_csv(tmp_path / "t.csv", rows))
    for part, ending in (("train", ""), ("test", ".0")):
        chosen = csv_rows([f"{n % 2}{ending}" for n in range(20)], images[20 * (part == "test") :])
        write_csv(tmp_path / f"{part}.csv", chosen[:20])
    (tmp_path / "t.csv").unlink()
    assert load("table", tmp_path).class_names == ("0", "1")


def test_what_lies_beside_tables_is_not_read(tmp_path):
    images, labels = some_digits()
    path = write_csv(tmp_path / "train.csv", csv_rows(labels, images))
    (tmp_path / "train.csv.gz").write_bytes(gzip.compress(path.read_bytes()))
    (tmp_path / ".ipynb_checkpoints").mkdir()
    shutil.copy(path, tmp_path / ".ipynb_checkpoints/train-checkpoint.csv")
    (tmp_path / "._train.csv").write_bytes(b"\0\5\x16\7")
    write_csv(tmp_path / "sample_submission.csv", [[1, 0], [2, 0]], ["ImageId", "Label"])
    data = load("table", tmp_path)
    assert len(data.train) + len(data.test) == 40


def test_ink_and_no_ink_as_pixels(tmp_path):
    images, labels = some_digits()
    for ink in (images > 127, (images > 127).astype(np.int64)):
        np.savez(tmp_path / "t.npz", x=ink, y=labels)
        assert load("table", tmp_path / "t.npz").train.images_NCHW.unique().tolist() == [0, 255]


def test_parquet_without_labels_and_with_other_pictures(tmp_path):
    pyarrow = pytest.importorskip("pyarrow", reason="needs pyarrow")
    from pyarrow import parquet

    images, labels = some_digits()

    def write(name: str, pictures, labels) -> None:
        streams = [io.BytesIO() for _ in pictures]
        for picture_, stream in zip(pictures, streams):
            picture_.save(stream, "PNG")
        columns = {"image": [{"bytes": stream.getvalue()} for stream in streams], "label": labels}
        features = {"label": {"names": [*"0123456789"], "_type": "ClassLabel"}}
        facts = {"huggingface": json.dumps({"info": {"features": features}})}
        table = pyarrow.table(columns).replace_schema_metadata(facts)
        parquet.write_table(table, tmp_path / name)

    write(
        "train.parquet",
        map_to_16_bits := [Image.fromarray(image.astype(np.uint16) * 257) for image in images],
        labels,
    )
    write("test.parquet", map_to_16_bits, [-1] * 40)
    data = load("table", tmp_path)
    assert len(data.train) + len(data.test) == 40
    assert int(data.train.images_NCHW.float().mean()) in range(20, 45)
    write("train.parquet", map_to_16_bits, [*labels[:-1], 12])
    assert "row 39 of" in message_of("table", tmp_path)


def test_three_hundred_classes_are_drawn_in_seconds():
    from capsrun.report.figures import confusion_matrix

    names = [f"class {number}" for number in range(300)]
    figure = confusion_matrix(torch.eye(300, dtype=torch.long), names, "many")
    assert max(figure.get_size_inches()) < 30
