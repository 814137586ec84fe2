"""`capsrun eval`: test a trained model: errors, confusion matrix, pictures."""

import dataclasses
import time
from pathlib import Path
from typing import Any

from capsrun.config import EvalConfig
from capsrun.data import load_dataset
from capsrun.runs import figures, record
from capsrun.runs.checkpoint import check_dataset, load_model
from capsrun.runs.progress import bar
from capsrun.runs.scores import answer, print_table, score_figures, score_summary
from capsrun.training.metrics import score_split
from capsrun.training.step import resolve_device, resolve_precision, to_device


def evaluate(config: EvalConfig, checkpoint: Path) -> dict[str, Any]:
    """Test the model of `checkpoint` on a split of a data set and return what `result.json` holds.

    Raises UserError when the checkpoint, the data or their combination cannot be used.
    """
    device = resolve_device(config.device)
    precision = resolve_precision(config.precision, device)
    trained = load_model(checkpoint)
    check_dataset(config.dataset, trained.config, config.split)
    dataset = load_dataset(config.dataset, device)
    split = dataset.split(config.split)
    # Beside the checkpoint, where another split or mask does not overwrite this one.
    name = f"eval-{dataset.name}-{config.split}" + ("-longest" if config.mask == "longest" else "")
    out_dir = Path(config.out_dir or checkpoint.parent / name)
    record.make_output(out_dir)

    print(f"{checkpoint}: {precision} on {record.describe_device(device)}")
    if not trained.finished:
        print(f"this run is not finished: its model after {trained.step:,} steps is tested")
    began = time.perf_counter()
    model = to_device(trained.model, device, fast=config.compile)
    score = score_split(model, split, precision, config.mask, bar)
    seconds = time.perf_counter() - began
    print_table(score, dataset.class_names)
    drawn = score_figures(model, split, dataset.class_names, score, config.mask, config.pictures)
    for old in ("confusion", "reconstructions", "failures"):
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
        "config": dataclasses.asdict(config),
        "trained": dataclasses.asdict(trained.config),
    }
    record.write_json(out_dir / "result.json", result)
    print(f"pictures: {out_dir / 'pictures'}")
    print(answer(config.split, score.errors, score.count))
    return result
