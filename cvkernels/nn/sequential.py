"""FusedSequential: nn.Sequential, with what its children compute together run as one op."""

from __future__ import annotations

from torch import Tensor, nn
from torch.nn.modules.batchnorm import _BatchNorm

from cvkernels.nn.fusion import ACTIVATIONS, FusedModule

ACTIVATION_MODULES = tuple(kind for kind in ACTIVATIONS if isinstance(kind, type))


class FusedSequential(nn.Sequential, FusedModule):
    """nn.Sequential that fuses its neighbours; names, order, slicing and iteration are the same.

    A convolution runs with the norm and activation that follow it and, where a kernel can, with the
    norm and ReLU before it; a max pool runs without indices. All other children are called.
    """

    def forward(self, x: Tensor) -> Tensor:
        layers = list(self)
        while layers:
            first = layers.pop(0)
            if isinstance(first, _BatchNorm) and _next_are(layers, nn.ReLU, nn.Conv2d):
                relu, conv = layers.pop(0), layers.pop(0)
                x = self.fused(x, conv, *_norm_and_act(layers), input_bn=(first, relu))
            elif isinstance(first, _BatchNorm) and _next_are(layers, nn.Conv2d):
                conv = layers.pop(0)
                x = self.fused(x, conv, *_norm_and_act(layers), input_bn=(first, None))
            elif isinstance(first, nn.Conv2d):
                x = self.fused(x, first, *_norm_and_act(layers))
            elif isinstance(first, nn.MaxPool2d):
                x = self.pooled(x, first)
            else:
                x = first(x)
        return x


def _norm_and_act(layers: list[nn.Module]) -> tuple[nn.Module | None, nn.Module | None]:
    """Take the norm and the activation that layers begin with, where they do."""
    norm = layers.pop(0) if _next_are(layers, _BatchNorm) else None
    act = layers.pop(0) if _next_are(layers, ACTIVATION_MODULES) else None
    return norm, act


def _next_are(layers: list[nn.Module], *kinds: type | tuple[type, ...]) -> bool:
    return len(layers) >= len(kinds) and all(map(isinstance, layers, kinds))
