"""A training run in progress, and what its first process does beside training.

That process alone tests the model, and writes.
"""

import contextlib
import math
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch

from capsrun import errors
from capsrun.config import TrainConfig
from capsrun.data.splits import Dataset, TrainingBatches
from capsrun.disk import write_json
from capsrun.model_config import (
    CapsuleLossConfig,
    CrossEntropyConfig,
    LogLikelihoodConfig,
    LossConfig,
    MarginLossConfig,
    SpreadLossConfig,
)
from capsrun.models.capsnet import CapsNet
from capsrun.models.routing import RoutingIteration
from capsrun.report import figures, pictures
from capsrun.report.run_page import write_run_page
from capsrun.runs import segments
from capsrun.runs.checkpoint import write_checkpoint
from capsrun.runs.folder import RunFolder
from capsrun.runs.initial import Initial
from capsrun.runs.progress import ProgressLine, StopRequest, Stopwatch, bar, stoppable
from capsrun.runs.reader import best_on_test, read_metrics
from capsrun.runs.recorder import Recorder, is_shown
from capsrun.terminal import counted
from capsrun.training.device import autocast, describe_device, memory_gb, provenance
from capsrun.training.distributed import Ranks
from capsrun.training.losses import class_presence
from capsrun.training.metrics import Score, score_split
from capsrun.training.schedule import learning_rate
from capsrun.training.step import Trainer, Update
from capsrun.training.stopping import how_it_stopped, is_out_of_patience, reaches_target

NOT_FINITE = "not_finite.pt"
# What the loss of the classes is called.
KINDS: dict[type[LossConfig], str] = {
    MarginLossConfig: "margin",
    SpreadLossConfig: "spread",
    LogLikelihoodConfig: "log_likelihood",
    CrossEntropyConfig: "cross_entropy",
}
# Images of the batch for which it is logged what routing does: they are routed once more for that,
# with the weights as they are after the update.
ROUTING_LOGGED = 16


@dataclass
class Run:
    """A training run in progress, as each of the processes that make it has it."""

    config: TrainConfig
    ranks: Ranks
    dataset: Dataset
    batches: TrainingBatches
    """This process's share of what is trained on."""
    trainer: Trainer
    steps: int
    """Updates of the whole run."""
    step: int
    """Updates made so far."""
    clock: Stopwatch
    """Runs while the model is trained, not while it is tested or saved."""
    ended: bool
    """Whether a test has ended it before its last step."""
    initial: Initial

    @property
    def evaluate_every(self) -> int:
        """After how many steps the model is tested."""
        return self.config.evaluation_steps(self.dataset.train.epoch_images)


def batch_numbers(run: Run, update: Update) -> dict[str, float]:
    """What the last step computed. Raises FloatingPointError when its loss is not finite."""
    batch, output, losses = update
    kind = KINDS[type(run.config.loss)]
    seen = "capsule_length" if isinstance(run.config.loss, CapsuleLossConfig) else "softmax"
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
    values = run.trainer.mean(torch.stack(list(means.values())).detach(), batch).tolist()
    if not math.isfinite(values[0]):
        raise FloatingPointError(f"the loss is {values[0]}")
    return dict(zip(means, values))


def routing_changes(trainer: Trainer, images_BCHW: torch.Tensor) -> dict[str, float]:
    """How much each routing iteration changes the logits of some images (figure A.1)."""
    if not isinstance(trainer.model, CapsNet):
        return {}
    history: list[RoutingIteration] = []
    trainer.model.eval()  # so that no running statistics change; the next update trains again
    with torch.inference_mode(), autocast(trainer.device, trainer.precision):
        trainer.model.encode(images_BCHW, history)
    changes = [i.logit_changes_BIJ for i in history if i.logit_changes_BIJ is not None]
    return {
        f"routing_logit_change/iteration_{number}": changes_BIJ.abs().mean().item()
        for number, changes_BIJ in enumerate(changes, 1)
    }


def error_percents(scores: Mapping[str, Score]) -> dict[str, float]:
    """What `metrics.jsonl` holds of a test."""
    values = {}
    for name, score in scores.items():
        values[f"error_percent/{name}"] = score.error_percent
        if score.labels_NT.shape[1] > 1:
            almost = 100 * score.almost_correct / score.count
            values[f"almost_correct_percent/{name}"] = almost
    return values


class Writer:
    """What the first process does beside training: it alone tests the model, and writes.

    The other processes have one of which they use the progress only, which stays silent there.
    """

    def __init__(self, run: Run, folder: RunFolder, checkpoint: Mapping[str, Any] | None) -> None:
        """checkpoint: the one after which the run goes on; None: it begins."""
        self.run, self.folder = run, folder
        config, trainer, ranks = run.config, run.trainer, run.ranks
        where = f"{trainer.precision} on {describe_device(trainer.device)}"
        where += f", {ranks.count} processes" if ranks.count > 1 else ""
        begins = f"going on after step {run.step:,}" if run.step else "from step 0"
        print(f"{folder.path}: {begins} of {run.steps:,}, {where}")
        self.provenance = provenance(trainer.device, trainer.precision) | {"processes": ranks.count}
        """Device, versions and commit, as they are for the steps of this process."""
        self.earlier = checkpoint["parts"] if checkpoint else []
        """On what the steps before those were computed."""
        self.logged = run.step, run.clock.seconds
        """Step and seconds of training when the speed was last logged."""
        self.tested: dict[str, Score] | None = None
        """What the test that ended the run found, where it was of all test images."""
        self.progress = ProgressLine(run.step, run.steps, config.recipe.batch_size, ranks.first)
        if ranks.first:
            next_step = segments.extended(self.earlier[-1:], run.step + 1, self.provenance)
            for change in segments.changes(next_step) if run.step < run.steps else []:
                errors.remark(change)
            metrics_bytes = checkpoint["metrics_bytes"] if checkpoint else 0
            self.recorder = Recorder(folder.path, run.steps, run.step, metrics_bytes)
            if run.step == 0:
                self.recorder.settings(folder.config)

    def close(self) -> None:
        """Leave the screen and the files as they are to be."""
        self.progress.close()
        if self.run.ranks.first:
            # All that is to be kept is written by now; what cannot be was told of before.
            with contextlib.suppress(OSError):
                self.recorder.close()

    def log(self, update: Update, numbers: Mapping[str, float]) -> None:
        """Record what the last step computed, and how fast that is. numbers: `batch_numbers`."""
        run, record, recipe = self.run, self.run.config.record, self.run.config.recipe
        values = {**numbers, "learning_rate": learning_rate(recipe, run.step - 1, run.steps)}
        on_board = is_shown(run.step, record.log_every_steps, run.steps, record.tensorboard_points)
        if on_board:  # it takes as long as all the rest of this
            values |= routing_changes(run.trainer, update.batch.images_BCHW[:ROUTING_LOGGED])
        steps, seconds = run.step - self.logged[0], run.clock.seconds - self.logged[1]
        values["images_per_second"] = steps * recipe.batch_size / seconds
        self.logged = run.step, run.clock.seconds
        values["memory_gb"] = memory_gb(run.trainer.device)
        self.recorder.numbers(run.step, values, on_board)
        shown = {"loss": numbers["loss/total"]}
        if "loss/reconstruction" in numbers:
            kind = KINDS[type(self.run.config.loss)]
            shown[kind.replace("_", " ")] = numbers[f"loss/{kind}"]
        self.progress.show(shown, values["images_per_second"])

    def evaluate(self, stop: StopRequest) -> bool:
        """Test the model as it is now; whether what is to stop the run says so.

        Of the test images as many are used as `record.evaluate_images` says, but all where they
        decide whether the run is over. The test that ends a run is recorded by `finish`, as the
        last one of every run is, and so once, whenever the run is interrupted in between.
        Raises Stopped when that is asked for meanwhile.
        """
        run, target = self.run, self.run.config.stop
        on_test = target.accuracy_percent is not None and target.on == "test"
        scores = self.test(stop, None if on_test else run.config.record.evaluate_images)
        if reaches_target(target, scores):
            reached = f"{target.on} accuracy {100 - scores[target.on].error_percent:.2f} % reached"
            self.progress.say(f"{reached} after {counted(run.step, 'step')}")
            self.tested = scores if on_test else None
            return True
        rows = [*read_metrics(self.folder.path), error_percents(scores)]
        if is_out_of_patience(target, rows):
            return True
        self.record(scores)
        return False

    def test(self, stop: StopRequest, most: int | None) -> dict[str, Score]:
        """Test the model as it is now, and its average; by the names of the splits.

        most: how many of the test images are used; None: all. Raises Stopped when that is asked
        for.
        """
        run, model, data = self.run, self.run.trainer.model, self.run.dataset
        tested = [("test", model, data.test), ("validation", model, data.validation)]
        if run.trainer.averaged is not None:
            tested += [(f"{name}_averaged", run.trainer.averaged, s) for name, _, s in tested]
        return {
            name: score_split(
                tested_model,
                split,
                run.trainer.precision,
                mask="label",
                progress=lambda batches: stoppable(bar(batches, doing="testing"), stop),
                most=most if split is data.test else None,
            )
            for name, tested_model, split in tested
            if len(split)
        }

    def record(self, scores: Mapping[str, Score]) -> None:
        """Record what a test found, and what the model reconstructs."""
        run, model, data = self.run, self.run.trainer.model, self.run.dataset
        self.recorder.numbers(run.step, error_percents(scores))
        most_drawn = run.config.record.tensorboard_pictures
        drawn = is_shown(run.step, run.evaluate_every, run.steps, most_drawn)
        if drawn and model.decoder is not None:
            grid = pictures.reconstruction_grid(model, data.test, data.class_names)
            self.recorder.picture(run.step, "reconstructions", figures.pixels(grid))
        self.recorder.flush()
        said = [pictures.answer(name, s.errors, s.count) for name, s in scores.items()]
        self.progress.say(f"after {counted(run.step, 'step')}: {', '.join(said).replace('_', ' ')}")

    def save(self, finished: bool = False) -> None:
        """Write the checkpoint; when finished, without the optimiser's state, twice the weights.

        Raises FloatingPointError, and keeps the last checkpoint, for a weight that is not finite.
        """
        weights = self.run.trainer.model.state_dict().values()
        if not all(bool(tensor.isfinite().all()) for tensor in weights):
            raise FloatingPointError("a weight is not finite")
        self._save(self.folder.checkpoint, finished)

    def save_not_finite(self) -> None:
        """Save the state in which the numbers broke, and leave `checkpoint.pt` as it was.

        The batch is not in it: it is a function of the seed and the step.
        """
        self._save(self.folder.path / NOT_FINITE)

    def _save(self, path: Path, finished: bool = False) -> None:
        run, trainer = self.run, self.run.trainer
        self._refuse_another_folder()
        write_checkpoint(
            path,
            self.folder.config,
            run.step,
            model=trainer.model.state_dict(),
            averaged=None if trainer.averaged is None else trainer.averaged.state_dict(),
            optimizer=None if finished else trainer.optimizer.state_dict(),
            precision=trainer.precision,
            train_seconds=run.clock.seconds,
            metrics_bytes=self.recorder.metrics_bytes(),
            parts=segments.extended(self.earlier, run.step, self.provenance),
            data=run.dataset.unverified,
            init_md5=run.initial.md5,
            seen=list(run.initial.seen),
        )

    def _refuse_another_folder(self) -> None:
        """Raise OSError where the run's folder was deleted: what has its name is another run's."""
        if not self.folder.is_held():
            raise OSError("it is not the folder that this process has opened")

    def finish(self, stop: StopRequest) -> dict[str, Any]:
        """Test the trained model, which is saved, draw its pictures, and write `result.json` last.

        Raises Stopped when that is asked for while it is tested; all but the result is saved then.
        """
        run, folder, config = self.run, self.folder, self.run.config
        model, data = run.trainer.model, run.dataset
        # Where the last test has ended the run there is nothing new to find.
        scores = self.tested or self.test(stop, None)
        self.record(scores)
        final = scores["test"]
        drawn = pictures.score_figures(model, data.test, data.class_names, final)
        for name, figure in drawn.items():
            figures.save(figure, folder.pictures / f"{name}.png")
            self.recorder.picture(run.step, name, figures.pixels(figure))
        stopped = how_it_stopped(config.stop, scores, run.ended)
        if stopped is not None:
            epochs = run.step * config.recipe.batch_size / data.train.epoch_images
            stopped |= {"steps": run.step, "epochs": epochs}
        computed_on = segments.extended(self.earlier, run.step, self.provenance)
        result = {
            "command": "train",
            "name": config.name,
            "dataset": config.dataset.title,
            "model": config.model.name,
            "seed": config.seed,
            "steps": run.step,
            **pictures.score_summary(final, data.class_names),
            "scores": {name: pictures.counts(score) for name, score in scores.items()},
            "best_on_test": best_on_test(read_metrics(folder.path), folder.config, final.count),
            "parameters": sum(parameter.numel() for parameter in model.parameters()),
            "train_seconds": run.clock.seconds,
            "images_per_second": run.step * config.recipe.batch_size / run.clock.seconds,
            "memory_gb": memory_gb(run.trainer.device),
            **self.provenance,
            "data_md5": data.unverified,
            "init_md5": run.initial.md5,
            "stopped": stopped,
            "parts": computed_on,
            "notes": [*errors.notices, *segments.changes(computed_on)],
            "config": folder.config,
        }
        self.recorder.finished()
        self.recorder.flush()
        self._refuse_another_folder()
        write_json(folder.path / "result.json", result)
        write_run_page(folder.path)
        return result
