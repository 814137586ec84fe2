"""The networks, found by the name in their configuration."""

import torch

from capsrun.config import CapsNetConfig, DatasetConfig, RoutingConfig
from capsrun.errors import UserError
from capsrun.models.capsnet import CapsNet

MODELS = {"capsnet": CapsNet}


def build_model(
    model: CapsNetConfig, routing: RoutingConfig, dataset: DatasetConfig, seed: int = 0
) -> CapsNet:
    """Make the network for a data set's images, its weights a function of `seed` alone.

    Raises UserError for images that are too small.
    """
    with torch.random.fork_rng(devices=[]):
        torch.default_generator.manual_seed(seed)
        try:
            return MODELS[model.name](
                model, routing, dataset.image_px, dataset.channels, dataset.classes
            )
        except ValueError as error:
            raise UserError(str(error)) from error
