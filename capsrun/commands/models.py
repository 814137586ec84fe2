"""What the commands share that use a trained model: its data, facts and a folder of results."""

import contextlib
import dataclasses
from collections.abc import Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any, TextIO

import torch
from matplotlib.figure import Figure

from capsrun import disk
from capsrun.config import CheckpointConfig, EvalConfig, ExploreConfig, PerturbConfig, PredictConfig
from capsrun.data import load_dataset
from capsrun.data.splits import Dataset
from capsrun.data_config import DatasetConfig
from capsrun.errors import UserError
from capsrun.names import about_packaged, packaged, usual_dataset
from capsrun.report import figures
from capsrun.report.pictures import answer
from capsrun.report.run_page import write_run_page
from capsrun.runs.checkpoint import (
    Trained,
    check_dataset,
    find_model,
    output_folder,
)
from capsrun.runs.folder import output
from capsrun.runs.initial import refuse_seen_images
from capsrun.runs.reader import RESULT, read_result
from capsrun.runs.recorder import show_in_tensorboard
from capsrun.terminal import counted, printable


def announce(
    checkpoint: Path, trained: Trained, text: str, done: str, stream: TextIO | None = None
) -> None:
    """Say which model is used, and whether its run is unfinished. done: what is done with it."""
    print(printable(f"{checkpoint}: {text}"), file=stream)
    if not trained.finished:
        after = counted(trained.step, "step")
        print(f"this run is not finished: its model after {after} is {done}", file=stream)


def find_or_packaged(config: PerturbConfig | ExploreConfig | PredictConfig) -> Path:
    """The checkpoint that a command is to look into.

    Where none is named, and no network was trained on MNIST yet, it is the one that comes with
    capsrun, and the images are the test digits that do.
    Raises UserError, with the command that makes it, when there is none.
    """
    try:
        return find_model(config)
    except UserError:
        usual = [usual_dataset(name) for name in ("mnist", "mnist1k")]
        if config.checkpoint or config.seed or config.dataset not in usual:
            raise
    config.dataset = usual[1]
    return packaged()


def images_of(trained: Trained, checkpoint: Path) -> DatasetConfig:
    """The data set that is at hand for a model."""
    return usual_dataset("mnist1k") if checkpoint == packaged() else trained.config.dataset


def say_network(checkpoint: Path, trained: Trained, stream: TextIO | None = None) -> None:
    """Say which network is used, how good it is where that is known, and whether it is finished."""
    if checkpoint == packaged():
        print(f"network: {about_packaged()}", file=stream)
        return
    result = read_result(checkpoint.with_name(RESULT))
    text = f"{trained.config.model.name}, trained on {trained.config.dataset.title}"
    if result is not None and result.command == "train":
        values = result.values
        text += f", {answer('test', values['errors'], values['count'])}"
    announce(checkpoint, trained, text, "used", stream)


def load_test_images(config: CheckpointConfig, trained: Trained, device: torch.device) -> Dataset:
    """The data set, if the model can be tested on it. Raises UserError if it cannot."""
    check_dataset(config.dataset, trained.config, "test")
    return load_images(config, [trained], device)


def load_images(
    config: CheckpointConfig, models: Sequence[Trained], device: torch.device
) -> Dataset:
    """The data set. Raises UserError where a model was trained on some of its test images."""
    dataset = load_dataset(config.dataset, device)
    for trained in models:
        refuse_seen_images(config.dataset, dataset.unverified, trained.seen, "the model")
    return dataset


@contextlib.contextmanager
def result_folder(
    config: EvalConfig | PerturbConfig, checkpoint: Path, name: str
) -> Iterator[Path]:
    """Make `out_dir`, or a folder of this name beside the model, for this process alone.

    Raises UserError for a run's own folder, and Busy while another process writes to this one.
    """
    folder = Path(config.out_dir or output_folder(checkpoint, config.runs_dir) / name)
    with output(folder):
        yield folder


def model_facts(trained: Trained, checkpoint: Path) -> dict[str, Any]:
    """Which model a result is of, for its JSON file."""
    return {
        "name": trained.config.name,
        "model": trained.config.model.name,
        "seed": trained.config.seed,
        "steps": trained.step,
        "checkpoint": str(checkpoint),
        "trained": dataclasses.asdict(trained.config),
    }


def write_result(
    folder: Path, result: Mapping[str, Any], drawn: Mapping[str, Mapping[str, Figure]]
) -> Path:
    """Write `result.json` and the page that shows it; returns the page's path.

    drawn: figures by name for TensorBoard, where they replace earlier ones of the same key.
    """
    for key, of_key in drawn.items():
        pictures = {name: figures.pixels(figure) for name, figure in of_key.items()}
        show_in_tensorboard(folder, key, pictures)
    disk.write_json(folder / "result.json", result)
    return write_run_page(folder)
