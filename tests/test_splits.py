"""Data sets that are made of others: where digits are put, how they are paired and transformed."""

import numpy as np
import pytest
import torch
from conftest import MNIST_DIR, train_config

from capsrun.data import affnist_like, load_dataset
from capsrun.data.affnist_like import Transforms, ink_extent, warp
from capsrun.data.multimnist import ink_overlap
from capsrun.data.splits import StoredImages, TrainingBatches, check_shift, standardise, vary
from capsrun.errors import UserError

CPU = torch.device("cpu")
FROM_5K = "dataset.source=mnist5k"
needs_mnist = pytest.mark.skipif(not MNIST_DIR.is_dir(), reason=f"no MNIST in {MNIST_DIR}")


def load(name, *overrides, device=CPU):
    config = train_config(f"dataset={name}", FROM_5K, *overrides).dataset
    return load_dataset(config, device)


@pytest.fixture(scope="module")
def digits():
    """The digits of which the data sets of these tests are made."""
    return load_dataset(train_config("dataset=mnist5k").dataset, CPU)


def everything(split, count=None):
    return split.batch(split.indices(0, len(split) if count is None else count))


# By number


@pytest.mark.parametrize("name", ["mnist5k", "multimnist", "mnist_padded", "affnist_like"])
def test_an_image_by_its_number(name):
    split = plain_split("test") if name == "mnist5k" else load(name).test
    last = len(split) - 1
    for index in (0, 7, last, np.int64(7), torch.tensor(7)):
        image, label = split[index]
        batch = split.batch(torch.tensor([int(index)]))
        assert torch.equal(image, batch.images_BCHW[0])
        assert 0 <= image.min() < image.max() <= 1
        if split.digits == 1:
            assert type(label) is int
            assert label == int(batch.labels_BT)
        else:
            assert torch.equal(label, batch.labels_BT[0])
    for index, same in ((-1, last), (-last - 1, 0)):
        assert torch.equal(split[index][0], split[same][0])
    for beyond in (last + 1, -last - 2, 10**30):
        with pytest.raises(IndexError, match="there is no image"):
            split[beyond]
    for wrong in (slice(3), [0, 1], "0", 1.0, None, torch.tensor([0, 1])):
        with pytest.raises(TypeError, match=r"by its number, not .*split\.batch\(indices\)"):
            split[wrong]


def plain_split(part, *overrides):
    return load_dataset(train_config("dataset=mnist5k", *overrides).dataset, CPU).split(part)


def test_iteration_ends():
    few = plain_split("validation", "dataset.validation=3")
    assert [label for _, label in few] == few.labels_N.tolist()
    assert len(list(few)) == len(few) == 3


@pytest.mark.parametrize("workers", [0, 2])
@pytest.mark.parametrize("name", ["mnist5k", "multimnist"])
def test_a_data_loader_takes_a_split(name, workers):
    split = plain_split("test") if name == "mnist5k" else load(name).test
    some = torch.utils.data.Subset(split, range(50))
    loader = torch.utils.data.DataLoader(some, 16, shuffle=True, num_workers=workers)
    found = [(images, labels) for images, labels in loader]
    images, labels = map(torch.cat, zip(*found))
    expected = split.batch(torch.arange(50))
    assert images.shape == expected.images_BCHW.shape
    assert labels.dtype == torch.int64
    assert labels.shape == ((50,) if name == "mnist5k" else (50, 2))
    ours, theirs = (t.flatten(1).sum(1).sort().values for t in (images, expected.images_BCHW))
    torch.testing.assert_close(ours, theirs)
    whole = torch.utils.data.DataLoader(split, 16, shuffle=True)
    assert next(iter(whole))[0].shape == (16, *images.shape[1:])


@pytest.mark.parametrize("name", ["mnist5k", "multimnist", "mnist_padded", "affnist_like"])
def test_what_a_data_set_shows_of_itself_is_one_line(name):
    overrides = [] if name == "mnist5k" else [FROM_5K]
    dataset = load_dataset(train_config(f"dataset={name}", *overrides).dataset, CPU)
    shown = [repr(dataset), repr(dataset.train), repr(dataset.validation), repr(dataset.test)]
    assert all(len(line) < 100 and "\n" not in line and name in line for line in shown)
    assert f"{len(dataset.test):,} images" in shown[3]


# Padded MNIST


def assert_whole(batch, digits_NCHW):
    """Fail where an image has not all the ink of its digit."""
    ink = digits_NCHW.sum((1, 2, 3), dtype=torch.int64)
    torch.testing.assert_close(batch.images_BCHW.sum((1, 2, 3)) * 255, ink.float())


def test_padded_training_digits_go_everywhere_and_stay_whole(digits):
    batches = TrainingBatches(load("mnist_padded").train, 0, 2000)
    seen = set()
    for step in range(2):
        indices, positions = batches.draw(step)
        batch = batches.assemble(indices, positions)
        assert batch.images_BCHW.shape == (2000, 1, 40, 40)
        own_NCHW = digits.train.images_NCHW[indices]
        assert_whole(batch, own_NCHW)
        first, own = (
            (images > 0).any(3).int().argmax(2)[:, 0] for images in (batch.images_BCHW, own_NCHW)
        )
        seen |= set((first - own).tolist())
    assert seen == set(range(13)), "all 13 rows"


def test_padded_digits_can_reach_the_border(digits):
    images = load("mnist_padded", "dataset.shift_px=10").test.batch(torch.arange(1000)).images_BCHW
    ink = digits.test.images_NCHW[:1000].sum((1, 2, 3), dtype=torch.int64)
    kept = images.sum((1, 2, 3)) * 255 / ink
    assert kept.mean() > 0.99
    borders = images[:, 0, 0], images[:, 0, -1], images[:, 0, :, 0], images[:, 0, :, -1]
    assert all(border.any() for border in borders)


def test_padded_test_digits_have_one_place_or_all_169(digits):
    test = load("mnist_padded").test
    assert len(test) == 1000
    batch = everything(test)
    assert_whole(batch, digits.test.images_NCHW)
    assert torch.equal(batch.labels_BT[:, 0], digits.test.labels_N)
    offsets = test.offsets(test.indices(0, 1000))
    assert (offsets.min(), offsets.max()) == (0, 12)
    test = load("mnist_padded", "dataset.test=all").test
    assert len(test) == 169 * 1000
    # Every place of digit 5, and what is there.
    of_digit = 5 + 1000 * torch.arange(169)
    assert len({tuple(offset) for offset in test.offsets(of_digit).tolist()}) == 169
    batch = test.batch(of_digit)
    for (row, column), image in zip(test.offsets(of_digit).tolist(), batch.images_BCHW):
        cut = image[:, row : row + 28, column : column + 28]
        torch.testing.assert_close(cut * 255, digits.test.images_NCHW[5].float())
        assert image.sum() == pytest.approx(cut.sum().item())


# MultiMNIST


def test_pairs_are_of_different_classes_and_of_the_same_split(digits):
    dataset = load("multimnist")
    assert (len(dataset.train), len(dataset.test)) == (4000 * 1000, 1000 * 10)
    for split, own in ((dataset.train, digits.train), (dataset.test, digits.test)):
        indices = torch.randint(0, len(split), (5000,), generator=torch.Generator().manual_seed(0))
        labels = split.labels(indices)
        assert (labels[:, 0] != labels[:, 1]).all()
        assert torch.equal(labels, own.labels_N[split.pairs(indices)])
    images = {image.numpy().tobytes() for image in digits.test.images_NCHW}
    assert {image.numpy().tobytes() for image in dataset.test.digits_NCHW} == images


def test_a_pair_is_its_two_digits_added_and_clipped(digits):
    test = load("multimnist").test
    indices = torch.tensor([0, 5, 4321, 9999])
    batch = test.batch(indices)
    offsets, pairs = test.offsets(indices), test.pairs(indices)
    for n in range(4):
        total = torch.zeros(36, 36, dtype=torch.int64)
        for t in range(2):
            row, column = offsets[n, t].tolist()
            alone = torch.zeros(36, 36, dtype=torch.int64)
            alone[row : row + 28, column : column + 28] = digits.test.images_NCHW[pairs[n, t], 0]
            torch.testing.assert_close(batch.targets_BTCHW[n, t, 0] * 255, alone.float())
            total += alone
        assert total.max() > 255, "no clipping in this example"
        torch.testing.assert_close(batch.images_BCHW[n, 0] * 255, total.clamp(max=255).float())


@pytest.mark.parametrize("name", ["multimnist", "mnist_padded", "affnist_like"])
def test_image_k_is_image_k_whatever_the_batch_and_fixed_by_seed(name):
    split = load(name).test
    indices = torch.tensor([len(split) - 1, 17, 991])
    together = split.batch(indices)
    for n, index in enumerate(indices):
        alone = split.batch(index[None])
        for ours, theirs in zip(alone[:3], together[:3]):
            assert torch.equal(ours[0], theirs[n])
    assert torch.equal(load(name).test.batch(indices).images_BCHW, together.images_BCHW)
    other = load(name, "dataset.split_seed=1").test.batch(indices)
    assert not torch.equal(other.images_BCHW, together.images_BCHW)


@pytest.mark.gpu
@pytest.mark.parametrize("name", ["multimnist", "mnist_padded", "affnist_like"])
def test_image_k_is_image_k_on_a_gpu(name):
    here, there = load(name).test, load(name, device=torch.device("cuda")).test
    indices = here.indices(0, 500)
    ours, theirs = here.batch(indices), there.batch(indices.cuda())
    assert torch.equal(ours.labels_BT, theirs.labels_BT.cpu())
    worst = (ours.images_BCHW - theirs.images_BCHW.cpu()).abs().max()
    # A transformed pixel may be rounded to the next byte.
    assert worst < (1.1 / 255 if name == "affnist_like" else 1e-6)


def test_no_partner_comes_twice_and_the_base_keeps_its_shift():
    split = load("multimnist").train
    base = 77
    images = base + 4000 * torch.arange(1000)
    pairs = split.pairs(images)
    assert (pairs[:, 0] == base).all()
    assert len(pairs[:, 1].unique()) == 1000
    offsets = split.offsets(images)
    assert len(offsets[:, 0].unique(dim=0)) == 1
    assert len(offsets[:, 1].unique(dim=0)) == 81, "all shifts of up to 4 px along each axis"


def test_an_epoch_of_pairs_has_every_base_once_and_the_next_has_other_partners():
    train = load("multimnist").train
    assert train.epoch_images == 4000
    batches = TrainingBatches(train, 0, 4000)
    first, second = (train.pairs(p // 4000 % 1000 * 4000 + i) for i, p in map(batches.draw, (0, 1)))
    assert torch.equal(first[:, 0].sort().values, torch.arange(4000))
    assert torch.equal(second[:, 0].sort().values, torch.arange(4000))
    partner = dict(first.tolist())
    assert sum(partner[b] == p for b, p in second.tolist()) == 0
    batch = batches.batch(1)
    assert torch.equal(batch.labels_BT, train.labels_N[second])


def test_the_default_test_images_are_the_first_of_all():
    sample, whole = load("multimnist").test, load("multimnist", "dataset.test=all").test
    assert len(whole) == 1000 * 900, "of 1,000 test digits 900 are of other classes"
    indices = torch.tensor([0, 9_999])
    assert torch.equal(sample.batch(indices).images_BCHW, whole.batch(indices).images_BCHW)


@needs_mnist
def test_multimnist_has_the_size_and_the_overlap_of_the_paper(monkeypatch):
    monkeypatch.setenv("CAPSRUN_DATA", str(MNIST_DIR))
    dataset = load_dataset(train_config("dataset=multimnist").dataset, CPU)
    assert (len(dataset.train), len(dataset.test)) == (60_000_000, 100_000)
    whole = load_dataset(train_config("dataset=multimnist", "dataset.test=all").dataset, CPU)
    assert len(whole.test) == 10_000_000
    overlap = dataset.test.frame_overlap(dataset.test.indices(0, 100_000)).mean().item()
    assert overlap == pytest.approx(0.80, abs=0.005), "§6: 80 % on average"
    # Of the ink itself: what was measured here; the paper reports no such number.
    ink = ink_overlap(everything(dataset.test, 10_000).targets_BTCHW).mean().item()
    assert ink == pytest.approx(0.727, abs=0.01)
    # The shifts of the authors' README, which may push a digit's frame over the edge.
    wider = load_dataset(train_config("dataset=multimnist", "dataset.shift_px=6").dataset, CPU)
    assert wider.test.frame_overlap(torch.arange(10_000)).mean() < 0.75
    assert wider.test.offsets(torch.arange(999)).min() == -2


def test_overlap_of_boxes_by_hand():
    digits = torch.zeros(3, 2, 1, 10, 10)
    digits[:, 0, 0, 2:6, 1:5] = 1  # 4×4
    digits[0, 1, 0, 4:6, 3:5] = 1  # 2×2, inside
    digits[1, 1, 0, 4:8, 3:7] = 1  # 4×4, of which 2×2 common
    digits[2, 1, 0, 7:9, 7:9] = 1  # apart
    assert ink_overlap(digits).tolist() == [1.0, 0.25, 0.0]


# In the way of affNIST


def transforms(**values):
    names = dict.fromkeys(Transforms._fields, 0.0) | {"row_scale_B": 1.0, "column_scale_B": 1.0}
    return Transforms(*(torch.tensor([float(v)]) for v in (names | values).values()))


def warped(image_HW, canvas_px=11, **values):
    return warp(image_HW[None, None].float(), transforms(**values), canvas_px)[0, 0]


def spot(row, column, side=11):
    image = torch.zeros(side, side)
    image[row, column] = 1
    return image


def test_warps_by_hand():
    """The middle of 11×11 pixels is (5, 5); a spot right of it and one above it."""
    right, above = spot(5, 8), spot(2, 5)
    torch.testing.assert_close(warped(right), right)
    torch.testing.assert_close(warped(right, column_shift_px_B=-2), spot(5, 6))
    torch.testing.assert_close(warped(right, row_shift_px_B=1), spot(6, 8))
    counter_clockwise = warped(right, rotation_degrees_B=90)
    torch.testing.assert_close(counter_clockwise, above, atol=1e-5, rtol=0)
    # Sheared by 1/3: three rows up is one column to the left.
    torch.testing.assert_close(warped(above, shear_B=1 / 3), spot(2, 4), atol=1e-5, rtol=0)
    assert warped(above, row_scale_B=4 / 3)[1, 5] == pytest.approx(1)
    assert warped(right, column_scale_B=4 / 3)[5, 9] == pytest.approx(1)
    # Rotated after it was scaled: the columns' scale has moved it, then it is turned upwards.
    both = warped(right, column_scale_B=4 / 3, rotation_degrees_B=90)
    assert both[1, 5] == pytest.approx(1, abs=1e-5)


def test_affnist_like_transforms_are_spread_as_they_should_be():
    test = load("affnist_like").test
    assert len(test) == 32_000
    found = test.transforms(test.indices(0, 32_000))
    for values, low, high in [
        (found.rotation_degrees_B, -20, 20),
        (found.shear_B, -0.2, 0.2),
        (found.row_scale_B, 0.8, 1.2),
        (found.column_scale_B, 0.8, 1.2),
    ]:
        size = high - low
        assert low - 1e-6 <= values.min() < low + 0.001 * size
        assert high - 0.001 * size < values.max() <= high + 1e-6
        # The standard error of the mean of a uniform number is size / √(12 · 32,000).
        assert abs(values.mean() - (low + high) / 2) < 5 * size / (12 * 32_000) ** 0.5
        assert values.std() == pytest.approx(size / 12**0.5, rel=0.02)


def test_affnist_like_keeps_all_ink_on_the_canvas(digits):
    """On a larger canvas nothing more is seen, and the ink is that of the digit, scaled."""
    test = load("affnist_like").test
    indices = torch.randperm(32_000, generator=torch.Generator().manual_seed(0))[:2000]
    batch = test.batch(indices)
    how = test.transforms(indices)
    own = digits.test.images_NCHW[indices % 1000].float()
    wide = warp(own, how, 60)
    border = wide.clone()
    border[..., 10:50, 10:50] = 0
    assert border.max() < 1e-3, "ink beyond the canvas"
    inside = wide[..., 10:50, 10:50]
    torch.testing.assert_close(batch.images_BCHW * 255, inside.round(), atol=0.01, rtol=0)
    scale = how.row_scale_B * how.column_scale_B
    ratio = batch.images_BCHW.sum((1, 2, 3)) * 255 / own.sum((1, 2, 3)) / scale
    assert ratio.mean() == pytest.approx(1, abs=0.003)
    assert (ratio - 1).abs().max() < 0.2
    # Ink comes to the border, too: places are not kept to the middle.
    seen = (batch.images_BCHW > 0).any(0)[0]
    assert all(edge.any() for edge in (seen[0], seen[-1], seen[:, 0], seen[:, -1]))


def test_affnist_like_has_32_versions(digits):
    test = load("affnist_like").test
    batch = test.batch(3 + 1000 * torch.arange(32))
    assert (batch.labels_BT == digits.test.labels_N[3]).all()
    assert len({image.numpy().tobytes() for image in batch.images_BCHW}) == 32
    # Bytes, as those of affNIST are.
    torch.testing.assert_close(batch.images_BCHW * 255, (batch.images_BCHW * 255).round())


def test_a_digit_that_is_too_large_at_first_is_drawn_again(monkeypatch, digits):
    config = train_config("dataset=affnist_like").dataset
    full = torch.full((1, 1, 28, 28), 255, dtype=torch.uint8)
    split = affnist_like.TransformedDigits(full, torch.tensor([0]), config)
    how = split.transforms(torch.arange(32))
    # A full square of 28 px needs more than 40 px when it is large and turned.
    assert how.row_scale_B.max() < 1.2
    border = warp(full.float().expand(32, -1, -1, -1), how, 60)
    border[..., 10:50, 10:50] = 0
    assert border.max() < 1e-2
    monkeypatch.setattr(affnist_like, "ATTEMPTS", 1)
    with pytest.raises(UserError, match="do not fit"):
        split.transforms(torch.arange(32))


def test_places_are_uniform_among_those_at_which_no_ink_is_lost(digits):
    test = load("affnist_like").test
    indices = torch.randperm(32_000, generator=torch.Generator().manual_seed(1))[:8000]
    how = test.transforms(indices)
    own = digits.test.images_NCHW[indices % 1000]
    first, last = ink_extent(own, how.matrices())
    # The middle is pixel 19.5; ink may reach the pixels −1 and 40 around the canvas.
    low, high = -20.5 - first, 20.5 - last
    moved = torch.stack([how.row_shift_px_B, how.column_shift_px_B], 1)
    share = (moved - low) / (high - low)
    assert share.min() >= -1e-5
    assert share.max() <= 1 + 1e-5
    for axis in range(2):
        tenths = (share[:, axis] * 10).long().clamp(max=9).bincount(minlength=10)
        assert (tenths - 800).abs().max() < 140, "five standard deviations"
    assert abs(torch.corrcoef(share.T)[0, 1]) < 0.05


# Changes of photos


def photos(count=500, **settings):
    changes = [f"dataset.{key}={value}" for key, value in settings.items()]
    config = train_config("dataset=mnist", "dataset.channels=3", *changes).dataset
    images = torch.randint(60, 200, (count, 3, 32, 32), dtype=torch.uint8)
    return StoredImages(images, torch.zeros(count, dtype=torch.int64), config)


def test_crops_come_from_everywhere_and_in_testing_from_the_middle():
    split = photos(image_px=24, shift_px=4)
    batch = everything(split)
    torch.testing.assert_close(batch.images_BCHW * 255, split.images_NCHW[:, :, 4:28, 4:28].float())
    indices = torch.arange(500)
    moved = split.training_batch(indices, indices, 0).images_BCHW * 255
    corners = set()
    for image, crop in zip(split.images_NCHW.float(), moved):
        found = [
            (row, column)
            for row in range(9)
            for column in range(9)
            if torch.allclose(image[:, row : row + 24, column : column + 24], crop, atol=0.01)
        ]
        assert len(found) == 1, "each crop is a part of its own image"
        corners |= set(found)
    assert len(corners) > 75, "81 places, 500 crops"


def test_half_of_the_images_are_mirrored():
    split = photos(image_px=32, shift_px=0, flip="true")
    indices = torch.arange(500)
    changed = split.training_batch(indices, indices, 0).images_BCHW * 255
    same = (changed - split.images_NCHW).abs().amax((1, 2, 3)) < 0.01
    mirrored = (changed - split.images_NCHW.flip(3)).abs().amax((1, 2, 3)) < 0.01
    assert (same ^ mirrored).all()
    assert 200 < mirrored.sum() < 300
    assert torch.equal(everything(split).images_BCHW * 255, split.images_NCHW.float())


@pytest.mark.parametrize(("px", "shift"), [(25, 4), (24, 5), (31, 1)])
def test_crops_beyond_the_edge_of_a_photo_are_refused(px, shift):
    with pytest.raises(UserError, match="at most"):
        check_shift(photos(1, image_px=px, shift_px=shift).config, 32)


def test_brightness_and_contrast_by_hand():
    config = photos(brightness=0.25, contrast=0.5).config
    pixels = 0.3 + 0.4 * torch.rand(400, 3, 8, 8)
    changed = vary(pixels, torch.arange(400), 0, config)
    moved = (changed - pixels).mean((1, 2, 3))
    assert 0.24 < moved.abs().max() <= 0.25
    assert abs(moved.mean()) < 0.03
    # The contrast changes about the mean of each channel.
    factor = changed.std((2, 3)) / pixels.std((2, 3))
    torch.testing.assert_close(factor[:, 0], factor[:, 1])
    assert 0.5 <= factor.min() < 0.52
    assert 1.48 < factor.max() <= 1.5 + 1e-5


def test_standardised_images_have_mean_0_and_deviation_1():
    images = 0.2 + 0.5 * torch.rand(4, 3, 8, 8)
    images[3] = 0.7
    seen = standardise(images)
    torch.testing.assert_close(seen.mean((1, 2, 3)), torch.zeros(4), atol=1e-5, rtol=0)
    torch.testing.assert_close(seen[:3].flatten(1).std(1, unbiased=False), torch.ones(3))
    assert seen[3].abs().max() < 1e-4, "an image of one grey"
    split = photos(image_px=32, shift_px=0, standardise="true")
    batch = everything(split)
    torch.testing.assert_close(batch.targets_BTCHW[:, 0] * 255, split.images_NCHW.float())
    torch.testing.assert_close(batch.images_BCHW, standardise(batch.targets_BTCHW[:, 0]))


def test_training_images_are_a_function_of_seed_and_step_whatever_changes_them():
    changed = photos(image_px=24, shift_px=4, flip="true", brightness=0.2, contrast=0.5)
    for split in (changed, load("mnist_padded").train):
        first = TrainingBatches(split, 3, 50).batch(5)
        assert torch.equal(TrainingBatches(split, 3, 50).batch(5).images_BCHW, first.images_BCHW)
        other = TrainingBatches(split, 4, 50).batch(5)
        assert not torch.equal(first.images_BCHW, other.images_BCHW)
        assert first.targets_BTCHW.min() >= 0
        assert first.targets_BTCHW.max() <= 1


# What does not fit together


@pytest.mark.parametrize(
    ("name", "override", "message"),
    [
        ("mnist_padded", "dataset.shift_px=11", "at most 10 px"),
        ("mnist_padded", "dataset.image_px=28", "at most 4 px"),
        ("mnist_padded", "dataset.image_px=20", "made of images of 28 px"),
        ("multimnist", "dataset.shift_px=7", "at most 6 px"),
        ("multimnist", "dataset.image_px=20", "made of images of 28 px"),
        ("multimnist", "dataset.digits=1", "2 digit"),
        ("multimnist", "dataset.flip=true", "no effect"),
        ("mnist_padded", "dataset.standardise=true", "no effect"),
        ("affnist_like", "dataset.shift_px=2", "no effect"),
        ("affnist_like", "dataset.test=sample", "mnist_padded and multimnist"),
        ("multimnist", "dataset.source=cifar10", "one of: mnist, mnist5k"),
        ("multimnist", "dataset.classes=3", "10 classes"),
    ],
)
def test_settings_that_do_not_fit_are_refused(name, override, message):
    with pytest.raises(UserError, match=message):
        load(name, override)


def test_validation_digits_have_their_own_places_and_pairs():
    dataset = load("mnist_padded", "dataset.validation=500")
    ours, theirs = (s.offsets(torch.arange(500)) for s in (dataset.validation, dataset.test))
    assert not torch.equal(ours, theirs)
    dataset = load("multimnist", "dataset.validation=500")
    assert (len(dataset.train), len(dataset.validation)) == (3500 * 1000, 500 * 10)
    train = {image.numpy().tobytes() for image in dataset.train.digits_NCHW}
    assert not train & {image.numpy().tobytes() for image in dataset.validation.digits_NCHW}
