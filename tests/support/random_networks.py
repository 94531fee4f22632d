"""Small networks made at random: modules, writes in place, views, reductions, parts and sizes.

``python -m tests.support.random_networks FIRST LAST`` freezes those of many seeds.
"""

import random
import sys

import torch
import torch.nn.functional as F
from torch import nn

import cvkernels

MODULES = (
    lambda: nn.Conv2d(8, 8, 3, padding=1), lambda: nn.Conv2d(8, 8, 1), lambda: nn.BatchNorm2d(8),
    lambda: nn.Conv2d(8, 8, 3, padding=1, groups=8), lambda: nn.ReLU(True), nn.ReLU, nn.Sigmoid,
    lambda: nn.SiLU(True), lambda: nn.Hardswish(True), nn.Identity, nn.Dropout,
    lambda: nn.MaxPool2d(3, 1, 1), lambda: nn.AvgPool2d(3, 1, 1),
)  # fmt: skip


def _write_a_chunk(f, which):
    parts = f.chunk(2, 1) if which % 2 else f.split([3, 5], 1)
    parts[which // 2].mul_(3)


def _view_and_back(f, which):
    b, c, h, w = f.shape
    if which == 0:
        return f.reshape(b, c, h * w).reshape(b, c, h, w)
    if which == 1:
        return f.flatten(2).relu_().view(b, c, h, -1)
    if which == 2:
        return f.transpose(2, 3).mul_(2).transpose(2, 3)
    return f.permute(0, 2, 3, 1).mul(2).permute(0, 3, 1, 2)


def _iadd(f, g, net):
    f += g
    return f


def _isub(f, g, net):
    f -= g * 0.3
    return f


def _imul(f, g, net):
    f *= net.scale
    return f


# What makes a map of two, f and g; of one as a case of that.
MAPS = (
    _iadd, _isub, _imul,
    lambda f, g, net: f.add_(g, alpha=0.5),
    lambda f, g, net: torch.cat(f.chunk(2, 1)[::-1], 1),
    lambda f, g, net: torch.cat((f.chunk(2, 1)[0], g[:, 4:]), 1),
    lambda f, g, net: torch.stack((f, g), 1).sum(1),
    lambda f, g, net: torch.stack(f.chunk(2, 1), 2).flatten(1, 2),
    lambda f, g, net: torch.stack((f, g)).mean(0),
    lambda f, g, net: torch.cat((f, g), 1)[:, 4:12],
    lambda f, g, net: f + g,
    lambda f, g, net: f * g,
    lambda f, g, net: f - g * net.scale,
    lambda f, g, net: 2 - f,
    lambda f, g, net: f / f.size(1),
    lambda f, g, net: f * torch.sigmoid(f.mean((2, 3), keepdim=True)),
    lambda f, g, net: f * f.mean(1, keepdim=True),
    lambda f, g, net: f * F.adaptive_avg_pool2d(g, 1).sigmoid(),
    lambda f, g, net: f * f.mean(3, keepdim=True).mean(2, keepdim=True),
    lambda f, g, net: f,
    lambda f, g, net: f.view_as(g),
    lambda f, g, net: f.detach(),
    lambda f, g, net: f[:],
    lambda f, g, net: F.max_pool2d(f, 3, 1, 1),
    lambda f, g, net: F.avg_pool2d(f, 3, 1, 1),
    lambda f, g, net: F.interpolate(F.avg_pool2d(f, 2), size=g.shape[2:]),
    lambda f, g, net: F.pad(F.max_pool2d(f, 3, 1), (1, 1, 1, 1)),
    lambda f, g, net: F.dropout(f, 0.3, net.training),
    *(lambda f, g, net, which=which: _view_and_back(f, which) for which in range(4)),
)  # fmt: skip
# What writes f and makes no map.
WRITES = (
    lambda f, g: f.mul_(0.7),
    lambda f, g: f.div_(2),
    lambda f, g: f.copy_(g * 0.5),
    lambda f, g: F.relu(f, inplace=True),
    lambda f, g: f.clamp_(-1, 1),
    lambda f, g: f.sigmoid_(),
    lambda f, g: f[:, 3].mul_(2),
    lambda f, g: f[:, 2:5].relu_(),
    lambda f, g: f[0].add_(1),
    lambda f, g: f[..., 0].zero_(),
    *(lambda f, g, which=which: _write_a_chunk(f, which) for which in range(4)),
)
RESULTS = (
    lambda f: f.mean(1),
    lambda f: f.mean(3).mean(2),
    lambda f: f.mean([2, 3]),
    lambda f: f.flatten(2).mean(-1),
    lambda f: F.avg_pool2d(f, f.size()[2:]),
    lambda f: F.max_pool2d(f, (f.size(2), f.size(3))).flatten(1),
    lambda f: f.amax((2, 3)),
    lambda f: f.clamp(min=1e-6).pow(3).mean((-2, -1)).pow(1 / 3),
)


class RandomNetwork(nn.Module):
    """A network of images [N, 8, H, W], the same for the same seed."""

    def __init__(self, seed: int) -> None:
        super().__init__()
        choose = random.Random(seed)
        self.register_buffer("scale", torch.rand(1, 8, 1, 1) + 0.5)
        self.layers, self.program = nn.ModuleList(), []
        for _ in range(choose.randint(3, 9)):
            kind = choose.choices(("layer", "map", "write", "result"), (8, 12, 4, 2))[0]
            function = {"map": MAPS, "write": WRITES, "result": RESULTS}.get(kind, MODULES)
            picked = choose.choice(function)
            if kind == "layer":
                picked = picked()
                if isinstance(picked, nn.BatchNorm2d):
                    nn.init.uniform_(picked.running_mean)
                    nn.init.uniform_(picked.weight)
                self.layers.append(picked)
            self.program.append((kind, picked, choose.random(), choose.random()))
        self.returned = [choose.random() for _ in range(choose.randint(1, 3))]

    def forward(self, x):
        maps, results = [x * 1.0], []
        for kind, picked, first, second in self.program:
            f, g = (maps[int(place * len(maps))] for place in (first, second))
            if kind == "layer":
                maps.append(picked(f))
            elif kind == "map":
                maps.append(picked(f, g, self))
            elif kind == "write":
                picked(f, g)
            else:
                results.append(picked(f))
        return (*(maps[int(place * len(maps))] for place in self.returned), *results)


@torch.no_grad()
def check_frozen(seed: int) -> None:
    """Frozen, the network errs as stock does, in each call and for other sizes of images."""
    torch.manual_seed(seed)
    network = RandomNetwork(seed).eval()
    wide = RandomNetwork(seed).double().eval()
    wide.load_state_dict(network.state_dict())
    frozen = None
    for shape in ((2, 8, 6, 6), (2, 8, 6, 6), (3, 8, 7, 5)):
        x = torch.randn(shape)
        frozen = cvkernels.freeze(network, x) if frozen is None else frozen
        for ours, stock, truth in zip(frozen(x), network(x.clone()), wide(x.double()), strict=True):
            assert ours.shape == stock.shape and ours.dtype == stock.dtype
            errors = [(y.double() - truth).abs().max() for y in (ours, stock)]
            slack = 1e-5 * truth.abs().max() + 1e-6
            assert errors[0] <= 4 * errors[1] + slack or not truth.isfinite().all()


if __name__ == "__main__":
    for number in range(*map(int, sys.argv[1:3])):
        try:
            check_frozen(number)
        except Exception as error:  # noqa: BLE001 - the others go on
            print(f"seed {number}: {type(error).__name__}: {error}")
