"""Which training runs there are, how far each is, and how it was tested: from their folders alone.

Nothing here imports PyTorch, so that a list of runs is there at once, and no damaged file stops it.
"""

import math
from collections.abc import Iterator, Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from capsrun.disk import LOCK, MOST_TEXT_BYTES, holder, parse_json, read_bytes, read_yaml
from capsrun.disk import read_json as read_any_json

FINISHED, RUNNING, INTERRUPTED, DAMAGED = "finished", "running", "interrupted", "damaged"
# Files that a run writes while it goes on.
WRITTEN = ("result.json", "metrics.jsonl", "checkpoint.pt", "config.yaml")


class Damaged(Exception):
    """A file of a run that cannot be read; the message names it."""


@dataclass(frozen=True)
class Test:
    """What `eval` or `perturb` found out about a run."""

    folder: Path
    command: str
    dataset: str
    error_percent: float | None
    count: int | None
    written: float
    """Seconds since 1970."""


@dataclass
class Run:
    """One training run, as its folder shows it."""

    folder: Path
    status: str
    written: float
    """When one of its files was last written, in seconds since 1970."""
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
    tests: list[Test] = field(default_factory=list)
    """The latest last."""


def find_runs(runs_dir: Path) -> list[Run]:
    """Every training run below a folder, the one that was written last in the end."""
    folders = {path.parent for path in visible(runs_dir, "config.yaml")}
    tests = []
    for path in visible(runs_dir, "result.json"):
        values = read_json(path)
        if values is not None and values.get("command") == "train":
            folders.add(path.parent)  # of which config.yaml was lost
        elif values is not None and values.get("command") in ("eval", "perturb"):
            tests.append((path, values))
    runs = {folder: read_run(folder) for folder in folders}
    for path, values in tests:
        run = runs.get(tested_run(path, values, runs))
        if run is not None:
            run.tests.append(read_test(path, values))
    for run in runs.values():
        run.tests.sort(key=lambda test: test.written)
    return sorted(runs.values(), key=lambda run: (run.written, run.folder))


def visible(folder: Path, name: str) -> Iterator[Path]:
    """The files of a name below a folder, but for those in hidden folders."""
    for path in folder.rglob(name):
        if not any(part.startswith(".") for part in path.relative_to(folder).parts):
            yield path


def read_json(path: Path) -> dict[str, Any] | None:
    """What a JSON file holds, or None where that cannot be read or is no object."""
    try:
        values = read_any_json(path)
    except (OSError, ValueError):
        return None
    return values if isinstance(values, dict) else None


def tested_run(path: Path, values: Mapping[str, Any], runs: Mapping[Path, Run]) -> Path:
    """The folder of the run that a test is about: the one it lies in, or that of its checkpoint."""
    for parent in path.parents:
        if parent in runs:
            return parent
    try:
        tested = Path(str(values.get("checkpoint", ""))).parent.resolve()
    except (OSError, ValueError, RuntimeError):  # no path, or links that lead in a circle
        return path.parent
    return next((folder for folder in runs if folder.resolve() == tested), path.parent)


def read_test(path: Path, values: Mapping[str, Any]) -> Test:
    """What the `result.json` of a test says."""
    return Test(
        path.parent,
        str(values["command"]),
        printable(values.get("dataset") or "own image"),
        number(values.get("error_percent")),
        whole(values.get("count")),
        path.stat().st_mtime,
    )


def read_run(folder: Path) -> Run:
    """What the folder of a training run says, as far as it can be read."""
    run = Run(folder, DAMAGED, last_written(folder))
    try:
        if (folder / "result.json").exists():
            add_result(run)
        else:
            add_progress(run)
    except Damaged as damaged:
        run.status, run.problem = DAMAGED, str(damaged)
    except (
        LookupError,
        TypeError,
        ValueError,
        AttributeError,
        OverflowError,
    ):  # whatever somebody wrote there
        run.status, run.problem = DAMAGED, "its files are not those of a training run"
    return run


def last_written(folder: Path) -> float:
    """When a file of a run was last written; of a finished run, its result."""
    for names in (WRITTEN[:1], WRITTEN[1:]):
        times = [(folder / name).stat().st_mtime for name in names if (folder / name).exists()]
        if times:
            return max(times)
    return folder.stat().st_mtime


def add_result(run: Run) -> None:
    """Read what a finished run found."""
    values = read_json(run.folder / "result.json")
    if values is None:
        raise Damaged("result.json cannot be read")
    add_settings(run, values["config"])
    run.error_percent = number(values["error_percent"])
    run.steps = run.total_steps = int(values["steps"])
    run.status = FINISHED


def add_progress(run: Run) -> None:
    """Read how far a run without a result is."""
    try:
        config = read_yaml(run.folder / "config.yaml")
    except (OSError, ValueError) as error:
        raise Damaged("config.yaml cannot be read") from error
    add_settings(run, config)
    run.steps, run.total_steps = 0, whole(config["recipe"]["steps"])
    for row in metrics(run.folder):
        run.steps = whole(row.get("step", run.steps))
        run.total_steps = whole(row.get("total_steps", run.total_steps))
        run.error_percent = number(row.get("error_percent/test", run.error_percent))
    run.owner = holder(run.folder / LOCK)
    run.status = RUNNING if run.owner else INTERRUPTED
    if (run.folder / "not_finite.pt").exists():
        run.status, run.problem = INTERRUPTED, "its loss or a weight was not finite"


def add_settings(run: Run, config: Mapping[str, Any]) -> None:
    """Take over what a run was told."""
    run.config = config
    run.name = printable(config.get("name") or run.folder.parent.name)
    run.seed = int(config["seed"])
    run.dataset = printable(config["dataset"]["name"])
    run.model = printable(config["model"]["name"])


def metrics(folder: Path) -> Iterator[dict[str, Any]]:
    """The rows of `metrics.jsonl` that are whole: the last one may be half written."""
    try:
        lines = read_bytes(folder / "metrics.jsonl", MOST_TEXT_BYTES).splitlines()
    except (OSError, ValueError):
        return
    for line in lines:
        try:
            row = parse_json(line.decode(errors="replace"))
        except ValueError:
            continue
        if isinstance(row, dict):
            yield row


def printable(value: Any) -> str:
    """A value as text that moves no cursor and changes no colour."""
    return "".join(letter if letter.isprintable() else "?" for letter in str(value))


def whole(value: Any) -> int | None:
    """A whole number, or None for anything else."""
    return value if isinstance(value, int) and not isinstance(value, bool) else None


def number(value: Any) -> float | None:
    """A finite number, or None for anything else."""
    is_number = isinstance(value, int | float) and not isinstance(value, bool)
    return float(value) if is_number and math.isfinite(value) else None
