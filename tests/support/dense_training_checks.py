"""A dense block in training beside its stock twin; the tests of DenseNet training share it."""

import pytest
import torch
from torch import nn

import cvkernels
from cvkernels.nn import DenseBlock

stock_module = pytest.importorskip("torchvision.models.densenet")

LAYERS, CHANNELS, GROWTH = 3, 8, 4


def blocks(memory_efficient=False, drop_rate=0.0):
    """(ours, stock) with one state, their norms no identities."""
    stock = stock_module._DenseBlock(LAYERS, CHANNELS, 2, GROWTH, drop_rate)
    with torch.no_grad():
        for norm in stock.modules():
            if isinstance(norm, nn.BatchNorm2d):
                norm.weight.uniform_(-1.0, 1.5)
                norm.bias.normal_(0, 0.2)
    ours = DenseBlock(LAYERS, CHANNELS, 2, GROWTH, drop_rate, memory_efficient)
    ours.load_state_dict(stock.state_dict())
    return ours, stock


def image(dtype=torch.float32, shape=(2, CHANNELS, 5, 6)):
    return torch.randn(shape, dtype=dtype)


def runs_fused(module, x):
    """Whether module(x) runs our passes, and the reasons that explain gives."""
    rows = cvkernels.explain(module, x).rows
    return any("batch_norm_act" in row.op for row in rows), {row.reason for row in rows}


def outcome(module, x, weights=None):
    """Output, gradients of the input and of every parameter, and the buffers after it."""
    x = x.detach().requires_grad_()
    out = module(x)
    generator = torch.Generator().manual_seed(1)
    cotangent = torch.randn(out.shape, generator=generator, dtype=torch.float64).to(out)
    grads = torch.autograd.grad(out, [x, *module.parameters()], cotangent)
    return [t.detach() for t in (out, *grads)] + [b.clone() for b in module.buffers()]
