"""`capsrun train`: train a model, or go on where its run was interrupted."""

import contextlib
import dataclasses
import math
import time
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from typing import Any, NoReturn

import torch

from capsrun import errors
from capsrun.config import MarginLossConfig, StopConfig, TrainConfig
from capsrun.data import Dataset, known, load_dataset
from capsrun.data.splits import TrainingBatches
from capsrun.errors import Stopped, UserError
from capsrun.models import build_model
from capsrun.models.capsnet import CapsNet
from capsrun.models.routing import RoutingIteration
from capsrun.names import model_words, run_name, suggest, uses_of_model
from capsrun.report import figures
from capsrun.report.pictures import (
    almost_line,
    answer,
    counts,
    reconstruction_grid,
    score_figures,
    score_summary,
)
from capsrun.report.run_page import NAME as PAGE
from capsrun.report.run_page import refresh_run_page, write_run_page
from capsrun.runs import parts, record
from capsrun.runs.checkpoint import load_weights, save_checkpoint
from capsrun.runs.parts import Part
from capsrun.runs.progress import (
    ProgressLine,
    StopRequest,
    Stopwatch,
    bar,
    stop_requests,
    stoppable,
)
from capsrun.runs.reader import best_on_test, read_metrics
from capsrun.terminal import BOLD, duration, styled
from capsrun.training.device import (
    autocast,
    begin_memory_count,
    describe_device,
    memory_gb,
    provenance,
    resolve_device,
    resolve_precision,
    set_deterministic,
)
from capsrun.training.distributed import Ranks, join_ranks
from capsrun.training.graph import make_trainer
from capsrun.training.losses import class_presence
from capsrun.training.metrics import Score, score_split
from capsrun.training.schedule import learning_rate, total_steps
from capsrun.training.step import Trainer, Update

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
    batches: TrainingBatches
    """This process's share of what is trained on."""
    trainer: Trainer
    ranks: Ranks
    """The processes that train the model together."""
    recorder: record.Recorder | None
    """None in all processes but the first, which alone writes."""
    progress: ProgressLine
    clock: Stopwatch
    """Runs while the model is trained, not while it is evaluated or saved."""
    provenance: dict[str, Any]
    """Device, versions and commit, as they were when the run (or its last part) began."""
    earlier: list[Part]
    """On what the steps before those of this process were computed; see `runs/parts.py`."""
    step: int
    """Updates made so far."""
    steps: int
    """Updates of the whole run."""
    logged: tuple[int, float]
    """Step and seconds of training when the speed was last logged."""
    tested_before: int = 0
    """The step at which an earlier capsrun saved, which tested the model before that."""
    ended: bool = False
    """Whether an evaluation has ended it before its last step."""
    tested: dict[str, Score] | None = None
    """What the last evaluation found, if the model has not changed since and it was complete."""

    def close(self) -> None:
        """Leave the screen and the files as they are to be."""
        self.progress.close()
        if self.recorder is not None:
            # All that is to be kept is written by now; what cannot be was told of before.
            with contextlib.suppress(OSError):
                self.recorder.close()


def main(config: TrainConfig, overrides: Sequence[str]) -> dict[str, Any]:
    """`capsrun train`: name the run, and make what is left of it; returns its result."""
    config.name = config.name or run_name(config, overrides)
    out_dir = Path(config.runs_dir) / config.name / f"seed{config.seed}"
    return train(config, out_dir, model_words(config, out_dir))


def train(
    config: TrainConfig, out_dir: Path, model_words: Sequence[str] | None = None
) -> dict[str, Any]:
    """Train as `config` says into `out_dir` and return what `result.json` holds.

    model_words: what the other commands are told to find this model, for the line that suggests
    them; None: none is printed.
    Goes on after the last checkpoint of an interrupted run, and leaves a finished one alone. With
    several processes (`torchrun`) the first one returns the result, the others nothing.
    Raises UserError for what the user can mend, Busy while another process is at work on the run,
    OSError where the folder cannot be written any more, and Stopped, with everything saved, on
    Ctrl-C.
    """
    ranks = join_ranks(config.device != "cpu" and torch.cuda.is_available())
    folder = ranks.together(lambda: record.RunFolder(out_dir, dataclasses.asdict(config)))
    result = ranks.from_first(folder.result)
    if result is None:
        result = train_to_the_end(config, folder, ranks)
    elif ranks.first:
        folder.tidy()
        print(f"{out_dir} is finished already; choose another name=…, or delete it to train anew")
        if not (out_dir / PAGE).exists():  # it was interrupted, or is of an earlier version
            refresh_run_page(out_dir)
    ranks.leave()
    if not ranks.first:
        return {}
    if "almost_correct" in result:
        print(almost_line(result["almost_correct"], result["count"]))
    if result.get("stopped"):
        print(stopped_line(result["stopped"]))
    if model_words is not None:
        uses = uses_of_model(config.model, model_words)
        suggest(["eval", *model_words], *uses)
    print(styled(answer("test", result["errors"], result["count"]), BOLD))
    return result


def train_to_the_end(config: TrainConfig, folder: record.RunFolder, ranks: Ranks) -> dict[str, Any]:
    """Make what is left of a run; returns what `result.json` holds, in the first process only."""
    ranks.from_first(folder.refuse_if_used)
    with contextlib.ExitStack() as at_the_end:
        at_the_end.callback(folder.release)
        run = open_run(config, folder, ranks)
        at_the_end.callback(run.close)
        try:
            with stop_requests() as stop:
                training_loop(run, stop)
                result = finish(run, stop) if ranks.first else {}
        except FloatingPointError as error:
            ranks.from_first(partial(save_unfinite, run))
            raise UserError(
                f"training stopped after step {run.step:,}: {error}; that state is in "
                f"{folder.path / NOT_FINITE}, and checkpoint.pt (if any) is from before; try a "
                "lower recipe.learning_rate"
            ) from error
        except BrokenPipeError:  # of the screen
            raise
        except OSError as error:
            raise OSError(cannot_be_written(folder, error)) from error
    if ranks.first:
        print(trained_line(result))
        print(f"page: {folder.path / PAGE}")
        print(f"curves: tensorboard --logdir {folder.path}")
    return result


def cannot_be_written(folder: record.RunFolder, error: OSError) -> str:
    """What to say where the system refuses what a run writes, the disk being full, say."""
    if not folder.path.is_dir():
        return f"{folder.path} has vanished while the run went on; the same command begins it anew"
    where = f" ({error.filename})" if error.filename else ""
    kept = "the last checkpoint" if folder.checkpoint.exists() else "nothing yet"
    return (
        f"{folder.path} cannot be written any more: {error.strerror or error}{where}; saved is "
        f"{kept}, and the same command goes on from there once it can be written"
    )


def training_loop(run: Run, stop: StopRequest) -> None:
    """Make every step that is left, or those until an evaluation ends the run (`stop`).

    A checkpoint is of the state before the test that may be due at its step. Raises Stopped, having
    saved, when that is asked for, and FloatingPointError for a loss or a weight that is not finite.
    """
    config, ranks = run.config, run.ranks
    evaluate_every = evaluation_steps(run)
    saved_at = time.monotonic()
    run.clock.start()
    while run.step < run.steps and not run.ended:  # it is at once where only a result is missing
        if run.step and run.step % evaluate_every == 0 and run.step != run.tested_before:
            evaluate_or_stop(run, stop)
            if run.ended:  # nothing is saved here that would go on when it is resumed
                break
        log_at = next_multiple(run.step, config.record.log_every_steps, run.steps)
        stop_at = min(log_at, next_multiple(run.step, evaluate_every, run.steps))
        count = min(stop_at - run.step, run.trainer.steps_at_once)
        update = run.trainer.advance(run.batches, run.step, count)
        run.step += count
        run.progress.advance(count)
        if run.step == log_at:
            log_step(run, update)
        is_late = time.monotonic() - saved_at >= config.record.checkpoint_every_seconds
        asked, late = ranks.highest(stop.signal_number, int(is_late))
        if asked:
            save_and_stop(run, asked)
        if late:
            with run.clock.paused():
                ranks.from_first(partial(save, run))
            saved_at = time.monotonic()
    run.clock.pause()
    ranks.from_first(partial(save, run, finished=True))


def evaluate_or_stop(run: Run, stop: StopRequest) -> None:
    """Test the model as it is now; where a stop is asked for meanwhile, that is left for later."""
    with run.clock.paused():
        try:
            run.ended = run.ranks.from_first(partial(log_evaluation, run, stop))
        except Stopped as stopped:
            save_and_stop(run, stopped.signal_number)


def save_and_stop(run: Run, signal_number: int) -> NoReturn:
    """Save the state of a run in all its processes, and raise Stopped."""
    run.clock.pause()
    run.ranks.from_first(partial(save, run))
    at = f"step {run.step:,} of {run.steps:,}"
    raise Stopped(f"stopped after {at}, which is saved", signal_number)


def evaluation_steps(run: Run) -> int:
    """After how many steps the model of a run is tested."""
    return run.config.evaluation_steps(run.dataset.train.epoch_images)


def next_multiple(step: int, every: int, last: int) -> int:
    """The first multiple of `every` after `step`, or `last` where that comes before."""
    return min((step // every + 1) * every, last)


def open_run(config: TrainConfig, folder: record.RunFolder, ranks: Ranks) -> Run:
    """Load the data, build the model, and take both to where an interrupted run was."""
    if known(config.dataset.name).for_testing:
        raise UserError(
            f"{config.dataset.name} is for testing; train on dataset={config.dataset.trained_on}"
        )
    if config.recipe.batch_size < ranks.count:
        raise UserError(
            f"a step has {config.recipe.batch_size} images, too few for {ranks.count} processes; "
            "start fewer, or set a larger recipe.batch_size"
        )
    set_deterministic(config.deterministic)
    device = ranks.together(lambda: resolve_device(config.device))
    begin_memory_count(device)
    precision = ranks.from_first(lambda: resolve_precision(config.precision, device))
    dataset = ranks.together(lambda: load_dataset(config.dataset, device))
    steps = total_steps(config.recipe, dataset.train.epoch_images)
    batches = ranks.together(lambda: training_batches(config, dataset, steps, ranks))
    model = build_model(config.model, config.routing, config.dataset, config.seed)
    ranks.from_first(folder.make)
    checkpoint = ranks.from_first(folder.unfinished)
    if checkpoint is not None:
        precision = checkpoint["precision"]  # the run's, where this machine would choose another
        load_weights(model, checkpoint["model"], folder.checkpoint)
    trainer = make_trainer(
        model, config.loss, config.recipe, steps, device, precision, config.compile, ranks
    )
    step, seconds, ended = 0, 0.0, False
    if checkpoint is not None:
        step, seconds = checkpoint["step"], checkpoint["train_seconds"]
        if checkpoint["optimizer"] is None:  # the last step is made; only the result is missing
            ended = step < steps
        else:
            load_optimizer(trainer, checkpoint["optimizer"], folder.checkpoint)
        if trainer.averaged is not None:
            load_weights(trainer.averaged, checkpoint.get("averaged"), folder.checkpoint)
    where = f"{precision} on {describe_device(device)}"
    where += f", {ranks.count} processes" if ranks.count > 1 else ""
    print(
        f"{folder.path}: {'going on after' if step else 'from'} step {step:,} of {steps:,}, {where}"
    )
    made_with = {**provenance(device, precision), "processes": ranks.count}
    earlier = [] if checkpoint is None else parts.of_checkpoint(checkpoint)
    recorder = None
    if ranks.first:
        for change in parts.changes_now(earlier, made_with) if step < steps else []:
            errors.remark(change)
        recorder = record.Recorder(folder.path, step, checkpoint)
        if not step:
            recorder.begin(steps)
    return Run(
        config,
        folder,
        dataset,
        batches,
        trainer,
        ranks,
        recorder,
        ProgressLine(step, steps, config.recipe.batch_size, shown=ranks.first),
        Stopwatch(seconds),
        made_with,
        earlier,
        step,
        steps,
        logged=(step, seconds),
        tested_before=step if checkpoint and "event_bytes" not in checkpoint else 0,
        ended=ended,
    )


def training_batches(
    config: TrainConfig, dataset: Dataset, steps: int, ranks: Ranks
) -> TrainingBatches:
    """A process's share of the batches of a run. Raises UserError for an order they cannot have."""
    recipe = config.recipe
    share = ranks.share(recipe.batch_size)
    batches = TrainingBatches(dataset.train, config.seed, recipe.batch_size, share, recipe.order)
    if ranks.first and batches.stored is not None:
        digits, pass_steps = len(batches.stored), batches.stored.records / recipe.batch_size
        if steps < pass_steps or config.stop.asked:
            part = int(digits * steps / pass_steps)
            short = f"after {steps:,} steps these are about the first {part:,} of {digits:,} digits"
            errors.remark(
                "recipe.order=authors takes a digit's shifts one after another, and a run that "
                f"ends before step {math.ceil(pass_steps):,} has not seen all digits"
                + (f"; {short}" if part < digits else "")
            )
    return batches


def load_optimizer(trainer: Trainer, state: Any, path: Path) -> None:
    """Go on with the optimiser's state of a checkpoint. Raises UserError if it does not fit."""
    if not trainer.fits_optimizer(state):
        raise UserError(f"checkpoint {path} holds the state of another optimiser; delete it")
    trainer.load_optimizer(state)


def log_step(run: Run, update: Update) -> None:
    """Record what the last step computed. Raises FloatingPointError when its loss is not finite."""
    batch, output, losses = update
    kind, seen = kinds(run.config)
    scores_BJ = output.scores_BJ.detach()
    present_BJ = class_presence(batch.labels_BT, scores_BJ.shape[1])
    means = {
        "loss/total": losses.total,
        f"loss/{kind}": losses.classification,
        f"{seen}/true_class": scores_BJ[present_BJ].mean(),
        f"{seen}/other_classes": scores_BJ[~present_BJ].mean(),
    }
    if output.reconstructions_BTCHW is not None:
        means["loss/reconstruction"] = losses.reconstruction
    numbers = run.trainer.mean(torch.stack(list(means.values())).detach(), batch)
    values = dict(zip(means, numbers.tolist()))
    total = values["loss/total"]
    if not math.isfinite(total):
        raise FloatingPointError(f"the loss is {total}")
    if run.recorder is None:
        return
    values["learning_rate"] = learning_rate(run.config.recipe, run.step - 1, run.steps)
    if is_on_board(run):  # it takes as long as all the rest of this
        values |= routing_changes(run, batch.images_BCHW[:ROUTING_LOGGED])
    steps, seconds = run.step - run.logged[0], run.clock.seconds - run.logged[1]
    values["images_per_second"] = steps * run.config.recipe.batch_size / seconds
    run.logged = (run.step, run.clock.seconds)
    values["memory_gb"] = memory_gb(run.trainer.device)
    record_numbers(run, values)
    shown = {"loss": total}
    if output.reconstructions_BTCHW is not None:  # else it is all there is
        shown[kind] = values[f"loss/{kind}"]
    run.progress.show(shown, values["images_per_second"])


def record_numbers(run: Run, values: Mapping[str, float]) -> None:
    """Record what the last step computed."""
    assert run.recorder is not None  # only the first process records
    run.recorder.numbers(run.step, values, is_on_board(run))


def is_on_board(run: Run) -> bool:
    """Whether TensorBoard gets this step: a long run does not show each that is logged."""
    chosen = run.config.record
    return record.is_shown(run.step, chosen.log_every_steps, run.steps, chosen.tensorboard_points)


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


def log_evaluation(run: Run, stop: StopRequest) -> bool:
    """Test the model as it is now; whether what is to stop the run says so.

    Of the test images as many are used as `record.evaluate_images` says, but all where they decide
    whether the run is over. Raises Stopped when that is asked for meanwhile.
    """
    target, most = run.config.stop, run.config.record.evaluate_images
    on_test = target.accuracy_percent is not None and target.on == "test"
    scores = test_model(run, stop, None if on_test else most)
    run.tested = scores if on_test else None
    reached = reaches_target(target, scores)
    if reached:
        accuracy = 100 - scores[target.on].error_percent
        run.progress.say(f"{target.on} accuracy {accuracy:.2f} % reached after {run.step:,} steps")
    return reached or is_out_of_patience(run)


def is_out_of_patience(run: Run) -> bool:
    """Whether the last `stop.patience` evaluations brought nothing on held-out images."""
    patience = run.config.stop.patience
    return patience is not None and no_longer_improves(patience, read_metrics(run.folder.path))


def no_longer_improves(patience: int, rows: Sequence[Mapping[str, Any]]) -> bool:
    """Whether the last `patience` evaluations erred no less on held-out images than one before.

    rows: what was recorded so far.
    """
    key = "error_percent/validation"
    errors = [row[key] for row in rows if key in row]
    before, last = errors[:-patience], errors[-patience:]
    return bool(before) and min(last) >= min(before)


def reaches_target(stop: StopConfig, scores: Mapping[str, Score]) -> bool:
    """Whether there is an accuracy at which to stop, and the images that decide are so far."""
    if stop.accuracy_percent is None:
        return False
    score = scores[stop.on]
    # Counted in images, so that 99.23 % of 10,000 is 9,923 and no rounding decides.
    needed = math.ceil(stop.accuracy_percent * score.count / 100 - 1e-6)
    return score.count - score.errors >= needed


def test_model(run: Run, stop: StopRequest, most: int | None) -> dict[str, Score]:
    """Test the model as it is now; record its errors and what it reconstructs.

    most: how many of the test images are used; None: all. Raises Stopped when that is asked for,
    and has recorded nothing then.
    """
    assert run.recorder is not None  # only the first process tests
    values, scores = {}, {}
    model, averaged = run.trainer.model, run.trainer.averaged
    splits = {"test": run.dataset.test, "validation": run.dataset.validation}
    tested = [(name, model, split) for name, split in splits.items() if len(split)]
    if averaged is not None:
        tested += [(f"{name}_averaged", averaged, split) for name, _, split in tested]
    for name, tested_model, split in tested:
        scores[name] = score_split(
            tested_model,
            split,
            run.trainer.precision,
            mask="label",
            progress=lambda batches: stoppable(bar(batches, doing="testing"), stop),
            most=most if split is run.dataset.test else None,
        )
        values[f"error_percent/{name}"] = scores[name].error_percent
        if split.digits > 1:
            almost = 100 * scores[name].almost_correct / scores[name].count
            values[f"almost_correct_percent/{name}"] = almost
    run.recorder.numbers(run.step, values)
    if isinstance(model, CapsNet) and model.decoder is not None and draws_reconstructions(run):
        grid = reconstruction_grid(model, run.dataset.test, run.dataset.class_names)
        run.recorder.picture(run.step, "reconstructions", grid)
    run.recorder.flush()
    shown = ", ".join(answer(name, result.errors, result.count) for name, result in scores.items())
    run.progress.say(f"after {run.step:,} steps: {shown.replace('_', ' ')}")
    return scores


def draws_reconstructions(run: Run) -> bool:
    """Whether the evaluation after this step is one of those that draw."""
    most = run.config.record.tensorboard_pictures
    return record.is_shown(run.step, evaluation_steps(run), run.steps, most)


def save(run: Run, finished: bool = False) -> None:
    """Write the checkpoint; when finished, without the optimiser's state, twice the weights.

    Raises FloatingPointError, and keeps the last checkpoint, for a weight that is not finite.
    """
    assert run.recorder is not None  # only the first process writes; all have the same weights
    averaged = run.trainer.averaged
    weights = run.trainer.model.state_dict()
    if not all(bool(tensor.isfinite().all()) for tensor in weights.values()):
        raise FloatingPointError("a weight is not finite")
    save_checkpoint(
        run.folder.checkpoint,
        run.folder.config,
        run.step,
        model=weights,
        averaged=None if averaged is None else averaged.state_dict(),
        optimizer=None if finished else run.trainer.optimizer.state_dict(),
        precision=run.trainer.precision,
        train_seconds=run.clock.seconds,
        **run.recorder.position(),
        parts=parts.extended(run.earlier, run.step, run.provenance),
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


def finish(run: Run, stop: StopRequest) -> dict[str, Any]:
    """Test the trained model, which is saved, draw its pictures, and write `result.json` last.

    Raises Stopped when that is asked for while it is tested; all but the result is saved then.
    """
    assert run.recorder is not None  # only the first process has anything to finish
    # Where the last evaluation has stopped the run there is nothing new to find.
    scores = run.tested if run.ended and run.tested else test_model(run, stop, None)
    final = scores["test"]
    model, dataset, config = run.trainer.model, run.dataset, run.config
    computed = parts.extended(run.earlier, run.step, run.provenance)
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
        "scores": {name: counts(score) for name, score in scores.items()},
        "best_on_test": best_on_test(read_metrics(run.folder.path), run.folder.config, final.count),
        "parameters": sum(parameter.numel() for parameter in model.parameters()),
        "train_seconds": run.clock.seconds,
        "images_per_second": run.step * config.recipe.batch_size / run.clock.seconds,
        "memory_gb": memory_gb(run.trainer.device),
        **run.provenance,
        "stopped": how_it_stopped(run, scores),
        "parts": computed,
        "notes": [*errors.notices, *parts.changes(computed)],
        "config": run.folder.config,
    }
    run.recorder.flush()
    run.folder.write_result(result)
    write_run_page(run.folder.path)
    return result


def how_it_stopped(run: Run, scores: Mapping[str, Score]) -> dict[str, Any] | None:
    """What was to stop the run, whether that came, and when; None where nothing was to.

    scores: of the last step.
    """
    stop = run.config.stop
    if stop.accuracy_percent is not None:
        # What an evaluation has decided stays, should the last test differ by a rounding.
        reached = reaches_target(stop, scores) or run.ended
        what = {"accuracy_percent": stop.accuracy_percent, "on": stop.on, "reached": reached}
    elif stop.patience is not None:
        what = {"patience": stop.patience, "on": "validation", "reached": run.ended}
    else:
        return None
    return {
        **what,
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
    length = f"{stopped['steps']:,} steps ({stopped['epochs']:.2f} epochs)"
    if "patience" in stopped:
        better = f"{stopped['patience']} evaluations in a row erred no less on held-out images"
        return f"stopped after {length}: {better}" if stopped["reached"] else f"made all {length}"
    asked = f"{stopped['accuracy_percent']:g} % on the {stopped['on']} images"
    if stopped["reached"]:
        return f"stopped after {length}, which reached {asked}"
    return f"{asked} was not reached in {length}"
