"""Calls of conv_bn_act: the backend chosen, errors, derived weights, and what explain reports."""

import itertools

import pytest
import torch
from torch import nn

import cvkernels
from cvkernels.functional import BatchNormParams, DerivedWeights, conv_bn_act
from cvkernels.ops.conv_bn_act import native, onednn
from tests.support.cases.conv_bn_act import ODD, make_inputs

# The choice of a backend


def test_auto_on_cpu_follows_its_rule():
    args, kwargs = make_inputs(ODD["channels-not-8"])
    chosen = cvkernels.backend.chosen
    assert chosen("conv_bn_act", *args, **kwargs) == "native"
    gate = torch.rand(2, 13)
    assert chosen("conv_bn_act", *args, **kwargs, input_gate=gate) == "native"
    grouped, options = make_inputs(ODD["grouped"])
    assert chosen("conv_bn_act", *grouped, **options) == "onednn"
    gate = torch.rand(2, 16)
    assert chosen("conv_bn_act", *grouped, **options, input_gate=gate) == "reference"


def test_an_unknown_op_is_named():
    with pytest.raises(ValueError, match="no op named 'conv_bn_atc'"):
        cvkernels.backend.chosen("conv_bn_atc", torch.ones(1))


# Bad input


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
        (nn.SyncBatchNorm(4), ValueError),
        (type("Subclass", (nn.BatchNorm2d,), {})(4), TypeError),
        (nn.InstanceNorm2d(4), TypeError),
        (nn.BatchNorm2d(4), ValueError),
    ],
    ids=["sync", "subclass", "instance", "training"],
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
