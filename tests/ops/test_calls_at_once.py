"""Calls on CPU that a native op takes as they are: it sees them before the checks in Python."""

import importlib

import pytest
import torch

from cvkernels import backend, extension, record
from cvkernels.functional import (
    avg_pool,
    dense_concat,
    max_pool,
    se_scale,
    squeeze,
    squeeze_excite,
)
from tests.support.cases.squeeze_excite import SMALL, Map, make_layers, make_map

DTYPES = [torch.float32, torch.float16, torch.bfloat16]
# Where each op's checks begin.
CHECKS = {
    "avg_pool.op": "window_of",
    "dense_concat.op": "_check",
    "max_pool.op": "window_of",
    "squeeze_excite.op": "choose",
    "squeeze_excite.scale": "choose",
    "squeeze_excite.squeeze": "choose",
}


@pytest.fixture(autouse=True)
def native():
    if not extension.has("cpu"):
        pytest.skip(extension.status()["cpu"].reason)


def calls(x):
    """A call of each op on x, as functions of backend=."""
    N, C, H, W = x.shape
    like = {"dtype": x.dtype, "device": x.device}
    residual, gate = torch.randn(x.shape, **like), torch.randn(N, C, **like)
    layers = make_layers(Map(N, C, 6, H, W), x.dtype, x.device)
    buffer = torch.zeros(N, C + 3, H, W, **like)
    return {
        "squeeze": lambda name: squeeze(x, backend=name),
        "se_scale": lambda name: se_scale(x, gate, residual, "silu", backend=name),
        "squeeze_excite": lambda name: squeeze_excite(
            x, *layers, "silu", residual, "relu", backend=name
        ),
        "max_pool": lambda name: max_pool(x, 3, 2, 1, 1, True, backend=name),
        "avg_pool": lambda name: avg_pool(x, (3, 1), 1, (1, 0), backend=name),
        "dense_concat": lambda name: dense_concat(buffer.clone(), x, 2, None, True, backend=name),
    }


@pytest.mark.parametrize("m", SMALL.values(), ids=SMALL.keys())
@pytest.mark.parametrize("dtype", DTYPES, ids=str)
def test_the_checks_change_no_result(m, dtype, memory_format):
    x = make_map(m, dtype, memory_format, "cpu")
    for name, call in calls(x).items():
        at_once, checked = call("auto"), call("native")
        assert torch.equal(at_once, checked), name
        assert at_once.stride() == checked.stride(), name


@pytest.fixture
def refusing(monkeypatch):
    """The calls above fail as soon as they are checked."""

    def checked(*args, **kwargs):
        raise AssertionError("checked")

    for module, name in CHECKS.items():
        monkeypatch.setattr(importlib.import_module(f"cvkernels.ops.{module}"), name, checked)


def test_checks_wait_for_a_refusal(refusing):
    for call in calls(torch.randn(2, 8, 5, 5)).values():
        call("auto")
        for watched in (backend.use("reference"), record.recording(record.Recorder())):
            with watched, pytest.raises(AssertionError, match="checked"):
                call("auto")


@pytest.mark.parametrize("kind", ["a gradient", "another device", "no pixels"])
def test_other_calls_are_checked(kind, refusing):
    x = torch.randn(2, 8, 5, 5, requires_grad=kind == "a gradient")
    if kind != "a gradient":
        x = x.to("meta") if kind == "another device" else x[:, :, :0]
    taken = {"dense_concat"} if kind == "no pixels" else set()  # it moves nothing
    for name, call in calls(x).items():
        if name not in taken:
            with pytest.raises(AssertionError, match="checked"):
                call("auto")


def test_a_source_in_the_buffer_is_checked(refusing):
    buffer = torch.zeros(2, 8, 5, 5)
    with pytest.raises(AssertionError, match="checked"):
        dense_concat(buffer, buffer[:, :3], 2)
