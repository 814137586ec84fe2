"""The settings of attacks on a network. Values: `configs/attack/`."""

from dataclasses import dataclass

from capsrun.fields import setting


@dataclass(kw_only=True)
class AttackConfig:
    """How images are perturbed so that a network errs; see `training/attacks.py`."""

    name: str
    epsilon: list[float] = setting(minimum=0, maximum=1)
    """How far a pixel in [0, 1] may be moved: each is an attack of its own."""
    steps: int = setting(minimum=1, maximum=10_000)
    step_size: float | None = setting(above=0, maximum=1)
    """By how much a step moves a pixel; None: 2.5 ε / steps, but at most ε."""
    random_start: bool
    """Whether the first step is made from a random place within ε of the image."""
    restarts: int = setting(minimum=1, maximum=1_000)
    """An image counts as fooled if one of so many attacks fools it."""
    targeted: bool
    """Whether the image is to be taken for a class that is drawn at random, or for any other."""
    loss: str = setting(choices=("trained", "difference"))
    """What is climbed: the loss that the network was trained with, or the largest score of a wrong
    class minus the smallest of a right one."""
    reconstructive: bool
    """Whether an image that fools the network is moved towards its reconstruction, so that a
    detector misses it."""
    source: str | None = setting(path=True)
    """A checkpoint of another network, whose gradients are used; None: the tested one's."""
    seed: int = setting(minimum=0, maximum=2**63 - 1)
    """Of random starts and targets."""
