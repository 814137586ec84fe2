"""The CNN baselines: their layers, parameters and losses, and dropout."""

import pytest
import torch
from conftest import load_data, make_model, make_trainer, train_config
from torch.nn import functional as F

from capsrun.commands.train import train
from capsrun.compose import configs_dir
from capsrun.data.splits import TrainingBatches
from capsrun.errors import UserError
from capsrun.model_config import CrossEntropyConfig
from capsrun.models import cnn, plan_model
from capsrun.models.cnn import CNN, CNNOutput, drop_out
from capsrun.runs.checkpoint import load_checkpoint
from capsrun.training.losses import cross_entropy
from capsrun.training.metrics import predicted_classes, score_split

SMALL = ["model.channels=[8,8]", "model.kernels_px=[5,5]", "model.pools_px=[2,2]"]
SMALL += ["model.hidden=[32,16]", "recipe.batch_size=16", "recipe.epochs=null", "recipe.steps=12"]
SMALL += ["record.log_every_steps=2", "record.evaluate_every_steps=8"]
FROM_5K = "dataset.source=mnist5k"
CNNS = sorted(path.stem for path in (configs_dir() / "model").glob("cnn_*.yaml"))


def build(*overrides):
    return make_model(train_config(*overrides))


@pytest.mark.parametrize(
    ("dataset", "model", "parameters"),
    [
        ("mnist", "cnn_baseline", 35_445_522),  # §5: 35.4 million
        ("multimnist", "cnn_multimnist", 24_563_978),  # §6: 24.56 million
        ("mnist_padded", "cnn_affnist", 13_734_794),  # as large as the CapsNet, within 5 %
        ("mnist", "cnn_authors", 7_495_946),
    ],
)
def test_parameters(dataset, model, parameters):
    config = train_config(f"dataset={dataset}", f"model={model}")
    plan = plan_model(config.model, config.routing, config.dataset)
    assert sum(p.numel() for p in plan.parameters()) == parameters


def test_the_layers_of_the_baseline():
    model = build("model=cnn_baseline")
    shapes = [tuple(p.shape) for name, p in model.named_parameters() if name.endswith("weight")]
    assert shapes == [
        (256, 1, 5, 5),
        (256, 256, 5, 5),
        (128, 256, 5, 5),
        (328, 128 * 28 * 28),
        (192, 328),
        (10, 192),
    ]
    assert model.config.dropout == 0.5


def test_a_forward_pass_by_functions():
    """Convolution, ReLU, max-pooling; hidden layers with ReLU; a linear layer, and no more."""
    model = build("model=cnn_baseline", *SMALL)
    images = torch.rand(3, 1, 28, 28)
    p = dict(model.named_parameters())
    maps = images
    for layer in (0, 3):
        weight, bias = (p[f"convolutions.{layer}.{k}"] for k in ("weight", "bias"))
        maps = F.max_pool2d(F.relu(F.conv2d(maps, weight, bias, padding=2)), 2)
    hidden = maps.flatten(1)
    for layer in (0, 2):
        hidden = F.relu(hidden @ p[f"hidden.{layer}.weight"].T + p[f"hidden.{layer}.bias"])
    expected = hidden @ p["last.weight"].T + p["last.bias"]
    torch.testing.assert_close(model(images).logits_BJ, expected)
    torch.testing.assert_close(model(images).scores_BJ.sum(1), torch.ones(3))


def test_valid_padding_and_the_authors_initialisation():
    model = build("model=cnn_authors")
    assert tuple(model.hidden[0].weight.shape) == (1024, 256 * 4 * 4)
    for name, parameter in model.named_parameters():
        if name.endswith("bias"):
            assert (parameter == 0.1).all()
        else:
            std = 0.05 if name.startswith("convolutions") else 0.1
            assert parameter.abs().max() <= 2 * std
            # A normal cut at two standard deviations has 0.88 of its spread.
            assert parameter.std().item() == pytest.approx(0.88 * std, rel=0.02)


def test_glorots_initialisation():
    model = build("model=cnn_baseline")
    for name, parameter in model.named_parameters():
        if name.endswith("bias"):
            assert (parameter == 0).all()
        else:
            receptive = parameter[0, 0].numel() if parameter.dim() == 4 else 1
            bound = (6 / (receptive * sum(parameter.shape[:2]))) ** 0.5
            assert 0.98 * bound < parameter.abs().max() <= bound


@pytest.mark.parametrize(
    ("model", "override", "message"),
    [
        ("cnn_baseline", "model.dropout=1.5", "model.dropout is 1.5; it must be at most"),
        ("cnn_baseline", "model.dropout=1", "at most 0.99"),
        ("cnn_baseline", "model.dropout=-0.1", "at least 0"),
        ("cnn_baseline", "model.kernels_px=[5,5]", "there are 3, 2 and 3"),
        ("cnn_baseline", "model.channels=[256,0,128]", "at least 1"),
        ("cnn_baseline", "model.padding=full", "valid, same"),
        ("cnn_baseline", "loss=paper", "for capsules, which model=cnn_baseline has not"),
        ("cnn_authors", "dataset.image_px=7", "too small for the layers of cnn_authors"),
        ("capsnet", "loss=cross_entropy", "not for model=capsnet"),
    ],
)
def test_settings_that_do_not_fit_are_refused(model, override, message):
    with pytest.raises(UserError, match=message):
        build(f"model={model}", override)


def test_a_cnn_may_have_another_name():
    assert isinstance(build("model=cnn_baseline", "model.name=mine"), CNN)


def entropy(activation, target=1.0):
    return CrossEntropyConfig(name="x", activation=activation, present_target=target)


def test_cross_entropy_by_hand():
    z = torch.tensor([1.0, 2.0, 0.0])
    log_softmax = z - z.exp().sum().log()
    p = 1 / (1 + (-z).exp())
    whole = -(p[0].log() + p[1].log() + (1 - p[2]).log()) / 3
    half = -(0.5 * (p[:2].log() + (1 - p[:2]).log()).sum() + (1 - p[2]).log()) / 3
    for labels, config, expected in (
        ([1], entropy("softmax"), -log_softmax[1]),
        ([0, 1], entropy("softmax"), -log_softmax[:2].mean()),
        ([0, 1], entropy("sigmoid"), whole),
        ([0, 1], entropy("sigmoid", 0.5), half),
    ):
        found = cross_entropy(z[None], torch.tensor([labels]), config).item()
        assert found == pytest.approx(expected.item())


def test_two_most_likely_classes_are_the_prediction():
    logits = torch.tensor([[0.0, 3.0, 1.0, 2.0], [5.0, 0.0, 0.0, 1.0]])
    assert predicted_classes(CNNOutput(logits).scores_BJ, 2).tolist() == [[1, 3], [0, 3]]


# Dropout


def test_dropout_drops_its_share_and_keeps_the_mean():
    hidden = torch.ones(400, 500)
    noise = torch.arange(400) * 12345
    dropped = drop_out(hidden, 0.3, noise)
    share = (dropped == 0).float().mean().item()
    assert share == pytest.approx(0.3, abs=0.005)
    torch.testing.assert_close(
        dropped[dropped != 0], torch.full_like(dropped[dropped != 0], 1 / 0.7)
    )
    assert dropped.mean().item() == pytest.approx(1, abs=0.01)
    # Every image and every unit on its own.
    kept = (dropped != 0).float()
    assert (kept.mean(0) - 0.7).abs().max() < 0.12
    assert (kept.mean(1) - 0.7).abs().max() < 0.12
    assert torch.equal(drop_out(hidden, 0.3, noise), dropped)
    assert not torch.equal(drop_out(hidden, 0.3, noise + 1000), dropped)


def test_dropout_is_of_the_last_hidden_layer_and_in_training_only():
    model = build("model=cnn_baseline", *SMALL)
    seen = []
    model.last.register_forward_hook(lambda module, inputs, output: seen.append(inputs[0]))
    images = torch.rand(64, 1, 28, 28)
    model(images)
    model(images, None, torch.arange(64))
    tested, trained = seen
    assert tested.shape == (64, 16)
    active = tested > 0
    assert ((trained[active] == 0).float().mean() - 0.5).abs() < 0.1
    kept = active & (trained > 0)
    torch.testing.assert_close(trained[kept], 2 * tested[kept])


# Runs


@pytest.mark.parametrize("name", CNNS)
def test_a_cnn_has_the_rate_of_the_authors_whatever_the_recipe(name):
    """But for the rate that is asked for."""
    recipes = [[f"model={name}", f"recipe={recipe}"] for recipe in ("sixty", "authors", "affnist")]
    assert [train_config(*words).recipe.learning_rate for words in recipes] == [0.001] * 3
    asked = train_config(*recipes[0], "recipe.learning_rate=0.003")
    assert asked.recipe.learning_rate == 0.003


def test_a_cnn_learns(tmp_path):
    settings = [*SMALL, "recipe.steps=150", "recipe.learning_rate=0.003", "model.hidden=[64]"]
    settings += ["record.evaluate_every_steps=75"]
    config = train_config("dataset=mnist5k", "model=cnn_baseline", *settings, "precision=fp32")
    result = train(config, tmp_path)
    assert result["error_percent"] < 50
    assert result["model"] == "cnn_baseline"
    assert result["reconstruction_squared_error"] is None
    pictures = sorted(path.name for path in (tmp_path / "pictures").iterdir())
    assert pictures == ["confusion.png", "curves.png", "failures.png"]
    assert isinstance(load_checkpoint(tmp_path / "checkpoint.pt").model, CNN)


def test_a_cnn_on_two_digits(monkeypatch):
    """Units are dropped in training, by each image's own number, and not in testing."""
    noise = []
    monkeypatch.setattr(cnn, "drop_out", lambda h, share, noise_B: noise.append(noise_B) or h)
    config = train_config("dataset=multimnist", FROM_5K, "model=cnn_multimnist", *SMALL)
    config.model.dropout = 0.5
    trainer, data = make_trainer(config, fast=True), load_data("multimnist", FROM_5K)
    model = trainer.model
    trainer.advance(TrainingBatches(data.train, 0, 16), 0, 2)
    score = score_split(model, data.test, "fp32", most=200)
    assert score.count == 200
    assert len(torch.cat(noise).unique()) == 2 * 16
    assert score.almost_correct >= score.count - score.errors
    batch = data.test.batch(torch.arange(200))
    top2 = model(batch.images_BCHW).logits_BJ.topk(2).indices.sort(1).values
    assert torch.equal(score.predicted_NT, top2)
