"""``python -m benchmarks predict``: the times that a model predicts for the frozen networks.

No GPU is involved, and nothing is measured: each step of a frozen plan for an H200 describes its
work, which :mod:`cvkernels.ops.common.work` turns into a time. ``results/h200/predicted.json`` has
them, beside the rates and assumptions that they rest on; results/h200/NOTES.md says how to read it.
"""

from __future__ import annotations

import argparse
import json
from collections import defaultdict
from pathlib import Path
from typing import Any

import torch
from torch import nn

import cvkernels
from benchmarks.output.results import RESULTS
from cvkernels.freeze.frozen import planned
from cvkernels.freeze.plan import Plan
from cvkernels.freeze.report import rows_of
from cvkernels.ops.common import work
from cvkernels.ops.common.work import H200
from cvkernels.ops.conv_bn_act import work as conv_work
from cvkernels.ops.depthwise_conv_bn_act import work as depthwise_work
from cvkernels.tables import text_table

FILE = RESULTS / "h200" / "predicted.json"
BATCHES = (128, 1)
DTYPE = torch.bfloat16
# Images per second at batch 128 in bfloat16 that a review of the kernels as they were predicted
# for their first run and for eight changes to them, and what the model's totals are to reach.
REVIEW_FIRST = {
    "resnet50": 33e3, "seresnet50": 24e3, "densenet121": 29e3, "efficientnet_b0": 41e3,
    "googlenet": 60e3,
}  # fmt: skip
REVIEW_AFTER = {
    "resnet50": 39e3, "seresnet50": 28e3, "densenet121": 43e3, "efficientnet_b0": 88e3,
    "googlenet": 88e3,
}  # fmt: skip
TARGETS = {
    "resnet50": 45e3, "seresnet50": 36e3, "densenet121": 50e3, "efficientnet_b0": 85e3,
    "googlenet": 88e3,
}  # fmt: skip
ASSUMPTIONS = (
    f"L2 delivers {H200.l2 / 1e12} TB/s to the SMs (6 to 9 are likely).",
    f"A step of a K loop that nothing hides takes {H200.step * 1e6} us.",
    f"A kernel costs {H200.kernel * 1e6} us in a graph beside its work.",
    f"{H200.exposed:.0%} of the shorter of a launch's time in memory and on its SMs is not hidden.",
    f"{H200.issue / 4:.0%} of the issue slots are used.",
    f"A load takes {H200.load * 1e6} us under load; fewer bytes in flight than memory's rate times "
    "that lower the rate.",
    "Every value that a step reads comes from memory once, also one that L2 may still hold.",
    f"cuDNN reaches {conv_work.CUDNN_SHARE:.0%} of the matrix rate, "
    f"{conv_work.CUDNN_SHARE_NARROW:.0%} below 128 output channels, reads its output once, and "
    f"splits sums over few tiles into {conv_work.CUDNN_SPLITS}.",
    f"cuBLAS reaches {work.CUBLAS_SHARE:.0%} of the matrix rate and splits sums over few tiles "
    f"into {work.CUBLAS_SPLITS}.",
    "Channel counts and pitches that are no multiple of 8 cost nothing but padding.",
    "Pools, copies and aten's elementwise kernels move 16 bytes a thread and do nothing else.",
    "The copy of the images into the graph's input is not counted; input_copy_us has it.",
)

# What the totals are where an assumption is another one.
OTHERWISE = {
    "L2 delivers 6 TB/s": {"l2": 6e12},
    "L2 delivers 9 TB/s": {"l2": 9e12},
    "a launch hides all of its shorter time": {"exposed": 0.0},
    "80 % of the issue slots are used": {"issue": 4 * 0.8},
    "an unhidden step takes 0.2 us": {"step": 0.2e-6},
    "a kernel costs 0.4 us in a graph": {"kernel": 0.4e-6},
}


def network(name: str, dtype: torch.dtype) -> nn.Module:
    """The network on the meta device, in eval."""
    options = {"init_weights": False} if name == "googlenet" else {}
    with torch.device("meta"):
        return cvkernels.create_model(name, **options).eval().to(dtype)


def plan_of(name: str, batch: int, dtype: torch.dtype = DTYPE) -> Plan:
    """The frozen plan of a network at 224 x 224 for a GPU."""
    images = torch.empty(batch, 3, 224, 224, dtype=dtype, device="meta")
    return planned(network(name, dtype), images)


def prediction_of(name: str, batch: int) -> dict[str, Any]:
    """One network's entry: its steps, their sum, and what bounds how much of it."""
    plan = plan_of(name, batch)
    rows = [row for row in rows_of(plan) if row.kernels]
    bounds: dict[str, float] = defaultdict(float)
    for row in rows:
        bounds[row.bound] += row.predicted_us or 0.0
    total = sum(bounds.values())
    copied = 2 * batch * 3 * 224 * 224 * DTYPE.itemsize
    entry: dict[str, Any] = {
        "network": name,
        "batch": batch,
        "dtype": "bfloat16",
        "predicted_ms": round(total / 1e3, 4),
        "predicted_images_per_s": round(1e6 * batch / total),
        "input_copy_us": round(1e6 * copied / H200.memory, 1),
        "predicted_us_by_bound": {k: round(v, 1) for k, v in sorted(bounds.items())},
    }
    if batch == 128:
        entry |= {
            "review_first_run_images_per_s": REVIEW_FIRST[name],
            "review_after_images_per_s": REVIEW_AFTER[name],
            "target_images_per_s": TARGETS[name],
        }
    entry["predicted_images_per_s_if"] = {
        name: round(batch / seconds_of(plan, H200._replace(**change)))
        for name, change in OTHERWISE.items()
    }
    fields = ("layer", "op", "backend", "kernels", "bytes_read", "bytes_written")
    entry["steps"] = [
        {field: getattr(row, field) for field in fields}
        | {
            "memory_us": round(1e6 * (row.bytes_read + row.bytes_written) / H200.memory, 2),
            "predicted_us": round(row.predicted_us or 0.0, 2),
            "bound": row.bound,
        }
        for row in rows
    ]
    return entry


def seconds_of(plan: Plan, gpu: work.GPU) -> float:
    """A call of the plan by other rates; the work of its steps stays the same."""
    return sum(work.predict(launches, gpu).seconds for launches in plan.work.values())


def predictions() -> dict[str, Any]:
    return {
        "predicted": "every time here is a prediction of a model; none is measured",
        "gpu": H200._asdict(),
        "assumptions": list(ASSUMPTIONS),
        "instructions": {
            "conv_bn_act": {
                name: getattr(conv_work, name)
                for name in (
                    "STEP", "OF_X", "OF_WEIGHT", "INPUT_BN", "INPUT_GATE", "SETUP", "ELEMENT",
                    "RESIDUAL", "OUTPUT_GATE", "ACTS",
                )
            },
            "depthwise_conv_bn_act": {
                f"{size}x{size} stride {stride}": count
                for (size, stride), count in depthwise_work.TRITON.items()
            },
        },
        "networks": [prediction_of(name, batch) for name in TARGETS for batch in BATCHES],
    }  # fmt: skip


def text_of(found: dict[str, Any]) -> str:
    """JSON with a step a line."""
    text = json.dumps(found, indent=1)
    lines: list[str] = []
    inside = False
    for line in text.split("\n"):
        if line == "    {":
            inside, parts = True, []
        elif inside and line.startswith("    }"):
            lines.append(f"    {{{' '.join(parts)}{line[4:]}")
            inside = False
        elif inside:
            parts.append(line.strip())
        else:
            lines.append(line)
    return "\n".join(lines) + "\n"


def table(found: dict[str, Any]) -> str:
    """A row per network and batch, the review's figures beside the model's."""
    header = ("network", "batch", "predicted ms", "predicted img/s", "target", "review: first run",
              "review: after", "bound by, predicted us")  # fmt: skip
    lines = []
    for entry in found["networks"]:
        figures = [
            f"{entry[key]:,.0f}" if key in entry else ""
            for key in ("target_images_per_s", "review_first_run_images_per_s",
                        "review_after_images_per_s")
        ]  # fmt: skip
        bounds = sorted(entry["predicted_us_by_bound"].items(), key=lambda item: -item[1])
        shares = ", ".join(f"{name} {us:.0f}" for name, us in bounds)
        name, batch, ms = entry["network"], entry["batch"], f"{entry['predicted_ms']:.3f}"
        rate = f"{entry['predicted_images_per_s']:,}"
        lines.append((name, batch, ms, rate, *figures, shares))
    return text_table(header, lines)


def add_options(command: argparse.ArgumentParser) -> None:
    command.add_argument("--json", type=Path, default=FILE, help="where the predictions go")


def main(options: argparse.Namespace) -> int:
    found = predictions()
    options.json.parent.mkdir(parents=True, exist_ok=True)
    options.json.write_text(text_of(found))
    print(table(found))
    print(f"predicted for {H200.name}, not measured; the steps are in {options.json}")
    return 0
