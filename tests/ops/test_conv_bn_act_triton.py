"""The Triton kernels of conv_bn_act through their launcher, in the interpreter without a GPU."""

import os
from dataclasses import replace
from typing import NamedTuple

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor

from cvkernels.ops.conv_bn_act import triton as conv_launches
from cvkernels.ops.conv_bn_act import tuning
from cvkernels.ops.conv_bn_act.problem import Problem
from tests.support.numerics import assert_close_as_eager

# bfloat16 only where it is real: the interpreter's dot is wrong for it
DTYPES = [torch.float32, torch.float16] + [torch.bfloat16] * torch.cuda.is_available()
VECTORS = ("weight", "bias", "mean", "var")


class BN(NamedTuple):
    weight: Tensor | None
    bias: Tensor | None
    mean: Tensor | None
    var: Tensor | None
    eps: float = 1e-3


class Conv(NamedTuple):
    """One call's tensors and options."""

    x: Tensor
    weight: Tensor
    bias: Tensor | None = None
    bn: BN | None = None
    residual: Tensor | None = None
    input_bn: BN | None = None
    input_gate: Tensor | None = None
    stride: tuple[int, int] = (1, 1)
    padding: tuple[int, int] = (0, 0)
    dilation: tuple[int, int] = (1, 1)
    groups: int = 1
    act: str = "none"


def affine(x, bn):
    one = torch.ones(x.shape[1], dtype=x.dtype, device=x.device)
    weight, bias, mean, var = (None if v is None else v.to(x.dtype) for v in bn[:4])
    var = one - bn.eps if var is None else var
    return F.batch_norm(x, one * 0 if mean is None else mean, var, weight, bias, eps=bn.eps)


def composed(c):
    """The op in plain PyTorch, in the dtype of c.x."""
    x = c.x
    if c.input_bn is not None:
        x = affine(x, c.input_bn).relu()
    if c.input_gate is not None:
        x = x * c.input_gate[:, :, None, None]
    y = F.conv2d(x, c.weight, c.bias, c.stride, c.padding, c.dilation, c.groups)
    if c.bn is not None:
        y = affine(y, c.bn)
    if c.residual is not None:
        y = y + c.residual
    acts = {"none": lambda t: t, "relu": torch.relu, "relu6": F.relu6, "silu": F.silu}
    return acts[c.act](y)


def double(c):
    def wide(value):
        if isinstance(value, BN):
            return BN(*(wide(v) for v in value))
        return value.double() if isinstance(value, Tensor) else value

    return Conv(*(wide(v) for v in c))


def problem_of(c, sliced_out=False):
    n, channels, height, width = c.x.shape
    k, _, r, s = c.weight.shape
    options = (c.stride, c.padding, c.dilation, c.groups, c.x.dtype, c.act)
    has = (v is not None for v in (c.bias, c.bn, c.residual, c.input_bn, c.input_gate))
    return Problem(n, channels, height, width, k, r, s, *options, *has, sliced_out)


def out_like(c, problem):
    shape = (problem.N, problem.K, problem.P, problem.Q)
    return torch.empty(
        shape, dtype=c.x.dtype, device=c.x.device, memory_format=torch.channels_last
    ).fill_(float("nan"))


def run(c, out=None, config=None):
    problem = problem_of(c, out is not None)
    out = out_like(c, problem) if out is None else out
    args = (c.x, c.weight, c.bias, c.bn, c.residual, c.input_bn, c.input_gate, out)
    conv_launches.run(problem, *args, precision="ieee", config=config)
    return out


def check(c, **options):
    assert_close_as_eager(run(c, **options), composed(c), composed(double(c)))


def make_bn(channels, dtype, device):
    weight, bias, mean = (torch.randn(channels, device=device).to(dtype) for _ in range(3))
    return BN(weight, bias, mean, torch.rand(channels, device=device).to(dtype) + 0.1)


def make(
    x_shape,
    weight_shape,
    dtype,
    device,
    *,
    memory_format=torch.channels_last,
    bn=True,
    bias=False,
    residual=False,
    input_bn=False,
    input_gate=False,
    **options,
):
    def normal(*shape, scale=1.0):
        return (torch.randn(shape, device=device) * scale).to(dtype)

    k = weight_shape[0]
    fan_in = weight_shape[1] * weight_shape[2] * weight_shape[3]
    c = Conv(
        normal(*x_shape).to(memory_format=memory_format),
        normal(*weight_shape, scale=fan_in**-0.5).to(memory_format=memory_format),
        normal(k) if bias else None,
        make_bn(k, torch.float32, device) if bn else None,
        None,
        make_bn(x_shape[1], torch.float32, device) if input_bn else None,
        normal(*x_shape[:2]).sigmoid() if input_gate else None,
        **options,
    )
    if residual:
        p = problem_of(c)
        res = normal(p.N, k, p.P, p.Q).to(memory_format=memory_format)
        c = c._replace(residual=res)
    return c


# x[N, C, H, W], weight[K, C/groups, R, S], options
CASES = {
    "1x1": ((2, 64, 7, 5), (40, 64, 1, 1), {}),
    "1x1-stride": ((2, 24, 7, 6), (17, 24, 1, 1), {"stride": (2, 2)}),
    "1x1-odd-channels": ((1, 17, 5, 9), (24, 17, 1, 1), {}),
    "1x1-padded": ((1, 16, 4, 3), (16, 16, 1, 1), {"padding": (1, 1)}),
    "1x1-one-pixel": ((3, 40, 1, 1), (33, 40, 1, 1), {}),
    "3x3": ((2, 32, 6, 5), (48, 32, 3, 3), {"padding": (1, 1)}),
    "3x3-odd-channels": ((1, 17, 5, 7), (19, 17, 3, 3), {"padding": (1, 1), "stride": (2, 1)}),
    "3x3-dilated": ((1, 24, 9, 8), (16, 24, 3, 3), {"padding": (2, 2), "dilation": (2, 2)}),
    "5x5": ((1, 16, 7, 6), (32, 16, 5, 5), {"padding": (2, 2)}),
    "1x7": ((2, 20, 4, 9), (24, 20, 1, 7), {"padding": (0, 3)}),
    "stem-7x7": ((2, 3, 15, 18), (64, 3, 7, 7), {"padding": (3, 3), "stride": (2, 2)}),
    "stem-3x3": ((1, 3, 11, 8), (32, 3, 3, 3), {"stride": (2, 2)}),
    "filter-row-dilated": ((1, 5, 8, 9), (20, 5, 3, 2), {"dilation": (2, 3), "padding": (1, 2)}),
    "resnext-4": ((1, 64, 6, 5), (64, 4, 3, 3), {"padding": (1, 1), "groups": 16}),
    "resnext-16": ((1, 64, 5, 4), (64, 16, 3, 3), {"stride": (2, 2), "groups": 4}),
    "two-groups-of-64": ((1, 32, 4, 5), (128, 16, 3, 3), {"padding": (1, 1), "groups": 2}),
    "uneven-groups": ((2, 15, 5, 4), (21, 5, 3, 3), {"padding": (1, 1), "groups": 3}),
    "grouped-1x1": ((1, 24, 5, 4), (48, 6, 1, 1), {"groups": 4}),
    "depthwise": ((1, 24, 6, 5), (24, 1, 3, 3), {"padding": (1, 1), "groups": 24}),
    "depthwise-multiplier": ((1, 9, 5, 5), (18, 1, 3, 3), {"padding": (1, 1), "groups": 9}),
}


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize("case", CASES.values(), ids=CASES.keys())
def test_matches_composition(case, dtype, memory_format, device):
    x_shape, weight_shape, options = case
    check(make(x_shape, weight_shape, dtype, device, memory_format=memory_format, **options))


@pytest.mark.parametrize("residual", [False, True], ids=["plain", "residual"])
@pytest.mark.parametrize("act", ["none", "relu", "relu6", "silu"])
@pytest.mark.parametrize("case", ["1x1", "3x3-odd-channels", "stem-7x7"])
def test_activation_and_residual(case, act, residual, memory_format, device):
    x_shape, weight_shape, options = CASES[case]
    options = {"act": act, "residual": residual, "memory_format": memory_format, **options}
    check(make(x_shape, weight_shape, torch.float16, device, bias=True, **options))


# every tile the heuristic can choose, on a problem of several tiles either way
SHIPPED = [
    pytest.param(kernel, itemsize, config, id=f"{kernel}-{8 * itemsize}bit-{index}")
    for (kernel, itemsize), configs in tuning.CONFIGS.items()
    for index, config in enumerate(configs)
]


@pytest.mark.parametrize(("kernel", "itemsize", "config"), SHIPPED)
def test_every_shipped_config(kernel, itemsize, config, device):
    channels, taps = {"1x1": (72, 1), "spatial": (40, 3), "filter_row": (3, 3)}[kernel]
    dtype = torch.float16 if itemsize == 2 else torch.float32
    shape = (2, channels, 11, 9), (136, channels, taps, taps)
    c = make(*shape, dtype, device, residual=True, act="relu", padding=(taps // 2,) * 2)
    assert tuning.kernel(problem_of(c)) == kernel
    check(c, config=config)


PROLOGUES = {
    "affine": {"input_bn": True},
    "gate": {"input_gate": True},
    "both": {"input_bn": True, "input_gate": True},
}


@pytest.mark.parametrize("prologue", PROLOGUES.values(), ids=PROLOGUES.keys())
@pytest.mark.parametrize(
    "case", ["1x1", "1x1-stride", "1x1-odd-channels", "1x1-padded", "3x3", "stem-3x3", "resnext-4"]
)
def test_prologue(case, prologue, device):
    x_shape, weight_shape, options = CASES[case]
    check(make(x_shape, weight_shape, torch.float32, device, **prologue, **options))


def test_gate_of_one_image_per_tile(device):
    c = make((3, 40, 16, 8), (32, 40, 1, 1), torch.float32, device, input_gate=True)
    config = replace(tuning.heuristic(problem_of(c), (9, 0)), block_m=64)
    check(c, config=config)


@pytest.mark.parametrize("channels", [5, 32], ids=["filter_row", "spatial"])
def test_padding_is_zero_after_the_prologue(channels, device):
    c = make(
        (1, channels, 3, 3), (16, channels, 3, 3), torch.float32, device, bn=False, padding=(1, 1)
    )
    ones = torch.ones(channels, device=device)
    c = c._replace(x=c.x * 0, weight=c.weight * 0 + 1, input_bn=BN(ones, 2 * ones, None, None))
    taps = torch.tensor([4.0, 6, 4, 6, 9, 6, 4, 6, 4], device=device).view(3, 3)
    assert torch.equal(run(c), (2 * channels * taps).expand(1, 16, 3, 3))


@pytest.mark.parametrize("missing", [*VECTORS, "all"])
@pytest.mark.parametrize("where", ["bn", "input_bn"])
def test_bn_vector_missing(where, missing, device):
    c = make((1, 20, 4, 4), (24, 20, 1, 1), torch.float32, device, bias=True, input_bn=True)
    none = dict.fromkeys(VECTORS if missing == "all" else (missing,))
    check(c._replace(**{where: getattr(c, where)._replace(**none)}))


def test_bn_vectors_in_mixed_dtypes(device):
    c = make((1, 20, 4, 4), (24, 20, 1, 1), torch.float16, device, bias=True)
    check(c._replace(bn=c.bn._replace(weight=c.bn.weight.half(), bias=c.bn.bias.half())))


@pytest.mark.parametrize("case", ["1x1", "1x1-stride", "3x3", "stem-3x3", "resnext-4"])
def test_channel_slices(case, device):
    """x is a prefix of a larger buffer and out a slice of another; the rest is NaN and stays."""
    x_shape, weight_shape, options = CASES[case]
    c = make(x_shape, weight_shape, torch.float16, device, residual=True, **options)
    nan = float("nan")
    x_buffer = torch.full_like(c.x[:, :1].expand(x_shape), nan).repeat(1, 2, 1, 1)
    x_buffer = x_buffer.contiguous(memory_format=torch.channels_last)
    x_buffer[:, : x_shape[1]] = c.x
    c = c._replace(x=x_buffer[:, : x_shape[1]])
    p = problem_of(c)
    buffer = torch.full((p.N, p.K + 11, p.P, p.Q), nan, dtype=c.x.dtype, device=device)
    buffer = buffer.contiguous(memory_format=torch.channels_last)
    check(c, out=buffer[:, 8 : 8 + p.K])
    assert buffer[:, :8].isnan().all() and buffer[:, 8 + p.K :].isnan().all()


@pytest.mark.parametrize("case", ["1x1", "3x3", "stem-7x7"])
def test_any_strides(case, device):
    """Every tensor is a strided view: transposed pixels, every second channel, NCHW out."""
    x_shape, weight_shape, options = CASES[case]
    c = make(x_shape, weight_shape, torch.float32, device, residual=True, **options)
    p = problem_of(c)

    def spread(t):
        wide = torch.full((*t.shape[:3], 2 * t.shape[3]), float("nan"), device=device)
        wide[..., ::2] = t
        return wide[..., ::2]

    c = c._replace(
        x=c.x.transpose(2, 3).contiguous().transpose(2, 3),
        weight=spread(c.weight),
        residual=spread(c.residual),
    )
    check(c, out=torch.full((p.N, p.K, p.P, p.Q), float("nan"), device=device))


@pytest.mark.parametrize("x_shape", [(0, 16, 4, 4), (2, 16, 4, 4)], ids=["no-image", "no-channel"])
def test_empty_output_launches_nothing(x_shape, device, monkeypatch):
    c = make(x_shape, (16 if x_shape[0] == 0 else 0, 16, 1, 1), torch.float32, device)
    monkeypatch.setattr(
        conv_launches, "plan_launch", lambda *a, **k: pytest.fail("planned a launch")
    )
    run(c)


def test_nan_propagates(device):
    for act in ("none", "relu", "relu6", "silu"):
        c = make((1, 16, 2, 2), (16, 16, 1, 1), torch.float32, device, act=act)
        c.x[0, 3, 1, 0] = float("nan")
        out = run(c)
        assert out[0, :, 1, 0].isnan().all()
        assert out.isnan().sum() == 16


def test_extreme_statistics(device):
    c = make((2, 32, 5, 5), (24, 32, 1, 1), torch.float32, device, residual=True)
    c.bn.var[:6] = 1e5
    c.bn.var[6:9] = 0.0
    c.bn.weight[3:9] = torch.tensor([0.0, -1.0, -3.0, 0.0, -2.0, 1e-3], device=device)
    check(c)


def test_too_many_pixels_is_refused():
    x = torch.empty(2**11, 8, 2**10, 2**10, device="meta")
    c = Conv(x, torch.empty(8, 8, 1, 1, device="meta"))
    with pytest.raises(ValueError, match=r"at most 2\^31 pixels.*split the batch"):
        run(c, out=x)


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
    x_shape, weight_shape, options = CASES[case]
    c = make((2, *x_shape[1:]), weight_shape, torch.float16, device, residual=True, **options)
    p = problem_of(c)
    x = huge(c.x.shape, device, tmp_path / "x").copy_(c.x)
    out = huge((p.N, p.K, p.P, p.Q), device, tmp_path / "out")
    assert torch.equal(run(c._replace(x=x), out=out), run(c))


def test_one_launch_per_call(device, monkeypatch):
    launches = []
    for name, kernel in conv_launches._KERNELS.items():
        monkeypatch.setitem(conv_launches._KERNELS, name, Counted(kernel, launches))
    conv_launches._plan.cache_clear()
    for case in ("1x1", "3x3", "stem-3x3"):
        x_shape, weight_shape, options = CASES[case]
        check(make(x_shape, weight_shape, torch.float32, device, residual=True, **options))
    conv_launches._plan.cache_clear()
    assert launches == [
        "conv_bn_act_1x1_kernel",
        "conv_bn_act_spatial_kernel",
        "conv_bn_act_filter_row_kernel",
    ]


class Counted:
    """A kernel that notes its name when launched."""

    def __init__(self, kernel, launches):
        self.kernel, self.launches, self.arg_names = kernel, launches, kernel.arg_names

    def __getitem__(self, grid):
        self.launches.append(self.kernel.__name__)
        return self.kernel[grid]


def test_plan_needs_no_data():
    x = torch.empty(128, 64, 56, 56, device="meta", dtype=torch.bfloat16)
    x = x.contiguous(memory_format=torch.channels_last)
    c = Conv(x, torch.empty(256, 64, 1, 1, device="meta", dtype=torch.bfloat16), act="relu")
    problem = problem_of(c)
    config = tuning.heuristic(problem, (9, 0))
    out = out_like(c, problem)
    planned = conv_launches.plan_launch(
        problem, c.x, c.weight, None, None, out, precision="tf32", config=config
    )
    launch, operands = planned.launch, planned.operands(*c[:7], out)
    assert launch.kernel is conv_launches.conv_bn_act_1x1_kernel
    assert launch.grid == (128 * 56 * 56 // 128 * 2,)
    assert launch.meta["FLAT_X"] and launch.meta["FLAT_OUT"] and launch.meta["EVEN_C"]
    names = [name for name in launch.kernel.arg_names if name not in launch.meta]
    args = dict(zip(names, (*operands, *launch.fixed), strict=True))
    assert args["x_ptr"] is x and args["M"] == 128 * 56 * 56
    assert args["residual_ptr"] is None and args["bn_var_ptr"] is None
    assert (args["x_stride_c"], args["x_stride_w"], args["out_stride_w"]) == (1, 64, 256)
