"""What conv_bn_act computes, in plain PyTorch: the specification, and the fallback everywhere."""

from __future__ import annotations

from typing import NamedTuple

import torch.nn.functional as F
from torch import Tensor, nn


class BatchNormParams(NamedTuple):
    """Inference batch normalisation per channel: ``(x - mean) / sqrt(var + eps) * weight + bias``.

    Each vector is Tensor[C] or None. Without ``mean`` and ``var`` it is the affine map
    ``x * weight + bias``; give both or neither.
    """

    weight: Tensor | None = None
    bias: Tensor | None = None
    mean: Tensor | None = None
    var: Tensor | None = None
    eps: float = 1e-5

    @classmethod
    def of(cls, module: nn.BatchNorm2d) -> BatchNormParams:
        """The live parameters and running statistics of an inference-mode ``nn.BatchNorm2d``.

        Raises:
            TypeError: module is not exactly nn.BatchNorm2d: a subclass may compute something else.
            ValueError: module normalises with batch statistics (it trains, or tracks none).
        """
        if type(module) is not nn.BatchNorm2d:
            raise TypeError(
                f"BatchNormParams.of: module must be exactly nn.BatchNorm2d, got "
                f"{type(module).__name__}; run it as a module of its own"
            )
        if module.training or module.running_mean is None:
            raise ValueError(
                "BatchNormParams.of: module uses batch statistics; call module.eval(), and build "
                "it with track_running_stats=True"
            )
        return cls(module.weight, module.bias, module.running_mean, module.running_var, module.eps)


def normalize(x: Tensor, bn: BatchNormParams) -> Tensor:
    if bn.mean is not None:
        return F.batch_norm(x, bn.mean, bn.var, bn.weight, bn.bias, training=False, eps=bn.eps)
    y = x
    if bn.weight is not None:
        y = y * bn.weight[:, None, None]
    if bn.bias is not None:
        y = y + bn.bias[:, None, None]
    return y.to(x.dtype)


def activate(x: Tensor, act: str) -> Tensor:
    if act == "relu":
        return F.relu(x)
    if act == "relu6":
        return F.relu6(x)
    if act == "silu":
        return F.silu(x)
    return x


def conv_bn_act_reference(
    x: Tensor,
    weight: Tensor,
    bias: Tensor | None = None,
    bn: BatchNormParams | None = None,
    *,
    stride: int | tuple[int, int] = 1,
    padding: int | tuple[int, int] = 0,
    dilation: int | tuple[int, int] = 1,
    groups: int = 1,
    act: str = "relu",
    residual: Tensor | None = None,
    input_bn: BatchNormParams | None = None,
    input_gate: Tensor | None = None,
) -> Tensor:
    if input_bn is not None:
        x = F.relu(normalize(x, input_bn))
    if input_gate is not None:
        x = x * input_gate[:, :, None, None]
    y = F.conv2d(x, weight, bias, stride, padding, dilation, groups)
    if bn is not None:
        y = normalize(y, bn)
    if residual is not None:
        y = y + residual
    return activate(y, act)
