"""Residual blocks with squeeze-and-excitation; mirror timm.models.resnet, names and order.

Hu et al. 2018, arXiv:1709.01507, figure 3. These are the blocks of ``seresnet50`` and ``senet154``;
those of the incompatible ``legacy_`` family are in :mod:`cvkernels.nn.legacy_se_residual`.
"""

from __future__ import annotations

import math
from collections.abc import Callable
from operator import itemgetter

from torch import Tensor, nn

from cvkernels.nn.fused.match import why_not_called, why_not_conv_bn_act
from cvkernels.nn.fused.module import FusedModule
from cvkernels.nn.fused.plan_cache import OPTIONS
from cvkernels.nn.squeeze_excite import SEModule, SqueezeExcite
from cvkernels.nn.stochastic_depth import DropPath

# Convolution, norm and activation.
Layer = tuple[nn.Module, nn.Module, nn.Module | None]


def prepared_branch(
    block: FusedModule,
    x: Tensor,
    layers: tuple[Layer, ...],
    se: nn.Module,
    downsample: nn.Module | None,
    act: nn.Module,
) -> Callable[[Tensor], Tensor] | None:
    """What runs a residual block on others like x, while its modules stay as they are.

    ``act(se(layers(x)) + downsample(x))``. None where an op is not prepared.
    """
    runs = []
    y = x
    for layer in layers:
        if why_not_conv_bn_act(y, *layer) or (run := block.prepared(y, *layer)) is None:
            return None
        runs.append(run)
        y = run(y, None)
    if not isinstance(se, SqueezeExcite) or (join := se.prepared_added(y, act)) is None:
        return None

    def run_branch(x: Tensor) -> Tensor:
        y = x
        for run in runs:
            y = run(y, None)
        shortcut = x if downsample is None else downsample(x)
        if (shortcut.shape, shortcut.dtype) != (y.shape, y.dtype):
            return act(se(y) + shortcut)
        return join(y, shortcut, y)

    return run_branch


class _SEResidual(FusedModule):
    """What both blocks share: the two places that timm keeps free, and the end of the branch."""

    def _prepared_branch(
        self, x: Tensor, layers: tuple[Layer, ...], act: nn.Module
    ) -> Callable[[Tensor], Tensor] | None:
        if not self._places_are_free(x) or not self._path_is_free(x):
            return None
        return prepared_branch(self, x, layers, self.se, self.downsample, act)

    def _places_are_free(self, x: Tensor) -> bool:
        places = (self.drop_block, self.aa)
        return all(type(p) is nn.Identity for p in places) and not why_not_called(x, *places)

    def _spatial(self, x: Tensor, conv: nn.Module, bn: nn.Module, act: nn.Module) -> Tensor:
        """``aa(act(drop_block(bn(conv(x)))))``: one op while drop_block and aa are identities."""
        if self._places_are_free(x):
            return self.fused(x, conv, bn, act)
        return self.aa(act(self.drop_block(bn(conv(x)))))

    def _joined(
        self, x: Tensor, shortcut: Tensor, conv: nn.Module, bn: nn.Module, act: nn.Module
    ) -> Tensor:
        """``act(drop_path(se(bn(conv(x)))) + downsample(shortcut))``: two ops and the shortcut's.

        timm's blocks without attention have no ``se``; then it is one op.
        """
        if self.se is None and self.drop_path is None:
            if self.downsample is not None:
                shortcut = self.downsample(shortcut)
            return self.fused(x, conv, bn, act, residual=shortcut)
        fresh = not why_not_conv_bn_act(x, conv, bn, None)
        x = self.fused(x, conv, bn)
        if self._joins_in_one_op(x, act):
            if self.downsample is not None:
                shortcut = self.downsample(shortcut)
            return self.se.added(x, shortcut, act, lambda: self._ended(x, shortcut, act), fresh)
        return self._ended(x, shortcut, act, self.downsample)

    def _joins_in_one_op(self, x: Tensor, act: nn.Module) -> bool:
        """Whether squeeze-and-excitation, the addition and the activation are one op for x."""
        if not self._path_is_free(x):
            return False
        return isinstance(self.se, SqueezeExcite) and not self.se.why_not_added(x, act)

    def _path_is_free(self, x: Tensor) -> bool:
        """Whether drop_path does nothing to x, and nobody watches it."""
        drop = self.drop_path
        if drop is None:
            return True
        drops = type(drop) is not DropPath or (drop.training and drop.drop_prob > 0.0)
        return not drops and not why_not_called(x, drop)

    def _ended(
        self,
        x: Tensor,
        shortcut: Tensor,
        act: nn.Module,
        downsample: nn.Module | None = None,
    ) -> Tensor:
        """The end of the stock forward, module by module."""
        if self.se is not None:
            x = self.se(x)
        if self.drop_path is not None:
            x = self.drop_path(x)
        if downsample is not None:
            shortcut = downsample(shortcut)
        x += shortcut
        return act(x)

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

    def __init__(
        self,
        inplanes: int,
        planes: int,
        stride: int = 1,
        downsample: nn.Module | None = None,
        cardinality: int = 1,
        base_width: int = 64,
        reduce_first: int = 1,
        dilation: int = 1,
        first_dilation: int | None = None,
        act_layer: Callable[..., nn.Module] = nn.ReLU,
        norm_layer: Callable[..., nn.Module] = nn.BatchNorm2d,
        drop_path: nn.Module | None = None,
    ) -> None:
        super().__init__()
        if cardinality != 1 or base_width != 64:
            raise ValueError(
                f"SEBasicBlock only supports cardinality=1 and base_width=64, got "
                f"cardinality={cardinality} and base_width={base_width}; SEBottleneck supports both"
            )
        first = planes // reduce_first
        first_dilation = first_dilation or dilation
        self.conv1 = nn.Conv2d(
            inplanes, first, 3, stride, first_dilation, dilation=first_dilation, bias=False
        )
        self.bn1 = norm_layer(first)
        self.drop_block = nn.Identity()
        self.act1 = act_layer(inplace=True)
        self.aa = nn.Identity()
        self.conv2 = nn.Conv2d(first, planes, 3, 1, dilation, dilation=dilation, bias=False)
        self.bn2 = norm_layer(planes)
        self.se = SEModule(planes)
        self.act2 = act_layer(inplace=True)
        self.downsample = downsample
        self.stride = stride
        self.dilation = dilation
        self.drop_path = drop_path

    def forward(self, x: Tensor) -> Tensor:
        return self.recalled(x, self._computed, self._prepared_like)

    def _computed(self, x: Tensor) -> Tensor:
        y = self._spatial(x, self.conv1, self.bn1, self.act1)
        return self._joined(y, x, self.conv2, self.bn2, self.act2)

    def _prepared_like(self, x: Tensor) -> Callable[[Tensor], Tensor] | None:
        layers = ((self.conv1, self.bn1, self.act1), (self.conv2, self.bn2, None))
        return self._prepared_branch(x, layers, self.act2)


class SEBottleneck(_SEResidual):
    """1x1, 3x3 with the stride and the groups, 1x1, squeeze-and-excitation, and a shortcut."""

    expansion: int = 4

    def __init__(
        self,
        inplanes: int,
        planes: int,
        stride: int = 1,
        downsample: nn.Module | None = None,
        cardinality: int = 1,
        base_width: int = 64,
        reduce_first: int = 1,
        dilation: int = 1,
        first_dilation: int | None = None,
        act_layer: Callable[..., nn.Module] = nn.ReLU,
        norm_layer: Callable[..., nn.Module] = nn.BatchNorm2d,
        drop_path: nn.Module | None = None,
    ) -> None:
        super().__init__()
        width = int(math.floor(planes * (base_width / 64)) * cardinality)
        first = width // reduce_first
        first_dilation = first_dilation or dilation
        self.conv1 = nn.Conv2d(inplanes, first, 1, bias=False)
        self.bn1 = norm_layer(first)
        self.act1 = act_layer(inplace=True)
        self.conv2 = nn.Conv2d(
            first, width, 3, stride, first_dilation, first_dilation, cardinality, bias=False
        )
        self.bn2 = norm_layer(width)
        self.drop_block = nn.Identity()
        self.act2 = act_layer(inplace=True)
        self.aa = nn.Identity()
        self.conv3 = nn.Conv2d(width, planes * self.expansion, 1, bias=False)
        self.bn3 = norm_layer(planes * self.expansion)
        self.se = SEModule(planes * self.expansion)
        self.act3 = act_layer(inplace=True)
        self.downsample = downsample
        self.stride = stride
        self.dilation = dilation
        self.drop_path = drop_path

    def forward(self, x: Tensor) -> Tensor:
        return self.recalled(x, self._computed, self._prepared_like)

    def _computed(self, x: Tensor) -> Tensor:
        y = self.fused(x, self.conv1, self.bn1, self.act1)
        y = self._spatial(y, self.conv2, self.bn2, self.act2)
        return self._joined(y, x, self.conv3, self.bn3, self.act3)

    def _prepared_like(self, x: Tensor) -> Callable[[Tensor], Tensor] | None:
        layers = (
            (self.conv1, self.bn1, self.act1),
            (self.conv2, self.bn2, self.act2),
            (self.conv3, self.bn3, None),
        )
        return self._prepared_branch(x, layers, self.act3)


OPTIONS.update(dict.fromkeys((SEBasicBlock, SEBottleneck), itemgetter("training")))
