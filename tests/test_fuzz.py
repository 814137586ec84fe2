"""Hostile files: what somebody made to break, stop, fill or take over the program.

The parsers themselves are in `parsers.py`. Here they get files that are changed at random
(hypothesis), files that lie about their sizes, and a short run of the fuzzer of `scripts/fuzz.py`.
"""

import dataclasses
import gzip
import importlib.util
import io
import json
import os
import pickle
import stat
import struct
import subprocess
import sys
import zipfile
import zlib
from datetime import timedelta
from pathlib import Path

import pytest
import torch
from conftest import REPOSITORY, TINY, train_config
from parsers import TARGETS, check, picture, zipped
from PIL import Image

from capsrun import cli
from capsrun.commands.perturb import read_image
from capsrun.config import TrainConfig, from_dict
from capsrun.data import affnist, cifar10, files, matlab
from capsrun.errors import UserError
from capsrun.models import build_model
from capsrun.reading import parse_json, read_bytes, read_yaml
from capsrun.runs import archive
from capsrun.runs.checkpoint import load_checkpoint, read_checkpoint, save_checkpoint
from capsrun.runs.results import read_result

hypothesis = pytest.importorskip("hypothesis", reason="the package hypothesis is not here")
st = hypothesis.strategies

# How many files each parser gets; the fast ones could take many more.
EXAMPLES = {"idx": 60, "affnist": 100, "smallnorb": 100, "svhn": 60, "image": 60, "settings": 40}
FEW = 15
SLOWEST_SECONDS = 20


@st.composite
def changed(draw, seeds):
    """One of some files with bytes changed, sizes overwritten, parts cut, doubled or swapped in."""
    content = bytearray(draw(st.sampled_from(seeds)))
    for _ in range(draw(st.integers(1, 4))):
        place = draw(st.integers(0, max(0, min(len(content), 1000) - 1)))
        kind = draw(st.sampled_from(["flip", "size", "cut", "twice", "splice", "text"]))
        if kind == "flip" and content:
            content[place] ^= 1 << draw(st.integers(0, 7))
        elif kind == "size":
            number = draw(st.sampled_from([0, 1, 10**9, 2**31 - 1, 2**31, 2**32 - 1]))
            content[place : place + 4] = number.to_bytes(
                4, draw(st.sampled_from(["big", "little"]))
            )
        elif kind == "cut":
            del content[place:]
        elif kind == "twice":
            content[place:place] = content[: draw(st.integers(0, 200))]
        elif kind == "splice":
            content[place:place] = draw(st.sampled_from(seeds))[-draw(st.integers(0, 200)) :]
        else:
            words = [
                "NaN",
                "-1e999",
                "9" * 30,
                "null",
                "[" * 50,
                "{}",
                "\ud7ff",
                "${seed}",
                '"',
                "\x1b",
            ]
            content[place:place] = draw(st.sampled_from(words)).encode()
    return bytes(content)


@pytest.mark.filterwarnings("ignore")
@pytest.mark.parametrize("name", TARGETS)
def test_changed_and_random_files_are_read_or_refused(name):
    """Nothing but a `UserError` comes out, and it does not take long."""
    seeds = TARGETS[name].seeds()

    @hypothesis.settings(
        max_examples=EXAMPLES.get(name, FEW),
        deadline=timedelta(seconds=SLOWEST_SECONDS),
        derandomize=True,
        database=None,
        phases=(hypothesis.Phase.generate, hypothesis.Phase.shrink),
        suppress_health_check=list(hypothesis.HealthCheck),
    )
    @hypothesis.given(st.one_of(changed(seeds), st.binary(max_size=300)))
    def try_one(content):
        check(name, content)

    try_one()


json_values = st.recursive(
    st.none()
    | st.booleans()
    | st.integers()
    | st.floats()
    | st.text(max_size=5)
    | st.sampled_from([10**30, "${oc.env:HOME}", "???", "../x", "\x00", ""]),
    lambda inner: (
        st.lists(inner, max_size=3) | st.dictionaries(st.text(max_size=5), inner, max_size=3)
    ),
    max_leaves=8,
)


@pytest.mark.filterwarnings("ignore")
@pytest.mark.parametrize("name", ["settings", "result"])
def test_values_of_any_type_anywhere_are_read_or_refused(name):
    seed = json.loads(TARGETS[name].seeds()[0])
    places = list(leaves(seed))

    @hypothesis.settings(
        max_examples=40,
        deadline=timedelta(seconds=SLOWEST_SECONDS),
        derandomize=True,
        database=None,
        phases=(hypothesis.Phase.generate, hypothesis.Phase.shrink),
        suppress_health_check=list(hypothesis.HealthCheck),
    )
    @hypothesis.given(st.sampled_from(places), json_values)
    def try_one(place, value):
        values = json.loads(json.dumps(seed))
        inner = values
        for key in place[:-1]:
            inner = inner[key]
        inner[place[-1]] = value
        check(name, json.dumps(values).encode())

    try_one()


def leaves(values, place=()):
    """Where each value is, the sections too."""
    for key, value in values.items():
        yield (*place, key)
        if isinstance(value, dict):
            yield from leaves(value, (*place, key))


# The fuzzer


def run_fuzzer(*words, seconds, script=REPOSITORY / "scripts" / "fuzz.py"):
    if importlib.util.find_spec("atheris") is None:
        pytest.skip("the package atheris is not here (it is there for Linux on x86)")
    done = subprocess.run(
        [sys.executable, script, f"--seconds={seconds}", *words],
        cwd=script.parent,
        capture_output=True,
        text=True,
        check=False,
        timeout=3600,
    )
    return done.returncode, done.stdout + done.stderr


def test_a_short_run_of_the_fuzzer_finds_nothing(tmp_path):
    """On one parser of each kind; all have their turn in the long run."""
    names = ["idx", "svhn", "zip", "checkpoint", "settings"]
    code, log = run_fuzzer(f"--out={tmp_path}", *names, seconds=1)
    assert code == 0, log
    assert log.count("nothing found") == len(names)


def test_what_the_fuzzer_finds_can_be_repeated(tmp_path):
    """It finds a fault that was put into a parser."""
    script = (REPOSITORY / "scripts" / "fuzz.py").read_text()
    fault = "    def broken(content):\n        assert len(content) < 9 or content[4] != 7\n"
    fault += "    parsers.TARGETS['idx'] = parsers.Target(broken, parsers.idx_seeds)\n"
    place = "    unknown = sorted("
    assert script.count(place) == 1
    script = script.replace(place, fault + place)
    script = script.replace("Path(__file__).resolve().parent.parent", f"Path({str(REPOSITORY)!r})")
    (tmp_path / "fuzz.py").write_text(script)
    code, log = run_fuzzer("--out=found", "idx", seconds=20, script=tmp_path / "fuzz.py")
    assert code == 1, log
    assert "AssertionError" in log
    assert "--repeat idx" in log


@pytest.mark.slow
@pytest.mark.parametrize("name", TARGETS)
def test_a_long_run_of_the_fuzzer_finds_nothing(tmp_path, name):
    code, log = run_fuzzer(f"--out={tmp_path}", name, seconds=120)
    assert code == 0, log


# Memory


def run_with_little_memory(code, *arguments):
    """Run Python code in a process that may take 500 MB more than after its imports."""
    limited = (
        "import re, resource, sys\n"
        f"sys.path.insert(0, {str(REPOSITORY / 'tests')!r})\n"
        "import parsers\n"
        "size = int(re.search(r'VmSize:\\s+(\\d+)', open('/proc/self/status').read())[1]) * 1024\n"
        "resource.setrlimit(resource.RLIMIT_AS, (size + 500_000_000,) * 2)\n"
    )
    words = [sys.executable, "-c", limited + code, *map(str, arguments)]
    return subprocess.run(words, capture_output=True, text=True, timeout=300, check=False)


@pytest.mark.skipif(not Path("/proc/self/status").exists(), reason="no Linux")
def test_files_that_lie_about_their_sizes_take_no_memory(tmp_path):
    """All in one process, as to start one takes seconds; each is refused, and none runs out."""
    attacks = {
        "idx": bytes([0, 0, 8, 3]) + struct.pack(">3I", 10**9, 28, 28),
        "smallnorb": struct.pack("<6I", 0x1E3D4C55, 4, 10**9, 2, 96, 96),
        "affnist": mat_of_zeros(100, claimed=2**31),
        "zip": lying_zip(50_000_000),
        "checkpoint": compressed_checkpoint(tmp_path, 600_000_000),
        "image": picture_of_claimed_size(60_000, 60_000),
        "config": billion_laughs().encode(),
        "result": b"[" * 200_000,
        "metrics": b'{"step": ' + b"9" * 5000 + b"}",
        "settings": b'{"model": {"kernels_px": ' + b"[" * 900 + b"]" * 900 + b"}}",
    }
    for name, content in attacks.items():
        (tmp_path / name).write_bytes(content)
    done = run_with_little_memory(
        "for path in sys.argv[1:]: parsers.check(path.split('/')[-1], open(path, 'rb').read())\n"
        "print('all refused')",
        *(tmp_path / name for name in attacks),
    )
    assert done.stdout.strip() == "all refused", done.stderr


def mat_of_zeros(count, claimed=None):
    """A MATLAB file with one compressed element, of so many zeros."""
    size = count if claimed is None else claimed
    element = zlib.compress(struct.pack("<II", matlab.MATRIX, size) + bytes(count), 9)
    head = b"MATLAB".ljust(124) + b"\0\1IM"
    return head + struct.pack("<II", matlab.COMPRESSED, len(element)) + element


def lying_zip(count):
    """A zip whose file unpacks to more than both of its headers say."""
    content = bytearray(zipped(bytes(count)))
    true_size = struct.pack("<I", count)
    while (place := content.find(true_size)) >= 0:
        content[place : place + 4] = struct.pack("<I", 1000)
    return bytes(content)


def billion_laughs():
    lines = ["a0: &a0 [x, x, x, x, x, x, x, x, x, x]"]
    lines += [f"a{n}: &a{n} [{', '.join([f'*a{n - 1}'] * 10)}]" for n in range(1, 10)]
    return "\n".join(lines)


def picture_of_claimed_size(width, height):
    """A PNG whose header claims so many pixels."""
    content = bytearray(picture("L", "PNG"))
    content[16:24] = struct.pack(">II", width, height)
    content[29:33] = struct.pack(">I", zlib.crc32(content[12:29]))
    return bytes(content)


def test_what_unpacks_to_too_much_is_refused(tmp_path, monkeypatch):
    monkeypatch.setattr(files, "MAX_FILE_BYTES", 10_000)
    path = tmp_path / "images.gz"
    path.write_bytes(gzip.compress(bytes(1_000_000)))
    with pytest.raises(UserError, match=r"holds more than 10\.0 kB"):
        files.read_idx(tmp_path, files.IdxFile("images", None, None), 3)
    monkeypatch.setattr(matlab, "MOST_BYTES", 10_000)
    with pytest.raises(UserError, match="more than 10,000 bytes"):
        affnist.read_mat(mat_of_zeros(1_000_000), "test.mat")


def test_an_unpacked_file_is_not_larger_than_it_says(tmp_path):
    path = tmp_path / "test.mat.zip"
    path.write_bytes(lying_zip(5_000_000))
    with pytest.raises(UserError, match=r"damaged|holds more"):
        list(affnist.mat_files(path))


@pytest.mark.parametrize("size", [(40_000, 40_000), (9_000, 1), (1, 60_000)])
def test_pictures_that_would_fill_the_memory_are_refused(tmp_path, size):
    path = tmp_path / "own.png"
    path.write_bytes(picture_of_claimed_size(*size))
    with pytest.raises(UserError, match="cannot be read as an image"):
        read_image(path, 28, 1, "auto")


def test_no_program_is_run_for_a_picture(tmp_path):
    """Pillow lets Ghostscript read PostScript."""
    path = tmp_path / "own.png"
    Image.new("RGB", (9, 9)).save(path, "EPS")
    with pytest.raises(UserError, match="cannot be read as an image"):
        read_image(path, 28, 1, "auto")


# Checkpoints


def saved_tiny(path, **changes):
    config = train_config(*TINY)
    model = build_model(config.model, config.routing, config.dataset)
    state = {"model": model.state_dict(), "optimizer": None, "train_seconds": 1.5, **changes}
    save_checkpoint(path, state.pop("config", dataclasses.asdict(config)), 5, **state)
    return config, model


def compressed_checkpoint(folder, size):
    """A checkpoint one of whose tensors, all zeros, is compressed a thousand times."""
    path = folder / "bomb.pt"
    saved_tiny(path)
    stream = io.BytesIO()
    fast = {"compression": zipfile.ZIP_DEFLATED, "compresslevel": 1}
    with zipfile.ZipFile(path) as old, zipfile.ZipFile(stream, "w", **fast) as new:
        for name in old.namelist():
            if not name.endswith("data/0"):
                new.writestr(name, old.read(name))
                continue
            with new.open(name, "w", force_zip64=True) as member:
                for _ in range(size // 10_000_000):
                    member.write(bytes(10_000_000))
    return stream.getvalue()


def test_a_tensor_larger_than_its_file_is_refused(tmp_path):
    path = tmp_path / "checkpoint.pt"
    for tensor in (
        torch.zeros(1).expand(10**12),
        torch.zeros(10**12, device="meta"),
        torch.sparse_coo_tensor(torch.zeros(1, 1), torch.ones(1), (9,), check_invariants=True),
        torch.nn.Parameter(torch.zeros(3)),
    ):
        saved_tiny(path, model={"conv1.weight": tensor})
        with pytest.raises(UserError, match="nothing in it was run"):
            load_checkpoint(path)


@pytest.mark.parametrize("key", ["conv1_channels", "primary_types", "digit_dimensions"])
@pytest.mark.parametrize("value", [10**6, 2**62])
def test_a_checkpoint_that_asks_for_a_huge_network_is_refused(tmp_path, key, value):
    path = tmp_path / "checkpoint.pt"
    config, _ = saved_tiny(path)
    values = dataclasses.asdict(config)
    values["model"][key] = value
    saved_tiny(path, config=values)
    with pytest.raises(UserError, match=r"ask for|another network"):
        load_checkpoint(path)


def test_a_huge_network_on_the_command_line_is_refused(in_tmp, capsys):
    assert cli.main(["train", "dataset=mnist5k", "model.conv1_channels=100000000"]) == 2
    assert "parameters, more than" in capsys.readouterr().err


@pytest.mark.parametrize(
    "changes",
    [
        {"train_seconds": float("nan")},
        {"train_seconds": -1.0},
        {"model": [1]},
        {"optimizer": 3},
        {"config": 3},
        {"precision": "int4"},
        {"metrics_bytes": -5},
        {"train_seconds": 10**40},
    ],
    ids=str,
)
def test_a_checkpoint_with_values_of_other_types_is_refused(tmp_path, changes):
    path = tmp_path / "checkpoint.pt"
    saved_tiny(path, **changes)
    with pytest.raises(UserError, match=r"other types or ranges|damaged"):
        read_checkpoint(path)


class Named:
    """Pickles as a call of some function with some arguments."""

    def __init__(self, function, *arguments):
        self.call = (function, arguments)

    def __reduce__(self):
        return self.call


@pytest.mark.parametrize(
    "value",
    [
        Named(bytearray, 10**12),
        Named(os.system, "true"),
        Named(torch.Tensor, 10**9),
        Named(torch.UntypedStorage, 10**9),
        Named(complex, 1.0),
    ],
    ids=["bytearray", "os.system", "Tensor", "UntypedStorage", "complex"],
)
def test_a_pickle_that_names_anything_else_is_refused(value):
    """PyTorch itself allows most of these."""
    with pytest.raises(ValueError, match="a pickle with"):
        archive.check_pickle(pickle.dumps({"a": value}, protocol=2))


def test_a_pickle_that_takes_for_ever_is_refused():
    nested = b"\x80\x02}" + b")q\x00" + b"h\x00h\x00\x86q\x00" * 60 + b"K\x01s."
    with pytest.raises(ValueError, match="neither a name nor a number"):
        archive.check_pickle(nested)


def test_another_optimiser_is_refused_before_training_goes_on(tmp_path):
    from capsrun.commands.train import load_optimizer
    from capsrun.training.step import Trainer

    config, model = saved_tiny(tmp_path / "checkpoint.pt")
    trainer = Trainer(
        model, config.loss, config.recipe, 10, torch.device("cpu"), "fp32", fast=False
    )
    state = trainer.optimizer.state_dict()
    load_optimizer(trainer, state, tmp_path)
    state["state"][0]["exp_avg"] = torch.zeros(3)
    for hostile in (
        state,
        {},
        {"state": {}, "param_groups": []},
        {"param_groups": [1], "state": 2},
    ):
        with pytest.raises(UserError, match="another optimiser"):
            load_optimizer(trainer, hostile, tmp_path)


def test_a_matrix_without_parts_is_refused():
    content = mat_of_zeros(0)[:128] + struct.pack("<II", matlab.MATRIX, 0)
    with pytest.raises(UserError, match="damaged"):
        affnist.read_mat(content, "test.mat")


# Links, devices and pipes


def test_a_link_in_a_zip_is_refused(tmp_path):
    path = tmp_path / "test.mat.zip"
    with zipfile.ZipFile(path, "w") as archive_:
        link = zipfile.ZipInfo("test.mat")
        link.external_attr = (stat.S_IFLNK | 0o777) << 16
        archive_.writestr(link, "/etc/passwd")
    with pytest.raises(UserError, match="holds a link"):
        list(affnist.mat_files(path))


@pytest.mark.parametrize("kind", ["device", "pipe", "folder"])
def test_only_regular_files_are_read(tmp_path, kind):
    """A device has no end, and a pipe would be waited for."""
    path = tmp_path / "MNIST" / "raw" / "train-images-idx3-ubyte"
    path.parent.mkdir(parents=True)
    if kind == "device":
        path.symlink_to("/dev/zero")
    elif kind == "pipe":
        os.mkfifo(path)
    else:
        path.mkdir()
    with pytest.raises((ValueError, IsADirectoryError)):
        read_bytes(path, 1000)
    assert files.find_idx(path.parent, files.IdxFile(path.name, None, None)) is None
    for read in (
        lambda: read_checkpoint(path),
        lambda: read_image(path, 28, 1, "auto"),
        lambda: list(affnist.mat_files(path)),
        lambda: files.stored_bytes(path, 1000),
    ):
        with pytest.raises(UserError):
            read()
    assert read_result(path) is None


def test_a_file_of_many_terabytes_is_not_read(tmp_path):
    path = tmp_path / "test.mat"
    with open(path, "wb") as stream:
        stream.truncate(10**12)
    with pytest.raises(UserError, match="holds more than"):
        list(affnist.mat_files(path))


def test_cifar10_is_never_unpickled(tmp_path, monkeypatch):
    """Its version for Python is pickles; only the binary version is read."""
    folder = tmp_path / cifar10.FOLDER
    folder.mkdir()
    marker = tmp_path / "ran"
    for name in (*cifar10.TRAIN, *cifar10.TEST):
        (folder / name).write_bytes(pickle.dumps(Named(open, str(marker), "w")))
    with pytest.raises(UserError, match="damaged or cut short"):
        cifar10.load(train_config("dataset=cifar10", f"dataset.data_dir={tmp_path}").dataset)
    assert not marker.exists()
    sources = (REPOSITORY / "capsrun").rglob("*.py")
    unpickle = ("pickle.load", "weights_only=False", "allow_pickle=True", "yaml.load(", "eval(")
    assert [(f, w) for f in sources for w in unpickle if f" {w}" in f.read_text()] == []


# JSON and YAML


@pytest.mark.parametrize(
    "text",
    ["[" * 100_000, "9" * 100, '"\\ud800"', "[" * 40 + "]" * 40, "{", "9" * 5000],
    ids=["deep", "long number", "half a letter", "rather deep", "cut", "very long number"],
)
def test_json_that_would_break_later_is_refused(text):
    with pytest.raises(ValueError, match=r"."):
        parse_json(text)


@pytest.mark.parametrize(
    "text",
    [
        billion_laughs(),
        "a: !!python/object/apply:os.system ['touch ran']",
        "a: !!python/name:os.system",
        "a: &a [*a]",
        "[" * 50_000,
        "{a: " * 20_000,
        "a: \ud7ff\x00",
        "x: " + "9" * 5000,
        "- " * 1000 + "a",
    ],
    ids=["laughs", "object", "name", "circle", "lists", "maps", "zero", "number", "dashes"],
)
def test_yaml_that_is_more_than_settings_is_refused(in_tmp, text):
    path = in_tmp / "config.yaml"
    path.write_text(text)
    with pytest.raises(ValueError, match=r"."):
        read_yaml(path)
    assert not (in_tmp / "ran").exists()


def test_settings_from_a_file_cannot_ask_for_the_environment(monkeypatch):
    values = dataclasses.asdict(train_config(*TINY))
    assert from_dict(TrainConfig, values).dataset.source == values["dataset"]["source"]
    values["dataset"]["source"] = "${oc.env:HOME}"
    with pytest.raises(UserError, match="whose value is elsewhere"):
        from_dict(TrainConfig, values)


def test_settings_that_hold_themselves_are_refused():
    values = dataclasses.asdict(train_config(*TINY))
    values["model"] = values
    with pytest.raises(UserError, match=r"nested too deeply|more than"):
        from_dict(TrainConfig, values)


@pytest.mark.parametrize(
    "text",
    [
        "a: [",
        "a: !!python/object/apply:os.system ['touch ran']",
        "name: &a [*a]",
        "\t",
        "[" * 2000,
        billion_laughs(),
        "x: {_target_: os.system, command: touch ran}",
        "# @package _global_\nhydra: {callbacks: {x: {_target_: os.system, command: touch ran}}}",
    ],
    ids=["cut", "object", "circle", "tab", "deep", "laughs", "target", "callback"],
)
def test_a_hostile_folder_of_settings_is_one_sentence(in_tmp, text, capsys):
    folder = in_tmp / "mine" / "dataset"
    folder.mkdir(parents=True)
    (folder / "own.yaml").write_text(text)
    assert cli.main(["data", "--config-dir", "mine", "dataset=own"]) == 2
    assert len(capsys.readouterr().err.strip().splitlines()) == 1
    assert not (in_tmp / "ran").exists()


def test_a_name_cannot_lead_elsewhere(tmp_path):
    """`report keep=…` makes folders of the names of runs."""
    values = json.loads(TARGETS["result"].seeds()[0])
    path = tmp_path / "result.json"
    for name, good in (("run", True), ("../../elsewhere", False), ("/elsewhere", False)):
        path.write_text(json.dumps({**values, "name": name}))
        assert (read_result(path) is not None) == good
