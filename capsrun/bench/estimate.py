"""How long the paper's experiments will take on this machine, from a few timed training steps."""

import math
import sys
from collections.abc import Iterable
from concurrent.futures import ProcessPoolExecutor
from concurrent.futures.process import BrokenProcessPool
from multiprocessing import get_context
from typing import NamedTuple

import torch

from capsrun.bench.tasks import step_seconds
from capsrun.config import EvalConfig, TrainConfig
from capsrun.data import sizes
from capsrun.errors import UserError
from capsrun.experiments import Experiments
from capsrun.runs.jobs import Job, threads_each
from capsrun.training.device import memory_gb, resolve_device, resolve_precision

# What a job takes beside training and testing: starting Python, reading data, drawing pictures.
START_SECONDS = 8.0
# Testing an image takes about a third of training on it: the forward pass alone.
TEST_SHARE = 1 / 3
# A whole run holds more than a few steps: all images, what it tests, what it saves.
MEMORY_SHARE = 1.5


class Cost(NamedTuple):
    """What a step or a job takes."""

    seconds: float
    """About how long, with its share of the cores."""
    memory_gb: float
    """Of this machine's memory, in 10⁹ bytes, not of a GPU's."""
    may_stop_early: bool = False
    """Whether no seed has shown yet where such a run ends: the seconds are to its last step."""


def job_costs(
    jobs: Iterable[Job], experiments: Experiments, device: str, parallel: int = 1
) -> dict[Job, Cost]:
    """About what each job takes: a few steps of each network are made, in a process of its own.

    parallel: how many share the cores or, each so much slower, the GPU.
    Raises UserError where such a process does not come to its end.
    """
    place = resolve_device(device)
    threads = threads_each(parallel)
    slower = parallel if place.type == "cuda" else 1
    timed: dict[str, Cost] = {}
    found = {}
    for job in jobs:
        trained = job if job.trains else job.needs[0]
        training = experiments.training(trained.arguments[1:])
        network = repr((training.model, training.routing, training.dataset.image_px))
        if network not in timed:
            print(f"timing the network of {trained.experiment} …", file=sys.stderr)
            timed[network] = timed_apart(training, place, threads)
        step, may_stop_early = timed[network], False
        each = slower * step.seconds
        if job.trains:
            made, ended = job.steps_made(), job.others_ended()
            ended = None if ended is None or ended <= made else ended
            seconds = training_seconds(training, each, made, ended)
            may_stop_early = ended is None and training.stop.asked
        else:
            test = experiments.tested(job.arguments)
            testing = testing_seconds(each / training.recipe.batch_size, test)
            seconds = START_SECONDS + len(job.needs) * testing
        found[job] = Cost(seconds, MEMORY_SHARE * step.memory_gb, may_stop_early)
    return found


def timed_apart(training: TrainConfig, device: torch.device, threads: int) -> Cost:
    """What a step takes in a process of its own, whose memory is that of this network alone."""
    try:
        with ProcessPoolExecutor(1, get_context("spawn")) as process:
            return process.submit(step_cost, training, device, threads).result()
    except BrokenProcessPool:
        raise UserError(
            f"the process in which a step of {training.model.name} was timed was ended from "
            "outside, as happens where memory is short; timing=false goes without"
        ) from None


def step_cost(training: TrainConfig, device: torch.device, threads: int) -> Cost:
    """What a few steps of a run take, in a process that does nothing else."""
    torch.set_num_threads(threads)
    seconds = step_seconds(training, device, resolve_precision("auto", device))
    return Cost(seconds, memory_gb(torch.device("cpu")))


def training_seconds(
    training: TrainConfig, step_seconds: float, made: int, ended: float | None = None
) -> float:
    """About how long the rest of a run takes, with its tests on the way and in the end.

    ended: the step at which it is expected to stop; None: its last.
    """
    train, test = sizes(training.dataset)
    batch, recipe = training.recipe.batch_size, training.recipe
    steps = recipe.steps or math.ceil((recipe.epochs or 0) * train / batch)
    left = max(math.ceil(ended or steps) - made, 0)
    every = training.evaluation_steps(train)
    in_training = min(test, training.record.evaluate_images) + training.dataset.validation
    tested = (test + left // every * in_training) * (1 if recipe.average is None else 2)
    return START_SECONDS + step_seconds * (left + TEST_SHARE * tested / batch)


def testing_seconds(image_seconds: float, config: EvalConfig | None) -> float:
    """About how long it takes to test a model; None: on no more than a few images.

    image_seconds: of training.
    """
    if config is None:
        return 0.0
    count = sizes(config.dataset)[1]
    return TEST_SHARE * image_seconds * min(count, config.images or count)
