"""freeze merges convolutions of one geometry that read one value; what they compute stays."""

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor, nn

import cvkernels
from cvkernels.nn import Inception
from tests.support.pairs import calibrate, image


def frozen_and_merged(model, x):
    """The frozen model, within the numerics rule, and how many siblings its plan has."""
    frozen = cvkernels.freeze(model, x)
    verification = cvkernels.verify(frozen)
    assert verification.ok, verification
    return frozen, sum(node.op.name == "part" for node in frozen.graph.nodes)


def convolutions(frozen):
    return sum(row.op == "conv" for row in frozen.report().rows)


@pytest.mark.parametrize("batch", [1, 2])
def test_an_inception_module_runs_its_three_1x1_as_one(batch):
    torch.manual_seed(0)
    model = nn.Sequential(Inception(3, 16, 8, 16, 4, 12, 4), Inception(48, 8, 16, 8, 8, 8, 8))
    calibrate(model, image(4, 8))
    frozen, merged = frozen_and_merged(model.eval(), torch.randn(batch, 3, 9, 7))
    assert merged == 6
    assert convolutions(frozen) == 2 * 4
    assert not {"cat", "copy", "part"} & {row.op for row in frozen.report().rows}


class Siblings(nn.Module):
    """Three convolutions on one input, and what ``combine`` makes of their values."""

    def __init__(self, combine, kernel_size=1, biases=(True, False, True)) -> None:
        super().__init__()
        self.first, self.second, self.third = (
            nn.Conv2d(6, channels, kernel_size, padding=kernel_size // 2, bias=bias)
            for channels, bias in zip((5, 16, 7), biases, strict=True)
        )
        self.after = nn.Conv2d(5, 8, 3, padding=1)
        self.last = nn.Conv2d(16, 8, 1, 2)
        self.combine = combine

    def forward(self, x: Tensor):
        return self.combine(self, self.first(x), self.second(x), self.third(x))


def twice(model, a, b, c):
    inner = torch.cat([c, model.after(a)], 1)
    return torch.cat([inner, c], 1), torch.cat([c, inner], 1), model.last(b)


def convolved(model, a, b, c):
    return model.after(a), model.last(b), c


def begins(model, a, b, c):
    return torch.cat([c, model.after(a)], 1).relu(), model.last(b)


# What is made of the three values, and how many of the convolutions are then merged.
COMBINATIONS = {
    "two are convolved": (convolved, 2),
    "one begins a concatenation": (begins, 3),
    "one is inside a concatenation": (
        lambda model, a, b, c: (torch.cat([model.after(a), c], 1), model.last(b)), 2
    ),
    "one is concatenated twice": (twice, 2),
    "one is returned": (lambda model, a, b, c: (torch.cat([a, c], 1), model.after(a), b), 0),
    "none is read by convolutions": (
        lambda model, a, b, c: (a.relu(), b.mean((2, 3)), F.max_pool2d(c, 2)), 0
    ),
}  # fmt: skip


@pytest.mark.parametrize("combine, merged", COMBINATIONS.values(), ids=COMBINATIONS.keys())
@pytest.mark.parametrize("kernel_size", [1, 3])
def test_siblings_are_merged_where_their_readers_take_slices(combine, merged, kernel_size):
    torch.manual_seed(0)
    model = Siblings(combine, kernel_size).eval()
    frozen, count = frozen_and_merged(model, torch.randn(2, 6, 5, 4))
    assert count == merged
    assert "copy" not in {row.op for row in frozen.report().rows} or combine is twice


def test_siblings_of_other_geometry_stay_apart_and_none_has_a_bias():
    torch.manual_seed(0)
    model = Siblings(convolved, biases=(False, False, False)).eval()
    assert frozen_and_merged(model, torch.randn(1, 6, 4, 4))[1] == 2
    model.second.stride = (2, 2)
    assert frozen_and_merged(model, torch.randn(1, 6, 4, 4))[1] == 0


def test_a_backend_without_slices_gives_views_of_them():
    if reason := cvkernels.ops.conv_bn_act.onednn.lacks(torch.float32):
        pytest.skip(reason)
    torch.manual_seed(0)
    x = torch.randn(2, 6, 5, 4)
    for combine in (convolved, begins):
        model = Siblings(combine).eval()
        choices = cvkernels.tune(model, x)
        table = dict.fromkeys(choices, "onednn")
        frozen = cvkernels.freeze(model, x, table=table)
        assert "onednn" in {row.backend for row in frozen.report().rows}
        assert cvkernels.verify(frozen).ok


def test_merged_siblings_are_saved(tmp_path):
    torch.manual_seed(0)
    x = torch.randn(2, 6, 5, 4)
    frozen = cvkernels.freeze(Siblings(begins).eval(), x)
    frozen.save(tmp_path / "frozen.pt")
    loaded = cvkernels.load_frozen(tmp_path / "frozen.pt")
    assert all(map(torch.equal, frozen(x), loaded(x)))
