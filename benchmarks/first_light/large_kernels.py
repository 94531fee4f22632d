"""Kernels that move over 64 MB, as a share of the copy bandwidth."""

from __future__ import annotations

import functools
from collections.abc import Callable, Iterator
from dataclasses import asdict
from typing import Any

from benchmarks import kernels
from benchmarks.first_light.setting import Setting
from benchmarks.harness.case import Case
from benchmarks.harness.machine import Machine
from benchmarks.harness.report import Row
from benchmarks.harness.run import measure_case

LARGE = 64e6
OPS = (
    "squeeze_excite", "batch_norm_act", "max_pool", "avg_pool", "dense_concat",
    "depthwise_conv_bn_act",
)  # fmt: skip


def items(setting: Setting) -> Iterator[tuple[str, Callable[[], dict[str, Any]]]]:
    machine = setting.machine()
    for op in OPS:
        batch = 1 if setting.rehearsal else setting.batch
        cases = kernels.cases(setting.device, [setting.dtype], batch, [op], True, "none")
        cases = [case for case in cases if case.part != "host" and case.bytes is not None]
        large = [case for case in cases if setting.rehearsal or (case.bytes or 0) > LARGE]
        for case in large[:1] if setting.rehearsal else large:
            yield f"{case.op} {case.id}", functools.partial(measure, setting, machine, case)


def measure(setting: Setting, machine: Machine, case: Case) -> dict[str, Any]:
    rows: list[Row] = []
    measure_case(case, machine, setting.settings(15, 1.0), rows)
    return {"bytes": case.bytes, "rows": [asdict(row) for row in rows]}
