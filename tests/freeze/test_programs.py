"""What a plan records of its native steps: the same work on the same memory, watched or not."""

import pytest
import torch
from torch import nn

import cvkernels
from cvkernels import extension
from cvkernels.freeze import plan as plans
from cvkernels.freeze.programs import Env, Segment
from cvkernels.functional import excite
from tests.support.model_checks import calibrated
from tests.support.pairs import image

NETWORKS = ("googlenet", "resnet18", "densenet121", "seresnet50", "efficientnet_b0")
scale = torch.ops.cvkernels.se_scale_native_out.default


@pytest.fixture(autouse=True)
def native():
    if not extension.has("cpu"):
        pytest.skip(extension.status()["cpu"].reason)


@pytest.mark.parametrize("name", NETWORKS)
@pytest.mark.parametrize("batch", [1, 3])
def test_nearly_every_step_is_recorded_and_none_changes(name, batch, monkeypatch):
    options = {"init_weights": False} if name == "googlenet" else {}
    model = calibrated(getattr(cvkernels.models, name), num_classes=10, **options)
    x, other = image(batch), image(batch)
    frozen = cvkernels.freeze(model, x)
    plan = frozen._plans[x.shape]
    monkeypatch.setattr(plans, "recordable", lambda *_: set())
    by_steps = cvkernels.freeze(model, x)
    assert not any(isinstance(run, Segment) for run in by_steps._plans[x.shape].run_order)
    for data in (x, other, x):
        assert torch.equal(frozen(data), by_steps(data))
    steps = sum(run is not None for _, run in plan.steps)
    recorded = sum(len(program) for env in plan.drop_arenas() for program in env.programs.values())
    # The stem reads the caller's image, and the head ends in PyTorch's linear layer.
    assert recorded >= steps - 5


def test_explain_and_a_profiler_see_the_steps_and_change_nothing():
    model = calibrated(cvkernels.models.efficientnet_b0, num_classes=10)
    x = image(2)
    frozen = cvkernels.freeze(model, x)
    expected = frozen(x)
    explained = cvkernels.explain(frozen, x)
    assert {call.op for call in explained.rows} >= {"conv", "depthwise", "excite"}
    assert torch.equal(frozen(x), expected)
    with torch.profiler.profile() as profile:
        assert torch.equal(frozen(x), expected)
    seen = {event.name for event in profile.events()}
    assert {"cvkernels::conv_bn_act_native", "cvkernels::excite_native"} <= seen
    assert torch.equal(frozen(x), expected)


def test_the_number_of_threads_is_that_of_the_call():
    model = calibrated(cvkernels.models.resnet18, num_classes=10)
    x = image(1)
    frozen = cvkernels.freeze(model, x)
    before = torch.get_num_threads()
    try:
        results = []
        for threads in (1, 3, 2):
            torch.set_num_threads(threads)
            results.append(frozen(x))
    finally:
        torch.set_num_threads(before)
    assert torch.equal(results[0], results[1]) and torch.equal(results[0], results[2])


class Gated(nn.Module):
    """A squeeze-and-excitation that also returns its gates."""

    def __init__(self):
        super().__init__()
        self.stem = nn.Conv2d(3, 16, 3, padding=1)
        self.depthwise = nn.Conv2d(16, 16, 3, padding=1, groups=16)
        self.norm = nn.BatchNorm2d(16)
        self.act = nn.SiLU()
        self.pool = nn.AdaptiveAvgPool2d(1)
        self.reduce, self.expand = nn.Conv2d(16, 4, 1), nn.Conv2d(4, 16, 1)
        self.last = nn.Conv2d(16, 8, 1)

    def forward(self, x):
        x = self.act(self.norm(self.depthwise(self.stem(x))))
        gate = torch.sigmoid(self.expand(self.act(self.reduce(self.pool(x)))))
        return self.last(x * gate), gate


def test_results_stay_as_they_were_given():
    torch.manual_seed(0)
    model = Gated().eval()
    x = image(2, size=16)
    frozen = cvkernels.freeze(model, x)
    first = frozen(x)
    kept = [tensor.clone() for tensor in first]
    frozen(image(2, size=16))
    assert all(map(torch.equal, first, kept))
    assert cvkernels.verify(frozen).ok


def test_recorded_work_reads_what_its_memory_holds_then():
    x = torch.randn(2, 8, 4, 4).contiguous(memory_format=torch.channels_last)
    env = Env([x, torch.ones(2, 8), torch.empty_like(x)])
    segment = Segment([lambda env: scale(env[0], env[1], None, 0, env[2])])
    for _ in range(3):
        env[0].normal_()
        segment(env)
        assert torch.allclose(env[2], env[0] * torch.ones(()).sigmoid())
    assert [len(program) for program in env.programs.values()] == [1]


def test_recording_ends_with_its_function():
    from cvkernels import _C

    with pytest.raises(RuntimeError, match="recording already"):
        _C.record(lambda: _C.record(lambda: None))
    with pytest.raises(KeyError):
        _C.record(lambda: {}["missing"])
    assert len(_C.record(lambda: None)) == 0
    pooled, w1, w2 = torch.randn(1, 8), torch.randn(2, 8), torch.randn(8, 2)
    assert excite(pooled, w1, None, w2, None).any()  # at once
