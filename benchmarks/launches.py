"""``python -m benchmarks launches``: every Triton launch of the frozen networks, compiled.

No GPU is involved: plans are made on the meta device, their launches collected, and each distinct
one compiled for the targets that ship. ``results/h200/launches.json`` has what the machine code
uses and consists of, ``launches.md`` beside it the table; rows of another Triton, or
of an architecture that is not asked for, stay in them.

A child process, ``python -m benchmarks.launches``, reads what to compile from stdin as JSON and
prints the rows; it must not have TRITON_INTERPRET set.
"""

from __future__ import annotations

import argparse
import contextlib
import json
import os
import subprocess
import sys
from collections.abc import Iterable, Iterator
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import Any, NamedTuple
from unittest import mock

import torch
from torch import Tensor

from benchmarks.harness.environment import ROOT
from benchmarks.output.results import RESULTS
from benchmarks.predict import TARGETS, plan_of
from cvkernels import record
from cvkernels.ops.common.dispatch import Implementation
from cvkernels.ops.common.triton_launch import Launch
from cvkernels.ops.common.work import H200, Work, bytes_in_flight, model_of, occupancy, predict

FILE = RESULTS / "h200" / "launches.json"
NETWORKS = tuple(TARGETS)
BATCHES = (128, 1)
DTYPES = ("bfloat16", "float16")
ARCHS = (80, 90, 100)
# Kernels that multiply matrices: dense convolutions.
DENSE = ("conv_bn_act_1x1_kernel", "conv_bn_act_spatial_kernel", "conv_bn_act_filter_row_kernel")
TILES = ("BLOCK_M", "BLOCK_N", "BLOCK_K", "BLOCK_P", "BLOCK_Q", "BLOCK_C", "BLOCK_R")


class Found(NamedTuple):
    """A launch of a plan, with its operands on the meta device, and what the model says of it."""

    launch: Launch
    operands: tuple[Any, ...]
    layer: str
    work: Work
    dtype: str  # of the network


class _Shaped(Tensor):
    """A meta tensor for which plans have their launches."""

    is_meta = False  # type: ignore[assignment]


@contextlib.contextmanager
def _collected() -> Iterator[list[tuple[Launch, tuple]]]:
    """Triton's launches are planned on the meta device too, and collected in place of being run."""
    found: list[tuple[Launch, tuple]] = []
    build = Implementation.build

    def build_shaped(self: Implementation, problem: Any, call: Any, *operands: Any) -> Any:
        if self.name.startswith("triton"):
            call = call._replace(x=call.x.as_subclass(_Shaped))
        return build(self, problem, call, *operands)

    def collect(self: Launch, *operands: Any) -> None:
        found.append((self, operands))

    with (
        mock.patch.object(Implementation, "build", build_shaped),
        mock.patch.object(Launch, "__call__", collect),
    ):
        yield found


@contextlib.contextmanager
def _gpu_of(arch: int) -> Iterator[None]:
    """Plans on the meta device are for a GPU of this architecture."""
    capability = divmod(arch, 10)
    name = model_of(capability).name
    with (
        mock.patch("cvkernels.backend.gpu", lambda x: (name, capability)),
        mock.patch("cvkernels.freeze.backends.gpu", lambda x: (name, capability)),
    ):
        yield


def launches_of(name: str, batch: int, dtype: str, arch: int) -> list[Found]:
    """The launches of a network's frozen plan, in the order in which they run."""
    with _gpu_of(arch), _collected() as launched:
        plan = plan_of(name, batch, getattr(torch, dtype))
        found = []
        env = plan.drop_arenas()[0]
        env[0] = plan.memory.steps[0].value.empty(torch.device("meta"))
        with record.recording(record.Recorder()), record.paused():
            for step, run in plan.steps:
                before = len(launched)
                if run is not None:
                    run(env)
                layer, works = f"{name} {step.layer or step.op.name}", plan.work.get(step, ())
                for number, (launch, operands) in enumerate(launched[before:]):
                    work = works[number] if number < len(works) else Work(0, 0)
                    found.append(Found(launch, operands, layer, work, dtype))
    return found


def kind_of(launch: Launch, operands: tuple) -> str:
    """What Triton compiles a launch by: equal ones have one machine code."""
    kinds: list[Any] = []
    parameters = {p.name: p for p in launch.kernel.params}
    for name, value in zip(launch.kernel.arg_names, (*operands, *launch.fixed), strict=False):
        if isinstance(value, Tensor):
            kinds.append(str(value.dtype))
        elif type(value) is not int or parameters[name].do_not_specialize:
            kinds.append(type(value).__name__)
        else:
            aligned = not parameters[name].do_not_specialize_on_alignment and value % 16 == 0
            kinds.append(1 if value == 1 else f"16n {value >> 31}" if aligned else value >> 31)
    return repr((launch.kernel.__name__, kinds, sorted(launch.meta.items())))


def distinct(
    networks: Iterable[str], batches: Iterable[int], dtypes: Iterable[str], arch: int
) -> dict[str, list[Found]]:
    """The launches of the networks by :func:`kind_of`."""
    kinds: dict[str, list[Found]] = {}
    for name in networks:
        for dtype in dtypes:
            for batch in batches:
                for found in launches_of(name, batch, dtype, arch):
                    kinds.setdefault(kind_of(found.launch, found.operands), []).append(found)
    return kinds


def row_of(launches: list[Found], arch: int) -> dict[str, Any]:
    """Compile the largest of launches that have one machine code: what the table shows of them."""
    from benchmarks import machine_code

    largest = max(launches, key=lambda f: f.work.read + f.work.written)
    launch, operands, layer, work, dtype = largest
    found = machine_code.disassemble(launch, operands, arch)
    warps = launch.meta.get("num_warps", 4)
    gpu = model_of(divmod(arch, 10))
    tensors = [operand for operand in operands if isinstance(operand, Tensor)]
    kept = ("kernel", "arch", "triton", "registers", "shared", "accesses", "narrowest")
    return {
        "layer": layer,
        "launches": len(launches),
        "dtype": dtype,
        "shapes": ["x".join(map(str, tensor.shape)) for tensor in tensors[:2]],
        "tile": {name: launch.meta[name] for name in TILES if name in launch.meta},
        "warps": warps,
        "stages": launch.meta.get("num_stages", 1),
        **{name: found[name] for name in kept},
        "spills": found["stack"] + found["local"],
        "matrix": found["matrix"],
        "instructions": found["instructions"],
        "loop": found["loop"],
        "counted": _counted(launch, work, found),
        "modelled": round(work.instructions / warps),
        "fit_registers": occupancy(gpu, 32 * warps, found["registers"]),
        "fit_shared": occupancy(gpu, 32 * warps, 16, found["shared"]),
        "assumed": max(f.work.per_sm for f in launches),
        "kb_in_flight": round(bytes_in_flight(work, H200) / 1024, 1),
        "bounds": sorted({predict((f.work,), H200).bound for f in launches}),
    }


def _counted(launch: Launch, work: Work, found: dict[str, Any]) -> int:
    """Instructions that a warp runs, by the machine code and the trips of its loops."""
    outside, trips = found["instructions"] - found["loop"], work.steps
    if "BLOCK_Q" in launch.meta:  # the loop over the filter's columns, in that over tiles
        inner = launch.meta["K"]
        outside = found["instructions"] - found["around"]
        return outside + trips // inner * (found["around"] + (inner - 1) * found["loop"])
    return outside + trips * found["loop"]


def compile_share(request: dict[str, Any]) -> list[dict[str, Any]]:
    """The rows of one process's share of a request."""
    rows = []
    for arch in request["archs"]:
        kinds = distinct(request["networks"], request["batches"], request["dtypes"], arch)
        share = list(kinds.values())[request["part"] :: request["parts"]]
        rows += [row_of(launches, arch) for launches in share]
    return rows


def rows(
    networks: Iterable[str] = NETWORKS, batches: Iterable[int] = BATCHES,
    dtypes: Iterable[str] = DTYPES, archs: Iterable[int] = ARCHS, processes: int = 2,
) -> list[dict[str, Any]]:  # fmt: skip
    """All rows, compiled in processes without TRITON_INTERPRET."""
    request = {
        "networks": list(networks), "batches": list(batches), "dtypes": list(dtypes),
        "archs": list(archs), "parts": processes,
    }  # fmt: skip
    with ThreadPoolExecutor(processes) as pool:
        shares = list(pool.map(lambda part: _child(request | {"part": part}), range(processes)))
    return _joined(row for share in shares for row in share)


def _joined(found: Iterable[dict[str, Any]]) -> list[dict[str, Any]]:
    """The rows in order; those that differ in their dtype alone are one."""
    alike: dict[str, dict[str, Any]] = {}
    for row in sorted(found, key=_order):
        same = {k: v for k, v in row.items() if k not in ("dtype", "launches")}
        first = alike.setdefault(json.dumps(same), row)
        if first is not row:
            first["dtype"] += f", {row['dtype']}"
            first["launches"] += row["launches"]
    return list(alike.values())


def _order(row: dict[str, Any]) -> tuple:
    return (row["triton"], row["arch"], row["kernel"], row["layer"], row["dtype"])


def _child(request: dict[str, Any]) -> list[dict[str, Any]]:
    env = {name: value for name, value in os.environ.items() if name != "TRITON_INTERPRET"}
    env["PYTHONPATH"] = os.pathsep.join([str(ROOT), env.get("PYTHONPATH", "")]).rstrip(os.pathsep)
    done = subprocess.run(
        [sys.executable, "-m", "benchmarks.launches"],
        input=json.dumps(request), capture_output=True, text=True, env=env, cwd=ROOT,
    )  # fmt: skip
    if done.returncode:
        raise RuntimeError(f"benchmarks.launches failed:\n{done.stderr}")
    return json.loads(done.stdout)


HEADER = (
    "kernel", "layer", "dtype", "operands", "tile", "warps", "arch", "Triton", "registers",
    "shared KB", "spills", "fit: registers", "fit: shared", "assumed", "narrowest B", "matrix",
    "instructions", "loop", "run", "modelled", "KB in flight", "bound by",
)  # fmt: skip


def markdown(found: list[dict[str, Any]]) -> str:
    """The table; ``narrowest`` is of the maps, and what is in flight counts where memory bounds."""
    lines = ["# Launches of the frozen networks", ""]
    lines += [
        "Made by `python -m benchmarks launches`: each distinct machine code once. `fit` is how",
        "many programs an SM holds by registers and by shared memory, `assumed` what the time",
        "model counts on; `narrowest B` the bytes of the narrowest access of a thread, but for",
        "those of 4, to vectors in float32; `instructions` are those of the code, `run` those that",
        "a warp runs by the trips of its loops, `modelled` those that the time model counts on.",
        "",
    ]
    lines += [f"| {' | '.join(HEADER)} |", f"|{' --- |' * len(HEADER)}"]
    for row in found:
        cells = (
            row["kernel"].removesuffix("_kernel"), row["layer"], row["dtype"],
            ", ".join(row["shapes"]),
            "x".join(map(str, row["tile"].values())), row["warps"], row["arch"], row["triton"],
            row["registers"], f"{row['shared'] / 1024:.1f}", row["spills"], row["fit_registers"],
            row["fit_shared"], row["assumed"], row["narrowest"], row["matrix"],
            row["instructions"], row["loop"], row["counted"], row["modelled"],
            row["kb_in_flight"] if "memory" in row["bounds"] else "", ", ".join(row["bounds"]),
        )  # fmt: skip
        lines.append(f"| {' | '.join(map(str, cells))} |")
    return "\n".join(lines) + "\n"


def add_options(command: argparse.ArgumentParser) -> None:
    command.add_argument("--network", action="append", choices=NETWORKS, help="default: all")
    command.add_argument("--batch", action="append", type=int, help="default: 128 and 1")
    command.add_argument("--dtype", action="append", choices=DTYPES, help="default: both")
    command.add_argument("--arch", action="append", type=int, choices=ARCHS, help="default: all")
    command.add_argument("--processes", type=int, default=os.cpu_count() or 1)
    command.add_argument("--json", type=Path, default=FILE, help="launches.md goes beside it")


def main(options: argparse.Namespace) -> int:
    options.json.parent.mkdir(parents=True, exist_ok=True)
    for arch in options.arch or ARCHS:
        found = rows(
            options.network or NETWORKS, options.batch or BATCHES, options.dtype or DTYPES,
            (arch,), options.processes,
        )  # fmt: skip
        count = sum(row["launches"] for row in found)
        print(f"sm_{arch}: {len(found)} machine codes of {count} launches, into {options.json}")
        kind = (found[0]["triton"], arch)
        found += [row for row in read(options.json) if (row["triton"], row["arch"]) != kind]
        found.sort(key=_order)
        text = ",\n".join(json.dumps(row) for row in found)
        options.json.write_text(f"[\n{text}\n]\n")
        options.json.with_suffix(".md").write_text(markdown(found))
    return 0


def read(path: Path = FILE) -> list[dict[str, Any]]:
    """The rows of a table; none where there is no file."""
    return json.loads(path.read_text()) if path.is_file() else []


if __name__ == "__main__":
    json.dump(compile_share(json.load(sys.stdin)), sys.stdout)
