"""The SENets of Caffe's and Cadene's checkpoints; mirrors timm.models.senet.

Hu et al. 2018, arXiv:1709.01507. The ``legacy_`` networks share shapes with those of
:mod:`cvkernels.models.senet` and compute something else: the stride of SE-ResNet's bottleneck sits
in conv1, the basic block applies its ReLU before the squeeze, the stem pools without padding.
"""

from __future__ import annotations

from collections import OrderedDict
from collections.abc import Sequence

from torch import Tensor, nn

from cvkernels.models.timm_builder import timm_model_builder
from cvkernels.models.timm_classifier import STAGES, TimmClassifier
from cvkernels.nn.legacy_se_residual import (
    LegacySEBasicBlock,
    LegacySEBottleneck,
    LegacySEResNetBottleneck,
    LegacySEResNeXtBottleneck,
)
from cvkernels.nn.sequential import FusedSequential


class LegacySENet(TimmClassifier):
    """Stem, four stages of residual blocks with squeeze-and-excitation, global pool, classifier.

    ``forward`` takes Tensor[N, in_chans, H, W], any layout, and returns logits Tensor[N,
    num_classes]. In eval each convolution runs with its norm and activation as one op.

    Args:
        block: LegacySEBasicBlock, LegacySEResNetBottleneck, LegacySEResNeXtBottleneck or
            LegacySEBottleneck.
        layers: blocks per stage, four numbers.
        groups: of the 3x3 in a block.
        reduction: divides the channels in squeeze-and-excitation.
        drop_rate: of the dropout before the classifier.
        in_chans: channels of the input.
        inplanes: channels of the stem.
        input_3x3: three 3x3 convolutions in the stem instead of one 7x7.
        downsample_kernel_size, downsample_padding: of the shortcut's convolution in layer2 to
            layer4.
        num_classes: outputs of the classifier; 0 leaves it out.
        global_pool: "avg", "max", "avgmax", "catavgmax" or "" (the feature map).

    Raises:
        ValueError: there is no such global_pool.
    """

    classifier_name = "last_linear"

    def __init__(
        self,
        block: type[LegacySEBasicBlock | LegacySEBottleneck],
        layers: Sequence[int],
        groups: int,
        reduction: int,
        drop_rate: float = 0.2,
        in_chans: int = 3,
        inplanes: int = 64,
        input_3x3: bool = False,
        downsample_kernel_size: int = 1,
        downsample_padding: int = 0,
        num_classes: int = 1000,
        global_pool: str = "avg",
    ) -> None:
        super().__init__(num_classes, in_chans, drop_rate)
        if input_3x3:
            convs = [
                nn.Conv2d(in_chans, 64, 3, stride=2, padding=1, bias=False),
                nn.Conv2d(64, 64, 3, padding=1, bias=False),
                nn.Conv2d(64, inplanes, 3, padding=1, bias=False),
            ]
        else:
            convs = [nn.Conv2d(in_chans, inplanes, 7, stride=2, padding=3, bias=False)]
        stem: OrderedDict[str, nn.Module] = OrderedDict()
        for index, conv in enumerate(convs, 1):
            stem[f"conv{index}"] = conv
            stem[f"bn{index}"] = nn.BatchNorm2d(conv.out_channels)
            stem[f"relu{index}"] = nn.ReLU(inplace=True)
        self.layer0 = FusedSequential(stem)
        # Caffe pools without padding and lets the last window run over the edge.
        self.pool0 = nn.MaxPool2d(3, stride=2, ceil_mode=True)
        self.feature_info = [{"num_chs": inplanes, "reduction": 2, "module": "layer0"}]

        self.inplanes = inplanes
        shortcut = (downsample_kernel_size, downsample_padding)
        for index, (name, count) in enumerate(zip(STAGES, layers, strict=True)):
            stage = self._make_layer(
                block, 64 * 2**index, count, groups, reduction,
                stride=2 if index else 1, shortcut=shortcut if index else (1, 0),
            )  # fmt: skip
            setattr(self, name, stage)
            info = {"num_chs": self.inplanes, "reduction": 4 * 2**index, "module": name}
            self.feature_info.append(info)
        self._add_head(self.inplanes, global_pool)
        for m in self.modules():
            if isinstance(m, nn.Conv2d):
                nn.init.kaiming_normal_(m.weight, mode="fan_out", nonlinearity="relu")

    def _make_layer(
        self,
        block: type,
        planes: int,
        blocks: int,
        groups: int,
        reduction: int,
        stride: int,
        shortcut: tuple[int, int],
    ) -> FusedSequential:
        outplanes = planes * block.expansion
        downsample = None
        if stride != 1 or self.inplanes != outplanes:
            kernel_size, padding = shortcut
            geometry = (kernel_size, stride, padding)
            downsample = FusedSequential(
                nn.Conv2d(self.inplanes, outplanes, *geometry, bias=False),
                nn.BatchNorm2d(outplanes),
            )
        layers = [block(self.inplanes, planes, groups, reduction, stride, downsample)]
        self.inplanes = outplanes
        layers += [block(outplanes, planes, groups, reduction) for _ in range(1, blocks)]
        return FusedSequential(*layers)

    def _stem(self, x: Tensor) -> Tensor:
        return self.layer0(x)

    def _stem_pool(self, x: Tensor) -> Tensor:
        return self.pooled(x, self.pool0)


def _network(block: type, layers: tuple[int, ...], kwargs: dict, **own) -> LegacySENet:
    """A network whose own options a caller may override, as in timm."""
    fixed = {"block": block, "layers": layers, "groups": 1, "reduction": 16}
    return LegacySENet(**{**fixed, **own, **kwargs})


@timm_model_builder
def legacy_seresnet18(**kwargs) -> LegacySENet:
    """SE-ResNet-18 with the ReLU before the squeeze: 11.8 M parameters."""
    return _network(LegacySEBasicBlock, (2, 2, 2, 2), kwargs)


@timm_model_builder
def legacy_seresnet34(**kwargs) -> LegacySENet:
    """SE-ResNet-34 with the ReLU before the squeeze: 22.0 M parameters."""
    return _network(LegacySEBasicBlock, (3, 4, 6, 3), kwargs)


@timm_model_builder
def legacy_seresnet50(**kwargs) -> LegacySENet:
    """SE-ResNet-50 with the stride in conv1: 28.1 M parameters."""
    return _network(LegacySEResNetBottleneck, (3, 4, 6, 3), kwargs)


@timm_model_builder
def legacy_seresnet101(**kwargs) -> LegacySENet:
    """SE-ResNet-101 with the stride in conv1: 49.3 M parameters."""
    return _network(LegacySEResNetBottleneck, (3, 4, 23, 3), kwargs)


@timm_model_builder
def legacy_seresnet152(**kwargs) -> LegacySENet:
    """SE-ResNet-152 with the stride in conv1: 66.8 M parameters."""
    return _network(LegacySEResNetBottleneck, (3, 8, 36, 3), kwargs)


@timm_model_builder
def legacy_seresnext50_32x4d(**kwargs) -> LegacySENet:
    """SE-ResNeXt-50, 32 groups of width 4: 27.6 M parameters."""
    return _network(LegacySEResNeXtBottleneck, (3, 4, 6, 3), kwargs, groups=32)


@timm_model_builder
def legacy_seresnext101_32x4d(**kwargs) -> LegacySENet:
    """SE-ResNeXt-101, 32 groups of width 4: 49.0 M parameters."""
    return _network(LegacySEResNeXtBottleneck, (3, 4, 23, 3), kwargs, groups=32)


@timm_model_builder
def legacy_senet154(**kwargs) -> LegacySENet:
    """SENet-154: 64 groups, a stem and shortcuts of 3x3 convolutions; 115.1 M parameters."""
    return _network(
        LegacySEBottleneck, (3, 8, 36, 3), kwargs, groups=64, inplanes=128, input_3x3=True,
        downsample_kernel_size=3, downsample_padding=1,
    )  # fmt: skip
