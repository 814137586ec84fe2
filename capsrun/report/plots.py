"""The plots of the report: learning curves, error against iterations, figures A.1 and B.1.

Every function returns a matplotlib figure; none knows files.
"""

from collections.abc import Mapping, Sequence
from typing import Any

import numpy as np
from matplotlib.axes import Axes
from matplotlib.figure import Figure

from capsrun.report.figures import FONT_SIZE, new_figure

# Distinct for every kind of colour vision (Okabe and Ito); lines differ in their dashes too.
COLOURS = ("#0072B2", "#D55E00", "#009E73", "#CC79A7", "#E69F00", "#56B4E9", "#000000")
DASHES = ("-", "--", "-.", ":")
MARKED_POINTS = 50  # more are not told apart
SMOOTHED_POINTS = 20  # a noisy curve is smoothed over about this share, 1/20, of its points

Metrics = Sequence[Mapping[str, Any]]
"""The rows of one run's metrics.jsonl."""


def curve(metrics: Metrics, key: str) -> tuple[np.ndarray, np.ndarray]:
    """The steps and values at which a number was recorded."""
    points = [(row["step"], row[key]) for row in metrics if key in row]
    return tuple(np.array(points, dtype=float).reshape(-1, 2).T)  # type: ignore[return-value]


def smoothed(values: np.ndarray) -> np.ndarray:
    """A running mean that weighs its first values as much as they are worth."""
    past = len(values) / (len(values) + SMOOTHED_POINTS)
    mean, weight, means = 0.0, 0.0, []
    for value in values:
        mean = past * mean + (1 - past) * value
        weight = past * weight + (1 - past)
        means.append(mean / weight)
    return np.array(means)


def learning_curves(rows: Mapping[str, Sequence[Metrics]]) -> Figure:
    """Training loss and test error of each row: a thin line a seed, a thick one their mean.

    rows: the metrics of each seed, by the name of the row.
    """
    figure = new_figure(10, 3.6)
    losses, errors = figure.subplots(1, 2)
    for number, (name, seeds) in enumerate(rows.items()):
        style = {"color": COLOURS[number % len(COLOURS)], "ls": DASHES[number % len(DASHES)]}
        _seeds_and_mean(losses, seeds, "loss/total", style, f"{name} (n = {len(seeds)})", True)
        _seeds_and_mean(errors, seeds, "error_percent/test", style, None, False)
    _finish(losses, "step", "training loss (running mean)")
    losses.set_yscale("log")
    _finish(errors, "step", "test error %")
    errors.set_yscale("log")
    errors.yaxis.set_major_formatter("{x:g}")
    errors.yaxis.set_minor_formatter("{x:g}")
    figure.legend(loc="lower center", ncols=2, fontsize=FONT_SIZE - 1, frameon=False)
    figure.tight_layout(rect=(0, 0.08 + 0.05 * ((len(rows) - 1) // 2), 1, 1))
    return figure


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


def run_curves(metrics: Metrics) -> Figure:
    """What one run recorded: losses, errors, capsule lengths, routing, learning rate."""
    recorded = sorted(_keys(metrics))
    panels = [(panel, [key for key in recorded if key.startswith(panel[1])]) for panel in PANELS]
    panels = [(panel, keys) for panel, keys in panels if keys]
    columns = max(1, min(3, len(panels)))
    rows = -(-len(panels) // columns)
    figure = new_figure(3.6 * columns, 2.8 * rows)
    for place, ((title, begin, logarithmic, noisy), keys) in enumerate(panels, 1):
        axes = figure.add_subplot(rows, columns, place)
        for number, key in enumerate(keys):
            steps, values = curve(metrics, key)
            axes.plot(
                steps,
                smoothed(values) if noisy else values,
                color=COLOURS[number % len(COLOURS)],
                ls=DASHES[number % len(DASHES)],
                marker=None if noisy or len(steps) > MARKED_POINTS else "o",
                ms=3,
                lw=1.4,
                label=key[len(begin) :].replace("_", " "),
            )
        if logarithmic and all((curve(metrics, key)[1] > 0).all() for key in keys):
            axes.set_yscale("log")
            axes.yaxis.set_major_formatter("{x:g}")
            low, high = axes.get_ylim()
            # Over more than a decade there are enough others.
            axes.yaxis.set_minor_formatter("{x:g}" if high < 10 * low else "")
        if len(keys) > 1:
            axes.legend(fontsize=FONT_SIZE - 1, frameon=False)
        _finish(axes, "step", title)
    figure.tight_layout()
    return figure


def _seeds_and_mean(
    axes: Axes,
    seeds: Sequence[Metrics],
    key: str,
    style: dict[str, Any],
    label: str | None,
    noisy: bool,
) -> None:
    curves = [curve(metrics, key) for metrics in seeds]
    curves = [(x, smoothed(y) if noisy else y) for x, y in curves if len(x)]
    if not curves:
        return
    marker = None if noisy else "o"
    for steps, values in curves if len(curves) > 1 else []:
        axes.plot(steps, values, lw=0.6, alpha=0.5, marker=marker, ms=2, **style)
    length = min(len(steps) for steps, _ in curves)
    longest = max(len(steps) for steps, _ in curves)
    if length == longest:  # else runs stopped at different steps, and a mean would mislead
        mean = np.mean([values for _, values in curves], axis=0)
        axes.plot(curves[0][0], mean, lw=1.8, marker=marker, ms=4, label=label, **style)
    else:
        axes.plot([], [], lw=1.8, label=label, **style)


def _finish(axes: Axes, x: str, y: str) -> None:
    axes.set_xlabel(x, fontsize=FONT_SIZE)
    axes.set_ylabel(y, fontsize=FONT_SIZE)
    axes.tick_params(labelsize=FONT_SIZE)
    axes.tick_params(which="minor", labelsize=FONT_SIZE - 2)
    axes.grid(alpha=0.3)
    for side in ("top", "right"):
        axes.spines[side].set_visible(False)


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
    _finish(axes, "routing iterations", "test error %")
    axes.set_title(title, fontsize=FONT_SIZE, wrap=True)
    figure.tight_layout()
    return figure


def routing_changes(seeds: Sequence[Metrics]) -> Figure:
    """Figure A.1: the mean change of the logits by each iteration, in training and at its end.

    The mean over the seeds where they were recorded at the same steps, else the first seed.
    """
    keys = sorted(key for key in _keys(seeds[0]) if key.startswith("routing_logit_change/"))
    figure = new_figure(9, 3.2)
    during, after = figure.subplots(1, 2)
    last = []
    for number, key in enumerate(keys):
        curves = [curve(metrics, key) for metrics in seeds]
        curves = [c for c in curves if len(c[0]) == len(curves[0][0])]
        mean = np.mean([values for _, values in curves], axis=0)
        style = {"color": COLOURS[number % len(COLOURS)], "ls": DASHES[number % len(DASHES)]}
        during.plot(curves[0][0], mean, lw=1.2, label=f"iteration {number + 1}", **style)
        last.append(float(np.mean(mean[-5:])))
    during.set_yscale("log")
    during.legend(fontsize=FONT_SIZE - 1, frameon=False)
    _finish(during, "step", "mean |change of a logit|")
    after.plot(range(1, len(keys) + 1), last, marker="o", color=COLOURS[0])
    after.set_yscale("log")
    after.set_xticks(range(1, len(keys) + 1))
    _finish(after, "routing iteration", "at the end of training")
    figure.tight_layout()
    return figure


def training_losses(rows: Mapping[str, Sequence[Metrics]]) -> Figure:
    """Figure B.1: the training loss of each row, whole and without the reconstruction."""
    figure = new_figure(9, 3.4)
    for axes, key, what in zip(
        figure.subplots(1, 2), ("loss/total", "loss/margin"), ("training loss", "margin loss alone")
    ):
        for number, (name, seeds) in enumerate(rows.items()):
            style = {"color": COLOURS[number], "ls": DASHES[number % len(DASHES)]}
            _seeds_and_mean(axes, seeds, key, style, f"{name} (n = {len(seeds)})", True)
        axes.set_yscale("log")
        axes.legend(fontsize=FONT_SIZE - 1, frameon=False)
        _finish(axes, "step", f"{what} (running mean)")
    figure.tight_layout()
    return figure


def _keys(metrics: Metrics) -> set[str]:
    return {key for row in metrics for key in row}
