"""What tests ask of a network beside its stock counterpart."""

import copy
import functools
import io
import pickle

import pytest
import torch
from torch import Tensor, nn

import cvkernels
from tests.support.numerics import assert_close_as_eager, assert_matches_module
from tests.support.pairs import calibrate, calibrated_pair

# Every kind of layer, in the fewest.
TINY_DENSENET = dict(growth_rate=8, block_config=(2, 2, 1, 1), num_init_features=16, num_classes=10)


def build(builder, seed=0, **kwargs):
    torch.manual_seed(seed)
    return builder(**kwargs)


def builders(name):
    """Ours and torchvision's of that name, or by it timm's ``create_model``, which drops Nones."""
    stock = pytest.importorskip("torchvision").models
    if hasattr(stock, name):
        return getattr(cvkernels.models, name), getattr(stock, name)
    timm = pytest.importorskip("timm")
    return tuple(functools.partial(library.create_model, name) for library in (cvkernels, timm))


def fresh_twins(name, **kwargs):
    """(ours, stock) of one seed, whose constructors draw the same random numbers."""
    ours, stock = builders(name)
    ours = build(ours, **kwargs)
    drawn = torch.rand(1)
    stock = build(stock, **kwargs)
    assert torch.equal(drawn, torch.rand(1)), "the constructor drew other random numbers"
    return ours, stock


def twins(name, device="cpu", **kwargs):
    """(ours, stock) in eval with one state, in which every layer's output is of order 1."""
    return tuple(model.to(device) for model in calibrated_pair(*fresh_twins(name, **kwargs)))


def calibrated(builder, **kwargs):
    """A network of seed 0 in eval, as :func:`calibrate` leaves it."""
    return calibrate(build(builder, **kwargs)).eval()


class Concatenated(nn.Module):
    """The outputs of a model that may return several, side by side."""

    def __init__(self, model):
        super().__init__()
        self.model = model

    def forward(self, x):
        outputs = self.model(x)
        return outputs if isinstance(outputs, Tensor) else torch.cat(tuple(outputs), 1)


def counterpart(stock, name, how, **options):
    """Ours in eval with stock's weights: a "patched" copy of it, or the "drop_in" of this name."""
    if how == "patched":
        ours = copy.deepcopy(stock)
        cvkernels.patch(ours)
        return ours
    ours = getattr(cvkernels.models, name)(**options).eval()
    ours.load_state_dict(stock.state_dict())
    return ours


def saved_and_loaded(model):
    """The model out of a file, which has no derived weights in it."""
    file, plain = io.BytesIO(), io.BytesIO()
    torch.save(model, file)
    torch.save(copy.deepcopy(model), plain)
    assert file.tell() == pytest.approx(plain.tell(), rel=1e-3)
    file.seek(0)
    return torch.load(file, weights_only=False)


COPIES = {
    "deepcopy": copy.deepcopy,
    "pickle": lambda model: pickle.loads(pickle.dumps(model)),
    "torch.save": saved_and_loaded,
}


def assert_same_state(ours, stock):
    """Names, order, shapes, versions and every bit of the parameters and buffers."""
    state, expected = ours.state_dict(), stock.state_dict()
    assert list(state) == list(expected)
    assert state._metadata == expected._metadata
    assert [n for n, _ in ours.named_modules()] == [n for n, _ in stock.named_modules()]
    assert [n for n, _ in ours.named_parameters()] == [n for n, _ in stock.named_parameters()]
    for key, value in expected.items():
        assert state[key].dtype == value.dtype and torch.equal(state[key], value), key


def assert_close(actual, expected, message="", tolerance=1e-4):
    """Equal but for roundings, of tensors of order 1."""
    torch.testing.assert_close(
        actual, expected, rtol=1e-5, atol=tolerance, msg=lambda text: f"{message}: {text}"
    )


def assert_same_output(ours, stock, x):
    """For networks too large for a float64 copy, and what :func:`assert_matches_module` calls
    other than as ``model(x)``."""
    with torch.no_grad():
        assert_close(ours(x), stock(x))


def assert_same_gradients(ours, stock, x, buffers=False):
    """Outputs, gradients in the input and every parameter, and ``buffers``, in float64.

    In float32 a rounding moves some element of x across a ReLU's kink, and the gradient jumps.
    """
    gradients = []
    for model in (ours, stock):
        model, image = copy.deepcopy(model).double(), x.double().requires_grad_()
        torch.manual_seed(3)
        out = Concatenated(model)(image)
        out.square().mean().backward()
        found = {n: p.grad for n, p in model.named_parameters() if p.grad is not None}
        gradients.append(found | {"input": image.grad, "output": out.detach()})
        gradients[-1] |= {n: b.double() for n, b in model.named_buffers()} if buffers else {}
    assert gradients[0].keys() == gradients[1].keys()
    # A bias before a norm over the batch has the gradient zero, and rounding around it.
    rounding = 1e-12 * max(grad.abs().max() for grad in gradients[1].values())
    for name, expected in gradients[1].items():
        allowed = 1e-8 * expected.abs().max() + rounding
        assert (gradients[0][name] - expected).abs().max() <= allowed, name


def assert_eval_is_pure(ours, stock, x, in_float32=False):
    """Outputs by the rule, gradients, and not a bit of the state changes.

    ``in_float32``: the input's gradient by the rule, for networks that bear it, or all in float64.
    """
    before = {key: value.clone() for key, value in ours.state_dict().items()}
    assert_matches_module(ours, stock, x, grad=False)
    if in_float32:
        assert_matches_module(ours, stock, x)
    else:
        assert_same_gradients(ours, stock, x)
    after = ours.state_dict()
    assert list(after) == list(before)
    assert all(torch.equal(after[key], value) for key, value in before.items())


def assert_autocasts_like(ours, stock, x):
    """By the rule, under bfloat16 autocast of x's device."""
    with torch.no_grad():
        exact = copy.deepcopy(stock).double()(x.double())
        with torch.autocast(x.device.type, torch.bfloat16):
            actual, expected = ours(x), stock(x)
    assert_close_as_eager(actual, expected, exact)


def assert_follows_parameters(ours, stock, x, factors=(0.9, 1.1, 0.98)):
    """Eval outputs follow an optimiser's step, loads, and the states of functional_call.

    Those states are the network's own, all values times one of ``factors``.
    """
    for model in (ours, stock):
        with torch.no_grad():
            model(x)
        for parameter in model.parameters():
            parameter.grad = 0.1 * parameter.detach()
        torch.optim.SGD(model.parameters(), lr=0.1).step()
    assert_matches_module(ours, stock, x, grad=False)
    calibrated_pair(ours, stock)
    assert_matches_module(ours, stock, x, grad=False)
    own = stock.state_dict()
    for factor in factors:
        state = {k: v * factor if v.is_floating_point() else v for k, v in own.items()}
        with torch.no_grad():
            actual = torch.func.functional_call(ours, state, x)
            expected = torch.func.functional_call(stock, state, x)
        assert_close(actual, expected, factor, 1e-3)
        del state  # the next may lie at its addresses
    assert_matches_module(ours, stock, x, grad=False)
    with torch.no_grad():
        for parameter in stock.parameters():
            parameter.mul_(0.9)
    ours.load_state_dict({k: v.clone() for k, v in stock.state_dict().items()}, assign=True)
    assert_matches_module(ours, stock, x, grad=False)


def assert_trains_like(ours, stock, x, in_float32=False):
    """Outputs, gradients, buffers and the random numbers drawn, in training mode.

    ``in_float32``: the input's gradient by the rule, for networks that bear it, or all in float64.
    """
    assert_same_gradients(ours, stock, x, buffers=True)
    exact = copy.deepcopy(stock).double()
    assert_matches_module(Concatenated(ours), Concatenated(stock), x, grad=in_float32)
    torch.manual_seed(2)
    exact(x.double())
    assert_same_statistics(ours, stock, exact)
    states = []
    for model in (ours, stock):
        torch.manual_seed(3)
        model(x)
        states.append(torch.get_rng_state())
    assert torch.equal(*states)


def assert_same_statistics(ours, stock, exact):
    """By the rule on all of them together: what one deep channel errs by is a matter of luck."""
    moved, state = [], ours.state_dict()
    for key, value in stock.state_dict().items():
        if key.endswith(("running_mean", "running_var")):
            assert_close(state[key], value, key, 1e-5)
            moved.append([m.state_dict()[key].double() for m in (ours, stock, exact)])
        else:
            assert torch.equal(state[key], value), key
    if moved:
        actual, eager, truth = (torch.cat(parts) for parts in zip(*moved, strict=True))
        assert (actual - truth).norm() <= 2 * (eager - truth).norm() + 1e-7 * truth.norm()


def assert_hook_is_called(ours, stock, layer, x):
    """A hook sees what it sees in stock, in each call, and the output stays right."""
    outputs = []
    for model in (ours, stock):
        model.get_submodule(layer).register_forward_hook(
            lambda module, args, out: outputs.append(out.clone())
        )
    assert_same_output(ours, stock, x)
    calls = len(outputs) // 2  # a block may call one module several times
    assert calls
    for actual, expected in zip(outputs[:calls], outputs[calls:], strict=True):
        assert_close(actual, expected)


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
