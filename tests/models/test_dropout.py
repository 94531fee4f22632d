"""Dropout and stochastic depth draw stock's numbers, in stock's order, wherever they are active."""

import copy

import pytest
import torch
from torch import nn

from tests.support.model_checks import TINY_DENSENET, Concatenated, counterpart
from tests.support.pairs import spread_norms

torchvision = pytest.importorskip("torchvision")
timm = pytest.importorskip("timm")


def build(stock, how, name="", **options):
    """(ours, stock) in eval."""
    torch.manual_seed(0)
    stock = spread_norms(stock(**options)).eval()
    return counterpart(stock, name, how, **options), stock


DENSENETS = {
    "drop_in": lambda: build(
        torchvision.models.DenseNet, "drop_in", "DenseNet", drop_rate=0.3, **TINY_DENSENET
    ),
    "patched": lambda: build(
        torchvision.models.DenseNet, "patched", drop_rate=0.3, **TINY_DENSENET
    ),
    "timm": lambda: build(
        timm.models.DenseNet, "patched", proj_drop_rate=0.3, drop_rate=0.3,
        growth_rate=8, block_config=(2, 2, 1, 1), num_classes=10,
    ),
}  # fmt: skip


def layers(model):
    return [module for module in model.modules() if "DenseLayer" in type(module).__name__]


def monte_carlo(model):
    for layer in layers(model):
        layer.training = True


def one_layer(model):
    layers(model)[-1].training = True


def all_but_norms(model):
    for module in model.train().modules():
        if isinstance(module, nn.BatchNorm2d):
            module.eval()


def one_block(model):
    model.features.denseblock2.train()


def all_but_a_transition(model):
    model.train().features.transition1.eval()


def behind_another_pool(model):
    model.train().features.pool0 = nn.AvgPool2d(2)


def with_channels_last_weights(model):
    monte_carlo(model.to(memory_format=torch.channels_last))


CHANGES = [
    nn.Module.train, monte_carlo, one_layer, all_but_norms, one_block, all_but_a_transition,
    behind_another_pool, with_channels_last_weights,
]  # fmt: skip
IMAGES = {
    "contiguous": lambda x: x,
    "channels_last": lambda x: x.contiguous(memory_format=torch.channels_last),
    "crop": lambda x: x.contiguous(memory_format=torch.channels_last)[:, :, 3:, 5:],
    "transposed": lambda x: x.transpose(2, 3),
}


def drawn(model, x, grad=False):
    """Two outputs, and what is drawn behind them."""
    torch.manual_seed(7)
    with torch.set_grad_enabled(grad):
        outputs = [Concatenated(model)(x).detach() for _ in range(2)]
    assert not torch.equal(*outputs)
    return torch.stack(outputs), torch.rand(1)


def assert_draws_like(ours, stock, x, grad):
    (actual, ours_next), (expected, stock_next) = (drawn(m, x, grad) for m in (ours, stock))
    tolerance = 1e-8 if x.dtype == torch.float64 else 1e-4
    torch.testing.assert_close(actual, expected, rtol=tolerance, atol=tolerance)
    assert torch.equal(ours_next, stock_next)


@pytest.mark.parametrize("grad", [False, True], ids=["no_grad", "grad"])
@pytest.mark.parametrize("change", CHANGES, ids=lambda change: change.__name__)
@pytest.mark.parametrize("how", DENSENETS)
def test_densenet(how, change, grad):
    pair = [model.double() for model in DENSENETS[how]()]
    for layout in IMAGES.values():
        ours, stock = copy.deepcopy(pair)
        for model in (ours, stock):
            change(model)
        assert_draws_like(ours, stock, layout(torch.randn(2, 3, 48, 64).double()), grad)


OTHERS = {
    "googlenet": ("torchvision", {"init_weights": False}),
    "efficientnet_b0": ("torchvision", {}),
    "seresnet18": ("timm", {"drop_path_rate": 0.4, "drop_rate": 0.2}),
}


@pytest.mark.parametrize("how", ["drop_in", "patched"])
@pytest.mark.parametrize(
    ("name", "kinds"),
    [
        ("googlenet", "Dropout"),
        ("efficientnet_b0", "Dropout"),
        ("efficientnet_b0", "StochasticDepth"),
        ("seresnet18", "DropPath"),
        *((name, "train") for name in OTHERS),
    ],
)
def test_other_networks(name, how, kinds):
    library, options = OTHERS[name]
    stock = getattr({"torchvision": torchvision, "timm": timm}[library].models, name)
    ours, stock = build(stock, how, name, **options)
    x = torch.randn(2, 3, 48, 48)
    if kinds == "train":
        ours, stock, x = ours.double(), stock.double(), x.double()
    for model in (ours, stock):
        active = [m for m in model.modules() if type(m).__name__ == kinds]
        for module in [model] if kinds == "train" else active:
            module.train()
    assert_draws_like(ours, stock, x, kinds == "train")
