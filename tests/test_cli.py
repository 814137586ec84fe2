"""The command line: speed, help, composition, and one clear sentence for every mistake."""

import contextlib
import dataclasses
import fcntl
import os
import pty
import re
import shlex
import signal
import struct
import subprocess
import sys
import termios
import time
from pathlib import Path

import pytest
from conftest import REPOSITORY, TINY, run_capsrun, train_config, without_root

from capsrun import cli, completion, compose, names, terminal
from capsrun.commands.list import ListConfig
from capsrun.commands.report import ReportConfig
from capsrun.commands.reproduce import ReproduceConfig
from capsrun.config import (
    BenchConfig,
    DataConfig,
    EvalConfig,
    ExploreConfig,
    ExportConfig,
    PerturbConfig,
    TrainConfig,
)
from capsrun.errors import UserError
from capsrun.settings import differing_keys, from_dict

SCHEMAS = {
    "train": TrainConfig,
    "eval": EvalConfig,
    "perturb": PerturbConfig,
    "explore": ExploreConfig,
    "export": ExportConfig,
    "data": DataConfig,
    "list": ListConfig,
    "bench": BenchConfig,
    "reproduce": ReproduceConfig,
    "report": ReportConfig,
}
CHOICES = [
    f"{folder.name}={file.stem}"
    for folder in sorted((REPOSITORY / "configs").iterdir())
    if folder.is_dir() and folder.name != "sweep"  # see test_sweeps.py
    for file in sorted(folder.glob("*.yaml"))
]


def mistake(capsys, *arguments):
    """Run a command that is wrong; returns the one line that it says."""
    assert cli.main(list(arguments)) == 2
    captured = capsys.readouterr()
    assert "Traceback" not in captured.err
    assert captured.err.count("\n") == 1, captured.err
    assert captured.err.startswith("capsrun")
    return captured.err


def fastest(*arguments, cwd):
    times = []
    for _ in range(3):
        began = time.perf_counter()
        assert run_capsrun(*arguments, cwd=cwd).returncode == 0
        times.append(time.perf_counter() - began)
    return min(times)


def test_help_answers_in_half_a_second(tmp_path):
    assert fastest("--help", cwd=tmp_path) < 0.5


def test_the_configuration_is_shown_in_a_second_and_a_half(tmp_path):
    assert fastest("train", "--cfg", "job", cwd=tmp_path) < 1.5


@pytest.mark.parametrize("arguments", [["--help"], ["train", "--cfg", "job"], ["train", "--help"]])
def test_help_imports_no_torch(arguments):
    script = (
        "import sys\n"
        "from capsrun.cli import main\n"
        f"main({arguments!r})\n"
        "assert 'torch' not in sys.modules and 'matplotlib' not in sys.modules\n"
    )
    done = subprocess.run(
        [sys.executable, "-c", script], capture_output=True, text=True, check=False
    )
    assert done.returncode == 0, done.stderr


def test_help_names_every_command_with_an_example(capsys):
    assert cli.main(["--help"]) == 0
    text = capsys.readouterr().out
    for name in (*SCHEMAS, "completion"):
        assert f"capsrun {name}" in text
    assert cli.main([]) == 0
    assert capsys.readouterr().out == text


def test_version(capsys):
    assert cli.main(["--version"]) == 0
    assert capsys.readouterr().out.startswith("capsrun 0.")


def test_every_command_has_a_configuration_that_composes():
    assert set(cli.COMMANDS) == set(SCHEMAS)
    for name, schema in SCHEMAS.items():
        from_dict(schema, compose.compose(name))


@pytest.mark.parametrize("choice", CHOICES)
def test_every_yaml_composes(choice):
    group, name = choice.split("=")
    if group in ("budget", "queue"):
        config = from_dict(ReproduceConfig, compose.compose("reproduce", [choice]))
        assert config.queue.entries if group == "queue" else config.budget.name == name
    elif group == "experiment":
        train_config(choice)
    else:
        # Cross-entropy is for networks without capsules.
        config = train_config(*["model=cnn_baseline"] * ("entropy" in choice), choice)
        assert getattr(config, group).name == name


def test_every_yaml_is_found():
    files = list((REPOSITORY / "configs").glob("*/*.yaml"))
    assert len(CHOICES) == len([file for file in files if file.parent.name != "sweep"]) >= 9


@pytest.mark.parametrize(
    ("arguments", "parts"),
    [
        (["trian"], ["'trian'", "did you mean 'train'"]),
        (["train", "sede=3"], ["'sede'", "did you mean 'seed'"]),
        (["train", "iterations=3"], ["did you mean 'routing.iterations'"]),
        (
            ["train", "model=cnn_baseline", "routing.iterations=1"],
            ["with model=cnn_baseline there is no setting"],
        ),
        (["train", "model=cnn_baseline", "model.chanels=[8]"], ["did you mean 'model.channels'"]),
        (["bench", "dataset=affnist_like"], ["affnist_like is for testing"]),
        (["bench", "recipe=affnist"], ["a recipe that does not say when to stop"]),
        (["train", "+sede=3"], ["no setting 'sede'"]),
        (["train", "~seed"], ["seed has no value"]),
        (["train", "dataset=null"], ["dataset"]),
        (["train", "runs_dir='${nope}'"], ["nope"]),
        (["train", "recipe.epochs=inf"], ["recipe.epochs is inf", "finite"]),
        (["train", "seed=99999999999999999999"], ["seed is 99999999999999999999", "at most"]),
        (["eval", "routing.iterations=3"], ["no setting", "routing"]),
        (["perturb", "model=capsnet"], ["no setting", "model"]),
        (["train", "dataset=mnits"], ["dataset=mnits", "did you mean 'mnist'", "fashion_mnist"]),
        (["train", "loss=none"], ["loss=none", "authors, cross_entropy, paper"]),
        (["train", "seed=zero"], ["seed", "'zero'"]),
        (["train", "seed=1.5"], ["seed", "1.5"]),
        (["train", "seed=-1"], ["seed is -1", "at least 0"]),
        (["train", "routing.leaky=perhaps"], ["routing.leaky", "bool"]),
        (["train", "recipe.learning_rate=fast"], ["recipe.learning_rate", "fast"]),
        (["train", "routing.iterations=0"], ["routing.iterations is 0", "at least 1"]),
        (["train", "routing.iterations=-3"], ["routing.iterations is -3"]),
        (["train", "recipe.batch_size=0"], ["recipe.batch_size is 0"]),
        (["train", "recipe.epochs=0"], ["recipe.epochs is 0"]),
        (["train", "recipe.epochs=null", "recipe.steps=-5"], ["recipe.steps is -5"]),
        (["train", "recipe.steps=5"], ["exactly one of recipe.steps and recipe.epochs"]),
        (["train", "recipe.decay_steps=5"], ["exactly one of recipe.decay_steps"]),
        (["train", "recipe.learning_rate=nan"], ["recipe.learning_rate is nan"]),
        (["train", "loss.margin_present=1.5"], ["loss.margin_present is 1.5", "at most 1"]),
        (["train", "model.decoder_widths=[512,0]"], ["model.decoder_widths is 0"]),
        (["train", "device=tpu"], ["device is 'tpu'", "auto, cpu, cuda"]),
        (["train", "model.primary_scale=half"], ["model.primary_scale", "authors, one"]),
        (["train", "name=.."], ["name"]),
        (["train", "name=../elsewhere"], ["name"]),
        (["train", "seed=[1"], ["'seed=[1' cannot be read"]),
        (["train", "seed"], ["'seed' cannot be read", "did you mean seed=…"]),
        (["train", "mnist"], ["'mnist' cannot be read", "did you mean dataset=mnist"]),
        (["train", "mnits"], ["did you mean dataset=mnist"]),
        (["train", "dataset", "mnist"], ["did you mean dataset=…"]),
        (["train", "x y"], ["quote values with special characters"]),
        (["train", "--dataset", "mnist"], ["no option --dataset", "dataset=mnist"]),
        (["train", "--dataset=mnist"], ["no option --dataset", ": dataset=mnist"]),
        (["train", "--learning-rate", "0.1"], [": recipe.learning_rate=0.1"]),
        (["train", "--hlep"], ["no option --hlep", "did you mean '--help'"]),
        (["train", "--fast"], ["no option --fast", "capsrun train --help"]),
        (["train", "-x"], ["no option -x"]),
        (["bench", "--profil"], ["did you mean '--profile'"]),
        (["mnist"], ["no command 'mnist'", "`capsrun train dataset=mnist`"]),
        (["cnn_baseline"], ["`capsrun train model=cnn_baseline`"]),
        (["smoke"], ["`capsrun reproduce budget=smoke`"]),
        (["table1"], ["`capsrun reproduce targets=table1`"]),
        (["figure_4"], ["`capsrun reproduce targets=figure_4`"]),
        (["dataset=mnist"], ["capsrun train dataset=mnist"]),
        (["completon"], ["did you mean 'completion'"]),
        (["xyzzy"], ["`capsrun` lists them"]),
        (["completion", "instal"], ["did you mean 'install'"]),
        (["completion", "install", "fsh"], ["'fsh', did you mean 'fish'"]),
        (["reproduce", "targets=tabel1"], ["did you mean 'table1'"]),
        (["reproduce", "table1"], ["did you mean targets=table1"]),
        (["reproduce", "budget=smok"], ["did you mean 'smoke'"]),
        (["perturb", "perturb.invert=yse"], ["did you mean 'yes'"]),
        (["train", "device=cdua"], ["did you mean 'cuda'"]),
        (["train", "dataset=multimnist", "dataset.source=kmnits"], ["did you mean 'kmnist'"]),
        (["train", "dataset.name=mnits"], ["no data set 'mnits', did you mean 'mnist'"]),
        (["eval", "split=exam"], ["split is 'exam'", "test, validation, train"]),
        (["eval", "mask=none"], ["mask is 'none'"]),
        (["eval", "checkpoint=nowhere"], ["nowhere", "capsrun list"]),
        (["eval", "seed=3"], ["seed3", "capsrun train dataset=mnist seed=3"]),
        (["perturb", "dataset=mnist5k"], ["capsrun train dataset=mnist5k"]),
        (["data", "samples=0"], ["samples is 0"]),
    ],
    ids=lambda value: " ".join(value) if value and isinstance(value[0], str) else None,
)
def test_mistakes_are_one_clear_sentence(in_tmp, capsys, arguments, parts):
    message = mistake(capsys, *arguments)
    for part in parts:
        assert part in message
    assert list(in_tmp.iterdir()) == []


def test_the_options_are_those_of_hydra():
    from hydra._internal.utils import get_args_parser

    found = [option for action in get_args_parser()._actions for option in action.option_strings]
    assert {*completion.OPTIONS, *completion.SHORT_OPTIONS} == set(found)


@pytest.mark.parametrize("option", ["--cfg=job", "-c", "--conf", "-cjob", "--mul", "--info"])
def test_options_of_hydra_are_let_through(option):
    cli.refuse_unknown_flags("train", [option, "job", "seed=-1"])


def test_cuda_without_a_gpu(in_tmp, capsys, monkeypatch):
    monkeypatch.setattr("torch.cuda.is_available", lambda: False)
    assert "no CUDA GPU" in mistake(capsys, "train", "device=cuda")
    assert list(in_tmp.iterdir()) == []


def test_an_output_folder_that_cannot_be_written(in_tmp, capsys):
    locked = in_tmp / "locked"
    locked.mkdir()
    locked.chmod(0o555)
    in_tmp.chmod(0o755)
    for parent in in_tmp.parents[:2]:
        parent.chmod(0o755)
    with without_root():
        message = mistake(capsys, "train", *TINY, "runs_dir=locked/runs")
    assert "locked/runs" in message
    assert "cannot be written" in message


def test_a_file_where_the_output_folder_should_be(in_tmp, capsys):
    (in_tmp / "runs").write_text("")
    assert "cannot be written" in mistake(capsys, "train", *TINY)
    assert (in_tmp / "runs").read_text() == ""


def test_run_names_follow_from_what_was_chosen():
    def name(*overrides):
        return names.run_name(train_config(*overrides), overrides)

    assert name() == name("dataset=mnist", "seed=3", "device=cpu") == "mnist-capsnet-quick"
    assert name("record.log_every_steps=1", "runs_dir=x", "name=null") == "mnist-capsnet-quick"
    assert name("recipe=authors", "dataset=kmnist") == "kmnist-capsnet-authors"
    assert name("routing.iterations=1") == "mnist-capsnet-quick+routing.iterations-1"
    assert name("seed=1", "routing.iterations=1", "loss=paper") == (
        "mnist-capsnet-quick+loss-paper+routing.iterations-1"
    )
    assert name("model.decoder_widths=[16, 8]") == "mnist-capsnet-quick+model.decoder_widths-_16_8"
    assert "/" not in name("dataset.trained_on=a/b")


def test_the_name_of_a_run_can_be_given_back(in_tmp, capsys):
    overrides = [*TINY, "recipe.steps=1"]
    assert cli.main(["train", *overrides]) == 0
    (checkpoint,) = in_tmp.rglob("checkpoint.pt")
    folder = checkpoint.parent.relative_to(in_tmp)
    assert "+" in str(folder)
    assert cli.main(["eval", "dataset=mnist5k", f"checkpoint={folder}"]) == 0


def test_multirun_makes_a_run_for_each_combination(in_tmp):
    done = run_capsrun(
        "train",
        "--multirun",
        *TINY,
        "recipe.steps=1",
        "routing.iterations=1,2",
        "seed=0,1",
        cwd=in_tmp,
    )
    assert done.returncode == 0, done.stderr
    results = sorted(path.parent.relative_to(in_tmp) for path in in_tmp.rglob("result.json"))
    assert len(results) == 4
    assert {path.name for path in results} == {"seed0", "seed1"}
    assert done.stdout.count("test error") >= 4


def test_an_option_may_stand_between_settings(capsys):
    assert cli.main(["train", "seed=3", "--cfg", "job", "dataset=kmnist"]) == 0
    shown = capsys.readouterr().out
    assert "seed: 3" in shown
    assert "name: kmnist" in shown


def test_different_settings_under_one_name_are_refused(in_tmp, capsys):
    assert cli.main(["train", *TINY, "recipe.steps=1", "name=same"]) == 0
    capsys.readouterr()
    message = mistake(capsys, "train", *TINY, "recipe.steps=2", "name=same")
    assert "recipe.steps (there 1, now 2)" in message


def test_differing_keys_by_hand():
    ours = {"a": 1, "b": {"c": 2, "d": 3}}
    assert differing_keys(ours, {"a": 1, "b": {"c": 2, "d": 3}}) == []
    assert differing_keys(ours, {"a": 1, "b": {"c": 5}}) == [("b.c", 2, 5), ("b.d", 3, None)]


def test_configurations_of_the_wrong_kind_are_refused():
    for values in (None, 3, "text", [1], {"seed": 0}):
        with pytest.raises(UserError):
            from_dict(TrainConfig, values)


@pytest.fixture(scope="session")
def installed_wheel(tmp_path_factory) -> Path:
    """A folder into which the wheel is installed."""
    folder = tmp_path_factory.mktemp("wheel")
    pip = [sys.executable, "-m", "pip", "--quiet", "--disable-pip-version-check"]
    build = [*pip, "wheel", "--no-deps", "--no-build-isolation", "-w", str(folder), str(REPOSITORY)]
    subprocess.run(build, check=True)
    (wheel,) = folder.glob("*.whl")
    subprocess.run(
        [*pip, "install", "--no-deps", "--target", str(folder / "site"), str(wheel)], check=True
    )
    return folder / "site"


def test_the_installed_wheel_works_from_another_directory(installed_wheel, tmp_path):
    assert (installed_wheel / "capsrun" / "configs" / "dataset" / "mnist.yaml").exists()
    environment = {"PYTHONPATH": str(installed_wheel)}
    where = subprocess.run(
        [sys.executable, "-c", "import capsrun; print(capsrun.__file__)"],
        cwd=tmp_path,
        env=environment,
        capture_output=True,
        text=True,
        check=True,
    )
    assert where.stdout.startswith(str(installed_wheel))
    trained = run_capsrun("train", *TINY, "name=w", cwd=tmp_path, **environment)
    assert trained.returncode == 0, trained.stderr
    assert trained.stdout.splitlines()[-1].startswith("test error ")
    sources = ["dataset=mnist5k", "checkpoint=runs/w/seed0"]
    # It does what eval does, and needs the parts of the page, which are in the wheel too.
    few = ["explore.images=1", "explore.search=20"]
    explored = run_capsrun("explore", *sources, *few, cwd=tmp_path, **environment)
    assert explored.returncode == 0, explored.stderr
    assert (tmp_path / "runs" / "w" / "seed0" / "explore-mnist5k.html").exists()
    assert (installed_wheel / "bin" / "capsrun").exists()


def test_a_reader_that_has_seen_enough(tmp_path):
    done = subprocess.run(
        f"{sys.executable} -m capsrun train --help | head -1",
        shell=True,
        cwd=tmp_path,
        capture_output=True,
        text=True,
        check=False,
    )
    assert done.stdout == "capsrun train [key=value …]\n"
    assert done.stderr == ""


def test_times_and_sizes_are_in_the_units_that_suit_them():
    times = {
        0: "0 s",
        0.02: "0.02 s",
        0.34: "0.3 s",
        3: "3 s",
        9.97: "10 s",
        59.7: "1 min",
        100: "1 min 40 s",
        3_000: "50 min",
        4_800: "1 h 20 min",
        7_199: "2 h",
        40_000: "11 h",
        90_000: "1 day 1 h",
        2_000_000: "23 days",
    }
    assert {seconds: terminal.duration(seconds) for seconds in times} == times
    assert [terminal.ago(s) for s in (-1, 20, 60, 3 * 3600 + 100, 86_400)] == [
        "0 s ago",
        "20 s ago",
        "1 min ago",
        "3 h ago",
        "1 day ago",
    ]
    assert [terminal.size(n) for n in (0, 999, 11_594_722, 150e6, 999.9e6, 5e12)] == [
        "0 bytes",
        "999 bytes",
        "11.6 MB",
        "150 MB",
        "1.0 GB",
        "5000 GB",
    ]


def on_a_terminal(*arguments, cwd, **environment) -> str:
    """What a command shows in a terminal of 100 columns, with its control sequences."""
    main, side = pty.openpty()
    fcntl.ioctl(side, termios.TIOCSWINSZ, struct.pack("HHHH", 24, 100, 0, 0))
    inherited = {k: v for k, v in os.environ.items() if k != "NO_COLOR"}
    process = subprocess.Popen(
        [sys.executable, "-m", "capsrun", *arguments],
        cwd=cwd,
        env={**inherited, "TERM": "xterm", **environment},
        stdin=side,
        stdout=side,
        stderr=side,
    )
    os.close(side)
    shown = b""
    with contextlib.suppress(OSError):  # Linux's way to say that the other side is closed
        while piece := os.read(main, 4096):
            shown += piece
    os.close(main)
    assert process.wait() in (0, 2)
    return shown.decode()


@pytest.mark.parametrize("environment", [{"NO_COLOR": "1"}, {"TERM": "dumb"}])
def test_colours_are_for_terminals_that_want_them(tmp_path, environment):
    assert "\x1b[31mcapsrun:\x1b[0m there is no command" in on_a_terminal("trian", cwd=tmp_path)
    assert "\x1b" not in on_a_terminal("trian", cwd=tmp_path, **environment)
    assert "\x1b" not in run_capsrun("trian", cwd=tmp_path, TERM="xterm").stderr


def test_training_on_a_terminal_ends_with_the_answer_in_bold(in_tmp, capsys):
    shown = on_a_terminal("train", *TINY, "name=t", cwd=in_tmp)
    *_, suggested, _, _, answered = shown.split("\r\n")[:-1]
    assert suggested == "next: capsrun eval dataset=mnist5k checkpoint=runs/t/seed0"
    assert re.fullmatch(r"\x1b\[1mtest error .* % \(.* of 1,000\)\x1b\[0m", answered)
    assert "testing:   0%" in shown, "the tests in between have a bar of their own"
    lines = [line for line in re.split(r"[\r\n]+", shown) if line.startswith("after ")]
    assert len(lines) == 2, "which does not break the other lines"
    assert cli.main(suggested.split(", ")[0].split()[2:]) == 0
    plain = capsys.readouterr().out
    assert "\x1b" not in plain
    assert plain.splitlines()[-1] == answered[4:-4]


def suggested_words(lines):
    """The words of each command on the lines that say what is next."""
    (first,) = [number for number, line in enumerate(lines) if line.startswith("next: ")]
    marked = [line for line in lines[first:] if line[:6] in ("next: ", "      ")]
    commands = [shlex.split(line[6:]) for line in marked]
    assert all(words[0] == "capsrun" for words in commands), lines
    return [words[1:] for words in commands]


@pytest.mark.parametrize(
    ("name", "overrides", "words"),
    [
        ("mnist5k-capsnet-quick", [], []),
        ("mnist5k-capsnet-quick", ["seed=3"], ["seed=3"]),
        ("mnist5k-capsnet-quick", ["runs_dir=a+b"], ["runs_dir=a+b"]),
        ("mine", ["seed=3"], ["checkpoint=runs/mine/seed3"]),
        ("mine", ["runs_dir='it is'"], ["checkpoint='it is/mine/seed0'"]),
        (
            "mine",
            ["dataset.validation=10", "dataset.standardise=true"],
            [
                "dataset.standardise=true",
                "dataset.validation=10",
                "checkpoint=runs/mine/seed0",
            ],
        ),
    ],
)
def test_what_is_suggested_after_training_finds_the_model(name, overrides, words):
    config = train_config("dataset=mnist5k", f"name={name}", *overrides)
    folder = Path(config.runs_dir) / name / f"seed{config.seed}"
    assert names.model_words(config, folder) == ["dataset=mnist5k", *words]
    assert names.model_words(config, folder / "checkpoint.pt") == ["dataset=mnist5k", *words]
    tested = from_dict(EvalConfig, compose.compose("eval", ["dataset=mnist5k", *words]))
    assert Path(tested.checkpoint) == folder
    own = vars(config.dataset)
    assert differing_keys(vars(tested.dataset), own) == []


def test_mnist_need_not_be_said():
    config = train_config()
    assert names.model_words(config, Path("runs/mnist-capsnet-quick/seed0")) == []


def test_each_command_says_what_is_next(in_tmp, capsys):
    def run(*arguments):
        assert cli.main(list(arguments)) == 0
        lines = capsys.readouterr().out.splitlines()
        found = suggested_words(lines)
        for command, *words in found:
            from_dict(SCHEMAS[command], compose.compose(command, words))
        return [command for command, *_ in found], lines

    default = "name=mnist5k-capsnet-quick"
    assert run("list")[0] == ["train", "train"]
    commands, lines = run("train", *TINY, default)
    assert commands == ["eval", "perturb", "explore"]
    assert lines[-1].startswith("test error ")
    assert run("train", *TINY, default)[0] == commands, "a finished run says so too"
    commands, lines = run("eval", "dataset=mnist5k")
    assert commands == ["perturb", "explore", "report"]
    assert lines[-1].startswith("test error ")
    assert run("perturb", "dataset=mnist5k", "perturb.digit=5")[0] == ["explore", "report"]
    few = ["explore.images=1", "explore.search=50"]
    assert run("explore", "dataset=mnist5k", *few)[0] == ["perturb", "export"]
    assert cli.main(["export", "dataset=mnist5k", "format=torch"]) == 0
    assert "\nnext: model.pt2 in Python" in capsys.readouterr().out
    assert run("list")[0] == ["eval", "report"]
    assert run("data", "dataset=mnist5k")[0] == ["train"]
    assert run("reproduce", "targets=[table1]", "timing=false", "only_plan=true")[0] == [
        "reproduce"
    ]
    cnn = ["dataset=mnist5k", "model=cnn_baseline", "recipe.epochs=null", "recipe.steps=1"]
    small = ["model.channels=[2]", "model.kernels_px=[5]", "model.pools_px=[4]", "model.hidden=[8]"]
    assert run("train", *cnn, *small, "name=cnn")[0] == ["eval"], "it has no capsules"


def test_a_checkpoint_of_a_like_name_is_hinted_at(in_tmp, capsys, tiny_run):
    folder = in_tmp / "runs" / "mnist-capsnet-quick" / "seed0"
    folder.mkdir(parents=True)
    (folder / "checkpoint.pt").touch()
    hint = "did you mean 'runs/mnist-capsnet-quick/seed0'?"
    for wrong in (
        "runs/mnist-capsnet-quik/seed0",
        "run/mnist-capsnet-quick/seed0",
        "runs/mnist-capsnet-quick",
    ):
        assert hint in mistake(capsys, "eval", f"checkpoint={wrong}")
    assert "did you mean" not in mistake(capsys, "eval", "checkpoint=elsewhere")


def ask_and_swallow(*_):
    """As a library does that is interrupted while it is imported."""
    try:
        signal.raise_signal(signal.SIGINT)
    except KeyboardInterrupt:
        raise AttributeError("module 'numpy' has no attribute 'minimum'") from None


@pytest.mark.parametrize(
    ("act", "code"),
    [(lambda *_: signal.raise_signal(signal.SIGTERM), 143), (ask_and_swallow, 130)],
)
def test_a_signal_before_there_is_anything_to_save(monkeypatch, capsys, act, code):
    before = [signal.getsignal(number) for number in (signal.SIGINT, signal.SIGTERM)]
    command = dataclasses.replace(cli.COMMANDS["list"], run=act)
    monkeypatch.setitem(cli.COMMANDS, "list", command)
    assert cli.main(["list"]) == code
    said = capsys.readouterr().err
    assert "stopped at once; the same command goes on after what is saved" in said
    assert said.endswith("capsrun list\n")
    assert before == [signal.getsignal(number) for number in (signal.SIGINT, signal.SIGTERM)]
