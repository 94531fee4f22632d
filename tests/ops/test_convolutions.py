"""What conv_bn_act and depthwise_conv_bn_act share: errors, requests, derived weights."""

import pytest
import torch
from torch import nn

from cvkernels import backend, functional
from cvkernels.functional import BatchNormParams, DerivedWeights
from tests.support.cases import conv_bn_act, depthwise_conv_bn_act

each_op = pytest.mark.parametrize("op", ["conv_bn_act", "depthwise_conv_bn_act"])


def make_arguments(op):
    """By keyword, of a call that the native implementation takes."""
    if op == "conv_bn_act":
        args, options = conv_bn_act.make_inputs(conv_bn_act.ODD["channels-not-8"])
    else:
        cases = depthwise_conv_bn_act.CASES
        args, options = depthwise_conv_bn_act.make_inputs(cases["channels-not-8"])
    return dict(zip(("x", "weight", "bias", "bn"), args, strict=True)) | options


# The error, and the change of good arguments that it names.
BAD = {
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


@pytest.mark.parametrize(("error", "message", "change"), BAD.values(), ids=BAD.keys())
@each_op
def test_bad_input_is_refused_by_name(op, error, message, change):
    arguments = make_arguments(op)
    with pytest.raises(error, match=f"^{op}: .*{message}"):
        getattr(functional, op)(**arguments | change(arguments))


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
        expected = getattr(functional, op)(**arguments)
        for _ in range(2):
            assert torch.equal(getattr(functional, op)(**arguments, cache=cache), expected)
    assert len(cache) == 1
