"""Which stock class :func:`cvkernels.patch` swaps for which of ours, and what ours replaces."""

from __future__ import annotations

from typing import NamedTuple


class Swap(NamedTuple):
    """A class of ours that runs the attributes of a stock class.

    Attributes:
        ours: path of our class.
        methods: those that our class takes over; all others stay the stock class's.
        unless: an attribute that asks for something ours does not compute, where it is true.
    """

    ours: str
    methods: tuple[str, ...] = ("forward",)
    unless: str = ""


_NN = "cvkernels.nn."
_TIMM_NETWORK = ("forward_features", "forward")
_TIMM_EFFICIENTNET = "timm.models._efficientnet_blocks."

# Only exact instances are swapped: a subclass may have a forward of its own.
SWAPS = {
    "torchvision.ops.misc.Conv2dNormActivation": Swap(_NN + "conv_bn_act.ConvBNAct"),
    "torchvision.ops.misc.SqueezeExcitation": Swap(_NN + "squeeze_excite.SqueezeExcitation"),
    "torchvision.models.googlenet.BasicConv2d": Swap(_NN + "inception.BasicConv2d"),
    "torchvision.models.googlenet.Inception": Swap(_NN + "inception.Inception"),
    "torchvision.models.googlenet.GoogLeNet": Swap(
        "cvkernels.models.googlenet.GoogLeNet", ("_forward", "forward")
    ),
    "torchvision.models.resnet.BasicBlock": Swap(_NN + "residual.BasicBlock"),
    "torchvision.models.resnet.Bottleneck": Swap(_NN + "residual.Bottleneck"),
    "torchvision.models.resnet.ResNet": Swap(
        "cvkernels.models.resnet.ResNet", ("_forward_impl", "forward")
    ),
    "torchvision.models.densenet._DenseLayer": Swap(_NN + "dense.DenseLayer"),
    "torchvision.models.densenet._DenseBlock": Swap(_NN + "dense.DenseBlock"),
    "torchvision.models.densenet._Transition": Swap(_NN + "dense.Transition"),
    "torchvision.models.densenet.DenseNet": Swap("cvkernels.models.densenet.DenseNet"),
    "torchvision.models.efficientnet.MBConv": Swap(_NN + "mbconv.MBConv"),
    "torchvision.models.efficientnet.FusedMBConv": Swap(_NN + "mbconv.FusedMBConv"),
    "torchvision.models.efficientnet.EfficientNet": Swap(
        "cvkernels.models.efficientnet.EfficientNet", ("_forward_impl", "forward")
    ),
    "timm.layers.squeeze_excite.SEModule": Swap(
        _NN + "squeeze_excite.SEModule", unless="add_maxpool"
    ),
    "timm.models.resnet.BasicBlock": Swap(_NN + "se_residual.SEBasicBlock"),
    "timm.models.resnet.Bottleneck": Swap(_NN + "se_residual.SEBottleneck"),
    "timm.models.resnet.ResNet": Swap("cvkernels.models.senet.SEResNet", _TIMM_NETWORK),
    "timm.models.senet.SEModule": Swap(_NN + "squeeze_excite.LegacySEModule"),
    "timm.models.senet.SEBottleneck": Swap(_NN + "legacy_se_residual.LegacySEBottleneck"),
    "timm.models.senet.SEResNetBottleneck": Swap(
        _NN + "legacy_se_residual.LegacySEResNetBottleneck"
    ),
    "timm.models.senet.SEResNeXtBottleneck": Swap(
        _NN + "legacy_se_residual.LegacySEResNeXtBottleneck"
    ),
    "timm.models.senet.SEResNetBlock": Swap(_NN + "legacy_se_residual.LegacySEBasicBlock"),
    "timm.models.senet.SENet": Swap("cvkernels.models.legacy_senet.LegacySENet", _TIMM_NETWORK),
    "timm.models.densenet.DenseLayer": Swap(_NN + "timm_blocks.TimmDenseLayer"),
    "timm.models.densenet.DenseBlock": Swap(_NN + "dense.DenseBlock"),
    "timm.models.densenet.DenseTransition": Swap(_NN + "dense.Transition"),
    _TIMM_EFFICIENTNET + "SqueezeExcite": Swap(_NN + "timm_blocks.TimmSqueezeExcite"),
    _TIMM_EFFICIENTNET + "ConvBnAct": Swap(_NN + "timm_blocks.TimmConvBnAct"),
    _TIMM_EFFICIENTNET + "DepthwiseSeparableConv": Swap(
        _NN + "timm_blocks.TimmDepthwiseSeparableConv"
    ),
    _TIMM_EFFICIENTNET + "InvertedResidual": Swap(_NN + "timm_blocks.TimmInvertedResidual"),
    _TIMM_EFFICIENTNET + "EdgeResidual": Swap(_NN + "timm_blocks.TimmEdgeResidual"),
    "timm.models.densenet.DenseNet": Swap("cvkernels.models.timm_networks.TimmNetwork"),
    "timm.models.efficientnet.EfficientNet": Swap(
        "cvkernels.models.timm_networks.TimmEfficientNet", _TIMM_NETWORK
    ),
}

# Children of these that are exactly nn.Sequential are swapped too, for FusedSequential.
SEQUENTIAL = "torch.nn.modules.container.Sequential"
SEQUENTIALS = {
    "torchvision.models.googlenet.Inception": ("branch4",),
    "torchvision.models.resnet.BasicBlock": ("downsample",),
    "torchvision.models.resnet.Bottleneck": ("downsample",),
    "torchvision.models.densenet.DenseNet": ("features",),
    "timm.models.resnet.BasicBlock": ("downsample",),
    "timm.models.resnet.Bottleneck": ("downsample",),
    "timm.models.senet.SEBottleneck": ("downsample",),
    "timm.models.senet.SEResNetBottleneck": ("downsample",),
    "timm.models.senet.SEResNeXtBottleneck": ("downsample",),
    "timm.models.senet.SEResNetBlock": ("downsample",),
    "timm.models.senet.SENet": ("layer0",),
    "timm.models.densenet.DenseNet": ("features",),
}
