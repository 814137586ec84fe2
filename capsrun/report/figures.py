"""The pictures: grids of images with labels, the confusion matrix.

They are matplotlib figures that know no model; `save` and `save_animation` write them.
Shapes: C channels, H and W pixels, J classes.
"""

from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import numpy as np
from matplotlib.backends.backend_agg import FigureCanvasAgg
from matplotlib.figure import Figure
from PIL import Image
from torch import Tensor

from capsrun.disk import replacing
from capsrun.terminal import counted

DPI = 100
BLOCKS_IN_A_ROW = 5  # of a sheet
GAP_PX = 2  # between the images of a grid, in pixels of an image
FRAME_MS = 120  # of an animation
FONT_SIZE = 8
LINE_INCHES = 0.15  # height of a line of text
MOST_NAMED_CLASSES = 50  # of a confusion matrix
LETTER_INCHES = 0.075  # width of a letter, with some room
# Red, green and blue of the first and the second digit of an image; both together are white. They
# differ in brightness and hue for every kind of colour vision.
TWO_COLOURS = ((1.0, 0.55, 0.1), (0.1, 0.45, 1.0))


def new_figure(width_inches: float, height_inches: float) -> Figure:
    """An empty figure that needs no screen."""
    figure = Figure(figsize=(width_inches, height_inches), dpi=DPI)
    FigureCanvasAgg(figure)
    return figure


def save(figure: Figure, path: Path) -> None:
    """Write a figure as PNG, without a date or version, so that equal pictures are equal files."""
    with replacing(path) as temporary:
        figure.savefig(temporary, format="png", metadata={"Software": None})


def pixels(figure: Figure) -> np.ndarray:
    """A figure as colours (height, width, 3), uint8.

    TensorBoard's own way needs pyplot, which reads the user's styles, damaged ones too.
    """
    canvas = FigureCanvasAgg(figure)
    canvas.draw()
    return np.asarray(canvas.buffer_rgba())[..., :3].copy()


def image_grid(
    rows: Sequence[tuple[str, Sequence[Tensor]]],
    column_titles: Sequence[str] = (),
    title: str = "",
    scale: int = 2,
) -> Figure:
    """Rows of images, each row with a label on its left, each column with a title above.

    rows: (label, images of shape (C, H, W) with pixels in [0, 1], grey or RGB); all images have
    one size, and a row may be shorter than the others. scale: screen pixels for each pixel.
    """
    labels = [label for label, _ in rows]
    return sheet([("", [images for _, images in rows])], labels, column_titles, title, scale)


def sheet(
    blocks: Sequence[tuple[str, Sequence[Sequence[Tensor]]]],
    row_labels: Sequence[str],
    column_titles: Sequence[str],
    title: str,
    scale: int = 2,
) -> Figure:
    """Grids of images of one size beside and below each other, each with a title of its own.

    blocks: (title, rows of images of shape (C, H, W)).
    """
    canvases = [_assemble(rows) for _, rows in blocks]
    height, width = (side * scale / DPI for side in canvases[0].shape[:2])
    columns = min(len(blocks), BLOCKS_IN_A_ROW)
    lines = -(-len(blocks) // columns)
    left = 0.1 + LETTER_INCHES * max(map(len, row_labels))
    above = 0.2 + LINE_INCHES * max((text.count("\n") + 1 for text in column_titles), default=0)
    above += 2 * LINE_INCHES if len(blocks) > 1 else 0
    heading = 2 * LINE_INCHES if title else 0
    total_width = max(left + columns * (width + 0.2), LETTER_INCHES * len(title))
    total_height = heading + lines * (above + height)
    figure = new_figure(total_width, total_height)
    if title:
        top = 1 - 1.3 * LINE_INCHES / total_height
        figure.text(0.1 / total_width, top, title, fontsize=FONT_SIZE + 1)
    for number, (name, rows) in enumerate(blocks):
        line, column = divmod(number, columns)
        x = left + column * (width + 0.2)
        y = total_height - heading - (line + 1) * (above + height) + 0.1
        size = (width / total_width, height / total_height)
        axes = figure.add_axes((x / total_width, y / total_height, *size))
        axes.imshow(canvases[number], interpolation="nearest", aspect="auto")
        axes.set_title(name, fontsize=FONT_SIZE + 2, pad=3)
        axes.spines[:].set_visible(False)
        image_height, image_width = rows[0][0].shape[1:]
        labels = row_labels if column == 0 else [""] * len(row_labels)
        axes.set_yticks(_centres(len(labels), image_height), labels)
        axes.set_xticks(_centres(len(column_titles), image_width), column_titles)
        axes.tick_params(length=0, pad=2, labelsize=FONT_SIZE, labeltop=True, labelbottom=False)
    return figure


def _centres(count: int, image_px: int) -> list[float]:
    """Where the middles of the images of a grid are, along one axis."""
    return [number * (image_px + GAP_PX) + image_px / 2 for number in range(count)]


def save_animation(frames: Sequence[Figure], path: Path) -> None:
    """Write figures of one size as an endless animation, GIF or PNG as the name of `path` says."""
    images = []
    for figure in frames:
        images.append(Image.fromarray(pixels(figure)))
    kind = "GIF" if path.suffix == ".gif" else "PNG"
    with replacing(path) as temporary:
        images[0].save(
            temporary, kind, save_all=True, append_images=images[1:], duration=FRAME_MS, loop=0
        )


def _assemble(rows: Sequence[Sequence[Tensor]]) -> np.ndarray:
    """One white RGB array (height, width, 3) with the images on it."""
    _, height, width = rows[0][0].shape
    columns = max(len(images) for images in rows)
    canvas = np.ones((len(rows), height + GAP_PX, columns, width + GAP_PX, 3))
    for row, images in enumerate(rows):
        for column, image_CHW in enumerate(images):
            pixels = image_CHW.detach().float().cpu().clamp(0, 1).numpy().transpose(1, 2, 0)
            canvas[row, :height, column, :width] = pixels
    whole = canvas.reshape(len(rows) * (height + GAP_PX), columns * (width + GAP_PX), 3)
    return whole[:-GAP_PX, :-GAP_PX]


def confusion_matrix(confusion_JJ: Tensor, class_names: Sequence[str], title: str) -> Figure:
    """Which class was taken for which; mistakes are shaded, what is right is only written."""
    counts = confusion_JJ.numpy()
    mistakes = counts * (1 - np.eye(len(counts), dtype=counts.dtype))
    most = max(mistakes.max(), 1)
    few = len(counts) <= MOST_NAMED_CLASSES  # more could not be read, and would take minutes
    size = 1.8 + 0.5 * min(len(counts), MOST_NAMED_CLASSES)
    figure = new_figure(size, size)
    figure.set_layout_engine("constrained")
    axes = figure.subplots()
    axes.imshow(mistakes, cmap="Oranges", vmin=0, vmax=most)
    for row, column in np.ndindex(*counts.shape):
        if few and counts[row, column]:
            text = axes.text(column, row, f"{counts[row, column]:,}", ha="center", va="center")
            text.set(fontsize=FONT_SIZE, weight="normal" if row == column else "bold")
            text.set_color("white" if mistakes[row, column] > 0.6 * most else "black")
    places = range(0, len(class_names), 1 if few else len(class_names) // 20)
    class_names = [class_names[place] for place in places]
    axes.set_xticks(places, class_names, rotation=45 if max(map(len, class_names)) > 3 else 0)
    axes.set_yticks(places, class_names)
    axes.set_xlabel("predicted")
    axes.set_ylabel("true")
    axes.set_title(title, fontsize=10)
    return figure


def step_times(result: Mapping[str, Any]) -> Figure:
    """Bars of how long each kind of training step takes, from what `capsrun bench` found.

    A mark on each shows how long the arithmetic of a direct convolution would take at the rate of a
    large matrix product. A step that is shorter makes do with fewer operations.
    """
    rows = result["steps"].values()
    figure = new_figure(8, 1.3 + 0.4 * len(rows))
    axes = figure.add_subplot()
    times = [row["median_ms"] for row in rows]
    direct = [row["median_ms"] * row["percent_of_matrix_rate"] / 100 for row in rows]
    axes.barh(range(len(rows)), times, color="#9ecae1")
    label = "direct arithmetic at the rate of a large matrix product"
    axes.plot(direct, range(len(rows)), "|", c="#08519c", ms=16, mew=2, label=label)
    for place, row in enumerate(rows):
        digits = 0 if times[place] >= 100 else 2
        text = f"   {times[place]:,.{digits}f} ms, {row['times_textbook']:.1f}×"
        end = max(times[place], direct[place])
        axes.text(end, place, text, va="center", fontsize=FONT_SIZE)
    axes.set_yticks(range(len(rows)), list(result["steps"]))
    axes.invert_yaxis()
    axes.tick_params(labelsize=FONT_SIZE)
    axes.set_xlim(0, 1.2 * max(times))
    axes.set_xlabel(
        f"ms for a training step of {counted(result['batch_size'], 'image')}", fontsize=FONT_SIZE
    )
    title = (
        f"{result['device']}, torch {result['versions']['torch']}, {result['date']}\n"
        f"{result['step_gflop']:.3g} GFLOP a step, {result['dataset']}; × the speed of the textbook"
    )
    axes.set_title(title, fontsize=FONT_SIZE)
    figure.legend(fontsize=FONT_SIZE, loc="lower center", frameon=False)
    axes.spines[["top", "right"]].set_visible(False)
    figure.tight_layout(rect=(0, 0.06, 1, 1))
    return figure
