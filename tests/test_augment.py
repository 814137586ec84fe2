"""How Efficient-CapsNet's training images are changed at random, against slow ways to do it."""

import dataclasses
import math

import numpy as np
import pytest
import torch
from conftest import load_data, train_config
from PIL import Image

from capsrun.data.augment import Changes, augment, draw_changes, erase, move, squeeze, turn
from capsrun.data.splits import TrainingBatches
from capsrun.errors import UserError
from capsrun.settings import deciding, flattened, from_dict

FROM_5K = "dataset.source=mnist5k"
AUGMENTED = ["dataset.augment=efficient_capsnet", "dataset.shift_px=0"]


@pytest.fixture(scope="module")
def digits():
    """Some real digits, in [0, 1]."""
    split = load_data("mnist5k").test
    return split.batch(torch.arange(0, 1000, 17)).images_BCHW


@pytest.fixture(scope="module")
def changes() -> Changes:
    return draw_changes(torch.arange(200_000), 5, 28)


def test_a_quarter_turn_by_hand():
    """9 above and 4 to the left of (14, 14) becomes 9 to the left and 4 below."""
    image = torch.zeros(1, 1, 28, 28)
    image[0, 0, 14 - 9, 14 - 4] = 1
    turned = turn(image, torch.tensor([90.0]))
    assert turned[0, 0, 14 + 4, 14 - 9] == pytest.approx(1, abs=1e-4)
    assert turned.sum() == pytest.approx(1, abs=1e-4)
    assert torch.equal(turn(image, torch.zeros(1)), image)


def test_rotation_is_bilinear_about_the_point_of_the_authors(digits):
    degrees = torch.arange(-29, 30)[: len(digits)].float()
    turned = turn(digits, degrees)
    for number in (0, 3, 28, 40):
        angle = math.radians(degrees[number])
        image = np.pad(digits[number, 0].double().numpy(), 40)
        for row in range(28):
            for column in range(28):
                across, down = column - 14, row - 14
                x = math.cos(angle) * across - math.sin(angle) * down + 54
                y = math.sin(angle) * across + math.cos(angle) * down + 54
                left, top = math.floor(x), math.floor(y)
                right_share, low_share = x - left, y - top
                upper, lower = image[top : top + 2, left : left + 2]
                expected = (1 - low_share) * (upper @ [1 - right_share, right_share])
                expected += low_share * (lower @ [1 - right_share, right_share])
                assert turned[number, 0, row, column] == pytest.approx(expected, abs=1e-4)


@pytest.mark.parametrize(
    ("back", "share", "place"),
    [
        ((True, True), (0.9999, 0.9999), (0, 0)),  # 5 empty rows, 4 empty columns before
        ((False, False), (0.9999, 0.9999), (25, 26)),  # of the last row and column
        ((True, False), (0.0, 0.0), (5, 4)),
        ((True, True), (0.01, 0.01), (4, 3)),
        ((False, False), (0.04, 0.04), (5, 4)),
        ((False, True), (0.5, 0.5), (15, 2)),  # ⌊0.5 · (20 + 1)⌋ = 10 down, 0.5 · 4 to the left
    ],
)
def test_moves_by_hand(back, share, place):
    image = torch.zeros(1, 1, 28, 28)
    image[0, 0, 5:8, 4:6] = torch.rand(3, 2) + 0.1
    moved = move(image, torch.tensor([back]), torch.tensor([share]))
    assert torch.equal(moved[0, 0, place[0] :, place[1] :][:3, :2], image[0, 0, 5:8, 4:6])
    assert (moved > 0).sum() == 6
    blank = torch.zeros(1, 1, 28, 28)
    assert torch.equal(move(blank, torch.tensor([back]), torch.tensor([share])), blank)


@pytest.mark.parametrize("narrower", range(1, 8))
@pytest.mark.parametrize("later", [0, 1])
def test_squeezed_images_are_pillows(digits, narrower, later):
    """Its Lanczos kernel is TensorFlow's with antialiasing; both keep the height exactly."""
    given = torch.tensor([[narrower], [later]]).expand(2, len(digits))
    squeezed = squeeze(digits, *given)
    start = narrower // 2 + later
    for image, got in zip(digits[::9], squeezed[::9]):
        resized = Image.fromarray(image[0].numpy()).resize((28 - narrower, 28), Image.LANCZOS)
        expected = np.zeros((28, 28), np.float32)
        expected[:, start : start + 28 - narrower] = np.asarray(resized)
        np.testing.assert_allclose(got[0].numpy(), expected, atol=2e-6)


def test_a_square_is_erased():
    erased = erase(torch.ones(2, 1, 28, 28), torch.tensor([[4, 22], [10, 7]]))
    assert (erased == 0).sum() == 2 * 16
    assert erased[0, 0, 4:8, 22:26].sum() == erased[1, 0, 10:14, 7:11].sum() == 0


def normal_share(low: float, high: float) -> float:
    """How much of a normal distribution with σ = 0.33 is between two numbers of one sign."""
    return (math.erf(high / 0.33 / math.sqrt(2)) - math.erf(low / 0.33 / math.sqrt(2))) / 2


def test_changes_are_drawn_as_the_authors_draw_them(changes):
    count, more = len(changes.degrees_B), 0.004  # over three standard deviations of a share
    degrees = changes.degrees_B
    assert (degrees.trunc() == degrees).all()
    assert (degrees.min(), degrees.max()) == (-29, 29), "30 · 0.9999, cut"
    turned = degrees != 0
    assert turned.sum() / count == pytest.approx(0.5 - normal_share(0, 1 / 30), abs=more)
    assert (degrees == 29).sum() / count == pytest.approx(
        (0.5 - normal_share(0, 29 / 30)) / 2, abs=more
    )
    assert (degrees == -7).sum() / count == pytest.approx(
        normal_share(7 / 30, 8 / 30) / 2, abs=more
    )
    assert changes.back_B2.float().mean(0).tolist() == pytest.approx([0.5, 0.5], abs=more)
    assert changes.share_B2.min() >= 0
    assert changes.share_B2.max() == pytest.approx(0.9999)
    half = (changes.share_B2 < 0.2).float().mean(0).tolist()
    assert half == pytest.approx([2 * normal_share(0, 0.2)] * 2, abs=more)
    shares = [2 * normal_share(n / 7, (n + 1) / 7) for n in range(6)]
    shares.append(1 - sum(shares))
    narrower = changes.narrower_px_B.bincount(minlength=8) / count
    assert narrower.tolist() == pytest.approx([0, *shares], abs=more)
    later = changes.later_px_B.bincount() / count
    assert later.tolist() == pytest.approx(
        [2 * normal_share(0, 0.5), 1 - 2 * normal_share(0, 0.5)], abs=more
    )
    for axis in range(2):
        places = changes.erased_px_B2[:, axis].bincount() / count
        assert places.tolist() == pytest.approx([0] * 4 + [1 / 19] * 19, abs=more)


def test_what_is_drawn_is_independent(changes):
    columns = [changes.degrees_B, *changes.back_B2.T, *changes.share_B2.T, changes.narrower_px_B]
    columns += [changes.later_px_B, *changes.erased_px_B2.T]
    correlations = torch.corrcoef(torch.stack([column.float() for column in columns]))
    assert (correlations - torch.eye(9)).abs().max() < 0.012


def test_training_images_are_augmented_and_no_others(digits):
    """As a function of the seed and the position alone; the decoder is to draw what is seen."""
    split = load_data("mnist5k", *AUGMENTED).train
    batches = TrainingBatches(split, 3, 50)
    indices, positions = batches.draw(9)
    batch = batches.batch(9)
    plain = split.batch(indices).images_BCHW
    assert torch.equal(batch.images_BCHW, augment(plain, positions, 3).clamp(0, 1))
    assert torch.equal(batch.images_BCHW, batch.targets_BTCHW[:, 0])
    parts = [
        split.training_batch(i, p, 3).images_BCHW
        for i, p in zip(indices.split(7), positions.split(7))
    ]
    assert torch.equal(torch.cat(parts), batch.images_BCHW), "whichever images it is made with"
    assert not torch.equal(TrainingBatches(split, 4, 50).batch(9).images_BCHW, batch.images_BCHW)
    again = split.training_batch(indices, positions + 1, 3).images_BCHW
    assert (again != batch.images_BCHW).flatten(1).any(1).all()
    test = load_data("mnist5k", *AUGMENTED).test
    assert torch.equal(test.batch(torch.arange(0, 1000, 17)).images_BCHW, digits)


def test_colours_and_other_sizes():
    images = torch.zeros(64, 3, 40, 40)
    images[:, :, 12:30, 15:22] = torch.rand(64, 3, 18, 7)
    changed = augment(images, torch.arange(64), 0)
    assert changed.shape == images.shape
    assert changed.isfinite().all()
    assert draw_changes(torch.arange(20_000), 0, 40).narrower_px_B.max() == 10


@pytest.mark.parametrize(
    ("words", "message"),
    [
        (["dataset=mnist5k", AUGMENTED[0]], r"say dataset\.shift_px=0"),
        (["dataset=mnist5k", *AUGMENTED, "dataset.image_px=9"], "at least 10 px"),
        (["dataset=multimnist", FROM_5K, AUGMENTED[0]], "no effect"),
        (["dataset=affnist_like", FROM_5K, AUGMENTED[0]], "no effect"),
    ],
)
def test_images_that_cannot_be_augmented_are_refused(words, message):
    with pytest.raises(UserError, match=message):
        load_data(words[0].partition("=")[2], *words[1:])


def test_the_authors_order_of_capsnet_is_not_of_augmented_images():
    split = load_data("mnist5k", *AUGMENTED).train
    with pytest.raises(UserError, match="not changed otherwise"):
        TrainingBatches(split, 0, 16, order="authors")


def test_results_from_before_there_was_augmentation_are_those_without_it():
    config = train_config()
    now = dataclasses.asdict(config)
    before = {**now, "dataset": {k: v for k, v in now["dataset"].items() if k != "augment"}}
    assert from_dict(type(config), before) == config
    assert deciding(before) == deciding(now)
    augmented = dataclasses.asdict(train_config(*AUGMENTED))
    differing = dict(deciding(augmented).items() - deciding(now).items())
    assert differing.keys() == {"dataset.augment", "dataset.shift_px"}
    assert "dataset.augment" in dict(flattened(now))
