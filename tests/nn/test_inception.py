"""Inception blocks in one buffer: equal to stock, and stock where a caller looks."""

import copy
import functools
import importlib

import pytest
import torch
from torch import nn

import cvkernels
from cvkernels import backend
from cvkernels.nn import Inception
from tests.support import pairs
from tests.support.numerics import assert_matches_module
from tests.support.pairs import pair, with_statistics

pytest.importorskip("torchvision")
# The name torchvision.models.googlenet is the builder's too.
stock_inception = importlib.import_module("torchvision.models.googlenet").Inception

ARGUMENTS = (24, 16, 12, 20, 8, 16, 8)
CONVOLUTIONS = ["branch1", "branch2.0", "branch2.1", "branch3.0", "branch3.1", "branch4.1"]


def blocks():
    """(ours, stock) with one state."""
    stock = with_statistics(stock_inception(*ARGUMENTS))
    return pair(stock, Inception(*ARGUMENTS).eval())


image = functools.partial(pairs.image, batch=2, size=(7, 6), channels=24)


def explained(module, x):
    """(ops, reasons) of module(x)."""
    with torch.no_grad():
        rows = cvkernels.explain(module, x).rows
    return [row.op for row in rows], {row.reason for row in rows}


def test_siblings_are_one_convolution_and_nothing_is_concatenated():
    ours, _ = blocks()
    # On CUDA nothing derived from weights is kept, merged ones neither.
    planned = torch.empty(2, 24, 7, 6, dtype=torch.bfloat16, device="meta")
    for x, convolutions in ((image(), 4), (planned, 6)):
        ops, _ = explained(ours, x)
        assert sorted(ops) == ["conv_bn_act"] * convolutions + ["max_pool"]


@pytest.mark.parametrize("name", ["reference", "triton", "onednn"])
def test_requested_backends(name):
    if name == "triton":
        pytest.importorskip("triton")
    ours, stock = blocks()
    device = "cuda" if torch.cuda.is_available() and name != "onednn" else "cpu"
    ours, stock, x = ours.to(device), stock.to(device), image().to(device)
    with backend.use(name):
        for _ in range(2):
            assert_matches_module(ours, stock, x, grad=False)
        assert "aten.cat" not in explained(ours, x)[0]
    assert_matches_module(ours, stock, x, grad=False)


def test_two_blocks_behind_each_other_in_triton():
    pytest.importorskip("triton")
    device = "cuda" if torch.cuda.is_available() else "cpu"
    first = (24, 8, 8, 8, 8, 8, 8)
    second = (32, 16, 8, 16, 8, 16, 8)
    stock = with_statistics(nn.Sequential(stock_inception(*first), stock_inception(*second)))
    ours = nn.Sequential(Inception(*first), Inception(*second)).eval()
    ours.load_state_dict(stock.state_dict())
    ours, stock, x = ours.to(device), stock.to(device), image(batch=1, size=(5, 4)).to(device)
    with backend.use("triton"):
        assert_matches_module(ours, stock, x, grad=False)


def test_gradients_are_stock_s():
    ours, stock = blocks()
    assert_matches_module(ours, stock, image())


# Where the branches are called


HOOKED = ["branch2", "branch4", "branch4.0", *CONVOLUTIONS, "branch1.conv", "branch3.0.bn"]


CHANGES = {
    "norm": (lambda block: setattr(block.branch1, "bn", nn.GroupNorm(4, 16)), "GroupNorm"),
    "batch-statistics": (lambda block: block.branch3[0].bn.train(), "batch statistics"),
    "block": (lambda block: setattr(block, "branch1", nn.Conv2d(24, 16, 1)), "Conv2d is no conv"),
    "longer-branch": (lambda block: block.branch2.append(nn.Softplus()), "sequence of two"),
    "pool": (
        lambda block: block.branch4.__setitem__(0, nn.AvgPool2d(3, 1, 1)),
        "AvgPool2d is not exactly",
    ),
    "eps": (lambda block: setattr(block.branch1.bn, "eps", 0.5), "differ in their form"),
    "sibling-bias": (
        lambda block: setattr(block.branch1.conv, "bias", nn.Parameter(torch.ones(16))),
        "bias",
    ),
    "data": (
        lambda block: setattr(block.branch1.conv.weight, "data", block.branch1.conv.weight * 2),
        "",
    ),
    "in-place": (lambda block: block.branch2[0].bn.running_var.mul_(2), ""),
    "parameter": (
        lambda block: setattr(
            block.branch3[0].bn, "weight", nn.Parameter(block.branch3[0].bn.weight * 3)
        ),
        "",
    ),
    "later-bias": (
        lambda block: setattr(block.branch2[1].conv, "bias", nn.Parameter(torch.ones(20))),
        "",
    ),
}


@pytest.mark.parametrize(("change", "reason"), CHANGES.values(), ids=CHANGES.keys())
def test_changes_between_calls_are_followed(change, reason):
    ours, stock = blocks()
    x = image()
    with torch.no_grad():
        for _ in range(2):
            before = ours(x)
        for block in (ours, stock):
            torch.manual_seed(1)
            change(block)
        for _ in range(2):
            assert torch.allclose(ours(x), stock(x), atol=1e-4)
        assert not torch.allclose(ours(x), before, atol=1e-4)
    ops, reasons = explained(ours, x)
    assert ("aten.cat" in ops) == bool(reason)
    assert reason in str(reasons)


def test_a_convolution_block_of_another_kind_is_called():
    def separable(in_channels, out_channels, **kwargs):
        return nn.Sequential(nn.Conv2d(in_channels, out_channels, **kwargs), nn.Sigmoid())

    block = Inception(*ARGUMENTS, conv_block=separable).eval()
    with torch.no_grad():
        x = image()
        assert torch.equal(block(x), torch.cat(block._forward(x), 1))


def test_verify_knows_the_layers():
    block = with_statistics(nn.Sequential(Inception(*ARGUMENTS)))
    verified = cvkernels.verify(block, image())
    assert verified.ok
    assert {"0.branch1.conv", "0.branch2.1.conv"} <= {row.layer for row in verified.rows}


def test_torchvisions_block_is_patched():
    stock = with_statistics(stock_inception(*ARGUMENTS))
    model = nn.Sequential(copy.deepcopy(stock))
    cvkernels.patch(model)
    for _ in range(2):
        assert_matches_module(model[0], stock, image(), grad=False)
    assert "aten.cat" not in explained(model, image())[0]
    cvkernels.restore(model)
    assert type(model[0]) is type(stock)
