"""``python -m benchmarks tune``: what is measured, and the table that comes of it."""

import json
from collections import Counter
from concurrent.futures import ThreadPoolExecutor
from dataclasses import replace

import pytest
import torch

from benchmarks import tune
from benchmarks.__main__ import main
from benchmarks.harness import machine as machines
from benchmarks.harness.machine import Machine, Settings
from cvkernels.backend import BackendError
from cvkernels.ops.conv_bn_act import tiles, tuning
from cvkernels.ops.conv_bn_act.problem import Problem, Projection
from cvkernels.ops.conv_bn_act.tiles import Config

GEOMETRY = ((1, 1), (0, 0), (1, 1))
TINY = Problem(2, 16, 6, 5, 16, 1, 1, *GEOMETRY, 1, torch.float16, "relu", has_bn=True)
PROLOGUES = Problem(
    1, 32, 4, 4, 16, 1, 1, *GEOMETRY, 1, torch.float16, "silu", has_bn=True, has_residual=True,
    has_input_bn=True, has_input_gate=True, has_out=True,
)  # fmt: skip
SPATIAL = replace(TINY, C=64, H=5, K=64, R=3, S=3, padding=(1, 1))
ADDED = replace(TINY, has_bn=False, has_bias=True)
PROJECTED = replace(ADDED, projection=Projection(24, (2, 2)))
GATED = replace(ADDED, has_residual=True, has_output_gate=True)
ONCE = Settings(rounds=1, seconds=60.0, least=1)


@pytest.fixture
def machine(monkeypatch, device):
    monkeypatch.setattr(machines, "last_level_cache", lambda device: 2**10)
    return Machine(device)


def few(problem, capability):
    """The heuristic's answer, and two other tiles that the interpreter is quick with."""
    first = tuning.heuristic(problem, capability)
    tiles = [Config("triton", 64, 32, k, 4, 2) for k in (16, 32)]
    return [first, *tiles]


def test_the_networks_convolutions_are_counted():
    found = tune.problems(["resnet50"], [1, 128], [torch.bfloat16])
    # Of the frozen network, which sums four shortcuts with other convolutions; and of the live one
    # these shortcuts, and the first convolution, whose images the frozen one lays out anew.
    assert sum(found.values()) == 2 * (53 - 4 + 4 + 1)
    assert {problem.N for problem in found} == {1, 128}
    stem = [problem for problem in found if problem.R == 7]
    assert len(stem) == 4 and all(found[problem] == 1 for problem in stem)


@pytest.mark.parametrize("problem", [TINY, PROLOGUES, SPATIAL])
def test_candidates_are_tiles_that_may_be_chosen(problem):
    found = tune.candidates(problem, (9, 0))
    assert found[0] == tuning.heuristic(problem, (9, 0)) and len(set(found)) == len(found) > 2
    assert any(c.backend == "cudnn" for c in found) == (problem is not PROLOGUES)
    assert any(c.backend == "halo" for c in found) == (problem is SPATIAL)
    for config in found:
        assert (
            replace(config, backend="triton", split_k=1) in tiles.CONFIGS[tiles.kernel(problem), 2]
        )


@pytest.mark.parametrize(
    "problem", [TINY, PROLOGUES, SPATIAL, PROJECTED, GATED],
    ids=["1x1", "prologues", "3x3", "projection", "gates"],
)  # fmt: skip
def test_right_answers_are_timed_and_wrong_ones_named(problem, machine, monkeypatch, capsys):
    pytest.importorskip("triton")
    monkeypatch.setattr(tune, "candidates", few)
    runner = tune.runner

    def sometimes_wrong(problem, config, given):
        run = runner(problem, config, given)
        return (lambda: run() + 1) if config.block_k == 16 else run

    monkeypatch.setattr(tune, "runner", sometimes_wrong)
    found = tune.measure(problem, machine, ONCE)
    backends = ("triton", "cudnn") if machine.device.type == "cuda" else ("triton",)
    right = [c for c in few(problem, (9, 0)) if c.block_k != 16 and c.backend in backends]
    assert set(found.seconds) == set(right)
    assert all(seconds > 0 for seconds in found.seconds.values())
    assert "max error" in capsys.readouterr().err


@pytest.mark.skipif(torch.cuda.is_available(), reason="cuDNN is timed above")
def test_cudnn_is_asked_for_by_name(device):
    config = replace(tuning.heuristic(TINY, (9, 0)), backend="cudnn")
    with pytest.raises(BackendError, match="'cudnn' cannot run this call"):
        tune.runner(TINY, config, tune.operands(TINY, device))


def results():
    """One where another tile wins, one where cuDNN does, one where the gain is noise."""
    first = tuning.heuristic(TINY, (9, 0))
    other = Config("triton", 64, 32, 32, 4, 3)
    library = replace(first, backend="cudnn")
    noise, cudnn = replace(TINY, K=24), replace(TINY, K=40)
    return [
        tune.Found(TINY, {first: 2e-6, other: 1e-6}, first),
        tune.Found(cudnn, {first: 3e-6, library: 2e-6}, first),
        tune.Found(noise, {first: 1.01e-6, other: 1e-6}, first),
    ]


def test_the_table_holds_what_beats_the_heuristic_and_is_read_back(tmp_path):
    one, two, noise = results()
    stale = {"entries": {tuning.key(noise.problem): {"backend": "cudnn"}, "kept": {}}}
    unmeasured = tune.Found(SPATIAL, {}, tuning.heuristic(SPATIAL, (9, 0)))
    table = tune.table_of([one, two, noise, unmeasured], "Some GPU", (9, 0), stale)
    assert "kept" not in table["entries"]  # it does not say with which versions
    versions = {name: table[name] for name in ("torch", "triton")}
    table = tune.table_of([one, two, noise, unmeasured], "Some GPU", (9, 0), stale | versions)
    assert table["entries"].pop("kept") == {}
    assert set(table["entries"]) == {tuning.key(one.problem), tuning.key(two.problem)}
    path = tmp_path / "table.json"
    path.write_text(json.dumps(table))
    assert tuning.load_table(path) == 2
    chosen = tuning.choose(one.problem, "Some GPU", (9, 0))
    assert (chosen.block_m, chosen.num_stages) == (64, 3)
    assert tuning.choose(two.problem, "Some GPU", (9, 0)).backend == "cudnn"
    assert tuning.choose(noise.problem, "Some GPU", (9, 0)) == noise.heuristic


def test_problems_come_as_they_are_compiled_until_the_time_is_over(monkeypatch, capsys):
    monkeypatch.setattr(tune, "ProcessPoolExecutor", lambda n, context: ThreadPoolExecutor(n))
    started = []

    def compiles(problem, device):
        started.append(device)
        if problem is SPATIAL:
            raise RuntimeError("no such GPU")

    monkeypatch.setattr(tune, "compile_candidates", compiles)
    three = [TINY, SPATIAL, PROLOGUES]
    assert list(tune.compiled(three, torch.device("cuda:1"), 60.0)) == three
    assert started == ["cuda:1"] * 3 and "no such GPU" in capsys.readouterr().err
    assert list(tune.compiled(three, torch.device("cuda:1"), 0.0)) == []


def test_the_report_adds_up_all_calls():
    found = results()
    text = tune.report(found, Counter({one.problem: n for n, one in enumerate(found, 1)}))
    assert "2.00x" in text and "1.50x" in text
    # 1 * 2 + 2 * 3 + 3 * 1.01 and 1 * 1 + 2 * 2 + 3 * 1.01 microseconds
    assert "all calls: 11 us by the heuristic, 8 us by the table" in text


def test_a_cpu_is_refused(capsys):
    assert main(["tune", "--device", "cpu"]) == 2
    assert "tune measures a GPU" in capsys.readouterr().err
