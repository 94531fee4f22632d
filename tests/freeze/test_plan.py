"""The planner: no two values that live at the same time share memory; none has more than enough."""

import itertools
import random

import pytest
import torch
from torch import nn

import cvkernels
from cvkernels.freeze.memory import ALIGNMENT, Interval, pack

pytestmark = pytest.mark.fast


def aligned(nbytes):
    return -(-nbytes // ALIGNMENT) * ALIGNMENT


def assert_apart(intervals):
    """No two that live at the same time share a byte."""
    for a, b in itertools.combinations(intervals, 2):
        together = a.first <= b.last and b.first <= a.last
        apart = a.offset + a.nbytes <= b.offset or b.offset + b.nbytes <= a.offset
        assert apart or not together


@pytest.mark.parametrize("seed", range(20))
def test_packed_intervals_do_not_overlap(seed):
    draw = random.Random(seed)
    intervals = []
    for _ in range(draw.randrange(1, 60)):
        first = draw.randrange(40)
        nbytes = draw.choice([0, 1, 63, 64, 100, 4096, draw.randrange(10_000)])
        intervals.append(Interval(nbytes, first, first + draw.randrange(8)))
    total = pack(intervals)
    assert all(i.offset % ALIGNMENT == 0 and i.offset + i.nbytes <= total for i in intervals)
    assert_apart(intervals)
    busiest = max(
        sum(aligned(i.nbytes) for i in intervals if i.first <= step <= i.last) for step in range(48)
    )
    assert busiest <= total <= sum(aligned(i.nbytes) for i in intervals)


def test_values_that_never_meet_share_their_memory():
    chain = [Interval(1000, step, step + 1) for step in range(10)]
    assert pack(chain) == 2 * aligned(1000)


class RandomNetwork(nn.Module):
    """Ops on values drawn among those that there are; many of them are concatenated."""

    def __init__(self, seed):
        super().__init__()
        draw = random.Random(seed)
        self.plan = []
        self.layers = nn.ModuleList()
        channels = [8]
        for _ in range(draw.randrange(6, 16)):
            kind = draw.choice(["conv", "conv", "pool", "norm", "relu", "cat", "cat", "add", "se"])
            a = draw.randrange(len(channels))
            same = [i for i, count in enumerate(channels) if count == channels[a]]
            others = [draw.randrange(len(channels)) for _ in range(draw.randrange(1, 4))]
            module, count = nn.Identity(), channels[a]
            if kind == "conv":
                count = draw.choice([8, 16])
                kernel = draw.choice([1, 3])
                module = nn.Conv2d(channels[a], count, kernel, padding=kernel // 2)
            elif kind == "pool":
                module = draw.choice([nn.MaxPool2d(3, 1, 1), nn.AvgPool2d(3, 1, 1)])
            elif kind == "norm":
                module = nn.BatchNorm2d(channels[a])
            elif kind == "relu":
                module = nn.ReLU()
            elif kind == "cat":
                count = channels[a] + sum(channels[i] for i in others)
            elif kind == "se":
                gate = (nn.Conv2d(count, 4, 1), nn.ReLU(), nn.Conv2d(4, count, 1), nn.Sigmoid())
                module = nn.Sequential(nn.AdaptiveAvgPool2d(1), *gate)
            self.layers.append(module)
            self.plan.append((kind, a, draw.choice(same), others))
            channels.append(count)

    def forward(self, x):
        values = [x]
        for (kind, a, same, others), module in zip(self.plan, self.layers, strict=True):
            if kind == "cat":
                y = torch.cat([values[a], *(values[i] for i in others)], 1)
            elif kind == "add":
                y = values[a] + values[same]
            elif kind == "se":
                y = values[a] * module(values[a])
            else:
                y = module(values[a])
            values.append(y)
        return values[-1], values[len(values) // 2]


@pytest.mark.parametrize("seed", range(24))
def test_random_networks(seed):
    torch.manual_seed(seed)
    model = RandomNetwork(seed).eval()
    for norm in model.modules():
        if isinstance(norm, nn.BatchNorm2d):
            norm.running_mean.normal_()
            norm.running_var.uniform_(0.5, 2)
    x = torch.randn(2, 8, 5, 6)
    frozen = cvkernels.freeze(model, x)
    verification = cvkernels.verify(frozen)
    assert verification.ok, verification
    plan = frozen._plans[x.shape]
    assert_apart(plan.memory.intervals.values())
    (env,) = plan.drop_arenas()
    starts = {value.data_ptr() % ALIGNMENT for value in env if value is not None}
    assert starts <= {0} or any(plan.memory.slices(step) for step in plan.memory.index)


def test_dense_blocks_share_one_buffer_and_inception_blocks_too():
    torch.manual_seed(0)
    model = cvkernels.models.DenseNet(8, (3, 3, 2, 2), 16, num_classes=10).eval()
    report = cvkernels.freeze(model, torch.randn(1, 3, 64, 64)).report()
    assert not {"cat", "copy"} & {row.op for row in report.rows}
    assert report.arena_bytes < report.live_bytes / 2
    model = cvkernels.models.googlenet(num_classes=10, init_weights=False).eval()
    report = cvkernels.freeze(model, torch.randn(1, 3, 64, 64)).report()
    assert not {"cat", "copy", "concat"} & {row.op for row in report.rows}


def test_a_stem_and_its_pool_run_image_by_image():
    # 16 channels and up to 1024 pixels: BLAS or the native convolution, which write into the arena
    model = nn.Sequential(nn.Conv2d(16, 32, 1), nn.ReLU(), nn.MaxPool2d(3, 2, 1)).eval()
    x = torch.randn(3, 16, 16, 16)
    frozen = cvkernels.freeze(model, x)
    report = frozen.report()
    assert [row.op for row in report.rows if row.kernels] == ["conv_pool", "clone"]
    assert report.arena_bytes == 4 * 32 * (16 * 16 + 3 * 8 * 8)
    assert cvkernels.verify(frozen).ok and cvkernels.verify(frozen, x[:1]).ok
