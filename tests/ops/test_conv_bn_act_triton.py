"""The Triton kernels of conv_bn_act, in the interpreter without a GPU."""

import functools
import os
from dataclasses import replace

import pytest
import torch

from cvkernels.functional import BatchNormParams, conv_bn_act
from cvkernels.ops.conv_bn_act import tiles, tuning
from cvkernels.ops.conv_bn_act import triton as conv_launches
from cvkernels.ops.conv_bn_act.problem import problem_of
from cvkernels.ops.conv_bn_act.reference import conv_bn_act_reference
from cvkernels.ops.conv_bn_act.tiles import Config
from tests.support.cases.conv_bn_act import ODD, TILED, Conv, add_residual, make_inputs
from tests.support.numerics import assert_matches

# bfloat16 only where it is real: the interpreter's dot is wrong for it
DTYPES = [torch.float32, torch.float16] + [torch.bfloat16] * torch.cuda.is_available()
CASES = ODD | TILED
CHANNELS_LAST = torch.channels_last

by_triton = functools.partial(conv_bn_act, backend="triton")


def make(case, dtype, device, memory_format=CHANNELS_LAST, residual=False, **options):
    """Arguments and options of a case, given or by its name."""
    conv = CASES[case] if isinstance(case, str) else case
    args, geometry = make_inputs(conv, dtype, memory_format, device)
    options |= geometry
    return args, add_residual(args, options) if residual else options


def check(args, options, op=by_triton):
    assert_matches(op, conv_bn_act_reference, args, options)


def problem(x, weight, bias=None, bn=None, out=None, **options):
    """The problem of a call."""
    return problem_of(x, weight, bias, bn, **({"act": "relu"} | options), out=out)


def by_config(config, layout=CHANNELS_LAST):
    """The op with a tile that the heuristic may not choose, and an output of any layout."""

    def run(x, weight, bias, bn, **options):
        p = problem(x, weight, bias, bn, **options)
        out = x.new_full((p.N, p.K, p.P, p.Q), torch.nan).contiguous(memory_format=layout)
        others = (options.get(name) for name in ("residual", "input_bn", "input_gate"))
        args = (p, x, weight, bias, bn, *others, out, None, options.get("output_gate"))
        conv_launches.run(*args, precision="ieee", config=config)
        return out

    return run


@pytest.mark.pairwise
@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize("case", CASES)
def test_matches_the_reference(case, dtype, memory_format, device):
    check(*make(case, dtype, device, memory_format))


@pytest.mark.parametrize("residual", [False, True], ids=["plain", "residual"])
@pytest.mark.parametrize("act", ["none", "relu", "relu6", "silu"])
@pytest.mark.parametrize("case", ["1x1", "3x3-two-strides", "stem-7x7"])
def test_activation_and_residual(case, act, residual, memory_format, device):
    check(*make(case, torch.float16, device, memory_format, residual, act=act))


# every tile the heuristic can choose, on a problem of several tiles either way
SHIPPED = [
    pytest.param(kernel, itemsize, config, id=f"{kernel}-{8 * itemsize}bit-{index}")
    for (kernel, itemsize), configs in tiles.CONFIGS.items()
    for index, config in enumerate(configs)
]


@pytest.mark.few(12)
@pytest.mark.parametrize(("kernel", "itemsize", "config"), SHIPPED)
def test_every_shipped_config(kernel, itemsize, config, device):
    channels, taps = {"1x1": (72, 1), "spatial": (40, 3), "filter_row": (3, 3)}[kernel]
    dtype = torch.float16 if itemsize == 2 else torch.float32
    conv = Conv(channels, 11, 9, 136, taps, taps, 1, taps // 2)
    args, options = make(conv, dtype, device, residual=True)
    assert tiles.kernel(problem(*args, **options)) == kernel
    check(args, options, by_config(config))


@pytest.mark.few(5)
@pytest.mark.parametrize("splits", [2, 3, 8])
@pytest.mark.parametrize("act", ["relu", "silu"])
@pytest.mark.parametrize("case", ["1x1", "1x1-stride", "3x3"])
def test_split_reductions(case, act, splits, memory_format, device):
    """Among them such that some programs have nothing to add."""
    args, options = make(case, torch.float16, device, memory_format, residual=True, act=act)
    config = Config("triton", 64, 32, 32, 4, 2, splits)
    check(args, options, by_config(config))
    run = by_config(config)
    assert torch.equal(run(*args, **options), run(*args, **options))


def test_split_reductions_with_a_prologue(device):
    args, options = make(Conv(200, 5, 5, 24), torch.float16, device)
    options["input_gate"] = torch.rand(2, 200, device=device).half()
    check(args, options, by_config(Config("triton", 64, 32, 32, 4, 2, 3)))


# Channels in packs of 8, 4, 2 and 1 elements, and of 8 in more than the kernels' blocks.
@pytest.mark.parametrize("channels", [(24, 40), (40, 24), (20, 36), (18, 22), (17, 19), (72, 8)])
@pytest.mark.parametrize("taps", [1, 3])
def test_channels_of_all_packs(channels, taps, device):
    given, made = channels
    conv = Conv(given, 5, 7, made, taps, taps, 1, taps // 2)
    args, options = make(conv, torch.float16, device, residual=True)
    check(args, options)


@pytest.mark.parametrize("kernel", [(7, 4), (3, 2), (4, 2)], ids=str)
def test_images_laid_out_in_pairs_of_pixels(kernel, device):
    """Frozen plans' first convolutions: whole packs, no padding, and strides that differ."""
    conv = Conv(8, 13, 10, 24, *kernel)
    args, options = make(conv, torch.float16, device, act="silu")
    options["stride"] = (2, 1)
    p = problem(*args, **options)
    assert tiles.kernel(p) == "filter_row"
    check(args, options)
    check(args, options, by_config(tuning.heuristic(p, (9, 0))))


def test_residuals_fetched_before_the_loop(device):
    args, options = make(Conv(72, 9, 7, 72), torch.float16, device, residual=True)
    config = Config("triton", 128, 64, 32, 8, 2)
    check(args, options, by_config(config))


def test_gate_of_one_image_per_tile(device):
    args, options = make(Conv(40, 16, 8, 32, N=3), torch.float32, device)
    options["input_gate"] = torch.rand(3, 40, device=device)
    config = tuning.heuristic(problem(*args, **options), (9, 0))
    check(args, options, by_config(replace(config, block_m=64)))


@pytest.mark.parametrize("channels", [5, 32], ids=["filter_row", "spatial"])
def test_padding_is_zero_after_the_prologue(channels, device):
    x, ones = torch.zeros(1, channels, 3, 3, device=device), torch.ones(channels, device=device)
    weight = torch.ones(16, channels, 3, 3, device=device)
    taps = torch.tensor([4.0, 6, 4, 6, 9, 6, 4, 6, 4], device=device).view(3, 3)
    out = by_triton(x, weight, padding=1, input_bn=BatchNormParams(ones, 2 * ones))
    assert torch.equal(out, (2 * channels * taps).expand(1, 16, 3, 3))


def test_vectors_of_a_norm_in_mixed_dtypes(device):
    (*args, bn), options = make("1x1", torch.float16, device)
    mixed = bn._replace(weight=bn.weight.half(), bias=bn.bias.half())
    same = BatchNormParams(*(v.float() for v in mixed[:4]), bn.eps)
    check((*args, same), options, lambda *a, **o: by_triton(*args, mixed, **o))


@pytest.mark.parametrize("case", ["1x1", "1x1-stride", "3x3", "stem-3x3", "groups-of-4"])
def test_channel_slices(case, device):
    """x is a prefix of a larger buffer and out a slice of another; the rest is NaN and stays."""
    (x, *args), options = make(case, torch.float16, device, residual=True)
    beside = torch.cat([x, torch.full_like(x, torch.nan)], 1).to(memory_format=CHANNELS_LAST)
    N, K, P, Q = options["residual"].shape
    buffer = x.new_full((N, K + 11, P, Q), torch.nan).to(memory_format=CHANNELS_LAST)
    into_slice = functools.partial(by_triton, out=buffer[:, 8 : 8 + K])
    check((beside[:, : x.shape[1]], *args), options, lambda *a, **o: into_slice(*a, **o).clone())
    assert buffer[:, :8].isnan().all() and buffer[:, 8 + K :].isnan().all()


@pytest.mark.parametrize("case", ["1x1", "3x3", "stem-7x7"])
def test_any_strides(case, device):
    """Every tensor is a strided view: transposed pixels, every second column, NCHW out."""
    (x, weight, *vectors), options = make(case, torch.float32, device, residual=True)

    def spread(t):
        return torch.stack([t, torch.full_like(t, torch.nan)], -1).flatten(-2)[..., ::2]

    x = x.transpose(2, 3).contiguous().transpose(2, 3)
    options["residual"] = spread(options["residual"])
    check((x, spread(weight), *vectors), options, by_config(None, torch.contiguous_format))


@pytest.mark.parametrize("empty", ["N", "K"])
def test_empty_output_launches_nothing(empty, device, monkeypatch):
    x, weight = torch.ones(2, 16, 4, 4, device=device), torch.ones(16, 16, 1, 1, device=device)
    p = replace(problem(x, weight), **{empty: 0})
    monkeypatch.setattr(
        conv_launches, "plan_launch", lambda *a, **k: pytest.fail("planned a launch")
    )
    out = x.new_empty(p.N, p.K, 4, 4)
    conv_launches.run(p, x, weight, *[None] * 5, out, precision="ieee")


def test_extreme_statistics(device):
    args, options = make(Conv(32, 5, 5, 24), torch.float32, device, residual=True, act="none")
    bn = args[-1]
    bn.var[:6], bn.var[6:9] = 1e5, 0.0
    bn.weight[3:9] = torch.tensor([0.0, -1.0, -3.0, 0.0, -2.0, 1e-3], device=device)
    check(args, options)


def test_too_many_pixels_is_refused():
    x, weight = torch.empty(2**11, 8, 2**10, 2**10, device="meta"), torch.ones(8, 8, 1, 1)
    p = problem(x, weight.to("meta"))
    with pytest.raises(ValueError, match=r"at most 2\^31 pixels.*split the batch"):
        conv_launches.plan_launch(p, x, weight, None, None, x, precision="ieee")


def huge(shape, device, path):
    """Zeros of ``shape`` with images 2^31 elements apart; on CPU in a sparse file."""
    size = (shape[0] - 1) * 2**31 + shape[1] * shape[2] * shape[3]
    if device.type == "cpu":
        path.write_bytes(b"")
        os.truncate(path, 2 * size)
        flat = torch.from_file(str(path), shared=True, size=size, dtype=torch.float16)
    else:
        flat = torch.zeros(size, dtype=torch.float16, device=device)
    _, channels, height, width = shape
    return flat.as_strided(shape, (2**31, 1, width * channels, channels))


@pytest.mark.parametrize("case", ["1x1", "3x3", "stem-3x3"])
def test_more_than_int32_elements(case, device, tmp_path):
    (x, *args), options = make(replace(CASES[case], N=2), torch.float16, device, residual=True)
    far = huge(x.shape, device, tmp_path / "x").copy_(x)
    out = huge(options["residual"].shape, device, tmp_path / "out")
    expected = by_triton(x, *args, **options)
    assert torch.equal(by_triton(far, *args, **options, out=out), expected)


class Counted:
    """A kernel that notes its name when launched."""

    def __init__(self, kernel, launches):
        self.kernel, self.launches, self.arg_names = kernel, launches, kernel.arg_names
        self.__name__ = kernel.__name__

    def __getitem__(self, grid):
        self.launches.append(self.kernel.__name__)
        return self.kernel[grid]


@pytest.mark.parametrize(
    ("case", "kernel"), [("1x1", "1x1"), ("3x3", "spatial"), ("stem-3x3", "filter_row")]
)
def test_one_launch_per_call(case, kernel, device, monkeypatch):
    launches = []
    for name, found in conv_launches._KERNELS.items():
        monkeypatch.setitem(conv_launches._KERNELS, name, Counted(found, launches))
    conv_launches._plan.cache_clear()
    args, options = make(case, torch.float32, device, residual=True)
    by_triton(*args, **options)
    conv_launches._plan.cache_clear()
    assert launches == [f"conv_bn_act_{kernel}_kernel"]


def test_plan_needs_no_data():
    def empty(*shape):
        x = torch.empty(shape, dtype=torch.bfloat16, device="meta")
        return x.contiguous(memory_format=CHANNELS_LAST)

    x, weight, out = empty(128, 64, 56, 56), empty(256, 64, 1, 1), empty(128, 256, 56, 56)
    p = problem(x, weight)
    config = tuning.heuristic(p, (9, 0))
    planned = conv_launches.plan_launch(
        p, x, weight, None, None, out, precision="tf32", config=config
    )
    launch, operands = planned.launch, planned.operands(x, weight, *[None] * 5, out)
    assert launch.kernel is conv_launches.conv_bn_act_1x1_kernel
    assert launch.grid == (128 * 56 * 56 // 128 * 2,)
    assert launch.meta["FLAT_X"] and launch.meta["FLAT_OUT"] and launch.meta["EVEN_C"]
    names = [name for name in launch.kernel.arg_names if name not in launch.meta]
    args = dict(zip(names, (*operands, *launch.fixed), strict=True))
    assert args["x_ptr"] is x and args["M"] == 128 * 56 * 56
    assert args["residual_ptr"] is None and args["bn_var_ptr"] is None
    assert launch.meta["X_VEC"] == launch.meta["WEIGHT_VEC"] == launch.meta["OUT_VEC"] == 8
    assert (args["x_stride_c"], args["x_stride_w"], args["out_stride_w"]) == (1, 8, 32)


GATED = {
    "1x1": Conv(72, 7, 5, 40, N=3), "wide": Conv(40, 9, 7, 136, N=2),
    "3x3": Conv(24, 9, 6, 40, 3, 3, 1, 1, N=3), "stem": Conv(3, 14, 11, 24, 7, 7, 2, 3, N=3),
    "groups": Conv(24, 6, 5, 16, 3, 3, 1, 1, groups=4, N=3),
}  # fmt: skip


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize("case", GATED)
def test_gates_of_the_output(case, dtype, memory_format, device):
    """A tile has pixels of several images, each with gates of its own."""
    conv = GATED[case]
    args, options = make(conv, dtype, device, memory_format, residual=case != "3x3")
    options["output_gate"] = torch.rand(conv.N, conv.K, device=device).to(dtype)
    check(args, options)


@pytest.mark.parametrize("config", [(64, 32, 32, 4, 3, 1), (64, 128, 32, 8, 2, 3)], ids=str)
@pytest.mark.parametrize("case", ["1x1", "wide", "3x3", "groups"])
def test_gates_of_the_output_by_tiles_and_splits(case, config, device):
    conv = GATED[case]
    args, options = make(conv, torch.float16, device, residual=True)
    options["output_gate"] = torch.rand(conv.N, conv.K, device=device).half()
    check(args, options, by_config(Config("triton", *config)))


PROJECTIONS = {
    # (C, H, W, K, stride) of the convolution, (C', stride) of the projection of its residual
    "stage": ((72, 7, 5, 40, 1), (24, 2)),
    "first stage": ((40, 6, 6, 72, 1), (40, 1)),
    "stride in the convolution": ((24, 14, 9, 72, 2), (72, 1)),
    "odd channels": ((19, 7, 5, 17, 1), (11, 2)),
}


def projected(case, dtype, device, memory_format=CHANNELS_LAST):
    """Arguments and options of a call with a projection."""
    (C, H, W, K, stride), (channels, step) = PROJECTIONS[case]
    (x, weight, bias, _), options = make(
        Conv(C, H, W, K, stride=stride), dtype, device, memory_format
    )
    args = (x, weight, bias if bias is not None else torch.randn(K, device=device), None)
    P, Q = -(-H // stride), -(-W // stride)
    size = (2, channels, (P - 1) * step + 1, Q * step)
    other = torch.randn(size, device=device).to(dtype).contiguous(memory_format=memory_format)
    filters = torch.randn(K, channels, 1, 1, device=device).to(dtype) / channels**0.5
    return args, options | {"residual": other, "projection": filters, "projection_stride": step}


def projected_reference(x, weight, bias, bn, residual, projection, projection_stride, **options):
    added = torch.nn.functional.conv2d(residual, projection, stride=projection_stride)
    return conv_bn_act_reference(x, weight, bias, bn, residual=added, **options)


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize("case", PROJECTIONS)
def test_projections_of_the_residual(case, dtype, memory_format, device):
    args, options = projected(case, dtype, device, memory_format)
    assert_matches(by_triton, projected_reference, args, options)


@pytest.mark.parametrize("config", [(64, 32, 32, 4, 3, 1), (64, 64, 64, 8, 2, 3)], ids=str)
@pytest.mark.parametrize("case", PROJECTIONS)
def test_projections_by_tiles_and_splits(case, config, device):
    (x, weight, bias, bn), options = projected(case, torch.float16, device)
    p = problem_of(x, weight, bias, bn, act="relu", **options)
    out = x.new_full((p.N, p.K, p.P, p.Q), torch.nan).contiguous(memory_format=CHANNELS_LAST)
    given = (p, x, weight, bias, bn, options["residual"], None, None, out, options["projection"])

    def run(*args, **options):
        conv_launches.run(*given, precision="ieee", config=Config("triton", *config))
        return out

    assert_matches(run, projected_reference, (x, weight, bias, bn), options)
