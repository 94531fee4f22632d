"""Small networks of every block train as stock's do, whichever way autograd goes backward."""

import copy

import pytest
import torch
from torch import nn
from torch.utils.checkpoint import checkpoint

from cvkernels.nn.training import recompute
from cvkernels.nn.training.conv_bn_act import siblings
from tests.support.pairs import gradients, loss_of, step
from tests.support.training_nets import (
    BLOCKS,
    RESIDUAL,
    assert_same_results,
    each_block,
    each_network,
    image,
    training_pair,
)

# Parts of each network, one behind the other.
PARTS = {
    "dense": ["features.denseblock1", "features.denseblock2", "features.transition2"],
    "memory_efficient": ["features.denseblock1", "features.denseblock2", "features.transition2"],
    "inception": ["first", "second"],
    "bottleneck": ["layer1", "layer2", "layer3", "layer4"],
    "se-bottleneck": ["layer1", "layer2", "layer3", "layer4"],
    "mbconv": ["features.1", "features.2", "features.3"],
}


def seeded(model):
    def run(x):
        torch.manual_seed(5)
        return model(x)

    return run


def maps_of(model, x, parts):
    """What these parts of the model return, in the order of their calls."""
    maps = []
    handles = [
        model.get_submodule(part).register_forward_hook(lambda module, args, y: maps.append(y))
        for part in parts
    ]
    model(x)
    for handle in handles:
        handle.remove()
    return maps


@pytest.mark.few(10)
@each_network
def test_optimiser_steps(name, memory_format):
    x = image(name).contiguous(memory_format=memory_format)

    def run(model):
        optimiser, results = torch.optim.SGD(model.parameters(), 0.01, momentum=0.9), []
        for _ in range(3 if name in RESIDUAL else 10):
            results += step(model, x, run=seeded(model))
            optimiser.step()
        return results + [p.detach() for p in model.parameters()]

    assert_same_results(name, run, 1e-7 if name in RESIDUAL else 1e-8)


@each_block
def test_several_forwards_before_their_backwards(name):
    height, width = image(name).shape[2:]
    images = [image(name), image(name, batch=2) * 2, image(name, size=(height - 9, width - 3)) - 1]

    def run(model):
        losses = [loss_of(model(x)) for x in images]
        losses[1].backward(retain_graph=True)
        losses[1].backward()
        (losses[0] * 0.5 + losses[2]).backward()
        loss_of(model(images[0])).backward()
        return [*gradients(model), *model.buffers()]

    assert_same_results(name, run)


class Sink(torch.autograd.Function):
    """The first of several values for the loss; the others get no gradient, as from DDP's."""

    @staticmethod
    def forward(ctx, *values):
        ctx.set_materialize_grads(False)
        return values

    @staticmethod
    def backward(ctx, *grads):
        return grads


@each_network
def test_missing_gradients_stay_missing(name):
    """A head that the loss leaves out must not be moved by weight decay."""
    ours, stock = training_pair(name)
    missing = []
    for model in (ours, stock):
        unused, x = copy.deepcopy(model), image(name)
        used, _ = Sink.apply(model(x), unused(x))
        used.square().sum().backward()
        missing.append([p.grad is None for p in (*model.parameters(), *unused.parameters())])
    assert missing[0] == missing[1] and all(missing[0][len(missing[0]) // 2 :])


def test_one_of_several_convolutions_without_gradient():
    """Of those on one map that run as one."""
    blocks = [(nn.Conv2d(8, 6, 1, bias=False), nn.BatchNorm2d(6)) for _ in range(3)]
    modules = nn.ModuleList(part.double() for block in blocks for part in block)
    x = torch.randn(2, 8, 5, 4, dtype=torch.float64, requires_grad=True)
    outcomes = []
    for run in (siblings, lambda x, blocks: [bn(conv(x)).relu() for conv, bn in blocks]):
        outs = run(x, blocks)
        (outs[0].square().sum() + outs[2].sum()).backward()
        outcomes.append([x.grad, *(p.grad for p in modules.parameters())])
        x.grad = None
        modules.zero_grad()
    for ours, stock in zip(*outcomes, strict=True):
        assert (ours is None) == (stock is None)
        if ours is not None:
            torch.testing.assert_close(ours, stock)


@each_block
def test_a_retained_graph_gives_equal_gradients_twice(name):
    ours, _ = training_pair(name, torch.float32)
    x = image(name, torch.float32).requires_grad_()
    loss = loss_of(ours(x))
    buffers = [b.clone() for b in ours.buffers()]
    first, second = (
        torch.autograd.grad(loss, [x, *ours.parameters()], retain_graph=True) for _ in range(2)
    )
    assert all(map(torch.equal, first, second))
    assert all(map(torch.equal, buffers, ours.buffers()))


@each_block
def test_parts_of_the_graph(name):
    """Gradients in a map, in one weight, and of one use of a map leave the others right."""

    def run(model):
        first, second, *_ = maps_of(model, image(name).requires_grad_(), PARTS[name])
        weight = next(model.get_submodule(PARTS[name][1]).parameters())
        loss = second.square().sum() + first.pow(3).sum()
        parts = [
            torch.autograd.grad(part, leaf, retain_graph=True)[0]
            for part, leaf in (
                (second.square().sum(), first), (second.sum(), weight), (first.pow(3).sum(), first),
            )
        ]  # fmt: skip
        loss.backward(retain_graph=True)
        loss.backward()
        return [*parts, *gradients(model)]

    assert_same_results(name, run)


# Parts whose parameters need no gradient, and parameters in them that need one.
FROZEN = {
    "dense-some": (
        "dense", "denseblock1.denselayer1.norm2 denseblock2.denselayer2.conv1 transition1.norm", ""
    ),
    "dense-first-layers": ("dense", "conv0 denseblock1.denselayer1 denseblock1.denselayer2", ""),
    "dense-last-layer": ("dense", "denseblock1.denselayer3", ""),
    "dense-norms": (
        "dense", "denseblock1.denselayer1.norm1 denseblock1.denselayer2.norm1 norm0 norm5"
        " denseblock1.denselayer2.norm2 denseblock1.denselayer3.norm1 transition1.norm", "",
    ),
    "dense-all-but-one-norm": (
        "dense", "conv0 norm0 denseblock1 transition1 denseblock2 transition2 denseblock3 norm5",
        "features.denseblock1.denselayer1.norm1.weight",
    ),
    "inception-stem": ("inception", "stem", ""),
    "inception-convolutions": (
        "inception", "first.branch1.conv first.branch2.0.conv second.branch4.1.conv", ""
    ),
    "inception-norms": ("inception", "first.branch1.bn stem.0.bn second.branch3.0.bn", ""),
    "inception-all": ("inception", "stem first second fc side", ""),
    "stem": ("se-bottleneck", "conv1 bn1", ""),
    "stages": ("se-bottleneck", "conv1 bn1 layer1 layer2", ""),
    "shortcuts": ("se-bottleneck", "layer2.0.downsample layer3.0.downsample", ""),
    "ends": ("se-bottleneck", "layer1.1.conv3 layer1.1.bn3 layer2.1.bn3", ""),
    "norms": ("se-bottleneck", "layer1.0.bn1 layer1.1.bn2 layer2.0.bn2", ""),
    "excitation": ("se-bottleneck", "layer1.1.se layer2.0.se", ""),
}  # fmt: skip


@pytest.mark.parametrize("evaluated", [False, True], ids=["train", "eval"])
@pytest.mark.parametrize(("name", "frozen", "trained"), FROZEN.values(), ids=FROZEN.keys())
def test_frozen_parts(name, frozen, trained, evaluated):
    """Without gradients of their own, and with running statistics, as in fine-tuning."""
    prefix, x = "features." if name == "dense" else "", image(name)

    def run(model):
        for part in frozen.split():
            model.get_submodule(prefix + part).requires_grad_(False).train(not evaluated)
        for parameter in trained.split():
            model.get_parameter(parameter).requires_grad_()
        results = step(model, x)
        if any(p.requires_grad for p in model.parameters()):
            model.zero_grad()
            loss_of(model(x)).backward()  # where the image needs no gradient either
        return results + gradients(model)

    assert_same_results(name, run)


class Checkpointed(nn.Module):
    def __init__(self, module, reentrant):
        super().__init__()
        self.module, self.reentrant = module, reentrant

    def forward(self, x):
        return checkpoint(self.module, x, use_reentrant=self.reentrant)


@pytest.mark.parametrize("reentrant", [False, True], ids=["checkpoint", "reentrant"])
@each_block
def test_checkpointed_parts(name, reentrant):
    def run(model):
        for part in PARTS[name]:
            model.set_submodule(part, Checkpointed(model.get_submodule(part), reentrant))
        results = step(model, image(name))
        # It recomputes up to the last tensor that backward needs, and only as far the statistics:
        # in a dense block another tensor than in stock's.
        ends_early = BLOCKS[name][0] == "features.denseblock1" and not reentrant
        return results[: -len(list(model.buffers()))] if ends_early else results

    assert_same_results(name, run)


@each_block
def test_saved_tensors_may_lie_elsewhere(name):
    def run(model):
        def forward(x):
            with torch.autograd.graph.save_on_cpu():
                return model(x)

        return step(model, image(name), run=forward)

    assert_same_results(name, run)


@each_block
def test_no_gradient_keeps_nothing_and_updates_statistics(name):
    def run(model):
        with torch.no_grad():
            out = model(image(name))
        assert not out.requires_grad
        return [out, *model.buffers()]

    assert_same_results(name, run)


@pytest.mark.parametrize("written", ["map", "weight"])
@each_block
def test_writing_what_autograd_needs_is_refused(name, written):
    """Of a block: a weight, and its image, which a dense block copies into memory of its own."""
    block, channels = BLOCKS[name]
    if written == "map" and "dense" in block:
        pytest.skip("it keeps a copy of its image")
    block, x = training_pair(name)[0].get_submodule(block), image(name, channels=channels)
    out, weight = block(x), next(p for p in block.parameters() if p.dim() == 4)
    with torch.no_grad():
        {"map": x, "weight": weight}[written].mul_(2)
    with pytest.raises(RuntimeError, match="modified by an inplace operation"):
        out.sum().backward()


# What is computed again


# Parts that no other one in the list is fused with.
WATCHED = {
    "inception-blocks": ("inception", ["stem", "first", "pool"]),
    "inception-convolution": ("inception", ["stem.0"]),
    "bottleneck": ("bottleneck", None),
    "se-bottleneck": ("se-bottleneck", None),
    "legacy": ("legacy", None),
    "mbconv": ("mbconv", None),
    "timm-mbconv": ("timm-mbconv", None),
}


def blocks_of(model):
    """The names of its blocks and sequences: no parts of what a block fuses."""
    return [
        name
        for name, module in model.named_modules()
        if type(module).__module__.startswith("cvkernels.nn")
        or type(module).__name__ == "Sequential"  # patched or not
    ]


@pytest.mark.parametrize(("name", "watched"), WATCHED.values(), ids=WATCHED.keys())
def test_what_is_recomputed_is_bit_equal(name, watched):
    ours, _ = training_pair(name, torch.float32)
    maps = maps_of(ours, image(name, torch.float32), watched or blocks_of(ours))
    maps = [y for y in maps if isinstance(y, torch.Tensor) and recompute.recompute_of(y)]
    assert len(maps) >= (len(watched) if watched else 3)
    for y in maps:
        how = y._cvkernels_recompute
        assert torch.equal(how.node.value(how.saved), y)


@pytest.mark.parametrize("name", ["inception", "bottleneck", "se-bottleneck", "mbconv"])
def test_maps_are_let_go_as_backward_passes(name, monkeypatch):
    ours, _ = training_pair(name, torch.float32)
    nodes, value = [], recompute.RecomputeNode.value
    monkeypatch.setattr(
        recompute.RecomputeNode,
        "value",
        lambda node, leaves: nodes.append(node) or value(node, leaves),
    )
    loss_of(ours(image(name, torch.float32))).backward()
    assert nodes and not any(node._value for node in nodes)


# Half precision


@pytest.mark.few(4)
@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16], ids=str)
@each_block
def test_autocast_is_as_near_as_stock(name, dtype):
    """Twice stock's own distance from float64, of the output and on the mean over gradients."""
    ours, stock = training_pair(name)
    exact, distances = copy.deepcopy(stock), []
    for index in range(1, 5):
        truth = step(exact, image(name) * index)
        for model in (ours.float(), stock.float()):

            def forward(x, model=model):
                with torch.autocast("cpu", dtype):
                    return model(x).float()

            results = step(model, image(name, torch.float32) * index, run=forward)
            out, *rest = [
                (actual.double() - t).norm() / t.norm()
                for actual, t in zip(results, truth, strict=True)
                if t is not None and t.is_floating_point() and t.norm() > 1e-9
            ]
            distances.append(torch.stack([out, torch.stack(rest).mean()]))
    actual, eager = torch.stack(distances).view(4, 2, 2).mean(0)
    assert (actual <= 2 * eager + torch.finfo(dtype).eps).all(), (actual, eager)
