"""What `capsrun eval` shows of routing: couplings, their entropy, and who claims which ink."""

import dataclasses
import json
import math
import re

import numpy as np
import pytest
import torch
from conftest import make_model, stored, train_config
from PIL import Image

from capsrun import cli
from capsrun.models.capsnet import CapsNet
from capsrun.report import figures
from capsrun.report.routing_maps import (
    claims,
    claims_in_colour,
    entropy_bits,
    grid_extent,
    on_grid,
    place_means,
    routed,
    routing_figure,
)


def capsnet(*overrides: str, px: int = 28) -> CapsNet:
    words = [f"dataset.image_px={px}", "model.conv1_channels=6", "model.primary_types=3"]
    model = make_model(train_config(*words, *overrides)).eval()
    with torch.no_grad():
        model.conv1.weight.mul_(3)
        model.primarycaps.weight.mul_(30)
        model.digitcaps.weight.mul_(5)
    return model


def images(count: int = 4, px: int = 28):
    pixels = torch.randint(0, 256, (count, 1, px, px), generator=torch.Generator().manual_seed(1))
    return stored(pixels.to(torch.uint8), torch.arange(count))


def test_entropy_in_bits():
    uniform = torch.full((1, 8), 1 / 8)
    certain = torch.tensor([[1.0, 0, 0, 0, 0, 0, 0, 0]])
    half = torch.tensor([[0.5, 0.25, 0.25, 0, 0, 0, 0, 0]])
    assert entropy_bits(torch.cat([uniform, certain, half])).tolist() == [3.0, 0.0, 1.5]
    # Leaky routing: what is missing to 1 is the share of "none of these".
    assert entropy_bits(torch.full((1, 3), 0.25)).item() == 2.0


def test_places_are_ordered_as_the_capsules_are():
    types, side = 3, 4
    numbers = torch.arange(types * side**2)
    grid = on_grid(numbers, types)
    for kind, row, column in ((0, 0, 1), (2, 3, 0), (1, 2, 3)):
        assert grid[kind, row, column] == kind * side**2 + row * side + column
    weights = torch.rand(types * side**2, generator=torch.Generator().manual_seed(0))
    means = place_means(numbers.float(), weights, types)
    at = [kind * side**2 + 2 * side + 1 for kind in range(types)]
    expected = sum(weights[i] * i for i in at) / sum(weights[i] for i in at)
    assert means[2, 1].item() == pytest.approx(expected.item(), rel=1e-5)


@pytest.mark.parametrize(
    ("overrides", "px"), [([], 28), (["model.padding=same"], 28), ([], 36), ([], 31)]
)
def test_a_cell_lies_where_its_capsules_look(overrides, px):
    """Only pixels around the middle of a cell change the capsules of its place, the same far."""
    model = capsnet(*overrides, px=px)
    low, high = grid_extent(model)
    side = math.isqrt(model.primary_capsules // 3)
    assert high - low == 2 * side
    row = column = side // 2
    black = torch.zeros(1, 1, px, px, requires_grad=True)
    poses = model.primary_poses(black + 0.5)
    on_grid(poses[0].square().sum(1), 3)[:, row, column].sum().backward()
    seen = black.grad[0, 0].abs() > 0
    rows = seen.any(1).nonzero().flatten()
    middle = (rows.min() + rows.max() + 1).item() / 2
    assert middle == low + 2 * row + 1
    assert rows.max() - rows.min() == 16  # 17 pixels


@pytest.mark.parametrize("leaky", ["false", "true"])
def test_couplings_become_less_equal(leaky):
    model = capsnet(f"routing.leaky={leaky}")
    routing = routed(model, images(), 2)
    share = 1 / 11 if leaky == "true" else 1 / 10
    assert routing.equal_share == pytest.approx(share)
    assert routing.couplings_RJGG.shape == (3, 10, 6, 6)
    torch.testing.assert_close(routing.couplings_RJGG[0], torch.full((10, 6, 6), share))
    totals = routing.couplings_RJGG.sum(1)
    if leaky == "false":
        torch.testing.assert_close(totals, torch.ones(3, 6, 6))
    assert routing.entropy_R[0].item() == pytest.approx(-math.log2(share), abs=1e-4)
    assert routing.entropy_R[2] < routing.entropy_R[0] - 1e-3
    assert (routing.labels, len(routing.predicted)) == ([2], 1)


def test_a_black_image_has_no_undefined_numbers():
    model = capsnet("model.digit_bias=false")
    with torch.no_grad():
        model.conv1.bias.zero_()
        model.primarycaps.bias.zero_()
    black = stored(torch.zeros(1, 1, 28, 28, dtype=torch.uint8), torch.zeros(1, dtype=torch.long))
    routing = routed(model, black, 0)
    assert not routing.lengths_J.any()
    for numbers in (routing.couplings_RJGG, routing.entropy_RGG, routing.entropy_R):
        assert numbers.isfinite().all()
    assert not routing.added_JGG.any()
    routing_figure(routing, tuple("0123456789"), "black")


def test_grey_is_the_mean_of_the_colours():
    grey = torch.full((1, 3, 28, 28), 102, dtype=torch.uint8)
    split = stored(grey, torch.zeros(1, dtype=torch.long))
    routing = routed(capsnet("dataset.channels=3"), split, 0)
    torch.testing.assert_close(routing.ink_HW, torch.full((28, 28), 0.4))


def test_what_self_attention_adds_is_the_length_before_squashing_with_its_prior():
    model = capsnet("routing=self_attention")
    with torch.no_grad():
        model.digitcaps.bias.normal_(std=0.3)
    routing = routed(model, images(), 1)
    # ‖v‖ = 1 − e^−‖s‖
    lengths = -torch.log1p(-routing.lengths_J.double())
    added = routing.added_JGG.sum((1, 2)).double()
    torch.testing.assert_close(added, lengths, rtol=1e-3, atol=1e-4)
    assert (routing.added_text, routing.has_bias) == ("adds to ‖s‖", False)


def test_what_is_added_is_the_length_before_squashing():
    model = capsnet("model.digit_bias=false")
    routing = routed(model, images(), 1)
    v = routing.lengths_J.double()
    # v = s²/(1 + s²), so s = √(v/(1 − v)).
    torch.testing.assert_close(
        routing.added_JGG.sum((1, 2)).double(), (v / (1 - v)).sqrt(), rtol=1e-3, atol=1e-4
    )


def test_a_digit_claims_the_ink_of_its_places():
    routing = routed(capsnet(px=36), images(px=36), 0)
    left = torch.zeros(10, 10)
    left[:, :5] = 1
    added = torch.zeros(10, 10, 10)
    added[3], added[8] = left, 1 - left
    ink = torch.ones(36, 36)
    ink[30:] = 0
    shown = {"added_JGG": added, "predicted": [3, 8], "labels": [3, 8], "ink_HW": ink}
    routing = dataclasses.replace(routing, **shown)
    first, second = claims(routing)
    torch.testing.assert_close(first + second, torch.ones(36, 36))
    assert (first[:, :15] > 0.99).all()
    assert (second[:, 21:] > 0.99).all()
    drawn = claims_in_colour(routing)
    assert np.allclose(drawn[10, 5], figures.TWO_COLOURS[0])
    assert np.allclose(drawn[10, 30], figures.TWO_COLOURS[1])
    assert not drawn[32].any()
    figure = routing_figure(routing, tuple("0123456789"), "two digits")
    assert any(axes.get_xlabel() == "predicted: 3 orange 8 blue" for axes in figure.axes)


def test_the_picture_shows_what_was_computed():
    routing = routed(capsnet(), images(), 3)
    figure = routing_figure(routing, tuple("abcdefghij"), "a title")
    maps = [axes.images[0] for axes in figure.axes if axes.images]
    # The image, ten classes and the entropy, for three iterations; then what is added.
    shown = [image.get_array() for image in maps]
    arrays = [a for a in shown if a.shape == (6, 6)]
    assert len(arrays) == 3 * 11 + 10
    assert np.allclose(arrays[11 + 4], routing.couplings_RJGG[1, 4])
    assert np.allclose(arrays[2 * 11 + 10], routing.entropy_RGG[2])
    assert np.allclose(arrays[33 + 7], routing.added_JGG[7])
    extents = {tuple(i.get_extent()) for i, a in zip(maps, shown) if a.shape == (6, 6)}
    assert extents == {(7.5, 19.5, 19.5, 7.5)}
    texts = [axes.get_title() for axes in figure.axes]
    assert any(re.match(r"d\nlabel(, predicted)?\n‖v‖ 0", text) for text in texts)


def test_eval_draws_the_routing_of_chosen_images(tiny_run, tmp_path, capsys):
    common = ["eval", "dataset=mnist5k", f"checkpoint={tiny_run}", f"out_dir={tmp_path}"]
    assert cli.main([*common, "images=50", "routing_images=[3,8]"]) == 0
    names = {path.name for path in (tmp_path / "pictures").glob("routing_*")}
    assert names == {"routing_3.png", "routing_8.png"}
    assert Image.open(tmp_path / "pictures" / "routing_3.png").width > 1000
    result = json.loads((tmp_path / "result.json").read_text())
    assert [image["image"] for image in result["routing"]] == [3, 8]
    assert result["routing"][0]["entropy_bits"][0] == pytest.approx(math.log2(10), abs=1e-3)
    events = [path.read_bytes() for path in (tmp_path / "tensorboard").iterdir()]
    assert sum(b"routing_3" in content for content in events) == 1
    assert "Routing of image 8" in (tmp_path / "index.html").read_text()
    # Another choice replaces the pictures, and none is one.
    assert cli.main([*common, "images=50", "routing_images=[]"]) == 0
    assert not list((tmp_path / "pictures").glob("routing_*"))
    capsys.readouterr()
    assert cli.main([*common, "images=50", "routing_images=[1000]"]) == 2
    assert "routing_images=1000: the images of this split are 0 to 999" in capsys.readouterr().err
