"""conv_bn_act on CPU as a matrix product: a 1x1 convolution of few pixels."""

import pytest
import torch
from numerics import assert_matches

import cvkernels
from cvkernels.functional import BatchNormParams, DerivedWeights, conv_bn_act
from cvkernels.ops.conv_bn_act import onednn
from cvkernels.ops.conv_bn_act.reference import conv_bn_act_reference

FORMATS = {"nchw": torch.contiguous_format, "nhwc": torch.channels_last}
VIEWS = {
    "dense": lambda x: x,
    "slice": lambda x: x[:, 3:20],
    "window": lambda x: x[:, :, 1:4, 2:5],
    "transposed": lambda x: x.transpose(2, 3),
    "one-pixel": lambda x: x[:, :, :1, :1],
    "one-image": lambda x: x[:1],
}


def make(view="dense", layout="nhwc", K=12):
    x = VIEWS[view](torch.randn(2, 24, 7, 6).contiguous(memory_format=FORMATS[layout]))
    weight, bias = torch.randn(K, x.shape[1], 1, 1), torch.randn(K)
    bn = BatchNormParams(*torch.randn(3, K), torch.rand(K) + 0.5)
    return x, weight, bias, bn


@pytest.fixture
def products(monkeypatch):
    """The matrix products that ran."""
    calls, multiply = [], onednn._multiply
    monkeypatch.setattr(onednn, "_multiply", lambda *a: calls.append(a) or multiply(*a))
    return calls


@pytest.mark.parametrize("act", ["none", "relu"])
@pytest.mark.parametrize("layout", FORMATS)
@pytest.mark.parametrize("view", VIEWS)
def test_matches_the_reference(view, layout, act, products):
    args = make(view, layout)
    cache = DerivedWeights()

    def call(*a):
        return conv_bn_act(*a, act=act, cache=cache, backend="onednn")

    for _ in range(2):
        assert_matches(call, lambda *a: conv_bn_act_reference(*a, act=act), args)
    assert len(products) == 2
    assert call(*args).is_contiguous(memory_format=torch.channels_last)


def test_writes_into_a_slice(products):
    x, *parameters = make()
    buffer = torch.randn(2, 40, 7, 6).contiguous(memory_format=torch.channels_last)
    expected = buffer.clone()
    expected[:, 5:17] = conv_bn_act(x, *parameters)
    conv_bn_act(x, *parameters, out=buffer[:, 5:17])
    assert torch.equal(buffer, expected) and len(products) == 2


def test_nan_stays(products):
    x, *parameters = make()
    x[0, 5, 2, 3] = torch.nan
    y = conv_bn_act(x, *parameters, act="relu")
    assert y[0, :, 2, 3].isnan().all() and y.isnan().sum() == 12 and products


OTHERS = {
    "stride": dict(stride=2),
    "padding": dict(padding=1),
    "groups": dict(groups=4),
    "silu": dict(act="silu"),
    "residual": dict(residual=torch.randn(2, 12, 7, 6)),
}


@pytest.mark.parametrize("kwargs", OTHERS.values(), ids=OTHERS.keys())
def test_everything_else_is_a_convolution(kwargs, products):
    x, weight, bias, bn = make()
    weight = weight[:, : 24 // kwargs.get("groups", 1)]
    args = (x, weight, bias, bn)
    assert_matches(
        lambda *a: conv_bn_act(*a, **kwargs, backend="onednn" if a[0].dtype == x.dtype else "auto"),
        lambda *a: conv_bn_act_reference(
            *a, **{k: v.to(a[0]) if k == "residual" else v for k, v in kwargs.items()}
        ),
        args,
    )
    assert not products


def test_many_pixels_and_lower_matrix_precision_are_a_convolution(products):
    _, *parameters = make()
    conv_bn_act(torch.randn(1, 24, 33, 32), *parameters)
    before = torch.get_float32_matmul_precision()
    torch.set_float32_matmul_precision("medium")
    try:
        conv_bn_act(torch.randn(1, 24, 4, 4), *parameters)
    finally:
        torch.set_float32_matmul_precision(before)
    assert not products


def test_explain_counts_the_passes():
    class Call(torch.nn.Module):
        def forward(self, x):
            return conv_bn_act(x, weight, bias, bn)

    x, weight, bias, bn = make()
    (row,) = cvkernels.explain(Call(), x).rows
    assert row.kernels == 2 and row.bytes_written == 2 * 4 * 12 * 2 * 42  # product, and ReLU
    (row,) = cvkernels.explain(Call(), x.contiguous()).rows
    assert row.kernels == 3  # the layout first
