"""SE-ResNet, SE-ResNeXt and SENet-154; mirrors timm.models.resnet with squeeze-and-excitation.

Hu et al. 2018, arXiv:1709.01507. The models that Caffe's and Cadene's checkpoints are for compute
something else: :mod:`cvkernels.models.legacy_senet`.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence

from torch import Tensor, nn

from cvkernels.models.timm_builder import timm_model_builder
from cvkernels.models.timm_classifier import STAGES, TimmClassifier
from cvkernels.nn.fused.watched import why_not_called
from cvkernels.nn.se_residual import SEBasicBlock, SEBottleneck
from cvkernels.nn.sequential import FusedSequential
from cvkernels.nn.stochastic_depth import DropPath

ACTIVATIONS = {
    "relu": nn.ReLU,
    "relu6": nn.ReLU6,
    "leaky_relu": nn.LeakyReLU,
    "elu": nn.ELU,
    "silu": nn.SiLU,
    "swish": nn.SiLU,
    "mish": nn.Mish,
    "hard_swish": nn.Hardswish,
}
NORMS = {"batchnorm": nn.BatchNorm2d, "batchnorm2d": nn.BatchNorm2d}
Layer = str | Callable[..., nn.Module]


class SEResNet(TimmClassifier):
    """Stem, four stages of residual blocks with squeeze-and-excitation, global pool, classifier.

    ``forward`` takes Tensor[N, in_chans, H, W], any layout, and returns logits Tensor[N,
    num_classes]. In eval each convolution runs with its norm and activation as one op.

    Args:
        block: SEBasicBlock or SEBottleneck.
        layers: blocks per stage, four numbers.
        num_classes: outputs of the classifier; 0 leaves it out.
        in_chans: channels of the input.
        output_stride: 32, or 16 or 8 with dilation in place of the last strides.
        global_pool: "avg", "max", "avgmax", "catavgmax" or "" (the feature map).
        cardinality, base_width: groups of the 3x3 in SEBottleneck, and their channels at 64 planes.
        stem_width, stem_type: "" is one 7x7; "deep" three 3x3 of stem_width, stem_width and twice
            that; "deep_tiered" starts at three quarters.
        block_reduce_first: divides the width of a block's first convolution.
        down_kernel_size: of the shortcut's convolution where the stride is 2.
        act_layer, norm_layer: called with inplace=True and with the channel count; or a name, such
            as "silu" and "batchnorm2d". Norms other than BatchNorm2d run unfused.
        drop_rate: of the dropout before the classifier.
        drop_path_rate: of stochastic depth in the last block; grows linearly from 0.
        zero_init_last: start each residual branch at zero (gamma of its last norm).

    Raises:
        ValueError: an option is none of those above, or SEBasicBlock got groups or a width.
    """

    classifier_name = "fc"

    def __init__(
        self,
        block: type[SEBasicBlock | SEBottleneck],
        layers: Sequence[int],
        num_classes: int = 1000,
        in_chans: int = 3,
        output_stride: int = 32,
        global_pool: str = "avg",
        cardinality: int = 1,
        base_width: int = 64,
        stem_width: int = 64,
        stem_type: str = "",
        block_reduce_first: int = 1,
        down_kernel_size: int = 1,
        channels: Sequence[int] = (64, 128, 256, 512),
        act_layer: Layer = nn.ReLU,
        norm_layer: Layer = nn.BatchNorm2d,
        drop_rate: float = 0.0,
        drop_path_rate: float = 0.0,
        zero_init_last: bool = True,
    ) -> None:
        super().__init__(num_classes, in_chans, drop_rate)
        if output_stride not in (8, 16, 32):
            raise ValueError(f"output_stride must be 8, 16 or 32, got {output_stride!r}")
        if stem_type not in ("", "deep", "deep_tiered"):
            raise ValueError(f"stem_type must be '', 'deep' or 'deep_tiered', got {stem_type!r}")
        act_layer = _named("act_layer", act_layer, ACTIVATIONS)
        norm_layer = _named("norm_layer", norm_layer, NORMS)
        inplanes = self._add_stem(stem_width, stem_type, act_layer, norm_layer)
        self.feature_info = [{"num_chs": inplanes, "reduction": 2, "module": "act1"}]

        drop_paths = _drop_paths(drop_path_rate, sum(layers))
        net_stride, dilation, previous_dilation = 4, 1, 1
        for name, planes, count in zip(STAGES, channels, layers, strict=True):
            stride = 1 if name == "layer1" else 2
            if net_stride >= output_stride:
                dilation *= stride
                stride = 1
            net_stride *= stride
            outplanes = planes * block.expansion
            downsample = None
            if stride != 1 or inplanes != outplanes:
                downsample = _downsample(
                    inplanes, outplanes, down_kernel_size, stride, dilation, previous_dilation,
                    norm_layer,
                )  # fmt: skip
            stage = FusedSequential()
            for _ in range(count):
                stage.append(block(
                    inplanes, planes, stride, downsample, cardinality, base_width,
                    block_reduce_first, dilation, previous_dilation, act_layer, norm_layer,
                    next(drop_paths),
                ))  # fmt: skip
                inplanes, stride, downsample, previous_dilation = outplanes, 1, None, dilation
            setattr(self, name, stage)
            self.feature_info.append({"num_chs": inplanes, "reduction": net_stride, "module": name})
        self._add_head(inplanes, global_pool)
        self._initialise(zero_init_last)

    def _add_stem(
        self,
        width: int,
        kind: str,
        act_layer: Callable[..., nn.Module],
        norm_layer: Callable[..., nn.Module],
    ) -> int:
        """Add what comes before ``layer1``; how many channels it gives."""
        inplanes = width * 2 if kind else 64
        if kind:
            first = 3 * (width // 4) if kind == "deep_tiered" else width
            self.conv1 = nn.Sequential(
                nn.Conv2d(self.in_chans, first, 3, stride=2, padding=1, bias=False),
                norm_layer(first),
                act_layer(inplace=True),
                nn.Conv2d(first, width, 3, padding=1, bias=False),
                norm_layer(width),
                act_layer(inplace=True),
                nn.Conv2d(width, inplanes, 3, padding=1, bias=False),
            )
        else:
            self.conv1 = nn.Conv2d(self.in_chans, inplanes, 7, stride=2, padding=3, bias=False)
        self.bn1 = norm_layer(inplanes)
        self.act1 = act_layer(inplace=True)
        self.maxpool = nn.MaxPool2d(kernel_size=3, stride=2, padding=1)
        return inplanes

    def _initialise(self, zero_init_last: bool) -> None:
        for m in self.modules():
            if isinstance(m, nn.Conv2d):
                nn.init.kaiming_normal_(m.weight, mode="fan_out", nonlinearity="relu")
        if not zero_init_last:
            return
        for m in self.modules():
            if isinstance(m, (SEBasicBlock, SEBottleneck)):
                m.zero_init_last()

    def _stem(self, x: Tensor) -> Tensor:
        stem = self.conv1
        if type(stem) is nn.Sequential and len(stem) == 7 and not why_not_called(x, stem):
            x = self.fused(x, stem[0], stem[1], stem[2])
            x = self.fused(x, stem[3], stem[4], stem[5])
            stem = stem[6]
        return self.fused(x, stem, self.bn1, self.act1)

    def _stem_pool(self, x: Tensor) -> Tensor:
        return self.pooled(x, self.maxpool)


def _named(argument: str, layer: Layer, known: dict[str, type]) -> Callable[..., nn.Module]:
    if not isinstance(layer, str):
        return layer
    if layer.lower() not in known:
        raise ValueError(
            f"{argument} must be one of {', '.join(known)}, or a class or function that makes the "
            f"layer, got {layer!r}"
        )
    return known[layer.lower()]


def _drop_paths(rate: float, blocks: int) -> Iterator[DropPath | None]:
    """The stochastic depth of each block, whose rate grows linearly from 0 to ``rate``."""
    for index in range(blocks):
        yield DropPath(rate * index / (blocks - 1)) if index and rate > 0 else None


def _downsample(
    inplanes: int,
    outplanes: int,
    kernel_size: int,
    stride: int,
    dilation: int,
    previous_dilation: int,
    norm_layer: Callable[..., nn.Module],
) -> FusedSequential:
    """The shortcut's convolution and norm; a 1x1 unless the stage shrinks the map or dilates."""
    if stride == 1 and dilation == 1:
        kernel_size = 1
    if kernel_size == 1:
        previous_dilation = 1
    padding = (stride - 1 + previous_dilation * (kernel_size - 1)) // 2
    geometry = (kernel_size, stride, padding, previous_dilation)
    conv = nn.Conv2d(inplanes, outplanes, *geometry, bias=False)
    return FusedSequential(conv, norm_layer(outplanes))


def _network(block: type, layers: tuple[int, ...], kwargs: dict, **own) -> SEResNet:
    """A network whose own options a caller may override, as in timm."""
    return SEResNet(**{"block": block, "layers": layers, **own, **kwargs})


@timm_model_builder
def seresnet18(**kwargs) -> SEResNet:
    """SE-ResNet-18: 11.8 M parameters."""
    return _network(SEBasicBlock, (2, 2, 2, 2), kwargs)


@timm_model_builder
def seresnet34(**kwargs) -> SEResNet:
    """SE-ResNet-34: 22.0 M parameters."""
    return _network(SEBasicBlock, (3, 4, 6, 3), kwargs)


@timm_model_builder
def seresnet50(**kwargs) -> SEResNet:
    """SE-ResNet-50: 28.1 M parameters."""
    return _network(SEBottleneck, (3, 4, 6, 3), kwargs)


@timm_model_builder
def seresnet101(**kwargs) -> SEResNet:
    """SE-ResNet-101: 49.3 M parameters."""
    return _network(SEBottleneck, (3, 4, 23, 3), kwargs)


@timm_model_builder
def seresnet152(**kwargs) -> SEResNet:
    """SE-ResNet-152: 66.8 M parameters."""
    return _network(SEBottleneck, (3, 8, 36, 3), kwargs)


@timm_model_builder
def seresnext50_32x4d(**kwargs) -> SEResNet:
    """SE-ResNeXt-50, 32 groups of width 4: 27.6 M parameters."""
    return _network(SEBottleneck, (3, 4, 6, 3), kwargs, cardinality=32, base_width=4)


@timm_model_builder
def seresnext101_32x4d(**kwargs) -> SEResNet:
    """SE-ResNeXt-101, 32 groups of width 4: 49.0 M parameters."""
    return _network(SEBottleneck, (3, 4, 23, 3), kwargs, cardinality=32, base_width=4)


@timm_model_builder
def seresnext101_32x8d(**kwargs) -> SEResNet:
    """SE-ResNeXt-101, 32 groups of width 8: 93.6 M parameters."""
    return _network(SEBottleneck, (3, 4, 23, 3), kwargs, cardinality=32, base_width=8)


@timm_model_builder
def senet154(**kwargs) -> SEResNet:
    """SENet-154: 64 groups, a stem and shortcuts of 3x3 convolutions; 115.1 M parameters."""
    return _network(
        SEBottleneck, (3, 8, 36, 3), kwargs, cardinality=64, base_width=4, stem_type="deep",
        down_kernel_size=3, block_reduce_first=2,
    )  # fmt: skip
