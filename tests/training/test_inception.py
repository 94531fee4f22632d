"""Training GoogLeNet's blocks: stock's gradients and statistics, convolution outputs alone kept."""

import copy
import io
import pickle

import pytest
import torch
from torch import nn

import cvkernels
from cvkernels.nn import FusedSequential
from cvkernels.nn.training import conv_bn_act as convolution
from cvkernels.nn.training import recompute
from tests.support.autograd_memory import saved_bytes
from tests.support.inception_training_checks import image, inception_pair, is_recomputed
from tests.support.numerics import assert_close_as_eager
from tests.support.pairs import assert_equal, loss_of, step

torchvision = pytest.importorskip("torchvision")


# What is computed


def test_ten_optimiser_steps_match_stock(memory_format):
    results = []
    for model in inception_pair():
        optimiser = torch.optim.SGD(model.parameters(), 0.05, momentum=0.9)
        x = image().contiguous(memory_format=memory_format)
        for _ in range(10):
            results.append(step(model, x))
            optimiser.step()
        results[-1] += [p.detach() for p in model.parameters()]
    for ours, stock in zip(results[:10], results[10:], strict=True):
        assert_equal(ours, stock, 1e-8)


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16], ids=str)
def test_gradients_follow_the_numerics_rule(dtype, memory_format, device):
    """Of two convolutions and a pool: through more, what a ReLU passes depends on a rounding."""
    ours, stock = inception_pair(dtype)
    x = image(dtype=dtype).to(device).contiguous(memory_format=memory_format)
    models = []
    for model in (ours, stock):
        layers = FusedSequential if model is ours else nn.Sequential
        stem = layers(*model.stem, model.first.branch1)
        models.append(nn.Sequential(stem, nn.AdaptiveAvgPool2d(1), nn.Flatten()).to(device))
    exact = step(copy.deepcopy(models[1]).double(), x.double())
    results = [step(model, x) for model in models]
    for actual, eager, truth in zip(*results, exact, strict=True):
        if actual.is_floating_point():
            assert_close_as_eager(actual, eager, truth)
        else:
            assert torch.equal(actual, eager)


def test_what_is_recomputed_is_bit_equal():
    ours, _ = inception_pair(torch.float32)
    maps = [ours.stem[0](image(dtype=torch.float32))]
    maps += [ours.stem(image(dtype=torch.float32))]
    maps += [ours.first(maps[1])]
    maps += [ours.pool(maps[2])]
    for out in maps:
        how = out._cvkernels_recompute
        assert torch.equal(how.node.value(how.saved), out)


def test_autocast_matches_stock():
    ours, stock = inception_pair(torch.float32)
    x = image(dtype=torch.float32)

    def run(model):
        def forward(x):
            with torch.autocast("cpu", torch.bfloat16):
                return model(x).float()

        return step(model, x, run=forward)

    exact = step(copy.deepcopy(stock).double(), x.double())
    for actual, eager, truth in zip(run(ours), run(stock), exact, strict=True):
        if actual.is_floating_point() and truth.abs().max() > 1e-12:
            assert_close_as_eager(actual, eager, truth, factor=3.0)


def test_several_forwards_retained_graphs_and_accumulated_gradients():
    images = [image(), image(batch=2) * 2, image(size=(17, 20)) - 1]
    results = []
    for model in inception_pair():
        losses = [loss_of(model(x)) for x in images]
        losses[1].backward(retain_graph=True)
        losses[1].backward()
        (losses[0] * 0.5 + losses[2]).backward()
        results.append([*(p.grad for p in model.parameters()), *model.buffers()])
    assert_equal(*results)


FROZEN = {
    "stem": ["stem"],
    "convolutions": ["first.branch1.conv", "first.branch2.0.conv", "second.branch4.1.conv"],
    "norms": ["first.branch1.bn", "stem.0.bn", "second.branch3.0.bn"],
    "all": [""],
}


@pytest.mark.parametrize("names", FROZEN.values(), ids=FROZEN.keys())
def test_frozen_parameters(names):
    ours, stock = inception_pair()
    for model in (ours, stock):
        for name in names:
            model.get_submodule(name).requires_grad_(False)
    assert_equal(step(ours, image()), step(stock, image()))


def test_no_image_gradient():
    results = []
    for model in inception_pair():
        loss_of(model(image())).backward()
        results.append([p.grad for p in model.parameters()])
    assert_equal(*results)


def test_part_of_the_graph():
    """Gradients in a map, and of one use of it, leave the others right."""
    results = []
    for model in inception_pair():
        first = model.first(model.stem(image()))
        pooled = model.pool(first)
        second = model.second(pooled)
        (grad,) = torch.autograd.grad(second.square().sum(), pooled, retain_graph=True)
        (side,) = torch.autograd.grad(first.pow(3).sum(), first, retain_graph=True)
        (second.square().sum() + first.pow(3).sum()).backward()
        results.append([grad, side, *(p.grad for p in model.parameters())])
    assert_equal(*results)


# What is kept


@pytest.mark.parametrize("patched", [False, True], ids=["builder", "patched"])
def test_googlenet_keeps_less_than_8_mb_per_image(patched):
    builders = torchvision.models if patched else cvkernels.models
    with torch.device("meta"):
        model = builders.googlenet(init_weights=False).to(torch.bfloat16)
        x = torch.randn(4, 3, 224, 224, dtype=torch.bfloat16)
    if patched:
        cvkernels.patch(model)
    assert saved_bytes(model.train(), x) / 4 <= 8e6


def test_only_convolution_outputs_are_kept():
    ours, _ = inception_pair(torch.float32)
    x = image(dtype=torch.float32)
    outputs = []
    for module in ours.modules():
        if isinstance(module, nn.BatchNorm2d):
            outputs.append(4 * 4 * module.num_features)  # mean, variance, weight and bias
    sizes = {"stem": (16, 13 * 12), "first": (8 + 8 + 12 + 4 + 8 + 4, 6 * 6)}
    sizes["second"] = (8 + 8 + 8 + 4 + 8 + 8, 3 * 3)
    maps = sum(4 * 3 * channels * pixels for channels, pixels in sizes.values())
    heads = 2 * 4 * 3 * 32
    assert saved_bytes(ours, x) == x.nbytes + maps + sum(outputs) + heads


def test_autocast_keeps_no_cast_weights():
    ours, _ = inception_pair(torch.float32)
    block = ours.first.branch2
    x = torch.randn(2, 16, 6, 6)
    with torch.autocast("cpu", torch.bfloat16):
        count = saved_bytes(block, x)
    assert count == 2 * x.numel() + 20 * (2 * 2 * 36 + 4 * 4)


@pytest.mark.parametrize("change", ["none", "hook", "bias", "eval", "frozen"])
def test_convolutions_on_one_map_run_as_one(change, monkeypatch):
    """The three 1x1 of a block; in the test's block the third is a sequence's first."""
    counts, convolve = [], convolution.convolve
    monkeypatch.setattr(convolution, "convolve", lambda *args: counts.append(1) or convolve(*args))
    ours, stock = inception_pair()
    for model in (ours, stock):
        block = model.first.branch3[0]
        if change == "hook":
            block.register_forward_hook(lambda *_: None)
        elif change == "bias":
            block.conv.bias = nn.Parameter(torch.linspace(-1, 1, 4).double())
        elif change == "eval":
            block.bn.eval()
        elif change == "frozen":
            block.requires_grad_(False)
    assert_equal(step(ours, image()), step(stock, image()))
    # The stem's, and of each block the siblings, two 3x3 and the projection.
    together = {"none": 9, "frozen": 9, "eval": 10}
    assert len(counts) == together.get(change, 11)


def test_maps_are_let_go_as_backward_passes():
    ours, _ = inception_pair(torch.float32)
    nodes, compute = [], recompute.RecomputeNode.value

    def value(node, leaves):
        nodes.append(node)
        return compute(node, leaves)

    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(recompute.RecomputeNode, "value", value)
        loss_of(ours(image(dtype=torch.float32))).backward()
    assert nodes and not any(node._value for node in nodes)


def test_an_output_pickles_without_its_graph():
    ours, _ = inception_pair()
    out = ours.first(torch.randn(2, 16, 6, 6, dtype=torch.float64))
    assert is_recomputed(out)
    file = io.BytesIO()
    torch.save(out, file)
    assert len(file.getvalue()) < 3 * out.nbytes
    file.seek(0)
    for twin in (torch.load(file), pickle.loads(pickle.dumps(out))):
        assert torch.equal(twin, out) and not is_recomputed(twin)
