"""depthwise_conv_bn_act around its arithmetic: registration, choice, errors, cache, explain."""

import pytest
import torch
from torch.library import opcheck

import cvkernels
from cvkernels import record
from cvkernels.backend import BackendError
from cvkernels.functional import depthwise_conv_bn_act
from cvkernels.ops.depthwise_conv_bn_act import native as native_module
from cvkernels.ops.depthwise_conv_bn_act.reference import depthwise_conv_bn_act_reference
from tests.support.cases.depthwise_conv_bn_act import CASES, flat_arguments, make_inputs
from tests.support.numerics import assert_matches

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


# Bad input

GOOD = make_inputs(CASES["channels-24"])
BAD = {
    "weight-groups": (ValueError, "conv_bn_act has groups=", {"weight": torch.rand(24, 2, 3, 3)}),
    "weight-channels": (ValueError, "with C = 24", {"weight": torch.rand(12, 1, 3, 3)}),
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
