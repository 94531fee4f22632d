"""A live network never answers past code that its owner replaced, nor past a mode that watches."""

import contextlib
import types
from collections import Counter

import pytest
import torch
from torch import nn
from torch.nn import functional as F
from torch.overrides import TorchFunctionMode, resolve_name
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils.flop_counter import FlopCounterMode

from tests.support.live_twins import CASES, Twins, each_case, largest, names_of

# Code replaced


def bent(counts, function, by=0.1):
    """function, counted and with another answer."""

    def replaced(*args, **kwargs):
        counts[function] += 1
        y = function(*args, **kwargs)
        return y + by * y.tanh()

    return replaced


def kind_of(model, kinds):
    """The class of the model's modules of these kinds, which may derive from stock PyTorch's."""
    found = {type(module) for module in model.modules() if isinstance(module, kinds)}
    return found.pop() if len(found) == 1 else None


ACTIVATIONS = (nn.ReLU, nn.SiLU)
FORWARDS = {
    "norm_forward": (nn.BatchNorm2d, "forward"),
    "conv_forward": (nn.Conv2d, "forward"),
    "conv__conv_forward": (nn.Conv2d, "_conv_forward"),
    "act_forward": (ACTIVATIONS, "forward"),
    "pool_forward": (nn.MaxPool2d, "forward"),
}
FUNCTIONS = ("batch_norm", "conv2d", "relu", "silu", "max_pool2d")
# What a network does not call.
ABSENT = {
    "googlenet": ("act_forward", "silu"),
    "resnet18": ("silu",),
    "densenet121": ("silu",),
    "seresnet18": ("silu",),
    "efficientnet_b0": ("pool_forward", "max_pool2d", "relu"),
}
BY_NETWORK = {
    f"{key}-{what}": (case, what)
    for what in (*FORWARDS, *FUNCTIONS)
    for key, case in CASES.items()
    if what not in ABSENT[case[0]]
}


def each_replaced(kinds):
    cases = {key: case for key, case in BY_NETWORK.items() if case[1] in kinds}
    return pytest.mark.parametrize(("case", "what"), cases.values(), ids=cases.keys())


warmth = pytest.mark.parametrize("warm", [False, True], ids=["before_first_call", "after"])


def replace(patch, what, stock, counts):
    """Replace a method on its class, or a function of torch.nn.functional."""
    if what in FUNCTIONS:
        owner, name = F, what
    else:
        owner, name = FORWARDS[what]
        owner = kind_of(stock, owner)
    patch.setattr(owner, name, bent(counts, getattr(owner, name)))


def answers_counted(twins, counts):
    """The answers of ours and stock's, and what was counted for each."""
    answers, counted = [], []
    for model in twins.both:
        counts.clear()
        answers.append(twins.answer(model))
        counted.append(dict(counts))
    return answers, counted


@pytest.mark.pairwise
@pytest.mark.few(30)
@each_replaced((*FORWARDS, *FUNCTIONS))
@warmth
def test_code_replaced(warm, case, what, monkeypatch):
    twins, counts = Twins(*case, warm=warm), Counter()
    with monkeypatch.context() as patch:
        replace(patch, what, twins.stock, counts)
        answers, counted = answers_counted(twins, counts)
        assert sum(counted[1].values()) > 0
        twins.compare(*answers, "replaced")
        assert counted[0] == counted[1]
        twins.check("replaced, again", changed=False)
    twins.check("restored")


@pytest.mark.pairwise
@pytest.mark.few(20)
@each_replaced(FORWARDS)
@warmth
def test_an_instance_s_method_replaced(warm, case, what):
    twins = Twins(*case, warm=warm)
    kinds, method = FORWARDS[what]
    names = names_of(twins.stock, kinds)
    for name in dict.fromkeys((names[0], names[len(names) // 2], names[-1])):
        answers, counted = [], []
        for model in twins.both:
            module, counts = model.get_submodule(name), Counter()
            function = bent(counts, getattr(type(module), method), by=3)
            # A bound method, which a copy of the network binds to the copy.
            module.__dict__[method] = types.MethodType(function, module)
            answers.append(twins.answer(model))
            counted.append(dict(counts))
        twins.compare(*answers, f"{name}, replaced")
        assert counted[0] == counted[1] != {}
        for model in twins.both:
            del model.get_submodule(name).__dict__[method]
        twins.check(f"{name}, restored")


# Modes


LAYERS = ("conv", "batch_norm")


class FunctionsSeen(TorchFunctionMode):
    def __init__(self, bend=False):
        super().__init__()
        self.counts, self.bend = Counter(), bend

    def __torch_function__(self, function, types, args=(), kwargs=None):
        y = function(*args, **(kwargs or {}))
        name = resolve_name(function) or getattr(function, "__name__", "")
        if name.startswith("torch.") and any(layer in name for layer in LAYERS):
            self.counts[name] += 1
            y = y + 0.1 * y.tanh() if self.bend else y
        return y


class OpsSeen(TorchDispatchMode):
    def __init__(self, bend=False):
        super().__init__()
        self.counts, self.bend = Counter(), bend

    def __torch_dispatch__(self, op, types, args=(), kwargs=None):
        y = op(*args, **(kwargs or {}))
        name = op._schema.name
        if name.startswith("aten::") and any(layer in name for layer in LAYERS):
            self.counts[name] += 1
            if self.bend:
                first, *rest = y if isinstance(y, tuple) else (y,)
                first = first + 0.1 * first.tanh()
                y = (first, *rest) if isinstance(y, tuple) else first
        return y


MODES = {"functions": FunctionsSeen, "ops": OpsSeen}


@each_case
@pytest.mark.parametrize("kind", MODES.values(), ids=MODES.keys())
@pytest.mark.parametrize("bend", [False, True], ids=["watches", "changes"])
def test_modes(kind, bend, case):
    twins, answers, counted = Twins(*case), [], []
    for model in twins.both:
        with kind(bend) as mode:
            answers.append(twins.answer(model))
        counted.append(mode.counts)
    layers = len(names_of(twins.stock, (nn.Conv2d, nn.BatchNorm2d)))
    assert sum(counted[1].values()) >= layers
    assert counted[0] == counted[1]
    twins.compare(*answers, "under the mode", changed=bend)
    twins.check("without the mode", changed=bend)


@each_case
def test_flops_counted(case):
    twins, totals = Twins(*case), []
    for model in twins.both:
        with FlopCounterMode(display=False) as counter:
            twins.answer(model)
        totals.append(counter.get_total_flops())
    assert totals[0] == totals[1] > 0


# Training


TRAINED_UNDER = ("nothing", "norm_forward", "conv_forward", "batch_norm", "conv2d", *MODES)


@pytest.mark.few(12)
@each_case
@pytest.mark.parametrize("what", TRAINED_UNDER)
def test_training(what, case, monkeypatch):
    """Loss and gradients, in float64: deep networks' float32 gradients are mostly rounding."""
    twins = Twins(*case, warm=False)
    x = torch.randn(3, 3, 64, 64, generator=torch.Generator().manual_seed(1)).double()
    results, counted = [], []
    for model in twins.both:
        counts = Counter()
        with monkeypatch.context() as patch, contextlib.ExitStack() as stack:
            if what in MODES:
                # The backward's convolutions are not all ours to repeat: the forward's are.
                counts = stack.enter_context(MODES[what](bend=what == "functions")).counts
            elif what != "nothing":
                replace(patch, what, twins.stock, counts)
            torch.manual_seed(4)
            loss = model.double().train()(x).square().mean()
            counted.append(dict(counts))
        gradients = torch.autograd.grad(loss, list(model.parameters()))
        results.append([loss.detach(), *gradients, *model.buffers()])
    assert what == "nothing" or sum(counted[1].values()) > 0
    names = ["loss", *(name for name, _ in twins.stock.named_parameters())]
    names += [name for name, _ in twins.stock.named_buffers()]
    for name, actual, expected in zip(names, *results, strict=True):
        error = largest(actual.double() - expected.double())
        # A convolution before a norm has a bias or a scale without gradient, but for rounding.
        allowed = 1e-8 * max(largest(expected), 1e-3)
        assert error <= allowed, f"{name}: {error:.1e} of {largest(expected):.1e}"
    assert counted[0] == counted[1]
