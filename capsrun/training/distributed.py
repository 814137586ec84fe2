"""Data-parallel training: several processes, one for each device, make every step together.

`torchrun` starts them and tells each its rank. Each makes its share of a step's batch; their
gradients are averaged, so all of them hold the same weights, and the first one alone writes.

Shapes: B batch of a step, over all processes.
"""

import contextlib
import os
import signal
import sys
import threading
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from datetime import timedelta
from typing import Any, TypeVar

import torch
from torch import Tensor, distributed, nn

from capsrun.errors import Unfinished, UserError, process_rank, remark

Result = TypeVar("Result")

# A process that dies is noticed at once, by its closed connection; a machine that loses its power
# or its network only after this time. So long the others also wait while the first one tests.
TIMEOUT = timedelta(hours=1)
SILENT_SECONDS = 5  # after which it is said that others are waited for


@dataclass(frozen=True)
class Ranks:
    """The processes that train one model, and which of them this one is."""

    rank: int = 0
    """From 0."""
    count: int = 1

    @property
    def first(self) -> bool:
        """Whether this is the one that reads and writes the run's folder."""
        return self.rank == 0

    def share(self, batch_size: int) -> slice:
        """Which images of a batch this process takes; some take one more than others."""
        return slice(*(rank * batch_size // self.count for rank in (self.rank, self.rank + 1)))

    def mean(self, values: Tensor, images: int, batch_size: int) -> Tensor:
        """The means over a whole batch of what are means over the images of each process.

        images: how many of the batch this process has.
        """
        if self.count == 1:
            return values
        total = values.detach() * (images / batch_size)
        with peers():
            distributed.all_reduce(total)
        return total

    def highest(self, *values: int) -> list[int]:
        """The highest of what the processes say; all wait for the last one."""
        highest = torch.tensor(values)  # on the CPU, so that no GPU is waited for
        if self.count > 1:
            with peers():
                distributed.all_reduce(highest, distributed.ReduceOp.MAX)
        return highest.tolist()

    def together(self, work: Callable[[], Result]) -> Result:
        """Do the same in every process. Where one raises a UserError, all of them do."""
        if self.count == 1:
            return work()
        error = None
        try:
            result = work()
        except UserError as raised:
            error = raised
        errors: list[UserError | None] = [None] * self.count
        with peers():
            distributed.all_gather_object(errors, error)
        for error in filter(None, errors):
            raise error
        return result

    def from_first(self, work: Callable[[], Result]) -> Result:
        """Do something in the first process only; what it returns or raises goes to all."""
        if self.count == 1:
            return work()
        sent: list[Any] = [None, None]
        if self.first:
            try:
                sent[0] = work()
            except Exception as raised:
                sent[1] = raised
        with peers():
            distributed.broadcast_object_list(sent)
        result, error = sent
        if error is not None:
            raise error
        return result

    def share_model(self, model: nn.Module, device: torch.device) -> nn.Module:
        """The model as one that gives all processes the first one's weights, and mean gradients.

        A batch normalisation normalises by the images of its own process; the running statistics
        are those of the first one's, which the others are given before each step.
        """
        if self.count == 1:
            return model
        with peers():
            return nn.parallel.DistributedDataParallel(
                model,
                device_ids=[device] if device.type == "cuda" else None,
                gradient_as_bucket_view=True,
            )

    def leave(self) -> None:
        """Part from the others, when all is done."""
        if self.count > 1:
            distributed.destroy_process_group()


ALONE = Ranks()


@contextlib.contextmanager
def peers() -> Iterator[None]:
    """Turn what PyTorch raises where another process is gone into an Unfinished that says so."""
    try:
        yield
    except RuntimeError as error:
        # Gloo's is no more than a RuntimeError.
        if not isinstance(error, distributed.DistError) and "gloo" not in str(error).lower():
            raise
        raise Unfinished(
            "another process of this job has ended, so this one ends too; the same command goes on "
            "after the last checkpoint, with any number of processes"
        ) from error


def take_gpu(local_rank: int) -> None:
    """Use this one of the GPUs of this machine. Raises UserError where there are fewer."""
    if local_rank >= torch.cuda.device_count():
        raise UserError(
            f"there are {torch.cuda.device_count()} GPUs here, but torchrun starts more "
            "processes: say as many with --nproc-per-node, or device=cpu"
        )
    torch.cuda.set_device(local_rank)


@contextlib.contextmanager
def meeting(count: int) -> Iterator[None]:
    """Say for whom is waited, and let signals end the program: nothing is there to be saved yet.

    It waits outside Python, where none of its handlers would be run.
    """
    place = f"{os.environ['MASTER_ADDR']}:{os.environ['MASTER_PORT']}"
    message = f"waiting for the other processes of this job, {count} in all, at {place}"
    said = threading.Timer(SILENT_SECONDS, remark, [message])
    said.daemon = True
    said.start()
    is_main = threading.current_thread() is threading.main_thread()
    numbers = (signal.SIGINT, signal.SIGTERM) if is_main else ()
    before = {number: signal.signal(number, signal.SIG_DFL) for number in numbers}
    try:
        yield
    finally:
        said.cancel()
        for number, handler in before.items():
            signal.signal(number, handler or signal.SIG_DFL)  # None where it was set from C


def join_ranks(use_gpu: bool) -> Ranks:
    """Meet the other processes that `torchrun` started; alone without it.

    use_gpu: whether the model will be on a GPU: of those of this machine, each process takes one.
    Raises UserError for more processes than GPUs, and for those that torchrun did not start.
    """
    rank, count = process_rank()
    if count == 1:
        return ALONE
    if not {"MASTER_ADDR", "MASTER_PORT", "LOCAL_RANK"} <= os.environ.keys():
        raise UserError(
            f"RANK and WORLD_SIZE say that this is one of {count} processes, but not where the "
            "others are: start them with torchrun, or unset the two"
        )
    try:
        local_rank, port = (int(os.environ[name]) for name in ("LOCAL_RANK", "MASTER_PORT"))
        if local_rank < 0 or not 0 < port < 2**16:
            raise ValueError("LOCAL_RANK or MASTER_PORT has no sound number")
        if use_gpu:
            take_gpu(local_rank)
        if not distributed.is_initialized():
            # Decisions are made on the CPU in any case.
            backend = "cpu:gloo,cuda:nccl" if use_gpu else "gloo"
            with meeting(count):
                distributed.init_process_group(backend, timeout=TIMEOUT)
    except (ValueError, distributed.DistError) as error:  # of variables that are no addresses
        raise UserError(
            f"the {count} processes of this job cannot meet ({str(error).splitlines()[0]}): start "
            "them with torchrun, or unset RANK and WORLD_SIZE"
        ) from error
    if rank:  # the first one talks
        sys.stdout = open(os.devnull, "w", encoding="utf-8")
    return Ranks(rank, count)
