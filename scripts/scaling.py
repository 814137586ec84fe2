"""How long a training step takes with several processes, and what of that is communication.

    torchrun --nproc-per-node=2 scripts/scaling.py recipe.batch_size=128 precision=fp32

Takes the settings of `capsrun train`, and makes steps of that run without saving anything. Prints
JSON, one line: seconds are medians, memory is of one process.
"""

import json
import statistics
import sys
import time
from collections.abc import Callable

import torch
from torch import distributed

from capsrun.data import load_dataset
from capsrun.data.splits import TrainingBatches
from capsrun.library import training_config
from capsrun.models import build_model
from capsrun.training.device import describe_device, memory_gb, resolve_device, resolve_precision
from capsrun.training.distributed import Ranks, join_ranks
from capsrun.training.graph import trainer_class

WARM_UPS, TURNS = 3, 15


def main() -> None:
    config = training_config(*sys.argv[1:])
    ranks = join_ranks(config.device != "cpu" and torch.cuda.is_available())
    device = resolve_device(config.device)
    precision = resolve_precision(config.precision, device)
    dataset = load_dataset(config.dataset, device)
    model = build_model(config.model, config.routing, config.dataset, config.seed)
    trainer = trainer_class(device, config.compile, ranks.count)(
        model, config.loss, config.recipe, 1000, device, precision, config.compile, ranks
    )
    size = config.recipe.batch_size
    batches = TrainingBatches(dataset.train, config.seed, size, ranks.share(size))
    numbers = iter(range(1000))
    step_seconds = median_seconds(lambda: trainer.advance(batches, next(numbers), 1), device, ranks)
    gradients = torch.cat([p.detach().flatten() for p in model.parameters()])
    exchange_seconds = 0.0
    if ranks.count > 1:
        exchange_seconds = median_seconds(lambda: distributed.all_reduce(gradients), device, ranks)
    result = {
        "processes": ranks.count,
        "batch_size": size,
        "precision": precision,
        "step_seconds": step_seconds,
        "images_per_second": size / step_seconds,
        "exchanged_bytes": gradients.nbytes if ranks.count > 1 else 0,
        "exchange_alone_seconds": exchange_seconds,
        "memory_gb": memory_gb(device),
        "device": describe_device(device),
        "torch": torch.__version__,
    }
    if ranks.first:
        print(json.dumps(result))
    ranks.leave()


def median_seconds(work: Callable[[], object], device: torch.device, ranks: Ranks) -> float:
    """How long some work takes that all processes begin at the same time."""
    turns = []
    for turn in range(WARM_UPS + TURNS):
        ranks.highest(turn)  # waits for the last one
        began = time.perf_counter()
        work()
        if device.type == "cuda":
            torch.cuda.synchronize(device)
        ranks.highest(turn)
        turns.append(time.perf_counter() - began)
    return statistics.median(turns[WARM_UPS:])


if __name__ == "__main__":
    main()
