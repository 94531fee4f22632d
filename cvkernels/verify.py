"""``verify``: every layer's error against float64, next to the error that stock PyTorch makes."""

from __future__ import annotations

import copy
from collections.abc import Sequence
from typing import NamedTuple

import torch
from torch import Tensor, nn
from torch.utils._pytree import tree_leaves

from cvkernels import backend, record
from cvkernels.freeze.frozen import Frozen
from cvkernels.freeze.quantise.guard import decibels
from cvkernels.record import Recorder
from cvkernels.tables import text_table

FACTOR = 2.0


class LayerError(NamedTuple):
    """Largest absolute differences from float64: ours, stock's, and what the rule allows ours."""

    layer: str
    ours: float
    stock: float
    allowed: float

    @property
    def ok(self) -> bool:
        return self.ours <= self.allowed


class Agreement(NamedTuple):
    """Of a two-dimensional output with float64's: the share of rows whose largest entry is where
    float64 has it, the share where it is among float64's five largest, and the signal-to-noise
    ratio ``10 * log10(sum(y ** 2) / sum((z - y) ** 2))`` in decibels."""

    top1: float
    top5: float
    decibels: float

    def __str__(self) -> str:
        return f"top-1 {self.top1:.1%}, top-5 {self.top5:.1%}, {self.decibels:.1f} dB"


class Verification:
    """Errors per layer, the model's output last; prints as a table.

    Attributes:
        ok: every row is within the rule; of a model in int8, which is not held to it, the output
            keeps the decibels that it was frozen for.
        agreement: of ours with float64, None where the output is not two-dimensional.
        stock: the same of stock PyTorch.
    """

    def __init__(
        self, rows: list[LayerError], agreement: Agreement | None, stock: Agreement | None,
        tolerance: float | None = None,
    ) -> None:  # fmt: skip
        self.rows = rows
        self.agreement = agreement
        self.stock = stock
        self.tolerance = tolerance

    @property
    def ok(self) -> bool:
        if self.tolerance is not None:
            return self.agreement is None or self.agreement.decibels >= self.tolerance
        return all(row.ok for row in self.rows)

    @property
    def top1_agreement(self) -> float | None:
        return None if self.agreement is None else self.agreement.top1

    def __str__(self) -> str:
        header = ("layer", "max error", "stock's", "allowed", "verdict")
        bytes_ = self.tolerance is not None
        lines = [
            (
                r.layer,
                *(f"{error:.3e}" for error in r[1:]),
                "in int8" if bytes_ else "ok" if r.ok else "FAILS",
            )
            for r in self.rows
        ]
        table = text_table(header, lines)
        if self.agreement is None:
            return table
        table += f"\nagreement with float64: {self.agreement}; stock's: {self.stock}"
        if bytes_:
            verdict = "ok" if self.ok else "FAILS"
            table += f"\nfrozen to keep {self.tolerance:.1f} dB: {verdict}"
        return table

    __repr__ = __str__


class _Outputs(Recorder):
    """Keeps the output of every fused group and of every other module without children."""

    def __init__(self, model: nn.Module) -> None:
        super().__init__({id(module): name for name, module in model.named_modules()})
        self.outputs: dict[str, Tensor] = {}

    def leave_module(self, module: nn.Module, args: object, output: object) -> None:
        if isinstance(output, Tensor) and not list(module.children()):
            self.observe(module, output)

    def observe(self, module: object, output: Tensor) -> None:
        if not self._inside_group and id(module) in self.names:
            self.outputs[self.names[id(module)]] = output.detach().clone()


def verify(
    model: nn.Module, example: Tensor | None = None, *, original: nn.Module | None = None
) -> Verification:
    """Compare ``model(example)`` with float64 and with stock PyTorch in example's dtype.

    The rule: our error against float64 may be at most twice stock PyTorch's, plus one rounding of
    the layer's largest value, to TF32 where convolutions may compute in it. Stock's is the larger
    of those in its two memory layouts, since by few outputs one alone may seem all but exact. A row
    is a convolution with the norm, residual and activation that run with it, or another module;
    errors are those accumulated since the input. A model frozen in int8 is not held to it, but to
    the decibels that it was frozen for.

    Args:
        model: in eval mode, or what :func:`cvkernels.freeze` returned, of which the outputs alone
            are compared, with those of the model that it came from. It is not changed.
        example: the input, on the model's device; for a frozen model that of ``freeze`` if None.
        original: what a frozen model came from, where it does not know: it was loaded or copied, or
            ``freeze`` was given the only reference.

    Raises:
        TypeError: there is no example, or an original for a model that is not frozen.
        ValueError: the model is in training mode, example holds no data (meta device), or the
            original is not known or has changed since.
    """
    if isinstance(model, Frozen):
        if original is None or example is None:
            original, remembered = model.original(original)
            example = remembered if example is None else example
        if example is None:
            raise TypeError("verify: the frozen model was loaded or copied; give an example")
        return _verify_frozen(model, original, example)
    if original is not None or example is None:
        raise TypeError("verify: give an example; original= is for a frozen model alone")
    if model.training:
        raise ValueError("verify: the model is in training mode; call model.eval() first")
    if example.is_meta:
        raise ValueError("verify: example is on the meta device and holds no data; pass a real one")
    double = copy.deepcopy(model).double()
    with backend.use("reference"):
        exact = _outputs(double, example.double())
        stock = [_outputs(*in_layout) for in_layout in _both_layouts(model, example)]
    ours = _outputs(model, example)
    rows = [
        _layer_error(name, ours[name], [outputs[name] for outputs in stock], exact[name])
        for name in exact
        if name in ours
    ]
    stocks = [outputs[""] for outputs in stock]
    return Verification(rows, _agreement([ours[""]], exact[""]), _agreement(stocks, exact[""]))


def _agreement(finals: Sequence[Tensor], truth: Tensor) -> Agreement | None:
    """Of the one of finals that agrees least."""
    if truth.dim() != 2 or not truth.numel():
        return None
    five = truth.topk(min(5, truth.shape[1])).indices
    found = []
    for final in finals:
        top = final.argmax(1)
        found.append(
            Agreement(
                (top == five[:, 0]).double().mean().item(),
                (top[:, None] == five).any(1).double().mean().item(),
                decibels([final], [truth]),
            )
        )
    return min(found, key=lambda agreement: agreement.decibels)


def _verify_frozen(frozen: Frozen, original: nn.Module, example: Tensor) -> Verification:
    image = example.to(frozen.dtype)
    with torch.no_grad(), backend.use("reference"):
        exact = tree_leaves(copy.deepcopy(original).double()(example.double()))
        model = copy.deepcopy(original).to(frozen.dtype)
        layouts = [tree_leaves(twin(x)) for twin, x in _both_layouts(model, image)]
    outputs = zip(tree_leaves(frozen(image)), zip(*layouts, strict=True), exact, strict=True)
    triples = [parts for parts in outputs if isinstance(parts[0], Tensor)]
    names = [f"output {number}" if len(triples) > 1 else "" for number in range(len(triples))]
    rows = [_layer_error(name, *parts) for name, parts in zip(names, triples, strict=True)]
    ours, stock, truth = triples[0]
    tolerance = None if frozen.quantised is None else frozen.quantised.tolerance
    return Verification(rows, _agreement([ours], truth), _agreement(stock, truth), tolerance)


def _outputs(model: nn.Module, example: Tensor) -> dict[str, Tensor]:
    recorder = _Outputs(model)
    hook = nn.modules.module.register_module_forward_hook(recorder.leave_module)
    try:
        with torch.no_grad(), record.recording(recorder):
            final = model(example)
    finally:
        hook.remove()
    return {**recorder.outputs, "": final}


def _both_layouts(model: nn.Module, example: Tensor) -> list[tuple[nn.Module, Tensor]]:
    """(a model, an input) in example's memory layout, and where it is an image, in the other."""
    if example.dim() != 4:
        return [(model, example)]
    nhwc = example.is_contiguous(memory_format=torch.channels_last)
    other = torch.contiguous_format if nhwc else torch.channels_last
    converted = copy.deepcopy(model).to(memory_format=other)
    return [(model, example), (converted, example.contiguous(memory_format=other))]


def _layer_error(name: str, ours: Tensor, stock: Sequence[Tensor], exact: Tensor) -> LayerError:
    theirs = max(_max_error(outputs, exact) for outputs in stock)
    allowed = FACTOR * theirs
    allowed += rounding(ours) * exact.abs().max().item() if exact.numel() else 0.0
    return LayerError(name or "output", _max_error(ours, exact), theirs, allowed)


def rounding(result: Tensor) -> float:
    """One rounding of ``result``, relative: that of TF32 where convolutions may compute in it."""
    may = result.is_cuda and result.dtype == torch.float32
    if may and torch.backends.cudnn.conv.fp32_precision == "tf32":  # type: ignore[attr-defined]
        return 2.0**-10
    return torch.finfo(result.dtype).eps


def _max_error(actual: Tensor, exact: Tensor) -> float:
    return (actual.double() - exact).abs().max().item() if exact.numel() else 0.0
