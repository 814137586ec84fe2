"""Training steps on a GPU as captured CUDA graphs: nothing is done on the host between them.

Shapes: B batch, S steps of one graph.
"""

import warnings
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from typing import Any, NamedTuple

import torch
from torch import Tensor

from capsrun.data.splits import TrainingBatches
from capsrun.errors import notice
from capsrun.models.capsnet import CapsNet
from capsrun.models.layers import take
from capsrun.training.device import begin_memory_count
from capsrun.training.schedule import adam_rate
from capsrun.training.step import Trainer, Update

STEPS_PER_REPLAY, TIMED_REPLAYS = 10, 20
WARM_UPS = 3  # libraries choose their algorithms and allocate during the first calls


class Way(NamedTuple):
    """How an update may be computed on a GPU."""

    compiled: bool
    """Whether the forward and backward pass go through `torch.compile`."""
    triton: bool = False
    """Whether votes and routing are Triton kernels."""
    frequency: bool = False
    """Whether PrimaryCaps is `frequency_conv2d`; how fast that is there was not measured yet."""

    def __str__(self) -> str:
        parts = ["compiled" if self.compiled else "eager"]
        parts += ["Triton routing"] * self.triton + ["frequency domain"] * self.frequency
        return ", ".join(parts)


PLAIN = Way(compiled=False)
WAYS = (
    *(Way(True, True), Way(True, True, True), Way(True)),
    *(Way(False, True), Way(False, True, True), PLAIN),
)
# Neither is chosen by a measurement: a compiler tries kernels that add in different orders, and the
# fastest way is not always the same one. Of these the first that works here is taken.
DETERMINISTIC_WAYS = (Way(False, True), PLAIN)


def trainer_class(device: torch.device, fast: bool, processes: int) -> type[Trainer]:
    """Who makes the steps: when fast, one process on a GPU replays graphs."""
    return GraphedTrainer if fast and device.type == "cuda" and processes == 1 else Trainer


class GraphedTrainer(Trainer):
    """A trainer that replays its updates as CUDA graphs, captured when the first is due.

    Where none can be captured it makes them one by one.
    """

    def __init__(self, *arguments: Any) -> None:
        """arguments: those of `Trainer`."""
        super().__init__(*arguments)
        self.steps_at_once = STEPS_PER_REPLAY
        self.optimizer.param_groups[0]["capturable"] = True
        rates = [adam_rate(self.recipe, step, self.steps) for step in range(self.steps)]
        self.rates = torch.tensor(rates, device=self.device)
        """What `adam_rate` gives for every step of the run."""
        self._captured: dict[int, CapturedSteps] | None = None
        self._deterministic = torch.are_deterministic_algorithms_enabled()
        # Shapes never change, so the library may try its algorithms once and keep the fastest.
        torch.backends.cudnn.benchmark = not self._deterministic

    def advance(self, batches: TrainingBatches, step: int, count: int) -> Update:
        """Make `count` updates from number `step` on; returns the last one.

        What it returns is overwritten by the next call. Nothing is waited for.
        """
        if self._captured is None:
            with own_stream(self.device):
                self._captured = self._capture(batches)
        if not self._captured:
            return super().advance(batches, step, count)
        while count:
            size = STEPS_PER_REPLAY if count >= STEPS_PER_REPLAY else 1
            update = self._captured[size].replay(step)
            step, count = step + size, count - size
        return update

    def _capture(self, batches: TrainingBatches) -> dict[int, "CapturedSteps"]:
        """Graphs of one update and of several, by their number; none where none can be captured."""
        way = self._choose_way(batches)
        self._use(way or PLAIN)
        if way is None:
            self.steps_at_once = 1
            return {}
        begin_memory_count(self.device)  # what was tried has no part in the memory of a run
        single = CapturedSteps(self, batches, 1)
        several = CapturedSteps(self, batches, STEPS_PER_REPLAY, single.pool)
        return {1: single, STEPS_PER_REPLAY: several}

    def _choose_way(self, batches: TrainingBatches) -> Way | None:
        """The fastest way of those that work here, as measured here, or None.

        Where PyTorch is to be deterministic, the first of `DETERMINISTIC_WAYS` that works.
        """
        torch.compiler.reset()  # it compiles a function so many times only, over all runs
        reference = self._outcome(PLAIN, batches)
        seconds: dict[Way, float] = {}
        for way in DETERMINISTIC_WAYS if self._deterministic else WAYS:
            if self._deterministic and seconds:
                break
            if (way.triton or way.frequency) and type(self.model) is not CapsNet:
                continue  # other networks have no layers that compute in these ways
            if not way.compiled and any(known.compiled for known in seconds):
                break  # what is compiled works, and is faster
            try:
                # A way that computes something else is none, however fast it may be.
                outcome = self._outcome(way, batches)
                torch.testing.assert_close(outcome, reference, rtol=0.05, atol=1e-6)
                seconds[way] = CapturedSteps(self, batches, 1).seconds()
            except Exception as error:  # whatever a compiler or a driver finds wrong
                if way.frequency:
                    continue  # never needed
                reason = (str(error).strip() or type(error).__name__).splitlines()[0]
                notice(
                    f"the training step cannot be captured {way} ({reason}), so it may be slower"
                )
        self.ways_ms = {str(way): 1e3 * value for way, value in seconds.items()}
        return min(seconds, key=lambda way: seconds[way], default=None)

    def _outcome(self, way: Way, batches: TrainingBatches) -> Tensor:
        """The loss of a batch, and the length of the gradient of each weight, in some way."""
        self._use(way)
        self.model.train()
        with unchanged(self):
            losses = self.compute(batches.batch(0))[1]
            gradients = torch.autograd.grad(losses.total, list(self.model.parameters()))
        return torch.stack([losses.total.detach(), *(grad.norm() for grad in gradients)])

    def _use(self, way: Way) -> None:
        take(self.model, triton=way.triton, frequency=way.frequency)
        # One compilation, for one shape: a batch is always full.
        self.compute = torch.compile(self.forward, dynamic=False) if way.compiled else self.forward


class CapturedSteps:
    """Some updates in a row that read all that changes from buffers on the device.

    On a CPU, where there are no graphs, they simply run: the same code, for tests.
    """

    def __init__(
        self, trainer: GraphedTrainer, batches: TrainingBatches, count: int, pool: Any = None
    ) -> None:
        """Capture `count` updates; the weights and the optimiser stay as they are.

        pool: the memory of another graph, to be shared.
        """
        self._trainer, self._batches = trainer, batches
        self.count, self.pool = count, pool
        images = count * batches.batch_size
        device = trainer.device
        self._indices = torch.zeros(images, dtype=torch.int64, device=device)
        self._positions = torch.zeros(images, dtype=torch.int64, device=device)
        self._rates_S = torch.zeros(count, device=device)
        self._steps_S = torch.zeros(count, device=device)
        self._graph: torch.cuda.CUDAGraph | None = None
        self._update: Update
        if device.type == "cuda":
            with unchanged(trainer), warnings.catch_warnings():
                # Adam finds it strange to be capturable, but not captured yet.
                warnings.filterwarnings("ignore", message=".*capturable")
                self._graph = capture(self._run, pool)
            self.pool = self._graph.pool()

    def replay(self, step: int) -> Update:
        """Make the updates from number `step` on; returns the last one."""
        indices, positions = self._batches.draw(step, self.count)
        self._indices.copy_(indices)
        self._positions.copy_(positions)
        self._rates_S.copy_(self._trainer.rates[step : step + self.count])
        torch.arange(step, step + self.count, out=self._steps_S)
        if self._graph is None:
            self._run()
        else:
            self._graph.replay()
        return self._update

    def _run(self) -> None:
        size = self._batches.batch_size
        batches = zip(self._indices.split(size), self._positions.split(size))
        for (indices_B, positions_B), rate, step in zip(batches, self._rates_S, self._steps_S):
            self._trainer.set_rate(rate)
            self._trainer.set_progress(step)
            self._update = self._trainer.update(self._batches.assemble(indices_B, positions_B))

    def seconds(self) -> float:
        """How long one replay takes; the weights and the optimiser stay as they are."""
        assert self._graph is not None
        with unchanged(self._trainer):
            start, end = (torch.cuda.Event(enable_timing=True) for _ in range(2))
            self._graph.replay()
            start.record()
            for _ in range(TIMED_REPLAYS):
                self._graph.replay()
            end.record()
            end.synchronize()
        return start.elapsed_time(end) / 1e3 / TIMED_REPLAYS


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
