"""torch.compile on the large batch: its defaults, and for resnet50 its longest search."""

from __future__ import annotations

import functools
import time
from collections.abc import Callable, Iterator
from typing import Any

import torch

import cvkernels
from benchmarks.first_light.setting import Setting, timed
from benchmarks.harness import peers
from benchmarks.harness.machine import Timed

DEFAULTS = ("resnet50", "efficientnet_b0")


def items(setting: Setting) -> Iterator[tuple[str, Callable[[], dict[str, Any]]]]:
    for name in defaults(setting):
        yield f"{name} compile", functools.partial(measure, setting, name, "compile")
    yield "resnet50 max-autotune", functools.partial(measure, setting, "resnet50", "max-autotune")


def defaults(setting: Setting) -> tuple[str, ...]:
    """The networks that torch.compile gets with its defaults."""
    return DEFAULTS[:1] if setting.rehearsal else DEFAULTS


def compiled(setting: Setting, model: Callable, kind: str, x: torch.Tensor) -> Callable:
    if setting.rehearsal:
        return torch.compile(model, backend="eager")
    return (peers.autotuned if kind == "max-autotune" else peers.compiled)(model, x)


def measure(setting: Setting, name: str, kind: str) -> dict[str, Any]:
    stock, ours = setting.models(name)
    x = setting.images(setting.batch)
    start = time.perf_counter()
    with torch.no_grad():
        function = compiled(setting, stock, kind, x)
        function(x)
        setting.synchronize()
        seconds = time.perf_counter() - start
        calls = {kind: function, "freeze": cvkernels.freeze(ours, x)}
        if kind == "compile":
            calls["compile graph"] = setting.graphed(function, x)
        for call in calls.values():
            for _ in range(2):
                call(x)
        runs = {key: Timed(functools.partial(call, x), latency=True) for key, call in calls.items()}
        times = timed(setting.machine(), setting.settings(20, 2.0), runs)
    for found in times.values():
        found["images_per_s"] = setting.batch / found["us"] * 1e6
    return {"network": name, "first_batch_s": seconds, "variants": times}
