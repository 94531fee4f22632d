"""``tune``: measure each convolution of a model on every backend that can run it."""

from __future__ import annotations

import json
import time
from collections.abc import Callable
from pathlib import Path

import torch
from torch import Tensor, nn

from cvkernels.freeze import backends
from cvkernels.freeze.backends import Backend
from cvkernels.freeze.frozen import Frozen, freeze
from cvkernels.freeze.ops import Conv
from cvkernels.freeze.progress import progress
from cvkernels.functional import DerivedWeights, dense_concat, se_scale
from cvkernels.ops.conv_bn_act import op as conv_bn_act
from cvkernels.ops.conv_bn_act.problem import Problem

# Each candidate is timed in turns, until it has run so often and so long.
RUNS, SECONDS = 5, 0.02


class Choices(dict[str, str]):
    """The fastest backend of each convolution, by its shape; ``freeze(..., table=)`` takes it.

    ``seconds`` has what every backend took.
    """

    def __init__(self) -> None:
        super().__init__()
        self.seconds: dict[str, dict[str, float]] = {}

    def save(self, path: str | Path) -> None:
        """Write the choices to a JSON file, which ``freeze(..., table=path)`` takes."""
        Path(path).write_text(json.dumps(self, indent=1) + "\n")


def tune(model: nn.Module, example: Tensor) -> Choices:
    """Time every convolution of ``model`` on ``example``'s shape on all backends that can run it.

    The choices hold for this machine, the number of threads set, and these shapes: convolutions
    of other shapes run by the rule. They take effect where they are given: in
    ``freeze(model, example, table=choices)``.

    Args:
        model: in eval, or what :func:`cvkernels.freeze` made of it.
        example: as of :func:`cvkernels.freeze`.

    Raises:
        TypeError, ValueError: as of :func:`cvkernels.freeze`.
    """
    frozen = model if isinstance(model, Frozen) else freeze(model, example)
    convolutions: dict[str, tuple[Conv, Problem]] = {}
    for conv, problem in frozen.convolutions(example):
        convolutions.setdefault(backends.key(problem), (conv, problem))
    choices = Choices()
    with torch.no_grad(), progress("tune", len(convolutions)) as advance:
        for key, (conv, problem) in convolutions.items():
            candidates = backends.possible(problem, frozen.device)
            if len(candidates) > 1:
                seconds = _measure(conv, problem, candidates, frozen.device)
                choices[key] = min(seconds, key=seconds.__getitem__)
                choices.seconds[key] = seconds
            advance()
    return choices


def _measure(
    conv: Conv, problem: Problem, candidates: list[Backend], device: torch.device
) -> dict[str, float]:
    runs = {}
    for backend in candidates:
        run = _runner(conv, problem, backend, device)
        try:
            run()
        except Exception as error:
            if type(error).__name__ != "OutOfResources":  # Triton's: a tile too large for this GPU
                raise
        else:
            runs[backend.name] = run
    best = dict.fromkeys(runs, float("inf"))
    count, spent = 0, 0.0
    while count < RUNS or spent < SECONDS * len(runs):
        for name, run in runs.items():
            start = time.perf_counter()
            run()
            if device.type == "cuda":
                torch.cuda.synchronize(device)
            took = time.perf_counter() - start
            best[name] = min(best[name], took)
            spent += took
        count += 1
    return best


def _runner(
    conv: Conv, problem: Problem, backend: Backend, device: torch.device
) -> Callable[[], None]:
    """Runs the convolution, after its prologue where the backend has none."""

    def drawn(*shape: int) -> Tensor:
        tensor = torch.randn(shape, device=device).to(problem.dtype)
        return tensor.contiguous(memory_format=torch.channels_last) if len(shape) == 4 else tensor

    x = drawn(problem.N, problem.C, problem.H, problem.W)
    gate = drawn(problem.N, problem.C) if problem.has_input_gate else None
    output_gate = drawn(problem.N, problem.K) if problem.has_output_gate else None
    channels, size = problem.K, (problem.P, problem.Q)
    if (projected := problem.projection) is not None:
        channels, steps = projected.C, zip(size, projected.stride, strict=True)
        size = tuple((n - 1) * step + 1 for n, step in steps)
    has_residual = problem.has_residual or projected is not None
    residual = drawn(problem.N, channels, *size) if has_residual else None
    alone = problem.has_prologue and not backend.prologue
    convolve = conv_bn_act.plan(
        x, **(conv.bare() if alone else conv).arguments, residual=residual, cache=DerivedWeights(),
        input_gate=None if alone else gate, output_gate=output_gate,
        implementation=backend.implementation, once=True,
    ).run  # fmt: skip
    if not alone:
        return lambda: convolve(x, residual, gate, None, output_gate)
    before = torch.empty_like(x)

    def run() -> None:
        if conv.input_bn is not None:
            dense_concat(before, x, 0, conv.input_bn, relu=True)
        else:
            se_scale(x, gate, out=before)
        convolve(before, residual, None, None, output_gate)

    return run
