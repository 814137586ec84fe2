"""The official files of affNIST: read as they are, refused by name when they are not what they
should be, downloaded when missing. They are made here of real digits, in the real format."""

import http.server
import io
import threading
import zipfile

import numpy as np
import pytest
import torch
from conftest import MNIST_DIR, TINY, train_config
from scipy.io import savemat

from capsrun import cli
from capsrun.commands.train import train
from capsrun.data import affnist, download, load_dataset
from capsrun.errors import UserError

CPU = torch.device("cpu")
COUNT = 320


@pytest.fixture(scope="module")
def digits():
    """320 digits of 40×40 px in random places: images (N, 40, 40), labels (N,)."""
    config = train_config("dataset=affnist_like", "dataset.source=mnist5k").dataset
    test = load_dataset(config, CPU).test
    batch = test.batch(test.indices(0, COUNT))
    images = (batch.images_BCHW[:, 0] * 255).round().to(torch.uint8)
    return images.numpy(), batch.labels_BT[:, 0].numpy()


def counts(labels):
    return tuple(np.bincount(labels, minlength=10).tolist())


def struct(images, labels, **changes):
    """The fields of `affNISTdata`, as MATLAB's struct has them."""
    fields = {
        "image": images.reshape(len(images), -1).T,
        "label_int": labels[None].astype(np.uint8),
        "label_one_of_n": np.eye(10)[labels].T,
        "human_readable_transform": np.zeros((6, len(labels))),
    }
    return {key: value for key, value in (fields | changes).items() if value is not None}


def mat(fields, name="affNISTdata", compress=True):
    stream = io.BytesIO()
    savemat(stream, {name: fields}, do_compression=compress)
    return stream.getvalue()


def zipped(**members):
    stream = io.BytesIO()
    with zipfile.ZipFile(stream, "w", zipfile.ZIP_DEFLATED) as archive:
        for name, content in members.items():
            archive.writestr(name, content)
    return stream.getvalue()


def encrypted(content):
    """A zip whose member is marked as encrypted."""
    archive = bytearray(zipped(**{"test.mat": content}))
    for magic, flags in ((b"PK\x03\x04", 6), (b"PK\x01\x02", 8)):
        archive[archive.index(magic) + flags] |= 1
    return bytes(archive)


@pytest.fixture
def folder(tmp_path, monkeypatch, digits):
    """Where the files are looked for, and a data set of 320 images is taken for the whole one."""
    monkeypatch.setattr(affnist, "CLASS_COUNTS", counts(digits[1]))
    monkeypatch.setenv("CAPSRUN_DATA", str(tmp_path / "data"))
    path = tmp_path / "data" / "affNIST"
    path.mkdir(parents=True)
    return path


def load():
    return load_dataset(train_config("dataset=affnist").dataset, CPU)


def assert_right(dataset, digits):
    images, labels = digits
    assert dataset.test.images_NCHW.dtype == torch.uint8
    assert torch.equal(dataset.test.images_NCHW[:, 0], torch.from_numpy(images))
    assert dataset.test.labels_N.tolist() == labels.tolist()
    assert len(dataset.train) == len(dataset.validation) == 0


@pytest.mark.parametrize("compress", [True, False])
def test_one_file(folder, digits, compress):
    (folder / "test.mat").write_bytes(mat(struct(*digits), compress=compress))
    assert_right(load(), digits)


def test_one_zip(folder, digits):
    (folder / "test.mat.zip").write_bytes(zipped(**{"test.mat": mat(struct(*digits))}))
    dataset = load()
    assert_right(dataset, digits)
    assert not (folder / "test.mat").exists(), "nothing is unpacked to disk"
    assert [source.verified for source in dataset.sources] == [False]


def batches(digits):
    images, labels = digits
    pieces = zip(np.split(images, 32), np.split(labels, 32))
    return {f"{n}.mat": mat(struct(*piece)) for n, piece in enumerate(pieces, 1)}


@pytest.mark.parametrize("form", ["files", "zips", "one zip", "subfolder", "zip with folder"])
def test_32_batches_in_the_order_of_their_numbers(folder, digits, form):
    files = batches(digits)
    if form == "one zip":
        (folder / "test_batches.zip").write_bytes(zipped(**files))
    elif form == "zip with folder":
        inside = {f"test_batches/{name}": content for name, content in files.items()}
        (folder / "test_batches.zip").write_bytes(zipped(**inside))
    else:
        place = folder / "test_batches" if form == "subfolder" else folder
        place.mkdir(exist_ok=True)
        for name, content in files.items():
            if form == "zips":
                (place / f"{name}.zip").write_bytes(zipped(**{name: content}))
            else:
                (place / name).write_bytes(content)
    assert_right(load(), digits)


def test_missing_batches_are_named(folder, digits):
    for name, content in batches(digits).items():
        if name not in ("7.mat", "31.mat"):
            (folder / name).write_bytes(content)
    with pytest.raises(UserError, match=r"lacks 7\.mat, 31\.mat"):
        load()


def transposed(images):
    return images.transpose(0, 2, 1)


@pytest.mark.parametrize(
    ("damage", "message"),
    [
        (lambda i, n: mat(struct(i, n))[:-1000], "damaged, cut short"),
        (lambda i, n: b"", "damaged, cut short"),
        (lambda i, n: b"no matlab file" * 99, "damaged, cut short"),
        (lambda i, n: mat(struct(i, n), "somethingElse"), "no struct affNISTdata"),
        (lambda i, n: mat(np.zeros((3, 3)), "affNISTdata"), "no struct affNISTdata"),
        (lambda i, n: mat(struct(i, n, image=None)), "lacks image"),
        (lambda i, n: mat(struct(i, n, label_int=None)), "lacks label_int"),
        (lambda i, n: mat(struct(i, n, image=i.reshape(len(i), -1))), r"\(320, 1600\).*transposed"),
        (lambda i, n: mat(struct(i, n, image=i.reshape(len(i), -1).T / 255)), "not uint8"),
        (lambda i, n: mat(struct(i // 255, n)), "no pixel brighter than 1"),
        (lambda i, n: mat(struct(i[:-1], n)), "319 images but 320 labels"),
        (lambda i, n: mat(struct(i, n, label_int=n[None] + 1)), "labels other than 0 to 9"),
        (lambda i, n: mat(struct(i, n, label_int=n[None] * 1.5)), "labels other than 0 to 9"),
        (lambda i, n: mat(struct(i, n, label_int=(n[None] + 1) % 10)), "contradict each other"),
        (lambda i, n: mat(struct(i, n, label_one_of_n=np.ones((10, len(n))))), "contradict"),
        (lambda i, n: mat(struct(i, n, image=np.array([["a", "b"]], object))), "lacks image"),
        (lambda i, n: mat(struct(i[:310], n[:310])), "310 images; .* has 320"),
        (lambda i, n: mat(struct(i, np.array([0, 1, 2, 5, 4, 3, 6, 7, 8, 9])[n])), "another order"),
        (lambda i, n: mat(struct(i[:, :, ::-1], n)), "mirrored"),
        (lambda i, n: mat(struct(transposed(i), n)), "turned, mirrored or transposed"),
        (lambda i, n: mat(struct(i[:, ::-1], n)), "turned, mirrored or transposed"),
        (lambda i, n: mat(struct(i, np.roll(n, 1))), "labels do not belong"),
        (lambda i, n: mat(struct(i, np.where(n == 7, 3, n))), "another order"),
    ],
    ids=[
        "cut",
        "empty",
        "text",
        "other struct",
        "no struct",
        "no images",
        "no labels",
        "matrix transposed",
        "floats",
        "0 to 1",
        "counts",
        "label 10",
        "fractions",
        "label orders",
        "all classes at once",
        "cells",
        "part",
        "3 and 5 exchanged",
        "mirrored",
        "images transposed",
        "upside down",
        "labels shifted",
        "nine digits",
    ],
)
def test_what_is_not_affnist_is_refused_by_name(folder, digits, damage, message):
    (folder / "test.mat").write_bytes(damage(*digits))
    with pytest.raises(UserError, match=message) as caught:
        load()
    assert "test.mat" in str(caught.value)


def test_a_short_batch_is_named(folder, digits):
    files = batches(digits)
    images, labels = digits
    files["9.mat"] = mat(struct(images[80:88], labels[80:88]))
    for name, content in files.items():
        (folder / name).write_bytes(content)
    with pytest.raises(UserError, match=r"9\.mat holds 8 images"):
        load()


def test_other_parts_of_affnist_are_not_taken_for_the_test_set(folder, digits, monkeypatch):
    """Its validation set looks alike, and only how many images a class has tells them apart."""
    images, labels = digits
    (folder / "test.mat").write_bytes(mat(struct(images, labels)))
    others = np.array(counts(labels)) + np.array([3, -3, 0, 0, 0, 0, 0, 0, 0, 0])
    monkeypatch.setattr(affnist, "CLASS_COUNTS", tuple(others.tolist()))
    with pytest.raises(UserError, match="another set"):
        load()


@pytest.mark.skipif(not MNIST_DIR.is_dir(), reason=f"no MNIST in {MNIST_DIR}")
def test_the_class_counts_are_those_of_mnist(monkeypatch):
    monkeypatch.setenv("CAPSRUN_DATA", str(MNIST_DIR))
    test = load_dataset(train_config("dataset=mnist").dataset, CPU).test
    assert tuple((32 * test.labels_N.bincount()).tolist()) == affnist.CLASS_COUNTS


def test_eval_and_data_of_affnist(folder, digits, tmp_path, capsys):
    """From a checkpoint of padded MNIST, as a user does it."""
    (folder / "test.mat").write_bytes(mat(struct(*digits)))
    run = train_config(*TINY, "dataset=mnist_padded", "dataset.source=mnist5k", "recipe.steps=2")
    train(run, tmp_path / "run")
    assert cli.main(["eval", "dataset=affnist", f"checkpoint={tmp_path / 'run'}"]) == 0
    assert capsys.readouterr().out.strip().splitlines()[-1].endswith("of 320)")
    assert (tmp_path / "run" / "eval-affnist-test" / "pictures" / "failures.png").exists()
    assert cli.main(["data", "dataset=affnist", f"out_dir={tmp_path / 'data-out'}"]) == 0
    assert "test.mat: MD5" in capsys.readouterr().out
    assert (tmp_path / "data-out" / "contact_sheet.png").exists()


@pytest.mark.parametrize(
    ("content", "message"),
    [
        (lambda good: zipped(**{"../test.mat": good}), "outside its folder"),
        (lambda good: zipped(**{"/etc/test.mat": good}), "outside its folder"),
        (lambda good: zipped(**{"a\\..\\..\\test.mat": good}), "outside its folder"),
        (lambda good: encrypted(good), "cannot be read"),
        (lambda good: zipped(**{".": b"", "test.mat": good[:-99]}), "damaged, cut short"),
        (lambda good: zipped(**{"readme.txt": b"hello"}), r"holds no \.mat file"),
        (lambda good: zipped(**{"test.mat": good})[:-300], "damaged, cut short"),
        (lambda good: b"PK no zip", "damaged, cut short"),
    ],
    ids=["dots", "absolute", "backslashes", "password", "no name", "no mat", "cut", "no zip"],
)
def test_zips_that_cannot_be_used_are_refused_by_name(folder, digits, content, message):
    (folder / "test.mat.zip").write_bytes(content(mat(struct(*digits))))
    with pytest.raises(UserError, match=message) as caught:
        load()
    assert "test.mat.zip" in str(caught.value)
    assert [path.name for path in folder.parent.rglob("*") if path.is_file()] == ["test.mat.zip"]


def test_a_zip_that_claims_too_much_is_not_unpacked(folder, digits, monkeypatch):
    monkeypatch.setattr(affnist, "MAX_BYTES", 1000)
    (folder / "test.mat.zip").write_bytes(zipped(**{"test.mat": mat(struct(*digits))}))
    with pytest.raises(UserError, match="more than 1,000 bytes"):
        load()


class RangeServer(http.server.BaseHTTPRequestHandler):
    """Serves `content`; `break_after` bytes of an answer the connection is cut."""

    content = b""
    break_after: int | None = None
    with_ranges = True
    etag = '"first"'
    asked: list

    def do_GET(self):
        asked = self.headers.get("Range")
        type(self).asked.append(asked)
        start = int(asked.split("=")[1].rstrip("-")) if asked and self.with_ranges else 0
        if self.headers.get("If-Range", self.etag) != self.etag:
            start = 0
        if start >= len(self.content):
            self.send_response(416)
            self.send_header("Content-Range", f"bytes */{len(self.content)}")
            self.end_headers()
            return
        self.send_response(206 if start else 200)
        if start:
            whole = len(self.content)
            self.send_header("Content-Range", f"bytes {start}-{whole - 1}/{whole}")
        self.send_header("ETag", self.etag)
        body = self.content[start:]
        self.send_header("Content-Length", str(len(body)))
        self.end_headers()
        self.wfile.write(body[: self.break_after])

    def log_message(self, *args):
        pass


@pytest.fixture
def server(monkeypatch):
    handler = type("Handler", (RangeServer,), {"asked": []})
    with http.server.ThreadingHTTPServer(("127.0.0.1", 0), handler) as served:
        threading.Thread(target=served.serve_forever, daemon=True).start()
        handler.url = f"http://127.0.0.1:{served.server_port}/test.mat.zip"
        monkeypatch.setattr(affnist, "URL", handler.url)
        yield handler
        served.shutdown()


@pytest.mark.parametrize("with_ranges", [True, False])
def test_an_interrupted_download_goes_on(folder, digits, server, with_ranges, capsys):
    server.content = zipped(**{"test.mat": mat(struct(*digits))})
    server.break_after, server.with_ranges = len(server.content) // 3, with_ranges
    with pytest.raises(UserError, match="are kept: the same command goes on"):
        load()
    assert (folder / "test.mat.zip.part").stat().st_size == server.break_after
    assert not (folder / "test.mat.zip").exists()
    server.break_after = None
    assert_right(load(), digits)
    assert server.asked == [None, f"bytes={len(server.content) // 3}-"]
    assert not (folder / "test.mat.zip.part").exists()
    assert "downloading http" in capsys.readouterr().out
    load()
    assert len(server.asked) == 2, "what is there is not downloaded again"


def test_a_part_of_another_file_is_fetched_anew(folder, digits, server):
    server.content = zipped(**{"test.mat": mat(struct(*digits))})
    (folder / "test.mat.zip.part").write_bytes(b"x" * (len(server.content) + 5))
    assert_right(load(), digits)


def test_a_download_that_is_complete_but_for_its_name_is_kept(folder, digits, server):
    server.content = zipped(**{"test.mat": mat(struct(*digits))})
    (folder / "test.mat.zip.part").write_bytes(server.content)
    assert_right(load(), digits)
    assert server.asked == [f"bytes={len(server.content)}-"], "it is not fetched again"


def test_parts_of_two_versions_are_not_joined(folder, digits, server):
    server.content = b"an older file" * 5000
    server.break_after = 10_000
    with pytest.raises(UserError, match="are kept"):
        load()
    server.content, server.break_after = zipped(**{"test.mat": mat(struct(*digits))}), None
    server.etag = '"second"'
    assert_right(load(), digits)
    assert [path.name for path in folder.iterdir()] == ["test.mat.zip"]


def test_without_network_the_message_names_what_else_can_be_done(folder, monkeypatch, capsys):
    monkeypatch.setattr(affnist, "URL", "http://127.0.0.1:9/test.mat.zip")
    folder.rmdir()
    with pytest.raises(UserError, match="could not be downloaded") as caught:
        load()
    assert "dataset=affnist_like" in str(caught.value)
    assert "is not affNIST" in str(caught.value)
    assert not folder.exists(), "no empty folder stays"


def test_a_download_with_another_checksum_is_not_kept(tmp_path, server):
    server.content = b"something else"
    target = tmp_path / "file.gz"
    with pytest.raises(UserError, match="published MD5"):
        download.obtain(server.url, target, "0" * 32, "This", "do that")
    assert list(tmp_path.iterdir()) == []


def test_there_is_nothing_to_train_on(folder, digits):
    (folder / "test.mat").write_bytes(mat(struct(*digits)))
    with pytest.raises(UserError, match="for testing"):
        load().split("train")


@pytest.mark.parametrize("setting", ["dataset.shift_px=2", "dataset.image_px=28"])
def test_settings_that_do_not_fit(folder, digits, setting):
    with pytest.raises(UserError, match=r"no effect|sizes"):
        load_dataset(train_config("dataset=affnist", setting).dataset, CPU)
