"""EfficientNet's blocks; mirror MBConv and FusedMBConv of torchvision.models.efficientnet.

Sandler et al. 2018, arXiv:1801.04381; with squeeze-and-excitation Tan and Le 2019,
arXiv:1905.11946; the fused block Tan and Le 2021, arXiv:2104.00298.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Iterable
from dataclasses import dataclass
from functools import partial
from operator import itemgetter

from torch import Tensor, nn

from cvkernels.nn.conv_bn_act import ConvBNAct, split_conv_bn_act
from cvkernels.nn.fused.match import (
    fused_act,
    runs_depthwise,
    why_not_called,
    why_not_conv_bn_act,
)
from cvkernels.nn.fused.module import FusedModule
from cvkernels.nn.fused.plan_cache import OPTIONS
from cvkernels.nn.squeeze_excite import SqueezeExcitation, SqueezeExcite, divisible
from cvkernels.nn.stochastic_depth import StochasticDepth


@dataclass
class InvertedResidualConfig:
    """One stage: ``num_layers`` blocks; the first has the stride and changes the channels."""

    expand_ratio: float
    kernel: int
    stride: int
    input_channels: int
    out_channels: int
    num_layers: int
    block: Callable[..., nn.Module]

    @staticmethod
    def adjust_channels(channels: int, width_mult: float, min_value: int | None = None) -> int:
        """The multiple of 8 nearest to ``channels * width_mult``, not less than 90 % of it."""
        return divisible(channels * width_mult, 8, min_value)


class MBConvConfig(InvertedResidualConfig):
    """A stage of MBConv, scaled: ``width_mult`` on its channels, ``depth_mult`` on its layers."""

    def __init__(
        self,
        expand_ratio: float,
        kernel: int,
        stride: int,
        input_channels: int,
        out_channels: int,
        num_layers: int,
        width_mult: float = 1.0,
        depth_mult: float = 1.0,
        block: Callable[..., nn.Module] | None = None,
    ) -> None:
        super().__init__(
            expand_ratio,
            kernel,
            stride,
            self.adjust_channels(input_channels, width_mult),
            self.adjust_channels(out_channels, width_mult),
            self.adjust_depth(num_layers, depth_mult),
            MBConv if block is None else block,
        )

    @staticmethod
    def adjust_depth(num_layers: int, depth_mult: float) -> int:
        return math.ceil(num_layers * depth_mult)


class FusedMBConvConfig(InvertedResidualConfig):
    """A stage of FusedMBConv."""

    def __init__(
        self,
        expand_ratio: float,
        kernel: int,
        stride: int,
        input_channels: int,
        out_channels: int,
        num_layers: int,
        block: Callable[..., nn.Module] | None = None,
    ) -> None:
        block = FusedMBConv if block is None else block
        super().__init__(
            expand_ratio, kernel, stride, input_channels, out_channels, num_layers, block
        )


class _InvertedResidual(FusedModule):
    """``block`` and, where its shape allows, ``stochastic_depth(block(x)) + x``.

    The shortcut is added in the op of the last convolution, where no activation follows that one
    and stochastic depth drops nothing.
    """

    def __init__(
        self, cnf: InvertedResidualConfig, layers: list[nn.Module], stochastic_depth_prob: float
    ) -> None:
        super().__init__()
        self.use_res_connect = cnf.stride == 1 and cnf.input_channels == cnf.out_channels
        self.block = nn.Sequential(*layers)
        self.stochastic_depth = StochasticDepth(stochastic_depth_prob, "row")
        self.out_channels = cnf.out_channels

    def forward(self, x: Tensor) -> Tensor:
        if not self.use_res_connect:
            return self.block(x)
        if self._shortcut_is_separate(x):
            y = self.stochastic_depth(self.block(x))
            y += x
            return y
        *layers, project = self.block
        y = x
        for layer in layers:
            y = layer(y)
        conv, bn, _ = split_conv_bn_act(list(project))
        return project.fused(y, conv, bn, residual=x)

    def _shortcut_is_separate(self, x: Tensor) -> bool:
        """Whether the block's modules must be called, or something stands before the shortcut."""
        if self.stochastic_depth.training and self.stochastic_depth.p > 0.0:
            return True
        if type(self.block) is not nn.Sequential or not len(self.block):
            return True
        project = self.block[-1]
        if getattr(type(project), "forward", None) is not ConvBNAct.forward:
            return True
        conv, _, act = split_conv_bn_act(list(project))
        if conv is None or act is not None:
            return True
        return bool(why_not_called(x, self.block, project, self.stochastic_depth))


def _check_stride(cnf: InvertedResidualConfig) -> None:
    if not 1 <= cnf.stride <= 2:
        raise ValueError("illegal stride value")


class MBConv(_InvertedResidual):
    """Expand 1x1, depthwise k x k, squeeze-and-excitation, project 1x1; B0's first expands nothing.

    Raises:
        ValueError: the configuration's stride is neither 1 nor 2.
    """

    def __init__(
        self,
        cnf: MBConvConfig,
        stochastic_depth_prob: float,
        norm_layer: Callable[..., nn.Module],
        se_layer: Callable[..., nn.Module] = SqueezeExcitation,
    ) -> None:
        _check_stride(cnf)
        conv = partial(ConvBNAct, norm_layer=norm_layer, activation_layer=nn.SiLU)
        expanded = cnf.adjust_channels(cnf.input_channels, cnf.expand_ratio)
        layers: list[nn.Module] = []
        if expanded != cnf.input_channels:
            layers.append(conv(cnf.input_channels, expanded, kernel_size=1))
        layers.append(conv(expanded, expanded, cnf.kernel, cnf.stride, groups=expanded))
        squeezed = max(1, cnf.input_channels // 4)
        layers.append(se_layer(expanded, squeezed, activation=partial(nn.SiLU, inplace=True)))
        layers.append(conv(expanded, cnf.out_channels, kernel_size=1, activation_layer=None))
        super().__init__(cnf, layers, stochastic_depth_prob)

    def forward(self, x: Tensor) -> Tensor:
        return self.recalled(x, self._computed, self._prepared_like)

    def _computed(self, x: Tensor) -> Tensor:
        if not self._is_stock(x):
            return super().forward(x)
        *expand, depthwise, excitation, project = self.block
        y = x
        for layer in expand:
            y = layer(y)
        residual = x if self.use_res_connect else None
        if sums_and_gates(y, excitation, depthwise, project) and not why_not_called(y, depthwise):
            y, sums = depthwise.squeezed(y, *depthwise)
            gate = excitation.gate_of_sums(sums, y.shape[2] * y.shape[3])
        else:
            y, gate = excitation(depthwise(y)), None
        return project.fused(y, *project, residual=residual, input_gate=gate)

    def _prepared_like(self, x: Tensor) -> Callable[[Tensor], Tensor] | None:
        """What runs the block on others like x, while its modules stay as they are; or None."""
        if not self._is_stock(x):
            return None
        *expand, depthwise, excitation, project = self.block
        return prepared_branch(
            x,
            [(layer, *split_conv_bn_act(list(layer))) for layer in expand],
            (depthwise, *depthwise),
            excitation,
            (project, *project),
            self.use_res_connect,
        )

    def _is_stock(self, x: Tensor) -> bool:
        """Whether the block has stock's parts, trains none of them, and nobody watches a join."""
        block = self.block
        if type(block) is not nn.Sequential or len(block) not in (3, 4):
            return False
        *expand, depthwise, excitation, project = block
        convs = (*expand, depthwise, project)
        if any(getattr(type(conv), "forward", None) is not ConvBNAct.forward for conv in convs):
            return False
        if getattr(type(excitation), "forward", None) is not SqueezeExcite.forward:
            return False
        if (len(depthwise), len(project)) != (3, 2):
            return False
        if self.stochastic_depth.training and self.stochastic_depth.p > 0.0:
            return False
        return not why_not_called(x, block, project, self.stochastic_depth)


def sums_and_gates(
    x: Tensor, excitation: nn.Module, depthwise: Iterable, project: Iterable
) -> bool:
    """Whether the depthwise op sums its output, so that the projection takes the gate.

    The depthwise map is then written once and read once. ``depthwise`` is (conv, norm, activation),
    ``project`` (conv, norm).
    """
    conv, bn, act = depthwise
    return (
        getattr(type(excitation), "forward", None) is SqueezeExcite.forward
        and not why_not_called(x, excitation)
        and not why_not_conv_bn_act(x, conv, bn, act)
        and not why_not_conv_bn_act(x, *project, None)
        and not excitation.why_not_op(x)
        and runs_depthwise(x, conv)
    )


def prepared_branch(
    x: Tensor,
    expand: list[tuple],
    depthwise: tuple,
    excitation: SqueezeExcite,
    project: tuple,
    adds: bool,
) -> Callable[[Tensor], Tensor] | None:
    """What runs an MBConv on others like x, while its modules stay as they are; or None.

    Layers are (the module that fuses them, conv, norm, activation), ``project`` without the last.
    """
    expands = []
    y = x
    for owner, *parts in expand:
        inner_act, clash = fused_act(*parts[1:])
        reason = clash or why_not_conv_bn_act(y, *parts[:2], inner_act)
        if reason or (run := owner.prepared(y, *parts)) is None:
            return None
        expands.append(run)
        y = run(y, None)
    owner, *parts = depthwise
    if not sums_and_gates(y, excitation, parts, project[1:]):
        return None
    if (convolve := owner.prepared_squeezed(y, *parts)) is None:
        return None
    y, sums = convolve(y)
    scale = excitation.prepared_gate(y, sums)
    reduce = project[0].prepared(y, *project[1:], residual=x if adds else None)
    if scale is None or reduce is None:
        return None

    def run_branch(x: Tensor) -> Tensor:
        y = x
        for run in expands:
            y = run(y, None)
        y, sums = convolve(y)
        return reduce(scale(y, sums), x if adds else None)

    return run_branch


class FusedMBConv(_InvertedResidual):
    """Expand k x k and project 1x1, or one k x k where nothing expands; no squeeze-and-excitation.

    Raises:
        ValueError: the configuration's stride is neither 1 nor 2.
    """

    def __init__(
        self,
        cnf: FusedMBConvConfig,
        stochastic_depth_prob: float,
        norm_layer: Callable[..., nn.Module],
    ) -> None:
        _check_stride(cnf)
        conv = partial(ConvBNAct, norm_layer=norm_layer, activation_layer=nn.SiLU)
        expanded = cnf.adjust_channels(cnf.input_channels, cnf.expand_ratio)
        if expanded != cnf.input_channels:
            layers = [
                conv(cnf.input_channels, expanded, cnf.kernel, cnf.stride),
                conv(expanded, cnf.out_channels, kernel_size=1, activation_layer=None),
            ]
        else:
            layers = [conv(cnf.input_channels, cnf.out_channels, cnf.kernel, cnf.stride)]
        super().__init__(cnf, layers, stochastic_depth_prob)


OPTIONS[MBConv] = itemgetter("training", "use_res_connect")
OPTIONS[ConvBNAct] = itemgetter("training")
OPTIONS[StochasticDepth] = itemgetter("training", "p")
