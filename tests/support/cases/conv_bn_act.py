"""Shapes and inputs of conv_bn_act that its tests and its benchmark share."""

from __future__ import annotations

from dataclasses import dataclass

import torch

from cvkernels.functional import BatchNormParams
from cvkernels.ops.conv_bn_act.reference import conv_bn_act_reference


@dataclass(frozen=True)
class Conv:
    """One convolution: x[N, C, H, W], weight[K, C/groups, R, S]."""

    C: int
    H: int
    W: int
    K: int
    R: int = 1
    S: int = 1
    stride: int | tuple[int, int] = 1
    padding: int | tuple[int, int] = 0
    dilation: int | tuple[int, int] = 1
    groups: int = 1
    N: int = 2


def _resnet50() -> dict[str, Conv]:
    """Every distinct convolution of ResNet-50 at 224 x 224."""
    convs = {"stem": Conv(3, 224, 224, 64, 7, 7, 2, 3)}
    inplanes, size = 64, 56
    for stage, planes in enumerate((64, 128, 256, 512), start=1):
        stride = 1 if stage == 1 else 2
        out = size // stride
        convs[f"layer{stage}.0.conv1"] = Conv(inplanes, size, size, planes)
        convs[f"layer{stage}.0.conv2"] = Conv(planes, size, size, planes, 3, 3, stride, 1)
        convs[f"layer{stage}.0.downsample"] = Conv(inplanes, size, size, planes * 4, stride=stride)
        convs[f"layer{stage}.conv3"] = Conv(planes, out, out, planes * 4)
        convs[f"layer{stage}.1.conv1"] = Conv(planes * 4, out, out, planes)
        convs[f"layer{stage}.1.conv2"] = Conv(planes, out, out, planes, 3, 3, 1, 1)
        inplanes, size = planes * 4, out
    return convs


RESNET50 = _resnet50()

ODD = {
    "channels-not-8": Conv(13, 9, 7, 11, 3, 3, 1, 1),
    "pointwise-odd": Conv(17, 5, 9, 19),
    "one-image": Conv(24, 7, 7, 40, 3, 3, 2, 1, N=1),
    "one-pixel": Conv(8, 1, 1, 16),
    "rectangle-kernel": Conv(6, 8, 11, 10, 1, 7, 1, (0, 3)),
    "large-kernel": Conv(4, 12, 10, 6, 5, 5, 2, 2),
    "dilated": Conv(8, 13, 11, 8, 3, 3, 1, 2, 2),
    "grouped": Conv(16, 8, 6, 32, 3, 3, 1, 1, groups=4),
    "resnext-groups": Conv(64, 7, 5, 64, 3, 3, 2, 1, groups=16),
    "depthwise": Conv(12, 9, 8, 12, 3, 3, 1, 1, groups=12),
    "stem-small": Conv(3, 17, 15, 8, 7, 7, 2, 3),
    "strided-pointwise": Conv(12, 9, 8, 20, stride=2),
    "padded-pointwise": Conv(5, 6, 7, 9, padding=1),
    "empty-batch": Conv(8, 6, 6, 4, 3, 3, 1, 1, N=0),
}
# What a Triton tile cannot divide evenly, in a geometry that ODD does not have.
TILED = {
    "1x1": Conv(64, 7, 5, 40),
    "1x1-stride": Conv(24, 7, 6, 17, stride=2),
    "1x1-one-pixel": Conv(40, 1, 1, 33, N=3),
    "3x3": Conv(32, 6, 5, 48, 3, 3, 1, 1),
    "3x3-two-strides": Conv(17, 5, 7, 19, 3, 3, (2, 1), 1, N=1),
    "5x5": Conv(16, 7, 6, 32, 5, 5, 1, 2, N=1),
    "stem-7x7": Conv(3, 15, 18, 64, 7, 7, 2, 3),
    "stem-3x3": Conv(3, 11, 8, 32, 3, 3, 2, N=1),
    "filter-row-dilated": Conv(5, 8, 9, 20, 3, 2, 1, (1, 2), (2, 3), N=1),
    "groups-of-4": Conv(64, 6, 5, 64, 3, 3, 1, 1, groups=16, N=1),
    "groups-of-16": Conv(64, 5, 4, 64, 3, 3, 2, groups=4, N=1),
    "two-groups-of-64": Conv(32, 4, 5, 128, 3, 3, 1, 1, groups=2, N=1),
    "uneven-groups": Conv(15, 5, 4, 21, 3, 3, 1, 1, groups=3),
    "grouped-1x1": Conv(24, 5, 4, 48, groups=4, N=1),
    "depthwise-multiplier": Conv(9, 5, 5, 18, 3, 3, 1, 1, groups=9, N=1),
}


def make_bn(channels: int, dtype=torch.float32, device="cpu") -> BatchNormParams:
    """Vectors like a trained norm's: gammas of both signs and one zero."""
    weight, var = torch.randn(channels, device=device), torch.rand(channels, device=device) + 0.1
    weight[0] = 0.0
    bias, mean = (torch.randn(channels, device=device) for _ in range(2))
    return BatchNormParams(*(v.to(dtype) for v in (weight, bias, mean, var)), eps=1e-3)


def make_inputs(
    conv: Conv, dtype=torch.float32, memory_format=torch.contiguous_format, device="cpu"
) -> tuple[tuple, dict]:
    """Arguments and keyword arguments of conv_bn_act for ``conv``, with bias and batch norm."""
    x = torch.randn(conv.N, conv.C, conv.H, conv.W, device=device)
    fan_in = conv.C // conv.groups * conv.R * conv.S
    weight = torch.randn(conv.K, conv.C // conv.groups, conv.R, conv.S, device=device) / fan_in**0.5
    args = (
        x.to(dtype).contiguous(memory_format=memory_format),
        weight.to(dtype).contiguous(memory_format=memory_format),
        torch.randn(conv.K, device=device).to(dtype),
        make_bn(conv.K, device=device),
    )
    return args, {n: getattr(conv, n) for n in ("stride", "padding", "dilation", "groups")}


def add_residual(args: tuple, options: dict) -> dict:
    """``options`` with a residual of the output's shape, strides and dtype."""
    return {**options, "residual": torch.randn_like(conv_bn_act_reference(*args, **options))}
