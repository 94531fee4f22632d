"""A frozen model is refused where a call is recorded as a graph, and works afterwards."""

import pytest
import torch
from torch._subclasses.fake_tensor import FakeTensorMode
from torch.fx.experimental.proxy_tensor import make_fx

import cvkernels
from tests.support.model_checks import calibrated


def fake(model, x):
    with FakeTensorMode(allow_non_fake_inputs=True) as mode:
        return model(mode.from_tensor(x))


TRACERS = {
    "export": lambda model, x: torch.export.export(model, (x,)),
    "export-strict": lambda model, x: torch.export.export(model, (x,), strict=True),
    "jit": torch.jit.trace,
    "make_fx": lambda model, x: make_fx(model)(x),
    "make_fx-fake": lambda model, x: make_fx(model, tracing_mode="fake")(x),
    "fake": fake,
}


@pytest.mark.parametrize("called", [False, True], ids=["", "called"])
@pytest.mark.parametrize("trace", TRACERS.values(), ids=TRACERS.keys())
def test_traces_are_refused_and_leave_no_trace(trace, called):
    model = calibrated(cvkernels.models.resnet18, num_classes=10)
    x = torch.rand(2, 3, 64, 64)
    with torch.no_grad():
        expected = model(x)
        frozen = cvkernels.freeze(model, x)
        if called:
            frozen(x)
        # Dynamo, of a strict export, refuses before any of our code runs.
        wanted = "" if trace is TRACERS["export-strict"] else "export the model that it came from"
        with pytest.raises(Exception, match=wanted):
            trace(frozen, x)
        for images, right in ((x, expected), (x[:1], expected[:1])):
            torch.testing.assert_close(frozen(images), right, rtol=1e-4, atol=1e-4)


def test_a_profiler_lists_the_convolutions_of_a_network_that_ran_before():
    model, x = cvkernels.models.resnet18().eval(), torch.rand(2, 3, 64, 64)
    with torch.no_grad():
        for _ in range(3):
            model(x)
        with torch.profiler.profile(activities=[torch.profiler.ProfilerActivity.CPU]) as profile:
            model(x)
    counts = {event.key: event.count for event in profile.key_averages()}
    convolutions = sum(count for key, count in counts.items() if "conv" in key)
    assert convolutions >= 20
