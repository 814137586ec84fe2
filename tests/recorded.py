"""What finished runs leave, written by tests."""

import json
from dataclasses import asdict, replace
from pathlib import Path
from typing import Any

from capsrun.experiments import Experiments

EXPERIMENTS = Experiments()


def write_result(folder: Path, values: dict[str, Any]) -> Path:
    folder.mkdir(parents=True, exist_ok=True)
    (folder / "result.json").write_text(json.dumps(values))
    return folder


def train_result(folder: Path, errors: int, seed: int, *overrides: str, **changes: Any) -> Path:
    """Write what a finished training run leaves, with so many errors."""
    # Each is composed once.
    words = ("experiment=table1_mnist_3_reconstruction", *overrides)
    training = replace(EXPERIMENTS.training(words), seed=seed)
    values = {
        "command": "train",
        "name": "run",
        "dataset": training.dataset.name,
        "model": training.model.name,
        "seed": seed,
        "steps": training.recipe.steps or 469,
        "error_percent": errors / 100,
        "errors": errors,
        "count": 10_000,
        "train_seconds": 100.0 + seed,
        "device": "Some CPU, 2 threads",
        "precision": "bf16",
        "date": "2026-11-23",
        "versions": {"torch": "2.11"},
        "git_commit": "0123456789abcdef",
        "stopped": None,
        "config": asdict(training),
    }
    return write_result(folder, values | changes)


def eval_result(folder: Path, test: str, errors: int, *overrides: str, **changes: Any) -> Path:
    """Write what `capsrun eval` with the words `test` leaves of a run with seed 0."""
    training = EXPERIMENTS.training(overrides)
    tested = EXPERIMENTS.tested(["eval", *test.split()])
    values = {
        "command": "eval",
        "name": "run",
        "dataset": tested.dataset.name,
        "model": training.model.name,
        "seed": 0,
        "steps": 5_000,
        "finished": True,
        "error_percent": errors / 3200,
        "errors": errors,
        "count": 320_000,
        "train_seconds": 100.0,
        "eval_seconds": 3.0,
        "device": "Some CPU, 2 threads",
        "precision": "bf16",
        "date": "2026-11-23",
        "versions": {"torch": "2.11"},
        "git_commit": None,
        "ensemble": [],
        "config": asdict(tested),
        "trained": asdict(training),
    }
    return write_result(folder, values | changes)
