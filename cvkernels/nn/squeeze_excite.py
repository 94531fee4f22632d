"""Squeeze-and-excitation, once, under the three namings that checkpoints know.

Hu et al. 2018, arXiv:1709.01507, figure 2: the mean of each channel, two small layers, and a gate
that scales the channel. The two layers are 1x1 convolutions in every checkpoint. All of it is
one op, with the shortcut and the activation that follow it in a residual block.
"""

from __future__ import annotations

from collections.abc import Callable

import torch
from torch import Tensor, nn

from cvkernels import backend, record
from cvkernels.functional import excite, se_scale, squeeze_excite
from cvkernels.nn.fused.branch import Layer
from cvkernels.nn.fused.caller_layout import in_layout_of_input
from cvkernels.nn.fused.match import fused_act, runs_depthwise, why_not_layer
from cvkernels.nn.fused.module import FusedModule, Step, run_step
from cvkernels.nn.fused.plan_cache import OPTIONS, guard_of
from cvkernels.nn.fused.watched import why_altered, why_not_called
from cvkernels.nn.training import squeeze_excite as in_training
from cvkernels.nn.training.recompute import recompute_of
from cvkernels.ops.common.autograd import autocast_dtype
from cvkernels.ops.conv_bn_act.op import supports_prologue_and_slices


def divisible(value: float, divisor: int, least: int | None = None, share: float = 0.9) -> int:
    """The multiple of divisor nearest to value, but at least ``least`` and ``share * value``."""
    rounded = max(least or divisor, int(value + divisor / 2) // divisor * divisor)
    return rounded + divisor if rounded < share * value else rounded


class _Sigmoid(nn.Module):
    """timm's, whose call torch.fx sees as the function and not as a module."""

    def forward(self, x: Tensor) -> Tensor:
        return x.sigmoid()


_ACTS: dict[type[nn.Module], str] = {nn.ReLU: "relu", nn.SiLU: "silu"}


class SqueezeExcite(FusedModule):
    """``x * gate(fc2(act(fc1(mean of x over H and W))))``; the subclasses name the parts.

    ``forward`` takes Tensor[N, C, H, W], any layout, and returns the same shape, never a view of x.
    One op where the layers are exactly 1x1 convolutions, the activation ReLU or SiLU and the gate a
    sigmoid.
    """

    @in_layout_of_input
    def forward(self, x: Tensor) -> Tensor:
        plans = self.plans_of(x, self)
        if plans is not None and (run := plans.get(x)) is not None:
            return run(x)
        if reason := self.why_not_op(x):
            if (recorder := record.active()) is None:
                return self.as_modules(x)
            with recorder.fallback(reason):
                return self.as_modules(x)
        if plans is None or (guard := guard_of(x, list(self.modules()))) is None:
            return self.as_op(x)
        plan = squeeze_excite.plan(x, *self._layers())
        if plan.backend != "reference":
            plans.keep(guard, plan.run, x)
        return plan.run(x)

    def as_modules(self, x: Tensor) -> Tensor:
        """The stock forward of timm's modules: every part called, in their order."""
        _, fc1, between, fc2, gate = self.parts()
        y = fc1(x.mean((2, 3), keepdim=True))
        for module in between:
            y = module(y)
        return x * gate(fc2(y))

    def as_op(
        self, x: Tensor, residual: Tensor | None = None, out_act: str = "none",
        out: Tensor | None = None,
    ) -> Tensor:  # fmt: skip
        """``out_act(forward(x) + residual)`` as one op, where :meth:`why_not_op` is empty.

        In training an x that can be computed again is not kept for backward, see
        :mod:`cvkernels.nn.training`.
        """
        if out_act in in_training.OUT_ACTS and (recompute := recompute_of(x)) is not None:
            return in_training.squeeze_excite(x, recompute, self._layers(), residual, out_act)
        return squeeze_excite(x, *self._layers(), residual, out_act, out=out)

    def takes_sums(self, x: Tensor, depthwise: Layer, project: Layer) -> bool:
        """Whether the depthwise op sums its output for this module, and the projection takes it
        with its gates: the depthwise map is then written once and read once."""
        act, clash = fused_act(depthwise.norm, depthwise.act)
        return (
            getattr(type(self), "forward", None) is SqueezeExcite.forward
            and not (clash or why_altered(self))
            and None not in (depthwise.norm, act)
            and not why_not_layer(depthwise.conv, depthwise.norm, act)
            and not why_not_layer(project.conv, project.norm, None)
            and not self.why_not_op(x)
            and runs_depthwise(x, depthwise.conv)
        )

    def run_gated(
        self, block: FusedModule, x: Tensor, depthwise: Layer, project: Layer,
        residual: Tensor | None, lasting: bool,
    ) -> tuple[Tensor, Step]:  # fmt: skip
        """``project(forward(depthwise(x)))``, ended by the residual, and what repeats it.

        For what :meth:`takes_sums` lets pass. On CUDA the gates are the projection's prologue; on
        CPU multiplying them in first is faster.
        """
        conv, norm = depthwise.conv, depthwise.norm
        first = block.squeezed_step(x, conv, norm, fused_act(norm, depthwise.act)[0], lasting)
        y, sums = run_step(first, x)
        prologue = supports_prologue_and_slices(y)
        gate = self._gate_step(y, sums, prologue, lasting)
        gates = run_step(gate, y, sums)
        y, gates = (y, gates) if prologue else (gates, None)
        last = block.layer_step(
            y, project.conv, project.norm, project.act, residual, input_gate=gates, lasting=lasting
        )

        def run(x: Tensor, residual: Tensor | None = None) -> Tensor:
            y, sums = first.run(x)
            if prologue:
                return last.run(y, residual, gate.run(y, sums))
            return last.run(gate.run(y, sums), residual)

        out = run_step(last, y, residual, gates)
        lasts = first.lasting and gate.lasting and last.lasting
        return out, Step(conv, last.reason, run, lasts)

    def _gate_step(self, y: Tensor, sums: Tensor, prologue: bool, lasting: bool) -> Step:
        """From a map and its sums to the gates [N, C], or (no prologue) to the map times these."""
        layers, count = self._layers(), y.shape[2] * y.shape[3]
        if not lasting:

            def gated(y: Tensor, sums: Tensor) -> Tensor:
                gate = excite(sums, *layers, sigmoid=True, count=count)
                if prologue:
                    return gate
                gate = gate[:, :, None, None].to(y.dtype)
                return y * gate if torch.is_grad_enabled() else y.mul_(gate)

            return Step(self, "", gated)
        excitation = excite.plan(sums, *layers, sigmoid=prologue, count=count)
        if prologue:
            run, lasts = lambda y, sums: excitation.run(sums), True
        else:
            scale = se_scale.plan(y, y.new_empty(y.shape[:2]), out=y)
            run = lambda y, sums: scale.run(y, excitation.run(sums), None, y)  # noqa: E731
            lasts = scale.backend != "reference"
        return Step(self, "", run, lasts and excitation.backend != "reference")

    def _layers(self) -> tuple[Tensor, Tensor | None, Tensor, Tensor | None, str]:
        _, fc1, between, fc2, _ = self.parts()
        return fc1.weight, fc1.bias, fc2.weight, fc2.bias, _ACTS[type(between[-1])]

    def added_step(
        self, x: Tensor, shortcut: Tensor, act: nn.Module, fresh: bool, lasting: bool
    ) -> Step:
        """What computes ``act(forward(x) + shortcut)``, for an x that :meth:`why_not_added` lets
        pass.

        ``fresh``: nothing else holds x, and without a gradient the result may be written over it.
        """
        if (shortcut.shape, shortcut.dtype) != (x.shape, x.dtype):
            reason = f"the shortcut is {shortcut.dtype} with shape {list(shortcut.shape)}"
            return Step(self, reason, lambda x, shortcut: act(self(x) + shortcut))
        out_act = _ACTS[type(act)]
        in_place = fresh and not torch.is_grad_enabled() and not torch.compiler.is_compiling()
        if not lasting:

            def run(x: Tensor, shortcut: Tensor) -> Tensor:
                return self.as_op(x, shortcut, out_act, x if in_place else None)

            return Step(self, "", run)
        plan = squeeze_excite.plan(
            x, *self._layers(), residual=shortcut, out_act=out_act, out=x if in_place else None
        )
        compute, lasts = plan.run, plan.backend != "reference"
        run = lambda x, shortcut: compute(x, shortcut, x if in_place else None)  # noqa: E731
        return Step(self, "", run, lasts)

    def why_not_added(self, x: Tensor, act: nn.Module) -> str:
        """Why forward, shortcut and act are called one by one; empty where they are one op."""
        if type(self).forward is not SqueezeExcite.forward:
            return f"{type(self).__name__} has a forward of its own"
        if reason := why_not_called(x, self, act):
            return reason
        if type(act) not in _ACTS:
            return f"{type(act).__name__} is not exactly nn.ReLU or nn.SiLU"
        return self.why_not_op(x)

    def parts(self) -> tuple[nn.Module | None, nn.Module, tuple, nn.Module, nn.Module]:
        """(the pool or None, fc1, what follows it, fc2, the gate).

        From ``_modules``: an attribute of a module costs a tenth of a small call.
        """
        raise NotImplementedError

    def why_not_op(self, x: Tensor) -> str:
        """Why the parts have to be called as modules; empty where the op does the same."""
        pool, fc1, between, fc2, gate = self.parts()
        if reason := why_not_called(x, pool, fc1, *between, fc2, gate):
            return reason
        if backend.requested("auto", ()) == "reference":
            return "requested"
        if pool is not None and (
            type(pool) is not nn.AdaptiveAvgPool2d or pool.output_size not in (1, (1, 1))
        ):
            return f"{pool} is not a global average pool"
        for fc in (fc1, fc2):
            if not _is_matrix(fc):
                return f"{fc} is not exactly a 1x1 nn.Conv2d"
        *identities, act = between
        if type(act) not in _ACTS or any(type(m) is not nn.Identity for m in identities):
            return f"{between} is not exactly nn.ReLU or nn.SiLU"
        if not _is_sigmoid(gate):
            return f"{gate} is not exactly nn.Sigmoid"
        return self._why_not_tensors(x, fc1, fc2)

    def _why_not_tensors(self, x: Tensor, fc1: nn.Module, fc2: nn.Module) -> str:
        """Why the op does not take these shapes and dtypes; PyTorch takes them, or says why not."""
        if x.dim() != 4 or 0 in x.shape[1:] or x.shape[1] != fc1.weight.shape[1]:
            return f"x has shape {list(x.shape)}"
        if fc1.weight.shape[:2] != fc2.weight.shape[1::-1]:
            return f"{fc1} and {fc2} do not lead back to the channels of x"
        parameters = (*fc1._parameters.values(), *fc2._parameters.values())
        dtypes = {p.dtype for p in parameters if p is not None}
        # PyTorch would cast the layers to x's half dtype.
        halved = x.dtype in (torch.float16, torch.bfloat16) and autocast_dtype(x) is not None
        if dtypes == {x.dtype} or (dtypes == {torch.float32} and halved):
            return ""
        return f"x is {x.dtype} and the layers are {', '.join(sorted(map(str, dtypes)))}"


def _is_sigmoid(gate: nn.Module) -> bool:
    kind = type(gate)
    timms = (kind.__module__, kind.__name__) == ("timm.layers.activations", "Sigmoid")
    return kind in (nn.Sigmoid, _Sigmoid) or timms


def _is_matrix(fc: nn.Module) -> bool:
    one, none = (1, 1), (0, 0)
    return type(fc) is nn.Conv2d and (
        (fc.kernel_size, fc.stride, fc.padding, fc.groups) == (one, one, none, 1)
    )


class SqueezeExcitation(SqueezeExcite):
    """Mirrors torchvision.ops.SqueezeExcitation, with its five parts in its order."""

    def __init__(
        self, input_channels: int, squeeze_channels: int,
        activation: Callable[..., nn.Module] = nn.ReLU,
        scale_activation: Callable[..., nn.Module] = nn.Sigmoid,
    ) -> None:  # fmt: skip
        super().__init__()
        self.avgpool = nn.AdaptiveAvgPool2d(1)
        self.fc1 = nn.Conv2d(input_channels, squeeze_channels, 1)
        self.fc2 = nn.Conv2d(squeeze_channels, input_channels, 1)
        self.activation = activation()
        self.scale_activation = scale_activation()

    def parts(self) -> tuple:
        m = self._modules
        return m["avgpool"], m["fc1"], (m["activation"],), m["fc2"], m["scale_activation"]

    def as_modules(self, x: Tensor) -> Tensor:
        scale = self.activation(self.fc1(self.avgpool(x)))
        return self.scale_activation(self.fc2(scale)) * x


class SEModule(SqueezeExcite):
    """Mirrors timm.layers.SEModule: fc1, bn (an identity), act, fc2, gate.

    Args:
        channels: of x.
        rd_ratio: share of the channels that the squeezed layer has, rounded to ``rd_divisor``.
        rd_channels: channels of the squeezed layer, where given.
    """

    def __init__(
        self, channels: int, rd_ratio: float = 1 / 16, rd_channels: int | None = None,
        rd_divisor: int = 8,
    ) -> None:  # fmt: skip
        super().__init__()
        squeezed = rd_channels or divisible(channels * rd_ratio, rd_divisor, share=0.0)
        self.fc1 = nn.Conv2d(channels, squeezed, kernel_size=1)
        self.bn = nn.Identity()
        self.act = nn.ReLU(inplace=True)
        self.fc2 = nn.Conv2d(squeezed, channels, kernel_size=1)
        self.gate = _Sigmoid()

    def parts(self) -> tuple:
        m = self._modules
        return None, m["fc1"], (m["bn"], m["act"]), m["fc2"], m["gate"]


class LegacySEModule(SqueezeExcite):
    """Mirrors timm.models.senet.SEModule: fc1, relu, fc2, sigmoid."""

    def __init__(self, channels: int, reduction: int) -> None:
        super().__init__()
        self.fc1 = nn.Conv2d(channels, channels // reduction, kernel_size=1)
        self.relu = nn.ReLU(inplace=True)
        self.fc2 = nn.Conv2d(channels // reduction, channels, kernel_size=1)
        self.sigmoid = nn.Sigmoid()

    def parts(self) -> tuple:
        m = self._modules
        return None, m["fc1"], (m["relu"],), m["fc2"], m["sigmoid"]


OPTIONS.update(
    dict.fromkeys((SqueezeExcitation, SEModule, LegacySEModule, _Sigmoid), ("training",))
)
