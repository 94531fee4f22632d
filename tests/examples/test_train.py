"""examples/train.py: what it learns, that it goes on where it was interrupted, and bad input."""

import errno
import json
import os
import subprocess
import sys

import pytest
import torch

from tests.examples.conftest import EXAMPLES

NETWORKS = ["googlenet", "resnet18", "densenet121", "seresnet18", "efficientnet_b0"]


@pytest.fixture
def train(example, folder, tmp_path):
    """Trains in this process: train(out, *words) gives the exit status."""
    script = example("train")

    def run(out, *words, data=folder):
        common = [str(data), "--out", str(tmp_path / out), "--size", "32", "--batch", "4"]
        return script.main([*common, "--workers", "0", "--quiet", "--lr", "0.02", *words])

    run.script = script
    return run


def final(tmp_path, out, part="model"):
    return torch.load(tmp_path / out / "checkpoint.pt", weights_only=True)[part]


def rows(tmp_path, out):
    return [json.loads(line) for line in (tmp_path / out / "log.jsonl").read_text().splitlines()]


def moved(tmp_path, out):
    """All parameters as one vector."""
    state = final(tmp_path, out)
    parts = [t.flatten() for n, t in sorted(state.items()) if n.endswith((".weight", ".bias"))]
    return torch.cat(parts).double()


def assert_same_state(ours, theirs, tolerance=0.0):
    assert ours.keys() == theirs.keys()
    for name, tensor in ours.items():
        torch.testing.assert_close(tensor, theirs[name], rtol=tolerance, atol=tolerance, msg=name)


@pytest.mark.few(1)
@pytest.mark.parametrize("model", NETWORKS)
def test_trains_as_the_stock_network_does(train, tmp_path, model):
    """One step: what it moved, all in all. Stock's own gradients err by a hundredth in some of
    these untrained networks, and later steps amplify it."""
    common = ["--model", model, "--epochs", "1", "--lr", "1e-4", "--size", "96", "--batch", "24"]
    assert train("ours", *common) == 0
    assert train("begin", *common, "--lr", "0", "--weight-decay", "0") == 0
    pytest.importorskip("timm")
    for kind in ("stock", "patch"):
        assert train(kind, *common, f"--{kind}") == 0
        begin, ours, stock = (moved(tmp_path, out) for out in ("begin", "ours", kind))
        assert (ours - stock).norm() < 0.05 * (stock - begin).norm()
        for key in ("train_loss", "val_loss"):
            ours, stock = (rows(tmp_path, out)[0][key] for out in ("ours", kind))
            assert ours == pytest.approx(stock, rel=1e-2)


def test_learns_and_tells(train, tmp_path):
    assert train("out", "--model", "resnet18", "--epochs", "4", "--ema", "0.5") == 0
    found = rows(tmp_path, "out")
    assert [row["epoch"] for row in found] == [1, 2, 3, 4]
    assert found[-1]["train_loss"] < found[0]["train_loss"] and found[-1]["train_top1"] > 0.6
    assert all(row["peak_mb"] > 0 and row["train_images_per_s"] > 0 for row in found)
    best = torch.load(tmp_path / "out" / "best.pt", weights_only=True)
    assert best["about"]["classes"] == ["blue", "green", "red"] and "optimizer" not in best
    assert (tmp_path / "out" / "training.svg").stat().st_size > 1000


EVERYTHING = (
    "--model seresnet18 --epochs 3 --mixup 0.2 --label-smoothing 0.1 --ema 0.9 --clip 1 "
    "--accumulate 2 --optimizer adamw --amp bf16 --save-every 1"
).split()


@pytest.mark.few(1)
@pytest.mark.parametrize("step", [1, 4, 8])
def test_an_interrupted_run_ends_with_the_same_weights(train, tmp_path, monkeypatch, step):
    assert train("whole", *EVERYTHING) == 0
    kind = train.script.Training
    do, taken = kind.step, []

    def interrupted(self, passes):
        taken.append(None)
        if len(taken) == step + 1:
            raise KeyboardInterrupt
        return do(self, passes)

    monkeypatch.setattr(kind, "step", interrupted)
    assert train("cut", *EVERYTHING) == 130
    monkeypatch.setattr(kind, "step", do)
    assert train("cut", *EVERYTHING, "--resume") == 0
    for part in ("model", "ema"):
        assert_same_state(final(tmp_path, "cut", part), final(tmp_path, "whole", part))
    assert len(rows(tmp_path, "cut")) == 3


@pytest.mark.parametrize("words", [[], ["--mixup", "0.3"], ["--batch", "1", "--size", "64"]])
def test_unreadable_images_are_named_and_left_out(train, folder, tmp_path, capsys, words):
    whole = (folder / "val/red/0.png").read_bytes()
    (folder / "train/blue/2.png").write_bytes(b"no image")
    (folder / "val/red/0.png").write_bytes(whole[: len(whole) // 2])
    assert train("out", "--model", "resnet18", "--epochs", "2", *words) == 0
    said = capsys.readouterr().err
    for name in ("train/blue/2.png", "val/red/0.png"):
        assert said.count(f"unreadable, left out: {folder / name}") == 1
    assert [row["unreadable"] for row in rows(tmp_path, "out")] == [2, 2]


@pytest.mark.parametrize("kind", ["stop", "skip"])
def test_a_batch_that_is_not_finite(train, tmp_path, monkeypatch, capsys, example, kind):
    samples = example("data").Samples
    read = samples.__getitem__

    def broken(self, key):
        image, label, name = read(self, key)
        return (image.clone().fill_(torch.inf) if "green/5" in name else image), label, name

    monkeypatch.setattr(samples, "__getitem__", broken)
    status = train("out", "--model", "resnet18", "--epochs", "1", "--nonfinite", kind)
    said = capsys.readouterr().err
    assert "images that are not finite" in said and "green/5.png" in said
    assert status == (1 if kind == "stop" else 0)
    if kind == "skip":
        assert rows(tmp_path, "out")[0]["skipped_steps"] == 1
        assert all(t.isfinite().all() for t in final(tmp_path, "out").values())


def test_checkpoints_that_a_run_cannot_go_on_from(train, tmp_path, capsys):
    assert train("out", "--model", "resnet18", "--epochs", "1") == 0
    path = tmp_path / "out" / "checkpoint.pt"

    def refusal(*words):
        assert train("out", "--epochs", "2", "--resume", *words) == 1
        return capsys.readouterr().err

    assert "is of model resnet18, this run of resnet34" in refusal("--model", "resnet34")
    assert "is of a run without --ema" in refusal("--model", "resnet18", "--ema", "0.9")
    content = torch.load(path, weights_only=True)
    torch.save(content | {"format": 2}, path)
    assert "has format 2, this script reads up to 1" in refusal("--model", "resnet18")
    path.write_bytes(b"something else")
    assert "is no checkpoint that can be read" in refusal("--model", "resnet18")


def test_a_full_disk_leaves_the_old_checkpoint(train, tmp_path, monkeypatch, capsys):
    assert train("out", "--model", "resnet18", "--epochs", "1") == 0
    before = (tmp_path / "out" / "checkpoint.pt").read_bytes()

    def full(content, file):
        file.write(b"the beginning")
        raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC))

    monkeypatch.setattr(torch, "save", full)
    assert train("out", "--model", "resnet18", "--epochs", "2", "--resume") == 1
    assert "No space left on device; the run goes on" in capsys.readouterr().err
    assert (tmp_path / "out" / "checkpoint.pt").read_bytes() == before
    assert not list((tmp_path / "out").glob("*.new"))


@pytest.mark.parametrize(
    ("words", "said"),
    [
        (["--model", "resnet19"], "Unknown model resnet19; did you mean"),
        (["--model", "resnet19", "--patch"], "neither torchvision nor timm has a model"),
        (["--batch", "64"], "24 training images are too few for one step"),
    ],
)
def test_what_cannot_be_trained_is_told_in_a_line(train, capsys, words, said):
    assert train("out", *words) == 1
    line = capsys.readouterr().err
    assert said in line and line.count("\n") == 1


def test_a_folder_without_classes(train, tmp_path, capsys):
    assert train("out", data=tmp_path) == 1
    assert "must hold the folders train and val" in capsys.readouterr().err


# Processes


def in_processes(count, folder, out, *words, seconds=300):
    """torchrun's exit status and what was printed."""
    command = [
        sys.executable, "-m", "torch.distributed.run", "--standalone", "--nproc-per-node", count,
        EXAMPLES / "train.py", folder, "--out", out, "--size", "32", "--batch", "4", "--workers",
        "0", "--quiet", "--lr", "0.02", "--model", "resnet18", *words,
    ]  # fmt: skip
    done = subprocess.run(
        [str(word) for word in command], capture_output=True, text=True, timeout=seconds,
        env={**os.environ, "OMP_NUM_THREADS": "1"},
    )  # fmt: skip
    return done.returncode, done.stdout + done.stderr


@pytest.mark.full
@pytest.mark.parametrize("words", [[], ["--fsdp", "--sync-bn"]], ids=["ddp", "fsdp"])
def test_another_number_of_processes_goes_on(train, folder, tmp_path, words):
    """Two processes, then one."""
    for epochs, processes in enumerate((2, 1), 1):
        more = ["--epochs", epochs, "--ema", "0.9", "--save-every", "1", "--resume", *words]
        if processes == 1:
            more = [word for word in more if word not in words]
        status, said = in_processes(processes, folder, tmp_path / "out", *more)
        assert status == 0, said
    assert [row["epoch"] for row in rows(tmp_path, "out")] == [1, 2]
    assert all(t.isfinite().all() for t in final(tmp_path, "out").values())


@pytest.mark.full
def test_shards_train_as_replicas_do(train, folder, tmp_path):
    for out, words in (("ddp", []), ("fsdp", ["--fsdp"])):
        status, said = in_processes(2, folder, tmp_path / out, "--epochs", "1", *words)
        assert status == 0, said
    parameters = {
        out: {n: t for n, t in final(tmp_path, out).items() if "running" not in n}
        for out in ("ddp", "fsdp")
    }
    assert_same_state(parameters["fsdp"], parameters["ddp"], 1e-4)


@pytest.mark.full
def test_a_process_that_dies_ends_the_others(folder, tmp_path):
    (tmp_path / "sitecustomize.py").write_text(
        "import os, threading, time\n"
        "if os.environ.get('RANK') == '1':\n"
        "    threading.Thread(target=lambda: (time.sleep(12), os._exit(3)), daemon=True).start()\n"
    )
    path = os.pathsep.join((str(tmp_path), os.environ.get("PYTHONPATH", "")))
    os.environ["PYTHONPATH"], before = path, os.environ.get("PYTHONPATH")
    try:
        words = ["--epochs", "1000", "--timeout", "20"]
        status, said = in_processes(2, folder, tmp_path / "out", *words, seconds=120)
    finally:
        os.environ.pop("PYTHONPATH") if before is None else os.environ.update(PYTHONPATH=before)
    assert status != 0 and "exitcode  : 3" in said


def test_runs_are_drawn_beside_each_other(example, tmp_path):
    plots = example("plots")
    folders = [tmp_path / name for name in ("a-ours", "a-stock", "b-ours")]
    for index, folder in enumerate(folders):
        folder.mkdir()
        lines = [json.dumps({"epoch": e, "val_top1": 0.1 * (e + index)}) for e in (1, 2)]
        (folder / "log.jsonl").write_text("\n".join(lines) + "\n")
    pytest.importorskip("matplotlib")
    plots.compare(folders, tmp_path / "curves.svg")
    drawn = (tmp_path / "curves.svg").read_text()
    assert all(f"<!-- {text} -->" in drawn for text in ("a", "b", "ours", "stock"))
