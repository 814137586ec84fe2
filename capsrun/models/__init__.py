"""The networks, made as their configuration says."""

import torch

from capsrun.config import CapsNetConfig, CNNConfig, DatasetConfig, ModelConfig, RoutingConfig
from capsrun.errors import UserError
from capsrun.models.capsnet import CapsNet, CapsNetOutput
from capsrun.models.cnn import CNN, CNNOutput

# What every network has: `classes`, `channels`, `image_px`, `decoder` (or None), and a call with
# images, labels and noise; its output has `scores_BJ` and `reconstructions_BTCHW`.
Model = CapsNet | CNN
Output = CapsNetOutput | CNNOutput


def build_model(
    model: ModelConfig, routing: RoutingConfig | None, dataset: DatasetConfig, seed: int = 0
) -> Model:
    """Make the network for a data set's images, its weights a function of `seed` alone.

    Raises UserError for images that are too small.
    """
    sizes = dataset.image_px, dataset.channels, dataset.classes
    with torch.random.fork_rng(devices=[]):
        torch.default_generator.manual_seed(seed)
        try:
            if isinstance(model, CNNConfig):
                return CNN(model, *sizes)
            assert isinstance(model, CapsNetConfig)  # checked in config.py
            assert routing is not None
            return CapsNet(model, routing, *sizes)
        except ValueError as error:
            raise UserError(str(error)) from error
