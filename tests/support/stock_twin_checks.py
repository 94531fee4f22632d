"""What tests of SENet, EfficientNet and patched networks ask of a model beside its stock twin."""

import copy

import pytest
import torch
from torch import nn

import cvkernels
from tests.support.numerics import assert_matches_module
from tests.support.pairs import calibrated_pair


def assert_same_state(ours, stock):
    """Names, order, shapes, versions and every bit of the parameters and buffers."""
    state, expected = ours.state_dict(), stock.state_dict()
    assert list(state) == list(expected)
    assert state._metadata == expected._metadata
    assert [n for n, _ in ours.named_modules()] == [n for n, _ in stock.named_modules()]
    assert [n for n, _ in ours.named_parameters()] == [n for n, _ in stock.named_parameters()]
    for key, value in expected.items():
        assert state[key].dtype == value.dtype and torch.equal(state[key], value), key


def assert_same_output(ours, stock, x):
    """Equal to a thousandth of the largest output, for networks too large for a float64 copy."""
    with torch.no_grad():
        actual, expected = ours(x), stock(x)
    assert actual.shape == expected.shape
    assert (actual - expected).abs().max() <= 1e-3 * expected.abs().max()


def assert_same_gradients(ours, stock, x):
    """Gradients in the input and every parameter, in float64.

    In float32 a rounding moves some element of x across a ReLU's kink, and the gradient jumps.
    """
    gradients = []
    for model in (ours, stock):
        model, image = copy.deepcopy(model).double(), x.double().requires_grad_()
        torch.manual_seed(3)
        model(image).square().mean().backward()
        found = {n: p.grad for n, p in model.named_parameters() if p.grad is not None}
        gradients.append(found | {"input": image.grad})
    assert gradients[0].keys() == gradients[1].keys()
    # A bias before a norm over the batch has the gradient zero, and rounding around it.
    rounding = 1e-12 * max(grad.abs().max() for grad in gradients[1].values())
    for name, expected in gradients[1].items():
        allowed = 1e-8 * expected.abs().max() + rounding
        assert (gradients[0][name] - expected).abs().max() <= allowed, name


def assert_eval_is_pure(ours, stock, x):
    """Outputs by the rule, gradients, and not a bit of the state changes."""
    before = {key: value.clone() for key, value in ours.state_dict().items()}
    assert_matches_module(ours, stock, x, grad=False)
    assert_same_gradients(ours, stock, x)
    after = ours.state_dict()
    assert list(after) == list(before)
    assert all(torch.equal(after[key], value) for key, value in before.items())


def assert_follows_parameters(ours, stock, x):
    """Eval outputs follow an optimiser's step, a load, and the state of functional_call."""
    for model in (ours, stock):
        with torch.no_grad():
            model(x)
        for parameter in model.parameters():
            parameter.grad = 0.1 * parameter.detach()
        torch.optim.SGD(model.parameters(), lr=0.1).step()
    assert_matches_module(ours, stock, x, grad=False)
    calibrated_pair(ours, stock)
    assert_matches_module(ours, stock, x, grad=False)
    state = {k: v * 0.99 if v.is_floating_point() else v for k, v in stock.state_dict().items()}
    with torch.no_grad():
        actual = torch.func.functional_call(ours, state, x)
        expected = torch.func.functional_call(stock, state, x)
    assert (actual - expected).abs().max() <= 1e-3 * expected.abs().max()
    assert_matches_module(ours, stock, x, grad=False)


def assert_trains_like(ours, stock, x):
    """Outputs, gradients, buffers and the random numbers drawn, in training mode."""
    assert_matches_module(ours, stock, x, grad=False)
    assert_same_gradients(ours, stock, x)
    for key, value in stock.state_dict().items():
        if key.endswith(("running_mean", "running_var")):
            assert torch.allclose(ours.state_dict()[key], value, atol=1e-5), key
        else:
            assert torch.equal(ours.state_dict()[key], value), key
    states = []
    for model in (ours, stock):
        torch.manual_seed(3)
        model(x)
        states.append(torch.get_rng_state())
    assert torch.equal(*states)


def assert_hook_is_called(ours, stock, layer, x):
    """A hook sees what it sees in stock, and the output stays right."""
    outputs = []
    for model in (ours, stock):
        model.get_submodule(layer).register_forward_hook(
            lambda module, args, out: outputs.append(out.clone())
        )
    assert_same_output(ours, stock, x)
    assert (outputs[0] - outputs[1]).abs().max() <= 1e-3 * outputs[1].abs().max()


def assert_every_norm_is_fused(model, x):
    """explain shows one fused convolution for each batch norm, and no other convolution or norm."""
    rows = cvkernels.explain(model, x).rows
    norms = [m for m in model.modules() if isinstance(m, nn.BatchNorm2d)]
    fused = [row for row in rows if row.op in ("conv_bn_act", "depthwise_conv_bn_act")]
    assert len(fused) == len(norms)
    assert not any("batch_norm" in row.op or "convolution" in row.op for row in rows)
    assert {row.backend for row in fused} <= {"onednn", "triton", "cudnn", "native"}


def assert_same_error(ours, stock, **kwargs):
    """The builder raises stock's error type, and its message where that names no function."""
    with pytest.raises(Exception) as expected:  # noqa: PT011, B017 - whatever stock raises
        stock(**kwargs)
    with pytest.raises(type(expected.value)) as actual:
        ours(**kwargs)
    if "()" not in str(expected.value):
        assert str(actual.value) == str(expected.value)
