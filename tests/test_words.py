"""Names and paths on the command line stay what was typed, whatever else they could mean."""

import os
from pathlib import Path

import pytest
from conftest import TINY, train_config

from capsrun.cli import main
from capsrun.compose import as_typed, compose
from capsrun.errors import UserError
from capsrun.names import run_name, word

NAMES = [
    *("12e4567", "1_000", "1.10", "1e5", "0x1f", "007", "true", "Yes", "NULL", "inf", "nan", "-1"),
    *("epoch=9-step=4690.ckpt", "übung", "a,b", "a(b)", "[x]y"[1:], "a{b}", "a#b", "a;b", "a&b"),
    *("x${seed}", "${seed}", "${oc.env:HOME}", "$5", "it's", 'a"b', "a\\b", "a\\", "a\\'b", "a:b"),
    *("a b", "a@b", "a!b", "?", "*", "%", "日本", "a|b", "a<b>c", "`a`", "a\\${b}"),
]


@pytest.mark.parametrize("name", NAMES)
def test_a_name_is_what_was_typed(name):
    # So it is as capsrun itself writes it, for a shell to take.
    paths = [f"dataset.data_dir={name}", f"runs_dir={name}", word("checkpoint", name)]
    config = compose("eval", paths)
    assert [config.dataset.data_dir, config.runs_dir, config.checkpoint] == [name] * 3


def test_hydras_own_way_to_write_them_stays():
    assert compose("train", ["name='a b'"]).name == "a b"
    assert compose("train", ["name=null"]).name is None
    assert compose("train", ['name="n${seed}"', "seed=3"]).name == "n3"
    assert compose("eval", ["ensemble=[a,'b=c']"]).ensemble == ["a", "b=c"]
    assert as_typed("train", "name=a,1e5", several=True) == "name='a','1e5'"
    assert as_typed("train", "name=choice(a,b)", several=True) == "name=choice(a,b)"
    assert as_typed("train", "recipe.steps=1_0", several=False) == "recipe.steps=1_0"
    assert as_typed("train", "--config-dir=a=b", several=False) == "--config-dir=a=b"


@pytest.mark.parametrize(("word", "value"), [("yes", "true"), ("true", "true"), ("no", "false")])
def test_flags_are_the_same_words_everywhere(word, value):
    assert compose("perturb", [f"perturb.invert={word}"]).perturb.invert == value
    assert compose("explore", [f"explore.encoder={word}"]).explore.encoder == value
    assert train_config(f"compile={word}").compile is (value == "true")


def test_a_number_of_steps_alone_is_enough():
    """So is one of epochs, and of steps or periods of the decay; what is said counts."""
    recipe = train_config("recipe.steps=10").recipe
    assert (recipe.steps, recipe.epochs) == (10, None)
    recipe = train_config("recipe=authors", "recipe.epochs=2").recipe
    assert (recipe.steps, recipe.epochs) == (None, 2)
    recipe = train_config("recipe.decay_steps=100").recipe
    assert (recipe.decay_steps, recipe.decay_periods) == (100, None)
    with pytest.raises(UserError, match="set exactly one"):
        train_config("recipe.steps=10", "recipe.epochs=2")
    with pytest.raises(UserError, match="set exactly one"):
        train_config("recipe.epochs=null")


def test_a_run_of_such_a_name_goes_into_its_folder(in_tmp, capsys):
    assert main(["train", *TINY, "recipe.steps=1", "name=12e4567", "runs_dir=~é=1"]) == 0
    assert Path("~é=1/12e4567/seed0/result.json").exists()
    assert "curves: tensorboard --logdir '~é=1/12e4567/seed0'\n" in capsys.readouterr().out
    assert main(["list", "runs_dir=~é=1", "name=12e"]) == 0
    assert "12e4567" in capsys.readouterr().out


def test_a_sweep_over_names(in_tmp, capsys):
    assert main(["list", "name=1e5,é", "--multirun"]) == 0


def test_home_is_meant_by_a_tilde_in_every_path(monkeypatch, tmp_path):
    monkeypatch.setenv("HOME", str(tmp_path))
    config = train_config("runs_dir=~/exps", "dataset.data_dir=~/data", "name=~")
    assert config.runs_dir == f"{tmp_path}/exps"
    assert config.dataset.data_dir == f"{tmp_path}/data"
    assert config.name == "~"
    assert not os.path.exists("~")


def test_a_long_name_is_shortened_readably():
    words = [f"model.decoder_widths=[{width},16]" for width in range(1, 40)]
    config = train_config(words[0])
    name = run_name(config, words)
    assert len(name.encode()) <= 200
    assert name.startswith("mnist-capsnet-quick+model.decoder_widths-_10_16+")
    assert name != run_name(config, words[:-1])
    assert run_name(config, words[:2]).endswith("+model.decoder_widths-_2_16")


@pytest.mark.parametrize("name", ["x" * 256, "a/" + "é" * 128])
def test_a_name_that_no_file_system_takes_is_refused(name):
    with pytest.raises(UserError, match="longer than a file system takes"):
        train_config(f"name={name}")


@pytest.mark.parametrize(
    "word",
    [
        "record.tensorboard_points=99999999999999999999",
        "record.evaluate_images=9223372036854775808",
        "recipe.batch_size=1000000000",
        "routing.iterations=2147483648",
        "recipe.steps=9223372036854775807",
        "recipe.epochs=1e300",
    ],
)
def test_numbers_beyond_any_sense_are_refused_at_the_start(word):
    with pytest.raises(UserError, match=rf"{word.partition('=')[0]} is .*; it must be"):
        train_config(*(["recipe.epochs=null"] if "steps" in word else []), word)


@pytest.mark.parametrize("name", ["12e4567", "1.10", "0012", "12:30:45", "true", "1_000"])
@pytest.mark.parametrize("key", ["name", "runs_dir"])
def test_a_name_in_a_file_that_is_read_as_something_else_is_refused(key, name, in_tmp, refused):
    folder = in_tmp / "own" / "experiment"
    folder.mkdir(parents=True)
    (folder / "mine.yaml").write_text(f"# @package _global_\n\n{key}: {name}\n")
    message = refused("train", "--config-dir", "own", "experiment=mine")
    assert f"own/experiment/mine.yaml, line 3: {key} is " in message
    assert "is to be in quotes" in message


def test_paths_in_a_list(in_tmp, refused):
    words = ["eval", "dataset=mnist5k", "checkpoint=a"]
    assert "ensemble is inf, as it is read" in refused(*words, "ensemble=[12e4567]")
    message = refused(*words, "ensemble=[übung #1/seed0]")
    assert "is in quotes inside a list: ensemble=['a b','c']" in message


@pytest.mark.parametrize("path", ["[old] runs", "'q'x", "[p]=ü,'1'", "[o]"])
def test_a_path_may_begin_with_brackets_or_quotes(path, in_tmp, refused):
    assert compose("eval", [f"checkpoint={path}/seed0"]).checkpoint == f"{path}/seed0"
    if path == "[o]":
        assert compose("eval", [f"out_dir={path}"]).out_dir == path
