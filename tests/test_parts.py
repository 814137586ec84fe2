"""What is said of a run that was interrupted and went on elsewhere."""

import pytest
import torch
from conftest import TINY, train_config
from test_train import StopAfter

from capsrun import errors
from capsrun.commands.train import train
from capsrun.errors import Stopped
from capsrun.runs import segments
from capsrun.training import device

torch_version = str(torch.__version__)


def interrupted(monkeypatch, folder, config, steps):
    with monkeypatch.context() as patch:
        StopAfter(patch, steps)
        with pytest.raises(Stopped):
            train(config, folder)


def test_another_machine_or_torch_is_said(tmp_path, monkeypatch, capsys):
    """Also when the process that was told of it was not the last one; not an interruption alone."""
    config = train_config(*TINY)
    interrupted(monkeypatch, tmp_path, config, 2)
    interrupted(monkeypatch, tmp_path, config, 3)
    assert "went on with" not in capsys.readouterr().err
    with monkeypatch.context() as patch:
        patch.setattr(torch, "__version__", "99.1")
        patch.setattr(device, "describe_device", lambda _: "abacus, 1 threads")
        interrupted(patch, tmp_path, config, 2)
        said = capsys.readouterr().err
        assert "after step 5 the run went on with device abacus, 1 threads (before: " in said
        assert f"torch 99.1 (before: {torch_version})" in said
    result = train(config, tmp_path)
    assert "after step 7 the run went on with" in capsys.readouterr().err
    spans = [(part["first_step"], part["last_step"]) for part in result["parts"]]
    assert spans == [(1, 5), (6, 7), (8, 12)]
    versions = [part["versions"]["torch"] for part in result["parts"]]
    assert versions == [torch_version, "99.1", torch_version]
    last = result["parts"][-1]
    assert (last["versions"], last["device"]) == (result["versions"], result["device"])
    changed = [note for note in result["notes"] if "went on with" in note]
    assert len(changed) == 2
    assert not any("went on with" in note for note in errors.notices)  # they are of this run alone


def test_what_is_a_change():
    now = {"device": "a", "precision": "fp32", "processes": 1, "git_commit": None}
    now["versions"] = {"python": "3.12.1", "torch": "2.8.0"}
    repaired = {**now, "versions": {"python": "3.12.9", "torch": "2.8.0"}}
    newer = {**now, "versions": {"python": "3.13.0", "torch": "2.8.0"}}
    assert segments.differences(now, repaired) == []
    assert segments.differences(now, newer) == ["python 3.13 (before: 3.12)"]
    committed = {**now, "git_commit": "abc"}
    assert segments.differences(now, committed) == ["commit abc (before: unknown)"]
    on_gpu = {**now, "versions": now["versions"] | {"cuda": "13.0"}}
    assert segments.differences(now, on_gpu) == ["cuda 13.0 (before: unknown)"]
    assert segments.differences(now, {**now, "processes": 2}) == ["processes 2 (before: 1)"]
    one = segments.extended([], 5, now)
    assert segments.extended(one, 5, newer) == one  # no step was made there
