"""The blocks of the five networks, with the stock parameter names, so that checkpoints load."""

from cvkernels.nn.conv_bn_act import ConvBNAct
from cvkernels.nn.dense import DenseBlock, DenseLayer, Transition
from cvkernels.nn.global_pool import GlobalPool
from cvkernels.nn.inception import BasicConv2d, Inception, InceptionAux
from cvkernels.nn.legacy_se_residual import (
    LegacySEBasicBlock,
    LegacySEBottleneck,
    LegacySEResNetBottleneck,
    LegacySEResNeXtBottleneck,
)
from cvkernels.nn.mbconv import FusedMBConv, FusedMBConvConfig, MBConv, MBConvConfig
from cvkernels.nn.residual import BasicBlock, Bottleneck
from cvkernels.nn.se_residual import SEBasicBlock, SEBottleneck
from cvkernels.nn.sequential import FusedSequential
from cvkernels.nn.squeeze_excite import LegacySEModule, SEModule, SqueezeExcitation, SqueezeExcite
from cvkernels.nn.stochastic_depth import DropPath, StochasticDepth

__all__ = [
    "BasicBlock",
    "BasicConv2d",
    "Bottleneck",
    "ConvBNAct",
    "DenseBlock",
    "DenseLayer",
    "DropPath",
    "FusedMBConv",
    "FusedMBConvConfig",
    "FusedSequential",
    "GlobalPool",
    "Inception",
    "InceptionAux",
    "LegacySEBasicBlock",
    "LegacySEBottleneck",
    "LegacySEModule",
    "LegacySEResNeXtBottleneck",
    "LegacySEResNetBottleneck",
    "MBConv",
    "MBConvConfig",
    "SEBasicBlock",
    "SEBottleneck",
    "SEModule",
    "SqueezeExcitation",
    "SqueezeExcite",
    "StochasticDepth",
    "Transition",
]
