"""How a block runs a few of its submodules as one op, and when it must call them instead.

A block names the modules it would like to run together: ``self.fused(x, self.conv1, self.bn1,
self.relu)``. Where they are exactly what the op computes and nobody watches them, the op runs on
their parameters; otherwise the modules are called one by one, which is the stock forward.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import NamedTuple

import torch
import torch.nn.functional as F
from torch import Tensor, fx, nn
from torch._subclasses import FakeTensor
from torch.nn.modules import module as torch_module

from cvkernels import record
from cvkernels.functional import BatchNormParams, DerivedWeights, conv_bn_act, max_pool
from cvkernels.nn.recall import Recall
from cvkernels.ops.conv_bn_act.op import fuses_input_bn
from cvkernels.ops.conv_bn_act.prepared import Run, prepared
from cvkernels.ops.pool import checked, window_of


def relu_(x: Tensor) -> Tensor:
    """The activation of the stock blocks that call a function and have no module for it."""
    return F.relu(x, inplace=True)


ACTIVATIONS: dict[type[nn.Module] | Callable[[Tensor], Tensor], str] = {
    nn.ReLU: "relu",
    nn.ReLU6: "relu6",
    nn.SiLU: "silu",
    relu_: "relu",
}


class _Derived(NamedTuple):
    """What a block keeps beside one of its convolutions."""

    weights: DerivedWeights
    recall: Recall


class FusedModule(nn.Module):
    """Base of the blocks: keeps the weights that backends derive from the block's convolutions.

    They are no part of the block: not in ``state_dict``, never pickled or copied, and dropped by
    ``train()``, ``load_state_dict``, ``.to()`` and the like. Writing a parameter through ``.data``
    while in eval is the one change that goes unseen; ``block.train().eval()`` drops them.
    """

    def fused(
        self,
        x: Tensor,
        conv: nn.Module,
        bn: nn.Module | None = None,
        act: nn.Module | Callable[[Tensor], Tensor] | None = None,
        residual: Tensor | None = None,
        input_bn: tuple[nn.Module, nn.Module | None] | None = None,
        out: Tensor | None = None,
    ) -> Tensor:
        """``act(bn(conv(u)) + residual)``, as one op where the modules allow it.

        ``u`` is x, or ``relu(norm(x))`` for ``input_bn=(norm, relu)``. These two are called before
        the rest where no kernel has them as a prologue, so that the rest is fused all the same.
        ``act`` is a module, or :func:`relu_`. A norm may be timm's BatchNormAct2d, whose activation
        is inside it; there ``act`` and ``relu`` are None. ``out``, a channel slice of a
        channels_last buffer, is written and returned, where no gradient is needed.
        """
        if input_bn is not None and (reason := why_not_input_bn(x, *input_bn)):
            x = run_group(input_bn[0], reason, None, lambda u=x: _normalised(u, *input_bn))
            input_bn = None
        derived = self._derived_from(conv)
        recall = None
        if derived is not None and input_bn is None and type(x) is Tensor and x.is_cpu:
            recall = derived.recall
            if (run := recall.get(x, conv, bn, act, residual)) is not None:
                y = run(x, residual)
                return y if out is None else out.copy_(y)
        fused_act, clash = _fused_act(bn, act, residual)

        def as_modules() -> Tensor:
            y = conv(x if input_bn is None else _normalised(x, *input_bn))
            if bn is not None:
                y = bn(y)
            if residual is not None:
                y += residual
            y = y if act is None else act(y)
            return y if out is None else out.copy_(y)

        def as_op() -> Tensor:
            tensors, (stride, padding, dilation, groups), name = _operands(x, conv, bn, fused_act)
            return conv_bn_act(
                *tensors,
                stride=stride,
                padding=padding,
                dilation=dilation,
                groups=groups,
                act=name,
                residual=residual,
                input_bn=None if input_bn is None else affine_of(input_bn[0]),
                out=out,
                cache=None if derived is None else derived.weights,
            )

        reason = clash or why_not_conv_bn_act(x, conv, bn, fused_act)
        y = run_group(conv, reason, as_op, as_modules)
        if recall is not None and not reason:

            def prepare() -> Run | None:
                tensors, geometry, name = _operands(x, conv, bn, fused_act)
                return prepared(*tensors, geometry, name, residual, derived.weights)

            recall.keep(x, conv, bn, act, residual, prepare)
        return y

    def prepared(
        self,
        x: Tensor,
        conv: nn.Module,
        bn: nn.Module | None = None,
        act: nn.Module | Callable[[Tensor], Tensor] | None = None,
    ) -> Run | None:
        """What runs :meth:`fused` on others like x, unchecked, while the modules stay as they are.

        For modules that :func:`why_not_conv_bn_act` has nothing against. None where the call needs
        what only :meth:`fused` does.
        """
        fused_act, clash = _fused_act(bn, act, None)
        derived = self._derived_from(conv)
        if clash or derived is None:
            return None
        tensors, geometry, name = _operands(x, conv, bn, fused_act)
        return prepared(*tensors, geometry, name, None, derived.weights)

    def pooled(self, x: Tensor, pool: nn.Module, out: Tensor | None = None) -> Tensor:
        """``pool(x)``, without indices where it is exactly a max pool and nobody watches it.

        ``out`` is written and returned, where no gradient is needed.
        """

        def as_op() -> Tensor:
            window = (pool.kernel_size, pool.stride, pool.padding, pool.dilation, pool.ceil_mode)
            return max_pool(x, *window, out=out)

        def as_modules() -> Tensor:
            y = pool(x)
            return y if out is None else out.copy_(y)

        return run_group(pool, why_not_max_pool(x, pool), as_op, as_modules)

    def _derived_from(self, conv: nn.Conv2d) -> _Derived | None:
        if torch.compiler.is_compiling():
            return None
        all_derived = self.__dict__.setdefault("_derived", {})
        derived = all_derived.get(id(conv))
        if derived is None:
            derived = all_derived[id(conv)] = _Derived(DerivedWeights(), Recall())
        return derived

    def drop_derived_weights(self) -> None:
        """Forget folded and prepacked weights; the next fused call derives them again."""
        self.__dict__.pop("_derived", None)

    def train(self, mode: bool = True):
        self.drop_derived_weights()
        return super().train(mode)

    def _apply(self, fn: Callable, recurse: bool = True):
        self.drop_derived_weights()
        return super()._apply(fn, recurse)

    def _load_from_state_dict(self, *args, **kwargs) -> None:
        self.drop_derived_weights()
        super()._load_from_state_dict(*args, **kwargs)

    def _replicate_for_data_parallel(self):
        replica = super()._replicate_for_data_parallel()
        replica.__dict__.pop("_derived", None)
        return replica

    def __prepare_scriptable__(self):
        raise NotImplementedError(
            "torch.jit.script cannot compile cvkernels' blocks (and PyTorch deprecates it); use "
            "torch.export or torch.jit.trace, which run the stock forward"
        )

    def __getstate__(self) -> dict:
        state = self.__dict__.copy()
        state.pop("_derived", None)
        return state


def _operands(
    x: Tensor, conv: nn.Module, bn: nn.Module | None, act: nn.Module | Callable | None
) -> tuple[tuple, tuple, str]:
    """What conv_bn_act and :func:`prepared` take: tensors, geometry, and the activation's name."""
    name = "none" if act is None else ACTIVATIONS[_kind(act)]
    geometry = (conv.stride, conv.padding, conv.dilation, conv.groups)
    scale = None if bn is None else affine_of(bn)
    return (x, conv.weight, conv.bias, scale), geometry, name


def _kind(act: nn.Module | Callable) -> type[nn.Module] | Callable:
    """What ``ACTIVATIONS`` knows act by."""
    return type(act) if isinstance(act, nn.Module) else act


def _normalised(x: Tensor, norm: nn.Module, relu: nn.Module | None) -> Tensor:
    return norm(x) if relu is None else relu(norm(x))


def affine_of(bn: nn.Module) -> BatchNormParams:
    """The scale and shift of a norm that :func:`why_not_affine` has nothing against."""
    return BatchNormParams(bn.weight, bn.bias, bn.running_mean, bn.running_var, bn.eps)


def _fused_act(
    bn: nn.Module | None, act: nn.Module | Callable | None, residual: Tensor | None
) -> tuple[nn.Module | Callable | None, str]:
    """The activation behind bn, which may carry it inside, and why its place forbids fusing."""
    if type(bn) is nn.BatchNorm2d or not _is_norm_act(bn) or type(bn.act) is nn.Identity:
        return act, ""
    if act is not None:
        return act, "an activation follows a norm that has one inside"
    return bn.act, "" if residual is None else "the activation stands before the shortcut"


def _is_norm_act(bn: nn.Module | None) -> bool:
    kind = type(bn)
    return kind.__name__ == "BatchNormAct2d" and kind.__module__ == "timm.layers.norm_act"


def run_group(
    leader: nn.Module,
    reason: str,
    as_op: Callable[[], Tensor] | None,
    as_modules: Callable[[], Tensor],
) -> Tensor:
    """Run a group of modules as one op, or one by one for ``reason``; seen under ``leader``."""
    run = as_modules if reason else as_op
    if (recorder := record.active()) is None:
        return run()
    with recorder.group(leader, reason):
        y = run()
    recorder.observe(leader, y)
    return y


def why_not_conv_bn_act(
    x: Tensor, conv: nn.Module, bn: nn.Module | None, act: nn.Module | Callable | None
) -> str:
    """Why the modules have to be called one by one; empty where conv_bn_act computes the same."""
    if type(conv) is not nn.Conv2d:
        return f"{type(conv).__name__} is not exactly nn.Conv2d"
    if bn is not None and (reason := why_not_affine(bn)):
        return reason
    if act is not None and _kind(act) not in ACTIVATIONS:
        return f"{type(act).__name__} is not one of the fused activations"
    if conv.padding_mode != "zeros" or isinstance(conv.padding, str):
        return f"padding={conv.padding!r} with padding_mode={conv.padding_mode!r} is not fused"
    return why_not_called(x, conv, bn, act if isinstance(act, nn.Module) else None)


def why_not_input_bn(x: Tensor, norm: nn.Module, relu: nn.Module | None) -> str:
    """Why norm and relu have to be called first; empty where they are the op's prologue."""
    if reason := why_not_norm_relu(x, norm, relu):
        return reason
    return "" if fuses_input_bn(x) else "no backend here normalises a convolution's input"


def why_not_norm_relu(x: Tensor, norm: nn.Module, relu: nn.Module | None) -> str:
    """Why norm and relu are no multiply-add and ReLU that an op can do to its input."""
    if reason := why_not_affine(norm):
        return reason
    if relu is None and _is_norm_act(norm):
        relu = norm.act
    if type(relu) is not nn.ReLU:
        return f"{type(relu).__name__} is not exactly nn.ReLU"
    return why_not_called(x, norm, relu)


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
    if torch.is_grad_enabled() and (
        x.requires_grad or any(parameter.requires_grad for parameter in module.parameters())
    ):
        return "a gradient is needed"
    if x.dim() != 4 or not x.numel():
        return "the input is empty or not [N, C, H, W]"
    device = x.device.type
    if device in ("cpu", "cuda") and torch.is_autocast_enabled(device):
        dtype = torch.get_autocast_dtype(device)
        if dtype != x.dtype:
            return f"autocast computes in {dtype}, the input is {x.dtype}"
    return ""


def why_not_affine(bn: nn.Module) -> str:
    """Why bn is no scale and shift per channel; empty where it is, but for its activation."""
    if type(bn) is not nn.BatchNorm2d:
        if not _is_norm_act(bn):
            return f"{type(bn).__name__} is not exactly nn.BatchNorm2d"
        if type(bn.drop) is not nn.Identity or _has_hooks(bn.drop) or _has_hooks(bn.act):
            return "BatchNormAct2d drops something, or a part of it has a hook"
    if bn.training or bn.running_mean is None:
        return "batch norm normalises with batch statistics"
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


def why_not_called(x: Tensor, *modules: nn.Module | None) -> str:
    """Why the modules' own ``__call__`` must happen: somebody watches it, or it is being traced."""
    if isinstance(x, fx.Proxy):
        return "torch.fx is tracing"
    if not _is_plain(x):
        return f"the input is a {type(x).__name__}"
    for module in modules:
        if module is None:
            continue
        if _has_hooks(module):
            return f"{type(module).__name__} has a hook"
        for parameter in module._parameters.values():
            if parameter is not None and not _is_plain(parameter):
                return f"a parameter is a {type(parameter).__name__}"
    if _has_global_hooks():
        return "a global module hook is registered"
    if torch.compiler.is_compiling():
        if torch.compiler.is_exporting():
            return "torch.export is tracing"
        return "inductor fuses it" if x.device.type == "cpu" else ""
    if torch.jit.is_tracing():
        return "torch.jit is tracing"
    if torch._C._functorch.is_functorch_wrapped_tensor(x):
        return "a torch.func transform is active"
    return ""


def _is_plain(tensor: Tensor) -> bool:
    """No subclass with a meaning of its own (DTensor, a quantised tensor, ...)."""
    return type(tensor) in (Tensor, nn.Parameter) or isinstance(tensor, FakeTensor)


def _has_hooks(module: nn.Module) -> bool:
    return bool(
        module._forward_hooks
        or module._forward_pre_hooks
        or module._backward_hooks
        or module._backward_pre_hooks
    )


def _has_global_hooks() -> bool:
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
