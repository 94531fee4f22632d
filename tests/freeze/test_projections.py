"""Two 1x1 convolutions that are added become one step of a GPU's plan; here the CPU runs it."""

import pytest
import torch
from torch import nn

import cvkernels
from cvkernels.freeze import frozen as freezing
from cvkernels.freeze.ops import Conv
from tests.freeze.test_gpu_plans import images, network
from tests.support.numerics import assert_close_as_eager


@pytest.fixture
def for_gpu(monkeypatch):
    """The graphs are those of a GPU."""
    monkeypatch.setattr(freezing, "is_gpu", lambda device: True)


class Block(nn.Module):
    """The end of a stage's first block, with what else there may be."""

    def __init__(self, kind, stride, flipped):
        super().__init__()
        self.reduce = nn.Conv2d(12, 8, 1, stride)
        self.expand = nn.Sequential(nn.Conv2d(8, 16, 1, bias=False), nn.BatchNorm2d(16))
        kernel, groups = (3 if kind == "3x3" else 1), (2 if kind == "groups" else 1)
        conv = nn.Conv2d(12, 16, kernel, stride, kernel // 2, groups=groups, bias=kind == "bias")
        norm = nn.BatchNorm2d(16)
        norm.running_mean.normal_(), norm.running_var.uniform_(0.5, 2)
        last = [nn.ReLU()] if kind == "relu" else []
        self.downsample = nn.Sequential(conv, norm, *last)
        self.kind, self.flipped = kind, flipped

    def forward(self, x):
        if self.flipped:
            shortcut = self.downsample(x)
            y = self.expand(self.reduce(x).relu())
        else:
            y = self.expand(self.reduce(x).relu())
            shortcut = self.downsample(x)
        z = (y + shortcut).relu()
        return z * shortcut if self.kind == "read twice" else z


def merged(frozen):
    return [
        node
        for node in frozen.graph.nodes
        if isinstance(node.op, Conv) and node.op.projection is not None
    ]


def check(model, x):
    frozen = cvkernels.freeze(model.eval(), x)
    with torch.no_grad():
        eager, exact = model(x), model.double()(x.double())
    assert_close_as_eager(frozen(x), eager, exact)
    return frozen


@pytest.mark.parametrize("flipped", [False, True], ids=["downsample last", "downsample first"])
@pytest.mark.parametrize("stride", [1, 2])
@pytest.mark.parametrize("kind", ["plain", "bias"])
def test_shortcuts_of_stages_are_merged(kind, stride, flipped, for_gpu):
    frozen = check(Block(kind, stride, flipped), torch.randn(2, 12, 9, 7))
    (node,) = merged(frozen)
    assert {node.op.weight.shape[1], node.op.projection.shape[1]} == {8, 12}
    assert sum(isinstance(n.op, Conv) for n in frozen.graph.nodes) == 2


@pytest.mark.parametrize("kind", ["3x3", "groups", "relu", "read twice"])
def test_other_shortcuts_stay(kind, for_gpu):
    frozen = check(Block(kind, 2, True), torch.randn(2, 12, 9, 7))
    assert not [n for n in merged(frozen) if n.op.projection.shape[1] == 12]
    assert sum(isinstance(n.op, Conv) for n in frozen.graph.nodes) >= 2


def test_a_cpu_keeps_both():
    assert not merged(check(Block("plain", 2, False), torch.randn(2, 12, 9, 7)))


def test_files_keep_the_projection(tmp_path, for_gpu):
    model, x = Block("plain", 2, False).eval(), torch.randn(2, 12, 9, 7)
    frozen = cvkernels.freeze(model, x)
    frozen.save(tmp_path / "block.pt")
    loaded = cvkernels.load_frozen(tmp_path / "block.pt")
    assert merged(loaded) and torch.equal(loaded(x), frozen(x))


@pytest.mark.skipif(bool(cvkernels.backend.lacks_triton("cuda")), reason="Triton is not installed")
def test_four_stages_of_resnet50_are_merged():
    plan = freezing.planned(network("resnet50"), images())
    found = [p for _, p in plan.convolutions() if p.projection is not None]
    sizes = {(p.C, p.projection.C, p.K, p.stride, p.projection.stride) for p in found}
    assert len(found) == len(sizes) == 4
    assert (256, 512, 1024, (1, 1), (2, 2)) in sizes or (512, 256, 1024, (2, 2), (1, 1)) in sizes
    rows = {step.layer: plan.traffic[step] for step, _ in plan.steps}
    first = next(rows[layer] for layer in rows if layer in ("layer1.0.downsample.0",))
    assert first.bytes_read < 110e6
