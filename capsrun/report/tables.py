"""The words and tables of the report, as Markdown."""

import statistics
from collections.abc import Iterable, Sequence

from capsrun.experiments import GROUPS, Published
from capsrun.report.rows import Group, Row, of_group, of_network, standard_error, whole_test
from capsrun.runs.reader import epochs_of_a_step

# The groups of experiments whose numbers stand in tables beside those of the paper.
TABLES = [group for group in GROUPS if group not in ("ablations", "figures")]
NOT_RUN = "not run yet"
FEWEST_STEPS = 100  # after fewer, an error says nothing
# How a published number was chosen.
CHOSEN = {"last": "last step", "best_on_test": "best on test", "unknown": "step not said"}

HEAD = (
    "test error %",
    "paper",
    *(f"public, {kind}" for kind in CHOSEN.values()),
    "capsrun, last step",
    "best on test, not a result",
)
SUMMARY = (*HEAD, "seeds", "trained for")
HOW = ("seeds", "trained for", "on")
ROWS = (*HEAD, *HOW, "against the paper")


def table(header: Sequence[str], lines: Iterable[Sequence[str]]) -> str:
    """A Markdown table. Its cells are not aligned: one longer cell would change every line."""
    rows = [header, ["---"] * len(header), *lines]
    return "\n".join(
        "| " + " | ".join(cell.replace("|", "\\|") for cell in row) + " |" for row in rows
    )


def published(number: Published | None) -> str:
    """A number that somebody reports, with its spread."""
    if number is None:
        return "–"
    spread = "" if number.spread is None else f" ± {number.spread:g}"
    single = " (1 run)" if number.trials == 1 else ""
    return f"{number.error_percent:g}{spread}{single}"


def from_others(row: Row) -> list[str]:
    """The paper's number, and of the public ones the lowest of each kind of `CHOSEN`."""
    rising = sorted(row.about.public, key=lambda number: number.error_percent)
    lowest = [next((n for n in rising if n.chosen == kind), None) for kind in CHOSEN]
    return [published(number) for number in (row.about.paper, *lowest)]


def mean_and_spread(values: Sequence[float]) -> str:
    """With the standard deviation (n − 1) where there are several."""
    spread = f" ± {statistics.stdev(values):.2f}" if len(values) > 1 else ""
    return f"{statistics.fmean(values):.2f}{spread}"


def best_on_test(group: Group) -> str:
    """What choosing the step on test images would have given, and of how many tests in a run."""
    found = [result.values.get("best_on_test") for result in group.results]
    best = [each for each in found if each]
    if len(best) < len(found):
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
    training = group.first.training
    epochs = span([steps * epochs_of_a_step(training) for steps in group.steps], ".3g")
    steps = f"{span(group.steps, ',')} {'step' if max(group.steps) == 1 else 'steps'}"
    text = f"{steps} ({epochs} {'epoch' if epochs == '1' else 'epochs'})"
    stop = training["stop"]
    if stop["accuracy_percent"] is not None:
        reached = all(result.reached_target for result in group.results)
        which = "test" if stop["on"] == "test" else "held-out"
        target = f"{stop['accuracy_percent']:g} % of the {which} images right"
        text = f"stopped at {target}, {text}" if reached else f"{text}, {target} not reached"
    if stop["patience"] is not None:
        text += ", as long as it improved on held-out images"
    if row is not None and row.is_full(group):
        return f"{text}: full length"
    recipe = training["recipe"]
    return f"{text}, recipe {recipe['name']} with learning rate {recipe['learning_rate']:g}"


def how(row: Row | None, group: Group) -> list[str]:
    """The cells of `HOW`."""
    seeds = " ".join(str(result.seed) for result in group.results)
    devices = sorted({result.values["device"] for result in group.results})
    return [seeds, length(row, group), f"{'; '.join(devices)}, {group.first.values['precision']}"]


def verdict(row: Row, group: Group) -> str:
    """How a group compares with the paper, where it was trained as long."""
    paper = row.about.paper
    if paper is None:
        return ""
    difference = group.mean - paper.error_percent
    if not row.is_full(group):
        return f"{difference:+.2f}, after another length of training"
    error = standard_error(group, paper)
    if error is None:
        return f"{difference:+.2f}; one seed has no standard error"
    if abs(difference) <= error:
        return f"{difference:+.2f}: within the standard error of {error:.3f}"
    # Of seeds that all gave the same the error is 0.
    far = f" by {abs(difference) / error:.1f} standard errors" if error else ""
    return f"{difference:+.2f}: {'worse' if difference > 0 else 'better'} than the paper{far}"


def summary_lines(rows: Sequence[Row]) -> list[list[str]]:
    """One line for each number of the paper, the best public ones, ours and of what length."""
    chosen = [row for group in TABLES for row in of_group(group, rows) if row.about.summary]
    return [[row.label, *from_others(row), *in_summary(row)] for row in chosen]


def in_summary(row: Row) -> list[str]:
    """What was measured, whether for less than the paper's length, and how; not after few steps."""
    best = row.best
    if best is None:
        return [NOT_RUN, "", "", ""]
    if max(best.steps) < FEWEST_STEPS:
        return ["only tried", "", "", length(row, best)]
    short = "" if row.is_full(best) else ", short"
    measured = f"{mean_and_spread(best.errors)}{short}"
    return [measured, best_on_test(best), str(len(best.results)), length(row, best)]


def row_lines(row: Row) -> list[list[str]]:
    """A line for each length at which an experiment was run; the first one has its name."""
    head = [row.about.title, *from_others(row)]
    lines = []
    for group in row.groups:
        measured = [mean_and_spread(group.errors), best_on_test(group), *how(row, group)]
        lines.append([*head, *measured, verdict(row, group)])
        head = [""] * len(head)
        if group.averaged_errors:
            averaged = mean_and_spread(group.averaged_errors)
            which = f"the same runs, weights averaged by {group.average:g} a step"
            lines.append([*head, averaged, "", "", which, "", ""])
    return lines or [[*head, NOT_RUN, *[""] * 5]]


def differences(row: Row, group: Group) -> str:
    """In which settings of network and images a group is not as an experiment asks for."""
    result = group.first
    ours, asked = of_network(result.settings), of_network(row.settings)
    if result.tested:
        test = row.tested or whole_test(result.training["dataset"])
        ours |= {f"tested with {key}": shown(value) for key, value in result.tested.items()}
        asked |= {f"tested with {key}": shown(value) for key, value in test.items()}
    keys = sorted(key for key in {*ours, *asked} if ours.get(key) != asked.get(key))
    return ", ".join(f"{key} {shown(ours.get(key))}" for key in keys)


def shown(value: object) -> str:
    """A setting as a person would write it."""
    if isinstance(value, float):
        return f"{value:g}"
    text = str(value).strip("'")
    return text.lower() if text in ("None", "True", "False") else text
