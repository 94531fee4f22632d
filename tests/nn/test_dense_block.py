"""Dense blocks and transitions in one buffer: equal to stock, and stock where a caller looks."""

import copy
import functools

import pytest
import torch
from torch import nn

import cvkernels
from cvkernels import backend
from cvkernels.nn import DenseBlock, DenseLayer, FusedSequential, Transition
from tests.support import pairs
from tests.support.numerics import assert_close_as_eager, assert_matches_module
from tests.support.pairs import pair, with_statistics

stock_module = pytest.importorskip("torchvision.models.densenet")

LAYERS, CHANNELS, GROWTH = 3, 16, 8


def blocks(drop_rate=0.0):
    """(ours, stock) with one state."""
    stock = stock_module._DenseBlock(LAYERS, CHANNELS, 2, GROWTH, drop_rate)
    ours = DenseBlock(LAYERS, CHANNELS, 2, GROWTH, drop_rate)
    return pair(with_statistics(stock), ours.eval())


image = functools.partial(pairs.image, batch=2, size=(6, 7), channels=CHANNELS)


def concatenates(module, x):
    """Whether module(x) concatenates, and the reasons that explain gives."""
    with torch.no_grad():
        rows = cvkernels.explain(module, x).rows
    return any(row.op == "aten.cat" for row in rows), {row.reason for row in rows}


@pytest.mark.parametrize("name", ["reference", "triton"])
def test_block_on_requested_backends(name):
    if name == "triton":
        pytest.importorskip("triton")
    ours, stock = blocks()
    device = "cuda" if torch.cuda.is_available() else "cpu"
    with backend.use(name):
        assert_matches_module(ours.to(device), stock.to(device), image().to(device), grad=False)
        assert not concatenates(ours, image().to(device))[0]


# Where the layers are called

PARTS = [".norm1", ".relu1", ".conv1", ".norm2", ".relu2", ".conv2"]


def strided(layer):
    layer.conv2.dilation, layer.conv2.padding = (2, 2), (2, 2)


def replaced(layer):
    layer.relu2 = nn.Hardswish()


CHANGES = {
    "act": (replaced, True),
    "norm": (lambda layer: setattr(layer, "norm1", nn.GroupNorm(4, CHANNELS + GROWTH)), True),
    "batch-statistics": (lambda layer: layer.norm2.train(), True),
    "dilation": (strided, False),
    "eps": (lambda layer: setattr(layer.norm1, "eps", 0.5), False),
    "data": (lambda layer: setattr(layer.conv1.weight, "data", layer.conv1.weight.data * 2), False),
    "in-place": (lambda layer: layer.norm1.running_var.mul_(2), False),
    "parameter": (
        lambda layer: setattr(layer.norm2, "weight", nn.Parameter(layer.norm2.weight * 3)),
        False,
    ),
    "module": (lambda layer: setattr(layer, "norm1", copy.deepcopy(layer.norm1).eval()), False),
    "bias": (lambda layer: setattr(layer.conv2, "bias", nn.Parameter(torch.ones(GROWTH))), False),
}  # fmt: skip


@pytest.mark.parametrize(("change", "as_modules"), CHANGES.values(), ids=CHANGES.keys())
def test_changes_between_calls_are_followed(change, as_modules):
    ours, stock = blocks()
    x = image()
    with torch.no_grad():
        for _ in range(2):
            before = ours(x)
        for block in (ours, stock):
            torch.manual_seed(1)
            change(block["denselayer2"])
        for _ in range(2):
            assert torch.allclose(ours(x), stock(x), atol=1e-4)
        assert (change is CHANGES["module"][0]) == torch.allclose(ours(x), before, atol=1e-4)
    assert concatenates(ours, x)[0] == as_modules


def test_a_foreign_layer_is_called():
    class Foreign(nn.Module):
        def forward(self, inputs):
            return torch.cat(inputs, 1)[:, :GROWTH]

    ours, stock = blocks()
    for block in (ours, stock):
        block["denselayer2"] = Foreign()
    x = image()
    with torch.no_grad():
        assert torch.allclose(ours(x), stock(x), atol=1e-5)
    assert "Foreign is no dense layer of cvkernels" in concatenates(ours, x)[1]


def test_gradients_and_dropout_are_stock_s():
    ours, stock = blocks(drop_rate=0.5)
    assert_matches_module(ours, stock, image())
    for block in (ours, stock):
        for module in block.modules():
            if not isinstance(module, nn.BatchNorm2d):
                module.training = True
    # One layout for all three, since dropout draws its numbers in memory order.
    x = image().contiguous(memory_format=torch.channels_last)
    assert_matches_module(ours, stock, x, grad=False)
    assert "dropout is active" in concatenates(ours, image())[1]


# Transitions


def transitions():
    stock = with_statistics(stock_module._Transition(12, 6))
    ours = Transition(12, 6).eval()
    ours.load_state_dict(stock.state_dict())
    return ours, stock


@pytest.mark.parametrize("dtype", [torch.float32, torch.float16, torch.bfloat16], ids=str)
def test_transition_matches_stock(dtype, memory_format, device):
    ours, stock = (module.to(device, dtype) for module in transitions())
    x = image(size=(9, 6), channels=12).to(device, dtype).contiguous(memory_format=memory_format)
    assert_matches_module(ours, stock, x, grad=False)
    with torch.no_grad():
        ops = [row.op for row in cvkernels.explain(ours, x).rows]
    assert ops[0] == "avg_pool" and not [op for op in ops if "norm" in op or "avg_pool2d" in op]


POOLS = {
    "padded": nn.AvgPool2d(3, 2, 1),
    "divisor": nn.AvgPool2d(2, divisor_override=3),
    "max": nn.MaxPool2d(2),
    "ceil": nn.AvgPool2d(2, ceil_mode=True),
    "overlapping": nn.AvgPool2d((3, 2), (1, 2)),
}


@pytest.mark.parametrize(("name", "pool"), POOLS.items(), ids=POOLS.keys())
def test_transition_with_another_pool(name, pool):
    ours, stock = transitions()
    ours.pool = stock.pool = pool
    x = image(size=(9, 7), channels=12)
    assert_matches_module(ours, stock, x, grad=False)
    with torch.no_grad():
        first = cvkernels.explain(ours, x).rows[0].op
    assert (first == "avg_pool") == (name in ("ceil", "overlapping"))


def test_transition_that_was_extended_runs_what_was_added():
    ours, stock = transitions()
    for module in (ours, stock):
        module.add_module("scale", nn.Softplus())
    assert_matches_module(ours, stock, image(size=(8, 8), channels=12), grad=False)


# A sequence of them


def features(kind_of_block, kind_of_transition, sequence):
    layers = [
        nn.Conv2d(3, CHANNELS, 3), nn.BatchNorm2d(CHANNELS), nn.ReLU(), nn.MaxPool2d(3, 2, 1),
        kind_of_block(2, CHANNELS, 2, GROWTH, 0.0), kind_of_transition(CHANNELS + 2 * GROWTH, 12),
        kind_of_block(2, 12, 2, GROWTH, 0.0), nn.BatchNorm2d(12 + 2 * GROWTH),
    ]  # fmt: skip
    return sequence(*layers)


def test_a_sequence_copies_nothing():
    stock = with_statistics(
        features(stock_module._DenseBlock, stock_module._Transition, nn.Sequential)
    )
    ours = features(DenseBlock, Transition, FusedSequential).eval()
    ours.load_state_dict(stock.state_dict())
    x = torch.randn(2, 3, 17, 19)
    assert_matches_module(ours, stock, x, grad=False)
    meta = torch.empty(8, 3, 64, 64, dtype=torch.bfloat16, device="meta")
    ops = [row.op for row in cvkernels.explain(ours, meta).rows]
    assert not [op for op in ops if "copy" in op or "cat" in op]
    seen = []
    for layer in ("3", "4", "5", "6"):
        handle = ours.get_submodule(layer).register_forward_hook(lambda *_: seen.append(1))
        assert_matches_module(ours, stock, x, grad=False)
        handle.remove()
    assert len(seen) == 4


def test_verify_knows_the_layers():
    model = with_statistics(features(DenseBlock, Transition, FusedSequential))
    verified = cvkernels.verify(model, torch.randn(2, 3, 33, 33))
    assert verified.ok
    assert {"4.denselayer2.conv2", "5.conv"} <= {row.layer for row in verified.rows}


def test_timm_layers_grow_too():
    timm = pytest.importorskip("timm.models.densenet")
    stock = with_statistics(timm.DenseBlock(LAYERS, CHANNELS, 2, GROWTH))
    model = nn.Sequential(copy.deepcopy(stock))
    cvkernels.patch(model)
    for _ in range(2):
        assert_matches_module(model[0], stock, image(), grad=False)
    assert not concatenates(model, image())[0]


def test_a_layer_alone_still_takes_tensors():
    layer = with_statistics(DenseLayer(12, 4, 2, 0.0))
    x = torch.randn(2, 12, 6, 6)
    with torch.no_grad():
        exact = copy.deepcopy(layer).double()(x.double())
        assert_close_as_eager(layer(list(x.split([4, 8], 1))), layer(x), exact)
