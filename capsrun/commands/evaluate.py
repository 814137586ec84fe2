"""`capsrun eval`: test a trained model: errors, confusion matrix, pictures."""

import dataclasses
import hashlib
import time
from pathlib import Path
from typing import Any

from capsrun.config import EvalConfig, TrainConfig
from capsrun.data import SAMPLED, load_dataset
from capsrun.errors import UserError, notice
from capsrun.runs import figures, record
from capsrun.runs.checkpoint import check_dataset, find_checkpoint, load_model
from capsrun.runs.progress import bar
from capsrun.runs.scores import almost_line, answer, print_table, score_figures, score_summary
from capsrun.training.metrics import score_split
from capsrun.training.step import resolve_device, resolve_precision, to_device


def evaluate(config: EvalConfig, checkpoint: Path) -> dict[str, Any]:
    """Test the model of `checkpoint` on a split of a data set and return what `result.json` holds.

    With `config.ensemble` the scores of all models are averaged.
    Raises UserError when a checkpoint, the data or their combination cannot be used.
    """
    device = resolve_device(config.device)
    precision = resolve_precision(config.precision, device)
    trained = load_model(checkpoint)
    others = [find_checkpoint(path, "capsrun train") for path in config.ensemble]
    ensemble = [trained, *map(load_model, others)]
    for member in ensemble:
        check_dataset(config.dataset, member.config, config.split)
        if type(member.config.loss) is not type(trained.config.loss):
            raise UserError(
                "an ensemble averages capsule lengths, or the probabilities of CNNs, but not both: "
                f"{trained.config.model.name} and {member.config.model.name}"
            )
    if config.mask == "longest" and trained.model.decoder is None:
        raise UserError(f"{checkpoint} has no decoder, so there is nothing that mask= decides")
    dataset = load_dataset(config.dataset, device)
    split = dataset.split(config.split)
    # Beside the checkpoint, where another split or mask does not overwrite this one.
    name = f"eval-{dataset.name}-{config.split}" + unlike_training(config, trained.config)
    name += "-all" if dataset.name in SAMPLED and config.dataset.test == "all" else ""
    name += "-longest" if config.mask == "longest" else ""
    if others:
        digest = hashlib.md5("\n".join(map(str, others)).encode(), usedforsecurity=False)
        name += f"-ensemble{len(ensemble)}-{digest.hexdigest()[:6]}"
    out_dir = Path(config.out_dir or checkpoint.parent / name)
    record.make_output(out_dir)

    for path, member in zip([checkpoint, *others], ensemble):
        print(f"{path}: {precision} on {record.describe_device(device)}")
        if not member.finished:
            print(f"this run is not finished: its model after {member.step:,} steps is tested")
    began = time.perf_counter()
    models = [to_device(member.model, device, fast=config.compile) for member in ensemble]
    model = models[0]
    score = score_split(models, split, precision, config.mask, bar)
    seconds = time.perf_counter() - began
    print_table(score, dataset.class_names)
    drawn = score_figures(model, split, dataset.class_names, score, config.mask, config.pictures)
    for old in ("confusion", "reconstructions", "failures", "absent"):
        (out_dir / "pictures" / f"{old}.png").unlink(missing_ok=True)
    for picture, figure in drawn.items():
        figures.save(figure, out_dir / "pictures" / f"{picture}.png")
    record.show_in_tensorboard(out_dir, "eval", drawn)
    result = {
        "command": "eval",
        "name": trained.config.name,
        "dataset": dataset.name,
        "split": config.split,
        "mask": config.mask,
        "model": trained.config.model.name,
        "seed": trained.config.seed,
        "steps": trained.step,
        "finished": trained.finished,
        **score_summary(score, dataset.class_names),
        "train_seconds": trained.train_seconds,
        "eval_seconds": seconds,
        "images_per_second": score.count / seconds,
        **record.provenance(device, precision),
        "checkpoint": str(checkpoint),
        "ensemble": [str(path) for path in others],
        "config": dataclasses.asdict(config),
        "trained": dataclasses.asdict(trained.config),
    }
    record.write_json(out_dir / "result.json", result)
    if others:
        print(f"scores: means over {len(ensemble)} models; pictures: of {checkpoint}")
    print(f"pictures: {out_dir / 'pictures'}")
    if split.digits > 1:
        print(almost_line(score.almost_correct, score.count))
    print(answer(config.split, score.errors, score.count))
    return result


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
