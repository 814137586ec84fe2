"""Data-parallel training: several processes do what one does, and one that dies ends the job."""

import json
import os
import pickle
import re
import signal
import socket
import subprocess
import sys
import time
from pathlib import Path

import pytest
import torch
from conftest import REPOSITORY, TINY, make_model, stored, train_config, untrained

from capsrun.cli import main
from capsrun.commands.train import train
from capsrun.data.splits import TrainingBatches
from capsrun.disk import refuse_if_locked
from capsrun.errors import Busy, Stopped, UserError
from capsrun.runs.checkpoint import load_checkpoint, read_checkpoint
from capsrun.training.distributed import ALONE, Ranks

# What tells of the machine, and what is taken from the first process's images alone.
OF_THE_MACHINE = ("images_per_second", "memory_gb", "routing_logit_change")
# Each job finds a port of its own, so that tests can run beside each other.
TORCHRUN = ["-m", "torch.distributed.run", "--standalone"]
TRAIN = ["-m", "capsrun", "train"]
RUN = "runs/run/seed0"
FP32 = ["precision=fp32", "record.evaluate_images=200"]
FIFTY = [*TINY, *FP32, "recipe.steps=50", "recipe.batch_size=15", "record.log_every_steps=1"]
FIFTY += ["recipe.order=authors", "recipe.average=0.9"]


def torchrun(processes: int, *words: str, cwd: Path) -> subprocess.Popen:
    """Start several processes of `-m capsrun`, or of a script, as a user does."""
    return subprocess.Popen(
        [sys.executable, *TORCHRUN, f"--nproc-per-node={processes}", *words],
        cwd=cwd,
        env={**os.environ, "OMP_NUM_THREADS": "1"},
        stdout=subprocess.PIPE,
        stderr=subprocess.PIPE,
        text=True,
    )


def ended(process: subprocess.Popen) -> tuple[int, str, str]:
    said, errors = process.communicate(timeout=300)
    return process.returncode, said, errors


def metrics(folder: Path) -> list[dict]:
    lines = [json.loads(line) for line in (folder / "metrics.jsonl").read_text().splitlines()]
    return [{k: v for k, v in line.items() if not k.startswith(OF_THE_MACHINE)} for line in lines]


def assert_close(folder: Path, other: Path) -> None:
    """The same curve, and the same weights, to the rounding of another order of summing."""
    ours, theirs = metrics(folder), metrics(other)
    assert len(ours) == len(theirs)
    for row, expected in zip(ours, theirs):
        assert row == pytest.approx(expected, rel=1e-4, abs=1e-6), row["step"]
    for weights in ("model", "averaged"):
        ours, theirs = (read_checkpoint(f / "checkpoint.pt")[weights] for f in (folder, other))
        assert list(ours or ()) == list(theirs or ()), "names are those of one process"
        torch.testing.assert_close(ours, theirs, rtol=1e-2, atol=2e-3)


def test_shares_are_the_batch():
    """Every image once, in order, as even as can be, also where it cannot be divided."""
    for size in (128, 100, 5):
        for count in (1, 2, 3, 5):
            shares = [Ranks(rank, count).share(size) for rank in range(count)]
            images = [image for share in shares for image in range(size)[share]]
            assert images == list(range(size))
            sizes = [len(range(size)[share]) for share in shares]
            assert max(sizes) - min(sizes) <= 1


def test_a_share_of_a_batch_is_that_part_of_it():
    images = torch.randint(0, 256, (20, 1, 8, 8), dtype=torch.uint8)
    split = stored(images, torch.arange(20) % 10)
    whole = TrainingBatches(split, 3, 7).batch(5)
    parts = [TrainingBatches(split, 3, 7, Ranks(k, 3).share(7)).batch(5) for k in range(3)]
    for field in ("images_BCHW", "labels_BT", "targets_BTCHW", "noise_B"):
        pieces = torch.cat([getattr(part, field) for part in parts])
        assert torch.equal(pieces, getattr(whole, field)), field


def test_alone_nothing_is_exchanged():
    value = torch.tensor(2.0, requires_grad=True)
    assert ALONE.mean(value, 3, 3) is value
    assert ALONE.highest(4, 5) == [4, 5]
    assert ALONE.together(lambda: 6) == ALONE.from_first(lambda: 6) == 6
    model = torch.nn.Linear(1, 1)
    assert ALONE.share_model(model, torch.device("cpu")) is model


@pytest.fixture(scope="module")
def of_one(tmp_path_factory) -> Path:
    """Fifty steps in one process."""
    folder = tmp_path_factory.mktemp("one")
    train(train_config(*FIFTY, "name=run"), folder)
    return folder


@pytest.mark.parametrize("processes", [2, pytest.param(3, marks=pytest.mark.slow)])
def test_fifty_steps_of_several_processes_are_those_of_one(processes, of_one, tmp_path):
    """15 images of a batch are 7 and 8, or 5, 5 and 5."""
    code, said, errors = ended(torchrun(processes, *TRAIN, *FIFTY, "name=run", cwd=tmp_path))
    assert code == 0, errors
    folder = tmp_path / RUN
    assert_close(folder, of_one)
    assert said.count("after 8 steps: test error") == 1, "one process talks"
    assert f"{processes} processes" in said
    result = json.loads((folder / "result.json").read_text())
    assert result["processes"] == processes
    expected = json.loads((of_one / "result.json").read_text())
    assert abs(result["errors"] - expected["errors"]) <= 5
    assert len(list((folder / "tensorboard").iterdir())) == 1, "one process writes"


SHORT = [word for word in TINY if word.startswith(("recipe.", "record."))] + FP32
CNN = ["model=cnn_baseline", "model.channels=[4]", "model.kernels_px=[5]", "model.pools_px=[4]"]
PAIRS = [*TINY[1:4], "dataset=multimnist", "dataset.source=mnist5k"]
ON_GPU = [*FIFTY[:-1], "record.log_every_steps=10", "device=cuda"]
TWO_GPUS = pytest.mark.skipif(torch.cuda.device_count() < 2, reason="needs two GPUs")


@pytest.mark.parametrize(
    "words",
    [
        pytest.param([*SHORT, *CNN, TINY[0], "model.hidden=[16]"], marks=pytest.mark.slow),
        pytest.param([*SHORT, *PAIRS], marks=pytest.mark.slow),
        pytest.param([*SHORT, *TINY[:4], "init=../given.pt"], marks=pytest.mark.slow),
        pytest.param(ON_GPU, marks=[pytest.mark.gpu, TWO_GPUS]),
    ],
    ids=["cnn", "multimnist", "init", "two GPUs"],
)
def test_other_models_data_and_devices_are_shared_too(words, tmp_path):
    """Dropout, the places of digits and their pairs do not depend on the number of processes."""
    folders = [tmp_path / "one", tmp_path / "two"]
    untrained(tmp_path / "given.pt", *TINY, "seed=9")
    for processes, folder in enumerate(folders, 1):
        folder.mkdir()
        code, _, errors = ended(torchrun(processes, *TRAIN, *words, "name=run", cwd=folder))
        assert code == 0, errors
    assert_close(*(folder / RUN for folder in folders))


def ranks_of(folder: Path) -> dict[int, int]:
    """The processes that train in a folder, by rank."""
    found = {}
    for path in Path("/proc").glob("[0-9]*"):
        try:
            environment = (path / "environ").read_bytes().decode(errors="replace")
            place = Path(os.readlink(path / "cwd"))
        except OSError:  # it has ended meanwhile
            continue
        rank = re.search(r"(?:^|\0)RANK=(\d+)", environment)
        if rank and place == folder:
            found[int(rank[1])] = int(path.name)
    return found


def wait_for(file: Path, process: subprocess.Popen) -> None:
    deadline = time.monotonic() + 200
    while not file.exists():
        assert process.poll() is None, process.communicate()
        assert time.monotonic() < deadline
        time.sleep(0.1)


def test_a_dead_process_ends_the_job_and_another_number_goes_on(tmp_path, capsys):
    """Killed with two processes, gone on with one: as if it had been one from the start."""
    words = [*TINY, *FP32, "recipe.steps=200", "record.checkpoint_every_seconds=0.1", "name=run"]
    process, folder = torchrun(2, *TRAIN, *words, cwd=tmp_path), tmp_path / RUN
    wait_for(folder / "checkpoint.pt", process)
    os.kill(ranks_of(tmp_path)[1], signal.SIGKILL)
    began = time.monotonic()
    code, _, errors = ended(process)
    assert code != 0
    assert time.monotonic() - began < 60, "nobody waits for the dead"
    assert not ranks_of(tmp_path), "nobody is left"
    # The launcher may be faster to end the other one than that is to see what has happened.
    ours = [line for line in errors.splitlines() if line.startswith("capsrun")]
    assert all("another process of this job has ended" in line for line in ours[:1]), errors
    saved = read_checkpoint(folder / "checkpoint.pt")["step"]
    assert 0 < saved < 200
    config = train_config(*words)
    resumed = train(config, folder)
    assert "going on after step" in capsys.readouterr().out
    straight = train(config, tmp_path / "straight")
    assert resumed["steps"] == straight["steps"] == 200
    assert abs(resumed["errors"] - straight["errors"]) <= 30


@pytest.mark.parametrize(
    "every", [pytest.param(100_000, marks=pytest.mark.slow), 1], ids=["training", "testing"]
)
def test_a_signal_stops_all_of_them_with_everything_saved(tmp_path, every):
    """While they train, and while the first one tests, which it does nearly all the time then."""
    words = [*TINY, *FP32, "recipe.steps=100000", "record.checkpoint_every_seconds=0.1", "name=run"]
    words += ["record.evaluate_images=1000", f"record.evaluate_every_steps={every}"]
    process, folder = torchrun(2, *TRAIN, *words, cwd=tmp_path), tmp_path / RUN
    wait_for(folder / "checkpoint.pt", process)
    process.send_signal(signal.SIGTERM)
    code, _, errors = ended(process)
    assert code != 0
    assert not ranks_of(tmp_path)
    said = re.search(r"stopped after step ([\d,]+) of 100,000, which is saved; .*", errors)
    assert "the same torchrun command goes on, with any number of processes" in said[0]
    step = read_checkpoint(folder / "checkpoint.pt")["step"]
    assert step == int(said[1].replace(",", ""))
    assert load_checkpoint(folder).step == step
    refuse_if_locked(folder / ".lock")


def said_by_the_first(errors: str, message: str) -> int:
    """How often; another one that torchrun has not ended after ten seconds says it with its rank.

    torchrun may take longer than that on a machine that is busy.
    """
    return sum(line.startswith(f"capsrun train: {message}") for line in errors.splitlines())


def test_a_mistake_is_said_once(tmp_path, monkeypatch, capsys):
    """By the first process, whichever of them finds the mistake, and all end."""
    words = ["dataset=mnist5k", "recipe.batch_size=1"]
    code, _, errors = ended(torchrun(2, *TRAIN, *words, cwd=tmp_path))
    assert code != 0
    assert said_by_the_first(errors, "a step has 1 image, too few for 2 processes") == 1, errors
    waits = []
    monkeypatch.setattr(time, "sleep", waits.append)
    monkeypatch.setenv("WORLD_SIZE", "2")
    for rank, before in ((0, ""), (1, "[rank 1] ")):
        monkeypatch.setenv("RANK", str(rank))
        assert main(["train", "dataset=mnist", "dataset.data_dir=none", "seed=-1"]) == 2
        assert capsys.readouterr().err.startswith(f"{before}capsrun train: seed is -1")
    assert waits == [10], "the other one waits to be ended"


@pytest.mark.parametrize("steps", [12, pytest.param(1, marks=pytest.mark.slow)])
def test_a_loss_that_is_not_finite_stops_all_of_them(tmp_path, steps):
    """Or a weight, which is found when the last step is saved."""
    words = [*TINY, *FP32, "recipe.learning_rate=1e39", f"recipe.steps={steps}", "name=run"]
    code, _, errors = ended(torchrun(2, *TRAIN, *words, cwd=tmp_path))
    assert code != 0
    assert said_by_the_first(errors, "training stopped after step") == 1, errors
    assert "try a lower recipe.learning_rate" in errors
    assert (tmp_path / RUN / "not_finite.pt").exists()


@pytest.mark.parametrize(
    ("words", "said"),
    [
        (["train", *TINY], "start them with torchrun, or unset the two"),
        (["eval", TINY[0]], "eval is one process: start it without torchrun"),
        (["train", TINY[0], "--multirun", "seed=0,1"], "a sweep starts its own processes: start"),
    ],
)
def test_processes_that_torchrun_did_not_start_and_other_commands_are_refused(
    monkeypatch, capsys, in_tmp, words, said
):
    monkeypatch.setenv("RANK", "0")
    monkeypatch.setenv("WORLD_SIZE", "2")
    monkeypatch.delenv("MASTER_ADDR", raising=False)
    assert main(words) == 2
    assert said in capsys.readouterr().err


@pytest.mark.parametrize("port", ["", "x", "99999999", "0", "-1"])
def test_an_address_that_is_none_is_one_sentence(monkeypatch, in_tmp, refused, port):
    said = {"RANK": "0", "WORLD_SIZE": "2", "LOCAL_RANK": "0", "MASTER_ADDR": "127.0.0.1"}
    for name, value in {**said, "MASTER_PORT": port}.items():
        monkeypatch.setenv(name, value)
    assert "the 2 processes of this job cannot meet (" in refused("train", *TINY, "device=cpu")


@pytest.mark.parametrize("number", [signal.SIGINT, signal.SIGTERM])
def test_who_waits_for_processes_that_do_not_come_says_so_and_can_be_stopped(
    number, monkeypatch, in_tmp
):
    said = {"RANK": "0", "WORLD_SIZE": "3", "LOCAL_RANK": "0", "MASTER_ADDR": "127.0.0.1"}
    with socket.socket() as free:
        free.bind(("127.0.0.1", 0))
        port = str(free.getsockname()[1])
    code = "import sys; from capsrun.training import distributed as d; d.SILENT_SECONDS = 0.5\n"
    code += "from capsrun.cli import main; sys.exit(main(sys.argv[1:]))"
    process = subprocess.Popen(
        [sys.executable, "-c", code, "train", *TINY, "device=cpu"],
        env={**os.environ, **said, "MASTER_PORT": port},
        stderr=subprocess.PIPE,
        encoding="utf-8",
    )
    line = process.stderr.readline()
    assert f"waiting for the other processes of this job, 3 in all, at 127.0.0.1:{port}" in line
    process.send_signal(number)
    assert process.wait(30) == -number


@pytest.mark.parametrize(
    "error", [Stopped("saved", 15), UserError("wrong"), Busy("used"), OSError(28, "full")]
)
def test_what_one_process_raises_can_be_sent_to_others(error):
    copy = pickle.loads(pickle.dumps(error))
    assert (type(copy), str(copy), vars(copy)) == (type(error), str(error), vars(error))


@pytest.mark.slow
def test_the_script_that_measures_scaling():
    code, printed, errors = ended(
        torchrun(2, "scripts/scaling.py", *TINY, "precision=fp32", cwd=REPOSITORY)
    )
    assert code == 0, errors
    result = json.loads(printed)
    model = make_model(train_config(*TINY))
    assert result["processes"] == 2
    assert result["exchange_alone_seconds"] > 0
    assert result["exchanged_bytes"] == 4 * sum(p.numel() for p in model.parameters())
