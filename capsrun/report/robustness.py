"""What is shown of a network on changed images: tables, error curves, the images, ROC curves."""

from collections.abc import Mapping, Sequence
from typing import Any

from matplotlib.figure import Figure
from tabulate import tabulate
from torch import Tensor

from capsrun.data.warped import BORDER, UNITS
from capsrun.report.figures import FONT_SIZE, GAP_PX, image_grid, new_figure
from capsrun.report.pictures import displayed, shown_classes
from capsrun.report.plots import few, finish, style

WRONG_COLOUR, RIGHT_COLOUR = "#FF7733", "#33DD99"  # on black


def print_rows(first: str, rows: Sequence[Mapping[str, Any]], key: str) -> None:
    """A table of the errors at each value, or ε."""
    header = [first, "errors", "images", "error"]
    header += ["taken for the target"] if "success" in rows[0] else []
    header += ["no gradient"] if "flat" in rows[0] else []
    lines = []
    for row in rows:
        line = [f"{row[key]:g}", f"{row['errors']:,}", f"{row['count']:,}"]
        line += [f"{row['error_percent']:.2f} %"]
        line += [f"{row['success_percent']:.2f} %"] if "success" in row else []
        lines.append([*line, f"{row['flat']:,}"] if "flat" in row else line)
    sides = ["right"] * len(header)
    print(tabulate(lines, header, tablefmt="plain", disable_numparse=True, colalign=sides))


def error_curve(how: str, rows: Sequence[Mapping[str, Any]], split: str, title: str) -> Figure:
    """The error at each value of `rotate`, `shift` or `scale`."""
    label = f"{how}: {UNITS[how]} ({BORDER})"
    return _curves(label, f"{split} error %", title, rows, "value", {"": "error_percent"})


def attack_curve(rows: Sequence[Mapping[str, Any]], split: str, title: str) -> Figure:
    """The error within each ε, and of an attack with targets how often it has them."""
    lines = {f"{split} error": "error_percent"}
    if "success_percent" in rows[0]:
        lines["taken for the target"] = "success_percent"
    if "undetected_percent" in rows[0]:
        lines["fooled and not detected, of the measured images"] = "undetected_percent"
    return _curves("ε, in units of pixels in [0, 1]", "% of images", title, rows, "epsilon", lines)


def _curves(
    x: str,
    y: str,
    title: str,
    rows: Sequence[Mapping[str, Any]],
    key: str,
    lines: Mapping[str, str],
) -> Figure:
    figure = new_figure(6.5, 3.6)
    axes = figure.add_subplot()
    rows = sorted(rows, key=lambda row: row[key])
    places = [row[key] for row in rows]
    for number, (label, name) in enumerate(lines.items()):
        axes.plot(
            places, [row[name] for row in rows], marker="o", ms=4, label=label, **style(number)
        )
    axes.set_ylim(bottom=0)
    if len(lines) > 1:
        axes.legend(fontsize=FONT_SIZE, frameon=False)
    finish(axes, x, y)
    axes.set_title(title, fontsize=FONT_SIZE + 1)
    figure.tight_layout()
    return figure


def taken_for(
    rows: Sequence[tuple[str, Tensor, Tensor]],
    labels_ST: Tensor,
    class_names: Sequence[str],
    title: str,
) -> Figure:
    """Some images at each value, with what they are taken for below them, red where it is wrong.

    rows: what is on the left, images (S, C, H, W), and the classes (S, T) that they are taken for.
    """
    names = few([name for name, _, _ in rows])
    chosen = [row for row in rows if row[0] in names]
    grid = [(name, list(displayed(images_SCHW))) for name, images_SCHW, _ in chosen]
    titles = [shown_classes(labels, class_names) for labels in labels_ST.tolist()]
    figure = image_grid(grid, titles, title, scale=3)
    axes = figure.axes[0]
    height, width = grid[0][1][0].shape[1:]
    for row, (_, _, predicted_ST) in enumerate(chosen):
        for column, (guess, label) in enumerate(zip(predicted_ST.tolist(), labels_ST.tolist())):
            right = guess == label
            axes.text(
                column * (width + GAP_PX) + width - 1,
                row * (height + GAP_PX) + height - 1,
                shown_classes(guess, class_names),
                color=RIGHT_COLOUR if right else WRONG_COLOUR,
                weight="normal" if right else "bold",
                fontsize=FONT_SIZE,
                ha="right",
                va="bottom",
                bbox={"facecolor": "black", "alpha": 0.6, "pad": 0.5, "linewidth": 0},
            )
    return figure


def roc_curves(detection: Mapping[str, Any], title: str) -> Figure:
    """The ROC curve of each other data set, and of images that fool, against the real ones."""
    figure = new_figure(5, 4.2)
    axes = figure.add_subplot()
    attacked = {
        f"that fool within ε = {row['epsilon']:g}": row["fooled_detection"]
        for row in detection["attack"]
        if row["epsilon"] and "fooled_detection" in row
    }
    for number, (name, found) in enumerate({**detection["sets"], **attacked}.items()):
        label = f"{name}: area {found['roc_area']:.4f}"
        axes.plot(*zip(*found["roc"]), lw=1.6, label=label, **style(number))
    axes.axvline(detection["real_flagged_percent"], color="#888888", lw=0.8)
    axes.legend(fontsize=FONT_SIZE, frameon=False, loc="lower right")
    finish(axes, "real images flagged %", "other images flagged %")
    axes.set_title(title, fontsize=FONT_SIZE + 1)
    figure.tight_layout()
    return figure


def print_detection(detection: Mapping[str, Any]) -> None:
    """What is flagged of the real images and of others."""
    header = ["images", "count", "flagged", "area under ROC"]
    real = f"{detection['real_flagged_percent']:.2f} %"
    lines = [["as they are", f"{detection['measured_images']:,}", real, ""]]
    for name, found in detection["sets"].items():
        flagged = f"{found['flagged_percent']:.2f} %"
        lines.append([name, f"{found['count']:,}", flagged, f"{found['roc_area']:.4f}"])
    for row in detection["attack"]:
        flagged, found = f"{row['flagged_percent']:.2f} %", row.get("fooled_detection")
        lines.append([f"ε = {row['epsilon']:g}", f"{row['count']:,}", flagged, ""])
        if found:
            flagged = f"{found['flagged_percent']:.2f} %"
            line = [" which fool", f"{found['count']:,}", flagged, f"{found['roc_area']:.4f}"]
            lines.append(line)
    sides = ["left", "right", "right", "right"]
    print(f"detection: {detection['description']}")
    print(tabulate(lines, header, tablefmt="plain", disable_numparse=True, colalign=sides))
    for row in detection["attack"]:
        print(
            f"ε = {row['epsilon']:g}: {row['undetected_percent']:.2f} % fooled and not flagged "
            f"({row['undetected']:,} of {row['count']:,}; fooled: {row['fooled']:,})"
        )
