"""Weights to and from the authors' TensorFlow code (github.com/Sarasra/models, research/capsules).

Their variables, with `/` or `.` between the parts of a name, and their shapes: kernels are (height,
width, in, out); N input capsules are ordered (type, row, column); 160 is (class, dimension).

conv1/weights (9, 9, C, 256) · conv1/biases (256) ·
conv_capsule1/weights (9, 9, 256, types·8) · conv_capsule1/biases (types, 8, 1, 1) ·
capsule2/weights (N, 8, 160) · capsule2/biases (10, 16) ·
recons/recons_1, _2, _3 /weights (in, out) and /biases (out)
"""

from collections.abc import Callable, Mapping
from typing import Any, NamedTuple

import numpy as np
import torch
from torch import Tensor

from capsrun.models.capsnet import CapsNet

# Training state that their checkpoints hold beside the weights.
_NOT_WEIGHTS = (
    "Adam",
    "Adam_1",
    "ExponentialMovingAverage",
    "beta1_power",
    "beta2_power",
    "global_step",
)


class _Variable(NamedTuple):
    """One of their variables, and how it becomes our parameter and back."""

    parameter: str
    to_ours: Callable[[Tensor], Tensor]
    to_theirs: Callable[[Tensor], Tensor]


def _variables(model: CapsNet) -> dict[str, _Variable]:
    """Their name of each of the model's parameters."""

    def same(tensor: Tensor) -> Tensor:
        return tensor

    def kernel(name: str) -> _Variable:
        return _Variable(name, lambda t: t.permute(3, 2, 0, 1), lambda t: t.permute(2, 3, 1, 0))

    grid = (model.config.primary_types, model.config.primary_dimensions, 1, 1)
    poses = (model.classes, model.config.digit_dimensions)
    variables = {
        "conv1.weights": kernel("conv1.weight"),
        "conv1.biases": _Variable("conv1.bias", same, same),
        "conv_capsule1.weights": kernel("primarycaps.weight"),
        "conv_capsule1.biases": _Variable(
            "primarycaps.bias", torch.flatten, lambda t: t.reshape(grid)
        ),
        "capsule2.weights": _Variable(
            "digitcaps.weight", lambda t: t.unflatten(2, poses), lambda t: t.flatten(2)
        ),
    }
    if model.digitcaps.bias is not None:
        variables["capsule2.biases"] = _Variable("digitcaps.bias", same, same)
    if model.decoder is not None:
        for number in range(len(model.decoder) // 2):
            theirs, ours = f"recons.recons_{number + 1}", f"decoder.{2 * number}"
            variables[f"{theirs}.weights"] = _Variable(f"{ours}.weight", Tensor.t, Tensor.t)
            variables[f"{theirs}.biases"] = _Variable(f"{ours}.bias", same, same)
    return variables


def load_authors_weights(model: CapsNet, arrays: Mapping[str, Any]) -> None:
    """Put the authors' weights, as NumPy arrays by variable name, into a CapsNet of the same shape.

    The model is to be made with the authors' options (`digit_bias`, `primary_scale=authors`).
    A trailing `:0` is ignored, and so is training state (Adam's moments, the step).
    Raises ValueError, and changes nothing, when a weight is missing, unknown or of another shape.

    >>> import capsrun
    >>> config = capsrun.training_config("model=capsnet_small")
    >>> model = capsrun.CapsNet(config.model, config.routing, config.dataset.image_px)
    >>> arrays = to_authors_arrays(model)  # or those of a file
    >>> arrays["conv1.weights"].shape
    (9, 9, 1, 64)
    >>> capsrun.load_authors_weights(model, arrays)
    """
    if not hasattr(arrays, "items"):
        raise ValueError("arrays are wanted by name: numpy.load(path), say, or a dict")
    given = {}
    for full_name, array in arrays.items():
        name = full_name.removesuffix(":0").replace("/", ".")
        if name.rpartition(".")[2] not in _NOT_WEIGHTS:
            given[name] = torch.from_numpy(np.array(array))
    variables = _variables(model)
    if given.keys() != variables.keys():
        missing = sorted(variables.keys() - given.keys())
        unknown = sorted(given.keys() - variables.keys())
        raise ValueError(
            f"these are not the weights of this model: missing {missing}, unknown {unknown}"
        )
    state = model.state_dict()
    for name, variable in variables.items():
        expected = tuple(variable.to_theirs(state[variable.parameter]).shape)
        if tuple(given[name].shape) != expected:
            raise ValueError(f"{name} has shape {tuple(given[name].shape)}, not {expected}")
    model.load_state_dict(
        {variable.parameter: variable.to_ours(given[name]) for name, variable in variables.items()}
    )


def to_authors_arrays(
    model: CapsNet, tensors: Mapping[str, Tensor] | None = None
) -> dict[str, np.ndarray]:
    """Our weights as arrays with the authors' names (with dots) and shapes.

    tensors: what to convert instead of the model's state, by parameter name; gradients, say.
    """
    source = model.state_dict() if tensors is None else tensors
    return {
        name: np.ascontiguousarray(
            variable.to_theirs(source[variable.parameter].detach()).cpu().numpy()
        )
        for name, variable in _variables(model).items()
    }
