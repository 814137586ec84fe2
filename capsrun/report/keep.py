"""Copies of results, to be committed, say: `capsrun report keep=FOLDER`."""

import os
import re
import shutil
from collections.abc import Sequence
from pathlib import Path
from typing import Any

from capsrun import disk
from capsrun.disk import LOCK
from capsrun.errors import UserError
from capsrun.report.run_page import FILES, FORMATS
from capsrun.runs.reader import RESULT, Result, read_result

# What is copied of a run; of metrics.jsonl only what is not larger than this.
KEPT = FILES[:-1]  # all but the checkpoint
KEPT_BYTES = 500_000


def keep(results: Sequence[Result], folder: Path) -> None:
    """Copy results, metrics and the pictures of the first seed of each run into a folder.

    Links in a run's folder are not followed, nor are those below `folder`. Raises UserError, before
    anything is copied, where two different results would have one place, or where something else
    is in it.
    """
    places: dict[Path, Result] = {}
    for result in results:
        target = place(result, folder)
        if target.resolve() == result.folder.resolve():  # kept before
            continue
        refuse_link(target, folder)
        for other in (places.get(target), kept_before(target)):
            if other is not None and outcome(other) != outcome(result):
                raise UserError(
                    f"{other.folder} and {result.folder} are different results that would both be "
                    f"kept in {target}; move one of them away, or give its run another name"
                )
        places[target] = result
    first: dict[str, int] = {}
    for result in results:
        name = result.values["name"]
        first[name] = min(result.seed, first.get(name, result.seed))
    for target, result in places.items():
        copy(result.folder, target, pictures=result.seed == first[result.values["name"]])


def place(result: Result, folder: Path) -> Path:
    """Where a result is kept.

    A run's folder is named as the run, and what was made of it lies inside: under the name that it
    has beside its run, or that of its experiment, whose folders are named by seeds.
    """
    target = folder / result.values["name"] / f"seed{result.seed}"
    if result.command == "train":
        return target
    source = result.folder.absolute()
    return target / (source.parent if re.fullmatch(r"seed\d+", source.name) else source).name


def refuse_link(target: Path, folder: Path) -> None:
    """Raise UserError where what is written to a folder below another one would leave that."""
    parts = target.relative_to(folder).parts
    below = [folder.joinpath(*parts[: n + 1]) for n in range(len(parts))]
    for path in (*below, target / "pictures"):
        if path.is_symlink():
            raise UserError(f"{path} is a link, which keep=… does not follow; delete it")


def kept_before(target: Path) -> Result | None:
    """The result that is in a place. Raises UserError where something else is."""
    file = target / RESULT
    for name in (FILES[-1], LOCK):
        if (target / name).exists():
            raise UserError(f"{target} is the folder of a run; choose another keep=…")
    found = read_result(file)
    if found is None and os.path.lexists(file):
        raise UserError(f"{file} is damaged, or not of capsrun; move it away to keep another there")
    if found is None:  # which is copied first
        disk.refuse_foreign(target, (*KEPT, "pictures/*"), "choose another keep=…")
    return found


def outcome(result: Result) -> dict[str, Any]:
    """What makes another result of it: settings, test, and what was found but for the times."""
    values = result.values
    found = {key: values.get(key) for key in ("command", "steps", "errors", "count", "scores")}
    asked = {key: values["config"].get(key) for key in ("perturb", "dataset", "mask")}
    return found | {"settings": result.settings} | (asked if result.command == "perturb" else {})


def copy(source: Path, target: Path, pictures: bool) -> None:
    """Copy a result, with what else is small in its folder."""
    disk.make_folder(target)
    for file in KEPT:
        if disk.is_plain(source / file) and (source / file).stat().st_size <= KEPT_BYTES:
            copy_file(source / file, target / file)
    drawn = source / "pictures"
    if pictures and drawn.is_dir() and not drawn.is_symlink():
        disk.make_folder(target / "pictures")
        for path in drawn.iterdir():
            if disk.is_plain(path) and path.suffix in FORMATS:
                copy_file(path, target / "pictures" / path.name)


def copy_file(source: Path, target: Path) -> None:
    """Copy a file, in place of an earlier one or of a link."""
    with disk.replacing(target) as temporary:
        shutil.copyfile(source, temporary)
