"""Whether anything has to see a call, or replaces the code that it would run.

Fusing skips the ``__call__`` of modules and the functions behind them. So hooks, tracers,
transforms and modes that watch these, and user code put in their place, forbid it.
"""

from __future__ import annotations

import sys
import types
from collections.abc import Callable, Sequence

import torch
import torch.nn.functional as F
from torch import Tensor, fx, nn
from torch._subclasses import FakeTensor, FakeTensorMode
from torch.nn.modules import module as torch_module
from torch.overrides import _get_current_function_mode_stack as function_modes
from torch.utils._device import DeviceContext
from torch.utils._python_dispatch import _get_current_dispatch_mode_stack as dispatch_modes

from cvkernels import backend, record

_CODE: tuple[tuple[object, tuple[str, ...]], ...] = (
    (nn.Module, ("__call__", "_call_impl")),
    (nn.Conv2d, ("forward", "_conv_forward")),
    (nn.BatchNorm2d, ("forward", "_check_input_dim")),
    (nn.SyncBatchNorm, ("forward", "_check_input_dim", "_check_non_zero_input_channels")),
    *(
        (kind, ("forward",))
        for kind in (
            nn.ReLU, nn.ReLU6, nn.SiLU, nn.Sigmoid, nn.Identity, nn.Sequential, nn.MaxPool2d,
            nn.AvgPool2d, nn.AdaptiveAvgPool2d,
        )
    ),
    (
        F,
        (
            "conv2d", "batch_norm", "relu", "hardtanh", "silu", "max_pool2d", "avg_pool2d",
            "adaptive_avg_pool2d",
        ),
    ),
    (torch, ("batch_norm", "cat", "sigmoid")),
)  # fmt: skip


def _genuine(code: object) -> object:
    """code, if it is PyTorch's own: it may have been replaced before this import."""
    home = getattr(code, "__module__", None) or ""
    genuine = isinstance(code, types.BuiltinFunctionType) or home.startswith("torch")
    return code if genuine else None


# (owner, name, PyTorch's own): what a fused op stands for.
STOCK_CODE = tuple(
    (owner, name, _genuine(getattr(owner, name))) for owner, names in _CODE for name in names
)
# What an instance may hold in place of its class's method, or of its own parameter or buffer.
METHODS = ("forward", "_conv_forward", "_check_input_dim", "_check_non_zero_input_channels")
SHADOWS = (*METHODS, "weight", "bias", "running_mean", "running_var", "num_batches_tracked")


def why_watched(x: Tensor) -> str:
    """Why modules must be called one by one for x, whatever they are; empty where they need not."""
    if isinstance(x, fx.Proxy):
        return "torch.fx is tracing"
    if not is_plain(x):
        return f"the input is a {type(x).__name__}"
    if has_global_hooks():
        return "a global module hook is registered"
    if torch.compiler.is_compiling():
        if torch.compiler.is_exporting():
            return "torch.export is tracing"
        return "inductor fuses it" if x.device.type == "cpu" else ""
    if torch.jit.is_tracing():
        return "torch.jit is tracing"
    if torch._C._functorch.peek_interpreter_stack() is not None:
        return "a torch.func transform is active"
    return why_mode() or why_replaced()


def why_mode() -> str:
    """The mode, other than PyTorch's own and ``explain``'s, that sees each function or operator."""
    if torch._C._len_torch_function_stack():
        for mode in function_modes():
            if not isinstance(mode, DeviceContext):
                return f"the mode {type(mode).__name__} sees each function"
    if torch._C._len_torch_dispatch_stack():
        recorder = record.active()
        for mode in dispatch_modes():
            explains = recorder is not None and getattr(mode, "recorder", None) is recorder
            if not explains and not isinstance(mode, FakeTensorMode):
                return f"the mode {type(mode).__name__} sees each operator"
    return ""


def why_replaced() -> str:
    """Which function or method of PyTorch's has been replaced; empty where none has."""
    for owner, name, stock in STOCK_CODE:
        if getattr(owner, name) is not stock:
            return f"{getattr(owner, '__name__', owner)}.{name} is replaced"
    return ""


def why_altered(*modules: nn.Module | None) -> str:
    """Why one of these must be called: it has a hook, or code or tensors of its own."""
    for module in modules:
        if module is None:
            continue
        if has_hooks(module):
            return f"{type(module).__name__} has a hook"
        attributes = module.__dict__
        for name in SHADOWS:
            if name in attributes:
                kind = type(module).__name__
                return (
                    f"{kind} has a {name} of its own"
                    if name in METHODS
                    else f"{name} of {kind} is no parameter or buffer"
                )
        for parameter in module._parameters.values():
            if parameter is not None and not is_plain(parameter):
                return f"a parameter is a {type(parameter).__name__}"
    return ""


def why_not_called(x: Tensor, *modules: nn.Module | None) -> str:
    """:func:`why_watched`, or :func:`why_altered`."""
    return why_watched(x) or why_altered(*modules)


def is_plain(tensor: Tensor) -> bool:
    """No subclass with a meaning of its own (DTensor, a quantised tensor, ...)."""
    return type(tensor) in (Tensor, nn.Parameter) or isinstance(tensor, FakeTensor)


def has_hooks(module: nn.Module) -> bool:
    return bool(
        module._forward_hooks
        or module._forward_pre_hooks
        or module._backward_hooks
        or module._backward_pre_hooks
    )


def hooks_of(module: nn.Module) -> list[Callable]:
    """The hooks on the module's call and on its gradients."""
    if not has_hooks(module):
        return []
    return [
        *module._forward_hooks.values(),
        *module._forward_pre_hooks.values(),
        *module._backward_hooks.values(),
        *module._backward_pre_hooks.values(),
    ]


def has_global_hooks() -> bool:
    """Hooks on every module's call, but for those that a running ``explain`` registers."""
    hooks = (
        *torch_module._global_backward_hooks.values(),
        *torch_module._global_backward_pre_hooks.values(),
        *torch_module._global_forward_hooks.values(),
        *torch_module._global_forward_pre_hooks.values(),
    )
    if not hooks:
        return False
    recorder = record.active()
    return recorder is None or not all(recorder.owns(hook) for hook in hooks)


def why_written_unseen(modules: Sequence[nn.Module]) -> str:
    """Why weights derived from these modules' tensors cannot be kept: others may write them."""
    for module in modules:
        for tensor in (*module._parameters.values(), *module._buffers.values()):
            if tensor is None:
                continue
            if tensor.is_inference():
                return "tensors of inference mode have no version"
            if tensor.is_cpu and tensor.is_shared():
                return "the weights lie in shared memory"
            if getattr(tensor, "_fsdp_flattened", False):
                return "FullyShardedDataParallel gathers the weights"
    sharded = _fully_sharded()
    if sharded and any(id(module) in sharded for module in modules):
        return "fully_shard gathers the weights"
    return ""


def _fully_sharded() -> set[int]:
    """The ids of all modules whose parameters ``fully_shard`` gathers into memory of its own."""
    fsdp = sys.modules.get("torch.distributed.fsdp")
    states = sys.modules.get("torch.distributed._composable_state")
    if fsdp is None or states is None:
        return set()
    roots = [m for m in list(states._module_state_mapping) if isinstance(m, fsdp.FSDPModule)]
    return {id(module) for root in roots for module in root.modules()}


def forbids_kept(x: Tensor) -> bool:
    """Whether the surroundings of a call on x forbid that a plan is kept of it or runs it."""
    return bool(
        not (x.is_cpu or x.is_cuda)
        or torch.is_grad_enabled()
        or torch.compiler.is_compiling()
        or torch.is_autocast_enabled(x.device.type)
        or record.current() is not None
        or backend.in_force() != "auto"
        or torch_module._global_forward_hooks
        or torch_module._global_forward_pre_hooks
        or torch_module._global_backward_hooks
        or torch_module._global_backward_pre_hooks
        or torch._C._functorch.peek_interpreter_stack() is not None
        or torch._C._get_tracing_state() is not None
        or torch._C._len_torch_function_stack()
        or torch._C._len_torch_dispatch_stack()
        or torch.autograd._profiler_enabled()
        or not torch._C._get_mkldnn_enabled()
    )
