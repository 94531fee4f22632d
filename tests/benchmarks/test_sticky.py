"""CUDA errors that stay with a process: they end it, and what was measured is kept."""

import json

import pytest
import torch

from benchmarks import everything, tune
from benchmarks.__main__ import main
from benchmarks.everything import Part
from benchmarks.harness import sticky
from benchmarks.harness.machine import Machine
from benchmarks.harness.sticky import ContextLost, check_context
from tests.support.harness_fakes import CPU, doubled, make_case

ERROR = "CUDA error: an illegal memory access was encountered"


@pytest.fixture
def cuda(monkeypatch):
    """torch.cuda with a context that ``break_it`` breaks."""
    state = {"broken": False}

    def synchronize(device=None):
        if state["broken"]:
            raise RuntimeError(ERROR)

    def break_it(*args):
        state["broken"] = True
        raise RuntimeError("the first error")

    monkeypatch.setattr(torch.cuda, "is_available", lambda: True)
    monkeypatch.setattr(torch.cuda, "is_initialized", lambda: True)
    monkeypatch.setattr(torch.cuda, "synchronize", synchronize)
    return break_it


def test_only_an_error_that_stays_is_one(cuda):
    check_context(ValueError("of a compiler"))
    with pytest.raises(RuntimeError):
        cuda()
    with pytest.raises(ContextLost, match=f"{ERROR}.*ValueError: the next") as lost:
        check_context(ValueError("the next"))
    assert not isinstance(lost.value, Exception)


def test_without_cuda_nothing_is_asked(monkeypatch):
    monkeypatch.setattr(torch.cuda, "is_initialized", lambda: False)
    monkeypatch.setattr(torch.cuda, "synchronize", lambda: pytest.fail("asked"))
    check_context(ValueError())


@pytest.fixture
def options(monkeypatch, tmp_path):
    monkeypatch.setattr("benchmarks.harness.machine.last_level_cache", lambda device: 2**10)
    arguments = [
        "kernels",
        "--op",
        "se_scale",
        "--rounds",
        "2",
        "--seconds",
        "0",
        "--device",
        "cpu",
    ]
    return [*arguments, "--json", str(tmp_path / "rows.json")]


def cases(broken):
    good = [make_case({"eager": doubled, "cvkernels": doubled}, name) for name in ("one", "three")]
    return [good[0], make_case({"eager": doubled, "cvkernels": broken}, "two"), good[1]]


def test_the_command_ends_with_its_message_and_goes_on_in_a_new_process(
    cuda, options, monkeypatch, capsys, tmp_path
):
    monkeypatch.setattr("benchmarks.kernels.ops", lambda: ["se_scale"])
    monkeypatch.setattr("benchmarks.kernels.cases", lambda *_, **__: cases(cuda))
    assert main(options) == sticky.STATUS
    assert f"error: CUDA is lost to this process ({ERROR})" in capsys.readouterr().err
    content = json.loads((tmp_path / "rows.json").read_text())
    assert not content["complete"]
    assert {row["case"] for row in content["rows"]} == {"one", "two"}
    monkeypatch.setattr(torch.cuda, "synchronize", lambda device=None: None)
    assert main([*options, "--go-on"]) == 1  # for the row that failed
    content = json.loads((tmp_path / "rows.json").read_text())
    rows = [(row["case"], row["variant"], row["status"]) for row in content["rows"]]
    assert ("two", "cvkernels", "failed") in rows and ("three", "cvkernels", "measured") in rows
    assert content["complete"] and len(rows) == len(set(rows)) == 5


def test_all_starts_a_new_process_for_the_rest_of_a_part(tmp_path):
    commands, statuses = [], iter([sticky.STATUS, 0, 0])

    def run(command, seconds):
        commands.append(command)
        return next(statuses)

    parts = [Part(name, ("benchmarks", "kernels"), 1.0) for name in ("one", "two")]
    assert everything.run_parts(parts, tmp_path, 60, run) == []
    assert [command[-1] for command in commands].count("--go-on") == 1
    assert commands[1] == (*commands[0], "--go-on") and "two" in commands[2][-1]


def test_tune_ends_too(cuda, monkeypatch):
    problem = tune.Problem(
        1, 16, 4, 4, 16, 1, 1, (1, 1), (0, 0), (1, 1), 1, torch.float16, "relu", has_bn=True
    )
    monkeypatch.setattr("benchmarks.harness.machine.last_level_cache", lambda device: 2**10)
    monkeypatch.setattr(tune, "runner", lambda *_: cuda)
    with pytest.raises(ContextLost):
        tune.measure(problem, Machine(CPU))
