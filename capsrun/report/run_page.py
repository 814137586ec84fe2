"""The page of a finished run: what `result.json`, `metrics.jsonl` and the pictures say, as HTML.

It is made of the files of the run's folder alone, so it can be made again at any time.
"""

import os
import shlex
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from omegaconf import OmegaConf

from capsrun.disk import read_json, write_file
from capsrun.errors import notice
from capsrun.report import figures, plots
from capsrun.report.page import embedded, render
from capsrun.runs.reader import Result, is_finished_run
from capsrun.terminal import duration

NAME = "index.html"
MISTAKES = 8  # as many kinds of them are listed
# The headings of some pictures, which come first; the others are shown under their names.
HEADINGS = {
    "curves": "Learning curves",
    "confusion": "What is taken for what",
    "failures": "Worst mistakes",
    "reconstructions": "Hits and their reconstructions",
    "absent": "What is not there",
    "all_classes": "Every class, every dimension",
}
FORMATS = (".png", ".gif", ".apng")
FILES = ("result.json", "config.yaml", "metrics.jsonl", "checkpoint.pt")


def write_run_page(folder: Path) -> Path:
    """Write `index.html` beside the `result.json` of a folder, and return its path.

    A run's page links to the tests and pictures in its folder: where this is one of them, the run's
    page is written anew too.
    """
    result = Result(folder, read_json(folder / "result.json"))
    if result.command == "train" and result.metrics:
        (folder / "pictures").mkdir(exist_ok=True)
        figures.save(plots.run_curves(result.metrics), folder / "pictures" / "curves.png")
    write_file(folder / NAME, run_page(result))
    if result.command != "train":
        refresh_run_page(folder.parent)
    return folder / NAME


def refresh_run_page(folder: Path) -> None:
    """Write the page of a finished run anew, as something was made of it."""
    if is_finished_run(folder):
        try:
            write_run_page(folder)
        except OSError as error:  # it is read-only, say
            notice(f"the page of {folder} was not made again: {error!r}")


def run_page(result: Result) -> str:
    folder, values = result.folder, result.values
    shown = shown_pictures(result)
    made = [(f"{page.parent.name}/{NAME}", page.parent.name) for page in folder.glob(f"*/{NAME}")]
    made = sorted(made) + sorted((p.name, p.stem) for p in folder.glob("explore-*.html"))
    files = [name for name in FILES if (folder / name).exists()]
    board = shlex.join(["tensorboard", "--logdir", os.path.abspath(folder)])
    return render(
        "run.html",
        values=values,
        training=duration(values["train_seconds"]) if "train_seconds" in values else None,
        made=made,
        run=NAME if is_finished_run(folder.parent) else None,
        pictures=pictures(result, shown),
        config=OmegaConf.to_yaml(values["config"]),
        files=[*files, *(f"pictures/{path.name}" for path in shown.values())],
        tensorboard=board if (folder / "tensorboard").is_dir() else None,
    )


def shown_pictures(result: Result) -> dict[str, Path]:
    """The pictures that belong to a result, by their names, those first that one looks at first."""
    folder = result.folder / "pictures"
    # perturb leaves those of other classes and formats where they are.
    own = result.values.get("pictures")
    paths = folder.glob("*.*") if own is None else (folder / Path(name).name for name in own)
    found = {path.stem: path for path in paths if path.suffix in FORMATS and path.is_file()}
    return {name: found[name] for name in [*HEADINGS, *sorted(found)] if name in found}


def pictures(result: Result, shown: Mapping[str, Path]) -> list[dict[str, str]]:
    """What the page says of the pictures, and their pixels."""
    if result.command == "perturb" and "all_classes" in shown:
        shown = {"all_classes": shown["all_classes"]}  # the others are on it, and among the files
    texts = {"absent": "A class that is not in the image should stay dark."}
    if "confusion" in shown:
        texts["confusion"] = mistakes(result.values)
    return [
        {
            "heading": HEADINGS.get(name) or heading_of(name),
            "text": texts.get(name, ""),
            "source": embedded(path),
        }
        for name, path in shown.items()
    ]


def heading_of(name: str) -> str:
    """`routing_8` as `Routing of image 8`, `digit_5` as `Digit 5`."""
    words = name.replace("routing_", "routing of image ").replace("_", " ")
    return words[:1].upper() + words[1:]


def mistakes(values: Mapping[str, Any]) -> str:
    """The most frequent mistakes, in words."""
    names = list(values["errors_by_class"])
    counts = [
        (count, f"{names[true]} taken for {names[guess]}: {count:,}")
        for true, row in enumerate(values["confusion"])
        for guess, count in enumerate(row)
        if count > 1 and true != guess
    ]
    worst = sorted(counts, key=lambda entry: -entry[0])[:MISTAKES]
    return f"Most often {'; '.join(text for _, text in worst)}." if worst else ""
