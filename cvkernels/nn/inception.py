"""GoogLeNet's blocks; mirror torchvision.models.googlenet's, names and order.

Szegedy et al. 2015, arXiv:1409.4842, with the batch norms of Ioffe and Szegedy 2015,
arXiv:1502.03167.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from cvkernels.nn.fusion import FusedModule, relu_
from cvkernels.nn.sequential import FusedSequential


class BasicConv2d(FusedModule):
    """``relu(bn(conv(x)))``, one op in eval; ``kwargs`` are nn.Conv2d's."""

    def __init__(self, in_channels: int, out_channels: int, **kwargs: Any) -> None:
        super().__init__()
        self.conv = nn.Conv2d(in_channels, out_channels, bias=False, **kwargs)
        self.bn = nn.BatchNorm2d(out_channels, eps=0.001)

    def forward(self, x: Tensor) -> Tensor:
        return self.fused(x, self.conv, self.bn, relu_)


class Inception(nn.Module):
    """Four branches side by side, concatenated by channel; figure 2b of the paper.

    ::

        x -+- 1x1 ---------------- ch1x1     -+
           +- 1x1 ch3x3red - 3x3 - ch3x3     -+
           +- 1x1 ch5x5red - 3x3 - ch5x5     -+- cat
           +- max pool 3x3 - 1x1 - pool_proj -+

    Args:
        in_channels: of x.
        ch1x1, ch3x3red, ch3x3, ch5x5red, ch5x5, pool_proj: outputs of the convolutions above.
        conv_block: called as ``conv_block(in, out, kernel_size=..., ...)``; BasicConv2d by default.
    """

    def __init__(
        self,
        in_channels: int,
        ch1x1: int,
        ch3x3red: int,
        ch3x3: int,
        ch5x5red: int,
        ch5x5: int,
        pool_proj: int,
        conv_block: Callable[..., nn.Module] | None = None,
    ) -> None:
        super().__init__()
        conv_block = conv_block or BasicConv2d
        self.branch1 = conv_block(in_channels, ch1x1, kernel_size=1)
        self.branch2 = nn.Sequential(
            conv_block(in_channels, ch3x3red, kernel_size=1),
            conv_block(ch3x3red, ch3x3, kernel_size=3, padding=1),
        )
        self.branch3 = nn.Sequential(
            conv_block(in_channels, ch5x5red, kernel_size=1),
            # 3x3 where the paper has 5x5: the published checkpoints were trained so
            # (github.com/pytorch/vision/issues/906).
            conv_block(ch5x5red, ch5x5, kernel_size=3, padding=1),
        )
        self.branch4 = FusedSequential(
            nn.MaxPool2d(kernel_size=3, stride=1, padding=1, ceil_mode=True),
            conv_block(in_channels, pool_proj, kernel_size=1),
        )

    def _forward(self, x: Tensor) -> list[Tensor]:
        return [self.branch1(x), self.branch2(x), self.branch3(x), self.branch4(x)]

    def forward(self, x: Tensor) -> Tensor:
        return torch.cat(self._forward(x), 1)


class InceptionAux(nn.Module):
    """The auxiliary classifier: average pool to 4x4, 1x1 convolution, two linear layers.

    The paper pools 5x5 with stride 3, which gives the same 4x4 on the 14x14 maps of 224 pixels.
    """

    def __init__(
        self,
        in_channels: int,
        num_classes: int,
        conv_block: Callable[..., nn.Module] | None = None,
        dropout: float = 0.7,
    ) -> None:
        super().__init__()
        conv_block = conv_block or BasicConv2d
        self.conv = conv_block(in_channels, 128, kernel_size=1)
        self.fc1 = nn.Linear(2048, 1024)
        self.fc2 = nn.Linear(1024, num_classes)
        self.dropout = nn.Dropout(p=dropout)

    def forward(self, x: Tensor) -> Tensor:
        x = F.adaptive_avg_pool2d(x, (4, 4))
        x = self.conv(x)
        x = torch.flatten(x, 1)
        x = F.relu(self.fc1(x), inplace=True)
        x = self.dropout(x)
        return self.fc2(x)
