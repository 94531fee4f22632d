"""The global pool before a classifier; mirrors timm.layers.SelectAdaptivePool2d."""

from __future__ import annotations

import torch
from torch import Tensor, nn
from torch.nn import functional as F


class _AverageAndMax(nn.Module):
    """Half the sum of the average and the maximum, or ("catavgmax") the two side by side."""

    def __init__(self, concatenate: bool) -> None:
        super().__init__()
        self.concatenate = concatenate

    def forward(self, x: Tensor) -> Tensor:
        average, largest = F.adaptive_avg_pool2d(x, 1), F.adaptive_max_pool2d(x, 1)
        if self.concatenate:
            return torch.cat((average, largest), 1)
        return 0.5 * (average + largest)


class GlobalPool(nn.Module):
    """``pool`` over H and W, then ``flatten`` to [N, C]; the empty pool type does neither.

    Args:
        pool_type: "avg", "max", "avgmax" (half their sum), "catavgmax" (2C channels) or "".

    Raises:
        ValueError: there is no such pool type.
    """

    def __init__(self, pool_type: str = "avg") -> None:
        super().__init__()
        self.pool_type = pool_type or ""
        if self.pool_type == "":
            self.pool = nn.Identity()
        elif self.pool_type == "avg":
            self.pool = nn.AdaptiveAvgPool2d(1)
        elif self.pool_type == "max":
            self.pool = nn.AdaptiveMaxPool2d(1)
        elif self.pool_type in ("avgmax", "catavgmax"):
            self.pool = _AverageAndMax(self.pool_type == "catavgmax")
        else:
            raise ValueError(
                f"global_pool must be 'avg', 'max', 'avgmax', 'catavgmax' or '' (no pooling), "
                f"got {pool_type!r}"
            )
        self.flatten = nn.Flatten(1) if self.pool_type else nn.Identity()

    def feat_mult(self) -> int:
        """How many outputs a channel has."""
        return 2 if self.pool_type == "catavgmax" else 1

    def forward(self, x: Tensor) -> Tensor:
        return self.flatten(self.pool(x))

    def __repr__(self) -> str:
        return f"{type(self).__name__}(pool_type={self.pool_type!r}, flatten={self.flatten})"
