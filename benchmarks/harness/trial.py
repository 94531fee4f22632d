"""The check of a case's variants, which comes before the timing."""

from __future__ import annotations

import contextlib
from collections.abc import Callable

import torch
from torch import Tensor

from benchmarks.harness.case import Case
from benchmarks.harness.machine import Timed
from cvkernels import record
from cvkernels.freeze.quantise.guard import decibels
from tests.support.numerics import (
    assert_close_as_eager,
    gradients,
    map_floats,
    max_error,
    tensors_in,
)

# A call of an op takes microseconds: a host sample is the mean of this many.
HOST_CALLS = 50


class WrongResult(Exception):
    """A variant's answer is further from the float64 answer than the tests allow."""


class Trial:
    """A case with its inputs made and its float64 answer known: checks and binds the variants."""

    def __init__(self, case: Case) -> None:
        # One function compiled for ever more shapes would reach dynamo's limit and run eagerly.
        torch.compiler.reset()
        torch.manual_seed(0)
        self.case = case
        self.args, self.kwargs = case.inputs()
        for tensor in tensors_in([self.args, self.kwargs]):
            if tensor.numel() and not tensor.any():
                raise ValueError(f"{case.op} {case.id}: an input is all zeros, which times nothing")
        exact = map_floats(_double, self.args), map_floats(_double, self.kwargs)
        self._exact = self._results(case.reference, *exact)
        self._eager = self._results(case.reference, self.args, self.kwargs)

    def _results(self, function: Callable, args: tuple, kwargs: dict) -> list[Tensor]:
        if hasattr(function, "answers"):
            return function.answers(*args, **kwargs)
        if self.case.part == "backward":
            return gradients(function, args, kwargs)
        return [function(*args, **kwargs)]

    @property
    def eager_error(self) -> float:
        """The reference's largest error in the case's dtype."""
        return max(map(max_error, self._eager, self._exact))

    def check(self, function: Callable, factor: float = 2.0) -> float:
        """Largest error against float64.

        Raises:
            WrongResult: it is more than ``factor`` times eager's, and one rounding.
        """
        actual = self._results(function, self.args, self.kwargs)
        if self.case.rounds:
            return max(map(max_error, actual, self._exact))
        if self.case.bitwise and not all(map(torch.equal, actual, self._eager)):
            raise WrongResult("not equal to the reference")
        try:
            for ours, theirs, truth in zip(actual, self._eager, self._exact, strict=True):
                assert_close_as_eager(ours, theirs, truth, factor)
        except AssertionError as error:
            raise WrongResult(*error.args) from None
        return max(map(max_error, actual, self._exact))

    def agreement(self, function: Callable) -> tuple[float, float]:
        """The signal-to-noise ratio of one answer in decibels, and its share of rows whose largest
        entry is where float64 has it."""
        (actual,), (truth,) = self._results(function, self.args, self.kwargs), self._exact
        same = actual.argmax(1) == truth.argmax(1)
        return decibels([actual], [truth]), same.double().mean().item()

    def backend(self, function: Callable) -> tuple[str, str]:
        """The backend that a variant of ours runs; why, where it is the reference.

        A CUDA graph's replays record nothing; of one, that of the function that was captured.
        """
        function = getattr(function, "eager", function)
        recorder = _Reasons()
        with record.recording(recorder):
            function(*self._fresh(function), **self.kwargs)
        backends = {call.backend for call in recorder.calls} - {"reference"}
        if backends:
            return "+".join(sorted(backends)), ""
        return "reference", recorder.fallback_reason

    def _fresh(self, function: Callable) -> tuple:
        return function.fresh(*self.args) if hasattr(function, "fresh") else self.args

    def bind(self, function: Callable) -> Timed:
        args, kwargs = self.args, self.kwargs
        if self.case.part == "host":
            return Timed(lambda: function(*args, **kwargs), repeats=HOST_CALLS, host=True)
        if self.case.part != "backward":
            return Timed(
                lambda *args: function(*args, **kwargs),
                lambda: self._fresh(function),
                latency=self.case.network,
            )
        leaves = [tensor for tensor in tensors_in([args, kwargs]) if tensor.requires_grad]
        cotangent = torch.randn_like(function(*args, **kwargs))
        return Timed(
            lambda out: torch.autograd.grad(out, leaves, cotangent),
            lambda: (function(*args, **kwargs),),
        )


class _Reasons(record.Recorder):
    """Also keeps why the reference ran."""

    fallback_reason = ""

    def fallback(self, reason: str) -> contextlib.AbstractContextManager[None]:
        self.fallback_reason = reason
        return super().fallback(reason)


def _double(tensor: Tensor) -> Tensor:
    return tensor.detach().double().requires_grad_(tensor.requires_grad)
