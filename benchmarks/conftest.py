"""Benchmarks under pytest-benchmark: a row per case and variant, our columns in extra_info.

``pytest benchmarks/bench_<op>.py [-k NAME] [--benchmark-json FILE]``. pytest-benchmark times the
rows one after another; ``python -m benchmarks kernels --op <op>`` interleaves them.
"""

from __future__ import annotations

import functools
import time
from dataclasses import asdict

import pytest

from benchmarks.harness import environment, run
from benchmarks.harness.case import grad_mode
from benchmarks.harness.machine import Machine, clock_of
from benchmarks.harness.trial import Trial

SECONDS = 1.0  # of timing per row, about


def pytest_benchmark_update_machine_info(config, machine_info):
    machine_info["cvkernels"] = environment.environment(environment.default_device())


def pytest_generate_tests(metafunc):
    if "variant" not in metafunc.fixturenames:
        return
    device = environment.default_device()
    cases = metafunc.module.cases(
        device, environment.default_dtypes(device), environment.default_batch(device), quick=False
    )
    parameters = []
    for case in cases:
        timer = time.perf_counter if case.part == "host" else clock_of(device)
        mark = pytest.mark.benchmark(group=f"{case.op} {case.id}", timer=timer)
        parameters += [
            pytest.param(case, variant, marks=mark, id=f"{case.id}-{variant}")
            for variant in case.variants
        ]
    metafunc.parametrize(("case", "variant"), parameters)


@pytest.fixture(scope="session")
def machine():
    return Machine(environment.default_device())


@pytest.fixture(scope="session")
def trial_of():
    """A case's inputs and float64 answer, shared by its variants, which follow one another."""
    return functools.lru_cache(maxsize=1)(Trial)


@pytest.fixture(scope="session")
def measured():
    """case -> the rows so far, each with the extra_info that it goes to."""
    return {}


@pytest.fixture
def measure(benchmark, case, variant, machine, trial_of, measured):
    """Check the variant, let pytest-benchmark time it, and add the harness's columns."""

    def measure() -> None:
        row = run.new_row(case, variant)
        with grad_mode(case):
            timed = run.prepare(trial_of(case), row)
            if row.status == "unavailable":
                pytest.skip(row.note)
            assert timed is not None, f"{row.status}: {row.note}"
            machine.hide_launches([timed])
            seconds = machine.sample(timed) * timed.repeats
            rounds = min(max(int(SECONDS / seconds), 8), 100)

            def setup():
                arguments = timed.setup()
                machine.make_cold()
                return arguments, {}

            benchmark.pedantic(
                timed.run,
                setup=None if timed.host else setup,
                rounds=rounds,
                iterations=timed.repeats,
            )
        if benchmark.disabled:
            return
        run.fill(row, benchmark.stats.stats.data, machine.rates(case.dtype))
        rows = measured.setdefault(case, [])
        rows.append((row, benchmark.extra_info))
        run.compare([row for row, _ in rows])
        for known, extra_info in rows:
            extra_info.update(asdict(known))

    return measure
