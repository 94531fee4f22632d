"""Stochastic depth: a residual branch dropped for whole images.

StochasticDepth mirrors torchvision's module and DropPath timm's. Both draw the same random numbers,
in training only: one Bernoulli variable an image, in the dtype of the branch. Huang et al. 2016,
arXiv:1603.09382.
"""

from __future__ import annotations

import torch
from torch import Tensor, nn


def stochastic_depth(x: Tensor, p: float, mode: str, training: bool = True) -> Tensor:
    """x with each image ("row") or the batch ("batch") zeroed with probability p, else / (1 - p).

    Raises:
        ValueError: p is not a probability, or there is no such mode.
    """
    if p < 0.0 or p > 1.0:
        raise ValueError(f"drop probability has to be between 0 and 1, but got {p}")
    if mode not in ("batch", "row"):
        raise ValueError(f"mode has to be either 'batch' or 'row', but got {mode}")
    if not training or p == 0.0:
        return x
    images = x.shape[0] if mode == "row" else 1
    noise = x.new_empty([images] + [1] * (x.ndim - 1)).bernoulli_(1.0 - p)
    if p < 1.0:
        noise.div_(1.0 - p)
    return x * noise


torch.fx.wrap("stochastic_depth")


class StochasticDepth(nn.Module):
    """Mirrors torchvision.ops.StochasticDepth."""

    def __init__(self, p: float, mode: str) -> None:
        super().__init__()
        self.p = p
        self.mode = mode

    def forward(self, x: Tensor) -> Tensor:
        return stochastic_depth(x, self.p, self.mode, self.training)

    def __repr__(self) -> str:
        return f"{type(self).__name__}(p={self.p}, mode={self.mode})"


class DropPath(nn.Module):
    """Mirrors timm.layers.DropPath."""

    def __init__(self, drop_prob: float = 0.0) -> None:
        super().__init__()
        self.drop_prob = drop_prob

    def forward(self, x: Tensor) -> Tensor:
        if self.drop_prob == 0.0 or not self.training:
            return x
        return stochastic_depth(x, self.drop_prob, "row")

    def extra_repr(self) -> str:
        return f"drop_prob={self.drop_prob:0.3f}"
