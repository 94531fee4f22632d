"""``python -m benchmarks tune``: the fastest backend and tile of each convolution on this GPU.

Every convolution of the networks is measured with each tile that the heuristic could return and,
where it can run it, with cuDNN: answers checked first, caches cold, candidates interleaved. What
beats the heuristic's answer by more than :data:`GAIN` goes into the table of the GPU under
``cvkernels/tuned/``, which :mod:`cvkernels.ops.conv_bn_act.tuning` reads. Convolutions come in the
order of the time that a network must spend in them; with ``--minutes`` the rest is left as it was.
"""

from __future__ import annotations

import argparse
import contextlib
import json
import math
import multiprocessing
import os
import sys
import time
from collections import Counter
from collections.abc import Callable, Iterable, Iterator, Sequence
from concurrent.futures import ProcessPoolExecutor, wait
from dataclasses import asdict, replace
from typing import Any, NamedTuple
from unittest import mock

import torch
import torch.nn.functional as F
from torch import Tensor

import cvkernels
from benchmarks.harness import command_line
from benchmarks.harness.case import batch_norm
from benchmarks.harness.case import image as random_image
from benchmarks.harness.command_line import Refused, dtypes_of
from benchmarks.harness.environment import environment
from benchmarks.harness.machine import Machine, Settings, Timed, interleave
from benchmarks.harness.report import summarize
from benchmarks.harness.sticky import check_context
from cvkernels import backend as backends
from cvkernels.demo import NETWORKS
from cvkernels.freeze.frozen import planned
from cvkernels.functional import BatchNormParams, DerivedWeights, conv_bn_act
from cvkernels.ops.conv_bn_act import cudnn, halo, op, tuning
from cvkernels.ops.conv_bn_act import triton as conv_launches
from cvkernels.ops.conv_bn_act.problem import Problem
from cvkernels.ops.conv_bn_act.reference import conv_bn_act_reference
from cvkernels.ops.conv_bn_act.tiles import Config
from cvkernels.tables import text_table
from tests.support.numerics import assert_close_as_eager

GAIN = 0.03  # a smaller one is noise, and the heuristic's answer stays
BATCHES = (1, 128)
SETTINGS = Settings(rounds=12, seconds=0.4, least=6)


class Operands(NamedTuple):
    """The tensors of a call, as triton.py takes them, and the reference's keywords for them."""

    x: Tensor
    weight: Tensor
    bias: Tensor | None
    bn: BatchNormParams | None
    residual: Tensor | None
    input_bn: BatchNormParams | None
    gate: Tensor | None
    out: Tensor
    projection: Tensor | None
    output_gate: Tensor | None


class Found(NamedTuple):
    """Seconds of each candidate of a problem, by its config, and the heuristic's."""

    problem: Problem
    seconds: dict[Config, float]
    heuristic: Config

    @property
    def best(self) -> Config:
        if not self.seconds:
            return self.heuristic
        fastest = min(self.seconds, key=self.seconds.__getitem__)
        expected = self.seconds.get(self.heuristic, math.inf)
        return fastest if expected > (1 + GAIN) * self.seconds[fastest] else self.heuristic


def problems(
    networks: Iterable[str], batches: Iterable[int], dtypes: Iterable[torch.dtype]
) -> Counter[Problem]:
    """The convolutions that the networks run on a GPU at 224 x 224, and how often each.

    Those of the frozen networks, and those that only the others run.
    """
    met: Counter[Problem] = Counter()
    unfrozen: Counter[Problem] = Counter()
    checked = op.problem_of

    def watched(*arguments: Any) -> Problem:
        problem = checked(*arguments)
        unfrozen[_key_of(problem)] += 1
        return problem

    for network in networks:
        options = {"init_weights": False} if network == "googlenet" else {}
        with torch.device("meta"):
            model = getattr(cvkernels.models, network)(**options).eval()
        for dtype in dtypes:
            model = model.to(dtype)
            for batch in batches:
                x = torch.empty(batch, 3, 224, 224, dtype=dtype, device="meta")
                met.update(_key_of(problem) for _, problem in planned(model, x).convolutions())
                with mock.patch.object(op, "problem_of", watched):
                    cvkernels.explain(model, x.contiguous(memory_format=torch.channels_last))
    return met + Counter({p: count for p, count in unfrozen.items() if p not in met})


def _key_of(problem: Problem) -> Problem:
    """The problem with its norm in the epilogue, for all that have its key; beside a projection,
    where it is folded, with a bias."""
    projected = problem.projection is not None
    return replace(problem, has_bias=projected, has_bn=not projected, has_out=False)


def candidates(problem: Problem, capability: tuple[int, int]) -> list[Config]:
    """The heuristic's answer first, then what else might be faster."""
    first = tuning.heuristic(problem, capability)
    found = [first, *tuning.measured(problem, capability)]
    if not cudnn.why_not(problem):
        found.append(replace(first, backend="cudnn"))
    if not halo.unfit(problem) and halo.tile_of(problem, capability):
        found.append(replace(first, backend="halo"))
    return list(dict.fromkeys(found))


def operands(problem: Problem, device: torch.device) -> Operands:
    p = problem

    def image(*shape: int) -> Tensor:
        return random_image(*shape, dtype=p.dtype, device=device)

    def gates(channels: int) -> Tensor:
        return torch.rand(p.N, channels, device=device).to(p.dtype)

    residual = image(p.N, p.K, p.P, p.Q) if p.has_residual else None
    projection = None
    if (projected := p.projection) is not None:
        size = [(n - 1) * s + 1 for n, s in zip((p.P, p.Q), projected.stride, strict=True)]
        residual = image(p.N, projected.C, *size)
        projection = image(p.K, projected.C, 1, 1) / projected.C**0.5
    fan_in = p.C // p.groups * p.R * p.S
    return Operands(
        image(p.N, p.C, p.H, p.W),
        image(p.K, p.C // p.groups, p.R, p.S) / fan_in**0.5,
        torch.randn(p.K, device=device) if p.has_bias else None,
        batch_norm(p.K, device) if p.has_bn else None,
        residual,
        BatchNormParams(*batch_norm(p.C, device)[:2]) if p.has_input_bn else None,
        gates(p.C) if p.has_input_gate else None,
        image(p.N, p.K, p.P, p.Q),
        projection,
        gates(p.K) if p.has_output_gate else None,
    )


def runner(problem: Problem, config: Config, given: Operands) -> Callable[[], Tensor]:
    """A call with this config, which returns its output."""
    if config.backend != "triton":
        p, cache = problem, DerivedWeights()
        planned = conv_bn_act.plan(
            *given[:4], stride=p.stride, padding=p.padding, dilation=p.dilation, groups=p.groups,
            act=p.act, residual=given.residual, backend=config.backend, cache=cache,
        )  # fmt: skip
        return lambda: planned.run(given.x, given.residual)

    def run() -> Tensor:
        conv_launches.run(problem, *given, precision="ieee", config=config)
        return given.out

    return run


def exact(problem: Problem, given: Operands, dtype: torch.dtype) -> Tensor:
    """The reference in ``dtype``; the norms' vectors stay as they are where they are wider."""

    def cast(value: Any) -> Any:
        if isinstance(value, BatchNormParams):
            wide = torch.promote_types(dtype, torch.float32)
            return BatchNormParams(
                *(None if v is None else v.to(wide) for v in value[:4]), value.eps
            )
        return None if value is None else value.to(dtype)

    x, weight, bias, bn, residual, input_bn, gate, _, projection, output_gate = map(cast, given)
    if problem.projection is not None:
        residual = F.conv2d(residual, projection, stride=problem.projection.stride)
    return conv_bn_act_reference(
        x, weight, bias, bn, stride=problem.stride, padding=problem.padding,
        dilation=problem.dilation, groups=problem.groups, act=problem.act, residual=residual,
        input_bn=input_bn, input_gate=gate, output_gate=output_gate,
    )  # fmt: skip


def measure(problem: Problem, machine: Machine, settings: Settings = SETTINGS) -> Found:
    """Every candidate that gives the right answer, timed. Float32 is the truth of 16 bits."""
    device = machine.device
    given = operands(problem, device)
    wide = torch.float64 if problem.dtype == torch.float32 else torch.float32
    truth, eager = (exact(problem, given, dtype) for dtype in (wide, problem.dtype))
    tried = candidates(problem, backends.gpu(given.x)[1])
    calls: dict[Config, Timed] = {}
    for config in tried:
        try:
            run = runner(problem, config, given)
            assert_close_as_eager(run(), eager, truth)
        except Exception as error:  # noqa: BLE001 - of a compiler, too; others go on
            print(f"{tuning.key(problem)}: {config}: {error}", file=sys.stderr)
            check_context(error)
        else:
            calls[config] = Timed(run)
    del truth, eager
    machine.hide_launches(calls.values())
    samples = interleave(calls, machine, settings) if calls else {}
    seconds = {config: summarize(times).median for config, times in samples.items()}
    return Found(problem, seconds, tried[0])


def compiled(chosen: Sequence[Problem], device: torch.device, seconds: float) -> Iterator[Problem]:
    """Each of ``chosen`` once a process for each core has compiled its candidates, and those of the
    ones after it meanwhile, into Triton's cache on disk; ends after ``seconds``."""
    end = time.monotonic() + seconds
    pool = ProcessPoolExecutor(len(os.sched_getaffinity(0)), multiprocessing.get_context("spawn"))
    try:
        waiting = [pool.submit(compile_candidates, problem, str(device)) for problem in chosen]
        for problem, compiling in zip(chosen, waiting, strict=True):
            wait([compiling], max(0.0, end - time.monotonic()))
            if time.monotonic() >= end:
                return
            if not compiling.cancelled() and (error := compiling.exception()) is not None:
                print(f"{tuning.key(problem)}: {error}", file=sys.stderr)  # measure tells of what
            yield problem
    finally:
        pool.shutdown(wait=False, cancel_futures=True)


def compile_candidates(problem: Problem, device: str) -> None:
    given = operands(problem, torch.device("meta"))
    with torch.cuda.device(device):
        for config in candidates(problem, torch.cuda.get_device_capability()):
            if config.backend == "triton":
                planned = conv_launches.plan_launch(
                    problem, given.x, given.weight, given.residual, given.gate, given.out,
                    precision="ieee", config=config, input_bn=given.input_bn,
                )  # fmt: skip
                # What does not compile is not measured; measure says why.
                with contextlib.suppress(Exception):
                    for launch, arguments in planned.launches(*given):
                        launch.warmup(*arguments)


def table_of(results: Iterable[Found], device: str, capability: Sequence[int], old: dict) -> dict:
    """The table with these results in place of what ``old`` has for the same keys.

    Of a table that other versions of torch or Triton were measured with, nothing is kept.
    """
    versions = environment(torch.device("cpu"))
    made = {name: versions[name] for name in ("torch", "triton", "commit")}
    same = all(old.get(name) == made[name] for name in ("torch", "triton"))
    entries = dict(old["entries"]) if same else {}
    for found in results:
        key, best = tuning.key(found.problem), found.best
        entries.pop(key, None)
        if best != found.heuristic:
            named = {"backend": best.backend}
            entries[key] = asdict(best) if best.backend == "triton" else named
    fields = {"device": device, "capability": list(capability), "op": "conv_bn_act", **made}
    return fields | {"entries": dict(sorted(entries.items()))}


def report(results: Sequence[Found], calls: Counter[Problem]) -> str:
    """A row for each problem, and what all calls take with the heuristic and with the table."""
    header = ("calls", "problem", "heuristic us", "best us", "gain", "best")
    rows = []
    for found in results:
        expected = found.seconds.get(found.heuristic, math.nan)
        best = found.seconds.get(found.best, math.nan)
        words = " ".join(str(value) for value in asdict(found.best).values())
        times = (f"{1e6 * expected:.1f}", f"{1e6 * best:.1f}", f"{expected / best:.2f}x")
        rows.append((str(calls[found.problem]), tuning.key(found.problem), *times, words))
    measured = [found for found in results if found.heuristic in found.seconds]
    before = sum(calls[f.problem] * f.seconds[f.heuristic] for f in measured)
    after = sum(calls[f.problem] * f.seconds[f.best] for f in measured)
    total = f"all calls: {1e6 * before:.0f} us by the heuristic, {1e6 * after:.0f} us by the table"
    return f"{text_table(header, rows)}\n{total}"


def add_options(parser: argparse.ArgumentParser) -> None:
    command_line.add_network_options(parser, list(NETWORKS))
    command_line.add_options(parser, rounds=False)


def main(options: argparse.Namespace) -> int:
    device = options.device
    if device.type != "cuda":
        raise Refused("tune measures a GPU, and torch finds no CUDA device here")
    name, capability = torch.cuda.get_device_name(device), torch.cuda.get_device_capability(device)
    path = options.json or tuning.shipped_table(name)
    path.parent.mkdir(exist_ok=True)
    old = json.loads(path.read_text()) if path.exists() else {}
    command_line.check_writable(path)
    calls = problems(options.network or NETWORKS, options.batch or BATCHES, dtypes_of(options))
    machine = Machine(device)
    rates = {dtype: machine.rates(dtype) for dtype in {problem.dtype for problem in calls}}

    def least(problem: Problem) -> float:
        traffic, (copy, matrix) = problem.bytes_read + problem.bytes_written, rates[problem.dtype]
        return max(traffic / copy / 1e9, problem.flops / matrix / 1e12)

    chosen = sorted(calls, key=lambda problem: -calls[problem] * least(problem))
    results: list[Found] = []
    try:
        for problem in compiled(chosen, device, 60 * options.minutes):
            try:
                results.append(measure(problem, machine))
            except torch.OutOfMemoryError as error:
                print(f"{tuning.key(problem)}: {error}", file=sys.stderr)
    finally:  # after Ctrl-C, too
        if len(results) < len(chosen):
            print(f"{len(chosen) - len(results)} problems are not measured", file=sys.stderr)
        command_line.write_json(path, table_of(results, name, capability, old))
        print(report(results, calls))
    return 0
