"""Blocks of torchvision and timm that patch replaces, of random options, between maps of one size.

Each takes and returns [N, 8, H, W]. Where what it computes has other channels or another size, it
is cut or repeated to 8 channels and interpolated, by code that is no block's.
"""

from __future__ import annotations

from functools import partial
from random import Random

import timm
import torch
import torch.nn.functional as F
import torchvision
from timm.layers import BatchNormAct2d
from timm.models import _efficientnet_blocks, densenet, resnet, senet
from torch import Tensor, nn
from torchvision.models import efficientnet
from torchvision.models.googlenet import BasicConv2d, Inception
from torchvision.ops.misc import Conv2dNormActivation

WIDTH = 8
ACTIVATIONS = (nn.ReLU, nn.SiLU, nn.ReLU6, nn.Hardswish)


class Fitted(nn.Module):
    """``block``, from and to 8 channels of one size."""

    def __init__(self, block: nn.Module) -> None:
        super().__init__()
        self.block = block
        x = torch.zeros(1, WIDTH, 6, 6)
        try:
            with torch.no_grad():
                self.shape = block.eval()(x).shape
        except RuntimeError:  # stock has no such block
            self.shape = x.shape

    def forward(self, x: Tensor) -> Tensor:
        y = self.block(x)
        channels = self.shape[1]
        if channels < WIDTH:
            y = torch.cat((y,) * (-(-WIDTH // channels)), 1)
        if channels != WIDTH:
            y = y[:, :WIDTH]
        return F.interpolate(y, size=x.shape[2:]) if self.shape[2] != 6 else y


def _downsample(choose: Random, channels: int, stride: int) -> nn.Module | None:
    if stride == 1 and channels == WIDTH and choose.random() < 0.7:
        return None
    conv = nn.Conv2d(WIDTH, channels, 1, stride, bias=choose.random() < 0.2)
    return nn.Sequential(conv, nn.BatchNorm2d(channels))


def _torchvision_residual(choose: Random) -> nn.Module:
    stride, planes = choose.choice((1, 1, 2)), choose.choice((2, 2, 4, 8))
    if choose.random() < 0.4:
        block, channels, options = torchvision.models.resnet.BasicBlock, planes * 4, {}
        planes = channels
    else:
        block, channels = torchvision.models.resnet.Bottleneck, planes * 4
        options = dict(groups=choose.choice((1, 2)), dilation=choose.choice((1, 2)))
        options["base_width"] = choose.choice((64, 128))
    downsample = _downsample(choose, channels, stride)
    return block(WIDTH, planes, stride, downsample, **options)


def _timm_residual(choose: Random) -> nn.Module:
    stride, planes = choose.choice((1, 1, 2)), choose.choice((2, 4, 8))
    attention = (None, None, "se", "se", "eca", "ese", "cbam")
    options = dict(
        act_layer=choose.choice((nn.ReLU, nn.ReLU, nn.SiLU)),
        attn_layer=timm.layers.get_attn(choose.choice(attention)),
        aa_layer=choose.choice((None, None, None, timm.layers.BlurPool2d)),
        drop_path=choose.choice((None, None, timm.layers.DropPath(0.3))),
    )
    if choose.random() < 0.4:
        channels = planes = planes * 4
        block = resnet.BasicBlock
    else:
        channels, block = planes * 4, resnet.Bottleneck
        options |= dict(cardinality=choose.choice((1, 2)), base_width=choose.choice((64, 128)))
    downsample = _downsample(choose, channels, stride)
    return block(WIDTH, planes, stride, downsample, **options)


def _legacy_residual(choose: Random) -> nn.Module:
    stride, planes = choose.choice((1, 1, 2)), choose.choice((2, 4, 8))
    kinds = (senet.SEBottleneck, senet.SEResNetBottleneck, senet.SEResNeXtBottleneck)
    block = choose.choice((*kinds, senet.SEResNetBlock))
    planes = planes * 4 if block is senet.SEResNetBlock else planes
    channels = planes * block.expansion
    options = dict(base_width=64) if block is senet.SEResNeXtBottleneck else {}
    downsample = _downsample(choose, channels, stride)
    options |= dict(groups=1, reduction=2, stride=stride, downsample=downsample)
    return block(WIDTH, planes, **options)


def _dense(choose: Random) -> nn.Module:
    layers, growth = choose.randint(1, 3), choose.choice((2, 3, 4, 8))
    drop_rate, saves = choose.choice((0.0, 0.0, 0.3)), choose.random() < 0.3
    kind = choose.choice((torchvision.models.densenet._DenseBlock, densenet.DenseBlock))
    dense = kind(layers, WIDTH, 2, growth, drop_rate=drop_rate, **{
        "memory_efficient" if kind is not densenet.DenseBlock else "grad_checkpointing": saves
    })  # fmt: skip
    channels = WIDTH + layers * growth
    if choose.random() < 0.5:
        return dense
    return nn.Sequential(dense, _transition_of(choose, channels, kind))


def _transition_of(choose: Random, channels: int, dense: type) -> nn.Module:
    if dense is not densenet.DenseBlock:
        return torchvision.models.densenet._Transition(channels, channels // 2)
    aa_layer = choose.choice((None, None, timm.layers.BlurPool2d))
    return densenet.DenseTransition(channels, channels // 2, aa_layer=aa_layer)


def _transition(choose: Random) -> nn.Module:
    kind = choose.choice((torchvision.models.densenet._DenseBlock, densenet.DenseBlock))
    return _transition_of(choose, WIDTH, kind)


def _inception(choose: Random) -> nn.Module:
    if choose.random() < 0.3:
        return BasicConv2d(WIDTH, 6, kernel_size=choose.choice((1, 3)), padding=1)
    widths = [choose.choice((2, 3, 4, 8)) for _ in range(6)]
    return Inception(WIDTH, *widths)


def _conv_norm_act(choose: Random) -> nn.Module:
    channels, kernel = choose.choice((3, 8, 16)), choose.choice((1, 3, 5))
    options = dict(
        stride=choose.choice((1, 1, 2)),
        groups=choose.choice((1, 1, 8)) if channels % 8 == 0 else 1,
        norm_layer=choose.choice((nn.BatchNorm2d, nn.BatchNorm2d, None)),
        activation_layer=choose.choice((*ACTIVATIONS, None)),
        inplace=choose.choice((True, False)),
    )
    return Conv2dNormActivation(WIDTH, channels, kernel, **options)


def _mbconv(choose: Random) -> nn.Module:
    ratio, kernel, stride = choose.choice((1, 2, 4)), choose.choice((3, 5)), choose.choice((1, 2))
    channels, drop = choose.choice((8, 8, 12)), choose.choice((0.0, 0.0, 0.3))
    shape = (ratio, kernel, stride, WIDTH, channels, 1)
    if choose.random() < 0.7:
        config, block = efficientnet.MBConvConfig(*shape), efficientnet.MBConv
    else:
        config, block = efficientnet.FusedMBConvConfig(*shape), efficientnet.FusedMBConv
    return block(config, drop, nn.BatchNorm2d)


def _squeeze_excite(choose: Random) -> nn.Module:
    squeezed, act = choose.choice((1, 2, 4)), choose.choice((nn.ReLU, nn.SiLU))
    kinds = (
        partial(torchvision.ops.SqueezeExcitation, WIDTH, squeezed, activation=act),
        partial(timm.layers.SEModule, WIDTH, rd_channels=squeezed, act_layer=act),
        partial(timm.layers.SEModule, WIDTH, rd_channels=squeezed, gate_layer="hard_sigmoid"),
        partial(senet.SEModule, WIDTH, reduction=2),
        partial(
            _efficientnet_blocks.SqueezeExcite, WIDTH, rd_channels=squeezed, act_layer=act
        ),
    )  # fmt: skip
    return choose.choice(kinds)()


def _timm_mbconv(choose: Random) -> nn.Module:
    channels = choose.choice((8, 8, 12))
    options = dict(
        stride=choose.choice((1, 1, 2)), act_layer=choose.choice((nn.ReLU, nn.SiLU)),
        pad_type=choose.choice(("", "", "same")), drop_path_rate=choose.choice((0.0, 0.0, 0.3)),
        aa_layer=choose.choice((None, None, None, timm.layers.BlurPool2d)),
    )  # fmt: skip
    se = choose.choice((None, partial(_efficientnet_blocks.SqueezeExcite, rd_ratio=0.5)))
    kernel, ratio = choose.choice((3, 5)), choose.choice((1.0, 2.0, 4.0))
    kind = choose.randrange(4)
    if kind == 0:
        block = partial(_efficientnet_blocks.ConvBnAct, skip=choose.random() < 0.5)
        return block(WIDTH, channels, kernel, **options)
    options |= dict(noskip=choose.random() < 0.3, se_layer=se)
    if kind == 1:
        block = partial(_efficientnet_blocks.DepthwiseSeparableConv, pw_act=choose.random() < 0.5)
    else:
        kinds = (_efficientnet_blocks.InvertedResidual, _efficientnet_blocks.EdgeResidual)
        block = partial(kinds[kind - 2], exp_ratio=ratio)
    return block(WIDTH, channels, kernel, **options)


BLOCKS = (
    _torchvision_residual, _timm_residual, _legacy_residual, _dense, _transition, _inception,
    _conv_norm_act, _mbconv, _squeeze_excite, _timm_mbconv,
)  # fmt: skip


def random_block(choose: Random) -> Fitted:
    """One of the blocks; its norms have statistics, and some are unlike a new one's."""
    block = Fitted(choose.choice(BLOCKS)(choose))
    for norm in block.modules():
        if isinstance(norm, (nn.BatchNorm2d, BatchNormAct2d)):
            _vary(norm, choose)
    return block


@torch.no_grad()
def _vary(norm: nn.Module, choose: Random) -> None:
    norm.running_mean.normal_(0, 0.3)
    norm.running_var.uniform_(0.5, 2)
    norm.weight.uniform_(0.5, 1.5)
    norm.bias.normal_(0, 0.3)
    kind = choose.randrange(24)
    if kind == 0:
        norm.momentum = None
    elif kind == 1:
        norm.eps = 0.1
    elif kind == 2:
        norm.weight = norm.bias = None
    elif kind == 3:
        norm.track_running_stats = False
        norm.running_mean = norm.running_var = norm.num_batches_tracked = None
    elif kind == 4:
        norm.momentum = 0.9
