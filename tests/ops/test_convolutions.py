"""What conv_bn_act and depthwise_conv_bn_act share: vectors, errors, requests, derived weights."""

import pytest
import torch
from torch import nn

from cvkernels import backend, functional, record
from cvkernels.backend import BackendError
from cvkernels.functional import BatchNormParams, DerivedWeights
from cvkernels.ops.conv_bn_act.reference import conv_bn_act_reference
from cvkernels.ops.depthwise_conv_bn_act.reference import depthwise_conv_bn_act_reference
from tests.support.cases import conv_bn_act, depthwise_conv_bn_act
from tests.support.numerics import assert_matches

CHANNELS_LAST = torch.channels_last
REFERENCES = {
    "conv_bn_act": conv_bn_act_reference,
    "depthwise_conv_bn_act": depthwise_conv_bn_act_reference,
}
each_op = pytest.mark.parametrize("op", REFERENCES)


def make_arguments(op, device="cpu"):
    """By keyword, of a call that the native implementation takes."""
    if op == "conv_bn_act":
        conv = conv_bn_act.ODD["channels-not-8"]
        args, options = conv_bn_act.make_inputs(conv, torch.float32, CHANNELS_LAST, device)
    else:
        case = depthwise_conv_bn_act.CASES["channels-not-8"]
        args, options = depthwise_conv_bn_act.make_inputs(case, device=device)
    return dict(zip(("x", "weight", "bias", "bn"), args, strict=True)) | options


def call(op, arguments, **others):
    return getattr(functional, op)(**arguments, **others)


@each_op
@pytest.mark.parametrize("where", ["reference", "native", "triton"], indirect=True)
@pytest.mark.parametrize("dropped", ["bias", "bn", "weight", "shift", "statistics", "all"])
def test_every_vector_is_optional(op, dropped, where):
    arguments = make_arguments(op, where)
    bn = arguments["bn"]
    changes = {
        "bias": {"bias": None},
        "bn": {"bn": None},
        "weight": {"bn": bn._replace(weight=None)},
        "shift": {"bn": bn._replace(bias=None)},
        "statistics": {"bn": bn._replace(mean=None, var=None)},
        "all": {"bias": None, "bn": None},
    }
    arguments |= changes[dropped]
    assert_matches(getattr(functional, op), REFERENCES[op], (), arguments)


@each_op
@pytest.mark.parametrize("where", ["auto", "native", "triton"], indirect=True)
def test_unneeded_gradients_are_not_computed(op, where):
    arguments = make_arguments(op, where)
    arguments["x"].requires_grad_()
    call(op, arguments).sum().backward()
    assert arguments["x"].grad is not None and arguments["weight"].grad is None


@each_op
def test_autocast_computes_in_its_dtype(op, device):
    arguments = make_arguments(op, device)
    with torch.autocast(device.type, torch.bfloat16), torch.no_grad():
        out, expected = call(op, arguments), REFERENCES[op](**arguments)
    assert out.dtype == torch.bfloat16
    assert torch.allclose(out.float(), expected.float(), atol=0.1, rtol=0.05)


def like_weight(*shape):
    return lambda a: {"weight": torch.rand(shape)}


# The error, and the change of good arguments that it names: x[2, 13, 9, 7] and K = 11, or
# x[3, 37, 9, 5].
BOTH = {
    "rank": (
        ValueError, r"x must have shape \[N, C, H, W\].*unsqueeze", lambda a: {"x": a["x"][0]},
    ),
    "weight-rank": (
        ValueError, "weight must have shape", lambda a: {"weight": a["weight"][..., 0]},
    ),
    "mixed-dtype": (
        TypeError, "weight must have x's dtype", lambda a: {"weight": a["weight"].half()},
    ),
    "int-dtype": (
        TypeError, "dtype must be float32",
        lambda a: {"x": a["x"].long(), "weight": a["weight"].long()},
    ),
    "device": (
        ValueError, "weight must be on x's device", lambda a: {"weight": a["weight"].to("meta")},
    ),
    "bias-shape": (
        ValueError, r"bias must have shape \[\d+\], got \[12\]", lambda a: {"bias": torch.rand(12)},
    ),
    "bn-module": (
        TypeError, "bn must be BatchNormParams, got BatchNorm2d",
        lambda a: {"bn": nn.BatchNorm2d(len(a["bias"]))},
    ),
    "bn-shape": (
        ValueError, "bn.weight must have shape",
        lambda a: {"bn": BatchNormParams(weight=torch.rand(7))},
    ),
    "bn-half": (
        ValueError, "both mean and var", lambda a: {"bn": BatchNormParams(mean=a["bias"])},
    ),
    "act": (ValueError, "act must be one of", lambda a: {"act": "gelu"}),
    "stride": (ValueError, "stride must be at least 1", lambda a: {"stride": 0}),
    "stride-triple": (
        ValueError, "stride must be an int or two", lambda a: {"stride": (1, 1, 1)},
    ),
    "padding-same": (
        ValueError, "padding must be an int or two.*'same'", lambda a: {"padding": "same"},
    ),
    "padding-negative": (ValueError, "padding must be at least 0", lambda a: {"padding": -1}),
    "too-small": (
        ValueError, r"does not fit into the map of \d+x\d+",
        lambda a: {"padding": 0, "dilation": 20},
    ),
}  # fmt: skip
ONE = {
    "conv_bn_act": {
        "channels": (ValueError, "weight must have C/groups", like_weight(11, 12, 3, 3)),
        "groups": (ValueError, "groups must divide the channels", lambda a: {"groups": 2}),
        "residual-shape": (
            ValueError, "residual must have shape", lambda a: {"residual": a["x"]},
        ),
        "residual-dtype": (
            TypeError, "residual must have x's dtype",
            lambda a: {"residual": a["x"][:, :11].half()},
        ),
        "gate-shape": (
            ValueError, r"input_gate must have shape \[N, C\]",
            lambda a: {"input_gate": torch.rand(2, 11)},
        ),
        "output-gate-shape": (
            ValueError, r"output_gate must have shape \[N, K\]",
            lambda a: {"output_gate": torch.rand(2, 13)},
        ),
        "input-bn-shape": (
            ValueError, "input_bn.weight must have shape", lambda a: {"input_bn": a["bn"]},
        ),
        "out-shape": (ValueError, "out must have shape", lambda a: {"out": a["x"]}),
        "out-layout": (
            ValueError, "out must have channel stride 1",
            lambda a: {"out": torch.rand(2, 11, 9, 7)},
        ),
        "out-dtype": (
            TypeError, "out must have dtype", lambda a: {"out": a["x"][:, :11].half()},
        ),
    },
    "depthwise_conv_bn_act": {
        "weight-groups": (ValueError, "conv_bn_act has groups=", like_weight(37, 2, 3, 3)),
        "weight-channels": (ValueError, "with C = 37", like_weight(12, 1, 3, 3)),
    },
}  # fmt: skip
# Calls that a backend which is asked for cannot run, and why.
CANNOT = {
    "conv_bn_act": {
        "cudnn": ("needs CUDA tensors", {}),
        "native": ("has no groups, got 2", {"x": torch.rand(2, 4, 5, 5), "groups": 2,
                   "weight": torch.rand(2, 2, 3, 3), "bias": None, "bn": None}),
        "onednn": ("prologue", {"input_gate": torch.rand(2, 13)}),
    },
    "depthwise_conv_bn_act": {
        "native": ("3x3 and 5x5 kernels of stride 1 and 2", {"dilation": 2}),
        "onednn": ("no onednn implementation", {}),
        "cudnn": ("no cudnn implementation", {}),
        "triton": ("3x3 or 5x5, got 7x7", {"weight": torch.rand(37, 1, 7, 7)}),
    },
}  # fmt: skip


@pytest.mark.parametrize(
    ("op", "error", "message", "change"),
    [
        pytest.param(op, *case, id=f"{op}-{name}")
        for op, own in ONE.items()
        for name, case in (BOTH | own).items()
    ],
)
def test_bad_input_is_refused_by_name(op, error, message, change):
    arguments = make_arguments(op)
    with pytest.raises(error, match=f"^{op}: .*{message}"):
        getattr(functional, op)(**arguments | change(arguments))


@pytest.mark.parametrize(
    ("op", "name", "reason", "change"),
    [(op, name, *case) for op, cases in CANNOT.items() for name, case in cases.items()],
)
def test_explicit_backend_runs_or_raises(op, name, reason, change, native):
    arguments = make_arguments(op) | change
    with pytest.raises(BackendError, match=f"^{op}: backend '{name}' cannot run.*{reason}"):
        call(op, arguments, backend=name)


@each_op
def test_use_requests_and_a_call_overrules_it(op, native):
    arguments, chosen = make_arguments(op), backend.chosen
    with backend.use("reference"):
        assert chosen(op, **arguments) == "reference"
        assert chosen(op, **arguments, backend="native") == "native"
    assert chosen(op, **arguments) == "native"


@each_op
def test_derived_weights_follow_every_change_of_the_parameters(op):
    arguments, cache = make_arguments(op), DerivedWeights()
    weight, bias, bn = (arguments[key] for key in ("weight", "bias", "bn"))
    for change in (
        lambda: None,
        lambda: weight.mul_(2),
        lambda: bn.var.add_(1),
        lambda: bias.zero_(),
        lambda: bn.weight.fill_(1),
    ):
        change()
        expected = call(op, arguments)
        for _ in range(2):
            assert torch.equal(call(op, arguments, cache=cache), expected)
    assert len(cache) == 1


@pytest.mark.parametrize(
    ("op", "options"),
    [
        ("conv_bn_act", {}),
        ("depthwise_conv_bn_act", {}),
        ("depthwise_conv_bn_act", {"squeeze": True}),
    ],
)
def test_explain_reports_the_call(op, options, device):
    arguments = make_arguments(op, device)
    with record.recording(record.Recorder()) as recorder, torch.no_grad():
        out = call(op, arguments, **options)
    (row,) = recorder.calls
    x, weight, bias = (arguments[name] for name in ("x", "weight", "bias"))
    written = sum(t.nbytes for t in out) if options else out.nbytes
    assert (row.op, row.kernels) == (op, 1)
    assert row.bytes_read == x.nbytes + weight.nbytes + 5 * bias.nbytes
    assert row.bytes_written == written
