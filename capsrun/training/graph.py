"""Training steps on a GPU as captured CUDA graphs: nothing is done on the host between them.

Shapes: B batch, S steps of one graph.
"""

from __future__ import annotations

import warnings
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from typing import TYPE_CHECKING, Any, NamedTuple

import torch
from torch import Tensor

from capsrun.data.splits import TrainingBatches
from capsrun.errors import notice
from capsrun.models.capsnet import CapsNet

if TYPE_CHECKING:
    from capsrun.training.step import Trainer, Update

STEPS_PER_REPLAY = 10
WARM_UPS = 3  # libraries choose their algorithms and allocate during the first calls


class Way(NamedTuple):
    """How an update may be computed on a GPU."""

    compiled: bool
    """Whether the forward and backward pass go through `torch.compile`."""
    triton: bool
    """Whether votes and routing are the Triton kernels of `models/routing_gpu.py`."""
    frequency: bool = False
    """Whether PrimaryCaps is `frequency_conv2d`; how fast that is there was not measured yet."""

    def __str__(self) -> str:
        parts = ["compiled" if self.compiled else "eager"]
        parts += ["Triton routing"] * self.triton + ["frequency domain"] * self.frequency
        return ", ".join(parts)


WAYS = (
    *(Way(True, True), Way(True, True, True), Way(True, False)),
    *(Way(False, True), Way(False, True, True), Way(False, False)),
)
# Neither is chosen by a measurement: a compiler tries kernels that add in different orders, and the
# fastest way is not always the same one. Of these the first that works here is taken.
DETERMINISTIC_WAYS = (Way(False, True), Way(False, False))


class GraphedSteps:
    """Makes a trainer's updates by replaying graphs, captured when the first is asked for."""

    def __init__(self, trainer: Trainer, rates: Tensor) -> None:
        """rates: what `adam_rate` gives for every step of the run, on the trainer's device."""
        self.failed = False
        """Whether steps cannot be captured here; then the trainer makes them one by one."""
        self.seconds: dict[Way, float] = {}
        """How long an update took in each of the ways that work here."""
        self._trainer, self._rates = trainer, rates
        self._deterministic = torch.are_deterministic_algorithms_enabled()
        # Shapes never change, so the library may try its algorithms once and keep the fastest.
        torch.backends.cudnn.benchmark = not self._deterministic
        self._captured: dict[int, CapturedSteps] = {}

    def advance(self, batches: TrainingBatches, step: int, count: int) -> Update:
        """Make `count` updates from number `step` on; returns the last one.

        What it returns is overwritten by the next call. Nothing is waited for.
        """
        if not self._captured:
            with own_stream(self._trainer.device):
                self._choose_way(batches)
        if self.failed:
            return self._trainer.advance(batches, step, count)
        while count:
            size = STEPS_PER_REPLAY if count >= STEPS_PER_REPLAY else 1
            update = self._captured[size].replay(step)
            step, count = step + size, count - size
        return update

    def _choose_way(self, batches: TrainingBatches) -> None:
        """Capture the updates in the fastest way of those that work here, as measured here.

        Where PyTorch is to be deterministic, in the first of `DETERMINISTIC_WAYS` that works.
        """
        reference = self._outcome(Way(False, False), batches)
        for way in DETERMINISTIC_WAYS if self._deterministic else WAYS:
            if self._deterministic and self.seconds:
                break
            if (way.triton or way.frequency) and not isinstance(self._trainer.model, CapsNet):
                continue  # nothing is routed, and there are no primary capsules
            if not way.compiled and any(known.compiled for known in self.seconds):
                break  # what is compiled works, and is faster
            try:
                # A way that computes something else is none, however fast it may be.
                outcome = self._outcome(way, batches)
                torch.testing.assert_close(outcome, reference, rtol=0.05, atol=1e-6)
                self.seconds[way] = CapturedSteps(self._trainer, batches, self._rates, 1).seconds()
            except Exception as error:  # whatever a compiler or a driver finds wrong
                if way.frequency:
                    continue  # never needed
                reason = (str(error).strip() or type(error).__name__).splitlines()[0]
                notice(
                    f"the training step cannot be captured {way} ({reason}), so it may be slower"
                )
        self.failed = not self.seconds
        if self.failed:
            self._use(Way(False, False))
            return
        self._use(min(self.seconds, key=lambda way: self.seconds[way]))
        if self._trainer.device.type == "cuda":  # what was tried has no part in the memory of a run
            torch.cuda.empty_cache()
            torch.cuda.reset_peak_memory_stats()
        pool = None  # one working memory for both
        for size in (1, STEPS_PER_REPLAY):
            steps = CapturedSteps(self._trainer, batches, self._rates, size, pool)
            self._captured[size], pool = steps, steps.pool

    def _outcome(self, way: Way, batches: TrainingBatches) -> Tensor:
        """The loss of a batch, and the length of the gradient of each weight, in some way."""
        self._use(way)
        losses = self._trainer.compute(batches.batch(0))[1]
        gradients = torch.autograd.grad(losses.total, list(self._trainer.model.parameters()))
        return torch.stack([losses.total.detach(), *(grad.norm() for grad in gradients)])

    def _use(self, way: Way) -> None:
        trainer = self._trainer
        trainer.model.triton, trainer.model.frequency = way.triton, way.frequency
        # One compilation, for one shape: a batch is always full.
        forward = trainer.forward
        trainer.compute = torch.compile(forward, dynamic=False) if way.compiled else forward


class CapturedSteps:
    """Some updates in a row that read all that changes from buffers on the device.

    On a CPU, where there are no graphs, they simply run: the same code, for tests.
    """

    def __init__(
        self,
        trainer: Trainer,
        batches: TrainingBatches,
        rates: Tensor,
        count: int,
        pool: Any = None,
    ) -> None:
        """Capture `count` updates; the weights and the optimiser stay as they are.

        rates: see `GraphedSteps`. pool: the memory of another graph, to be shared.
        """
        self._trainer, self._batches, self._rates = trainer, batches, rates
        self.count, self.pool = count, pool
        images = count * batches.batch_size
        device = trainer.device
        self._indices = torch.zeros(images, dtype=torch.int64, device=device)
        self._positions = torch.zeros(images, dtype=torch.int64, device=device)
        self._rates_S = torch.zeros(count, device=device)
        self._graph: torch.cuda.CUDAGraph | None = None
        self._update: Update
        if device.type == "cuda":
            self._graph = self._capture()

    def replay(self, step: int) -> Update:
        """Make the updates from number `step` on; returns the last one."""
        indices, positions = self._batches.draw(step, self.count)
        self._indices.copy_(indices)
        self._positions.copy_(positions)
        self._rates_S.copy_(self._rates[step : step + self.count])
        if self._graph is None:
            self._update = self._run()
        else:
            self._graph.replay()
        return self._update

    def _run(self) -> Update:
        size = self._batches.batch_size
        parts = zip(self._indices.split(size), self._positions.split(size), self._rates_S)
        for indices_B, positions_B, rate in parts:
            self._trainer.set_rate(rate)
            update = self._trainer.update(self._batches.assemble(indices_B, positions_B))
        return update

    def seconds(self, replays: int = 20) -> float:
        """How long one replay takes; the weights and the optimiser stay as they are."""
        assert self._graph is not None
        with unchanged(self._trainer):
            start, end = (torch.cuda.Event(enable_timing=True) for _ in range(2))
            self._graph.replay()
            start.record()
            for _ in range(replays):
                self._graph.replay()
            end.record()
            end.synchronize()
        return start.elapsed_time(end) / 1e3 / replays

    def _capture(self) -> torch.cuda.CUDAGraph:
        def run() -> None:
            self._update = self._run()

        with unchanged(self._trainer), warnings.catch_warnings():
            # Adam finds it strange that it is told of graphs, but not captured yet.
            warnings.filterwarnings("ignore", message=".*capturable")
            graph = capture(run, self.pool)
        self.pool = graph.pool()
        return graph


def capture(run: Callable[[], object], pool: Any = None) -> torch.cuda.CUDAGraph:
    """Some work of a GPU as a graph; to be called in `own_stream`. pool: see `CapturedSteps`."""
    for _ in range(WARM_UPS):
        run()
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph, pool=pool, stream=torch.cuda.current_stream()):
        run()
    return graph


@contextmanager
def own_stream(device: torch.device) -> Iterator[None]:
    """Have a GPU work on a stream that can be captured.

    Backward passes keep to the stream on which autograd first met a weight, so all of them belong
    here, those before the capture too.
    """
    if device.type != "cuda":
        yield
        return
    outer, stream = torch.cuda.current_stream(), torch.cuda.Stream()
    stream.wait_stream(outer)
    with torch.cuda.stream(stream):
        yield
    outer.wait_stream(stream)


@contextmanager
def unchanged(trainer: Trainer) -> Iterator[None]:
    """Undo what updates do to the weights and the optimiser meanwhile."""
    changed = trainer.changing_tensors()
    saved = [tensor.clone() for tensor in changed]
    try:
        yield
    finally:
        with torch.no_grad():
            for tensor, value in zip(changed, saved):
                tensor.copy_(value)
