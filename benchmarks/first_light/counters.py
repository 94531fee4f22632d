"""Hardware counters of four kernels by ncu, and memory checks of them by compute-sanitizer.

Run as ``python -m benchmarks.first_light.counters NAME``, it launches one of the kernels.
"""

from __future__ import annotations

import functools
import json
import shutil
import subprocess
import sys
from collections.abc import Callable, Iterator
from typing import Any

import torch
from torch import Tensor

from benchmarks.first_light.setting import Setting
from cvkernels.functional import conv_bn_act, depthwise_conv_bn_act

# (C, H = W, K, kernel, stride) of a convolution; K 0 is depthwise.
KERNELS = {
    "stem": (3, 224, 64, 7, 2),
    "3x3 128 at 28": (128, 28, 128, 3, 1),
    "3x3 128 to 32 at 56": (128, 56, 32, 3, 1),
    "depthwise 5x5": (240, 28, 0, 5, 1),
}
KEPT = 6000  # characters of a tool's output
SECONDS = 45
TOOLS = {
    "ncu": (
        "ncu", "--clock-control", "none", "--section", "SpeedOfLight", "--section",
        "MemoryWorkloadAnalysis", "--launch-count", "4",
    ),
    "memcheck": ("compute-sanitizer", "--tool", "memcheck", "--error-exitcode", "9"),
}  # fmt: skip


def items(setting: Setting, tool: str) -> Iterator[tuple[str, Callable[[], dict[str, Any]]]]:
    names = list(KERNELS)[:1] if setting.rehearsal else KERNELS
    for name in names:
        yield name, functools.partial(under, setting, tool, name)


def under(setting: Setting, tool: str, name: str) -> dict[str, Any]:
    """What the tool says of the kernel; in a rehearsal the kernel runs without one."""
    command = () if setting.rehearsal else TOOLS[tool]
    if command and shutil.which(command[0]) is None:
        return {"status": "unavailable", "note": f"{command[0]} is not installed"}
    request = json.dumps({"rehearsal": setting.rehearsal, "batch": setting.batch})
    module = (sys.executable, "-m", "benchmarks.first_light.counters", name, request)
    done = subprocess.run((*command, *module), capture_output=True, text=True, timeout=SECONDS)
    text = (done.stdout + done.stderr)[-KEPT:]
    if done.returncode:
        raise RuntimeError(f"{tool} ended with status {done.returncode}: {text[-300:]}")
    return {"text": text}


def launch(setting: Setting, name: str) -> Tensor:
    C, size, K, kernel, stride = KERNELS[name]
    batch = setting.batch
    if setting.rehearsal:
        batch, C, size, K = 1, min(C, 8), 8, min(K, 8)

    def drawn(*shape: int) -> Tensor:
        t = torch.randn(shape, device=setting.device).to(setting.dtype)
        return t.contiguous(memory_format=torch.channels_last) if len(shape) == 4 else t

    x, padding = drawn(batch, C, size, size), kernel // 2
    if K:
        weight = drawn(K, C, kernel, kernel)
        y = conv_bn_act(x, weight, drawn(K), stride=stride, padding=padding, act="relu")
    else:
        weight = drawn(C, 1, kernel, kernel)
        y = depthwise_conv_bn_act(x, weight, drawn(C), stride=stride, padding=padding, act="silu")
    setting.synchronize()
    return y[0] if isinstance(y, tuple) else y


if __name__ == "__main__":
    with torch.no_grad():
        finite = bool(launch(Setting(**json.loads(sys.argv[2])), sys.argv[1]).isfinite().all())
    print(f"{sys.argv[1]}: {'finite' if finite else 'NOT FINITE'}")
    sys.exit(not finite)
