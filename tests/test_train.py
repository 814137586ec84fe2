"""Training runs: what they leave behind, and that an interruption changes nothing."""

import dataclasses
import json
import shlex
import signal
import time
import types
from functools import partial

import pytest
import torch
from conftest import TINY, train_config
from tensorboard.backend.event_processing.event_accumulator import EventAccumulator
from tensorboard.plugins.hparams import metadata
from tensorboard.plugins.hparams.api_pb2 import Status

from capsrun.cli import main
from capsrun.commands import train as train_command
from capsrun.commands import writer as training
from capsrun.commands.train import refuse_another, train
from capsrun.data import load_dataset
from capsrun.data.splits import TrainingBatches
from capsrun.errors import Stopped, UserError
from capsrun.names import run_name
from capsrun.runs import progress
from capsrun.runs.checkpoint import load_checkpoint, read_checkpoint
from capsrun.runs.folder import RunFolder
from capsrun.runs.recorder import Recorder
from capsrun.training.distributed import Ranks
from capsrun.training.stopping import is_out_of_patience, stopped_line

# Numbers that tell of the machine and the clock, not of the computation.
# The same in two runs by chance only; the date too, around midnight.
OF_THE_MACHINE = {"images_per_second", "memory_gb", "train_seconds", "date", "time"}


def metrics(folder):
    lines = [json.loads(line) for line in (folder / "metrics.jsonl").read_text().splitlines()]
    return [{k: v for k, v in line.items() if k not in OF_THE_MACHINE} for line in lines]


def curves(folder):
    """Steps and values of every curve, as TensorBoard shows them."""
    board = EventAccumulator(str(folder / "tensorboard"), size_guidance={"scalars": 0})
    board.Reload()
    return {
        name: [(event.step, event.value) for event in board.Scalars(name)]
        for name in board.Tags()["scalars"]
        if name not in OF_THE_MACHINE and board.Scalars(name)  # else all of it was taken back
    }


def settings_shown(folder):
    """The HParams of TensorBoard, how the run ended, and the configuration as text."""
    board = EventAccumulator(str(folder / "tensorboard"))
    board.Reload()
    found = board.PluginTagToContent(metadata.PLUGIN_NAME)
    assert set(found) == {metadata.SESSION_START_INFO_TAG, metadata.SESSION_END_INFO_TAG}
    begun = metadata.parse_session_start_info_plugin_data(found[metadata.SESSION_START_INFO_TAG])
    ended = metadata.parse_session_end_info_plugin_data(found[metadata.SESSION_END_INFO_TAG])
    (text,) = board.Tensors("configuration/text_summary")
    (shown,) = text.tensor_proto.string_val
    values = {key: getattr(v, v.WhichOneof("kind")) for key, v in begun.hparams.items()}
    return values, ended.status, shown.decode()


def assert_same_weights(folder, other):
    ours, theirs = (read_checkpoint(f / "checkpoint.pt")["model"] for f in (folder, other))
    for name, value in ours.items():
        assert torch.equal(value, theirs[name]), name


def assert_same_run(folder, other):
    assert_same_weights(folder, other)
    assert metrics(folder) == metrics(other)
    ours, theirs = (json.loads((f / "result.json").read_text()) for f in (folder, other))
    for key in OF_THE_MACHINE:
        ours.pop(key), theirs.pop(key)
    assert ours == theirs
    assert settings_shown(folder) == settings_shown(other)


def test_result(tiny_run):
    result = json.loads((tiny_run / "result.json").read_text())
    expected = {
        "command": "train",
        "name": "run",
        "dataset": "mnist5k",
        "model": "capsnet",
        "seed": 0,
        "steps": 12,
        "count": 1000,
        "config": read_checkpoint(tiny_run / "checkpoint.pt")["config"],
    }
    assert {key: result[key] for key in expected} == expected
    assert result["error_percent"] == 100 * result["errors"] / 1000
    assert sum(result["errors_by_class"].values()) == result["errors"]
    assert sum(map(sum, result["confusion"])) == 1000
    assert result["images_per_second"] == pytest.approx(12 * 16 / result["train_seconds"])
    assert result["precision"] in ("fp32", "bf16")
    assert "thread" in result["device"]
    assert result["versions"]["torch"] == torch.__version__
    assert {"date", "git_commit"} <= result.keys()


def test_everything_is_in_the_folder(tiny_run):
    assert sorted(path.name for path in tiny_run.glob("[!.]*")) == [
        "checkpoint.pt",
        "config.yaml",
        "index.html",
        "metrics.jsonl",
        "pictures",
        "result.json",
        "tensorboard",
    ]
    pictures = {path.name for path in (tiny_run / "pictures").iterdir()}
    assert {"confusion.png", "failures.png"} <= pictures
    assert all((tiny_run / "pictures" / name).stat().st_size > 5000 for name in pictures)


def test_tensorboard_shows_what_is_promised(tiny_run):
    board = EventAccumulator(str(tiny_run / "tensorboard"))
    board.Reload()
    tags = board.Tags()
    assert set(tags["scalars"]) == {
        "loss/total",
        "loss/margin",
        "loss/reconstruction",
        "learning_rate",
        "error_percent/test",
        "capsule_length/true_class",
        "capsule_length/other_classes",
        "routing_logit_change/iteration_1",
        "routing_logit_change/iteration_2",
        "routing_logit_change/iteration_3",
        "images_per_second",
        "memory_gb",
    }
    assert {"reconstructions", "confusion", "failures"} <= set(tags["images"])
    assert [event.step for event in board.Scalars("loss/total")] == [2, 4, 6, 8, 10, 12]
    assert [event.step for event in board.Scalars("error_percent/test")] == [8, 12]
    total, margin, reconstruction = (
        board.Scalars(f"loss/{part}")[-1].value for part in ("total", "margin", "reconstruction")
    )
    assert total == pytest.approx(margin + reconstruction, rel=1e-5)


def test_tensorboard_can_compare_runs_by_their_settings(tiny_run):
    values, status, text = settings_shown(tiny_run)
    assert values["recipe.batch_size"] == 16.0
    assert values["model.decoder_widths"] == "[16, 16]"
    assert (values["model.name"], values["loss.name"]) == ("capsnet", "authors")
    assert (values["routing.leaky"], values["seed"]) == ("False", 0.0)
    assert not {"recipe.epochs", "device", "name", "record.log_every_steps"} & set(values)
    assert status == Status.STATUS_SUCCESS
    assert text.startswith("    name: run\n    seed: 0\n")
    assert "\n      name: mnist5k\n" in text


class StopAfter:
    """Ask the training loop to stop after some steps, as Ctrl-C does."""

    def __init__(self, monkeypatch, steps, number=signal.SIGINT):
        self.left = steps
        original = TrainingBatches.batch

        def count(*args):
            self.left -= 1
            if self.left == 0:
                signal.raise_signal(number)
            return original(*args)

        monkeypatch.setattr(TrainingBatches, "batch", count)


def interrupted(monkeypatch, config, folder, steps):
    """Train, but ask it to stop after so many steps."""
    with monkeypatch.context() as patch:
        StopAfter(patch, steps)
        with pytest.raises(Stopped, match="saved"):
            train(config, folder)


def straight_and_resumed(config, folder, monkeypatch, stops):
    """Train at once, and with a stop after each of so many steps; the same comes out of both."""
    result = train(config, folder / "straight")
    for steps in stops:
        interrupted(monkeypatch, config, folder / "resumed", steps)
    train(config, folder / "resumed")
    assert_same_run(folder / "resumed", folder / "straight")
    return result


def test_a_resumed_run_equals_the_straight_one_bit_for_bit(tiny_run, tmp_path, monkeypatch):
    """Also one that was stopped at a step after which it is tested."""
    folder = tmp_path / "seed0"
    config = train_config(*TINY, "name=run")
    for steps in (1, 7, 3):
        interrupted(monkeypatch, config, folder, steps)
    train(config, folder)
    assert_same_run(folder, tiny_run)


@pytest.mark.parametrize("dataset", ["mnist5k", "multimnist"])
def test_other_models_and_data_are_resumed_bit_for_bit_too(dataset, tmp_path, monkeypatch):
    """Dropout, shifts and pairs are functions of the seed and the step."""
    source = [] if dataset == "mnist5k" else ["dataset.source=mnist5k"]
    cnn = ["model.channels=[4]", "model.kernels_px=[5]", "model.pools_px=[4]", "model.hidden=[16]"]
    recipe = [word for word in TINY if word.startswith(("recipe.", "record."))]
    overrides = [f"dataset={dataset}", *source, "model=cnn_baseline", *cnn, *recipe]
    config = train_config(*overrides, "name=run", "record.evaluate_images=200")
    straight_and_resumed(config, tmp_path, monkeypatch, [5])


def test_the_order_and_the_average_are_resumed_bit_for_bit_too(tmp_path, monkeypatch, capsys):
    config = train_config(*TINY, "name=run", "recipe.order=authors", "recipe.average=0.8")
    result = straight_and_resumed(config, tmp_path, monkeypatch, [5, 4])
    ours, theirs = (
        read_checkpoint(tmp_path / run / "checkpoint.pt")["averaged"]
        for run in ("resumed", "straight")
    )
    assert all(torch.equal(ours[name], weight) for name, weight in theirs.items())
    assert {"test", "test_averaged"} == result["scores"].keys()
    assert result["scores"]["test"]["errors"] == result["errors"]
    # 12 steps of 16 images, 25 of a digit.
    said = capsys.readouterr().err
    assert said.count("the first 7 of 4,000 digits") == 4  # runs begun
    assert "before step 6,250 has not seen all digits" in said


def test_a_run_in_the_authors_order_that_may_stop_is_told_what_it_may_miss(capsys):
    config = train_config("dataset=mnist5k", "recipe.order=authors", "recipe.batch_size=100")
    dataset = load_dataset(config.dataset, torch.device("cpu"))
    train_command.training_batches(config, dataset, 1000, Ranks())
    assert not capsys.readouterr().err
    config.stop.accuracy_percent = 99.0
    train_command.training_batches(config, dataset, 1000, Ranks())
    said = capsys.readouterr().err
    assert "ends before step 1,000 has not seen all digits" in said
    assert "about the first" not in said


def test_without_averaged_weights_there_are_none(tiny_run):
    with pytest.raises(UserError, match=r"no averaged weights; train with recipe\.average="):
        load_checkpoint(tiny_run, averaged=True)


@pytest.mark.parametrize(
    "data",
    [["dataset=multimnist", "dataset.source=mnist5k"], ["dataset=mnist5k", "dataset.contrast=0.8"]],
)
def test_an_order_that_images_cannot_have_is_refused_before_anything_is_written(data, tmp_path):
    config = train_config(*data, "recipe.order=authors")
    with pytest.raises(UserError, match=r"recipe\.order=authors needs single images"):
        train(config, tmp_path / "run")
    assert not (tmp_path / "run").exists()


@pytest.mark.parametrize(
    ("errors", "tired"),
    [
        ([], False),
        ([5, 6], False),
        ([5, 6, 5], True),
        ([5, 6, 4], False),
        ([5, 4, 4], False),
        ([5, 4, 4, 4], True),
    ],
)
def test_patience_ends_when_evaluations_in_a_row_err_no_less(errors, tired):
    rows = [{"step": 0, "total_steps": 9}]
    rows += [{"step": k, "error_percent/validation": float(e)} for k, e in enumerate(errors)]
    patient, careless = train_config("stop.patience=2", "dataset.validation=10"), train_config()
    assert is_out_of_patience(patient.stop, rows) == tired
    assert not is_out_of_patience(careless.stop, rows)


@pytest.mark.parametrize(
    "words",
    [
        ["stop.accuracy_percent=1", "stop.every_steps=4"],
        ["stop.accuracy_percent=1", "stop.every_steps=4", "stop.on=validation"],
        ["stop.patience=1", "stop.every_steps=2", "recipe.learning_rate=1e-12"],
        ["stop.accuracy_percent=100", "stop.every_steps=5"],
    ],
    ids=["test", "validation", "patience", "not reached"],
)
def test_the_last_test_is_recorded_once_wherever_a_run_dies(words, tmp_path, monkeypatch):
    floor = "recipe.learning_rate_floor=0"
    config = train_config(*TINY, *words, floor, "dataset.validation=100", "name=run")
    train(config, tmp_path / "straight")
    with monkeypatch.context() as patch:
        patch.setattr("capsrun.report.pictures.score_figures", lambda *_: 1 / 0)
        with pytest.raises(ZeroDivisionError):
            train(config, tmp_path / "resumed")
    train(config, tmp_path / "resumed")
    assert_same_run(tmp_path / "resumed", tmp_path / "straight")
    steps = [row["step"] for row in metrics(tmp_path / "straight") if "error_percent/test" in row]
    assert len(steps) == len(set(steps)) > 0


def test_a_run_without_progress_ends_and_says_why(tmp_path, monkeypatch):
    """At a rate of almost nothing every evaluation is the same; a resumed run ends at the same."""
    words = ["dataset.validation=100", "stop.patience=2", "stop.every_steps=2"]
    still = ["recipe.learning_rate=1e-12", "recipe.learning_rate_floor=0"]
    config = train_config(*TINY, *words, *still, "name=run")
    straight = straight_and_resumed(config, tmp_path, monkeypatch, [5])
    assert straight["stopped"].items() >= {"patience": 2, "reached": True, "steps": 6}.items()
    assert straight["scores"]["validation"]["count"] == 100
    said = stopped_line(straight["stopped"])
    assert said.endswith("2 evaluations in a row erred no less on held-out images")
    assert {"error_percent/test", "error_percent/validation"} <= metrics(tmp_path / "resumed")[
        -1
    ].keys()


@pytest.mark.parametrize(
    ("words", "reason"),
    [
        (["stop.patience=3"], r"stop\.patience needs held-out training images"),
        (
            ["stop.patience=3", "stop.accuracy_percent=99", "dataset.validation=100"],
            r"set one of stop\.accuracy_percent and stop\.patience",
        ),
        (["stop.accuracy_percent=99", "stop.on=validation"], r"dataset\.validation=10000"),
        (["stop.on=validation"], r"stop\.on needs stop\.accuracy_percent"),
        (["stop.every_steps=3"], r"stop\.every_steps needs stop\.accuracy_percent"),
        # Which is free for a run that is resumed or averaged with others; where one ends is not.
        (
            ["stop.accuracy_percent=99", "record.evaluate_every_steps=7"],
            r"say stop\.every_steps=… in place of record\.evaluate_every_steps",
        ),
        (["recipe.average=1"], "below 1"),
        (["recipe.average=0"], "above 0"),
        (["recipe.adam_beta2=1"], "below 1"),
        # With these no loss is finite, whatever the learning rate.
        (["loss.margin_factor=1e300"], "loss.margin_factor is 1e[+]?300"),
        (["loss.absent_weight=1e39"], "loss.absent_weight is 1e[+]?39"),
        (["loss.reconstruction_weight=1e39"], "loss.reconstruction_weight is 1e[+]?39"),
        (["recipe.adam_epsilon=1e-320"], "recipe.adam_epsilon is 1e-320"),
        (["recipe.learning_rate_floor=1e300"], "recipe.learning_rate_floor is 1e[+]?300"),
    ],
)
def test_settings_that_make_no_sense_are_refused(words, reason):
    with pytest.raises(UserError, match=reason):
        train_config(*words)


def test_a_stop_is_looked_at_when_the_model_is_tested():
    words = ["stop.accuracy_percent=99", "recipe.batch_size=100"]
    assert train_config(*words).evaluation_steps(1_000) == 10
    assert train_config(*words, "stop.every_steps=3").evaluation_steps(1_000) == 3


@pytest.mark.parametrize("number", [signal.SIGINT, signal.SIGTERM])
def test_ctrl_c_saves_and_says_how_to_go_on(in_tmp, monkeypatch, capsys, number):
    StopAfter(monkeypatch, 4, number)
    assert main(["train", *TINY, "name=long"]) == 128 + number
    errors = capsys.readouterr().err
    assert "stopping after this step; once more stops at once" in errors
    last = errors.splitlines()[-1]
    assert last.startswith("stopped after step 4 of 12, which is saved; the same command goes on: ")
    assert last.endswith("capsrun train " + shlex.join([*TINY, "name=long"]))
    assert load_checkpoint("runs/long/seed0").step == 4


def test_a_finished_run_is_left_alone(tiny_run, capsys):
    before = {path: path.stat().st_mtime_ns for path in tiny_run.rglob("*")}
    assert main(["train", *TINY, "name=run", f"runs_dir={tiny_run.parent.parent}"]) == 0
    output = capsys.readouterr().out
    assert "finished already" in output
    assert "next: capsrun eval dataset=mnist5k checkpoint=" in output
    assert output.splitlines()[-1].startswith("test error ")
    assert {path: path.stat().st_mtime_ns for path in tiny_run.rglob("*")} == before


WHOLE, CUT = slice(None), slice(-1000)  # of the finished run's file


@pytest.mark.parametrize(
    ("files", "message"),
    [
        ({"checkpoint.pt": WHOLE}, r"no config\.yaml"),
        ({"config.yaml": b"a: ["}, r"config\.yaml is damaged"),
        ({"config.yaml": b"[1]"}, r"config\.yaml is damaged"),
        ({"config.yaml": WHOLE, "checkpoint.pt": CUT}, "delete it to train from the start"),
    ],
)
def test_a_folder_that_is_damaged_is_refused_and_left(tiny_run, tmp_path, files, message):
    given = {
        name: (tiny_run / name).read_bytes()[content] if isinstance(content, slice) else content
        for name, content in files.items()
    }
    for name, content in given.items():
        (tmp_path / name).write_bytes(content)
    with pytest.raises(UserError, match=message):
        train(train_config(*TINY, "name=run"), tmp_path)
    assert {name: (tmp_path / name).read_bytes() for name in given} == given


def test_what_decides_the_bits_is_in_the_name_of_a_run():
    """But not where it is computed."""
    words = ["dataset=mnist5k", "deterministic=true", "device=cpu", "compile=false"]
    assert run_name(train_config(*words), words) == "mnist5k-capsnet-quick+deterministic-true"


def test_another_configuration_is_refused_with_the_keys_that_differ(tiny_run):
    before = (tiny_run / "config.yaml").read_bytes()
    config = train_config(*TINY, "name=run", "routing.iterations=2", "recipe.steps=13")
    with pytest.raises(UserError, match="other settings") as caught:
        train(config, tiny_run)
    message = str(caught.value)
    assert "routing.iterations (there 3, now 2)" in message
    assert "recipe.steps (there 12, now 13)" in message
    assert "seed" not in message.split("other settings")[1]
    assert (tiny_run / "config.yaml").read_bytes() == before


def test_where_and_how_often_may_differ(tiny_run, monkeypatch):
    config = train_config(*TINY, "name=run", "record.log_every_steps=7", "device=cpu")
    train(config, tiny_run)
    # Its test errors are compared with each other, so they are of the same images.
    config = train_config(*TINY, "name=run", "record.evaluate_images=7")
    with pytest.raises(UserError, match=r"record\.evaluate_images"):
        train(config, tiny_run)


def test_a_resumed_run_keeps_its_precision(tmp_path, monkeypatch):
    """Another machine may choose another one for `auto`; a run does not change half-way."""
    choices = ["bf16", "fp32"]
    monkeypatch.setattr(train_command, "resolve_precision", lambda *_: choices.pop())
    interrupted(monkeypatch, train_config(*TINY), tmp_path, 3)
    interrupted(monkeypatch, train_config(*TINY), tmp_path, 2)
    assert not choices
    assert read_checkpoint(tmp_path / "checkpoint.pt")["precision"] == "fp32"


def test_the_shift_of_the_configuration_is_used():
    def rows_of_ink(shift_px):
        """The mean row of each image's ink in the first batch."""
        config = train_config(*TINY, f"dataset.shift_px={shift_px}")
        dataset = load_dataset(config.dataset, torch.device("cpu"))
        batches = train_command.training_batches(config, dataset, 1, Ranks())
        ink = batches.batch(0).images_BCHW.sum((1, 3))
        return (ink * torch.arange(28)).sum(1) / ink.sum(1)

    still, moved, far = map(rows_of_ink, (0, 2, 9))
    assert 1.5 < (moved - still).abs().max() < 2.01
    assert (far - still).abs().max() > 3


def test_a_loss_that_is_not_finite_stops_the_run(tmp_path, monkeypatch):
    """The state that led there is kept apart, and the last good checkpoint is left as it was."""
    config = train_config(*TINY, "record.checkpoint_every_seconds=0", "record.log_every_steps=12")
    original = TrainingBatches.batch

    def poison(batches, step):
        batch, nan = original(batches, step), float("nan")
        return batch._replace(targets_BTCHW=batch.targets_BTCHW * (nan if step == 6 else 1.0))

    monkeypatch.setattr(TrainingBatches, "batch", poison)
    with pytest.raises(UserError, match=r"after step 6: the loss is nan.*not_finite\.pt"):
        train(config, tmp_path)
    for name in ("not_finite.pt", "checkpoint.pt"):
        state = read_checkpoint(tmp_path / name)
        assert state["step"] == 6
        assert all(value.isfinite().all() for value in state["model"].values()), name
    assert not (tmp_path / "result.json").exists()


def test_weights_that_are_not_finite_are_not_saved(tmp_path):
    """Between two logged steps nobody looks at the loss, but a checkpoint looks at the weights."""
    config = train_config(*TINY, "recipe.learning_rate=1e39", "record.log_every_steps=1000")
    config.record.checkpoint_every_seconds = 0
    with pytest.raises(UserError, match="after step 1: a weight is not finite"):
        train(config, tmp_path)
    assert not (tmp_path / "checkpoint.pt").exists()
    assert not (tmp_path / "result.json").exists()


def test_the_last_step_is_reported_not_the_best(tmp_path, monkeypatch):
    """Scores get worse during this run; picking the best would report 1 error."""
    original = training.score_split
    seen = []

    def worse_each_time(*args, **kwargs):
        result = original(*args, **kwargs)
        seen.append(result)
        predicted = result.labels_NT.clone()
        predicted[: len(seen)] = (predicted[: len(seen)] + 1) % 10
        return dataclasses.replace(result, predicted_NT=predicted)

    monkeypatch.setattr(training, "score_split", worse_each_time)
    result = train(train_config(*TINY, "record.evaluate_every_steps=3"), tmp_path)
    assert len(seen) == 4
    assert result["errors"] == 4
    assert result["best_on_test"] == {
        "error_percent": 0.1,
        "step": 3,
        "evaluations": 4,
        "count": 1000,
    }


def test_another_seed_without_decoder(tiny_run, tmp_path):
    result = train(train_config(*TINY, "model.reconstruction=false", "seed=1"), tmp_path)
    assert result["reconstruction_squared_error"] is None
    drawn = sorted(path.name for path in (tmp_path / "pictures").iterdir())
    assert drawn == ["confusion.png", "curves.png", "failures.png"]
    assert "loss/reconstruction" not in metrics(tmp_path)[0]
    ours, theirs = (load_checkpoint(f / "checkpoint.pt").model for f in (tmp_path, tiny_run))
    assert not torch.allclose(ours.conv1.weight, theirs.conv1.weight, atol=0.02)


def test_stopwatch_does_not_count_pauses(monkeypatch):
    now = [100.0]
    monkeypatch.setattr(progress.time, "perf_counter", lambda: now[0])
    watch = progress.Stopwatch(5.0)
    with watch.running():
        now[0] += 2
        with watch.paused():
            now[0] += 50
        now[0] += 1
    now[0] += 9
    assert watch.seconds == 8


def test_records_are_cut_where_the_checkpoint_was_made(tmp_path):
    """Also what was recorded of its step after it, as a test is, and what a longer file had."""
    recorder = Recorder(tmp_path, steps=9)
    recorder.numbers(1, {"a": 1.0})
    recorder.numbers(2, {"a": 2.0})
    end = recorder.metrics_bytes()
    recorder.numbers(2, {"b": 2.0})
    recorder.numbers(3, {"a": 3.0})
    recorder.close()
    time.sleep(1)  # TensorBoard orders its files by the second in their names
    recorder = Recorder(tmp_path, 9, 2, end)
    assert recorder.metrics_bytes() == end
    recorder.numbers(3, {"a": 4.0})
    recorder.close()
    Recorder(tmp_path, 9, 3, 10**6).close()
    begun, *rows = metrics(tmp_path)
    assert begun == {"step": 0, "total_steps": 9}
    assert rows == [{"step": 1, "a": 1.0}, {"step": 2, "a": 2.0}, {"step": 3, "a": 4.0}]
    assert curves(tmp_path) == {"a": [(1, 1.0), (2, 2.0), (3, 4.0)]}


def test_a_run_that_ended_before_its_first_checkpoint_shows_its_settings_once(tiny_run, tmp_path):
    config = read_checkpoint(tiny_run / "checkpoint.pt")["config"]
    for _ in range(2):
        recorder = Recorder(tmp_path, steps=9)
        recorder.settings(config)
        recorder.numbers(1, {"a": 1.0})
        recorder.finished()
        recorder.close()
        time.sleep(1)  # as above
    settings_shown(tmp_path)
    assert curves(tmp_path) == {"a": [(1, 1.0)]}


@pytest.mark.parametrize("number", [signal.SIGINT, signal.SIGTERM])
def test_a_second_signal_is_not_held_back(number):
    before = signal.getsignal(number)
    with progress.stop_requests() as stop:
        assert not stop.asked
        signal.raise_signal(number)
        assert stop.signal_number == number
        assert signal.getsignal(number) == before
    assert signal.getsignal(number) == before


def stopped_at(number, score_split):
    """The same function, but before its call of this number, from 0, a stop is asked for."""
    left = [number]

    def stopped(*arguments, **named):
        if left[0] == 0:
            signal.raise_signal(signal.SIGTERM)
        left[0] -= 1
        return score_split(*arguments, **named)

    return stopped


def test_a_stop_while_it_is_tested_leaves_the_test_for_later(tiny_run, tmp_path, monkeypatch):
    """At once, between two batches of the test; nothing is lost or recorded twice."""
    folder, config = tmp_path / "run", train_config(*TINY, "name=run")
    original = training.score_split
    for before, step, message in (
        (0, 8, "after step 8 of 12, which is saved"),
        (1, 12, "while it was tested; what was trained is saved"),
    ):
        with monkeypatch.context() as patch:
            patch.setattr(training, "score_split", stopped_at(before, original))
            with pytest.raises(Stopped, match=message) as raised:
                train(config, folder)
        assert raised.value.signal_number == signal.SIGTERM
        assert read_checkpoint(folder / "checkpoint.pt")["step"] == step
        assert not (folder / "result.json").exists()
    train(config, folder)
    assert_same_run(folder, tiny_run)


def test_a_run_does_not_go_on_with_other_files_or_beyond_its_end(tmp_path):
    """Its result would be of neither data; files that nobody vouches for are told by their MD5."""
    dataset = types.SimpleNamespace(name="cifar10", unverified=["a"])
    refuse = partial(refuse_another, dataset=dataset, steps=10, folder=RunFolder(tmp_path, {}))
    refuse({"step": 10, "data": ["a"]})
    refuse({"step": 10})  # of a time when it was not kept
    with pytest.raises(UserError, match="was begun with other files of cifar10 than are there now"):
        refuse({"step": 10, "data": ["b"]})
    with pytest.raises(UserError, match="is of step 1,000,000, but the run has 10; delete it"):
        refuse({"step": 10**6, "data": ["a"]})
