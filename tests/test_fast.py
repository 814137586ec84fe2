"""The fast ways of computing give the numbers of the plain ones."""

import importlib.util
import os
import shutil
import sys
import threading
import types
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

import pytest
import torch
from conftest import TINY, needs_compiler, run_python, train_config
from torch.nn import functional as F

from capsrun import errors
from capsrun.commands.train import train
from capsrun.data import load_dataset
from capsrun.data.splits import TrainingBatches
from capsrun.models import build_model, fast
from capsrun.models.fast import frequency_conv, native, routing_cpu
from capsrun.models.fast.patch_conv import patch_conv2d
from capsrun.models.fast.routing_cpu import load_kernels, route_fused, squash_fused
from capsrun.models.fast.strided_conv import relu_strided_conv2d
from capsrun.models.layers import take
from capsrun.models.routing import capsule_votes, route, squash
from capsrun.settings import role
from capsrun.training.step import Trainer

CPU = torch.device("cpu")
needs_triton = pytest.mark.skipif(
    importlib.util.find_spec("triton") is None, reason="no Triton here"
)
# Sizes (B, I, K, J, D), leaky, bias, iterations.
ROUTINGS = [
    ((17, 9, 8, 10, 16), True, True, 3),
    ((5, 4, 3, 7, 5), False, True, 5),
    ((19, 12, 1, 2, 9), True, False, 2),
    ((1, 3, 8, 1, 1), False, True, 1),
]
SMALL_ROUTINGS = [((17, 5, 3, 7, 5), True, True, 3), ((1, 2, 8, 1, 1), False, False, 1)]


def relative_error(ours, exact):
    """L2, in float64."""
    return ((ours.double() - exact.double()).norm() / exact.double().norm()).item()


def worst_error(ours, exact):
    """The largest relative error of some tensors; NaN if one of them is."""
    found = [relative_error(a.cpu(), b) for a, b in zip(ours, exact, strict=True)]
    return torch.tensor(found).max().item()


def with_gradients(function, tensors, seed):
    """The value of a function and its gradients."""
    given = [None if t is None else t.clone().requires_grad_() for t in tensors]
    value = function(*given)
    value.backward(seed.to(value.dtype))
    return [value.detach()] + [tensor.grad for tensor in given if tensor is not None]


def routing_inputs(batch, count, dimensions, outputs, output_dimensions, bias):
    """Inputs, weights and bias; and a gradient of the capsules."""
    generator = torch.Generator().manual_seed(0)

    def draw(*shape):
        return torch.randn(shape, generator=generator)

    tensors = [
        draw(batch, count, dimensions) * 0.3,
        draw(count, dimensions, outputs, output_dimensions) * 0.5,
        draw(outputs, output_dimensions) if bias else None,
    ]
    return tensors, draw(batch, outputs, output_dimensions)


def plain_routing(iterations, leaky=False):
    return lambda u, w, b: route(capsule_votes(u, w), b, iterations, leaky)


def fused_routing(iterations, leaky=False):
    return lambda u, w, b: route_fused(u, w, b, iterations, leaky)


def in_double(tensors):
    return [t if t is None else t.double() for t in tensors]


def small_model(*overrides):
    config = train_config(*TINY, *overrides)
    return build_model(config.model, config.routing, config.dataset)


# Routing and squash on a CPU


@needs_compiler
@pytest.mark.parametrize(
    ("shape", "leaky", "bias", "iterations"), [*ROUTINGS, ((128, 50, 8, 10, 16), False, False, 3)]
)
def test_fused_routing_is_routing(shape, leaky, bias, iterations):
    tensors, seed = routing_inputs(*shape, bias)
    exact = with_gradients(plain_routing(iterations, leaky), in_double(tensors), seed)
    ours = with_gradients(fused_routing(iterations, leaky), tensors, seed)
    assert len(ours) == 3 + bias
    assert worst_error(ours, exact) < 1e-5


@needs_compiler
@pytest.mark.parametrize("shape", [(2, 2, 6, 2, 1024), (2, 2, 1024, 8, 16)])
def test_the_largest_capsules_of_fused_routing(shape):
    tensors, seed = routing_inputs(*shape, True)
    tensors[1] /= shape[2] ** 0.5
    plain = with_gradients(plain_routing(2), tensors, seed)
    assert worst_error(with_gradients(fused_routing(2), tensors, seed), plain) < 1e-4


@pytest.mark.parametrize(("dimensions", "outputs"), [(2, 300), (900, 20), (1025, 1)])
def test_fused_routing_leaves_large_capsules_alone(capsys, monkeypatch, dimensions, outputs):
    """Double precision too, about which nothing is said."""
    monkeypatch.setattr(errors, "notices", [])
    inputs, weights = torch.ones(1, 1, dimensions), torch.ones(1, dimensions, outputs, 10)
    for _ in range(2):
        assert route_fused(inputs, weights, None, 3, False) is None
    said = f"routing from {dimensions} dimensions to {outputs} capsules of 10 is too large"
    assert capsys.readouterr().err.count(said) == 1
    tensors, _ = routing_inputs(2, 3, 8, 10, 16, True)
    assert route_fused(*in_double(tensors), 3, False) is None


@needs_compiler
def test_fused_routing_depends_on_neither_threads_nor_batch_mates():
    tensors, seed = routing_inputs(40, 30, 8, 10, 16, True)
    threads = torch.get_num_threads()
    both = []
    for number in (1, 3):
        torch.set_num_threads(number)
        both.append(with_gradients(fused_routing(3), tensors, seed))
    torch.set_num_threads(threads)
    assert all(torch.equal(a, b) for a, b in zip(*both))
    inputs, *others = tensors
    assert torch.equal(fused_routing(3)(inputs[7:20], *others), both[0][0][7:20])


@needs_compiler
def test_fused_routing_of_strange_numbers():
    """Zeros have finite gradients, huge logits no overflow, and a NaN is not swallowed."""
    (inputs, weights, _), seed = routing_inputs(3, 6, 8, 10, 16, False)
    zeros = with_gradients(fused_routing(3), [0 * inputs, weights, None], seed)
    huge = with_gradients(fused_routing(3), [1e4 * inputs, weights, None], seed)
    assert all(tensor.isfinite().all() for tensor in zeros + huge)
    torch.testing.assert_close(huge[0], plain_routing(3)(1e4 * inputs, weights, None))
    inputs[1, 2, 3] = float("nan")
    value = route_fused(inputs, weights, None, 3, False)
    assert value[1].isnan().all()
    assert value[[0, 2]].isfinite().all()


@needs_compiler
def test_testing_keeps_nothing_for_a_backward_pass(monkeypatch):
    model = small_model()
    kept = []
    monkeypatch.setattr(
        routing_cpu._Route, "apply", lambda *args: kept.append(args[-1]) or torch.zeros(1)
    )
    for testing in (torch.inference_mode(), torch.no_grad(), torch.enable_grad()):
        with testing:
            model.digitcaps(torch.ones(1, model.primary_capsules, 8))
    assert kept == [False, False, True]


@needs_compiler
@pytest.mark.parametrize("shape", [(5, 32, 6, 8), (3, 4, 5, 3), (2, 1, 2, 1)])
def test_fused_squash_is_squash(shape):
    """Capsules of PrimaryCaps from its maps, types first, and zeros among them."""
    batch, types, px, dimensions = shape
    generator = torch.Generator().manual_seed(0)
    maps = torch.randn(batch, types * dimensions, px, px, generator=generator)
    bias = torch.randn(types * dimensions, generator=generator) / 10
    maps[0], bias[:dimensions] = 0, 0
    seed = torch.randn(batch, types * px**2, dimensions, generator=generator)

    def plain(maps, bias):
        poses = (maps / 32 + bias[:, None, None]).unflatten(1, (types, dimensions))
        return squash(poses.permute(0, 1, 3, 4, 2).flatten(1, 3))

    exact = with_gradients(plain, in_double([maps, bias]), seed)
    for memory_format in (torch.contiguous_format, torch.channels_last):
        given = [maps.contiguous(memory_format=memory_format), bias]
        ours = with_gradients(lambda m, b: squash_fused(m, b, 1 / 32, dimensions), given, seed)
        assert all(tensor.isfinite().all() for tensor in ours)
        assert worst_error(ours, exact) < 1e-5


# Triton


@needs_triton
def test_triton_routing_is_routing():
    """In Triton's interpreter, which has to be chosen before Triton is imported."""
    path = os.pathsep.join([str(Path(__file__).parent), *sys.path])
    environment = {**os.environ, "TRITON_INTERPRET": "1", "PYTHONPATH": path}
    script = "import test_fast; test_fast.check_triton_routing('cpu', test_fast.SMALL_ROUTINGS)"
    done = run_python("-c", script, env=environment)
    if "only 0-dimensional arrays can be converted" in done.stderr:
        pytest.skip("the interpreter of this Triton does not work with this NumPy")
    assert done.returncode == 0, done.stderr
    assert done.stdout.count("checked") == len(SMALL_ROUTINGS)


@pytest.mark.gpu
def test_triton_routing_on_a_gpu():
    check_triton_routing("cuda", [*ROUTINGS, ((128, 1152, 8, 10, 16), False, True, 3)])


def check_triton_routing(device, cases):
    from capsrun.models.fast import routing_gpu

    if device == "cpu":  # several chunks of the few input capsules that an interpreter can take
        routing_gpu.CHUNK = 4
    for shape, leaky, bias, iterations in cases:
        tensors, seed = routing_inputs(*shape, bias)
        exact = with_gradients(plain_routing(iterations, leaky), in_double(tensors), seed)
        given = [t if t is None else t.to(device) for t in tensors]
        how = iterations, leaky
        ours = with_gradients(
            lambda u, w, b, how=how: routing_gpu.route_fused(u, w, b, *how), given, seed.to(device)
        )
        assert worst_error(ours, exact) < 1e-5, shape
        print("checked")
    compiled = torch.compile(routing_gpu.route_fused, backend="aot_eager", fullgraph=True)
    assert relative_error(compiled(*given, *how).cpu(), exact[0]) < 1e-5


@needs_triton
@pytest.mark.parametrize("sizes", [(8, 10, 16), (1, 7, 5)])
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


@pytest.mark.parametrize("exporting", [False, True])
def test_which_routing_a_network_takes(monkeypatch, exporting):
    """Triton's compiled, too, which PyTorch 2.11 takes for an export."""
    routing_gpu = types.SimpleNamespace(route_fused=lambda *_: "triton")
    monkeypatch.setattr(fast, "routing_gpu", routing_gpu, raising=False)
    monkeypatch.setitem(sys.modules, "capsrun.models.fast.routing_gpu", routing_gpu)
    monkeypatch.setattr(routing_cpu, "route_fused", lambda *_: "cpu")
    monkeypatch.setattr(torch.compiler, "is_exporting", lambda: exporting)
    routing = train_config().routing

    def taken(device, triton):
        poses = types.SimpleNamespace(device=torch.device(device))
        return fast.class_capsules(poses, None, None, routing, triton)

    assert taken("cpu", True) == (None if exporting else "cpu")
    assert [taken("cuda", triton) for triton in (False, True)] == [None, "triton"]
    routing.detach = True
    assert taken("cuda", True) is taken("cpu", False) is None


# Convolutions


@pytest.mark.parametrize("exporting", [False, True])
def test_the_frequency_domain_in_pytorchs_operations_is_the_same_network(monkeypatch, exporting):
    """A GPU's way, which is the same on a CPU; compiled, too, which passes for an export."""
    monkeypatch.setattr(torch.compiler, "is_exporting", lambda: exporting)
    images = torch.rand(4, 1, 28, 28, generator=torch.Generator().manual_seed(0))
    values = []
    for frequency in (False, True):
        model = small_model()
        take(model, fast=False, frequency=frequency)
        lengths_BJ = model(images).lengths_BJ
        lengths_BJ.square().sum().backward()
        values.append([lengths_BJ.detach(), model.conv1.weight.grad, model.primarycaps.weight.grad])
    assert not torch.equal(values[0][0], values[1][0]), "it is another way"
    assert worst_error(values[1], values[0]) < 1e-5


@pytest.mark.parametrize("dtype", [torch.float64, torch.bfloat16])
@pytest.mark.parametrize("channels", [1, 3])
def test_convolution_of_patches_is_a_convolution(channels, dtype):
    generator = torch.Generator().manual_seed(0)
    images, weight, bias = (
        torch.randn(shape, generator=generator, dtype=torch.float64)
        for shape in ((3, channels, 12, 11), (5, channels, 4, 4), (5,))
    )
    seed = torch.randn(3, 5, 9, 8, generator=generator)
    exact = with_gradients(lambda w, b: F.conv2d(images, w, b), [weight, bias], seed)
    with torch.autocast("cpu", torch.bfloat16, enabled=dtype == torch.bfloat16):
        ours = with_gradients(lambda w, b: patch_conv2d(images, w, b), [weight, bias], seed)
    assert [t.dtype for t in ours] == [dtype, torch.float64, torch.float64]
    assert worst_error(ours, exact) < (1e-12 if dtype == torch.float64 else 0.02)


@pytest.mark.parametrize("dtype", [torch.float64, torch.bfloat16])
@pytest.mark.parametrize(
    ("image", "kernel", "stride"),
    [
        *(((20, 20), (9, 9), 2), ((19, 19), (9, 9), 2), ((13, 10), (4, 5), 3)),
        *(((9, 8), (3, 3), 1), ((8, 9), (1, 2), 3), ((5, 5), (5, 5), 2)),
    ],
)
def test_strided_convolution_is_a_convolution(image, kernel, stride, dtype):
    generator = torch.Generator().manual_seed(0)
    maps = torch.randn(3, 4, *image, generator=generator, dtype=torch.float64)
    maps = maps.to(dtype).contiguous(memory_format=torch.channels_last)
    weight = torch.randn(6, 4, *kernel, generator=generator, dtype=torch.float64) / 6
    seed = F.conv2d(maps.double(), weight, stride=stride) + 1
    exact = with_gradients(
        lambda m, w: F.conv2d(F.relu(m), w, stride=stride), [maps.double(), weight], seed
    )
    ours = with_gradients(lambda m, w: relu_strided_conv2d(m, w, stride), [maps, weight], seed)
    assert ours[2].dtype == torch.float64, "the weight's gradient has the weight's type"
    assert worst_error(ours, exact) < (1e-12 if dtype == torch.float64 else 0.02)


# Building the kernels


@pytest.fixture
def fresh_kernels(tmp_path, monkeypatch):
    """Nothing built yet, and an empty cache folder."""
    monkeypatch.setattr(errors, "notices", [])
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path / "cache"))
    loaders = load_kernels, frequency_conv.load_kernels
    for load in loaders:
        load.cache_clear()
    yield tmp_path
    for load in loaders:
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
def test_two_may_build_at_once(fresh_kernels, monkeypatch):
    """Each links its own library, and the name is never that of half a library."""
    both_compiled, original = threading.Barrier(2, timeout=60), native._run

    def run(*command):
        if "-shared" in command:
            both_compiled.wait()
        return original(*command)

    monkeypatch.setattr(native, "_run", run)

    with ThreadPoolExecutor(2) as threads:
        building = [
            threads.submit(native.load_library, routing_cpu.SOURCE, "K=1", "J=1", "D=1")
            for _ in range(2)
        ]
    assert [library.result().lanes() > 0 for library in building] == [True, True]
    assert len(list((fresh_kernels / "cache" / "capsrun").iterdir())) == 1


NO_COMPILER = "no C++ compiler (g++ or clang++) here"


def hide_compiler(monkeypatch, compiler):
    if compiler:
        monkeypatch.setenv("CXX", compiler)
    else:
        monkeypatch.delenv("CXX", raising=False)
        monkeypatch.setattr(shutil, "which", lambda name: None)


@pytest.mark.parametrize(
    ("compiler", "said"),
    [
        (None, NO_COMPILER),
        ("/bin/false", "could not be built with /bin/false (Command"),
        ("/no/such/compiler", "could not be built with /no/such/compiler ([Errno 2]"),
    ],
)
def test_without_a_working_compiler_steps_are_made_the_plain_way(
    fresh_kernels, monkeypatch, capsys, compiler, said
):
    hide_compiler(monkeypatch, compiler)
    monkeypatch.setattr(frequency_conv, "cpu_features", lambda: {"avx2"})
    (_, losses), (_, plain) = (trained(train_config(*TINY), 1, fast) for fast in (True, False))
    torch.testing.assert_close(losses, plain, rtol=1e-5, atol=0)
    assert capsys.readouterr().err.count(said) == 1


@pytest.mark.parametrize("compiled", [True, False])
def test_what_a_run_says_of_a_missing_compiler(fresh_kernels, monkeypatch, capsys, compiled):
    """Nothing with `compile=false`, which needs none."""
    hide_compiler(monkeypatch, None)
    config = train_config(*TINY, f"compile={compiled}", "recipe.steps=1")
    result = train(config, fresh_kernels / "run")
    assert capsys.readouterr().err.count(NO_COMPILER) == compiled
    assert any(NO_COMPILER in note for note in result.get("notes", [])) == compiled


# Training


def trainer_of(config, steps, fast, precision="fp32"):
    model = build_model(config.model, config.routing, config.dataset)
    return Trainer(model, config.loss, config.recipe, steps, CPU, precision, fast)


def batches_of(config):
    digits = load_dataset(config.dataset, CPU).train
    return TrainingBatches(digits, 0, config.recipe.batch_size)


def trained(config, steps, fast, precision="fp32"):
    """A trainer after some steps on real digits, and its losses."""
    trainer, batches = trainer_of(config, steps, fast, precision), batches_of(config)
    losses = [trainer.advance(batches, s, 1).losses.total.item() for s in range(steps)]
    return trainer, torch.tensor(losses)


@needs_compiler
@pytest.mark.parametrize(
    ("overrides", "precision", "early", "late"),
    [
        ([], "fp32", 1e-5, 2e-3),
        (["routing.leaky=true", "routing.iterations=2", "loss=paper"], "fp32", 1e-5, 2e-3),
        ([], "bf16", 0.02, 0.02),
    ],
)
def test_fast_training_is_plain_training(overrides, precision, early, late):
    """The differences of rounding grow while the weights move."""
    config = train_config(*TINY, *overrides)
    (fast, ours), (plain, theirs) = (trained(config, 40, fast, precision) for fast in (True, False))
    torch.testing.assert_close(ours[:10], theirs[:10], rtol=early, atol=0)
    torch.testing.assert_close(ours, theirs, rtol=late, atol=0)
    assert theirs[-10:].mean() < 0.85 * theirs[:10].mean(), "nothing was learnt"
    assert list(fast.model.state_dict()) == list(plain.model.state_dict())


@needs_compiler
def test_a_fast_run_can_go_on_without_compiling():
    """`compile` is how a run is computed, not what: it may change when the run is resumed."""
    assert not role("compile").resume
    config = train_config(*TINY)
    straight, first, second = (trainer_of(config, 12, fast) for fast in (True, True, False))
    batches = batches_of(config)
    straight.advance(batches, 0, 11)
    first.advance(batches, 0, 5)
    second.model.load_state_dict(first.model.state_dict())
    second.load_optimizer(first.optimizer.state_dict())
    second.advance(batches, 5, 6)
    ours, theirs = (t.advance(batches, 11, 1).losses.total.item() for t in (second, straight))
    assert ours == pytest.approx(theirs, rel=1e-3)
