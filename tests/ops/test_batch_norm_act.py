"""batch_norm_act and its passes against stock batch norm: every promise of their docstrings."""

import pytest
import torch
import torch.nn.functional as F

import cvkernels
from cvkernels import backend
from cvkernels.backend import BackendError
from cvkernels.functional import BatchNormParams, batch_norm_act
from cvkernels.ops.batch_norm_act import passes, reference
from cvkernels.ops.batch_norm_act.reference import batch_norm_act_reference
from tests.support.numerics import (
    assert_close_as_eager,
    assert_matches,
    cotangents_of,
    tensors_in,
)

pytestmark = [pytest.mark.fast, pytest.mark.usefixtures("native")]

DTYPES = [torch.float32, torch.float16, torch.bfloat16]
# N, C, H, W, and the channels of the tensor that x is a slice of
SHAPES = {
    "densenet121-block1": (2, 64, 14, 14, 256),
    "densenet121-block4": (2, 544, 7, 7, 1024),
    "whole": (3, 24, 6, 5, 24),
    "odd": (3, 17, 5, 9, 37),  # nothing divides a vector
    "one-channel": (2, 1, 9, 7, 1),
    "one-channel-of-many": (2, 1, 9, 7, 8),
    "pixels-of-one-image": (1, 5, 1, 3, 5),
    "many-pixels": (2, 3, 130, 131, 4),  # more than one chunk
}


# act, and whether a residual is added before it
ENDS = [("none", False), ("relu", False), ("silu", False), ("none", True), ("relu", True)]


def make(shape, dtype=torch.float32, device="cpu", mean=0.5, std=1.0):
    N, C, H, W, total = shape
    buffer = (torch.randn(N, total, H, W, device=device) * std + mean).to(dtype)
    return buffer.contiguous(memory_format=torch.channels_last)[:, :C]


def vectors(C, dtype=torch.float32, device="cpu"):
    weight, bias = torch.randn(2, C, device=device).to(dtype)
    if C > 1:
        weight[0] = 0.0
    return weight, bias


def outcome(function, x, weight, bias, act, residual=None):
    """Output, statistics, and the gradients of x, weight, bias and residual."""
    tensors = (x, weight, bias, residual)
    leaves = [None if t is None else t.detach().requires_grad_() for t in tensors]
    out = function(*leaves[:3], 1e-3, act, leaves[3])
    grads = torch.autograd.grad(out[0], tensors_in(leaves), cotangents_of(out[0]))
    return [t.detach() for t in (*out, *grads)]


def ours(x, weight, bias, eps, act, residual=None):
    return batch_norm_act(x, weight, bias, eps=eps, act=act, residual=residual, backend="native")


def check(*calls):
    """Of calls (x, weight, bias, act, residual or nothing), all together: the error of the largest
    of few sums is a matter of luck."""
    wide = [[t.double() if isinstance(t, torch.Tensor) else t for t in call] for call in calls]
    actual = [outcome(ours, *call) for call in calls]
    eager, exact = (
        [outcome(batch_norm_act_reference, *call) for call in some] for some in (calls, wide)
    )
    for results in zip(*(zip(*some, strict=True) for some in (actual, eager, exact)), strict=True):
        assert_close_as_eager(*(torch.stack(tensors) for tensors in results))


def check_shape(shape, dtype, act, adds, device="cpu"):
    def make_call():
        residual = make(shape, dtype, device) if adds else None
        return make(shape, dtype, device), *vectors(shape[1], device=device), act, residual

    check(*(make_call() for _ in range(32 if shape[1] == 1 else 1)))


@pytest.mark.parametrize(("act", "adds"), ENDS)
@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize("shape", SHAPES.values(), ids=SHAPES.keys())
def test_output_statistics_and_gradients_match_stock(shape, dtype, act, adds, device):
    check_shape(shape, dtype, act, adds, device)


def test_a_residual_of_other_strides_and_gradients(device):
    """A planar residual, one that needs no gradient, and one that alone needs it."""
    x, residual = (make(SHAPES["odd"], device=device) for _ in range(2))
    check((x, *vectors(17, device=device), "relu", residual.contiguous()))
    for leaf, other in ((x, residual), (residual, x)):
        leaf = leaf.detach().requires_grad_()
        pair = (leaf, other) if other is residual else (other, leaf)
        out = batch_norm_act(pair[0], act="relu", residual=pair[1]).out
        expected = F.relu(F.batch_norm(pair[0], None, None, training=True) + pair[1])
        grads = (torch.autograd.grad(y.square().sum(), leaf)[0] for y in (out, expected))
        torch.testing.assert_close(*grads, rtol=1e-4, atol=1e-4)


def test_silu_far_out(device):
    """Where the exponential is zero, infinite or not a number."""
    x = make(SHAPES["many-pixels"], device=device)
    weight, bias = torch.tensor([[300.0, 1.0, 1.0], [0.0, 200.0, -200.0]], device=device)
    check((x, weight, bias, "silu"))


@pytest.mark.parametrize("given", ["weight", "bias", "neither"])
def test_vectors_may_be_absent_or_of_x_s_dtype(given, device):
    x = make(SHAPES["odd"], torch.bfloat16, device)
    weight, bias = vectors(17, torch.bfloat16, device)
    check((x, weight if given == "weight" else None, bias if given == "bias" else None, "relu"))


def test_far_from_zero(device):
    """Sums of squares of x itself would lose the variance."""
    x = make(SHAPES["many-pixels"], device=device, mean=300.0, std=0.1)
    check((x, *vectors(3, device=device), "relu"))


@pytest.mark.parametrize(("act", "adds"), ENDS)
def test_float64_is_exact(act, adds):
    x, residual = (make(SHAPES["odd"], torch.float64) for _ in range(2))
    arguments = (x, *vectors(17, torch.float64), act, residual if adds else None)
    pairs = (outcome(f, *arguments) for f in (ours, batch_norm_act_reference))
    for actual, expected in zip(*pairs, strict=True):
        torch.testing.assert_close(actual, expected, rtol=1e-12, atol=1e-12)


def test_several_norms_share_one_gradient(device):
    """What reduce leaves of two norms of one x, finished once, is the sum of their gradients."""
    shape = SHAPES["densenet121-block1"]
    x, norms = make(shape, device=device), [vectors(64, device=device) for _ in range(2)]
    grads = [torch.randn_like(x) for _ in norms]
    mean, var = passes.statistics(x)
    total = torch.zeros(2, 80, 14, 14, device=device).contiguous(memory_format=torch.channels_last)
    slope, offset = (passes.vector_like(x, zero=True) for _ in range(2))
    for (weight, bias), grad in zip(norms, grads, strict=True):
        bn = BatchNormParams(weight, bias, mean, var, 1e-5)
        passes.reduce(grad, x, bn, "relu", (slope, offset), total[:, 16:])
    out = passes.input_gradient(total[:, 16:], x, mean, slope, offset, torch.empty_like(x))
    assert not total[:, :16].any()

    def summed(dtype):
        leaf = x.to(dtype).requires_grad_()
        ys = [
            F.relu(F.batch_norm(leaf, None, None, w.to(dtype), b.to(dtype), True)) * g.to(dtype)
            for (w, b), g in zip(norms, grads, strict=True)
        ]
        return torch.autograd.grad(sum(y.sum() for y in ys), leaf)[0]

    assert_close_as_eager(out, summed(torch.float32), summed(torch.float64))


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
def test_passes_match_their_references(dtype, device):
    x, grad = (make(SHAPES["odd"], dtype, device) for _ in range(2))
    weight, bias = vectors(17, device=device)
    mean, var = reference.statistics_reference(x)
    slope, offset = torch.randn(2, 17, device=device)

    def normalised(x, weight, bias, mean, var):
        return passes.apply(
            x, BatchNormParams(weight, bias, mean, var), "relu", torch.empty_like(x)
        )

    def expected(x, weight, bias, mean, var):
        return reference.apply_reference(x, BatchNormParams(weight, bias, mean, var), "relu")

    assert_matches(
        lambda *args: (normalised if args[0].dtype == dtype else expected)(*args),
        expected,
        (x, weight, bias, mean, var),
    )

    def finished(total, x, mean, slope, offset):
        through = reference.through_statistics_reference(x, mean, slope, offset)
        return (reference.wide(total) + through).to(x.dtype)

    def ours(total, x, mean, slope, offset):
        return passes.input_gradient(total, x, mean, slope, offset, torch.empty_like(x))

    assert_matches(ours, finished, (grad, x, mean, slope, offset))
    wide = (grad.float(), x, mean, slope, offset)
    torch.testing.assert_close(ours(*wide), finished(*wide))


@pytest.mark.parametrize("kind", ["float32", "own"])
@pytest.mark.parametrize("dtype", [*DTYPES, torch.float64], ids=str)
@pytest.mark.parametrize("absent", [(), ("weight",), ("bias",), ("running",)], ids=str)
def test_forward_leaves_vectors_and_running_statistics(absent, dtype, kind, device):
    """Statistics and copies of the vectors in a slice of a matrix; what batch norm moves."""
    if dtype == torch.float64 and device.type == "cuda":
        pytest.skip("the native passes have no float64 on CUDA")
    x, wide = make(SHAPES["odd"], dtype, device), torch.promote_types(dtype, torch.float32)
    of_vectors = dtype if kind == "own" else wide
    norm = torch.nn.BatchNorm2d(17, momentum=0.3).to(device, of_vectors)
    with torch.no_grad():
        for tensor in (norm.weight, norm.bias, norm.running_mean, norm.running_var):
            tensor.uniform_(0.5, 2.0)
    weight = None if "weight" in absent else norm.weight.detach()
    bias = None if "bias" in absent else norm.bias.detach()
    stock = torch.nn.BatchNorm2d(17, momentum=0.3).to(device, torch.float64)
    stock.load_state_dict(norm.state_dict())
    stock(x.double())
    matrix = torch.full((4, 20), torch.nan, device=device, dtype=wide)
    own, out = matrix[:, 2:19], torch.empty_like(x, memory_format=torch.channels_last)
    running = passes.Running(norm.running_mean, norm.running_var, 0.3)
    before = norm.running_mean.clone()
    running = None if "running" in absent else running
    passes.forward(x, weight, bias, running, 1e-3, "relu", None, own, out)
    assert matrix[:, :2].isnan().all() and matrix[:, 19:].isnan().all()
    tolerance = torch.finfo(wide).eps * 20
    expected = reference.rows_of(*reference.statistics_reference(x.double()), weight, bias)
    for row, value in zip(own, expected, strict=True):
        torch.testing.assert_close(row, value.to(wide), rtol=tolerance, atol=tolerance)
    recomputed = torch.empty_like(out)
    assert torch.equal(passes.recompute(x, own, 1e-3, "relu", None, recomputed), out)
    if "running" in absent:
        assert torch.equal(norm.running_mean, before)
        return
    tolerance = torch.finfo(of_vectors).eps * 4
    for name in ("running_mean", "running_var"):
        actual, exact = getattr(norm, name), getattr(stock, name).to(of_vectors)
        torch.testing.assert_close(actual, exact, rtol=tolerance, atol=tolerance)
    assert norm.running_mean._version > 0


def test_nan_stays_and_spreads_as_in_stock():
    x = make(SHAPES["odd"]).clone()
    x[0, 3, 0, 0] = torch.nan
    outs = [f(x, *vectors(17), 1e-5, "relu")[0] for f in (ours, batch_norm_act_reference)]
    assert torch.equal(*(out.isnan() for out in outs)) and outs[0][:, 3].isnan().all()


def test_sums_do_not_depend_on_threads():
    x, threads = make(SHAPES["many-pixels"]), torch.get_num_threads()
    results = []
    try:
        for count in (1, 2):
            torch.set_num_threads(count)
            results.append(outcome(ours, x, *vectors_once, "relu"))
    finally:
        torch.set_num_threads(threads)
    assert all(torch.equal(a, b) for a, b in zip(*results, strict=True))


vectors_once = (torch.tensor([1.0, -0.5, 0.25]), torch.tensor([0.1, 0.2, -0.3]))


def test_strides_that_the_passes_do_not_take_run_the_reference():
    x = torch.randn(2, 4, 5, 6)
    assert backend.chosen("batch_norm_act", x) == "reference"
    assert backend.chosen("batch_norm_act", make((2, 4, 5, 6, 8))) == "native"
    torch.testing.assert_close(batch_norm_act(x).out, F.batch_norm(x, None, None, training=True))
    with pytest.raises(BackendError, match="channel slice"):
        batch_norm_act(x, backend="native")


def test_what_is_kept_and_its_versions():
    x = make(SHAPES["whole"]).requires_grad_()
    kept = []
    y = x * 1.0
    with torch.autograd.graph.saved_tensors_hooks(lambda t: kept.append(t) or t, lambda t: t):
        batch_norm_act(y, act="relu")
    out = batch_norm_act(y, act="relu").out
    large = {t.data_ptr() for t in kept if t.numel() >= x.numel()}
    assert large == {y.data_ptr()}
    with torch.no_grad():
        y.add_(1)
    with pytest.raises(RuntimeError, match="modified by an inplace operation"):
        out.sum().backward()


@pytest.mark.parametrize(
    ("act", "shortcut"),
    [("none", False), ("relu", False), ("silu", False), ("none", True), ("relu", True)],
)
def test_gradients_are_exact_and_differentiable_in_float64(act, shortcut):
    shape = (2, 3, 3, 2)
    x, residual = (
        torch.randn(shape, dtype=torch.float64)
        .contiguous(memory_format=torch.channels_last)
        .requires_grad_()
        for _ in "xr"
    )
    affine = [torch.randn(3, dtype=torch.float64, requires_grad=True) for _ in "wb"]
    assert backend.chosen("batch_norm_act", x, *affine, act=act) == "native"

    def run(x, weight, bias, *residual):
        return batch_norm_act(x, weight, bias, act=act, residual=(*residual, None)[0]).out

    leaves = (x, *affine, *([residual] if shortcut else []))
    assert torch.autograd.gradcheck(run, leaves, check_batched_grad=True)
    assert torch.autograd.gradgradcheck(run, leaves, check_batched_grad=True)


def test_torch_func_and_compile():
    x, (weight, bias) = make(SHAPES["whole"]), vectors(24)

    def loss(x):
        return batch_norm_act(x, weight, bias, act="relu").out.pow(2).sum()

    (expected,) = torch.autograd.grad(loss(leaf := x.detach().requires_grad_()), leaf)
    torch.testing.assert_close(torch.func.grad(loss)(x), expected)
    compiled = torch.compile(loss, fullgraph=True, backend="aot_eager")
    torch.testing.assert_close(torch.autograd.grad(compiled(leaf), leaf)[0], expected)


def test_explain_counts_the_passes():
    class Norm(torch.nn.Module):
        def forward(self, x):
            return batch_norm_act(x, act="relu").out

    x = torch.empty(2, 16, 8, 8, dtype=torch.bfloat16, device="meta")
    rows = cvkernels.explain(Norm(), x.contiguous(memory_format=torch.channels_last)).rows
    assert [row.op for row in rows] == ["batch_norm_act_forward"]
    assert rows[0].bytes_read == 2 * rows[0].bytes_written == 4 * x.numel()


BAD = {
    "rank": (lambda x: (x[0],), ValueError, r"shape \[N, C, H, W\].*got \[4, 5, 6\]"),
    "one-pixel": (lambda x: (x[:1, :, :1, :1],), ValueError, "more than one element per channel"),
    "empty": (lambda x: (x[:0],), ValueError, "more than one element per channel"),
    "dtype": (lambda x: (x.int(),), TypeError, "x must be float32.*got torch.int32"),
    "weight": (lambda x: (x, x.new_ones(3)), ValueError, r"weight must have shape \[4\]"),
    "bias": (lambda x: (x, None, x.new_ones(4, 1)), ValueError, r"bias must have shape \[4\]"),
    "residual": (
        lambda x: (x, None, None, x[:1]), ValueError, r"residual must have x's shape",
    ),
    "residual-dtype": (
        lambda x: (x, None, None, x.half()), TypeError, "residual must have x's dtype",
    ),
    "bias-device": (
        lambda x: (x, None, torch.ones(4, device="meta")), ValueError, "bias must be on x's device",
    ),
}  # fmt: skip


@pytest.mark.parametrize(("args", "kind", "message"), BAD.values(), ids=BAD.keys())
def test_bad_arguments_are_refused(args, kind, message):
    x = make((2, 4, 5, 6, 4))
    with pytest.raises(kind, match=message):
        x, weight, bias, residual = (*args(x), None, None, None)[:4]
        batch_norm_act(x, weight, bias, residual=residual)


def test_unknown_act_is_refused():
    x = make((2, 4, 5, 6, 4))
    with pytest.raises(ValueError, match="act must be one of"):
        batch_norm_act(x, act="gelu")
    with pytest.raises(ValueError, match="a residual goes with act 'none' or 'relu'"):
        batch_norm_act(x, act="silu", residual=x)
