"""Squeeze-and-excitation behind a 1x1 convolution: its gates come from the convolution's input."""

import pytest
import torch
from torch import nn

import cvkernels
from cvkernels import extension
from cvkernels.freeze import frozen as freezing
from cvkernels.freeze.ops import Conv, SqueezeExcite
from tests.freeze.test_gpu_plans import images, network
from tests.support.numerics import assert_close_as_eager

pytestmark = pytest.mark.skipif(
    not extension.has("cpu"), reason="the compiled extension is missing"
)


class Gates(nn.Module):
    def __init__(self, act, bias):
        super().__init__()
        self.fc1, self.fc2 = nn.Conv2d(24, 6, 1, bias=bias), nn.Conv2d(6, 24, 1, bias=bias)
        self.act = act()

    def forward(self, x):
        return x * self.fc2(self.act(self.fc1(x.mean((2, 3), keepdim=True)))).sigmoid()


class Block(nn.Module):
    """A bottleneck's end, with what else there may be."""

    def __init__(self, kind="plain"):
        super().__init__()
        taps, groups = (3 if kind == "3x3" else 1), (2 if kind == "groups" else 1)
        stride = 2 if kind == "stride" else 1
        bias = kind != "without biases"
        self.reduce = nn.Conv2d(12, 8, 1)
        self.expand = nn.Conv2d(8, 24, taps, stride, taps // 2, groups=groups, bias=bias)
        self.norm, self.kind = nn.BatchNorm2d(24), kind
        self.se = Gates(nn.SiLU if kind == "silu" else nn.ReLU, bias)
        self.shortcut = nn.Conv2d(12, 24, 1, stride)
        nn.init.normal_(self.norm.running_mean), nn.init.uniform_(self.norm.running_var, 0.5, 2)

    def forward(self, x):
        early = self.shortcut(x) if self.kind != "shortcut last" else None
        y = self.norm(self.expand(self.reduce(x).relu()))
        if self.kind == "activated":
            y = y.relu()
        z = self.se(y)
        if self.kind == "read twice":
            return z + y
        if self.kind == "no shortcut":
            return z
        return (z + (self.shortcut(x) if early is None else early)).relu()


def check(model, x):
    frozen = cvkernels.freeze(model.eval(), x)
    with torch.no_grad():
        eager, exact = model(x), model.double()(x.double())
    for _ in range(2):  # recorded, and repeated
        assert_close_as_eager(frozen(x), eager, exact)
    return frozen


def gated(frozen):
    nodes = frozen.graph.nodes
    assert not [n for n in nodes if isinstance(n.op, SqueezeExcite)]
    return [n for n in nodes if isinstance(n.op, Conv) and "output_gate" in n.op.roles]


@pytest.mark.parametrize(
    "kind", ["plain", "without biases", "silu", "no shortcut", "shortcut last"]
)
@pytest.mark.parametrize("batch", [1, 3])
def test_gates_are_known_before_their_map(kind, batch):
    frozen = check(Block(kind), torch.randn(batch, 12, 9, 7))
    (conv,) = gated(frozen)
    assert conv.op.weight.shape[:2] == (24, 8)
    # a shortcut that is computed last adds the gated map itself
    assert conv.op.act == ("none" if kind in ("no shortcut", "shortcut last") else "relu")
    plan = frozen.plan_for(torch.randn(batch, 12, 9, 7))
    assert {"squeeze", "excite"} <= {step.op.name for step in plan.recorded}


@pytest.mark.parametrize("kind", ["3x3", "groups", "stride", "activated", "read twice"])
def test_other_maps_are_squeezed_themselves(kind):
    """The mean of these is not the convolution of a mean, or another step needs the map."""
    frozen = check(Block(kind), torch.randn(2, 12, 9, 7))
    assert [n for n in frozen.graph.nodes if isinstance(n.op, SqueezeExcite)]


def test_extreme_maps_keep_their_gates():
    """Gates near 0 and 1, and means that cancel."""
    model = Block().eval()
    with torch.no_grad():
        model.se.fc2.weight.mul_(30), model.expand.weight.mul_(20)
    check(model, 10 * torch.randn(2, 12, 9, 7))


def test_files_keep_the_gates(tmp_path):
    x = torch.randn(2, 12, 9, 7)
    frozen = cvkernels.freeze(Block().eval(), x)
    frozen.save(tmp_path / "block.pt")
    loaded = cvkernels.load_frozen(tmp_path / "block.pt")
    assert gated(loaded) and torch.equal(loaded(x), frozen(x))


def test_they_are_tuned_like_others():
    x = torch.randn(2, 12, 9, 7)
    choices = cvkernels.tune(Block().eval(), x)
    assert not [key for key in choices if "output gate" in key]  # one implementation has them


@pytest.mark.skipif(bool(cvkernels.backend.lacks_triton("cuda")), reason="Triton is not installed")
def test_all_blocks_of_seresnet50_for_a_gpu():
    plan = freezing.planned(network("seresnet50"), images())
    problems = [p for _, p in plan.convolutions() if p.has_output_gate]
    assert len(problems) == 16 and sum(p.has_residual for p in problems) == 12
    assert not [p for p in problems if p.projection is not None]
