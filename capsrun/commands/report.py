"""`capsrun report`: what was measured, beside what the paper reports, as Markdown and HTML."""

import csv
import html
import io
import re
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any, NamedTuple

from tabulate import tabulate

from capsrun import disk
from capsrun.errors import UserError, notice
from capsrun.experiments import GROUPS, Experiments
from capsrun.fields import setting
from capsrun.names import folder_words, suggest
from capsrun.report import own
from capsrun.report.document import document, main_tables, own_runs, trainings
from capsrun.report.gallery import Pictures
from capsrun.report.keep import keep
from capsrun.report.page import plain, to_html
from capsrun.report.questions import questions_and_answers
from capsrun.report.rows import Row, make_row, of_group
from capsrun.report.tables import NOT_RUN, SUMMARY, shown, summary_lines
from capsrun.runs.progress import bar
from capsrun.runs.reader import Result, find_results

# What it leaves in its folder.
# What may be written anew in other files: see `main_tables`.
TABLES = "summary|questions|routings|changed"
FILES = PAGE, HTML, TEX, CSV = "report.md", "report.html", "report.tex", "report.csv"
# What `report.csv` has of a result before its settings.
COLUMNS = ["name", "seed", "command", "error_percent", "errors", "count", "steps", "train_seconds"]
COLUMNS += ["parameters", "device", "date", "git_commit"]


@dataclass(kw_only=True)
class ReportConfig:
    """What it needs. Values: `configs/report.yaml`."""

    sources: list[str] = setting(path=True)
    runs_dir: str = setting(path=True)
    out_dir: str = setting(path=True)
    keep: str | None = setting(path=True)
    update: list[str] = setting(path=True)
    """Markdown files with a place for tables of the report; see `update_tables`."""


def main(config: ReportConfig, overrides: Sequence[str]) -> None:
    """`capsrun report`: build it, and say what makes the numbers that it lacks."""
    report(config, Experiments())
    suggest(["reproduce", "only_plan=true", *folder_words(config)])


def report(config: ReportConfig, experiments: Experiments) -> Path:
    """Write `report.md`, `report.html` and the pictures; returns the page's path.

    Raises UserError where there is no finished run, for a folder that cannot be written or is
    somebody else's, and, before anything is written, for a page that cannot be updated.
    """
    for path in config.update:
        places(Path(path))
    if not config.sources:
        raise UserError("sources=[] names no folder in which runs are; take sources=[runs], say")
    results = find_results(config.sources)
    if not results:
        raise UserError(
            f"there is no finished run in {' or '.join(config.sources)}; make some with "
            "`capsrun reproduce budget=smoke`, say"
        )
    out_dir = Path(config.out_dir)
    if any((out_dir / name).exists() for name in ("config.yaml", "result.json")):
        raise UserError(f"{out_dir} is the folder of a run; {disk.ELSEWHERE}")
    as_text = [Result(result.folder, plain(result.values)) for result in results]
    # A report that was committed is without its lock.
    with disk.own_folder(out_dir, *(() if is_report(out_dir / PAGE) else (*FILES, "pictures/*"))):
        rows = write_report(as_text, experiments, out_dir)
        tables = measured(rows, as_text, experiments)
        write_tables(tables, results, out_dir)
    if config.keep is not None:
        keep(results, Path(config.keep))
    for path in config.update:
        update_tables(Path(path), main_tables(rows, as_text))
    print_tables(tables, rows)
    print(f"the whole report: {out_dir / HTML}")
    return out_dir / HTML


def is_report(page: Path) -> bool:
    """Whether a file is the Markdown of a report, as `write_report` writes it."""
    title = b"# capsrun: what the paper reports and what was measured\n"
    return page.is_file() and page.read_bytes().startswith(title)


class Table(NamedTuple):
    """Some of what was run, as plain text."""

    title: str
    header: Sequence[str]
    lines: list[list[str]]


def measured(
    rows: Sequence[Row], results: Sequence[Result], experiments: Experiments
) -> list[Table]:
    """What was run: one's own runs and experiments, and the rows of the paper."""
    _, found = questions_and_answers(rows, trainings(results))
    tables = [
        Table(f"trained on {name}", own.HEADER[:5], own.lines(groups, experiments))
        for name, groups in own.by_images(own_runs(rows, results, found)).items()
    ]
    named = [
        [row.about.title, *line[1:]]
        for row in of_group("own", rows)
        for line in own.lines(row.groups, experiments)
    ]
    tables += [Table(GROUPS["own"], ("experiment", *own.HEADER[1:5]), named)] if named else []
    numbers = [line for line in summary_lines(rows) if NOT_RUN not in line]
    tables += [Table("the paper's numbers", SUMMARY, numbers)] if numbers else []
    return [as_plain_text(table) for table in tables]


def as_plain_text(table: Table) -> Table:
    """A table of Markdown, as wide as its header, without the marks that keep its signs plain."""
    title, header, lines = table
    cells = [[html.unescape(cell) for cell, _ in zip(line, header)] for line in lines]
    return Table(html.unescape(title), header, cells)


def print_tables(tables: Iterable[Table], rows: Sequence[Row]) -> None:
    """Show what was run, and say what was not."""
    for title, header, lines in tables:
        print(f"{title}:\n{tabulate(lines, header, 'plain', disable_numparse=True)}\n")
    left = sum(NOT_RUN in line for line in summary_lines(rows))
    print(f"{left} of the paper's numbers: {NOT_RUN}\n" if left else "")


def write_tables(tables: Iterable[Table], results: Sequence[Result], out_dir: Path) -> None:
    """Write what was run as tables for LaTeX, `report.tex`, and every result as `report.csv`."""
    parts = [
        f"% {title}\n{tabulate(lines, header, 'latex_booktabs', disable_numparse=True)}"
        for title, header, lines in tables
    ]
    head = "% Needs \\usepackage{booktabs}."
    disk.write_file(out_dir / TEX, "\n\n".join([head, *parts, ""]))
    tested = [result for result in results if result.command != "perturb"]
    tested.sort(key=lambda result: (result.values["name"], repr(result.settings), result.seed))
    flattened = [flat(result) for result in tested]
    keys = dict.fromkeys(key for line in flattened for key in line)
    table = io.StringIO(newline="")
    writer = csv.DictWriter(table, list(keys))
    writer.writeheader()
    writer.writerows(flattened)
    disk.write_file(out_dir / CSV, table.getvalue())


def flat(result: Result) -> dict[str, Any]:
    """A result as a line of a table: what was found, and how the model was trained and tested."""
    found = {key: result.values.get(key) for key in COLUMNS}
    found["tested_on"], found["torch"] = result.tested_on, result.values["versions"]["torch"]
    trained = {key: shown(value) for key, value in result.settings.items()}
    return found | trained | {f"test.{k}": v for k, v in result.tested.items()}


def write_report(results: Sequence[Result], experiments: Experiments, out_dir: Path) -> list[Row]:
    """Write the files of the report into a folder, and return the rows of its tables."""
    disk.make_folder(out_dir / "pictures")
    if (out_dir / PAGE).exists():  # its pictures may have no place in the new one
        before = (out_dir / PAGE).read_text(encoding="utf-8", errors="replace")
        for name in re.findall(r"\((pictures/[\w.-]+)\)", before):
            (out_dir / name).unlink(missing_ok=True)
    names = bar(experiments.names(), "experiment", "results")
    rows = [row for name in names if (row := row_of(name, experiments, results)) is not None]
    text = document(rows, results, experiments, Pictures(out_dir))
    for name, content in ((PAGE, text), (HTML, to_html(text, out_dir))):
        disk.write_file(out_dir / name, content)
    return rows


def row_of(name: str, experiments: Experiments, results: Sequence[Result]) -> Row | None:
    """The row of an experiment; None, and the user is told, for one of one's own that is wrong."""
    try:
        return make_row(name, experiments, results)
    except UserError as error:
        if not experiments.is_own(name):
            raise
        notice(f"the experiment {name} is left out: {error}")
        return None


def update_tables(path: Path, tables: Mapping[str, str]) -> None:
    """Put tables, by name, between `<!-- name -->` and `<!-- end -->` in a file.

    All else stays as it is, its line ends too. Raises UserError as `places` does.
    """
    text, found = places(path)
    for begin, end, name in reversed(found):
        line_end = "\r\n" if text[:begin].endswith("\r\n") else "\n"
        content = tables.get(name)
        if content is not None:
            text = text[:begin] + content.replace("\n", line_end) + line_end + text[end:]
    # In place of the file that a link is to, not of the link.
    disk.write_file(path.resolve(), text)


def places(path: Path) -> tuple[str, list[tuple[int, int, str]]]:
    """The text of a file, and where in it each table begins and ends, and its name.

    Raises UserError for a file that is not there or not UTF-8, for one without such a place, and
    where an end is missing, as all that follows would be lost.
    """
    try:
        text = disk.read_bytes(path, disk.MOST_TEXT_BYTES).decode()
    except (OSError, ValueError) as error:
        said = error.strerror if isinstance(error, OSError) else error
        raise UserError(f"{path} cannot be updated: {said}") from error
    found = []
    for mark in re.finditer(rf"<!-- ({TABLES}) -->[ \t]*\r?\n", text):
        end = re.compile(rf"<!-- (end|{TABLES}) -->").search(text, mark.end())
        if end is None or end[1] != "end":
            raise UserError(f"{path} has no <!-- end --> after <!-- {mark[1]} -->")
        found.append((mark.end(), end.start(), mark[1]))
    if not found:
        raise UserError(f"{path} has no place for a table: <!-- summary --> and <!-- end -->")
    return text, found
