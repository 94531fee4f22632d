"""The benchmarks' byte models are those that explain reports; their cases are the networks'."""

import pytest
import torch

from benchmarks import (
    bench_avg_pool,
    bench_conv_bn_act,
    bench_dense_concat,
    bench_max_pool,
    bench_mbconv,
    kernels,
)
from benchmarks.harness import machine
from benchmarks.harness.case import Conditions, grad_mode
from benchmarks.harness.machine import Settings
from benchmarks.harness.report import Rates
from benchmarks.harness.run import run_cases
from benchmarks.harness.trial import Trial
from cvkernels import explain, extension, record
from tests.support.harness_fakes import CPU


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
        moved = call.bytes_read + call.bytes_written
        # A second launch adds the parts of a split reduction.
        assert case.bytes == moved or (call.kernels == 2 and case.bytes < moved), case.id


def test_benchmark_covers_every_convolution_of_resnet50():
    from tests.support.cases.conv_bn_act import RESNET50

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
    at = Conditions(conv.N, torch.float32, torch.device("meta"))
    case = bench_conv_bn_act.case_of(name, conv, at)
    args, kwargs = case.inputs()

    class Call(torch.nn.Module):
        def forward(self, x):
            return case.variants["cvkernels"]()(x, *args[1:], **kwargs)

    totals = explain(Call(), args[0]).totals
    assert case.bytes == totals["bytes_read"] + totals["bytes_written"]


def test_bytes_of_mbconv_are_those_of_its_three_kernels():
    size, wide, narrow = 56 * 56, 144, 24
    maps = 128 * size * (2 * narrow + 4 * wide + narrow)  # the last is the residual
    counted = bench_mbconv.traffic("2.1", 128, torch.bfloat16) / 2
    assert maps < counted < 1.01 * maps


def test_stock_is_the_reference():
    for part in ("forward", "backward"):
        conv = bench_conv_bn_act.ODD["grouped"]
        for name in ("layer1.conv3", "layer1.0.downsample", "layer1.0.conv1"):
            at = Conditions(conv.N, torch.float32, CPU, part)
            case = bench_conv_bn_act.case_of(name, conv, at)
            with grad_mode(case):
                trial = Trial(case)
                for variant in ("eager", "cvkernels"):
                    trial.check(case.variants[variant]())


@pytest.mark.parametrize("op", kernels.ops())
def test_every_variant_of_an_op_runs_and_is_right(op, monkeypatch):
    """On the smallest of its maps, without what compiles."""
    monkeypatch.setattr(machine, "last_level_cache", lambda device: 2**10)
    monkeypatch.setattr(machine.Machine, "rates", lambda self, dtype: Rates(1.0, 1.0))
    cases = kernels.cases(CPU, [torch.float32], 1, [op], quick=True, compiled="none")
    by_op = {}
    for case in sorted(cases, key=lambda case: case.bytes or 0):
        if case.part == "forward":
            by_op.setdefault(case.op, case)
    once = Settings(rounds=1, seconds=60.0, least=1)
    rows = run_cases(list(by_op.values()), machine.Machine(CPU), once).rows
    assert {row.status for row in rows} == {"measured"}, [row.note for row in rows]
