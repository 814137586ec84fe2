"""How long the paper's experiments will take on this machine.

From finished runs of the same networks here, and of others from a few timed training steps.
"""

import dataclasses
import sys
import time
from collections.abc import Iterable, Mapping, Sequence
from concurrent.futures.process import BrokenProcessPool
from typing import Any

import torch

from capsrun.bench.tasks import STEPS, own_process, random_split, wait_for
from capsrun.config import TrainConfig
from capsrun.data import sizes
from capsrun.data.splits import TrainingBatches
from capsrun.errors import UserError
from capsrun.experiments import Experiments
from capsrun.models import build_model
from capsrun.runs.jobs import Cost, Job, threads_each
from capsrun.runs.reader import Result, find_results
from capsrun.training.device import (
    describe_device,
    memory_gb,
    resolve_device,
    resolve_precision,
)
from capsrun.training.schedule import total_steps
from capsrun.training.step import Trainer

# What a job takes beside training and testing: starting Python, reading data, drawing pictures.
START_SECONDS = 8.0
# Testing an image takes about a third of training on it: the forward pass alone.
TEST_SHARE = 1 / 3
# A whole run holds more than a few steps: all images, what it tests, what it saves.
MEMORY_SHARE = 1.5
# Shorter training says little about a longer one: to build and to warm up takes its part.
FEWEST_SECONDS = 30.0
# What of the images decides how long a step takes.
IMAGES = ("image_px", "channels", "classes", "digits")


def job_costs(
    jobs: Sequence[Job], experiments: Experiments, device: str, parallel: int = 1
) -> dict[Job, Cost]:
    """About what each job takes: as finished runs of its network did on this device.

    Where there is none, a few steps of the network are made, in a process of its own.
    parallel: how many share the cores or, each so much slower, the GPU.
    Raises UserError where such a process does not come to its end.
    """
    place = resolve_device(device)
    if parallel > 1:
        torch.set_num_threads(threads_each(parallel))  # as each of them will have
    finished = find_results({job.folder.parents[2] for job in jobs})
    known: dict[str, tuple[float, float]] = {}
    found = {}
    for job in jobs:
        trained = job if job.trains else job.needs[0]
        training = experiments.training(trained.arguments[1:])
        network = repr(network_of(dataclasses.asdict(training)))
        if network not in known:
            run = latest_run(training, place, finished)
            # Of a GPU a result says how much of its memory was held, not of the machine's.
            if run is None or (place.type == "cuda" and parallel > 1):
                print(f"timing the network of {trained.name} …", file=sys.stderr)
                seconds, gb = timed_apart(training, place, threads_each(parallel))
                known[network] = seconds, MEMORY_SHARE * gb
            else:
                print(f"the network of {trained.name}: as fast as {run.folder}", file=sys.stderr)
                seconds = training.recipe.batch_size / run.values["images_per_second"]
                known[network] = seconds, run.values["memory_gb"]
        seconds, gb = known[network]
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
        found[job] = Cost(seconds, gb, may_stop_early)
    return found


def network_of(training: Mapping[str, Any]) -> dict[str, Any]:
    """The settings of a run that decide how long a step takes."""
    images = {key: training["dataset"][key] for key in IMAGES}
    parts = {key: training[key] for key in ("model", "routing", "compile")}
    return {**parts, **images, "batch_size": training["recipe"]["batch_size"]}


def latest_run(
    training: TrainConfig, device: torch.device, finished: Iterable[Result]
) -> Result | None:
    """The last run of a network on this device that was long enough to tell how fast it is."""
    wanted = {
        "command": "train",
        "device": describe_device(device),
        "precision": resolve_precision(training.precision, device),
        "processes": 1,
    }
    network = network_of(dataclasses.asdict(training))
    alike = [
        result
        for result in finished
        if {key: result.values.get(key) for key in wanted} == wanted
        and {"images_per_second", "memory_gb"} <= result.values.keys()
        and result.values["train_seconds"] >= FEWEST_SECONDS
        and network_of(result.training) == network
    ]
    return max(alike, key=lambda result: result.written, default=None)


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
