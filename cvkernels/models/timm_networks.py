"""The forwards of timm's networks, over the modules that timm built.

:func:`cvkernels.patch` gives these to networks that exist; none has a constructor.
"""

from __future__ import annotations

from torch import Tensor
from torch.utils.checkpoint import checkpoint

from cvkernels.nn.fused.caller_layout import in_layout_of_input
from cvkernels.nn.fused.module import FusedModule


class TimmNetwork(FusedModule):
    """Features, then the head."""

    @in_layout_of_input
    def forward(self, x: Tensor) -> Tensor:
        return self.forward_head(self.forward_features(x))


class TimmEfficientNet(TimmNetwork):
    """Stem, blocks, 1x1 head. The norms are timm's BatchNormAct2d, with the activation inside."""

    @in_layout_of_input
    def forward_features(self, x: Tensor) -> Tensor:
        x = self.fused(x, self.conv_stem, self.bn1)
        if self.grad_checkpointing:
            for stage in self.blocks:
                for block in stage:
                    x = checkpoint(block, x, use_reentrant=False)
        else:
            x = self.blocks(x)
        return self.fused(x, self.conv_head, self.bn2)
