"""A live network beside its stock twin, both changed in the same way, and their answers compared.

A change that does not show in stock's answer proves nothing, so it must show there.
"""

import copy
import functools
from collections.abc import Callable, Iterator
from typing import NamedTuple

import pytest
import torch
from torch import Tensor, nn

from tests.support.model_checks import calibrated, counterpart

torchvision = pytest.importorskip("torchvision")
timm = pytest.importorskip("timm")

# Of the largest logit: what rounding may cost, and what a change must make of stock's answer.
ROUNDING, VISIBLE = 1e-4, 1e-3
# What a scenario yields where the answer is to be the one before.
AGAIN = "the same again"


class Family(NamedTuple):
    """Stock's builders of a network, and the modules that people shard one by one."""

    stock: Callable
    patched: Callable
    sharded: str
    options: dict = {}


FAMILIES = {
    "googlenet": Family(
        torchvision.models.googlenet,
        torchvision.models.googlenet,
        r"inception\w+|conv\d",
        {"aux_logits": False, "init_weights": False},
    ),
    "resnet18": Family(torchvision.models.resnet18, torchvision.models.resnet18, r"layer\d\.\d"),
    "densenet121": Family(
        torchvision.models.densenet121,
        torchvision.models.densenet121,
        r"features\.(denseblock|transition)\d",
    ),
    "seresnet18": Family(timm.models.seresnet18, timm.models.seresnet18, r"layer\d\.\d"),
    "efficientnet_b0": Family(
        torchvision.models.efficientnet_b0,
        timm.models.efficientnet_b0,
        r"features\.\d\.\d|blocks\.\d\.\d",
    ),
}
CASES = {f"{name}-{how}": (name, how) for name in FAMILIES for how in ("drop_in", "patched")}
each_case = pytest.mark.parametrize("case", CASES.values(), ids=CASES.keys())


@functools.cache
def originals(name, how):
    """(ours, stock) of one state, never called in eval; copied for each test."""
    family = FAMILIES[name]
    options = {"num_classes": 50, **family.options}
    stock = calibrated(family.patched if how == "patched" else family.stock, **options)
    for norm in stock.modules():
        if isinstance(norm, nn.BatchNorm2d):
            # A channel that hardly varied would amplify any change, and rounding with it.
            norm.running_var.clamp_(min=norm.running_var.mean().item())
    ours = counterpart(stock, name, how, **options)
    return ours, stock


def largest(tensor):
    return tensor.detach().abs().max().item()


class Twins:
    """A network of ours and stock's with the same weights; ``check`` compares their answers."""

    def __init__(self, name, how, context=torch.no_grad, warm=True):
        self.name = name
        self.ours, self.stock = map(copy.deepcopy, originals(name, how))
        self.both = self.ours, self.stock
        self.x = torch.randn(1, 3, 64, 64, generator=torch.Generator().manual_seed(1))
        self.context, self.channels = context, {}
        self.last = self.answer(self.stock)
        for _ in range(3 if warm else 0):
            actual = self.answer(self.ours)
        if warm:
            self.compare(actual, self.last, "before the change", changed=False)

    def answer(self, model):
        with self.context():
            return model(self.x)

    def check(self, label, changed=True):
        """Ours answers as stock does; ``changed``, and stock not as it last did."""
        self.compare(*map(self.answer, self.both), label, changed)

    def compare(self, actual, expected, label, changed=True):
        scale = largest(expected)
        shown = largest(expected - self.last) / scale
        assert not changed or shown > VISIBLE, f"{label}: stock's answer moved by {shown:.1e} only"
        error, stale = largest(actual - expected) / scale, largest(actual - self.last) / scale
        kind = "the old answer" if stale <= ROUNDING else "neither the old answer nor the new one"
        if error > ROUNDING:
            # A change may make stock's own answer amplify rounding; nothing else may explain ours.
            exact = self.exact()
            stocks, ours = largest(expected - exact) / scale, largest(actual - exact) / scale
            assert ours <= 4 * stocks and stale > 10 * ours, f"{label}: off by {error:.1e}, {kind}"
        self.last = expected

    def exact(self):
        """Stock's answer in float64."""
        stock = copy.deepcopy(self.stock).double()
        for module in stock.modules():
            for name, value in module.__dict__.items():
                if isinstance(value, Tensor):
                    module.__dict__[name] = value.double()
        with self.context():
            return stock(self.x.double())

    def follow(self, scenario: Callable[[nn.Module, "Twins"], Iterator[str]]):
        """Run ``scenario`` on both in turn, and compare their answers wherever it yields.

        Both draw the same random numbers on their way to each yield.
        """
        runs, steps = [scenario(model, self) for model in self.both], 0
        while True:
            labels = []
            for run in runs:
                torch.manual_seed(5 + steps)
                labels.append(next(run, None))
            if labels == [None, None]:
                break
            assert labels[0] == labels[1]
            self.check(f"step {steps}, {labels[0]}", changed=labels[0] != AGAIN)
            steps += 1
        assert steps, "the scenario changed nothing"

    @torch.random.fork_rng()
    def shown_channel(self, path, write):
        """The first channel in which ``write`` shows: in some, ReLU gives zeros before and after.

        Of the tensor at that path, as it is when first asked for.
        """
        if path not in self.channels:
            tensor = self.stock
            for name in path.split("."):
                tensor = getattr(tensor, name)
            before = tensor.detach().clone()
            for channel in range(len(tensor)):
                write(tensor, channel)
                moved = largest(self.answer(self.stock) - self.last) / largest(self.last)
                tensor.data.copy_(before)
                if moved > 2 * VISIBLE:
                    self.channels[path] = channel
                    break
            else:
                raise AssertionError(f"the change of {path} shows in no channel")
        return self.channels[path]


def names_of(model, kinds):
    return [name for name, module in model.named_modules() if isinstance(module, kinds)]


def convs_of(model):
    """The name of one convolution of each kind: of kernel, stride, depthwise or not, with bias."""
    kinds = {}
    for name, conv in model.named_modules():
        if isinstance(conv, nn.Conv2d):
            kind = conv.kernel_size, conv.stride, conv.groups == 1, conv.bias is None
            kinds.setdefault(kind, []).append(name)
    return [names[len(names) // 2] for names in kinds.values()]


def norms_of(model):
    """The names of the first norm, one in the middle and the last."""
    names = names_of(model, nn.BatchNorm2d)
    return names[0], names[len(names) // 2], names[-1]
