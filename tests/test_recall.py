"""A fused call that comes again is checked quickly, and never runs when something has changed."""

import copy

import pytest
import torch
from torch import nn

import cvkernels
from cvkernels.nn import ConvBNAct
from cvkernels.nn.recall import CAPACITY, Recall


@pytest.fixture(autouse=True)
def without_gradients():
    with torch.no_grad():
        yield


@pytest.fixture
def block():
    torch.manual_seed(0)
    block = ConvBNAct(8, 16, 3).eval()
    block[1].running_mean.normal_()
    block[1].running_var.uniform_(0.5, 2)
    block(torch.randn(2, 8, 6, 5))
    return block


@pytest.fixture
def x():
    return torch.randn(2, 8, 6, 5)


@pytest.fixture
def recalled(monkeypatch):
    """How many calls were recalled."""
    runs = []
    get = Recall.get

    def counted(self, *args):
        run = get(self, *args)
        runs.append(run is not None)
        return run

    monkeypatch.setattr(Recall, "get", counted)
    return runs


def agrees(block, x):
    with cvkernels.backend.use("reference"):
        expected = block(x)
    return torch.allclose(block(x), expected, atol=1e-4)


def test_the_same_call_is_recalled(block, x, recalled):
    first, second = block(x), block(x + 1)
    assert recalled == [True, True]
    assert agrees(block, x) and torch.equal(block(x), first) and not torch.equal(first, second)
    assert block(x).is_contiguous(memory_format=torch.channels_last)


def test_with_a_residual(x, recalled):
    torch.manual_seed(0)
    block = ConvBNAct(8, 8, 3).eval()
    for shortcut in (torch.randn(2, 8, 6, 5), torch.randn(2, 8, 6, 5)):
        y = block.fused(x, block[0], block[1], block[2], residual=shortcut)
        assert torch.allclose(y, torch.relu(block[1](block[0](x)) + shortcut), atol=1e-4)
    assert recalled == [False, True]


CHANGES = {
    "weight": lambda b: b[0].weight.mul_(2),
    "weight's memory": lambda b: setattr(b[0].weight, "data", b[0].weight * 2),
    "a new weight": lambda b: setattr(b[0], "weight", nn.Parameter(b[0].weight * 2)),
    "running mean": lambda b: b[1].running_mean.add_(1),
    "gamma": lambda b: b[1].weight.mul_(-1),
    "a bias": lambda b: setattr(b[0], "bias", nn.Parameter(torch.ones(16))),
    "eps": lambda b: setattr(b[1], "eps", 0.5),
    "stride": lambda b: setattr(b[0], "stride", (2, 2)),
    "padding": lambda b: setattr(b[0], "padding", (0, 0)),
    "padding mode": lambda b: setattr(b[0], "padding_mode", "reflect"),
    "activation": lambda b: setattr(b, "2", nn.SiLU()),
    "no activation": lambda b: b.__delitem__(2),
    "norm": lambda b: b.__setitem__(1, nn.BatchNorm2d(16).eval()),
    "norm's mode": lambda b: setattr(b[1], "training", True),
    "norm's class": lambda b: setattr(b[1], "__class__", nn.SyncBatchNorm),
}


@pytest.mark.parametrize("change", CHANGES.values(), ids=CHANGES.keys())
def test_a_changed_module_is_noticed(change, block, x, recalled):
    block(x)
    assert recalled == [True]
    change(block)
    twin = copy.deepcopy(block)
    if isinstance(block[1], nn.SyncBatchNorm):
        twin[1].__class__ = nn.BatchNorm2d
    expected = nn.Sequential(*twin)(x)
    assert torch.allclose(block(x), expected, atol=1e-4)
    assert recalled == [True, False]


@pytest.mark.parametrize("layer", [0, 1, 2])
def test_a_hook_is_called(layer, block, x):
    block(x)
    seen = []
    handle = block[layer].register_forward_hook(lambda *_: seen.append(1))
    block(x)
    handle.remove()
    block(x)
    assert seen == [1]


def test_a_global_hook_is_called(block, x):
    block(x)
    seen = []
    handle = nn.modules.module.register_module_forward_hook(lambda m, *_: seen.append(type(m)))
    try:
        block(x)
    finally:
        handle.remove()
    assert seen == [nn.Conv2d, nn.BatchNorm2d, nn.ReLU, ConvBNAct]


def test_modes_around_the_call_are_noticed(block, x, recalled):
    block(x)
    with torch.autocast("cpu", torch.bfloat16):
        assert block(x).dtype == torch.bfloat16
    with torch.enable_grad():
        assert block(x).requires_grad
    with cvkernels.backend.use("reference"):
        block(x)
    rows = cvkernels.explain(block, x).rows
    assert [row.op for row in rows] == ["conv_bn_act"]
    torch.func.vmap(lambda image: block(image[None])[0])(x)
    torch.jit.trace(block, x, check_trace=False)
    with torch.backends.mkldnn.flags(enabled=False):
        block(x)
    assert recalled[0] and not any(recalled[1:])
    block(x), block(x)
    assert recalled[-1]


def test_other_data_is_checked_anew(block, recalled):
    for shape in ((1, 8, 6, 5), (2, 8, 7, 5)):
        block(torch.randn(shape))
    assert agrees(block, torch.randn(1, 8, 6, 5))
    with pytest.raises(RuntimeError, match="float64"):
        block(torch.randn(2, 8, 6, 5, dtype=torch.float64))
    with pytest.raises(RuntimeError, match="9"):
        block(torch.randn(2, 9, 6, 5))
    assert recalled[:2] == [False, False] and not any(recalled[-2:])


def test_few_shapes_are_kept(block):
    for width in range(5, 5 + 3 * CAPACITY):
        block(torch.randn(2, 8, 6, width))
    (derived,) = block.__dict__["_derived"].values()
    assert len(derived.recall._calls) == CAPACITY


def test_an_image_is_looked_at_every_time(recalled):
    block = ConvBNAct(3, 8, 3).eval()
    x = torch.randn(1, 3, 6, 6)
    block(x), block(x)
    x[0, 0, 0, 0] = torch.nan
    assert block(x).isnan().any() and not any(recalled)
