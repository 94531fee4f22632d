"""Dense blocks in training: stock's numbers, whatever their norms and convolutions."""

import copy

import pytest
import torch
from torch import nn
from torch.utils.checkpoint import checkpoint

import cvkernels
from cvkernels.models.densenet import DenseNet
from cvkernels.nn import DenseBlock, Transition
from tests.support import pairs
from tests.support.numerics import max_error
from tests.support.pairs import assert_equal, norms_of, pair, spread_norms
from tests.support.training_nets import stock_densenet

LAYERS, CHANNELS, GROWTH = 3, 8, 4


def blocks(memory_efficient=False):
    """(ours, stock) with one state, their norms no identities."""
    stock = stock_densenet._DenseBlock(LAYERS, CHANNELS, 2, GROWTH, 0.0)
    ours = DenseBlock(LAYERS, CHANNELS, 2, GROWTH, 0.0, memory_efficient)
    return pair(spread_norms(stock, (-1.0, 1.5)), ours)


def image(dtype=torch.float64):
    return pairs.image(2, (5, 6), dtype=dtype, channels=CHANNELS)


def outcome(module, x):
    """Output, gradients of the input and of every parameter, and the buffers after it."""
    x = x.detach().requires_grad_()
    out = module(x)
    generator = torch.Generator().manual_seed(1)
    cotangent = torch.randn(out.shape, generator=generator, dtype=torch.float64).to(out)
    grads = torch.autograd.grad(out, [x, *module.parameters()], cotangent)
    return [t.detach() for t in (out, *grads)] + [b.clone() for b in module.buffers()]


def runs_fused(module, x):
    return any("batch_norm_act" in row.op for row in cvkernels.explain(module, x).rows)


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
    ours, stock = (block.to(device, dtype) for block in blocks(memory_efficient))
    images = [image(dtype).to(device).contiguous(memory_format=memory_format) for _ in range(6)]
    if dtype == torch.float64:
        assert_equal(outcome(ours, images[0]), outcome(stock, images[0]), 1e-11)
    else:
        assert_errors_as_eager(ours, stock, images)
    assert runs_fused(ours, images[0])


@pytest.mark.parametrize("backend", ["auto", "reference"])
def test_recomputed_layers_have_second_derivatives(backend):
    ours, stock = (block.double() for block in blocks(memory_efficient=True))
    x = image().requires_grad_()

    def twice(block):
        with cvkernels.backend.use(backend):
            (grad,) = torch.autograd.grad(block(x).square().sum(), x, create_graph=True)
        return torch.autograd.grad(grad.square().sum(), [x, *block.parameters()])

    assert_equal(twice(ours), twice(stock), 1e-9)


@pytest.mark.parametrize(("reentrant", "times"), [(False, 1), (True, 2)])
def test_how_often_a_checkpointed_block_counts_a_batch(reentrant, times):
    """Stock counts it twice in both: recomputing ends early here, as README says."""
    ours, _ = blocks()
    x = image(torch.float32).requires_grad_()
    checkpoint(ours, x, use_reentrant=reentrant).sum().backward()
    assert [int(norm.num_batches_tracked) for norm in norms_of(ours)] == [times] * 2 * LAYERS


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
    ours, stock = (block.double() for block in blocks())
    for block in (ours, stock):
        change(block)
    for _ in range(3):
        x = image()
        assert_equal(outcome(ours, x), outcome(stock, x), 1e-11)
    assert runs_fused(ours, x)


@pytest.mark.parametrize("hooked", [False, True], ids=["alone", "hooked"])
def test_a_transition(hooked):
    stock = stock_densenet._Transition(12, 6)
    ours, stock = pair(stock, Transition(12, 6), torch.float64)
    if hooked:
        ours.relu.register_forward_hook(lambda *_: None)
    x = torch.randn(2, 12, 7, 8, dtype=torch.float64)
    for _ in range(2):
        assert_equal(outcome(ours, x), outcome(stock, x), 1e-11)


def test_autocast_is_as_near_as_stock():
    ours, stock = (nn.Sequential(nn.Conv2d(3, CHANNELS, 1), block) for block in blocks())
    ours[0].load_state_dict(stock[0].state_dict())
    exact, x, results = copy.deepcopy(stock).double(), torch.randn(2, 3, 6, 6), []
    for model in (ours, stock, exact):
        with torch.autocast("cpu", torch.bfloat16, enabled=model is not exact):
            out = model(x.double() if model is exact else x)
        assert out.dtype == (torch.float64 if model is exact else torch.bfloat16)
        out.to(x if model is not exact else out).pow(2).sum().backward()
        results.append(pairs.gradients(model))
    for actual, eager, truth in zip(*results, strict=True):
        # Gradients are rounded to bfloat16 at each convolution, in another order than stock's.
        rounding = 2 * torch.finfo(torch.bfloat16).eps * truth.abs().max()
        assert max_error(actual, truth) <= 2 * max_error(eager, truth) + rounding


def test_digits_are_learnt_as_by_stock():
    datasets = pytest.importorskip("sklearn.datasets")
    data, target = datasets.load_digits(return_X_y=True)
    images = torch.tensor(data, dtype=torch.float64).view(-1, 1, 8, 8) / 16
    images = nn.functional.interpolate(images, scale_factor=2).expand(-1, 3, -1, -1)[:1000]
    target, accuracies = torch.tensor(target)[:1000], []
    for kind in (stock_densenet.DenseNet, DenseNet):
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
