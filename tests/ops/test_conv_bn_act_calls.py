"""Calls of conv_bn_act: the backend chosen, errors, derived weights, and what explain reports."""

import itertools

import pytest
import torch
from torch import nn

import cvkernels
from cvkernels import BackendError, record
from cvkernels.functional import BatchNormParams, DerivedWeights, conv_bn_act
from cvkernels.ops.conv_bn_act import native, onednn
from tests.support.cases.conv_bn_act import ODD, make_bn, make_inputs

# The choice of a backend


def test_auto_on_cpu_follows_its_rule():
    args, kwargs = make_inputs(ODD["channels-not-8"])
    chosen = cvkernels.backend.chosen
    assert chosen("conv_bn_act", *args, **kwargs) == "native"
    gate = torch.rand(2, 13)
    assert chosen("conv_bn_act", *args, **kwargs, input_gate=gate) == "native"
    double = (args[0].double(), args[1].double(), *args[2:])
    assert chosen("conv_bn_act", *double, **kwargs) == "reference"
    args[1].requires_grad_()
    assert chosen("conv_bn_act", *args, **kwargs) == "reference"
    with torch.no_grad():
        assert chosen("conv_bn_act", *args, **kwargs) == "native"
    grouped, options = make_inputs(ODD["grouped"])
    assert chosen("conv_bn_act", *grouped, **options) == "onednn"
    gate = torch.rand(2, 16)
    assert chosen("conv_bn_act", *grouped, **options, input_gate=gate) == "reference"


@pytest.mark.parametrize(
    ("backend", "name", "reason"),
    [("cudnn", "grouped", "needs CUDA tensors"), ("native", "grouped", "has no groups, got 4")],
)
def test_explicit_backend_runs_or_raises(backend, name, reason):
    args, kwargs = make_inputs(ODD[name])
    with pytest.raises(
        BackendError, match=f"conv_bn_act: backend '{backend}' cannot run.*{reason}"
    ):
        conv_bn_act(*args, **kwargs, backend=backend)


def test_unknown_backend_and_op_are_named():
    args, kwargs = make_inputs(ODD["channels-not-8"])
    with pytest.raises(ValueError, match="backend must be one of .* got 'magic'"):
        conv_bn_act(*args, **kwargs, backend="magic")
    with pytest.raises(ValueError, match="no op named 'conv_bn_atc'"):
        cvkernels.backend.chosen("conv_bn_atc", *args)


# Bad input


def bad(error, message, **change):
    """A change of good arguments, and the error that names it."""
    return change, error, message


BAD = {
    "channels": bad(ValueError, "weight must have C/groups", weight=torch.rand(11, 12, 3, 3)),
    "groups": bad(ValueError, "groups must divide the channels", groups=2),
    "residual-shape": bad(
        ValueError, "residual must have shape", residual=torch.rand(2, 11, 9, 9)
    ),
    "residual-dtype": bad(
        TypeError, "residual must have x's dtype", residual=torch.rand(2, 11, 9, 7).half()
    ),
    "gate-shape": bad(
        ValueError, r"input_gate must have shape \[N, C\]", input_gate=torch.rand(2, 11)
    ),
    "input-bn-shape": bad(
        ValueError, "input_bn.weight must have shape", input_bn=make_bn(11)
    ),
    "out-shape": bad(ValueError, "out must have shape", out=torch.rand(2, 10, 9, 7)),
    "out-layout": bad(ValueError, "out must have channel stride 1", out=torch.rand(2, 11, 9, 7)),
    "out-dtype": bad(
        TypeError, "out must have dtype",
        out=torch.rand(2, 11, 9, 7).half().contiguous(memory_format=torch.channels_last),
    ),
}  # fmt: skip


@pytest.mark.parametrize("case", BAD.values(), ids=BAD.keys())
def test_bad_input_is_refused_by_name(case):
    change, error, message = case
    (x, weight, bias, bn), kwargs = make_inputs(ODD["channels-not-8"])
    arguments = {"x": x, "weight": weight, "bias": bias, "bn": bn, **kwargs, **change}
    with pytest.raises(error, match=f"conv_bn_act: .*{message}"):
        conv_bn_act(**arguments)


def test_overlapping_out_is_refused():
    buffer = torch.randn(2, 24, 5, 6).contiguous(memory_format=torch.channels_last)
    weight = torch.randn(8, 16, 1, 1)
    with pytest.raises(ValueError, match="out overlaps x: .*write into other channels"):
        conv_bn_act(buffer[:, :16], weight, out=buffer[:, 15:23])


def test_out_with_gradient_is_refused():
    out = torch.empty(2, 8, 5, 6).contiguous(memory_format=torch.channels_last)
    x = torch.rand(2, 16, 5, 6, requires_grad=True)
    with pytest.raises(ValueError, match="out= is not differentiable"):
        conv_bn_act(x, torch.randn(8, 16, 1, 1), out=out)


@pytest.mark.parametrize(
    ("module", "error"),
    [
        (nn.SyncBatchNorm(4), TypeError),
        (nn.InstanceNorm2d(4), TypeError),
        (nn.BatchNorm2d(4), ValueError),
    ],
    ids=["sync", "instance", "training"],
)
def test_only_an_exact_batch_norm_in_eval_is_taken(module, error):
    with pytest.raises(error, match="BatchNormParams.of: module"):
        BatchNormParams.of(module)


# Derived weights


@pytest.mark.parametrize(
    ("backend", "expected", "kept"), [(native, 1, 1), (onednn, 4, 2)], ids=["native", "onednn"]
)
def test_derived_weights_are_reused_and_bounded(backend, expected, kept, monkeypatch):
    """oneDNN packs weights for a size of the map; for the native convolution they are the same."""
    args, kwargs = make_inputs(ODD["channels-not-8"])
    folds, fold = [], backend.fold
    monkeypatch.setattr(backend, "fold", lambda *a: folds.append(1) or fold(*a))
    cache = DerivedWeights(capacity=2)
    name = backend.__name__.rpartition(".")[2]
    for size in itertools.chain([9, 9, 9], [10, 11, 12]):
        conv_bn_act(
            torch.randn(1, 13, size, 7), *args[1:], **kwargs, cache=cache, backend=name
        )  # fmt: skip
    assert len(folds) == expected and len(cache) == kept


def test_explain_reports_the_call(device):
    args, kwargs = make_inputs(
        ODD["channels-not-8"], memory_format=torch.channels_last, device=device
    )
    with record.recording(record.Recorder()) as recorder, torch.no_grad():
        out = conv_bn_act(*args, **kwargs)
    (call,) = recorder.calls
    x, weight = args[:2]
    assert (call.op, call.kernels) == ("conv_bn_act", 1)
    assert call.bytes_read == x.nbytes + weight.nbytes + 5 * 11 * 4
    assert call.bytes_written == out.nbytes
