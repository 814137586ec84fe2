"""What a score looks like: numbers for `result.json`, a table, the pictures of figure 3.

Shapes: B batch, C channels, H and W pixels.
"""

from collections.abc import Sequence
from typing import Any

import torch
from matplotlib.figure import Figure
from torch import Tensor

from capsrun.data import Split
from capsrun.data.batches import to_pixels
from capsrun.models.capsnet import CapsNet
from capsrun.runs import figures
from capsrun.training.metrics import Score

# How many images the pictures of a training run show.
PICTURES = 16


def answer(split: str, errors: int, count: int) -> str:
    """The last line of train and eval: `test error 0.34 % (34 of 10,000)`."""
    return f"{split} error {100 * errors / count:.2f} % ({errors:,} of {count:,})"


def score_summary(score: Score, class_names: Sequence[str]) -> dict[str, Any]:
    """The numbers of a score, for `result.json`."""
    return {
        "error_percent": score.error_percent,
        "errors": score.errors,
        "count": score.count,
        "errors_by_class": dict(zip(class_names, class_errors(score), strict=True)),
        "confusion": score.confusion_JJ.tolist(),
        "reconstruction_squared_error": score.squared_error,
    }


def class_errors(score: Score) -> list[int]:
    """Wrongly classified images of each class."""
    return (score.confusion_JJ.sum(1) - score.confusion_JJ.diagonal()).tolist()


def print_table(score: Score, class_names: Sequence[str]) -> None:
    """Errors of each class, and what its images were taken for."""
    width = max(8, *map(len, class_names))
    print(f"{'class':>{width}} {'images':>7} {'errors':>7} {'error':>8}  taken for")
    for number, (name, errors) in enumerate(zip(class_names, class_errors(score), strict=True)):
        row = score.confusion_JJ[number]
        count = int(row.sum())
        mistakes = sorted(
            ((int(row[k]), k) for k in range(len(row)) if k != number and row[k]), reverse=True
        )
        taken_for = ", ".join(f"{class_names[k]} ({times})" for times, k in mistakes)
        percent = f"{100 * errors / count:.2f} %" if count else "–"
        print(f"{name:>{width}} {count:>7,} {errors:>7,} {percent:>8}  {taken_for}".rstrip())


def score_figures(
    model: CapsNet,
    split: Split,
    class_names: Sequence[str],
    score: Score,
    mask: str = "label",
    pictures: int = PICTURES,
) -> dict[str, Figure]:
    """Draw the confusion matrix, and with a decoder figure 3 of the paper: hits and failures."""
    title = answer("", score.errors, score.count).strip()
    drawn = {"confusion": figures.confusion_matrix(score.confusion_JJ, class_names, title)}
    if model.decoder is None:
        return drawn
    wrong_N = score.labels_N != score.predicted_N
    hits = (~wrong_N).nonzero().squeeze(1)[:pictures]
    failures = wrong_N.nonzero().squeeze(1)[:pictures]
    if len(hits):
        drawn["reconstructions"] = _figure_3(model, split, class_names, score, hits, mask, False)
    if len(failures):
        drawn["failures"] = _figure_3(model, split, class_names, score, failures, mask, True)
    return drawn


def _figure_3(
    model: CapsNet,
    split: Split,
    class_names: Sequence[str],
    score: Score,
    chosen: Tensor,
    mask: str,
    failures: bool,
) -> Figure:
    """Images above their reconstructions; failures are reconstructed as both classes."""
    device = split.images_NCHW.device
    pixels = to_pixels(split.images_NCHW[chosen.to(device)])
    labels, predicted = score.labels_N[chosen], score.predicted_N[chosen]
    rows: list[tuple[str, Sequence[Tensor]]] = [("input", list(pixels))]
    as_label = ("as label", list(reconstruct(model, pixels, labels.to(device))))
    as_longest = ("as predicted", list(reconstruct(model, pixels, predicted.to(device))))
    first, second = (as_label, as_longest) if mask == "label" else (as_longest, as_label)
    rows += [first, second] if failures else [("output", first[1])]
    titles = [
        f"{class_names[label]}\n{class_names[guess]}"
        for label, guess in zip(labels.tolist(), predicted.tolist(), strict=True)
    ]
    kind = "Failures" if failures else "Hits"
    return figures.image_grid(rows, titles, f"{kind}: label above prediction above input")


@torch.inference_mode()
def reconstruct(model: CapsNet, pixels_BCHW: Tensor, labels_B: Tensor) -> Tensor:
    """What the decoder draws for each image's given class."""
    return model.decode(model.encode(pixels_BCHW), labels_B)


def reconstruction_grid(
    model: CapsNet, split: Split, class_names: Sequence[str], count: int = PICTURES
) -> Figure:
    """The first images of a split above their reconstructions as their true class."""
    pixels, labels = to_pixels(split.images_NCHW[:count]), split.labels_N[:count]
    rows = [("input", list(pixels)), ("output", list(reconstruct(model, pixels, labels)))]
    return figures.image_grid(rows, [class_names[label] for label in labels.tolist()])
