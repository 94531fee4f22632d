"""Each step of each frozen plan, timed beside its prediction: what steers all later work."""

from __future__ import annotations

import functools
import json
from collections import defaultdict, deque
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import torch

import cvkernels
from benchmarks.first_light.setting import Setting, microseconds
from benchmarks.harness.machine import Machine, Timed


def items(setting: Setting) -> Iterator[tuple[str, Callable[[], dict[str, Any]]]]:
    machine = setting.machine()
    for batch in setting.batches:
        for name in setting.networks:
            yield f"{name} batch {batch}", functools.partial(measure, setting, machine, name, batch)


def measure(setting: Setting, machine: Machine, name: str, batch: int) -> dict[str, Any]:
    x = setting.images(batch)
    frozen = cvkernels.freeze(setting.models(name)[1], x)
    plan = frozen.plan_for(x)
    predictions = Predictions(setting.predicted, name, batch)
    copy = machine.rates(setting.dtype).copy_gb_per_s
    rows = []
    with torch.no_grad():
        for step, run in getattr(plan, "plan", plan).each_step(x):
            found = microseconds(sampled(setting, machine, run))
            moved = sum(plan_traffic(plan, step)[1:])
            about = {"layer": step.layer, "op": step.op.name, "backend": backend_of(plan, step)}
            rows.append({
                **about, **found, "bytes": moved, "copy_us": moved / copy / 1e3,
                "predicted_us": predictions.of(step.layer, step.op.name),
            })  # fmt: skip
    total = sum(row["us"] for row in rows)
    return {"network": name, "batch": batch, "steps": rows, "sum_us": total}


def sampled(setting: Setting, machine: Machine, run: Callable[[], object]) -> list[float]:
    run()
    machine.hide_launches([Timed(run)])
    count = setting.settings(5, 1.0).rounds
    return [machine.sample(Timed(run)) for _ in range(count)]


def plan_traffic(plan: Any, step: Any) -> tuple:
    return getattr(plan, "plan", plan).traffic[step]


def backend_of(plan: Any, step: Any) -> str:
    return getattr(plan, "plan", plan).backends[step]


class Predictions:
    """Of the time model, by layer and op in their order; None where there is none."""

    def __init__(self, path: str, network: str, batch: int) -> None:
        self._times: dict[tuple[str, str], deque[float]] = defaultdict(deque)
        try:
            found = json.loads(Path(path).read_text())["networks"]
            for step in _steps_of(found, network, batch):
                self._times[step["layer"], step["op"]].append(float(step["predicted_us"]))
        except (OSError, ValueError, LookupError, TypeError, AttributeError):
            self._times.clear()

    def of(self, layer: str, op: str) -> float | None:
        times = self._times[layer, op]
        return times.popleft() if times else None


def _steps_of(networks: Any, network: str, batch: int) -> list[dict[str, Any]]:
    """Of a list of plans, or of a dict of networks and batches."""
    if isinstance(networks, dict):
        return networks[network][f"batch{batch}"]["steps"]
    plans = (plan for plan in networks if (plan["network"], plan["batch"]) == (network, batch))
    return next(iter(plans), {"steps": []})["steps"]
