"""CUDA C++ kernels as machine code for a real GPU, where none is: registers, spills, loops."""

import pytest

from cvkernels.ops.depthwise_conv_bn_act import cuda
from tests.support import sass
from tests.support.cases.depthwise_conv_bn_act import EFFICIENTNET_B0, problem_of

pytestmark = pytest.mark.skipif(bool(sass.missing()), reason=sass.missing())

# What an SM of sm_90 has.
REGISTERS, SHARED = 65536, 227 << 10
DEPTHWISE = """
#include "depthwise_conv_bn_act/kernels.cuh"
using namespace cvkernels;
namespace ops = cvkernels::depthwise_conv_bn_act;
"""
DEPTHWISE_KERNEL = """
template __global__ void ops::depthwise_conv_bn_act_kernel<{T}, {K}, {S}, {squeeze}, {act}>(
    const {T}*, const {T}*, {T}*, float*, ops::Call, {act});
"""
# (filter, stride, squeeze): most instructions of the main loop for an output with SiLU.
BUDGETS = {
    (3, 1, False): 17.0,
    (3, 1, True): 18.0,
    (5, 1, False): 34.1,
    (5, 1, True): 35.5,
    (3, 2, True): 25.5,
    (5, 2, True): 44.2,
}


def outputs_of_a_step(kernel, stride):
    """Of a thread: 7 columns of four channels, or of two."""
    return 28 if stride == 1 else 14


@pytest.fixture(scope="module")
def depthwise(tmp_path_factory):
    """The kernels for bfloat16 by (filter, stride, squeeze), with SiLU."""
    source = DEPTHWISE
    for kernel, stride, squeeze in BUDGETS:
        source += DEPTHWISE_KERNEL.format(
            T="bfloat16", K=kernel, S=stride, squeeze=str(squeeze).lower(), act="SiluInto<bfloat16>"
        )
    codes = sass.compile_kernels(source, tmp_path_factory.mktemp("depthwise"))
    found = {}
    for case in BUDGETS:
        mark = "ILi{}ELi{}ELb{:d}E".format(*case).removeprefix("I")
        (found[case],) = (code for code in codes if mark in code.name)
    return found


@pytest.mark.parametrize("case", BUDGETS, ids=str)
def test_depthwise_keeps_to_its_instructions(case, depthwise):
    kernel, stride, squeeze = case
    outputs, loop = outputs_of_a_step(kernel, stride), depthwise[case].main_loop
    assert loop.count("FFMA") == outputs * (kernel**2 + 1)
    assert loop.count("MUFU") == outputs and loop.count("FADD") == squeeze * outputs
    assert loop.count() <= BUDGETS[case] * outputs, loop.names


@pytest.mark.parametrize("case", BUDGETS, ids=str)
def test_depthwise_accesses_maps_by_16_bytes_without_spills(case, depthwise):
    code = depthwise[case]
    assert code.spilled == 0
    texts = code.main_loop.instructions
    copies = [text for text in texts if text.startswith("LDGSTS")]
    stores = [text for text in texts if text.startswith("STG")]
    assert copies and all(text.startswith("LDGSTS.E.BYPASS.128") for text in copies)
    assert stores and all(text.startswith("STG.E.128") for text in stores)
    assert not code.main_loop.count("LDG", "LD", "ST", "LDL", "STL", "CALL")


@pytest.mark.parametrize("case", BUDGETS, ids=str)
def test_depthwise_fills_an_sm(case, depthwise):
    code, threads = depthwise[case], 128
    blocks = min(REGISTERS // (code.registers * threads), SHARED // (code.shared + 1024))
    assert blocks * threads // 32 >= 16


@pytest.mark.parametrize("shape", EFFICIENTNET_B0.values(), ids=str)
def test_depthwise_has_bytes_on_their_way(shape):
    """Of x to shared memory while a step computes, and of out; both are asynchronous.

    Reading is about half of the traffic: 4.3 TB/s for a microsecond are 32 KiB for each SM.
    """
    problem = problem_of(shape, 128)
    cut = cuda.cut(problem, (9, 0))
    kernel, stride = shape.kernel, shape.stride
    of_row = cut.images * cut.bands * min(cut.strips * cuda.STRIP, problem.Q) * cuda.PIXEL
    rows_out = 2 if (kernel, stride) == (5, 1) else 1
    rows_in = 2  # two steps of one row, or one step of two
    reading = cuda.BLOCKS * of_row * stride * rows_in
    assert reading >= 28 << 10
    assert reading + cuda.BLOCKS * of_row * rows_out >= 32 << 10
