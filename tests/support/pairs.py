"""A module of ours beside its stock twin: their state, an image, a step and its comparison."""

import copy

import torch
import torch.nn.functional as F
from torch import nn
from torch.distributed.tensor import DTensor

import cvkernels

SIZE = 64


def image(batch=1, size=SIZE, device="cpu", dtype=torch.float32, channels=3, seed=None):
    """Random numbers; with a seed, the same in each call."""
    height, width = (size, size) if isinstance(size, int) else size
    generator = None if seed is None else torch.Generator().manual_seed(seed)
    x = torch.randn(batch, channels, height, width, generator=generator)
    return x.to(device=device, dtype=dtype)


def seen(count=1, device="cpu", channels=3, size=96):
    """The first of the four images that :func:`calibrated_pair` shows to the norms.

    On images that its norms have not seen, or on maps of few pixels, a deep untrained network is
    chaotic: it amplifies the rounding of its first layers a thousandfold, in stock as in ours.
    """
    return image(4, size, channels=channels, seed=11)[:count].to(device)


def norms_of(model):
    return [module for module in model.modules() if isinstance(module, nn.BatchNorm2d)]


@torch.no_grad()
def spread_norms(model, weight=(0.5, 1.5), bias=0.2):
    """``model``, its norms no identities."""
    for norm in norms_of(model):
        if norm.affine:
            norm.weight.uniform_(*weight)
            norm.bias.normal_(0, bias)
    return model


@torch.no_grad()
def with_statistics(model):
    """``model`` in eval, its norms no identities there either."""
    for norm in norms_of(model):
        norm.running_mean.normal_(0, 0.2)
        norm.running_var.uniform_(0.5, 1.5)
    return spread_norms(model).eval()


@torch.no_grad()
def calibrate(model, images=None, only_norms=False):
    """Norms with an affine part that is not the identity, and the statistics of what they see.

    Without them a signal fades to nothing on its way through an untrained network, and any output
    would be right. ``only_norms`` train meanwhile, or all that a training forward runs.
    """
    norms, training = norms_of(model), model.training
    momenta = [norm.momentum for norm in norms]
    spread_norms(model, (0.5, 1.0), 0.1)
    model.train(not only_norms)
    for norm in norms:
        norm.train().momentum = 1.0
    model(image(4) if images is None else images)
    model.train(training)
    for norm, momentum in zip(norms, momenta, strict=True):
        norm.momentum = momentum
    return model


def pair(stock, ours=None, dtype=None):
    """(ours, stock) with the state of stock; ours is a patched copy unless it is given."""
    if ours is None:
        ours = copy.deepcopy(stock)
        cvkernels.patch(ours)
    else:
        ours.load_state_dict(stock.state_dict())
    return ours.to(dtype=dtype), stock.to(dtype=dtype)


def calibrated_pair(ours, stock):
    """(ours, stock) in eval with one state, in which every layer's output is of order 1."""
    images = seen(4, channels=getattr(stock, "in_chans", 3))
    return pair(calibrate(stock.eval(), images, only_norms=True), ours.eval())


def loss_of(out):
    out = out.flatten(1)
    return F.cross_entropy(out, torch.arange(len(out)) % out.shape[1])


def gradients(model):
    """Of the parameters; of sharded ones, the whole."""
    grads = [p.grad for p in model.parameters()]
    return [g.full_tensor() if isinstance(g, DTensor) else g for g in grads]


def step(model, x, *args, run=None):
    """[output, gradients of x and parameters, buffers] of one forward and backward."""
    model.zero_grad()
    x = x.detach().requires_grad_()
    out = (run or model)(x, *args)
    loss_of(out).backward()
    return [out.detach(), x.grad, *gradients(model), *(b.clone() for b in model.buffers())]


def assert_equal(ours, stock, tolerance=1e-10, message=""):
    for actual, expected in zip(ours, stock, strict=True):
        assert (actual is None) == (expected is None), message
        if expected is not None:
            torch.testing.assert_close(
                actual, expected, rtol=tolerance, atol=tolerance, msg=lambda m: f"{message}: {m}"
            )
