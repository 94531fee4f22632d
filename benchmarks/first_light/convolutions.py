"""The dearest convolutions: our tiles, cuDNN fused and not, and for 1x1 the matrix product."""

from __future__ import annotations

import functools
from collections.abc import Callable, Iterator, Sequence
from dataclasses import replace
from typing import Any

import torch
from torch import Tensor
from torch.nn import functional

from benchmarks import tune
from benchmarks.first_light.setting import Setting, cudnn_benchmark, timed
from benchmarks.harness.machine import Machine, Timed
from benchmarks.harness.sticky import check_context
from cvkernels import backend as backends
from cvkernels.ops.common.norm import fold
from cvkernels.ops.conv_bn_act import tuning
from cvkernels.ops.conv_bn_act.problem import Problem
from cvkernels.tables import first_line
from tests.support.numerics import assert_close_as_eager

DEAREST = 30
TILES = 6  # of a problem, the heuristic's first
# Bytes a second and operations a second that order the problems; only their ratio counts.
COPY, MATRIX = 4.3e12, 790e12

Call = Callable[[], Tensor]


def items(setting: Setting) -> Iterator[tuple[str, Callable[[], dict[str, Any]]]]:
    machine = setting.machine()
    for problem, calls in dearest(setting):
        row = functools.partial(measure, setting, machine, problem, calls)
        yield tuning.key(problem), row


def dearest(setting: Setting) -> list[tuple[Problem, int]]:
    """(problem, how often the networks have it), by the time that they must spend in them."""
    if setting.rehearsal:
        geometry = ((1, 1), (0, 0), (1, 1))
        small = Problem(1, 64, 4, 4, 32, 1, 1, *geometry, 1, torch.float32, "relu", has_bn=True)
        spatial = replace(small, R=3, S=3, padding=(1, 1), has_residual=True)
        return [(small, 2), (spatial, 1)]
    calls = tune.problems(setting.networks, [setting.batch], [setting.dtype])

    def least(problem: Problem) -> float:
        traffic = problem.bytes_read + problem.bytes_written
        return max(traffic / COPY, problem.flops / MATRIX)

    found = sorted(calls, key=lambda problem: -calls[problem] * least(problem))
    return [(problem, calls[problem]) for problem in found[:DEAREST]]


def measure(setting: Setting, machine: Machine, problem: Problem, calls: int) -> dict[str, Any]:
    given = tune.operands(problem, setting.device)
    truth = tune.exact(problem, given, torch.float32 if not setting.rehearsal else torch.float64)
    eager = tune.exact(problem, given, problem.dtype)
    right: dict[str, Timed] = {}
    wrong: dict[str, str] = {}
    for name, call in candidates(setting, problem, given).items():
        try:
            assert_close_as_eager(call(), eager, truth)
        except Exception as error:  # noqa: BLE001 - of a compiler, too; the others count
            wrong[name] = f"{type(error).__name__}: {first_line(error)}"
            check_context(error)
        else:
            right[name] = Timed(call)
    for name, call in products(problem, given).items():
        right[name] = Timed(call)
    times = timed(machine, setting.settings(12, 1.0), right)
    floor = machine.rates(problem.dtype)
    least = max(
        (problem.bytes_read + problem.bytes_written) / floor.copy_gb_per_s / 1e3,
        problem.flops / floor.matrix_tflop_per_s / 1e6,
    )
    return {"calls": calls, "floor_us": least, "variants": times, "wrong": wrong}


def candidates(setting: Setting, problem: Problem, given: tune.Operands) -> dict[str, Call]:
    """Ours by name of their tile, the heuristic's as "ours", and cuDNN's."""
    capability = backends.gpu(given.x)[1]
    first, *others = tune.candidates(problem, capability)
    tiles = [replace(first, backend="triton"), *(c for c in others if c.backend == "triton")]
    tiles = list(dict.fromkeys(tiles))[: 2 if setting.rehearsal else TILES]
    found: dict[str, Call] = {}
    for index, config in enumerate(tiles):
        name = f"ours {config.name}" if index == 0 else config.name
        found[name] = tune.runner(problem, config, given)
    for benchmark in (False, True):
        word = "benchmark" if benchmark else "first answer"
        if not problem.has_prologue:
            call = with_cudnn(plain(problem, given), benchmark)
            found[f"convolution + {problem.act}, {word}"] = call
        if any(c.backend == "cudnn" for c in (first, *others)) and not setting.rehearsal:
            run = tune.runner(problem, replace(first, backend="cudnn"), given)
            found[f"cudnn fused, {word}"] = with_cudnn(run, benchmark)
    return found


def with_cudnn(call: Call, benchmark: bool) -> Call:
    def run() -> Tensor:
        with cudnn_benchmark(benchmark):
            return call()

    return run


def plain(problem: Problem, given: tune.Operands) -> Call:
    """aten's convolution with folded weights, then shortcut and activation in place."""
    p = problem
    weight, bias = fold(given.weight, given.bias, given.bn)
    weight = weight.contiguous(memory_format=torch.channels_last)
    geometry = (p.stride, p.padding, p.dilation, False, (0, 0), p.groups)

    def run() -> Tensor:
        y = torch.convolution(given.x, weight, bias, *geometry)
        if given.residual is not None:
            y.add_(given.residual)
        return y if p.act == "none" else getattr(functional, p.act)(y, inplace=True)

    return run


def products(problem: Problem, given: tune.Operands) -> dict[str, Call]:
    """torch.addmm of a 1x1's sizes: what a matrix product without our epilogue takes."""
    sizes: Sequence[int] = (problem.R, problem.S, *problem.stride, problem.groups)
    if tuple(sizes) != (1, 1, 1, 1, 1) or problem.padding != (0, 0):
        return {}
    x = given.x.permute(0, 2, 3, 1).reshape(-1, problem.C)
    weight = given.weight.reshape(problem.K, problem.C).t()
    bias = torch.zeros(problem.K, dtype=x.dtype, device=x.device)
    out = torch.empty(x.shape[0], problem.K, dtype=x.dtype, device=x.device)
    return {"addmm": lambda: torch.addmm(bias, x, weight, out=out)}
