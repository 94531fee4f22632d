"""The Triton kernels of se_scale, forward and backward, in the interpreter without a GPU."""

import pytest
import torch

from cvkernels import backend
from cvkernels.functional import excite, se_scale, squeeze, squeeze_excite
from cvkernels.ops.squeeze_excite import tiles
from cvkernels.ops.squeeze_excite import triton as se_launches
from cvkernels.ops.squeeze_excite.reference import (
    excite_reference,
    se_scale_reference,
    squeeze_excite_reference,
    squeeze_reference,
)
from tests.support.cases.squeeze_excite import (
    SMALL,
    Map,
    make_flat_layers,
    make_layers,
    make_map,
    of_flat_layers,
)
from tests.support.cases.views import STRIDED
from tests.support.numerics import assert_matches, assert_matches_grad

pytest.importorskip("triton")

DTYPES = [torch.float32, torch.float16, torch.bfloat16]
CHANNELS_LAST = torch.channels_last
# Maps of several tiles, parts and blocks of channels, and what divides none of them.
MAPS = {name: m for name, m in SMALL.items() if name != "efficientnet-56"} | {
    "several-parts": Map(1, 40, 6, 21, 23, "silu"),
    "several-blocks": Map(2, 144, 20, 9, 9, "silu"),
    "wide": Map(1, 528, 33, 3, 3),
}

small_maps = pytest.mark.parametrize("m", MAPS.values(), ids=MAPS.keys())
dtypes = pytest.mark.parametrize("dtype", DTYPES, ids=str)
acts = pytest.mark.parametrize("act", ["none", "relu", "silu"])


def ends(maps):
    """Every activation with and without a residual on one map, each of them once on the others."""
    return pytest.mark.parametrize(
        ("m", "act", "residual"),
        [
            pytest.param(m, act, residual, id=f"{name}-{act}-{'residual' if residual else 'alone'}")
            for name, m in maps.items()
            for act in ("none", "relu", "silu")
            for residual in (False, True)
            if name == "odd" or residual == (act != "none")
        ],
    )


@pytest.fixture(autouse=True)
def triton_everywhere(device):
    with backend.use("triton"):
        yield


@small_maps
@dtypes
def test_squeeze(m, dtype, memory_format, device):
    x = make_map(m, dtype, memory_format, device)
    assert_matches(squeeze, squeeze_reference, (x,))


def test_the_maps_cover_several_parts():
    x = make_map(MAPS["several-parts"], torch.float32, CHANNELS_LAST, "cpu")
    assert tiles.parts_of(x) > 1 and tiles.reduction(1, 40, 21 * 23, 8, tiles.BACKWARD).parts > 1


@small_maps
@dtypes
@pytest.mark.parametrize("sigmoid", [False, True], ids=["logits", "multiplier"])
def test_excite(m, dtype, sigmoid, device):
    pooled = torch.randn(m.N, m.C, device=device).to(dtype)
    arguments = (pooled, *make_layers(m, dtype, device), m.act)
    assert_matches(excite, excite_reference, arguments, {"sigmoid": sigmoid})


def test_excite_of_sums_in_other_parameters(device):
    m = MAPS["odd"]
    sums = 45 * torch.randn(m.N, m.C, device=device)
    for dtype in DTYPES:
        weight1, _, weight2, _ = make_layers(m, dtype, device)
        arguments = (sums, weight1, None, weight2, None, "silu")
        assert_matches(excite, excite_reference, arguments, {"count": 45})
        assert excite(*arguments, count=45).dtype == dtype


@ends(MAPS)
def test_se_scale(m, act, residual, memory_format, device):
    for dtype in DTYPES:
        x = make_map(m, dtype, memory_format, device)
        gate = (3 * torch.randn(m.N, m.C, device=device)).to(dtype)
        added = make_map(m, dtype, memory_format, device) if residual else None
        assert_matches(se_scale, se_scale_reference, (x, gate, added, act))


@small_maps
@dtypes
def test_squeeze_excite(m, dtype, memory_format, device):
    x, added = (make_map(m, dtype, memory_format, device) for _ in range(2))
    arguments = (x, *make_layers(m, dtype, device), m.act, added, "relu")
    assert_matches(squeeze_excite, squeeze_excite_reference, arguments)
    nhwc = x.stride(1) == 1 and m.C > 1
    expected = CHANNELS_LAST if nhwc else torch.contiguous_format
    assert squeeze_excite(*arguments).is_contiguous(memory_format=expected)


SEVERAL = Map(3, 72, 18, 3, 5, "silu")


@dtypes
@pytest.mark.parametrize("residual", [False, True], ids=["alone", "residual"])
def test_an_image_that_fits_is_one_launch(dtype, residual, device, monkeypatch):
    x = make_map(SEVERAL, dtype, CHANNELS_LAST, device)
    added = make_map(SEVERAL, dtype, CHANNELS_LAST, device) if residual else None
    arguments = (x, *make_layers(SEVERAL, dtype, device), "silu", added, "relu")
    monkeypatch.setattr(tiles, "IMAGES", 3)
    launched = []
    launch = se_launches.Launch.__call__
    monkeypatch.setattr(
        se_launches.Launch, "__call__", lambda self, *t: launched.append(self) or launch(self, *t)
    )
    assert_matches(squeeze_excite, squeeze_excite_reference, arguments)
    assert [launch.kernel.__name__ for launch in launched] == ["squeeze_excite_image_nhwc_kernel"]
    monkeypatch.setattr(tiles, "IMAGES", 4)
    squeeze_excite.plan(*arguments)(x, added)
    assert len(launched) == 1 + 3


def test_gradients_of_images_in_one_launch(device, monkeypatch):
    monkeypatch.setattr(tiles, "IMAGES", 3)
    x = make_map(SEVERAL, torch.float32, CHANNELS_LAST, device).requires_grad_()
    layers = make_flat_layers(SEVERAL, torch.float32, device).requires_grad_()
    ours, stock = (of_flat_layers(f, SEVERAL) for f in (squeeze_excite, squeeze_excite_reference))
    assert_matches_grad(ours, stock, (x, layers, "silu", None, "relu"))


@pytest.mark.parametrize("view", STRIDED.values(), ids=STRIDED.keys())
def test_any_strides(view, memory_format, device):
    whole = make_map(Map(2, 48, 4, 9, 8), torch.float32, memory_format, device)
    x, added = view(whole), view(whole + 1)
    layers = make_layers(Map(*x.shape[:2], 6, *x.shape[2:]), torch.float32, device)
    for residual in (added, added.contiguous()):
        arguments = (x, *layers, "relu", residual, "silu")
        assert_matches(squeeze_excite, squeeze_excite_reference, arguments)


@pytest.mark.parametrize("target", ["x", "residual", "slice", "strided"])
def test_out(target, memory_format, device):
    m = Map(2, 24, 6, 5, 6)
    x, residual = (make_map(m, torch.float32, memory_format, device) for _ in range(2))
    layers = make_layers(m, torch.float32, device)
    expected = squeeze_excite_reference(x, *layers, "relu", residual, "relu")
    buffer = torch.full((2, 64, 5, 6), 7.0, device=device).contiguous(memory_format=CHANNELS_LAST)
    out = {"x": x, "residual": residual, "slice": buffer[:, 8:32],
           "strided": torch.empty(2, 24, 6, 5, device=device).transpose(2, 3)}[target]  # fmt: skip
    assert squeeze_excite(x, *layers, "relu", residual, "relu", out=out) is out
    assert torch.allclose(out, expected, atol=1e-5)
    assert (buffer[:, :8] == 7).all() and (buffer[:, 32:] == 7).all()


@acts
def test_nan_and_infinity_propagate(act, memory_format, device):
    m = Map(2, 24, 6, 4, 5)
    x = make_map(m, torch.float32, memory_format, device)
    x[0, 3, 1, 2], x[0, 4, 0, 0], x[1, 5, 2, 2] = torch.nan, torch.inf, -torch.inf
    gate = torch.randn(2, 24, device=device)
    gate[1, 7], gate[1, 8], gate[1, 9] = torch.nan, torch.inf, -torch.inf
    layers = make_layers(m, torch.float32, device)
    for function, reference, arguments in (
        (se_scale, se_scale_reference, (x, gate, None, act)),
        (squeeze_excite, squeeze_excite_reference, (x, *layers, "silu", None, act)),
    ):
        y, expected = function(*arguments), reference(*arguments)
        assert torch.equal(y.isnan(), expected.isnan())
        assert torch.equal(y.isinf(), expected.isinf())


# Gradients

GRADIENT_MAPS = {name: MAPS[name] for name in ("odd", "one-pixel", "several-parts", "one-channel",
                                               "several-blocks", "empty-batch")}  # fmt: skip


@ends(GRADIENT_MAPS)
def test_se_scale_gradients(m, act, residual, memory_format, device):
    for dtype in DTYPES:
        x = make_map(m, dtype, memory_format, device).requires_grad_()
        gate = torch.randn(m.N, m.C, device=device).to(dtype).requires_grad_()
        added = make_map(m, dtype, memory_format, device).requires_grad_() if residual else None
        assert_matches_grad(se_scale, se_scale_reference, (x, gate, added, act))


@ends(GRADIENT_MAPS)
def test_squeeze_excite_gradients(m, act, residual, memory_format, device):
    for dtype in DTYPES:
        x = make_map(m, dtype, memory_format, device).requires_grad_()
        layers = make_flat_layers(m, dtype, device).requires_grad_()
        added = make_map(m, dtype, memory_format, device).requires_grad_() if residual else None
        ours, stock = (of_flat_layers(f, m) for f in (squeeze_excite, squeeze_excite_reference))
        assert_matches_grad(ours, stock, (x, layers, m.act, added, act))


@dtypes
@pytest.mark.parametrize("count", [None, 45], ids=["means", "sums"])
@pytest.mark.parametrize("sigmoid", [False, True], ids=["logits", "multiplier"])
def test_squeeze_and_excite_gradients(dtype, count, sigmoid, device):
    m = MAPS["odd"]
    x = make_map(m, dtype, CHANNELS_LAST, device).requires_grad_()
    assert_matches_grad(squeeze, squeeze_reference, (x,))
    pooled = torch.randn(m.N, m.C, device=device).to(torch.float32 if count else dtype)
    layers = make_flat_layers(m, dtype, device).requires_grad_()
    ours, stock = (of_flat_layers(f, m) for f in (excite, excite_reference))
    options = {"sigmoid": sigmoid, "count": count}
    assert_matches_grad(ours, stock, (pooled.requires_grad_(), layers, "silu"), options)


def test_gradients_of_frozen_parts_and_strided_cotangents(device):
    m = MAPS["odd"]
    x = make_map(m, torch.float32, CHANNELS_LAST, device)
    layers = make_layers(m, torch.float32, device)
    layers[0].requires_grad_()
    assert_matches_grad(squeeze_excite, squeeze_excite_reference, (x, *layers))
    x.requires_grad_()

    def of_mean(function):
        return lambda *arguments: function(*arguments).mean((2, 3))

    for arguments in ((x, *layers), (x, *(t.detach() for t in layers))):
        ours, theirs = of_mean(squeeze_excite), of_mean(squeeze_excite_reference)
        assert_matches_grad(ours, theirs, arguments)


def test_equal_inputs_give_equal_bits(memory_format, device):
    m = MAPS["several-parts"]
    x = make_map(m, torch.float32, memory_format, device).requires_grad_()
    layers = [t.requires_grad_() for t in make_layers(m, torch.float32, device)]

    def results():
        y = squeeze_excite(x, *layers)
        return [y, *torch.autograd.grad(y.square().sum(), [x, *layers])]

    assert all(map(torch.equal, results(), results()))


def test_compiles_with_gradients(device):
    torch._dynamo.reset()
    m = Map(2, 16, 4, 5, 6)
    maps = [make_map(m, torch.float32, CHANNELS_LAST, device) for _ in range(2)]
    leaves = [t.requires_grad_() for t in (*make_layers(m, torch.float32, device), *maps)]

    def run(w1, b1, w2, b2, x, residual):
        y = squeeze_excite(2 * x, w1, b1, w2, b2, "silu", residual, "relu")
        gate = excite(squeeze(y), w1, b1, w2, b2)
        return se_scale(y, gate, x, "silu")

    compiled = torch.compile(run, fullgraph=True)
    cotangent = torch.randn_like(maps[0])
    ours, theirs = (
        torch.autograd.grad(function(*leaves), leaves, cotangent) for function in (compiled, run)
    )
    assert all(torch.allclose(a, b, atol=1e-4) for a, b in zip(ours, theirs, strict=True))


@pytest.mark.gpu
@pytest.mark.parametrize("shape", [(36, 1024, 256, 256), (1, 64, 6000, 6000)], ids=["batch", "map"])
def test_more_than_two_to_the_31_elements(shape, memory_format):
    x = torch.zeros(shape, dtype=torch.float16, device="cuda").contiguous(
        memory_format=memory_format
    )
    x[-1, -1, -1, -1] = 1
    y = se_scale(x, torch.full(shape[:2], 100.0, dtype=torch.float16, device="cuda"), out=x)
    assert y[-1, -1, -1, -1] == 1 and y[-1, -1].sum() == 1
    assert squeeze(x.mul_(shape[2] * shape[3] / 64))[-1, -1] > 0
