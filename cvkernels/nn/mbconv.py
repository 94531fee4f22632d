"""EfficientNet's blocks; mirror MBConv and FusedMBConv of torchvision.models.efficientnet.

Sandler et al. 2018, arXiv:1801.04381; with squeeze-and-excitation Tan and Le 2019,
arXiv:1905.11946; the fused block Tan and Le 2021, arXiv:2104.00298.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from functools import partial

from torch import nn

from cvkernels.nn.conv_bn_act import (
    Conv2dNormActivation,
    ConvBNAct,
    split_conv_bn_act,
)
from cvkernels.nn.fused.branch import Branch, FusedBlock, Layer
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
        self, expand_ratio: float, kernel: int, stride: int, input_channels: int,
        out_channels: int, num_layers: int, width_mult: float = 1.0, depth_mult: float = 1.0,
        block: Callable[..., nn.Module] | None = None,
    ) -> None:  # fmt: skip
        channels = [self.adjust_channels(c, width_mult) for c in (input_channels, out_channels)]
        depth = self.adjust_depth(num_layers, depth_mult)
        super().__init__(expand_ratio, kernel, stride, *channels, depth, block or MBConv)

    @staticmethod
    def adjust_depth(num_layers: int, depth_mult: float) -> int:
        return math.ceil(num_layers * depth_mult)


@dataclass
class FusedMBConvConfig(InvertedResidualConfig):
    """A stage of FusedMBConv."""

    block: Callable[..., nn.Module] | None = None

    def __post_init__(self) -> None:
        self.block = self.block or FusedMBConv


class _InvertedResidual(FusedBlock):
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

    def branch(self) -> Branch:
        return Branch(
            tuple(self._steps()), self.use_res_connect, drop=self.stochastic_depth, body=self.block
        )

    def _steps(self) -> Sequence[Layer | nn.Module]:
        """The block's children, as far as they are stock's; none if they are not."""
        if type(self.block) is not nn.Sequential:
            return ()
        steps: list[Layer | nn.Module] = []
        for module in self.block:
            if getattr(type(module), "forward", None) is ConvBNAct.forward:
                conv, norm, act = split_conv_bn_act(list(module))
                if conv is None:
                    return ()
                steps.append(Layer(conv, norm, act, owner=module))
            elif isinstance(module, SqueezeExcite):
                steps.append(module)
            else:
                return ()
        return steps


def _layer_of(cnf: InvertedResidualConfig, norm_layer: Callable) -> Callable[..., nn.Module]:
    """What makes the convolutions of a block, checked to be one of this configuration."""
    if not 1 <= cnf.stride <= 2:
        raise ValueError("illegal stride value")
    return partial(Conv2dNormActivation, norm_layer=norm_layer, activation_layer=nn.SiLU)


class MBConv(_InvertedResidual):
    """Expand 1x1, depthwise k x k, squeeze-and-excitation, project 1x1; B0's first expands nothing.

    Raises:
        ValueError: the configuration's stride is neither 1 nor 2.
    """

    def __init__(
        self, cnf: MBConvConfig, stochastic_depth_prob: float,
        norm_layer: Callable[..., nn.Module],
        se_layer: Callable[..., nn.Module] = SqueezeExcitation,
    ) -> None:  # fmt: skip
        conv = _layer_of(cnf, norm_layer)
        expanded = cnf.adjust_channels(cnf.input_channels, cnf.expand_ratio)
        layers: list[nn.Module] = []
        if expanded != cnf.input_channels:
            layers.append(conv(cnf.input_channels, expanded, kernel_size=1))
        layers.append(conv(expanded, expanded, cnf.kernel, cnf.stride, groups=expanded))
        squeezed = max(1, cnf.input_channels // 4)
        layers.append(se_layer(expanded, squeezed, activation=partial(nn.SiLU, inplace=True)))
        layers.append(conv(expanded, cnf.out_channels, kernel_size=1, activation_layer=None))
        super().__init__(cnf, layers, stochastic_depth_prob)


class FusedMBConv(_InvertedResidual):
    """Expand k x k and project 1x1, or one k x k where nothing expands; no squeeze-and-excitation.

    Raises:
        ValueError: the configuration's stride is neither 1 nor 2.
    """

    def __init__(
        self, cnf: FusedMBConvConfig, stochastic_depth_prob: float,
        norm_layer: Callable[..., nn.Module],
    ) -> None:  # fmt: skip
        conv = _layer_of(cnf, norm_layer)
        expanded = cnf.adjust_channels(cnf.input_channels, cnf.expand_ratio)
        if expanded != cnf.input_channels:
            layers = [
                conv(cnf.input_channels, expanded, cnf.kernel, cnf.stride),
                conv(expanded, cnf.out_channels, kernel_size=1, activation_layer=None),
            ]
        else:
            layers = [conv(cnf.input_channels, cnf.out_channels, cnf.kernel, cnf.stride)]
        super().__init__(cnf, layers, stochastic_depth_prob)


OPTIONS[MBConv] = OPTIONS[FusedMBConv] = ("training", "use_res_connect")
OPTIONS[ConvBNAct] = OPTIONS[Conv2dNormActivation] = ("training",)
OPTIONS[StochasticDepth] = ("training", "p")
