"""New runs that begin with the weights of another: what is taken, what is not, what is said."""

import hashlib
import json
from pathlib import Path

import pytest
import torch
from conftest import TINY, make_model, train_config, untrained
from test_train import assert_same_run, interrupted

from capsrun.commands.train import train
from capsrun.errors import UserError, notices
from capsrun.names import run_name, run_of
from capsrun.runs.checkpoint import load_checkpoint, read_checkpoint
from capsrun.runs.initial import begin_with_weights, layer_of

NONE = Path("there/is/none")
CNN = ["model=cnn_baseline", "model.channels=[4,4]", "model.kernels_px=[5,5]", TINY[0]]
CNN += ["model.pools_px=[4,1]", "model.hidden=[16]"]


def test_more_epochs_go_on_from_the_weights_of_a_finished_run(tiny_run, tmp_path, capsys):
    words = [*TINY, "name=more", "recipe.learning_rate=1e-30", "recipe.learning_rate_floor=0"]
    result = train(train_config(*words, f"init={tiny_run}"), tmp_path / "more")
    file = tiny_run / "checkpoint.pt"
    assert (
        f"begins with the weights of {file}, after 12 steps: all layers" in capsys.readouterr().out
    )
    before = json.loads((tiny_run / "result.json").read_text())
    assert (result["steps"], result["errors"]) == (12, before["errors"])
    assert result["init_md5"] == hashlib.md5(file.read_bytes()).hexdigest()
    assert before["init_md5"] is None
    ours, theirs = (load_checkpoint(folder) for folder in (tmp_path / "more", tiny_run))
    torch.testing.assert_close(ours.model.state_dict(), theirs.model.state_dict())


@pytest.mark.parametrize(
    ("given", "wanted", "anew"),
    [
        (TINY, [*TINY, "seed=3"], []),
        (TINY, [*TINY, "dataset.classes=7"], ["digitcaps", "decoder.0"]),
        (TINY, [*TINY, "dataset.image_px=32"], ["digitcaps", "decoder.4"]),
        (TINY, [*TINY, "dataset.channels=3"], ["conv1", "decoder.4"]),
        (TINY, [*TINY, "model.digit_dimensions=8"], ["digitcaps", "decoder.0"]),
        (TINY, [*TINY, "model.reconstruction=false"], []),
        ([*TINY, "model.reconstruction=false"], TINY, ["decoder.0", "decoder.2", "decoder.4"]),
        ([*TINY, "model.digit_bias=false"], TINY, ["digitcaps"]),
        (TINY, [*TINY, "routing.iterations=1", "loss=paper"], []),
        (CNN, [*CNN, "dataset.classes=7"], ["last"]),
        (CNN, [*CNN, "dataset.channels=3"], ["convolutions.0"]),
    ],
    ids=lambda words: " ".join(words[len(TINY) :]) or "tiny" if words in (TINY, CNN) else None,
)
def test_what_fits_is_taken_and_the_rest_is_begun_anew(tmp_path, capsys, given, wanted, anew):
    untrained(tmp_path / "given.pt", *given)
    config = train_config(*wanted, f"init={tmp_path}/given.pt")
    model, random = make_model(config, seed=5), make_model(config, seed=5).state_dict()
    assert begin_with_weights(model, config, [], NONE).md5
    line = capsys.readouterr().out
    assert line.count("\n") == 1
    said = line.strip().partition("; begun anew: ")[2]
    assert sorted(filter(None, said.split(", "))) == sorted(anew)
    assert ("all layers" in line) == (not anew)
    theirs = read_checkpoint(tmp_path / "given.pt")["model"]
    for key, value in model.state_dict().items():
        expected = random if layer_of(key) in anew else theirs
        assert torch.equal(value, expected[key]), key


@pytest.mark.parametrize(
    ("given", "wanted", "message"),
    [
        (CNN, TINY, r"of another network \(model=cnn_baseline\), and none fit .*model=capsnet\)"),
        (TINY, CNN, r"of another network \(model=capsnet\), and none fit .*model=cnn_baseline\)"),
        # The layers of the decoder fit, and would be all that is learnt already.
        (TINY, [*TINY, "model.conv1_channels=9", "model.primary_types=3"], "of another network"),
        (["dataset=mnist", *TINY[1:]], TINY, "the test images of mnist5k are training images of m"),
        (["dataset=mnist_padded", *TINY[1:]], TINY, "training images of mnist"),
    ],
)
def test_weights_of_another_network_or_of_the_test_images_are_refused(
    in_tmp, given, wanted, message
):
    untrained(in_tmp / "given.pt", *given)
    with pytest.raises(UserError, match=message):
        train(train_config(*wanted, "name=run", "init=given.pt"), in_tmp / "run")
    assert not (in_tmp / "run").exists(), "with the right weights the same place is free"


def test_what_are_no_weights_is_one_sentence(in_tmp, refused, tiny_run):
    (in_tmp / "text.pt").write_text("no weights")
    checkpoint = read_checkpoint(tiny_run / "checkpoint.pt")
    next(iter(checkpoint["model"].values())).fill_(torch.nan)
    torch.save(checkpoint, "nan.pt")
    said = {
        "runs/nothing": "there is no checkpoint runs/nothing; `capsrun list` shows",
        "text.pt": "text.pt is damaged or cut short, or no checkpoint",
        "nan.pt": "holds numbers that are not finite",
        "https://a.org/b.pt": "is to be downloaded first",
    }
    for path, message in said.items():
        assert message in refused("train", *TINY, "name=run", f"init={path}")
    assert not Path("runs").exists()


def test_held_out_images_that_were_trained_on_are_told(tmp_path):
    held_out = [*TINY, "dataset.validation=100"]
    for given, told in ((held_out, 0), (TINY, 1)):
        untrained(tmp_path / "given.pt", *given)
        config = train_config(*held_out, f"init={tmp_path}/given.pt")
        begin_with_weights(make_model(config), config, [], NONE)
        assert len([text for text in notices if "held out" in text]) == told


def test_an_interrupted_run_goes_on_without_the_weights_that_it_began_with(tmp_path, monkeypatch):
    untrained(tmp_path / "given.pt", *TINY, "seed=7")
    config = train_config(*TINY, "name=run", f"init={tmp_path}/given.pt", "precision=fp32")
    straight = train(config, tmp_path / "straight")
    interrupted(monkeypatch, config, tmp_path / "resumed", 5)
    (tmp_path / "given.pt").unlink()
    assert train(config, tmp_path / "resumed")["init_md5"] == straight["init_md5"]
    assert_same_run(tmp_path / "resumed", tmp_path / "straight")
    assert train(config, tmp_path / "resumed")["init_md5"], "a finished run is left alone"
    other = train_config(*TINY, "name=run", "init=other.pt", "precision=fp32")
    with pytest.raises(UserError, match=r"other settings: init \(there .*, now other\.pt\)"):
        train(other, tmp_path / "resumed")


@pytest.mark.parametrize(
    ("path", "name"),
    [
        ("runs/mnist-capsnet-quick/seed0", "mnist-capsnet-quick"),
        ("~/runs/a+b-1/seed2/checkpoint.pt", "a_b-1-seed2"),
        ("'it is/mine/seed0/'", "mine"),
        ("results/capsnet-mnist.pt", "capsnet-mnist"),
        ("seed0", "seed0"),
        ("checkpoint.pt", ""),
        (".", ""),
        ("/", ""),
        ("..", ".."),
    ],
)
def test_such_a_run_is_named_after_the_other(path, name):
    overrides = ["dataset=mnist5k", f"init={path}"]
    said = run_name(train_config(*overrides), overrides)
    assert said == f"mnist5k-capsnet-quick+init-{name}"


def test_seeds_of_one_run_are_told_apart():
    paths = [f"runs/{run}/seed{seed}" for run in "ab" for seed in range(3)]
    assert len({run_of(path) for path in paths}) == len(paths)


def test_help_says_what_it_is(printed):
    (line,) = (line for line in printed("train", "--help") if line.strip().startswith("init="))
    assert "begin with the weights of a checkpoint" in line
