"""depthwise_conv_bn_act: every promise of its docstring, on the native op and on the reference."""

import pytest
import torch
from cases_conv_bn_act import make_bn
from numerics import assert_close_as_eager, assert_matches, map_floats
from torch import nn
from torch.library import opcheck

import cvkernels
from cvkernels import extension, record
from cvkernels.backend import BackendError
from cvkernels.functional import BatchNormParams, DerivedWeights, depthwise_conv_bn_act
from cvkernels.ops.depthwise_conv_bn_act import native as native_module
from cvkernels.ops.depthwise_conv_bn_act.reference import depthwise_conv_bn_act_reference

ACTS = ("none", "relu", "relu6", "silu")
DTYPES = [torch.float32, torch.float16, torch.bfloat16]

# N, C, H, W, kernel, stride, padding
CASES = {
    "effnet-b0-112": (2, 32, 112, 112, 3, 1, 1),
    "effnet-b0-112-s2": (1, 96, 112, 112, 3, 2, 1),
    "effnet-b0-56-5x5-s2": (1, 144, 56, 56, 5, 2, 2),
    "effnet-b0-14-5x5": (2, 672, 14, 14, 5, 1, 2),
    "effnet-b0-7-5x5": (2, 1152, 7, 7, 5, 1, 2),
    "effnet-v2-24-s2": (1, 256, 24, 24, 3, 2, 1),
    "channels-24": (1, 24, 7, 7, 3, 1, 1),
    "channels-not-8": (3, 37, 9, 5, 3, 2, 1),
    "few-channels": (2, 3, 21, 16, 5, 1, 2),
    "one-channel": (2, 1, 6, 8, 3, 1, 1),
    "unpadded": (1, 40, 8, 9, 5, 2, 0),
    "one-pixel": (2, 20, 1, 1, 3, 1, 1),
    "kernel-larger-than-x": (1, 16, 2, 3, 5, 2, 2),
    "wide-padding": (1, 18, 3, 4, 3, 1, (4, 3)),
    "bands": (1, 17, 61, 8, 3, 1, 1),  # more rows than one task of the native op makes
    "empty-batch": (0, 24, 7, 7, 3, 1, 1),
}


def make_inputs(case, dtype=torch.float32, memory_format=torch.channels_last, device="cpu"):
    """Arguments and options of the op, with bias and batch norm."""
    N, C, H, W, kernel, stride, padding = case
    x = torch.randn(N, C, H, W, device=device).to(dtype).contiguous(memory_format=memory_format)
    weight = (torch.randn(C, 1, kernel, kernel, device=device) / kernel).to(dtype)
    args = (x, weight, torch.randn(C, device=device), make_bn(C, device=device))
    return args, {"stride": stride, "padding": padding, "act": "silu"}


def assert_matches_both(op, args, options):
    """Output and sums by the rule; op returns both."""
    reference = depthwise_conv_bn_act_reference
    exact = reference(*map_floats(torch.Tensor.double, args), **options, squeeze=True)
    eager = reference(*args, **options, squeeze=True)
    actual = op(*args, **options, squeeze=True)
    for ours, theirs, truth in zip(actual, eager, exact, strict=True):
        assert_close_as_eager(ours, theirs, truth)


def run(backend):
    return lambda *args, **kwargs: depthwise_conv_bn_act(*args, **kwargs, backend=backend)


@pytest.fixture
def native():
    if not extension.has("cpu"):
        pytest.skip(extension.status()["cpu"].reason)


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize("case", CASES.values(), ids=CASES.keys())
def test_native_matches_reference(case, dtype, memory_format, native):
    args, options = make_inputs(case, dtype, memory_format)
    assert_matches_both(run("native"), args, options)


@pytest.mark.parametrize("act", ACTS)
@pytest.mark.parametrize("case", ["channels-24", "channels-not-8", "bands"])
def test_every_activation(case, act, native):
    args, options = make_inputs(CASES[case])
    assert_matches_both(run("native"), args, options | {"act": act})


@pytest.mark.parametrize("dropped", ["bias", "bn", "weight", "shift", "statistics", "all"])
def test_every_vector_is_optional(dropped, native):
    (x, weight, bias, bn), options = make_inputs(CASES["channels-not-8"])
    if dropped in ("bias", "all"):
        bias = None
    bn = {
        "bn": None,
        "all": None,
        "weight": bn._replace(weight=None),
        "shift": bn._replace(bias=None),
        "statistics": bn._replace(mean=None, var=None),
    }.get(dropped, bn)
    assert_matches_both(run("native"), (x, weight, bias, bn), options)


STRIDED = {
    "channel-slice": lambda x: x[:, 3:36],
    "every-second-channel": lambda x: x[:, ::2],
    "window-of-an-image": lambda x: x[:, :, 2:9, 1:8],
    "transposed": lambda x: x.transpose(2, 3),
    "expanded": lambda x: x[:1].expand(3, -1, -1, -1),
}


@pytest.mark.parametrize("view", STRIDED.values(), ids=STRIDED.keys())
def test_any_strides(view, memory_format, native):
    (x, *_), options = make_inputs((2, 48, 11, 12, 3, 1, 1), memory_format=memory_format)
    x = view(x)
    weight = torch.randn(3, 3, 1, x.shape[1]).permute(3, 2, 0, 1)
    assert_matches_both(run("native"), (x, weight, None, make_bn(x.shape[1])), options)


def test_output_is_channels_last_in_the_inputs_dtype(memory_format, native):
    args, options = make_inputs(CASES["channels-24"], torch.bfloat16, memory_format)
    out, sums = depthwise_conv_bn_act(*args, **options, squeeze=True)
    assert out.is_contiguous(memory_format=torch.channels_last) and out.dtype == torch.bfloat16
    assert sums.shape == (1, 24) and sums.dtype == torch.float32 and sums.is_contiguous()
    assert torch.equal(depthwise_conv_bn_act(*args, **options), out)


def test_number_of_threads_and_images_changes_nothing(native):
    """A fixed order of summation: equal bits for one image alone and beside others."""
    args, options = make_inputs((5, 200, 61, 9, 5, 1, 2))
    results, before = [], torch.get_num_threads()
    try:
        for threads in (1, 2, 3):
            torch.set_num_threads(threads)
            results.append(run("native")(*args, **options, squeeze=True))
    finally:
        torch.set_num_threads(before)
    results.append(
        [
            torch.cat(parts)
            for parts in zip(
                *(
                    run("native")(image[None], *args[1:], **options, squeeze=True)
                    for image in args[0]
                ),
                strict=True,
            )
        ]
    )
    for out, sums in results[1:]:
        assert torch.equal(out, results[0][0]) and torch.equal(sums, results[0][1])


@pytest.mark.parametrize("act", ACTS)
@pytest.mark.parametrize("value", [torch.nan, torch.inf, -torch.inf], ids=str)
def test_nan_and_infinity_come_through_as_in_pytorch(value, act, native):
    (x, weight, _, _), options = make_inputs(CASES["channels-24"])
    options["act"] = act
    x[0, 5, 3, 4] = x[0, 7, 0, 0] = value
    out, sums = run("native")(x, weight, **options, squeeze=True)
    expected, expected_sums = depthwise_conv_bn_act_reference(x, weight, **options, squeeze=True)
    for ours, theirs in ((out, expected), (sums, expected_sums)):
        assert torch.equal(ours.isnan(), theirs.isnan())
        assert torch.equal(ours.isinf(), theirs.isinf())
        assert torch.allclose(ours, theirs, atol=1e-3, equal_nan=True)
    bounded = act == "relu6" and value == value  # NaN is not equal to itself
    assert expected.isfinite().all() == bounded


def test_silu_of_extreme_values(native):
    x = torch.cat([torch.linspace(-120, 120, 4001), torch.tensor([-1e38, 1e38, -0.0])])
    x = x.view(1, 1, 4, -1)
    weight = torch.zeros(1, 1, 3, 3)
    weight[0, 0, 1, 1] = 1.0
    assert_matches_both(run("native"), (x, weight), {"padding": 1, "act": "silu"})


@pytest.mark.parametrize("backend", ["native", "reference"])
def test_sums_do_not_overflow_a_half_dtype(backend, native):
    x = torch.full((1, 8, 64, 64), 1000.0, dtype=torch.float16)
    weight = torch.zeros(8, 1, 3, 3, dtype=torch.float16)
    weight[:, :, 1, 1] = 1.0
    _, sums = run(backend)(x, weight, padding=1, squeeze=True)
    assert torch.equal(sums, torch.full((1, 8), 1000.0 * 64 * 64))


def test_result_is_never_a_view(native):
    x, weight = torch.ones(1, 8, 4, 4), torch.ones(8, 1, 3, 3)
    depthwise_conv_bn_act(x, weight, padding=1).zero_()
    assert x.min() == 1 and weight.min() == 1


# Gradients


def leaves(values):
    return map_floats(lambda t: t.detach().requires_grad_(t.requires_grad), values)


def gradients_of(op, args, options):
    """Gradients of <out, c> + <sums, d> with fixed c and d, in every tensor that requires one."""
    out, sums = op(*args, **options, squeeze=True)
    generator = torch.Generator().manual_seed(1)
    cotangents = [
        torch.randn(t.shape, generator=generator, dtype=torch.float64).to(t) for t in (out, sums)
    ]
    flat = [*args[:3], *(args[3][:2] if args[3] is not None else ())]
    wanted = [t for t in flat if t is not None and t.requires_grad]
    return torch.autograd.grad((out, sums), wanted, cotangents)


@pytest.mark.parametrize("backend", ["auto", "native"])
@pytest.mark.parametrize("act", ACTS)
@pytest.mark.parametrize("case", ["channels-24", "channels-not-8", "unpadded"])
def test_gradients_match_reference(case, act, backend, native):
    args, options = make_inputs(CASES[case])
    options["act"] = act
    for leaf in (*args[:3], args[3].weight, args[3].bias):
        leaf.requires_grad_()
    reference = depthwise_conv_bn_act_reference
    double = map_floats(lambda t: t.detach().double().requires_grad_(t.requires_grad), args)
    exact = gradients_of(reference, double, options)
    eager = gradients_of(reference, leaves(args), options)
    actual = gradients_of(run(backend), leaves(args), options)
    for ours, theirs, truth in zip(actual, eager, exact, strict=True):
        assert_close_as_eager(ours, theirs, truth)


def flat_arguments(case, dtype, act, backend, requires_grad=False):
    """The registered ops' arguments."""
    (x, weight, bias, bn), options = make_inputs(case, dtype)
    bn = BatchNormParams(*(v.to(dtype) for v in bn[:4]), bn.eps)
    for leaf in (x, weight, bias, bn.weight, bn.bias):
        leaf.requires_grad_(requires_grad)
    pairs = [[v, v] if isinstance(v, int) else v for v in (options["stride"], options["padding"])]
    return (x, weight, bias.to(dtype), *bn, *pairs, [1, 1], act, backend)


@pytest.mark.parametrize("act", ACTS)
def test_gradient_formula_is_exact_in_float64(act):
    x, weight, bias, gamma, beta, *rest = flat_arguments(
        (2, 3, 4, 5, 3, 2, 1), torch.float64, act, "reference"
    )
    inputs = [t.detach().requires_grad_() for t in (x, weight, bias, gamma, beta)]

    def op(*tensors):
        return torch.ops.cvkernels.depthwise_conv_bn_act_squeeze(*tensors, *rest)

    assert torch.autograd.gradcheck(op, inputs)
    assert torch.autograd.gradgradcheck(op, inputs)


def test_unneeded_gradients_are_not_computed(native):
    (x, weight, bias, bn), options = make_inputs(CASES["channels-24"])
    x.requires_grad_()
    run("native")(x, weight, bias, bn, **options).sum().backward()
    assert x.grad is not None and weight.grad is None


# Registration, torch.compile, autocast


@pytest.mark.parametrize("requires_grad", [False, True], ids=["no-grad", "grad"])
@pytest.mark.parametrize("name", ["depthwise_conv_bn_act", "depthwise_conv_bn_act_squeeze"])
@pytest.mark.parametrize("backend", ["auto", "reference"])
def test_opcheck(backend, name, requires_grad):
    arguments = flat_arguments(
        CASES["channels-not-8"], torch.float32, "relu", backend, requires_grad
    )
    opcheck(getattr(torch.ops.cvkernels, name).default, arguments)


def test_opcheck_of_the_compiled_op(native):
    (x, weight, bias, bn), _ = make_inputs(CASES["channels-24"])
    packed, affine = native_module.pack(weight, bias, bn)
    out, sums = torch.empty(1, 7, 7, 24), torch.empty(1, 24)
    op = torch.ops.cvkernels.depthwise_conv_bn_act_native.default
    opcheck(op, (x, packed, affine, 3, 1, 1, 1, 3, out, sums))
    opcheck(op, (x, packed, affine, 3, 1, 1, 1, 3, out, None))


@pytest.mark.parametrize("squeeze", [False, True], ids=["out", "squeeze"])
@pytest.mark.parametrize("backend", ["auto", "native"])
def test_compiles_in_one_graph(backend, squeeze, native):
    args, options = make_inputs(CASES["channels-not-8"])

    def function(*args):
        y = depthwise_conv_bn_act(*args, **options, squeeze=squeeze, backend=backend)
        return y[0] + y[1][:, :, None, None] if squeeze else y + 1

    torch._dynamo.reset()
    compiled = torch.compile(function, fullgraph=True, backend="aot_eager")
    with torch.no_grad():
        assert torch.allclose(compiled(*args), function(*args), atol=1e-3)


def test_autocast_computes_in_its_dtype(native):
    args, options = make_inputs(CASES["channels-24"])
    with torch.autocast("cpu", torch.bfloat16), torch.no_grad():
        out = depthwise_conv_bn_act(*args, **options)
        expected = depthwise_conv_bn_act_reference(*args, **options)
    assert out.dtype == torch.bfloat16
    assert torch.allclose(out.float(), expected.float(), atol=0.1, rtol=0.05)


# The choice of a backend


def chosen(*args, **kwargs):
    return cvkernels.backend.chosen("depthwise_conv_bn_act", *args, **kwargs)


def test_auto_on_cpu_follows_its_rule(native):
    args, options = make_inputs(CASES["channels-24"])
    assert chosen(*args, **options) == "native"
    double = (args[0].double(), args[1].double(), *args[2:])
    assert chosen(*double, **options) == "reference"
    assert chosen(*args, **options | {"stride": 3}) == "reference"
    assert chosen(*args, padding=1, dilation=2) == "reference"
    seven = torch.randn(24, 1, 7, 7)
    assert chosen(args[0], seven, padding=3) == "reference"
    args[1].requires_grad_()
    assert chosen(*args, **options) == "reference"
    with torch.no_grad():
        assert chosen(*args, **options) == "native"


@pytest.mark.parametrize(
    "change",
    [{"stride": 3}, {"dilation": 2}, {"stride": (2, 1)}, {"kernel": (7, 7)}, {"kernel": (3, 5)}],
    ids=str,
)
def test_what_has_no_kernel_runs_the_reference(change):
    (x, weight, bias, bn), options = make_inputs((1, 12, 15, 14, 3, 1, 1))
    if "kernel" in change:
        weight = torch.randn(12, 1, *change["kernel"])
    else:
        options |= change
    assert_matches(
        depthwise_conv_bn_act, depthwise_conv_bn_act_reference, (x, weight, bias, bn), options
    )


@pytest.mark.parametrize(
    ("backend", "change", "reason"),
    [
        ("native", {"dilation": 2}, "3x3 and 5x5 kernels of stride 1 and 2"),
        ("onednn", {}, "no onednn implementation"),
        ("cudnn", {}, "no cudnn implementation"),
        ("triton", {"x": torch.ones(1, 24, 7, 7, dtype=torch.float64)}, "float16, bfloat16 and"),
    ],
)
def test_explicit_backend_runs_or_raises(backend, change, reason):
    (x, weight, _, _), options = make_inputs(CASES["channels-24"])
    change = {"x": x, "weight": weight} | options | change
    change["weight"] = weight.to(change["x"].dtype)
    with pytest.raises(BackendError, match=f"backend '{backend}' cannot run.*{reason}"):
        depthwise_conv_bn_act(**change, backend=backend)


def test_use_requests_and_a_call_overrules_it(native):
    args, options = make_inputs(CASES["channels-24"])
    with cvkernels.backend.use("reference"):
        assert chosen(*args, **options) == "reference"
        assert chosen(*args, **options, backend="native") == "native"


# Bad input

GOOD = make_inputs(CASES["channels-24"])
BAD = {
    "rank": (
        ValueError, r"x must have shape \[N, C, H, W\].*unsqueeze", {"x": torch.rand(24, 7, 7)},
    ),
    "weight-rank": (ValueError, "weight must have shape", {"weight": torch.rand(24, 3, 3)}),
    "weight-groups": (ValueError, "conv_bn_act has groups=", {"weight": torch.rand(24, 2, 3, 3)}),
    "weight-channels": (ValueError, "with C = 24", {"weight": torch.rand(12, 1, 3, 3)}),
    "mixed-dtype": (
        TypeError, "weight must have x's dtype", {"weight": torch.rand(24, 1, 3, 3).half()},
    ),
    "int-dtype": (
        TypeError, "dtype must be float32", {"x": torch.ones(1, 24, 7, 7, dtype=torch.int64)},
    ),
    "device": (
        ValueError, "weight must be on x's device",
        {"weight": torch.empty(24, 1, 3, 3, device="meta")},
    ),
    "bias-shape": (
        ValueError, r"bias must have shape \[24\], got \[12\]", {"bias": torch.rand(12)},
    ),
    "bn-module": (
        TypeError, "bn must be BatchNormParams, got BatchNorm2d", {"bn": nn.BatchNorm2d(24)},
    ),
    "bn-shape": (
        ValueError, "bn.weight must have shape", {"bn": BatchNormParams(weight=torch.rand(7))},
    ),
    "bn-half": (ValueError, "both mean and var", {"bn": BatchNormParams(mean=torch.rand(24))}),
    "act": (ValueError, "act must be one of", {"act": "gelu"}),
    "stride": (ValueError, "stride must be at least 1", {"stride": 0}),
    "stride-triple": (ValueError, "stride must be an int or two", {"stride": (1, 1, 1)}),
    "padding-same": (ValueError, "padding must be an int or two.*'same'", {"padding": "same"}),
    "padding-negative": (ValueError, "padding must be at least 0", {"padding": -1}),
    "too-small": (ValueError, "does not fit into the map of 7x7", {"padding": 0, "dilation": 4}),
}  # fmt: skip


@pytest.mark.parametrize(("error", "message", "change"), BAD.values(), ids=BAD.keys())
def test_bad_input_is_refused_by_name(error, message, change):
    (x, weight, bias, bn), options = GOOD
    arguments = {"x": x, "weight": weight, "bias": bias, "bn": bn, **options, **change}
    with pytest.raises(error, match=f"depthwise_conv_bn_act: .*{message}"):
        depthwise_conv_bn_act(**arguments)


def test_the_compiled_op_checks_too(native):
    (x, weight, bias, bn), _ = GOOD
    packed, affine = native_module.pack(weight, bias, bn)
    op = torch.ops.cvkernels.depthwise_conv_bn_act_native.default
    out = torch.empty(1, 7, 7, 24)
    for change, message in (
        ({0: x[0]}, "x must have 4 dimensions"),
        ({0: x.double(), 8: out.double()}, "dtype must be float32, float16 or bfloat16"),
        ({1: packed[:1]}, "weight must hold 288 float32 numbers"),
        ({3: 4}, "kernel must be 3 or 5, got 4"),
        ({4: 3}, "stride must be 1 or 2, got 3"),
        ({7: 9}, "act must be between 0 and 3"),
        ({8: out[:, :6]}, r"out must be dense with shape \[1, 7, 7, 24\], got \[1, 6, 7, 24\]"),
        ({9: torch.empty(1, 23)}, "sums must hold 24 float32 numbers"),
    ):
        arguments = [x, packed, affine, 3, 1, 1, 1, 0, out, torch.empty(1, 24)]
        for index, value in change.items():
            arguments[index] = value
        with pytest.raises(RuntimeError, match=f"depthwise_conv_bn_act: {message}"):
            op(*arguments)


# Derived weights, explain


def test_derived_weights_follow_every_change_of_the_parameters(native):
    (x, weight, bias, bn), options = make_inputs(CASES["channels-not-8"])
    cache = DerivedWeights()
    for change in (
        lambda: None,
        lambda: weight.mul_(2),
        lambda: bn.var.add_(1),
        lambda: bias.zero_(),
        lambda: bn.weight.copy_(torch.ones(37)),
    ):
        change()
        expected = depthwise_conv_bn_act(x, weight, bias, bn, **options)
        for _ in range(2):
            actual = depthwise_conv_bn_act(x, weight, bias, bn, **options, cache=cache)
            assert torch.equal(actual, expected)
    assert len(cache) == 1


@pytest.mark.parametrize("squeeze", [False, True], ids=["out", "squeeze"])
def test_explain_reports_the_call(squeeze, native):
    args, options = make_inputs(CASES["channels-24"])
    with record.recording(record.Recorder()) as recorder:
        out = depthwise_conv_bn_act(*args, **options, squeeze=squeeze)
    (call,) = recorder.calls
    x, weight = args[:2]
    written = out[0].nbytes + out[1].nbytes if squeeze else out.nbytes
    assert (call.op, call.backend, call.kernels) == ("depthwise_conv_bn_act", "native", 1)
    assert call.bytes_read == x.nbytes + weight.nbytes + 5 * 24 * 4
    assert call.bytes_written == written


@pytest.mark.parametrize(("batch", "kernels"), [(128, 1), (1, 2)])
def test_meta_tensors_are_planned_as_cuda(batch, kernels):
    """A batch of 128 fills the GPU with whole maps; the bands of one image are added afterwards."""
    pytest.importorskip("triton")
    x = torch.empty(batch, 96, 112, 112, dtype=torch.bfloat16, device="meta")
    weight = torch.empty(96, 1, 3, 3, dtype=torch.bfloat16, device="meta")
    with record.recording(record.Recorder()) as recorder:
        out, sums = depthwise_conv_bn_act(x, weight, stride=2, padding=1, squeeze=True)
        depthwise_conv_bn_act(x, weight, stride=2, padding=1)
    squeezing, plain = recorder.calls
    assert (squeezing.backend, squeezing.kernels) == ("triton", kernels)
    assert (plain.backend, plain.kernels) == ("triton", 1)
    assert plain.bytes_read == x.nbytes + weight.nbytes and plain.bytes_written == out.nbytes
    parts = squeezing.bytes_read - plain.bytes_read
    assert (parts == 0) == (kernels == 1)
    assert squeezing.bytes_written == out.nbytes + sums.nbytes + parts
    assert out.device.type == sums.device.type == "meta"
