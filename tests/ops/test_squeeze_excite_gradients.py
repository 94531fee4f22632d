"""Gradients of squeeze-and-excitation's registered ops, by hand, against autograd's of PyTorch."""

import pytest
import torch

from cvkernels import backend, extension
from cvkernels.functional import excite, se_scale, squeeze, squeeze_excite
from cvkernels.ops.squeeze_excite.reference import (
    excite_reference,
    se_scale_reference,
    squeeze_excite_reference,
    squeeze_reference,
)
from tests.ops.test_squeeze_excite import dtypes, ends
from tests.support.cases.squeeze_excite import (
    SMALL,
    Map,
    make_flat_layers,
    make_layers,
    make_map,
    of_flat_layers,
)
from tests.support.numerics import assert_matches_grad

CHANNELS_LAST = torch.channels_last
ops = torch.ops.cvkernels


@pytest.fixture(params=["reference", "native", "triton"])
def name(request):
    """The backend of the registered ops."""
    if request.param == "native" and not extension.has("cpu"):
        pytest.skip(extension.status()["cpu"].reason)
    if request.param == "triton":
        pytest.importorskip("triton")
    return request.param


@pytest.fixture
def where(name, device):
    return device if name == "triton" else torch.device("cpu")


def leaf(tensor, dtype=torch.float32):
    return tensor.to(dtype).requires_grad_()


# On few elements stock's own error is a matter of luck: not every map is fair to every kernel.
FEW = {name: SMALL[name] for name in ("odd", "one-pixel", "several-parts", "one-channel",
                                      "several-blocks", "empty-batch")}  # fmt: skip
LARGE = {"efficientnet-56": Map(1, 24, 6, 56, 56, "silu")}
gradients = pytest.mark.parametrize(
    ("name", "m", "act", "residual"),
    [
        pytest.param(name, *case.values, id=f"{name}-{case.id}")
        for name, maps in (("reference", FEW), ("native", SMALL | LARGE), ("triton", FEW))
        for case in ends(maps)
    ],
    indirect=["name"],
)


def make_residual(x, act, name, *how):
    """For the native gradient of ReLU nothing of the sum is nearly zero: that would pass by a
    rounding, or not."""
    added = make_map(*how)
    if name == "native" and act == "relu":
        added += added.sign() * 4 * x.detach().abs()
    return leaf(added, added.dtype)


@pytest.mark.pairwise
@gradients
@dtypes
def test_gradients_of_se_scale(name, m, act, residual, dtype, memory_format, where):
    x = leaf(make_map(m, dtype, memory_format, where), dtype)
    gate = leaf(torch.randn(m.N, m.C, device=where), dtype)
    added = make_residual(x, act, name, m, dtype, memory_format, where) if residual else None
    call = (x, gate, added, act)
    assert_matches_grad(lambda *a: ops.se_scale(*a, name), se_scale_reference, call)


@pytest.mark.pairwise
@gradients
@dtypes
def test_gradients_of_squeeze_excite(name, m, act, residual, dtype, memory_format, where):
    x = leaf(make_map(m, dtype, memory_format, where), dtype)
    layers = leaf(make_flat_layers(m, dtype, where), dtype)
    added = make_residual(x, act, name, m, dtype, memory_format, where) if residual else None
    ours = of_flat_layers(lambda *a: ops.squeeze_excite(*a, name)[0], m)
    stock = of_flat_layers(squeeze_excite_reference, m)
    assert_matches_grad(ours, stock, (x, layers, m.act, added, act))


@pytest.mark.parametrize("act", ["none", "relu", "silu"])
def test_derivatives_of_gradients(act, memory_format, name, where):
    """In the map, the gates and the parameters, whichever backend computed the gradients."""
    m = SMALL["odd"]
    x = leaf(make_map(m, torch.float32, memory_format, where))
    added = make_residual(x, act, name, m, torch.float32, memory_format, where)
    gate = leaf(torch.randn(m.N, m.C, device=where))
    layers = leaf(make_flat_layers(m, torch.float32, where))

    def gradient(function):
        def run(x, *others):
            loss = function(x, *others).square().sum()
            return torch.autograd.grad(loss, x, create_graph=True)[0]

        return run

    scaled = gradient(lambda *a: ops.se_scale(*a, name)), gradient(se_scale_reference)
    assert_matches_grad(*scaled, (x, gate, added, act))
    ours = of_flat_layers(lambda *a: ops.squeeze_excite(*a, name)[0], m)
    whole = gradient(ours), gradient(of_flat_layers(squeeze_excite_reference, m))
    assert_matches_grad(*whole, (x, layers, m.act, added, act))


@dtypes
@pytest.mark.parametrize("count", [0, 45], ids=["means", "sums"])
@pytest.mark.parametrize("sigmoid", [False, True], ids=["logits", "multiplier"])
def test_gradients_of_the_parts(dtype, count, sigmoid, memory_format, name, where):
    m = SMALL["odd"]
    x = leaf(make_map(m, dtype, memory_format, where), dtype)
    assert_matches_grad(lambda x: ops.squeeze(x, name), squeeze_reference, (x,))
    pooled = leaf(torch.randn(m.N, m.C, device=where), torch.float32 if count else dtype)
    layers = leaf(make_flat_layers(m, dtype, where), dtype)
    ours = of_flat_layers(lambda *a: ops.excite(*a, sigmoid, count, name), m)
    stock = of_flat_layers(lambda *a: excite_reference(*a, sigmoid=sigmoid, count=count or None), m)
    assert_matches_grad(ours, stock, (pooled, layers, "silu"))


def test_gradients_of_frozen_parts_and_strided_cotangents(name, where):
    def block(*a):
        return ops.squeeze_excite(*a, "relu", None, "none", name)[0]

    def of_mean(function):
        return lambda *arguments: function(*arguments).mean((2, 3))

    m = SMALL["odd"]
    x = make_map(m, torch.float32, CHANNELS_LAST, where)
    layers = make_layers(m, torch.float32, where)
    layers[0].requires_grad_()
    assert_matches_grad(block, squeeze_excite_reference, (x, *layers))
    x.requires_grad_()
    for arguments in ((x, *layers), (x, *(t.detach() for t in layers))):
        assert_matches_grad(of_mean(block), of_mean(squeeze_excite_reference), arguments)


def test_equal_inputs_give_equal_bits(memory_format, name, where):
    m = SMALL["several-parts"]
    x = leaf(make_map(m, torch.float32, memory_format, where))
    layers = [leaf(t) for t in make_layers(m, torch.float32, where)]

    def results():
        y, *_ = ops.squeeze_excite(x, *layers, "relu", None, "none", name)
        return [y, *torch.autograd.grad(y.square().sum(), [x, *layers])]

    assert all(map(torch.equal, results(), results()))


@pytest.mark.parametrize("chosen", ["auto", "reference", "triton"])
def test_compiles_with_gradients(chosen, device):
    torch._dynamo.reset()
    m = Map(2, 16, 4, 5, 6)
    maps = [make_map(m, torch.float32, CHANNELS_LAST, device) for _ in range(2)]
    leaves = [leaf(t) for t in (*make_layers(m, torch.float32, device), *maps)]

    def run(w1, b1, w2, b2, x, residual):
        y = squeeze_excite(2 * x, w1, b1, w2, b2, "silu", residual, "relu")
        gate = excite(squeeze(y), w1, b1, w2, b2)
        return se_scale(y, gate, x, "silu")

    cotangent = torch.randn_like(maps[0])
    with backend.use(chosen):
        ours, theirs = (
            torch.autograd.grad(function(*leaves), leaves, cotangent)
            for function in (torch.compile(run, fullgraph=True), run)
        )
    assert all(torch.allclose(a, b, atol=1e-4) for a, b in zip(ours, theirs, strict=True))
