"""When a few modules may run as one op: exactly what the op computes, and nothing watches them.

Each ``why_not_`` function gives the reason to call the modules one by one, empty where there is
none.
"""

from __future__ import annotations

from collections.abc import Callable

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from cvkernels.nn.fused.watched import has_hooks, why_altered, why_not_called
from cvkernels.ops.common.autograd import operand_dtype
from cvkernels.ops.common.norm import BATCH_NORMS
from cvkernels.ops.common.pool import checked, window_of
from cvkernels.ops.conv_bn_act.op import supports_prologue_and_slices
from cvkernels.ops.depthwise_conv_bn_act.op import runs_fused


def relu_(x: Tensor) -> Tensor:
    """The activation of the stock blocks that call a function and have no module for it."""
    return F.relu(x, inplace=True)


ACTIVATIONS: dict[type[nn.Module] | Callable[[Tensor], Tensor], str] = {
    nn.ReLU: "relu",
    nn.ReLU6: "relu6",
    nn.SiLU: "silu",
    relu_: "relu",
}

_NORM_ACTS = ("BatchNormAct2d", "SyncBatchNormAct")


def _kind(act: nn.Module | Callable) -> type[nn.Module] | Callable:
    """What ``ACTIVATIONS`` knows act by."""
    return type(act) if isinstance(act, nn.Module) else act


def act_name(act: nn.Module | Callable | None) -> str:
    """What the ops call act."""
    return "none" if act is None else ACTIVATIONS[_kind(act)]


def runs_depthwise(x: Tensor, conv: nn.Conv2d) -> bool:
    """Whether conv is depthwise and has kernels of its own for x; else conv_bn_act takes it."""
    if conv.groups == 1 or conv.weight.shape[:2] != (conv.groups, 1):
        return False
    return runs_fused(x, conv.kernel_size, conv.stride, conv.dilation)


def fused_act(
    bn: nn.Module | None, act: nn.Module | Callable | None = None, residual: Tensor | None = None
) -> tuple[nn.Module | Callable | None, str]:
    """The activation behind bn, which may carry it inside, and why its place forbids fusing."""
    if type(bn) in BATCH_NORMS or not is_norm_act(bn) or type(bn.act) is nn.Identity:
        return act, ""
    if act is not None:
        return act, "an activation follows a norm that has one inside"
    return bn.act, "" if residual is None else "the activation stands before the shortcut"


def is_norm_act(bn: nn.Module | None) -> bool:
    """Whether bn is timm's norm with an activation inside, with the forward that timm gave it."""
    kind = type(bn)
    if kind.__name__ not in _NORM_ACTS or kind.__module__ != "timm.layers.norm_act":
        return False
    return kind.forward.__module__ == kind.__module__


def why_not_layer(conv: nn.Module, bn: nn.Module | None, act: nn.Module | Callable | None) -> str:
    """Why the modules are not what conv_bn_act computes; empty where they are."""
    if type(conv) is not nn.Conv2d:
        return f"{type(conv).__name__} is not exactly nn.Conv2d"
    if bn is not None and (reason := why_not_affine(bn)):
        return reason
    if act is not None and _kind(act) not in ACTIVATIONS:
        return f"{type(act).__name__} is not one of the fused activations"
    if conv.padding_mode != "zeros" or isinstance(conv.padding, str):
        return f"padding={conv.padding!r} with padding_mode={conv.padding_mode!r} is not fused"
    return why_altered(conv, bn, act if isinstance(act, nn.Module) else None)


def why_not_input_bn(x: Tensor, norm: nn.Module, relu: nn.Module | None, groups: int) -> str:
    """Why norm and relu have to be called first; empty where they are the op's prologue."""
    if reason := why_not_norm_relu(norm, relu):
        return reason
    return (
        ""
        if supports_prologue_and_slices(x, groups)
        else "no backend here normalises a convolution's input"
    )


def why_not_norm_relu(norm: nn.Module, relu: nn.Module | None) -> str:
    """Why norm and relu are no multiply-add and ReLU that an op can do to its input."""
    if reason := why_not_affine(norm):
        return reason
    if relu is None and is_norm_act(norm):
        relu = norm.act
    if type(relu) is not nn.ReLU:
        return f"{type(relu).__name__} is not exactly nn.ReLU"
    return why_altered(norm, relu)


def why_not_same_map(module: nn.Conv2d | nn.MaxPool2d) -> str:
    """Why the output's height and width are not the input's."""
    options = (module.kernel_size, module.stride, module.padding, module.dilation)
    pairs = [(value, value) if isinstance(value, int) else value for value in options]
    if all(s == 1 and 2 * p == d * (k - 1) for k, s, p, d in zip(*pairs, strict=True)):
        return ""
    return f"{type(module).__name__} changes the map's size"


def why_not_in_place(x: Tensor, module: nn.Module) -> str:
    """Why module's parts cannot write their outputs into one buffer of x's dtype."""
    if reason := why_not_called(x, module):
        return reason
    if torch.compiler.is_compiling():
        return "torch.compile plans the memory"
    if torch.is_grad_enabled() and (x.requires_grad or _may_require_grad(module)):
        return "a gradient is needed"
    if x.dim() != 4 or not x.numel():
        return "the input is empty or not [N, C, H, W]"
    if (dtype := operand_dtype(x)) != x.dtype:
        return f"autocast computes in {dtype}, the input is {x.dtype}"
    return ""


def _may_require_grad(module: nn.Module) -> bool:
    """Whether a parameter requires a gradient; those of DataParallel's replicas are not listed."""
    if getattr(module, "_is_replica", False):
        return True
    return any(parameter.requires_grad for parameter in module.parameters())


def why_not_affine(bn: nn.Module) -> str:
    """Why bn is no scale and shift per channel; empty where it is, but for its activation."""
    if reason := why_not_batch_norm(bn):
        return reason
    if bn.training or bn.running_mean is None:
        return "batch norm normalises with batch statistics"
    return ""


def why_not_batch_norm(bn: nn.Module) -> str:
    """Why bn, but for its activation and mode, is no batch norm; empty where it is."""
    if type(bn) in BATCH_NORMS:
        return ""
    if not is_norm_act(bn):
        return f"{type(bn).__name__} is not exactly nn.BatchNorm2d"
    if type(bn.drop) is not nn.Identity or has_hooks(bn.drop) or has_hooks(bn.act):
        return f"{type(bn).__name__} drops something, or a part of it has a hook"
    return ""


def why_not_max_pool(x: Tensor, pool: nn.Module) -> str:
    """Why the pool has to be called as a module; empty where max_pool computes the same."""
    if type(pool) is not nn.MaxPool2d:
        return f"{type(pool).__name__} is not exactly nn.MaxPool2d"
    reason = why_not_called(x, pool)
    if not reason and (pool.return_indices or x.dim() != 4):
        reason = "max_pool takes [N, C, H, W] and returns no indices"
    return reason


def pooled_shape(x: Tensor, pool: nn.MaxPool2d | nn.AvgPool2d) -> tuple[int, int, int, int]:
    """The shape of ``pool(x)``."""
    dilation = getattr(pool, "dilation", 1)
    window = window_of(
        "pool", pool.kernel_size, pool.stride, pool.padding, dilation, pool.ceil_mode
    )
    return (*x.shape[:2], *checked("pool", x, window, None))
