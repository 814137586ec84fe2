"""`capsrun train`: train a model, or go on where its run was interrupted."""

import dataclasses
import math
import time
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from typing import Any

import torch

from capsrun import errors
from capsrun.config import MarginLossConfig, StopConfig, TrainConfig
from capsrun.data import Dataset, known, load_dataset
from capsrun.data.splits import TrainingBatches
from capsrun.errors import Stopped, UserError
from capsrun.models import build_model
from capsrun.models.capsnet import CapsNet
from capsrun.models.routing import RoutingIteration
from capsrun.runs import figures, record
from capsrun.runs.checkpoint import load_weights, save_checkpoint
from capsrun.runs.next_steps import command, next_lines, uses_of_model
from capsrun.runs.progress import ProgressLine, StopRequest, Stopwatch, bar, stop_requests
from capsrun.runs.run_page import NAME as PAGE
from capsrun.runs.run_page import write_run_page
from capsrun.runs.scores import (
    almost_line,
    answer,
    reconstruction_grid,
    score_figures,
    score_summary,
)
from capsrun.terminal import BOLD, duration, styled
from capsrun.training.losses import class_presence
from capsrun.training.metrics import Score, score_split
from capsrun.training.step import (
    Trainer,
    Update,
    autocast,
    learning_rate,
    resolve_device,
    resolve_precision,
    total_steps,
)

NOT_FINITE = "not_finite.pt"
# Images of the batch for which it is logged what routing does: they are routed once more for that,
# with the weights as they are after the update.
ROUTING_LOGGED = 16


@dataclass
class Run:
    """A training run in progress."""

    config: TrainConfig
    folder: record.RunFolder
    dataset: Dataset
    trainer: Trainer
    recorder: record.Recorder
    progress: ProgressLine
    clock: Stopwatch
    """Runs while the model is trained, not while it is evaluated or saved."""
    provenance: dict[str, Any]
    """Device, versions and commit, as they were when the run (or its last part) began."""
    step: int
    """Updates made so far."""
    steps: int
    """Updates of the whole run."""
    logged: tuple[int, float]
    """Step and seconds of training when the speed was last logged."""
    reached: bool = False
    """Whether the accuracy at which to stop was reached."""
    tested: dict[str, Score] | None = None
    """What the last evaluation found, if the model has not changed since and it was complete."""


def train(
    config: TrainConfig, out_dir: Path, model_words: Sequence[str] | None = None
) -> dict[str, Any]:
    """Train as `config` says into `out_dir` and return what `result.json` holds.

    model_words: what the other commands are told to find this model, for the line that suggests
    them; None: none is printed.
    Goes on after the last checkpoint of an interrupted run, and leaves a finished one alone.
    Raises UserError for what the user can mend, and Stopped, with everything saved, on Ctrl-C.
    """
    folder = record.RunFolder(out_dir, dataclasses.asdict(config))
    result = folder.result()
    if result is not None:
        print(f"{out_dir} is finished already; choose another name=…, or delete it to train anew")
        if not (out_dir / PAGE).exists():  # it was interrupted, or is of an earlier version
            write_run_page(out_dir)
    else:
        run = open_run(config, folder)
        try:
            with stop_requests() as stop:
                training_loop(run, stop)
                result = finish(run)
        except FloatingPointError as error:
            save_unfinite(run)
            raise UserError(
                f"training stopped after step {run.step:,}: {error}; that state is in "
                f"{folder.path / NOT_FINITE}, and checkpoint.pt (if any) is from before; try a "
                "lower recipe.learning_rate"
            ) from error
        finally:
            run.progress.close()
            run.recorder.close()
        print(trained_line(result))
        print(f"page: {out_dir / PAGE}")
        print(f"curves: tensorboard --logdir {out_dir}")
    if "almost_correct" in result:
        print(almost_line(result["almost_correct"], result["count"]))
    if result.get("stopped"):
        print(stopped_line(result["stopped"]))
    if model_words is not None:
        uses = uses_of_model(config.model, model_words)
        print(next_lines([command("eval", *model_words), *uses]))
    print(styled(answer("test", result["errors"], result["count"]), BOLD))
    return result


def training_loop(run: Run, stop: StopRequest) -> None:
    """Make every step that is left, or those until the accuracy at which to stop is reached.

    Raises Stopped, having saved, when that is asked for, and FloatingPointError for a loss or a
    weight that is not finite.
    """
    config = run.config
    batches = TrainingBatches(run.dataset.train, config.seed, config.recipe.batch_size)
    evaluate_every = evaluation_steps(run)
    saved_at = time.monotonic()
    run.clock.start()
    while run.step < run.steps and not run.reached:  # it is at once where only a result is missing
        log_at = next_multiple(run.step, config.record.log_every_steps, run.steps)
        stop_at = min(log_at, next_multiple(run.step, evaluate_every, run.steps))
        count = min(stop_at - run.step, run.trainer.steps_at_once)
        update = run.trainer.advance(batches, run.step, count)
        run.step += count
        run.progress.advance(count)
        if run.step == log_at:
            log_step(run, update)
        if run.step % evaluate_every == 0 and run.step < run.steps:
            with run.clock.paused():
                run.reached = log_evaluation(run)
            if run.reached:  # nothing is saved here that would go on when it is resumed
                break
        if stop.asked or time.monotonic() - saved_at >= config.record.checkpoint_every_seconds:
            with run.clock.paused():
                save(run)
            saved_at = time.monotonic()
        if stop.asked:
            at = f"step {run.step:,} of {run.steps:,}"
            raise Stopped(f"stopped after {at}, which is saved", stop.signal_number)
    run.clock.pause()


def evaluation_steps(run: Run) -> int:
    """After how many steps the model is tested: what `stop` or `record` says, or an epoch."""
    config = run.config
    stopping = config.stop.accuracy_percent is not None
    chosen = config.stop.every_steps if stopping else config.record.evaluate_every_steps
    return chosen or math.ceil(run.dataset.train.epoch_images / config.recipe.batch_size)


def next_multiple(step: int, every: int, last: int) -> int:
    """The first multiple of `every` after `step`, or `last` where that comes before."""
    return min((step // every + 1) * every, last)


def open_run(config: TrainConfig, folder: record.RunFolder) -> Run:
    """Load the data, build the model, and take both to where an interrupted run was."""
    if known(config.dataset.name).for_testing:
        raise UserError(
            f"{config.dataset.name} is for testing; train on dataset={config.dataset.trained_on}"
        )
    device = resolve_device(config.device)
    precision = resolve_precision(config.precision, device)
    dataset = load_dataset(config.dataset, device)
    steps = total_steps(config.recipe, dataset.train.epoch_images)
    model = build_model(config.model, config.routing, config.dataset, config.seed)
    folder.make()
    checkpoint = folder.unfinished()
    if checkpoint is not None:
        precision = checkpoint["precision"]  # the run's, where this machine would choose another
        load_weights(model, checkpoint["model"], folder.checkpoint)
    trainer = Trainer(
        model, config.loss, config.recipe, steps, device, precision, fast=config.compile
    )
    step, seconds, metrics_bytes, reached = 0, 0.0, 0, False
    if checkpoint is not None:
        step, seconds = checkpoint["step"], checkpoint["train_seconds"]
        metrics_bytes = checkpoint["metrics_bytes"]
        if checkpoint["optimizer"] is None:  # the last step is made; only the result is missing
            reached = step < steps
        else:
            trainer.load_optimizer(checkpoint["optimizer"])
    where = f"{precision} on {record.describe_device(device)}"
    print(
        f"{folder.path}: {'going on after' if step else 'from'} step {step:,} of {steps:,}, {where}"
    )
    recorder = record.Recorder(folder.path, step, metrics_bytes)
    if not step:
        recorder.begin(steps)
    return Run(
        config,
        folder,
        dataset,
        trainer,
        recorder,
        ProgressLine(step, steps, config.recipe.batch_size),
        Stopwatch(seconds),
        record.provenance(device, precision),
        step,
        steps,
        logged=(step, seconds),
        reached=reached,
    )


def log_step(run: Run, update: Update) -> None:
    """Record what the last step computed. Raises FloatingPointError when its loss is not finite."""
    batch, output, losses = update
    total = losses.total.item()
    if not math.isfinite(total):
        raise FloatingPointError(f"the loss is {total}")
    kind, seen = kinds(run.config)
    scores_BJ = output.scores_BJ.detach()
    present_BJ = class_presence(batch.labels_BT, scores_BJ.shape[1])
    values = {
        "loss/total": total,
        f"loss/{kind}": losses.classification.item(),
        "learning_rate": learning_rate(run.config.recipe, run.step - 1, run.steps),
        f"{seen}/true_class": scores_BJ[present_BJ].mean().item(),
        f"{seen}/other_classes": scores_BJ[~present_BJ].mean().item(),
    }
    if output.reconstructions_BTCHW is not None:
        values["loss/reconstruction"] = losses.reconstruction.item()
    values |= routing_changes(run, batch.images_BCHW[:ROUTING_LOGGED])
    steps, seconds = run.step - run.logged[0], run.clock.seconds - run.logged[1]
    values["images_per_second"] = steps * run.config.recipe.batch_size / seconds
    run.logged = (run.step, run.clock.seconds)
    values["memory_gb"] = record.memory_gb(run.trainer.device)
    run.recorder.numbers(run.step, values)
    parts = {"loss": total}
    if output.reconstructions_BTCHW is not None:  # else it is all there is
        parts[kind] = values[f"loss/{kind}"]
    run.progress.show(parts, values["images_per_second"])


def kinds(config: TrainConfig) -> tuple[str, str]:
    """What the loss of a model and its scores are called."""
    if isinstance(config.loss, MarginLossConfig):
        return "margin", "capsule_length"
    return "cross_entropy", "softmax"


def routing_changes(run: Run, images_BCHW: torch.Tensor) -> dict[str, float]:
    """How much each routing iteration changes the logits of some images (figure A.1)."""
    if not isinstance(run.trainer.model, CapsNet):
        return {}
    history: list[RoutingIteration] = []
    with torch.inference_mode(), autocast(run.trainer.device, run.trainer.precision):
        run.trainer.model.encode(images_BCHW, history)
    return {
        f"routing_logit_change/iteration_{number}": i.logit_changes_BIJ.abs().mean().item()
        for number, i in enumerate(history, 1)
    }


def log_evaluation(run: Run) -> bool:
    """Test the model as it is now; whether the accuracy at which to stop is reached.

    Of the test images as many are used as `record.evaluate_images` says, but all where they decide
    whether to stop.
    """
    stop, most = run.config.stop, run.config.record.evaluate_images
    on_test = stop.accuracy_percent is not None and stop.on == "test"
    scores = test_model(run, None if on_test else most)
    run.tested = scores if on_test else None
    reached = reaches_target(stop, scores)
    if reached:
        accuracy = 100 - scores[stop.on].error_percent
        run.progress.say(f"{stop.on} accuracy {accuracy:.2f} % reached after {run.step:,} steps")
    return reached


def reaches_target(stop: StopConfig, scores: Mapping[str, Score]) -> bool:
    """Whether there is an accuracy at which to stop, and the images that decide are so far."""
    if stop.accuracy_percent is None:
        return False
    score = scores[stop.on]
    # Counted in images, so that 99.23 % of 10,000 is 9,923 and no rounding decides.
    needed = math.ceil(stop.accuracy_percent * score.count / 100 - 1e-6)
    return score.count - score.errors >= needed


def test_model(run: Run, most: int | None) -> dict[str, Score]:
    """Test the model as it is now; record its errors and what it reconstructs.

    most: how many of the test images are used; None: all.
    """
    values, scores = {}, {}
    model = run.trainer.model
    for name, split in (("test", run.dataset.test), ("validation", run.dataset.validation)):
        if len(split):
            limit = most if name == "test" else None
            scores[name] = score_split(
                model,
                split,
                run.trainer.precision,
                mask="label",
                progress=partial(bar, doing="testing"),
                most=limit,
            )
            values[f"error_percent/{name}"] = scores[name].error_percent
            if split.digits > 1:
                almost = 100 * scores[name].almost_correct / scores[name].count
                values[f"almost_correct_percent/{name}"] = almost
    run.recorder.numbers(run.step, values)
    if isinstance(model, CapsNet) and model.decoder is not None:
        grid = reconstruction_grid(model, run.dataset.test, run.dataset.class_names)
        run.recorder.picture(run.step, "reconstructions", grid)
    run.recorder.flush()
    shown = ", ".join(answer(name, result.errors, result.count) for name, result in scores.items())
    run.progress.say(f"after {run.step:,} steps: {shown}")
    return scores


def save(run: Run, finished: bool = False) -> None:
    """Write the checkpoint; when finished, without the optimiser's state, which is two thirds.

    Raises FloatingPointError, and keeps the last checkpoint, for a weight that is not finite.
    """
    weights = run.trainer.model.state_dict()
    if not all(bool(tensor.isfinite().all()) for tensor in weights.values()):
        raise FloatingPointError("a weight is not finite")
    save_checkpoint(
        run.folder.checkpoint,
        run.folder.config,
        run.step,
        model=weights,
        optimizer=None if finished else run.trainer.optimizer.state_dict(),
        precision=run.trainer.precision,
        train_seconds=run.clock.seconds,
        metrics_bytes=run.recorder.position(),
    )


def save_unfinite(run: Run) -> None:
    """Save the state in which the numbers broke beside `checkpoint.pt`, which is left as it was.

    The batch is not in it: it is a function of the seed and the step.
    """
    save_checkpoint(
        run.folder.path / NOT_FINITE,
        run.folder.config,
        run.step,
        model=run.trainer.model.state_dict(),
        optimizer=run.trainer.optimizer.state_dict(),
        train_seconds=run.clock.seconds,
    )


def finish(run: Run) -> dict[str, Any]:
    """Save the trained model, test it, draw its pictures, and write `result.json` last."""
    save(run, finished=True)
    # Where the last evaluation has stopped the run there is nothing new to find.
    scores = run.tested if run.reached and run.tested else test_model(run, None)
    run.reached = run.reached or reaches_target(run.config.stop, scores)
    final = scores["test"]
    model, dataset, config = run.trainer.model, run.dataset, run.config
    for name, figure in score_figures(model, dataset.test, dataset.class_names, final).items():
        figures.save(figure, run.folder.pictures / f"{name}.png")
        run.recorder.picture(run.step, name, figure)
    result = {
        "command": "train",
        "name": config.name,
        "dataset": config.dataset.name,
        "model": config.model.name,
        "seed": config.seed,
        "steps": run.step,
        **score_summary(final, dataset.class_names),
        "parameters": sum(parameter.numel() for parameter in model.parameters()),
        "train_seconds": run.clock.seconds,
        "images_per_second": run.step * config.recipe.batch_size / run.clock.seconds,
        "memory_gb": record.memory_gb(run.trainer.device),
        **run.provenance,
        "stopped": how_it_stopped(run),
        "notes": list(errors.notices),
        "config": run.folder.config,
    }
    run.folder.write_result(result)
    write_run_page(run.folder.path)
    return result


def how_it_stopped(run: Run) -> dict[str, Any] | None:
    """Whether and when the run reached the accuracy at which to stop; None where there is none."""
    if run.config.stop.accuracy_percent is None:
        return None
    return {
        "accuracy_percent": run.config.stop.accuracy_percent,
        "on": run.config.stop.on,
        "reached": run.reached,
        "steps": run.step,
        "epochs": run.step * run.config.recipe.batch_size / run.dataset.train.epoch_images,
    }


def trained_line(result: Mapping[str, Any]) -> str:
    """How long a run took, and how fast it was."""
    return (
        f"trained: {result['steps']:,} steps in {duration(result['train_seconds'])} "
        f"({result['images_per_second']:,.0f} images/s)"
    )


def stopped_line(stopped: Mapping[str, Any]) -> str:
    """What `how_it_stopped` found, as a sentence."""
    asked = f"{stopped['accuracy_percent']:g} % on the {stopped['on']} images"
    length = f"{stopped['steps']:,} steps ({stopped['epochs']:.2f} epochs)"
    if stopped["reached"]:
        return f"stopped after {length}, which reached {asked}"
    return f"{asked} was not reached in {length}"
