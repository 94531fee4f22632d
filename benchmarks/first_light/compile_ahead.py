"""Compiles in the background what a later step needs, into caches on disk.

``python -m benchmarks.first_light.compile_ahead plan NETWORK BATCH REHEARSAL``, "convolutions" or
"inductor" in place of "plan"; prints how long it took, as JSON.
"""

from __future__ import annotations

import json
import sys
import time

import torch

import cvkernels
from benchmarks import tune
from benchmarks.first_light import convolutions, peers
from benchmarks.first_light.setting import Setting
from cvkernels.freeze.frozen import planned
from cvkernels.ops.common.launches import collecting


def plan(setting: Setting, name: str) -> int:
    """The kernels of a frozen plan, with their launchers; how many."""
    options = {"init_weights": False} if name == "googlenet" else {}
    with torch.device("meta"):
        model = getattr(cvkernels.models, name)(**options).eval().to(setting.dtype)
    shape = (setting.batch, 3, setting.size, setting.size)
    with collecting():
        made = planned(model, torch.empty(shape, dtype=setting.dtype, device="meta"))
    launched = made.launches()
    if setting.rehearsal:  # no compiler runs under the interpreter
        return len(launched)
    from cvkernels.ops.common.triton_compile import compile_all

    return compile_all(launched, setting.device, workers=2)


def tiles(setting: Setting) -> int:
    """The candidates of the dearest convolutions."""
    problems = [problem for problem, _ in convolutions.dearest(setting)]
    if not setting.rehearsal:
        for _ in tune.compiled(problems, setting.device, 300.0):
            pass
    return len(problems)


def inductor(setting: Setting) -> int:
    names = peers.defaults(setting)
    for name in names:
        stock, x = setting.models(name)[0], setting.images(setting.batch)
        with torch.no_grad():
            peers.compiled(setting, stock, "compile", x)(x)
    return len(names)


def main(kind: str, name: str, batch: str, rehearsal: str) -> None:
    setting, start = Setting(rehearsal == "yes", int(batch)), time.perf_counter()
    work = {"plan": lambda: plan(setting, name), "convolutions": lambda: tiles(setting)}
    count = work.get(kind, lambda: inductor(setting))()
    seconds = round(time.perf_counter() - start, 2)
    print(json.dumps({"kind": kind, "network": name, "count": count, "seconds": seconds}))


if __name__ == "__main__":
    main(*sys.argv[1:])
