"""capsrun reproduces *Dynamic Routing Between Capsules* (Sabour, Frosst, Hinton, NIPS 2017).

As a library: the network, its layers and equations, the data sets and trained models.
`docs/tutorial.md` goes from the equations to a trained model; `help(capsrun.route)` and the like
are the reference.

    import capsrun

    config = capsrun.training_config("dataset=mnist5k", "routing.iterations=1")
    model = capsrun.CapsNet(config.model, config.routing, image_px=28)
    digits = capsrun.load_dataset(config.dataset)
    trained = capsrun.load_checkpoint("runs/mnist-capsnet-quick/seed0")

A mistake in a setting or a file raises `capsrun.errors.UserError`, which says what to do.
"""

import importlib
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from capsrun.library import load_dataset, save_checkpoint, training_config
    from capsrun.models.authors import load_authors_weights
    from capsrun.models.capsnet import CapsNet
    from capsrun.models.dynamic import CapsuleLayer
    from capsrun.models.layers import Decoder, PrimaryCaps
    from capsrun.models.routing import capsule_votes, coupling_coefficients, route, squash
    from capsrun.runs.checkpoint import load_checkpoint
    from capsrun.training.losses import margin_loss, reconstruction_loss

__version__ = "0.1.0"

__all__ = [
    "CapsNet",
    "CapsuleLayer",
    "Decoder",
    "PrimaryCaps",
    "__version__",
    "capsule_votes",
    "coupling_coefficients",
    "load_authors_weights",
    "load_checkpoint",
    "load_dataset",
    "margin_loss",
    "reconstruction_loss",
    "route",
    "save_checkpoint",
    "squash",
    "training_config",
]

# Where each name is found once it is asked for: `capsrun --help` needs none of them, nor PyTorch.
_MODULES = {
    "CapsNet": "capsrun.models.capsnet",
    "CapsuleLayer": "capsrun.models.dynamic",
    "Decoder": "capsrun.models.layers",
    "PrimaryCaps": "capsrun.models.layers",
    "capsule_votes": "capsrun.models.routing",
    "coupling_coefficients": "capsrun.models.routing",
    "load_authors_weights": "capsrun.models.authors",
    "load_checkpoint": "capsrun.runs.checkpoint",
    "load_dataset": "capsrun.library",
    "margin_loss": "capsrun.training.losses",
    "reconstruction_loss": "capsrun.training.losses",
    "route": "capsrun.models.routing",
    "save_checkpoint": "capsrun.library",
    "squash": "capsrun.models.routing",
    "training_config": "capsrun.library",
}


def __getattr__(name: str) -> Any:
    """Import a public name when it is first used (PEP 562)."""
    if name not in _MODULES:
        raise AttributeError(f"module 'capsrun' has no attribute {name!r}")
    value = getattr(importlib.import_module(_MODULES[name]), name)
    globals()[name] = value
    return value


def __dir__() -> list[str]:
    """What is there, with what is not imported yet."""
    return sorted({*globals(), *__all__})
