"""``explain``: which kernel runs where, what it moves, and where none is fused, why."""

from __future__ import annotations

import copy
from collections.abc import Iterable
from functools import cached_property

import torch
from torch import Tensor, nn
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_leaves

from cvkernels import record
from cvkernels.freeze.frozen import freeze, planned
from cvkernels.freeze.report import rows_of
from cvkernels.record import Call, Recorder
from cvkernels.tables import text_table

NOT_OURS = "not an op of cvkernels"
# Allocation, metadata and a copy to the host launch nothing.
LAUNCH_NOTHING = {
    f"aten::{name}"
    for name in "empty empty_like empty_strided new_empty as_strided_ _local_scalar_dense".split()
}
# Their destination is written without being read.
OVERWRITES = {"aten::copy_", "aten::fill_", "aten::zero_"}


class Explanation:
    """The calls of one forward pass; prints as a table.

    ``rows`` are :class:`cvkernels.record.Call`: layer, op, backend, reason, kernels, bytes_read,
    bytes_written, in the order in which they ran. Those of a frozen plan for a GPU whose times the
    model of :mod:`cvkernels.ops.common.work` predicts, which ``gpu`` names, also have predicted_us
    and bound. ``images`` are those of a call.
    """

    def __init__(self, rows: list[Call], device: str, gpu: str = "", images: int = 0) -> None:
        self.rows = rows
        self.device = device
        self.gpu = gpu
        self.images = images

    @cached_property
    def totals(self) -> dict[str, int]:
        """Sums over the rows: ``kernels``, ``bytes_read``, ``bytes_written``."""
        names = ("kernels", "bytes_read", "bytes_written")
        return {name: sum(getattr(row, name) for row in self.rows) for name in names}

    @cached_property
    def predicted_us(self) -> float | None:
        """The sum of the steps' predicted times; None where none is predicted."""
        times = [row.predicted_us for row in self.rows]
        return sum(t for t in times if t is not None) if self.gpu else None

    def __str__(self) -> str:
        header = ["layer", "op", "backend", "kernels", "MB read", "MB written", "reason"]
        lines: list[list] = [
            [c.layer, c.op, c.backend, c.kernels, _mb(c.bytes_read), _mb(c.bytes_written), c.reason]
            for c in self.rows
        ]
        kernels, read, written = self.totals.values()
        total = ["total", "", "", kernels, _mb(read), _mb(written), f"on {self.device}"]
        if self.predicted_us is None:
            return text_table(header, [*lines, total])
        header[6:6] = ["predicted us", "bound"]
        for row, line in zip(self.rows, lines, strict=True):
            line[6:6] = [f"{row.predicted_us or 0.0:.1f}", row.bound]
        total[6:6] = [f"{self.predicted_us:.1f}", ""]
        rate = 1e6 * self.images / self.predicted_us
        return (
            f"{text_table(header, [*lines, total])}\n"
            f"predicted for {self.gpu}, not measured: {self.predicted_us / 1e3:.3f} ms for "
            f"{self.images} images, {rate:,.0f} img/s"
        )

    __repr__ = __str__


def _mb(count: int) -> str:
    return f"{count / 1e6:.3f}"


def explain(model: nn.Module, example: Tensor | tuple, *, frozen: bool = False) -> Explanation:
    """Run ``model(example)`` once, or plan it, and report every kernel with its choice and traffic.

    Args:
        model: as it would be called; its mode (train or eval) counts, and its state is not changed.
        example: the input, or a tuple of inputs. On the meta device nothing runs and nothing is
            allocated: the report is the plan that a Hopper GPU would get for the model in example's
            dtype. The dispatch that plans is the one that runs.
        frozen: explain what :func:`cvkernels.freeze` makes of the model instead: its plan for
            example's shape.

    Returns:
        An :class:`Explanation`. ``kernels`` counts device launches (on CPU, calls of a library or
        native routine). Bytes are the compulsory traffic of each kernel in the dtypes at hand: each
        element that it needs once, and each that it writes once. PyTorch's own ops are in it under
        their aten names, with the same model. With ``frozen`` and an example on the meta device,
        each step also has the time that a model predicts for an H200 and what bounds it, and the
        table ends with their sum: predictions, none of which is measured.

    Raises:
        TypeError: example is not a tensor or a tuple with one.
        ValueError: with ``frozen``, where :func:`cvkernels.freeze` raises it.
    """
    if frozen:
        return _explain_frozen(model, example)
    inputs = example if isinstance(example, tuple) else (example,)
    tensors = [leaf for leaf in tree_leaves(inputs) if isinstance(leaf, Tensor)]
    if not tensors:
        raise TypeError(
            f"explain: example must be a tensor or a tuple, got {type(example).__name__}"
        )
    planned = tensors[0].is_meta
    state = dict(_planned_state(model, tensors[0].dtype) if planned else _protected_state(model))
    recorder = Recorder({id(module): name for name, module in model.named_modules()})
    hook = nn.modules.module.register_module_forward_pre_hook(recorder.enter_module)
    try:
        with torch.no_grad(), record.recording(recorder), _AtenCalls(recorder):
            torch.func.functional_call(model, state, inputs)
    finally:
        hook.remove()
    device = f"a planned {recorder.meta_device} device" if planned else str(tensors[0].device)
    return Explanation(recorder.calls, device)


def _explain_frozen(model: nn.Module, example: Tensor | tuple) -> Explanation:
    if isinstance(example, tuple) and len(example) == 1:
        (example,) = example
    if not isinstance(example, Tensor):
        raise TypeError(f"explain: example must be a tensor, got {type(example).__name__}")
    if not example.is_meta:
        return explain(freeze(model, example), example)
    plan = planned(_on_meta(model, example.dtype), example)
    calls = [
        Call(
            r.layer, r.op, r.backend, r.note, r.kernels, r.bytes_read, r.bytes_written,
            r.predicted_us, r.bound,
        )
        for r in rows_of(plan)
    ]  # fmt: skip
    gpu = plan.gpu.name if plan.gpu is not None else ""
    return Explanation(calls, "a planned cuda device", gpu, example.shape[0])


def _on_meta(model: nn.Module, dtype: torch.dtype) -> nn.Module:
    """A copy of the model with its tensors on the meta device, floating ones in ``dtype``."""
    state = dict(_planned_state(model, dtype))
    tensors = (*model.named_parameters(), *model.named_buffers())
    return copy.deepcopy(model, {id(tensor): state[name] for name, tensor in tensors})


def _planned_state(model: nn.Module, dtype: torch.dtype) -> Iterable[tuple[str, Tensor]]:
    """The model's tensors on the meta device, floating ones in ``dtype``."""
    for tensors in (model.named_parameters, model.named_buffers):
        for name, tensor in tensors():
            kind = dtype if tensor.is_floating_point() else tensor.dtype
            meta = torch.empty_like(tensor, device="meta", dtype=kind)
            yield name, nn.Parameter(meta, False) if isinstance(tensor, nn.Parameter) else meta


def _protected_state(model: nn.Module) -> Iterable[tuple[str, Tensor]]:
    """Copies of the buffers that a forward in training mode would change."""
    if model.training:
        for name, buffer in model.named_buffers():
            yield name, buffer.clone()


class _AtenCalls(TorchDispatchMode):
    """Records what runs outside the library's own ops: one kernel per aten op that is no view."""

    def __init__(self, recorder: Recorder) -> None:
        super().__init__()
        self.recorder = recorder

    def __torch_dispatch__(self, func, types, args=(), kwargs=None):
        kwargs = kwargs or {}
        out = func(*args, **kwargs)
        name = func._schema.name
        ours = name.startswith("cvkernels::")
        if self.recorder.inside_op or ours or name in LAUNCH_NOTHING or _is_view(func):
            return out
        reads = _distinct(tree_leaves((args, kwargs)))
        writes = _distinct(tree_leaves(out))
        if name in OVERWRITES:
            reads = [t for t in reads if t is not args[0]]
        reason = self.recorder.reason
        about = (name.replace("::", "."), "reference" if reason else "aten", reason or NOT_OURS)
        traffic = (sum(t.numel() * t.element_size() for t in ts) for ts in (reads, writes))
        with self.recorder.call(*about, 1, *traffic):
            return out


def _is_view(func: torch._ops.OpOverload) -> bool:
    aliases = [r.alias_info for r in func._schema.returns]
    return any(alias is not None and not alias.is_write for alias in aliases)


def _distinct(leaves: list) -> list[Tensor]:
    return list({id(leaf): leaf for leaf in leaves if isinstance(leaf, Tensor)}.values())
