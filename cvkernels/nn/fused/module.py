"""How a block runs a few of its submodules as one op, and when it must call them instead.

A block names the modules it would like to run together: ``self.fused(x, self.conv1, self.bn1,
self.relu)``. Where they are exactly what the op computes and nobody watches them, the op runs on
their parameters; otherwise the modules are called one by one, which is the stock forward.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import NamedTuple

import torch
from torch import Tensor, nn

from cvkernels import record
from cvkernels.functional import (
    BatchNormParams,
    DerivedWeights,
    conv_bn_act,
    depthwise_conv_bn_act,
    max_pool,
)
from cvkernels.nn.fused.match import (
    act_name,
    fused_act,
    runs_depthwise,
    why_not_conv_bn_act,
    why_not_input_bn,
    why_not_max_pool,
)
from cvkernels.nn.fused.plan_cache import Recall
from cvkernels.nn.training.concat_and_pool import max_pool as training_max_pool
from cvkernels.nn.training.conv_bn_act import conv_bn_act as training_conv_bn_act
from cvkernels.nn.training.match import why_not_train_conv_bn_act
from cvkernels.nn.training.recompute import recompute_of
from cvkernels.ops.conv_bn_act.op import fuses_prologue
from cvkernels.ops.conv_bn_act.prepared import Run, prepared
from cvkernels.ops.depthwise_conv_bn_act.prepared import Run as SqueezedRun
from cvkernels.ops.depthwise_conv_bn_act.prepared import prepared as prepared_depthwise


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
        input_gate: Tensor | None = None,
        out: Tensor | None = None,
    ) -> Tensor:
        """``act(bn(conv(u)) + residual)``, as one op where the modules allow it.

        ``u`` is x, or ``relu(norm(x))`` for ``input_bn=(norm, relu)``, times ``input_gate[N, C]``.
        They are computed before the rest where no kernel has them as a prologue, so that the rest
        is fused all the same; x may then be overwritten by ``x * input_gate``. ``act`` is a module,
        or :func:`relu_`. A norm may be timm's BatchNormAct2d, whose activation is inside it; there
        ``act`` and ``relu`` are None. ``out``, a channel slice of a channels_last buffer, is
        written and returned, where no gradient is needed.

        In training batch norm takes the batch's statistics, and autograd keeps the convolution's
        output alone, see :mod:`cvkernels.nn.training`.
        """
        groups = getattr(conv, "groups", 1)
        if input_bn is not None and (reason := why_not_input_bn(x, *input_bn, groups)):
            x = run_group(input_bn[0], reason, None, lambda u=x: _normalised(u, *input_bn))
            input_bn = None
        if input_gate is not None and input_bn is None and not fuses_prologue(x, groups):
            x, input_gate = _gated(x, input_gate), None
        plain = input_bn is None and input_gate is None
        derived = self._derived_from(conv)
        recall = self.recall_of(x, conv) if plain else None
        if recall is not None:
            if (run := recall.get(x, (conv, bn, act), residual)) is not None:
                return run(x, residual, out)
        inner_act, clash = fused_act(bn, act, residual)
        if plain and out is None and not clash:
            parts = (x, conv, bn, inner_act, residual)
            if not why_not_train_conv_bn_act(*parts):
                return run_group(conv, "", lambda: training_conv_bn_act(*parts), None)

        def as_modules() -> Tensor:
            u = x if input_bn is None else _normalised(x, *input_bn)
            y = conv(u if input_gate is None else _gated(u, input_gate))
            if bn is not None:
                y = bn(y)
            if residual is not None:
                y += residual
            y = y if act is None else act(y)
            return y if out is None else out.copy_(y)

        def as_op() -> Tensor:
            tensors, (stride, padding, dilation, groups), name = _operands(x, conv, bn, inner_act)
            options = {"stride": stride, "padding": padding, "dilation": dilation, "act": name}
            options["cache"] = None if derived is None else derived.weights
            if residual is None and out is None and plain and runs_depthwise(x, conv):
                return depthwise_conv_bn_act(*tensors, **options)
            return conv_bn_act(
                *tensors,
                **options,
                groups=groups,
                residual=residual,
                input_bn=None if input_bn is None else affine_of(input_bn[0]),
                input_gate=input_gate,
                out=out,
            )

        reason = clash or why_not_conv_bn_act(x, conv, bn, inner_act)
        y = run_group(conv, reason, as_op, as_modules)
        if recall is not None and not reason:

            def prepare() -> Run | None:
                return _prepared(x, conv, bn, inner_act, residual, derived.weights)

            recall.keep(x, (conv, bn, act), residual, prepare)
        return y

    def prepared(
        self,
        x: Tensor,
        conv: nn.Module,
        bn: nn.Module | None = None,
        act: nn.Module | Callable[[Tensor], Tensor] | None = None,
        residual: Tensor | None = None,
        input_bn: nn.Module | None = None,
    ) -> Run | None:
        """What runs :meth:`fused` on others like x, unchecked, while the modules stay as they are.

        For modules that :func:`why_not_conv_bn_act` has nothing against. None where the call needs
        what only :meth:`fused` does.
        """
        inner_act, clash = fused_act(bn, act, residual)
        derived = self._derived_from(conv)
        if clash or derived is None:
            return None
        return _prepared(x, conv, bn, inner_act, residual, derived.weights, input_bn)

    def prepared_squeezed(
        self, x: Tensor, conv: nn.Conv2d, bn: nn.BatchNorm2d, act: nn.Module
    ) -> SqueezedRun | None:
        """What runs :meth:`squeezed` on others like x, as :meth:`prepared` does :meth:`fused`."""
        if (derived := self._derived_from(conv)) is None:
            return None
        (*tensors,), (*geometry, _), name = _operands(x, conv, bn, act)
        return prepared_depthwise(*tensors, geometry, name, True, derived.weights)

    def recalled(
        self,
        x: Tensor,
        compute: Callable[[Tensor], Tensor],
        prepare: Callable[[Tensor], Callable[[Tensor], Tensor] | None],
    ) -> Tensor:
        """``compute(x)``, the whole of this block, by what was remembered where nothing changed.

        ``prepare(x)`` gives what is to be remembered for others like x, or None; it may compute
        the block again, part by part.
        """
        if (recall := self.recall_of(x, self)) is None:
            return compute(x)
        if (run := recall.get(x, (self,))) is not None:
            return run(x)
        y = compute(x)
        recall.keep(x, (self,), None, lambda: prepare(x))
        return y

    def recall_of(self, x: Tensor, leader: nn.Module) -> Recall | None:
        """What is remembered of the calls that ``leader`` leads; None where none could be for x."""
        if type(x) is not Tensor or not x.is_cpu:
            return None
        derived = self._derived_from(leader)
        return None if derived is None else derived.recall

    def squeezed(
        self, x: Tensor, conv: nn.Conv2d, bn: nn.BatchNorm2d, act: nn.Module
    ) -> tuple[Tensor, Tensor]:
        """``act(bn(conv(x)))`` and its sums over H and W, as one op.

        For modules that :func:`why_not_conv_bn_act` and :func:`runs_depthwise` let pass.
        """
        derived = self._derived_from(conv)

        def as_op() -> tuple[Tensor, Tensor]:
            return depthwise_conv_bn_act(
                x, conv.weight, conv.bias, affine_of(bn), stride=conv.stride, padding=conv.padding,
                dilation=conv.dilation, act=act_name(act), squeeze=True,
                cache=None if derived is None else derived.weights,
            )  # fmt: skip

        if (recorder := record.active()) is None:
            return as_op()
        with recorder.group(conv, ""):
            y, sums = as_op()
        recorder.observe(conv, y)
        return y, sums

    def pooled(self, x: Tensor, pool: nn.Module, out: Tensor | None = None) -> Tensor:
        """``pool(x)``, without indices where it is exactly a max pool and nobody watches it.

        ``out`` is written and returned, where no gradient is needed. In training an x that can be
        computed again is not kept for backward, see :mod:`cvkernels.nn.training`.
        """

        def as_op() -> Tensor:
            if (recompute := recompute_of(x)) is not None:
                return training_max_pool(x, recompute, pool)
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
    geometry = (conv.stride, conv.padding, conv.dilation, conv.groups)
    scale = None if bn is None else affine_of(bn)
    return (x, conv.weight, conv.bias, scale), geometry, act_name(act)


def _prepared(
    x: Tensor,
    conv: nn.Module,
    bn: nn.Module | None,
    act: nn.Module | Callable | None,
    residual: Tensor | None,
    weights: DerivedWeights,
    input_bn: nn.Module | None = None,
) -> Run | None:
    tensors, geometry, name = _operands(x, conv, bn, act)
    if not runs_depthwise(x, conv):
        affine = None if input_bn is None else affine_of(input_bn)
        return prepared(*tensors, geometry, name, residual, weights, affine)
    if residual is not None or input_bn is not None:
        return None
    convolve = prepared_depthwise(*tensors, geometry[:3], name, False, weights)
    if convolve is None:
        return None

    def run(x: Tensor, residual: None = None, out: Tensor | None = None) -> Tensor:
        y = convolve(x)[0]
        return y if out is None else out.copy_(y)

    return run


def _gated(x: Tensor, gate: Tensor) -> Tensor:
    """x times gate[N, C], in place where no gradient needs x."""
    gate = gate[:, :, None, None].to(x.dtype)
    return x * gate if torch.is_grad_enabled() else x.mul_(gate)


def _normalised(x: Tensor, norm: nn.Module, relu: nn.Module | None) -> Tensor:
    return norm(x) if relu is None else relu(norm(x))


def affine_of(bn: nn.Module) -> BatchNormParams:
    """The scale and shift of a norm that :func:`why_not_affine` has nothing against."""
    return BatchNormParams(bn.weight, bn.bias, bn.running_mean, bn.running_var, bn.eps)


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
