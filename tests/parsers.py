"""Every parser of capsrun that reads what somebody else may have written, for the fuzzers.

A target takes bytes; whatever they are, it returns or raises `UserError` (or, for the functions
that read a folder's files, leaves them out), and it needs little memory and time.
"""

import contextlib
import dataclasses
import functools
import gzip
import io
import json
import os
import struct
import tempfile
import zipfile
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import NamedTuple

import numpy as np
import torch
from conftest import TINY, train_config
from PIL import Image

from capsrun import cli
from capsrun.commands import list as list_command
from capsrun.commands.perturb import read_image
from capsrun.commands.train import train
from capsrun.config import ListConfig, TrainConfig, from_dict, with_later_settings
from capsrun.data import affnist, cifar10, files, smallnorb, svhn
from capsrun.errors import UserError
from capsrun.models import build_model
from capsrun.reading import parse_json
from capsrun.runs import inventory, record, results, run_page
from capsrun.runs.checkpoint import load_checkpoint, read_checkpoint, save_checkpoint
from capsrun.runs.jobs import Job
from capsrun.training.step import Trainer

CPU = torch.device("cpu")


class Target(NamedTuple):
    """One parser and small files that it takes."""

    parse: Callable[[bytes], None]
    seeds: Callable[[], list[bytes]]


@functools.cache
def folder() -> Path:
    """Where files are written to be parsed; in memory, where there is such a place."""
    shm = Path("/dev/shm")
    place = tempfile.TemporaryDirectory(dir=shm if os.access(shm, os.W_OK) else None)
    folder.kept = place  # type: ignore[attr-defined]
    return Path(place.name)


def written(content: bytes, name: str) -> Path:
    path = folder() / name
    path.parent.mkdir(parents=True, exist_ok=True)
    path.write_bytes(content)
    return path


def saved(write: Callable[[io.BytesIO], object]) -> bytes:
    stream = io.BytesIO()
    write(stream)
    return stream.getvalue()


# MNIST's files


def idx(*sizes: int) -> bytes:
    head = bytes([0, 0, 8, len(sizes)]) + struct.pack(f">{len(sizes)}I", *sizes)
    return head + bytes(int(np.prod(sizes)))


def parse_idx(content: bytes) -> None:
    for dimensions in (1, 3):
        with contextlib.suppress(UserError):
            files.parse_idx(content, dimensions, Path("file"))
    file = files.IdxFile("images", None, None)
    for name in ("images", "images.gz"):
        path = written(content, name)
        with contextlib.suppress(UserError):
            files.read_idx(folder(), file, 3)
        path.unlink()


def idx_seeds() -> list[bytes]:
    plain = [idx(3), idx(2, 4, 4), idx(10**9 % 97, 1, 1)]
    return plain + [gzip.compress(content) for content in plain]


# affNIST, SVHN, smallNORB, CIFAR-10


def mat(**variables: object) -> list[bytes]:
    """MATLAB files with these variables, compressed and not."""
    from scipy.io import savemat

    return [
        saved(functools.partial(savemat, mdict=variables, do_compression=c)) for c in (False, True)
    ]


def affnist_mats() -> list[bytes]:
    images = np.full((1600, 2), 200, np.uint8)
    labels = np.array([[3, 7]])
    one_of_n = np.eye(10)[labels[0]].T
    struct_ = {"image": images, "label_int": labels, "label_one_of_n": one_of_n, "other": "text"}
    cells = np.array([["a", np.zeros(3)]], object)
    return [*mat(affNISTdata=struct_), *mat(affNISTdata={**struct_, "cells": cells}, b=1 + 2j)]


def parse_affnist(content: bytes) -> None:
    affnist.read_mat(content, "test.mat")


def zipped(content: bytes, method: int = zipfile.ZIP_DEFLATED) -> bytes:
    stream = io.BytesIO()
    with zipfile.ZipFile(stream, "w", method) as archive:
        archive.writestr("test.mat", content)
        archive.writestr("readme.txt", "hello")
    return stream.getvalue()


def parse_zip(content: bytes) -> None:
    for name, inside in affnist.mat_files(written(content, "test.mat.zip")):
        affnist.read_mat(inside, name)


def zip_seeds() -> list[bytes]:
    mats = affnist_mats()
    return [zipped(mats[1]), zipped(mats[0]), zipped(b"x" * 50, zipfile.ZIP_STORED)]


def parse_svhn(content: bytes) -> None:
    svhn.parse(written(content, "train_32x32.mat"))


def svhn_seeds() -> list[bytes]:
    return mat(X=np.zeros((32, 32, 3, 2), np.uint8), y=np.array([[1], [10]]))


def parse_smallnorb(content: bytes) -> None:
    for magic in (smallnorb.BYTES, smallnorb.INTEGERS):
        with contextlib.suppress(UserError):
            array = smallnorb.parse(content, magic, "file")
            smallnorb.check_pair(array, array, "file")
    with contextlib.suppress(UserError):
        smallnorb._content(written(content, "norb.gz"))


def smallnorb_seeds() -> list[bytes]:
    labels = struct.pack("<5I3i", smallnorb.INTEGERS, 1, 3, 1, 1, 0, 1, 4)
    images = struct.pack("<6I", smallnorb.BYTES, 4, 1, 2, 3, 3) + bytes(18)
    return [labels, images, gzip.compress(images)]


def parse_cifar10(content: bytes) -> None:
    cifar10.parse(content * 10_000, "file")  # of one record all that are needed


def cifar10_seeds() -> list[bytes]:
    return [bytes([3]) + bytes(3072)]


# Images


def picture(mode: str, kind: str, size: tuple[int, int] = (9, 7)) -> bytes:
    return saved(lambda stream: Image.new(mode, size, 1).save(stream, kind))


def image_seeds() -> list[bytes]:
    kinds = [("L", "PNG"), ("RGBA", "PNG"), ("I;16", "PNG"), ("RGB", "JPEG"), ("P", "GIF")]
    kinds += [("RGB", "BMP"), ("RGB", "TIFF"), ("RGB", "WEBP"), ("L", "PPM"), ("1", "PNG")]
    return [picture(mode, kind) for mode, kind in kinds]


def parse_image(content: bytes) -> None:
    path = written(content, "own.image")
    for channels in (1, 3):
        pixels, _ = read_image(path, 28, channels, "auto")
        assert pixels.shape == (channels, 28, 28)


# Checkpoints


@functools.cache
def tiny() -> tuple[TrainConfig, Trainer]:
    config = train_config(
        *TINY, "model.conv1_channels=1", "model.primary_types=1", "model.digit_dimensions=2"
    )
    model = build_model(config.model, config.routing, config.dataset)
    return config, Trainer(model, config.loss, config.recipe, 10, CPU, "fp32", fast=False)


@functools.cache
def checkpoint_seeds() -> list[bytes]:
    config, trainer = tiny()
    path = folder() / "seed.pt"
    found = []
    for optimizer in (trainer.optimizer.state_dict(), None):
        save_checkpoint(
            path,
            dataclasses.asdict(config),
            5,
            model=trainer.model.state_dict(),
            optimizer=optimizer,
            precision="fp32",
            train_seconds=1.5,
            metrics_bytes=0,
        )
        found.append(path.read_bytes())
    return found


def parse_checkpoint(content: bytes) -> None:
    path = written(content, "checkpoint.pt")
    trained = load_checkpoint(path)
    px, channels = trained.config.dataset.image_px, trained.config.dataset.channels
    assert trained.model.channels == channels
    assert trained.model.image_px == px
    checkpoint = read_checkpoint(path)
    trainer = tiny()[1]
    if checkpoint["optimizer"] is not None and trainer.fits_optimizer(checkpoint["optimizer"]):
        trainer.load_optimizer(checkpoint["optimizer"])


def pickle_inside(content: bytes) -> bytes:
    """A checkpoint with these bytes in the place of its pickle."""
    stream = io.BytesIO()
    old = io.BytesIO(checkpoint_seeds()[0])
    with zipfile.ZipFile(old) as source, zipfile.ZipFile(stream, "w") as target:
        for name in source.namelist():
            target.writestr(name, content if name.endswith("data.pkl") else source.read(name))
    return stream.getvalue()


def parse_pickle(content: bytes) -> None:
    parse_checkpoint(pickle_inside(content))


def pickle_seeds() -> list[bytes]:
    seeds = []
    for content in checkpoint_seeds():
        with zipfile.ZipFile(io.BytesIO(content)) as archive:
            seeds += [archive.read(n) for n in archive.namelist() if n.endswith("data.pkl")]
    return seeds


# A run's folder


@functools.cache
def result_seeds() -> list[bytes]:
    found = []
    for path in sorted((cli.configs_dir().parent / "results").rglob("result.json")):
        command = json.loads(path.read_text())["command"]
        if command not in [json.loads(content)["command"] for content in found]:
            found.append(path.read_bytes())
    return found


def parse_result(content: bytes) -> None:
    """A `result.json` as list, report, train and the page of a run read it."""
    run = folder() / "runs" / "some" / "seed0"
    written(content, "runs/some/seed0/result.json")
    (run / "config.yaml").unlink(missing_ok=True)
    listed()
    for group in results.grouped(results.find_results([folder() / "runs"])):
        assert group.errors or group.results[0].command == "perturb"
        assert group.steps is not None
    run_page.refresh_run_page(run)
    written(config_seeds()[0], "runs/some/seed0/config.yaml")
    with contextlib.redirect_stdout(io.StringIO()):
        train(tiny()[0], run)  # it is finished already, or its result is refused


def listed() -> None:
    for as_json in (False, True):
        with contextlib.redirect_stdout(io.StringIO()) as shown:
            runs_dir = str(folder() / "runs")
            list_command.list_runs(ListConfig(runs_dir=runs_dir, name=None, json=as_json))
        shown.getvalue().encode()


def config_seeds() -> list[bytes]:
    from omegaconf import OmegaConf

    return [OmegaConf.to_yaml(dataclasses.asdict(tiny()[0])).encode()]


def parse_config(content: bytes) -> None:
    """A `config.yaml` as train and list read it."""
    (folder() / "runs/some/seed0/result.json").unlink(missing_ok=True)
    path = written(content, "runs/some/seed0/config.yaml")
    listed()
    with contextlib.suppress(UserError):
        record.RunFolder(path.parent, dataclasses.asdict(tiny()[0]))


def parse_settings(content: bytes) -> None:
    """The settings in a checkpoint or a result, here as JSON."""
    try:
        values = parse_json(content.decode(errors="replace"))
    except ValueError:
        return
    if isinstance(values, dict):
        values = with_later_settings(values)
    from_dict(TrainConfig, values)


def settings_seeds() -> list[bytes]:
    return [json.dumps(dataclasses.asdict(tiny()[0])).encode()]


def parse_metrics(content: bytes) -> None:
    """A `metrics.jsonl` as list, reproduce and the page of a run read it."""
    run = folder() / "runs" / "some" / "seed0"
    (run / "result.json").unlink(missing_ok=True)
    written(config_seeds()[0], "runs/some/seed0/config.yaml")
    written(b"", "runs/some/seed0/checkpoint.pt")
    written(content, "runs/some/seed0/metrics.jsonl")
    listed()
    assert Job("some", 0, run, ("train",)).steps_made() is not None
    for row in results.Result(run, {}).metrics:
        assert row["step"] is not None
    inventory.read_run(run)
    (run / "checkpoint.pt").unlink()
    (run / "metrics.jsonl").unlink()


def metrics_seeds() -> list[bytes]:
    return [b'{"step": 0, "total_steps": 12}\n{"step": 8, "error_percent/test": 2.5}\n']


# The command line


def parse_words(content: bytes) -> None:
    """Words after a command, one a line, as far as the configuration goes."""
    words = content.decode(errors="replace").replace("\0", "").split("\n")
    cli.training_config(cli.compose_checked("train", words[:8]))


def word_seeds() -> list[bytes]:
    words = [b"dataset=mnist5k\nrecipe.steps=5", b"model.decoder_widths=[16,16]", b"seed=1\n~stop"]
    return [*words, b"name='a b'\n+x={a:1}", b"recipe=authors\nroutting.iterations=${seed}"]


def parse_own_yaml(content: bytes) -> None:
    """A YAML file of one's own, in a folder given with --config-dir."""
    written(content, "configs/dataset/own.yaml")
    words = ["--config-dir", str(folder() / "configs"), "dataset=own", "--cfg", "job"]
    with contextlib.redirect_stdout(io.StringIO()):
        cli.run_command("data", words)


def own_yaml_seeds() -> list[bytes]:
    return [(cli.configs_dir() / "dataset" / "mnist.yaml").read_bytes(), b"name: [1, {a: b}]"]


TARGETS = {
    "idx": Target(parse_idx, idx_seeds),
    "affnist": Target(parse_affnist, affnist_mats),
    "zip": Target(parse_zip, zip_seeds),
    "svhn": Target(parse_svhn, svhn_seeds),
    "smallnorb": Target(parse_smallnorb, smallnorb_seeds),
    "cifar10": Target(parse_cifar10, cifar10_seeds),
    "image": Target(parse_image, image_seeds),
    "checkpoint": Target(parse_checkpoint, checkpoint_seeds),
    "pickle": Target(parse_pickle, pickle_seeds),
    "result": Target(parse_result, result_seeds),
    "config": Target(parse_config, config_seeds),
    "settings": Target(parse_settings, settings_seeds),
    "metrics": Target(parse_metrics, metrics_seeds),
    "words": Target(parse_words, word_seeds),
    "own_yaml": Target(parse_own_yaml, own_yaml_seeds),
}


@contextlib.contextmanager
def nothing_but_user_errors() -> Iterator[None]:
    """Let a mistake of the user pass, but not one that was found by running out of memory."""
    try:
        yield
    except UserError as error:
        causes = [error.__cause__, error.__context__]
        # PyTorch says otherwise that there is no memory.
        failed = any("allocate memory" in str(cause) for cause in causes)
        if failed or any(isinstance(cause, MemoryError) for cause in causes):
            raise AssertionError("it took all memory that there is") from error
        str(error).encode()


def check(name: str, content: bytes) -> None:
    """Give bytes to a target; raises whatever it should not raise."""
    with nothing_but_user_errors():
        TARGETS[name].parse(content)
