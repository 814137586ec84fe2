"""What train and eval show of a score: the answer, a table, and pictures.

Shapes: N and B images, T digits in one image, C channels, H and W pixels, J classes.
"""

from collections.abc import Sequence
from typing import Any

import torch
from matplotlib.figure import Figure
from tabulate import tabulate
from torch import Tensor

from capsrun.data.batches import in_class_order
from capsrun.data.splits import Split
from capsrun.models import Model
from capsrun.models.capsnet import CapsNet
from capsrun.report import figures
from capsrun.training.metrics import Score

# How many images the pictures of a training run show.
PICTURES = 16


def answer(split: str, errors: int, count: int) -> str:
    """The last line of train and eval: `test error 0.34 % (34 of 10,000)`."""
    return f"{split} error {100 * errors / count:.2f} % ({errors:,} of {count:,})"


def almost_line(almost_correct: int, count: int) -> str:
    """What is said apart of images with two digits, and counts for nothing."""
    return (
        f"at least one of the two digits found: {100 * almost_correct / count:.2f} % "
        f"({almost_correct:,} of {count:,})"
    )


def score_summary(score: Score, class_names: Sequence[str]) -> dict[str, Any]:
    """The numbers of a score, for `result.json`."""
    summary = {
        **counts(score),
        "errors_by_class": dict(zip(class_names, class_errors(score), strict=True)),
        "confusion": score.confusion_JJ.tolist(),
        "reconstruction_squared_error": score.squared_error,
    }
    if score.labels_NT.shape[1] > 1:
        summary["almost_correct"] = score.almost_correct
    return summary


def counts(score: Score) -> dict[str, Any]:
    """How many images were tested, and how many of them are wrong."""
    return {"error_percent": score.error_percent, "errors": score.errors, "count": score.count}


def class_errors(score: Score) -> list[int]:
    """Digits of each class that were missed."""
    return (score.digits_J - score.confusion_JJ.diagonal()).tolist()


def print_table(score: Score, class_names: Sequence[str]) -> None:
    """Errors of each class, and what its images were taken for."""
    lines = []
    for number, (name, errors) in enumerate(zip(class_names, class_errors(score), strict=True)):
        row, count = score.confusion_JJ[number].tolist(), int(score.digits_J[number])
        mistakes = sorted(
            ((times, k) for k, times in enumerate(row) if k != number and times), reverse=True
        )
        taken_for = ", ".join(f"{class_names[k]} ({times:,})" for times, k in mistakes)
        percent = f"{100 * errors / count:.2f} %" if count else "–"
        lines.append([name, f"{count:,}", f"{errors:,}", percent, taken_for])
    counted = "digits" if score.labels_NT.shape[1] > 1 else "images"
    header = ["class", counted, "errors", "error", "taken for"]
    sides = ("right", "right", "right", "right", "left")
    print(tabulate(lines, header, tablefmt="plain", disable_numparse=True, colalign=sides))
    if score.labels_NT.shape[1] > 1:
        both = score.count - score.almost_correct
        print(f"(in {both:,} images both digits were missed: what for is not known)")


def score_figures(
    model: Model,
    split: Split,
    class_names: Sequence[str],
    score: Score,
    mask: str = "label",
    pictures: int = PICTURES,
) -> dict[str, Figure]:
    """Draw the confusion matrix, hits and failures, and with two digits what is not there.

    With a decoder these are figure 3 of the paper, or for two digits figure 5.
    """
    title = answer("", score.errors, score.count).strip()
    if split.digits > 1:
        title += "\ndigits; without images of which both were missed"
    drawn = {"confusion": figures.confusion_matrix(score.confusion_JJ, class_names, title)}
    hits = (score.labels_NT == score.predicted_NT).all(1).nonzero().squeeze(1)[:pictures]
    failures = score.worst_first[:pictures]
    if model.decoder is not None and len(hits):
        drawn["reconstructions"] = _examples(model, split, class_names, score, hits, None)
    if len(failures):
        drawn["failures"] = _examples(model, split, class_names, score, failures, mask)
    if model.decoder is not None and split.digits > 1:
        chosen = torch.arange(min(pictures, score.count))
        drawn["absent"] = _absent(model, split, class_names, score, chosen)
    return drawn


def _examples(
    model: Model,
    split: Split,
    class_names: Sequence[str],
    score: Score,
    chosen_B: Tensor,
    mask: str | None,
) -> Figure:
    """Images above their reconstructions; failures are reconstructed as both classes.

    mask: which of the two comes first; None: these are hits, of which the two are the same.
    """
    batch = in_class_order(split.batch(chosen_B.to(split.device)))
    labels_BT = batch.labels_BT
    predicted_BT = score.predicted_NT[chosen_B].to(split.device)
    if split.digits > 1:  # a class keeps its place, and so its colour
        swapped_B1 = (predicted_BT.flip(1) == labels_BT).any(1, keepdim=True)
        predicted_BT = torch.where(swapped_B1, predicted_BT.flip(1), predicted_BT)
    rows = input_rows(batch.targets_BTCHW)
    if model.decoder is not None:
        shown = {"as label": labels_BT, "as predicted": predicted_BT}
        if mask is None:
            shown = {"output": labels_BT}
        elif mask == "longest":
            shown = dict(reversed(shown.items()))
        rows += [
            (name, list(in_colours(reconstruct(model, batch.images_BCHW, classes_BT))))
            for name, classes_BT in shown.items()
        ]
    titles = [
        f"{shown_classes(label, class_names)}\n{shown_classes(guess, class_names)}"
        for label, guess in zip(labels_BT.tolist(), predicted_BT.tolist(), strict=True)
    ]
    kind = "Hits" if mask is None else "Failures, the surest first"
    colours = " (first digit orange, second blue)" if split.digits > 1 else ""
    title = f"{kind}: label above prediction above input{colours}"
    return figures.image_grid(rows, titles, title)


def _absent(
    model: CapsNet, split: Split, class_names: Sequence[str], score: Score, chosen_B: Tensor
) -> Figure:
    """Reconstruct a class that is there beside one that is neither there nor predicted (figure 5).

    What is not there should stay dark, as the decoder is to draw only what it finds in the image.
    """
    batch = in_class_order(split.batch(chosen_B.to(split.device)))
    labels_BT = batch.labels_BT
    taken = torch.cat([labels_BT, score.predicted_NT[chosen_B].to(split.device)], dim=1).tolist()
    count = len(class_names)
    # The next class after the last label that nothing speaks for.
    absent = [
        next(k % count for k in range(row[1] + 1, row[1] + 1 + count) if k % count not in row)
        for row in taken
    ]
    shown_BT = torch.stack([labels_BT[:, 0], torch.tensor(absent, device=split.device)], dim=1)
    drawn_BTCHW = reconstruct(model, batch.images_BCHW, shown_BT)
    rows = input_rows(batch.targets_BTCHW)[:1]
    for name, places in (("both", [1, 1]), ("present", [1, 0]), ("absent", [0, 1])):
        kept_T111 = drawn_BTCHW.new_tensor(places).view(2, 1, 1, 1)
        rows.append((name, list(in_colours(drawn_BTCHW * kept_T111))))
    titles = [
        f"{shown_classes(label, class_names)}\n{class_names[label[0]]}, *{class_names[other]}"
        for label, other in zip(labels_BT.tolist(), absent, strict=True)
    ]
    title = "What is not there: label above the classes drawn, * neither in the image nor predicted"
    return figures.image_grid(rows, titles, title)


def shown_classes(labels: Sequence[int], class_names: Sequence[str]) -> str:
    """`5`, or with two digits `5, 0`."""
    return ", ".join(class_names[label] for label in labels)


def input_rows(targets_BTCHW: Tensor) -> list[tuple[str, Sequence[Tensor]]]:
    """The images, and with two digits the digits that they consist of, in their colours."""
    pixels_BCHW = targets_BTCHW.sum(1).clamp(max=1)
    rows: list[tuple[str, Sequence[Tensor]]] = [("input", list(displayed(pixels_BCHW)))]
    if targets_BTCHW.shape[1] > 1:
        rows.append(("its digits", list(in_colours(targets_BTCHW))))
    return rows


def in_colours(images_BTCHW: Tensor) -> Tensor:
    """One image as it is; two on top of each other, orange and blue, and white where both are."""
    if images_BTCHW.shape[1] == 1:
        return displayed(images_BTCHW[:, 0])
    colours_T3 = images_BTCHW.new_tensor(figures.TWO_COLOURS)
    grey_BTHW = images_BTCHW.mean(2)
    return torch.einsum("bthw,tc->bchw", grey_BTHW, colours_T3).clamp(0, 1)


def displayed(images_BCHW: Tensor) -> Tensor:
    """Images that a screen can show: two channels (of two cameras) side by side."""
    if images_BCHW.shape[1] != 2:
        return images_BCHW
    return torch.cat(list(images_BCHW.split(1, dim=1)), dim=3)


@torch.inference_mode()
def reconstruct(model: CapsNet, images_BCHW: Tensor, labels_BT: Tensor) -> Tensor:
    """What the decoder draws for each of the given classes: (B, T, C, H, W)."""
    model.eval()
    return model.decode(model.encode(images_BCHW), labels_BT)


def reconstruction_grid(model: CapsNet, split: Split, class_names: Sequence[str]) -> Figure:
    """The first images of a split above their reconstructions as their true classes."""
    batch = split.batch(split.indices(0, PICTURES))
    drawn = in_colours(reconstruct(model, batch.images_BCHW, batch.labels_BT))
    rows = [*input_rows(batch.targets_BTCHW), ("output", list(drawn))]
    titles = [shown_classes(labels, class_names) for labels in batch.labels_BT.tolist()]
    return figures.image_grid(rows, titles)
