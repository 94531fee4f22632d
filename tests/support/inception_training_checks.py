"""A small GoogLeNet in training beside its stock twin; the tests of inception training share it."""

import copy
import importlib

import pytest
import torch
import torch.nn.functional as F
from torch import nn

import cvkernels
from cvkernels.nn import FusedSequential
from cvkernels.nn.training import recompute

pytest.importorskip("torchvision")
# The name torchvision.models.googlenet is the builder's too.
stock_module = importlib.import_module("torchvision.models.googlenet")

FIRST = (16, 8, 8, 12, 4, 8, 4)
SECOND = (32, 8, 8, 8, 4, 8, 8)


class Net(nn.Module):
    """Stem, two blocks and the pools between them; the first block's output is used three times."""

    def __init__(self, convolution, inception, sequence):
        super().__init__()
        self.stem = sequence(
            convolution(3, 16, kernel_size=3, stride=2, padding=1),
            nn.MaxPool2d(3, 2, ceil_mode=True),
        )
        self.first = inception(*FIRST)
        self.pool = sequence(nn.MaxPool2d(2, 2, ceil_mode=True))
        self.second = inception(*SECOND)
        self.fc = nn.Linear(32, 5)
        self.side = nn.Linear(32, 5)

    def forward(self, x):
        first = self.first(self.stem(x))
        second = self.second(self.pool(first))
        return torch.cat([self.fc(second.mean((2, 3))), self.side(first.mean((2, 3)))], 1)


def pair(dtype=torch.float64):
    """(ours, stock) in training with one state; norms of all forms that BatchNorm2d has."""
    torch.manual_seed(0)
    stock = Net(stock_module.BasicConv2d, stock_module.Inception, nn.Sequential)
    stock.first.branch2[0].bn = nn.BatchNorm2d(8, momentum=None)
    stock.first.branch2[1].bn = nn.BatchNorm2d(12, affine=False)
    stock.second.branch1.bn = nn.BatchNorm2d(8, track_running_stats=False)
    stock.second.branch3[1].conv.bias = nn.Parameter(torch.randn(8))
    with torch.no_grad():
        for norm in stock.modules():
            if isinstance(norm, nn.BatchNorm2d) and norm.affine:
                norm.weight.uniform_(-0.5, 1.5)
                norm.bias.normal_(0, 0.3)
    ours = copy.deepcopy(stock)
    cvkernels.patch(ours)
    for name in ("stem", "pool"):
        setattr(ours, name, FusedSequential(*getattr(ours, name)))
    return ours.to(dtype).train(), stock.to(dtype).train()


def image(dtype=torch.float64, batch=3, size=(26, 23)):
    return torch.randn(batch, 3, *size, generator=torch.Generator().manual_seed(1)).to(dtype)


def loss_of(out):
    return F.cross_entropy(out, torch.arange(len(out)) % out.shape[1])


def step(model, x, run=None):
    """(outputs, gradients of image and parameters, buffers) of one forward and backward."""
    model.zero_grad()
    x = x.detach().requires_grad_()
    out = (run or model)(x)
    loss_of(out).backward()
    grads = [x.grad, *(p.grad for p in model.parameters())]
    return [out.detach(), *grads, *(b.clone() for b in model.buffers())]


def assert_equal(ours, stock, tolerance=1e-10):
    for actual, expected in zip(ours, stock, strict=True):
        if expected is None:
            assert actual is None
        else:
            torch.testing.assert_close(actual, expected, rtol=tolerance, atol=tolerance)


def is_recomputed(out):
    return isinstance(getattr(out, "recipe", None), recompute.Recipe)
