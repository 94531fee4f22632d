"""A kept plan is verified at every call, and never runs when something has changed."""

import copy
import gc
import weakref
from functools import partial

import pytest
import torch
from torch import nn

import cvkernels
from cvkernels.nn import ConvBNAct
from cvkernels.nn.fused.plan_cache import CAPACITY, PlanCache
from cvkernels.nn.legacy_se_residual import LegacySEBottleneck
from cvkernels.nn.mbconv import MBConv, MBConvConfig
from cvkernels.nn.se_residual import SEBottleneck
from cvkernels.nn.squeeze_excite import SqueezeExcitation

pytestmark = pytest.mark.fast


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
def found(monkeypatch):
    """Whether each look for a plan found one that may run."""
    runs = []
    get = PlanCache.get

    def counted(self, *args):
        run = get(self, *args)
        runs.append(run is not None)
        return run

    monkeypatch.setattr(PlanCache, "get", counted)
    return runs


def agrees(block, x):
    with cvkernels.backend.use("reference"):
        expected = block(x)
    return torch.allclose(block(x), expected, atol=1e-4)


def test_the_same_call_is_found(block, x, found):
    first, second = block(x), block(x + 1)
    assert found == [True, True]
    assert agrees(block, x) and torch.equal(block(x), first) and not torch.equal(first, second)
    assert block(x).is_contiguous()


def test_with_a_residual(x, found):
    torch.manual_seed(0)
    block = ConvBNAct(8, 8, 3).eval()
    for shortcut in (torch.randn(2, 8, 6, 5), torch.randn(2, 8, 6, 5)):
        y = block.fused(x, block[0], block[1], block[2], residual=shortcut)
        assert torch.allclose(y, torch.relu(block[1](block[0](x)) + shortcut), atol=1e-4)
    assert found == [False, True]


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
def test_a_changed_module_is_noticed(change, block, x, found):
    block(x)
    assert found == [True]
    change(block)
    twin = copy.deepcopy(block)
    if isinstance(block[1], nn.SyncBatchNorm):
        twin[1].__class__ = nn.BatchNorm2d
    expected = nn.Sequential(*twin)(x)
    assert torch.allclose(block(x), expected, atol=1e-4)
    assert found == [True, False]


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


def test_modes_around_the_call_are_noticed(block, x, found):
    block(x)
    with torch.autocast("cpu", torch.bfloat16):
        assert block(x).dtype == torch.bfloat16
    with torch.enable_grad():
        assert block(x).requires_grad
    with cvkernels.backend.use("reference"):
        block(x)
    rows = cvkernels.explain(block, x).rows
    assert [row.op for row in rows] == ["conv_bn_act", "aten.clone"]
    torch.func.vmap(lambda image: block(image[None])[0])(x)
    torch.jit.trace(block, x, check_trace=False)
    with torch.backends.mkldnn.flags(enabled=False):
        block(x)
    assert found[0] and not any(found[1:])
    block(x), block(x)
    assert found[-1]


def test_other_data_is_checked_anew(block, found):
    for shape in ((1, 8, 6, 5), (2, 8, 7, 5)):
        block(torch.randn(shape))
    assert agrees(block, torch.randn(1, 8, 6, 5))
    with pytest.raises(RuntimeError, match="float64"):
        block(torch.randn(2, 8, 6, 5, dtype=torch.float64))
    with pytest.raises(RuntimeError, match="9"):
        block(torch.randn(2, 9, 6, 5))
    assert found[:2] == [False, False] and not any(found[-2:])


def test_few_shapes_are_kept(block):
    for width in range(5, 5 + 3 * CAPACITY):
        block(torch.randn(2, 8, 6, width))
    (derived,) = block.__dict__["_derived"].values()
    assert len(derived.plans._kept) == CAPACITY


def test_nan_in_an_image_comes_through_a_found_call(found):
    block = ConvBNAct(3, 8, 3).eval()
    x = torch.randn(1, 3, 6, 6)
    block(x), block(x)
    x[0, 0, 0, 0] = torch.nan
    assert block(x).isnan().any() and found[-1]


def seed_statistics(model):
    for module in model.modules():
        if isinstance(module, nn.BatchNorm2d):
            module.running_mean.normal_()
            module.running_var.uniform_(0.5, 2)


def mbconv():
    config = MBConvConfig(4, 3, 1, 16, 16, 1)
    return MBConv(config, 0.2, nn.BatchNorm2d)


def timm_inverted_residual():
    blocks = pytest.importorskip("timm.models._efficientnet_blocks")
    excite = partial(blocks.SqueezeExcite, rd_ratio=0.25)
    block = blocks.InvertedResidual(16, 16, act_layer=nn.SiLU, exp_ratio=4.0, se_layer=excite)
    cvkernels.patch(nn.Sequential(block))
    return block


# name -> (block, changes of its parts that a kept call must notice)
BLOCKS = {
    "SqueezeExcitation": (
        lambda: SqueezeExcitation(16, 4),
        {
            "weight": lambda b: b.fc1.weight.mul_(2),
            "bias": lambda b: setattr(b.fc2, "bias", nn.Parameter(torch.ones(16))),
            "pool": lambda b: setattr(b.avgpool, "output_size", (6, 5)),
            "activation": lambda b: setattr(b, "activation", nn.SiLU()),
            "gate": lambda b: setattr(b, "scale_activation", nn.Hardsigmoid()),
        },
    ),
    "MBConv": (
        mbconv,
        {
            "depthwise weight": lambda b: b.block[1][0].weight.mul_(2),
            "norm": lambda b: b.block[1][1].running_var.mul_(4),
            "excitation": lambda b: b.block[2].fc2.bias.add_(1),
            "shortcut": lambda b: setattr(b, "use_res_connect", False),
            "a layer": lambda b: b.block[0].__setitem__(2, nn.ReLU()),
        },
    ),
    "SEBottleneck": (
        lambda: SEBottleneck(16, 4, base_width=128),
        {
            "norm": lambda b: b.bn3.bias.add_(1),
            "excitation": lambda b: b.se.fc1.weight.mul_(-1),
            "activation": lambda b: setattr(b, "act3", nn.SiLU()),
            "a place": lambda b: setattr(b, "aa", nn.ReLU()),
            "downsample": lambda b: setattr(b, "downsample", nn.Conv2d(16, 16, 1)),
            "one channel": lambda b: setattr(b, "downsample", nn.Conv2d(16, 1, 1)),
        },
    ),
    "LegacySEBottleneck": (
        lambda: LegacySEBottleneck(16, 4, 2, 4),
        {
            "norm": lambda b: b.bn3.bias.add_(1),
            "excitation": lambda b: b.se_module.fc1.weight.mul_(-1),
            "downsample": lambda b: setattr(b, "downsample", nn.Conv2d(16, 16, 1)),
        },
    ),
    "timm's InvertedResidual": (
        timm_inverted_residual,
        {
            "depthwise weight": lambda b: b.conv_dw.weight.mul_(2),
            "norm": lambda b: b.bn3.running_var.mul_(4),
            "excitation": lambda b: b.se.conv_expand.bias.add_(1),
            "shortcut": lambda b: setattr(b, "has_skip", False),
            "an activation": lambda b: setattr(b.bn2, "act", nn.ReLU()),
            "a place": lambda b: setattr(b, "aa", nn.ReLU()),
        },
    ),
    "depthwise": (
        lambda: ConvBNAct(16, 16, 3, groups=16),
        {"weight": lambda b: b[0].weight.mul_(2), "eps": lambda b: setattr(b[1], "eps", 0.5)},
    ),
}
BLOCK_CHANGES = [
    pytest.param(make, change, id=f"{name}-{what}")
    for name, (make, changes) in BLOCKS.items()
    for what, change in changes.items()
]


@pytest.mark.parametrize(("make", "change"), BLOCK_CHANGES)
def test_a_block_is_found_until_a_part_changes(make, change, found):
    torch.manual_seed(0)
    block = make().eval()
    seed_statistics(block)
    x = torch.randn(2, 16, 6, 5).contiguous(memory_format=torch.channels_last)
    kept = x.clone()
    block(x)
    found.clear()
    assert agrees(block, x) and found == [False] * (len(found) - 1) + [True]
    assert torch.equal(block(x.contiguous()), block(x)) and torch.equal(x, kept)
    change(block)
    found.clear()
    assert agrees(block, x) and not found[0]


@pytest.mark.parametrize(
    "make",
    [*(make for make, _ in BLOCKS.values()), cvkernels.models.googlenet],
    ids=[*BLOCKS, "googlenet"],
)
def test_a_block_goes_with_its_last_reference(make):
    """Plans and guards make no cycles with the modules, so that their memory is free at once."""
    block = make().eval()
    x = torch.randn(1, 3, 64, 64) if hasattr(block, "fc") else torch.randn(1, 16, 6, 5)
    block(x), block(x)
    modules = [weakref.ref(module) for module in block.modules()]
    gc.disable()
    try:
        del block
        assert not any(module() for module in modules)
    finally:
        gc.enable()


@pytest.mark.parametrize("make", [make for make, _ in BLOCKS.values()], ids=BLOCKS.keys())
def test_every_hook_in_a_block_is_called(make):
    block = make().eval()
    x = torch.randn(1, 16, 5, 5)
    block(x), block(x)
    leaves = [m for m in block.modules() if not list(m.children())]
    seen = []
    for module in leaves:
        handle = module.register_forward_hook(lambda m, *_: seen.append(m))
        block(x)
        handle.remove()
    assert all(any(m is found for found in seen) for m in leaves)


def test_a_block_in_training_draws_its_stochastic_depth(found):
    block = mbconv().eval()
    x = torch.randn(2, 16, 6, 5)
    block(x), block(x)
    assert found[-1]
    block.stochastic_depth.train()
    torch.manual_seed(0)
    first = torch.get_rng_state()
    block(x)
    assert not torch.equal(torch.get_rng_state(), first)


def test_filters_cut_off_in_the_same_memory(block, x):
    """Address, version and strides stay; a network is pruned by hand like this."""
    conv, bn = block[0], block[1]
    assert agrees(block, x)
    conv.weight.data = conv.weight.data[:12]
    for vector in (bn.weight, bn.bias, bn.running_mean, bn.running_var):
        vector.data = vector.data[:12]
    assert block(x).shape[1] == 12 and agrees(block, x)
