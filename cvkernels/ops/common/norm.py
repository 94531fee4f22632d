"""Inference batch norm as the ops take it: its vectors, what it computes, and how it is folded."""

from __future__ import annotations

from typing import NamedTuple, TypeVar

import torch
import torch.nn.functional as F
from torch import Tensor, nn

# A norm's place in the schema of a registered op, and the arguments for none.
ARGUMENTS = "Tensor? weight, Tensor? bias, Tensor? mean, Tensor? var, float eps"
NO_VECTORS = (None, None, None, None, 0.0)
# Weights that are folded at once on the CPU.
FOLDED = 1 << 16


# Modules that normalise maps with running statistics as nn.BatchNorm2d does. In training the other
# takes those of several processes' batches.
BATCH_NORMS = (nn.BatchNorm2d, nn.SyncBatchNorm)


class BatchNormParams(NamedTuple):
    """Inference batch normalisation per channel: ``(x - mean) / sqrt(var + eps) * weight + bias``.

    Each vector is Tensor[C] or None, and one is a tensor. Without ``mean`` and ``var`` it is the
    affine map ``x * weight + bias``; give both or neither.
    """

    weight: Tensor | None = None
    bias: Tensor | None = None
    mean: Tensor | None = None
    var: Tensor | None = None
    eps: float = 1e-5

    @classmethod
    def of(cls, module: nn.BatchNorm2d | nn.SyncBatchNorm) -> BatchNormParams:
        """The live parameters and running statistics of an inference-mode ``nn.BatchNorm2d``.

        Raises:
            TypeError: module is not exactly nn.BatchNorm2d or nn.SyncBatchNorm: a subclass may
                compute something else.
            ValueError: module normalises with batch statistics (it trains, or tracks none).
        """
        if type(module) not in BATCH_NORMS:
            raise TypeError(
                f"BatchNormParams.of: module must be exactly nn.BatchNorm2d or nn.SyncBatchNorm, "
                f"got {type(module).__name__}; run it as a module of its own"
            )
        if module.training or module.running_mean is None:
            raise ValueError(
                "BatchNormParams.of: module uses batch statistics; call module.eval(), and build "
                "it with track_running_stats=True"
            )
        return cls(module.weight, module.bias, module.running_mean, module.running_var, module.eps)


def accumulator(dtype: torch.dtype) -> torch.dtype:
    """What sums of elements of ``dtype`` are in."""
    return torch.float64 if dtype == torch.float64 else torch.float32


OptionalNorm = TypeVar("OptionalNorm", BatchNormParams, BatchNormParams | None)


def vectors_of(bn: OptionalNorm, x: Tensor) -> OptionalNorm:
    """bn with vectors of one dtype, x's or the one that x is computed in, contiguous."""
    if bn is None:
        return bn
    kinds = {vector.dtype for vector in bn[:4] if vector is not None}
    kind = x.dtype if kinds == {x.dtype} else accumulator(x.dtype)
    weight, bias, mean, var = (v if v is None else v.to(kind).contiguous() for v in bn[:4])
    return BatchNormParams(weight, bias, mean, var, bn.eps)


def sources_of(weight: Tensor, bias: Tensor | None, bn: BatchNormParams | None) -> list:
    """The tensors that a convolution's folded weights are made from."""
    return [weight, bias, *(() if bn is None else bn[:4])]


def normalize(x: Tensor, bn: BatchNormParams) -> Tensor:
    bn = vectors_of(bn, x)  # PyTorch's batch norm takes no others
    if bn.mean is not None:
        return F.batch_norm(x, bn.mean, bn.var, bn.weight, bn.bias, training=False, eps=bn.eps)
    y = x
    if bn.weight is not None:
        y = y * bn.weight[:, None, None]
    if bn.bias is not None:
        y = y + bn.bias[:, None, None]
    return y.to(x.dtype)


def scale_shift(
    bias: Tensor | None, bn: BatchNormParams | None, like: Tensor, dtype: torch.dtype
) -> tuple[Tensor, Tensor]:
    """``conv * scale + shift`` for a convolution with this bias and batch norm, in ``dtype``."""
    K = like.shape[0]
    one = torch.ones(K, dtype=dtype, device=like.device)
    scale, shift = one, torch.zeros_like(one)
    if bn is not None:
        scale = one if bn.weight is None else bn.weight.to(dtype)
        if bn.var is not None:
            scale = scale * torch.rsqrt(bn.var.to(dtype) + bn.eps)
        if bn.mean is not None:
            shift = -bn.mean.to(dtype) * scale
        if bn.bias is not None:
            shift = shift + bn.bias.to(dtype)
    if bias is not None:
        shift = shift + bias.to(dtype) * scale
    return scale, shift


def fold(
    weight: Tensor, bias: Tensor | None, bn: BatchNormParams | None,
    dtype: torch.dtype | None = None,
) -> tuple[Tensor, Tensor]:  # fmt: skip
    """Weight and bias of the one convolution that equals conv + batch norm; computed in float64.

    Returns them in ``dtype``, weight's if None, weight's memory format kept, bias contiguous.
    Without a norm they may be the arguments themselves.
    """
    dtype = dtype or weight.dtype
    with torch.no_grad():
        if bn is None:
            shift = weight.new_zeros(weight.shape[0]) if bias is None else bias.detach()
            return weight.detach().to(dtype), shift.to(dtype).contiguous()
        scale, shift = scale_shift(bias, bn, weight, torch.float64)
        scale = scale.view(-1, 1, 1, 1)
        folded = torch.empty_like(weight, dtype=dtype)
        # By parts that stay in the cache: on the CPU fresh memory costs more than the products.
        rows = max(1, FOLDED // max(1, weight[:1].numel())) if weight.is_cpu else weight.shape[0]
        for start in range(0, weight.shape[0], rows):
            part = slice(start, start + rows)
            folded[part] = weight[part].double() * scale[part]
        return folded, shift.to(dtype)
