"""`capsrun eval`: test a trained model: errors, confusion matrix, pictures.

Shapes: N images, J classes, C channels, H and W pixels.
"""

import dataclasses
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import torch
from matplotlib.figure import Figure
from torch import Tensor

from capsrun.config import DatasetConfig, EvalConfig, TrainConfig
from capsrun.data import Split, load_dataset
from capsrun.data.batches import to_pixels
from capsrun.errors import UserError
from capsrun.models.capsnet import CapsNet
from capsrun.runs import figures, record
from capsrun.runs.checkpoint import load_model
from capsrun.training.metrics import Score, score_split
from capsrun.training.step import resolve_device, resolve_precision, to_device

# How many images the pictures of a training run show.
PICTURES = 16


def evaluate(config: EvalConfig, checkpoint: Path) -> dict[str, Any]:
    """Test the model of `checkpoint` on a split of a data set and return what `result.json` holds.

    Raises UserError when the checkpoint, the data or their combination cannot be used.
    """
    device = resolve_device(config.device)
    precision = resolve_precision(config.precision, device)
    model, trained = load_model(checkpoint)
    check_dataset(config.dataset, trained, config.split)
    dataset = load_dataset(config.dataset, device)
    split = dataset.split(config.split)
    out_dir = Path(config.out_dir or checkpoint.parent / f"eval-{dataset.name}-{config.split}")
    record.make_output(out_dir)

    print(f"{checkpoint}: {precision} on {record.describe_device(device)}")
    result = score_split(to_device(model, device), split, precision, config.mask, record.bar)
    print_table(result, dataset.class_names)
    drawn = score_figures(model, split, dataset.class_names, result, config.mask, config.pictures)
    for name, figure in drawn.items():
        figures.save(figure, out_dir / "pictures" / f"{name}.png")
    record.show_in_tensorboard(out_dir, drawn)
    summary = {
        "command": "eval",
        "name": trained.name,
        "dataset": dataset.name,
        "split": config.split,
        "mask": config.mask,
        "model": trained.model.name,
        "seed": trained.seed,
        **score_summary(result, dataset.class_names),
        **record.provenance(device, precision),
        "config": dataclasses.asdict(config),
        "trained": dataclasses.asdict(trained),
    }
    record.write_json(out_dir / "result.json", summary)
    print(f"pictures: {out_dir / 'pictures'}")
    print(record.answer(config.split, result.errors, result.count))
    return summary


def check_dataset(dataset: DatasetConfig, trained: TrainConfig, split: str) -> None:
    """Refuse images that the model cannot take, and a split that it was not trained with."""
    ours, theirs = (
        (d.channels, d.image_px, d.image_px, d.classes) for d in (dataset, trained.dataset)
    )
    if ours != theirs:
        raise UserError(
            "the checkpoint is of a model for images of {}×{}×{} and {} classes".format(*theirs)
            + ", but dataset={} has {}×{}×{} and {}".format(dataset.name, *ours)
        )
    if dataset.name != trained.dataset.name:
        return
    for key in ["split_seed"] if split == "test" else ["split_seed", "validation"]:
        value = getattr(trained.dataset, key)
        if getattr(dataset, key) != value:
            raise UserError(
                f"the model was trained with dataset.{key}={value}: say the same here, or images "
                "that it was trained on are counted as unseen"
            )


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
    """The confusion matrix, and with a decoder figure 3 of the paper: hits and failures."""
    title = record.answer("", score.errors, score.count).strip()
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
