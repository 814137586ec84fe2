"""What `capsrun bench` times: training steps of several kinds, routing, testing, the machine.

Shapes: B batch, I input capsules, K input dimension.
"""

from collections.abc import Callable
from concurrent.futures import ProcessPoolExecutor
from multiprocessing import get_context

import torch

from capsrun.bench.textbook import textbook_steps
from capsrun.bench.timing import captured
from capsrun.config import BenchConfig
from capsrun.data import Split
from capsrun.data.batches import TrainingBatches
from capsrun.models import build_model
from capsrun.models.capsnet import CapsNet
from capsrun.runs.record import memory_gb
from capsrun.training.metrics import score_split
from capsrun.training.step import Trainer, resolve_device, to_device

Run = Callable[[int], None]

TRAINING_IMAGES, TEST_IMAGES = 60_000, 10_000
STEPS = 200_000  # of a run that is timed in its first half, again and again
DTYPES = {"fp32": torch.float32, "bf16": torch.bfloat16}


def variant_names(precision: str) -> list[str]:
    """The kinds of training step that are compared, each with its precision."""
    precisions = ["fp32"] if precision == "fp32" else ["fp32", "bf16"]
    return ["textbook fp32"] + [f"{kind} {p}" for kind in ("plain", "fast") for p in precisions]


def make_model(config: BenchConfig, device: torch.device, fast: bool) -> CapsNet:
    """The untrained network on the device."""
    return to_device(build_model(config.model, config.routing, config.dataset), device, fast)


def random_split(config: BenchConfig, count: int, device: torch.device) -> Split:
    """Images of the data set's shape; their content does not change how long anything takes."""
    dataset, generator = config.dataset, torch.Generator().manual_seed(0)
    shape = (count, dataset.channels, dataset.image_px, dataset.image_px)
    images = torch.randint(0, 256, shape, dtype=torch.uint8, generator=generator)
    labels = torch.randint(0, dataset.classes, (count,), generator=generator)
    return Split(images.to(device), labels.to(device))


def training_steps(config: BenchConfig, device: torch.device, name: str, capture: bool) -> Run:
    """Training steps of a variant, batches included.

    capture: whether a fast variant is captured on a GPU, as in training; else it is plain there.
    """
    kind, precision = name.split()
    split = random_split(config, TRAINING_IMAGES, device)
    size, shift_px = config.recipe.batch_size, config.dataset.shift_px
    if kind == "textbook":
        return textbook_steps(make_model(config, device, False), split, size, shift_px, device)
    model = build_model(config.model, config.routing, config.dataset)
    fast = kind == "fast" and (capture or device.type == "cpu")
    trainer = Trainer(model, config.loss, config.recipe, STEPS, device, precision, fast)
    batches = TrainingBatches(split.images_NCHW, split.labels_N, 0, size, shift_px)
    made = 0

    def advance(count: int) -> None:
        nonlocal made
        trainer.advance(batches, made % (STEPS // 2), count)
        made += count

    return advance


def routing_alone(
    config: BenchConfig, device: torch.device, fast: bool, triton: bool = False
) -> Run:
    """Votes and routing of a batch, forward and backward; on a GPU, when fast, compiled."""
    model = make_model(config, device, fast)
    model.triton = triton
    shape = (config.recipe.batch_size, model.primary_capsules, config.model.primary_dimensions)
    poses_BIK = (torch.rand(shape, device=device) / 10).requires_grad_()
    inputs = [poses_BIK, model.digitcaps_weight]
    inputs += [] if model.digitcaps_bias is None else [model.digitcaps_bias]
    compiled = fast and device.type == "cuda"
    route = torch.compile(model.route_poses, dynamic=False) if compiled else model.route_poses

    def once() -> None:
        capsules_BJD = route(poses_BIK)
        torch.autograd.grad(capsules_BJD, inputs, torch.ones_like(capsules_BJD))

    return captured(once, device)


def testing(config: BenchConfig, device: torch.device, precision: str) -> Run:
    """Classify as many images as MNIST has for testing."""
    model = make_model(config, device, fast=True)
    split = random_split(config, TEST_IMAGES, device)

    def run(count: int) -> None:
        for _ in range(count):
            score_split(model, split, precision)

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


def step_flop(model: CapsNet, batch_size: int) -> float:
    """Floating-point operations of a training step: three times those of the forward pass.

    An addition and a multiplication count as two. Routing counts as it is defined, with each vote
    computed once.
    """
    conv1_px = model.seen_px - model.config.kernel_px + 1
    votes = model.digitcaps_weight.numel()
    multiplications = (
        model.conv1.weight.numel() * conv1_px**2
        + model.primarycaps.weight.numel() * model.primary_capsules // model.config.primary_types
        + votes
        + (2 * model.routing.iterations - 1) * votes // model.config.primary_dimensions
    )
    if model.decoder is not None:
        multiplications += sum(p.numel() for p in model.decoder.parameters() if p.dim() == 2)
    return 3.0 * 2 * multiplications * batch_size


def memory_alone(config: BenchConfig, name: str) -> float:
    """Most memory that training with a variant holds, in 10⁹ bytes, in a process of its own."""
    with ProcessPoolExecutor(1, get_context("spawn")) as pool:
        return pool.submit(_memory_of_steps, config, name).result()


def _memory_of_steps(config: BenchConfig, name: str) -> float:
    device = resolve_device(config.device)
    training_steps(config, device, name, capture=True)(3)
    return memory_gb(device)
