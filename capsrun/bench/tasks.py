"""What `capsrun bench` times: training steps of several kinds, routing, testing, the machine.

Shapes: B batch, I input capsules, K input dimension.
"""

import dataclasses
import time
from collections.abc import Callable
from concurrent.futures import ProcessPoolExecutor
from multiprocessing import get_context
from typing import Any

import torch

from capsrun.bench.textbook import textbook_steps
from capsrun.bench.timing import captured, wait_for
from capsrun.config import BenchConfig, DatasetConfig, TrainConfig
from capsrun.data import known
from capsrun.data.files import Part, RawData
from capsrun.data.splits import TrainingBatches, TrainingSplit
from capsrun.models import build_model
from capsrun.models.capsnet import CapsNet
from capsrun.training.device import memory_gb, resolve_device
from capsrun.training.graph import make_trainer
from capsrun.training.metrics import score_split
from capsrun.training.step import Trainer, to_device

Run = Callable[[int], None]

TRAINING_IMAGES, TEST_IMAGES = 60_000, 10_000
DIGIT_PX = 28
STEPS = 200_000  # of a run that is timed in its first half, again and again
DTYPES = {"fp32": torch.float32, "bf16": torch.bfloat16}


def variant_names(precision: str, device: torch.device) -> list[str]:
    """The kinds of training step that are compared, each with its precision."""
    precisions = ["fp32"] if precision == "fp32" else ["fp32", "bf16"]
    kinds = ("plain", "direct", "fast") if device.type == "cpu" else ("plain", "fast")
    return ["textbook fp32"] + [f"{kind} {p}" for kind in kinds for p in precisions]


def make_model(config: BenchConfig, device: torch.device, fast: bool) -> CapsNet:
    """The untrained network on the device."""
    model = build_model(config.model, config.routing, config.dataset)
    assert isinstance(model, CapsNet)  # checked when bench begins
    return to_device(model, device, fast)


def random_images(dataset: DatasetConfig, count: int) -> RawData:
    """Training images as large as the data set's, of random pixels.

    Their content does not change how long anything takes.
    """
    generator = torch.Generator().manual_seed(0)
    # What is made of other images is made of MNIST's size; else they are as large as the canvas.
    side = DIGIT_PX if known(dataset.name).read is None else dataset.image_px
    shape = (count, dataset.channels, side, side)
    images = torch.randint(0, 256, shape, dtype=torch.uint8, generator=generator)
    labels = torch.randint(0, dataset.classes, (count,), dtype=torch.uint8, generator=generator)
    names = tuple(str(number) for number in range(dataset.classes))
    return RawData(Part(images, labels), Part(images[:0], labels[:0]), names, ())


def random_split(dataset: DatasetConfig, count: int, device: torch.device) -> TrainingSplit:
    """Training images of random pixels, as the data set makes them."""
    return known(dataset.name).make(random_images(dataset, count), dataset, device).train


def batches_alone(config: BenchConfig, device: torch.device) -> Run:
    """The images and targets of a training batch, from the numbers of the images."""
    split = random_split(config.dataset, TRAINING_IMAGES, device)
    batches = TrainingBatches(split, 0, config.recipe.batch_size)
    indices, positions = batches.draw(0)
    return captured(lambda: batches.assemble(indices, positions), device)


def training_steps(config: BenchConfig, device: torch.device, name: str, capture: bool) -> Run:
    """Training steps of a variant, batches included.

    The direct variant, on CPUs, is the fast one without `models/frequency_conv.py` and what came
    with it: it convolves directly, Conv1 too, squashes with PyTorch's operations, and gives freed
    memory back; votes and routing are the fast ones.
    capture: whether a fast variant is captured on a GPU, as in training; else it is plain there.
    """
    kind, precision = name.split()
    size = config.recipe.batch_size
    if kind == "textbook":
        raw = random_images(config.dataset, TRAINING_IMAGES)
        like = make_model(config, device, False)
        return textbook_steps(like, *raw.train, config.dataset, size, device)
    split = random_split(config.dataset, TRAINING_IMAGES, device)
    model = make_model(config, torch.device("cpu"), False)
    fast = kind in ("direct", "fast") and (capture or device.type == "cpu")
    trainer = make_trainer(model, config.loss, config.recipe, STEPS, device, precision, fast)
    return Steps(trainer, TrainingBatches(split, 0, size))


class Steps:
    """A trainer's updates, from one call to the next."""

    def __init__(self, trainer: Trainer, batches: TrainingBatches) -> None:
        self.trainer, self._batches, self._made = trainer, batches, 0

    def __call__(self, count: int) -> None:
        self.trainer.advance(self._batches, self._made % (STEPS // 2), count)
        self._made += count


def step_seconds(config: TrainConfig, device: torch.device, precision: str) -> float:
    """About how long a training step of a run takes: the faster of two, or one where it is long.

    On a GPU the step is plain, as to capture it would take longer than the answer is worth; so
    training there is faster than this says.
    """
    dataset = dataclasses.replace(config.dataset, validation=0)
    batches = TrainingBatches(random_split(dataset, 1000, device), 0, config.recipe.batch_size)
    model = build_model(config.model, config.routing, config.dataset)
    fast = device.type == "cpu"
    trainer = Trainer(model, config.loss, config.recipe, STEPS, device, precision, fast)
    seconds = []
    for number in range(3):
        began = time.perf_counter()
        trainer.advance(batches, number, 1)
        if device.type == "cuda":
            torch.cuda.synchronize()
        seconds.append(time.perf_counter() - began)
        if number and seconds[-1] > 2:  # long enough to be told by one
            break
    return min(seconds[1:])


def routing_alone(
    config: BenchConfig, device: torch.device, fast: bool, triton: bool = False
) -> Run:
    """Votes and routing of a batch, forward and backward; on a GPU, when fast, compiled."""
    model = make_model(config, device, fast)
    model.triton = triton
    shape = (config.recipe.batch_size, model.primary_capsules, model.config.primary_dimensions)
    poses_BIK = (torch.rand(shape, device=device) / 10).requires_grad_()
    inputs = [poses_BIK, model.digitcaps_weight]
    inputs += [] if model.digitcaps_bias is None else [model.digitcaps_bias]
    compiled = fast and device.type == "cuda"
    route = torch.compile(model.route_poses, dynamic=False) if compiled else model.route_poses

    def once() -> None:
        capsules_BJD = route(poses_BIK)
        torch.autograd.grad(capsules_BJD, inputs, torch.ones_like(capsules_BJD))

    return captured(once, device)


def testing(config: BenchConfig, device: torch.device, precision: str, direct: bool) -> Run:
    """Classify as many images as MNIST has for testing. direct: see `CapsNet.direct`."""
    model = make_model(config, device, fast=True)
    split = random_split(config.dataset, TRAINING_IMAGES, device)

    def run(count: int) -> None:
        for _ in range(count):
            score_split(model, split, precision, most=TEST_IMAGES)

    return run


def matrix_product(device: torch.device, dtype: torch.dtype) -> tuple[Run, int]:
    """A large square matrix product, and its floating-point operations."""
    size = 8192 if device.type == "cuda" else 2048
    left, right = (torch.randn(size, size, device=device).to(dtype) for _ in range(2))
    result = torch.empty_like(left)

    def run(count: int) -> None:
        before = torch.backends.cuda.matmul.allow_tf32
        # The convolutions, which are nearly all of a step, may use TF32 on a GPU.
        torch.backends.cuda.matmul.allow_tf32 = torch.backends.cudnn.allow_tf32
        for _ in range(count):
            torch.mm(left, right, out=result)
        torch.backends.cuda.matmul.allow_tf32 = before

    return run, 2 * size**3


def large_copy(device: torch.device) -> tuple[Run, int]:
    """A large copy, and the bytes that it reads and writes."""
    source = torch.zeros(2**28 if device.type == "cuda" else 2**26, device=device)
    target = torch.empty_like(source)

    def run(count: int) -> None:
        for _ in range(count):
            target.copy_(source)

    return run, 2 * source.numel() * source.element_size()


def step_flop(model: CapsNet, batch_size: int, digits: int) -> float:
    """Floating-point operations of a training step: three times those of the forward pass.

    An addition and a multiplication count as two. Routing counts as it is defined, with each vote
    computed once. digits: how many of an image are reconstructed.
    """
    same = model.config.padding == "same"
    conv1_px = model.image_px if same else model.seen_px - model.config.kernel_px + 1
    votes = model.digitcaps_weight.numel()
    multiplications = (
        model.conv1.weight.numel() * conv1_px**2
        + model.primarycaps.weight.numel() * model.primary_capsules // model.config.primary_types
        + votes
        + (2 * model.routing.iterations - 1) * votes // model.config.primary_dimensions
    )
    if model.decoder is not None:
        decoder = sum(p.numel() for p in model.decoder.parameters() if p.dim() == 2)
        multiplications += digits * decoder
    return 3.0 * 2 * multiplications * batch_size


class OwnProcess:
    """Training steps of a variant in a process of its own.

    So the variants do not share how a process allocates memory, which changes their speed (see
    `keep_freed_memory`), and the memory of each can be told.
    """

    def __init__(self, config: BenchConfig, name: str) -> None:
        self._pool = ProcessPoolExecutor(
            1, get_context("spawn"), initializer=_begin, initargs=(config, name)
        )

    def __call__(self, count: int) -> None:
        """Make so many steps, and wait for them."""
        self._pool.submit(_advance, count).result()

    def finish(self) -> dict[str, Any]:
        """End the process; returns what was found there, as `bench.json` holds it.

        memory_gb: the most memory that it held, in 10⁹ bytes. ways_ms: see `Trainer.ways_ms`.
        """
        found = self._pool.submit(_found).result()
        self._pool.shutdown()
        return found


_here: dict[str, Any] = {}  # of an OwnProcess


def _begin(config: BenchConfig, name: str) -> None:
    _here["device"] = resolve_device(config.device)
    _here["run"] = training_steps(config, _here["device"], name, capture=True)


def _advance(count: int) -> None:
    _here["run"](count)
    wait_for(_here["device"])


def _found() -> dict[str, Any]:
    run = _here["run"]
    ways_ms = run.trainer.ways_ms if isinstance(run, Steps) else {}
    return {"memory_gb": memory_gb(_here["device"]), "ways_ms": ways_ms}
