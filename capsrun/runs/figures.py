"""The pictures: reconstructions, perturbed dimensions, confusion matrix, contact sheet.

Every function returns a matplotlib figure and knows neither files nor models.
Shapes: N pictures, C channels, H and W pixels.
"""

from collections.abc import Sequence
from pathlib import Path

import numpy as np
from matplotlib.backends.backend_agg import FigureCanvasAgg
from matplotlib.figure import Figure
from torch import Tensor

DPI = 100


def new_figure(width_inches: float, height_inches: float) -> Figure:
    """An empty figure that needs no screen."""
    figure = Figure(figsize=(width_inches, height_inches), dpi=DPI, layout="constrained")
    FigureCanvasAgg(figure)
    return figure


def save(figure: Figure, path: Path) -> None:
    """Write a figure as PNG, without a date, so that equal pictures are equal files."""
    figure.savefig(path, metadata={"Software": None})


def show_image(axes, image_CHW: Tensor) -> None:
    """Draw one image with pixels in [0, 1]: grey for one channel, colour for three."""
    pixels = image_CHW.detach().float().cpu().numpy().transpose(1, 2, 0)
    axes.imshow(pixels.squeeze(-1) if pixels.shape[-1] == 1 else pixels, cmap="gray", vmin=0, vmax=1)
    axes.set_xticks([])
    axes.set_yticks([])
    for spine in axes.spines.values():
        spine.set_visible(False)


def image_grid(
    rows: Sequence[tuple[str, Sequence[Tensor]]],
    column_titles: Sequence[str] = (),
    title: str = "",
    cell_inches: float = 0.62,
) -> Figure:
    """Rows of images, each row with a label on its left, each column with a title above.

    rows: (label, images of shape (C, H, W)); a row may be shorter than the others.
    """
    columns = max(len(images) for _, images in rows)
    titles_height = 0.28 * max([title.count("\n") + 1 for title in column_titles], default=0)
    figure = new_figure(
        columns * cell_inches + 1.1, len(rows) * cell_inches + titles_height + 0.5
    )
    grid = figure.subplots(len(rows), columns, squeeze=False)
    for axes in grid.flat:
        axes.set_axis_off()
    for axes_row, (label, images) in zip(grid, rows):
        for axes, image in zip(axes_row, images):
            axes.set_axis_on()
            show_image(axes, image)
        axes_row[0].set_axis_on()
        axes_row[0].set_ylabel(label, rotation=0, ha="right", va="center", fontsize=8)
    for axes, column_title in zip(grid[0], column_titles):
        axes.set_title(column_title, fontsize=8)
    if title:
        figure.suptitle(title, fontsize=9)
    return figure


def confusion_matrix(confusion_JJ: Tensor, class_names: Sequence[str], title: str) -> Figure:
    """Which class was taken for which; mistakes are shaded, what is right is only written."""
    counts = confusion_JJ.numpy()
    mistakes = counts * (1 - np.eye(len(counts), dtype=counts.dtype))
    size = 1.8 + 0.5 * len(counts)
    figure = new_figure(size, size)
    axes = figure.subplots()
    axes.imshow(mistakes, cmap="Oranges", vmin=0, vmax=max(mistakes.max(), 1))
    for row, column in np.ndindex(*counts.shape):
        if counts[row, column]:
            weight = "bold" if row != column else "normal"
            axes.text(column, row, f"{counts[row, column]:,}", ha="center", va="center", fontsize=8, weight=weight)
    places = range(len(class_names))
    axes.set_xticks(places, class_names, rotation=45 if max(map(len, class_names)) > 2 else 0)
    axes.set_yticks(places, class_names)
    axes.set_xlabel("predicted")
    axes.set_ylabel("true")
    axes.set_title(title, fontsize=10)
    return figure
