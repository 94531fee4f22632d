"""Dense blocks in training: stock's numbers with linear memory."""

import copy

import pytest
import torch
from torch import nn

import cvkernels
from cvkernels.models.densenet import DenseNet
from cvkernels.nn import DenseBlock, DenseLayer, Transition
from tests.support.autograd_memory import megabytes_per_image, saved_bytes
from tests.support.dense_training_checks import (
    CHANNELS,
    GROWTH,
    blocks,
    image,
    outcome,
    runs_fused,
    stock_module,
)
from tests.support.numerics import max_error

TINY = dict(growth_rate=8, block_config=(3, 2, 2), num_init_features=16, num_classes=10)


def assert_errors_as_eager(ours, stock, images):
    """The tolerance rule on the mean over images and tensors of errors relative to the largest.

    A tensor here has a few numbers, and one ReLU that rounding turns decides over its error.
    """
    exact = copy.deepcopy(stock).double()
    errors = []
    for x in images:
        results = [outcome(m, v) for m, v in ((ours, x), (stock, x), (exact, x.double()))]
        errors.append(
            [
                (max_error(a, truth), max_error(e, truth), truth.abs().max().item())
                for a, e, truth in zip(*results, strict=True)
                if a.is_floating_point()
            ]
        )
    eps = torch.finfo(images[0].dtype).eps
    actual, eager, largest = torch.tensor(errors).unbind(-1)
    assert (actual / largest).mean() <= 2 * (eager / largest).mean() + eps


@pytest.mark.parametrize("memory_efficient", [False, True], ids=["plain", "memory_efficient"])
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float64], ids=str)
def test_block_matches_stock(dtype, memory_efficient, memory_format, device):
    ours, stock = (b.to(device, dtype) for b in blocks(memory_efficient))
    x = image(dtype=dtype).to(device).contiguous(memory_format=memory_format)
    if dtype == torch.float64:
        for actual, expected in zip(outcome(ours, x), outcome(stock, x), strict=True):
            torch.testing.assert_close(actual, expected, rtol=1e-11, atol=1e-11)
    else:
        more = [image(dtype=dtype).to(x).contiguous(memory_format=memory_format) for _ in range(5)]
        assert_errors_as_eager(ours, stock, [x, *more])
    assert runs_fused(ours, x)[0]


def norms_of(block):
    return [m for m in block.modules() if isinstance(m, nn.BatchNorm2d)]


def with_cumulative_average(block):
    for norm in norms_of(block):
        norm.momentum = None


def without_affine(block):
    for norm in norms_of(block):
        norm.weight = norm.bias = None


def without_statistics(block):
    layer = block["denselayer2"]
    for name in ("norm1", "norm2"):
        width = getattr(layer, name).num_features
        setattr(layer, name, nn.BatchNorm2d(width, track_running_stats=False).double())


def with_other_momenta(block):
    for i, norm in enumerate(norms_of(block)):
        norm.momentum, norm.eps = 0.05 * (i + 1), 1e-3 * (i + 1)


def with_biases(block):
    for layer in block.values():
        for conv in (layer.conv1, layer.conv2):
            conv.bias = nn.Parameter(torch.linspace(-1, 1, conv.out_channels).double())


VARIANTS = [
    with_cumulative_average, without_affine, without_statistics, with_other_momenta, with_biases,
]  # fmt: skip


@pytest.mark.parametrize("change", VARIANTS, ids=lambda f: f.__name__)
def test_options_of_norms_and_convolutions(change):
    ours, stock = blocks()
    for block in (ours, stock):
        change(block.double())
    for _ in range(3):
        x = image(dtype=torch.float64)
        for actual, expected in zip(outcome(ours, x), outcome(stock, x), strict=True):
            torch.testing.assert_close(actual, expected, rtol=1e-11, atol=1e-11)
    assert runs_fused(ours, x)[0]


@pytest.mark.parametrize("memory_efficient", [False, True], ids=["plain", "memory_efficient"])
def test_ten_steps_of_a_network_are_stock_s(memory_efficient):
    torch.manual_seed(0)
    stock = stock_module.DenseNet(**TINY).double()
    ours = DenseNet(**TINY, memory_efficient=memory_efficient).double()
    ours.load_state_dict(stock.state_dict())
    models = (ours, stock)
    optimisers = [torch.optim.SGD(m.parameters(), 0.05, momentum=0.9) for m in models]
    for _ in range(10):
        x, target = torch.randn(3, 3, 40, 33, dtype=torch.float64), torch.tensor([1, 4, 7])
        losses = []
        for model, optimiser in zip(models, optimisers, strict=True):
            optimiser.zero_grad()
            losses.append(nn.functional.cross_entropy(model(x), target))
            losses[-1].backward()
            optimiser.step()
        torch.testing.assert_close(*losses, rtol=1e-9, atol=1e-9)
    for key, value in stock.state_dict().items():
        torch.testing.assert_close(ours.state_dict()[key], value, rtol=1e-8, atol=1e-9)


@pytest.mark.parametrize("library", ["torchvision", "timm"])
def test_patched_networks_train_the_same_way(library):
    if library == "timm":
        timm = pytest.importorskip("timm.models.densenet")
        stock = timm.DenseNet(growth_rate=8, block_config=(2, 2), num_classes=10)
    else:
        stock = stock_module.DenseNet(**TINY)
    stock = stock.double()
    model = copy.deepcopy(stock)
    cvkernels.patch(model)
    x = torch.randn(2, 3, 40, 40, dtype=torch.float64)
    for actual, expected in zip(outcome(model, x), outcome(stock, x), strict=True):
        torch.testing.assert_close(actual, expected, rtol=1e-9, atol=1e-9)
    assert saved_bytes(model, x) < 0.5 * saved_bytes(stock, x)


# What autograd keeps


def test_saved_memory_of_densenet121():
    model = cvkernels.models.densenet121()
    assert megabytes_per_image(model) <= 15
    for layer in model.modules():
        if isinstance(layer, DenseLayer):
            layer.memory_efficient = True
    assert megabytes_per_image(model) <= 6


@pytest.mark.parametrize("memory_efficient", [False, True], ids=["plain", "memory_efficient"])
def test_saved_memory_grows_linearly_with_depth(memory_efficient):
    x = image().requires_grad_()
    maps = [
        saved_bytes(DenseBlock(layers, CHANNELS, 2, GROWTH, 0.0, memory_efficient), x)
        for layers in (4, 8, 16)
    ]
    assert maps[2] - maps[1] == 2 * (maps[1] - maps[0])
    stock = stock_module._DenseBlock(16, CHANNELS, 2, GROWTH, 0.0)
    assert maps[2] < 0.25 * saved_bytes(stock, x)


def test_no_gradient_keeps_nothing_and_updates_statistics():
    ours, stock = blocks()
    x = image()
    with torch.no_grad():
        expected, out = stock(x), ours(x)
    torch.testing.assert_close(out, expected)
    assert not out.requires_grad
    for a, b in zip(ours.buffers(), stock.buffers(), strict=True):
        torch.testing.assert_close(a, b)


def test_a_transition_alone_and_what_it_keeps():
    stock = stock_module._Transition(12, 6).double()
    ours = Transition(12, 6).double()
    ours.load_state_dict(stock.state_dict())
    x = torch.randn(2, 12, 7, 8, dtype=torch.float64)
    for actual, expected in zip(outcome(ours, x), outcome(stock, x), strict=True):
        torch.testing.assert_close(actual, expected, rtol=1e-11, atol=1e-11)
    ours.relu.register_forward_hook(lambda *_: None)
    for actual, expected in zip(outcome(ours, x), outcome(stock, x), strict=True):
        torch.testing.assert_close(actual, expected, rtol=1e-11, atol=1e-11)


def test_digits_are_learnt_as_by_stock():
    datasets = pytest.importorskip("sklearn.datasets")
    data, target = datasets.load_digits(return_X_y=True)
    images = torch.tensor(data, dtype=torch.float64).view(-1, 1, 8, 8) / 16
    images = nn.functional.interpolate(images, scale_factor=2).expand(-1, 3, -1, -1)[:1000]
    target, accuracies = torch.tensor(target)[:1000], []
    for kind in (stock_module.DenseNet, DenseNet):
        torch.manual_seed(0)
        model = kind(growth_rate=8, block_config=(2, 2), num_init_features=16, num_classes=10)
        model = model.double()
        optimiser = torch.optim.SGD(model.parameters(), 0.1, momentum=0.9)
        for epoch in range(4):
            optimiser.param_groups[0]["lr"] = 0.1 * (1 - epoch / 4)
            for start in range(0, 800, 50):
                batch = slice(start, start + 50)
                optimiser.zero_grad()
                nn.functional.cross_entropy(model(images[batch]), target[batch]).backward()
                optimiser.step()
        with torch.no_grad():
            guess = model.eval()(images[800:]).argmax(1)
        accuracies.append((guess == target[800:]).float().mean().item())
    assert accuracies[0] == accuracies[1] > 0.85
