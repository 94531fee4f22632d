"""What autograd keeps of a training pass: the convolutions' outputs, and little else."""

import io
import pickle

import pytest
import torch
from torch import nn

import cvkernels
from cvkernels import backend
from cvkernels.nn import Bottleneck, DenseBlock, DenseLayer
from cvkernels.nn.training import recompute
from tests.support.autograd_memory import megabytes_per_image, saved_bytes
from tests.support.pairs import assert_equal
from tests.support.training_nets import (
    image,
    is_recomputed,
    stock_densenet,
    training_pair,
)

# Of 224 x 224 in bfloat16.
MEGABYTES = {
    "googlenet": 8,
    "resnet18": 5.4,
    "resnet50": 22.7,
    "densenet121": 15,
    "seresnet50": 22.8,
    "efficientnet_b0": 14.4,
}


@pytest.mark.parametrize("patched", [False, True], ids=["builder", "patched"])
@pytest.mark.parametrize(("name", "most"), MEGABYTES.items(), ids=MEGABYTES)
def test_megabytes_per_image(name, most, patched):
    options = {"init_weights": False} if name == "googlenet" else {}
    if not patched:
        model = cvkernels.create_model(name, **options)
    else:
        library = pytest.importorskip("timm" if name == "seresnet50" else "torchvision")
        model = getattr(library.models, name)(**options)
        cvkernels.patch(model)
    assert megabytes_per_image(model) <= most
    if name == "densenet121":
        for layer in model.modules():
            if isinstance(layer, DenseLayer):
                layer.memory_efficient = True
        assert megabytes_per_image(model) <= 6


@pytest.mark.parametrize(
    "name", ["dense-patched", "timm-dense", "inception", "bottleneck", "se-bottleneck", "mbconv"]
)
def test_less_is_kept_than_by_stock(name):
    ours, stock = training_pair(name)
    most = 0.5 if "dense" in name else 0.75
    assert saved_bytes(ours, image(name)) < most * saved_bytes(stock, image(name))


@pytest.mark.parametrize("memory_efficient", [False, True], ids=["plain", "memory_efficient"])
def test_saved_memory_grows_linearly_with_depth(memory_efficient):
    channels, growth, x = 8, 4, torch.randn(2, 8, 5, 6, requires_grad=True)
    maps = [
        saved_bytes(DenseBlock(layers, channels, 2, growth, 0.0, memory_efficient), x)
        for layers in (4, 8, 16)
    ]
    assert maps[2] - maps[1] == 2 * (maps[1] - maps[0])
    stock = stock_densenet._DenseBlock(16, channels, 2, growth, 0.0)
    assert maps[2] < 0.25 * saved_bytes(stock, x)


def test_only_convolution_outputs_are_kept():
    ours, _ = training_pair("inception", torch.float32)
    x = image("inception", torch.float32)
    norms = [m for m in ours.modules() if isinstance(m, nn.BatchNorm2d)]
    vectors = sum(4 * 4 * norm.num_features for norm in norms)  # mean, variance, weight and bias
    sizes = {"stem": (16, 13 * 12), "first": (8 + 8 + 12 + 4 + 8 + 4, 6 * 6)}
    sizes["second"] = (8 + 8 + 8 + 4 + 8 + 8, 3 * 3)
    maps = sum(4 * 3 * channels * pixels for channels, pixels in sizes.values())
    heads = 2 * 4 * 3 * 32
    assert saved_bytes(ours, x) == x.nbytes + maps + vectors + heads


@pytest.mark.parametrize("name", ["inception", "se-bottleneck", "dense"])
def test_an_input_that_is_recomputed_is_saved_without_its_data(name):
    """It is saved for derivatives of gradients, first."""
    ours, _ = training_pair(name)
    kinds = ("_ConvBNActBackward", "_ExciteBackward", "_DenseBlockBackward")
    found, nodes = [], [ours(image(name).requires_grad_()).grad_fn]
    seen = set(nodes)
    while nodes:
        node = nodes.pop()
        if node.name() in kinds:
            found.append(node.saved_tensors[0].untyped_storage().nbytes())
        above = {above for above, _ in node.next_functions if above is not None} - seen
        seen |= above
        nodes += above
    assert found and not any(found)


def test_autocast_keeps_no_cast_weights():
    ours, _ = training_pair("inception", torch.float32)
    x = torch.randn(2, 16, 6, 6)
    with torch.autocast("cpu", torch.bfloat16):
        count = saved_bytes(ours.first.branch2, x)
    assert count == 2 * x.numel() + 20 * (2 * 2 * 36 + 4 * 4)


def test_an_output_pickles_without_its_graph():
    ours, _ = training_pair("inception")
    out = ours.first(torch.randn(2, 16, 6, 6, dtype=torch.float64))
    assert is_recomputed(out)
    file = io.BytesIO()
    torch.save(out, file)
    assert len(file.getvalue()) < 3 * out.nbytes
    file.seek(0)
    for twin in (torch.load(file), pickle.loads(pickle.dumps(out))):
        assert torch.equal(twin, out) and not is_recomputed(twin)


# Chains of blocks


def test_the_end_of_a_long_chain_is_kept():
    first = Bottleneck(4, 2, downsample=cvkernels.nn.ConvBNAct(4, 8, 1))
    chain = nn.Sequential(first, *(Bottleneck(8, 2) for _ in range(80))).double().train()
    x, counts = torch.randn(2, 4, 5, 5, dtype=torch.float64), []
    y = x
    for block in chain:
        y = block(y)
        assert is_recomputed(y)
        counts.append(len(y._cvkernels_recompute.saved))
    assert max(counts) <= recompute.MOST_SAVED + 2 and min(counts[1:]) < 6
    grads = []
    for name in ("auto", "reference"):
        with backend.use(name):
            leaf = x.clone().requires_grad_()
            chain(leaf).square().sum().backward()
            grads.append([leaf.grad, *(p.grad.clone() for p in chain.parameters())])
            chain.zero_grad()
    assert_equal(*grads, 1e-7)


def test_what_is_copied_when_saved_is_copied_about_once():
    """On the CPU, say: each block of a chain would keep the chain before it."""
    chain = nn.Sequential(*(Bottleneck(16, 4) for _ in range(12))).train()
    x, sizes = torch.randn(2, 16, 8, 8), []
    for name in ("auto", "reference"):
        packed = []
        hooks = torch.autograd.graph.save_on_cpu()
        pack = hooks.pack_hook

        def counted(tensor, packed=packed, pack=pack):
            packed.append(tensor.nbytes)
            return pack(tensor)

        counted.__qualname__ = pack.__qualname__
        hooks.pack_hook = counted
        with backend.use(name), hooks:
            chain(x)
        sizes.append(sum(packed))
    assert sizes[0] <= 1.1 * sizes[1]
