"""`capsrun eval`: test a trained model: errors, confusion matrix, pictures."""

import csv
import dataclasses
import hashlib
import time
from collections.abc import Mapping, Sequence
from functools import partial
from pathlib import Path
from typing import Any

from matplotlib.figure import Figure
from torch import Tensor

from capsrun import disk
from capsrun.commands import robustness
from capsrun.commands.models import announce, load_images, model_facts, result_folder, write_result
from capsrun.config import EvalConfig, TrainConfig
from capsrun.data.sets import known
from capsrun.data.splits import Dataset, Split
from capsrun.errors import UserError, notice
from capsrun.models.capsnet import CapsNet
from capsrun.names import model_words, suggest, uses_of_model, usual_dataset
from capsrun.report import figures
from capsrun.report.pictures import almost_line, answer, print_table, score_figures, score_summary
from capsrun.report.routing_maps import routed, routing_figure
from capsrun.runs import checkpoint as checkpoints
from capsrun.runs.checkpoint import Trained
from capsrun.runs.progress import bar
from capsrun.terminal import BOLD, counted, duration, styled
from capsrun.training.device import describe_device, provenance, resolve_device, resolve_precision
from capsrun.training.metrics import Score, score_split
from capsrun.training.step import to_device

# What an earlier evaluation may have left that this one does not draw.
PICTURES = ("confusion", "reconstructions", "failures", "absent", "routing_*", *robustness.PICTURES)


def main(config: EvalConfig, overrides: Sequence[str]) -> dict[str, Any]:
    """`capsrun eval`: test the chosen or the default model; returns what `result.json` holds."""
    return evaluate(config, checkpoints.find_model(config, config.split))


def evaluate(config: EvalConfig, checkpoint: Path) -> dict[str, Any]:
    """Test the model of `checkpoint` on a split of a data set and return what `result.json` holds.

    With `config.ensemble` the scores of all models are averaged.
    Raises UserError when a checkpoint, the data or their combination cannot be used.
    """
    device = resolve_device(config.device)
    precision = resolve_precision(config.precision, device)
    paths = [checkpoint, *map(checkpoints.find_checkpoint, config.ensemble)]
    ensemble = load_ensemble(config, paths)
    trained = ensemble[0]
    dataset = load_images(config, ensemble, device)
    split, names = dataset.split(config.split), dataset.class_names
    check_routing_images(config, split)
    robustness.check(config, ensemble)
    others = robustness.find_others(config, split)
    place = folder_name(config, trained.config, paths[1:])
    with result_folder(config, checkpoint, place) as folder:
        for path, member in zip(paths, ensemble):
            announce(path, member, f"{precision} on {describe_device(device)}", "tested")
        began = time.perf_counter()
        models = [to_device(member.model, device, fast=config.compile) for member in ensemble]
        options = config.mask, partial(bar, doing="testing"), config.images, config.predictions
        try:
            score = score_split(models, split, precision, *options)
        except FloatingPointError as error:
            raise UserError(f"{checkpoint} cannot be tested: {error}") from error
        seconds = time.perf_counter() - began
        print_table(score, names)
        tested = robustness.Tested(config, trained, models, dataset, precision, score, others)
        drawn, found = look_into(tested)
        replace_pictures(folder / "pictures", drawn)
        write_predictions(folder / "predictions.csv", score, names)
        result = {
            **about(config, ensemble, paths),
            **score_summary(score, names),
            **found,
            "eval_seconds": seconds,
            "images_per_second": score.count / seconds,
            **provenance(device, precision),
        }
        page = write_result(folder, result, {"eval": drawn})
    if len(ensemble) > 1:
        print(f"scores: means over {len(ensemble)} models; pictures: of {checkpoint}")
    print(f"tested: {counted(score.count, 'image')} in {duration(seconds)}")
    print(f"page: {page}")
    if split.digits > 1:
        print(almost_line(score.almost_correct, score.count))
    suggest(*uses_of_model(trained.config.model, model_words(config, checkpoint)), ["report"])
    print(styled(answer(config.split, score.errors, score.count), BOLD))
    return result


def load_ensemble(config: EvalConfig, paths: list[Path]) -> list[Trained]:
    """The models of some checkpoints. Raises UserError for what they cannot do (together)."""
    averaged = config.weights == "averaged"
    ensemble = [checkpoints.load_checkpoint(path, averaged=averaged) for path in paths]
    first = ensemble[0]
    if len({path.resolve() for path in paths}) < len(paths):
        raise UserError("an ensemble is of several models, but one of them is named twice")
    for member in ensemble:
        checkpoints.check_dataset(config.dataset, member.config, config.split)
        if isinstance(member.model, CapsNet) != isinstance(first.model, CapsNet):
            raise UserError(
                "an ensemble averages capsule lengths, or the probabilities of CNNs, but not both: "
                f"{first.config.model.name} and {member.config.model.name}"
            )
    if config.mask == "longest" and first.model.decoder is None:
        raise UserError(f"{paths[0]} has no decoder, so there is nothing that mask= decides")
    return ensemble


def check_routing_images(config: EvalConfig, split: Split) -> None:
    """Raise UserError for an image that there is not."""
    for number in config.routing_images:
        if number >= len(split):
            raise UserError(
                f"routing_images={number}: the images of this split are 0 to {len(split) - 1:,}"
            )


def folder_name(config: EvalConfig, trained: TrainConfig, others: list[Path]) -> str:
    """A name beside the checkpoint that no other split, mask, set of images or ensemble has.

    Says where the images are others than those of the run.
    """
    dataset = config.dataset
    parts = ["eval", dataset.title, config.split]
    same = dataset.name == trained.dataset.name
    compared = dict.fromkeys(("source", "split_seed"), trained.dataset)
    if config.split == "validation":
        compared["validation"] = trained.dataset
    if dataset.source is not None:  # whose test images are moved too
        compared["shift_px"] = trained.dataset if same else usual_dataset(dataset.name, dataset)
    for key, like in compared.items():
        value, other = getattr(dataset, key), getattr(like, key)
        if value is not None and value != other:
            parts.append(f"{key}-{value}")
            if same:
                notice(f"trained with dataset.{key}={other}, tested with {value}")
    if known(dataset.name).sampled and dataset.test == "all":
        parts.append("all")
    if config.images is not None:
        parts.append(f"first{config.images}")
    parts += [word for word in (config.mask, config.weights) if word in ("longest", "averaged")]
    if others:
        digest = hashlib.md5("\n".join(map(str, others)).encode(), usedforsecurity=False)
        parts.append(f"ensemble{1 + len(others)}-{digest.hexdigest()[:6]}")
    parts += robustness.folder_parts(config)
    return "-".join(parts)


def look_into(tested: robustness.Tested) -> tuple[dict[str, Figure], dict[str, Any]]:
    """The pictures of a test, and what `result.json` holds beside its errors."""
    config, model, dataset = tested.config, tested.models[0], tested.dataset
    names, options = dataset.class_names, (tested.plain, config.mask, config.pictures)
    drawn = score_figures(model, tested.split, names, *options)
    routing: list[dict[str, Any]] = []
    if isinstance(model, CapsNet):
        drawn_routing, routing = route_images(config, model, dataset)
        drawn |= drawn_routing
    changed_drawn, changed = robustness.find(tested)
    return drawn | changed_drawn, {"routing": routing, **changed}


def route_images(
    config: EvalConfig, model: CapsNet, dataset: Dataset
) -> tuple[dict[str, Figure], list[dict[str, Any]]]:
    """Pictures of how some images are routed, and the numbers, for `result.json`."""
    drawn, facts = {}, []
    for number in config.routing_images:
        found = routed(model, dataset.split(config.split), number)
        title = f"{dataset.name}, {config.split} image {number}: routing"
        drawn[f"routing_{number}"] = routing_figure(found, dataset.class_names, title)
        facts.append(found.facts(number))
        print(f"routing of image {number}: {found.entropy_text()}")
    return drawn, facts


def write_predictions(path: Path, score: Score, names: Sequence[str]) -> None:
    """A line for each image whose scores were kept: its number, classes, and every score."""

    def named(classes_T: Tensor) -> str:
        return " ".join(names[label] for label in classes_T.tolist())

    with disk.replacing(path) as temporary, open(temporary, "w", encoding="utf-8") as stream:
        lines = csv.writer(stream, lineterminator="\n")
        lines.writerow(["image", "label", "prediction", *names])
        rows = zip(score.labels_NT, score.predicted_NT, score.scores_NJ)
        for number, (labels_T, predicted_T, scores_J) in enumerate(rows):
            shown = [f"{value:.4f}" for value in scores_J.tolist()]
            lines.writerow([number, named(labels_T), named(predicted_T), *shown])


def replace_pictures(folder: Path, drawn: Mapping[str, Figure]) -> None:
    """Write pictures in place of those of an earlier evaluation, of which there may be more."""
    for pattern in PICTURES:
        for old in folder.glob(f"{pattern}.png"):
            old.unlink()
    for name, figure in drawn.items():
        figures.save(figure, folder / f"{name}.png")


def about(config: EvalConfig, ensemble: list[Trained], paths: list[Path]) -> dict[str, Any]:
    """Which models were tested, and how: for `result.json`."""
    return {
        "command": "eval",
        **model_facts(ensemble[0], paths[0]),
        "dataset": config.dataset.title,
        "split": config.split,
        "mask": config.mask,
        "weights": config.weights,
        "train_seconds": ensemble[0].train_seconds,
        "finished": all(member.finished for member in ensemble),
        "config": dataclasses.asdict(config),
        "ensemble": [str(path) for path in paths[1:]],
        "others_trained": [dataclasses.asdict(member.config) for member in ensemble[1:]],
    }
