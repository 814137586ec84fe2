"""What the tests share: configurations, real digits, and the commands as a user runs them."""

import contextlib
import copy
import dataclasses
import functools
import json
import os
import shutil
import subprocess
import sys
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import pytest
import torch

from capsrun import cli, errors, experiments
from capsrun.config import TrainConfig
from capsrun.data import load_dataset
from capsrun.data.splits import StoredImages
from capsrun.models import Model, build_model
from capsrun.training.step import Trainer

REPOSITORY = Path(__file__).resolve().parent.parent
SHARED = REPOSITORY.parent / "shared"
GOLDEN = SHARED / "golden"
MNIST_DIR = SHARED / "data"
NOWHERE = "http://127.0.0.1:9/"  # where nothing answers

needs_compiler = pytest.mark.skipif(
    not (os.environ.get("CXX") or shutil.which("g++") or shutil.which("clang++")),
    reason="no C++ compiler here",
)

# A CapsNet and a run so small that a test can train them.
TINY = [
    "dataset=mnist5k",
    "model.conv1_channels=8",
    "model.primary_types=2",
    "model.decoder_widths=[16,16]",
    "recipe.batch_size=16",
    "recipe.epochs=null",
    "recipe.steps=12",
    "record.log_every_steps=2",
    "record.evaluate_every_steps=8",
]


def train_config(*overrides: str) -> TrainConfig:
    """The configuration that `capsrun train` makes of these overrides."""
    return copy.deepcopy(_composed(overrides, os.environ.get("CAPSRUN_DATA")))


@functools.cache
def _composed(overrides: tuple[str, ...], data_dir: str | None) -> TrainConfig:
    """Composed once: it takes a quarter of a second."""
    return experiments.training_config(overrides)


def load_data(name: str, *overrides: str):
    """The data set of this name, with these settings, on the CPU."""
    return load_dataset(train_config(f"dataset={name}", *overrides).dataset, torch.device("cpu"))


def make_model(config: TrainConfig, seed: int = 0) -> Model:
    """The untrained network of a configuration."""
    return build_model(config.model, config.routing, config.dataset, seed)


def make_trainer(
    config: TrainConfig,
    kind: type[Trainer] = Trainer,
    device: torch.device | None = None,
    precision: str = "fp32",
    fast: bool = False,
) -> Trainer:
    """What makes the steps of an untrained network, by default in the plain way on the CPU."""
    place = device or torch.device("cpu")
    steps = config.recipe.steps
    return kind(make_model(config), config.loss, config.recipe, steps, place, precision, fast)


def stored(images, labels, shift_px: int = 2) -> StoredImages:
    """Some images as a split, moved by so much in training."""
    px, channels = images.shape[-1], images.shape[1]
    sizes = [f"dataset.image_px={px}", f"dataset.channels={channels}"]
    config = train_config(*sizes, f"dataset.shift_px={shift_px}")
    return StoredImages(images, labels, config.dataset)


def untrained(path: Path, *overrides: str) -> None:
    """Write the checkpoint of a run that would be finished, if its first weights were its last."""
    from capsrun.models import build_model
    from capsrun.runs.checkpoint import write_checkpoint

    config = train_config(*overrides)
    weights = build_model(config.model, config.routing, config.dataset).state_dict()
    facts = dataclasses.asdict(config)
    write_checkpoint(path, facts, 1, model=weights, optimizer=None, train_seconds=1.0)


def run_python(*words: str, **options: Any) -> subprocess.CompletedProcess:
    """Run Python in a process of its own."""
    words = (sys.executable, *words)
    return subprocess.run(words, capture_output=True, text=True, check=False, **options)


def run_capsrun(*arguments: str, cwd: Path, **environment: str) -> subprocess.CompletedProcess:
    """Run the command in a process of its own, as a user does."""
    options = {"cwd": cwd, "env": {**os.environ, **environment}, "timeout": 300}
    return run_python("-m", "capsrun", *arguments, **options)


def has_logged(run_dir: Path) -> bool:
    """Whether a run is training: its first line of metrics is there before that."""
    file = run_dir / "metrics.jsonl"
    return file.exists() and any("loss/total" in json.loads(line) for line in file.open())


@contextlib.contextmanager
def without_root() -> Iterator[None]:
    """Give up root's power to read and write everything, where the tests run as root."""
    if os.geteuid() != 0:
        yield
        return
    os.seteuid(65534)
    try:
        yield
    finally:
        os.seteuid(0)


@pytest.fixture(autouse=True)
def no_notices() -> None:
    """What the user was told during another test is nothing that this one says."""
    errors.notices.clear()


@pytest.fixture
def in_tmp(tmp_path, monkeypatch) -> Path:
    """An empty folder to work in."""
    monkeypatch.chdir(tmp_path)
    monkeypatch.delenv("CAPSRUN_DATA", raising=False)
    return tmp_path


@pytest.fixture
def printed(capsys) -> Callable[..., list[str]]:
    """Runs a command that is right; returns the lines that it prints."""

    def run(*arguments: str) -> list[str]:
        code = cli.main(list(arguments))
        said = capsys.readouterr()
        assert code == 0, said.err
        return said.out.splitlines()

    return run


@pytest.fixture
def refused(capsys) -> Callable[..., str]:
    """Runs a command that is wrong; returns the one line that it says."""

    def run(*arguments: str) -> str:
        assert cli.main(list(arguments)) == 2
        said = capsys.readouterr().err
        assert "Traceback" not in said
        assert said.startswith("capsrun")
        assert said.count("\n") == 1, said
        return said

    return run


@pytest.fixture(scope="session")
def tiny_run(tmp_path_factory) -> Path:
    """The folder of a finished run of the tiny CapsNet; not to be changed."""
    from capsrun.commands.train import train

    folder = tmp_path_factory.mktemp("tiny") / "run" / "seed0"
    train(train_config(*TINY, "name=run"), folder)
    return folder


@pytest.fixture(scope="session")
def browser() -> Iterator[Any]:
    """A headless Chromium; what needs it is skipped, with the reason, where there is none."""
    api = pytest.importorskip("playwright.sync_api", reason="the package playwright is not here")
    names = ("chromium", "chromium-browser", "google-chrome")
    path = next(filter(None, map(shutil.which, names)), None)
    if path is None:
        pytest.skip("there is no Chromium here (Debian: apt-get install chromium)")
    with api.sync_playwright() as playwright:
        # Chromium's own sandbox does not run as root, as in most containers.
        browser = playwright.chromium.launch(executable_path=path, args=["--no-sandbox"])
        yield browser
        browser.close()


@pytest.hookimpl(tryfirst=True)
def pytest_collection_modifyitems(items: list[pytest.Item]) -> None:
    """Whatever uses the browser has its mark."""
    for item in items:
        if "browser" in getattr(item, "fixturenames", ()):
            item.add_marker("browser")
