"""The guard's decision: what counts as a regression, and what as noise."""

import pytest

from benchmarks.__main__ import main
from benchmarks.harness.report import Row
from benchmarks.output import guard


def rows(speed_up, case="one", spread=0.0, op="pool"):
    """Eager at 100 us and ours at ``speed_up``; ``spread`` is p80 - p20 over the median."""
    made = []
    for variant, time in (("eager", 100.0), ("cvkernels", 100.0 / speed_up)):
        half = time * spread / 2
        made.append(
            Row(op, "forward", case, "4x4", "fp32", variant, status="measured", time_us=time,
                p20_us=time - half, p80_us=time + half, vs_eager=100.0 / time)
        )  # fmt: skip
    return made


@pytest.mark.parametrize(
    ("now", "spread", "ok"),
    [(2.0, 0.0, True), (1.95, 0.0, True), (1.5, 0.0, False), (1.5, 0.4, False), (3.0, 0.0, True)],
    ids=["equal", "within 5 %", "a quarter lost", "op lost though rows are noisy", "faster"],
)
def test_verdict(now, spread, ok):
    comparison = guard.compare(rows(2.0, spread=spread), rows(now, spread=spread))
    assert comparison.ok is ok
    assert ("REGRESSED" in str(comparison)) is not ok


def test_noisy_rows_are_allowed_more():
    (quiet,) = guard.compare(rows(2.0), rows(1.6)).changes
    (noisy,) = guard.compare(rows(2.0, spread=0.4), rows(1.6, spread=0.4)).changes
    assert quiet.regressed and not noisy.regressed


def test_many_small_losses_are_a_regressed_op():
    names = [f"case{index}" for index in range(5)]
    committed = [row for name in names for row in rows(2.0, name)]
    now = [row for name in names for row in rows(1.84, name)] + rows(2.0, op="conv")
    comparison = guard.compare(committed + rows(2.0, op="conv"), now)
    assert not comparison.rows and comparison.regressed_ops == ["pool"] and not comparison.ok


def test_rows_that_only_one_run_has_are_left_out():
    comparison = guard.compare(rows(2.0, "old"), rows(1.0, "new"))
    assert comparison.changes == [] and comparison.ok


def test_suspects_are_measured_again_and_the_better_counts():
    committed = rows(2.0, "one") + rows(2.0, "two")
    asked = []

    def measure(keys):
        asked.append(keys)
        return rows(2.0, "one") + rows(1.2, "two") if keys is None else rows(1.98, "two")

    assert guard.guarded(committed, measure).ok
    assert asked[0] is None and [key[2] for key in asked[1]] == ["two"]


def test_a_loss_that_stays_is_reported():
    comparison = guard.guarded(rows(2.0), lambda keys: rows(1.2))
    assert not comparison.ok and "regressed rows" in str(comparison)


def test_without_results_it_says_what_to_do(tmp_path, capsys):
    assert main(["guard", "--device", "cpu", "--against", str(tmp_path)]) == 2
    assert "holds no kernels-*.json; measure with --all" in capsys.readouterr().err


def test_results_of_another_machine_are_refused(tmp_path, capsys):
    from benchmarks.harness.command_line import write_report
    from benchmarks.harness.report import Report

    report = Report({"device": "abacus", "threads": 10}, rows=rows(2.0))
    write_report(tmp_path / "kernels-pool.json", report)
    assert main(["guard", "--device", "cpu", "--against", str(tmp_path)]) == 2
    assert "is of another machine: device 'abacus' there" in capsys.readouterr().err
