"""Residual blocks with squeeze-and-excitation; mirror timm.models.resnet, names and order.

Hu et al. 2018, arXiv:1709.01507, figure 3. These are the blocks of ``seresnet50`` and ``senet154``;
those of the incompatible ``legacy_`` family are in :mod:`cvkernels.nn.legacy_se_residual`.
"""

from __future__ import annotations

import math
from collections.abc import Callable

from torch import nn

from cvkernels.nn.fused.branch import Branch, FusedBlock, Layer
from cvkernels.nn.fused.plan_cache import OPTIONS
from cvkernels.nn.squeeze_excite import SEModule


class _SEResidual(FusedBlock):
    """What both blocks share: the constructor, the shortcut's join, how their last norm starts.

    ``_build`` makes a block's layers. timm's blocks without attention have no ``se``.
    """

    def __init__(
        self, inplanes: int, planes: int, stride: int = 1, downsample: nn.Module | None = None,
        cardinality: int = 1, base_width: int = 64, reduce_first: int = 1, dilation: int = 1,
        first_dilation: int | None = None, act_layer: Callable[..., nn.Module] = nn.ReLU,
        norm_layer: Callable[..., nn.Module] = nn.BatchNorm2d,
        drop_path: nn.Module | None = None,
    ) -> None:  # fmt: skip
        super().__init__()
        dilations = (first_dilation or dilation, dilation)
        self._build(
            inplanes, planes, stride, cardinality, base_width, reduce_first, dilations, act_layer,
            norm_layer,
        )  # fmt: skip
        self.downsample = downsample
        self.stride = stride
        self.dilation = dilation
        self.drop_path = drop_path

    def _joined(self, layers: tuple[Layer, ...], act: nn.Module) -> Branch:
        """``act(drop_path(se(layers(x))) + downsample(x))``."""
        steps = layers if self.se is None else (*layers, self.se)
        return Branch(steps, True, self.downsample, self.drop_path, act)

    def zero_init_last(self) -> None:
        """Start the residual branch at zero: gamma of its last norm, where it has one."""
        last = self.bn3 if hasattr(self, "bn3") else self.bn2
        if getattr(last, "weight", None) is not None:
            nn.init.zeros_(last.weight)


class SEBasicBlock(_SEResidual):
    """Two 3x3 convolutions, squeeze-and-excitation, and a shortcut.

    Raises:
        ValueError: cardinality is not 1 or base_width not 64.
    """

    expansion: int = 1

    def _build(
        self, inplanes, planes, stride, cardinality, base_width, reduce_first, dilations, act, norm
    ) -> None:
        if cardinality != 1 or base_width != 64:
            raise ValueError(
                f"SEBasicBlock only supports cardinality=1 and base_width=64, got "
                f"cardinality={cardinality} and base_width={base_width}; SEBottleneck supports both"
            )
        first, (first_dilation, dilation) = planes // reduce_first, dilations
        self.conv1 = nn.Conv2d(
            inplanes, first, 3, stride, first_dilation, dilation=first_dilation, bias=False
        )
        self.bn1 = norm(first)
        self.drop_block = nn.Identity()
        self.act1 = act(inplace=True)
        self.aa = nn.Identity()
        self.conv2 = nn.Conv2d(first, planes, 3, 1, dilation, dilation=dilation, bias=False)
        self.bn2 = norm(planes)
        self.se = SEModule(planes)
        self.act2 = act(inplace=True)

    def branch(self) -> Branch:
        layers = (
            Layer(self.conv1, self.bn1, self.act1, self.drop_block, self.aa),
            Layer(self.conv2, self.bn2),
        )
        return self._joined(layers, self.act2)


class SEBottleneck(_SEResidual):
    """1x1, 3x3 with the stride and the groups, 1x1, squeeze-and-excitation, and a shortcut."""

    expansion: int = 4

    def _build(
        self, inplanes, planes, stride, cardinality, base_width, reduce_first, dilations, act, norm
    ) -> None:
        width = int(math.floor(planes * (base_width / 64)) * cardinality)
        first, first_dilation = width // reduce_first, dilations[0]
        self.conv1 = nn.Conv2d(inplanes, first, 1, bias=False)
        self.bn1 = norm(first)
        self.act1 = act(inplace=True)
        self.conv2 = nn.Conv2d(
            first, width, 3, stride, first_dilation, first_dilation, cardinality, bias=False
        )
        self.bn2 = norm(width)
        self.drop_block = nn.Identity()
        self.act2 = act(inplace=True)
        self.aa = nn.Identity()
        self.conv3 = nn.Conv2d(width, planes * self.expansion, 1, bias=False)
        self.bn3 = norm(planes * self.expansion)
        self.se = SEModule(planes * self.expansion)
        self.act3 = act(inplace=True)

    def branch(self) -> Branch:
        layers = (
            Layer(self.conv1, self.bn1, self.act1),
            Layer(self.conv2, self.bn2, self.act2, self.drop_block, self.aa),
            Layer(self.conv3, self.bn3),
        )
        return self._joined(layers, self.act3)


OPTIONS.update(dict.fromkeys((SEBasicBlock, SEBottleneck), ("training",)))
