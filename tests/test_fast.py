"""The fast ways of computing give the numbers of the plain ones."""

import importlib.util
import json
import os
import shutil
import subprocess
import sys
import tempfile
import types
from pathlib import Path

import pytest
import torch
from conftest import MNIST_DIR, TINY, needs_compiler, train_config
from torch.nn import functional as F

from capsrun import errors, models
from capsrun.commands.train import train
from capsrun.data import load_dataset
from capsrun.data.splits import TrainingBatches
from capsrun.models import build_model
from capsrun.models.fast import frequency_conv, native, routing_cpu
from capsrun.models.fast.patch_conv import patch_conv2d
from capsrun.models.fast.routing_cpu import load_kernels, route_fused, squash_fused
from capsrun.models.fast.strided_conv import relu_strided_conv2d
from capsrun.models.routing import capsule_votes, route, squash
from capsrun.training.step import Trainer

CPU = torch.device("cpu")


def relative_error(ours, theirs):
    return ((ours - theirs).abs().max() / theirs.abs().max()).item()


def routing_inputs(batch, count, dimensions, outputs, output_dimensions, bias):
    generator = torch.Generator().manual_seed(0)

    def draw(*shape):
        return torch.randn(shape, generator=generator)

    return (
        draw(batch, count, dimensions) * 0.3,
        draw(count, dimensions, outputs, output_dimensions) * 0.5,
        draw(outputs, output_dimensions) if bias else None,
        draw(batch, outputs, output_dimensions),
    )


def with_gradients(function, inputs, weights, bias, seed):
    """The value of a function and its gradients."""
    given = [None if t is None else t.clone().requires_grad_() for t in (inputs, weights, bias)]
    value = function(*given)
    value.backward(seed)
    return [value.detach()] + [tensor.grad for tensor in given if tensor is not None]


@needs_compiler
@pytest.mark.parametrize("iterations", [1, 2, 3, 5])
@pytest.mark.parametrize(
    ("shape", "leaky", "bias"),
    [
        ((128, 50, 8, 10, 16), False, True),
        ((1, 7, 8, 10, 16), False, False),
        ((17, 33, 8, 10, 16), True, True),
        ((5, 4, 3, 7, 5), False, True),
        ((19, 12, 1, 2, 9), True, False),
        ((3, 1, 8, 1, 1), False, True),
    ],
)
def test_fused_routing_is_routing(shape, leaky, bias, iterations):
    *tensors, seed = routing_inputs(*shape, bias)

    def plain(inputs, weights, bias):
        return route(capsule_votes(inputs, weights), bias, iterations, leaky)

    def fused(inputs, weights, bias):
        return route_fused(inputs, weights, bias, iterations, leaky)

    exact = with_gradients(plain, *(t if t is None else t.double() for t in (*tensors, seed)))
    ours = with_gradients(fused, *tensors, seed)
    for name, a, b in zip(("v", "du", "dW", "dbias"), ours, exact):
        assert relative_error(a, b) < 1e-5, name


@needs_compiler
@pytest.mark.parametrize("shape", [(5, 32, 6, 8), (1, 2, 1, 8), (3, 4, 5, 3), (2, 1, 2, 1)])
def test_fused_squash_is_squash(shape):
    """Capsules of PrimaryCaps from its maps, types first, and zeros among them."""
    batch, types, px, dimensions = shape
    generator = torch.Generator().manual_seed(0)
    maps = torch.randn(batch, types * dimensions, px, px, generator=generator)
    bias = torch.randn(types * dimensions, generator=generator) / 10
    maps[0], bias[:dimensions] = 0, 0
    seed = torch.randn(batch, types * px**2, dimensions, generator=generator)
    weights = torch.empty(types * px**2, dimensions, 3, 2)

    def plain(maps, bias, _):
        poses = (maps / 32 + bias[:, None, None]).unflatten(1, (types, dimensions))
        return squash(poses.permute(0, 1, 3, 4, 2).flatten(1, 3))

    def fused(maps, bias, _):
        return squash_fused(maps, bias, 1 / 32, weights)

    exact = with_gradients(plain, maps.double(), bias.double(), None, seed.double())
    for memory_format in (torch.contiguous_format, torch.channels_last):
        laid = maps.contiguous(memory_format=memory_format)
        for a, b in zip(with_gradients(fused, laid, bias, None, seed), exact):
            assert a.isfinite().all()
            assert relative_error(a, b) < 1e-5


@pytest.mark.parametrize("channels", [1, 2, 3])
@pytest.mark.parametrize("dtype", [torch.float64, torch.bfloat16])
def test_convolution_of_patches_is_a_convolution(channels, dtype):
    generator = torch.Generator().manual_seed(0)
    images = torch.rand(3, channels, 12, 11, generator=generator, dtype=torch.float64)
    weight = torch.randn(5, channels, 4, 4, generator=generator, dtype=torch.float64) / 4
    bias = torch.randn(5, generator=generator, dtype=torch.float64)
    values = []
    for convolve, kind in ((F.conv2d, torch.float64), (patch_conv2d, dtype)):
        w, b = weight.clone().requires_grad_(), bias.clone().requires_grad_()
        with torch.autocast("cpu", torch.bfloat16, enabled=kind == torch.bfloat16):
            value = convolve(images, w, b)
        assert value.dtype == kind
        value.backward(torch.ones_like(value) + value.detach())
        assert w.grad.dtype == b.grad.dtype == torch.float64
        values.append([value.detach(), w.grad, b.grad])
    tolerance = 1e-12 if dtype == torch.float64 else 0.02
    for exact, ours in zip(*values):
        assert relative_error(ours.double(), exact) < tolerance


@needs_compiler
def test_fused_routing_depends_on_neither_threads_nor_batch_mates():
    *tensors, seed = routing_inputs(40, 30, 8, 10, 16, True)

    def fused(inputs, weights, bias):
        return route_fused(inputs, weights, bias, 3, False)

    threads = torch.get_num_threads()
    both = []
    for number in (1, 3):
        torch.set_num_threads(number)
        both.append(with_gradients(fused, *tensors, seed))
    torch.set_num_threads(threads)
    assert all(torch.equal(a, b) for a, b in zip(*both))
    inputs, weights, bias = tensors
    assert torch.equal(fused(inputs[7:20], weights, bias), both[0][0][7:20])


@needs_compiler
def test_fused_routing_of_strange_numbers():
    """Zeros have finite gradients, huge logits no overflow, and a NaN is not swallowed."""
    inputs, weights, bias, seed = routing_inputs(3, 6, 8, 10, 16, False)

    def fused(inputs, weights, bias):
        return route_fused(inputs, weights, bias, 3, False)

    zeros = with_gradients(fused, 0 * inputs, weights, bias, seed)
    assert all(tensor.isfinite().all() for tensor in zeros)
    huge = with_gradients(fused, 1e4 * inputs, weights, bias, seed)
    assert all(tensor.isfinite().all() for tensor in huge)
    torch.testing.assert_close(huge[0], route(capsule_votes(1e4 * inputs, weights), None, 3))
    inputs[1, 2, 3] = float("nan")
    value = fused(inputs, weights, bias)
    assert value[1].isnan().all()
    assert value[[0, 2]].isfinite().all()


@pytest.mark.skipif(importlib.util.find_spec("triton") is None, reason="no Triton here")
def test_triton_routing_is_routing():
    """In Triton's interpreter, which has to be chosen before Triton is imported."""
    environment = {**os.environ, "TRITON_INTERPRET": "1", "PYTHONPATH": str(Path(__file__).parent)}
    script = "import test_fast; test_fast.check_triton_routing('cpu', test_fast.ODD_SHAPES)"
    done = subprocess.run(
        [sys.executable, "-c", script], env=environment, capture_output=True, text=True, check=False
    )
    if "only 0-dimensional arrays can be converted" in done.stderr:
        pytest.skip("the interpreter of this Triton does not work with this NumPy")
    assert done.returncode == 0, done.stderr
    assert done.stdout.count("checked") == len(ODD_SHAPES)


@pytest.mark.gpu
def test_triton_routing_on_a_gpu():
    check_triton_routing("cuda", [*ODD_SHAPES, ((128, 1152, 8, 10, 16), False, True, 3)])


# Sizes (B, I, K, J, D), leaky, bias, iterations.
ODD_SHAPES = [
    ((17, 9, 8, 10, 16), True, True, 3),
    ((5, 4, 3, 7, 5), False, True, 5),
    ((19, 12, 1, 2, 9), False, False, 2),
    ((1, 3, 8, 1, 1), False, True, 1),
]


def check_triton_routing(device, cases):
    from capsrun.models.fast import routing_gpu

    if device == "cpu":
        routing_gpu.CHUNK = (
            4  # several chunks of the few input capsules that an interpreter can take
        )
    for shape, leaky, bias, iterations in cases:
        *tensors, seed = routing_inputs(*shape, bias)
        exact = with_gradients(
            lambda u, w, b, r=iterations, leaky=leaky: route(capsule_votes(u, w), b, r, leaky),
            *(t if t is None else t.double() for t in (*tensors, seed)),
        )
        ours = with_gradients(
            lambda u, w, b, r=iterations, leaky=leaky: routing_gpu.route_fused(u, w, b, r, leaky),
            *(t if t is None else t.to(device) for t in (*tensors, seed)),
        )
        for name, a, b in zip(("v", "du", "dW", "dbias"), ours, exact):
            assert relative_error(a.cpu(), b) < 1e-5, (shape, name)
        given = [t if t is None else t.to(device) for t in tensors]
        compiled = torch.compile(routing_gpu.route_fused, backend="aot_eager", fullgraph=True)
        assert relative_error(compiled(*given, iterations, leaky).cpu(), exact[0]) < 1e-5
        print("checked")


def test_fused_routing_leaves_double_precision_alone():
    inputs, weights, bias, _ = routing_inputs(2, 3, 8, 10, 16, True)
    assert route_fused(inputs.double(), weights.double(), bias.double(), 3, False) is None


@pytest.mark.parametrize(("dimensions", "outputs"), [(2, 300), (900, 20), (1025, 1)])
def test_fused_routing_leaves_large_capsules_alone(capsys, monkeypatch, dimensions, outputs):
    monkeypatch.setattr(errors, "notices", [])
    inputs, weights = torch.ones(1, 1, dimensions), torch.ones(1, dimensions, outputs, 10)
    for _ in range(2):
        assert route_fused(inputs, weights, None, 3, False) is None
    said = f"routing from {dimensions} dimensions to {outputs} capsules of 10 is too large"
    assert capsys.readouterr().err.count(said) == 1


@needs_compiler
@pytest.mark.parametrize("shape", [(2, 2, 6, 2, 1024), (2, 2, 64, 128, 16), (2, 2, 1024, 8, 16)])
def test_the_largest_capsules_of_fused_routing(shape):
    *tensors, seed = routing_inputs(*shape, True)
    tensors[1] /= shape[2] ** 0.5
    values = [
        with_gradients(function, *tensors, seed)
        for function in (
            lambda u, w, b: route_fused(u, w, b, 2, False),
            lambda u, w, b: route(capsule_votes(u, w), b, 2),
        )
    ]
    assert all(relative_error(a, b) < 1e-4 for a, b in zip(*values))


@needs_compiler
def test_testing_keeps_nothing_for_a_backward_pass(monkeypatch):
    config = train_config(*TINY)
    model = build_model(config.model, config.routing, config.dataset)
    model.fast = True
    kept = []
    monkeypatch.setattr(
        routing_cpu._Route, "apply", lambda *args: kept.append(args[-1]) or torch.zeros(1)
    )
    poses = torch.ones(1, model.primary_capsules, 8)
    with torch.inference_mode():
        model.route_poses(poses)
    with torch.no_grad():
        model.route_poses(poses)
    model.route_poses(poses)
    assert kept == [False, False, True]


@pytest.mark.skipif(importlib.util.find_spec("triton") is None, reason="no Triton here")
@pytest.mark.parametrize("sizes", [(8, 10, 16), (3, 7, 5), (1, 2, 1), (8, 1, 1)])
def test_triton_kernels_compile_for_a_gpu(sizes):
    """For an H100, which need not be there: what the interpreter takes, a compiler may not."""
    from capsrun.models.fast import routing_gpu

    compiler = pytest.importorskip("triton.compiler")
    target = pytest.importorskip("triton.backends.compiler").GPUTarget("cuda", 90, 32)
    launch = routing_gpu._launch(torch.empty(1, *sizes))
    options = {key: launch.pop(key) for key in ("num_warps", "num_stages")}
    given = {
        routing_gpu._forward_pass: {"FIRST": False, "SECOND": False, "LEAKY": True, "STEP": 32},
        routing_gpu._backward_pass: {"LAST": False, "STEP": 32},
        routing_gpu._input_gradients: {"SHARES": 11, "R": 3},
    }
    for kernel, more in given.items():
        constants = launch | more
        signature = {
            name: "constexpr" if name in constants else "*fp32" if name.endswith("_ptr") else "i32"
            for name in kernel.arg_names
        }
        places = {(kernel.arg_names.index(name),): value for name, value in constants.items()}
        source = compiler.ASTSource(fn=kernel, signature=signature, constexprs=places)
        assert "ptx" in compiler.compile(source, target=target, options=options).asm


def test_a_network_uses_triton_where_it_is_told_to(monkeypatch):
    config = train_config(*TINY)
    model = build_model(config.model, config.routing, config.dataset)
    gpu = torch.device("cuda")
    routing_gpu = types.SimpleNamespace(route_fused=lambda: "triton")
    monkeypatch.setattr(models, "routing_gpu", routing_gpu, raising=False)
    monkeypatch.setitem(sys.modules, "capsrun.models.fast.routing_gpu", routing_gpu)
    assert model._fused_routing(gpu) is None
    model.fast = True
    assert model._fused_routing(gpu) is None
    assert model._fused_routing(CPU) is routing_cpu.route_fused
    model.triton = True
    assert model._fused_routing(gpu) is routing_gpu.route_fused
    # PyTorch 2.11 takes what it compiles for an export, and a GPU's step is compiled.
    monkeypatch.setattr(torch.compiler, "is_exporting", lambda: True)
    assert model._fused_routing(gpu) is routing_gpu.route_fused
    assert model._fused_routing(CPU) is None
    model.routing.detach = True
    assert model._fused_routing(gpu) is None


@pytest.mark.parametrize("exporting", [False, True])
def test_a_network_uses_the_frequency_domain_where_it_is_told_to(monkeypatch, exporting):
    """Compiled, too, which PyTorch 2.11 takes for an export."""
    monkeypatch.setattr(torch.compiler, "is_exporting", lambda: exporting)
    config = train_config(*TINY)
    model = build_model(config.model, config.routing, config.dataset)
    seen = []
    original = frequency_conv.frequency_conv2d
    monkeypatch.setattr(
        frequency_conv, "frequency_conv2d", lambda *a, **k: seen.append(1) or original(*a, **k)
    )
    images = torch.rand(2, 1, 28, 28)
    direct = model.primary_poses(images)
    assert not seen
    model.frequency = True
    torch.testing.assert_close(model.primary_poses(images), direct, rtol=1e-4, atol=1e-5)
    assert seen


@pytest.fixture
def fresh_kernels(tmp_path, monkeypatch):
    """Nothing built yet, and an empty cache folder."""
    monkeypatch.setattr(errors, "notices", [])
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path / "cache"))
    for load in (load_kernels, frequency_conv.load_kernels):
        load.cache_clear()
    yield tmp_path
    for load in (load_kernels, frequency_conv.load_kernels):
        load.cache_clear()


@needs_compiler
def test_kernels_are_built_once(fresh_kernels, monkeypatch):
    assert load_kernels(2, 3, 4) is not None
    (built,) = (fresh_kernels / "cache" / "capsrun").iterdir()
    written = built.stat().st_mtime_ns
    load_kernels.cache_clear()
    original = native._run

    def only_version(*command):
        assert command[1:] == ("--version",)
        return original(*command)

    monkeypatch.setattr(native, "_run", only_version)
    assert load_kernels(2, 3, 4) is not None
    assert built.stat().st_mtime_ns == written


@needs_compiler
def test_where_the_cache_cannot_be_written_kernels_are_built_all_the_same(
    fresh_kernels, monkeypatch, capsys
):
    monkeypatch.setenv("XDG_CACHE_HOME", "/proc/nope")
    monkeypatch.setenv("TMPDIR", str(fresh_kernels))
    monkeypatch.setattr(tempfile, "tempdir", None)
    assert load_kernels(2, 3, 4) is not None
    assert frequency_conv.load_kernels(6, 5) is not None
    assert len(list(fresh_kernels.glob("capsrun-*/*.so"))) == 2
    assert len(list(fresh_kernels.glob("capsrun-*"))) == 1, (
        "one folder, which goes with the process"
    )
    native._folder_of_this_process().cleanup()
    native._folder_of_this_process.cache_clear()
    assert not list(fresh_kernels.glob("capsrun-*"))
    assert capsys.readouterr().err == ""


@pytest.mark.parametrize(
    ("compiler", "said"),
    [
        (None, "no C++ compiler (g++ or clang++) here"),
        ("/bin/false", "could not be built"),
        ("/no/such/compiler", "could not be built"),
    ],
)
def test_without_a_working_compiler_training_goes_the_plain_way(
    fresh_kernels, monkeypatch, capsys, compiler, said
):
    if compiler is None:
        monkeypatch.delenv("CXX", raising=False)
        monkeypatch.setattr(shutil, "which", lambda name: None)
    else:
        monkeypatch.setenv("CXX", compiler)
    result = train(train_config(*TINY), fresh_kernels / "run")
    assert result["steps"] == 12
    assert capsys.readouterr().err.count(said) == 1
    assert any(said in note for note in result["notes"])


def test_compile_false_needs_no_compiler(fresh_kernels, monkeypatch, capsys):
    monkeypatch.setenv("CXX", "/no/such/compiler")
    train(train_config(*TINY, "compile=false"), fresh_kernels / "run")
    assert "note:" not in capsys.readouterr().err


@pytest.mark.parametrize("dtype", [torch.float64, torch.bfloat16])
@pytest.mark.parametrize(
    ("image", "kernel", "stride"),
    [
        ((20, 20), (9, 9), 2),
        ((19, 19), (9, 9), 2),
        ((13, 10), (4, 5), 3),
        ((9, 8), (3, 3), 1),
        ((8, 9), (1, 2), 3),
        ((5, 5), (5, 5), 2),
    ],
)
def test_strided_convolution_is_a_convolution(image, kernel, stride, dtype):
    generator = torch.Generator().manual_seed(0)
    maps = torch.randn(3, 4, *image, generator=generator, dtype=torch.float64)
    weight = torch.randn(6, 4, *kernel, generator=generator, dtype=torch.float64) / 6
    values = []
    for function, kind in (
        (lambda m, w: F.conv2d(F.relu(m), w, stride=stride), torch.float64),
        (lambda m, w: relu_strided_conv2d(m, w, stride), dtype),
    ):
        m = maps.to(dtype).to(kind).to(memory_format=torch.channels_last).requires_grad_()
        w = weight.clone().requires_grad_()
        value = function(m, w)
        value.backward(torch.ones_like(value) + value.detach())
        values.append([value.detach(), m.grad, w.grad])
    assert values[1][2].dtype == torch.float64, "the weight's gradient has the weight's type"
    tolerance = 1e-12 if dtype == torch.float64 else 0.02
    for name, exact, ours in zip(("output", "maps", "weight"), *values):
        assert relative_error(ours.double(), exact) < tolerance, name


def test_the_frequency_domain_in_pytorchs_operations_is_the_same_network():
    """A GPU's way, which is the same on a CPU."""
    config = train_config(*TINY)
    images = torch.rand(4, 1, 28, 28, generator=torch.Generator().manual_seed(0))
    values = []
    for frequency in (False, True):
        model = build_model(config.model, config.routing, config.dataset)
        model.frequency = frequency
        lengths_BJ = model(images).lengths_BJ
        lengths_BJ.square().sum().backward()
        values.append([lengths_BJ.detach(), model.conv1.weight.grad, model.primarycaps.weight.grad])
    assert not torch.equal(values[0][0], values[1][0]), "it is another way"
    for ours, exact in zip(values[1], values[0]):
        assert relative_error(ours, exact) < 1e-5


def trained(config, steps, fast, precision="fp32"):
    """A trainer after some steps on real digits, and its losses."""
    digits = load_dataset(config.dataset, CPU).train
    batches = TrainingBatches(digits, 0, config.recipe.batch_size, order=config.recipe.order)
    model = build_model(config.model, config.routing, config.dataset)
    trainer = Trainer(model, config.loss, config.recipe, steps, CPU, precision, fast)
    losses = [trainer.advance(batches, s, 1).losses.total.item() for s in range(steps)]
    return trainer, torch.tensor(losses)


@needs_compiler
@pytest.mark.parametrize(
    "overrides",
    [[], ["routing.leaky=true", "routing.iterations=2"], ["dataset.image_px=28", "loss=paper"]],
)
def test_fast_training_is_plain_training(overrides):
    """Losses of 100 steps; the differences of rounding grow while the weights move."""
    config = train_config(*TINY, *overrides)
    (fast, ours), (plain, theirs) = (trained(config, 100, fast) for fast in (True, False))
    torch.testing.assert_close(ours[:10], theirs[:10], rtol=1e-5, atol=0)
    torch.testing.assert_close(ours, theirs, rtol=2e-3, atol=0)
    assert theirs[-10:].mean() < 0.8 * theirs[:10].mean(), "nothing was learnt"
    assert list(fast.model.state_dict()) == list(plain.model.state_dict())


@needs_compiler
def test_fast_training_in_bf16_is_plain_training_in_bf16():
    config = train_config(*TINY)
    (_, ours), (_, theirs) = (trained(config, 100, fast, "bf16") for fast in (True, False))
    torch.testing.assert_close(ours, theirs, rtol=0.02, atol=0)


@needs_compiler
def test_a_fast_run_can_go_on_without_compiling(tmp_path, monkeypatch):
    """`compile` is how a run is computed, not what: it may change when the run is resumed."""
    from test_train import StopAfter

    from capsrun.errors import Stopped

    with monkeypatch.context() as patch:
        StopAfter(patch, 5)
        with pytest.raises(Stopped):
            train(train_config(*TINY, "name=run"), tmp_path / "resumed")
    result = train(train_config(*TINY, "name=run", "compile=false"), tmp_path / "resumed")
    straight = train(train_config(*TINY, "name=run"), tmp_path / "straight")
    assert result["steps"] == 12
    ours, theirs = (
        [json.loads(line) for line in (tmp_path / run / "metrics.jsonl").read_text().splitlines()]
        for run in ("resumed", "straight")
    )
    for key, tolerance in (("loss/total", 0.02), ("loss/margin", 0.05)):
        values = [[line[key] for line in lines if key in line] for lines in (ours, theirs)]
        assert values[0] == pytest.approx(values[1], rel=tolerance)
        assert len(values[0]) == 6
    assert result["errors"] == pytest.approx(straight["errors"], abs=30)


@pytest.mark.slow
@needs_compiler
@pytest.mark.skipif(not MNIST_DIR.is_dir(), reason=f"no MNIST in {MNIST_DIR}")
def test_three_epochs_err_the_same_over_three_seeds(tmp_path):
    """A network of an eighth of the size, a quarter of an hour."""
    small = ["dataset=mnist", f"dataset.data_dir={MNIST_DIR}", "recipe.epochs=3"]
    small += ["model.conv1_channels=64", "model.primary_types=8"]
    wrong: dict[bool, list[int]] = {True: [], False: []}
    for fast, counts in wrong.items():
        for seed in range(3):
            config = train_config(*small, f"compile={fast}", f"seed={seed}")
            counts.append(train(config, tmp_path / f"{fast}-{seed}")["errors"])
    means = [sum(values) / 3 for values in wrong.values()]
    # The standard error of a mean of three counts around 85 is 5; of the difference of two, 7.5.
    assert abs(means[0] - means[1]) < 3 * 7.5
    assert max(means) < 150
