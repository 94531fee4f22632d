"""EfficientNet and EfficientNetV2; mirrors torchvision.models.efficientnet.

Tan and Le 2019, arXiv:1905.11946; Tan and Le 2021, arXiv:2104.00298.
"""

from __future__ import annotations

import copy
import math
from collections.abc import Callable, Sequence
from functools import partial
from typing import Any

import torch
from torch import Tensor, nn

from cvkernels.models.registry import model_builder
from cvkernels.nn.conv_bn_act import Conv2dNormActivation
from cvkernels.nn.fused.caller_layout import in_layout_of_input
from cvkernels.nn.fused.module import FusedModule
from cvkernels.nn.mbconv import FusedMBConvConfig, InvertedResidualConfig, MBConvConfig
from cvkernels.nn.sequential import FusedSequential

# expand ratio, kernel, stride, input channels, output channels, layers
B0_STAGES = (
    (1, 3, 1, 32, 16, 1),
    (6, 3, 2, 16, 24, 2),
    (6, 5, 2, 24, 40, 2),
    (6, 3, 2, 40, 80, 3),
    (6, 5, 1, 80, 112, 3),
    (6, 5, 2, 112, 192, 4),
    (6, 3, 1, 192, 320, 1),
)
# (stages of FusedMBConv, stages of MBConv)
V2_S_STAGES = (
    ((1, 3, 1, 24, 24, 2), (4, 3, 2, 24, 48, 4), (4, 3, 2, 48, 64, 4)),
    ((4, 3, 2, 64, 128, 6), (6, 3, 1, 128, 160, 9), (6, 3, 2, 160, 256, 15)),
)
V2_M_STAGES = (
    ((1, 3, 1, 24, 24, 3), (4, 3, 2, 24, 48, 5), (4, 3, 2, 48, 80, 5)),
    ((4, 3, 2, 80, 160, 7), (6, 3, 1, 160, 176, 14),
     (6, 3, 2, 176, 304, 18), (6, 3, 1, 304, 512, 5)),
)  # fmt: skip
V2_L_STAGES = (
    ((1, 3, 1, 32, 32, 4), (4, 3, 2, 32, 64, 7), (4, 3, 2, 64, 96, 7)),
    ((4, 3, 2, 96, 192, 10), (6, 3, 1, 192, 224, 19),
     (6, 3, 2, 224, 384, 25), (6, 3, 1, 384, 640, 7)),
)  # fmt: skip

# The norms of the checkpoints that come from TensorFlow.
B5_TO_B7_NORM = partial(nn.BatchNorm2d, eps=1e-3, momentum=0.01)
V2_NORM = partial(nn.BatchNorm2d, eps=1e-3)


class EfficientNet(FusedModule):
    """Stem, stages of inverted residual blocks, 1x1 head, global average pool, classifier.

    ``forward`` takes Tensor[N, 3, H, W], any layout, and returns logits Tensor[N, num_classes]. In
    eval each convolution runs with its norm, activation and shortcut as one op. ``resolution`` is
    the height and width that the network was scaled for (None if it was not said); any other works.

    Args:
        inverted_residual_setting: one MBConvConfig or FusedMBConvConfig a stage.
        dropout: probability before the classifier.
        stochastic_depth_prob: of the last block; grows linearly from 0.
        num_classes: outputs of the classifier.
        norm_layer: called with the channel count; BatchNorm2d by default. Others run unfused.
        last_channel: channels before the classifier; four times the last stage's by default.

    Raises:
        ValueError: inverted_residual_setting is empty, or a stride in it is neither 1 nor 2.
        TypeError: inverted_residual_setting is not a sequence of configurations.
    """

    resolution: int | None = None

    def __init__(
        self,
        inverted_residual_setting: Sequence[MBConvConfig | FusedMBConvConfig],
        dropout: float,
        stochastic_depth_prob: float = 0.2,
        num_classes: int = 1000,
        norm_layer: Callable[..., nn.Module] | None = None,
        last_channel: int | None = None,
    ) -> None:
        super().__init__()
        if not inverted_residual_setting:
            raise ValueError("The inverted_residual_setting should not be empty")
        if not isinstance(inverted_residual_setting, Sequence) or not all(
            isinstance(cnf, InvertedResidualConfig) for cnf in inverted_residual_setting
        ):
            raise TypeError("The inverted_residual_setting should be List[MBConvConfig]")
        norm_layer = norm_layer or nn.BatchNorm2d
        conv = partial(Conv2dNormActivation, norm_layer=norm_layer, activation_layer=nn.SiLU)

        layers: list[nn.Module] = [
            conv(3, inverted_residual_setting[0].input_channels, kernel_size=3, stride=2)
        ]
        total = sum(cnf.num_layers for cnf in inverted_residual_setting)
        built = 0
        for cnf in inverted_residual_setting:
            stage: list[nn.Module] = []
            for _ in range(cnf.num_layers):
                block = copy.copy(cnf)
                if stage:
                    block.input_channels = block.out_channels
                    block.stride = 1
                probability = stochastic_depth_prob * float(built) / total
                stage.append(block.block(block, probability, norm_layer))
                built += 1
            layers.append(FusedSequential(*stage))
        channels = inverted_residual_setting[-1].out_channels
        if last_channel is None:
            last_channel = 4 * channels
        layers.append(conv(channels, last_channel, kernel_size=1))

        self.features = FusedSequential(*layers)
        self.avgpool = nn.AdaptiveAvgPool2d(1)
        self.classifier = nn.Sequential(
            nn.Dropout(p=dropout, inplace=True), nn.Linear(last_channel, num_classes)
        )
        self._initialise()

    def _initialise(self) -> None:
        for m in self.modules():
            if isinstance(m, nn.Conv2d):
                nn.init.kaiming_normal_(m.weight, mode="fan_out")
                if m.bias is not None:
                    nn.init.zeros_(m.bias)
            elif isinstance(m, (nn.BatchNorm2d, nn.GroupNorm)):
                nn.init.ones_(m.weight)
                nn.init.zeros_(m.bias)
            elif isinstance(m, nn.Linear):
                bound = 1.0 / math.sqrt(m.out_features)
                nn.init.uniform_(m.weight, -bound, bound)
                nn.init.zeros_(m.bias)

    @in_layout_of_input
    def forward(self, x: Tensor) -> Tensor:
        return self._forward_impl(x)

    def _forward_impl(self, x: Tensor) -> Tensor:
        x = self.features(x)
        x = self.avgpool(x)
        x = torch.flatten(x, 1)
        return self.classifier(x)


def efficientnet(
    width: float = 1.0,
    depth: float = 1.0,
    resolution: int = 224,
    *,
    dropout: float = 0.2,
    stochastic_depth_prob: float = 0.2,
    num_classes: int = 1000,
    norm_layer: Callable[..., nn.Module] | None = None,
) -> EfficientNet:
    """Any point of the compound rule: EfficientNet-B0 scaled in width, depth and resolution.

    A stage of B0 with ``c`` channels and ``n`` blocks gets ``width * c`` channels, rounded to a
    multiple of 8 and never below 90 %, and ``ceil(depth * n)`` blocks. The paper scales by one
    exponent, ``width = 1.1**phi``, ``depth = 1.2**phi``, ``resolution = 224 * 1.15**phi``, at a
    cost of about ``2**phi``; any other three numbers are as good to this function.
    ``efficientnet(1.0, 1.0, 224)`` is :func:`efficientnet_b0`, ``efficientnet(1.2, 1.4, 300,
    dropout=0.3)`` is :func:`efficientnet_b3`, parameter for parameter.

    Args:
        width: multiplies the channels of every stage, stem and head included.
        depth: multiplies the blocks of every stage.
        resolution: height and width of the images that the network is for; kept as
            ``model.resolution``, and not enforced: convolutions take any size.
        dropout, stochastic_depth_prob, num_classes, norm_layer: as for :class:`EfficientNet`. The
            published weights of B5 to B7 need ``partial(nn.BatchNorm2d, eps=1e-3, momentum=0.01)``.

    Raises:
        ValueError: width or depth is not positive, or resolution is not a positive integer.

    Source: Tan and Le 2019, arXiv:1905.11946, equation 3 and table 1.
    """
    for name, factor in (("width", width), ("depth", depth)):
        if not isinstance(factor, (int, float)) or not 0 < factor < math.inf:
            raise ValueError(
                f"efficientnet: {name} must be a positive factor on B0's {name} (1.0 keeps it), "
                f"got {factor!r}"
            )
    if not isinstance(resolution, int) or resolution < 1:
        raise ValueError(
            f"efficientnet: resolution must be a positive integer, the height and width of the "
            f"images in pixels, got {resolution!r}"
        )
    kwargs = {"stochastic_depth_prob": stochastic_depth_prob, "num_classes": num_classes}
    return _network(_scaled(width, depth), dropout, resolution, kwargs, norm_layer=norm_layer)


def _scaled(width: float, depth: float) -> list[MBConvConfig]:
    return [MBConvConfig(*stage, width_mult=width, depth_mult=depth) for stage in B0_STAGES]


def _v2(stages: tuple[tuple, tuple]) -> list[MBConvConfig | FusedMBConvConfig]:
    fused, plain = stages
    return [FusedMBConvConfig(*s) for s in fused] + [MBConvConfig(*s) for s in plain]


def _network(
    stages: Sequence[MBConvConfig | FusedMBConvConfig],
    dropout: float,
    resolution: int,
    kwargs: dict[str, Any],
    last_channel: int | None = None,
    **own: Any,
) -> EfficientNet:
    """A network with ``dropout`` unless the caller gives another, and with options of its own."""
    kwargs = {"dropout": dropout, **kwargs}
    model = EfficientNet(stages, last_channel=last_channel, **kwargs, **own)
    model.resolution = resolution
    return model


@model_builder("EfficientNet_B0_Weights")
def efficientnet_b0(**kwargs) -> EfficientNet:
    """EfficientNet-B0, for 224 x 224: 5.3 M parameters."""
    return _network(_scaled(1.0, 1.0), 0.2, 224, kwargs)


@model_builder("EfficientNet_B1_Weights")
def efficientnet_b1(**kwargs) -> EfficientNet:
    """EfficientNet-B1, for 240 x 240: 7.8 M parameters."""
    return _network(_scaled(1.0, 1.1), 0.2, 240, kwargs)


@model_builder("EfficientNet_B2_Weights")
def efficientnet_b2(**kwargs) -> EfficientNet:
    """EfficientNet-B2: 9.1 M parameters. The weights are for 288 x 288, the paper has 260."""
    return _network(_scaled(1.1, 1.2), 0.3, 288, kwargs)


@model_builder("EfficientNet_B3_Weights")
def efficientnet_b3(**kwargs) -> EfficientNet:
    """EfficientNet-B3, for 300 x 300: 12.2 M parameters."""
    return _network(_scaled(1.2, 1.4), 0.3, 300, kwargs)


@model_builder("EfficientNet_B4_Weights")
def efficientnet_b4(**kwargs) -> EfficientNet:
    """EfficientNet-B4, for 380 x 380: 19.3 M parameters."""
    return _network(_scaled(1.4, 1.8), 0.4, 380, kwargs)


@model_builder("EfficientNet_B5_Weights")
def efficientnet_b5(**kwargs) -> EfficientNet:
    """EfficientNet-B5, for 456 x 456: 30.4 M parameters; norms with eps 1e-3 and momentum 0.01."""
    return _network(_scaled(1.6, 2.2), 0.4, 456, kwargs, norm_layer=B5_TO_B7_NORM)


@model_builder("EfficientNet_B6_Weights")
def efficientnet_b6(**kwargs) -> EfficientNet:
    """EfficientNet-B6, for 528 x 528: 43.0 M parameters; norms with eps 1e-3 and momentum 0.01."""
    return _network(_scaled(1.8, 2.6), 0.5, 528, kwargs, norm_layer=B5_TO_B7_NORM)


@model_builder("EfficientNet_B7_Weights")
def efficientnet_b7(**kwargs) -> EfficientNet:
    """EfficientNet-B7, for 600 x 600: 66.3 M parameters; norms with eps 1e-3 and momentum 0.01."""
    return _network(_scaled(2.0, 3.1), 0.5, 600, kwargs, norm_layer=B5_TO_B7_NORM)


@model_builder("EfficientNet_V2_S_Weights")
def efficientnet_v2_s(**kwargs) -> EfficientNet:
    """EfficientNetV2-S, for 384 x 384: 21.5 M parameters; norms with eps 1e-3."""
    return _network(_v2(V2_S_STAGES), 0.2, 384, kwargs, last_channel=1280, norm_layer=V2_NORM)


@model_builder("EfficientNet_V2_M_Weights")
def efficientnet_v2_m(**kwargs) -> EfficientNet:
    """EfficientNetV2-M, for 480 x 480: 54.1 M parameters; norms with eps 1e-3."""
    return _network(_v2(V2_M_STAGES), 0.3, 480, kwargs, last_channel=1280, norm_layer=V2_NORM)


@model_builder("EfficientNet_V2_L_Weights")
def efficientnet_v2_l(**kwargs) -> EfficientNet:
    """EfficientNetV2-L, for 480 x 480: 118.5 M parameters; norms with eps 1e-3."""
    return _network(_v2(V2_L_STAGES), 0.4, 480, kwargs, last_channel=1280, norm_layer=V2_NORM)
