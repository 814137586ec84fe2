"""The settings of networks, of their routing and of their losses. The values live in `configs/`."""

from dataclasses import dataclass
from typing import NamedTuple

from capsrun.fields import setting


@dataclass(kw_only=True)
class ModelConfig:
    """Some network."""

    name: str


@dataclass(kw_only=True)
class CapsuleModelConfig(ModelConfig):
    """Some network with capsules of one layer, routed to one for each class, and a decoder."""

    primary_types: int = setting(minimum=1)
    primary_dimensions: int = setting(minimum=1)
    digit_dimensions: int = setting(minimum=1)
    reconstruction: bool
    decoder_widths: list[int] = setting(minimum=1)


@dataclass(kw_only=True)
class CapsNetConfig(CapsuleModelConfig):
    """The layers of CapsNet. Values and their sources: `configs/model/capsnet.yaml`."""

    conv1_channels: int = setting(minimum=1)
    kernel_px: int = setting(minimum=1)
    padding: str = setting(choices=("valid", "same"))
    primary_scale: str = setting(choices=("authors", "one"))
    digit_bias: bool
    initialisation: str = setting(choices=("authors", "pytorch"))


@dataclass(kw_only=True)
class EfficientCapsNetConfig(CapsuleModelConfig):
    """The layers of Efficient-CapsNet. Values: `configs/model/efficient_capsnet.yaml`."""

    channels: list[int] = setting(minimum=1)
    """Output channels of each convolution but the last, which has those of PrimaryCaps."""
    kernels_px: list[int] = setting(minimum=1)
    strides: list[int] = setting(minimum=1)
    norm_momentum: float = setting(minimum=0, maximum=1)
    """Share of the running statistics that a batch keeps."""
    norm_epsilon: float = setting(above=0, maximum=10**3)


@dataclass(kw_only=True)
class CNNConfig(ModelConfig):
    """The layers of a convolutional network. Values and sources: `configs/model/cnn_*.yaml`."""

    channels: list[int] = setting(minimum=1)
    """Output channels of each convolution."""
    kernels_px: list[int] = setting(minimum=1)
    pools_px: list[int] = setting(minimum=1)
    """Size and stride of the max-pooling after each convolution; 1: none."""
    padding: str = setting(choices=("valid", "same"))
    hidden: list[int] = setting(minimum=1)
    """Widths of the fully connected layers before the last one."""
    dropout: float = setting(minimum=0, maximum=0.99)
    """Share of the last hidden layer's units that is dropped in training."""
    initialisation: str = setting(choices=("authors", "glorot", "pytorch"))


@dataclass(kw_only=True)
class RoutingConfig:
    """How the capsules below the class capsules are routed to them. Values: `configs/routing/`."""


@dataclass(kw_only=True)
class DynamicRoutingConfig(RoutingConfig):
    """Routing by agreement, as in the paper; with one iteration, no routing."""

    iterations: int = setting(minimum=1, maximum=1_000)
    leaky: bool
    detach: bool


@dataclass(kw_only=True)
class OtherRoutingConfig(RoutingConfig):
    """Another algorithm than the paper's."""

    algorithm: str
    """One of `ROUTINGS`."""


@dataclass(kw_only=True)
class EMRoutingConfig(OtherRoutingConfig):
    """Routing by expectation and maximisation."""

    iterations: int = setting(minimum=1, maximum=1_000)
    shared: bool
    """Whether the capsules of a type have one matrix for each class, wherever they are."""
    inverse_temperature: float = setting(above=0, maximum=10**6)
    """What λ tends to, see `EMCapsuleLayer`."""
    temperature_decay: float = setting(minimum=0, below=1)
    minimum_variance: float = setting(above=0, maximum=10**3)
    pose_dimensions: int = setting(minimum=1, maximum=10**4)
    """The numbers of a pose, a square matrix: of the capsules below, and of the classes'."""


def algorithm_of(routing: RoutingConfig) -> str:
    """The name of its algorithm in `ROUTINGS`: the paper's is not among its settings."""
    return routing.algorithm if isinstance(routing, OtherRoutingConfig) else "dynamic"


class Routing(NamedTuple):
    """A routing algorithm."""

    layer: str
    """The layer of class capsules, as `file.class` of `models/`."""
    settings: type[RoutingConfig] = OtherRoutingConfig
    shares: bool = False
    """Whether the lengths of the class capsules add up to 1, as probabilities do."""


ROUTINGS = {
    "dynamic": Routing("dynamic.CapsuleLayer", DynamicRoutingConfig),
    "em": Routing("em.EMCapsuleLayer", EMRoutingConfig),
    "self_attention": Routing("self_attention.SelfAttentionLayer"),
    "self_routing": Routing("self_routing.SelfRoutingLayer", shares=True),
}
"""By `routing.algorithm`, which all but the paper's have."""


@dataclass(kw_only=True)
class LossConfig:
    """Some loss. Values: `configs/loss/`."""

    name: str


@dataclass(kw_only=True)
class CrossEntropyConfig(LossConfig):
    """What the CNNs minimise."""

    activation: str = setting(choices=("softmax", "sigmoid"))
    present_target: float = setting(above=0, maximum=1)
    """Sigmoid only: the target of a class that is present."""


@dataclass(kw_only=True)
class CapsuleLossConfig(LossConfig):
    """What networks with capsules minimise."""

    reconstruction_weight: float = setting(minimum=0, maximum=10**6)


@dataclass(kw_only=True)
class LogLikelihoodConfig(CapsuleLossConfig):
    """The negative log-likelihood, of lengths that add up to 1."""


@dataclass(kw_only=True)
class MarginLossConfig(CapsuleLossConfig):
    """The margin loss."""

    margin_present: float = setting(minimum=0, maximum=1)
    margin_absent: float = setting(minimum=0, maximum=1)
    absent_weight: float = setting(minimum=0, maximum=10**6)
    margin_factor: float = setting(above=0, maximum=10**6)
    class_reduction: str = setting(choices=("mean", "sum"))


@dataclass(kw_only=True)
class SpreadLossConfig(CapsuleLossConfig):
    """The spread loss of EM routing, whose margin grows during a run."""

    margin_first: float = setting(minimum=0, maximum=1)
    margin_last: float = setting(minimum=0, maximum=1)
