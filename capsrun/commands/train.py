"""`capsrun train`: train a model, or go on where its run was interrupted."""

import dataclasses
import math
import shlex
import time
from collections.abc import Mapping, Sequence
from contextlib import closing
from pathlib import Path
from typing import Any

import torch

from capsrun import errors
from capsrun.commands.writer import NOT_FINITE, Run, Writer, batch_numbers
from capsrun.config import TrainConfig
from capsrun.data import load_dataset
from capsrun.data.sets import known
from capsrun.data.splits import Dataset, TrainingBatches
from capsrun.errors import Stopped, UserError
from capsrun.experiments import Experiments
from capsrun.models import build_model
from capsrun.names import command, model_words, run_name, suggest, uses_of_model
from capsrun.report import run_page
from capsrun.report.pictures import almost_line, answer
from capsrun.runs.checkpoint import load_weights
from capsrun.runs.folder import RunFolder
from capsrun.runs.initial import Initial, begin_with_weights
from capsrun.runs.progress import StopRequest, Stopwatch, stop_requests
from capsrun.terminal import BOLD, counted, duration, styled
from capsrun.training.device import (
    begin_memory_count,
    resolve_device,
    resolve_precision,
    set_deterministic,
)
from capsrun.training.distributed import Ranks, join_ranks
from capsrun.training.graph import trainer_class
from capsrun.training.schedule import total_steps
from capsrun.training.step import Trainer
from capsrun.training.stopping import stopped_line


def main(config: TrainConfig, overrides: Sequence[str]) -> dict[str, Any]:
    """`capsrun train`: name the run, make what is left of it, and say what came out."""
    say_experiment(overrides)
    config.name = config.name or run_name(config, overrides)
    out_dir = Path(config.runs_dir) / config.name / f"seed{config.seed}"
    result = train(config, out_dir)
    if "almost_correct" in result:
        print(almost_line(result["almost_correct"], result["count"]))
    if result.get("stopped"):
        print(stopped_line(result["stopped"]))
    words = model_words(config, out_dir)
    suggest(["eval", *words], *uses_of_model(config.model, words))
    print(styled(answer("test", result["errors"], result["count"]), BOLD))
    return result


def say_experiment(overrides: Sequence[str]) -> None:
    """Print what an experiment is, and what is trained where it is something else."""
    chosen = [word.partition("=")[2] for word in overrides if word.startswith("experiment=")]
    if not chosen or errors.process_rank()[0]:
        return
    about = Experiments().about(chosen[-1])
    print(f"experiment {chosen[-1]}" + (f": {about.title}" if about.title != chosen[-1] else ""))
    if about.command != "train":
        used_by = f", the model for `capsrun {about.command}`" if about.command else ""
        whole = command("reproduce", f"targets={chosen[-1]}")
        print(f"trained is {about.uses[-1]}{used_by}; all that it needs: {whole}")


def train(config: TrainConfig, out_dir: Path) -> dict[str, Any]:
    """Train as `config` says into `out_dir` and return what `result.json` holds.

    Goes on after the last checkpoint of an interrupted run, and leaves a finished one alone.
    Raises UserError for what the user can mend, Busy while another process is at work on the run,
    OSError where the folder cannot be written any more, and Stopped, with everything saved, on
    Ctrl-C.
    """
    ranks = join_ranks(config.device != "cpu" and torch.cuda.is_available())
    folder = RunFolder(out_dir, dataclasses.asdict(config))
    result = ranks.from_first(folder.result)
    if result is None:
        result = train_to_the_end(config, folder, ranks)
    elif ranks.first:
        folder.tidy()
        print(f"{out_dir} is finished already; choose another name=…, or delete it to train anew")
        if not (out_dir / run_page.NAME).exists():  # it was interrupted
            run_page.refresh_run_page(out_dir)
    ranks.leave()
    return result


def train_to_the_end(config: TrainConfig, folder: RunFolder, ranks: Ranks) -> dict[str, Any]:
    """Make what is left of a run, in all its processes; returns what `result.json` holds."""
    with closing(folder):
        run, checkpoint = open_run(config, folder, ranks)
        try:
            with closing(Writer(run, folder, checkpoint)) as writer, stop_requests() as stop:
                try:
                    training_loop(run, writer, stop)
                except FloatingPointError:
                    ranks.from_first(writer.save_not_finite)
                    raise
                result = ranks.from_first(lambda: writer.finish(stop))
        except FloatingPointError as error:
            raise UserError(
                f"training stopped after step {run.step:,}: {error}; that state is in "
                f"{folder.path / NOT_FINITE}, and checkpoint.pt (if any) is from before; try a "
                "lower recipe.learning_rate"
            ) from error
        except BrokenPipeError:  # of the screen
            raise
        except OSError as error:
            raise OSError(cannot_be_written(folder, error)) from error
    speed = f"{result['images_per_second']:,.0f} images/s"
    took = duration(result["train_seconds"])
    print(f"trained: {counted(result['steps'], 'step')} in {took} ({speed})")
    print(f"page: {folder.path / run_page.NAME}")
    print(f"curves: {shlex.join(['tensorboard', '--logdir', str(folder.path)])}")
    return result


def training_loop(run: Run, writer: Writer, stop: StopRequest) -> None:
    """Make every step that is left, or those until a test ends the run, and save what came of it.

    A checkpoint is of the state before the test that may be due at its step. Raises Stopped, having
    saved, when that is asked for, and FloatingPointError for a loss or a weight that is not finite.
    """
    record, ranks, every = run.config.record, run.ranks, run.evaluate_every
    saved_at = time.monotonic()
    try:
        with run.clock.running():
            while run.step < run.steps and not run.ended:  # not if only a result is missing
                if run.step and run.step % every == 0:
                    with run.clock.paused():
                        run.ended = ranks.from_first(lambda: writer.evaluate(stop))
                    if run.ended:
                        break
                log_at = next_multiple(run.step, record.log_every_steps, run.steps)
                stop_at = min(log_at, next_multiple(run.step, every, run.steps))
                count = min(stop_at - run.step, run.trainer.steps_at_once)
                update = run.trainer.advance(run.batches, run.step, count)
                run.step += count
                writer.progress.advance(count)
                if run.step == log_at:
                    numbers = batch_numbers(run, update)  # of the images of all processes
                    if ranks.first:
                        writer.log(update, numbers)
                is_late = time.monotonic() - saved_at >= record.checkpoint_every_seconds
                signal_number, save_now = ranks.highest(stop.signal_number, int(is_late))
                if signal_number:
                    raise Stopped("between two steps", signal_number)
                if save_now:
                    with run.clock.paused():
                        ranks.from_first(writer.save)
                    saved_at = time.monotonic()
    except Stopped as stopped:
        ranks.from_first(writer.save)
        at = f"step {run.step:,} of {run.steps:,}"
        raise Stopped(f"stopped after {at}, which is saved", stopped.signal_number) from None
    ranks.from_first(lambda: writer.save(finished=True))


def next_multiple(step: int, every: int, last: int) -> int:
    """The first multiple of `every` after `step`, or `last` where that comes before."""
    return min((step // every + 1) * every, last)


def open_run(
    config: TrainConfig, folder: RunFolder, ranks: Ranks
) -> tuple[Run, dict[str, Any] | None]:
    """Load the data, build the model, and take both to where an interrupted run was.

    Returns the run and the checkpoint after which it goes on, if it does.
    """
    if known(config.dataset.name).for_testing:
        raise UserError(
            f"{config.dataset.name} is for testing; train on dataset={config.dataset.trained_on}"
        )
    if config.recipe.batch_size < ranks.count:
        raise UserError(
            f"a step has {counted(config.recipe.batch_size, 'image')}, too few for {ranks.count} "
            "processes; start fewer, or set a larger recipe.batch_size"
        )
    set_deterministic(config.deterministic)
    device = ranks.together(lambda: resolve_device(config.device))
    begin_memory_count(device)
    dataset = ranks.together(lambda: load_dataset(config.dataset, device))
    steps = total_steps(config.recipe, dataset.train.epoch_images)
    batches = training_batches(config, dataset, steps, ranks)
    model = build_model(config.model, config.routing, config.dataset, config.seed)
    # The other processes are given the first one's weights by the trainer.
    given = model, config, dataset.unverified, folder.checkpoint
    initial = ranks.from_first(lambda: begin_with_weights(*given))
    # All have the first one's precision, should their processors differ.
    precision = ranks.from_first(lambda: resolve_precision(config.precision, device))
    checkpoint = ranks.from_first(folder.open)
    step, seconds, ended = 0, 0.0, False
    if checkpoint is not None:
        precision = checkpoint["precision"]  # the run's, where this machine would choose another
        step, seconds = checkpoint["step"], checkpoint["train_seconds"]
        ended = checkpoint["optimizer"] is None and step < steps
        initial = Initial(checkpoint.get("init_md5"), tuple(checkpoint.get("seen") or ()))
        refuse_another(checkpoint, dataset, steps, folder)
    trainer = trainer_class(device, config.compile, ranks.count)(
        model, config.loss, config.recipe, steps, device, precision, config.compile, ranks
    )
    if checkpoint is not None:
        restore(trainer, checkpoint, folder.checkpoint)
    clock = Stopwatch(seconds)
    run = Run(config, ranks, dataset, batches, trainer, steps, step, clock, ended, initial)
    return run, checkpoint


def refuse_another(
    checkpoint: Mapping[str, Any], dataset: Dataset, steps: int, folder: RunFolder
) -> None:
    """Raise UserError for a checkpoint of more steps than the run has, or of other data files."""
    if checkpoint.get("data", dataset.unverified) != dataset.unverified:
        raise UserError(
            f"{folder.path} was begun with other files of {dataset.name} than are there now; bring "
            "those back, or choose another name=…"
        )
    if (step := checkpoint["step"]) > steps:
        raise UserError(
            f"{folder.checkpoint} is of step {step:,}, but the run has {steps:,}; delete it to "
            "train from the start"
        )


def restore(trainer: Trainer, checkpoint: Mapping[str, Any], path: Path) -> None:
    """Take the weights and the optimiser to where an interrupted run was.

    Raises UserError for a checkpoint that does not fit.
    """
    load_weights(trainer.model, checkpoint["model"], path)
    if trainer.averaged is not None:
        load_weights(trainer.averaged, checkpoint.get("averaged"), path)
    if checkpoint["optimizer"] is not None:  # else the last step is made
        try:
            fits = trainer.fits_optimizer(checkpoint["optimizer"])
        except (AttributeError, TypeError):  # it is anything
            fits = False
        if not fits:
            raise UserError(f"checkpoint {path} holds the state of another optimiser; delete it")
        trainer.load_optimizer(checkpoint["optimizer"])


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


def cannot_be_written(folder: RunFolder, error: OSError) -> str:
    """What to say where the system refuses what a run writes, the disk being full, say."""
    if not folder.is_held():
        return f"{folder.path} has vanished while the run went on; the same command begins it anew"
    where = f" ({error.filename})" if error.filename else ""
    kept = "the last checkpoint" if folder.checkpoint.exists() else "nothing yet"
    return (
        f"{folder.path} cannot be written any more: {error.strerror or error}{where}; saved is "
        f"{kept}, and the same command goes on from there once it can be written"
    )
