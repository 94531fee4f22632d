"""``python -m benchmarks --all``: parts, interrupts, and the folder that is replaced whole."""

import contextlib
import json
import os
import signal
import subprocess
import sys
import time
from pathlib import Path

import pytest

from benchmarks import everything, kernels
from benchmarks.__main__ import main
from benchmarks.everything import Part, is_complete
from cvkernels.demo import NETWORKS

PARTS = [Part(name, ("benchmarks", "kernels"), 1.0) for name in ("one", "two")]


def writing(statuses, complete=True):
    """A runner that writes each part's file and ends with its status."""
    left = iter(statuses)

    def run(command, seconds):
        status = next(left)
        if status is not None:
            content = {"complete": complete and status != 130, "command": list(command)}
            Path(command[-1]).write_text(json.dumps(content))
        return status or 0

    return run


@pytest.mark.parametrize("device", ["cpu", "cuda"])
def test_parts_cover_every_op_and_network_within_the_time(device):
    parts = everything.parts(device)
    names = {part.name for part in parts}
    assert names >= {f"kernels-{op}" for op in kernels.ops()}
    assert names >= {f"{kind}-{n}" for kind in ("models", "training") for n in NETWORKS}
    assert "demo" in names and len(names) == len(parts)
    # The run ends in time whatever the sum; a sum far above it would leave parts out.
    assert max(part.minutes for part in parts) < everything.PART
    assert sum(part.minutes for part in parts) <= 1.25 * everything.TOTAL[device]


def test_every_part_is_a_command_that_the_parser_takes():
    from benchmarks.__main__ import _parser

    for part in everything.parts("cpu"):
        if part.arguments[0] == "benchmarks":
            _parser().parse_args([*part.arguments[1:], "--minutes", "1", "--json", "file"])


def test_parts_run_once_and_failures_do_not_stop_the_others(tmp_path):
    assert everything.run_parts(PARTS, tmp_path, 60, writing([1, 0])) == ["one"]
    assert all(is_complete(tmp_path, part) for part in PARTS)
    assert everything.run_parts(PARTS, tmp_path, 60, writing([])) == []  # nothing is left to run


def test_time_left_limits_a_part_and_none_left_ends_the_run(tmp_path):
    everything.run_parts(PARTS[:1], tmp_path, 30, writing([0]))
    command = json.loads((tmp_path / "one.json").read_text())["command"]
    assert 0 < float(command[command.index("--minutes") + 1]) <= 0.5
    everything.run_parts(PARTS, tmp_path, 0, writing([]))
    assert not is_complete(tmp_path, PARTS[1])


def test_stopped_part_counts_and_interrupted_one_does_not(tmp_path):
    run = writing([everything.OUT_OF_TIME, 130], complete=False)
    with pytest.raises(KeyboardInterrupt):
        everything.run_parts(PARTS, tmp_path, 60, run)
    assert [is_complete(tmp_path, part) for part in PARTS] == [True, False]


def run_all(monkeypatch, tmp_path, run, *arguments):
    monkeypatch.setattr(everything, "parts", lambda device: PARTS)
    monkeypatch.setattr(everything, "run_process", run)
    monkeypatch.setattr(everything, "_draw", lambda folder: None)
    return main(["--all", "--results", str(tmp_path), "--machine", "abacus", *arguments])


def test_interrupt_keeps_old_results_and_what_was_measured(monkeypatch, tmp_path, capsys):
    folder = tmp_path / "abacus"
    folder.mkdir()
    for name in ("old.json", "NOTES.md"):
        (folder / name).write_text("{}")
    assert run_all(monkeypatch, tmp_path, writing([0, 130])) == 130
    assert "--resume" in capsys.readouterr().out
    assert (folder / "old.json").exists()
    assert is_complete(tmp_path / "abacus.partial", PARTS[0])
    # Only the second is run now; then the folder is replaced, notes excepted.
    assert run_all(monkeypatch, tmp_path, writing([0]), "--resume") == 0
    assert sorted(path.name for path in folder.iterdir()) == ["NOTES.md", "one.json", "two.json"]
    assert not (tmp_path / "abacus.partial").exists()


def test_single_parts_gather_until_all_are_there(monkeypatch, tmp_path, capsys):
    assert run_all(monkeypatch, tmp_path, writing([0]), "--part", "two") == 0
    assert "not measured yet: one" in capsys.readouterr().out
    assert run_all(monkeypatch, tmp_path, writing([0]), "--part", "one") == 0
    assert {path.name for path in (tmp_path / "abacus").iterdir()} == {"one.json", "two.json"}


def test_unwritable_folder_is_refused_before_measuring(monkeypatch, tmp_path, capsys):
    (tmp_path / "file").write_text("")
    assert run_all(monkeypatch, tmp_path / "file", writing([])) == 2
    assert "cannot write results to" in capsys.readouterr().err


def test_unknown_part_is_refused(monkeypatch, tmp_path, capsys):
    assert run_all(monkeypatch, tmp_path, writing([]), "--part", "three") == 2
    assert "no part is named three; --list" in capsys.readouterr().err


def test_end_of_time_interrupts_a_part_which_keeps_what_it_has(tmp_path):
    """Even one that a shell started in the background, where interrupts are ignored."""
    path = tmp_path / "kept"
    code = (
        "import pathlib, time\n"
        "try:\n    time.sleep(60)\n"
        f"except KeyboardInterrupt:\n    pathlib.Path({str(path)!r}).write_text('kept')"
    )
    start, handler = time.monotonic(), signal.signal(signal.SIGINT, signal.SIG_IGN)
    try:
        status = everything.run_process([sys.executable, "-c", code], 3.0)
    finally:
        signal.signal(signal.SIGINT, handler)
    assert status == everything.OUT_OF_TIME
    assert path.read_text() == "kept" and time.monotonic() - start < 30


def part_of(pid):
    """The /proc folder of the part that process pid runs, once it runs it."""
    for path in Path("/proc").glob("[0-9]*/stat"):
        with contextlib.suppress(OSError):  # it has ended meanwhile
            _, parent, *_ = path.read_text().rpartition(")")[2].split()
            if int(parent) == pid and b"--json" in (path.parent / "cmdline").read_bytes():
                return path.parent
    return None


@pytest.mark.skipif(not Path("/proc/self/stat").exists(), reason="needs Linux's /proc")
@pytest.mark.parametrize("stop", [signal.SIGINT, signal.SIGTERM], ids=lambda s: s.name)
def test_a_signal_that_ends_all_ends_its_part_too(stop, tmp_path):
    part = everything.parts("cpu")[-1].name
    command = [sys.executable, "-m", "benchmarks", "--all", "--part", part, "--machine", "some"]
    process = subprocess.Popen(
        [*command, "--results", str(tmp_path)],
        cwd=everything.ROOT,
        stderr=subprocess.PIPE,
        stdout=subprocess.PIPE,
        text=True,
        env={**os.environ, "CUDA_VISIBLE_DEVICES": ""},
        preexec_fn=lambda: signal.signal(signal.SIGINT, signal.default_int_handler),
    )
    deadline = time.monotonic() + 120
    while (part := part_of(process.pid)) is None and time.monotonic() < deadline:
        time.sleep(0.1)
    assert part is not None
    process.send_signal(stop)
    out, _ = process.communicate(timeout=120)
    assert process.returncode == 130 and "go on with --all --resume" in out
    assert not part.exists()
