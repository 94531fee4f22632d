"""The forwards of the blocks of timm's EfficientNet and DenseNet, over modules that timm built.

:func:`cvkernels.patch` gives these to blocks that exist; none has a constructor. The norms there
are timm's BatchNormAct2d, with the activation inside.
"""

from __future__ import annotations

import torch
from torch import Tensor, nn

from cvkernels.nn.dense import AppendingLayer
from cvkernels.nn.fused.branch import Branch, FusedBlock, Layer
from cvkernels.nn.fused.caller_layout import in_layout_of_input
from cvkernels.nn.squeeze_excite import SqueezeExcite


class TimmSqueezeExcite(SqueezeExcite):
    """Runs timm.models._efficientnet_blocks.SqueezeExcite: conv_reduce, act1, conv_expand, gate."""

    def parts(self) -> tuple:
        return None, self.conv_reduce, (self.act1,), self.conv_expand, self.gate


class _InvertedResidual(FusedBlock):
    """What timm's blocks share: space-to-depth before them, and the shortcut at their end."""

    def _branch(self, *steps: Layer | nn.Module) -> Branch:
        """``drop_path(steps(x)) + x``, without an activation behind the sum."""
        if getattr(self, "conv_s2d", None) is not None:
            steps = (Layer(self.conv_s2d, self.bn_s2d), *steps)
        return Branch(steps, self.has_skip, drop=self.drop_path, in_place=False)


class TimmConvBnAct(_InvertedResidual):
    """``drop_path(aa(bn1(conv(x)))) + x``; the shortcut stands behind the activation."""

    def branch(self) -> Branch:
        return self._branch(Layer(self.conv, self.bn1, behind=self.aa))


class TimmDepthwiseSeparableConv(_InvertedResidual):
    """Depthwise k x k, squeeze-and-excitation, 1x1."""

    def branch(self) -> Branch:
        depthwise = Layer(self.conv_dw, self.bn1, behind=self.aa)
        return self._branch(depthwise, self.se, Layer(self.conv_pw, self.bn2))


class TimmInvertedResidual(_InvertedResidual):
    """MBConv: expand 1x1, depthwise k x k, squeeze-and-excitation, project 1x1."""

    def branch(self) -> Branch:
        expand = Layer(self.conv_pw, self.bn1)
        depthwise = Layer(self.conv_dw, self.bn2, behind=self.aa)
        return self._branch(expand, depthwise, self.se, Layer(self.conv_pwl, self.bn3))


class TimmEdgeResidual(_InvertedResidual):
    """Fused MBConv: expand k x k, squeeze-and-excitation, project 1x1."""

    def branch(self) -> Branch:
        expand = Layer(self.conv_exp, self.bn1, behind=self.aa)
        return self._branch(expand, self.se, Layer(self.conv_pwl, self.bn2))


class TimmDenseLayer(AppendingLayer):
    """``conv2(norm2(conv1(norm1(cat(inputs)))))``, the part up to conv1 checkpointed on request."""

    def recomputes(self) -> bool:
        return self.grad_checkpointing

    @in_layout_of_input
    def forward(self, x: Tensor | list[Tensor]) -> Tensor:
        inputs = [x] if isinstance(x, Tensor) else x
        if self.grad_checkpointing and self.any_requires_grad(inputs):
            bottleneck = self.norm2(self.call_checkpoint_bottleneck(inputs))
        else:
            features = torch.cat(inputs, 1)
            bottleneck = self.fused(features, self.conv1, self.norm2, input_bn=(self.norm1, None))
        return self.dropped(self.fused(bottleneck, self.conv2), inputs[0])
