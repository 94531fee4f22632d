"""The forwards of timm's EfficientNet and DenseNet, over the modules that timm built.

:func:`cvkernels.patch` gives these to blocks that exist; none has a constructor. The norms there
are timm's BatchNormAct2d, with the activation inside.
"""

from __future__ import annotations

from collections.abc import Callable

import torch
from torch import Tensor, nn
from torch.utils.checkpoint import checkpoint

from cvkernels.nn.dense import GrowingLayer
from cvkernels.nn.fused.match import fused_act, why_not_called
from cvkernels.nn.fused.module import FusedModule
from cvkernels.nn.mbconv import prepared_branch, sums_and_gates
from cvkernels.nn.squeeze_excite import SqueezeExcite


class TimmSqueezeExcite(SqueezeExcite):
    """Runs timm.models._efficientnet_blocks.SqueezeExcite: conv_reduce, act1, conv_expand, gate."""

    def parts(self) -> tuple:
        return None, self.conv_reduce, (self.act1,), self.conv_expand, self.gate

    def as_modules(self, x: Tensor) -> Tensor:
        squeezed = self.conv_reduce(x.mean((2, 3), keepdim=True))
        return x * self.gate(self.conv_expand(self.act1(squeezed)))


class _InvertedResidual(FusedModule):
    """What timm's blocks share: space-to-depth before them, and the shortcut at their end."""

    def _space_to_depth(self, x: Tensor) -> Tensor:
        if getattr(self, "conv_s2d", None) is None:
            return x
        return self.fused(x, self.conv_s2d, self.bn_s2d)

    def _projected(self, x: Tensor, shortcut: Tensor, conv: nn.Module, bn: nn.Module) -> Tensor:
        """``drop_path(bn(conv(x))) + shortcut``, where the block has a shortcut."""
        if not self.has_skip:
            return self.fused(x, conv, bn)
        if self._adds_apart(x):
            return self.drop_path(self.fused(x, conv, bn)) + shortcut
        return self.fused(x, conv, bn, residual=shortcut)

    def _adds_apart(self, x: Tensor) -> bool:
        """Whether something stands before the shortcut, or watches it."""
        return self.has_skip and (_drops(self.drop_path) or bool(why_not_called(x, self.drop_path)))

    def _excited(
        self,
        x: Tensor,
        shortcut: Tensor,
        depthwise: tuple[nn.Module, nn.Module],
        project: tuple[nn.Module, nn.Module],
    ) -> Tensor:
        """``project(se(depthwise(x)))``, both (conv, norm), and the shortcut."""
        conv, bn = depthwise
        if type(self.aa) is nn.Identity and not self._adds_apart(x):
            act = fused_act(bn)[0]
            if not why_not_called(x, self.aa) and sums_and_gates(
                x, self.se, (conv, bn, act), project
            ):
                y, sums = self.squeezed(x, conv, bn, act)
                gate = self.se.gate_of_sums(sums, y.shape[2] * y.shape[3])
                residual = shortcut if self.has_skip else None
                return self.fused(y, *project, residual=residual, input_gate=gate)
        y = self.se(self.aa(self.fused(x, conv, bn)))
        return self._projected(y, shortcut, *project)

    def _prepared_branch(
        self,
        x: Tensor,
        expand: tuple[nn.Module, nn.Module] | None,
        depthwise: tuple[nn.Module, nn.Module],
        project: tuple[nn.Module, nn.Module],
    ) -> Callable[[Tensor], Tensor] | None:
        """What runs the block on others like x, while its modules stay as they are; or None."""
        if getattr(self, "conv_s2d", None) is not None or type(self.aa) is not nn.Identity:
            return None
        if self._adds_apart(x) or why_not_called(x, self.aa):
            return None
        return prepared_branch(
            x,
            [] if expand is None else [(self, *expand, None)],
            (self, *depthwise, fused_act(depthwise[1])[0]),
            self.se,
            (self, *project),
            self.has_skip,
        )


def _drops(drop_path: nn.Module) -> bool:
    """Whether stochastic depth may drop an image now, as far as is known of its class."""
    if type(drop_path) is nn.Identity:
        return False
    known = type(drop_path).__module__ == "timm.layers.drop" and hasattr(drop_path, "drop_prob")
    return not known or (drop_path.training and drop_path.drop_prob > 0.0)


class TimmConvBnAct(_InvertedResidual):
    """``drop_path(aa(bn1(conv(x)))) + x``; the shortcut stands behind the activation."""

    def forward(self, x: Tensor) -> Tensor:
        y = self.aa(self.fused(x, self.conv, self.bn1))
        return self.drop_path(y) + x if self.has_skip else y


class TimmDepthwiseSeparableConv(_InvertedResidual):
    """Depthwise k x k, squeeze-and-excitation, 1x1."""

    def forward(self, x: Tensor) -> Tensor:
        return self.recalled(x, self._computed, self._prepared_like)

    def _computed(self, x: Tensor) -> Tensor:
        y = self._space_to_depth(x)
        return self._excited(y, x, (self.conv_dw, self.bn1), (self.conv_pw, self.bn2))

    def _prepared_like(self, x: Tensor) -> Callable[[Tensor], Tensor] | None:
        layers = (None, (self.conv_dw, self.bn1), (self.conv_pw, self.bn2))
        return self._prepared_branch(x, *layers)


class TimmInvertedResidual(_InvertedResidual):
    """MBConv: expand 1x1, depthwise k x k, squeeze-and-excitation, project 1x1."""

    def forward(self, x: Tensor) -> Tensor:
        return self.recalled(x, self._computed, self._prepared_like)

    def _computed(self, x: Tensor) -> Tensor:
        y = self.fused(self._space_to_depth(x), self.conv_pw, self.bn1)
        return self._excited(y, x, (self.conv_dw, self.bn2), (self.conv_pwl, self.bn3))

    def _prepared_like(self, x: Tensor) -> Callable[[Tensor], Tensor] | None:
        expand = (self.conv_pw, self.bn1)
        layers = (expand, (self.conv_dw, self.bn2), (self.conv_pwl, self.bn3))
        return self._prepared_branch(x, *layers)


class TimmEdgeResidual(_InvertedResidual):
    """Fused MBConv: expand k x k, squeeze-and-excitation, project 1x1."""

    def forward(self, x: Tensor) -> Tensor:
        y = self.fused(x, self.conv_exp, self.bn1)
        return self._projected(self.se(self.aa(y)), x, self.conv_pwl, self.bn2)


class TimmEfficientNet(FusedModule):
    """Stem, blocks, 1x1 head."""

    def forward_features(self, x: Tensor) -> Tensor:
        x = self.fused(x, self.conv_stem, self.bn1)
        if self.grad_checkpointing:
            for stage in self.blocks:
                for block in stage:
                    x = checkpoint(block, x, use_reentrant=False)
        else:
            x = self.blocks(x)
        return self.fused(x, self.conv_head, self.bn2)


class TimmDenseLayer(GrowingLayer):
    """``conv2(norm2(conv1(norm1(cat(inputs)))))``, the part up to conv1 checkpointed on request."""

    def recomputes(self) -> bool:
        return self.grad_checkpointing

    def forward(self, x: Tensor | list[Tensor]) -> Tensor:
        inputs = [x] if isinstance(x, Tensor) else x
        if self.grad_checkpointing and self.any_requires_grad(inputs):
            bottleneck = self.norm2(self.call_checkpoint_bottleneck(inputs))
        else:
            features = torch.cat(inputs, 1)
            bottleneck = self.fused(features, self.conv1, self.norm2, input_bn=(self.norm1, None))
        return self.dropped(self.fused(bottleneck, self.conv2), inputs[0])
