"""Dense and inception blocks in one buffer: equal to stock, and stock where a caller looks."""

import copy
import importlib

import pytest
import torch
from torch import nn

import cvkernels
from cvkernels import backend
from cvkernels.nn import DenseBlock, FusedSequential, Inception, Transition
from tests.support import pairs
from tests.support.numerics import assert_matches_module
from tests.support.pairs import pair, with_statistics

stock_dense = pytest.importorskip("torchvision.models.densenet")
# The name torchvision.models.googlenet is the builder's too.
stock_inception = importlib.import_module("torchvision.models.googlenet").Inception

# Stock's class and ours, their arguments and the channels of an image. A dense block has three
# layers, each of which adds 8 channels.
BLOCKS = {
    "dense": (stock_dense._DenseBlock, DenseBlock, (3, 16, 2, 8, 0.0), 16),
    "inception": (stock_inception, Inception, (24, 16, 12, 20, 8, 16, 8), 24),
    "transition": (stock_dense._Transition, Transition, (16, 6), 16),
}
each_block = pytest.mark.parametrize("name", ["dense", "inception"])


def blocks(name):
    """(ours, stock) in eval with one state."""
    stock, ours, arguments, _ = BLOCKS[name]
    return pair(with_statistics(stock(*arguments)), ours(*arguments).eval())


def image(name, batch=2, size=(7, 6), **kwargs):
    return pairs.image(batch, size, channels=BLOCKS[name][-1], **kwargs)


def explained(module, x):
    """The ops of module(x), and the reasons for them as one text."""
    with torch.no_grad():
        rows = cvkernels.explain(module, x).rows
    return [row.op for row in rows], str({row.reason for row in rows})


def assert_close(ours, stock, x, tolerance=1e-5):
    with torch.no_grad():
        assert torch.allclose(ours(x), stock(x), atol=tolerance)


# The same numbers


@pytest.mark.parametrize("dtype", [torch.float32, torch.float16, torch.bfloat16], ids=str)
@pytest.mark.parametrize("size", [(2, 6, 7), (1, 1, 1)], ids=str)
@each_block
def test_matches_stock(name, size, dtype, memory_format, device):
    ours, stock = (module.to(device, dtype) for module in blocks(name))
    x = image(name, size[0], size[1:], dtype=dtype, device=device)
    x = x.contiguous(memory_format=memory_format)
    before = x.clone()
    for _ in range(3):  # the first call, the one that plans, and one by a kept plan
        assert_matches_module(ours, stock, x, grad=False)
    assert torch.equal(x, before)
    assert "aten.cat" not in explained(ours, x)[0]


@each_block
def test_float64(name, memory_format):
    ours, stock = (module.double() for module in blocks(name))
    x = image(name, dtype=torch.float64).contiguous(memory_format=memory_format)
    with torch.no_grad():
        torch.testing.assert_close(ours(x), stock(x), rtol=1e-12, atol=1e-12)


@pytest.mark.parametrize("requested", ["reference", "triton", "onednn"])
@each_block
def test_requested_backends(name, requested):
    if requested == "triton":
        pytest.importorskip("triton")
    device = "cuda" if torch.cuda.is_available() and requested != "onednn" else "cpu"
    ours, stock = (block.to(device) for block in blocks(name))
    x = image(name, device=device)
    with backend.use(requested):
        for _ in range(2):
            assert_matches_module(ours, stock, x, grad=False)
        assert "aten.cat" not in explained(ours, x)[0]
    assert_matches_module(ours, stock, x, grad=False)


@each_block
def test_every_call_has_a_buffer_of_its_own(name):
    ours, stock = blocks(name)
    images = [image(name), image(name), image(name, 1, (9, 4)), image(name)]
    images += [x.contiguous(memory_format=torch.channels_last) for x in images]
    with torch.no_grad():
        outputs = [ours(x) for x in images]
        for x, out in zip(images, outputs, strict=True):
            assert torch.allclose(out, stock(x), atol=1e-5)
            assert out.stride() == stock(x).stride()


@each_block
def test_inference_mode_and_autocast(name):
    ours, stock = blocks(name)
    x = image(name)
    with torch.inference_mode():
        for _ in range(2):
            assert torch.allclose(ours(x), stock(x), atol=1e-5)
    with torch.autocast("cpu", torch.bfloat16), torch.no_grad():
        for _ in range(2):
            assert (ours(x) - stock(x)).abs().max() < 0.1
        assert "aten.cat" in explained(ours, x)[0]


@each_block
def test_gradients_are_stocks(name):
    assert_matches_module(*blocks(name), image(name))


@each_block
def test_loads_and_copies_are_followed(name):
    ours, stock = blocks(name)
    x = image(name)
    with torch.no_grad():
        ours(x), ours(x)
        ours.load_state_dict(with_statistics(stock).state_dict())
        assert_close(ours, stock, x)
        twin = copy.deepcopy(ours)
        assert not any("_derived" in module.__dict__ for module in twin.modules())
        assert torch.equal(twin(x), ours(x))


@pytest.mark.parametrize("name", ["dense", "inception", "timm-dense"])
def test_stock_blocks_are_patched(name):
    if name == "timm-dense":
        timm = pytest.importorskip("timm.models.densenet")
        name, stock = "dense", with_statistics(timm.DenseBlock(*BLOCKS["dense"][2][:4]))
    else:
        stock = blocks(name)[1]
    model = nn.Sequential(copy.deepcopy(stock))
    cvkernels.patch(model)
    for _ in range(2):
        assert_matches_module(model[0], stock, image(name), grad=False)
    assert "aten.cat" not in explained(model, image(name))[0]
    cvkernels.restore(model)
    assert type(model[0]) is type(stock)


# Where the parts are called


PARTS = {
    "dense": "denselayer2 denselayer2.norm1 denselayer2.relu1 denselayer2.conv1 denselayer2.norm2"
    " denselayer2.relu2 denselayer2.conv2",
    "inception": "branch2 branch4 branch4.0 branch1 branch2.0 branch2.1 branch3.0 branch3.1"
    " branch4.1 branch1.conv branch3.0.bn",
}


@pytest.mark.parametrize(
    ("name", "hooked"), [(name, part) for name, parts in PARTS.items() for part in parts.split()]
)
def test_a_hook_is_called_with_what_it_sees_in_stock(name, hooked):
    ours, stock = blocks(name)
    x, seen = image(name), []
    with torch.no_grad():
        ours(x), ours(x)  # a plan must not outlive the hook
        for module in (ours, stock):
            module.get_submodule(hooked).register_forward_hook(
                lambda module, args, out: seen.append(out.clone())
            )
            module(x)
        torch.testing.assert_close(*seen, atol=1e-5, rtol=1e-5)
    assert "has a hook" in explained(ours, x)[1]


def set_to(attribute, value):
    """A change of a module; ``value`` may be a function of the module."""

    def change(module):
        new = value(module) if callable(value) and not isinstance(value, nn.Module) else value
        setattr(module, attribute, copy.deepcopy(new))

    return change


def dilated(conv):
    conv.dilation, conv.padding = (2, 2), (2, 2)


def tripled(module):
    module.weight = nn.Parameter(module.weight * 3)


def pointed_elsewhere(module):
    module.weight.data = module.weight.data * 2


def with_bias(conv):
    conv.bias = nn.Parameter(torch.ones(conv.out_channels))


def statistics_written(norm):
    norm.running_var.mul_(2)


# A part, its change, and why the block then calls its parts as modules, None where it does not.
CHANGES = {
    "dense": {
        "act": ("denselayer2", set_to("relu2", nn.Hardswish()), ""),
        "norm": ("denselayer2", set_to("norm1", nn.GroupNorm(4, 24)), ""),
        "batch-statistics": ("denselayer2.norm2", nn.Module.train, ""),
        "dilation": ("denselayer2.conv2", dilated, None),
        "eps": ("denselayer2.norm1", set_to("eps", 0.5), None),
        "data": ("denselayer2.conv1", pointed_elsewhere, None),
        "in-place": ("denselayer2.norm1", statistics_written, None),
        "parameter": ("denselayer2.norm2", tripled, None),
        "module": ("denselayer2", set_to("norm1", lambda layer: layer.norm1), None),
        "bias": ("denselayer2.conv2", with_bias, None),
    },
    "inception": {
        "norm": ("branch1", set_to("bn", nn.GroupNorm(4, 16)), "GroupNorm"),
        "batch-statistics": ("branch3.0.bn", nn.Module.train, "batch statistics"),
        "block": ("", set_to("branch1", nn.Conv2d(24, 16, 1)), "Conv2d is no conv"),
        "longer-branch": ("branch2", lambda part: part.append(nn.Softplus()), "sequence of two"),
        "pool": ("branch4", set_to("0", nn.AvgPool2d(3, 1, 1)), "AvgPool2d is not exactly"),
        "eps": ("branch1.bn", set_to("eps", 0.5), "differ in their form"),
        "sibling-bias": ("branch1.conv", with_bias, "bias"),
        "data": ("branch1.conv", pointed_elsewhere, None),
        "in-place": ("branch2.0.bn", statistics_written, None),
        "parameter": ("branch3.0.bn", tripled, None),
        "later-bias": ("branch2.1.conv", with_bias, None),
    },
}  # fmt: skip
CHANGE_CASES = {
    f"{name}-{what}": (name, *change)
    for name, changes in CHANGES.items()
    for what, change in changes.items()
}


@pytest.mark.parametrize(
    ("name", "part", "change", "reason"), CHANGE_CASES.values(), ids=CHANGE_CASES.keys()
)
def test_changes_between_calls_are_followed(name, part, change, reason):
    ours, stock = blocks(name)
    x = image(name)
    with torch.no_grad():
        for _ in range(2):
            before = ours(x)
        for block in (ours, stock):
            change(block.get_submodule(part))
        for _ in range(2):
            assert_close(ours, stock, x, 1e-4)
        same = change is CHANGES["dense"]["module"][1]
        assert same == torch.allclose(ours(x), before, atol=1e-4)
    ops, reasons = explained(ours, x)
    assert ("aten.cat" in ops) == (reason is not None)
    assert (reason or "") in reasons


# Dense blocks alone


def test_a_foreign_layer_is_called():
    class Foreign(nn.Module):
        def forward(self, inputs):
            return torch.cat(inputs, 1)[:, :8]

    ours, stock = blocks("dense")
    ours["denselayer2"] = stock["denselayer2"] = Foreign()
    assert_close(ours, stock, image("dense"))
    assert "Foreign is no dense layer of cvkernels" in explained(ours, image("dense"))[1]


def test_dropout_is_stocks():
    ours, stock = blocks("dense")
    for block in (ours, stock):
        for module in block.modules():
            module.drop_rate = 0.5
            module.training = not isinstance(module, nn.BatchNorm2d)
    for layout in (torch.contiguous_format, torch.channels_last):
        x = image("dense").contiguous(memory_format=layout)
        assert_matches_module(ours, stock, x, grad=False)
    assert "dropout is active" in explained(ours, x)[1]


# Transitions


@pytest.mark.parametrize("dtype", [torch.float32, torch.float16, torch.bfloat16], ids=str)
def test_transition_matches_stock(dtype, memory_format, device):
    ours, stock = (module.to(device, dtype) for module in blocks("transition"))
    x = image("transition", size=(9, 6), dtype=dtype, device=device)
    assert_matches_module(ours, stock, x.contiguous(memory_format=memory_format), grad=False)
    ops = explained(ours, x)[0]
    assert ops[0] == "avg_pool" and not [op for op in ops if "norm" in op or "avg_pool2d" in op]


POOLS = {
    "padded": nn.AvgPool2d(3, 2, 1),
    "divisor": nn.AvgPool2d(2, divisor_override=3),
    "max": nn.MaxPool2d(2),
    "ceil": nn.AvgPool2d(2, ceil_mode=True),
    "overlapping": nn.AvgPool2d((3, 2), (1, 2)),
}


@pytest.mark.parametrize(("kind", "pool"), POOLS.items(), ids=POOLS.keys())
def test_transition_with_another_pool(kind, pool):
    ours, stock = blocks("transition")
    ours.pool = stock.pool = pool
    x = image("transition", size=(9, 7))
    assert_matches_module(ours, stock, x, grad=False)
    assert (explained(ours, x)[0][0] == "avg_pool") == (kind in ("ceil", "overlapping"))


def test_transition_that_was_extended_runs_what_was_added():
    ours, stock = blocks("transition")
    for module in (ours, stock):
        module.add_module("scale", nn.Softplus())
    assert_matches_module(ours, stock, image("transition", size=(8, 8)), grad=False)


# Inception blocks alone


def test_siblings_are_one_convolution_and_nothing_is_concatenated():
    ours, _ = blocks("inception")
    # On CUDA nothing derived from weights is kept, merged ones neither.
    planned = torch.empty(2, 24, 7, 6, dtype=torch.bfloat16, device="meta")
    for x, convolutions in ((image("inception"), 4), (planned, 6)):
        # The copy lays the result out for the caller, who is no block of ours.
        ops = ["aten.clone", *["conv_bn_act"] * convolutions, "max_pool"]
        assert sorted(explained(ours, x)[0]) == ops


def test_a_convolution_block_of_another_kind_is_called():
    def separable(in_channels, out_channels, **kwargs):
        return nn.Sequential(nn.Conv2d(in_channels, out_channels, **kwargs), nn.Sigmoid())

    block, x = Inception(*BLOCKS["inception"][2], conv_block=separable).eval(), image("inception")
    with torch.no_grad():
        assert torch.equal(block(x), torch.cat(block._forward(x), 1))


# Sequences


def dense_sequence(block, transition, sequence):
    return sequence(
        nn.Conv2d(3, 16, 3), nn.BatchNorm2d(16), nn.ReLU(), nn.MaxPool2d(3, 2, 1),
        block(2, 16, 2, 8, 0.0), transition(32, 12), block(2, 12, 2, 8, 0.0), nn.BatchNorm2d(28),
    )  # fmt: skip


def test_a_sequence_copies_nothing():
    stock = dense_sequence(stock_dense._DenseBlock, stock_dense._Transition, nn.Sequential)
    ours, stock = pair(
        with_statistics(stock), dense_sequence(DenseBlock, Transition, FusedSequential).eval()
    )
    x = torch.randn(2, 3, 17, 19)
    assert_matches_module(ours, stock, x, grad=False)
    meta = torch.empty(8, 3, 64, 64, dtype=torch.bfloat16, device="meta")
    assert not [op for op in explained(ours, meta)[0] if "copy" in op or "cat" in op]
    seen = []
    for layer in ("3", "4", "5", "6"):
        handle = ours.get_submodule(layer).register_forward_hook(lambda *_: seen.append(1))
        assert_matches_module(ours, stock, x, grad=False)
        handle.remove()
    assert len(seen) == 4


def test_two_inception_blocks_behind_each_other_in_triton():
    pytest.importorskip("triton")
    device = "cuda" if torch.cuda.is_available() else "cpu"
    arguments = (24, 8, 8, 8, 8, 8, 8), (32, 16, 8, 16, 8, 16, 8)
    stock, ours = (
        nn.Sequential(*(kind(*a) for a in arguments)).eval()
        for kind in (stock_inception, Inception)
    )
    ours, stock = (model.to(device) for model in pair(with_statistics(stock), ours))
    with backend.use("triton"):
        assert_matches_module(ours, stock, image("inception", 1, (5, 4), device=device), grad=False)


@pytest.mark.parametrize(
    ("model", "x", "layers"),
    [
        (
            lambda: dense_sequence(DenseBlock, Transition, FusedSequential),
            torch.randn(2, 3, 33, 33),
            {"4.denselayer2.conv2", "5.conv"},
        ),
        (
            lambda: nn.Sequential(Inception(*BLOCKS["inception"][2])),
            image("inception"),
            {"0.branch1.conv", "0.branch2.1.conv"},
        ),
    ],
    ids=["dense", "inception"],
)
def test_verify_knows_the_layers(model, x, layers):
    verified = cvkernels.verify(with_statistics(model()), x)
    assert verified.ok and layers <= {row.layer for row in verified.rows}
