"""Benchmarks of whole networks, on a toy: variants, peers that are missing, and saved bytes."""

import copy

import pytest
import torch
from torch import nn

from benchmarks import bench_models, bench_training
from benchmarks.__main__ import main
from benchmarks.bench_training import Step
from benchmarks.harness import machine as machines
from benchmarks.harness import peers, run
from benchmarks.harness.command_line import Refused
from benchmarks.harness.machine import Machine, Settings
from benchmarks.harness.report import Rates
from benchmarks.harness.run import run_cases
from cvkernels.freeze import quantise
from cvkernels.freeze.quantise.guard import decibels
from tests.support.harness_fakes import CPU

ONCE = Settings(rounds=4, seconds=60.0, least=4)


class Toy(nn.Module):
    def __init__(self, features=4):
        super().__init__()
        self.conv = nn.Conv2d(3, features, 3)
        self.drop = nn.Dropout(0.5)
        self.fc = nn.Linear(features, 1000)

    def forward(self, x):
        return self.fc(self.drop(self.conv(x).relu().mean((2, 3))))


@pytest.fixture
def toy(monkeypatch):
    """Every network is the toy; nothing is compiled or imported beforehand."""
    stock = Toy().eval()
    networks = bench_models.Networks(
        stock, copy.deepcopy(stock), copy.deepcopy(stock).double(), copy.deepcopy(stock)
    )
    for module in (bench_models, bench_training):
        monkeypatch.setattr(module, "networks_of", lambda *args: networks)
    monkeypatch.setattr(bench_models, "photographs", lambda: torch.rand(2, 3, 9, 9))
    monkeypatch.setattr(peers, "warm_up", lambda: None)
    monkeypatch.setattr(machines, "last_level_cache", lambda device: 2**10)
    monkeypatch.setattr(Machine, "rates", lambda self, dtype: Rates(1.0, 1.0))
    # Both collect garbage, which takes long in a process full of tests.
    monkeypatch.setattr(run, "resident_memory", lambda device: 1000.0)
    monkeypatch.setattr(run, "peak_memory", lambda call, device: call() is None or 2000.0)
    return networks


def without_compilers(cases):
    for case in cases:
        for name in [name for name in case.variants if name.startswith("compile")]:
            case.variants.pop(name)
    return cases


def test_inference_has_every_peer_and_its_columns(toy, monkeypatch):
    monkeypatch.setattr(peers, "_imported", missing)
    cases = bench_models.cases(CPU, [torch.float32], [1, 3], ["resnet50"])
    assert {"compile", "compile freezing", "openvino", "onnxruntime"} <= set(cases[0].variants)
    report = run_cases(without_compilers(cases), Machine(CPU), ONCE)
    rows = {(row.case, row.variant): row for row in report.rows}
    ours = rows["batch 3", "cvkernels"]
    assert ours.status == "measured" and ours.part == "inference"
    assert ours.vs_eager == pytest.approx(
        rows["batch 3", "eager channels_last"].time_us / ours.time_us
    )
    assert ours.max_error <= 2 * ours.eager_error + 1e-6
    assert ours.first_batch_s > 0 and ours.drift > 0
    assert (ours.kept_bytes, ours.peak_bytes) == (0.0, 2000.0)
    # A peer that is not installed says which extra has it, and the others go on.
    assert rows["batch 3", "openvino"].status == "unavailable"
    assert "pip install 'cvkernels[bench]'" in rows["batch 3", "openvino"].note
    assert report.sound


def test_int8_has_agreement_beside_time_and_is_held_to_no_rule(toy, monkeypatch):
    monkeypatch.setattr(peers, "_imported", missing)
    monkeypatch.setattr(quantise, "ENOUGH", 1)
    monkeypatch.setattr(bench_models, "CALIBRATION", 4)
    cases = bench_models.cases(CPU, [torch.int8], [3], ["resnet50"])
    rows = {row.variant: row for row in run_cases(cases, Machine(CPU), ONCE).rows}
    ours, guarded = rows["cvkernels int8"], rows["cvkernels int8, 30 dB"]
    assert (ours.status, ours.dtype, guarded.status) == ("measured", "int8", "measured")
    assert ours.max_error > 2 * ours.eager_error
    assert 20 < ours.decibels < 60 < rows["eager channels_last"].decibels
    assert 0 <= ours.top1 <= 1 and guarded.decibels > 25
    for peer in ("openvino", "onnxruntime", "compile"):
        assert rows[f"{peer} int8"].status == "unavailable"
    with pytest.raises(Refused, match="int8 are for CPUs"):
        bench_models.cases(torch.device("cuda"), [torch.int8], [3])


@pytest.mark.parametrize(
    ("peer", "package"), [("openvino_int8", "nncf"), ("onnxruntime_int8", "onnxruntime")]
)
def test_runtimes_quantise_the_network(peer, package):
    for name in (package, "onnxscript" if peer.startswith("onnx") else "openvino"):
        pytest.importorskip(name)
    model, images = Toy().eval(), torch.rand(8, 3, 9, 9)
    with torch.no_grad():
        found = getattr(peers, peer)(model, images[:2], images)(images[:2])
        assert 20 < decibels([found], [model(images[:2])]) < 70


def missing(name):
    from benchmarks.harness.case import PeerMissing

    raise PeerMissing(f"{name} is not installed; pip install 'cvkernels[bench]'")


def test_missing_package_is_told_with_its_extra():
    with pytest.raises(Exception, match="no_such_package is not installed; pip install 'cvk"):
        peers._imported("no_such_package")


@pytest.mark.parametrize("peer", ["openvino", "onnxruntime"])
def test_runtimes_compute_what_the_network_does(peer):
    pytest.importorskip(peer)
    if peer == "onnxruntime":
        pytest.importorskip("onnxscript")
    model, x = Toy().eval(), torch.rand(2, 3, 9, 9)
    with torch.no_grad():
        torch.testing.assert_close(getattr(peers, peer)(model, x)(x), model(x))


def test_out_of_memory_at_one_batch_leaves_the_others(toy, monkeypatch):
    forward = toy.ours.forward

    def too_large(x):
        if len(x) > 1:
            raise RuntimeError("DefaultCPUAllocator: can't allocate memory: you tried 9 bytes")
        return forward(x)

    monkeypatch.setattr(toy.ours, "forward", too_large)
    cases = bench_models.cases(CPU, [torch.float32], [3, 1], ["resnet50"])
    for case in without_compilers(cases):
        for name in ("openvino", "onnxruntime"):
            case.variants.pop(name)
    report = run_cases(cases, Machine(CPU), ONCE)
    ours = [row for row in report.rows if row.variant == "cvkernels"]
    assert [row.status for row in ours] == ["unavailable", "measured"]
    assert "can't allocate memory" in ours[0].note and report.sound


def test_cases_that_time_does_not_reach_have_rows_that_say_so(toy):
    cases = bench_models.cases(CPU, [torch.float32], [1], ["resnet50"])
    rows = run_cases(cases, Machine(CPU), ONCE, minutes=-1).rows
    assert len(rows) == len(cases[0].variants)
    assert all(row.note == "not reached within -1 minutes" for row in rows)


def test_training_checks_gradients_and_counts_saved_bytes(toy):
    (case,) = bench_training.cases(CPU, [torch.float32], [2], ["resnet50"])
    eager, ours = run_cases([case], Machine(CPU), ONCE).rows
    assert (eager.status, ours.status) == ("measured", "measured")
    assert eager.saved_bytes == ours.saved_bytes > 0
    assert ours.max_error == ours.eager_error > 0

    class Wrong(Toy):
        def forward(self, x):
            return super().forward(1.01 * x)

    wrong = Wrong()
    wrong.load_state_dict(toy.ours.state_dict())
    case.variants["cvkernels"] = lambda: Step(wrong)
    assert run_cases([case], Machine(CPU), ONCE).rows[1].status == "wrong"


@pytest.mark.full
def test_training_has_rows_of_torch_compile(toy):
    (case,) = bench_training.cases(CPU, [torch.float32], [2], ["resnet50"], compiles=True)
    *_, compiled = run_cases([case], Machine(CPU), ONCE).rows
    assert (compiled.variant, compiled.status) == ("compile", "measured")
    assert compiled.time_us > 0 and compiled.saved_bytes > 0


def test_saved_bytes_are_those_of_distinct_storages():
    class Squares(nn.Module):
        def __init__(self):
            super().__init__()
            self.weight = nn.Parameter(torch.ones(1000))

        def forward(self, x):
            y = x.flatten(1)[:, :1000] * self.weight  # keeps x and weight, which are not counted
            return y * y  # keeps y twice: [2, 1000]

    images = torch.rand(2, 3, 20, 20)
    saved = Step(Squares()).saved_bytes(images, torch.tensor([1, 2]))
    # y, and the logarithm of the softmax, of 4000 bytes per image each, and a few of the loss.
    assert 8000 <= saved < 8100


def test_step_trains_and_its_answers_stay():
    torch.manual_seed(0)
    step, images, labels = Step(Toy()), torch.rand(4, 3, 9, 9), torch.arange(4)
    first = step.answers(images, labels)
    losses = [step(images, labels).item() for _ in range(3)]
    assert first[0].shape == (4,)
    assert all(loss == pytest.approx(first[0].mean().item(), rel=0.2) for loss in losses)
    assert not torch.equal(step.model.fc.bias, step.initial["fc.bias"])
    again = step.answers(images, labels)
    assert all(map(torch.equal, first, again))
    assert step.model.drop.p == 0.5


def test_depths_have_rows_of_memory_alone(toy, monkeypatch):
    monkeypatch.setattr(bench_training, "_memory_efficient", lambda name, model, build: Toy())
    cases = bench_training.cases(CPU, [torch.float32], [2], ["densenet169"])
    rows = run_cases(cases, Machine(CPU), ONCE).rows
    assert {row.variant for row in rows} >= {"eager memory_efficient", "cvkernels memory_efficient"}
    measured = [row for row in rows if row.status == "measured"]
    assert measured and all(row.time_us is None and row.saved_bytes > 0 for row in measured)


def test_memory_efficient_densenet_has_the_same_parameters():
    torchvision = pytest.importorskip("torchvision")
    import cvkernels

    torch.manual_seed(0)
    stock = torchvision.models.densenet121()
    for build in (torchvision.models.get_model, cvkernels.create_model):
        efficient = bench_training._memory_efficient("densenet121", stock, build)
        assert any(getattr(module, "memory_efficient", False) for module in efficient.modules())
        for ours, theirs in zip(efficient.parameters(), stock.parameters(), strict=True):
            assert torch.equal(ours, theirs)


def test_command_line_runs_one_network(toy, tmp_path, capsys):
    path = tmp_path / "training-resnet50.json"
    arguments = ["training", "--network", "resnet50", "--batch", "2", "--rounds", "2"]
    assert main([*arguments, "--device", "cpu", "--dtype", "fp32", "--json", str(path)]) == 0
    assert "saved bytes/image" in capsys.readouterr().out and path.exists()


def test_no_gpu_is_said(capsys):
    if torch.cuda.is_available():
        pytest.skip("there is one")
    with pytest.raises(SystemExit):
        main(["models", "--device", "cuda"])
    assert "torch finds no CUDA device here; use cpu" in capsys.readouterr().err


@pytest.mark.gpu
def test_graph_replays_the_network():
    model, x = Toy().eval().cuda(), torch.rand(2, 3, 9, 9, device="cuda")
    with torch.no_grad():
        assert torch.equal(peers.graphed(model, x)(x), model(x))
