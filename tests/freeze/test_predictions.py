"""The time model: what it makes of a launch's work, and of plans. Predictions, not measurements."""

import pytest
import torch

import cvkernels
from cvkernels.freeze.frozen import planned
from cvkernels.ops.common.traffic import Traffic
from cvkernels.ops.common.work import (
    H200,
    Work,
    bytes_in_flight,
    bytes_needed,
    occupancy,
    predict,
    streaming,
)
from cvkernels.ops.conv_bn_act import tuning
from cvkernels.ops.conv_bn_act import work as conv_work
from cvkernels.ops.conv_bn_act.problem import Problem

# As many programs as fill every SM ten times, and loads enough for memory's rate.
FULL = {"programs": 132 * 2 * 10, "per_sm": 2, "in_flight": 32 * 1024}


def conv(C, K, R, size, batch=128, **options):
    geometry = ((1, 1), (R // 2,) * 2, (1, 1), 1)
    return Problem(
        batch, C, size, size, K, R, R, *geometry, torch.bfloat16, "relu", has_bias=True, **options
    )


def described(problem, name):
    tile = None
    if name.startswith("triton"):
        tile = tuning.named(problem, name, H200.name, H200.capability)
    return conv_work.of(problem, name, tile, H200)


def seconds(work):
    return predict((work,), H200).seconds - H200.kernel


def test_memory_takes_its_rate():
    found = predict((Work(3e9, 1e9, **FULL),), H200)
    assert found.bound == "memory"
    assert found.seconds == pytest.approx(4e9 / H200.memory + H200.kernel, rel=1e-2)


def test_too_few_bytes_in_flight_lower_the_rate():
    full, half = Work(4e9, 0, **FULL), Work(4e9, 0, **FULL | {"in_flight": 8 * 1024})
    assert bytes_needed(H200) == pytest.approx(32 * 1024, rel=0.01)
    assert bytes_in_flight(half, H200) == 16 * 1024
    assert seconds(half) == pytest.approx(2 * seconds(full), rel=0.02)
    # Without a program for each SM, only those that have one load.
    assert seconds(half._replace(programs=66, per_sm=1)) > 3 * seconds(half)


@pytest.mark.parametrize(
    ("field", "rate", "bound"),
    [
        ("flops", H200.matrix / H200.sms, "matrix"),
        ("l2", H200.l2 / H200.sms, "L2"),
        ("shared", H200.shared * H200.clock, "shared memory"),
        ("instructions", H200.issue * H200.clock, "issue"),
    ],
)
def test_programs_share_an_sm(field, rate, bound):
    """Twenty programs on each, of 10 us."""
    work = Work(0, 0, **FULL, **{field: 1e-5 * rate})
    found = predict((work,), H200)
    assert found.bound == bound
    assert found.seconds - H200.kernel == pytest.approx(20 * 1e-5)
    # Whole programs: one more takes an SM as long as one on every SM, but for what L2 delivers.
    more = seconds(work._replace(programs=work.programs + H200.sms))
    assert more == pytest.approx(21 * 1e-5)
    one = seconds(work._replace(programs=work.programs + 1))
    port = 1e-5 * H200.l2 / H200.sms / (H200.l2_port * H200.clock)
    assert one == pytest.approx(20 * 1e-5 + (port if bound == "L2" else 1e-5))


def test_a_program_alone_waits_for_its_loads():
    work = Work(0, 0, programs=1, steps=72, waits=0)
    assert predict((work,), H200).bound == "latency"
    assert seconds(work) == pytest.approx(72 * H200.step)


def test_what_follows_the_loop_is_not_hidden_in_a_program_of_its_own():
    work = Work(0, 0, programs=132, flops=1e-5 * H200.matrix / H200.sms, waits=0)
    last = 5e-6 * H200.issue * H200.clock
    after = work._replace(instructions=last, last=last)
    assert seconds(after) == pytest.approx(1.5e-5)
    two = after._replace(programs=10 * 264, per_sm=2)
    assert seconds(two) == pytest.approx(20 * 1e-5)


def test_small_launches_cost_the_gap():
    found = predict(streaming(Traffic(2, 2048, 2048)), H200)
    assert found.bound == "launch" and 2 * H200.kernel < found.seconds < 3 * H200.kernel
    assert predict((), H200).seconds == 0


def test_occupancy_is_of_what_runs_out_first():
    assert occupancy(H200, 256, 120, 97 * 1024) == 2  # registers
    assert occupancy(H200, 128, 64, 100 * 1024) == 2  # shared memory
    assert occupancy(H200, 1024, 16) == 2  # threads


def test_a_tile_loads_its_rows_for_each_tap_and_column_tile():
    one, three = (described(conv(128, 128, R, 28), "triton 128x128x64 w8 s3")[0] for R in (1, 3))
    assert one.l2 == 2 * (128 + 128) * 128 and three.l2 == 9 * one.l2
    assert three.steps == 9 * one.steps == 18
    assert three.flops * three.programs == conv(128, 128, 3, 28).flops
    wide = described(conv(256, 256, 1, 14), "triton 128x256x64 w8 s3")[0]
    square = described(conv(256, 256, 1, 14), "triton 128x128x64 w8 s3")[0]
    assert wide.per_sm == 1 and square.per_sm == 2
    assert wide.l2 * wide.programs == 0.75 * square.l2 * square.programs


def test_a_split_sum_has_more_programs_of_fewer_steps():
    problem = conv(512, 512, 3, 7, batch=1)
    (whole,) = described(problem, "triton 64x32x64 w4 s4")
    parts, finish = described(problem, "triton 64x32x64 w4 s4 k4")
    assert (parts.programs, parts.steps) == (4 * whole.programs, whole.steps / 4)
    assert parts.flops * parts.programs == whole.flops * whole.programs
    assert parts.written == finish.read == 4 * 4 * 49 * 512
    assert predict((parts, finish), H200).seconds < predict((whole,), H200).seconds


def test_a_dependent_launch_pays_less_of_the_gap():
    work = Work(0, 0, waits=0)
    assert predict((work,), H200).seconds == H200.kernel
    assert predict((work._replace(dependent=True),), H200).seconds == H200.dependent


def test_a_halo_in_shared_memory_saves_the_rereads():
    problem = conv(128, 32, 3, 56)
    taps, halo = (described(problem, name)[0] for name in ("triton 128x32x64 w4 s3", "halo"))
    compulsory = 2 * 128 * 128 * 56 * 56
    assert halo.l2 * halo.programs < 1.6 * compulsory < 9 * compulsory < taps.l2 * taps.programs
    assert seconds(halo) < seconds(taps)


def test_nothing_is_described_that_is_not_known():
    assert described(conv(64, 64, 3, 14), "native") == ()
    plan = planned(meta(cvkernels.models.resnet18()), torch.empty(2, 3, 64, 64, device="meta"))
    for step, run in plan.steps:
        launches = run is not None and plan.traffic[step].kernels > 0
        assert (plan.prediction(step).seconds > 0) == launches


def meta(model):
    return model.eval().to("meta")
