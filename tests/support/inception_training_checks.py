"""A small GoogLeNet in training beside its stock twin; the tests of inception training share it."""

import functools
import importlib

import pytest
import torch
from torch import nn

from cvkernels.nn import FusedSequential
from cvkernels.nn.training import recompute
from tests.support import pairs
from tests.support.pairs import pair, spread_norms

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


def inception_pair(dtype=torch.float64):
    """(ours, stock) in training with one state; norms of all forms that BatchNorm2d has."""
    torch.manual_seed(0)
    stock = Net(stock_module.BasicConv2d, stock_module.Inception, nn.Sequential)
    stock.first.branch2[0].bn = nn.BatchNorm2d(8, momentum=None)
    stock.first.branch2[1].bn = nn.BatchNorm2d(12, affine=False)
    stock.second.branch1.bn = nn.BatchNorm2d(8, track_running_stats=False)
    stock.second.branch3[1].conv.bias = nn.Parameter(torch.randn(8))
    ours, stock = pair(spread_norms(stock, (-0.5, 1.5), 0.3).train(), dtype=dtype)
    for name in ("stem", "pool"):
        setattr(ours, name, FusedSequential(*getattr(ours, name)))
    return ours, stock


image = functools.partial(pairs.image, batch=3, size=(26, 23), dtype=torch.float64, seed=1)


def is_recomputed(out):
    return isinstance(getattr(out, "_cvkernels_recompute", None), recompute.Recompute)
