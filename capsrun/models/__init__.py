"""The networks, made as their configuration says."""

import torch

from capsrun.data_config import DatasetConfig
from capsrun.errors import UserError
from capsrun.model_config import CNNConfig, EfficientCapsNetConfig, ModelConfig, RoutingConfig
from capsrun.models.capsnet import CapsNet, CapsNetOutput
from capsrun.models.cnn import CNN, CNNOutput
from capsrun.models.efficient import EfficientCapsNet

# What every network has: `classes`, `channels`, `image_px`, `decoder` (or None), and a call with
# images, labels and noise; its output has `scores_BJ` and `reconstructions_BTCHW`.
Model = CapsNet | CNN
Output = CapsNetOutput | CNNOutput


MOST_PARAMETERS = 1_000_000_000
"""More than these, 4 GB, are taken for a mistake; the largest network of the papers has 35 M."""


def build_model(
    model: ModelConfig, routing: RoutingConfig | None, dataset: DatasetConfig, seed: int = 0
) -> Model:
    """Make the network for a data set's images, its weights a function of `seed` alone.

    Raises UserError for images that are too small, and for a network that is too large.
    """
    plan_model(model, routing, dataset)
    with torch.random.fork_rng(devices=[]):
        torch.default_generator.manual_seed(seed)
        return _make(model, routing, dataset)


def plan_model(model: ModelConfig, routing: RoutingConfig | None, dataset: DatasetConfig) -> Model:
    """The network without memory for its weights, which tells their shapes. Raises as above."""
    try:
        with torch.device("meta"):
            plan = _make(model, routing, dataset)
    except (RuntimeError, TypeError, OverflowError, MemoryError) as error:  # sizes beyond 64 bits
        raise UserError("the network's settings ask for more numbers than can be had") from error
    except ValueError as error:
        raise UserError(str(error)) from error
    count = sum(parameter.numel() for parameter in plan.parameters())
    if count > MOST_PARAMETERS:
        raise UserError(
            f"the network's settings ask for {count:,} parameters, more than {MOST_PARAMETERS:,}"
        )
    return plan


def _make(model: ModelConfig, routing: RoutingConfig | None, dataset: DatasetConfig) -> Model:
    sizes = dataset.image_px, dataset.channels, dataset.classes, dataset.standardise
    if isinstance(model, CNNConfig):
        return CNN(model, *sizes)
    assert routing is not None  # checked in settings.py
    if isinstance(model, EfficientCapsNetConfig):
        return EfficientCapsNet(model, routing, *sizes)
    return CapsNet(model, routing, *sizes)
