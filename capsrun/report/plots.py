"""The plots of the report: learning curves, error against iterations, figures A.1 and B.1.

Every function returns a matplotlib figure; none knows files.
"""

import itertools
import re
import textwrap
from collections.abc import Mapping, Sequence
from typing import Any

import numpy as np
from matplotlib.axes import Axes
from matplotlib.figure import Figure
from matplotlib.lines import Line2D
from scipy import stats

from capsrun.report.figures import FONT_SIZE, new_figure

# Distinct for every kind of colour vision (Okabe and Ito); lines differ in their dashes too.
COLOURS = ("#0072B2", "#D55E00", "#009E73", "#CC79A7", "#E69F00", "#56B4E9", "#000000")
DASHES = ("-", "--", "-.", ":")
LONG_LABEL = 75  # letters, of which two labels are not beside each other
MARKED_POINTS = 50  # more are not told apart
MOST_LINES = 10  # of which a legend tells
SMOOTHED_POINTS = 20  # a noisy curve is smoothed over about this share, 1/20, of its points

Metrics = Sequence[Mapping[str, Any]]
"""The rows of one run's metrics.jsonl."""

# What the page of a run plots: the title, how the names of its numbers begin, whether the axis is
# logarithmic, and whether the numbers are noisy.
PANELS = (
    ("loss (running mean)", "loss/", True, True),
    ("error %", "error_percent/", True, False),
    ("mean length of the capsules", "capsule_length/", False, True),
    ("mean softmax", "softmax/", False, True),
    ("mean |change of a routing logit|", "routing_logit_change/", True, True),
    ("learning rate", "learning_rate", True, False),
)


def curve(metrics: Metrics, key: str, smooth: bool = False) -> tuple[np.ndarray, np.ndarray]:
    """The steps and values at which a number was recorded."""
    points = [(row["step"], row[key]) for row in metrics if key in row]
    steps, values = np.array(points, dtype=float).reshape(-1, 2).T
    return steps, smoothed(values) if smooth else values


def smoothed(values: np.ndarray) -> np.ndarray:
    """A running mean that weighs its first values as much as they are worth."""
    past = len(values) / (len(values) + SMOOTHED_POINTS)
    sums, weights = (
        np.array(list(itertools.accumulate(each, lambda total, new: past * total + new)))
        for each in (values, np.ones_like(values))
    )
    return sums / weights


def style(number: int) -> dict[str, Any]:
    """How the line of a number among others looks."""
    return {"color": COLOURS[number % len(COLOURS)], "ls": DASHES[number % len(DASHES)]}


def comparison(
    rows: Mapping[str, Sequence[Metrics]], panels: Mapping[str, tuple[str, bool]]
) -> Figure:
    """Curves of each row, on logarithmic axes: a thin line a seed, a thick one their mean.

    rows: the metrics of each seed, by the name of the row. panels: what is shown beside each other:
    the title and whether it is noisy, by the name of the recorded number.
    """
    figure = new_figure(10, 3.6)
    named: set[str] = set()
    for axes, (key, (title, noisy)) in zip(figure.subplots(1, len(panels)), panels.items()):
        for number, (name, seeds) in enumerate(rows.items()):
            curves = [
                curve(metrics, key, noisy)
                for metrics in seeds
                if any(key in row for row in metrics)
            ]
            short = textwrap.shorten(name, 2 * LONG_LABEL, placeholder=" …")
            label = f"{short} (n = {len(seeds)})" if curves and name not in named else None
            named |= {name} if curves else set()
            _seeds_and_mean(axes, curves, label, marker=None if noisy else "o", **style(number))
        finish(axes, "step", title, logarithmic=True)
    beside = 2 if max(map(len, rows)) < LONG_LABEL else 1
    if named:
        figure.legend(loc="lower center", ncols=beside, fontsize=FONT_SIZE - 1, frameon=False)
    figure.tight_layout(rect=(0, 0.08 + 0.05 * ((len(rows) - 1) // beside), 1, 1))
    return figure


def _seeds_and_mean(
    axes: Axes, curves: Sequence[tuple[np.ndarray, np.ndarray]], label: str | None, **look: Any
) -> None:
    for steps, values in curves if len(curves) > 1 else []:
        axes.plot(steps, values, lw=0.6, alpha=0.5, ms=2, **look)
    if len({len(steps) for steps, _ in curves}) == 1:
        mean = np.mean([values for _, values in curves], axis=0)
        axes.plot(curves[0][0], mean, lw=1.8, ms=4, label=label, **look)
    elif curves:  # runs stopped at different steps, and a mean would mislead
        axes.plot([], [], lw=1.8, label=label, **look)


def run_curves(metrics: Metrics) -> Figure:
    """What one run recorded: losses, errors, capsule lengths, routing, learning rate."""
    panels = [(panel, few(recorded(metrics, panel[1]))) for panel in PANELS]
    panels = [(panel, keys) for panel, keys in panels if keys]
    columns = max(1, min(3, len(panels)))
    rows = -(-len(panels) // columns)
    figure = new_figure(3.6 * columns, 2.8 * rows)
    for place, ((title, begin, logarithmic, noisy), keys) in enumerate(panels, 1):
        axes = figure.add_subplot(rows, columns, place)
        for number, key in enumerate(keys):
            steps, values = curve(metrics, key, noisy)
            marker = None if noisy or len(steps) > MARKED_POINTS else "o"
            label = key[len(begin) :].replace("_", " ")
            axes.plot(steps, values, marker=marker, ms=3, lw=1.4, label=label, **style(number))
            logarithmic = logarithmic and bool((values > 0).all())
        if len(keys) > 1:
            axes.legend(fontsize=FONT_SIZE - 1, frameon=False)
        finish(axes, "step", title, logarithmic)
    figure.tight_layout()
    return figure


def recorded(metrics: Metrics, begin: str) -> list[str]:
    """The names of the numbers that begin so, in order: iteration 10 comes after iteration 9."""
    names = {key for row in metrics for key in row if key.startswith(begin)}
    return sorted(names, key=lambda name: [p.zfill(9) for p in re.split(r"(\d+)", name)])


def few(names: Sequence[str]) -> list[str]:
    """These, but for some in between where a legend has no room for all."""
    places = np.linspace(0, len(names) - 1, min(len(names), MOST_LINES)).round()
    return [names[int(place)] for place in places]


def finish(axes: Axes, x: str, y: str, logarithmic: bool = False) -> None:
    """Name the axes, and draw the grid."""
    if logarithmic:
        axes.set_yscale("log")
        axes.yaxis.set_major_formatter("{x:g}")
        low, high = axes.get_ylim()
        # Over more than a decade there are enough others.
        axes.yaxis.set_minor_formatter("{x:g}" if high < 10 * low else "")
    axes.set_xlabel(x, fontsize=FONT_SIZE)
    axes.set_ylabel(y, fontsize=FONT_SIZE)
    axes.tick_params(labelsize=FONT_SIZE)
    axes.tick_params(which="minor", labelsize=FONT_SIZE - 2)
    axes.grid(alpha=0.3)
    axes.spines[["top", "right"]].set_visible(False)


def error_by_iterations(points: Mapping[int, Sequence[float]], title: str) -> Figure:
    """Test error against routing iterations: a dot for each seed, the mean and its deviation.

    points: the errors in percent of each seed, by number of iterations.
    """
    figure = new_figure(5, 3.4)
    axes = figure.add_subplot()
    iterations = sorted(points)
    for number in iterations:
        axes.plot([number] * len(points[number]), points[number], "o", ms=3, color="#888888")
    means = [float(np.mean(points[number])) for number in iterations]
    deviations = [float(np.std(points[n], ddof=1)) if len(points[n]) > 1 else 0 for n in iterations]
    axes.errorbar(iterations, means, deviations, marker="s", capsize=4, color=COLOURS[0])
    axes.set_xticks(iterations)
    finish(axes, "routing iterations", "test error %")
    axes.set_title(title, fontsize=FONT_SIZE, wrap=True)
    figure.tight_layout()
    return figure


def differences(points: Mapping[str, Sequence[float]], title: str) -> Figure:
    """Paired differences: a dot for each seed, their mean and its 95 % interval (Student's t).

    points: what several seeds found, by what was changed; the largest mean comes first.
    """
    names = sorted(points, key=lambda name: float(np.mean(points[name])))
    figure = new_figure(9, 1 + 0.3 * len(names))
    axes = figure.add_subplot()
    for row, name in enumerate(names):
        found = np.array(points[name])
        error = found.std(ddof=1) / len(found) ** 0.5
        half = float(stats.t.ppf(0.975, len(found) - 1)) * error
        axes.plot(found, [row] * len(found), "o", ms=3, color="#888888")
        axes.errorbar(found.mean(), row, xerr=half, marker="s", ms=5, capsize=4, color=COLOURS[0])
    axes.axvline(0, color="black", lw=0.8)
    labels = [f"{textwrap.fill(name, LONG_LABEL)} (n = {len(points[name])})" for name in names]
    axes.set_yticks(range(len(names)), labels)
    finish(axes, "points of test error more than without it", "")
    figure.suptitle(title, fontsize=FONT_SIZE)
    figure.tight_layout()
    return figure


def by_value(panels: Mapping[str, Mapping[str, Mapping[float, Sequence[float]]]]) -> Figure:
    """Percentages against a value, beside each other: the mean of seeds and its deviation.

    panels: by their titles, and in each by the name of a line, what each seed found at each value.
    """
    columns = min(3, len(panels))
    rows = -(-len(panels) // columns)
    names = list(dict.fromkeys(name for lines in panels.values() for name in lines))
    figure = new_figure(3.6 * columns, 2.9 * rows + 0.6)
    for place, (title, lines) in enumerate(panels.items(), 1):
        axes = figure.add_subplot(rows, columns, place)
        for name, points in lines.items():
            values = np.array(sorted(points))
            found = np.array([points[value] for value in values])
            mean = found.mean(1)
            deviation = found.std(1, ddof=1) if found.shape[1] > 1 else 0 * mean
            look = style(names.index(name))
            axes.plot(values, mean, lw=1.4, **look)
            band = mean - deviation, mean + deviation
            axes.fill_between(values, *band, color=look["color"], alpha=0.15, lw=0)
        axes.set_ylim(bottom=0)
        what, _, unit = title.rpartition(": ")
        finish(axes, "", unit)
        axes.set_title(textwrap.fill(what, 45), fontsize=FONT_SIZE - 1)
    looks = [Line2D([], [], label=name, **style(number)) for number, name in enumerate(names)]
    figure.legend(handles=looks, loc="lower center", ncols=3, fontsize=FONT_SIZE, frameon=False)
    figure.tight_layout(rect=(0, 0.6 / figure.get_figheight(), 1, 1))
    return figure


def routing_changes(seeds: Sequence[Metrics]) -> Figure:
    """Figure A.1: the mean change of the logits by each iteration, in training and at its end.

    seeds: of which the mean is drawn, recorded at the same steps.
    """
    keys = recorded(seeds[0], "routing_logit_change/")
    figure = new_figure(9, 3.2)
    during, after = figure.subplots(1, 2)
    last = []
    for number, key in enumerate(keys):
        steps, _ = curve(seeds[0], key)
        mean = np.mean([curve(metrics, key)[1] for metrics in seeds], axis=0)
        if key in few(keys):
            during.plot(steps, mean, lw=1.2, label=f"iteration {number + 1}", **style(number))
        last.append(float(np.mean(mean[-5:])))
    during.set_yscale("log")
    during.legend(fontsize=FONT_SIZE - 1, frameon=False)
    finish(during, "step", "mean |change of a logit|")
    after.plot(range(1, len(keys) + 1), last, marker="o", color=COLOURS[0])
    after.set_yscale("log")
    after.xaxis.get_major_locator().set_params(integer=True)
    finish(after, "routing iteration", "at the end of training")
    figure.tight_layout()
    return figure
