"""se_scale, squeeze, excite and squeeze_excite: every promise of their docstrings."""

import pytest
import torch

from cvkernels.functional import excite, se_scale, squeeze, squeeze_excite
from cvkernels.ops.squeeze_excite.reference import (
    excite_reference,
    se_scale_reference,
    squeeze_excite_reference,
    squeeze_reference,
)
from tests.support.cases.squeeze_excite import NETWORKS, SMALL, Map, make_layers, make_map
from tests.support.cases.views import STRIDED
from tests.support.numerics import assert_close_as_eager, assert_matches

DTYPES = [torch.float32, torch.float16, torch.bfloat16]
CHANNELS_LAST = torch.channels_last
ODD = SMALL["odd"]


def with_backend(function, name):
    return lambda *args, **kwargs: function(*args, backend=name, **kwargs)


small_maps = pytest.mark.parametrize("m", SMALL.values(), ids=SMALL.keys())
dtypes = pytest.mark.parametrize("dtype", DTYPES, ids=str)
acts = pytest.mark.parametrize("act", ["none", "relu", "silu"])


# Numbers


@small_maps
@dtypes
def test_squeeze_is_the_mean(m, dtype, memory_format, native):
    x = make_map(m, dtype, memory_format, "cpu")
    assert_matches(with_backend(squeeze, "native"), squeeze_reference, (x,))


@small_maps
@dtypes
@pytest.mark.parametrize("sigmoid", [False, True], ids=["logits", "multiplier"])
def test_excite_is_two_layers(m, dtype, sigmoid, native):
    pooled = torch.randn(m.N, m.C).to(dtype)
    arguments = (pooled, *make_layers(m, dtype, "cpu"), m.act)
    native_excite = with_backend(excite, "native")
    assert_matches(native_excite, excite_reference, arguments, {"sigmoid": sigmoid})


@small_maps
@dtypes
@acts
@pytest.mark.parametrize("residual", [False, True], ids=["alone", "residual"])
def test_se_scale_scales_each_channel(m, dtype, act, residual, memory_format, native):
    x = make_map(m, dtype, memory_format, "cpu")
    gate = (3 * torch.randn(m.N, m.C)).to(dtype)
    added = make_map(m, dtype, memory_format, "cpu") if residual else None
    assert_matches(with_backend(se_scale, "native"), se_scale_reference, (x, gate, added, act))


@small_maps
@dtypes
@pytest.mark.parametrize("residual", [False, True], ids=["alone", "residual"])
def test_squeeze_excite_is_the_block(m, dtype, residual, memory_format, native):
    x = make_map(m, dtype, memory_format, "cpu")
    added = make_map(m, dtype, memory_format, "cpu") if residual else None
    out_act = "relu" if residual else "none"
    arguments = (x, *make_layers(m, dtype, "cpu"), m.act, added, out_act)
    assert_matches(with_backend(squeeze_excite, "native"), squeeze_excite_reference, arguments)
    y = squeeze_excite(*arguments, backend="native")
    nhwc = x.stride(1) == 1 and m.C > 1
    assert y.is_contiguous(memory_format=CHANNELS_LAST if nhwc else torch.contiguous_format)


@pytest.mark.parametrize("name", ["seresnet50.layer1", "efficientnet_b0.1"])
def test_large_maps_keep_their_means(name, memory_format, native):
    x = make_map(NETWORKS[name], torch.float32, memory_format, "cpu") + 0.1
    assert_matches(with_backend(squeeze, "native"), squeeze_reference, (x,))


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
    arguments = (x, *make_layers(m, dtype, "cpu"), m.act, added, "relu")
    assert_matches(with_backend(squeeze_excite, "native"), squeeze_excite_reference, arguments)
    expected = squeeze_excite(*arguments, backend="native")
    # Memory that is aligned to an element alone, then in place, which is not past the caches.
    out = torch.empty(x.numel() + 1, dtype=dtype)[1:].as_strided(x.shape, x.stride())
    for target in (out, x):
        squeeze_excite(*arguments, backend="native", out=target)
        assert torch.equal(target, expected)


@dtypes
def test_float32_parameters_beside_half_maps(dtype, implementation):
    x = make_map(ODD, dtype, CHANNELS_LAST, "cpu")
    layers = make_layers(ODD, torch.float32, "cpu")
    run = with_backend(squeeze_excite, implementation)
    assert_matches(run, squeeze_excite_reference, (x, *layers))
    gate = torch.randn(ODD.N, ODD.C)
    assert_matches(with_backend(se_scale, implementation), se_scale_reference, (x, gate))


def test_layers_without_biases_and_as_matrices(implementation):
    x = make_map(ODD, torch.float32, CHANNELS_LAST, "cpu")
    weight1, _, weight2, _ = make_layers(ODD, torch.float32, "cpu")
    arguments = (x, weight1.flatten(1), None, weight2.flatten(1), None, "silu")
    assert_matches(
        with_backend(squeeze_excite, implementation), squeeze_excite_reference, arguments
    )


@dtypes
def test_excite_of_sums(dtype, implementation):
    m = SMALL["nine-images"]
    x = make_map(m, dtype, CHANNELS_LAST, "cpu")
    layers = make_layers(m, dtype, "cpu")
    sums, count = x.float().sum((2, 3)), m.H * m.W
    y = excite(sums, *layers, "silu", count=count, sigmoid=True, backend=implementation)
    eager = excite_reference(x.mean((2, 3)), *layers, "silu", sigmoid=True)
    doubles = [t.double() for t in (x.mean((2, 3), dtype=torch.float64), *layers)]
    assert_close_as_eager(y, eager, excite_reference(*doubles, "silu", sigmoid=True))


def test_float16_sums_do_not_overflow(memory_format, implementation):
    x = torch.full((1, 8, 80, 80), 1000.0, dtype=torch.float16).contiguous(
        memory_format=memory_format
    )
    assert torch.equal(squeeze(x, backend=implementation), torch.full_like(x[:, :, 0, 0], 1000))


@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16], ids=str)
def test_every_16_bit_number_passes_unchanged(dtype, native):
    bits = torch.arange(-(2**15), 2**15, dtype=torch.int32).to(torch.int16)
    x = bits.view(dtype).view(1, 64, 32, 32)
    y = se_scale(x, torch.full((1, 64), 200.0, dtype=dtype), backend="native")
    assert torch.equal(y.isnan(), x.isnan())
    assert torch.equal(y.nan_to_num(7.0), x.nan_to_num(7.0))


@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16], ids=str)
def test_rounding_is_pytorchs(dtype, native):
    """Layers of zeros and a bias in float32: all that happens to the bias is its rounding."""
    edges = [0.0, -0.0, 65519.0, 65520.0, 2.0**-25, 1.5 * 2.0**-24, 1e38, torch.inf, torch.nan]
    bias = torch.cat([torch.randn(9999) * 10.0**e for e in range(-9, 6)] + [torch.tensor(edges)])
    C = bias.numel()
    pooled = torch.zeros(1, C, dtype=dtype)
    y = excite(pooled, torch.zeros(1, C), None, torch.zeros(C, 1), bias, backend="native")
    expected = bias.to(dtype)[None]
    assert torch.equal(y.isnan(), expected.isnan())
    assert torch.equal(y.nan_to_num(7.0), expected.nan_to_num(7.0))


@acts
@dtypes
def test_nan_and_infinity_propagate(act, dtype, memory_format, implementation):
    x = make_map(Map(2, 24, 6, 4, 5), dtype, memory_format, "cpu")
    x[0, 3, 1, 2], x[0, 4, 0, 0], x[1, 5, 2, 2] = torch.nan, torch.inf, -torch.inf
    layers = make_layers(Map(2, 24, 6, 4, 5), dtype, "cpu")
    gate = torch.randn(2, 24).to(dtype)
    gate[1, 7], gate[1, 8], gate[1, 9] = torch.nan, torch.inf, -torch.inf
    for function, reference, arguments in (
        (squeeze, squeeze_reference, (x,)),
        (se_scale, se_scale_reference, (x, gate, None, act)),
        (squeeze_excite, squeeze_excite_reference, (x, *layers, "silu", None, act)),
    ):
        y, expected = function(*arguments, backend=implementation), reference(*arguments)
        assert torch.equal(y.isnan(), expected.isnan())
        assert torch.equal(y.isinf(), expected.isinf())
        assert y.isnan().any()


# Layouts


@pytest.mark.parametrize("view", STRIDED.values(), ids=STRIDED.keys())
@pytest.mark.parametrize("other", [False, True], ids=["residual-alike", "residual-other-layout"])
def test_any_strides(view, other, memory_format, native):
    whole = make_map(Map(2, 48, 4, 11, 12), torch.float32, memory_format, "cpu")
    x = view(whole)
    added = torch.randn(x.shape) if other else view(whole + 1)
    layers = make_layers(Map(*x.shape[:2], 6, *x.shape[2:]), torch.float32, "cpu")
    arguments = (x, *layers, "relu", added, "relu")
    assert_matches(with_backend(squeeze_excite, "native"), squeeze_excite_reference, arguments)
    assert_matches(with_backend(squeeze, "native"), squeeze_reference, (x,))
    gate = torch.randn(x.shape[:2])
    assert_matches(with_backend(se_scale, "native"), se_scale_reference, (x, gate, added, "silu"))


@pytest.mark.parametrize("threads", [2, 3, 4])
@pytest.mark.parametrize(
    "m",
    [Map(1, 136, 12, 20, 21), Map(3, 72, 4, 65, 66), Map(9, 136, 12, 20, 21)],
    ids=["image", "large-images", "images"],
)
def test_number_of_threads_changes_nothing(threads, m, memory_format, native):
    x = make_map(m, torch.float32, memory_format, "cpu")
    layers = make_layers(m, torch.float32, "cpu")
    results = []
    before = torch.get_num_threads()
    for count in (1, threads):
        torch.set_num_threads(count)
        try:
            results.append((squeeze(x, backend="native"), squeeze_excite(x, *layers)))
        finally:
            torch.set_num_threads(before)
    assert all(map(torch.equal, *results))
    assert_matches(squeeze_excite, squeeze_excite_reference, (x, *layers))


# out


@pytest.fixture
def block_call():
    m = Map(3, 24, 6, 5, 6)
    x = make_map(m, torch.float32, CHANNELS_LAST, "cpu")
    residual = make_map(m, torch.float32, CHANNELS_LAST, "cpu")
    return x, make_layers(m, torch.float32, "cpu"), residual, torch.randn(3, 24)


@pytest.mark.parametrize("target", ["x", "residual", "new", "slice", "nchw", "strided"])
def test_out_is_written_and_returned(target, block_call, implementation):
    x, layers, residual, gate = block_call
    expected = squeeze_excite_reference(x, *layers, "relu", residual, "relu")
    scaled = se_scale_reference(x, gate, residual, "silu")
    for run, truth in (
        (lambda x, r, out: squeeze_excite(x, *layers, "relu", r, "relu", out=out,
                                          backend=implementation), expected),
        (lambda x, r, out: se_scale(x, gate, r, "silu", out=out, backend=implementation), scaled),
    ):  # fmt: skip
        own_x, own_residual = (t.clone(memory_format=torch.preserve_format) for t in (x, residual))
        buffer = torch.full((3, 64, 5, 6), 7.0).contiguous(memory_format=CHANNELS_LAST)
        out = {
            "x": own_x,
            "residual": own_residual,
            "new": torch.empty_like(x),
            "slice": buffer[:, 8:32],
            "nchw": torch.empty(x.shape),
            "strided": torch.empty(3, 24, 6, 5).transpose(2, 3),
        }[target]
        assert run(own_x, own_residual, out) is out
        assert torch.allclose(out, truth, atol=1e-5)
        assert (buffer[:, :8] == 7).all() and (buffer[:, 32:] == 7).all()


BAD_OUT = {
    "shape": (ValueError, "out must have x's shape", lambda x: x.new_empty(3, 24, 5, 5)),
    "dtype": (TypeError, "out must have x's dtype", lambda x: x.double()),
    "device": (ValueError, "out must be on x's device", lambda x: x.to("meta")),
    "expanded": (ValueError, "must not overlap itself", lambda x: x[:1].expand(3, -1, -1, -1)),
}


@pytest.mark.parametrize(("error", "message", "make"), BAD_OUT.values(), ids=BAD_OUT.keys())
def test_bad_out_is_refused(error, message, make, block_call, implementation):
    x, layers, _, gate = block_call
    for function, arguments in ((se_scale, (x, gate)), (squeeze_excite, (x, *layers))):
        with pytest.raises(error, match=f"{function.__name__}: .*{message}"):
            function(*arguments, out=make(x), backend=implementation)


def test_out_that_overlaps_an_argument_in_part_is_refused(implementation):
    buffer = torch.randn(2, 32, 4, 4).contiguous(memory_format=CHANNELS_LAST)
    x, shifted, other = buffer[:, :16], buffer[:, 8:24], buffer[:, 16:]
    gate = torch.randn(2, 16)
    for arguments in ((x, gate), (torch.randn(2, 16, 4, 4), gate, x)):
        with pytest.raises(ValueError, match="se_scale: out overlaps (x|residual)"):
            se_scale(*arguments, out=shifted, backend=implementation)
    flat = torch.randn(2 * 16 * 17)
    out, inside = flat[:512].view(2, 16, 4, 4), flat[16:48].view(2, 16)
    with pytest.raises(ValueError, match="se_scale: out overlaps gate"):
        se_scale(torch.randn(2, 16, 4, 4), inside, out=out, backend=implementation)
    expected = se_scale_reference(x, gate)
    assert torch.allclose(se_scale(x, gate, out=other, backend=implementation), expected)


def test_out_is_not_differentiable_and_autograd_hears_of_it(block_call, native):
    x, layers, _, gate = block_call
    leaf = x.clone().requires_grad_()
    with pytest.raises(ValueError, match="out= is not differentiable"):
        se_scale(leaf, gate, out=torch.empty_like(x))
    weight = torch.ones_like(x, requires_grad=True)
    loss = (weight * x).sum()
    squeeze_excite(x, *layers, out=x)
    with pytest.raises(RuntimeError, match="modified by an inplace operation"):
        loss.backward()


def test_results_are_never_views(implementation):
    x = torch.ones(1, 8, 1, 1)
    assert squeeze(x, backend=implementation).data_ptr() != x.data_ptr()
    y = se_scale(x, torch.full((1, 8), 100.0), backend=implementation)
    y.zero_()
    assert x.min() == 1
