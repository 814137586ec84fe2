"""Checkpoints: what is saved comes back; what is not a checkpoint is refused and not run."""

import dataclasses
import os
import pickle
from pathlib import Path

import pytest
import torch
from conftest import TINY, make_model, train_config

from capsrun.errors import UserError
from capsrun.runs.checkpoint import (
    find_checkpoint,
    load_checkpoint,
    read_checkpoint,
    save_checkpoint,
)
from capsrun.runs.folder import RunFolder

REST = {"optimizer": None, "train_seconds": 1.5}


@pytest.fixture
def saved(tmp_path):
    config = train_config(*TINY)
    model = make_model(config)
    path = tmp_path / "checkpoint.pt"
    save_checkpoint(path, dataclasses.asdict(config), 5, model=model.state_dict(), **REST)
    return path, model, config


@pytest.mark.parametrize("make", [os.mkfifo, os.mkdir, lambda path: path.symlink_to("/dev/zero")])
def test_what_is_no_file_is_refused_at_once(tmp_path, make):
    make(tmp_path / "checkpoint.pt")
    with pytest.raises(UserError, match="is not a capsrun checkpoint"):
        read_checkpoint(tmp_path / "checkpoint.pt")


def test_what_is_saved_comes_back(saved):
    path, model, config = saved
    assert find_checkpoint(str(path.parent), "") == find_checkpoint(str(path), "") == path
    for trained in (load_checkpoint(path), load_checkpoint(str(path.parent), device="cpu")):
        assert trained.config == config
        for name, value in model.state_dict().items():
            assert torch.equal(value, trained.model.state_dict()[name])
        assert (trained.step, trained.train_seconds, trained.finished) == (5, 1.5, True)
        assert not trained.model.training
    # Other programs and later versions read the weights by these names.
    assert list(model.state_dict()) == [
        "digitcaps_weight",
        "digitcaps_bias",
        "conv1.weight",
        "conv1.bias",
        "primarycaps.weight",
        "primarycaps.bias",
        *(f"decoder.{layer}.{kind}" for layer in (0, 2, 4) for kind in ("weight", "bias")),
    ]


@pytest.mark.parametrize("kept", [0, 100, 0.5, -1])
def test_a_truncated_checkpoint_is_refused(saved, kept):
    path = saved[0]
    content = path.read_bytes()
    path.write_bytes(content[: int(kept * len(content)) if isinstance(kept, float) else kept])
    with pytest.raises(UserError, match="damaged or cut short"):
        read_checkpoint(path)


@pytest.mark.filterwarnings("ignore:Detected pickle protocol")
def test_a_pickle_that_would_run_code_is_refused_and_not_run(tmp_path):
    marker = tmp_path / "ran"

    class Attack:
        def __reduce__(self):
            return (open, (str(marker), "w"))

    plain = tmp_path / "plain.pt"
    plain.write_bytes(pickle.dumps({"format": Attack()}))
    zipped = tmp_path / "zipped.pt"
    torch.save({"format": "capsrun checkpoint 1", "model": Attack()}, zipped)
    for path in (plain, zipped):
        with pytest.raises(UserError, match="nothing in it was run"):
            read_checkpoint(path)
    assert not marker.exists()
    torch.load(zipped, weights_only=False)
    assert marker.exists(), "the attack itself does not work, so this test shows nothing"


@pytest.mark.parametrize(
    "content", [[1, 2], {"model": {}}, {"format": "capsrun checkpoint 1", "step": 1}]
)
def test_other_files_are_refused(tmp_path, content):
    path = tmp_path / "other.pt"
    torch.save(content, path)
    with pytest.raises(UserError, match=r"not a checkpoint|has no sound 'config'"):
        read_checkpoint(path)


@pytest.mark.parametrize(
    ("key", "state"),
    [
        ("step", {"step": 1.5}),
        ("model", {"model": None}),
        ("optimizer", {"optimizer": [1]}),
        ("metrics_bytes", {"metrics_bytes": "1"}),
        ("parts", {"parts": {}}),
        ("precision", {"precision": None}),
    ],
)
def test_what_a_run_needs_to_go_on_is_checked(saved, key, state):
    path, _, config = saved
    rest = {"precision": "fp32", "metrics_bytes": 1, "parts": []}
    torch.save({**torch.load(path), **rest, **state}, path)
    folder = RunFolder(path.parent, dataclasses.asdict(config))
    with pytest.raises(UserError, match=f"no sound '{key}'; delete it to train from the start"):
        folder.open()
    folder.close()


def test_weights_of_another_shape_are_refused(saved):
    path, model, config = saved
    state, five = model.state_dict(), torch.zeros(8, 1, 5, 5)
    without = {name: value for name, value in state.items() if "decoder" not in name}
    for changed, message in [
        ({**state, "conv1.weight": five}, r"conv1.weight has shape \(8, 1, 5, 5\)"),
        (without, "another network"),
        ({**state, "conv1.weight": 3}, "conv1.weight has shape"),
    ]:
        save_checkpoint(path, dataclasses.asdict(config), 5, model=changed, **REST)
        with pytest.raises(UserError, match=message):
            load_checkpoint(path)


@pytest.mark.parametrize(
    ("key", "value"), [("iterations", -1), ("iterations", "three"), ("unknown", 1)]
)
def test_a_hostile_configuration_is_refused(saved, key, value):
    path, model, config = saved
    values = dataclasses.asdict(config)
    values["routing"][key] = value
    save_checkpoint(path, values, 5, model=model.state_dict(), **REST)
    with pytest.raises(UserError, match=r"cannot be used.*" + key):
        load_checkpoint(path)


def test_a_missing_checkpoint_names_the_command_that_makes_it(tmp_path):
    with pytest.raises(UserError, match="make it with `capsrun train dataset=mnist`"):
        find_checkpoint(str(tmp_path / "none"), "capsrun train dataset=mnist")
    with pytest.raises(UserError, match=r"none.pt cannot be read: No such file"):
        load_checkpoint(tmp_path / "none.pt")


def test_an_interrupted_write_leaves_the_old_file(saved, monkeypatch):
    path = saved[0]
    before, whole = path.read_bytes(), Path.write_bytes

    def half(path, content):
        whole(path, bytes(content)[: len(content) // 2])
        raise OSError(28, "No space left on device")

    monkeypatch.setattr(Path, "write_bytes", half)
    with pytest.raises(OSError, match="No space"):
        save_checkpoint(path, {}, 6, model={})
    assert path.read_bytes() == before
    assert list(path.parent.iterdir()) == [path]
