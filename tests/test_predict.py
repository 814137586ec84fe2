"""Classes for images of one's own, and the network and digits that come with capsrun."""

import csv
import dataclasses
import json
import os
import shutil
from pathlib import Path

import pytest
import torch
from conftest import MNIST_DIR, load_data, train_config, untrained
from PIL import Image

import capsrun
from capsrun.commands.predict import LEAST_LENGTH
from capsrun.names import SMALL, about_packaged, packaged
from capsrun.runs.checkpoint import load_checkpoint
from capsrun.training.metrics import score_split


@pytest.fixture(scope="module")
def digits(tmp_path_factory) -> Path:
    """A file for the first test digit of each class, called after it."""
    folder = tmp_path_factory.mktemp("digits")
    test = load_data("mnist1k").test
    for number in range(10):
        Image.fromarray(test.images_NCHW[number, 0].numpy()).save(folder / f"{number}.png")
    return folder


def as_json(capsys, *words: str) -> list[dict]:
    assert capsrun.cli.main(["predict", *words, "json=true"]) == 0
    return json.loads(capsys.readouterr().out)


# ---- what comes with capsrun


def test_the_network_that_comes_along_is_as_good_as_is_said():
    test = load_data("mnist1k").test
    trained = load_checkpoint(SMALL)
    small = dataclasses.replace(train_config("model=capsnet_small").model, name="capsnet")
    assert trained.config.model == small
    assert sum(p.numel() for p in trained.model.parameters()) == 2_117_232
    assert packaged().stat().st_size < 4_300_000
    assert score_split(trained.model, test, "fp32").errors == 6


@pytest.mark.skipif(not (MNIST_DIR / "MNIST").is_dir(), reason="needs MNIST's files")
def test_its_errors_on_mnist(monkeypatch):
    test = load_data("mnist", f"dataset.data_dir={MNIST_DIR}").test
    assert score_split(load_checkpoint(SMALL).model, test, "fp32").errors == 49
    assert "(49 of 10,000)" in about_packaged()
    ours = load_data("mnist1k").test
    for number in (0, 7, 995):
        same = (test.images_NCHW == ours.images_NCHW[number]).flatten(1).all(1)
        assert test.labels_N[same].tolist() == [ours.labels_N[number]]


def test_perturb_and_explore_work_at_once(in_tmp, printed, monkeypatch):
    monkeypatch.setenv("CAPSRUN_DATA", "nowhere")
    lines = printed("perturb", "perturb.digit=5", "perturb.step=0.25")
    assert lines[0] == f"network: {about_packaged()}"
    assert "runs/small/perturb-mnist1k/pictures/digit_5.png" in lines
    lines = printed("explore", "explore.images=2", "explore.search=100")
    assert "digits can be drawn: the encoder is in the page" in lines
    assert Path("runs/small/explore-mnist1k.html").is_file()
    assert "capsrun perturb dataset=mnist1k checkpoint=small perturb.format=gif" in lines[-2]


def test_it_is_no_substitute_for_what_was_asked_for(in_tmp, refused):
    for words in (["seed=1"], ["dataset=fashion_mnist"], ["checkpoint=nowhere.pt"]):
        assert "there is no checkpoint" in refused("perturb", *words)
    assert "there is no checkpoint" in refused("eval")  # which tests a run of one's own
    Path("small").mkdir()  # a folder of this name is meant
    assert "there is no checkpoint small" in refused("explore", "checkpoint=small")


def test_a_run_of_ones_own_comes_first(in_tmp, printed):
    Path("runs/mnist-capsnet-quick/seed0").mkdir(parents=True)
    shutil.copy(packaged(), "runs/mnist-capsnet-quick/seed0/checkpoint.pt")
    digit = load_data("mnist1k").test.images_NCHW[4, 0]
    Image.fromarray(digit.numpy()).save("a.png")
    assert not any("comes with capsrun" in line for line in printed("predict", "a.png"))


# ---- predict


def test_each_image_has_a_line(in_tmp, printed, digits):
    lines = printed("predict", str(digits / "3.png"), str(digits / "7.png"))
    assert lines[0] == f"network: {about_packaged()}"
    assert lines[1].split() == ["image", "class", "length", "runner-up"]
    assert lines[2].split()[:2] == [str(digits / "3.png"), "3"]
    assert float(lines[2].split()[2]) > 0.5
    assert lines[3].split()[:2] == [str(digits / "7.png"), "7"]
    assert Image.open("runs/small/predict/sheet.png").size[0] > 100
    assert lines[-1].endswith(f"perturb.image={digits / '3.png'}")


def test_folders_json_and_csv(in_tmp, capsys, printed, digits):
    found = as_json(capsys, str(digits))
    assert [plain["classes"] for plain in found] == [[str(number)] for number in range(10)]
    assert set(found[3]) == {"image", "classes", "runner_up", "scores", "doubt", "remarks"}
    assert max(found[3]["scores"], key=found[3]["scores"].get) == "3"
    assert not Path("runs").exists()
    printed("predict", str(digits), "csv=out/scores.csv")
    with open("out/scores.csv", encoding="utf-8") as stream:
        rows = list(csv.DictReader(stream))
    assert [row["class"] for row in rows] == [*"0123456789"]
    assert float(rows[3]["3"]) == pytest.approx(found[3]["scores"]["3"], abs=1e-4)
    assert (
        len(json.loads(Path("runs/small/predict/predictions.json").read_text())["predictions"])
        == 10
    )


def test_the_rest_is_answered_where_some_cannot_be_used(in_tmp, capsys, digits):
    Image.new("L", (60, 60), 180).save("paper.png")
    Path("cut.png").write_bytes((digits / "3.png").read_bytes()[:80])
    words = ["predict", "paper.png", str(digits / "5.png"), "cut.png", "nowhere.png"]
    assert capsrun.cli.main(words) == 2
    said = capsys.readouterr()
    assert f"{digits / '5.png'}  5" in said.out
    assert "3 images of 4 could not be used, as is said above" in said.err
    for part in ("there is no ink in paper.png", "cut.png cannot be read", "no image nowhere.png"):
        assert part in said.err


def test_what_is_not_given_or_holds_nothing(in_tmp, refused):
    assert "capsrun predict IMAGE" in refused("predict")
    Path("empty").mkdir()
    assert "no pictures in empty" in refused("predict", "empty")
    assert "no image five.png" in refused("predict", "five.png")
    assert "did you mean 'checkpoint'" in refused("predict", "chekpoint=small")


def test_names_with_special_characters(in_tmp, capsys, digits):
    for name in ("a=b.png", "a b,c.png", "[1].png", "${x}.png", "it's.png", "é.png", "'q'.png"):
        shutil.copy(digits / "4.png", name)
        (found,) = as_json(capsys, name)
        assert (found["image"], found["classes"]) == (name, ["4"])
    os.rename(b"a=b.png", b"caf\xe9.png")
    found = as_json(capsys, ".")
    assert len(found) == 7


def test_what_the_model_does_not_know_is_said(in_tmp, capsys):
    noise = (torch.rand(28, 28, generator=torch.Generator().manual_seed(0)) * 255).byte()
    Image.fromarray(noise.numpy()).save("noise.png")
    (found,) = as_json(capsys, "noise.png")
    assert found["doubt"].startswith("unlike")


def test_few_of_mnists_digits_are_doubted(in_tmp, capsys):
    test = load_data("mnist1k").test
    for number in range(200):
        Image.fromarray(test.images_NCHW[number, 0].numpy()).save(f"{number}.png")
    found = as_json(capsys, ".")
    doubted = [plain for plain in found if plain["doubt"]]
    assert len(doubted) <= 6
    assert LEAST_LENGTH > 0.5


def test_both_of_two_digits_are_named(in_tmp, capsys):
    pair = load_data("multimnist", "dataset.source=mnist5k").test.batch(torch.tensor([0]))
    pixels = (pair.images_BCHW[0, 0] * 255).round().byte()
    Image.fromarray(pixels.numpy()).save("pair.png")
    checkpoint = Path(__file__).parent.parent / "results/capsnet-multimnist-small.pt"
    (found,) = as_json(capsys, "pair.png", f"checkpoint={checkpoint}")
    assert {int(name) for name in found["classes"]} == {*pair.labels_BT[0].tolist()}
    assert found["runner_up"] not in found["classes"]


def test_a_cnn_and_a_capsnet_without_decoder(in_tmp, printed, digits):
    untrained(Path("cnn.pt"), "model=cnn_affnist", "model.channels=[4,4,4]", "model.hidden=[8]")
    lines = printed("predict", str(digits / "1.png"), "checkpoint=cnn.pt")
    assert lines[0] == "cnn.pt: cnn_affnist, trained on mnist"
    assert "probability" in lines[1]
    untrained(Path("bare.pt"), "model=capsnet_small", "model.reconstruction=false")
    lines = printed("predict", str(digits / "1.png"), "checkpoint=bare.pt")
    assert not any("capsrun perturb" in line for line in lines)


def test_files_of_others_are_left_alone(in_tmp, refused, printed, digits):
    five = str(digits / "5.png")
    for name in ("photo.csv", "mine.txt"):
        Path(name).write_text("of mine\n")
        assert "holds no scores of capsrun's" in refused("predict", five, f"csv={name}")
        assert Path(name).read_text() == "of mine\n"
    printed("predict", five, "csv=o.csv")
    printed("predict", five, "csv=o.csv")  # its own may be replaced
    Path("out").mkdir()
    Path("out/sheet.png").write_text("of mine")
    assert "capsrun did not make it" in refused("predict", five, "out_dir=out")


def test_stdout_is_json_alone(in_tmp, capsys, digits):
    found = as_json(capsys, str(digits / "5.png"), "csv=o.csv")
    assert len(found) == 1
    assert Path("o.csv").exists()


def test_pictures_of_runs_are_no_images_of_ones_own(in_tmp, capsys, printed, refused, digits):
    shutil.copy(digits / "5.png", "five.png")
    printed("predict", ".")
    assert [plain["image"] for plain in as_json(capsys, ".")] == ["five.png"]
    assert "capsrun predict IMAGE" in refused("predict", "")


def test_what_is_next_can_be_typed(in_tmp, printed, digits):
    five = str(digits / "5.png")
    for words in (["predict", five], ["perturb", f"perturb.image={five}", "perturb.step=0.25"]):
        lines = printed(*words, "checkpoint=small")
        (command,) = (line for line in lines if line.startswith("next: "))
        assert "dataset=mnist1k checkpoint=small" in command
    assert "next: capsrun eval dataset=mnist1k checkpoint=small" in printed(
        "data", "dataset=mnist1k"
    )


def test_help_with_an_image_and_a_sweep_over_flags(in_tmp, printed, digits):
    five = str(digits / "5.png")
    assert printed("predict", five, "--help")[0].startswith("Usage: capsrun predict IMAGE|FOLDER …")
    lines = printed("predict", five, "--multirun", "invert=auto,false")
    assert "sweep: 2 finished" in lines[-1]


def test_images_are_named_in_one_way(in_tmp, refused, digits):
    five = str(digits / "5.png")
    assert "but not both" in refused("predict", five, f"images=[{five}]")


def test_a_name_that_is_not_utf8_on_the_command_line(in_tmp, printed, digits):
    name = os.fsdecode(b"caf\xe9.png")
    shutil.copy(digits / "4.png", name)
    assert any(line.split()[1:2] == ["4"] for line in printed("predict", name))
