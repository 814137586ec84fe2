"""`capsrun list`: what is shown of finished, running, interrupted and damaged runs."""

import json
import os
import re
import shutil
import time
import types
from dataclasses import asdict
from pathlib import Path

import pytest
from conftest import TINY, run_python, without_root
from omegaconf import OmegaConf
from recorded import EXPERIMENTS, eval_result, train_result

from capsrun import cli
from capsrun.disk import locked

NOW = time.time()


@pytest.fixture
def runs(in_tmp, monkeypatch) -> Path:
    """The folder in which runs are looked for, while the clock stands still."""
    monkeypatch.setattr("capsrun.commands.list.time", types.SimpleNamespace(time=lambda: NOW))
    return in_tmp / "runs"


def aged(folder, age_seconds):
    """The folder, as if its files had been written so many seconds ago."""
    for path in folder.iterdir():
        os.utime(path, (NOW - age_seconds, NOW - age_seconds))
    return folder


def finished(runs, name, age_seconds, errors=34, seed=0):
    folder = train_result(runs / name / f"seed{seed}", errors, seed, *TINY, name=name)
    return aged(folder, age_seconds)


def begun(runs, name, age_seconds, metrics, *overrides):
    folder = runs / name / "seed0"
    folder.mkdir(parents=True)
    config = asdict(EXPERIMENTS.training([*TINY, *overrides]))
    (folder / "config.yaml").write_text(OmegaConf.to_yaml(config | {"name": name}))
    (folder / "metrics.jsonl").write_text(metrics)
    return aged(folder, age_seconds)


def listed(capsys, *arguments):
    """The cells of each line, but for the header and what is next."""
    assert cli.main(["list", *arguments]) == 0
    header, *lines = capsys.readouterr().out.partition("\nnext: ")[0].splitlines()
    assert " ".join(header.split()) == "error steps data set model written status folder"
    return [" ".join(line.split()) for line in lines]


def test_nothing_is_there(in_tmp, capsys):
    assert cli.main(["list"]) == 0
    said = capsys.readouterr().out
    assert said.startswith("there is no run in runs\nnext: capsrun train dataset=mnist5k\n")
    assert cli.main(["list", "json=true"]) == 0
    assert json.loads(capsys.readouterr().out) == []
    assert list(in_tmp.iterdir()) == []


@pytest.mark.parametrize("command", ["list", "report"])
def test_a_folder_that_cannot_be_looked_into_is_not_an_empty_one(in_tmp, capsys, command):
    (in_tmp / "runs").touch()
    assert cli.main([command]) == 1
    assert capsys.readouterr().err == f"capsrun {command}: runs: Not a directory\n"


def test_each_run_has_a_line_and_the_latest_is_the_last(runs, capsys):
    rows = [
        {"step": 0, "total_steps": 9375},
        {"step": 1200, "error_percent/test": 2.5},
        {"step": 1220, "loss/total": 0.5},
    ]
    metrics = "\n".join(map(json.dumps, rows)) + '\n{"step": 12'
    finished(runs, "first", 3 * 3600)
    begun(runs, "stopped", 2 * 86_400, metrics)
    begun(runs, "going_on", 20, metrics)
    begun(runs, "begun", 30, "")
    begun(runs, "epochs", 9, '{"step": 40}\n', "recipe.steps=null", "recipe.epochs=2")
    (begun(runs, "broken", 8, '{"step": 3}\n') / "not_finite.pt").touch()
    with locked(runs / "going_on" / "seed0" / ".lock"):
        assert listed(capsys) == [
            "2.50 % 1,220 of 9,375 mnist5k capsnet 2 days ago interrupted runs/stopped/seed0",
            "0.34 % 12 mnist5k capsnet 3 h ago finished runs/first/seed0",
            "– 0 of 12 mnist5k capsnet 30 s ago interrupted runs/begun/seed0",
            "2.50 % 1,220 of 9,375 mnist5k capsnet 20 s ago running runs/going_on/seed0",
            "– 40 of ? mnist5k capsnet 9 s ago interrupted runs/epochs/seed0",
            "– 3 of 12 mnist5k capsnet 8 s ago interrupted runs/broken/seed0 "
            "(its loss or a weight was not finite)",
        ]


def test_columns_are_aligned(runs, capsys):
    finished(runs, "a", 5, errors=1250)
    finished(runs, "with_a_longer_name", 7200)
    assert cli.main(["list"]) == 0
    said = capsys.readouterr().out
    assert "\x1b" not in said
    header, *lines = said.partition("\nnext: ")[0].splitlines()
    for title in ("data set", "model", "status", "folder"):
        starts = header.index(title)
        assert all(line[starts - 1] == " " != line[starts] for line in lines)
    for title in ("error", "steps", "written"):
        ends = header.index(title) + len(title)
        assert all(line[ends - 1] != " " == line[ends] for line in lines)


def test_tests_are_beneath_their_run(runs, capsys):
    finished(runs, "second", 0)
    first = finished(runs, "first", 100)
    aged(eval_result(first / "eval-affnist-test", "dataset=affnist", 67_200), 20)
    perturbed = {"command": "perturb", "dataset": "mnist5k"}
    aged(eval_result(first / "perturb-mnist5k", "dataset=mnist5k", 0, **perturbed), 10)
    elsewhere = {"checkpoint": "runs/second/seed0/checkpoint.pt"}
    aged(eval_result(runs / "elsewhere", "dataset=affnist", 67_200, **elsewhere), 5)
    eval_result(runs / "other", "dataset=mnist", 5)
    (runs / "bench").mkdir()
    (runs / "bench" / "result.json").write_text('{"something": "else"}')
    assert listed(capsys) == [
        "0.34 % 12 mnist5k capsnet 2 min ago finished runs/first/seed0",
        "21.00 % affnist 20 s ago eval eval-affnist-test",
        "mnist5k 10 s ago perturb perturb-mnist5k",
        "0.34 % 12 mnist5k capsnet 0 s ago finished runs/second/seed0",
        "21.00 % affnist 5 s ago eval runs/elsewhere",
    ]


RESULTS = [b"{", b"[]", b'{"command": "train", "config": {}}', b"null"]
CONFIGS = [b"a: [1", b"text", b"", b"name: a\nrecipe: {steps: 1}", b"null\n", b"\xff\xfe\x00"]
DAMAGED = {"result.json": RESULTS, "config.yaml": CONFIGS}


def test_damaged_folders_do_not_hide_the_others(runs, capsys):
    finished(runs, "whole", 1)
    for file, contents in DAMAGED.items():
        for number, content in enumerate(contents):
            folder = runs / f"{file}{number}" / "seed0"
            folder.mkdir(parents=True)
            (folder / "config.yaml").touch()
            (folder / file).write_bytes(content)
    (runs / "loop").symlink_to(runs)
    lines = listed(capsys)
    for file, contents in DAMAGED.items():
        damaged = [line for line in lines if f"seed0 ({file} cannot be read)" in line]
        assert len(damaged) == len(contents)
        assert all(" damaged " in line for line in damaged)
    assert sum("finished runs/whole/seed0" in line for line in lines) == 1


@pytest.mark.parametrize(
    "row",
    [
        "5",
        "null",
        '{"step": "x"}',
        '{"step": 1.5}',
        '{"stop": 1}',
        '{"step": 3, "total_steps": "x"}',
        '{"step": 3, "error_percent/test": [1]}',
    ],
)
def test_numbers_of_a_run_are_read_up_to_what_is_none(runs, capsys, row):
    begun(runs, "run", 5, f'{{"step": 2, "error_percent/test": 4.5}}\n{row}\n{{"step": 9}}\n')
    assert listed(capsys) == ["4.50 % 2 of 12 mnist5k capsnet 5 s ago interrupted runs/run/seed0"]


@pytest.mark.parametrize("key", ["name", "seed", "dataset.classes", "recipe.steps", "stop.on"])
def test_settings_of_another_type_are_said_to_be_damaged(runs, capsys, key):
    folder = begun(runs, "run", 5, "")
    config = OmegaConf.load(folder / "config.yaml")
    OmegaConf.update(config, key, ["x"])
    OmegaConf.save(config, folder / "config.yaml")
    assert listed(capsys)[0].endswith("damaged runs/run/seed0 (config.yaml cannot be read)")


def test_only_those_of_a_name(runs, capsys):
    for name in ("mnist-capsnet-quick", "affnist-capsnet-quick", "smoke/table1"):
        finished(runs, name, 5)
    assert len(listed(capsys)) == 3
    for name, count in (("mnist-caps", 1), ("mnist*quick", 1), ("quick", 2), ("smoke/", 1)):
        assert len(listed(capsys, f"name={name}")) == count
    assert cli.main(["list", "name=smoek"]) == 2
    assert "did you mean 'smoke'" in capsys.readouterr().err


def test_json_is_for_programs(runs, capsys):
    folder = finished(runs, "first", 10, seed=3)
    eval_result(folder / "eval", "dataset=affnist", 67_200)
    assert cli.main(["list", "json=true"]) == 0
    (run,) = json.loads(capsys.readouterr().out)
    assert (run["folder"], run["seed"], run["status"]) == ("runs/first/seed3", 3, "finished")
    assert (run["error_percent"], run["steps"]) == (0.34, 12)
    (test,) = run["tests"]
    del test["written"]
    assert test == {
        "folder": "runs/first/seed3/eval",
        "command": "eval",
        "dataset": "affnist",
        "error_percent": 21.0,
        "count": 320_000,
    }


def table(capsys, *arguments):
    """The cells of the header and of each line, separated by bars."""
    assert cli.main(["list", *arguments]) == 0
    lines = capsys.readouterr().out.partition("\nnext: ")[0].splitlines()
    return [re.sub(" {2,}", "|", line.strip()) for line in lines]


def test_settings_that_are_asked_for_have_columns(runs, capsys):
    finished(runs, "first", 30)
    cnn = ["model=cnn_baseline", "recipe=authors", "model.channels=[8,16,8]"]
    begun(runs, "cnn", 10, '{"step": 3}\n')
    config = asdict(EXPERIMENTS.training(cnn))
    (runs / "cnn" / "seed0" / "config.yaml").write_text(OmegaConf.to_yaml(config))
    aged(runs / "cnn" / "seed0", 10)
    columns = "columns=[routing.iterations,model.channels,model.reconstruction,recipe.epochs]"
    header, first, cnn_line = table(capsys, columns)
    assert header == (
        "error|steps|data set|model|routing.iterations|model.channels|model.reconstruction|"
        "recipe.epochs|written|status|folder"
    )
    assert "|capsnet|3|true|null|30 s ago|" in first
    assert "|cnn_baseline|[8,16,8]|null|10 s ago|" in cnn_line
    assert cli.main(["list", columns, "json=true"]) == 0
    shown = [run["settings"] for run in json.loads(capsys.readouterr().out)]
    assert shown[0] == {
        "routing.iterations": 3,
        "model.reconstruction": True,
        "recipe.epochs": None,
    }
    assert shown[1] == {"model.channels": [8, 16, 8], "recipe.epochs": None}


@pytest.mark.parametrize(
    ("key", "said"),
    [
        ("iterations", "'iterations', did you mean 'routing.iterations'?"),
        ("model", "no run has a setting 'model'"),
        ("recipe.steps.x", "did you mean 'recipe.steps'"),
    ],
)
def test_a_setting_that_no_run_has(runs, refused, key, said):
    finished(runs, "first", 30)
    assert said in refused("list", f"columns={key}")


@pytest.mark.parametrize("flag", ["true", "yes"])
def test_means_are_of_runs_that_differ_in_the_seed_only(runs, capsys, flag):
    for seed, errors in enumerate((30, 34, 38)):
        finished(runs, "three", 90 - 10 * seed, errors, seed)
    other = train_result(runs / "one" / "seed0", 50, 0, *TINY, "routing.iterations=1", name="one")
    aged(other, 20)
    begun(runs, "begun", 9, '{"step": 3}\n')
    assert table(capsys, f"means={flag}", "columns=routing.iterations") == [
        "error|steps|data set|model|routing.iterations|seeds|written|run",
        "0.34 ± 0.04 %|12|mnist5k|capsnet|3|0 1 2|1 min ago|three",
        "0.50 %|12|mnist5k|capsnet|1|0|20 s ago|one",
        "not finished, and not shown: 1",
    ]
    words = ["means=true", "json=true", "name=three", "columns=[routing.iterations]"]
    assert cli.main(["list", *words]) == 0
    (mean,) = json.loads(capsys.readouterr().out)
    assert mean["seeds"] == [0, 1, 2]
    assert mean["errors_percent"] == [0.3, 0.34, 0.38]
    assert mean["error_percent"] == pytest.approx(0.34)
    assert mean["standard_deviation"] == pytest.approx(0.04)
    assert mean["settings"] == {"routing.iterations": 3}


def test_means_say_which_seed_was_run_twice_and_what_differs(runs, capsys):
    for folder, errors, seed in (("a", 25, 0), ("b", 27, 0), ("b", 29, 1)):
        train_result(runs / f"{folder}/seed{seed}", errors, seed, name=folder)
    assert cli.main(["list", "means=true", "columns=[seed,recipe.name]"]) == 0
    _, line, note, *_ = capsys.readouterr().out.splitlines()
    assert re.search(r"^0.28 ± 0.01 % .* 0 1 +authors +0 1 ", line)
    assert note == "b, a: seed 0 was run more than once, with different results; the latest counts"
    assert cli.main(["list", "means=true", "json=true", "columns=[seed]"]) == 0
    (group,) = json.loads(capsys.readouterr().out)
    assert (group["settings"], group["seeds_run_twice"]) == ({"seed": [0, 1]}, [0])


def test_the_latest_of_a_day_counts_everywhere(runs, capsys):
    """Whatever the names, and wherever they were copied to."""
    for name, errors, second in (("z_first", 55, 1), ("a_second", 57, 2)):
        folder = finished(runs, name, 60, errors)
        values = json.loads((folder / "result.json").read_text())
        values["time"] = f"10:00:0{second}.000"
        (folder / "result.json").write_text(json.dumps(values))
    assert cli.main(["list", "means=true"]) == 0
    assert capsys.readouterr().out.splitlines()[1].startswith(" 0.57 % ")
    assert cli.main(["report"]) == 0
    said = "a_second, z_first: seed 0 was run more than once, with different results; the latest"
    assert f"{said} counts." in (runs / "report/report.md").read_text()
    assert re.search(r"^a_second, z_first .* 0\.57 +0$", capsys.readouterr().out, re.MULTILINE)


def test_a_folder_that_cannot_be_looked_into_is_named(runs, capsys):
    finished(runs, "a", 60)
    (runs / "b").mkdir()
    for folder in (runs.parent, *runs.parent.parents[:2]):
        folder.chmod(0o755)
    (runs / "b").chmod(0)
    with without_root():
        assert cli.main(["list"]) == 0
    said = capsys.readouterr()
    assert "runs/a/seed0" in said.out
    assert "note: runs/b cannot be looked into: Permission denied\n" in said.err


def test_means_of_nothing(runs, capsys):
    begun(runs, "begun", 9, '{"step": 3}\n')
    assert table(capsys, "means=true")[0] == "there is no finished run in runs"
    assert cli.main(["list", "means=true", "json=true"]) == 0
    assert json.loads(capsys.readouterr().out) == []


def test_real_runs(in_tmp, tiny_run, capsys):
    """Of those that training makes; one lost its result, as if it had been killed."""
    shutil.copytree(tiny_run, in_tmp / "runs" / "whole" / "seed0")
    killed = shutil.copytree(tiny_run, in_tmp / "runs" / "killed" / "seed0")
    (killed / "result.json").unlink()
    shown = {line.split()[-1]: line for line in listed(capsys)}
    assert " % 12 mnist5k capsnet " in shown["runs/whole/seed0"]
    assert " % 12 of 12 mnist5k capsnet " in shown["runs/killed/seed0"]


def test_it_needs_no_torch(runs):
    finished(runs, "first", 10)
    begun(runs, "second", 10, '{"step": 3}\n')
    script = """
import sys
from capsrun.cli import main
assert main(["list"]) == 0
assert not {"torch", "matplotlib", "numpy"} & set(sys.modules)
"""
    done = run_python("-c", script)
    assert done.returncode == 0, done.stderr


# Clears the screen, in two ways; ends the line; writes from right to left.
HOSTILE = "x\x1b[2J\x9b2J\rfinished\n\u202ey"


@pytest.mark.parametrize("words", [[], ["means=true"], ["columns=[loss.name,recipe.name]"]])
def test_what_others_wrote_is_nothing_that_a_terminal_obeys(runs, capsys, words):
    """Neither of a finished run, nor of one that goes on, a damaged one, or a folder's name."""
    config = asdict(EXPERIMENTS.training(TINY))
    for part in ("dataset", "model", "loss", "recipe"):
        config[part] = config[part] | {"name": HOSTILE}
    train_result(runs / "a/seed0", 25, 0, name=HOSTILE, model=HOSTILE, config=config)
    eval_result(runs / "a/seed0/eval\x1b[2J", "dataset=affnist", 5, dataset=HOSTILE)
    for name in ("b", "c\x1b[2J"):
        begun(runs, name, 60, "")
        (runs / name / "seed0/config.yaml").write_text(OmegaConf.to_yaml(config))
    (runs / "d\nx/seed0").mkdir(parents=True)
    (runs / "d\nx/seed0/config.yaml").write_text("")
    assert cli.main(["list", *words]) == 0
    said = capsys.readouterr()
    table, _, following = said.out.partition("\nnext: ")
    lines = table.splitlines()
    assert len(lines) == (1 + 1 + 1 if "means=true" in words else 1 + 4 + 1)
    assert all(line.isprintable() for line in (*lines, *said.err.splitlines()))
    assert following == "capsrun report\n"  # with its data set nobody can go on


def test_a_name_of_a_file_that_is_left_out_is_nothing_that_a_terminal_obeys(runs, capsys):
    train_result(runs / "a\x1b[2Jb/seed0", 25, 0, steps="\x1b[2J")
    assert cli.main(["report"]) == 2
    said = capsys.readouterr().err
    assert "is left out" in said
    assert "\x1b" not in said
