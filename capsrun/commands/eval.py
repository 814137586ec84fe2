"""`capsrun eval`: test a trained model: errors, confusion matrix, pictures."""

import dataclasses
import hashlib
import time
from collections.abc import Mapping, Sequence
from functools import partial
from pathlib import Path
from typing import Any

from matplotlib.figure import Figure

from capsrun import disk
from capsrun.config import EvalConfig, TrainConfig
from capsrun.data import Split, known, load_dataset
from capsrun.errors import UserError, notice
from capsrun.models import Model
from capsrun.models.capsnet import CapsNet
from capsrun.names import model_words, suggest, uses_of_model
from capsrun.report import figures
from capsrun.report.pictures import almost_line, answer, print_table, score_figures, score_summary
from capsrun.report.routing_maps import Routed, routed, routing_figure
from capsrun.report.run_page import write_run_page
from capsrun.runs.checkpoint import (
    Trained,
    check_dataset,
    find_checkpoint,
    find_model,
    load_checkpoint,
    output_folder,
)
from capsrun.runs.folder import output
from capsrun.runs.progress import bar
from capsrun.runs.recorder import show_in_tensorboard
from capsrun.terminal import BOLD, duration, styled
from capsrun.training.device import describe_device, provenance, resolve_device, resolve_precision
from capsrun.training.metrics import score_split
from capsrun.training.step import to_device


def main(config: EvalConfig, overrides: Sequence[str]) -> None:
    """`capsrun eval`: test the chosen or the default model."""
    checkpoint = find_model(config, config.split)
    evaluate(config, checkpoint, model_words(config, checkpoint))


def evaluate(
    config: EvalConfig, checkpoint: Path, model_words: Sequence[str] | None = None
) -> dict[str, Any]:
    """Test the model of `checkpoint` on a split of a data set and return what `result.json` holds.

    With `config.ensemble` the scores of all models are averaged.
    model_words: what other commands are told to find this model and these images, for the line that
    suggests them; None: none is printed.
    Raises UserError when a checkpoint, the data or their combination cannot be used.
    """
    device = resolve_device(config.device)
    precision = resolve_precision(config.precision, device)
    others = [find_checkpoint(path) for path in config.ensemble]
    ensemble = load_ensemble(config, [checkpoint, *others])
    trained = ensemble[0]
    dataset = load_dataset(config.dataset, device)
    split = dataset.split(config.split)
    check_routing_images(config.routing_images, split)
    name = folder_name(config, trained.config, others)
    out_dir = Path(config.out_dir or output_folder(checkpoint, config.runs_dir) / name)
    with output(out_dir):
        for path, member in zip([checkpoint, *others], ensemble):
            print(f"{path}: {precision} on {describe_device(device)}")
            if not member.finished:
                print(f"this run is not finished: its model after {member.step:,} steps is tested")
        began = time.perf_counter()
        testing = partial(bar, doing="testing")
        models = [to_device(member.model, device, fast=config.compile) for member in ensemble]
        model = models[0]
        score = score_split(models, split, precision, config.mask, testing, config.images)
        seconds = time.perf_counter() - began
        print_table(score, dataset.class_names)
        drawn = score_figures(
            model, split, dataset.class_names, score, config.mask, config.pictures
        )
        maps = routing_of(model, split, config.routing_images)
        drawn |= routing_figures(maps, dataset.class_names, f"{dataset.name}, {config.split} image")
        replace_pictures(out_dir, drawn)
        result = {
            **about(config, ensemble),
            **score_summary(score, dataset.class_names),
            "routing": [routing.facts(number) for number, routing in maps.items()],
            "train_seconds": trained.train_seconds,
            "eval_seconds": seconds,
            "images_per_second": score.count / seconds,
            **provenance(device, precision),
            "checkpoint": str(checkpoint),
            "ensemble": [str(path) for path in others],
        }
        disk.write_json(out_dir / "result.json", result)
        for number, routing in maps.items():
            print(f"routing of image {number}: {routing.entropy_text()}")
        page = write_run_page(out_dir)
    if others:
        print(f"scores: means over {len(ensemble)} models; pictures: of {checkpoint}")
    print(f"tested: {score.count:,} images in {duration(seconds)}")
    print(f"page: {page}")
    if split.digits > 1:
        print(almost_line(score.almost_correct, score.count))
    if model_words is not None:
        uses = uses_of_model(trained.config.model, model_words)
        suggest(*uses, ["report"])
    print(styled(answer(config.split, score.errors, score.count), BOLD))
    return result


def about(config: EvalConfig, ensemble: list[Trained]) -> dict[str, Any]:
    """Which models were tested, and how: for `result.json`."""
    trained = ensemble[0]
    return {
        "command": "eval",
        "name": trained.config.name,
        "dataset": config.dataset.name,
        "split": config.split,
        "mask": config.mask,
        "weights": config.weights,
        "model": trained.config.model.name,
        "seed": trained.config.seed,
        "steps": trained.step,
        "finished": all(member.finished for member in ensemble),
        "config": dataclasses.asdict(config),
        "trained": dataclasses.asdict(trained.config),
        "others_trained": [dataclasses.asdict(member.config) for member in ensemble[1:]],
    }


def load_ensemble(config: EvalConfig, paths: list[Path]) -> list[Trained]:
    """The models of some checkpoints. Raises UserError for what they cannot do (together)."""
    ensemble = [load_checkpoint(path, averaged=config.weights == "averaged") for path in paths]
    first = ensemble[0]
    for member in ensemble:
        check_dataset(config.dataset, member.config, config.split)
        if type(member.config.loss) is not type(first.config.loss):
            raise UserError(
                "an ensemble averages capsule lengths, or the probabilities of CNNs, but not both: "
                f"{first.config.model.name} and {member.config.model.name}"
            )
    if config.mask == "longest" and first.model.decoder is None:
        raise UserError(f"{paths[0]} has no decoder, so there is nothing that mask= decides")
    return ensemble


def folder_name(config: EvalConfig, trained: TrainConfig, others: list[Path]) -> str:
    """A name beside the checkpoint that no other split, mask, set of images or ensemble has."""
    dataset = config.dataset
    name = f"eval-{dataset.name}-{config.split}" + unlike_training(config, trained)
    name += "-all" if known(dataset.name).sampled and dataset.test == "all" else ""
    name += f"-first{config.images}" if config.images is not None else ""
    name += "-longest" if config.mask == "longest" else ""
    name += "-averaged" if config.weights == "averaged" else ""
    if others:
        digest = hashlib.md5("\n".join(map(str, others)).encode(), usedforsecurity=False)
        name += f"-ensemble{1 + len(others)}-{digest.hexdigest()[:6]}"
    return name


def check_routing_images(numbers: list[int], split: Split) -> None:
    """Raise UserError for an image that there is not."""
    for number in numbers:
        if number >= len(split):
            raise UserError(
                f"routing_images={number}: the images of this split are 0 to {len(split) - 1:,}"
            )


def routing_of(model: Model, split: Split, numbers: list[int]) -> dict[int, Routed]:
    """How some images of a split are routed; nothing for a model without routing."""
    if not isinstance(model, CapsNet):
        return {}
    return {number: routed(model, split, number) for number in numbers}


def routing_figures(
    maps: Mapping[int, Routed], class_names: tuple[str, ...], images: str
) -> dict[str, Figure]:
    """A figure of each routed image. images: what they are, for the titles."""
    return {
        f"routing_{number}": routing_figure(routing, class_names, f"{images} {number}: routing")
        for number, routing in maps.items()
    }


def replace_pictures(out_dir: Path, drawn: Mapping[str, Figure]) -> None:
    """Write pictures in place of those of an earlier evaluation, of which there may be more."""
    pictures = out_dir / "pictures"
    for old in ("confusion", "reconstructions", "failures", "absent"):
        (pictures / f"{old}.png").unlink(missing_ok=True)
    for path in pictures.glob("routing_*.png"):
        path.unlink()
    for name, figure in drawn.items():
        figures.save(figure, out_dir / "pictures" / f"{name}.png")
    show_in_tensorboard(out_dir, "eval", drawn)


def unlike_training(config: EvalConfig, trained: TrainConfig) -> str:
    """What makes these test images others than those of the run, for the name of the folder."""
    ours, theirs, parts = config.dataset, trained.dataset, []
    same = ours.name == theirs.name
    for key in ("source", "split_seed", *(["shift_px"] if same else [])):
        value, other = getattr(ours, key), getattr(theirs, key)
        if value is not None and value != other:
            parts.append(f"-{key}-{value}")
            if same:
                notice(f"trained with dataset.{key}={other}, tested with {value}")
    return "".join(parts)
