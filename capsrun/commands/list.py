"""`capsrun list`: the training runs that there are, and what they were tested on."""

import contextlib
import fnmatch
import functools
import itertools
import json
import operator
import re
import statistics
import time
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from tabulate import tabulate

from capsrun.config import TrainConfig
from capsrun.data_config import title_of
from capsrun.disk import finite
from capsrun.errors import UserError, did_you_mean
from capsrun.fields import setting
from capsrun.names import folder_words, model_words, suggest
from capsrun.report.rows import Group, grouped
from capsrun.report.tables import mean_and_spread, span
from capsrun.runs.reader import DAMAGED, FINISHED, INTERRUPTED, RUNNING, Result, Run, find_runs
from capsrun.settings import flattened, from_dict, written
from capsrun.terminal import BOLD, DIM, GREEN, RED, YELLOW, ago, counted, printable, styled

# Between both stand the columns that are asked for.
HEADER = (("error", "steps", "data set", "model"), ("written", "status", "folder"))
SIDES = (("right", "right", "left", "left"), ("right", "left", "left"))
MEANS, SIDES_OF_MEANS = (
    (HEADER[0], ("seeds", "written", "run")),
    (SIDES[0], ("left", "right", "left")),
)
STYLES = {FINISHED: GREEN, RUNNING: YELLOW, INTERRUPTED: YELLOW, DAMAGED: RED}


@dataclass(kw_only=True)
class ListConfig:
    """What it needs. Values: `configs/list.yaml`."""

    runs_dir: str = setting(path=True)
    name: str | None
    """Only runs whose folder has this in its name; None: all."""
    columns: list[str]
    """Settings that are shown of each."""
    means: bool
    """Whether finished runs that differ in nothing but the seed have one line."""
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
            trained.runs_dir = config.runs_dir  # the folder may have been moved
            words = model_words(trained, finished[-1].folder)
        except UserError:  # it is of another version
            return suggest(["report", *folder_words(config)])
        suggest(["eval", *words], ["report", *folder_words(config)])
    elif any(run.status == INTERRUPTED for run in runs):
        print("next: the command that began a run goes on with it where it was interrupted")


def list_runs(config: ListConfig) -> list[Run]:
    """Print a line for each run, the latest last, and beneath it one for each of its tests.

    Or, where means are asked for, one for each group of runs. Raises UserError for a name, or a
    setting, that no run has.
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
    refuse_unknown(config.columns, runs)
    groups = means(runs) if config.means else []
    if config.json:
        plain = [mean_as_plain(group, config.columns) for group in groups]
        plain = plain if config.means else [as_plain(run, config.columns) for run in runs]
        print(json.dumps(finite(plain), indent=2, ensure_ascii=False))
    elif groups:
        print_means(groups, config.columns)
        if left := sum(run.result is None for run in runs):
            print(f"not finished, and not shown: {left}")
    elif runs and not config.means:
        print_table(runs, config.columns)
    else:
        print(f"there is no {'finished ' if runs else ''}run in {config.runs_dir}")
    return runs


def refuse_unknown(columns: Sequence[str], runs: Sequence[Run]) -> None:
    """Raise UserError for a setting that no run has."""
    known = {key for run in runs for key, _ in flattened(run.config)}
    for key in columns:
        if runs and key not in known:
            hint = did_you_mean(key, known)
            raise UserError(
                f"no run has a setting {key!r}{hint}; `capsrun train --help` lists them"
            )


def settings_of(config: Mapping[str, Any], columns: Sequence[str]) -> dict[str, Any]:
    """The settings that are asked for, by their names with dots, but for those that there are not.

    A CNN, say, has no `routing.iterations`.
    """
    found = {}
    for key in columns:
        with contextlib.suppress(LookupError, TypeError):
            found[key] = functools.reduce(operator.getitem, key.split("."), config)
    return found


def cells(config: Mapping[str, Any], columns: Sequence[str]) -> list[str]:
    """The same as they are typed."""
    found = settings_of(config, columns)
    return [printable(written(found[key])) if key in found else "" for key in columns]


def print_columns(
    lines: Sequence[list[str]],
    header: tuple[Sequence[str], Sequence[str]],
    sides: tuple[Sequence[str], Sequence[str]],
    columns: Sequence[str],
) -> None:
    """Print a table, its header in colour, with the settings that are asked for in the middle."""
    titles = [styled(title, BOLD) for title in (*header[0], *columns, *header[1])]
    align = (*sides[0], *["right"] * len(columns), *sides[1])
    as_they_are: dict[str, Any] = {"disable_numparse": True, "preserve_whitespace": True}
    print(tabulate(lines, titles, tablefmt="plain", colalign=align, **as_they_are))


def print_table(runs: Sequence[Run], columns: Sequence[str]) -> None:
    """Print the runs and their tests."""
    now = time.time()
    lines = []
    for run in runs:
        lines.append(run_line(run, columns, now))
        lines += [test_line(test, run, columns, now) for test in run.tests]
    print_columns(lines, HEADER, SIDES, columns)


def means(runs: Sequence[Run]) -> list[Group]:
    """The finished runs, together where they differ in the seed only; the latest last."""
    groups = grouped(run.result for run in runs if run.result is not None)
    return sorted(groups, key=last_written)


def last_written(group: Group) -> float:
    """When its latest run was, in seconds since 1970."""
    return max(result.written for result in group.results)


def print_means(groups: Sequence[Group], columns: Sequence[str]) -> None:
    """Print a line for each group of runs: the mean of their errors ± its standard deviation."""
    now = time.time()
    lines = []
    for group in groups:
        of_each = [cells(result.training, columns) for result in group.results]
        lines.append(
            [
                f"{mean_and_spread(group.errors)} %",
                span(group.steps, ","),
                *printable(
                    [title_of(group.first.training["dataset"]), group.first.values["model"]]
                ),
                *(" ".join(dict.fromkeys(column)) for column in zip(*of_each)),
                " ".join(str(result.seed) for result in group.results),
                ago(now - last_written(group)),
                printable(", ".join(group.names)),
            ]
        )
    print_columns(lines, MEANS, SIDES_OF_MEANS, columns)
    for remark in itertools.chain(*(group.remarks for group in groups)):
        print(printable(remark))


def together(group: Group, key: str) -> Any:
    """A setting of a group's runs; a list where they differ in it, as in the seed."""
    found = [settings_of(result.training, [key]).get(key) for result in group.results]
    return found[0] if all(value == found[0] for value in found) else found


def mean_as_plain(group: Group, columns: Sequence[str]) -> dict[str, object]:
    """A group of runs as JSON can hold it."""
    spread = statistics.stdev(group.errors) if len(group.errors) > 1 else None
    return {
        "names": group.names,
        "dataset": title_of(group.first.training["dataset"]),
        "model": group.first.values["model"],
        "settings": {
            key: together(group, key) for key in columns if settings_of(group.first.training, [key])
        },
        "seeds": [result.seed for result in group.results],
        "seeds_run_twice": group.twice,
        "steps": group.steps,
        "errors_percent": group.errors,
        "error_percent": group.mean,
        "standard_deviation": spread,
    }


def run_line(run: Run, columns: Sequence[str], now: float) -> list[str]:
    """The cells of a run."""
    steps = "" if run.steps is None else f"{run.steps:,}"
    if run.steps is not None and run.status != FINISHED:
        steps += f" of {run.total_steps:,}" if run.total_steps else " of ?"
    folder = f"{run.folder} ({run.problem})" if run.problem else str(run.folder)
    status = styled(run.status, STYLES[run.status])
    head = [percent(run.error_percent), steps, *printable([run.dataset, run.model])]
    rest = [ago(now - run.written), status, printable(folder)]
    return [*head, *cells(run.config, columns), *rest]


def test_line(test: Result, run: Run, columns: Sequence[str], now: float) -> list[str]:
    """The cells of a test."""
    inside = test.folder.is_relative_to(run.folder)
    place = test.folder.relative_to(run.folder) if inside else test.folder
    error = percent(test.error_percent) if test.command == "eval" else ""
    command = styled(test.command, DIM)
    head = [error, "", printable(tested_on(test)), "", *[""] * len(columns)]
    return [*head, ago(now - test.written), command, f"  {printable(str(place))}"]


def tested_on(test: Result) -> str:
    return test.values.get("dataset") or "own image"


def percent(error_percent: float | None) -> str:
    return "–" if error_percent is None else f"{error_percent:.2f} %"


def as_plain(run: Run, columns: Sequence[str]) -> dict[str, object]:
    """A run as JSON can hold it, with the settings that are asked for; all are in config.yaml."""
    values = {**vars(run), "folder": str(run.folder)}
    del values["config"], values["result"]
    values["settings"] = settings_of(run.config, columns)
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
