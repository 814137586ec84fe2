"""What the tests share: configurations, real digits, and the commands as a user runs them."""

import os
from pathlib import Path

import pytest
import torch

from capsrun import cli
from capsrun.config import TrainConfig, from_dict

REPOSITORY = Path(__file__).resolve().parent.parent
SHARED = REPOSITORY.parent / "shared"
GOLDEN = SHARED / "golden"


def train_config(*overrides: str) -> TrainConfig:
    """The configuration that `capsrun train` makes of these overrides."""
    return from_dict(TrainConfig, cli.compose("train", overrides))
