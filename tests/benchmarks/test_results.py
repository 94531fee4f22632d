"""What becomes of results: the tables of the READMEs, and the plots."""

import json

import pytest
import torch

from benchmarks.harness.command_line import write_report
from benchmarks.harness.report import Rates, Report, Row
from benchmarks.output import readme, results, summary

ENVIRONMENT = {"device": "abacus", "threads": 10, "commit": "abc"}


def row(op, part, case, variant, time, dtype="fp32", **columns):
    columns = {"status": "measured", "time_us": time, "p20_us": time, "p80_us": time, **columns}
    return Row(op, part, case, "4x4", dtype, variant, **columns)


@pytest.fixture
def folder(tmp_path):
    """A machine with rows of each kind, of which one loses and one could not run."""
    machine = tmp_path / "abacus"
    machine.mkdir()
    rates = {"fp32": Rates(10.0, 0.1)}
    both = {"max_error": 1e-6, "eager_error": 2e-6, "first_batch_s": 1.5, "peak_bytes": 10**7}
    inference = [
        row("resnet50", "inference", "batch 1", "eager channels_last", 3000.0, **both),
        row("resnet50", "inference", "batch 1", "cvkernels", 2000.0, vs_eager=1.5, **both),
        row("resnet50", "inference", "batch 1", "openvino", None, status="unavailable"),
        row("resnet50", "inference", "batch 1", "onnxruntime", 1800.0),
    ]
    training = [
        row(f"densenet{depth}", part, "batch 2", variant, time, saved_bytes=depth * factor)
        for depth, part, time in ((121, "training", 9e5), (201, "memory", None))
        for variant, factor in (("eager", 1e6), ("cvkernels", 2e5))
    ]
    kernels = [
        row("pool", "forward", case, variant, time, bytes=10**6, gb_per_s=1e3 / time,
            vs_eager=None if variant == "eager" else 100.0 / time, bound_share=0.5)
        for case, ours in (("wins", 50.0), ("loses", 200.0))
        for variant, time in (("eager", 100.0), ("cvkernels", ours))
    ]  # fmt: skip
    kernels += [
        row("conv", "forward", "one", variant, 10.0, bytes=10**5, flops=10**8, tflop_per_s=0.05)
        for variant in ("eager", "cvkernels")
    ]
    int8 = [
        row("resnet50", "inference", "batch 1", variant, time, "int8", decibels=30.2, top1=0.5)
        for variant, time in (("openvino int8", 3000.0), ("onnxruntime int8", 9000.0),
                              ("cvkernels int8", 2000.0), ("cvkernels int8, 30 dB", 4000.0))
    ]  # fmt: skip
    kinds = {"models": inference, "training": training, "kernels": kernels, "int8": int8}
    for kind, rows in kinds.items():
        write_report(machine / f"{kind}-all.json", Report(ENVIRONMENT, rates, rows))
    return machine


def test_reports_are_read_as_they_were_written(folder):
    (report,) = results.reports(folder, "kernels")
    written = json.loads((folder / "kernels-all.json").read_text())
    assert json.loads(json.dumps(report.as_dict())) == written
    written["schema"] = 1
    with pytest.raises(ValueError, match="results of schema 1, expected 2; measure them again"):
        Report.from_dict(written)


def test_tables_hold_every_row_losing_and_missing_ones_too(folder):
    text = readme.machine_page(folder)
    assert text.startswith("# Measured on abacus")
    inference = next(line for line in text.splitlines() if line.startswith("| resnet50 | 1 |"))
    assert "| 3.0 (3.0-3.0) | 2.0 (2.0-2.0) | unavailable | 1.8 (1.8-1.8) |" in inference
    assert "| 1.50x |  | 0.90x |" in inference
    assert "cvkernels vs better runtime 0.90x (0.90x to 0.90x)" in text
    assert "1.0e-06 (eager 2.0e-06)" in inference
    assert "| 2.0 (2.0-2.0) | 30.2, 50% | 4.0 (4.0-4.0) | 30.2, 50% | 1.50x | 0.75x |" in text
    assert "cvkernels int8 1.50x (1.50x to 1.50x); cvkernels int8, 30 dB 0.75x" in text
    assert "| densenet201 | 2 | fp32 | cvkernels |  |  |  | 40.2 |" in text
    assert "| pool | forward | fp32 | cvkernels | 2 | 1.00x | 0.50x (loses) |" in text


def frozen_rows():
    return [
        row("resnet50", "inference", f"batch {batch}", name, time, kept_bytes=10**7, **columns)
        for batch, vs_eager in ((1, 2.0), (16, 8.0))
        for name, time, columns in (
            ("cvkernels freeze", 1000.0, {"vs_eager": vs_eager, "peak_bytes": 10**6}),
            ("openvino", 1500.0, {"peak_bytes": 10**7}),
            ("eager channels_last", 1200.0 if batch == 1 else 8000.0, {}),
        )
    ]


@pytest.fixture
def summarised(folder):
    write_report(folder / "models-all.json", Report(ENVIRONMENT, rows=frozen_rows()))
    return summary.block(folder.parent)


def test_summary_has_a_row_per_network_and_its_conditions(summarised):
    assert "| resnet50 | 1.0 | 1.5 (OpenVINO) | 1.50x | 11 | 20 |" in summarised
    text = " ".join(summarised.split())
    assert "abacus, 10 threads; batch 16 at 224 x 224, random weights." in text
    assert "fp32 1.34x (1.20x to 1.50x);" in text, "of the fastest peer at each batch"
    assert "Figures of CPUs are measured on abacus." in text
    assert "No figure of a GPU is measured" in text


def test_summary_compares_int8_with_int8(summarised):
    text = " ".join(summarised.split())
    assert "int8 1.50x (1.50x to 1.50x); int8 guarded at 30 dB 0.75x" in text
    lines = [line for line in summarised.splitlines() if not line.startswith(("|", "!"))]
    assert max(map(len, lines)) <= 118


def test_summary_is_of_the_machine_with_most_precisions(folder):
    other = folder.parent / "aaa"
    other.mkdir()
    write_report(other / "models-all.json", Report(ENVIRONMENT, rows=frozen_rows()))
    write_report(folder / "models-all.json", Report(ENVIRONMENT, rows=frozen_rows()))
    assert (
        summary.block(folder.parent).startswith("![Images")
        and "aaa" not in (summary.block(folder.parent).splitlines()[0])
    )


def test_speed_ups_hold_mean_and_worst_of_each_network(folder):
    rows = [
        row("resnet50", "inference", "batch 1", "cvkernels", 2000.0, vs_eager=1.5), *frozen_rows()
    ]  # fmt: skip
    text = readme.speed_ups(rows)
    assert "| resnet50 | 1.50x (1.50x) | 4.00x (2.00x) | 1.50x (1.50x) |" in text
    assert "batches 1 and 16, each within its dtype" in text


def test_partial_folders_are_not_shown(folder):
    (folder.parent / "whole").mkdir()
    write_report(folder.parent / "whole/models-all.json", Report(ENVIRONMENT, rows=frozen_rows()))
    folder.rename(folder.with_name("abacus.partial"))
    assert "abacus.partial" not in summary.block(folder.parent)


def test_gpu_results_are_said_to_be_measured(folder):
    report = Report({**ENVIRONMENT, "device": "H200", "driver": "1"})
    write_report(folder / "kernels-gpu.json", report)
    assert "Figures of GPUs are measured on H200." in summary.provenance(folder.parent)


def test_every_kind_of_results_has_a_table():
    assert tuple(readme.TABLES) == results.KINDS


def test_plots_are_drawn_from_the_files_and_repeatable(folder):
    pytest.importorskip("matplotlib")
    from benchmarks.output import plots

    names = {path.name: path.read_bytes() for path in plots.draw(folder)}
    assert set(names) == {
        "roofline-pool-fp32.svg", "roofline-conv-fp32.svg", "networks.svg", "first-batch.svg",
        "densenet-memory.svg", "precisions.svg",
    }  # fmt: skip
    assert {path.name: path.read_bytes() for path in plots.draw(folder)} == names
    figure = plots.depth_memory(results.rows(folder, "training"))
    lines = {line.get_label(): list(line.get_ydata()) for line in figure.axes[0].get_lines()}
    assert lines == {"eager": [121.0, 201.0], "cvkernels": pytest.approx([24.2, 40.2])}


def test_machine_names_are_short(monkeypatch):
    monkeypatch.setattr(results, "cpu_name", lambda: "Intel(R) Xeon(R) Gold 6148 CPU @ 2.40GHz")
    monkeypatch.setattr(torch, "get_num_threads", lambda: 4)
    assert results.machine_name(torch.device("cpu")) == "gold-6148-4core"
    monkeypatch.setattr(results, "cpu_name", lambda: "Intel(R) Xeon(R) Processor")
    assert results.machine_name(torch.device("cpu")) == "xeon-4core"
    monkeypatch.setattr(torch.cuda, "get_device_name", lambda device: "NVIDIA H200")
    assert results.machine_name(torch.device("cuda")) == "h200"


def test_a_machine_without_these_results_has_no_tables(folder):
    other = folder.parent / "h200"
    other.mkdir()
    (other / "first_light.json").write_text("{}")
    (other / "NOTES.md").write_text("")
    assert results.machine_folders(folder.parent) == [folder]
