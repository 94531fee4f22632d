"""``python -m benchmarks kernels``: options, the JSON file, the exit status."""

import dataclasses
import json
import os
import subprocess
import sys
from pathlib import Path

import pytest
import torch

from benchmarks import kernels
from benchmarks.__main__ import main
from benchmarks.harness import command_line, machine, run
from benchmarks.harness.machine import Settings
from benchmarks.harness.report import SCHEMA, Noise, Report, Row
from tests.support.harness_fakes import doubled, make_case

ROOT = Path(__file__).resolve().parents[2]


def tiny_cases(*arguments, **options):
    return [make_case({"eager": doubled, "cvkernels": doubled}, name) for name in ("one", "two")]


def run_main(monkeypatch, *arguments):
    monkeypatch.setattr(command_line, "QUICK", Settings(rounds=3, seconds=1.0, least=3))
    monkeypatch.setattr(machine, "last_level_cache", lambda device: 2**16)
    monkeypatch.setattr(kernels, "cases", tiny_cases)
    return main(["kernels", "--quick", "--device", "cpu", *arguments])


def test_json_holds_rows_rates_and_conditions(monkeypatch, tmp_path, capsys):
    path = tmp_path / "rows.json"
    assert run_main(monkeypatch, "--case", "t*", "--json-out", str(path)) == 0
    written = json.loads(path.read_text())
    assert set(written) == {"schema", "complete", "environment", "rates", "noise", "rows"}
    assert written["schema"] == SCHEMA and written["complete"] is True
    conditions = {"device", "threads", "torch", "triton", "commit", "cache"}
    assert conditions <= set(written["environment"])
    assert set(written["rates"]["fp32"]) == {"copy_gb_per_s", "matrix_tflop_per_s"}
    assert set(written["noise"]) == {*Noise._fields, "too_noisy"}
    assert [row["variant"] for row in written["rows"]] == ["eager", "cvkernels"]
    for row in written["rows"]:
        assert set(row) == {field.name for field in dataclasses.fields(Row)}
        assert row["case"] == "two" and row["p20_us"] <= row["time_us"] <= row["p80_us"]
    table = capsys.readouterr().out
    for title in ("torch", "commit", "variant", "GB/s", "% copy", "vs eager", "max error", "A/A"):
        assert title in table


def test_unwritable_json_is_refused_before_measuring(monkeypatch, tmp_path, capsys):
    path = tmp_path / "missing" / "rows.json"
    monkeypatch.setattr(run, "run_cases", lambda *args: pytest.fail("measured"))
    assert run_main(monkeypatch, "--json", str(path)) == 2
    assert f"error: cannot write {path}: No such file" in capsys.readouterr().err


def test_unknown_case_names_those_there_are(monkeypatch, capsys):
    assert run_main(monkeypatch, "--case", "three") == 2
    assert "no case is named ['three']; there are: one, two" in capsys.readouterr().err


def test_interrupt_keeps_the_finished_cases_and_ends_with_130(monkeypatch, tmp_path, capsys):
    def interrupted(x):
        raise KeyboardInterrupt

    def cases(*arguments, **options):
        return [
            make_case({"eager": doubled, "cvkernels": doubled}, "one"),
            make_case({"eager": interrupted}, "two"),
        ]

    monkeypatch.setattr(machine, "last_level_cache", lambda device: 2**16)
    path = tmp_path / "rows.json"
    monkeypatch.setattr(kernels, "cases", cases)
    arguments = ["--device", "cpu", "--rounds", "3", "--json", str(path)]
    assert main(["kernels", *arguments]) == 130
    written = json.loads(path.read_text())
    assert written["complete"] is False
    assert [row["case"] for row in written["rows"]] == ["one", "one"]
    assert "interrupted: this is what was measured" in capsys.readouterr().out


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
    assert command_line.exit_status(Report({}, rows=[row])) == 1
    assert command_line.exit_status(Report({}, complete=False)) == 130


def test_rows_under_pytest_benchmark(tmp_path):
    path = tmp_path / "rows.json"
    chosen = "odd-fp32 and not compile or one-pixel and eager"
    pytest_of = ["-m", "pytest", "-q", "-p", "no:cacheprovider", "benchmarks/bench_max_pool.py"]
    command = [sys.executable, *pytest_of, "-k", chosen, "--benchmark-json", str(path)]
    if torch.cuda.is_available():
        pytest.skip("the rows' names are those of a machine without a GPU")
    # Under pytest-xdist, which this run may be, pytest-benchmark measures nothing.
    alone = {k: v for k, v in os.environ.items() if not k.startswith("PYTEST_")}
    done = subprocess.run(command, env=alone, cwd=ROOT, capture_output=True, text=True)
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
