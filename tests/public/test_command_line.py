import pytest
import torch

from cvkernels import demo
from cvkernels.__main__ import main


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
    import re

    assert re.match(message, error)


def test_interrupt_ends_quietly(monkeypatch, capsys):
    def interrupted(*args, **kwargs):
        raise KeyboardInterrupt

    monkeypatch.setattr("cvkernels.verify", interrupted)
    assert main(["verify", "resnet18", "--size", "32"]) == 130
    assert capsys.readouterr().err == "interrupted\n"


@pytest.mark.full
def test_demo_compares_every_network_on_given_photographs(tmp_path, monkeypatch):
    pytest.importorskip("torchvision")
    pytest.importorskip("timm")
    image = pytest.importorskip("PIL.Image")
    numpy = pytest.importorskip("numpy")
    pytest.importorskip("rich")
    pixels = numpy.random.default_rng(0).integers(0, 255, (300, 280, 3), dtype=numpy.uint8)
    image.fromarray(pixels).save(tmp_path / "photo.png")
    monkeypatch.setattr(demo, "BATCHES", (2,))
    table = demo.demo([str(tmp_path / "photo.png")], runs=1)
    assert [row.network for row in table.rows] == list(demo.NETWORKS)
    for row in table.rows:
        assert row.batch == 2 and row.largest_difference < 1e-3 and row.top5_agreement == 1.0
        assert min(row.stock_ms, row.ours_ms) > 0
    assert str(table).splitlines()[0].startswith("network")


def test_demo_refuses_a_file_that_is_no_image(tmp_path):
    pytest.importorskip("torchvision")
    (tmp_path / "text.png").write_text("no image")
    with pytest.raises(ValueError, match="text.png' is not an image"):
        demo.load_photos([str(tmp_path / "text.png")])
