"""When a convolution, its norm and its activation are trained as one function."""

from __future__ import annotations

from collections.abc import Callable

import torch
from torch import Tensor, nn

from cvkernels.nn.fused.match import (
    TRAINED,
    autocast_dtype,
    relu_,
    why_not_batch_norm,
    why_not_called,
)
from cvkernels.nn.training.recompute import why_not_saved_less

_ACTS = (nn.ReLU, nn.SiLU, relu_)
_PARAMETERS = {"weight", "bias"}


def why_not_trained(
    x: Tensor,
    conv: nn.Module,
    bn: nn.Module | None,
    act: nn.Module | Callable | None,
    residual: Tensor | None = None,
) -> str:
    """Why the modules have to be called; empty where :func:`conv_bn_act` trains the same."""
    if bn is None or not torch.is_grad_enabled():
        return "nothing is trained"
    if not bn.training and getattr(bn, "running_mean", None) is not None:
        return "batch norm normalises with running statistics"
    if type(conv) is not nn.Conv2d:
        return f"{type(conv).__name__} is not exactly nn.Conv2d"
    kind = type(act) if isinstance(act, nn.Module) else act
    if act is not None and kind not in _ACTS:
        return f"{type(act).__name__} is not exactly nn.ReLU or nn.SiLU"
    if conv.padding_mode != "zeros" or isinstance(conv.padding, str):
        return f"padding={conv.padding!r} with padding_mode={conv.padding_mode!r} is not fused"
    if reason := why_not_called(x, conv, bn, act if isinstance(act, nn.Module) else None):
        return reason
    if reason := why_not_batch_norm(x, conv.out_channels, bn) or why_not_saved_less(x):
        return reason
    if any(module._parameters.keys() != _PARAMETERS for module in (conv, bn)):
        return "the modules' parameters are not exactly weight and bias"  # as in a replica
    if any(type(option) is not tuple for option in _geometry(conv)):
        return "the convolution's geometry is not given in pairs"
    weight = conv._parameters["weight"]  # an attribute of a module costs ten times as much
    parameters = (x, residual, *conv._parameters.values(), *bn._parameters.values())
    if not any(t is not None and t.requires_grad for t in parameters):
        return "no gradient is needed"
    if weight.device != x.device:
        return f"the convolution is on {weight.device}"
    cast = autocast_dtype(x)
    dtype = operand_dtype(x, cast)
    if dtype not in TRAINED or dtype != operand_dtype(weight, cast):
        return f"the input is {x.dtype} and the weight {weight.dtype}"
    if x.dim() != 4:
        return f"the input has shape {list(x.shape)}, not [N, C, H, W]"
    shape = _shape_behind(x, conv)
    if shape[0] * shape[2] * shape[3] < 2:
        return "there is at most one value per channel behind the convolution"
    return "" if residual is None else _why_not_added(residual, kind, x, shape, dtype)


def _why_not_added(
    residual: Tensor, act: type | Callable | None, x: Tensor, shape: tuple, dtype: torch.dtype
) -> str:
    if act is nn.SiLU:
        return "SiLU stands behind the shortcut"
    if type(residual) is not Tensor or residual.layout is not torch.strided:
        return f"the shortcut is a {type(residual).__name__} of layout {residual.layout}"
    if (residual.shape, residual.dtype, residual.device) != (shape, dtype, x.device):
        return f"the shortcut is {residual.dtype} of shape {list(residual.shape)}"
    return ""


def _shape_behind(x: Tensor, conv: nn.Conv2d) -> tuple[int, int, int, int]:
    """Of conv(x); height and width are at most 0 where it does not fit."""
    sizes = (
        max(0, (size + 2 * padding - dilation * (kernel - 1) - 1) // stride + 1)
        for size, kernel, stride, padding, dilation in zip(
            x.shape[2:], *_geometry(conv), strict=True
        )
    )
    return (x.shape[0], conv.out_channels, *sizes)


def _geometry(conv: nn.Conv2d) -> tuple:
    return conv.kernel_size, conv.stride, conv.padding, conv.dilation


def operand_dtype(x: Tensor, cast: torch.dtype | None) -> torch.dtype:
    """What a convolution takes x in where autocast casts to ``cast``: it leaves float64 alone."""
    return x.dtype if cast is None or x.dtype == torch.float64 else cast
