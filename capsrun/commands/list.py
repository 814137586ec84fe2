"""`capsrun list`: the training runs that there are, and what they were tested on."""

import fnmatch
import json
import re
import time
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from tabulate import tabulate

from capsrun.config import TrainConfig, setting
from capsrun.disk import finite
from capsrun.errors import UserError, did_you_mean
from capsrun.names import folder_words, model_words, suggest
from capsrun.runs.reader import DAMAGED, FINISHED, INTERRUPTED, RUNNING, Result, Run, find_runs
from capsrun.settings import from_dict
from capsrun.terminal import BOLD, DIM, GREEN, RED, YELLOW, ago, counted, styled

HEADER = ("error", "steps", "data set", "model", "written", "status", "folder")
SIDES = ("right", "right", "left", "left", "right", "left", "left")
STYLES = {FINISHED: GREEN, RUNNING: YELLOW, INTERRUPTED: YELLOW, DAMAGED: RED}


@dataclass(kw_only=True)
class ListConfig:
    """What it needs. Values: `configs/list.yaml`."""

    runs_dir: str = setting(path=True)
    name: str | None
    """Only runs whose folder has this in its name; None: all."""
    json: bool


def main(config: ListConfig, overrides: Sequence[str]) -> None:
    """`capsrun list`: print the runs, and say what can be done with the latest."""
    runs = list_runs(config)
    if config.json:
        return
    finished = [run for run in runs if run.status == FINISHED]
    if not runs:
        suggest(["train", "dataset=mnist5k"], ["train", "dataset=mnist"])
    elif finished:  # the latest is the last
        try:
            trained = from_dict(TrainConfig, finished[-1].config)
        except UserError:  # it is of another version
            return suggest(["report", *folder_words(config)])
        trained.runs_dir = config.runs_dir  # the folder may have been moved
        words = model_words(trained, finished[-1].folder)
        suggest(["eval", *words], ["report", *folder_words(config)])
    elif any(run.status == INTERRUPTED for run in runs):
        print("next: the command that began a run goes on with it where it was interrupted")


def list_runs(config: ListConfig) -> list[Run]:
    """Print a line for each run, the latest last, and beneath it one for each of its tests.

    Raises UserError for a name that no run has.
    """
    found = find_runs(Path(config.runs_dir))
    pattern = f"*{config.name or ''}*"
    runs = [run for run in found if fnmatch.fnmatchcase(str(run.folder), pattern)]
    if found and not runs:
        parts = [part for run in found for part in (run.name, *re.split(r"[-+/]", run.name))]
        hint = did_you_mean(str(config.name), parts)
        raise UserError(
            f"of {counted(len(found), 'run')} in {config.runs_dir} none has {config.name!r} in its "
            f"name{hint}; without name=… all are listed"
        )
    if config.json:
        print(json.dumps(finite([as_plain(run) for run in runs]), indent=2, ensure_ascii=False))
    elif runs:
        print_table(runs)
    else:
        print(f"there is no run in {config.runs_dir}")
    return runs


def print_table(runs: Sequence[Run]) -> None:
    """Print the runs and their tests, the header and the states in colour."""
    now = time.time()
    lines = [
        line
        for run in runs
        for line in (run_line(run, now), *(test_line(test, run, now) for test in run.tests))
    ]
    header = [styled(title, BOLD) for title in HEADER]
    as_they_are: dict[str, Any] = {"disable_numparse": True, "preserve_whitespace": True}
    print(tabulate(lines, header, tablefmt="plain", colalign=SIDES, **as_they_are))


def run_line(run: Run, now: float) -> list[str]:
    """The cells of a run."""
    steps = "" if run.steps is None else f"{run.steps:,}"
    if run.steps is not None and run.status != FINISHED:
        steps += f" of {run.total_steps:,}" if run.total_steps else " of ?"
    folder = f"{run.folder} ({run.problem})" if run.problem else str(run.folder)
    status = styled(run.status, STYLES[run.status])
    written = ago(now - run.written)
    return [percent(run.error_percent), steps, run.dataset, run.model, written, status, folder]


def test_line(test: Result, run: Run, now: float) -> list[str]:
    """The cells of a test."""
    inside = test.folder.is_relative_to(run.folder)
    place = test.folder.relative_to(run.folder) if inside else test.folder
    error = percent(test.error_percent) if test.command == "eval" else ""
    command = styled(test.command, DIM)
    return [error, "", tested_on(test), "", ago(now - test.written), command, f"  {place}"]


def tested_on(test: Result) -> str:
    return test.values.get("dataset") or "own image"


def percent(error_percent: float | None) -> str:
    return "–" if error_percent is None else f"{error_percent:.2f} %"


def as_plain(run: Run) -> dict[str, object]:
    """A run as JSON can hold it, without its settings, which are in config.yaml in its folder."""
    values = {**vars(run), "folder": str(run.folder)}
    del values["config"]
    values["tests"] = [
        {
            "folder": str(test.folder),
            "command": test.command,
            "dataset": tested_on(test),
            "error_percent": test.values.get("error_percent"),
            "count": test.values.get("count"),
            "written": test.written,
        }
        for test in run.tests
    ]
    return values
