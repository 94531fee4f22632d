"""``profile``: the steps of a frozen plan and their times."""

import importlib.util
import json

import pytest
import torch

import cvkernels
from cvkernels.__main__ import main


def test_every_step_of_the_plan_has_a_time():
    model = cvkernels.create_model("resnet18").eval()
    x = torch.randn(2, 3, 32, 32)
    frozen = cvkernels.freeze(model, x)
    expected = frozen(x)
    found = cvkernels.profile(frozen, x, runs=2)
    planned = [row for row in frozen.report().rows if row.op != "clone"]  # of the answer
    assert [(r.layer, r.op, r.backend) for r in found.rows] == [row[:3] for row in planned]
    assert [r.bytes_moved for r in found.rows] == [r.bytes_read + r.bytes_written for r in planned]
    assert all(row.ms > 0 for row in found.rows) and found.whole_ms > 0
    assert found.steps_ms == pytest.approx(sum(row.ms for row in found.rows))  # of two runs
    assert torch.equal(frozen(x), expected)


@pytest.mark.parametrize("name", ["densenet121", "mobilenet_v2"])
def test_the_table_has_a_hundred_columns(name, capsys, tmp_path):
    if name == "mobilenet_v2":
        pytest.importorskip("torchvision")
    words = ["profile", name, "--size", "32", "--batch", "1", "--runs", "1", "--device", "cpu"]
    assert main([*words, "--json", str(tmp_path / "a.json")]) == 0
    lines = capsys.readouterr().out.splitlines()
    assert max(map(len, lines)) <= 100 and lines[0].split()[:3] == ["layer", "op", "backend"]
    content = json.loads((tmp_path / "a.json").read_text())
    assert len(content["rows"]) == len(lines) - 5 and "float32, [1, 3, 32, 32]" in lines[-1]


def test_half_precision_of_a_model_in_float32():
    model = cvkernels.create_model("resnet18").eval()
    frozen = cvkernels.freeze(model, torch.randn(1, 3, 32, 32), dtype=torch.bfloat16)
    found = cvkernels.profile(frozen, torch.randn(1, 3, 32, 32), runs=1)
    assert found.conditions.startswith("bfloat16, ")


def test_a_picture(tmp_path, capsys):
    pytest.importorskip("matplotlib")
    words = ["profile", "resnet18", "--size", "32", "--runs", "1", "--device", "cpu", "--plot"]
    assert main([*words, str(tmp_path / "a.svg")]) == 0
    drawn = (tmp_path / "a.svg").read_text()
    assert "<svg" in drawn
    assert main([*words, str(tmp_path / "a.nonsense")]) == 2
    assert "error: Format 'nonsense'" in capsys.readouterr().err


def test_without_matplotlib_nothing_is_measured(monkeypatch, capsys):
    monkeypatch.setattr(importlib.util, "find_spec", lambda name: None)
    monkeypatch.setattr(cvkernels, "profile", None)
    assert main(["profile", "resnet18", "--plot", "a.svg", "--device", "cpu"]) == 2
    assert "pip install matplotlib" in capsys.readouterr().err
