"""Dense blocks in training, however they are called; the stock forward where something watches."""

import copy

import pytest
import torch
from torch import nn
from torch.utils.checkpoint import checkpoint

from cvkernels import backend
from cvkernels.nn.training import dense_block
from tests.support.dense_training_checks import CHANNELS, blocks, image, outcome, runs_fused


def test_several_forwards_before_one_backward_and_accumulation():
    ours, stock = (b.double() for b in blocks())
    images = [image(dtype=torch.float64) for _ in range(3)]
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
    x, results = image(dtype=torch.float64), []
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
    x = image(dtype=torch.float64)
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
    real, calls = dense_block.convolve, []

    def failing(*args, **kwargs):
        calls.append(1)
        if len(calls) == 3:
            raise MemoryError("no room")
        return real(*args, **kwargs)

    monkeypatch.setattr(dense_block, "convolve", failing)
    with pytest.raises(MemoryError):
        ours(image())
    assert all(torch.equal(a, b) for a, b in zip(before, ours.buffers(), strict=True))
    monkeypatch.undo()
    with pytest.raises(RuntimeError):
        ours(image(channels=CHANNELS + 1))


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
    x, results = image(dtype=torch.float64), []
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
    x = image(dtype=torch.float64)
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
