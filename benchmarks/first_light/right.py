"""Right or wrong: every family of kernels against float64, and bit-equal under load.

Outputs are NaN before they are written. Each case runs many times while a copy on another stream
keeps the memory busy: all results must be the same bits.
"""

from __future__ import annotations

import contextlib
import copy
import functools
from collections.abc import Callable, Iterator
from typing import Any

import torch
from torch import Tensor

import cvkernels
from benchmarks import kernels
from benchmarks.first_light.setting import Setting
from benchmarks.harness.case import Case, grad_mode
from benchmarks.harness.report import dtype_name
from benchmarks.harness.trial import Trial
from tests.support.numerics import assert_close_as_eager, max_error, tensors_in

BATCH = 8
Item = tuple[str, Callable[[], dict[str, Any]]]


def items(setting: Setting, family: str) -> Iterator[Item]:
    # fills what torch.empty gives with NaN
    torch.use_deterministic_algorithms(True, warn_only=True)
    if family == "networks":
        for name in setting.networks:
            yield name, functools.partial(network, setting, name)
        return
    if family == "conv_bn_act":
        yield "cudnn_convolution_relu on NaN", functools.partial(cudnn_relu_on_nan, setting)
    batch = 1 if setting.rehearsal else BATCH
    cases = kernels.cases(setting.device, setting.dtypes, batch, [family], True, "none")
    for case in [case for case in cases if case.part != "host"][: 2 if setting.rehearsal else None]:
        yield f"{case.op} {case.id}", functools.partial(kernel, setting, case)


def kernel(setting: Setting, case: Case) -> dict[str, Any]:
    """Errors of our variant, and how many of its repeats gave the first one's bits."""
    with grad_mode(case):
        trial = Trial(case)
        function = case.variants["cvkernels"]()
        row = {"error": trial.check(function), "eager_error": trial.eager_error}
        row["backend"] = trial.backend(function)[0]
        if case.part != "forward" or hasattr(function, "fresh"):
            return row
        call = functools.partial(function, *trial.args, **trial.kwargs)
        return {**row, **repeated(setting, call)}


def repeated(setting: Setting, call: Callable[[], Any]) -> dict[str, Any]:
    """Raises where a repeat has other bits than the first call."""
    first = [t.clone() for t in tensors_in([call()])]
    unequal = 0
    with busy_memory(setting) as start_copy:
        for _ in range(setting.repeats):
            start_copy()
            unequal += not all(map(torch.equal, tensors_in([call()]), first))
    if unequal:
        raise AssertionError(f"{unequal} of {setting.repeats} repeats under load had other bits")
    return {"equal_repeats": setting.repeats}


@contextlib.contextmanager
def busy_memory(setting: Setting) -> Iterator[Callable[[], None]]:
    """A function that starts a copy beside what comes next."""
    source = torch.ones(2**4 if setting.rehearsal else 2**28, device=setting.device)
    target = torch.empty_like(source)
    if setting.rehearsal:
        yield lambda: [target.copy_(source)].clear()
        return
    stream = torch.cuda.Stream()

    def start_copy() -> None:
        with torch.cuda.stream(stream):
            target.copy_(source)

    yield start_copy
    torch.cuda.synchronize()


def cudnn_relu_on_nan(setting: Setting) -> dict[str, Any]:
    """ATen adds 0 * z to the convolution with z the output's own memory: is NaN there harmless?"""
    shape = (1, 8, 6, 6) if setting.rehearsal else (32, 64, 56, 56)
    dtype = setting.dtype
    x = torch.randn(shape, device=setting.device).to(dtype)
    x = x.contiguous(memory_format=torch.channels_last)
    weight = torch.randn(shape[1], shape[1], 3, 3, device=setting.device).to(dtype)
    weight = weight.contiguous(memory_format=torch.channels_last)
    bias = torch.randn(shape[1], device=setting.device).to(dtype)
    geometry = ((1, 1), (1, 1), (1, 1), 1)
    bad = 0
    for _ in range(setting.repeats):
        # freed at once: the next allocation of this size gets it
        _poisoned = torch.full_like(x, float("nan"))
        del _poisoned
        if setting.rehearsal:
            y = torch.convolution(x, weight, bias, (1, 1), (1, 1), (1, 1), False, (0, 0), 1).relu_()
        else:
            y = torch.cudnn_convolution_relu(x, weight, bias, *geometry)
        bad += not bool(y.isfinite().all())
    if bad:
        raise AssertionError(f"{bad} of {setting.repeats} outputs have NaN")
    return {"finite_repeats": setting.repeats}


def network(setting: Setting, name: str) -> dict[str, Any]:
    """The frozen network's logits against float64, beside stock's own."""
    stock, ours = setting.models(name)
    x = setting.images(2 if setting.rehearsal else BATCH)
    with torch.no_grad():
        frozen = cvkernels.freeze(ours, x)
        actual, eager = logits(frozen(x)), logits(stock(x))
        exact = logits(copy.deepcopy(stock).double()(x.double()))
        assert_close_as_eager(actual, eager, exact)
        same = (actual.argmax(1) == exact.argmax(1)).double().mean().item()
        row = {"error": max_error(actual, exact), "eager_error": max_error(eager, exact)}
        row.update(same_top1=same, dtype=dtype_name(setting.dtype))
        return {**row, **repeated(setting, lambda: logits(frozen(x)))}


def logits(result: Any) -> Tensor:
    return result if isinstance(result, Tensor) else result[0]
