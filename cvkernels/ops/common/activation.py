"""The activations that the ops apply to their output: their names, codes and plain PyTorch."""

from __future__ import annotations

import torch.nn.functional as F
from torch import Tensor

# In the order of the enum in csrc: the place of a name is its code.
ACTIVATIONS = ("none", "relu", "relu6", "silu")
code = ACTIVATIONS.index


def activate(x: Tensor, act: str) -> Tensor:
    if act == "relu":
        return F.relu(x)
    if act == "relu6":
        return F.relu6(x)
    if act == "silu":
        return F.silu(x)
    return x
