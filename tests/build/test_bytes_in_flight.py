"""The kernels that memory bounds load enough at once to keep an H200's busy.

Computed from machine code: loads before the first use, registers and shared memory, and the grid.
"""

import math
import re
import shutil
import subprocess
from pathlib import Path

import pytest
import torch

from cvkernels.ops.common.tiles import cdiv
from cvkernels.ops.common.work import H200, occupancy
from tests.ops.test_squeeze_excite_triton_compile import CASES
from tests.support.made_once import made_once, shared_folder
from tests.support.triton_compiled import compiled_once

pytest.importorskip("triton")
machine_code = pytest.importorskip("benchmarks.machine_code")

# Little's law: a memory of 4.3 TB/s that answers after about 1 us is busy while 132
# multiprocessors wait for some 32 KB each.
IN_FLIGHT = 32 * 1024

ROOT = Path(__file__).resolve().parents[2]
MAPS = ("squeeze", "scale", "shift", "backward", "reduce")
TRITON = [case for case in CASES if (case.arch, case.N) == (90, 128) and case.kernel in MAPS]
# Threads of a block, and patterns of the mangled names of kernels for bfloat16.
NATIVE = {
    "batch_norm_act": (256, (
        "statistics_kernelINS_8bfloat16ELi8E", "apply_kernelINS_8bfloat16ELi8E",
        "reduce_kernelINS_8bfloat16ELi8E", r"input_gradient_kernelINS_8bfloat16E(S\w_|f)Li8E",
    )),
    "max_pool": (128, ("max_pool_nhwc_kernelINS_8bfloat16ELi3E",)),
    "avg_pool": (128, ("avg_pool_nhwc_kernelINS_8bfloat16ELi2E",)),
    "dense_concat": (128, ("dense_concat_nhwc_kernelINS_8bfloat16E",)),
}  # fmt: skip


@pytest.fixture(scope="module")
def compiled(tmp_path_factory):
    return dict(zip(TRITON, compiled_once("se_scale", TRITON, tmp_path_factory), strict=True))


@pytest.mark.full
@pytest.mark.parametrize("case", TRITON, ids=str)
def test_triton_kernels_keep_memory_busy(case, compiled):
    found = compiled[case]
    threads, programs = 32 * found["meta"].get("num_warps", 4), math.prod(found["grid"])
    blocks = occupancy(H200, threads, found["registers"], found["shared"])
    blocks = min(blocks, cdiv(programs, H200.sms))
    assert blocks * threads * found["waits_for"] >= IN_FLIGHT, found


def compile_native(op: str, target: Path) -> None:
    include = Path(torch.__file__).parent / "include"
    command = ["nvcc", "-arch=sm_90", "-std=c++20", "-O3", "-cubin", "-DUSE_CUDA"]
    command += ["-DTORCH_TARGET_VERSION=0x020b000000000000", f"-I{ROOT / 'csrc'}"]
    command += ["-isystem", str(include), str(ROOT / "csrc" / op / "cuda.cu"), "-o", str(target)]
    done = subprocess.run(command, capture_output=True, text=True)
    assert done.returncode == 0, done.stderr


@pytest.mark.full
@pytest.mark.skipif(shutil.which("nvcc") is None, reason="no nvcc")
@pytest.mark.skipif(not (ROOT / "csrc").is_dir(), reason="the tests run without the repository")
@pytest.mark.parametrize("op", NATIVE)
def test_cuda_kernels_keep_memory_busy(op, tmp_path_factory):
    """On a grid that fills the GPU; and nothing of a wide map's passes is spilled."""
    cubin = made_once(
        shared_folder(tmp_path_factory) / f"{op}.cubin", lambda part: compile_native(op, part)
    )
    threads, names = NATIVE[op]
    found = machine_code.kernels_in(cubin.read_bytes())
    for name in names:
        wide = {kernel: needs for kernel, needs in found.items() if re.search(name, kernel)}
        assert wide, sorted(found)
        for kernel, (needs, sass) in wide.items():
            blocks = occupancy(H200, threads, needs.registers, needs.static_shared)
            waits_for = machine_code.bytes_per_thread(sass)
            assert blocks * threads * waits_for >= IN_FLIGHT, (kernel, needs, waits_for)
            assert needs.stack == needs.local == 0, (kernel, needs)


CODE = """
        /*0000*/                   LDG.E.128.CONSTANT R4, desc[UR4][R2.64] ;
        /*0010*/              @!P0 LDG.E.128 R8, desc[UR4][R2.64+0x10] ;
        /*0020*/                   IADD3 R12, R1, 0x1, RZ ;
        /*0030*/                   FADD R20, R7, R12 ;
        /*0040*/                   LDG.E.U16 R13, desc[UR4][R2.64] ;
        /*0050*/                   STG.E.128 desc[UR4][R2.64], R8 ;
"""
COPIES = """
        /*0000*/                   LDGSTS.E.BYPASS.128 [R0], desc[UR4][R2.64] ;
        /*0010*/                   LDGDEPBAR ;
        /*0020*/                   LDGSTS.E.BYPASS.128 [R0+0x10], desc[UR4][R2.64] ;
        /*0030*/                   LDGSTS.E.64 [R0+0x20], desc[UR4][R2.64] ;
        /*0040*/                   LDGDEPBAR ;
        /*0050*/                   DEPBAR.LE SB0, 0x1 ;
        /*0060*/                   LDGSTS.E.BYPASS.128 [R0], desc[UR4][R2.64] ;
"""


def test_loads_are_on_their_way_until_they_are_used():
    assert machine_code.bytes_per_thread(CODE) == 32
    assert machine_code.bytes_per_thread(CODE.replace("R7", "R1")) == 34
    assert machine_code.bytes_per_thread(COPIES) == 40
    assert machine_code.bytes_per_thread(COPIES.replace("SB0, 0x1", "SB0, 0x2")) == 56


def test_blocks_of_a_multiprocessor():
    assert occupancy(H200, 128, 64) == 8
    assert occupancy(H200, 128, 65) == 7
    assert occupancy(H200, 256, 32, 31 * 1024) == 7
