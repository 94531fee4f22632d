"""``python -m benchmarks first_light``: steps that hang, die and are killed, and what is saved."""

import json
import os
import random
import signal
import subprocess
import sys
import time
import warnings
from pathlib import Path
from types import SimpleNamespace

import pytest
import torch

from benchmarks.__main__ import main
from benchmarks.first_light import convolutions, facts, plans, rates, right
from benchmarks.first_light.saved import Saved, Unwritable
from benchmarks.first_light.setting import Rehearsed, Setting
from benchmarks.first_light.steps import FAMILIES, PRELOADED, steps
from cvkernels.extension import Status

ROOT = Path(__file__).parents[2]
TINY = Setting(rehearsal=True, batch=2)


def start(folder, *arguments):
    folder.mkdir(exist_ok=True)
    command = (sys.executable, "-m", "tests.support.first_light_steps", str(folder), *arguments)
    pipe = subprocess.PIPE
    return subprocess.Popen(command, cwd=ROOT, stdout=pipe, stderr=pipe, text=True)


def run(folder, *arguments):
    process = start(folder, *arguments)
    process.out, process.err = process.communicate(timeout=60)
    return process


def items_of(folder):
    content = json.loads((folder / "first_light.json").read_text())
    return {
        (step, key): row
        for step, record in content["steps"].items()
        for key, row in record["items"].items()
        if step != "machine"
    }


def executed(folder):
    path = folder / "executed"
    return path.read_text().split("\n")[:-1] if path.exists() else []


def statuses(folder):
    return {key: row["status"] for (_, key), row in items_of(folder).items()}


def test_killed_runs_lose_no_saved_item(tmp_path):
    chosen, order = ("one", "two"), random.Random(3)
    saved = set()
    for _ in range(4):
        process = start(tmp_path, "60", *chosen)
        time.sleep(order.uniform(0.4, 1.6))
        process.kill()
        process.communicate()
        if (tmp_path / "first_light.json").exists():
            done = set(items_of(tmp_path))
            assert saved <= done
            saved = done
    before = len(executed(tmp_path))
    assert run(tmp_path, "60", *chosen).returncode == 0
    done = items_of(tmp_path)
    assert len(done) == 16 and all(row["status"] == "done" for row in done.values())
    again = set(executed(tmp_path)[before:])
    assert not again & {key for _, key in saved}
    assert all(row["attempts"] == 1 for row in done.values())
    assert run(tmp_path, "60", *chosen).returncode == 0
    assert len(executed(tmp_path)) == before + len(again)  # nothing is left to do


def test_an_item_that_hangs_is_ended_and_the_rest_goes_on(tmp_path):
    for attempt in (1, 2):
        process = run(tmp_path, "40", "hangs:6", "one")
        assert process.returncode == 1
        assert "hangs: hanging: hung, ended after" in process.out
        found = statuses(tmp_path)
        assert found.pop("hanging") == "hung" and set(found.values()) == {"done"}
        assert set(found) == {"before", "after", *(f"one {index}" for index in range(8))}
        assert executed(tmp_path).count("hanging") == attempt
    assert run(tmp_path, "40", "hangs:6", "one").returncode == 1
    assert executed(tmp_path).count("hanging") == 2 and executed(tmp_path).count("before") == 1


def test_a_process_that_dies_is_replaced_for_the_other_items(tmp_path):
    process = run(tmp_path, "30", "dies", "fails", "loses")
    assert process.returncode == 1
    assert statuses(tmp_path) == {
        "dying": "died", "left": "done", "failing": "failed", "fine": "done",
        "losing": "lost CUDA", "rest": "done",
    }  # fmt: skip
    rows = items_of(tmp_path)
    assert rows["loses", "losing"]["note"] == "CUDA is lost to this process"
    assert rows["dies", "dying"]["note"] == "the process ended with status 3"
    assert rows["fails", "failing"]["note"] == "ValueError: no such"
    for _ in range(2):  # what failed is tried once more, and then no more
        run(tmp_path, "30", "dies", "fails")
    assert executed(tmp_path).count("failing") == executed(tmp_path).count("dying") == 2
    assert executed(tmp_path).count("fine") == 1


def test_the_seconds_are_kept_and_a_later_run_goes_on(tmp_path):
    begin = time.monotonic()
    first = run(tmp_path, "2", "hangs", "one", "slow")  # the last takes 4 seconds on any machine
    assert time.monotonic() - begin < 2 + 6
    assert "not complete" in first.out and statuses(tmp_path).get("slow 7") != "done"
    run(tmp_path, "30", "hangs:2", "one", "slow")
    assert statuses(tmp_path)["slow 7"] == "done"


@pytest.mark.few(1)
@pytest.mark.parametrize("name", ["SIGINT", "SIGTERM", "SIGKILL"])
def test_a_run_that_is_ended_leaves_no_process(tmp_path, name):
    process = start(tmp_path, "60", "hangs")
    while "hanging" not in executed(tmp_path):
        time.sleep(0.05)
    measuring = children_of(process.pid)
    assert len(measuring) >= 2  # the one that forks, and its fork
    process.send_signal(getattr(signal, name))
    process.communicate(timeout=30)
    end = time.monotonic() + 20
    while any(map(is_running, measuring)) and time.monotonic() < end:
        time.sleep(0.05)
    assert not any(map(is_running, measuring))
    if name != "SIGKILL":
        assert statuses(tmp_path)["before"] == "done"


def children_of(pid):
    found = []
    for path in Path("/proc").glob("[0-9]*/stat"):
        try:
            parent = int(path.read_text().rpartition(")")[2].split()[1])
        except OSError:
            continue
        if parent == pid:
            child = int(path.parent.name)
            found += [child, *children_of(child)]
    return found


def is_running(pid):
    try:
        return Path(f"/proc/{pid}/stat").read_text().rpartition(")")[2].split()[0] != "Z"
    except OSError:
        return False


def test_no_machine_is_one_line(tmp_path):
    process = run(tmp_path, "30", "refused")
    assert process.returncode == 1 and "there is no such machine" in process.err


def test_folders_that_cannot_be_used_are_refused_at_once(tmp_path, capsys):
    (tmp_path / "file").write_text("")
    (tmp_path / "other").mkdir()
    (tmp_path / "other" / "first_light.json").write_text('{"rows": []}')
    for name, message in (("file", "cannot write"), ("other", "is not of first_light")):
        folder = tmp_path / name
        assert main(["first_light", "--rehearse", "--results", str(folder)]) == 2
        line = capsys.readouterr().err
        assert message in line and str(folder) in line and line.count("\n") == 1
    Saved(tmp_path / "gpu", rehearsal=False)
    with pytest.raises(Unwritable, match="is of a GPU"):
        Saved(tmp_path / "gpu", rehearsal=True)


@pytest.mark.parametrize("seconds", ["0", "-1", "nan", "inf", "soon"])
def test_seconds_that_measure_nothing_are_refused(seconds, capsys):
    with pytest.raises(SystemExit):
        main(["first_light", "--rehearse", f"--seconds={seconds}"])
    assert "must be a number of at least 8" in capsys.readouterr().err


def test_a_large_log_is_begun_anew(tmp_path):
    for size, kept in ((100, True), (2**22 + 1, False)):
        (tmp_path / "first_light.log").write_bytes(b"\0" * size)
        run(tmp_path, "30", "one")
        assert ((tmp_path / "first_light.log").stat().st_size >= size) == kept


def test_what_a_killed_run_left_in_a_part_is_taken(tmp_path):
    saved = Saved(tmp_path, True)
    row = {"id": "1", "status": "done"}
    part = {"step": "one", "running": "", "ended": False, "items": {"a": row}}
    saved.part.write_text(json.dumps(part))
    for _ in range(2):
        assert Saved(tmp_path, True).settled("one") == {"a"}
    assert items_of(tmp_path)["one", "a"]["attempts"] == 1


@pytest.fixture
def cuda(monkeypatch):
    """What facts ask of CUDA: a GPU of capability 9.0 and a library that runs on it."""
    status = {"cuda": Status(True), "cpu": Status(False, "not installed", "")}
    monkeypatch.setattr(torch.cuda, "is_available", lambda: True)
    monkeypatch.setattr(torch.cuda, "get_device_capability", lambda: (9, 0))
    monkeypatch.setattr(torch.cuda, "synchronize", lambda: None)
    monkeypatch.setattr(facts.extension, "status", lambda: status)
    monkeypatch.setattr(torch, "randn", lambda *shape, device=None, f=torch.randn: f(*shape))
    functional = SimpleNamespace(max_pool=lambda *_, **__: None)
    monkeypatch.setattr(facts.cvkernels, "functional", functional)
    return SimpleNamespace(status=status, functional=functional)


def test_a_machine_that_can_be_measured(cuda):
    assert facts.lacks_gpu() == ""


def test_a_missing_library_and_one_for_other_gpus_are_named(cuda):
    def refuse(*_, **__):
        raise RuntimeError("CUDA error: no kernel image is available for execution on the device")

    cuda.functional.max_pool = refuse
    assert "has no code for compute capability 9.0" in facts.lacks_gpu()
    cuda.status["cuda"] = Status(False, "the package was built without CUDA ops", "")
    assert "CVKERNELS_CUDA_ARCHS=90" in facts.lacks_gpu()


def test_an_old_driver_is_named_in_pytorch_s_words(monkeypatch):
    def is_available():
        text = "The NVIDIA driver on your system is too old (found version 11040)"
        warnings.warn(text, stacklevel=1)
        return False

    monkeypatch.setattr(torch.cuda, "is_available", is_available)
    assert "too old (found version 11040)" in facts.lacks_gpu()
    monkeypatch.setattr(torch.cuda, "is_available", lambda: False)
    assert "finds no CUDA device" in facts.lacks_gpu()


def test_the_batch_is_halved_until_it_fits():
    assert [facts.fitting(128, int(free)) for free in (139e9, 9e9, 6e9, 4.1e9, 1e9)] == [
        128, 64, 32, 1, 0
    ]  # fmt: skip


def test_the_steps_cover_every_family_and_fit():
    made = steps()
    assert len({step.name for step in made}) == len(made)
    assert {step.argument for step in made} >= set(FAMILIES)
    order = [step.name for step in made]
    assert order[0] == "rates" and order.index("networks") < order.index("plans")


def test_rates_of_a_rehearsal():
    found = {key: measure() for key, measure in rates.items(TINY)}
    assert found["copy and matrix"]["fp32"]["copy_gb_per_s"] > 0
    if triton_interprets():
        assert found["reads from L2"]["tb_per_s"] > 0


def triton_interprets():
    return os.environ.get("TRITON_INTERPRET") == "1"


def test_repeats_with_other_bits_are_wrong():
    numbers = iter([1.0, 1.0, 2.0, 1.0])
    with pytest.raises(AssertionError, match="1 of 3 repeats"):
        right.repeated(TINY, lambda: torch.tensor(next(numbers)))


STEPS = [{"layer": "conv1.conv", "op": "conv", "predicted_us": us} for us in (3.0, 4.0)]
PREDICTED = {
    "list": [{"network": "net", "batch": 2, "steps": STEPS}],
    "dict": {"net": {"batch2": {"steps": STEPS}}},
}


@pytest.mark.parametrize("networks", PREDICTED.values(), ids=PREDICTED)
def test_steps_of_a_plan_stand_beside_their_predictions(networks, tmp_path):
    path = tmp_path / "predicted.json"
    path.write_text(json.dumps({"networks": networks}))
    predictions = plans.Predictions(str(path), "net", 2)
    found = [predictions.of("conv1.conv", "conv") for _ in range(3)]
    assert found == [3.0, 4.0, None]
    assert plans.Predictions(str(path), "net", 1).of("conv1.conv", "conv") is None


@pytest.mark.parametrize("text", ["", "[]", '{"networks": [{}]}', '{"networks": {"net": 1}}'])
def test_predictions_that_cannot_be_read_are_none(text, tmp_path):
    path = tmp_path / "predicted.json"
    path.write_text(text)
    assert plans.Predictions(str(path), "net", 2).of("conv1.conv", "conv") is None


def test_each_step_of_a_frozen_plan_is_timed(monkeypatch):
    small = torch.nn.Sequential(torch.nn.Conv2d(3, 8, 3), torch.nn.ReLU(), torch.nn.Conv2d(8, 8, 1))
    monkeypatch.setattr(Setting, "models", lambda self, name: (small.eval(), small.eval()))
    row = plans.measure(TINY, Rehearsed(), "net", 2)
    convolutions_timed = [step for step in row["steps"] if "conv" in step["op"]]
    assert len(convolutions_timed) == 2
    assert all(step["us"] > 0 and step["bytes"] > 0 for step in row["steps"])


@pytest.mark.skipif(not triton_interprets(), reason="of a rehearsal")
def test_convolutions_have_their_peers():
    pytest.importorskip("triton")
    (_, first), *_ = convolutions.items(TINY)
    row = first()
    assert {"addmm", "convolution + relu, benchmark"} <= set(row["variants"])
    assert any(name.startswith("ours triton") for name in row["variants"]) and not row["wrong"]


def test_the_process_that_forks_asks_nothing_of_cuda():
    """A fork of a process that uses CUDA cannot."""
    script = f"""
import torch
def asked(*_, **__): raise AssertionError("asked of CUDA")
for name in ("is_available", "device_count", "init", "_lazy_init", "current_device"):
    setattr(torch.cuda, name, asked)
for name in {PRELOADED!r}:
    __import__(name)
"""
    done = subprocess.run((sys.executable, "-c", script), cwd=ROOT, capture_output=True, text=True)
    assert done.returncode == 0, done.stderr
