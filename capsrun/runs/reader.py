"""Reads what training runs, and what was made of them, left in their folders.

Nothing here imports PyTorch when it is imported, so that a list of runs is there at once.
"""

import contextlib
import math
import os
from collections.abc import Iterable, Iterator, Mapping
from dataclasses import dataclass, field
from functools import cached_property
from pathlib import Path
from typing import Any

from capsrun import disk
from capsrun.checks import is_name
from capsrun.config import RecipeConfig, TrainConfig
from capsrun.data import sizes
from capsrun.data_config import dataset_schema, title_of
from capsrun.errors import UserError, notice
from capsrun.runs.shapes import (
    NUMBER,
    SHAPE,
    TEST_SHAPE,
    check_changed,
    check_shape,
    check_training,
)
from capsrun.settings import deciding, deciding_test, from_dict
from capsrun.training.schedule import total_steps

RESULT, METRICS, CONFIG = "result.json", "metrics.jsonl", "config.yaml"
FINISHED, RUNNING, INTERRUPTED, DAMAGED = "finished", "running", "interrupted", "damaged"

# What reading a file raises that is damaged, or is another program's.
UNSOUND = (OSError, ValueError, LookupError, TypeError, AttributeError, ArithmeticError)


@dataclass(frozen=True)
class Result:
    """One `result.json` of `train`, `eval` or `perturb`."""

    folder: Path
    values: dict[str, Any]

    @property
    def command(self) -> str:
        return self.values["command"]

    @property
    def seed(self) -> int:
        return self.values["seed"]

    @property
    def error_percent(self) -> float:
        return self.values["error_percent"]

    @property
    def training(self) -> Mapping[str, Any]:
        """The configuration of the run that trained the model."""
        return self.values["config" if self.command == "train" else "trained"]

    @cached_property
    def settings(self) -> dict[str, Any]:
        """What decides about the trained model, but for the seed, with dots in the names."""
        return deciding(self.training) | {"precision": self.values["precision"]}

    @property
    def reached_target(self) -> bool:
        """Whether the accuracy at which to stop was reached, where the run had one."""
        if self.training["stop"]["accuracy_percent"] is None:
            return True
        stopped = self.values.get("stopped")  # of training; eval does not say
        if stopped:
            return stopped["reached"]
        recipe = RecipeConfig(**self.training["recipe"])
        return self.values["steps"] < total_steps(recipe, training_images(self.training))

    @cached_property
    def tested(self) -> dict[str, Any]:
        """What decides which images it was tested on, and how; empty: by training itself."""
        if self.command == "train":
            return {}
        config = self.values["config"]
        return {
            **deciding_test(config["dataset"]),
            "split": config["split"],
            "images": config.get("images"),
            "weights": config.get("weights", "last"),
            "ensemble": len(self.values.get("ensemble", [])) + 1,
        }

    @property
    def members_alike(self) -> bool:
        """Whether the models of an ensemble differ in nothing but their seeds."""
        others = self.values.get("others_trained", [])
        seeds = {self.training["seed"], *(other["seed"] for other in others)}
        alike = all(deciding(other) == deciding(self.training) for other in others)
        return alike and len(seeds) == 1 + len(others)

    @property
    def tested_on(self) -> str:
        """The name of the data set whose images it was tested on."""
        return title_of(self.tested if self.tested else self.training["dataset"])

    @property
    def written(self) -> float:
        """When, in seconds since 1970."""
        return (self.folder / RESULT).stat().st_mtime

    @cached_property
    def metrics(self) -> list[dict[str, Any]]:
        """What was recorded during training; empty where that is not at hand."""
        return read_metrics(self.folder)


@dataclass
class Run:
    """One training run, as its folder shows it."""

    folder: Path
    written: float
    """When one of its files was last written, in seconds since 1970."""
    status: str = DAMAGED
    name: str = ""
    seed: int | None = None
    dataset: str = ""
    model: str = ""
    error_percent: float | None = None
    """Of a run that is not finished: as its last evaluation found it."""
    steps: int | None = None
    total_steps: int | None = None
    owner: str | None = None
    """The process that is at work on it."""
    config: Mapping[str, Any] = field(default_factory=dict)
    """The settings of the run; empty where they cannot be read."""
    problem: str = ""
    result: Result | None = None
    """What came out, of a finished run."""
    tests: list[Result] = field(default_factory=list)
    """What `eval` and `perturb` found out about it, the latest last."""


def find_results(sources: Iterable[str | Path]) -> list[Result]:
    """Every result of finished training below some folders, each once, though it may be copied.

    A `result.json` that is damaged, or not of this capsrun, is left out, and the user is told.
    """
    found: dict[str, Result] = {}
    for path in (path for source in sources for path in visible(Path(source), RESULT)):
        try:
            result = sound_result(path)
            if result.values.get("finished", True):
                from_dict(TrainConfig, dict(result.training))
                found.setdefault(repr(result.values), result)
        except (*UNSOUND, UserError) as error:
            notice(f"{path} is left out: it is damaged, or not of this capsrun ({error})")
    return list(found.values())


def find_runs(runs_dir: Path) -> list[Run]:
    """Every training run below a folder, the one that was written last in the end."""
    results = list(results_below(runs_dir))
    trained = {result.folder: result for result in results if result.command == "train"}
    folders = {path.parent for path in visible(runs_dir, CONFIG)} | trained.keys()
    runs = {folder: read_run(folder, trained.get(folder)) for folder in folders}
    resolved = {folder.resolve(): run for folder, run in runs.items()}
    for result in (result for result in results if result.command != "train"):
        parents = (runs[parent] for parent in result.folder.parents if parent in runs)
        # It lies in the folder of its run, or says where its checkpoint does.
        elsewhere = Path(result.values.get("checkpoint", "")).parent.resolve()
        run = next(parents, None) or resolved.get(elsewhere)
        if run is not None:
            run.tests.append(result)
    for run in runs.values():
        run.tests.sort(key=lambda test: test.written)
    return sorted(runs.values(), key=lambda run: (run.written, run.folder))


def visible(folder: Path, name: str) -> Iterator[Path]:
    """The files of a name below a folder, but for those in hidden folders.

    Raises OSError for a folder that cannot be looked into, as there may be some; of one below it
    the user is told.
    """

    def tell(error: OSError) -> None:
        notice(f"{error.filename} cannot be looked into: {error.strerror}")

    if not folder.exists():
        return
    os.listdir(folder)
    found = []
    for place, folders, files in os.walk(folder, onerror=tell):
        folders[:] = [each for each in folders if not each.startswith(".")]
        found += [Path(place, name)] if name in files else []
    yield from sorted(found)


def results_below(folder: Path) -> Iterator[Result]:
    """Every result below a folder, also of unfinished training."""
    for path in visible(folder, RESULT):
        result = read_result(path)
        if result is not None:
            yield result


def read_result(path: Path) -> Result | None:
    """A result of `train`, `eval` or `perturb`, or None for a file that is damaged or no such."""
    try:
        return sound_result(path)
    except UNSOUND:
        return None


def sound_result(path: Path) -> Result:
    """A result of `train`, `eval` or `perturb`. Raises one of `UNSOUND` for what is none."""
    result = Result(path.parent, disk.read_json(path))
    check_shape(result.values, {"command": str})
    if result.command not in ("train", "eval", "perturb"):
        raise ValueError(f"no command {result.command!r} leaves one")
    check_shape(result.values, SHAPE if result.command == "perturb" else SHAPE | TEST_SHAPE)
    if not is_name(result.values["name"]):
        raise ValueError("no run has such a name")
    check_training(result.training)
    if result.command != "perturb":
        _ = result.tested, result.members_alike
        check_changed(result.values)
        counted = 100 * result.values["errors"] / result.values["count"]
        if not math.isclose(result.error_percent, counted, rel_tol=1e-6, abs_tol=1e-9):
            raise ValueError("its 'error_percent' is not that of its 'errors' and 'count'")
    return result


def is_finished_run(folder: Path) -> bool:
    """Whether a folder holds the result of a training run."""
    result = read_result(folder / RESULT)
    return result is not None and result.command == "train"


def read_metrics(folder: Path) -> list[dict[str, Any]]:
    """The rows of a run's `metrics.jsonl`, up to one that is half written or damaged.

    Each has its `step`, a whole number, and other numbers by their names.
    """
    rows: list[dict[str, Any]] = []
    with contextlib.suppress(OSError, ValueError):
        for line in disk.read_bytes(folder / METRICS, disk.MOST_TEXT_BYTES).splitlines():
            row = disk.parse_json(line)
            check_shape(row, {"step": int, "total_steps?": int})
            check_shape(row, dict.fromkeys(row, NUMBER))
            rows.append(row)
    return rows


def best_on_test(
    rows: Iterable[Mapping[str, Any]], training: Mapping[str, Any], images: int
) -> dict[str, Any] | None:
    """The lowest of a run's test errors, at which step it came first, and of how many it is.

    It is chosen on test images, so it is no result: it shows what such a choice is worth.
    rows: as `read_metrics` gives them. images: of the last test. Where those during training were
    of fewer images, which is the `count`, the last one does not take part. None: there were none.
    """
    key = "error_percent/test"
    tests = [(row["step"], row[key]) for row in rows if key in row]
    stop = training["stop"]
    decides = stop["accuracy_percent"] is not None and stop["on"] == "test"
    count = images if decides else min(images, training["record"]["evaluate_images"])
    # After a stop, the last two tests are of the same step.
    errors = dict(tests[:-1] if count < images else tests)
    if not errors:
        return None
    step = min(errors, key=lambda step: (errors[step], step))
    found = {"error_percent": errors[step], "step": step}
    return {**found, "evaluations": len(errors), "count": count}


def training_images(training: Mapping[str, Any]) -> int:
    """How many images an epoch of a training configuration has."""
    dataset = training["dataset"]
    return sizes(dataset_schema(dataset)(**dataset))[0]


def epochs_of_a_step(training: Mapping[str, Any]) -> float:
    """Which part of the training images a step sees."""
    return training["recipe"]["batch_size"] / training_images(training)


def read_run(folder: Path, result: Result | None) -> Run:
    """What the folder of a training run says, as far as it can be read."""
    run = Run(folder, last_written(folder))
    if result is not None:
        add_settings(run, result.training)
        run.name, run.status, run.result = result.values["name"], FINISHED, result
        run.error_percent = result.error_percent
        run.steps = run.total_steps = result.values["steps"]
    elif (folder / RESULT).exists():
        run.problem = f"{RESULT} cannot be read"
    else:
        try:
            config = disk.read_yaml(folder / CONFIG)
            check_training(config)
        except UNSOUND:
            run.problem = f"{CONFIG} cannot be read"
        else:
            add_settings(run, config)
            add_progress(run)
    return run


def last_written(folder: Path) -> float:
    """When a file of a run was last written; of a finished run, its result."""
    for names in ((RESULT,), (METRICS, "checkpoint.pt", CONFIG)):
        times = [(folder / name).stat().st_mtime for name in names if (folder / name).exists()]
        if times:
            return max(times)
    return folder.stat().st_mtime


def add_settings(run: Run, config: Mapping[str, Any]) -> None:
    """Note with which settings a run was trained."""
    run.config, run.seed = config, config["seed"]
    run.name = config.get("name") or run.folder.parent.name
    run.dataset, run.model = title_of(config["dataset"]), config["model"]["name"]


def add_progress(run: Run) -> None:
    """Note how far a run without a result is."""
    run.steps, run.total_steps = 0, run.config["recipe"]["steps"]
    for row in read_metrics(run.folder):
        run.steps = row["step"]
        run.total_steps = row.get("total_steps", run.total_steps)
        run.error_percent = row.get("error_percent/test", run.error_percent)
    run.owner = disk.holder(run.folder / disk.LOCK)
    run.status = RUNNING if run.owner else INTERRUPTED
    if (run.folder / "not_finite.pt").exists():
        run.status, run.problem = INTERRUPTED, "its loss or a weight was not finite"
