"""The benchmarks' harness: what it times, what it refuses, and what it keeps."""

import contextlib
import dataclasses
import json
import os
import subprocess
import sys
from pathlib import Path

import pytest
import torch

from benchmarks import (
    bench_avg_pool,
    bench_conv_bn_act,
    bench_dense_concat,
    bench_max_pool,
    command_line,
    harness,
)
from benchmarks.harness import Case, Machine, Settings, Timed
from benchmarks.report import SCHEMA, Rates, Report, Row
from cvkernels import explain, extension, record
from cvkernels.backend import BackendError

ROOT = Path(__file__).resolve().parents[1]
CPU = torch.device("cpu")
FEW = Settings(rounds=6, seconds=60.0, least=6)


class FakeClock:
    """A clock that calls move; reading it takes next to no time, but some."""

    def __init__(self):
        self.now = 0.0

    def __call__(self):
        self.now += 1e-15
        return self.now

    def spending(self, *seconds):
        """A call that takes these seconds in turn, over and over."""
        calls = iter(())

        def call(*args, **kwargs):
            nonlocal calls
            spent = next(calls, None)
            if spent is None:
                calls = iter(seconds)
                spent = next(calls)
            self.now += spent
            return args[0] if args else None

        return call


@pytest.fixture
def clock():
    return FakeClock()


@pytest.fixture
def machine(clock, monkeypatch):
    """A CPU with a fake clock, a small cache and known rates."""
    monkeypatch.setattr(harness, "last_level_cache", lambda device: 2**10)
    made = Machine(CPU, clock)
    monkeypatch.setattr(made, "rates", lambda dtype: Rates(1.0, 1.0))
    return made


def doubled(x):
    return x * 2


def make_case(variants, name="double", inputs=None, **options):
    options = {"bytes": 1000, "flops": 10**6, **options}
    return Case(
        op="double",
        name=name,
        shape="4x4",
        dtype=torch.float32,
        inputs=inputs or (lambda: ((torch.randn(4, 4),), {})),
        reference=doubled,
        variants={key: (lambda function=function: function) for key, function in variants.items()},
        **options,
    )


def slow(clock, *seconds):
    """``doubled`` that takes these seconds in turn, when the harness times it."""
    spend = clock.spending(*seconds)

    def call(x):
        spend()
        return x * 2

    return call


def test_summary_is_median_and_quintiles():
    assert harness.summarize([5.0, 1.0, 2.0, 4.0, 3.0, 6.0]) == (3.5, 2.0, 5.0)
    assert harness.summarize([7.0]) == (7.0, 7.0, 7.0)


def test_times_are_medians_of_what_the_clock_says(machine, clock):
    calls = {
        "steady": Timed(clock.spending(2.0)),
        "jumping": Timed(clock.spending(1.0, 1.0, 1.0, 1.0, 9.0)),
    }
    samples = harness.interleave(calls, machine, Settings(rounds=10, seconds=60.0))
    assert harness.summarize(samples["steady"]) == pytest.approx((2.0, 2.0, 2.0))
    assert harness.summarize(samples["jumping"]).median == pytest.approx(1.0)
    assert sum(samples["jumping"]) == pytest.approx(2 * 13.0)


def test_setup_is_not_timed(machine, clock):
    setup = clock.spending(100.0)
    timed = Timed(clock.spending(1.0), lambda: (setup(),))
    assert machine.sample(timed) == pytest.approx(1.0)


def test_host_samples_are_means_in_warm_caches(machine, monkeypatch):
    monkeypatch.setattr(machine, "make_cold", lambda: pytest.fail("caches must stay warm"))
    ran = []
    assert machine.sample(Timed(lambda: ran.append(1), repeats=7, host=True)) > 0
    assert len(ran) == 7


def test_each_round_runs_each_variant_once_in_changing_order(machine):
    order = []
    calls = {name: Timed(lambda name=name: order.append(name)) for name in "abc"}
    harness.interleave(calls, machine, Settings(rounds=12, seconds=60.0))
    rounds = [tuple(order[start : start + 3]) for start in range(0, len(order), 3)]
    assert len(rounds) == 12
    assert all(sorted(names) == ["a", "b", "c"] for names in rounds)
    assert len(set(rounds)) > 2


def test_caches_are_cold_before_every_call(machine, monkeypatch):
    events = []
    monkeypatch.setattr(machine, "make_cold", lambda: events.append("flush"))
    calls = {name: Timed(lambda: events.append("call")) for name in "ab"}
    harness.interleave(calls, machine, FEW)
    assert events == ["flush", "call"] * 12


def test_flush_reads_more_than_the_last_level_cache():
    machine = Machine(CPU)
    assert machine._evictor.nbytes >= 2 * harness.last_level_cache(CPU) > 0
    assert machine._evictor.any()


def test_rounds_end_when_the_seconds_are_spent(machine):
    calls = {"a": Timed(lambda: None)}
    samples = harness.interleave(calls, machine, Settings(rounds=1000, seconds=0.0, least=3))
    assert len(samples["a"]) == 3


def test_columns_follow_from_the_time(machine, clock):
    case = make_case({"eager": slow(clock, 4e-6), "compile": slow(clock, 2e-6),
                      "cvkernels": slow(clock, 1e-6)})  # fmt: skip
    eager, compiled, ours = harness.run([case], machine, FEW).rows
    assert (eager.status, eager.backend, compiled.backend) == ("measured", "aten", "inductor")
    assert ours.time_us == pytest.approx(1.0) and ours.samples == 6
    assert (ours.vs_eager, ours.vs_compile) == (pytest.approx(4.0), pytest.approx(2.0))
    assert (ours.gb_per_s, ours.copy_share) == (pytest.approx(1.0), pytest.approx(1.0))
    assert (ours.tflop_per_s, ours.matrix_share) == (pytest.approx(1.0), pytest.approx(1.0))
    assert eager.bound_share == pytest.approx(0.25)
    assert ours.max_error < 1e-6


def test_rates_are_measured_per_dtype_and_once(monkeypatch):
    monkeypatch.setattr(harness, "last_level_cache", lambda device: 2**16)
    machine = Machine(CPU)
    rates = [machine.rates(dtype) for dtype in (torch.float32, torch.bfloat16, torch.float32)]
    assert rates[0] is rates[2]
    assert all(copy > 0 and matrix > 0 for copy, matrix in rates)


def test_wrong_result_is_refused_before_timing(machine):
    calls = []

    def wrong(x):
        calls.append(1)
        return x * 2 + 1e-3

    report = harness.run([make_case({"eager": doubled, "cvkernels": wrong})], machine, FEW)
    eager, ours = report.rows
    assert (eager.status, ours.status, ours.time_us) == ("measured", "wrong", None)
    assert "max error 1.0" in ours.note and "allowed" in ours.note
    assert len(calls) == 1 and not report.sound
    assert "wrong: max error" in str(report)


def test_nan_is_wrong(machine):
    case = make_case({"eager": doubled, "cvkernels": lambda x: x * torch.nan})
    assert harness.run([case], machine, FEW).rows[1].status == "wrong"


def test_moved_data_must_be_equal(machine):
    nudged = make_case({"eager": doubled, "cvkernels": lambda x: x * 2 * (1 + 2**-23)})
    assert harness.run([nudged], machine, FEW).rows[1].status == "measured"
    nudged = dataclasses.replace(nudged, bitwise=True)
    assert harness.run([nudged], machine, FEW).rows[1].note == "not equal to the reference"


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
    case = make_case(variants, inputs=inputs, part="backward")
    eager, ours = harness.run([case], machine, FEW).rows
    assert (eager.status, ours.status) == ("measured", "wrong")


def test_zeros_are_not_timed(machine):
    case = make_case({"eager": doubled}, inputs=lambda: ((torch.zeros(4, 4),), {}))
    (row,) = harness.run([case], machine, FEW).rows
    assert row.status == "failed" and "all zeros" in row.note and row.time_us is None


@pytest.mark.parametrize("when", ["when made", "when called"])
def test_missing_compiler_is_a_row_that_says_why(when, machine, clock):
    def broken(*args):
        raise RuntimeError("No working C++ compiler found\nand much more")

    case = make_case({"eager": doubled, "compile": broken, "cvkernels": doubled})
    if when == "when made":
        case.variants["compile"] = broken
    report = harness.run([case], machine, FEW)
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

    case = make_case({"eager": doubled, "cvkernels cudnn": refuses, "cvkernels": crashes,
                      "cvkernels triton": too_large})  # fmt: skip
    report = harness.run([case], machine, FEW)
    statuses = [row.status for row in report.rows]
    assert statuses == ["measured", "unavailable", "failed", "unavailable"]
    assert not report.sound


def test_case_that_does_not_fit_leaves_the_others(machine):
    def too_large():
        raise torch.OutOfMemoryError("out of memory")

    cases = [make_case({"eager": doubled}, "huge", too_large), make_case({"eager": doubled})]
    huge, fits = harness.run(cases, machine, FEW).rows
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
    report = harness.run(cases, machine, FEW)
    assert not report.complete
    assert [row.case for row in report.rows] == ["first", "second", "second"]
    assert report.rows[0].samples == 6 and report.rows[2].samples == 3
    assert all(row.status == "measured" for row in report.rows)
    assert "interrupted" in str(report) and not report.as_dict()["complete"]


def test_same_variant_twice_tells_the_noise(machine, clock):
    quiet = make_case({"eager": slow(clock, 1e-6), "cvkernels": slow(clock, 2e-6)})
    report = harness.run([quiet], machine, FEW)
    assert report.rows[0].again == pytest.approx(1.0) and report.rows[1].again is None
    assert report.noise.worst < 1e-6 and report.noise.spread < 1e-6
    assert not report.noise.too_noisy
    assert "quiet enough" in str(report)
    # Ever slower: whichever of the two runs later in a round looks worse.
    drifting = make_case({"eager": slow(clock, *(1e-6 * 2**power for power in range(30)))})
    report = harness.run([drifting], machine, Settings(rounds=1, seconds=60.0))
    assert report.noise.too_noisy and "TOO NOISY" in str(report)
    assert report.rows[0].note.startswith("noisy: ")


def test_fallback_to_the_reference_says_why(machine):
    def fallen_back(x):
        recorder = record.active()
        with recorder.fallback("no such kernel") if recorder else contextlib.nullcontext():
            return x * 2

    (row,) = harness.run([make_case({"cvkernels": fallen_back})], machine, FEW).rows
    assert (row.backend, row.note) == ("reference", "no such kernel")


def recorded(case, function):
    args, kwargs = case.inputs()
    recorder = record.Recorder()
    with torch.no_grad(), record.recording(recorder):
        function(*args, **kwargs)
    return recorder.calls


def test_byte_model_of_conv_bn_act_is_explain_s():
    """On the meta device, which runs nothing, at the batch of a GPU's benchmark."""
    meta = torch.device("meta")
    cases = bench_conv_bn_act.cases(meta, [torch.bfloat16, torch.float32], batch=128)
    forward = [case for case in cases if case.part == "forward"]
    assert len(forward) > 2 * 25
    for case in forward:
        (call,) = recorded(case, case.variants["cvkernels"]())
        assert case.bytes == call.bytes_read + call.bytes_written, case.id


def test_benchmark_covers_every_convolution_of_resnet50():
    from cases_conv_bn_act import RESNET50

    cases = bench_conv_bn_act.cases(CPU, [torch.float32], batch=RESNET50["stem"].N)
    shapes = {case.inputs.args[1] for case in cases if case.part == "forward"}
    assert set(RESNET50.values()) <= shapes
    assert {case.part for case in cases} == {"forward", "backward", "host"}
    quick = bench_conv_bn_act.cases(CPU, [torch.float32], batch=1, quick=True)
    assert 5 <= len(quick) < len(cases) / 2
    assert {case.part for case in quick} == {"forward", "backward", "host"}


@pytest.mark.parametrize(
    "bench", [bench_avg_pool, bench_dense_concat, bench_max_pool], ids=lambda b: b.__name__
)
def test_byte_model_of_a_native_op_is_explain_s(bench):
    if not extension.has("cpu"):
        pytest.skip(extension.status()["cpu"].reason)
    cases = bench.cases(CPU, [torch.float32, torch.bfloat16], batch=1)
    for case in cases:
        if case.part == "forward":
            (call,) = recorded(case, case.variants["cvkernels"]())
            assert case.bytes == call.bytes_read + call.bytes_written, case.id


def test_explain_reports_the_same_bytes():
    """The recorder that the two tests above read is the one behind the public explain."""
    name, conv = "one-pixel", bench_conv_bn_act.ODD["one-pixel"]
    case = bench_conv_bn_act.case_of(name, conv, torch.float32, torch.device("meta"))
    args, kwargs = case.inputs()

    class Call(torch.nn.Module):
        def forward(self, x):
            return case.variants["cvkernels"]()(x, *args[1:], **kwargs)

    totals = explain(Call(), args[0]).totals
    assert case.bytes == totals["bytes_read"] + totals["bytes_written"]


def test_stock_is_the_reference():
    for part in ("forward", "backward"):
        conv = bench_conv_bn_act.ODD["grouped"]
        for name in ("layer1.conv3", "layer1.0.downsample", "layer1.0.conv1"):
            case = bench_conv_bn_act.case_of(name, conv, torch.float32, CPU, part)
            with harness.grad_mode(case):
                trial = harness.Trial(case)
                for variant in ("eager", "cvkernels"):
                    trial.check(case.variants[variant]())


def tiny_cases(device, dtypes, batch, quick):
    return [make_case({"eager": doubled, "cvkernels": doubled}, name) for name in ("one", "two")]


def run_main(monkeypatch, *arguments):
    monkeypatch.setattr(harness, "QUICK", Settings(rounds=3, seconds=1.0, least=3))
    monkeypatch.setattr(harness, "last_level_cache", lambda device: 2**16)
    return command_line.main("double", tiny_cases, ["--quick", "--device", "cpu", *arguments])


def test_json_holds_rows_rates_and_conditions(monkeypatch, tmp_path, capsys):
    path = tmp_path / "rows.json"
    assert run_main(monkeypatch, "--case", "t*", "--json-out", str(path)) == 0
    written = json.loads(path.read_text())
    assert set(written) == {"schema", "complete", "environment", "rates", "noise", "rows"}
    assert written["schema"] == SCHEMA and written["complete"] is True
    assert {"device", "threads", "torch", "triton", "commit", "cache"} <= set(
        written["environment"]
    )
    assert set(written["rates"]["fp32"]) == {"copy_gb_per_s", "matrix_tflop_per_s"}
    assert set(written["noise"]) == {"cases", "median", "p80", "worst", "spread", "too_noisy"}
    assert [row["variant"] for row in written["rows"]] == ["eager", "cvkernels"]
    for row in written["rows"]:
        assert set(row) == {field.name for field in dataclasses.fields(Row)}
        assert row["case"] == "two" and row["p20_us"] <= row["time_us"] <= row["p80_us"]
    table = capsys.readouterr().out
    for title in ("torch", "commit", "variant", "GB/s", "% copy", "vs eager", "max error", "A/A"):
        assert title in table


def test_unwritable_json_still_prints_the_table(monkeypatch, tmp_path, capsys):
    path = tmp_path / "missing" / "rows.json"
    assert run_main(monkeypatch, "--json", str(path)) == 2
    printed = capsys.readouterr()
    assert "cvkernels" in printed.out and f"cannot write {path}" in printed.err


def test_unknown_case_names_those_there_are(monkeypatch, capsys):
    with pytest.raises(SystemExit):
        run_main(monkeypatch, "--case", "three")
    assert "no case is named ['three']; there are: one, two" in capsys.readouterr().err


@pytest.mark.parametrize(
    ("arguments", "message"),
    [(("--batch", "0"), "at least 1, got 0"), (("--device", "tpu"), "cpu or cuda, got 'tpu'")],
)
def test_bad_options_say_what_was_expected(arguments, message, monkeypatch, capsys):
    with pytest.raises(SystemExit):
        run_main(monkeypatch, *arguments)
    assert message in capsys.readouterr().err


def test_exit_status_tells_wrong_and_interrupted():
    row = Row("double", "forward", "one", "4x4", "fp32", "cvkernels", status="wrong")
    assert command_line._finish(Report({}, rows=[row]), None) == 1
    assert command_line._finish(Report({}, complete=False), None) == 130


def test_rows_under_pytest_benchmark(tmp_path):
    path = tmp_path / "rows.json"
    chosen = "odd-fp32 and not compile or one-pixel and eager"
    command = ["-m", "pytest", "-q", "-p", "no:cacheprovider", "benchmarks/bench_max_pool.py"]
    if torch.cuda.is_available():
        pytest.skip("the rows' names are those of a machine without a GPU")
    # Under pytest-xdist, which this run may be, pytest-benchmark measures nothing.
    alone = {k: v for k, v in os.environ.items() if not k.startswith("PYTEST_")}
    done = subprocess.run(
        [sys.executable, *command, "-k", chosen, "--benchmark-json", str(path)],
        env=alone,
        cwd=ROOT,
        capture_output=True,
        text=True,
        check=False,
    )
    assert done.returncode == 0, done.stdout + done.stderr
    written = json.loads(path.read_text())
    assert "commit" in written["machine_info"]["cvkernels"]
    rows = {row["extra_info"]["variant"]: row for row in written["benchmarks"][:2]}
    ours = rows["cvkernels"]
    assert ours["stats"]["median"] == pytest.approx(ours["extra_info"]["time_us"] / 1e6)
    assert ours["extra_info"]["bytes"] > 0 and ours["extra_info"]["copy_share"] > 0
    ratio = rows["eager"]["stats"]["median"] / ours["stats"]["median"]
    assert ours["extra_info"]["vs_eager"] == pytest.approx(ratio)
    assert written["benchmarks"][2]["extra_info"]["part"] == "host"


@pytest.mark.gpu
def test_cuda_clock_counts_device_seconds():
    machine = Machine(torch.device("cuda"))
    x = torch.rand(2**28, device="cuda")
    once, thrice = Timed(lambda: x.sum()), Timed(lambda: [x.sum() for _ in range(3)])
    machine.hide_launches([once, thrice])
    samples = harness.interleave({"once": once, "thrice": thrice}, machine, FEW)
    ratio = min(samples["thrice"]) / min(samples["once"])
    assert ratio == pytest.approx(3.0, rel=0.3)
