"""Reads what a run left in its folder: `result.json` and `metrics.jsonl`."""

import math
from collections.abc import Iterable, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from capsrun.config import TrainConfig
from capsrun.data import sizes
from capsrun.disk import MOST_TEXT_BYTES, parse_json, read_bytes, read_json
from capsrun.errors import UserError
from capsrun.settings import deciding, deciding_test, from_dict, is_name

METRICS = "metrics.jsonl"


@dataclass(frozen=True)
class Result:
    """One `result.json` of `train`, `eval` or `perturb`."""

    folder: Path
    values: Mapping[str, Any]

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

    @property
    def settings(self) -> dict[str, Any]:
        """What decides about the trained model, but for the seed, with dots in the names."""
        return deciding(self.training) | {"precision": self.values["precision"]}

    @property
    def reached_target(self) -> bool:
        """Whether the accuracy at which to stop was reached, where the run had one."""
        training = self.training
        if training["stop"]["accuracy_percent"] is None:
            return True
        stopped = self.values.get("stopped")  # of training; eval does not tell
        if stopped:
            return stopped["reached"]
        return self.values["steps"] < total_steps(training)

    @property
    def tested(self) -> dict[str, Any]:
        """What decides which images it was tested on, and how."""
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
        return self.tested.get("name") or self.training["dataset"]["name"]

    @property
    def metrics(self) -> list[dict[str, Any]]:
        """What was recorded during training; empty where that is not at hand."""
        return read_metrics(self.folder)

    @property
    def best_on_test(self) -> dict[str, Any] | None:
        """See `best_on_test`; None where nothing was recorded during training."""
        if self.command != "train":
            return None
        return self.values.get("best_on_test") or best_on_test(
            self.metrics, self.training, self.values["count"]
        )


def read_metrics(folder: Path) -> list[dict[str, Any]]:
    """The lines of a run's `metrics.jsonl`; none where it is missing or damaged."""
    try:
        rows = [
            parse_json(line) for line in read_bytes(folder / METRICS, MOST_TEXT_BYTES).splitlines()
        ]
    except (OSError, ValueError):
        return []
    return rows if all(is_row(row) for row in rows) else []


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
    complete = training
    stop = complete["stop"]
    decides = stop["accuracy_percent"] is not None and stop["on"] == "test"
    count = images if decides else min(images, complete["record"]["evaluate_images"])
    # After a stop, the last two tests are of the same step.
    errors = dict(tests[:-1] if count < images else tests)
    if not errors:
        return None
    step = min(errors, key=lambda step: (errors[step], step))
    found = {"error_percent": errors[step], "step": step}
    return {**found, "evaluations": len(errors), "count": count}


def is_row(row: Any) -> bool:
    """Whether this is a line of `metrics.jsonl`: a step, and numbers by name."""
    return (
        isinstance(row, dict)
        and type(row.get("step")) is int
        and all(type(value) in (int, float) for value in row.values())
    )


def total_steps(training: Mapping[str, Any]) -> int:
    """How many steps a training configuration asks for, at most."""
    recipe = training["recipe"]
    return recipe["steps"] or math.ceil(recipe["epochs"] / epochs_of_a_step(training) - 1e-9)


def epochs_of_a_step(training: Mapping[str, Any]) -> float:
    """Which part of the training images a step sees."""
    config = from_dict(TrainConfig, training)
    return config.recipe.batch_size / sizes(config.dataset)[0]


def find_results(sources: Iterable[str | Path]) -> list[Result]:
    """Every finished result below some folders, each once.

    A `result.json` that is not of capsrun, or is damaged, is left out.
    """
    found: dict[str, Result] = {}
    for source in sources:
        for path in sorted(Path(source).rglob("result.json")):
            inside = path.relative_to(source).parts
            result = None if any(part.startswith(".") for part in inside) else read_result(path)
            if result is not None:
                # The same run can be in runs/ and, copied, in results/.
                found.setdefault(fingerprint(result), result)
    return list(found.values())


def read_result(path: Path) -> Result | None:
    """A finished result, or None for anything else."""
    try:
        values = read_json(path)
        check_result(values)
    except (OSError, ValueError):
        return None
    return Result(path.parent, values) if values.get("finished", True) else None


def check_result(values: Any) -> None:
    """Raise ValueError for what is no result of `train`, `eval` or `perturb`.

    Everything that tables and pages look at is there, and of its type.
    """
    try:
        whole, numbers = ["seed", "steps"], ["train_seconds", "eval_seconds", "images_per_second"]
        texts = ["name", "model", "date", "device", "precision"]
        if values["command"] != "perturb":
            whole += ["errors", "count"]
            numbers.append("error_percent")
            texts.append("dataset")
        result = Result(Path(), values)
        stopped = values.get("stopped") or {"on": ""}
        nothing = {"error_percent": 0.0, "step": 0, "evaluations": 0, "count": 0}
        best = values.get("best_on_test") or nothing
        scores = values.get("scores", {}).values()
        sound = (
            values["command"] in ("train", "eval", "perturb")
            and all(type(values[key]) is int and values[key] >= 0 for key in whole)
            and all(math.isfinite(values[key]) for key in numbers if key in values)
            and all(isinstance(values[key], str) for key in texts)
            and all(isinstance(text, str) for text in values["versions"].values())
            and isinstance(values["versions"]["torch"], str)
            and isinstance(values.get("git_commit"), str | None)
            and is_name(values["name"])
            and type(values.get("almost_correct", 0)) is int
            and all(math.isfinite(stopped[key]) for key in stopped if key != "on")
            and isinstance(stopped["on"], str)
            and all(math.isfinite(each["error_percent"]) for each in (best, *scores))
            and all(type(best[key]) is int for key in ("step", "evaluations", "count"))
        )
        # What else is looked at later is there, too.
        fingerprint(result)
        if sound and values["command"] != "perturb":
            sound = sound and 0 <= values["errors"] <= values["count"] != 0
            sound = sound and isinstance(result.reached_target | result.members_alike, bool)
            epochs_of_a_step(result.training)
    except (
        LookupError,
        TypeError,
        ValueError,
        AttributeError,
        ArithmeticError,
        UserError,
    ) as error:
        raise ValueError("is no result of capsrun") from error
    if not sound:
        raise ValueError("is no result of capsrun")


def fingerprint(result: Result) -> str:
    """The same for two copies of a result."""
    values = result.values
    what = [result.command, result.seed, result.settings, values["steps"], values["date"]]
    if result.command != "perturb":
        what += [result.tested, values["errors"], values["count"]]
        what += [values.get("train_seconds"), values.get("eval_seconds")]
    return repr(what)
