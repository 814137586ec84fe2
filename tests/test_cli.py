"""The command line: speed, help, composition, and one clear sentence for every mistake."""

import subprocess
import sys
import time
from pathlib import Path

import pytest
from conftest import REPOSITORY, TINY, run_capsrun, train_config, without_root

from capsrun import cli
from capsrun.config import (
    BenchConfig,
    DataConfig,
    EvalConfig,
    ExportConfig,
    PerturbConfig,
    ReportConfig,
    ReproduceConfig,
    TrainConfig,
    differing_keys,
    from_dict,
)
from capsrun.errors import UserError

SCHEMAS = {
    "train": TrainConfig,
    "eval": EvalConfig,
    "perturb": PerturbConfig,
    "export": ExportConfig,
    "data": DataConfig,
    "bench": BenchConfig,
    "reproduce": ReproduceConfig,
    "report": ReportConfig,
}
CHOICES = [
    f"{folder.name}={file.stem}"
    for folder in sorted((REPOSITORY / "configs").iterdir())
    if folder.is_dir()
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
    for name in SCHEMAS:
        assert f"capsrun {name}" in text
    assert cli.main([]) == 0
    assert capsys.readouterr().out == text


def test_version(capsys):
    assert cli.main(["--version"]) == 0
    assert capsys.readouterr().out.startswith("capsrun 0.")


def test_every_command_has_a_configuration_that_composes():
    assert set(cli.COMMANDS) == set(SCHEMAS)
    for name, schema in SCHEMAS.items():
        from_dict(schema, cli.compose(name))


@pytest.mark.parametrize("choice", CHOICES)
def test_every_yaml_composes(choice):
    group, name = choice.split("=")
    if group in ("budget", "queue"):
        config = from_dict(ReproduceConfig, cli.compose("reproduce", [choice]))
        assert config.queue.entries if group == "queue" else config.budget.name == name
    elif group == "experiment":
        train_config(choice)
    else:
        # Cross-entropy is for networks without capsules.
        config = train_config(*["model=cnn_baseline"] * ("entropy" in choice), choice)
        assert getattr(config, group).name == name


def test_every_yaml_is_found():
    assert len(CHOICES) == len(list((REPOSITORY / "configs").glob("*/*.yaml"))) >= 9


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
        (["train", "seed"], ["'seed' cannot be read"]),
        (["eval", "split=exam"], ["split is 'exam'", "test, validation, train"]),
        (["eval", "mask=none"], ["mask is 'none'"]),
        (["eval", "checkpoint=nowhere"], ["nowhere", "capsrun train dataset=mnist"]),
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


def test_an_unknown_option_is_refused(in_tmp, capsys):
    with pytest.raises(SystemExit) as caught:
        cli.main(["train", "--fast"])
    assert caught.value.code == 2
    assert "--fast" in capsys.readouterr().err


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
        return cli.run_name(train_config(*overrides), overrides)

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
    assert run_capsrun("eval", *sources, cwd=tmp_path, **environment).returncode == 0
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
