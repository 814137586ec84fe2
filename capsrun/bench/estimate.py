"""How long the paper's experiments will take on this machine, from a few timed training steps."""

import math
import sys
from collections.abc import Iterable
from concurrent.futures import ProcessPoolExecutor
from multiprocessing import get_context
from typing import NamedTuple

import torch

from capsrun.bench.tasks import step_seconds
from capsrun.config import EvalConfig, TrainConfig
from capsrun.data import sizes
from capsrun.runs.jobs import Experiments, Job
from capsrun.runs.record import memory_gb
from capsrun.training.step import resolve_device, resolve_precision

# What a job takes beside training and testing: starting Python, reading data, drawing pictures.
START_SECONDS = 8.0
# Testing an image takes about a third of training on it: the forward pass alone.
TEST_SHARE = 1 / 3
# A whole run holds more than a few steps: all images, what it tests, what it saves.
MEMORY_SHARE = 1.5


class Cost(NamedTuple):
    """What a step or a job takes."""

    seconds: float
    """About how long, alone on this machine."""
    memory_gb: float
    """Of this machine's memory, in 10⁹ bytes, not of a GPU's."""
    may_stop_early: bool = False
    """Whether no seed has shown yet where such a run ends: the seconds are to its last step."""


def job_costs(jobs: Iterable[Job], experiments: Experiments, device: str) -> dict[Job, Cost]:
    """About what each job takes: a few steps of each network are made, in a process of its own."""
    place = resolve_device(device)
    precision = resolve_precision("auto", place)
    timed: dict[str, Cost] = {}
    found = {}
    for job in jobs:
        trained = job if job.trains else job.needs[0]
        training = experiments.training(trained.arguments[1:])
        network = repr((training.model, training.routing, training.dataset.image_px))
        if network not in timed:
            print(f"timing the network of {trained.experiment} …", file=sys.stderr)
            with ProcessPoolExecutor(1, get_context("spawn")) as process:
                timed[network] = process.submit(step_cost, training, place, precision).result()
        step, open_end = timed[network], False
        if job.trains:
            ended = job.others_ended()
            seconds = training_seconds(training, step.seconds, job.steps_made(), ended)
            open_end = ended is None and stops_early(training)
        else:
            test = experiments.tested(job.arguments)
            image_seconds = step.seconds / training.recipe.batch_size
            seconds = START_SECONDS + len(job.needs) * testing_seconds(image_seconds, test)
        found[job] = Cost(seconds, MEMORY_SHARE * step.memory_gb, open_end)
    return found


def step_cost(training: TrainConfig, device: torch.device, precision: str) -> Cost:
    """What a few steps of a run take, in a process that does nothing else."""
    seconds = step_seconds(training, device, precision)
    return Cost(seconds, memory_gb(torch.device("cpu")))


def stops_early(training: TrainConfig) -> bool:
    """Whether a run may end before its last step."""
    return training.stop.accuracy_percent is not None or training.stop.patience is not None


def training_seconds(
    training: TrainConfig, step_seconds: float, made: int, ended: float | None = None
) -> float:
    """About how long the rest of a run takes, with its tests once an epoch and in the end.

    ended: the step at which it is expected to stop; None: its last.
    """
    train, test = sizes(training.dataset)
    batch, recipe = training.recipe.batch_size, training.recipe
    steps = recipe.steps or math.ceil((recipe.epochs or 0) * train / batch)
    left = max(math.ceil(ended or steps) - made, 0)
    tests = left * batch // train
    in_training = min(test, training.record.evaluate_images) + training.dataset.validation
    tested = test + tests * in_training
    return START_SECONDS + step_seconds * (left + TEST_SHARE * tested / batch)


def testing_seconds(image_seconds: float, config: EvalConfig | None) -> float:
    """About how long it takes to test a model; None: on no more than a few images.

    image_seconds: of training.
    """
    if config is None:
        return 0.0
    count = sizes(config.dataset)[1]
    return TEST_SHARE * image_seconds * min(count, config.images or count)
