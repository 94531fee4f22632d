"""Padding of frozen networks: TensorFlow's "SAME", which follows from a map's size, and pads."""

import pytest
import torch
import torch.nn.functional as F
from torch import nn

import cvkernels
from cvkernels import extension
from cvkernels.freeze import quantise
from cvkernels.freeze.ops import SamePad
from cvkernels.freeze.quantise.guard import decibels
from tests.support.model_checks import calibrated
from tests.support.numerics import assert_close_as_eager
from tests.support.pairs import seen

timm = pytest.importorskip("timm")
conv2d_same = pytest.importorskip("timm.layers.conv2d_same")


def ops_of(frozen):
    return [node.op.name for node in frozen.graph.nodes]


def assert_frozen_follows_the_rule(model, frozen, x):
    with torch.no_grad():
        eager = model(x)
        exact = model.double()(x.double())
    model.float()
    assert_close_as_eager(frozen(x), eager, exact)


@pytest.mark.parametrize("size", [(6, 7), (9, 8), (1, 5)], ids=str)
@pytest.mark.parametrize("stride", [1, 2, 3])
@pytest.mark.parametrize(("kernel", "dilation"), [(3, 1), (5, 1), (2, 1), (4, 1), (3, 2), (1, 1)])
def test_same_convolutions(kernel, dilation, stride, size):
    conv = conv2d_same.Conv2dSame(4, 6, kernel, stride, dilation=dilation)
    model = nn.Sequential(conv, nn.BatchNorm2d(6), nn.ReLU()).eval()
    x = torch.randn(2, 4, *size)
    frozen = cvkernels.freeze(model, x)
    names = ops_of(frozen)
    assert names in (["input", "conv"], ["input", "pad_same", "conv"])
    # an odd kernel of stride 1 pads as much on both sides, whatever the size
    assert ("pad_same" in names) == (kernel > 1 and (stride > 1 or kernel % 2 == 0))
    assert_frozen_follows_the_rule(model, frozen, x)
    assert_frozen_follows_the_rule(model, frozen, torch.randn(1, 4, 11, 10))  # planned anew


def test_same_is_one_output_for_each_stride():
    for size in range(1, 20):
        for stride in (1, 2, 3, 4):
            pad = SamePad((3, 5), (stride, 2), (1, 2))
            (top, bottom), (left, right) = pad.amounts(size, size)
            assert 0 <= bottom - top <= 1 and 0 <= right - left <= 1
            rows = (size + top + bottom - 3) // stride + 1
            assert rows == -(-size // stride)
            assert (size + left + right - 9) // 2 + 1 == -(-size // 2)


class Padding(nn.Module):
    def __init__(self, pad):
        super().__init__()
        self.pad = pad
        self.conv, self.bn = nn.Conv2d(3, 8, 3, bias=False), nn.BatchNorm2d(8)

    def forward(self, x):
        return self.bn(self.conv(self.pad(x))).relu()


PADS = {
    "zero-pad": nn.ZeroPad2d((1, 2, 0, 3)),
    "one-number": nn.ZeroPad2d(1),
    "function": lambda x: F.pad(x, (1, 0, 2, 1)),
    "method-of-torch": lambda x: torch.nn.functional.pad(x, [0, 1, 0, 1], "constant", 0.0),
}
OTHERS = {
    "value": lambda x: F.pad(x, (1, 0, 2, 1), value=1.5),
    "negative": lambda x: F.pad(x, (1, -2, 0, 0)),
    "reflect": lambda x: F.pad(x, (1, 1, 1, 1), mode="reflect"),
    "columns-alone": lambda x: F.pad(x, (1, 1)),
}


@pytest.mark.parametrize("pad", PADS | OTHERS)
def test_pads(pad):
    model = Padding((PADS | OTHERS)[pad]).eval()
    x = torch.randn(2, 3, 9, 8)
    frozen = cvkernels.freeze(model, x)
    middle = "pad" if pad in PADS else "call"
    assert ops_of(frozen) == ["input", middle, "conv"]
    assert_frozen_follows_the_rule(model, frozen, x)


def test_a_network_is_fused_saved_and_planned_for_other_sizes(tmp_path):
    model = calibrated(timm.create_model, model_name="tf_efficientnet_lite0", num_classes=10)
    x = seen(2)
    frozen = cvkernels.freeze(model, x)
    assert ops_of(frozen).count("pad_same") == 5 and "call" not in ops_of(frozen)
    smaller = x[:1, :, :51, :46].contiguous()
    for images in (x, smaller):
        with torch.no_grad():
            expected = model(images)
        assert decibels(frozen(images), expected) > 90
    frozen.save(tmp_path / "model.cvk")
    assert torch.equal(cvkernels.load_frozen(tmp_path / "model.cvk")(smaller), frozen(smaller))
    halves = cvkernels.freeze(model, x, dtype=torch.bfloat16)
    with torch.no_grad():
        expected = model(x)
    assert decibels(halves(x), expected) > 20


@pytest.mark.skipif(not extension.has("cpu"), reason="the compiled extension is missing")
def test_bytes_are_padded_by_what_stands_for_zero(monkeypatch):
    monkeypatch.setattr(quantise, "ENOUGH", 1)
    model = calibrated(timm.create_model, model_name="tf_efficientnet_lite0", num_classes=10)
    x = seen(4)
    frozen = cvkernels.freeze(
        model, x[:1], dtype=torch.int8, calibration=x, tolerance=float("-inf")
    )
    names = ops_of(frozen)
    assert names.count("pad_same") == 5 and names.count("quantise") <= 2
    assert "dequantise" not in names and "conv" not in names
    with torch.no_grad():
        expected = model(x)
    assert decibels(frozen(x), expected) > 12
    # Of a norm that leaves no number at zero, bytes of zero would be far off.
    shifted = nn.Sequential(
        nn.Conv2d(3, 16, 1), nn.BatchNorm2d(16), conv2d_same.Conv2dSame(16, 8, 3, 2)
    ).eval()
    nn.init.constant_(shifted[1].bias, -4.0)
    frozen = cvkernels.freeze(
        shifted, x[:1], dtype=torch.int8, calibration=x, tolerance=float("-inf")
    )
    pad = next(node.op for node in frozen.graph.nodes if node.op.name == "pad_same")
    assert pad.fill > 0
    with torch.no_grad():
        assert decibels(frozen(x), shifted(x)) > 30
