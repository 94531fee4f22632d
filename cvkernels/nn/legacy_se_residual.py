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
    """What the blocks share: the constructor and the end of the branch.

    ``_build`` makes a block's convolutions and norms; ``options`` are a subclass's own.
    """

    def __init__(
        self, inplanes: int, planes: int, groups: int, reduction: int, stride: int = 1,
        downsample: nn.Module | None = None, **options: int,
    ) -> None:  # fmt: skip
        super().__init__()
        self._build(inplanes, planes, groups, stride, **options)
        self.relu = nn.ReLU(inplace=True)
        self.se_module = LegacySEModule(planes * self.expansion, reduction)
        self.downsample = downsample
        self.stride = stride

    def _joined(self, *layers: Layer) -> Branch:
        """``relu(se_module(layers(x)) + downsample(x))``."""
        steps, options = (*layers, self.se_module), {"in_place": False, "shortcut_first": True}
        return Branch(steps, True, self.downsample, act=self.relu, **options)


class LegacySEBasicBlock(_LegacySEResidual):
    """Two 3x3 convolutions, each with its ReLU, squeeze-and-excitation, and a shortcut."""

    expansion: int = 1

    def _build(self, inplanes: int, planes: int, groups: int, stride: int) -> None:
        self.conv1 = nn.Conv2d(inplanes, planes, 3, stride, padding=1, bias=False)
        self.bn1 = nn.BatchNorm2d(planes)
        self.conv2 = nn.Conv2d(planes, planes, 3, padding=1, groups=groups, bias=False)
        self.bn2 = nn.BatchNorm2d(planes)

    def branch(self) -> Branch:
        return self._joined(
            Layer(self.conv1, self.bn1, self.relu), Layer(self.conv2, self.bn2, self.relu)
        )


class _LegacyBottleneck(_LegacySEResidual):
    """1x1, 3x3, 1x1 to ``4 * planes``, squeeze-and-excitation, shortcut.

    ``_widths``, of planes, groups and what else a block takes, are the outputs of conv1 and conv2.
    """

    expansion: int = 4
    stride_first: bool = False  # in conv1, where Caffe has it; else in conv2

    def _build(self, inplanes: int, planes: int, groups: int, stride: int, **options: int) -> None:
        first, middle = self._widths(planes, groups, **options)
        outplanes = planes * self.expansion
        strides = (stride, 1) if self.stride_first else (1, stride)
        self.conv1 = nn.Conv2d(inplanes, first, 1, strides[0], bias=False)
        self.bn1 = nn.BatchNorm2d(first)
        self.conv2 = nn.Conv2d(first, middle, 3, strides[1], padding=1, groups=groups, bias=False)
        self.bn2 = nn.BatchNorm2d(middle)
        self.conv3 = nn.Conv2d(middle, outplanes, 1, bias=False)
        self.bn3 = nn.BatchNorm2d(outplanes)

    def branch(self) -> Branch:
        return self._joined(
            Layer(self.conv1, self.bn1, self.relu),
            Layer(self.conv2, self.bn2, self.relu),
            Layer(self.conv3, self.bn3),
        )


class LegacySEBottleneck(_LegacyBottleneck):
    """SENet-154's: twice as wide in the 1x1, the 3x3 in groups."""

    def _widths(self, planes: int, groups: int) -> tuple[int, int]:
        return planes * 2, planes * 4


class LegacySEResNetBottleneck(_LegacyBottleneck):
    """SE-ResNet's, with the stride in the first 1x1."""

    stride_first = True

    def _widths(self, planes: int, groups: int) -> tuple[int, int]:
        return planes, planes


class LegacySEResNeXtBottleneck(_LegacyBottleneck):
    """SE-ResNeXt's: ``groups`` of ``base_width`` channels (at 64 planes) in the 3x3."""

    def _widths(self, planes: int, groups: int, base_width: int = 4) -> tuple[int, int]:
        return (math.floor(planes * (base_width / 64)) * groups,) * 2
