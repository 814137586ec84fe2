"""How long the paper's experiments will take on this machine, from a few timed training steps."""

import dataclasses
import sys
import time
from collections.abc import Iterable
from concurrent.futures.process import BrokenProcessPool

import torch

from capsrun.bench.tasks import STEPS, own_process, random_split, wait_for
from capsrun.config import TrainConfig
from capsrun.data import sizes
from capsrun.data.splits import TrainingBatches
from capsrun.errors import UserError
from capsrun.experiments import Experiments
from capsrun.models import build_model
from capsrun.runs.jobs import Cost, Job, threads_each
from capsrun.training.device import memory_gb, resolve_device, resolve_precision
from capsrun.training.schedule import total_steps
from capsrun.training.step import Trainer

# What a job takes beside training and testing: starting Python, reading data, drawing pictures.
START_SECONDS = 8.0
# Testing an image takes about a third of training on it: the forward pass alone.
TEST_SHARE = 1 / 3
# A whole run holds more than a few steps: all images, what it tests, what it saves.
MEMORY_SHARE = 1.5


def job_costs(
    jobs: Iterable[Job], experiments: Experiments, device: str, parallel: int = 1
) -> dict[Job, Cost]:
    """About what each job takes: a few steps of each network are made, in a process of its own.

    parallel: how many share the cores or, each so much slower, the GPU.
    Raises UserError where such a process does not come to its end.
    """
    place = resolve_device(device)
    timed: dict[str, tuple[float, float]] = {}
    found = {}
    for job in jobs:
        trained = job if job.trains else job.needs[0]
        training = experiments.training(trained.arguments[1:])
        network = repr((training.model, training.routing, training.dataset.image_px))
        if network not in timed:
            print(f"timing the network of {trained.name} …", file=sys.stderr)
            timed[network] = timed_apart(training, place, threads_each(parallel))
        seconds, step_gb = timed[network]
        seconds *= parallel if place.type == "cuda" else 1
        may_stop_early = False
        if job.trains:
            made, ended = job.steps_made(), job.others_ended()
            if ended is not None and ended <= made:  # this one went on further
                ended = None
            may_stop_early = training.stop.asked and ended is None
            seconds = training_seconds(training, seconds, made, ended)
        else:
            test = experiments.tested(job.arguments)
            images = 0 if test is None else sizes(test.dataset)[1]
            images = min(images, (test and test.images) or images) * len(job.needs)
            seconds = START_SECONDS + seconds * TEST_SHARE * images / training.recipe.batch_size
        found[job] = Cost(seconds, MEMORY_SHARE * step_gb, may_stop_early)
    return found


def timed_apart(training: TrainConfig, device: torch.device, threads: int) -> tuple[float, float]:
    """What a step takes in a process of its own, whose memory is that of this network alone."""
    try:
        with own_process() as process:
            return process.submit(step_cost, training, device, threads).result()
    except BrokenProcessPool:
        raise UserError(
            f"the process in which a step of {training.model.name} was timed was ended from "
            "outside, as happens where memory is short; timing=false goes without"
        ) from None


def step_cost(config: TrainConfig, device: torch.device, threads: int) -> tuple[float, float]:
    """Seconds of a training step, the faster of two, or one where it is long; and 10⁹ bytes.

    On a GPU the step is plain, as to capture it would take longer than the answer is worth; so
    training there is faster than this says.
    """
    torch.set_num_threads(threads)
    dataset = dataclasses.replace(config.dataset, validation=0)
    batches = TrainingBatches(random_split(dataset, 1000, device), 0, config.recipe.batch_size)
    model = build_model(config.model, config.routing, config.dataset)
    precision, fast = resolve_precision("auto", device), device.type == "cpu"
    trainer = Trainer(model, config.loss, config.recipe, STEPS, device, precision, fast)
    seconds: list[float] = []
    for number in range(3):
        began = time.perf_counter()
        trainer.advance(batches, number, 1)
        wait_for(device)
        seconds.append(time.perf_counter() - began)
        if number and seconds[-1] > 2:  # long enough to be told by one
            break
    return min(seconds[1:]), memory_gb(torch.device("cpu"))


def training_seconds(
    training: TrainConfig, step_seconds: float, made: int, ended: float | None = None
) -> float:
    """About how long the rest of a run takes, with its tests on the way and in the end.

    ended: the step at which it is expected to stop; None: its last.
    """
    (train, test), recipe = sizes(training.dataset), training.recipe
    left = max((ended or total_steps(recipe, train)) - made, 0)
    on_the_way = min(test, training.record.evaluate_images) + training.dataset.validation
    tested = test + left // training.evaluation_steps(train) * on_the_way
    tested *= 1 if recipe.average is None else 2
    return START_SECONDS + step_seconds * (left + TEST_SHARE * tested / recipe.batch_size)
