"""The main figure: images per second of the five networks, frozen, eager and in a graph."""

from __future__ import annotations

import functools
import time
from collections.abc import Callable, Iterator
from typing import Any

import torch
from torch import Tensor

import cvkernels
from benchmarks.first_light.setting import Setting, cudnn_benchmark, timed
from benchmarks.harness.machine import Timed


def items(setting: Setting) -> Iterator[tuple[str, Callable[[], dict[str, Any]]]]:
    machine = setting.machine()
    for batch in setting.batches:
        for name in setting.networks:
            yield f"{name} batch {batch}", functools.partial(measure, setting, machine, name, batch)


def measure(setting: Setting, machine: Any, name: str, batch: int) -> dict[str, Any]:
    stock, ours = setting.models(name)
    x = setting.images(batch)
    row: dict[str, Any] = {"network": name, "batch": batch}
    with torch.no_grad():
        start = time.perf_counter()
        frozen = cvkernels.freeze(ours, x)
        frozen(x)
        setting.synchronize()
        row["first_batch_s"] = time.perf_counter() - start
        calls = {
            "eager": choosing(stock, False),
            "eager benchmark": choosing(stock, True),
            "eager graph": setting.graphed(choosing(stock, True), x),
            "freeze": frozen,
        }
        for call in calls.values():  # what is chosen on first use is no part of a time
            for _ in range(2):
                call(x)
        runs = {key: Timed(functools.partial(call, x), latency=True) for key, call in calls.items()}
        times = timed(machine, setting.settings(30, 4.0), runs)
    for found in times.values():
        found["images_per_s"] = batch / found["us"] * 1e6
    speedups = {
        f"vs {key}": times[key]["us"] / times["freeze"]["us"] for key in times if key != "freeze"
    }
    return {**row, "variants": times, **speedups}


def choosing(model: Callable[[Tensor], Any], benchmark: bool) -> Callable[[Tensor], Any]:
    """The model with cuDNN's first answer, or with its measured one."""

    def call(x: Tensor) -> Any:
        with cudnn_benchmark(benchmark):
            return model(x)

    return call
