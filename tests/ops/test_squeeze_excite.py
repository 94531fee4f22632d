"""squeeze, excite, se_scale and squeeze_excite: every promise of their docstrings, on each backend.

Without a GPU the Triton kernels run in the interpreter.
"""

import functools

import pytest
import torch

from cvkernels import backend
from cvkernels.functional import excite, se_scale, squeeze, squeeze_excite
from cvkernels.ops.squeeze_excite import tiles
from cvkernels.ops.squeeze_excite.reference import (
    excite_reference,
    se_scale_reference,
    squeeze_excite_reference,
    squeeze_reference,
)
from tests.support.cases.squeeze_excite import NETWORKS, SMALL, Map, make_layers, make_map
from tests.support.cases.views import STRIDED
from tests.support.numerics import (
    assert_close_as_eager,
    assert_matches,
    assert_matches_grad,
    assert_same_numbers,
    max_error,
)

DTYPES = [torch.float32, torch.float16, torch.bfloat16]
CHANNELS_LAST = torch.channels_last
ODD = SMALL["odd"]

small_maps = pytest.mark.parametrize("m", SMALL.values(), ids=SMALL.keys())
dtypes = pytest.mark.parametrize("dtype", DTYPES, ids=str)
halves = pytest.mark.parametrize("dtype", DTYPES[1:], ids=str)
acts = pytest.mark.parametrize("act", ["none", "relu", "silu"])
residuals = pytest.mark.parametrize("residual", [False, True], ids=["alone", "residual"])


fused = pytest.mark.parametrize("where", ["native", "triton"], indirect=True)
every_backend = pytest.mark.parametrize("where", ["reference", "native", "triton"], indirect=True)


def ends(maps):
    """Every activation with and without a residual on one map, each of them once on the others."""
    return [
        pytest.param(m, act, residual, id=f"{name}-{act}-{'residual' if residual else 'alone'}")
        for name, m in maps.items()
        for act in ("none", "relu", "silu")
        for residual in (False, True)
        if name == "odd" or residual == (act != "none")
    ]


# Numbers


@fused
@small_maps
@dtypes
def test_squeeze_is_the_mean(m, dtype, memory_format, where):
    assert_matches(squeeze, squeeze_reference, (make_map(m, dtype, memory_format, where),))


@fused
@small_maps
@dtypes
@pytest.mark.parametrize("sigmoid", [False, True], ids=["logits", "multiplier"])
def test_excite_is_two_layers(m, dtype, sigmoid, where):
    pooled = torch.randn(m.N, m.C, device=where).to(dtype)
    arguments = (pooled, *make_layers(m, dtype, where), m.act)
    assert_matches(excite, excite_reference, arguments, {"sigmoid": sigmoid})


@every_backend
@dtypes
@pytest.mark.parametrize("sizes", [(24, 6, 90), (90, 70, 19)], ids=["one launch", "two launches"])
def test_gates_of_another_map(sizes, dtype, where):
    C, R, K = sizes
    shapes = ((3, C), (R, C), (R,), (K, R, 1, 1), (K,))
    scales = (1, C**-0.5, 1, R**-0.5, 1)
    pooled, *layers = (
        (scale * torch.randn(shape, device=where)).to(dtype)
        for shape, scale in zip(shapes, scales, strict=True)
    )
    options = {"sigmoid": True}
    assert_matches(excite, excite_reference, (pooled, *layers, "relu"), options)
    plan = excite.plan(pooled, *layers, "relu", **options)
    assert torch.equal(plan(pooled), excite(pooled, *layers, "relu", **options))
    if backend.in_force() != "native":  # has no gradient
        for leaf in (pooled, *layers):
            leaf.requires_grad_()
        assert_matches_grad(excite, excite_reference, (pooled, *layers, "relu"), options)


# What two launches make: the first layer is wide, or its sums come in many parts.
LARGE = {
    "wide": Map(3, 24, 513, 3, 3),
    "split": Map(2, 520, 70, 3, 3, "silu"),
    "many-images": Map(600, 24, 66, 2, 1),
    "parts": Map(1, 264, 66, 24, 24, "silu"),
}


@pytest.mark.few(2)
@dtypes
@pytest.mark.parametrize("m", LARGE.values(), ids=LARGE.keys())
@pytest.mark.parametrize("where", ["triton"], indirect=True)
def test_layers_in_two_launches(m, dtype, where):
    layers = make_layers(m, dtype, where)
    assert tiles.excite(m.N, 1, m.C, m.R, m.C, dtype.itemsize, 132).launches == 2
    pooled = torch.randn(m.N, m.C, device=where).to(dtype)
    assert_matches(excite, excite_reference, (pooled, *layers, m.act), {"sigmoid": True})
    x = make_map(m, dtype, CHANNELS_LAST, where)
    assert_matches(squeeze_excite, squeeze_excite_reference, (x, *layers, m.act))


def test_many_images_in_one_launch(device):
    pytest.importorskip("triton")
    m = Map(600, 24, 6, 1, 1)
    arguments = (torch.randn(m.N, m.C, device=device), *make_layers(m, torch.float32, device))
    excite_by_triton = functools.partial(excite, backend="triton")
    assert_matches(excite_by_triton, excite_reference, arguments)


@halves
@pytest.mark.parametrize("m", [SMALL["several-blocks"], LARGE["split"]], ids=["one", "two"])
def test_products_with_16_bit_weights_keep_more_digits_than_those(m, dtype, device):
    """Means and hidden layer enter them as sums of two numbers."""
    pytest.importorskip("triton")
    x, layers = make_map(m, dtype, CHANNELS_LAST, device), make_layers(m, dtype, device)
    _, mean, gate = torch.ops.cvkernels.squeeze_excite(x, *layers, m.act, None, "none", "triton")
    exact_mean = x.double().mean((2, 3))
    exact = excite_reference(exact_mean, *(t.double() for t in layers), m.act)
    for ours, theirs in ((mean, exact_mean), (gate, exact)):
        assert max_error(ours, theirs) <= torch.finfo(dtype).eps / 32 * theirs.abs().max()


@pytest.mark.pairwise
@fused
@pytest.mark.parametrize(("m", "act", "residual"), ends(SMALL))
@dtypes
def test_se_scale_scales_each_channel(m, dtype, act, residual, memory_format, where):
    x, added = (make_map(m, dtype, memory_format, where) for _ in range(2))
    gate = (3 * torch.randn(m.N, m.C, device=where)).to(dtype)
    assert_matches(se_scale, se_scale_reference, (x, gate, added if residual else None, act))


@pytest.mark.pairwise
@fused
@small_maps
@dtypes
@residuals
def test_squeeze_excite_is_the_block(m, dtype, residual, memory_format, where):
    x, added = (make_map(m, dtype, memory_format, where) for _ in range(2))
    end = (added, "relu") if residual else ()
    arguments = (x, *make_layers(m, dtype, where), m.act, *end)
    assert_matches(squeeze_excite, squeeze_excite_reference, arguments)
    nhwc = x.stride(1) == 1 and m.C > 1
    expected = CHANNELS_LAST if nhwc else torch.contiguous_format
    assert squeeze_excite(*arguments).is_contiguous(memory_format=expected)


def test_the_maps_cover_several_parts():
    x = make_map(SMALL["several-parts"], torch.float32, CHANNELS_LAST, "cpu")
    assert tiles.parts_of(x, 132) > 1 and tiles.parts_of(x, 132, tiles.BACKWARD) > 1


@pytest.mark.parametrize("sms", [108, 132, 148])
@pytest.mark.parametrize("N", [1, 8, 128])
@pytest.mark.parametrize("m", NETWORKS.values(), ids=NETWORKS.keys())
def test_parts_leave_few_multiprocessors_idle(m, N, sms):
    """Nine tenths of their time is used, or a part has no more than three steps."""
    for of in (tiles.SQUEEZE, tiles.BACKWARD):
        tile = tiles.reduction((N, m.C, m.H, m.W), 2, 8, of, sms)
        assert (tile.parts - 1) * tile.pixels_per_part < m.H * m.W
        assert tile.parts * tile.pixels_per_part >= m.H * m.W
        programs = N * -(-m.C // tile.block_c) * tile.parts
        of_sm = programs / sms
        busy = of_sm >= 0.9 * of.resident and of_sm >= 0.8 * -(-programs // sms)
        assert busy or tile.pixels_per_part <= 3 * tile.block_p


@pytest.mark.parametrize("name", ["seresnet50.layer1", "efficientnet_b0.1", "efficientnet_b0.2.0"])
def test_large_maps_keep_their_means(name, memory_format, native):
    m = NETWORKS[name]
    x = make_map(m, torch.float32, memory_format, "cpu") + 0.1
    assert_matches(functools.partial(squeeze, backend="native"), squeeze_reference, (x,))
    arguments = (x, *make_layers(m, torch.float32, "cpu"), m.act)
    assert_matches(squeeze_excite, squeeze_excite_reference, arguments)


# Outputs of 8 MB or more are written past the caches: rows shorter and longer than what is written
# at once, and no whole number of lines.
STREAMED = {
    "float32": (Map(2, 37, 3, 173, 173), torch.float32),
    "float16": (Map(3, 4099, 3, 21, 17), torch.float16),
}


@pytest.mark.parametrize(("m", "dtype"), STREAMED.values(), ids=STREAMED.keys())
def test_outputs_that_no_cache_holds(m, dtype, memory_format, native):
    x, added = (make_map(m, dtype, memory_format, "cpu") for _ in range(2))
    assert x.nbytes >= 2**23
    block = functools.partial(squeeze_excite, backend="native")
    arguments = (x, *make_layers(m, dtype, "cpu"), m.act, added, "relu")
    assert_matches(block, squeeze_excite_reference, arguments)
    expected = block(*arguments)
    # Memory that is aligned to an element alone, then in place, which is not past the caches.
    out = torch.empty(x.numel() + 1, dtype=dtype)[1:].as_strided(x.shape, x.stride())
    for target in (out, x):
        assert torch.equal(block(*arguments, out=target), expected)


@every_backend
@dtypes
def test_float32_parameters_beside_half_maps(dtype, where):
    x = make_map(ODD, dtype, CHANNELS_LAST, where)
    layers = make_layers(ODD, torch.float32, where)
    assert_matches(squeeze_excite, squeeze_excite_reference, (x, *layers))
    gate = torch.randn(ODD.N, ODD.C, device=where)
    assert_matches(se_scale, se_scale_reference, (x, gate))


@every_backend
def test_layers_without_biases_and_as_matrices(where):
    x = make_map(ODD, torch.float32, CHANNELS_LAST, where)
    weight1, _, weight2, _ = make_layers(ODD, torch.float32, where)
    arguments = (x, weight1.flatten(1), None, weight2.flatten(1), None, "silu")
    assert_matches(squeeze_excite, squeeze_excite_reference, arguments)


@every_backend
@dtypes
def test_excite_of_sums(dtype, where):
    m = SMALL["nine-images"]
    x, layers = make_map(m, dtype, CHANNELS_LAST, where), make_layers(m, dtype, where)
    y = excite(x.float().sum((2, 3)), *layers, "silu", count=m.H * m.W, sigmoid=True)
    eager = excite_reference(x.mean((2, 3)), *layers, "silu", sigmoid=True)
    doubles = [t.double() for t in (x.mean((2, 3), dtype=torch.float64), *layers)]
    assert_close_as_eager(y, eager, excite_reference(*doubles, "silu", sigmoid=True))


@every_backend
def test_float16_sums_do_not_overflow(memory_format, where):
    x = torch.full((1, 8, 80, 80), 1000.0, dtype=torch.float16, device=where)
    x = x.contiguous(memory_format=memory_format)
    assert torch.equal(squeeze(x), torch.full_like(x[:, :, 0, 0], 1000))


@halves
def test_every_16_bit_number_passes_unchanged(dtype, native):
    bits = torch.arange(-(2**15), 2**15, dtype=torch.int32).to(torch.int16)
    x = bits.view(dtype).view(1, 64, 32, 32)
    y = se_scale(x, torch.full((1, 64), 200.0, dtype=dtype), backend="native")
    assert_same_numbers(y, x)


@halves
def test_rounding_is_pytorchs(dtype, native):
    """Layers of zeros and a bias in float32: all that happens to the bias is its rounding."""
    edges = [0.0, -0.0, 65519.0, 65520.0, 2.0**-25, 1.5 * 2.0**-24, 1e38, torch.inf, torch.nan]
    bias = torch.cat([torch.randn(9999) * 10.0**e for e in range(-9, 6)] + [torch.tensor(edges)])
    C = bias.numel()
    layers = (torch.zeros(1, C), None, torch.zeros(C, 1), bias)
    y = excite(torch.zeros(1, C, dtype=dtype), *layers, backend="native")
    assert_same_numbers(y, bias.to(dtype)[None])


@every_backend
@acts
@dtypes
def test_nan_and_infinity_propagate(act, dtype, memory_format, where):
    m = Map(2, 24, 6, 4, 5)
    x, layers = make_map(m, dtype, memory_format, where), make_layers(m, dtype, where)
    x[0, 3, 1, 2], x[0, 4, 0, 0], x[1, 5, 2, 2] = torch.nan, torch.inf, -torch.inf
    gate = torch.randn(2, 24, device=where).to(dtype)
    gate[1, 7], gate[1, 8], gate[1, 9] = torch.nan, torch.inf, -torch.inf
    for function, reference, arguments in (
        (squeeze, squeeze_reference, (x,)),
        (se_scale, se_scale_reference, (x, gate, None, act)),
        (squeeze_excite, squeeze_excite_reference, (x, *layers, "silu", None, act)),
    ):
        y, expected = function(*arguments), reference(*arguments)
        assert torch.equal(y.isnan(), expected.isnan()) and y.isnan().any()
        assert torch.equal(y.isinf(), expected.isinf())


# Layouts and out


@fused
@pytest.mark.parametrize("view", STRIDED.values(), ids=STRIDED.keys())
@pytest.mark.parametrize("other", [False, True], ids=["residual-alike", "residual-other-layout"])
def test_any_strides(view, other, memory_format, where):
    whole = make_map(Map(2, 48, 4, 9, 8), torch.float32, memory_format, where)
    x = view(whole)
    added = torch.randn(x.shape, device=where) if other else view(whole + 1)
    layers = make_layers(Map(*x.shape[:2], 6, *x.shape[2:]), torch.float32, where)
    gate = torch.randn(x.shape[:2], device=where)
    block = (x, *layers, "relu", added, "relu")
    assert_matches(squeeze_excite, squeeze_excite_reference, block)
    assert_matches(squeeze, squeeze_reference, (x,))
    assert_matches(se_scale, se_scale_reference, (x, gate, added, "silu"))


def block_call(where, memory_format=CHANNELS_LAST):
    """A map, layers, a residual and a gate."""
    m = Map(3, 24, 6, 5, 6)
    x, residual = (make_map(m, torch.float32, memory_format, where) for _ in range(2))
    return x, make_layers(m, torch.float32, where), residual, torch.randn(3, 24, device=where)


@every_backend
@pytest.mark.parametrize("target", ["x", "residual", "new", "slice", "nchw", "strided"])
def test_out_is_written_and_returned(target, memory_format, where):
    def block(x, residual, **out):
        return squeeze_excite(x, *layers, "relu", residual, "relu", **out)

    def scaled(x, residual, **out):
        return se_scale(x, gate, residual, "silu", **out)

    for run in (block, scaled):
        x, layers, residual, gate = block_call(where, memory_format)
        with backend.use("reference"):
            expected = run(x, residual)
        buffer = torch.full((3, 64, 5, 6), 7.0, device=where).contiguous(
            memory_format=CHANNELS_LAST
        )
        out = {
            "x": x, "residual": residual, "new": torch.empty_like(x), "slice": buffer[:, 8:32],
            "nchw": torch.empty(x.shape, device=where),
            "strided": torch.empty(3, 24, 6, 5, device=where).transpose(2, 3),
        }[target]  # fmt: skip
        assert run(x, residual, out=out) is out
        assert torch.allclose(out, expected, atol=1e-5)
        assert (buffer[:, :8] == 7).all() and (buffer[:, 32:] == 7).all()


BAD_OUT = {
    "shape": (ValueError, "out must have x's shape", lambda x: x.new_empty(3, 24, 5, 5)),
    "dtype": (TypeError, "out must have x's dtype", lambda x: x.double()),
    "device": (ValueError, "out must be on x's device", lambda x: x.to("meta")),
    "expanded": (ValueError, "must not overlap itself", lambda x: x[:1].expand(3, -1, -1, -1)),
}


@every_backend
@pytest.mark.parametrize(("error", "message", "make"), BAD_OUT.values(), ids=BAD_OUT.keys())
def test_bad_out_is_refused(error, message, make, where):
    x, layers, _, gate = block_call(where)
    for function, arguments in ((se_scale, (x, gate)), (squeeze_excite, (x, *layers))):
        with pytest.raises(error, match=f"{function.__name__}: .*{message}"):
            function(*arguments, out=make(x))


@every_backend
def test_out_that_overlaps_an_argument_in_part_is_refused(where):
    buffer, gate, apart = (
        torch.randn(shape, device=where) for shape in ((2, 32, 4, 4), (2, 16), (2, 16, 4, 4))
    )
    buffer = buffer.contiguous(memory_format=CHANNELS_LAST)
    x, shifted, other = buffer[:, :16], buffer[:, 8:24], buffer[:, 16:]
    for arguments in ((x, gate), (apart, gate, x)):
        with pytest.raises(ValueError, match="se_scale: out overlaps (x|residual)"):
            se_scale(*arguments, out=shifted)
    flat = torch.randn(2 * 16 * 17, device=where)
    out, inside = flat[:512].view(2, 16, 4, 4), flat[16:48].view(2, 16)
    with pytest.raises(ValueError, match="se_scale: out overlaps gate"):
        se_scale(apart, inside, out=out)
    expected = se_scale_reference(x, gate)
    assert torch.allclose(se_scale(x, gate, out=other), expected)


def test_out_is_not_differentiable_and_autograd_hears_of_it(native):
    x, layers, _, gate = block_call("cpu")
    leaf = x.clone().requires_grad_()
    with pytest.raises(ValueError, match="out= is not differentiable"):
        se_scale(leaf, gate, out=torch.empty_like(x))
    weight = torch.ones_like(x, requires_grad=True)
    loss = (weight * x).sum()
    squeeze_excite(x, *layers, out=x)
    with pytest.raises(RuntimeError, match="modified by an inplace operation"):
        loss.backward()


@every_backend
def test_results_are_never_views(where):
    x = torch.ones(1, 8, 1, 1, device=where)
    assert squeeze(x).data_ptr() != x.data_ptr()
    se_scale(x, torch.full((1, 8), 100.0, device=where)).zero_()
    assert x.min() == 1


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
