"""Small networks in training beside their stock twins, by name, and images for them."""

import importlib

import pytest
import torch
from torch import nn

from cvkernels.models.densenet import DenseNet
from cvkernels.nn import FusedSequential
from cvkernels.nn.training import recompute
from tests.support import pairs
from tests.support.pairs import assert_equal, pair, spread_norms

pytest.importorskip("torchvision")
efficientnet = importlib.import_module("torchvision.models.efficientnet")
resnet = importlib.import_module("torchvision.models.resnet")
stock_densenet = importlib.import_module("torchvision.models.densenet")
# The name torchvision.models.googlenet is the builder's too.
stock_googlenet = importlib.import_module("torchvision.models.googlenet")
timm = pytest.importorskip("timm").models

DENSENET = dict(growth_rate=8, block_config=(3, 2, 2), num_init_features=16, num_classes=10)
# Channels of an inception block: in, and out of its convolutions.
FIRST = (16, 8, 8, 12, 4, 8, 4)
SECOND = (32, 8, 8, 8, 4, 8, 8)


class InceptionNet(nn.Module):
    """Stem, two blocks and the pools between them; the first block's output is used three times."""

    def __init__(self):
        super().__init__()
        self.stem = nn.Sequential(
            stock_googlenet.BasicConv2d(3, 16, kernel_size=3, stride=2, padding=1),
            nn.MaxPool2d(3, 2, ceil_mode=True),
        )
        self.first = stock_googlenet.Inception(*FIRST)
        self.pool = nn.Sequential(nn.MaxPool2d(2, 2, ceil_mode=True))
        self.second = stock_googlenet.Inception(*SECOND)
        self.fc = nn.Linear(32, 5)
        self.side = nn.Linear(32, 5)
        # Norms of all forms that BatchNorm2d has, and a convolution with a bias.
        self.first.branch2[0].bn = nn.BatchNorm2d(8, momentum=None)
        self.first.branch2[1].bn = nn.BatchNorm2d(12, affine=False)
        self.second.branch1.bn = nn.BatchNorm2d(8, track_running_stats=False)
        self.second.branch3[1].conv.bias = nn.Parameter(torch.randn(8))

    def forward(self, x):
        first = self.first(self.stem(x))
        second = self.second(self.pool(first))
        return torch.cat([self.fc(second.mean((2, 3))), self.side(first.mean((2, 3)))], 1)


def mbconvs(kind=efficientnet.MBConvConfig, drop=0.0):
    stages = [kind(4, 3, 2, 16, 16, 2), kind(4, 3, 1, 16, 24, 3)]
    if kind is efficientnet.MBConvConfig:
        stages.insert(0, kind(1, 3, 1, 16, 16, 1))
    return efficientnet.EfficientNet(
        stages, 0.0, stochastic_depth_prob=drop, num_classes=5, last_channel=32
    )


def timm_mbconvs():
    net = timm.efficientnet_b0(num_classes=5)
    net.blocks = nn.Sequential(*list(net.blocks)[:3])
    net.conv_head, net.bn2.num_features = nn.Conv2d(40, 32, 1, bias=False), 32
    for name in ("weight", "bias"):
        setattr(net.bn2, name, nn.Parameter(torch.ones(32)))
    net.bn2.running_mean, net.bn2.running_var = torch.zeros(32), torch.ones(32)
    net.classifier = nn.Linear(32, 5)
    return net


def se_resnet(block, layers):
    return timm.resnet.ResNet(
        block, layers, num_classes=5, block_args={"attn_layer": "se"}, zero_init_last=False,
        channels=(16, 16, 32, 32), stem_width=16,
    )  # fmt: skip


def legacy_senet():
    return timm.senet.SENet(
        timm.senet.SEResNetBottleneck, [2, 1, 1, 1], 1, 16, drop_rate=0.0, num_classes=5
    )


# Stock networks of residual blocks, of which ours are patched copies.
RESIDUAL = {
    "basic": lambda: resnet.ResNet(resnet.BasicBlock, [3, 2, 1, 1], num_classes=5),
    "bottleneck": lambda: resnet.ResNet(resnet.Bottleneck, [3, 2, 1, 1], num_classes=5),
    "grouped": lambda: resnet.ResNet(
        resnet.Bottleneck, [2, 1, 1, 1], num_classes=5, groups=4, width_per_group=16
    ),
    "se-basic": lambda: se_resnet(timm.resnet.BasicBlock, (2, 2, 1, 1)),
    "se-bottleneck": lambda: se_resnet(timm.resnet.Bottleneck, (3, 2, 1, 1)),
    "timm-silu": lambda: timm.resnet.ResNet(
        timm.resnet.Bottleneck, (2, 1, 1, 1), num_classes=5, act_layer=nn.SiLU
    ),
    "legacy": legacy_senet,
    "mbconv": mbconvs,
    "mbconv-dropping": lambda: mbconvs(drop=0.3),
    "fused-mbconv": lambda: mbconvs(efficientnet.FusedMBConvConfig),
    "timm-mbconv": timm_mbconvs,
}
# Those of concatenating blocks, and what makes ours; without it, ours are patched copies too.
CONCATENATING = {
    "dense": (lambda: stock_densenet.DenseNet(**DENSENET), lambda: DenseNet(**DENSENET)),
    "memory_efficient": (
        lambda: stock_densenet.DenseNet(**DENSENET),
        lambda: DenseNet(**DENSENET, memory_efficient=True),
    ),
    "dense-patched": (lambda: stock_densenet.DenseNet(**DENSENET), lambda: None),
    "timm-dense": (
        lambda: timm.densenet.DenseNet(growth_rate=8, block_config=(2, 2), num_classes=10),
        lambda: None,
    ),
    "inception": (InceptionNet, lambda: None),
}
NETWORKS = [*CONCATENATING, *RESIDUAL]
# A network of each kind of block that trains by a function of ours: such a block, or a sequence of
# them, and the channels of its image.
BLOCKS = {
    "dense": ("features.denseblock1", 16),
    "memory_efficient": ("features.denseblock1", 16),
    "inception": ("first", 16),
    "bottleneck": ("layer1", 64),
    "se-bottleneck": ("layer1", 64),
    "mbconv": ("features.1", 16),
}

each_network = pytest.mark.parametrize("name", NETWORKS)
each_block = pytest.mark.parametrize("name", BLOCKS)


def training_pair(name, dtype=torch.float64):
    """(ours, stock) in training with one state, their norms no identities."""
    torch.manual_seed(0)
    if name in RESIDUAL:
        return pair(spread_norms(RESIDUAL[name](), (0.2, 1.5), 0.3).train(), dtype=dtype)
    stock, ours = (make() for make in CONCATENATING[name])
    ours, stock = pair(spread_norms(stock, (-0.5, 1.5), 0.3).train(), ours, dtype)
    if name == "inception":
        for part in ("stem", "pool"):
            setattr(ours, part, FusedSequential(*getattr(ours, part)))
    return ours, stock


def image(name, dtype=torch.float64, **kwargs):
    size = (26, 23) if name == "inception" else (40, 36)
    return pairs.image(**{"batch": 3, "size": size, "dtype": dtype, "seed": 1, **kwargs})


def assert_same_results(name, run, tolerance=1e-9):
    """``run`` gives equal tensors for both networks of that name."""
    assert_equal(*map(run, training_pair(name)), tolerance)


def is_recomputed(out):
    return isinstance(getattr(out, "_cvkernels_recompute", None), recompute.Recompute)
