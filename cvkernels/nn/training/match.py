"""When a few modules may be trained as one function of ours, on the batch's statistics.

As in :mod:`cvkernels.nn.fused.match`, each function gives the reason to call the modules one by
one, empty where there is none. :func:`why_not_train` is about the call, the others about modules:
what watches the call has been asked.
"""

from __future__ import annotations

from collections.abc import Callable

import torch
from torch import Tensor, nn
from torch._subclasses import FakeTensor

from cvkernels import backend
from cvkernels.nn.fused.match import (
    fused_act,
    relu_,
    why_not_batch_norm,
    why_not_layer,
    why_not_same_map,
)
from cvkernels.nn.fused.watched import why_altered, why_not_called
from cvkernels.nn.training.batch_norm import group_of
from cvkernels.ops.common.autograd import operand_dtype
from cvkernels.ops.common.convolution import output_size
from cvkernels.ops.common.pool import DTYPES

_ACTS = (nn.ReLU, nn.SiLU, relu_)
_PARAMETERS = {"weight", "bias"}


def why_not_train(x: Tensor, norm: nn.Module) -> str:
    """Why a training pass over a few modules, with norms of norm's kind, cannot be one autograd
    function of x's dtype."""
    if reason := why_not_called(x) or why_not_autograd_function():
        return reason
    alone = group_of(norm) is None  # else other processes may have the pixels that lack here
    if x.dim() != 4 or (alone and x.numel() <= x.shape[1]) or x.dtype not in DTYPES:
        return f"the input is {x.dtype} of shape {list(x.shape)}, not a batch of float maps"
    if (dtype := operand_dtype(x)) != x.dtype:
        return f"autocast computes in {dtype}, the input is {x.dtype}"
    return ""


def why_not_one_group(*norms: nn.Module) -> str:
    """Why norms do not take their statistics over the batches of the same processes."""
    groups = [group_of(norm) for norm in norms]
    return "" if all(group is groups[0] for group in groups) else "norms of several process groups"


def why_not_recompute(x: Tensor) -> str:
    """Why autograd, or a tracer, has to see the single operations on x."""
    if not torch.is_grad_enabled():
        return "no gradient is needed"
    if isinstance(x, FakeTensor) or x.layout is not torch.strided:
        return f"the input is a {type(x).__name__} of layout {x.layout}"
    return why_not_autograd_function()


def why_not_autograd_function() -> str:
    """Why an autograd function, which is differentiable in reverse alone, will not do."""
    if torch.compiler.is_compiling():
        return "torch.compile plans the memory"
    if backend.requested("auto", ()) == "reference":
        return "the reference is requested"
    if torch._C._functorch.peek_interpreter_stack() is not None:
        return "a torch.func transform is active"
    if torch.autograd.forward_ad._current_level >= 0:
        return "forward-mode differentiation is active"
    return ""


def why_not_train_norm_relu(
    x: Tensor, channels: int, norm: nn.Module, relu: nn.Module | None
) -> str:
    """Why norm and relu do not normalise ``channels`` channels with the batch's statistics."""
    if reason := _why_not_train_norm(x, channels, norm):
        return reason
    relu, clash = fused_act(norm, relu)
    if clash or type(relu) is not nn.ReLU:
        return clash or f"{type(relu).__name__} is not exactly nn.ReLU"
    return why_altered(norm, relu)


def why_not_train_conv(x: Tensor, channels: int, conv: nn.Module) -> str:
    """Why conv does not convolve ``channels`` channels of x's dtype, to a map of x's size."""
    if reason := why_not_layer(conv, None, None) or why_not_same_map(conv):
        return reason
    inputs = conv.weight.shape[1] * conv.groups
    if inputs != channels:
        return f"the convolution has {inputs} input channels for {channels}"
    return _why_not_operand(x, conv.weight)


def why_not_train_conv_bn_act(
    x: Tensor, conv: nn.Module, bn: nn.Module | None, act: nn.Module | Callable | None,
    residual: Tensor | None = None,
) -> str:  # fmt: skip
    """Why :func:`.conv_bn_act.conv_bn_act` does not train these modules as they train."""
    if bn is None or not torch.is_grad_enabled():
        return "nothing is trained"
    if reason := _why_not_batch_statistics(bn):
        return reason
    kind = type(act) if isinstance(act, nn.Module) else act
    if act is not None and kind not in _ACTS:
        return f"{type(act).__name__} is not exactly nn.ReLU or nn.SiLU"
    reason = why_not_layer(conv, None, act) or why_altered(bn)
    if reason := reason or _why_not_train_norm(x, conv.weight.shape[0], bn) or why_not_recompute(x):
        return reason
    if any(module._parameters.keys() != _PARAMETERS for module in (conv, bn)):
        return "the modules' parameters are not exactly weight and bias"  # as in a replica
    geometry = (conv.kernel_size, conv.stride, conv.padding, conv.dilation)
    if any(type(option) is not tuple for option in geometry):
        return "the convolution's geometry is not given in pairs"
    parameters = (x, residual, *conv._parameters.values(), *bn._parameters.values())
    if not any(t is not None and t.requires_grad for t in parameters):
        return "no gradient is needed"
    if reason := _why_not_operand(x, conv._parameters["weight"]):
        return reason
    if x.dim() != 4 or x.shape[1] != conv.weight.shape[1] * conv.groups:
        return f"the input has shape {list(x.shape)}, the weight {list(conv.weight.shape)}"
    sizes = output_size(x.shape[2:], *geometry)
    shape = (x.shape[0], conv.weight.shape[0], *(max(0, size) for size in sizes))
    if shape[0] * shape[2] * shape[3] < 2 and group_of(bn) is None:
        return "there is at most one value per channel behind the convolution"
    if residual is None:
        return ""
    if kind is nn.SiLU:
        return "SiLU stands behind the shortcut"
    if type(residual) is not Tensor or residual.layout is not torch.strided:
        return f"the shortcut is a {type(residual).__name__} of layout {residual.layout}"
    if (residual.shape, residual.dtype, residual.device) != (shape, operand_dtype(x), x.device):
        return f"the shortcut is {residual.dtype} of shape {list(residual.shape)}"
    return ""


def _why_not_batch_statistics(norm: nn.Module) -> str:
    if not norm.training and getattr(norm, "running_mean", None) is not None:
        return "batch norm normalises with running statistics"
    return ""


def _why_not_train_norm(x: Tensor, channels: int, norm: nn.Module) -> str:
    """Why norm, but for its activation, does not normalise ``channels`` channels with the batch's
    statistics."""
    if reason := why_not_batch_norm(norm) or _why_not_batch_statistics(norm):
        return reason
    wide = torch.promote_types(x.dtype, torch.float32)
    statistics = (norm._buffers.get("running_mean"), norm._buffers.get("running_var"))
    for vector in (*norm._parameters.values(), *statistics):
        if vector is None:
            continue
        if vector.device != x.device or vector.dtype not in (x.dtype, wide):
            return f"a vector of batch norm is {vector.dtype} on {vector.device}"
        if not vector.is_contiguous():
            return f"a vector of batch norm has strides {vector.stride()}"
        if len(vector) != channels:
            return f"batch norm has {len(vector)} channels for {channels}"
    return ""


def _why_not_operand(x: Tensor, weight: Tensor) -> str:
    """Why a convolution of x with weight has no dtype and device for both."""
    if weight.device != x.device:
        return f"the convolution is on {weight.device}"
    dtype = operand_dtype(x)
    if dtype not in DTYPES or dtype != operand_dtype(weight):
        return f"the input is {x.dtype} and the weight {weight.dtype}"
    return ""
