"""Small residual networks in training beside their stock twins; the tests of their training share
it."""

import functools

import pytest
import torch
from torch import nn
from torchvision.models import efficientnet, resnet

from tests.support import pairs
from tests.support.pairs import pair, spread_norms

timm_resnet = pytest.importorskip("timm.models.resnet")
timm_senet = pytest.importorskip("timm.models.senet")


def mbconvs(kind=efficientnet.MBConvConfig, drop=0.0):
    stages = [kind(4, 3, 2, 16, 16, 2), kind(4, 3, 1, 16, 24, 3)]
    if kind is efficientnet.MBConvConfig:
        stages.insert(0, kind(1, 3, 1, 16, 16, 1))
    return efficientnet.EfficientNet(
        stages, 0.0, stochastic_depth_prob=drop, num_classes=5, last_channel=32
    )


def timm_mbconvs():
    net = pytest.importorskip("timm").create_model("efficientnet_b0", num_classes=5)
    net.blocks = nn.Sequential(*list(net.blocks)[:3])
    net.conv_head, net.bn2.num_features = nn.Conv2d(40, 32, 1, bias=False), 32
    for name in ("weight", "bias"):
        setattr(net.bn2, name, nn.Parameter(torch.ones(32)))
    net.bn2.running_mean, net.bn2.running_var = torch.zeros(32), torch.ones(32)
    net.classifier = nn.Linear(32, 5)
    return net


def se_resnet(block, layers, **kwargs):
    return timm_resnet.ResNet(
        block, layers, num_classes=5, block_args={"attn_layer": "se"}, zero_init_last=False,
        channels=(16, 16, 32, 32), stem_width=16, **kwargs,
    )  # fmt: skip


def legacy(block, **kwargs):
    return timm_senet.SENet(
        block, [2, 1, 1, 1], groups=1, reduction=16, drop_rate=0.0, num_classes=5, **kwargs
    )


NETWORKS = {
    "basic": lambda: resnet.ResNet(resnet.BasicBlock, [3, 2, 1, 1], num_classes=5),
    "bottleneck": lambda: resnet.ResNet(resnet.Bottleneck, [3, 2, 1, 1], num_classes=5),
    "grouped": lambda: resnet.ResNet(
        resnet.Bottleneck, [2, 1, 1, 1], num_classes=5, groups=4, width_per_group=16
    ),
    "se-basic": lambda: se_resnet(timm_resnet.BasicBlock, (2, 2, 1, 1)),
    "se-bottleneck": lambda: se_resnet(timm_resnet.Bottleneck, (3, 2, 1, 1)),
    "timm-silu": lambda: timm_resnet.ResNet(
        timm_resnet.Bottleneck, (2, 1, 1, 1), num_classes=5, act_layer=nn.SiLU
    ),
    "legacy": lambda: legacy(timm_senet.SEResNetBottleneck),
    "mbconv": mbconvs,
    "mbconv-dropping": lambda: mbconvs(drop=0.3),
    "fused-mbconv": lambda: mbconvs(efficientnet.FusedMBConvConfig),
    "timm-mbconv": timm_mbconvs,
}


def residual_pair(name, dtype=torch.float64):
    """(ours, stock) in training with one state."""
    torch.manual_seed(0)
    return pair(spread_norms(NETWORKS[name](), (0.2, 1.5), 0.3).train(), dtype=dtype)


image = functools.partial(pairs.image, batch=3, size=(40, 36), dtype=torch.float64, seed=1)
