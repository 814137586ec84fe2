"""What `capsrun bench` times: training steps of several kinds, routing, testing, the machine.

Shapes: B batch, I input capsules, K input dimension.
"""

import signal
from collections.abc import Callable
from concurrent.futures import ProcessPoolExecutor
from concurrent.futures.process import BrokenProcessPool
from multiprocessing import get_context
from typing import Any

import torch
from torch.autograd import DeviceType
from torch.profiler import ProfilerActivity
from torch.utils.flop_counter import FlopCounterMode

from capsrun.bench.textbook import textbook_steps
from capsrun.config import BenchConfig
from capsrun.data import make_dataset
from capsrun.data.files import Part, RawData
from capsrun.data.sets import known
from capsrun.data.splits import TrainingBatches, TrainingSplit
from capsrun.data_config import DatasetConfig
from capsrun.errors import UserError
from capsrun.models import build_model
from capsrun.models.capsnet import CapsNet
from capsrun.models.layers import take
from capsrun.training.device import memory_gb, resolve_device
from capsrun.training.graph import capture, own_stream, trainer_class
from capsrun.training.metrics import score_split
from capsrun.training.step import Trainer, to_device

Run = Callable[[int], None]

TRAINING_IMAGES, TEST_IMAGES = 60_000, 10_000
DIGIT_PX = 28
STEPS = 200_000  # of a run that is timed in its first half, again and again
DTYPES = {"fp32": torch.float32, "bf16": torch.bfloat16}
PROFILED_STEPS = 3


def precisions(precision: str) -> list[str]:
    """Those that are timed: fp32, and the one in which training computes here."""
    return list(dict.fromkeys(("fp32", precision)))


def variant_names(precision: str) -> list[str]:
    """The kinds of training step that are compared, each with its precision."""
    kinds = [f"{kind} {p}" for kind in ("plain", "fast") for p in precisions(precision)]
    return ["textbook fp32", *kinds]


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
    return RawData(Part(images, labels), Part(images[:0], labels[:0]), ())


def random_split(dataset: DatasetConfig, count: int, device: torch.device) -> TrainingSplit:
    """Training images of random pixels, as the data set makes them."""
    return make_dataset(random_images(dataset, count), dataset, device).train


def batches_alone(config: BenchConfig, device: torch.device) -> Run:
    """The images and targets of a training batch, from the numbers of the images."""
    split = random_split(config.dataset, TRAINING_IMAGES, device)
    batches = TrainingBatches(split, 0, config.recipe.batch_size)
    indices, positions = batches.draw(0)
    return repeated(lambda: batches.assemble(indices, positions), device)


def repeated(once: Callable[[], Any], device: torch.device) -> Run:
    """Repeat some work; on a GPU as a captured graph, so that the host's time does not count."""
    repeat: Callable[[], Any] = once
    if device.type == "cuda":
        with own_stream(device):
            repeat = capture(once).replay

    def run(count: int) -> None:
        for _ in range(count):
            repeat()

    return run


def training_steps(
    config: BenchConfig, device: torch.device, name: str
) -> tuple[Run, Trainer | None]:
    """Training steps of a variant, batches included, and what makes them; the textbook has none."""
    kind, precision = name.split()
    size = config.recipe.batch_size
    model = make_model(config, torch.device("cpu"), fast=False)
    if kind == "textbook":
        raw = random_images(config.dataset, TRAINING_IMAGES)
        return textbook_steps(model, *raw.train, config.dataset, size, device), None
    fast = kind == "fast"
    kind_of_trainer = trainer_class(device, fast, 1)
    trainer = kind_of_trainer(model, config.loss, config.recipe, STEPS, device, precision, fast)
    batches = TrainingBatches(random_split(config.dataset, TRAINING_IMAGES, device), 0, size)
    made = 0

    def run(count: int) -> None:
        nonlocal made
        trainer.advance(batches, made % (STEPS // 2), count)
        made += count

    return run, trainer


def routing_alone(
    config: BenchConfig, device: torch.device, fast: bool, triton: bool = False
) -> Run:
    """Votes and routing of a batch, forward and backward; on a GPU, when fast, compiled."""
    model = make_model(config, device, fast)
    take(model, triton=triton)
    shape = (config.recipe.batch_size, model.primary_capsules, model.digitcaps.input_dim)
    poses_BIK = (torch.rand(shape, device=device) / 10).requires_grad_()
    inputs = [poses_BIK, *model.digitcaps.parameters()]
    compiled = fast and device.type == "cuda"
    route = torch.compile(model.digitcaps, dynamic=False) if compiled else model.digitcaps

    def once() -> None:
        capsules_BJD = route(poses_BIK)
        torch.autograd.grad(capsules_BJD, inputs, torch.ones_like(capsules_BJD))

    return repeated(once, device)


def testing(config: BenchConfig, device: torch.device, precision: str) -> Run:
    """Classify as many images as MNIST has for testing."""
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
    before = torch.backends.cuda.matmul.allow_tf32
    # The convolutions, which are nearly all of a step, may use TF32 on a GPU.
    torch.backends.cuda.matmul.allow_tf32 = torch.backends.cudnn.allow_tf32
    run = repeated(lambda: torch.mm(left, right, out=result), device)
    torch.backends.cuda.matmul.allow_tf32 = before
    return run, 2 * size**3


def large_copy(device: torch.device) -> tuple[Run, int]:
    """A large copy, and the bytes that it reads and writes."""
    source = torch.zeros(2**28 if device.type == "cuda" else 2**26, device=device)
    target = torch.empty_like(source)
    return repeated(lambda: target.copy_(source), device), 2 * source.nbytes


def step_flop(config: BenchConfig) -> int:
    """Floating-point operations of a training step: three times those of the forward pass.

    An addition and a multiplication count as two. They are those of the plain network, as a direct
    convolution has them; sums outside of matrix products and convolutions are left out.
    """
    dataset = config.dataset
    images_BCHW = torch.rand(1, dataset.channels, dataset.image_px, dataset.image_px)
    labels_BT = torch.arange(dataset.digits)[None]
    model = make_model(config, torch.device("cpu"), fast=False)
    with torch.no_grad(), FlopCounterMode(display=False) as counter:
        model(images_BCHW, labels_BT)
    return 3 * config.recipe.batch_size * counter.get_total_flops()


def operations_ms(run: Run, device: torch.device) -> dict[str, float]:
    """Milliseconds of each operation of a training step, without those that it calls.

    run: not one that replays a graph, whose kernels belong to no operation. On a GPU its own time
    is counted, not that of the host.
    """
    on_gpu = device.type == "cuda"
    run(2)
    activities = [ProfilerActivity.CPU] + [ProfilerActivity.CUDA] * on_gpu
    with torch.profiler.profile(activities=activities) as recorded:
        run(PROFILED_STEPS)
        wait_for(device)
    key = "self_device_time_total" if on_gpu else "self_cpu_time_total"
    found = {
        event.key: getattr(event, key) / 1e3 / PROFILED_STEPS
        for event in recorded.key_averages()
        if event.device_type == DeviceType.CPU  # a kernel's time is that of what launched it
    }
    return dict(sorted(found.items(), key=lambda item: -item[1]))


def wait_for(device: torch.device) -> None:
    """Wait until a GPU has done what it was told to do."""
    if device.type == "cuda":
        torch.cuda.synchronize(device)


def own_process() -> ProcessPoolExecutor:
    """A process to compute in, which Ctrl-C ends without a word."""
    silently = signal.SIGINT, signal.SIG_DFL
    return ProcessPoolExecutor(1, get_context("spawn"), signal.signal, silently)


class OwnProcess:
    """Training steps of a variant in a process of its own.

    So the variants do not share how a process allocates memory, which changes their speed (see
    `keep_freed_memory`), and the memory of each can be told.
    """

    def __init__(self, config: BenchConfig, name: str) -> None:
        self._variant = config, name
        self._pool = own_process()
        self.found: dict[str, Any] = {}
        """See `steps_here`, in that process."""

    def __call__(self, count: int) -> None:
        """Make so many steps, and wait for them. Raises UserError where its process was killed."""
        try:
            self.found = self._pool.submit(steps_here, *self._variant, count).result()
        except BrokenProcessPool:
            raise UserError(
                f"the process of {self._variant[1]} was ended from outside, as happens where "
                "memory is short; take a smaller recipe.batch_size"
            ) from None


_here: dict[str, Any] = {}  # what was built in this process, if it is that of a variant


def steps_here(config: BenchConfig, name: str, count: int) -> dict[str, Any]:
    """Make training steps of the one variant of this process.

    Returns what `bench.json` holds of it. memory_gb: the most memory held so far, in 10⁹ bytes.
    ways_ms: see `Trainer.ways_ms`.
    """
    device = resolve_device(config.device)
    if not _here:
        _here["run"], _here["trainer"] = training_steps(config, device, name)
    _here["run"](count)
    wait_for(device)
    ways_ms = _here["trainer"].ways_ms if _here["trainer"] else {}
    return {"memory_gb": memory_gb(device), "ways_ms": ways_ms}
