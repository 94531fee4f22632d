"""The residual blocks of the ``legacy_`` SENets; mirror timm.models.senet, names and order.

They are those of the authors' Caffe models (Hu et al. 2018, arXiv:1709.01507), and compute
something else than :mod:`cvkernels.nn.se_residual`: the stride of SE-ResNet sits in conv1, and the
basic block applies its ReLU before the squeeze.
"""

from __future__ import annotations

import math

from torch import nn

from cvkernels.nn.fused.branch import Branch, FusedBlock, Layer
from cvkernels.nn.squeeze_excite import LegacySEModule


class _LegacySEResidual(FusedBlock):
    """What the blocks share: the end of the branch."""

    def _joined(self, *layers: Layer) -> Branch:
        """``relu(se_module(layers(x)) + downsample(x))``."""
        steps = (*layers, self.se_module)
        return Branch(
            steps, True, self.downsample, act=self.relu, in_place=False, shortcut_first=True
        )


class LegacySEBasicBlock(_LegacySEResidual):
    """Two 3x3 convolutions, each with its ReLU, squeeze-and-excitation, and a shortcut."""

    expansion: int = 1

    def __init__(
        self,
        inplanes: int,
        planes: int,
        groups: int,
        reduction: int,
        stride: int = 1,
        downsample: nn.Module | None = None,
    ) -> None:
        super().__init__()
        self.conv1 = nn.Conv2d(inplanes, planes, 3, stride, padding=1, bias=False)
        self.bn1 = nn.BatchNorm2d(planes)
        self.conv2 = nn.Conv2d(planes, planes, 3, padding=1, groups=groups, bias=False)
        self.bn2 = nn.BatchNorm2d(planes)
        self.relu = nn.ReLU(inplace=True)
        self.se_module = LegacySEModule(planes, reduction)
        self.downsample = downsample
        self.stride = stride

    def branch(self) -> Branch:
        return self._joined(
            Layer(self.conv1, self.bn1, self.relu), Layer(self.conv2, self.bn2, self.relu)
        )


class _LegacyBottleneck(_LegacySEResidual):
    """1x1 to ``first``, 3x3 to ``middle``, 1x1 to ``4 * planes``, squeeze-and-excitation, shortcut.

    ``strides`` are those of conv1 and conv2.
    """

    expansion: int = 4

    def __init__(
        self,
        inplanes: int,
        planes: int,
        groups: int,
        reduction: int,
        downsample: nn.Module | None,
        first: int,
        middle: int,
        strides: tuple[int, int],
    ) -> None:
        super().__init__()
        outplanes = planes * self.expansion
        self.conv1 = nn.Conv2d(inplanes, first, 1, strides[0], bias=False)
        self.bn1 = nn.BatchNorm2d(first)
        self.conv2 = nn.Conv2d(first, middle, 3, strides[1], padding=1, groups=groups, bias=False)
        self.bn2 = nn.BatchNorm2d(middle)
        self.conv3 = nn.Conv2d(middle, outplanes, 1, bias=False)
        self.bn3 = nn.BatchNorm2d(outplanes)
        self.relu = nn.ReLU(inplace=True)
        self.se_module = LegacySEModule(outplanes, reduction)
        self.downsample = downsample
        self.stride = max(strides)

    def branch(self) -> Branch:
        return self._joined(
            Layer(self.conv1, self.bn1, self.relu),
            Layer(self.conv2, self.bn2, self.relu),
            Layer(self.conv3, self.bn3),
        )


class LegacySEBottleneck(_LegacyBottleneck):
    """SENet-154's: twice as wide in the 1x1, the 3x3 in groups."""

    def __init__(
        self,
        inplanes: int,
        planes: int,
        groups: int,
        reduction: int,
        stride: int = 1,
        downsample: nn.Module | None = None,
    ) -> None:
        widths = (planes * 2, planes * 4)
        super().__init__(inplanes, planes, groups, reduction, downsample, *widths, (1, stride))


class LegacySEResNetBottleneck(_LegacyBottleneck):
    """SE-ResNet's, with the stride in the first 1x1."""

    def __init__(
        self,
        inplanes: int,
        planes: int,
        groups: int,
        reduction: int,
        stride: int = 1,
        downsample: nn.Module | None = None,
    ) -> None:
        widths = (planes, planes)
        super().__init__(inplanes, planes, groups, reduction, downsample, *widths, (stride, 1))


class LegacySEResNeXtBottleneck(_LegacyBottleneck):
    """SE-ResNeXt's: ``groups`` of ``base_width`` channels (at 64 planes) in the 3x3."""

    def __init__(
        self,
        inplanes: int,
        planes: int,
        groups: int,
        reduction: int,
        stride: int = 1,
        downsample: nn.Module | None = None,
        base_width: int = 4,
    ) -> None:
        widths = (math.floor(planes * (base_width / 64)) * groups,) * 2
        super().__init__(inplanes, planes, groups, reduction, downsample, *widths, (1, stride))
