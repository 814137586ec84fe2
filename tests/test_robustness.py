"""Images that are rotated, moved, scaled or attacked, and detection by reconstruction."""

import json
from pathlib import Path

import pytest
import torch
from conftest import (
    TINY,
    load_data,
    make_model,
    needs_compiler,
    stored,
    train_config,
    untrained,
)

from capsrun.commands import robustness
from capsrun.commands.robustness import folder_parts, undetected
from capsrun.compose import compose
from capsrun.config import EvalConfig
from capsrun.data.warped import Noise, warped
from capsrun.experiments import settings_for
from capsrun.models.layers import take
from capsrun.report.rows import grouped
from capsrun.runs.checkpoint import load_checkpoint
from capsrun.runs.reader import find_results, find_runs
from capsrun.training import attacks, detection
from capsrun.training.attacks import Attack, Network, attack_split, attacked, step_size

PLAIN = ["eval", "dataset=mnist5k", "images=60", "device=cpu", "precision=fp32"]
PLAIN += ["pictures=1", "routing_images=[]"]
EFFICIENT = ["dataset=mnist5k", "model=efficient_capsnet", "model.channels=[4,4,4]"]
CNN = ["model=cnn_authors", "model.channels=[4,4]", "model.hidden=[8]"]


def eval_config(*words: str) -> EvalConfig:
    return settings_for(EvalConfig, compose("eval", ["dataset=mnist5k", *words]))


def attack_of(*words: str):
    """The settings of an attack, bim unless it is said."""
    return eval_config(*([] if "attack=pgd" in words else ["attack=bim"]), *words).attack


@pytest.fixture(scope="module")
def digits():
    return load_data("mnist5k").test


def network(*words: str, fast: bool = False) -> Network:
    """An untrained tiny network with weights that are large enough to say something."""
    is_capsnet = not any(word.startswith("model=") for word in words)
    config = train_config(*(TINY[:3] if is_capsnet else TINY[:1]), *words)
    model = make_model(config)
    take(model, fast=fast)
    if model.decoder is not None:
        with torch.no_grad():
            model.primarycaps.weight.mul_(20)
            model.digitcaps.weight.mul_(10)
            if "routing=self_routing" in words:  # which begins with equal shares for all
                generator = torch.Generator().manual_seed(0)
                model.digitcaps.routing_weight.normal_(generator=generator)
    return Network(model, config.loss)


def result_of(folder: Path) -> dict:
    (file,) = folder.glob("result.json")
    return json.loads(file.read_text())


# What is done to images


def test_rotation_is_counter_clockwise_and_exact_at_right_angles():
    image = torch.randint(0, 256, (1, 1, 6, 6), dtype=torch.uint8)
    split = stored(image, torch.zeros(1, dtype=torch.int64))
    turned = warped(split, "rotate", 90.0).batch(torch.tensor([0])).images_BCHW
    assert torch.allclose(turned, (image / 255).rot90(1, (2, 3)), atol=1e-5)


def test_each_image_is_moved_in_the_direction_of_its_number_and_cut_off():
    image = torch.zeros(5, 1, 5, 5, dtype=torch.uint8)
    image[:, :, 2, 4] = 255  # in the last column
    split = stored(image, torch.zeros(5, dtype=torch.int64))
    moved = warped(split, "shift", 1.0).batch(torch.arange(5)).images_BCHW.round()
    places = [m.nonzero()[:, 1:].tolist() for m in moved]
    assert places == [[], [[3, 4]], [[2, 3]], [[1, 4]], []]  # right, down, left, up, right
    half = warped(split, "shift", 0.5).batch(torch.tensor([2])).images_BCHW[0, 0, 2]
    assert torch.allclose(half, torch.tensor([0, 0, 0, 0.5, 0.5]), atol=1e-5)


def test_scale_is_about_the_middle_and_what_comes_in_is_black():
    split = stored(torch.full((1, 1, 9, 9), 255, dtype=torch.uint8), torch.zeros(1).long())
    half = warped(split, "scale", 0.5).batch(torch.tensor([0])).images_BCHW[0, 0]
    assert torch.allclose(half[2:7, 2:7], torch.ones(5, 5))
    assert float(half.sum()) == pytest.approx(25, rel=0.01)
    assert torch.equal(
        warped(split, "scale", 3.0).batch(torch.tensor([0])).images_BCHW[0, 0], torch.ones(9, 9)
    )


@pytest.mark.parametrize(("how", "value"), [("rotate", 0), ("shift", 0), ("scale", 1)])
def test_what_changes_nothing_is_the_split_itself(digits, how, value):
    assert warped(digits, how, value) is digits


def test_two_digits_are_changed_with_their_targets():
    pairs = load_data("multimnist", "dataset.source=mnist5k").test
    batch = warped(pairs, "rotate", 90.0).batch(torch.arange(3))
    as_they_are = pairs.batch(torch.arange(3))
    for name in ("images_BCHW", "targets_BTCHW"):
        turned = getattr(as_they_are, name).rot90(1, (-2, -1))
        assert torch.allclose(getattr(batch, name), turned, atol=1e-4)


def test_standardised_images_are_standardised_after_they_are_changed():
    images = torch.randint(0, 256, (2, 1, 8, 8), dtype=torch.uint8)
    split = stored(images, torch.zeros(2, dtype=torch.int64))
    split.config.standardise = True
    seen = warped(split, "scale", 0.5).batch(torch.arange(2)).images_BCHW
    assert torch.allclose(seen.mean((1, 2, 3)), torch.zeros(2), atol=1e-5)


def test_noise_is_the_same_again_and_uniform():
    noise = Noise(torch.zeros(40, dtype=torch.int64), train_config("dataset=mnist5k").dataset)
    images = noise.batch(torch.arange(40)).images_BCHW
    assert torch.equal(images[7:8], noise.batch(torch.tensor([7])).images_BCHW)
    assert float(images.mean()) == pytest.approx(0.5, abs=0.01)
    assert images.flatten(1).unique(dim=0).shape[0] == 40


# Attacks


@pytest.mark.parametrize(
    "words",
    [
        [],
        CNN,
        ["routing.detach=true"],
        ["routing.iterations=1"],
        ["routing=em"],
        ["routing=em", "routing.shared=true"],
        ["routing=self_attention"],
        ["routing=self_routing"],
        EFFICIENT,
    ],
)
@pytest.mark.parametrize("loss", ["trained", "difference"])
def test_gradients_are_those_of_finite_differences(digits, words, loss):
    """Also through the routing of a network that was trained without that gradient."""
    net = network(*words)
    net.model.double()
    attack = Attack(net, digits, attack_of(f"attack.loss={loss}"))
    # Where pixels are alike, max-pooling has no derivative.
    noise = Noise(torch.zeros(2, dtype=torch.int64), digits.config).batch(torch.arange(2))
    images, labels = 0.1 + 0.8 * noise.images_BCHW.double(), digits.batch(torch.arange(2)).labels_BT
    with attacked(net.model):
        gradient = attack.gradient(images, labels)
        direction = torch.randn(images.shape, generator=torch.Generator().manual_seed(1)).double()
        # The logits of a CNN are float32 in any case: there the slope is to be a large one.
        direction, step = (gradient.sign(), 1e-4) if words is CNN else (direction, 1e-6)

        def height(step: float) -> float:
            moved = net.model(images + step * direction)
            return float(attacks.climbed(moved, labels, net, attack.config))

        slope = (height(step) - height(-step)) / (2 * step)
    within = 1e-2 if words is CNN else 1e-4
    assert float((gradient * direction).sum()) == pytest.approx(slope, rel=within, abs=1e-9)
    assert all(parameter.requires_grad for parameter in net.model.parameters())
    assert slope != 0


@needs_compiler
@pytest.mark.parametrize(
    "words", [[], ["model.padding=same", "routing.leaky=true"], ["routing.detach=true"]]
)
def test_the_fast_kernels_have_the_same_gradients(digits, words):
    plain, fast = network(*words), network(*words, fast=True)
    numbers = digits.indices(0, 40)  # enough for the convolution by its spectrum
    batch = digits.batch(numbers)
    found = []
    for net in (plain, fast):
        with attacked(net.model):
            attack = Attack(net, digits, attack_of("attack.loss=difference"))
            found.append(attack.gradient(batch.images_BCHW, batch.labels_BT))
    assert torch.allclose(*found, rtol=0, atol=5e-4 * float(found[0].abs().max()))
    assert float(found[0].abs().max()) > 0


@pytest.mark.parametrize("words", [[], ["attack=pgd"], ["attack.targeted=true"]])
def test_images_stay_within_epsilon_and_in_range(digits, words):
    net, epsilon = network(), 0.1
    attack = Attack(net, digits, attack_of("attack.steps=3", *words))
    numbers = digits.indices(0, 5)
    batch = digits.batch(numbers)
    with attacked(net.model):
        aims = attack.aims(batch.labels_BT, numbers)
        given = batch.images_BCHW, aims, numbers
        moved, _ = attack.perturb(*given, epsilon, 0)
        again, _ = attack.perturb(*given, epsilon, 0)
        unmoved, _ = attack.perturb(*given, 0.0, 0)
        other, _ = attack.perturb(*given, epsilon, 1)
    assert torch.equal(moved, again)
    assert torch.equal(other, moved) != ("attack=pgd" in words)
    assert torch.equal(unmoved, batch.images_BCHW)
    assert float((moved - batch.images_BCHW).abs().max()) <= epsilon + 1e-7
    assert float(moved.min()) >= 0
    assert float(moved.max()) <= 1
    assert not torch.equal(moved, batch.images_BCHW)


def test_a_random_start_is_of_the_image_whatever_the_batch(digits):
    net = network()
    attack = Attack(net, digits, attack_of("attack=pgd", "attack.steps=1"))
    with attacked(net.model):
        whole = digits.batch(torch.arange(4))
        four, _ = attack.perturb(whole.images_BCHW, whole.labels_BT, torch.arange(4), 0.2, 0)
        one = digits.batch(torch.tensor([2]))
        alone, _ = attack.perturb(one.images_BCHW, one.labels_BT, torch.tensor([2]), 0.2, 0)
    assert (four[2:3] - alone).abs().max() < 1e-6


def test_targets_are_other_classes_and_all_of_them_come():
    labels = torch.arange(10).repeat(50)[:, None]
    drawn = attacks.targets(labels, torch.arange(500), 10, 0)
    assert not bool((drawn == labels).any())
    assert len((drawn - labels).remainder(10).unique()) == 9
    assert not torch.equal(drawn, attacks.targets(labels, torch.arange(500), 10, 1))


def test_the_step_is_as_is_said():
    assert step_size(attack_of("attack.steps=1"), 0.3) == 0.3
    assert step_size(attack_of("attack.steps=10"), 0.2) == pytest.approx(0.05)
    assert step_size(attack_of("attack.step_size=0.01"), 0.2) == 0.01


def flat_net(digits) -> Network:
    """One that is so sure of all that the margin loss of each image is exactly 0."""
    net = network()
    net.loss.margin_present, net.loss.margin_absent = 0.0, 1.0
    return net


def test_the_margin_loss_is_flat_on_sure_images_and_the_difference_is_not(digits):
    net = flat_net(digits)
    for loss in ("trained", "difference"):
        settings = attack_of(f"attack.loss={loss}", "attack.epsilon=[0,0.1]", "attack.steps=2")
        unmoved, moved = attack_split(
            Attack(net, digits, settings), net.model, 60, iter, detect=False
        )
        right_N = ~unmoved.wrong_N  # others are left alone
        assert int(right_N.sum()) > 3
        assert torch.equal(moved.flat_N, right_N if loss == "trained" else right_N & False)


@pytest.fixture(scope="module")
def trained(tmp_path_factory) -> Path:
    """The folder of a run that has learnt something."""
    from capsrun.commands.train import train

    folder = tmp_path_factory.mktemp("robust") / "run" / "seed0"
    words = [w for w in TINY if "steps" not in w and "conv1" not in w]
    words += ["model.conv1_channels=8", "recipe.steps=60"]
    words += ["dataset.validation=100", "loss=paper", "name=run", "device=cpu", "precision=fp32"]
    train(train_config(*words), folder)
    return folder


def test_the_error_grows_with_epsilon(digits, trained):
    found = load_checkpoint(trained)
    net = Network(found.model, found.config.loss)
    errors = {}
    for words in (("attack.loss=difference",), ("attack=pgd", "attack.restarts=2")):
        settings = attack_of(*words, "attack.epsilon=[0,0.02,0.05,0.1,0.2]", "attack.steps=4")
        outcomes = attack_split(Attack(net, digits, settings), net.model, 60, iter, detect=True)
        errors[words] = [int(outcome.wrong_N.sum()) for outcome in outcomes]
        assert errors[words] == sorted(errors[words])
        assert errors[words][-1] > errors[words][0] + 10
        assert len(outcomes[0].distances_N) == 60
    aimed = attack_of("attack.targeted=true", "attack.epsilon=[0,0.3]", "attack.loss=difference")
    before, after = attack_split(Attack(net, digits, aimed), net.model, 60, iter, detect=False)
    assert int(after.fooled_N.sum()) > int(before.fooled_N.sum())


def test_more_starts_fool_more(digits, trained):
    found = load_checkpoint(trained)
    net = Network(found.model, found.config.loss)
    fooled = []
    for restarts in (1, 8):
        words = ("attack=pgd", "attack.epsilon=[0.03]", "attack.steps=1")
        settings = attack_of(*words, f"attack.restarts={restarts}")
        (outcome,) = attack_split(Attack(net, digits, settings), net.model, 60, iter, detect=False)
        fooled.append(outcome.fooled_N)
    assert bool((fooled[1] | ~fooled[0]).all())
    assert int(fooled[1].sum()) > int(fooled[0].sum())


def test_a_reconstructive_attack_fools_with_better_reconstructions(digits, trained):
    found = load_checkpoint(trained)
    net = Network(found.model, found.config.loss)
    outcomes = []
    for words in ([], ["attack.reconstructive=true"]):
        settings = attack_of("attack.loss=difference", "attack.epsilon=[0.1]", *words)
        attack = Attack(net, digits, settings)
        outcomes += attack_split(attack, net.model, 60, iter, detect=True)
    plain, disguised = outcomes
    both = plain.fooled_N & disguised.fooled_N
    assert int(disguised.fooled_N.sum()) >= int(plain.fooled_N.sum()) > 10
    assert bool((disguised.distances_N <= plain.distances_N)[both].float().mean() > 0.9)
    assert float((plain.distances_N - disguised.distances_N)[both].mean()) > 0.1


def test_a_standardised_image_of_one_grey_has_no_undefined_gradient():
    """Though it has no deviation to divide by."""
    split = stored(torch.zeros(3, 1, 28, 28, dtype=torch.uint8), torch.tensor([1, 2, 3]))
    split.config.standardise = True
    net = network("dataset.standardise=true")
    attack = Attack(net, split, attack_of("attack.reconstructive=true"))
    grey = torch.tensor([0, 0.4, 1])[:, None, None, None].expand(3, 1, 28, 28)
    labels = torch.tensor([[1], [2], [3]])
    with attacked(net.model):
        assert bool(attack.gradient(grey, labels).isfinite().all())
        assert bool(attack.disguise(grey, labels)[0].isfinite().all())


# Detection


def test_the_area_under_the_curve():
    real, other = torch.tensor([1.0, 2.0, 3.0, 4.0]), torch.tensor([2.5, 4.0, 9.0])
    # Of 12 pairs: 2.5 is above 2, 4.0 above 3 and beside one, 9 above 4.
    assert detection.roc_area(real, other) == pytest.approx((2 + 3.5 + 4) / 12)
    assert detection.roc_area(real, real) == 0.5
    curve = detection.roc_curve(real, real + 10)
    assert curve[0] == [0, 0]
    assert curve[1] == [0, 100]
    assert curve[-1] == [100, 100]


def test_five_percent_of_the_held_out_images_are_flagged():
    held = torch.arange(1000).float()
    threshold = detection.threshold_of(held)
    assert detection.flagged_percent(held, threshold) == 5


def test_the_distance_is_that_of_the_drawn_predicted_class(digits):
    model = network().model
    images = digits.batch(torch.arange(3)).images_BCHW
    with torch.no_grad():
        predicted, found = detection.distances(model, images, digits.config)
        output = model(images)
        assert torch.equal(predicted[:, 0], output.lengths_BJ.argmax(1))
        drawn = model.decode(output.capsules_BJD, predicted)[:, 0]
    assert torch.allclose(found, (drawn - images).square().sum((1, 2, 3)))


# The command


ALL = ["rotate=[0,30]", "shift=2", "scale=[1,1.5]", "attack=pgd", "attack.epsilon=[0,0.1]"]
ALL += ["attack.steps=2", "detect=[noise]"]


def test_all_of_it_at_once_beside_the_plain_test(trained, printed):
    plain = printed(*PLAIN, f"checkpoint={trained}")
    lines = printed(*PLAIN, f"checkpoint={trained}", *ALL)
    assert lines[-1] == plain[-1]
    folders = sorted(trained.glob("eval-*"), key=lambda folder: len(folder.name))
    assert folders[0].name == "eval-mnist5k-test-first60"
    assert folders[1].name.startswith(f"{folders[0].name}-rotate-shift-scale-attack-pgd-detect-")
    before, found = map(result_of, folders)
    same = ("errors", "count", "error_percent", "confusion", "reconstruction_squared_error")
    assert all(found[key] == before[key] for key in same)
    assert {how: [row["value"] for row in rows] for how, rows in found["curves"].items()} == {
        "rotate": [0, 30],
        "shift": [2],
        "scale": [1, 1.5],
    }
    for how in ("rotate", "scale"):
        assert found["curves"][how][0]["errors"] == before["errors"]
    assert "cut off" in found["border"]
    unmoved, moved = found["attack"]
    assert unmoved["errors"] == before["errors"] <= moved["errors"]
    assert {*moved} == {"epsilon", "errors", "count", "error_percent", "flat"}
    detected = found["detection"]
    assert detected["threshold_from"] == "validation"
    assert detected["threshold_images"] == 60
    assert detected["measured_images"] == 60
    noise = detected["sets"]["noise"]
    assert noise["count"] == 60
    assert 0.5 < noise["roc_area"] <= 1
    assert detected["attack"][1]["undetected"] <= detected["attack"][1]["fooled"]
    drawn = {path.stem for path in (folders[1] / "pictures").glob("*.png")}
    assert {"rotate", "rotate_images", "attack", "attack_images", "detect"} <= drawn
    # Neither counts twice, and both are the same result.
    assert len(find_runs(trained.parent.parent)[0].tests) == 2
    tests = [r for r in find_results([trained]) if r.command == "eval"]
    (group,) = grouped(tests)
    assert len(tests) == 2
    assert len(group.results) == 1
    assert not group.remarks


def test_without_held_out_images_every_second_gives_the_threshold(in_tmp, printed):
    untrained(in_tmp / "a.pt", *TINY[:4])
    lines = printed(*PLAIN, "checkpoint=a.pt", "detect=noise", "out_dir=out")
    assert any("every second of the tested images" in line for line in lines)
    found = result_of(in_tmp / "out")["detection"]
    assert found["threshold_from"] == "every_second"
    assert found["threshold_images"] == found["measured_images"] == 30


def test_what_fools_and_is_missed_is_counted_among_the_measured_images():
    given = torch.tensor([5.0, 1.0, 9.0, 2.0, 0.0, 3.0]), torch.tensor([1, 1, 1, 1, 0, 0]).bool()
    distances, fooled = given
    none = torch.zeros(6, dtype=torch.bool)
    outcome = attacks.Outcome(0.1, none, none, fooled, none, distances, none)
    real = torch.tensor([0.5, 1.5, 2.5])
    found = undetected(outcome, slice(1, None, 2), real, threshold=2.0)  # 1, 2 and 3 are measured
    assert (found["count"], found["fooled"], found["undetected"]) == (3, 2, 2)
    assert found["undetected_percent"] == pytest.approx(200 / 3)
    assert found["flagged_percent"] == pytest.approx(100 / 3)
    assert found["fooled_detection"]["roc_area"] == pytest.approx((1 + 2) / 6)
    every = undetected(outcome, slice(None), real, threshold=2.0)
    assert (every["count"], every["fooled"], every["undetected"]) == (6, 4, 2)


def test_a_cnn_and_a_transferred_attack(in_tmp, printed):
    untrained(in_tmp / "cnn.pt", "dataset=mnist5k", *CNN)
    untrained(in_tmp / "caps.pt", *TINY[:4])
    attack = ["attack=fgsm", "attack.epsilon=0.2", "attack.source=caps.pt"]
    lines = printed(*PLAIN, "checkpoint=cnn.pt", "out_dir=out", "rotate=20", *attack)
    assert "perturbed on: caps.pt" in lines
    found = result_of(in_tmp / "out")
    assert len(found["curves"]["rotate"]) == len(found["attack"]) == 1


def test_a_transferred_attack_moves_images_by_the_source_alone(digits):
    tested, source = network(), network(*CNN)
    settings = attack_of("attack.epsilon=[0.1]", "attack.steps=2", "attack.loss=difference")
    transferred, own = (
        attack_split(Attack(net, digits, settings), tested.model, 30, iter, detect=False)[0]
        for net in (source, tested)
    )
    numbers = digits.indices(0, 8)
    batch = digits.batch(numbers)
    with attacked(source.model):
        given = batch.images_BCHW, batch.labels_BT, numbers
        moved, _ = Attack(source, digits, settings).perturb(*given, 0.1, 0)
    is_moved = (transferred.shown_SCHW != batch.images_BCHW).flatten(1).any(1)
    assert int(is_moved.sum()) > 0
    assert torch.allclose(transferred.shown_SCHW[is_moved], moved[is_moved])
    assert not torch.equal(transferred.shown_SCHW, own.shown_SCHW)


def test_the_command_perturbs_on_the_source(in_tmp, monkeypatch, printed):
    untrained(in_tmp / "caps.pt", *TINY[:4])
    untrained(in_tmp / "cnn.pt", "dataset=mnist5k", *CNN)
    used = []

    def spy(attack, model, *rest):
        used.append((attack, model))
        return attack_split(attack, model, *rest)

    monkeypatch.setattr(robustness, "attack_split", spy)
    attack = ["attack=fgsm", "attack.epsilon=0.2", "attack.source=cnn.pt"]
    printed(*PLAIN, "checkpoint=caps.pt", "out_dir=out", *attack)
    ((attack, model),) = used
    assert attack.network.model.decoder is None
    assert model.decoder is not None
    assert attack.network.loss.name == "cross_entropy"


def test_two_digits(in_tmp, printed):
    words = ["dataset=multimnist", "dataset.source=mnist5k"]
    untrained(in_tmp / "two.pt", *TINY[1:4], *words)
    test = ["eval", *words, "images=12", "device=cpu", "checkpoint=two.pt", "out_dir=out"]
    printed(*test, "shift=[0,3]", "attack=fgsm", "attack.epsilon=0.1", "detect=noise")
    found = result_of(in_tmp / "out")
    assert found["attack"][0]["count"] == found["curves"]["shift"][1]["count"] == 12


@pytest.mark.parametrize(
    ("words", "said"),
    [
        (["attack.epsilon=0.1"], "a choice that was not made: attack=bim, fgsm, pgd"),
        (["attack=bmi"], "did you mean 'bim'"),
        (["attack=bim", "attack.epsilon=[0,2]"], "attack.epsilon is 2.0; it must be at most 1"),
        (["attack=bim", "attack.epsilon=[]"], "attack.epsilon is empty"),
        (["attack=bim", "attack.loss=margin"], "it can be one of: trained, difference"),
        (["attack=bim", "attack.steps=0"], "at least 1"),
        (["attack=bim", "attack.source=nowhere.pt"], "there is no checkpoint nowhere.pt"),
        (["rotate=[400]"], "rotate is 400.0; it must be at most 360"),
        (["scale=0"], "scale is 0.0"),
        (["detect=[kmnits]"], "did you mean 'kmnist'"),
        (["detect=[mnist5k]"], "that which is tested"),
        (["detect=[folder]"], "of one's own"),
        (["detect=[mnist]"], "of the same images"),
        (["attack=bim", "attack.seed=3"], "this attack has neither"),
        (["detect=[cifar10]"], "its images have 3×24×24"),
        (["detect=noise", "images=1"], "two images at least"),
        (["detect=noise", "ensemble=[b.pt]"], "leave one out"),
        (["attack=bim", "ensemble=[b.pt]"], "leave one out"),
    ],
)
def test_mistakes_are_one_sentence(in_tmp, refused, words, said):
    untrained(in_tmp / "a.pt", *TINY[:4])
    untrained(in_tmp / "b.pt", *TINY[:4])
    assert said in refused("eval", "dataset=mnist5k", "images=9", "checkpoint=a.pt", *words)


def test_no_decoder_no_detection(in_tmp, refused):
    untrained(in_tmp / "a.pt", *TINY[:4], "model.reconstruction=false")
    words = "eval", "dataset=mnist5k", "checkpoint=a.pt"
    for asked in (["detect=noise"], ["attack=bim", "attack.reconstructive=true"]):
        assert "has no decoder" in refused(*words, *asked)
    untrained(in_tmp / "b.pt", *TINY[:4])
    source = ["checkpoint=b.pt", "attack=bim", "attack.reconstructive=true", "attack.source=a.pt"]
    assert "has no decoder" in refused(*words[:2], *source)


def test_other_settings_have_other_folders():
    settings = [
        ["rotate=[0,10]"],
        ["rotate=[0,20]"],
        ["attack=pgd"],
        ["attack=bim"],
        ["attack=pgd", "attack.steps=20"],
        ["attack=pgd", "attack.source=a.pt"],
        ["detect=[noise]"],
        ["detect=[kmnist]"],
        ["detect=[noise]", "attack=pgd"],
    ]
    found = ["-".join(folder_parts(eval_config(*words))) for words in settings]
    assert len({*found}) == len(found)
    assert found[2:4] == ["attack-pgd", "attack-bim"]
    assert folder_parts(eval_config()) == []
