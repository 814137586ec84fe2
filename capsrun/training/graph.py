"""Training steps on a GPU as captured CUDA graphs: nothing is done on the host between them.

Shapes: B batch, S steps of one graph.
"""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor

from capsrun.data.batches import TrainingBatches
from capsrun.errors import notice

if TYPE_CHECKING:
    from capsrun.training.step import Trainer, Update

STEPS_PER_REPLAY = 10
WARM_UPS = 3  # libraries choose their algorithms and allocate during the first calls


class GraphedSteps:
    """Makes a trainer's updates by replaying graphs, captured when the first is asked for."""

    def __init__(self, trainer: Trainer, rates: Tensor) -> None:
        """rates: what `adam_rate` gives for every step of the run, on the trainer's device."""
        self.failed = False
        """Whether steps cannot be captured here; then the trainer makes them one by one."""
        self._trainer, self._rates = trainer, rates
        # Shapes never change, so the library may try its algorithms once and keep the fastest.
        torch.backends.cudnn.benchmark = True
        self._captured: dict[int, CapturedSteps] = {}

    def advance(self, batches: TrainingBatches, step: int, count: int) -> Update:
        """Make `count` updates from number `step` on; returns the last one.

        What it returns is overwritten by the next call. Nothing is waited for.
        """
        if not self._captured and not self._capture(batches):
            return self._trainer.advance(batches, step, count)
        while count:
            size = STEPS_PER_REPLAY if count >= STEPS_PER_REPLAY else 1
            update = self._captured[size].replay(step)
            step, count = step + size, count - size
        return update

    def _capture(self, batches: TrainingBatches) -> bool:
        """Capture the updates, compiled where that works; False, having said so, where not."""
        trainer = self._trainer
        for compiled in (True, False):
            # One compilation, for one shape: a batch is always full.
            compute = torch.compile(trainer.forward, dynamic=False) if compiled else trainer.forward
            trainer.compute = compute
            try:
                pool = None  # one working memory for both
                for size in (1, STEPS_PER_REPLAY):
                    steps = CapturedSteps(trainer, batches, self._rates, size, pool)
                    self._captured[size], pool = steps, steps.pool
                return True
            except Exception as error:  # whatever a compiler or a driver finds wrong
                self._captured.clear()
                what = "compiled" if compiled else "captured"
                reason = (str(error).strip() or type(error).__name__).splitlines()[0]
                notice(f"the training step could not be {what} ({reason}), so it is slower")
        self.failed = True
        return False


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
            self._graph = self._captured()

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

    def _captured(self) -> torch.cuda.CUDAGraph:
        """Capture `_run`, after warm-ups whose changes to weights and optimiser are undone."""
        changed = self._trainer.changing_tensors()
        saved = [tensor.clone() for tensor in changed]
        stream = torch.cuda.Stream()
        stream.wait_stream(torch.cuda.current_stream())
        with torch.cuda.stream(stream):
            for _ in range(WARM_UPS):
                self._run()
        torch.cuda.current_stream().wait_stream(stream)
        graph = torch.cuda.CUDAGraph()
        with torch.cuda.graph(graph, pool=self.pool):
            self._update = self._run()
        self.pool = graph.pool()
        with torch.no_grad():
            for tensor, value in zip(changed, saved):
                tensor.copy_(value)
        return graph
