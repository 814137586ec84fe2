"""`capsrun list`: what is shown of finished, running, interrupted and damaged runs."""

import json
import os
import shutil
import subprocess
import sys
import time
import types
from dataclasses import asdict
from pathlib import Path

import pytest
from conftest import TINY, run_capsrun, train_config
from omegaconf import OmegaConf

from capsrun import cli
from capsrun.disk import locked

NOW = time.time()


@pytest.fixture
def runs(in_tmp, monkeypatch) -> Path:
    """The folder in which runs are looked for, while the clock stands still."""
    monkeypatch.setattr("capsrun.commands.list.time", types.SimpleNamespace(time=lambda: NOW))
    return in_tmp / "runs"


def settings(name, *overrides):
    return asdict(train_config(*TINY, f"name={name}", *overrides))


def write(folder, age_seconds, **files):
    """Write files into a folder, so many seconds ago; a dict as JSON."""
    folder.mkdir(parents=True, exist_ok=True)
    for name, content in files.items():
        name = name.replace("_", ".")
        text = json.dumps(content) if isinstance(content, dict) else content
        (folder / name).write_text(text)
        when = NOW - age_seconds
        os.utime(folder / name, (when, when))


def finished(runs, name, age_seconds, error_percent=0.34, seed=0):
    folder = runs / name / f"seed{seed}"
    config = settings(name, f"seed={seed}")
    result = {"command": "train", "steps": 12, "error_percent": error_percent, "config": config}
    write(folder, age_seconds, config_yaml=OmegaConf.to_yaml(config), result_json=result)
    return folder


def begun(runs, name, age_seconds, metrics, *overrides):
    folder = runs / name / "seed0"
    config = OmegaConf.to_yaml(settings(name, *overrides))
    write(folder, age_seconds, config_yaml=config, metrics_jsonl=metrics)
    return folder


def listed(capsys, *arguments):
    """The cells of each line, but for the header and what is next."""
    assert cli.main(["list", *arguments]) == 0
    header, *lines = capsys.readouterr().out.partition("\nnext: ")[0].splitlines()
    assert header.split() == [
        "error",
        "steps",
        "data",
        "set",
        "model",
        "written",
        "status",
        "folder",
    ]
    return [line.split() for line in lines]


def test_nothing_is_there(in_tmp, capsys):
    assert cli.main(["list"]) == 0
    said = capsys.readouterr().out
    assert said.startswith("there is no run in runs\nnext: capsrun train dataset=mnist5k\n")
    assert cli.main(["list", "json=true"]) == 0
    assert json.loads(capsys.readouterr().out) == []
    assert list(in_tmp.iterdir()) == []


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
    with locked(runs / "going_on" / "seed0" / ".lock"):
        found = listed(capsys)
    assert [" ".join(line) for line in found] == [
        "2.50 % 1,220 of 9,375 mnist5k capsnet 2 days ago interrupted runs/stopped/seed0",
        "0.34 % 12 mnist5k capsnet 3 h ago finished runs/first/seed0",
        "– 0 of 12 mnist5k capsnet 30 s ago interrupted runs/begun/seed0",
        "2.50 % 1,220 of 9,375 mnist5k capsnet 20 s ago running runs/going_on/seed0",
    ]


def test_columns_are_aligned(runs, capsys):
    finished(runs, "a", 5, error_percent=12.5)
    finished(runs, "with_a_longer_name", 7200)
    assert cli.main(["list"]) == 0
    header, *lines = capsys.readouterr().out.partition("\nnext: ")[0].splitlines()
    for title in ("data set", "model", "status", "folder"):
        starts = header.index(title)
        assert all(line[starts - 1] == " " != line[starts] for line in lines)
    for title in ("error", "steps", "written"):
        ends = header.index(title) + len(title)
        assert all(line[ends - 1] != " " == line[ends] for line in lines)


def test_a_run_whose_length_is_not_known(runs, capsys):
    config = ["recipe.steps=null", "recipe.epochs=2"]
    begun(runs, "old", 20, '{"step": 40, "loss/total": 1}\n', *config)
    assert " ".join(listed(capsys)[0]).startswith("– 40 of ? mnist5k")


def test_tests_are_beneath_their_run(runs, capsys):
    first, second = finished(runs, "first", 100), finished(runs, "second", 50)
    tested = {"command": "eval", "dataset": "affnist", "error_percent": 21.0, "count": 320_000}
    write(first / "eval-affnist-test", 20, result_json=tested)
    write(first / "perturb-mnist5k", 10, result_json={"command": "perturb", "dataset": "mnist5k"})
    elsewhere = {**tested, "checkpoint": "runs/second/seed0/checkpoint.pt"}
    write(runs / "elsewhere", 5, result_json=elsewhere)
    write(runs / "other", 5, result_json={"command": "eval", "dataset": "mnist"})
    write(runs / "bench", 5, result_json={"something": "else"})
    (second / "result.json").touch()
    assert [" ".join(line) for line in listed(capsys)] == [
        "0.34 % 12 mnist5k capsnet 2 min ago finished runs/first/seed0",
        "21.00 % affnist 20 s ago eval eval-affnist-test",
        "mnist5k 10 s ago perturb perturb-mnist5k",
        "0.34 % 12 mnist5k capsnet 0 s ago finished runs/second/seed0",
        "21.00 % affnist 5 s ago eval runs/elsewhere",
    ]


DAMAGED = {
    "no_json": {"result_json": "{"},
    "a_list": {"result_json": "[]"},
    "no_error": {"result_json": {"command": "train", "config": {}}},
    "no_yaml": {"config_yaml": "a: [1"},
    "text": {"config_yaml": "text"},
    "empty": {"config_yaml": ""},
    "no_seed": {"config_yaml": "name: a\nrecipe: {steps: 1}"},
    "null": {"config_yaml": "null\n"},
    "null_result": {"result_json": "null"},
}


def test_damaged_folders_do_not_hide_the_others(runs, capsys):
    finished(runs, "whole", 1)
    for name, files in DAMAGED.items():
        write(runs / name / "seed0", 100, **{"config_yaml": "", **files})
    (runs / "loop").symlink_to(runs)
    (runs / "bad_bytes" / "seed0").mkdir(parents=True)
    (runs / "bad_bytes" / "seed0" / "config.yaml").write_bytes(b"\xff\xfe\x00")
    lines = [" ".join(line) for line in listed(capsys)]
    damaged = [line for line in lines if " damaged " in line]
    assert len(damaged) == len(DAMAGED) + 1, lines
    assert any("no_json/seed0 (result.json cannot be read)" in line for line in damaged)
    assert any("no_yaml/seed0 (config.yaml cannot be read)" in line for line in damaged)
    assert sum("finished runs/whole/seed0" in line for line in lines) == 1


def test_a_run_whose_numbers_broke(runs, capsys):
    folder = begun(runs, "broken", 10, '{"step": 3}\n')
    (folder / "not_finite.pt").touch()
    (line,) = listed(capsys)
    assert " ".join(line).endswith(
        "interrupted runs/broken/seed0 (its loss or a weight was not finite)"
    )


def test_only_those_of_a_name(runs, capsys):
    for name in ("mnist-capsnet-quick", "affnist-capsnet-quick", "smoke/table1"):
        finished(runs, name, 5)
    assert len(listed(capsys)) == 3
    assert len(listed(capsys, "name=mnist-caps")) == 1
    assert len(listed(capsys, "name=mnist*quick")) == 1
    assert len(listed(capsys, "name=quick")) == 2
    assert len(listed(capsys, "name=smoke/")) == 1
    assert cli.main(["list", "name=smoek"]) == 2
    assert "did you mean 'smoke'" in capsys.readouterr().err


def test_json_is_for_programs(runs, capsys):
    finished(runs, "first", 10, seed=3)
    assert cli.main(["list", "json=true"]) == 0
    (run,) = json.loads(capsys.readouterr().out)
    assert (run["folder"], run["seed"], run["status"]) == ("runs/first/seed3", 3, "finished")
    assert (run["error_percent"], run["steps"], run["tests"]) == (0.34, 12, [])


def test_real_runs(in_tmp, tiny_run, capsys):
    """Of those that training makes; one lost its result, as if it had been killed."""
    shutil.copytree(tiny_run, in_tmp / "runs" / "whole" / "seed0")
    killed = shutil.copytree(tiny_run, in_tmp / "runs" / "killed" / "seed0")
    (killed / "result.json").unlink()
    shown = {line[-1]: " ".join(line) for line in listed(capsys)}
    assert " % 12 mnist5k capsnet " in shown["runs/whole/seed0"]
    assert " % 12 of 12 mnist5k capsnet " in shown["runs/killed/seed0"]
    rows = [json.loads(line) for line in (killed / "metrics.jsonl").read_text().splitlines()]
    assert rows[0] == {"step": 0, "total_steps": 12}


def test_it_needs_no_torch(runs):
    finished(runs, "first", 10)
    begun(runs, "second", 10, '{"step": 3}\n')
    script = (
        "import sys\n"
        "from capsrun.cli import main\n"
        "assert main(['list']) == 0\n"
        "assert not {'torch', 'matplotlib', 'numpy'} & set(sys.modules)\n"
    )
    subprocess.run([sys.executable, "-c", script], check=True)


def test_a_list_in_a_pipe_has_no_colours(runs):
    finished(runs, "first", 10)
    done = run_capsrun("list", cwd=runs.parent)
    assert done.returncode == 0
    assert "\x1b" not in done.stdout
