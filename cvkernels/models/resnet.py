"""ResNet, ResNeXt and Wide ResNet; mirrors torchvision.models.resnet.

He et al. 2016, arXiv:1512.03385; Xie et al. 2017, arXiv:1611.05431; Zagoruyko and Komodakis 2016,
arXiv:1605.07146.
"""

from __future__ import annotations

from collections.abc import Callable

import torch
from torch import Tensor, nn

from cvkernels.models.registry import model_builder
from cvkernels.nn import BasicBlock, Bottleneck, FusedSequential
from cvkernels.nn.fused.caller_layout import in_layout_of_input
from cvkernels.nn.fused.module import FusedModule
from cvkernels.nn.residual import conv1x1


class ResNet(FusedModule):
    """Stem, four stages of residual blocks, global average pool, classifier.

    ``forward`` takes Tensor[N, 3, H, W], any layout, and returns logits Tensor[N, num_classes]. In
    eval each convolution runs with its norm, activation and residual add as one op.

    Args:
        block: BasicBlock or Bottleneck.
        layers: blocks per stage, four numbers.
        num_classes: outputs of the classifier.
        zero_init_residual: start each residual branch at zero (gamma of its last norm).
        groups, width_per_group: of the 3x3 in Bottleneck (ResNeXt, Wide ResNet).
        replace_stride_with_dilation: for the last three stages, whether dilation replaces stride 2.
        norm_layer: called with the channel count; BatchNorm2d by default. Others run unfused.

    Raises:
        ValueError: replace_stride_with_dilation has not three entries, or BasicBlock got groups or
            a width.
        NotImplementedError: BasicBlock with dilation.
    """

    def __init__(
        self,
        block: type[BasicBlock | Bottleneck],
        layers: list[int],
        num_classes: int = 1000,
        zero_init_residual: bool = False,
        groups: int = 1,
        width_per_group: int = 64,
        replace_stride_with_dilation: list[bool] | None = None,
        norm_layer: Callable[..., nn.Module] | None = None,
    ) -> None:
        super().__init__()
        self._norm_layer = norm_layer or nn.BatchNorm2d
        self.inplanes = 64
        self.dilation = 1
        if replace_stride_with_dilation is None:
            replace_stride_with_dilation = [False, False, False]
        if len(replace_stride_with_dilation) != 3:
            raise ValueError(
                "replace_stride_with_dilation should be None "
                f"or a 3-element tuple, got {replace_stride_with_dilation}"
            )
        self.groups = groups
        self.base_width = width_per_group
        self.conv1 = nn.Conv2d(3, self.inplanes, kernel_size=7, stride=2, padding=3, bias=False)
        self.bn1 = self._norm_layer(self.inplanes)
        self.relu = nn.ReLU(inplace=True)
        self.maxpool = nn.MaxPool2d(kernel_size=3, stride=2, padding=1)
        self.layer1 = self._make_layer(block, 64, layers[0])
        self.layer2 = self._make_layer(block, 128, layers[1], 2, replace_stride_with_dilation[0])
        self.layer3 = self._make_layer(block, 256, layers[2], 2, replace_stride_with_dilation[1])
        self.layer4 = self._make_layer(block, 512, layers[3], 2, replace_stride_with_dilation[2])
        self.avgpool = nn.AdaptiveAvgPool2d((1, 1))
        self.fc = nn.Linear(512 * block.expansion, num_classes)
        self._initialise(zero_init_residual)

    def _initialise(self, zero_init_residual: bool) -> None:
        for m in self.modules():
            if isinstance(m, nn.Conv2d):
                nn.init.kaiming_normal_(m.weight, mode="fan_out", nonlinearity="relu")
            elif isinstance(m, (nn.BatchNorm2d, nn.GroupNorm)):
                nn.init.constant_(m.weight, 1)
                nn.init.constant_(m.bias, 0)
        if not zero_init_residual:
            return
        for m in self.modules():
            last = m.bn3 if isinstance(m, Bottleneck) else getattr(m, "bn2", None)
            if isinstance(m, (BasicBlock, Bottleneck)) and last.weight is not None:
                nn.init.constant_(last.weight, 0)

    def _make_layer(
        self,
        block: type[BasicBlock | Bottleneck],
        planes: int,
        blocks: int,
        stride: int = 1,
        dilate: bool = False,
    ) -> FusedSequential:
        first_dilation = self.dilation
        if dilate:
            self.dilation *= stride
            stride = 1
        outplanes = planes * block.expansion
        downsample = None
        if stride != 1 or self.inplanes != outplanes:
            downsample = FusedSequential(
                conv1x1(self.inplanes, outplanes, stride), self._norm_layer(outplanes)
            )
        width, norm = (self.groups, self.base_width), self._norm_layer
        stage = FusedSequential()
        for _ in range(blocks):
            stage.append(
                block(self.inplanes, planes, stride, downsample, *width, first_dilation, norm)
            )
            self.inplanes, stride, downsample = outplanes, 1, None
            first_dilation = self.dilation
        return stage

    @in_layout_of_input
    def forward(self, x: Tensor) -> Tensor:
        return self._forward_impl(x)

    def _forward_impl(self, x: Tensor) -> Tensor:
        x = self.fused(x, self.conv1, self.bn1, self.relu)
        x = self.pooled(x, self.maxpool)

        x = self.layer1(x)
        x = self.layer2(x)
        x = self.layer3(x)
        x = self.layer4(x)

        x = self.avgpool(x)
        x = torch.flatten(x, 1)
        return self.fc(x)


@model_builder("ResNet18_Weights")
def resnet18(**kwargs) -> ResNet:
    """ResNet-18: 11.7 M parameters."""
    return ResNet(BasicBlock, [2, 2, 2, 2], **kwargs)


@model_builder("ResNet34_Weights")
def resnet34(**kwargs) -> ResNet:
    """ResNet-34: 21.8 M parameters."""
    return ResNet(BasicBlock, [3, 4, 6, 3], **kwargs)


@model_builder("ResNet50_Weights")
def resnet50(**kwargs) -> ResNet:
    """ResNet-50: 25.6 M parameters."""
    return ResNet(Bottleneck, [3, 4, 6, 3], **kwargs)


@model_builder("ResNet101_Weights")
def resnet101(**kwargs) -> ResNet:
    """ResNet-101: 44.5 M parameters."""
    return ResNet(Bottleneck, [3, 4, 23, 3], **kwargs)


@model_builder("ResNet152_Weights")
def resnet152(**kwargs) -> ResNet:
    """ResNet-152: 60.2 M parameters."""
    return ResNet(Bottleneck, [3, 8, 36, 3], **kwargs)


@model_builder("ResNeXt50_32X4D_Weights", groups=32, width_per_group=4)
def resnext50_32x4d(**kwargs) -> ResNet:
    """ResNeXt-50, 32 groups of width 4: 25.0 M parameters."""
    return ResNet(Bottleneck, [3, 4, 6, 3], **kwargs)


@model_builder("ResNeXt101_32X8D_Weights", groups=32, width_per_group=8)
def resnext101_32x8d(**kwargs) -> ResNet:
    """ResNeXt-101, 32 groups of width 8: 88.8 M parameters."""
    return ResNet(Bottleneck, [3, 4, 23, 3], **kwargs)


@model_builder("ResNeXt101_64X4D_Weights", groups=64, width_per_group=4)
def resnext101_64x4d(**kwargs) -> ResNet:
    """ResNeXt-101, 64 groups of width 4: 83.5 M parameters."""
    return ResNet(Bottleneck, [3, 4, 23, 3], **kwargs)


@model_builder("Wide_ResNet50_2_Weights", width_per_group=128)
def wide_resnet50_2(**kwargs) -> ResNet:
    """Wide ResNet-50-2, the 3x3 twice as wide: 68.9 M parameters."""
    return ResNet(Bottleneck, [3, 4, 6, 3], **kwargs)


@model_builder("Wide_ResNet101_2_Weights", width_per_group=128)
def wide_resnet101_2(**kwargs) -> ResNet:
    """Wide ResNet-101-2, the 3x3 twice as wide: 126.9 M parameters."""
    return ResNet(Bottleneck, [3, 4, 23, 3], **kwargs)
