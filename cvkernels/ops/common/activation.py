"""The activations that the ops apply to their output: their names, codes and plain PyTorch."""

from __future__ import annotations

import torch
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


def activation_backward(grad: Tensor, act: str, out: Tensor | None, z: Tensor | None) -> Tensor:
    """The gradient in z of ``out = activate(z, act)``; relu and relu6 need out, and silu z."""
    if act == "relu":
        return torch.ops.aten.threshold_backward(grad, out, 0)
    if act == "relu6":
        return torch.ops.aten.hardtanh_backward(grad, out, 0.0, 6.0)
    if act == "silu":
        assert z is not None
        s = torch.sigmoid(z)
        return grad * (s * (1 + z * (1 - s)))
    return grad
