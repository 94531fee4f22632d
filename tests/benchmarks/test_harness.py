"""The benchmarks' harness: what it times, what it refuses, and what it keeps."""

import contextlib
import dataclasses
import sys
import types

import pytest
import torch

from benchmarks.harness import machine as machines
from benchmarks.harness.machine import Machine, Settings, Timed, interleave
from benchmarks.harness.report import Rates, summarize
from benchmarks.harness.run import forget_triton_kernels, run_cases
from cvkernels import record
from cvkernels.backend import BackendError
from tests.support.harness_fakes import CPU, FEW, FakeClock, doubled, make_case, slow


@pytest.fixture
def clock():
    return FakeClock()


@pytest.fixture
def machine(clock, monkeypatch):
    """A CPU with a fake clock, a small cache and known rates."""
    monkeypatch.setattr(machines, "last_level_cache", lambda device: 2**10)
    made = Machine(CPU, clock)
    monkeypatch.setattr(made, "rates", lambda dtype: Rates(1.0, 1.0))
    return made


def measured(machine, variants, **options):
    """The report of one case with these variants."""
    return run_cases([make_case(variants, **options)], machine, FEW)


def test_summary_is_median_and_quintiles():
    assert summarize([5.0, 1.0, 2.0, 4.0, 3.0, 6.0]) == (3.5, 2.0, 5.0)
    assert summarize([7.0]) == (7.0, 7.0, 7.0)


def test_times_are_medians_of_what_the_clock_says(machine, clock):
    calls = {
        "steady": Timed(clock.spending(2.0)),
        "jumping": Timed(clock.spending(1.0, 1.0, 1.0, 1.0, 9.0)),
    }
    samples = interleave(calls, machine, Settings(rounds=10, seconds=60.0))
    assert summarize(samples["steady"]) == pytest.approx((2.0, 2.0, 2.0))
    assert summarize(samples["jumping"]).median == pytest.approx(1.0)
    assert sum(samples["jumping"]) == pytest.approx(2 * 13.0)


def test_setup_is_not_timed(machine, clock):
    setup = clock.spending(100.0)
    timed = Timed(clock.spending(1.0), lambda: (setup(),))
    assert machine.sample(timed) == pytest.approx(1.0)


def test_threads_of_the_call_before_fall_asleep_before_a_latency(machine, monkeypatch):
    events = []
    monkeypatch.setattr(machines.time, "sleep", lambda seconds: events.append(seconds))
    machine.sample(Timed(lambda: events.append("run"), latency=True))
    machine.sample(Timed(lambda: events.append("op")))
    assert events == [machines.REST, "run", "op"] and machines.REST > 0


def test_host_samples_are_means_in_warm_caches(machine, monkeypatch):
    monkeypatch.setattr(machine, "make_cold", lambda: pytest.fail("caches must stay warm"))
    ran = []
    assert machine.sample(Timed(lambda: ran.append(1), repeats=7, host=True)) > 0
    assert len(ran) == 7


def test_each_round_runs_each_variant_once_in_changing_order(machine):
    order = []
    calls = {name: Timed(lambda name=name: order.append(name)) for name in "abc"}
    interleave(calls, machine, Settings(rounds=12, seconds=60.0))
    rounds = [tuple(order[start : start + 3]) for start in range(0, len(order), 3)]
    assert len(rounds) == 12
    assert all(sorted(names) == ["a", "b", "c"] for names in rounds)
    assert len(set(rounds)) > 2


def test_caches_are_cold_before_every_call(machine, monkeypatch):
    events = []
    monkeypatch.setattr(machine, "make_cold", lambda: events.append("flush"))
    calls = {name: Timed(lambda: events.append("call")) for name in "ab"}
    interleave(calls, machine, FEW)
    assert events == ["flush", "call"] * 12


def test_flush_reads_more_than_the_last_level_cache():
    machine = Machine(CPU)
    assert machine._evictor.nbytes >= 2 * machines.last_level_cache(CPU) > 0
    assert machine._evictor.any()


def test_rounds_end_when_the_seconds_are_spent(machine):
    calls = {"a": Timed(lambda: None)}
    samples = interleave(calls, machine, Settings(rounds=1000, seconds=0.0, least=3))
    assert len(samples["a"]) == 3


def test_columns_follow_from_the_time(machine, clock):
    times = {"eager": 4e-6, "compile": 2e-6, "cvkernels": 1e-6}
    variants = {name: slow(clock, seconds) for name, seconds in times.items()}
    eager, compiled, ours = measured(machine, variants).rows
    assert (eager.status, eager.backend, compiled.backend) == ("measured", "aten", "inductor")
    assert ours.time_us == pytest.approx(1.0) and ours.samples == 6
    assert (ours.vs_eager, ours.vs_compile) == (pytest.approx(4.0), pytest.approx(2.0))
    assert (ours.gb_per_s, ours.copy_share) == (pytest.approx(1.0), pytest.approx(1.0))
    assert (ours.tflop_per_s, ours.matrix_share) == (pytest.approx(1.0), pytest.approx(1.0))
    assert eager.bound_share == pytest.approx(0.25)
    assert ours.max_error < 1e-6


def test_rates_are_measured_per_dtype_and_once(monkeypatch):
    monkeypatch.setattr(machines, "last_level_cache", lambda device: 2**16)
    machine = Machine(CPU)
    rates = [machine.rates(dtype) for dtype in (torch.float32, torch.bfloat16, torch.float32)]
    assert rates[0] is rates[2]
    assert all(copy > 0 and matrix > 0 for copy, matrix in rates)


def test_the_matrix_rate_is_taken_in_the_precision_of_convolutions(monkeypatch):
    products, seen = torch.backends.cuda.matmul, []
    convolutions = torch.backends.cudnn.conv
    before, before_conv = products.fp32_precision, convolutions.fp32_precision
    monkeypatch.setattr(machines, "last_level_cache", lambda device: 2**10)
    measure = machines.interleave

    def watched(*args):
        seen.append(products.fp32_precision)
        return measure(*args)

    monkeypatch.setattr(machines, "interleave", watched)
    convolutions.fp32_precision = "tf32"
    try:
        Machine(CPU).rates(torch.float32)
    finally:
        convolutions.fp32_precision = before_conv
    assert seen == ["tf32"] and products.fp32_precision == before


def test_wrong_result_is_refused_before_timing(machine):
    calls = []

    def wrong(x):
        calls.append(1)
        return x * 2 + 1e-3

    report = measured(machine, {"eager": doubled, "cvkernels": wrong})
    eager, ours = report.rows
    assert (eager.status, ours.status, ours.time_us) == ("measured", "wrong", None)
    assert "max error 1.0" in ours.note and "allowed" in ours.note
    assert len(calls) == 1 and not report.sound
    assert "wrong: max error" in str(report)


def test_nan_is_wrong(machine):
    variants = {"eager": doubled, "cvkernels": lambda x: x * torch.nan}
    assert measured(machine, variants).rows[1].status == "wrong"


def test_moved_data_must_be_equal(machine):
    nudged = {"eager": doubled, "cvkernels": lambda x: x * 2 * (1 + 2**-23)}
    assert measured(machine, nudged).rows[1].status == "measured"
    row = measured(machine, nudged, bitwise=True).rows[1]
    assert row.note == "not equal to the reference"


def test_wrong_gradient_is_refused(machine):
    class Skewed(torch.autograd.Function):
        @staticmethod
        def forward(ctx, x):
            return x * 2

        @staticmethod
        def backward(ctx, grad):
            return grad * 2.01

    def inputs():
        return (torch.randn(4, 4, requires_grad=True),), {}

    variants = {"eager": doubled, "cvkernels": Skewed.apply}
    eager, ours = measured(machine, variants, inputs=inputs, part="backward").rows
    assert (eager.status, ours.status) == ("measured", "wrong")


def test_zeros_are_not_timed(machine):
    (row,) = measured(machine, {"eager": doubled}, inputs=lambda: ((torch.zeros(4, 4),), {})).rows
    assert row.status == "failed" and "all zeros" in row.note and row.time_us is None


@pytest.mark.parametrize("when", ["when made", "when called"])
def test_missing_compiler_is_a_row_that_says_why(when, machine, clock):
    def broken(*args):
        raise RuntimeError("No working C++ compiler found\nand much more")

    case = make_case({"eager": doubled, "compile": broken, "cvkernels": doubled})
    if when == "when made":
        case.variants["compile"] = broken
    report = run_cases([case], machine, FEW)
    eager, compiled, ours = report.rows
    assert (compiled.status, compiled.time_us) == ("unavailable", None)
    assert compiled.note == "RuntimeError: No working C++ compiler found"
    assert (eager.status, ours.status, ours.vs_compile) == ("measured", "measured", None)
    assert report.sound


def test_backend_that_cannot_run_is_unavailable_and_a_crash_is_failed(machine):
    def refuses(x):
        raise BackendError("conv: backend 'cudnn' cannot run this call")

    def crashes(x):
        raise TypeError("a bug")

    def too_large(x):
        raise torch.OutOfMemoryError("out of memory")

    ours = {"cvkernels cudnn": refuses, "cvkernels": crashes, "cvkernels triton": too_large}
    report = measured(machine, {"eager": doubled, **ours})
    statuses = [row.status for row in report.rows]
    assert statuses == ["measured", "unavailable", "failed", "unavailable"]
    assert not report.sound


def test_stock_that_is_not_installed_leaves_the_other_cases(machine):
    def missing():
        raise ModuleNotFoundError("No module named 'torchvision'")

    case = dataclasses.replace(make_case({"eager": doubled, "cvkernels": doubled}), inputs=missing)
    report = run_cases([case, make_case({"eager": doubled})], machine, FEW)
    assert [row.status for row in report.rows] == ["unavailable", "unavailable", "measured"]
    assert report.rows[0].note == "No module named 'torchvision'" and report.sound


def test_case_that_does_not_fit_leaves_the_others(machine):
    def too_large():
        raise torch.OutOfMemoryError("out of memory")

    cases = [make_case({"eager": doubled}, "huge", too_large), make_case({"eager": doubled})]
    huge, fits = run_cases(cases, machine, FEW).rows
    assert (huge.status, huge.note, fits.status) == ("unavailable", "out of memory", "measured")


def test_interrupt_keeps_what_was_measured(machine, clock):
    def interrupted(x):
        interrupted.calls += 1
        # The check, the question for the backend, three to warm up, and then three samples.
        if interrupted.calls > 8:
            raise KeyboardInterrupt
        return x * 2

    interrupted.calls = 0
    cases = [
        make_case({"eager": slow(clock, 1e-6)}, "first"),
        make_case({"eager": slow(clock, 1e-6), "cvkernels": interrupted}, "second"),
        make_case({"eager": doubled}, "third"),
    ]
    report = run_cases(cases, machine, FEW)
    assert not report.complete
    assert [row.case for row in report.rows] == ["first", "second", "second"]
    assert report.rows[0].samples == 6 and report.rows[2].samples == 3
    assert all(row.status == "measured" for row in report.rows)
    assert "interrupted" in str(report) and not report.as_dict()["complete"]


def test_same_variant_twice_tells_the_noise(machine, clock):
    report = measured(machine, {"eager": slow(clock, 1e-6), "cvkernels": slow(clock, 2e-6)})
    assert report.rows[0].again == pytest.approx(1.0) and report.rows[1].again is None
    assert report.noise.worst < 1e-6 and report.noise.spread < 1e-6
    assert not report.noise.too_noisy
    assert "quiet enough" in str(report)
    # Ever slower: whichever of the two runs later in a round looks worse.
    drifting = make_case({"eager": slow(clock, *(1e-6 * 2**power for power in range(30)))})
    report = run_cases([drifting], machine, Settings(rounds=1, seconds=60.0))
    assert report.noise.too_noisy and "TOO NOISY" in str(report)
    assert report.rows[0].note.startswith("noisy: ")


def test_fallback_to_the_reference_says_why(machine):
    def fallen_back(x):
        recorder = record.active()
        with recorder.fallback("no such kernel") if recorder else contextlib.nullcontext():
            return x * 2

    (row,) = measured(machine, {"cvkernels": fallen_back}).rows
    assert (row.backend, row.note) == ("reference", "no such kernel")


def test_a_graph_s_backend_is_that_of_what_it_was_captured_of(machine):
    def reports(x):
        with record.active().call("double", "native", "compiled for CPU", 1, 64, 64):
            return doubled(x)

    def replays(x):
        return doubled(x)

    replays.eager = lambda x: reports(x) if record.active() else doubled(x)
    (row,) = measured(machine, {"cvkernels graph": replays}).rows
    assert row.backend == "native"


def test_triton_kernels_are_compiled_anew(monkeypatch):
    kernel = types.SimpleNamespace(device_caches={0: "compiled"})
    monkeypatch.setitem(sys.modules, "cvkernels.some", types.SimpleNamespace(kernel=kernel, one=1))
    forget_triton_kernels()
    assert not kernel.device_caches


@pytest.mark.gpu
def test_cuda_clock_counts_device_seconds():
    machine = Machine(torch.device("cuda"))
    x = torch.rand(2**28, device="cuda")
    once, thrice = Timed(lambda: x.sum()), Timed(lambda: [x.sum() for _ in range(3)])
    machine.hide_launches([once, thrice])
    samples = interleave({"once": once, "thrice": thrice}, machine, FEW)
    ratio = min(samples["thrice"]) / min(samples["once"])
    assert ratio == pytest.approx(3.0, rel=0.3)
