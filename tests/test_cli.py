"""The command line: speed, help, composition, and one clear sentence for every mistake."""

import contextlib
import fcntl
import io
import os
import pty
import re
import resource
import shlex
import shutil
import signal
import struct
import subprocess
import sys
import termios
import zipfile
from pathlib import Path

import pytest
from conftest import REPOSITORY, TINY, load_data, train_config, untrained, without_root
from PIL import Image

from capsrun import cli, compose, experiments, names, terminal, yaml_files
from capsrun.config import EvalConfig, TrainConfig
from capsrun.errors import UserError
from capsrun.experiments import settings_for
from capsrun.model_config import ROUTINGS
from capsrun.runs.checkpoint import check_dataset, find_model
from capsrun.settings import differing_keys, from_dict

CHOICES = [
    f"{folder.name}={file.stem}"
    for folder in sorted((REPOSITORY / "configs").iterdir())
    if folder.is_dir() and folder.name != "sweep"  # see test_sweeps.py
    for file in sorted(folder.glob("*.yaml"))
]


@pytest.mark.parametrize(
    ("arguments", "seconds"),
    [(["--help"], 0.3), (["train", "--cfg", "job"], 1.0), (["train", "--help"], 1.0)],
)
def test_what_needs_no_torch_answers_at_once(arguments, seconds):
    script = (
        "import sys\n"
        "from capsrun.cli import main\n"
        f"main({arguments!r})\n"
        "assert not {'torch', 'matplotlib', 'numpy', 'argcomplete'} & set(sys.modules)\n"
    )
    used = resource.getrusage(resource.RUSAGE_CHILDREN).ru_utime
    subprocess.run([sys.executable, "-c", script], check=True, stdout=subprocess.DEVNULL)
    # Of the processor: other processes may be at work here.
    assert resource.getrusage(resource.RUSAGE_CHILDREN).ru_utime - used < 1.5 * seconds


def test_help_and_version(printed):
    """Help names every command, with an example."""
    text = printed("--help")
    for name in cli.ALL:
        assert any(f"capsrun {name}" in line for line in text)
    assert printed() == text
    assert printed("--version")[0].startswith("capsrun 0.")
    assert printed("train", "--version") == printed("--version")


@pytest.mark.parametrize("name", cli.COMMANDS)
def test_every_command_has_a_configuration_that_composes(name):
    settings_for(compose.schema_of(name), compose.compose(name))


@pytest.mark.parametrize("choice", CHOICES)
def test_every_yaml_composes(choice):
    group, name = choice.split("=")
    if group in ("budget", "queue"):
        config = from_dict(compose.schema_of("reproduce"), compose.compose("reproduce", [choice]))
        assert config.queue.entries if group == "queue" else config.budget.name == name
    elif group == "experiment":
        train_config(choice)
    elif group == "routing":
        routing = train_config(choice).routing
        algorithm = "dynamic" if name in ("uniform", "leaky") else name
        assert getattr(routing, "algorithm", "dynamic") == algorithm
        assert type(routing) is ROUTINGS[algorithm].settings
    elif group == "attack":
        assert settings_for(EvalConfig, compose.compose("eval", [choice])).attack.name == name
    else:
        # Cross-entropy is for networks without capsules.
        fitting = ["model=cnn_baseline"] * ("entropy" in choice)
        fitting += ["routing=self_routing"] * (name == "log_likelihood")
        fitting += ["dataset.path=mine"] * (name in ("folder", "idx", "table"))
        config = train_config(*fitting, choice)
        assert getattr(config, group).name == name


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
        (
            ["train", "dataset=affnist_like", "dataset.source=mnist5k"],
            ["for testing; train on dataset=mnist_padded"],
        ),
        (["train", "+sede=3"], ["no setting 'sede'"]),
        (["train", "~seed"], ["seed has no value"]),
        (["train", "runs_dir='${nope}'"], ["nope"]),
        (["train", "recipe.epochs=inf"], ["recipe.epochs is inf", "finite"]),
        (["train", "seed=99999999999999999999"], ["seed is 99999999999999999999", "below 2^63"]),
        (["train", "dataset=mnits"], ["dataset=mnits", "did you mean 'mnist'", "fashion_mnist"]),
        (["train", "loss=none"], ["loss=none", "authors, cross_entropy, log_likelihood, paper"]),
        (["train", "seed=zero"], ["seed", "'zero'"]),
        (["train", "seed=1.5"], ["seed", "1.5"]),
        (["train", "seed=-1"], ["seed is -1", "at least 0"]),
        (["train", "routing.leaky=perhaps"], ["routing.leaky", "bool"]),
        (["train", "recipe.learning_rate=fast"], ["recipe.learning_rate", "fast"]),
        (["train", "routing.iterations=0"], ["routing.iterations is 0", "at least 1"]),
        (
            ["train", "recipe.steps=5", "recipe.epochs=1"],
            ["exactly one of recipe.steps and recipe.epochs"],
        ),
        (
            ["train", "recipe.decay_steps=5", "recipe.decay_periods=1"],
            ["exactly one of recipe.decay_steps"],
        ),
        (["train", "loss.margin_present=1.5"], ["loss.margin_present is 1.5", "at most 1"]),
        (["train", "model.decoder_widths=[512,0]"], ["model.decoder_widths is 0"]),
        (["train", "device=tpu"], ["device is 'tpu'", "auto, cpu, cuda"]),
        (["train", "model.primary_scale=half"], ["model.primary_scale", "authors, one"]),
        (["train", "name=../elsewhere"], ["name"]),
        (["train", "seed=[1"], ["'seed=[1' cannot be read"]),
        (["train", "seed"], ["'seed' cannot be read", "did you mean seed=…"]),
        (["train", "mnist"], ["'mnist' cannot be read", "did you mean dataset=mnist"]),
        (["train", "dataset", "mnist"], ["did you mean dataset=…"]),
        (["train", "x y"], ["quote values with special characters"]),
        (["train", "--dataset", "mnist"], ["no option --dataset", "dataset=mnist"]),
        (["train", "--learning-rate", "0.1"], [": recipe.learning_rate=0.1"]),
        (["train", "--hlep"], ["no option --hlep", "did you mean '--help'"]),
        (["train", "--fast"], ["no option --fast", "capsrun train --help"]),
        (["train", "-x"], ["no option -x"]),
        (["bench", "--profil"], ["did you mean '--profile'"]),
        (["mnist"], ["no command 'mnist'", "`capsrun train dataset=mnist`"]),
        (["smoke"], ["`capsrun reproduce budget=smoke`"]),
        (["table1"], ["`capsrun reproduce targets=table1`"]),
        (["dataset=mnist"], ["capsrun train dataset=mnist"]),
        (["completon"], ["did you mean 'completion'"]),
        (["xyzzy"], ["`capsrun` lists them"]),
        (["completion", "instal"], ["did you mean 'install'"]),
        (["completion", "install", "fsh"], ["'fsh', did you mean 'fish'"]),
        (["reproduce", "targets=table2"], ["no experiment 'table2', did you mean 'table1'"]),
        (["reproduce", "targets=[]"], ["there is nothing to run"]),
        (["reproduce", "queue=cpu", "targets=[table1]"], ["leave targets= away"]),
        (["reproduce", "queue=cpu", "budget=smoke"], ["leave budget= away"]),
        (["reproduce", "queue=gpu", "seeds=[0]"], ["leave seeds= away"]),
        (["reproduce", "table1"], ["did you mean targets=table1"]),
        (["reproduce", "budget=smok"], ["did you mean 'smoke'"]),
        (["train", "dataset=multimnist", "dataset.source=kmnits"], ["did you mean 'kmnist'"]),
        (["train", "dataset.name=mnits"], ["no data set 'mnits', did you mean 'mnist'"]),
        (["eval", "split=exam"], ["split is 'exam'", "test, validation, train"]),
        (["eval", "checkpoint=nowhere"], ["nowhere", "capsrun list"]),
        (["eval", "seed=3"], ["seed3", "capsrun train dataset=mnist seed=3"]),
        (
            ["eval", "dataset=affnist_like"],  # which is not trained on
            [
                "runs/mnist_padded-capsnet-affnist/seed0",
                "`capsrun train dataset=mnist_padded recipe=affnist`",
            ],
        ),
        (
            ["eval", "dataset=cifar10", "seed=3"],
            [
                "runs/cifar10-capsnet_cifar10-quick/seed3",
                "`capsrun train dataset=cifar10 model=capsnet_cifar10 seed=3`",
            ],
        ),
    ],
    ids=lambda value: " ".join(value) if value and isinstance(value[0], str) else None,
)
def test_mistakes_are_one_clear_sentence(in_tmp, arguments, parts, refused):
    message = refused(*arguments)
    for part in parts:
        assert part in message
    assert list(in_tmp.iterdir()) == []


def test_the_options_are_those_of_hydra():
    from hydra._internal.utils import get_args_parser

    found = [option for action in get_args_parser()._actions for option in action.option_strings]
    not_here = {"--shell-completion", "--experimental-rerun", "--hydra-help", "--version"}
    not_here |= {"--package", "--run", "--config-path", "--config-name"}
    elsewhere = {"-sc", "-p", "-r", "-cp", "-cn"} | {"-h", "-cd"}  # and what is answered before
    assert {*compose.OPTIONS, *compose.SHORT_OPTIONS} == set(found) - not_here - elsewhere


@pytest.mark.parametrize(
    "words", ["--cfg=job", "-c job", "-cjob", "--cf all", "--mul", "-m", "--info", "-i config"]
)
def test_options_of_hydra_are_let_through(words):
    compose.refuse_unknown_options("train", ["seed=-1", *words.split()])


@pytest.mark.parametrize(
    ("words", "said"),
    [
        ("--cfg", "--cfg is followed by one of job, hydra, all: --cfg job"),
        ("--cfg seed=1", "--cfg is followed by"),
        ("--cfg=jbo", "--cfg is followed by"),
        ("-c jbo", "--cfg is followed by"),
        ("--info=X", "--info is followed by one of all, config"),
        ("--info seed=1", "--info is followed by"),
        ("--config-name eval", "no option --config-name, did you mean '--config-dir'?"),
        ("--config-path=/tmp", "no option --config-path"),
        ("-cp /tmp", "no option -cp"),
        ("-cn eval", "no option -cn"),
        ("--package model --cfg job", "no option --package"),
        ("-p model --cfg job", "no option -p"),
        ("--run", "no option --run"),
        ("--hydra-help", "no option --hydra-help"),
        ("--h", "no option --h"),
        ("--c job", "no option --c"),
        ("--shell-completion install=bash", "no option --shell-completion"),
        ("--", "no option --;"),
    ],
)
def test_other_options_are_refused_in_a_sentence(words, said, refused, in_tmp):
    assert said in refused("train", *words.split())
    assert list(in_tmp.iterdir()) == []


def test_cuda_without_a_gpu(in_tmp, monkeypatch, refused):
    monkeypatch.setattr("torch.cuda.is_available", lambda: False)
    assert "no CUDA GPU" in refused("train", "device=cuda")
    assert list(in_tmp.iterdir()) == []


def test_an_output_folder_that_cannot_be_written(in_tmp, refused):
    locked = in_tmp / "locked"
    locked.mkdir()
    locked.chmod(0o555)
    in_tmp.chmod(0o755)
    for parent in in_tmp.parents[:2]:
        parent.chmod(0o755)
    with without_root():
        message = refused("train", *TINY, "runs_dir=locked/runs")
    assert "locked/runs" in message
    assert "cannot be written" in message


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


def suggested(message):
    """The words of the command that a message says to use."""
    program, *words = shlex.split(re.search("`(.*?)`", message)[1])
    assert program == "capsrun"
    return words


@pytest.mark.parametrize(
    "words",
    [
        [],
        ["dataset=mnist5k", "dataset.split_seed=3", "seed=2"],
        ["dataset=multimnist", "dataset.source=mnist5k", "dataset.split_seed=3"],
        ["dataset=multimnist", "dataset.source=kmnist"],
        ["dataset=mnist_padded", "dataset.source=mnist5k"],
        ["dataset=affnist"],
        ["dataset=affnist_like", "dataset.source=mnist5k", "dataset.split_seed=3"],
        ["dataset=kmnist", "split=validation", "dataset.validation=100", "dataset.split_seed=4"],
        ["dataset=cifar10", "dataset.standardise=false", "dataset.image_px=28"],
        ["dataset=mnist5k", "runs_dir='it is'", "dataset.data_dir=/elsewhere"],
    ],
    ids=" ".join,
)
def test_the_command_that_makes_a_model_makes_the_one_that_is_missing(in_tmp, words, refused):
    config = from_dict(EvalConfig, compose.compose("eval", words))
    command, *overrides = suggested(refused("eval", *words))
    assert command == "train"
    trained = train_config(*overrides)
    name = names.run_name(trained, overrides)
    file = Path(trained.runs_dir) / name / f"seed{trained.seed}" / "checkpoint.pt"
    file.parent.mkdir(parents=True)
    file.touch()
    assert find_model(config, config.split) == file
    check_dataset(config.dataset, trained, config.split)
    assert trained.dataset.data_dir == config.dataset.data_dir


def test_a_model_that_was_suggested_is_found_by_default_and_by_name(in_tmp, printed, refused):
    tested = ["eval", "dataset=mnist5k", "dataset.split_seed=3", "images=10"]
    _, *words = suggested(refused(*tested))
    name = names.run_name(train_config(*words), words)
    assert "+" in name
    folder = in_tmp / "runs" / name / "seed0"
    folder.mkdir(parents=True)
    untrained(folder / "checkpoint.pt", *words, *TINY, f"name={name}")
    printed(*tested)
    printed(*tested, f"checkpoint=runs/{name}/seed0")


def own(folder: Path, **files: str) -> Path:
    """A folder of YAML files of one's own: `recipe_mine` is the text of `recipe/mine.yaml`."""
    for name, text in files.items():
        path = folder.joinpath(*name.split("_", 1)).with_suffix(".yaml")
        path.parent.mkdir(parents=True, exist_ok=True)
        path.write_bytes(text.encode("latin-1"))
    return folder


@pytest.fixture
def no_own_folder():
    """None counts when the test has ended."""
    yield
    yaml_files.use_own_dir(None)


NARROW = "# @package _global_\ndefaults: [capsnet, _self_]\nmodel: {conv1_channels: 32}\n"


@pytest.mark.parametrize(
    "option", [["--config-dir", "."], ["--config-dir=."], ["-cd", "."], ["--config-di", "."]]
)
def test_a_folder_of_recipes_of_ones_own(in_tmp, printed, option):
    """Other YAML files in it, whatever they hold, are no hindrance."""
    own(in_tmp, recipe_mine="defaults: [quick, _self_]\nname: mine\n")
    (in_tmp / "compose.yaml").write_text("services: {web: {image: 'a:b'}}\n")
    (in_tmp / "odd.yaml").write_text("a: [\n&x *y {{ no yaml }}\n")
    assert "  name: mine" in printed("train", *option, "recipe=mine", "--cfg", "job")
    for words in (["train", "recipe=mine", *option, "--help"], ["help", "train", *option]):
        assert "mine, multimnist" in " ".join(" ".join(printed(*words)).split())
    assert "mine, multimnist" not in " ".join(" ".join(printed("help", "train")).split())


@pytest.mark.parametrize("command", cli.COMMANDS)
def test_every_command_knows_the_folder_of_ones_own(in_tmp, command, no_own_folder, printed):
    own(in_tmp / "own", dataset_mine="defaults: [mnist, _self_]\nshift_px: 1\n")
    has_images = "dataset" in compose.group_choices(command)
    words = ["dataset=mine"] if has_images else []
    shown = printed(command, *words, "--cfg", "job", "--config-dir", "own")
    assert ("  shift_px: 1" in shown) == has_images


@pytest.mark.parametrize(
    ("text", "said"),
    [
        ("name: a\nsteps: 3\nname: b\n", ", line 3: recipe.name is there a second time"),
        ("# a list\n- a\n", ", line 2: settings are written as `key: value`"),
        ("text\n", ", line 1: settings are written as `key: value`"),
        ("a: [1\nb: 2\n", ", line 2: expected ',' or ']', but got ':'"),
        ("a: 1\n\tb: 3\n", ", line 2: found character '\\t'"),
        ("a: 1\nname: gr\xf6\xdfe\n", ", line 2: this is not UTF-8"),
        ("name: !!python/name:os.x a\n", ", line 1: could not determine a constructor"),
        ("a: \x01\n", ": unacceptable character"),
        ("a: &a {b: *a}\n", ": a part of it holds itself"),
        ("defaults: [quick, _self_]\nepocs: 3\n", ", line 2: there is no setting 'recipe.epocs'"),
        (
            "defaults: [quick, _self_]\nepochs: few\n",
            ", line 2: setting recipe.epochs: Value 'few'",
        ),
        ("defaults: [quick, _self_]\n\nepochs: -1\n", ", line 3: recipe.epochs is -1.0"),
        ("defaults: [quick, _self_]\nsteps: 4\n", ", line 2: set exactly one of recipe.steps"),
        ("defaults: [quikc, _self_]\n", ", line 1: there is no recipe=quikc, did you mean 'quick'"),
        ("defaults: [mine, _self_]\n", " inherits itself"),
        ("", ": setting recipe.name has no value; `defaults: [OTHER, _self_]` takes"),
    ],
)
def test_a_mistake_in_a_file_of_ones_own_is_named_with_its_line(in_tmp, text, said, refused):
    own(in_tmp / "own", recipe_mine=text, recipe_heir="defaults: [mine, _self_]\nbatch_size: 8\n")
    for recipe in ("mine", "heir") if text else ("mine",):
        message = refused("train", "--config-dir", "own", f"recipe={recipe}")
        assert f"own/recipe/mine.yaml{said}" in message


@pytest.mark.parametrize(
    ("words", "said"),
    [
        (["--config-dir"], "needs a folder"),
        (["--config-dir="], "needs a folder"),
        (["--config-dir", "nowhere"], "there is no folder nowhere"),
        (["--config-dir", "own"], "own/model/capsnet.yaml: capsrun has a model=capsnet"),
    ],
)
def test_a_folder_that_cannot_be_ones_own(in_tmp, words, said, refused):
    own(in_tmp / "own", model_capsnet=NARROW)
    assert said in refused("train", *words)


def test_a_copy_of_a_file_of_capsrun_is_that_file(in_tmp, printed):
    text = (REPOSITORY / "configs/recipe/quick.yaml").read_text()
    own(in_tmp / "own", recipe_quick=text.encode().decode("latin-1"))
    assert "  name: quick" in printed("train", "--config-dir", "own", "--cfg", "job")


def test_a_run_is_named_after_the_files_of_ones_own(in_tmp, no_own_folder):
    files = {"dataset_digits": "defaults: [mnist, _self_]\n"}
    files |= {"recipe_mine": "defaults: [quick, _self_]\n", "model_narrow": NARROW}
    files |= {"loss_mine": "defaults: [paper, _self_]\n"}
    files |= {"experiment_mine": "# @package _global_\ndefaults: [override /model: narrow]\n"}
    yaml_files.use_own_dir(own(in_tmp / "own", **files))

    def name(*words):
        # Not composed once for all tests: another one has other files of these names.
        return names.run_name(experiments.training_config(words), words)

    assert name("model=narrow") == "mnist-narrow-quick"
    assert name("model='narrow'", "recipe=mine.yaml", "seed=1") == "mnist-narrow-mine"
    assert name("dataset=digits", "loss=mine") == "digits-capsnet-quick+loss-mine"
    assert name("model=narrow", "model=capsnet") == "mnist-capsnet-quick"
    assert name("experiment=mine", "recipe=mine") == "mine+recipe-mine"
    # What is suggested works with the same files.
    assert names.command("eval").endswith("eval --config-dir " + str(in_tmp / "own"))


@pytest.mark.parametrize(
    ("words", "steps", "epochs"),
    [
        (["recipe.steps=10"], 10, None),
        (["recipe.steps=10", "recipe.epochs=null"], 10, None),
        (["recipe=authors", "recipe.epochs=3"], None, 3),
        (["experiment=table1_mnist_1", "recipe.epochs=3"], None, 3),
        (["recipe=sixty", "recipe.epochs=null", "recipe.steps=5"], 5, None),
    ],
)
def test_of_steps_and_epochs_one_is_enough(words, steps, epochs):
    recipe = train_config(*words).recipe
    assert (recipe.steps, recipe.epochs) == (steps, epochs)


def test_an_option_may_stand_between_settings(printed):
    shown = printed("train", "seed=3", "--cfg", "job", "dataset=kmnist")
    assert "seed: 3" in shown
    assert "  name: kmnist" in shown


def test_differing_keys_by_hand():
    ours = {"a": 1, "b": {"c": 2, "d": 3}}
    assert differing_keys(ours, {"a": 1, "b": {"c": 2, "d": 3}}) == []
    assert differing_keys(ours, {"a": 1, "b": {"c": 5}}) == [("b.c", 2, 5), ("b.d", 3, None)]


def test_configurations_of_the_wrong_kind_are_refused():
    for values in (None, 3, "text", [1], {"seed": 0}):
        with pytest.raises(UserError):
            from_dict(TrainConfig, values)


@pytest.mark.slow
def test_the_wheel_holds_everything_and_works_from_another_directory(tmp_path):
    build = [sys.executable, "-m", "hatchling", "build", "-t", "wheel", "-d", str(tmp_path)]
    subprocess.run(build, cwd=REPOSITORY, check=True, capture_output=True)
    (wheel,) = tmp_path.glob("*.whl")
    with zipfile.ZipFile(wheel) as archive:
        held = set(archive.namelist())
        archive.extractall(tmp_path / "site")
        (entry,) = (name for name in held if name.endswith("entry_points.txt"))
        assert "capsrun = capsrun.cli:main" in archive.read(entry).decode()
    listed = ["git", "ls-files", "--cached", "--others", "--exclude-standard", "capsrun", "configs"]
    files = subprocess.run(listed, cwd=REPOSITORY, check=True, capture_output=True, text=True)
    ours = [file for file in files.stdout.split() if (REPOSITORY / file).exists()]
    assert {f.replace("configs/", "capsrun/configs/", 1) for f in ours} <= held
    (tmp_path / "empty").mkdir()
    digit = load_data("mnist1k").test.images_NCHW[5, 0]
    Image.fromarray(digit.numpy()).save(tmp_path / "empty/five.png")

    def run(*words: str) -> list[str]:
        """The lines that a command prints in an empty folder, offline, with the wheel alone."""
        command = [sys.executable, "-m", "capsrun", *words]
        environment = {"PYTHONPATH": str(tmp_path / "site"), "PATH": os.environ["PATH"]}
        done = subprocess.run(
            command, cwd=tmp_path / "empty", env=environment, capture_output=True, text=True
        )
        assert done.returncode == 0, done.stderr
        return done.stdout.splitlines()

    assert run("train", *TINY, "name=w")[-1].startswith("test error ")
    assert run("predict", "five.png")[2].split()[:2] == ["five.png", "5"]
    assert "page: runs/small/perturb-mnist1k/index.html" in run("perturb", "perturb.digit=5")
    assert any("explore-mnist1k.html: 6" in line for line in run("explore"))
    assert (
        run("eval", "dataset=mnist1k", "checkpoint=small")[-1] == "test error 0.60 % (6 of 1,000)"
    )


def test_a_reader_that_has_seen_enough(tmp_path):
    done = subprocess.run(
        f"{sys.executable} -m capsrun train --help | head -1",
        shell=True,
        cwd=tmp_path,
        capture_output=True,
        text=True,
        check=False,
    )
    assert done.stdout.startswith("Usage: capsrun train [key=value …]: ")
    assert done.stderr == ""


TIMES = """0: 0 s, 0.02: 0.02 s, 0.34: 0.3 s, 3: 3 s, 9.97: 10 s, 59.7: 1 min, 100: 1 min 40 s,
 3000: 50 min, 4800: 1 h 20 min, 7199: 2 h, 40000: 11 h, 90000: 1 day 1 h, 2e6: 23 days"""
AGO = "-1: 0 s ago, 20: 20 s ago, 60: 1 min ago, 10900: 3 h ago, 86400: 1 day ago"
SIZES = (
    "0: 0 bytes, 999: 999 bytes, 11594722: 11.6 MB, 150e6: 150 MB, 999.9e6: 1.0 GB, 5e12: 5000 GB"
)


@pytest.mark.parametrize(
    ("said", "table"), [(terminal.duration, TIMES), (terminal.ago, AGO), (terminal.size, SIZES)]
)
def test_times_and_sizes_are_in_the_units_that_suit_them(said, table):
    expected = dict(pair.strip().split(": ") for pair in table.split(","))
    assert {number: said(float(number)) for number in expected} == expected


@pytest.mark.parametrize(
    ("count", "said"), [(0, "0 steps"), (1, "1 step"), (2, "2 steps"), (12_345, "12,345 steps")]
)
def test_one_of_something_is_no_plural(count, said):
    assert terminal.counted(count, "step") == said


def on_a_terminal(*arguments, cwd) -> str:
    """What a command shows in a terminal of 100 columns, with its control sequences."""
    main, side = pty.openpty()
    fcntl.ioctl(side, termios.TIOCSWINSZ, struct.pack("HHHH", 24, 100, 0, 0))
    inherited = {k: v for k, v in os.environ.items() if k != "NO_COLOR"}
    process = subprocess.Popen(
        [sys.executable, "-m", "capsrun", *arguments],
        cwd=cwd,
        env={**inherited, "TERM": "xterm"},
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
    assert process.wait() == 0
    return shown.decode()


def test_colours_are_for_terminals_that_want_them(monkeypatch):
    stream = io.StringIO()
    for variable in ("NO_COLOR", "TERM"):
        monkeypatch.delenv(variable, raising=False)
    assert terminal.styled("x", terminal.RED, stream) == "x"
    stream.isatty = lambda: True
    assert terminal.styled("x", terminal.RED, stream) == "\x1b[31mx\x1b[0m"
    for variable, value in (("NO_COLOR", "1"), ("TERM", "dumb")):
        with monkeypatch.context() as patched:
            patched.setenv(variable, value)
            assert terminal.styled("x", terminal.RED, stream) == "x"


def test_training_on_a_terminal_ends_with_the_answer_in_bold(in_tmp, printed):
    shown = on_a_terminal("train", *TINY, "name=t", cwd=in_tmp)
    *_, suggested, _, _, answered = shown.split("\r\n")[:-1]
    assert suggested == "next: capsrun eval dataset=mnist5k checkpoint=runs/t/seed0"
    assert re.fullmatch(r"\x1b\[1mtest error .* % \(.* of 1,000\)\x1b\[0m", answered)
    assert "testing:   0%" in shown, "the tests in between have a bar of their own"
    lines = [line for line in re.split(r"[\r\n]+", shown) if line.startswith("after ")]
    assert len(lines) == 2, "which does not break the other lines"
    plain = printed(*suggested.split(", ")[0].split()[2:])
    assert not any("\x1b" in line for line in plain)
    assert plain[-1] == answered[4:-4]


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
    usual = names.default_run(tested.dataset, tested.split, tested.seed)
    assert Path(tested.checkpoint or Path(tested.runs_dir) / usual) == folder
    own = vars(config.dataset)
    assert differing_keys(vars(tested.dataset), own) == []


def test_mnist_need_not_be_said():
    config = train_config()
    assert names.model_words(config, Path("runs/mnist-capsnet-quick/seed0")) == []


def test_each_command_says_what_is_next(in_tmp, tiny_run, printed):
    def run(*arguments):
        lines = printed(*arguments)
        found = suggested_words(lines)
        for command, *words in found:
            settings_for(compose.schema_of(command), compose.compose(command, words))
        return [command for command, *_ in found], lines

    assert run("list")[0] == ["train", "train"]
    shutil.copytree(tiny_run, in_tmp / "runs" / "run" / "seed0")
    commands, lines = run("train", *TINY, "name=run")
    assert commands == ["eval", "perturb", "explore"]
    assert lines[-1].startswith("test error ")
    (in_tmp / "runs" / "run").rename(in_tmp / "runs" / "mnist5k-capsnet-quick")
    commands, lines = run("eval", "dataset=mnist5k")
    assert commands == ["perturb", "explore", "report"]
    assert lines[-1].startswith("test error ")
    assert run("perturb", "dataset=mnist5k", "perturb.digit=5")[0] == ["explore", "report"]
    few = ["explore.images=1", "explore.search=50"]
    assert run("explore", "dataset=mnist5k", *few)[0] == ["perturb", "export"]
    exported = printed("export", "dataset=mnist5k", "format=torch")
    assert any(line.startswith("next: model.pt2 in Python") for line in exported)
    assert run("list")[0] == ["eval", "report"]
    assert run("data", "dataset=mnist5k")[0] == ["train"]
    planned = ["reproduce", "targets=[table1]", "timing=false", "only_plan=true"]
    assert run(*planned)[0] == ["reproduce"]
    cnn = ["dataset=mnist5k", "model=cnn_baseline", "recipe.epochs=null", "recipe.steps=1"]
    small = ["model.channels=[2]", "model.kernels_px=[5]", "model.pools_px=[4]", "model.hidden=[8]"]
    assert run("train", *cnn, *small, "name=cnn")[0] == ["eval"], "it has no capsules"


def test_a_checkpoint_of_a_like_name_is_hinted_at(in_tmp, refused):
    folder = in_tmp / "runs" / "mnist-capsnet-quick" / "seed0"
    folder.mkdir(parents=True)
    (folder / "checkpoint.pt").touch()
    hint = "did you mean 'runs/mnist-capsnet-quick/seed0'?"
    for wrong in (
        "runs/mnist-capsnet-quik/seed0",
        "run/mnist-capsnet-quick/seed0",
        "runs/mnist-capsnet-quick",
    ):
        assert hint in refused("eval", f"checkpoint={wrong}")
    assert "did you mean" not in refused("eval", "checkpoint=elsewhere")


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
def test_a_signal_before_there_is_anything_to_save(in_tmp, monkeypatch, capsys, act, code):
    before = [signal.getsignal(number) for number in (signal.SIGINT, signal.SIGTERM)]
    monkeypatch.setattr("capsrun.commands.list.main", act)
    assert cli.main(["list"]) == code
    said = capsys.readouterr().err
    assert "stopped at once; the same command goes on after what is saved" in said
    assert said.endswith("capsrun list\n")
    assert before == [signal.getsignal(number) for number in (signal.SIGINT, signal.SIGTERM)]
