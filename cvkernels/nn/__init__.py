"""The blocks of the five networks, with the parameter names that people's checkpoints have."""

from cvkernels.nn.conv_bn_act import ConvBNAct
from cvkernels.nn.residual import BasicBlock, Bottleneck

__all__ = ["BasicBlock", "Bottleneck", "ConvBNAct"]
