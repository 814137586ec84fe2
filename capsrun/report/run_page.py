"""The page of a finished run: what `result.json`, `metrics.jsonl` and the pictures say, as HTML.

It is made of the files of the run's folder alone, so it can be made again at any time.
"""

import os
import shlex
from collections.abc import Iterable, Mapping
from pathlib import Path
from typing import Any
from urllib.parse import quote

from omegaconf import OmegaConf

from capsrun.disk import read_json, replacing
from capsrun.errors import notice
from capsrun.report import figures, plots
from capsrun.report.page import plain, to_html
from capsrun.report.tables import table
from capsrun.runs.reader import Result
from capsrun.terminal import duration

NAME = "index.html"
MISTAKES = 8  # as many kinds of them are listed
# What is known about some pictures; the others are shown under their names.
PICTURES = {
    "curves": ("Learning curves", ""),
    "confusion": ("What is taken for what", ""),
    "failures": ("Worst mistakes", ""),
    "reconstructions": ("Hits and their reconstructions", ""),
    "absent": ("What is not there", "A class that is not in the image should stay dark."),
    "all_classes": ("Every class, every dimension", ""),
}
FORMATS = (".png", ".gif", ".apng")
FILES = ("result.json", "config.yaml", "metrics.jsonl", "checkpoint.pt")


def write_run_page(folder: Path) -> Path:
    """Write `index.html` beside the `result.json` of a folder, and return its path.

    A run's page links to the tests and pictures in its folder: where this is one of them, the run's
    page is written anew too.
    """
    path = folder / NAME
    result = Result(folder, read_json(folder / "result.json"))
    if result.command == "train" and result.metrics:
        (folder / "pictures").mkdir(exist_ok=True)
        curves = plots.run_curves(result.metrics)
        figures.save(curves, folder / "pictures" / "curves.png")
    text = "\n\n".join(paragraphs(result))
    with replacing(path) as temporary:
        temporary.write_text(to_html(text, folder), encoding="utf-8")
    if result.command != "train":
        refresh_run_page(folder.parent)
    return path


def refresh_run_page(folder: Path) -> None:
    """Write the page of a finished run anew, as something was made of it."""
    if not is_finished_run(folder):
        return
    try:
        write_run_page(folder)
    except (OSError, LookupError, TypeError, ValueError, AttributeError) as error:
        # It is of another version, or read-only.
        notice(f"the page of {folder} was not made again: {error!r}")


def is_finished_run(folder: Path) -> bool:
    """Whether a folder holds the result of a training run."""
    try:
        values = read_json(folder / "result.json")
    except (OSError, ValueError):
        return False
    return isinstance(values, dict) and values.get("command") == "train"


def paragraphs(result: Result) -> list[str]:
    """The page as Markdown."""
    values = result.values
    parts = [f"# {plain(title(values))}"]
    if "errors" in values:
        split = values.get("split", "test")
        parts.append(
            f"**{split} error {result.error_percent:.2f} %** "
            f"({values['errors']:,} of {values['count']:,})"
        )
    parts.append(table(("", ""), facts(values)))
    parts += links(result.folder)
    shown = shown_pictures(result)
    parts += pictures(result, shown)
    if values.get("routing"):
        parts += routing(values["routing"])
    parts += ["## Configuration", code(OmegaConf.to_yaml(values["config"]))]
    parts += ["## Files", files(result.folder, shown)]
    return parts


def title(values: Mapping[str, Any]) -> str:
    """What the page is of."""
    run = f"{values['name']}, seed {values['seed']}"
    if values["command"] == "eval":
        return f"{run}: tested on {values['dataset']} ({values['split']})"
    if values["command"] == "perturb":
        return f"{run}: what its capsules' dimensions do"
    return run


def facts(values: Mapping[str, Any]) -> list[list[str]]:
    """The lines of the table on top, of what is known."""
    versions = values["versions"]
    lines = {
        "data set": values["dataset"],
        "model": values["model"],
        "parameters": number(values.get("parameters")),
        "steps": number(values["steps"]),
        "training": duration(values["train_seconds"]) if "train_seconds" in values else None,
        "speed": speed(values),
        "best on test": best(values.get("best_on_test"), values),
        "averaged weights": averaged(values.get("scores", {})),
        "reconstruction error": squared(values.get("reconstruction_squared_error")),
        "at least one digit found": share(values),
        "device": f"{values['device']}, {values['precision']}",
        "date": values["date"],
        "versions": ", ".join(f"{name} {version}" for name, version in versions.items()),
        "commit": values.get("git_commit"),
        "checkpoint": values.get("checkpoint"),
        "notes": "; ".join(values.get("notes", [])) or None,
    }
    return [[name, plain(str(value))] for name, value in lines.items() if value is not None]


def number(value: int | None) -> str | None:
    return None if value is None else f"{value:,}"


def speed(values: Mapping[str, Any]) -> str | None:
    rate = values.get("images_per_second")
    return None if rate is None else f"{rate:,.0f} images/s"


def best(found: Mapping[str, Any] | None, values: Mapping[str, Any]) -> str | None:
    """The lowest of a result's test errors, which is chosen on test images."""
    if found is None:
        return None
    error, step = f"{found['error_percent']:.2f} %", f"{found['step']:,}"
    on = "" if found["count"] == values["count"] else f" on {found['count']:,} images"
    tests = f"the best of {found['evaluations']:,} tests{on}"
    return f"{error} after {step} steps, {tests}: not a result"


def averaged(scores: Mapping[str, Any]) -> str | None:
    """The test error of the averaged weights, where there are any."""
    found = scores.get("test_averaged")
    return None if found is None else f"test error {found['error_percent']:.2f} %"


def squared(value: float | None) -> str | None:
    return None if value is None else f"{value:.2f} (squared, summed over the pixels of an image)"


def share(values: Mapping[str, Any]) -> str | None:
    """In how many images of two digits at least one was found."""
    if "almost_correct" not in values:
        return None
    return f"{100 * values['almost_correct'] / values['count']:.2f} %"


def links(folder: Path) -> list[str]:
    """What was made of this run, or the run that this was made of."""
    made = [
        f"[{plain(page.parent.name)}]({quote(page.parent.name)}/{NAME})"
        for page in sorted(folder.glob(f"*/{NAME}"))
    ]
    made += [
        f"[{plain(page.stem)}]({quote(page.name)})"
        for page in sorted(folder.glob("explore-*.html"))
    ]
    parts = [f"Made of this run: {', '.join(made)}."] if made else []
    if is_finished_run(folder.parent):
        parts.append(f"[The run that this was made of](../{NAME})")
    return parts


def shown_pictures(result: Result) -> dict[str, str]:
    """The pictures that belong to a result: the name of the file, by its stem."""
    folder = result.folder / "pictures"
    # perturb leaves those of other classes and formats where they are.
    own = result.values.get("pictures")
    paths = (
        sorted(folder.glob("*.*")) if own is None else [folder / Path(name).name for name in own]
    )
    return {path.stem: path.name for path in paths if path.suffix in FORMATS and path.is_file()}


def pictures(result: Result, names: Mapping[str, str]) -> list[str]:
    """The pictures, those first that one looks at first."""
    parts = []
    for name in [*(name for name in PICTURES if name in names), *sorted(names.keys() - PICTURES)]:
        heading, text = PICTURES.get(name, (heading_of(name), ""))
        if result.command == "perturb" and name != "all_classes" and "all_classes" in names:
            continue  # it is on the sheet, and among the files
        parts += [f"## {plain(heading)}", *([text] if text else [])]
        path = f"pictures/{quote(names[name])}"
        if name == "confusion":
            parts += mistakes(result.values)
        parts.append(f"![{plain(heading)}]({path})")
    return parts


def heading_of(name: str) -> str:
    """`routing_8` as `Routing of image 8`, `digit_5` as `Digit 5`."""
    words = name.replace("routing_", "routing of image ").replace("_", " ")
    return words[:1].upper() + words[1:]


def mistakes(values: Mapping[str, Any]) -> list[str]:
    """The most frequent mistakes, in words."""
    names = list(values["errors_by_class"])
    counts = [
        (count, f"{names[true]} taken for {names[guess]}: {count:,}")
        for true, row in enumerate(values["confusion"])
        for guess, count in enumerate(row)
        if count > 1 and true != guess
    ]
    worst = sorted(counts, key=lambda entry: -entry[0])[:MISTAKES]
    return [plain("Most often " + "; ".join(text for _, text in worst) + ".")] if worst else []


def routing(images: Iterable[Mapping[str, Any]]) -> list[str]:
    """How far routing got from equal shares."""
    lines = [
        [
            str(image["image"]),
            " ".join(map(str, image["labels"])),
            " ".join(f"{bits:.3f}" for bits in image["entropy_bits"]),
            f"{image['most_bits']:.3f}",
        ]
        for image in images
    ]
    header = ("image", "classes", "entropy of the couplings after each iteration, bits", "at most")
    return ["## Entropy of the couplings", table(header, lines)]


def code(text: str) -> str:
    """A block of text as it is."""
    return "\n".join(f"    {line}" for line in text.splitlines())


def files(folder: Path, shown: Mapping[str, str]) -> str:
    """Links to what lies beside the page."""
    found = [f"[{name}]({name})" for name in FILES if (folder / name).exists()]
    found += [f"[pictures/{plain(name)}](pictures/{quote(name)})" for name in shown.values()]
    text = "; ".join(found)
    if (folder / "tensorboard").is_dir():
        command = shlex.join(["tensorboard", "--logdir", os.path.abspath(folder)])
        text += f". The same in TensorBoard: {plain(command)}"
    return text
