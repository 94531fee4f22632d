"""A convolution and what is fused with it in training: gradients by the rule of the tolerance."""

import copy

import pytest
import torch
from torch import nn

from cvkernels import backend
from cvkernels.nn import FusedSequential, SqueezeExcitation
from cvkernels.nn.fused.module import FusedModule
from cvkernels.nn.training import conv_bn_act as convolution
from tests.support.numerics import assert_close_as_eager, max_error
from tests.support.pairs import assert_equal, step
from tests.support.training_nets import image, training_pair


class Unit(FusedModule):
    """``act(se(bn(conv(x))) + shortcut)``, the parts that there are."""

    def __init__(self, act, adds, excites, conv):
        super().__init__()
        self.conv, self.bn, self.act = conv, nn.BatchNorm2d(24), act
        self.se = SqueezeExcitation(24, 6) if excites else None
        self.adds = adds

    def forward(self, x, shortcut):
        residual = shortcut if self.adds else None
        if self.se is None:
            return self.fused(x, self.conv, self.bn, self.act, residual=residual)
        y = self.fused(x, self.conv, self.bn)
        if not self.adds:
            return self.se(y)
        if self.se.why_not_added(y, self.act):
            return self.act(self.se(y) + shortcut)
        return self.se.added_step(y, shortcut, self.act, False, False).run(y, shortcut)


UNITS = {
    "none": (None, False, False),
    "relu": (nn.ReLU(), False, False),
    "silu": (nn.SiLU(), False, False),
    "none-added": (None, True, False),
    "relu-added": (nn.ReLU(), True, False),
    "se": (None, False, True),
    "se-relu-added": (nn.ReLU(), True, True),
}
# Without a bias: behind it a norm takes the mean, and its gradient is zero but for rounding.
CONVOLUTIONS = {
    "1x1": lambda: nn.Conv2d(24, 24, 1, bias=False),
    "3x3": lambda: nn.Conv2d(24, 24, 3, padding=1, bias=False),
    "depthwise": lambda: nn.Conv2d(24, 24, 5, padding=2, groups=24, bias=False),
    "grouped": lambda: nn.Conv2d(24, 24, 3, padding=1, groups=4, bias=False),
}


@pytest.mark.parametrize("conv", CONVOLUTIONS.values(), ids=CONVOLUTIONS.keys())
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16], ids=str)
@pytest.mark.parametrize("unit", UNITS.values(), ids=UNITS.keys())
def test_gradients_follow_the_numerics_rule(unit, dtype, conv, device, memory_format):
    ours = Unit(*unit, conv()).to(device, dtype)
    with torch.no_grad():
        ours.bn.weight.uniform_(0.2, 1.5)
        ours.bn.bias.normal_(0, 0.3)
    x, shortcut = torch.randn(2, 4, 24, 9, 7, device=device).to(dtype)
    x, shortcut = (t.contiguous(memory_format=memory_format) for t in (x, shortcut))
    cotangent = torch.randn(x.shape, device=device)
    if isinstance(ours.act, nn.ReLU):
        # None for what a rounding may keep from passing, or let pass.
        smooth = copy.deepcopy(ours).double()
        smooth.act = nn.Identity()
        with backend.use("reference"):
            cotangent *= smooth(x.double(), shortcut.double()).abs() > 0.1

    def gradients(unit, *inputs):
        unit.zero_grad()
        inputs = [t.detach().requires_grad_() for t in inputs]
        y = unit(*inputs)
        y.backward(cotangent.to(y.dtype))
        return [y.detach(), *(t.grad for t in (*inputs[: 1 + unit.adds], *unit.parameters()))]

    actual = gradients(ours, x, shortcut)
    with backend.use("reference"):
        exact = gradients(copy.deepcopy(ours).double(), x.double(), shortcut.double())
        # Ours are channels_last within; stock's error is the larger of its two layouts'.
        planar, pixels = (
            gradients(ours, *(t.contiguous(memory_format=layout) for t in (x, shortcut)))
            for layout in (torch.contiguous_format, torch.channels_last)
        )
    for a, *eager, truth in zip(actual, planar, pixels, exact, strict=True):
        assert_close_as_eager(a, max(eager, key=lambda e: max_error(e, truth)), truth)


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16], ids=str)
def test_convolutions_and_a_pool_follow_the_rule(dtype, memory_format, device):
    """Through more than two convolutions, what a ReLU passes depends on a rounding."""
    x = image("inception", dtype).to(device).contiguous(memory_format=memory_format)
    models = []
    for model, layers in zip(
        training_pair("inception", dtype), (FusedSequential, nn.Sequential), strict=True
    ):
        stem = layers(*model.stem, model.first.branch1)
        models.append(nn.Sequential(stem, nn.AdaptiveAvgPool2d(1), nn.Flatten()).to(device))
    exact = step(copy.deepcopy(models[1]).double(), x.double())
    for actual, eager, truth in zip(*(step(m, x) for m in models), exact, strict=True):
        if actual.is_floating_point():
            assert_close_as_eager(actual, eager, truth)
        else:
            assert torch.equal(actual, eager)


def test_autocast_follows_the_rule():
    ours, stock = training_pair("inception", torch.float32)
    x = image("inception", torch.float32)

    def run(model):
        def forward(x):
            with torch.autocast("cpu", torch.bfloat16):
                return model(x).float()

        return step(model, x, run=forward)

    exact = step(copy.deepcopy(stock).double(), x.double())
    for actual, eager, truth in zip(run(ours), run(stock), exact, strict=True):
        if actual.is_floating_point() and truth.abs().max() > 1e-12:
            assert_close_as_eager(actual, eager, truth, factor=3.0)


# What a block's third convolution of one pixel is, and how many then run: the stem's, and of each
# block the three siblings as one or by themselves, two of 3x3 and the projection.
SIBLINGS = {
    "as-made": (lambda block: None, 9),
    "frozen": (lambda block: block.requires_grad_(False), 9),
    "eval": (lambda block: block.bn.eval(), 10),
    "hook": (lambda block: block.register_forward_hook(lambda *_: None), 11),
    "bias": (
        lambda block: setattr(
            block.conv, "bias", nn.Parameter(torch.linspace(-1, 1, 4, dtype=torch.float64))
        ),
        11,
    ),
}


@pytest.mark.parametrize(("change", "convolutions"), SIBLINGS.values(), ids=SIBLINGS.keys())
def test_convolutions_on_one_map_run_as_one(change, convolutions, monkeypatch):
    """The three 1x1 of a block; in the test's block the third is a sequence's first."""
    counts, convolve = [], convolution.convolve
    monkeypatch.setattr(convolution, "convolve", lambda *args: counts.append(1) or convolve(*args))
    ours, stock = training_pair("inception")
    for model in (ours, stock):
        change(model.first.branch3[0])
    assert_equal(step(ours, image("inception")), step(stock, image("inception")))
    assert len(counts) == convolutions
