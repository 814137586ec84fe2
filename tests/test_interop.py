"""Weights to and from the authors' names and shapes; their values are tested in test_golden.py."""

import numpy as np
import pytest
import torch
from conftest import TINY, make_model, train_config

from capsrun.models.authors import load_authors_weights, to_authors_arrays


def make(*overrides, seed=0):
    return make_model(train_config(*TINY, "model.decoder_widths=[16,24]", *overrides), seed)


def test_names_and_shapes_are_the_authors():
    assert {name: array.shape for name, array in to_authors_arrays(make()).items()} == {
        "conv1.weights": (9, 9, 1, 8),
        "conv1.biases": (8,),
        "conv_capsule1.weights": (9, 9, 8, 16),
        "conv_capsule1.biases": (2, 8, 1, 1),
        "capsule2.weights": (72, 8, 160),
        "capsule2.biases": (10, 16),
        "recons.recons_1.weights": (160, 16),
        "recons.recons_1.biases": (16,),
        "recons.recons_2.weights": (16, 24),
        "recons.recons_2.biases": (24,),
        "recons.recons_3.weights": (24, 784),
        "recons.recons_3.biases": (784,),
    }


@pytest.mark.parametrize(
    "overrides", [[], ["model.digit_bias=false"], ["model.reconstruction=false"]]
)
def test_there_and_back(overrides):
    theirs, ours = make(*overrides, seed=1), make(*overrides, seed=2)
    load_authors_weights(ours, to_authors_arrays(theirs))
    images = torch.rand(2, 1, 28, 28)
    assert torch.equal(ours.encode(images), theirs.encode(images))
    for name, value in theirs.state_dict().items():
        assert torch.equal(value, ours.state_dict()[name])


def test_a_checkpoint_of_tensorflow():
    """Names with / and :0, and Adam's moments beside the weights."""
    theirs, ours = make(seed=1), make(seed=2)
    arrays = {}
    for name, array in to_authors_arrays(theirs).items():
        variable = name.replace(".", "/")
        arrays[f"{variable}:0"] = array
        arrays[f"{variable}/Adam:0"] = arrays[f"{variable}/Adam_1:0"] = np.zeros_like(array)
    arrays |= {"global_step": np.array(7), "beta1_power": np.array(0.9)}
    load_authors_weights(ours, arrays)
    assert torch.equal(ours.conv1.weight, theirs.conv1.weight)


@pytest.mark.parametrize(
    ("name", "array", "message"),
    [
        ("capsule2.biases", None, r"missing \['capsule2.biases'\]"),
        ("extra", np.zeros(3), r"unknown \['extra'\]"),
        ("conv1.biases", np.zeros(9), r"conv1.biases has shape \(9,\)"),
    ],
)
def test_other_weights_are_refused_and_nothing_is_changed(name, array, message):
    model = make()
    arrays = to_authors_arrays(make(seed=1)) | {name: array}
    arrays = {name: array for name, array in arrays.items() if array is not None}
    before = {name: value.clone() for name, value in model.state_dict().items()}
    with pytest.raises(ValueError, match=message):
        load_authors_weights(model, arrays)
    assert all(torch.equal(value, before[name]) for name, value in model.state_dict().items())
