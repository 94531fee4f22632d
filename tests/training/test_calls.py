"""Training in others' hands: hooks, replaced parts, transforms, refusals."""

import copy

import pytest
import torch
from torch import nn

import cvkernels
from cvkernels import backend
from cvkernels.nn import BasicConv2d, Bottleneck, Inception
from cvkernels.nn.fused.match import relu_
from cvkernels.nn.training import dense_block, match
from tests.support.pairs import assert_equal, loss_of, pair, step
from tests.support.training_nets import (
    FIRST,
    assert_same_results,
    each_block,
    efficientnet,
    image,
    is_recomputed,
    training_pair,
)

# Hooks


def half_as_much_again(module, args, out):
    return out * 1.5


def half_in_place(module, args, out):
    out.mul_(0.5)


def half(module, args, out):
    return out * 0.5


@torch.no_grad()
def more_in_place(module, args, out):
    out.add_(0.25)


# Hooks on ours and on stock, and the parts that they are on: stock's ReLU in place keeps its
# output, and lets no hook write it.
WRITTEN = {
    "inception-replaced": (
        "inception", half_as_much_again, half_as_much_again, ["stem.0", "first", "first.branch1"]
    ),
    "inception-past-autograd": ("inception", more_in_place, more_in_place, ["first"]),
    "inception-in-place": ("inception", half_in_place, half, ["first"]),
    "bottleneck-replaced": (
        "bottleneck", half_as_much_again, half_as_much_again,
        ["layer1.0", "layer1", "layer2.0.bn2"],
    ),
    "bottleneck-in-place": ("bottleneck", half_in_place, half, ["layer1.1", "layer2.1"]),
    "mbconv-in-place": ("mbconv", half_in_place, half, ["features.1.0", "features.2.1"]),
    "dense-in-place": ("dense", half_in_place, half, ["features.denseblock1"]),
    "memory_efficient-in-place": (
        "memory_efficient", half_in_place, half, ["features.denseblock2"]
    ),
}  # fmt: skip


@pytest.mark.parametrize(
    ("name", "our_hook", "stock_hook", "parts"), WRITTEN.values(), ids=WRITTEN.keys()
)
def test_hooks_that_change_an_output(name, our_hook, stock_hook, parts):
    pair = training_pair(name)
    for model, hook in zip(pair, (our_hook, stock_hook), strict=True):
        for part in parts:
            model.get_submodule(part).register_forward_hook(hook)
    assert_equal(*(step(model, image(name)) for model in pair), 1e-9)


@pytest.mark.parametrize(
    ("name", "part"),
    [
        ("inception", "first.branch1.conv"),
        ("inception", "first.branch3.0.bn"),
        ("inception", "first.branch4.0"),
        ("inception", "first.branch2"),
        ("inception", "stem.1"),
        ("bottleneck", "layer2.0.downsample"),
        ("se-bottleneck", "layer1.1.conv3"),
        ("mbconv", "features.2.0.block.1"),
        ("timm-mbconv", "blocks.1.1.bn3.act"),
        ("timm-mbconv", "blocks.1.1.bn3.drop"),
    ],
)
def test_hooks_inside_see_what_they_see_in_stock(name, part):
    def run(model):
        seen, module = [], model.get_submodule(part)
        module.register_forward_hook(lambda module, args, out: seen.append(out.clone()))
        if not isinstance(module, nn.BatchNorm2d):  # a ReLU in place follows, which forbids it
            module.register_full_backward_hook(lambda m, g, out: seen.append(out[0].clone()))
        return [*step(model, image(name)), *seen]

    assert_same_results(name, run)


# Maps written in place


# Of each network, modules that run one behind the other, by the name of what holds them; and the
# channels of the first one's input.
CHAINS = {
    "dense": (["features"], 3),
    "memory_efficient": (["features"], 3),
    "dense-patched": (["features"], 3),
    "timm-dense": (["features"], 3),
    "inception": (["stem", "first", "pool", "second"], 3),
    "basic": (["layer1", "layer2"], 64),
    "se-bottleneck": (["layer1", "layer2"], 64),
    "legacy": (["layer1", "layer2"], 64),
    "mbconv": (["features"], 3),
    "fused-mbconv": (["features"], 3),
    "timm-mbconv": (["blocks.0", "blocks.1"], 32),
}
# In place as ours, and as another tensor for stock: a block of it may keep its output, for a ReLU.
WRITES = (
    (lambda h: h.mul_(1.5), lambda h: h * 1.5),
    (lambda h: h.sigmoid_(), lambda h: h.sigmoid()),
    (
        lambda h: h.index_fill_(1, torch.tensor([1]), 0.0),
        lambda h: h.index_fill(1, torch.tensor([1]), 0.0),
    ),
)


def chain(model, name):
    """The modules of CHAINS, blocks whole."""
    parts = [model.get_submodule(part) for part in CHAINS[name][0]]
    return [m for part in parts for m in (part if isinstance(part, nn.Sequential) else [part])]


def small_image(name):
    return image(name, channels=CHAINS[name][1], size=(24, 20) if CHAINS[name][1] == 3 else (8, 6))


def step_through(model, name, call):
    """:func:`step` of ``h = call(index, module, h)`` for each module of the chain."""

    def through(h):
        h = h * 1
        for index, module in enumerate(chain(model, name)):
            h = call(index, module, h)
        return h

    return step(model, small_image(name), run=through)


@pytest.mark.parametrize("name", CHAINS)
def test_a_caller_may_write_each_output(name):
    def run(model, in_place):
        def call(index, module, h):
            h = module(h)
            if isinstance(module, (nn.ReLU, nn.BatchNorm2d)):  # a ReLU keeps its output
                return h
            return WRITES[index % len(WRITES)][0 if in_place else 1](h)

        return step_through(model, name, call)

    ours, stock = training_pair(name)
    assert_equal(run(ours, True), run(stock, False), 1e-8)


@pytest.mark.parametrize("name", CHAINS)
def test_an_input_written_afterwards_is_refused_or_does_not_count(name):
    """Stock refuses it where it kept the input; ours may have kept what the input came from."""

    def run(model, written):
        def call(index, module, h):
            y = module(h)
            if index == written:
                h.add_(1)
            return y

        return step_through(model, name, call)

    ours, stock = training_pair(name)
    state = copy.deepcopy(ours.state_dict())
    expected = run(stock, None)
    for index in range(len(chain(stock, name))):
        ours.load_state_dict(state)
        try:
            assert_equal(run(ours, index), expected, 1e-8)
        except RuntimeError as error:
            assert "modified by an inplace operation" in str(error)


def test_a_shortcut_written_once_its_block_has_added_it_does_not_count():
    """Stock refuses it. The block's output is kept then, and not computed from it again."""
    configuration = efficientnet.MBConvConfig(2, 3, 1, 8, 8, 2)
    blocks = [efficientnet.MBConv(configuration, 0.0, nn.BatchNorm2d) for _ in range(2)]
    ours, stock = pair(nn.Sequential(*blocks), dtype=torch.float64)

    def run(model, written):
        # Nor is its input kept for this gradient.
        model[0].block[0][0].weight.requires_grad_(False)

        def through(x):
            h = x * 1
            y = model[0](h)
            if written:
                h.mul_(2)
            return model[1](y).flatten(1)

        return step(model, image("mbconv", channels=8, size=(6, 5)), run=through)

    assert_equal(run(ours, True), run(stock, False), 1e-9)


def test_a_transition_with_a_hook_may_write_its_input():
    def run(model):
        hook = lambda module, args: args[0].mul_(2)  # noqa: E731
        model.features.transition1.register_forward_pre_hook(hook)
        model.features.transition2.norm.eval().register_forward_pre_hook(hook)
        return step(model, image("dense"))

    assert_same_results("dense", run, 1e-8)


# Parts that are not as a block makes them


def set_to(attribute, value):
    return lambda module: setattr(module, attribute, copy.deepcopy(value))


def hooked(module):
    module.register_forward_hook(lambda *_: None)


def registered_again(module):
    """What ``prune.remove`` and ``remove_parametrizations`` leave: the weight is the last one."""
    weight = module.weight
    del module.weight
    module.weight = weight


def with_extra_parameter(conv):
    conv.register_parameter("extra", nn.Parameter(torch.ones(1)))


def with_bias(conv):
    conv.bias = nn.Parameter(torch.linspace(-1, 1, conv.out_channels).double())


def with_forward(conv):
    conv.forward = lambda x: type(conv).forward(conv, x) * 2


class OtherNorm(nn.BatchNorm2d):
    pass


def other_norm(layer):
    layer.norm1 = OtherNorm(layer.norm1.num_features).eval()


# By network and block: a part ("" for the block), its change, and why there is no training it, ""
# where a reason is not given or not needed.
LAYER = "features.denseblock1.denselayer"
OTHERS = {
    ("dense", ""): {
        "evaluated": (f"{LAYER}2.norm1", nn.Module.eval, "running statistics"),
        "subclassed": (f"{LAYER}2", other_norm, "OtherNorm is not exactly nn.BatchNorm2d"),
        "dropping": (f"{LAYER}2", set_to("drop_rate", 0.5), "dropout is active"),
        "hooked": (f"{LAYER}2.relu1", hooked, "ReLU has a hook"),
        # A full backward hook cannot stand before an in-place ReLU, in stock either.
        "backward-hooked": (
            f"{LAYER}3.conv2",
            lambda conv: conv.register_full_backward_hook(lambda *_: None),
            "Conv2d has a hook",
        ),
        "activation": (f"{LAYER}1", set_to("relu2", nn.SiLU()), "SiLU is not exactly"),
    },
    ("inception", "first.branch1."): {
        "group-norm": ("", set_to("bn", nn.GroupNorm(2, 8)), "GroupNorm is not exactly"),
        "evaluated": ("bn", nn.Module.eval, "running statistics"),
        "hooked": ("conv", hooked, "has a hook"),
        "padding": ("conv", set_to("padding_mode", "reflect"), "padding_mode"),
    },
    ("bottleneck", "layer1.1."): {
        "group-norm": ("", set_to("bn3", nn.GroupNorm(4, 256)), ""),
        "instance": ("", set_to("bn2", nn.InstanceNorm2d(64, affine=True)), ""),
        "gelu": ("", set_to("relu", nn.GELU()), ""),
        "hooked": ("conv2", hooked, ""),
        "padding": ("conv2", set_to("padding_mode", "circular"), ""),
        "bias": ("conv3", with_bias, ""),
        "stride": ("conv2", set_to("stride", 1), ""),
        "dilation": ("conv3", set_to("dilation", [1, 1]), ""),
        "weight-behind-bias": ("bn1", registered_again, ""),
        "weight-registered-again": ("conv1", registered_again, ""),
        "extra-parameter": ("conv2", with_extra_parameter, ""),
        "forward": ("conv2", with_forward, ""),
        "no-running": ("", set_to("bn3", nn.BatchNorm2d(256, track_running_stats=False)), ""),
        "shortcut": ("", set_to("downsample", nn.AvgPool2d(1)), ""),
    },
}  # fmt: skip
OTHER_CASES = {
    f"{name}-{what}": (name, (block + part).rstrip("."), change, reason)
    for (name, block), changes in OTHERS.items()
    for what, (part, change, reason) in changes.items()
}


@pytest.mark.parametrize(
    ("name", "part", "change", "reason"), OTHER_CASES.values(), ids=OTHER_CASES.keys()
)
def test_other_parts_are_called_as_modules(name, part, change, reason):
    def run(model):
        torch.manual_seed(1)
        change(model.get_submodule(part))
        return step(model.double(), image(name))

    ours, stock = training_pair(name)
    assert_equal(run(ours), run(stock), 1e-8)
    if name == "dense":
        rows = cvkernels.explain(ours, image(name)).rows
        assert reason in str({row.reason for row in rows})
    elif name == "inception":
        block, x = ours.first.branch1, torch.randn(2, 16, 6, 6, dtype=torch.float64)
        assert reason in match.why_not_train_conv_bn_act(x, block.conv, block.bn, relu_)


def test_a_shortcut_of_another_shape_is_stocks():
    """It is broadcast, or refused, as there."""
    for shortcut in (nn.AdaptiveAvgPool2d(1), nn.Upsample(scale_factor=2)):
        results, x = [], torch.randn(2, 256, 6, 6)
        for model in training_pair("bottleneck", torch.float32):
            model.layer1[1].downsample = shortcut
            try:
                results.append(model.layer1[1](x).detach())
            except RuntimeError as error:
                results.append(str(error).splitlines()[0])
        if isinstance(results[1], str):
            assert results[0] == results[1]
        else:
            torch.testing.assert_close(*results)


# Who asks, and for what


def test_one_value_per_channel_is_refused_as_in_stock():
    block = BasicConv2d(3, 4, kernel_size=3)
    with pytest.raises(ValueError, match="more than 1 value per channel"):
        block(torch.randn(1, 3, 3, 3))
    assert block(torch.randn(1, 3, 3, 4)).shape == (1, 4, 1, 2)


def test_requested_reference_and_no_grad_run_as_modules():
    block, x = BasicConv2d(3, 4, kernel_size=3), torch.randn(2, 3, 6, 6)
    assert is_recomputed(block(x))
    with backend.use("reference"):
        assert not is_recomputed(block(x))
    with torch.no_grad():
        assert not is_recomputed(block(x))
    assert int(block.bn.num_batches_tracked) == 3


@pytest.mark.parametrize("name", ["dense", "inception", "bottleneck", "se-bottleneck", "mbconv"])
def test_torch_func_runs_as_modules(name):
    """torch.func refuses checkpoints by name, so there is no ``memory_efficient`` here."""

    def run(model):
        torch.func.replace_all_batch_norm_modules_(model)
        parameters = {name: p.detach() for name, p in model.named_parameters()}

        def loss(parameters, x):
            return loss_of(torch.func.functional_call(model, parameters, (x,)))

        x = image(name)
        grads = torch.func.grad(loss)(parameters, x)
        _, tangent = torch.func.jvp(lambda p: loss(p, x), (parameters,), (parameters,))
        each = torch.func.vmap(torch.func.grad(loss), (None, 0))(parameters, x[:, None])
        return [tangent, *grads.values(), *each.values()]

    assert_same_results(name, run)


def test_a_traced_dense_block_concatenates():
    ours, stock = training_pair("dense")
    compiled, x = torch.compile(ours, backend="eager", fullgraph=True), image("dense")
    torch.testing.assert_close(compiled(x), stock(x))
    graph = torch.fx.symbolic_trace(ours)
    assert any(node.target is torch.cat for node in graph.graph.nodes)


def test_export_and_trace_see_the_stock_operations():
    block = Inception(*FIRST).train()
    for norm in block.modules():
        if isinstance(norm, nn.BatchNorm2d):
            norm.momentum = 0.0
    x = torch.randn(2, 16, 6, 6)
    exported = torch.export.export(block, (x,))
    assert "cvkernels" not in str(exported.graph)
    traced = torch.jit.trace(block, x, check_trace=False)
    for run in (exported.module(), traced):
        torch.testing.assert_close(run(x), block(x), rtol=1e-4, atol=1e-4)


# What a forward leaves


@each_block
def test_copies_share_nothing_with_a_running_network(name):
    ours, _ = training_pair(name)
    x = image(name)
    out = ours(x)
    twin = copy.deepcopy(ours)
    torch.testing.assert_close(twin(x), out)
    for module in ours.modules():
        assert not any(isinstance(value, torch.Tensor) for value in vars(module).values())
    out.sum().backward()
    assert all(p.grad is None for p in twin.parameters())


def test_a_failed_forward_leaves_no_statistics(monkeypatch):
    ours, _ = training_pair("dense")
    block, x = ours.features.denseblock1, torch.randn(2, 16, 5, 6).double()
    before, real, calls = [b.clone() for b in block.buffers()], dense_block.convolve, []

    def failing(*args, **kwargs):
        calls.append(1)
        if len(calls) == 3:
            raise MemoryError("no room")
        return real(*args, **kwargs)

    monkeypatch.setattr(dense_block, "convolve", failing)
    with pytest.raises(MemoryError):
        block(x)
    assert all(map(torch.equal, before, block.buffers()))
    monkeypatch.undo()
    with pytest.raises(RuntimeError):
        block(torch.cat([x, x[:, :1]], 1))


def test_running_statistics_are_heard_of():
    block = Bottleneck(16, 4).train()
    statistics = block.bn1.running_mean, block.bn1.running_var
    before = [statistic._version for statistic in statistics]
    block(torch.randn(2, 16, 8, 8))
    assert all(s._version > version for s, version in zip(statistics, before, strict=True))
