"""What `--help` says of the commands, their choices and their settings."""

import pytest
from conftest import REPOSITORY

from capsrun.cli import COMMANDS, main
from capsrun.compose import group_choices
from capsrun.help import WHOLE, command_help, comments_of


def rows(text):
    """Each setting with what is said of it, in one line."""
    joined = text.replace("\n" + " " * 34, " ")
    return {line.split("=")[0].strip(): line for line in joined.splitlines() if line[:2] == "  "}


@pytest.mark.parametrize("command", COMMANDS)
def test_every_setting_says_what_it_means(command, monkeypatch):
    monkeypatch.setenv("COLUMNS", "200")
    text = command_help(command, *COMMANDS[command], [])
    takes = " IMAGE|FOLDER …" if command == "predict" else ""
    summary = COMMANDS[command].summary
    assert text.startswith(f"Usage: capsrun {command}{takes} [key=value …]: {summary}\n")
    for group in group_choices(command):
        assert f"\n  {group}" in text
    said = rows(text.partition("Settings:")[2])
    assert "runs_dir" in said
    for key, line in said.items():
        meaning = line.partition(" ")[2].strip() if "=" not in line else line.split(None, 1)[1]
        assert not meaning.startswith(("(", "whole", "number", "text", "path", "true |")), key


@pytest.mark.parametrize(
    ("group", "choice"),
    [
        (group, choice)
        for group, choices in group_choices("train").items()
        if group not in WHOLE
        for choice in choices
    ],
)
def test_so_does_every_choice(group, choice, monkeypatch):
    monkeypatch.setenv("COLUMNS", "200")
    text = command_help("train", *COMMANDS["train"], [f"{group}={choice}"])
    title = next(line for line in text.splitlines() if line.startswith(f"Of {group}={choice}: "))
    assert len(title) > len(f"Of {group}={choice}: ") + 10
    for key, line in rows(text.partition("Settings:")[2]).items():
        assert len(line.split(None, 1)) == 2, key


def test_it_shows_what_may_be_said_and_what_is_chosen(capsys):
    assert main(["train", "dataset=multimnist", "recipe.epochs=3", "--help"]) == 0
    text = capsys.readouterr().out
    assert "  dataset (multimnist) " in text
    assert "recipe.epochs=3 " in text
    assert "dataset.image_px=36 " in text
    assert "(whole number at least 1)" in text
    assert "auto: cuda where there is one | cpu | cuda" in text
    assert main(["help", "train", "dataset=multimnist", "recipe.epochs=3"]) == 0
    assert capsys.readouterr().out == text


def test_a_file_with_anchors_and_aliases_is_shown_too(printed):
    assert any("queue (cpu)" in line for line in printed("reproduce", "queue=cpu", "--help"))


def test_mistakes_are_said_here_too(capsys):
    assert main(["train", "seeed=1", "--help"]) == 2
    assert "did you mean 'seed'?" in capsys.readouterr().err
    assert main(["help", "trian"]) == 2
    assert "did you mean 'train'?" in capsys.readouterr().err


def test_a_comment_goes_on_in_the_lines_below(tmp_path):
    path = REPOSITORY / "configs" / "model" / "cnn_baseline.yaml"
    assert comments_of(path, "model")["model.initialisation"].endswith("cnn_baseline-30steps")
