"""Random calls of the public ops within what their docstrings allow, for hypothesis."""

from __future__ import annotations

from dataclasses import dataclass, field

import torch
from hypothesis import strategies as st
from torch import Tensor

from cvkernels.functional import BatchNormParams

DTYPES = (torch.float32, torch.bfloat16, torch.float16, torch.float64)
LAYOUTS = (
    "contiguous", "channels_last", "channel slice", "plane slice", "every other row", "window",
    "transposed", "one image for all", "offset",
)  # fmt: skip
Draw = st.DrawFn


@dataclass(frozen=True)
class RandomCall:
    """``op(*arguments, **options)``, which writes into ``written`` where that is given."""

    op: str
    arguments: tuple
    options: dict = field(default_factory=dict)
    written: Tensor | None = None


def numbers(draw: Draw, shape: tuple[int, ...], dtype: torch.dtype) -> Tensor:
    """Normal ones; a mean and a map of one seed differ, so that none lies on the kink of a ReLU."""
    seed = 8 * draw(st.integers(0, 1 << 16)) + len(shape)
    generator = torch.Generator().manual_seed(seed)
    return torch.randn(shape, generator=generator, dtype=torch.float64).to(dtype)


def a_map(draw: Draw, shape: tuple[int, int, int, int], dtype: torch.dtype,
          layouts: tuple[str, ...] = LAYOUTS) -> Tensor:  # fmt: skip
    """A map in one of many layouts."""
    N, C, H, W = shape
    layout = draw(st.sampled_from(layouts))
    nhwc = torch.channels_last
    if layout == "channels_last":
        return numbers(draw, shape, dtype).contiguous(memory_format=nhwc)
    if layout == "channel slice":
        return numbers(draw, (N, C + 5, H, W), dtype).contiguous(memory_format=nhwc)[:, 3 : 3 + C]
    if layout == "plane slice":
        return numbers(draw, (N, C + 2, H, W), dtype)[:, 1 : 1 + C]
    if layout == "every other row":
        return numbers(draw, (N, C, 2 * H, W), dtype).contiguous(memory_format=nhwc)[:, :, ::2]
    if layout == "window":
        wider = numbers(draw, (N, C, H + 3, W + 2), dtype).contiguous(memory_format=nhwc)
        return wider[:, :, 1 : 1 + H, 2 : 2 + W]
    if layout == "transposed":
        return numbers(draw, (N, C, W, H), dtype).transpose(2, 3)
    if layout == "one image for all":
        return numbers(draw, (1, C, H, W), dtype).expand(N, C, H, W)
    if layout == "offset":
        return numbers(draw, (N * C * H * W + 1,), dtype)[1:].view(shape)
    return numbers(draw, shape, dtype)


def a_vector(draw: Draw, size: int, dtype: torch.dtype | None = None) -> Tensor:
    """Of any floating dtype, or of this; its elements may lie apart."""
    kind = draw(st.sampled_from(DTYPES)) if dtype is None else dtype
    step = draw(st.sampled_from((1, 1, 2)))
    return numbers(draw, (size * step,), kind)[::step]


def maybe(draw: Draw, make, *arguments):
    return make(draw, *arguments) if draw(st.booleans()) else None


def a_norm(draw: Draw, channels: int) -> BatchNormParams:
    weight, bias = maybe(draw, a_vector, channels), maybe(draw, a_vector, channels)
    if (weight is not None or bias is not None) and draw(st.booleans()):
        return BatchNormParams(weight, bias)
    mean, var = a_vector(draw, channels), a_vector(draw, channels).abs() + 0.5
    return BatchNormParams(weight, bias, mean, var, draw(st.sampled_from((1e-5, 1e-3))))


def a_shape(draw: Draw, least: int = 0) -> tuple[int, int, int, int]:
    """Of a map: no image, or few; channels that divide nothing, too."""
    N = draw(st.integers(least, 3))
    C = draw(st.one_of(st.integers(1, 20), st.sampled_from((32, 48, 64))))
    return N, C, draw(st.integers(1, 12)), draw(st.integers(1, 12))


def a_size(draw: Draw, values: tuple[int, ...]) -> int | tuple[int, int]:
    """One number, or one for each side."""
    if draw(st.booleans()):
        return draw(st.sampled_from(values))
    return draw(st.sampled_from(values)), draw(st.sampled_from(values))


def sides(value: int | tuple[int, int]) -> tuple[int, int]:
    return value if isinstance(value, tuple) else (value, value)


def windows(size: tuple[int, int], kernel, stride, padding, dilation) -> tuple[int, int]:
    """How many windows of a convolution fit, in height and width; negative where none does."""
    found = [
        (side + 2 * p - d * (k - 1) - 1) // s + 1
        for side, k, s, p, d in zip(
            size, *map(sides, (kernel, stride, padding, dilation)), strict=True
        )
    ]
    return found[0], found[1]


@st.composite
def conv_bn_act(draw: Draw) -> RandomCall:
    N, C, H, W = a_shape(draw)
    dtype = draw(st.sampled_from(DTYPES))
    groups = draw(st.sampled_from([g for g in range(1, C + 1) if C % g == 0][:4]))
    K = groups * draw(st.integers(1, 3 if groups > 1 else 40))
    kernel = sides(a_size(draw, (1, 1, 3, 3, 5)))
    geometry = {
        "stride": a_size(draw, (1, 1, 2, 3)), "padding": a_size(draw, (0, 1, 2)),
        "dilation": a_size(draw, (1, 1, 2)),
    }  # fmt: skip
    P, Q = windows((H, W), kernel, *geometry.values())
    shape = (N, K, max(P, 1), max(Q, 1))
    options = {"groups": groups, **geometry}
    options["act"] = draw(st.sampled_from(("none", "relu", "relu6", "silu")))
    options["residual"] = maybe(draw, a_map, shape, dtype)
    options["input_bn"] = maybe(draw, a_norm, C)
    options["input_gate"] = a_gate(draw, N, C) if draw(st.booleans()) else None
    options["output_gate"] = a_gate(draw, N, K) if draw(st.booleans()) else None
    out = None
    if draw(st.booleans()):
        out = a_map(draw, shape, dtype, ("channels_last", "channel slice"))
        options["out"] = out
    weight = numbers(draw, (K, C // groups, *kernel), dtype) / (C // groups * kernel[0]) ** 0.5
    if draw(st.booleans()):
        weight = weight.contiguous(memory_format=torch.channels_last)
    x = a_map(draw, (N, C, H, W), dtype)
    bias, bn = maybe(draw, a_vector, K), maybe(draw, a_norm, K)
    return RandomCall("conv_bn_act", (x, weight, bias, bn), options, out)


def a_gate(draw: Draw, N: int, channels: int) -> Tensor:
    """Multipliers of any floating dtype."""
    return numbers(draw, (N, channels), draw(st.sampled_from(DTYPES))).sigmoid()


@st.composite
def depthwise_conv_bn_act(draw: Draw) -> RandomCall:
    shape, dtype = a_shape(draw), draw(st.sampled_from(DTYPES))
    C = shape[1]
    kernel = sides(draw(st.sampled_from((1, 3, 3, 5, 5, (3, 5)))))
    options = {
        "stride": a_size(draw, (1, 1, 2, 3)), "padding": a_size(draw, (0, 1, 2)),
        "dilation": a_size(draw, (1, 1, 1, 2)),
        "act": draw(st.sampled_from(("none", "relu", "relu6", "silu"))),
        "squeeze": draw(st.booleans()),
    }  # fmt: skip
    x, weight = a_map(draw, shape, dtype), numbers(draw, (C, 1, *kernel), dtype)
    bias, bn = maybe(draw, a_vector, C), maybe(draw, a_norm, C)
    return RandomCall("depthwise_conv_bn_act", (x, weight, bias, bn), options)


@st.composite
def batch_norm_act(draw: Draw) -> RandomCall:
    N, C, H, W = a_shape(draw, least=1)
    shape, dtype = (N, C, H + 1, W), draw(st.sampled_from(DTYPES))
    residual = maybe(draw, a_map, shape, dtype)
    acts = ("none", "relu") if residual is not None else ("none", "relu", "silu")
    options = {"act": draw(st.sampled_from(acts)), "residual": residual}
    vectors = maybe(draw, a_vector, C), maybe(draw, a_vector, C)
    return RandomCall("batch_norm_act", (a_map(draw, shape, dtype), *vectors), options)


def a_pool(draw: Draw) -> tuple[tuple[int, int, int, int], dict]:
    kernel = sides(a_size(draw, (1, 2, 3, 4)))
    padding = tuple(draw(st.integers(0, k // 2)) for k in kernel)
    stride = draw(st.sampled_from((None, 1, 2, (2, 3))))
    options = {"kernel_size": kernel, "stride": stride, "padding": padding}
    return a_shape(draw), options | {"ceil_mode": draw(st.booleans())}


def with_out(draw: Draw, op: str, x: Tensor, options: dict) -> RandomCall:
    """The call of a pool, which may write into a given tensor of its result's shape."""
    out = None
    if draw(st.booleans()):
        pool = getattr(torch.nn.functional, f"{op}2d")
        known = {k: v for k, v in options.items() if k != "input_bn"}
        known["stride"] = known["stride"] or known["kernel_size"]
        try:
            shape = pool(torch.empty(x.shape, device="meta"), **known).shape
        except RuntimeError:  # no window fits
            return RandomCall(op, (x,), options)
        written = tuple(layout for layout in LAYOUTS if layout != "one image for all")
        out = a_map(draw, shape, x.dtype, written)
        options = options | {"out": out}
    return RandomCall(op, (x,), options, out)


@st.composite
def max_pool(draw: Draw) -> RandomCall:
    shape, options = a_pool(draw)
    x = a_map(draw, shape, draw(st.sampled_from(DTYPES)))
    return with_out(draw, "max_pool", x, options | {"dilation": a_size(draw, (1, 1, 2))})


@st.composite
def avg_pool(draw: Draw) -> RandomCall:
    shape, options = a_pool(draw)
    x = a_map(draw, shape, draw(st.sampled_from(DTYPES)))
    options["count_include_pad"] = draw(st.booleans())
    options["divisor_override"] = draw(st.sampled_from((None, None, 3)))
    options["input_bn"] = maybe(draw, a_norm, shape[1])
    return with_out(draw, "avg_pool", x, options)


@st.composite
def dense_concat(draw: Draw) -> RandomCall:
    N, C, H, W = a_shape(draw)
    dtype, start = draw(st.sampled_from(DTYPES)), draw(st.integers(0, 5))
    total = start + C + draw(st.integers(0, 5))
    layouts = tuple(layout for layout in LAYOUTS if layout != "one image for all")
    buffer = a_map(draw, (N, total, H, W), dtype, layouts)
    bn, relu = maybe(draw, a_norm, C), draw(st.booleans())
    arguments = (buffer, a_map(draw, (N, C, H, W), dtype), start, bn, relu)
    return RandomCall("dense_concat", arguments, {}, buffer)


@st.composite
def squeeze(draw: Draw) -> RandomCall:
    return RandomCall("squeeze", (a_map(draw, a_shape(draw), draw(st.sampled_from(DTYPES))),))


def some_layers(draw: Draw, C: int, K: int, dtype: torch.dtype) -> tuple[Tensor | None, ...]:
    """Two layers with a hidden one between; of x's dtype, or float32 beside a half."""
    half = dtype in (torch.float16, torch.bfloat16)
    kind = draw(st.sampled_from((dtype, torch.float32))) if half else dtype
    R, ends = draw(st.integers(1, 20)), draw(st.sampled_from(((), (1, 1))))
    weight1 = numbers(draw, (R, C, *ends), kind) / C**0.5
    weight2 = numbers(draw, (K, R, *ends), kind) / R**0.5
    return weight1, maybe(draw, a_vector, R, kind), weight2, maybe(draw, a_vector, K, kind)


@st.composite
def excite(draw: Draw) -> RandomCall:
    dtype, C = draw(st.sampled_from(DTYPES)), draw(st.integers(1, 40))
    K = draw(st.sampled_from((C, C + 3)))
    options = {"act": draw(st.sampled_from(("relu", "silu"))), "sigmoid": draw(st.booleans())}
    pooled = numbers(draw, (draw(st.integers(0, 3)), C), dtype)
    return RandomCall("excite", (pooled, *some_layers(draw, C, K, dtype)), options)


@st.composite
def se_scale(draw: Draw) -> RandomCall:
    shape, dtype = a_shape(draw), draw(st.sampled_from(DTYPES))
    x, residual = a_map(draw, shape, dtype), maybe(draw, a_map, shape, dtype)
    half = dtype in (torch.float16, torch.bfloat16)
    gate = numbers(draw, shape[:2], torch.float32 if half and draw(st.booleans()) else dtype)
    options = {"act": draw(st.sampled_from(("none", "relu", "silu")))}
    layouts = tuple(layout for layout in LAYOUTS if layout != "one image for all")
    out = maybe(draw, a_map, shape, dtype, layouts)
    return RandomCall("se_scale", (x, gate, residual), options | {"out": out}, out)


@st.composite
def squeeze_excite(draw: Draw) -> RandomCall:
    shape, dtype = a_shape(draw), draw(st.sampled_from(DTYPES))
    C = shape[1]
    residual = maybe(draw, a_map, shape, dtype)
    options = {
        "act": draw(st.sampled_from(("relu", "silu"))), "residual": residual,
        "out_act": draw(st.sampled_from(("none", "relu", "silu"))),
    }  # fmt: skip
    x = a_map(draw, shape, dtype)
    return RandomCall("squeeze_excite", (x, *some_layers(draw, C, C, dtype)), options)


CALLS = {
    strategy.__name__: strategy()
    for strategy in (
        avg_pool, batch_norm_act, conv_bn_act, dense_concat, depthwise_conv_bn_act, excite,
        max_pool, se_scale, squeeze, squeeze_excite,
    )
}  # fmt: skip
