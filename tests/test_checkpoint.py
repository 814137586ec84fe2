"""Checkpoints: what is saved comes back; what is not a checkpoint is refused and not run."""

import dataclasses
import functools
import io
import os
import pickle
import re
import struct
import zipfile
from pathlib import Path

import numpy as np
import pytest
import torch
from conftest import TINY, make_model, train_config

import capsrun
from capsrun.errors import UserError
from capsrun.models.authors import to_authors_arrays
from capsrun.names import packaged
from capsrun.runs.checkpoint import (
    check_dataset,
    find_checkpoint,
    load_checkpoint,
    output_folder,
    read_checkpoint,
    write_checkpoint,
)
from capsrun.runs.folder import RunFolder

REST = {"optimizer": None, "train_seconds": 1.5}


@pytest.fixture
def saved(tmp_path):
    config = train_config(*TINY)
    model = make_model(config)
    path = tmp_path / "checkpoint.pt"
    write_checkpoint(path, dataclasses.asdict(config), 5, model=model.state_dict(), **REST)
    return path, model, config


@pytest.mark.parametrize("make", [os.mkfifo, os.mkdir, lambda path: path.symlink_to("/dev/zero")])
def test_what_is_no_file_is_refused_at_once(tmp_path, make):
    make(tmp_path / "checkpoint.pt")
    with pytest.raises(UserError, match="but a folder, a pipe or a device"):
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
        *(f"{layer}.{kind}" for layer in ("conv1", "primarycaps") for kind in ("weight", "bias")),
        "digitcaps.weight",
        "digitcaps.bias",
        *(f"decoder.{layer}.{kind}" for layer in (0, 2, 4) for kind in ("weight", "bias")),
    ]


@pytest.mark.parametrize("kept", [0, 100, 0.5, -1])
def test_a_truncated_checkpoint_is_refused(saved, kept):
    path = saved[0]
    content = path.read_bytes()
    path.write_bytes(content[: int(kept * len(content)) if isinstance(kept, float) else kept])
    with pytest.raises(UserError, match="damaged or cut short" if kept else "but empty"):
        read_checkpoint(path)


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
    ("content", "reason"),
    [
        ([1, 2], "a file of PyTorch of another program"),
        ({"model": {}}, "a file of PyTorch of another program"),
        ({"weight": torch.ones(2)}, r"another program's weights \(a state dict\)"),
        ({"epoch": 3, "state_dict": {"weight": torch.ones(2)}}, r"\(a state dict\)"),
        ({"pytorch-lightning_version": "2", "state_dict": {}}, "PyTorch Lightning"),
        ({"format": "capsrun checkpoint 0"}, "or of another version of it"),
        ({"format": "capsrun checkpoint 1", "step": 1}, "has no sound 'config'"),
    ],
)
@pytest.mark.parametrize("zipped", [True, False])
def test_other_contents_are_named(tmp_path, content, reason, zipped):
    path = tmp_path / "other.pt"
    torch.save(content, path, _use_new_zipfile_serialization=zipped)
    with pytest.raises(UserError, match=reason):
        read_checkpoint(path)


def npz():
    stream = io.BytesIO()
    np.savez(stream, weight=np.zeros(3))
    return stream.getvalue()


def archive(*names):
    stream = io.BytesIO()
    with zipfile.ZipFile(stream, "w") as made:
        for name in names:
            made.writestr(name, "content")
    return stream.getvalue()


AUTHORS = r".*capsrun\.load_authors_weights: see docs/python\.md"
EXPORTED = r".*give the checkpoint that it was made from"
TENSORFLOW = "a checkpoint of TensorFlow" + AUTHORS
OTHERS = {
    "weights.h5": (b"\x89HDF\r\n\x1a\n" + bytes(90), "HDF5 file, of Keras"),
    "weights.safetensors": (struct.pack("<Q", 90) + b'{"w":' + b" " * 90, "safetensors"),
    "authors.npz": (npz(), "NumPy arrays" + AUTHORS),
    "authors.npy": (b"\x93NUMPY\x01\x00", "array of NumPy" + AUTHORS),
    "model.ckpt-300.index": (b"\x00\x00\x0b", TENSORFLOW),
    "model.ckpt-300.meta": (b"\x0a\xa1", TENSORFLOW),
    "model.ckpt-300.data-00000-of-00001": (bytes(90), TENSORFLOW),
    "checkpoint": (
        b'model_checkpoint_path: "model.ckpt-300"',
        "TensorFlow's checkpoints" + AUTHORS,
    ),
    "model.onnx": (b"\x08\x0a\x12\x07pytorch\x1a\x052.9.0", "an ONNX file" + EXPORTED),
    "plain.onnx": (b"\x08\x0e:3\n\x0c\n\x01x", "an ONNX file" + EXPORTED),
    "model.pt2": (archive("model/archive_format"), "torch.export" + EXPORTED),
    "old.pt2": (archive("serialized_exported_program.json"), "torch.export" + EXPORTED),
    "script.pt": (archive("s/constants.pkl", "s/data.pkl"), "a program of TorchScript"),
    "model.keras": (archive("config.json", "model.weights.h5"), "a model of Keras"),
    "run.zip": (archive("seed0/checkpoint.pt"), "packed archive; unpack it"),
    "run.tar": (bytes(257) + b"ustar", "packed archive; unpack it"),
    "run.tar.gz": (b"\x1f\x8b\x08", "packed archive; unpack it"),
    "model.pkl": (pickle.dumps({"weight": 1}), "a pickle of Python"),
    "page.pt": (
        b"\n<!DOCTYPE html><html>",
        "a web page, which came in place of a download perhaps",
    ),
    "pointer.pt": (b"version https://git-lfs.github.com/spec/v1", "git lfs pull"),
    "text.pt": (b"weights", "damaged or cut short, or no checkpoint"),
    "cut.pt2": (archive("model/archive_format")[:-30], "damaged or cut short"),
    "changed.npz": (npz().replace(b"NUMPY", b"NUMPI"), "damaged or cut short"),
}


@pytest.mark.parametrize("name", OTHERS)
def test_other_files_are_named_and_not_run(tmp_path, name):
    content, reason = OTHERS[name]
    (tmp_path / name).write_bytes(content)
    with pytest.raises(UserError, match=rf"{re.escape(name)} is .*{reason}.*nothing in it was run"):
        read_checkpoint(tmp_path / name)


def test_a_whole_module_is_told_from_a_damaged_file(tmp_path):
    path = tmp_path / "whole.pt"
    for zipped, reason in ((True, "a whole module say"), (False, "an old file of PyTorch")):
        torch.save(torch.nn.Linear(2, 2), path, _use_new_zipfile_serialization=zipped)
        with pytest.raises(UserError, match=f"no checkpoint of capsrun but .*{reason}"):
            read_checkpoint(path)


def test_a_checkpoint_of_tensorflow_is_known_by_the_name_that_its_files_share(tmp_path):
    (tmp_path / "model.ckpt-300.index").write_bytes(bytes(9))
    for read in (find_and_read, load_checkpoint):
        with pytest.raises(UserError, match=TENSORFLOW):
            read(str(tmp_path / "model.ckpt-300"))


def find_and_read(path):
    return read_checkpoint(find_checkpoint(path))


@pytest.mark.parametrize("device", ["nonsense", "", "cuda:99", "auto", None])
def test_a_device_that_is_not_there_is_refused(saved, device):
    for load in (load_checkpoint, functools.partial(capsrun.load_dataset, "mnist5k")):
        arguments = [] if load is not load_checkpoint else [saved[0]]
        with pytest.raises(UserError, match=f"device={device} cannot be used here"):
            load(*arguments, device=device)


@pytest.mark.skipif(torch.cuda.is_available(), reason="there is a GPU")
def test_a_gpu_that_is_not_there_is_refused(saved):
    for device in ("cuda", torch.device("cuda", 0)):
        with pytest.raises(UserError, match="'cuda' where there is a GPU"):
            load_checkpoint(saved[0], device=device)


def test_a_model_that_was_filled_here_becomes_a_checkpoint(saved, tmp_path):
    _, model, config = saved
    other = make_model(config, seed=1)
    capsrun.load_authors_weights(other, to_authors_arrays(model))
    capsrun.save_checkpoint(other, tmp_path / "mine.pt", config)
    trained = load_checkpoint(tmp_path / "mine.pt")
    assert (trained.config, trained.step, trained.finished) == (config, 0, True)
    assert torch.equal(trained.model.conv1.weight, model.conv1.weight)
    with pytest.raises(UserError, match="another network"):
        capsrun.save_checkpoint(other, tmp_path / "mine.pt", train_config())
    with torch.no_grad():
        other.conv1.weight[0] = torch.nan
    with pytest.raises(UserError, match="this model holds numbers that are not finite"):
        capsrun.save_checkpoint(other, tmp_path / "mine.pt", config)
    assert load_checkpoint(tmp_path / "mine.pt").step == 0


PHOTOS = ["dataset=cifar10", "model=capsnet_cifar10", "model.primary_types=2"]
SMALL_CNN = ["model.channels=[4]", "model.kernels_px=[5]", "model.pools_px=[2]"]


@pytest.mark.parametrize(
    "words",
    [[], [*TINY[1:4], "routing.iterations=1"], ["model=cnn_baseline", *SMALL_CNN]],
)
def test_a_model_knows_the_settings_that_it_was_made_with(tmp_path, words):
    """All that decide what it computes; it is taken for one of MNIST's."""
    made = train_config(*words)
    model = make_model(made)
    capsrun.save_checkpoint(model, tmp_path / "mine.pt")
    trained = load_checkpoint(tmp_path / "mine.pt")
    assert (trained.config.model, trained.config.routing) == (made.model, made.routing)
    sizes = [
        (d.image_px, d.channels, d.classes, d.standardise)
        for d in (made.dataset, trained.config.dataset)
    ]
    assert sizes[0] == sizes[1]
    assert trained.config.dataset.name == "mnist"
    for name, value in model.state_dict().items():
        assert torch.equal(value, trained.model.state_dict()[name])
    assert repr(trained) == f"Trained({made.model.name}, trained on mnist: 0 steps, finished)"


def test_what_a_checkpoint_cannot_tell_is_not_saved(tmp_path):
    with pytest.raises(UserError, match=r"of 3 channel.* is not for MNIST: say what it is for"):
        capsrun.save_checkpoint(make_model(train_config(*PHOTOS)), tmp_path / "mine.pt")
    config = train_config(*TINY)
    model = make_model(config)
    model.primarycaps = capsrun.PrimaryCaps(8, types=2, scale=1.0)

    class Mine(capsrun.CapsNet):
        pass

    others = model, Mine(config.model, config.routing, 28)
    for other in others:
        with pytest.raises(UserError, match=r"not as its settings say, or its class is one"):
            capsrun.save_checkpoint(other, tmp_path / "mine.pt", config)
    assert not (tmp_path / "mine.pt").exists()


def test_a_file_that_is_cut_short_is_called_so(tmp_path):
    content = packaged().read_bytes()
    for length in (20_000, 500, len(content) - 1):
        (tmp_path / "cut.pt").write_bytes(content[:length])
        with pytest.raises(UserError, match="damaged or cut short"):
            load_checkpoint(tmp_path / "cut.pt")


def test_a_network_that_python_made_is_taken_by_the_commands(in_tmp, printed):
    config = train_config(*TINY)
    model = capsrun.CapsNet(config.model)
    capsrun.save_checkpoint(model, "mine.pt")
    assert "model.pt2" in " ".join(printed("export", "checkpoint=mine.pt", "format=torch"))
    capsrun.save_checkpoint(model, "mine.pt", config)
    words = ["dataset=mnist5k", "checkpoint=mine.pt", "images=20"]
    assert printed("eval", *words)[-1].startswith("test error ")


@pytest.mark.parametrize(
    "words",
    [["model.primary_scale=one"], ["routing.iterations=1"], ["dataset.standardise=true"]],
)
def test_a_model_of_other_settings_is_not_saved_with_these(words, tmp_path):
    """Though its weights have the same names and shapes: it would compute something else."""
    config, other = train_config(*TINY), train_config(*TINY, *words)
    for made, said in ((config, other), (other, config)):
        with pytest.raises(UserError, match="the network was made with"):
            capsrun.save_checkpoint(make_model(made), tmp_path / "mine.pt", said)
    assert list(tmp_path.iterdir()) == []


def test_save_checkpoint_says_what_it_does_not_take(tmp_path, monkeypatch):
    config = train_config(*TINY)
    model = make_model(config)
    for other in (torch.nn.DataParallel(model), torch.nn.Linear(1, 1), model.state_dict()):
        with pytest.raises(UserError, match="a CapsNet or a CNN is saved"):
            capsrun.save_checkpoint(other, tmp_path / "mine.pt", config)
    for other in (dataclasses.asdict(config), config.model):
        with pytest.raises(UserError, match="`training_config`"):
            capsrun.save_checkpoint(model, tmp_path / "mine.pt", other)
    with pytest.raises(UserError, match="path is to be that of a file"):
        capsrun.save_checkpoint(model, config)
    broken = dataclasses.replace(config, recipe=dataclasses.replace(config.recipe, steps=None))
    with pytest.raises(UserError, match=r"recipe\.steps"):
        capsrun.save_checkpoint(model, tmp_path / "mine.pt", broken)
    assert list(tmp_path.iterdir()) == []


def test_save_checkpoint_takes_the_paths_that_load_checkpoint_takes(tmp_path, monkeypatch):
    monkeypatch.setenv("HOME", str(tmp_path))
    config = train_config(*TINY)
    for path in ("~/mine.pt", "~/new/folder/mine.pt", f"~/{'x' * 252}.pt"):
        capsrun.save_checkpoint(make_model(config), path, config)
        assert load_checkpoint(path).step == 0
    (tmp_path / "file").touch()
    with pytest.raises(UserError, match="cannot be written to"):
        capsrun.save_checkpoint(make_model(config), "~/file/mine.pt", config)


def test_a_bit_that_has_changed_is_found(saved):
    """Which PyTorch would read as another weight."""
    path, *_ = saved
    with zipfile.ZipFile(path) as archive:
        largest = max(archive.infolist(), key=lambda member: member.file_size)
    content = bytearray(path.read_bytes())
    content[largest.header_offset + 4_000] ^= 1
    path.write_bytes(content)
    with pytest.raises(UserError, match="is damaged or cut short"):
        load_checkpoint(path)


OTHER_WEIGHTS = {
    "sparse": torch.Tensor.to_sparse,
    "meta": lambda tensor: tensor.to("meta"),
    "complex": lambda tensor: tensor.to(torch.complex64),
    "int64": torch.Tensor.long,
    "bool": torch.Tensor.bool,
}


@pytest.mark.parametrize("kind", OTHER_WEIGHTS)
def test_tensors_that_are_no_weights(saved, kind):
    path, *_ = saved
    checkpoint = torch.load(path)
    weights = {name: OTHER_WEIGHTS[kind](tensor) for name, tensor in checkpoint["model"].items()}
    torch.save({**checkpoint, "model": weights}, path)
    with pytest.raises(UserError, match=r"it is damaged: conv1.weight is .*, and no weights"):
        load_checkpoint(path)


def test_a_link_to_a_checkpoint_elsewhere_is_to_be_followed_by_the_user():
    with pytest.raises(UserError, match="is to be downloaded first"):
        find_checkpoint("https://example.com/a.pt")


@pytest.mark.parametrize(
    ("key", "state"),
    [
        ("step", {"step": 1.5}),
        ("step", {"step": True}),
        ("step", {"step": -7}),
        ("train_seconds", {"train_seconds": float("nan")}),
        ("train_seconds", {"train_seconds": -1.0}),
        ("metrics_bytes", {"metrics_bytes": -5}),
        ("metrics_bytes", {"metrics_bytes": True}),
        ("parts", {"parts": ["x"]}),
        ("first_step", {"parts": [{}]}),
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
    reason = f"no sound '{key}'; delete it to train from the start"
    with pytest.raises(UserError, match=reason):
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
        write_checkpoint(path, dataclasses.asdict(config), 5, model=changed, **REST)
        with pytest.raises(UserError, match=message):
            load_checkpoint(path)


@pytest.mark.parametrize(
    ("key", "value"), [("iterations", -1), ("iterations", "three"), ("unknown", 1)]
)
def test_a_hostile_configuration_is_refused(saved, key, value):
    path, model, config = saved
    values = dataclasses.asdict(config)
    values["routing"][key] = value
    write_checkpoint(path, values, 5, model=model.state_dict(), **REST)
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
        write_checkpoint(path, {}, 6, model={})
    assert path.read_bytes() == before
    assert list(path.parent.iterdir()) == [path]


def test_files_of_one_name_have_folders_of_their_own(tmp_path):
    """`best.pt` is in many folders, and what is made of one is not that of another."""
    one, other = (tmp_path / name / "best.pt" for name in ("a", "b"))
    assert output_folder(one, "runs") != output_folder(other, "runs")
    assert output_folder(one, "runs") == output_folder(tmp_path / "a/../a/best.pt", "runs")
    assert output_folder(one, "runs").name.startswith("best-")


@pytest.mark.parametrize(
    ("trained", "tested"),
    [
        (["dataset=mnist"], ["dataset=mnist5k", "dataset.validation=200"]),
        (["dataset=mnist5k"], ["dataset=mnist", "dataset.validation=6000"]),
        (["dataset=multimnist"], ["dataset=multimnist", "dataset.source=mnist5k"]),
    ],
)
def test_held_out_images_of_a_set_that_shares_images_are_refused(trained, tested):
    """They may be training images of the model."""
    dataset = train_config(*tested).dataset
    with pytest.raises(UserError, match="may be among its training images"):
        check_dataset(dataset, train_config(*trained), "validation")
    check_dataset(dataset, train_config(*tested), "validation")
