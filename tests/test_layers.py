"""The layers by themselves: stacked, compiled, copied, exported, and what they refuse."""

import copy
import inspect
import pickle

import pytest
import torch
from conftest import needs_compiler, train_config
from torch import nn
from torch.nn import functional as F

import capsrun
from capsrun.models import fast
from capsrun.models.fast import routing_cpu
from capsrun.models.layers import take
from capsrun.models.routing import capsule_votes, route, squash

SMALL = {"types": 2, "output_dim": 4, "kernel_px": 5}


class Stacked(nn.Module):
    """Two layers of routed capsules for pictures of 3 colours that are not square."""

    def __init__(self):
        super().__init__()
        self.convolution = nn.Conv2d(3, 8, 5)
        self.primary = capsrun.PrimaryCaps(8, **SMALL)
        self.parts = capsrun.CapsuleLayer(self.primary.count((14, 10)), 4, 6, 5, leaky=True)
        self.wholes = capsrun.CapsuleLayer(6, 5, 4, 8, iterations=2, bias=False)
        self.decoder = capsrun.Decoder(4, 8, (18, 14), channels=3, widths=[16])

    def forward(self, images, labels=None):
        capsules = self.wholes(self.parts(self.primary(self.convolution(images))))
        lengths = capsules.norm(dim=2)
        return lengths if labels is None else (lengths, self.decoder(capsules, labels))


def stacked() -> Stacked:
    torch.manual_seed(0)
    return Stacked()


IMAGES = torch.rand(6, 3, 18, 14, generator=torch.Generator().manual_seed(0))
LABELS = torch.arange(6) % 4


def loss_of(model):
    lengths, drawn = model(IMAGES.to(next(model.parameters()).dtype), LABELS)
    target = IMAGES.to(drawn.dtype)
    return capsrun.margin_loss(lengths, LABELS) + capsrun.reconstruction_loss(drawn, target)


def with_gradients(model):
    model.zero_grad()
    loss = loss_of(model)
    loss.backward()
    return [loss.detach(), *(weights.grad for weights in model.parameters())]


@needs_compiler
def test_stacked_layers_take_the_kernels_and_compute_what_the_plain_ones_do(monkeypatch):
    taken = []
    for name in ("squash_fused", "route_fused"):
        kernel = getattr(routing_cpu, name)
        spy = lambda *given, kernel=kernel: taken.append(kernel(*given)) or taken[-1]  # noqa: E731
        monkeypatch.setattr(routing_cpu, name, spy)
    model = stacked()
    ours = with_gradients(model)
    assert len(taken) == 3
    assert all(tensor is not None for tensor in taken)
    take(model, fast=False)
    torch.testing.assert_close(ours, with_gradients(model), rtol=1e-4, atol=1e-7)
    assert len(taken) == 3
    torch.testing.assert_close(
        [t.float() for t in with_gradients(model.double())], ours, rtol=1e-4, atol=1e-7
    )


def test_stacked_layers_learn():
    model = stacked()
    optimizer = torch.optim.Adam(model.parameters(), lr=0.01)
    before = loss_of(model).item()
    for _ in range(20):
        optimizer.zero_grad()
        loss_of(model).backward()
        optimizer.step()
    assert loss_of(model).item() < 0.7 * before


def test_one_layer_by_hand():
    """Of the paper's equations, on maps of either sign."""
    maps = torch.randn(2, 3, 9, 7, generator=torch.Generator().manual_seed(0))
    for relu in (True, False):
        primary = capsrun.PrimaryCaps(3, **SMALL, stride=1, padding="same", scale=0.5, relu=relu)
        out = F.conv2d(maps.relu() if relu else maps, primary.weight, padding=2) / 2
        out = (out + primary.bias[:, None, None]).unflatten(1, (2, 4)).movedim(2, -1)
        poses = primary(maps)
        torch.testing.assert_close(poses, squash(out.flatten(1, 3)))
        assert poses.shape[1] == primary.count((9, 7)) == 2 * 9 * 7
    layer = capsrun.CapsuleLayer(126, 4, 3, 5, leaky=True)
    votes = capsule_votes(poses, layer.weight)
    torch.testing.assert_close(layer(poses), route(votes, layer.bias, 3, leaky=True))


def test_values_that_are_not_said_are_those_of_configs():
    config = train_config()
    model, given_routing = config.model, config.routing
    assert inspect.signature(capsrun.CapsuleLayer).parameters["iterations"].default == 3
    layer = capsrun.CapsuleLayer(2, 2, 2, 2)
    assert layer.routing == given_routing
    assert (layer.bias is not None, layer.initialisation) == (model.digit_bias, "authors")
    primary = capsrun.PrimaryCaps(4)
    given = primary.types, primary.output_dim, primary.kernel_size[0], primary.zeros
    expected = model.primary_types, model.primary_dimensions, model.kernel_px, model.padding
    assert given == expected
    assert primary.scale == 1 / model.primary_types
    widths = [layer.out_features for layer in capsrun.Decoder(2, 2, 5) if hasattr(layer, "weight")]
    assert widths == [*model.decoder_widths, 25]
    network = capsrun.CapsNet(image_px=28)
    assert (network.config, network.routing, network.image_px) == (model, given_routing, 28)
    assert capsrun.CapsNet().image_px == config.dataset.image_px
    # Nobody who changes his own changes those of others.
    network.config.primary_types, layer.routing.iterations = 1, 9
    assert capsrun.CapsNet().config == model
    assert capsrun.CapsuleLayer(2, 2, 2, 2).routing == given_routing


def test_capsnet_is_made_of_the_layers():
    config = train_config("model=capsnet_small", "routing.leaky=true", "model.digit_bias=false")
    model = capsrun.CapsNet(config.model, config.routing, 20)
    kinds = capsrun.PrimaryCaps, capsrun.CapsuleLayer, capsrun.Decoder
    parts = model.primarycaps, model.digitcaps, model.decoder
    assert tuple(map(type, parts)) == kinds
    assert model.routing is model.digitcaps.routing
    assert model.primarycaps.scale == 1 / 9
    assert model.digitcaps.bias is None
    images, labels = torch.rand(3, 1, 20, 20), torch.tensor([[1], [2], [3]])
    output = model(images, labels)
    maps = model.conv1(images)
    capsules = model.digitcaps(model.primarycaps(maps))
    torch.testing.assert_close(output.capsules_BJD, capsules)
    drawn = model.decoder(capsules, labels)
    torch.testing.assert_close(output.reconstructions_BTCHW, drawn)
    assert isinstance(model.decoder[::2], nn.Sequential)
    assert len(model.decoder[::2]) == 3


@pytest.mark.parametrize("how", ["authors", "pytorch"])
def test_weights_are_drawn_again_as_they_were_drawn(how):
    made = [
        capsrun.PrimaryCaps(2, **SMALL, initialisation=how),
        capsrun.CapsuleLayer(9, 4, 3, 5, initialisation=how),
        capsrun.Decoder(3, 5, 4, initialisation=how),
        capsrun.CapsNet(train_config(f"model.initialisation={how}", "model=capsnet_small").model),
    ]
    for layer in made:
        bound = {name: value.abs().max() for name, value in layer.named_parameters()}
        before = copy.deepcopy(layer.state_dict())
        layer.reset_parameters()
        for name, value in layer.state_dict().items():
            if name.endswith("bias") and how == "authors":
                assert torch.equal(value, torch.full_like(value, 0.1))
            elif name.endswith("weight"):
                assert not torch.equal(value, before[name])
                assert value.abs().max().item() == pytest.approx(bound[name].item(), rel=0.3)


def test_copies_compilers_exports_and_transforms():
    """Whatever records or transforms what is computed is given PyTorch's operations."""
    model = stacked()
    lengths, drawn = model(IMAGES, LABELS)

    def agrees(other, *given):
        torch.testing.assert_close(other(*given), (lengths, drawn), rtol=1e-4, atol=1e-6)

    agrees(copy.deepcopy(model), IMAGES, LABELS)
    agrees(pickle.loads(pickle.dumps(model)), IMAGES, LABELS)
    agrees(torch.compile(model, backend="eager", fullgraph=True), IMAGES, LABELS)
    batch = torch.export.Dim("batch", min=1)
    shapes = {0: batch}, {0: batch}
    exported = torch.export.export(model, (IMAGES[:3], LABELS[:3]), dynamic_shapes=shapes)
    agrees(exported.module(), IMAGES, LABELS)

    def score(weights, image):
        return torch.func.functional_call(model, weights, (image[None],)).square().sum()

    weights = dict(model.named_parameters())
    of_each = torch.func.vmap(torch.func.grad(score), (None, 0))(weights, IMAGES)
    (lengths_BJ := model(IMAGES)).square().sum().backward()
    assert lengths_BJ.shape == (6, 4)
    ours = of_each["primary.weight"].sum(0)
    torch.testing.assert_close(ours, model.primary.weight.grad, rtol=1e-4, atol=1e-7)


@needs_compiler
def test_second_derivatives_are_refused_rather_than_wrong():
    """PyTorch's own `once_differentiable` leaves out what came through a kernel."""
    model = stacked()

    def twice():
        weight = model.convolution.weight
        (first,) = torch.autograd.grad(loss_of(model), weight, create_graph=True)
        return torch.autograd.grad(first.square().sum(), weight)[0]

    with pytest.raises(RuntimeError, match=r"no second derivatives: .*take\(network, fast=False\)"):
        twice()
    take(model, fast=False)
    plain = twice()
    model.double()
    torch.testing.assert_close(plain, twice().float(), rtol=1e-3, atol=1e-7)


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
def test_maps_that_autocast_left_in_float32(dtype):
    """Those of a normalisation, say; capsules stay in float32."""
    primary = capsrun.PrimaryCaps(4, **SMALL)
    layer = capsrun.CapsuleLayer(primary.count(12), 4, 3, 5)
    maps = torch.rand(5, 4, 12, 12, requires_grad=True)
    with torch.autocast("cpu", dtype):
        capsules = layer(primary(maps))
        again = layer(primary(maps).to(dtype))
    assert capsules.dtype == again.dtype == torch.float32
    capsules.sum().backward()
    assert maps.grad.dtype == torch.float32
    torch.testing.assert_close(capsules, layer(primary(maps)), rtol=0.05, atol=0.01)


def test_history_changes_nothing():
    layer = capsrun.CapsuleLayer(6, 4, 3, 5)
    poses, history = torch.rand(11, 6, 4), []
    torch.testing.assert_close(layer(poses, history), layer(poses))
    assert [step.couplings_BIJ.shape for step in history] == [(11, 6, 3)] * 3


LAYERS = {
    "primary": lambda: capsrun.PrimaryCaps(3, **SMALL),
    "capsules": lambda: capsrun.CapsuleLayer(6, 4, 3, 5),
    "decoder": lambda: capsrun.Decoder(3, 5, 4, widths=[6]),
}
CAPSULES, OF_CLASSES = torch.rand(2, 6, 4), torch.rand(2, 3, 5)


@pytest.mark.parametrize(
    ("layer", "given", "reason"),
    [
        ("primary", [torch.rand(2, 4, 9, 9)], r"\(2, 4, 9, 9\), but this layer takes \(B, 3, H"),
        ("primary", [torch.rand(3, 9, 9)], r"maps of shape \(3, 9, 9\)"),
        ("primary", [torch.rand(2, 3, 9, 4)], "maps of 9×4 are too small for a 5×5 kernel"),
        ("primary", [torch.ones(2, 3, 9, 9).byte()], r"uint8: they are to be floats, maps\.float"),
        ("primary", [torch.rand(2, 3, 9, 9).double()], r"this layer is of torch\.float32: maps\."),
        ("primary", [torch.rand(2, 3, 9, 9).to("meta")], "maps on meta, but this layer is on cpu"),
        ("primary", [[[1.0]]], "maps are a list"),
        ("capsules", [torch.rand(2, 5, 4)], r"\(2, 5, 4\), but .* \(B, 6, 4\), 6 of dimension 4"),
        ("capsules", [torch.rand(2, 6, 3)], r"shape \(2, 6, 3\), but this layer takes"),
        ("capsules", [torch.rand(6, 4)], r"shape \(6, 4\), but this layer takes"),
        ("capsules", [CAPSULES.long()], "capsules of torch.int64: they are to be floats"),
        ("capsules", [CAPSULES.half()], r"float16, .*capsules\.to\(torch\.float32\)"),
        ("capsules", [CAPSULES.to_sparse()], r"capsules\.to_dense\(\)"),
        ("capsules", [None], "capsules are a NoneType"),
        ("decoder", [torch.rand(2, 3, 4), torch.tensor([0, 1])], r"\(B, 3, 5\), 3 of dimension 5"),
        ("decoder", [OF_CLASSES, torch.tensor([0, 3])], "from 0 to 3, but the classes are 0 to 2"),
        ("decoder", [OF_CLASSES, torch.tensor([0, 1, 2])], r"shape \(3, 1\) for 2 images"),
        ("decoder", [OF_CLASSES, torch.eye(3)[:2].bool()], "labels of torch.bool"),
        ("decoder", [OF_CLASSES, torch.tensor([0.0, 1.0])], "labels of torch.float32"),
        ("decoder", [OF_CLASSES, torch.tensor(1)], r"labels of shape \(\)"),
        ("decoder", [OF_CLASSES, [0, 1]], "labels are a list"),
    ],
)
def test_what_a_layer_does_not_take(layer, given, reason):
    with pytest.raises(ValueError, match=reason) as caught:
        LAYERS[layer]()(*given)
    assert "\n" not in str(caught.value)


@pytest.mark.parametrize(
    ("make", "given", "reason"),
    [
        *((capsrun.CapsuleLayer, given, "inputs is 0|inputs is True|inputs is 2.0")
          for given in ([0, 4, 3, 5], [True, 4, 3, 5], [2.0, 4, 3, 5])),
        (capsrun.CapsuleLayer, [6, 4, 3, -1], "output_dim is -1: it is to be a whole number of"),
        (capsrun.CapsuleLayer, [6, 4, 3, 5, 0], "iterations is 0"),
        (capsrun.PrimaryCaps, [0], "channels is 0"),
        (capsrun.PrimaryCaps, [3, 0], "types is 0"),
        (capsrun.PrimaryCaps, [3, 2, 4, 5, 0], "stride is 0"),
        (capsrun.PrimaryCaps, [3, 2, 4, 5, 2, "full"], "padding is 'full': it can be one of: v"),
        (capsrun.Decoder, [3, 5, 0], "image_px is 0"),
        (capsrun.Decoder, [3, 5, (4, 0)], "image_px is 0"),
        (capsrun.Decoder, [3, 5, (4, 4, 4)], r"image_px is \(4, 4, 4\)"),
        (capsrun.Decoder, [3, 5, 4, 1, [0]], r"widths\[0\] is 0"),
        (capsrun.CapsNet, [None, None, 0], "image_px is 0"),
        (capsrun.CapsNet, [28], "settings of a CapsNet are wanted, not int: .*image_px=28"),
    ],
)  # fmt: skip
def test_sizes_that_no_layer_has(make, given, reason):
    with pytest.raises(ValueError, match=reason):
        make(*given)


@pytest.mark.parametrize("scale", [0, -1.0, float("nan"), float("inf"), "authors"])
def test_scales_that_primarycaps_does_not_have(scale):
    with pytest.raises(ValueError, match="scale is"):
        capsrun.PrimaryCaps(3, scale=scale)
    with pytest.raises(ValueError, match="initialisation is 'glorot'"):
        capsrun.PrimaryCaps(3, initialisation="glorot")


def test_a_frequency_domain_of_maps_that_are_not_square():
    """They are convolved directly."""
    primary = capsrun.PrimaryCaps(3)
    maps = torch.rand(40, 3, 13, 17)
    for frequency in (False, True):
        plain = F.conv2d(maps, primary.weight, stride=2)
        ours = fast.relu_conv2d(maps, primary.weight, 2, True, frequency)
        torch.testing.assert_close(ours, plain, rtol=1e-4, atol=1e-5)


def test_what_is_on_another_device_is_refused_in_one_sentence():
    labels = torch.zeros(2, dtype=torch.int64, device="meta")
    lengths, images = torch.rand(2, 3), torch.rand(2, 1, 8, 8)
    calls = [
        lambda: capsrun.Decoder(3, 5, 8)(torch.zeros(2, 3, 5), labels),
        lambda: capsrun.margin_loss(lengths, labels),
        lambda: capsrun.margin_loss(lengths, (lengths > 0.5).to("meta")),
        lambda: capsrun.reconstruction_loss(images, images.to("meta")),
    ]
    for call in calls:
        with pytest.raises(ValueError, match=r"on meta, and not on cpu: \w+\.to\(…\)"):
            call()


def test_networks_without_memory_tell_their_shapes():
    layer = capsrun.CapsuleLayer(6, 4, 3, 5).to("meta")
    assert layer(torch.zeros(2, 6, 4, device="meta")).shape == (2, 3, 5)


def test_constants_of_another_kind_are_refused():
    lengths = torch.rand(2, 3)
    for config in (capsrun.training_config(), 3):
        with pytest.raises(ValueError, match=r"training_config\(…\)\.loss"):
            capsrun.margin_loss(lengths, torch.tensor([0, 1]), config)
