"""A dense block in training beside its stock twin; the tests of DenseNet training share it."""

import functools

import pytest
import torch

import cvkernels
from cvkernels.nn import DenseBlock
from tests.support import pairs
from tests.support.numerics import cotangents_of
from tests.support.pairs import pair, spread_norms

stock_module = pytest.importorskip("torchvision.models.densenet")

LAYERS, CHANNELS, GROWTH = 3, 8, 4


def blocks(memory_efficient=False, drop_rate=0.0):
    """(ours, stock) with one state, their norms no identities."""
    stock = stock_module._DenseBlock(LAYERS, CHANNELS, 2, GROWTH, drop_rate)
    spread_norms(stock, (-1.0, 1.5))
    return pair(stock, DenseBlock(LAYERS, CHANNELS, 2, GROWTH, drop_rate, memory_efficient))


image = functools.partial(pairs.image, batch=2, size=(5, 6), channels=CHANNELS)


def runs_fused(module, x):
    """Whether module(x) runs our passes, and the reasons that explain gives."""
    rows = cvkernels.explain(module, x).rows
    return any("batch_norm_act" in row.op for row in rows), {row.reason for row in rows}


def outcome(module, x, weights=None):
    """Output, gradients of the input and of every parameter, and the buffers after it."""
    x = x.detach().requires_grad_()
    out = module(x)
    grads = torch.autograd.grad(out, [x, *module.parameters()], cotangents_of(out))
    return [t.detach() for t in (out, *grads)] + [b.clone() for b in module.buffers()]
