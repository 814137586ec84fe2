"""`capsrun list`: the training runs that there are, and what they were tested on."""

import dataclasses
import fnmatch
import json
import re
import time
from collections.abc import Iterable, Sequence
from dataclasses import dataclass
from pathlib import Path

from capsrun.config import TrainConfig
from capsrun.errors import UserError, did_you_mean
from capsrun.names import folder_words, model_words, suggest
from capsrun.runs.inventory import (
    DAMAGED,
    FINISHED,
    INTERRUPTED,
    RUNNING,
    Run,
    Test,
    find_runs,
)
from capsrun.settings import from_dict
from capsrun.terminal import BOLD, DIM, GREEN, RED, YELLOW, ago, styled

HEADER = ("error", "steps", "data set", "model", "written", "status", "folder")
TO_THE_RIGHT = ("error", "steps", "written")
STYLES = {FINISHED: GREEN, RUNNING: YELLOW, INTERRUPTED: YELLOW, DAMAGED: RED}


@dataclass(kw_only=True)
class ListConfig:
    """What it needs. Values: `configs/list.yaml`."""

    runs_dir: str
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
    now = time.time()
    found = find_runs(Path(config.runs_dir))
    runs = [run for run in found if config.name is None or is_named(run, config.name)]
    if found and not runs:
        parts = [part for run in found for part in (run.name, *re.split(r"[-+/]", run.name))]
        hint = did_you_mean(str(config.name), parts)
        raise UserError(
            f"of {len(found):,} runs in {config.runs_dir} none has {config.name!r} in its name"
            f"{hint}; without name=… all are listed"
        )
    if config.json:
        print(json.dumps([as_plain(run) for run in runs], indent=2, ensure_ascii=False))
    elif runs:
        lines: list[tuple[str, ...]] = [HEADER]
        for run in runs:
            lines.append(run_line(run, now))
            lines += [test_line(test, run, now) for test in run.tests]
        for line in aligned(lines):
            print(line)
    else:
        print(f"there is no run in {config.runs_dir}")
    return runs


def is_named(run: Run, pattern: str) -> bool:
    """Whether the folder of a run has these characters in it, where * stands for any."""
    return fnmatch.fnmatchcase(str(run.folder), f"*{pattern}*")


def run_line(run: Run, now: float) -> tuple[str, ...]:
    """The cells of a run."""
    if run.steps is None:
        steps = ""
    elif run.status == FINISHED:
        steps = f"{run.steps:,}"
    else:
        steps = f"{run.steps:,} of {run.total_steps or '?':{',' if run.total_steps else ''}}"
    folder = f"{run.folder} ({run.problem})" if run.problem else str(run.folder)
    return (
        percent(run.error_percent),
        steps,
        run.dataset,
        run.model,
        ago(now - run.written),
        run.status,
        folder,
    )


def test_line(test: Test, run: Run, now: float) -> tuple[str, ...]:
    """The cells of a test."""
    inside = test.folder.is_relative_to(run.folder)
    place = test.folder.relative_to(run.folder) if inside else test.folder
    error = percent(test.error_percent) if test.command == "eval" else ""
    return (error, "", test.dataset, "", ago(now - test.written), test.command, f"  {place}")


def percent(error_percent: float | None) -> str:
    """An error as text."""
    return "–" if error_percent is None else f"{error_percent:.2f} %"


def aligned(lines: Sequence[tuple[str, ...]]) -> Iterable[str]:
    """Lines with their cells below each other, the header and the states in colour."""
    widths = [max(len(line[column]) for line in lines) for column in range(len(HEADER))]
    for number, line in enumerate(lines):
        cells = []
        for title, cell, width in zip(HEADER, line, widths, strict=True):
            padded = f"{cell:>{width}}" if title in TO_THE_RIGHT else f"{cell:<{width}}"
            if number == 0:
                padded = styled(title, BOLD).join(padded.split(title))
            elif title == "status":
                padded = styled(padded, STYLES.get(cell, DIM))
            cells.append(padded)
        yield "  ".join(cells).rstrip()


def as_plain(run: Run) -> dict[str, object]:
    """A run as JSON can hold it; times are in seconds since 1970.

    Without its settings, which are in config.yaml in its folder.
    """
    values = dataclasses.asdict(dataclasses.replace(run, config={}))
    del values["config"]
    values["folder"] = str(run.folder)
    for test, plain in zip(run.tests, values["tests"], strict=True):
        plain["folder"] = str(test.folder)
    return values
