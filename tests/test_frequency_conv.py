"""PrimaryCaps in the frequency domain is the convolution: values, gradients, rounding, any size."""

import contextlib
import copy
import shutil
from concurrent.futures import ThreadPoolExecutor

import pytest
import torch
from conftest import TINY, make_model, needs_compiler, train_config
from test_fast import batches_of, relative_error, trainer_of, with_gradients
from torch.nn import functional as F

from capsrun.models.fast import frequency_conv
from capsrun.models.fast.frequency_conv import load_kernels, relu_frequency_conv2d, weights_stay
from capsrun.models.fast.frequency_gpu import frequency_conv2d
from capsrun.models.layers import take

# Batch, channels, outputs, pixels, kernel, stride.
SIZES = [
    (3, 4, 6, 19, 9, 2),  # 27 px: capsules' grid 6, the paper's sizes
    (1, 1, 1, 9, 9, 2),  # 17 px, the smallest image: one place, an odd number of samples
    (2, 3, 5, 20, 9, 2),  # a last row and column that reach no output
    (127, 5, 3, 11, 9, 2),
    (2, 17, 33, 11, 9, 2),  # tiles that are not full
    (2, 72, 84, 9, 9, 2),  # more than one piece of the products' depth, the last one not full
    (2, 32, 8, 11, 9, 2),  # channels that fill cache lines
    (2, 3, 2, 12, 4, 3),
    (2, 3, 2, 5, 3, 1),
    (2, 2, 3, 8, 2, 3),  # a kernel smaller than the stride
]


def draw(*sizes, dtype=torch.float32):
    """Maps, kernel and a gradient of the outputs."""
    batch, channels, outputs, px, kernel_px, stride = sizes
    generator = torch.Generator().manual_seed(0)

    def normal(*shape):
        return torch.randn(shape, generator=generator, dtype=torch.float64)

    maps, weight = normal(batch, channels, px, px), normal(outputs, channels, kernel_px, kernel_px)
    grid_px = (px - kernel_px) // stride + 1
    gradient = normal(batch, outputs, grid_px, grid_px)
    return maps.to(dtype), (weight / kernel_px).to(dtype), gradient.to(dtype)


def direct(stride):
    return lambda maps, weight: F.conv2d(F.relu(maps), weight.to(maps.dtype), stride=stride)


def by_operations(stride):
    return lambda maps, weight: frequency_conv2d(F.relu(maps), weight, stride)


def by_kernels(stride):
    return lambda maps, weight: relu_frequency_conv2d(maps, weight, stride)


@pytest.fixture
def other_kernels():
    """What the test loads is of this test alone."""
    load_kernels.cache_clear()
    yield
    load_kernels.cache_clear()


def spied(monkeypatch):
    """Grows by whether the kernels did it, with each call from a network."""
    found, original = [], frequency_conv.relu_frequency_conv2d

    def spy(*arguments, **settings):
        value = original(*arguments, **settings)
        found.append(value is not None)
        return value

    monkeypatch.setattr(frequency_conv, "relu_frequency_conv2d", spy)
    return found


@pytest.mark.parametrize(
    ("way", "dtype", "most"),
    [
        (by_operations, torch.float64, 1e-12),
        pytest.param(by_kernels, torch.float32, 2e-6, marks=needs_compiler),
    ],
)
@pytest.mark.parametrize("sizes", SIZES)
def test_products_of_spectra_are_a_convolution(sizes, way, dtype, most):
    *tensors, gradient = draw(*sizes, dtype=dtype)
    exact = with_gradients(direct(sizes[-1]), [t.double() for t in tensors], gradient)
    ours = with_gradients(way(sizes[-1]), tensors, gradient)
    for a, b in zip(ours, exact):
        assert (a.dtype, a.shape) == (dtype, b.shape)
        assert relative_error(a, b) < most


@needs_compiler
@pytest.mark.parametrize("sizes", [(16, 64, 64, 19, 9, 2), SIZES[5]])
def test_bfloat16_is_about_as_exact_as_a_direct_convolution(sizes):
    maps, weight, gradient = draw(*sizes, dtype=torch.float64)
    exact = with_gradients(direct(2), [maps, weight], gradient)
    found = []
    for convolve in (direct, by_kernels, by_operations):
        values = with_gradients(convolve(2), [maps.bfloat16(), weight.float()], gradient)
        found.append([relative_error(a, b) for a, b in zip(values, exact)])
    for theirs, ours, without_kernels in zip(*found):
        assert max(ours, without_kernels) < 2 * theirs
        assert 1e-3 < ours < 1e-2, "products are of bfloat16"


@needs_compiler
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_neither_threads_nor_batch_mates_matter(dtype):
    maps, weight, gradient = draw(37, 20, 24, 19, 9, 2)
    maps = maps.to(dtype)
    threads = torch.get_num_threads()
    values = []
    try:
        for number in (1, 3):
            torch.set_num_threads(number)
            values.append(with_gradients(by_kernels(2), [maps, weight], gradient))
    finally:
        torch.set_num_threads(threads)
    assert all(torch.equal(a, b) for a, b in zip(*values))
    some = with_gradients(by_kernels(2), [maps[7:20], weight], gradient[7:20])
    assert all(torch.equal(a, b[7:20]) for a, b in zip(some[:2], values[0][:2]))


@needs_compiler
def test_the_relu_passes_what_pytorchs_passes():
    """Nothing at 0 and below, and NaN, of which no other image hears."""
    maps, weight, gradient = draw(3, 2, 2, 11, 9, 2)
    maps[0, 0, :4] = 0
    maps[1, 1, 2, 3] = float("nan")
    exact = with_gradients(direct(2), [maps, weight], gradient)
    ours = with_gradients(by_kernels(2), [maps, weight], gradient)
    assert ours[0][1].isnan().any()
    for image in (0, 2):
        for a, b in zip(ours[:2], exact[:2]):
            torch.testing.assert_close(a[image], b[image], rtol=1e-4, atol=1e-5)
    assert (ours[1][0, 0, :4] == 0).all()


@needs_compiler
def test_a_backward_pass_after_another_batch():
    """The spectra of a batch are made again where another one has taken their memory."""
    maps, weight, gradient = draw(4, 3, 5, 11, 9, 2)
    expected = with_gradients(by_kernels(2), [maps, weight], gradient)
    first, second = maps.clone().requires_grad_(), (maps[:2] + 1).requires_grad_()
    kernel = weight.clone().requires_grad_()
    outputs = relu_frequency_conv2d(first, kernel, 2)
    relu_frequency_conv2d(second, kernel * 2, 2)
    given = torch.autograd.grad(outputs, [first, kernel], gradient, retain_graph=True)
    again = torch.autograd.grad(outputs, [first, kernel], gradient)
    for values in (given, again):
        assert all(torch.equal(a, b) for a, b in zip(values, expected[1:]))


@needs_compiler
def test_threads_do_not_share_memory():
    maps, weight, _ = draw(32, 32, 32, 19, 9, 2)
    scales = (1, 2, 3)
    expected = [relu_frequency_conv2d(maps * scale, weight, 2) for scale in scales]

    def convolve(scale):
        return [relu_frequency_conv2d(maps * scale, weight, 2) for _ in range(5)][-1]

    with ThreadPoolExecutor(3) as threads:
        found = threads.map(convolve, scales)
    assert all(torch.equal(ours, value) for ours, value in zip(found, expected, strict=True))


@needs_compiler
def test_while_weights_stay_the_kernel_is_transformed_once(monkeypatch):
    """But a change of them is seen even then."""
    maps, weight, _ = draw(4, 3, 5, 11, 9, 2)
    counted, original = [], load_kernels(6, 5).forward_fp32

    def count(*arguments):
        counted.append(arguments[8])  # with_kernel
        original(*arguments)

    monkeypatch.setattr(load_kernels(6, 5), "forward_fp32", count)
    double = weight * 2
    with torch.inference_mode():
        expected = [relu_frequency_conv2d(maps, w, 2) for w in (weight, double)]
        assert counted == [1, 1]
        del counted[:]
        with weights_stay():
            values = [relu_frequency_conv2d(maps, w, 2) for w in (weight, weight, double, weight)]
        assert counted == [1, 0, 1, 1]
        for value, number in zip(values, (0, 0, 1, 0)):
            assert torch.equal(value, expected[number])
        del counted[:]
        relu_frequency_conv2d(maps, weight, 2)
        assert counted == [1], "afterwards they may change again"
    weight = torch.nn.Parameter(weight)
    with weights_stay(), torch.no_grad():
        before = relu_frequency_conv2d(maps, weight, 2)
        weight.mul_(2)
        torch.testing.assert_close(relu_frequency_conv2d(maps, weight, 2), 2 * before)


@needs_compiler
def test_memory_is_taken_once(monkeypatch):
    monkeypatch.setattr(frequency_conv, "_buffers", frequency_conv._Buffers())
    maps, weight, gradient = draw(8, 16, 16, 19, 9, 2)
    before = None
    for size in (8, 3, 8):
        with_gradients(by_kernels(2), [maps[:size], weight], gradient[:size])
        before = before or dict(frequency_conv._buffers.memory)
    after = frequency_conv._buffers.memory
    assert all(after[name] is memory for name, memory in before.items())


def test_what_the_kernels_do_not_take():
    maps, weight, _ = draw(1, 1, 1, 9, 3, 1)
    assert relu_frequency_conv2d(maps.double(), weight.double(), 1) is None, "double precision"
    large = torch.zeros(1, 1, 40, 40)
    assert relu_frequency_conv2d(large, weight, 1) is None, "too many samples"
    for wrong in (torch.zeros(1, 1, 9, 8), torch.zeros(1, 1, 2, 2)):
        with pytest.raises(ValueError, match="square"):
            relu_frequency_conv2d(wrong, weight, 1)


@needs_compiler
def test_without_leave_to_use_the_tile_registers_others_are_used(monkeypatch, other_kernels):
    """Linux may refuse them; the same library without them then gives the same numbers."""
    maps, weight, gradient = draw(5, 20, 24, 11, 9, 2)
    given = [maps.bfloat16(), weight]
    values = [with_gradients(by_kernels(2), given, gradient)]
    original, asked = frequency_conv.load_library, []

    def refusing(source, *macros):
        kernels = original(source, *macros)
        asked.append(macros)
        kernels.ready = lambda: "NO_AMX" in macros
        return kernels

    monkeypatch.setattr(frequency_conv, "load_library", refusing)
    load_kernels.cache_clear()
    values.append(with_gradients(by_kernels(2), given, gradient))
    assert asked == [("N=6", "T=5"), ("N=6", "T=5", "NO_AMX")]
    assert all(relative_error(a, b) < 3e-3 for a, b in zip(*values))


@needs_compiler
@pytest.mark.parametrize(
    ("flags", "most_lanes"),
    [("-mno-avx512bf16 -mno-amx-tile", 16), ("-mno-avx512f", 8), ("-mno-avx", 4)],
)
def test_on_processors_with_less(flags, most_lanes, monkeypatch, other_kernels):
    """bfloat16 in software, vectors of 8 and of 4: what is there is left out by the compiler."""
    monkeypatch.setenv("CXX", f"{shutil.which('g++') or shutil.which('clang++')} {flags}")
    for sizes in ((5, 20, 24, 11, 9, 2), (2, 72, 84, 11, 9, 2), (2, 32, 8, 11, 9, 2)):
        maps, weight, gradient = draw(*sizes, dtype=torch.float64)
        exact = with_gradients(direct(2), [maps, weight], gradient)
        for dtype, tolerance in ((torch.float32, 2e-6), (torch.bfloat16, 7e-3)):
            ours = with_gradients(by_kernels(2), [maps.to(dtype), weight.float()], gradient)
            assert all(relative_error(a, b) < tolerance for a, b in zip(ours, exact))
    assert load_kernels(6, 5).lanes() <= most_lanes


@needs_compiler
@pytest.mark.parametrize(
    ("px", "padding", "channels"),
    [(17, "valid", 1), (18, "valid", 2), (28, "valid", 3), (11, "same", 1)],
)
def test_a_network_of_any_size(monkeypatch, px, padding, channels):
    config = train_config(
        *(f"dataset.image_px={px}", f"dataset.channels={channels}", f"model.padding={padding}"),
        *("model.conv1_channels=8", "model.primary_types=3", "model.decoder_widths=[16]"),
    )
    found = spied(monkeypatch)
    images = torch.rand(5, channels, px, px, generator=torch.Generator().manual_seed(0))
    labels = torch.arange(5)[:, None]
    values = []
    for fast, faster in ((False, True), (True, False), (True, True)):
        monkeypatch.setattr(frequency_conv, "is_faster", lambda *_, faster=faster: faster)
        model = make_model(config)
        take(model, fast=fast)
        output = model(images, labels)
        (output.lengths_BJ.sum() + output.reconstructions_BTCHW.square().sum()).backward()
        gradients = [parameter.grad for parameter in model.parameters()]
        values.append([output.lengths_BJ.detach(), *gradients])
    assert found == [True]
    for exact, *others in zip(*values):
        assert all(relative_error(ours, exact) < 1e-5 for ours in others)


@pytest.mark.parametrize(
    ("features", "images", "kernel_px", "training", "expected"),
    [
        *(("avx2", 3, 9, True, False), ("avx2", 4, 9, True, True)),
        *(("avx2", 31, 9, False, False), ("avx2", 32, 9, False, True)),
        *(("avx2", 4, 4, True, False), ("avx2", 4, 5, True, True)),
        *(("avx", 128, 9, True, False), ("avx", 128, 9, False, False)),
    ],
)
def test_where_it_is_faster(monkeypatch, features, images, kernel_px, training, expected):
    """Not for few images or small kernels, nor on processors where it was never measured."""
    monkeypatch.setattr(frequency_conv, "cpu_features", lambda: {features})
    maps, weight = torch.empty(images, 1, 20, 20), torch.empty(1, 1, kernel_px, kernel_px)
    with contextlib.nullcontext() if training else torch.no_grad():
        assert frequency_conv.is_faster(maps, weight, 2) == expected


@needs_compiler
def test_training_that_goes_on_is_bit_for_bit_as_without_a_break(monkeypatch):
    """Also where something else was convolved in between, as in testing."""
    monkeypatch.setattr(frequency_conv, "cpu_features", lambda: {"avx2"})
    config = train_config(*TINY, "dataset.image_px=28", "recipe.batch_size=8")
    batches, found = batches_of(config), spied(monkeypatch)
    whole, first, second = (trainer_of(config, 6, True) for _ in range(3))
    whole.advance(batches, 0, 4)
    first.advance(batches, 0, 2)
    with torch.no_grad():
        first.model(torch.rand(40, 1, 28, 28))
    second.model.load_state_dict(first.model.state_dict())
    second.load_optimizer(copy.deepcopy(first.optimizer.state_dict()))
    second.advance(batches, 2, 2)
    assert found == [True] * 9
    for ours, theirs in zip(second.model.parameters(), whole.model.parameters()):
        assert torch.equal(ours, theirs)
