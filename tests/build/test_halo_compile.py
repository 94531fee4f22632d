"""The halo kernel of conv_bn_act compiled for GPUs that are not there: its machine code, and what
its tiles ask of a multiprocessor. No figure here was measured on a GPU."""

import importlib.util
import itertools
import re
import shutil
import subprocess
from pathlib import Path
from typing import NamedTuple

import pytest
import torch

from cvkernels.ops.common.tiles import cdiv, sm_count
from cvkernels.ops.conv_bn_act import halo, tuning
from cvkernels.ops.conv_bn_act.problem import Problem
from tests.support.made_once import made_once, shared_folder

ROOT = Path(__file__).resolve().parents[2]
ARCHS = (80, 90, 100)
TYPES = ("float16", "bfloat16")
ROWS_AND_COLUMNS = tuple(itertools.product((4, 7), (2, 4)))
REGISTERS, SHARED_MEMORY = 1 << 16, {80: 164 << 10, 90: 228 << 10, 100: 228 << 10}
SOURCE = """
#include "conv_bn_act/kernels.cuh"
namespace cvkernels::conv_bn_act {
#define KERNEL(T, ROWS, COLUMNS)                             \\
  template __global__ void conv_bn_act_halo_kernel<T, ROWS, COLUMNS>( \\
      const T*, const T*, T*, Halo);
"""


def nvdisasm() -> str | None:
    """The toolkit's or Triton's."""
    spec = importlib.util.find_spec("triton")
    carried = Path(spec.origin).parent / "backends/nvidia/bin/nvdisasm" if spec else Path()
    return shutil.which("nvdisasm") or (str(carried) if carried.is_file() else None)


needs_compiler = pytest.mark.skipif(
    not (ROOT / "csrc").is_dir() or shutil.which("nvcc") is None or nvdisasm() is None,
    reason="no csrc, nvcc or nvdisasm here",
)


class Code(NamedTuple):
    """A compiled kernel."""

    registers: int
    stack: int
    spills: int
    instructions: list[str]
    loops: list[range]  # inner ones first


def output_of(*command: str) -> str:
    done = subprocess.run(command, capture_output=True, text=True)
    assert done.returncode == 0, done.stderr
    return done.stdout + done.stderr


def compile_for(arch: int, target: Path) -> None:
    """Write what ptxas and nvdisasm say to target."""
    source, cubin = target.with_suffix(".cu"), target.with_suffix(".cubin")
    kernels = [
        f"KERNEL({T}, {rows}, {columns})" for T in TYPES for rows, columns in ROWS_AND_COLUMNS
    ]
    source.write_text("\n".join((SOURCE, *kernels, "}")))
    options = ("-std=c++20", "-O3", f"-I{ROOT / 'csrc'}", f"-arch=sm_{arch}", "-Xptxas", "-v")
    said = output_of("nvcc", *options, "-cubin", str(source), "-o", str(cubin))
    target.write_text(said + output_of(str(nvdisasm()), "-c", str(cubin)))


def kernels_of(text: str) -> dict[tuple[str, int, int], Code]:
    usage = {}
    for name, said in re.findall(
        r"Compiling entry function '(\w+)'(.*?)(?=Compiling|\Z)", text, re.S
    ):
        numbers = (r"Used (\d+) registers", r"(\d+) bytes stack", r"(\d+) bytes spill stores")
        usage[name] = [int(re.search(pattern, said)[1]) for pattern in numbers]
    found = {}
    for part in re.split(r"^\.text\.", text, flags=re.M)[1:]:
        name = re.match(r"\w+", part)[0]
        T, rows, columns = re.search(r"I?NS_\d+(b?float16)ELi(\d)ELi(\d)E", name).groups()
        found[T, int(rows), int(columns)] = Code(*usage[name], *listing(part))
    return found


def listing(text: str) -> tuple[list[str], list[range]]:
    """The instructions, and the ranges of those from a label to a branch back to it."""
    instructions, labels = [], {}
    for line in text.splitlines():
        if label := re.match(r"(\.L_x_\d+):", line):
            labels[label[1]] = len(instructions)
        elif instruction := re.match(r"\s+/\*[0-9a-f]{4,}\*/\s+(.*?);", line):
            instructions.append(instruction[1])
    loops = []
    for number, instruction in enumerate(instructions):
        branch = re.search(r"BRA.*?`\((\.L_x_\d+)\)", instruction)
        if branch and labels.get(branch[1], number) < number:
            loops.append(range(labels[branch[1]], number + 1))
    return instructions, sorted(loops, key=len)


@pytest.fixture(scope="module", params=ARCHS, ids=lambda arch: f"sm_{arch}")
def compiled(request, tmp_path_factory):
    folder, arch = shared_folder(tmp_path_factory), request.param
    path = made_once(folder / f"halo_{arch}.txt", lambda part: compile_for(arch, part))
    return arch, kernels_of(path.read_text())


@pytest.mark.full
@needs_compiler
def test_registers_hold_all_sums(compiled):
    _, kernels = compiled
    assert set(kernels) == {(T, *cut) for T in TYPES for cut in ROWS_AND_COLUMNS}
    for (_, rows, columns), code in kernels.items():
        assert code.spills == 0 and code.stack == 0
        assert rows * columns * 4 < code.registers <= REGISTERS // (32 * halo.WARPS)


@pytest.mark.full
@needs_compiler
def test_the_loop_over_slices_multiplies(compiled):
    """Tensor-core instructions, the fragments that they share loaded once, and little else."""
    _, kernels = compiled
    for (T, rows, columns), code in kernels.items():
        body = next(
            body
            for body in ([code.instructions[i] for i in loop] for loop in code.loops)
            if any("HMMA" in instruction for instruction in body)
        )
        kind = "HMMA.16816.F32" + (".BF16" if T == "bfloat16" else "")
        products = sum(kind in instruction for instruction in body)
        loads = [instruction for instruction in body if "LDSM" in instruction]
        assert products == 9 * rows * columns
        assert len(loads) == 3 * (rows + 2 + 3 * columns // 2)
        assert all(".M88.4" in load for load in loads)
        assert len(body) - products - len(loads) <= 36
        assert not any(word in " ".join(body) for word in ("LDL", "STL", "BAR", "LDG"))


@pytest.mark.full
@needs_compiler
def test_maps_are_moved_in_16_bytes(compiled):
    _, kernels = compiled
    for code in kernels.values():
        copies = [i for i in code.instructions if "LDGSTS" in i]
        stores = [i for i in code.instructions if re.search(r"\bSTG?\.E|\bST\.E", i)]
        assert copies and all(".BYPASS" in i and ".128" in i for i in copies)
        assert stores and all(".128" in i for i in stores)


def problem_of(C: int, size: int, K: int, N: int = 128) -> Problem:
    ones = ((1, 1), (1, 1), (1, 1))
    return Problem(N, C, size, size, K, 3, 3, *ones, 1, torch.bfloat16, "none")


# What the networks have of the rule's kind.
DENSENET = [problem_of(128, size, 32) for size in (56, 28, 14, 7)]
GOOGLENET = [problem_of(C, size, K) for C, size, K in
             ((16, 28, 32), (16, 14, 48), (24, 14, 64), (32, 14, 64))]  # fmt: skip
GPUS = {80: (8, 0), 90: (9, 0), 100: (10, 0)}
shaped = pytest.mark.parametrize(
    "problem", DENSENET + GOOGLENET, ids=lambda p: f"{p.C}-{p.K}-at-{p.H}"
)
on_each_gpu = pytest.mark.parametrize("arch", ARCHS)


def compulsory(problem: Problem) -> int:
    return problem.dtype.itemsize * problem.N * problem.H * problem.W * (problem.C + problem.K)


@shaped
@on_each_gpu
def test_l2_gives_each_map_at_most_1_6_times(problem, arch):
    """An implicit matrix product takes x from it for each of nine taps."""
    assert tuning.heuristic(problem, GPUS[arch]).backend == "halo"
    tile = halo.tile_of(problem, GPUS[arch])
    assert halo.map_bytes(problem, tile) <= 1.6 * compulsory(problem)
    one = halo.tile_of(small := problem_of(problem.C, problem.H, problem.K, N=1), GPUS[arch])
    assert halo.map_bytes(small, one) <= 1.6 * compulsory(small)


@shaped
@on_each_gpu
def test_enough_bytes_are_on_their_way(problem, arch):
    """32 KB for each multiprocessor, or all that it has to fetch."""
    tile, multiprocessors = halo.tile_of(problem, GPUS[arch]), sm_count(GPUS[arch])
    assert halo.shared_bytes(problem, tile) + 1024 <= SHARED_MEMORY[arch]
    ahead = (tile.stages - 1) * tile.stage_bytes
    tiles = cdiv(halo.tiles_of(problem, tile), multiprocessors)
    all_stages = tiles * cdiv(cdiv(problem.C, halo.PRODUCT), tile.slices)
    assert ahead >= 32 << 10 or all_stages <= tile.stages - 1


@pytest.mark.parametrize(
    ("size", "share"), [(56, 0.75), (28, 0.58), (14, 0.35), (7, 0.15)], ids=str
)
def test_predicted_share_of_the_rate_of_mma_sync(size, share):
    """By the model, for DenseNet-121 on an H100: launches and padding included."""
    problem = problem_of(128, size, 32)
    tile = halo.tile_of(problem, (9, 0))
    clocks = halo.launch_clocks(problem, tile, 132)
    assert problem.flops / 2 / (clocks * halo.PAIRS * 132) >= share
    each = halo.clocks(problem, tile)
    assert each.shared <= each.products and each.l2 <= each.products


def banks(units: list[int]) -> set[int]:
    """Which eighth of the banks each unit of 16 bytes is in."""
    return {unit % 8 for unit in units}


@shaped
@on_each_gpu
def test_no_bank_is_asked_twice(problem, arch):
    """By eight lanes that shared memory serves together, in the places that the kernel gives them:
    a matrix row by row at each tap, and the pixels that neighbouring lanes copy."""
    tile = halo.tile_of(problem, GPUS[arch])
    height, width = (side + 2 for side in tile.size)
    octets, pixels = 2 * tile.slices, tile.patches * height * width
    plane = tile.stage_bytes // 16 // octets if tile.warps_c == 1 else None
    plane = plane or pixels + (max(1, 8 // octets) - pixels) % 8
    for row, s, octet in itertools.product(range(height), range(3), range(octets)):
        first = octet * plane + row * width + s
        assert len(banks([first + pixel for pixel in range(8)])) == 8
    for first in range(0, pixels * octets - 8, 8):
        lanes = [divmod(first + lane, octets) for lane in range(8)]
        assert len(banks([octet * plane + pixel for pixel, octet in lanes])) == 8
    assert tile.all_columns % 8 == 0  # so that a matrix of weights is eight neighbouring units
