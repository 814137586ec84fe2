"""`capsrun report`: what was measured, beside what the paper reports, as Markdown and HTML."""

import os
import shutil
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from urllib.parse import quote

from capsrun import disk
from capsrun.disk import LOCK, locked, replacing
from capsrun.errors import UserError
from capsrun.experiments import Experiments
from capsrun.names import folder_words, suggest
from capsrun.report import plots, run_page
from capsrun.report.gallery import Pictures, curves, paper_figures
from capsrun.report.page import plain, to_html
from capsrun.report.questions import (
    HEADER,
    Answer,
    Question,
    answers,
    by_iterations,
    lines,
    network,
    questions,
)
from capsrun.report.rows import Group, Wanted, grouped, of_network, own_test
from capsrun.report.tables import (
    CHOSEN,
    HOW,
    ROWS,
    SUMMARY,
    Row,
    aligned,
    differences,
    length,
    measured,
    published,
    row_lines,
    summary_lines,
    table,
)
from capsrun.runs.progress import bar
from capsrun.runs.reader import Result, find_results
from capsrun.terminal import duration

GROUP_TITLES = {
    "table1": "Table 1: MNIST",
    "multimnist": "Table 1: MultiMNIST",
    "affnist": "Padded MNIST and affNIST (§5.2)",
    "section7": "Other data sets (§7)",
}
REFERENCE = "ablation_iterations_3"
# What `keep` copies of a run; of metrics.jsonl only what is not larger than this.
KEPT = ("result.json", "config.yaml", "metrics.jsonl")
KEPT_BYTES = 500_000


@dataclass(kw_only=True)
class ReportConfig:
    """What it needs. Values: `configs/report.yaml`."""

    sources: list[str]
    runs_dir: str
    out_dir: str
    keep: str | None


def main(config: ReportConfig, overrides: Sequence[str]) -> None:
    """`capsrun report`: build it, and say what makes the numbers that it lacks."""
    report(config, Experiments())
    suggest(["reproduce", "only_plan=true", *folder_words(config)])


def report(config: ReportConfig, experiments: Experiments) -> Path:
    """Write `report.md`, `report.html` and the pictures; returns the page's path.

    Raises UserError where there is no finished run, or for a folder that cannot be written.
    """
    results = find_results(config.sources)
    if not results:
        raise UserError(
            f"there is no finished run in {' or '.join(config.sources)}; make some with "
            "`capsrun reproduce budget=smoke`, say"
        )
    out_dir = Path(config.out_dir)
    disk.make_folder(out_dir)
    with locked(out_dir / LOCK):
        rows = write_report(results, experiments, out_dir)
    if config.keep is not None:
        keep(results, Path(config.keep))
    print(aligned(SUMMARY, summary_lines(rows)))
    print(f"\nthe whole report: {out_dir / 'report.html'}")
    return out_dir / "report.html"


def write_report(results: Sequence[Result], experiments: Experiments, out_dir: Path) -> list[Row]:
    """Write the files of the report into a folder, and return the rows of its tables."""
    shutil.rmtree(out_dir / "pictures", ignore_errors=True)
    disk.make_folder(out_dir / "pictures")
    names = bar(experiments.names(), "experiment", "results")
    rows = [make_row(name, experiments, results) for name in names]
    text = "\n\n".join(page(rows, results, experiments, Pictures(out_dir))) + "\n"
    for name, content in (("report.md", text), ("report.html", to_html(text, out_dir))):
        with replacing(out_dir / name) as temporary:
            temporary.write_text(content)
    return rows


def make_row(name: str, experiments: Experiments, results: Iterable[Result]) -> Row:
    """Find what belongs to an experiment."""
    about = experiments.about(name)
    training = experiments.training([f"experiment={name}"])
    test = experiments.tested((about.command or "train").split())
    wanted = Wanted.of(training, None if test is None else test.dataset, about.models)
    groups = grouped(result for result in results if wanted.fits(result))
    # The sort is stable: within both, the longest training stays first.
    groups.sort(key=lambda group: not all(wanted.is_of_full_length(r) for r in group.results))
    return Row(name, about, wanted, groups)


def page(
    rows: Sequence[Row],
    results: Sequence[Result],
    experiments: Experiments,
    pictures: Pictures,
) -> list[str]:
    """The paragraphs of the report."""
    dates = [result.values["date"] for result in results]
    made = " to ".join(dict.fromkeys((min(dates), max(dates))))
    parts = [
        "# capsrun: what the paper reports and what was measured",
        "*Dynamic Routing Between Capsules* (Sabour, Frosst, Hinton, NIPS 2017). Test errors in "
        "percent, at the end of training, on all test images (on 100,000 pairs of MultiMNIST); "
        "± is the standard deviation over seeds. The paper does not say of which step its numbers "
        "are; of the public ones a column has the lowest, and a mean of the last few tests counts "
        "as the last step. `capsrun report` built this page from "
        f"{len(results)} `result.json` files ({made}). A number stands in a row of the paper "
        "only if its network, images and loss are those of the row, and results whose settings "
        "differ are never averaged. What capsrun found is what the last step gave; what choosing "
        "the step on test images would have given, as many published numbers were chosen, stands "
        "beside it and is no result. **full length**: with the recipe and steps of the "
        "experiment's file, which are the authors' where they are known (but for the order of the "
        "images, `recipe.order`, which is asked about below); everything else is "
        "labelled with how long it was trained, and says little about the paper's number.",
        table(SUMMARY, summary_lines(rows)),
    ]
    of_ablations = [row for row in rows if row.about.group == "ablations"]
    reference = next(row for row in rows if row.name == REFERENCE)
    asked = questions(of_ablations, reference)
    trained = grouped(result for result in results if result.command == "train")
    found = answers(asked, reference, trained)
    others = other_runs(rows, results, found)
    for group, title in bar(GROUP_TITLES.items(), "section", "tables and curves"):
        own = of_group(group, rows)
        parts += [f"## {title}", *tables(group, rows), *others_table(own, others)]
        parts += curves(group, title, own, pictures)
    parts += ["## What the number depends on", *ablations(asked, found, pictures)]
    parts += others_table(of_ablations, others)
    parts += ["## Figures", *paper_figures(rows, results, pictures)]
    parts += ["## What is missing", *missing(rows)]
    parts += ["## Every result", provenance(results, pictures.out_dir)]
    return parts


def of_group(group: str, rows: Iterable[Row]) -> list[Row]:
    """The rows of a group, the baseline first."""
    own = [row for row in rows if row.about.group == group]
    return sorted(own, key=lambda row: ("baseline" not in row.name, row.name))


def tables(group: str, rows: Sequence[Row]) -> list[str]:
    """The tables of a group: one, but for affNIST one for each set of test images."""
    own = of_group(group, rows)
    parts = []
    if group == "affnist":
        for start, text in (
            ("padded", "**Padded MNIST**, on which training is stopped:"),
            ("affnist_c", "**affNIST**, its official test set:"),
            (
                "affnist_like",
                "**affnist_like**: made here of MNIST in the way of affNIST. It is *not* affNIST, "
                "so the paper's numbers are not beside it:",
            ),
        ):
            lines = [line for row in own if row.name.startswith(start) for line in row_lines(row)]
            parts += [text, table(ROWS, lines)]
    else:
        parts.append(table(ROWS, [line for row in own for line in row_lines(row)]))
    notes = dict.fromkeys(row.about.note for row in own if row.about.note)
    sources = [
        f"{row.about.title}: "
        + "; ".join(f"{published(n)} {CHOSEN[n.chosen]}, {n.source}" for n in row.about.public)
        for row in own
        if row.about.public
    ]
    parts += [f"Note: {note}." for note in notes]
    parts += [f"Public, {source}." for source in sources]
    parts += twice(own)
    return parts


def twice(rows: Iterable[Row]) -> list[str]:
    """Say so where a seed was run more than once, with other results."""
    return [
        f"{row.about.title}: seed {seed} was run more than once, with different results; the "
        "latest counts."
        for row in rows
        for group in row.groups
        for seed in group.twice
    ]


def ablations(asked: Sequence[Question], found: Sequence[Answer], pictures: Pictures) -> list[str]:
    """What each change does to a network, between runs that differ in nothing else."""
    parts = [
        "CapsNet with reconstruction on MNIST, one thing changed. Uniform coupling is what the "
        "first iteration computes, so it is the network with one iteration.",
        table(HEADER, lines(asked, found)),
        "Each difference has a standard error of as many pairs as there are seeds: with five, "
        "chance alone brings one difference in twenty more than 2.8 of them from zero, with three "
        "more than 4.3. Without reconstruction a seed begins with other weights, as a decoder is "
        "drawn before them; all other pairs begin alike, but where that is what is changed. The "
        "authors' order takes 25 epochs to show every digit, 25 shifts of it one after the other: "
        "30 epochs show the first fifth of the digits a second time.",
    ]
    points = by_iterations(found)
    if points is not None:
        base, errors = points
        figure = plots.error_by_iterations(errors, f"{network(base)}, {length(None, base)}")
        parts.append(pictures.draw("iterations", figure, "test error against routing iterations"))
    return parts


def other_runs(
    rows: Sequence[Row], results: Iterable[Result], found: Iterable[Answer]
) -> dict[str, list[Group]]:
    """What belongs to no experiment and answers no question, by the name of the nearest."""
    compared = {id(r) for a in found for g in (a.base, a.changed) if g for r in g.results}
    left = [
        result
        for result in results
        if not repeats_training(result)
        and id(result) not in compared
        and not any(row.wanted.fits(result) for row in rows if row.about.group != "ablations")
    ]
    nearest_to: dict[str, list[Group]] = {}
    for group in grouped(left):
        nearest_to.setdefault(nearest(rows, group).name, []).append(group)
    return nearest_to


def repeats_training(result: Result) -> bool:
    """Whether a result tells nothing that the one of its training run does not."""
    if result.command != "eval":
        return result.command == "perturb"
    return result.tested == own_test(result.training)


def nearest(rows: Iterable[Row], group: Group) -> Row:
    """The experiment tested on the same data set, if any, that differs in the fewest settings."""
    result = group.results[0]
    ours = of_network(result.settings)

    def distance(row: Row) -> tuple[int, int, int]:
        asked = of_network(row.wanted.settings)
        tested_on = row.wanted.tested.get("name") or asked["dataset.name"].strip("'")
        return (
            tested_on != result.tested_on,
            bool(row.wanted.tested) != bool(result.tested),
            sum(ours.get(key) != asked.get(key) for key in {*ours, *asked}),
        )

    own = (row for row in rows if row.about.group != "figures" and row.about.command is not None)
    return min(own, key=distance)


def others_table(rows: Sequence[Row], others: Mapping[str, Sequence[Group]]) -> list[str]:
    """What is like some rows, but is of another network, of other images or tested otherwise."""
    lines = [
        [
            ", but ".join(filter(None, (row.about.title, differences(row, group)))),
            f"{group.results[0].tested_on} ({group.results[0].values['count']:,} images)",
            measured(group),
            " ".join(str(result.seed) for result in group.results),
            length(None, group),
            "; ".join(group.devices) + ", " + group.results[0].values["precision"],
        ]
        for row in rows
        for group in others.get(row.name, ())
    ]
    if not lines:
        return []
    header = ("other networks, images or tests", "tested on", "test error %", *HOW)
    return ["Not the paper's, so nothing of the paper is beside them:", table(header, lines)]


def seconds_at_full_length(row: Row) -> str:
    """About how long one seed trains at full length, by the speed of its longest run."""
    group, command = row.best, row.about.command
    if group is None or command != "train":
        return ""
    result, training = group.results[0], row.wanted.settings
    speed = result.values["train_seconds"] / result.values["steps"]
    steps = training["recipe.steps"]
    if not isinstance(steps, float):  # its length is in epochs
        return ""
    return f"{duration(speed * steps)} ({result.values['device']})"


def missing(rows: Sequence[Row]) -> list[str]:
    """The experiments that have too few seeds at full length, and what makes them."""
    lines = []
    groups = (*GROUP_TITLES, "ablations", "figures")
    for row in (row for group in groups for row in of_group(group, rows)):
        if not row.missing or row.about.command is None:
            continue
        lines.append(
            [
                row.label,
                f"{row.missing} of {row.asked}",
                f"`capsrun reproduce targets=[{row.name}] budget=full`",
                seconds_at_full_length(row),
            ]
        )
    if not lines:
        return ["Nothing."]
    header = ("at full length", "seeds missing", "command", "a seed takes about")
    return [table(header, lines), "`make reproduce BUDGET=full` runs all of them."]


def provenance(results: Iterable[Result], out_dir: Path) -> str:
    """Where each number comes from, with a link to the page of its run where there is one."""
    header = (
        "run",
        "seed",
        "tested on",
        "error %",
        "of",
        "steps",
        "training",
        "device",
        "torch",
        "date",
        "commit",
    )
    lines = []
    for result in results:
        if result.command == "perturb":
            continue
        values = result.values
        lines.append(
            [
                name_with_page(result, out_dir),
                str(result.seed),
                result.tested.get("name", values["dataset"]),
                f"{result.error_percent:.2f}",
                f"{values['count']:,}",
                f"{values['steps']:,}",
                duration(values["train_seconds"]),
                f"{values['device']}, {values['precision']}",
                values["versions"]["torch"],
                values["date"],
                (values.get("git_commit") or "–")[:8],
            ]
        )
    return table(header, sorted(lines))


def name_with_page(result: Result, out_dir: Path) -> str:
    """The name of a run, as a link to its page where that is at hand."""
    name, page = plain(str(result.values["name"])), result.folder / run_page.NAME
    if not page.exists():
        return name
    return f"[{name}]({quote(os.path.relpath(page, out_dir))})"


def keep(results: Sequence[Result], folder: Path) -> None:
    """Copy results, metrics and the pictures of the first seed of each run, to be kept.

    A run's folder is named as the run, and what was made of it lies inside: an `eval` has the name
    that it has beside its run, or that of its experiment.
    """
    first: dict[str, int] = {}
    for result in results:
        name = result.values["name"]
        first[name] = min(result.seed, first.get(name, result.seed))
    for result in results:
        name, source = result.values["name"], result.folder
        target = folder / name / f"seed{result.seed}"
        if result.command != "train":
            beside = source.name.startswith(("eval-", "perturb-"))
            target /= source.name if beside else source.parent.name
        if target.resolve() == source.resolve():  # kept before
            continue
        disk.make_folder(target)
        for file in KEPT:
            path = source / file
            if path.exists() and path.stat().st_size <= KEPT_BYTES:
                shutil.copyfile(path, target / file)
        if result.seed == first[name] and (source / "pictures").is_dir():
            shutil.copytree(source / "pictures", target / "pictures", dirs_exist_ok=True)
