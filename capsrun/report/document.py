"""The report as Markdown: its tables and figures, section by section."""

import os
from collections.abc import Iterable, Sequence
from pathlib import Path
from urllib.parse import quote

from capsrun.experiments import GROUPS, Experiments
from capsrun.report import changed, plots, questions, run_page, tables
from capsrun.report.gallery import Pictures, curves, paper_figures
from capsrun.report.own import own_groups
from capsrun.report.own import section as own_section
from capsrun.report.page import render
from capsrun.report.rows import Group, Row, grouped, of_group
from capsrun.report.tables import TABLES, table
from capsrun.runs.reader import Result
from capsrun.terminal import duration
from capsrun.yaml_files import own_option

# What is said of the test images where a group has a table for each set of them.
IMAGES = {
    "mnist_padded": "**Padded MNIST**, on which training is stopped:",
    "affnist": "**affNIST**, its official test set:",
    "affnist_like": (
        "**affnist_like**: made here of MNIST in the way of affNIST. It is *not* affNIST, "
        "so the paper's numbers are not beside it:"
    ),
}
PROVENANCE = ["run", "seed", "tested on", "error %", "of", "steps", "training", "device"]
PROVENANCE += ["torch", "date", "commit"]


def document(
    rows: Sequence[Row], results: Sequence[Result], experiments: Experiments, pictures: Pictures
) -> str:
    """The whole report; draws its pictures."""
    _, found = questions.questions_and_answers(rows, trainings(results))
    own = own_runs(rows, results, found)
    sections = []
    for group in TABLES:
        group_rows, title = of_group(group, rows), GROUPS[group]
        if not group_rows:  # none of one's own
            continue
        drawn = curves(group, title, group_rows, pictures)
        sections.append((title, [*group_tables(group_rows), *drawn]))
    dates = [result.values["date"] for result in results]
    return render(
        "report.md",
        results=len(results),
        dates=" to ".join(dict.fromkeys((min(dates), max(dates)))),
        **main_tables(rows, results),
        sections=sections,
        all_changed=list(changed.sections(changed.kinds(results))),
        after_ablations=[differences_figure(found, pictures), iterations_figure(found, pictures)],
        after_changed=[changed_figure(results, pictures)],
        own=own_section(own, experiments, pictures),
        figures=paper_figures(rows, results, pictures),
        missing=missing(rows),
        provenance=provenance(results, pictures.out_dir),
    )


def own_runs(
    rows: Sequence[Row], results: Iterable[Result], found: Iterable[questions.Answer]
) -> list[Group]:
    """The runs that belong to no row of the paper and answer none of its questions."""
    return own_groups(rows, results, [g for a in found for g in (a.base, a.changed) if g])


def trainings(results: Iterable[Result]) -> list[Group]:
    """What training itself found."""
    return grouped(result for result in results if result.command == "train")


def main_tables(rows: Sequence[Row], results: Sequence[Result]) -> dict[str, str]:
    """The tables that other pages show too, by the name of their place there."""
    asked, answers = questions.questions_and_answers(rows, trainings(results))
    routings = [question for question in asked if is_routing(question)]
    return {
        "summary": table(tables.SUMMARY, tables.summary_lines(rows)),
        "questions": table(questions.HEADER, questions.lines(asked, answers)),
        "routings": table(questions.HEADER, questions.lines(routings, answers)),
        "changed": changed.summary(changed.kinds(results)),
    }


def is_routing(question: questions.Question) -> bool:
    """Whether it is about another routing algorithm, or none."""
    return "routing.algorithm" in question.change or question.change == {"routing.iterations": 1}


def group_tables(rows: Sequence[Row]) -> list[str | None]:
    """The tables of a group: one, but for affNIST one for each set of test images."""
    parts: list[str | None] = []
    for text in (*IMAGES.values(), None):
        own = [row for row in rows if IMAGES.get(row.tested_on) == text]
        lines = [line for row in own for line in tables.row_lines(row)]
        parts += [text, table(tables.ROWS, lines)] if own else []
    parts += [f"Note: {note}." for note in dict.fromkeys(row.about.note for row in rows) if note]
    for row in rows:
        public = "; ".join(
            f"{tables.published(n)} {tables.CHOSEN[n.chosen]}, {n.source}" for n in row.about.public
        )
        parts += [f"Public, {row.about.title}: {public}."] if public else []
    parts += [f"{remark}." for row in rows for group in row.groups for remark in group.remarks]
    return parts


def differences_figure(found: Sequence[questions.Answer], pictures: Pictures) -> str:
    """What each change does to the runs of which most is asked, where there are several seeds."""
    asked = questions.most_asked(found)
    if asked is None:
        return ""
    base, points = asked
    figure = plots.differences(points, f"{questions.network(base)}, {tables.length(None, base)}")
    what = "differences by what is changed, of each seed, with 95 % intervals"
    return pictures.draw("differences", figure, what)


def iterations_figure(found: Sequence[questions.Answer], pictures: Pictures) -> str:
    """Error against routing iterations, where there is something to compare."""
    points = questions.by_iterations(found)
    if points is None:
        return ""
    base, errors = points
    title = f"{questions.network(base)}, {tables.length(None, base)}"
    figure = plots.error_by_iterations(errors, title)
    return pictures.draw("iterations", figure, "test error against routing iterations")


def changed_figure(results: Iterable[Result], pictures: Pictures) -> str:
    """Error against what images are changed by, where there are several seeds of something."""
    figure = changed.figure(changed.kinds(results))
    return "" if figure is None else pictures.draw("changed", figure, "error on changed images")


def missing(rows: Sequence[Row]) -> str:
    """The experiments that have too few seeds at full length, and what makes them; maybe none."""
    option = "".join(f" {word}" for word in own_option())
    found = [
        [
            row.label,
            f"{row.missing} of {row.asked}",
            f"`capsrun reproduce targets={row.name} budget=full{option}`",
        ]
        for group in (*TABLES, "ablations", "figures")
        for row in of_group(group, rows)
        if row.missing and row.about.command is not None
    ]
    return table(("at full length", "seeds missing", "command"), found) if found else ""


def provenance(results: Iterable[Result], out_dir: Path) -> str:
    """Where each number comes from, with a link to the page of its run where there is one."""
    found = [
        [
            name_with_page(result, out_dir),
            str(result.seed),
            result.tested_on,
            f"{result.error_percent:.2f}",
            f"{result.values['count']:,}",
            f"{result.values['steps']:,}",
            duration(result.values["train_seconds"]),
            f"{result.values['device']}, {result.values['precision']}",
            result.values["versions"]["torch"],
            result.values["date"],
            (result.values.get("git_commit") or "–")[:8],
        ]
        for result in results
        if result.command != "perturb"
    ]
    return table(PROVENANCE, sorted(found))


def name_with_page(result: Result, out_dir: Path) -> str:
    """The name of a run, as a link to its page where that is at hand."""
    name, page = result.values["name"], result.folder / run_page.NAME
    if not page.exists():
        return name
    return f"[{name}]({quote(os.fsencode(os.path.relpath(page, out_dir)))})"
