"""Dense blocks in training: stock's numbers with linear memory, and stock where somebody looks."""

import copy

import pytest
import torch
from numerics import max_error
from torch import nn
from torch.utils.checkpoint import checkpoint

import cvkernels
from benchmarks.densenet_memory import megabytes_per_image, saved_bytes
from cvkernels import backend
from cvkernels.models.densenet import DenseNet
from cvkernels.nn import DenseBlock, DenseLayer, Transition

stock_module = pytest.importorskip("torchvision.models.densenet")

LAYERS, CHANNELS, GROWTH = 3, 8, 4
TINY = dict(growth_rate=8, block_config=(3, 2, 2), num_init_features=16, num_classes=10)


def blocks(memory_efficient=False, drop_rate=0.0):
    """(ours, stock) with one state, their norms no identities."""
    stock = stock_module._DenseBlock(LAYERS, CHANNELS, 2, GROWTH, drop_rate)
    with torch.no_grad():
        for norm in stock.modules():
            if isinstance(norm, nn.BatchNorm2d):
                norm.weight.uniform_(-1.0, 1.5)
                norm.bias.normal_(0, 0.2)
    ours = DenseBlock(LAYERS, CHANNELS, 2, GROWTH, drop_rate, memory_efficient)
    ours.load_state_dict(stock.state_dict())
    return ours, stock


def image(dtype=torch.float32, shape=(2, CHANNELS, 5, 6)):
    return torch.randn(shape, dtype=dtype)


def runs_fused(module, x):
    """Whether module(x) runs our passes, and the reasons that explain gives."""
    rows = cvkernels.explain(module, x).rows
    return any("batch_norm_act" in row.op for row in rows), {row.reason for row in rows}


def outcome(module, x, weights=None):
    """Output, gradients of the input and of every parameter, and the buffers after it."""
    x = x.detach().requires_grad_()
    out = module(x)
    generator = torch.Generator().manual_seed(1)
    cotangent = torch.randn(out.shape, generator=generator, dtype=torch.float64).to(out)
    grads = torch.autograd.grad(out, [x, *module.parameters()], cotangent)
    return [t.detach() for t in (out, *grads)] + [b.clone() for b in module.buffers()]


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
    x = image(dtype).to(device).contiguous(memory_format=memory_format)
    if dtype == torch.float64:
        for actual, expected in zip(outcome(ours, x), outcome(stock, x), strict=True):
            torch.testing.assert_close(actual, expected, rtol=1e-11, atol=1e-11)
    else:
        more = [image(dtype).to(x).contiguous(memory_format=memory_format) for _ in range(5)]
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
        x = image(torch.float64)
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


# How people call it


def test_several_forwards_before_one_backward_and_accumulation():
    ours, stock = (b.double() for b in blocks())
    images = [image(torch.float64) for _ in range(3)]
    for block in (ours, stock):
        outs = [block(x) for x in images]
        sum((out * (i + 1)).pow(2).sum() for i, out in enumerate(outs)).backward()
        block(images[0]).pow(2).sum().backward()
    for a, b in zip(ours.parameters(), stock.parameters(), strict=True):
        torch.testing.assert_close(a.grad, b.grad, rtol=1e-10, atol=1e-10)


def test_a_retained_graph_gives_equal_gradients_twice():
    ours, _ = blocks(memory_efficient=True)
    x = image().requires_grad_()
    out = ours(x).pow(2).sum()
    buffers = [b.clone() for b in ours.buffers()]
    first, second = (
        torch.autograd.grad(out, [x, *ours.parameters()], retain_graph=True) for _ in range(2)
    )
    assert all(torch.equal(a, b) for a, b in zip(first, second, strict=True))
    assert all(torch.equal(a, b) for a, b in zip(buffers, ours.buffers(), strict=True))


FROZEN = {
    "some": lambda name: "norm2" in name or "denselayer2.conv1" in name,
    "first-layers": lambda name: "denselayer3" not in name,
    "last-layer": lambda name: "denselayer3" in name,
    "norms": lambda name: "norm" in name,
    "all-but-one-norm": lambda name: name != "denselayer1.norm1.weight",
}


@pytest.mark.parametrize("input_grad", [False, True], ids=["no-input-grad", "input-grad"])
@pytest.mark.parametrize("frozen", FROZEN.values(), ids=FROZEN.keys())
def test_frozen_parameters_and_inputs(frozen, input_grad):
    ours, stock = (b.double() for b in blocks())
    x, results = image(torch.float64), []
    for block in (ours, stock):
        for name, parameter in block.named_parameters():
            parameter.requires_grad_(not frozen(name))
        leaf = x.clone().requires_grad_(input_grad)
        block(leaf).pow(2).sum().backward()
        results.append([leaf.grad] + [p.grad for p in block.parameters()])
    for actual, expected in zip(*results, strict=True):
        assert (actual is None) == (expected is None)
        if actual is not None:
            torch.testing.assert_close(actual, expected, rtol=1e-10, atol=1e-10)


def test_a_checkpointed_block():
    ours, stock = (b.double() for b in blocks())
    x = image(torch.float64)
    for reentrant in (False, True):
        grads = []
        for block in (ours, stock):
            leaf = x.clone().requires_grad_()
            checkpoint(block, leaf, use_reentrant=reentrant).pow(2).sum().backward()
            grads.append(leaf.grad)
        torch.testing.assert_close(*grads)


def test_autocast_matches_stock():
    ours, stock = (nn.Sequential(nn.Conv2d(3, CHANNELS, 1), block) for block in blocks())
    ours[0].load_state_dict(stock[0].state_dict())
    exact, x = copy.deepcopy(stock).double(), torch.randn(2, 3, 6, 6)
    results = []
    for model in (ours, stock):
        with torch.autocast("cpu", torch.bfloat16):
            out = model(x)
            assert out.dtype == torch.bfloat16
        out.float().pow(2).sum().backward()
        results.append([p.grad for p in model.parameters()])
    exact(x.double()).pow(2).sum().backward()
    results.append([p.grad for p in exact.parameters()])
    for actual, eager, truth in zip(*results, strict=True):
        # Gradients are rounded to bfloat16 at each convolution, in another order than stock's.
        scale = truth.abs().max().item()
        error, theirs = ((t.double() - truth).abs().max().item() for t in (actual, eager))
        assert error <= 2 * theirs + 2 * torch.finfo(torch.bfloat16).eps * scale


def test_create_graph_is_refused_with_the_way_out():
    ours, _ = blocks()
    x = image().requires_grad_()
    with pytest.raises(RuntimeError, match=r"DenseBlock in training.*once.*reference"):
        torch.autograd.grad(ours(x).sum(), x, create_graph=True)
    with backend.use("reference"):
        (grad,) = torch.autograd.grad(ours(x).pow(2).sum(), x, create_graph=True)
        grad.pow(2).sum().backward()
    assert x.grad.isfinite().all()


def test_writing_what_autograd_needs_is_refused():
    ours, _ = blocks()
    out = ours(image())
    with torch.no_grad():
        out[:, CHANNELS:].zero_()
    with pytest.raises(RuntimeError, match="modified by an inplace operation"):
        out.sum().backward()
    out = ours(image())
    with torch.no_grad():
        ours["denselayer2"].conv1.weight.mul_(2)
    with pytest.raises(RuntimeError, match="modified by an inplace operation"):
        out.sum().backward()


def test_a_failed_forward_leaves_no_statistics(monkeypatch):
    ours, _ = blocks()
    before = [b.clone() for b in ours.buffers()]
    real, calls = torch.nn.functional.conv2d, []

    def failing(*args, **kwargs):
        calls.append(1)
        if len(calls) == 3:
            raise MemoryError("no room")
        return real(*args, **kwargs)

    monkeypatch.setattr("cvkernels.nn.dense_training.F.conv2d", failing)
    with pytest.raises(MemoryError):
        ours(image())
    assert all(torch.equal(a, b) for a, b in zip(before, ours.buffers(), strict=True))
    monkeypatch.undo()
    with pytest.raises(RuntimeError):
        ours(image(shape=(2, CHANNELS + 1, 5, 6)))


# Where the layers are called


def evaluated(block):
    block["denselayer2"].norm1.eval()


def synchronised(block):
    layer = block["denselayer2"]
    layer.norm1 = nn.SyncBatchNorm(layer.norm1.num_features).eval()


def dropping(block):
    block["denselayer2"].drop_rate = 0.5


def hooked(block):
    block["denselayer2"].relu1.register_forward_hook(lambda *_: None)


def backward_hooked(block):
    # A full backward hook cannot stand before an in-place ReLU, in stock either.
    block["denselayer3"].conv2.register_full_backward_hook(lambda *_: None)


def other_activation(block):
    block["denselayer1"].relu2 = nn.SiLU()


CALLED = {
    evaluated: "running statistics",
    synchronised: "SyncBatchNorm is not exactly",
    dropping: "dropout is active",
    hooked: "ReLU has a hook",
    backward_hooked: "Conv2d has a hook",
    other_activation: "SiLU is not exactly",
}


@pytest.mark.parametrize(
    ("change", "reason"), CALLED.items(), ids=lambda v: getattr(v, "__name__", "")
)
def test_stock_forward_where_it_must_be(change, reason):
    ours, stock = (b.double() for b in blocks())
    x, results = image(torch.float64), []
    for block in (ours, stock):
        change(block.double())
        block.double()
        torch.manual_seed(3)
        results.append(outcome(block, x))
    for actual, expected in zip(*results, strict=True):
        torch.testing.assert_close(actual, expected, rtol=1e-11, atol=1e-11)
    fused, reasons = runs_fused(ours, x)
    assert not fused and any(reason in text for text in reasons)


def test_func_transforms_forward_mode_and_compile():
    ours, stock = (b.double() for b in blocks())
    x = image(torch.float64)
    state = [{k: v.clone() for k, v in b.state_dict().items()} for b in (ours, stock)]

    def loss(block, buffers):
        def run(parameters, x):
            copies = {k: v.clone() for k, v in buffers.items()}
            return torch.func.functional_call(block, {**copies, **parameters}, x).pow(2).sum()

        return run

    grads = [
        torch.func.grad(loss(b, s))(dict(b.named_parameters()), x)
        for b, s in zip((ours, stock), state, strict=True)
    ]
    for key, expected in grads[1].items():
        torch.testing.assert_close(grads[0][key], expected)
    compiled = torch.compile(ours, backend="eager", fullgraph=True)
    torch.testing.assert_close(compiled(x), stock(x))
    graph = torch.fx.symbolic_trace(ours)
    assert any(node.target is torch.cat for node in graph.graph.nodes)


def test_copies_share_nothing_with_a_running_block():
    ours, _ = blocks()
    x = image()
    out = ours(x)
    twin = copy.deepcopy(ours)
    torch.testing.assert_close(twin(x), out)
    for module in ours.modules():
        for value in vars(module).values():
            assert not isinstance(value, torch.Tensor)
    out.sum().backward()
    assert all(p.grad is None for p in twin.parameters())


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
