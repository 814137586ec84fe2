"""The words and tables of the report, as Markdown."""

import statistics
from collections.abc import Iterable, Sequence
from dataclasses import dataclass

from capsrun.experiments import Experiment, Published
from capsrun.report.rows import Group, Wanted, of_network, own_test, standard_error
from capsrun.runs.reader import epochs_of_a_step

SEEDS = 3  # as many trials as the paper made
NOT_RUN = "not run yet"
FEWEST_STEPS = 100  # after fewer, an error says nothing


@dataclass(frozen=True)
class Row:
    """An experiment and what was found for it."""

    name: str
    about: Experiment
    wanted: Wanted
    groups: Sequence[Group]
    """What has the paper's length first, then the longest training."""

    def is_full(self, group: Group) -> bool:
        """Whether a group was trained with the recipe and length that the experiment asks for."""
        return all(self.wanted.is_of_full_length(result) for result in group.results)

    @property
    def full(self) -> Group | None:
        """What was measured at the paper's length."""
        return next((group for group in self.groups if self.is_full(group)), None)

    @property
    def best(self) -> Group | None:
        """What stands for the row: the paper's length where there is one, else the longest."""
        return next(iter(self.groups), None)

    @property
    def asked(self) -> int:
        """How many seeds there should be at the paper's length."""
        return SEEDS if self.about.models == 1 else 1

    @property
    def missing(self) -> int:
        """How many of them are not there yet."""
        return max(self.asked - (len(self.full.results) if self.full else 0), 0)

    @property
    def label(self) -> str:
        """Its title, after the data set where a table has none."""
        data = {"table1": "MNIST: ", "multimnist": "MultiMNIST: "}
        return data.get(self.about.group, "") + self.about.title


def table(header: Sequence[str], lines: Iterable[Sequence[str]]) -> str:
    """A Markdown table."""
    rows = [header, ["---"] * len(header), *lines]
    return "\n".join(
        "| " + " | ".join(cell.replace("|", "\\|") for cell in row) + " |" for row in rows
    )


def aligned(header: Sequence[str], lines: Sequence[Sequence[str]]) -> str:
    """A table for a terminal."""
    rows = [header, *lines]
    widths = [max(len(row[column]) for row in rows) for column in range(len(header))]
    return "\n".join(
        "  ".join(cell.ljust(width) for cell, width in zip(row, widths)).rstrip() for row in rows
    )


def published(number: Published | None) -> str:
    """A number that somebody reports, with its spread."""
    if number is None:
        return "–"
    spread = "" if number.spread is None else f" ± {number.spread:g}"
    single = " (1 run)" if number.trials == 1 else ""
    return f"{number.error_percent:g}{spread}{single}"


# How a published number was chosen.
CHOSEN = {"last": "last step", "best_on_test": "best on test", "unknown": "step not said"}


def lowest(numbers: Iterable[Published]) -> list[str]:
    """Of what is published, the lowest of each kind of `CHOSEN`."""
    rising = sorted(numbers, key=lambda number: number.error_percent)
    return [published(next((n for n in rising if n.chosen == kind), None)) for kind in CHOSEN]


def measured(group: Group | None) -> str:
    """Mean and standard deviation over the seeds."""
    return NOT_RUN if group is None else mean_and_spread(group.errors)


def mean_and_spread(values: Sequence[float]) -> str:
    """With the standard deviation (n − 1) where there are several."""
    spread = f" ± {statistics.stdev(values):.2f}" if len(values) > 1 else ""
    return f"{statistics.fmean(values):.2f}{spread}"


def best_on_test(group: Group) -> str:
    """What choosing the step on test images would have given, and of how many tests in a run."""
    best = [best for result in group.results if (best := result.best_on_test)]
    if len(best) < len(group.results):
        return "–"
    errors, counts = ([each[key] for each in best] for key in ("error_percent", "evaluations"))
    some = {each["count"] for each in best} - {r.values["count"] for r in group.results}
    on = f", on {span(sorted(some), ',')} images" if some else ""
    return f"{mean_and_spread(errors)} (best of {span(counts, ',')}{on})"


def span(values: Sequence[float], form: str) -> str:
    """One number, or the smallest and the largest."""
    low, high = (format(end, form) for end in (min(values), max(values)))
    return low if low == high else f"{low} to {high}"


def length(row: Row | None, group: Group) -> str:
    """How long a group was trained, and whether that is the paper's length."""
    result = group.results[0]
    epochs = [steps * epochs_of_a_step(result.training) for steps in group.steps]
    passes = span(epochs, ".3g")
    text = f"{span(group.steps, ',')} steps ({passes} {'epoch' if passes == '1' else 'epochs'})"
    stop = result.training.get("stop", {})
    if stop.get("accuracy_percent") is not None:
        reached = all(result.reached_target for result in group.results)
        which = "test" if stop["on"] == "test" else "held-out"
        target = f"{stop['accuracy_percent']:g} % of the {which} images right"
        text = f"stopped at {target}, {text}" if reached else f"{text}, {target} not reached"
    if stop.get("patience") is not None:
        text += ", as long as it improved on held-out images"
    if row is not None and row.is_full(group):
        return f"{text}: full length"
    recipe = result.training["recipe"]
    return f"{text}, recipe {recipe['name']} with learning rate {recipe['learning_rate']:g}"


def verdict(row: Row, group: Group) -> str:
    """How a group compares with the paper, where it was trained as long."""
    paper = row.about.paper
    if paper is None:
        return ""
    difference = f"{group.mean - paper.error_percent:+.2f}"
    if not row.is_full(group):
        return f"{difference}, after another length of training"
    error = standard_error(group, paper)
    if error is None:
        return f"{difference}; one seed has no standard error"
    if abs(group.mean - paper.error_percent) <= error:
        return f"{difference}: within the standard error of {error:.3f}"
    side = "worse" if group.mean > paper.error_percent else "better"
    if not error:  # every seed gave the same
        return f"{difference}: {side} than the paper"
    far = abs(group.mean - paper.error_percent) / error
    return f"{difference}: {side} than the paper by {far:.1f} standard errors"


def summary_rows(rows: Iterable[Row]) -> list[Row]:
    """The numbers of the paper, in its order, with affnist_like after affNIST."""
    order = ("table1", "multimnist", "affnist", "section7")
    chosen = [
        row
        for row in rows
        if row.about.group in order
        # where training stops is no result, and the variants are in the tables below
        and not row.name.startswith("padded")
        and not (row.about.group == "affnist" and row.name.endswith("_validation"))
    ]
    baseline_first = sorted(chosen, key=lambda row: ("baseline" not in row.name, row.name))
    return sorted(baseline_first, key=lambda row: order.index(row.about.group))


BEST = "best on test, not a result"
IN_PUBLIC = [f"public, {kind}" for kind in CHOSEN.values()]
HEAD = ("test error %", "paper", *IN_PUBLIC, "capsrun, last step", BEST)
SUMMARY = (*HEAD, "seeds", "trained for")


def summary_lines(rows: Iterable[Row]) -> list[list[str]]:
    """One line for each number: the paper's, the best public ones, ours and of what length."""
    return [
        [
            row.label,
            published(row.about.paper),
            *lowest(row.about.public),
            *in_summary(row),
        ]
        for row in summary_rows(rows)
    ]


def in_summary(row: Row) -> list[str]:
    """What was measured, with how many seeds and how long; not what a few steps gave."""
    best = row.best
    if best is None:
        return [NOT_RUN, "", "", ""]
    if max(best.steps) < FEWEST_STEPS:
        return ["only tried", "", "", length(row, best)]
    return [measured(best), best_on_test(best), str(len(best.results)), length(row, best)]


def row_lines(row: Row) -> list[list[str]]:
    """A line for each length at which an experiment was run; the first one has its name."""
    head = [row.about.title, published(row.about.paper), *lowest(row.about.public)]
    if not row.groups:
        return [[*head, NOT_RUN, "", "", "", "", ""]]
    lines = []
    for group in row.groups:
        lines.append(
            [
                *head,
                measured(group),
                best_on_test(group),
                " ".join(str(result.seed) for result in group.results),
                length(row, group),
                "; ".join(group.devices) + ", " + group.results[0].values["precision"],
                verdict(row, group),
            ]
        )
        head = [""] * len(head)
        if group.averaged_errors:
            averaged = mean_and_spread(group.averaged_errors)
            which = f"the same runs, weights averaged by {group.average:g} a step"
            lines.append([*head, averaged, "", "", which, "", ""])
    return lines


HOW = ("seeds", "trained for", "on")
ROWS = (*HEAD, *HOW, "against the paper")


def differences(row: Row, group: Group) -> str:
    """In which settings of network and images a group is not as an experiment asks for."""
    result = group.results[0]
    ours, asked = of_network(result.settings), of_network(row.wanted.settings)
    if result.tested:
        test = row.wanted.tested or own_test(result.training)
        of_test = {f"tested with {key}": shown(value) for key, value in result.tested.items()}
        expected = {f"tested with {k}": shown(v) for k, v in test.items()}
        expected.setdefault("tested with ensemble", str(row.wanted.models))
        ours, asked = ours | of_test, asked | expected
    keys = sorted(key for key in {*ours, *asked} if ours.get(key) != asked.get(key))
    return ", ".join(f"{key} {shown(ours.get(key))}" for key in keys)


def shown(value: object) -> str:
    """A setting as a person would write it."""
    if isinstance(value, float):
        return f"{value:g}"
    return "none" if value is None else str(value).strip("'")


def how_trained(group: Group, but: Sequence[str] = ()) -> str:
    """What groups have in common that were trained as long and with the same recipe.

    but: settings that may differ.
    """
    settings = group.results[0].settings
    ignored = {*of_network(settings), *but}
    return repr(sorted((key, value) for key, value in settings.items() if key not in ignored))
