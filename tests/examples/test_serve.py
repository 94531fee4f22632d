"""examples/serve.py: predictions of a trained network, alone and shared by two processes."""

import json
import os
import subprocess
import sys

import pytest

from tests.examples.conftest import EXAMPLES


@pytest.fixture
def trained(example, folder, tmp_path):
    words = f"--out {tmp_path / 'run'} --model resnet18 --size 32 --batch 4 --epochs 3 --lr 0.02"
    train = example("train")
    assert train.main([str(folder), *words.split(), "--workers", "0", "--quiet"]) == 0
    return tmp_path / "run" / "best.pt"


@pytest.fixture
def serve(example, capsys):
    """serve(*words): exit status, predictions and what was said."""
    script = example("serve")

    def run(*words):
        capsys.readouterr()
        status = script.main([*map(str, words), "--workers", "0", "--quiet"])
        out, said = capsys.readouterr()
        return status, [json.loads(line) for line in out.splitlines()], said

    return run


def test_predicts_every_readable_image_in_order(trained, folder, serve):
    (folder / "val/green/1.png").write_bytes(b"no image")
    status, found, said = serve(trained, folder / "val", "--top", 5, "--batch", 4)
    assert status == 0 and "8 images in" in said and "with 1 processes" in said
    assert f"unreadable, left out: {folder / 'val/green/1.png'}" in said
    names = [row["image"] for row in found]
    assert names == sorted(names) and len(names) == 8
    for row in found:
        assert {answer["class"] for answer in row["predictions"]} == {"blue", "green", "red"}
        chances = [answer["probability"] for answer in row["predictions"]]
        assert chances == sorted(chances, reverse=True) and abs(sum(chances) - 1) < 1e-4
    right = sum(row["predictions"][0]["class"] in row["image"] for row in found)
    assert right >= 6


def test_a_builder_with_weights(serve, folder, tmp_path):
    import torch

    import cvkernels

    model = cvkernels.create_model("resnet18", num_classes=7)
    torch.save(model.state_dict(), tmp_path / "weights.pt")
    words = ("--weights", tmp_path / "weights.pt", "--classes", 7, "--size", 40, "--dtype", "bf16")
    status, found, _ = serve("resnet18", folder / "val", *words)
    assert status == 0 and len(found) == 9
    status, found, said = serve("resnet18", folder / "val")
    assert status == 1 and "a builder's name needs --weights" in said
    status, found, said = serve("resnet18", tmp_path / "nothing", *words)
    assert status == 1 and "holds no images" in said


@pytest.mark.full
def test_two_processes_predict_as_one(trained, folder, serve, tmp_path):
    _, alone, _ = serve(trained, folder, "--batch", 4, "--top", 3)
    command = [
        sys.executable, "-m", "torch.distributed.run", "--standalone", "--nproc-per-node", "2",
        EXAMPLES / "serve.py", trained, folder, "--batch", "4", "--top", "3", "--workers", "0",
        "--out", tmp_path / "answers.jsonl",
    ]  # fmt: skip
    done = subprocess.run(
        list(map(str, command)), capture_output=True, text=True, timeout=300,
        env={**os.environ, "OMP_NUM_THREADS": "1"},
    )  # fmt: skip
    assert done.returncode == 0, done.stderr
    shared = [json.loads(line) for line in (tmp_path / "answers.jsonl").read_text().splitlines()]
    assert [row["image"] for row in shared] == [row["image"] for row in alone]
    for ours, theirs in zip(shared, alone, strict=True):
        for one, other in zip(ours["predictions"], theirs["predictions"], strict=True):
            assert one["class"] == other["class"]
            assert one["probability"] == pytest.approx(other["probability"], abs=1e-4)
    assert "33 images in" in done.stderr and "with 2 processes" in done.stderr
