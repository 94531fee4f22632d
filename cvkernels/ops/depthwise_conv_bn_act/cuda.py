"""The CUDA C++ kernel of depthwise_conv_bn_act, csrc/depthwise_conv_bn_act, and its cuts."""

from __future__ import annotations

import functools
from collections.abc import Callable
from typing import NamedTuple

import torch
from torch import Tensor

from cvkernels import backend as backends
from cvkernels.ops.common import native
from cvkernels.ops.common.activation import code
from cvkernels.ops.common.dispatch import Call
from cvkernels.ops.common.norm import BatchNormParams
from cvkernels.ops.common.tiles import INT32_MAX, cdiv, sm_count
from cvkernels.ops.depthwise_conv_bn_act.problem import OP, DepthwiseProblem

PACK = 16  # bytes of one access
# As kernels.cuh has them: threads of a block, output columns of a thread, bytes of a pixel.
THREADS, STRIP, PIXEL = 128, 7, 64
BLOCKS = 4  # of an SM, by registers and shared memory

library = torch.library.Library("cvkernels", "FRAGMENT")
library.define(
    f"{OP}_cuda(Tensor x, Tensor weight, Tensor? bias, Tensor? bn_weight, Tensor? bn_bias, "
    "Tensor? bn_mean, Tensor? bn_var, float bn_eps, int kernel, int stride, int padding_h, "
    "int padding_w, int act, int strips, int images, int bands, int band_rows, Tensor(a!) out, "
    "Tensor(b!)? sums) -> ()"
)
convolve = torch.ops.cvkernels.depthwise_conv_bn_act_cuda.default
native.writes(library, f"{OP}_cuda")


class Cut(NamedTuple):
    """How a call is cut into blocks.

    A unit is a band of ``band_rows`` output rows of one image, ``strips`` strips wide; a block has
    those of ``images`` images and of ``bands`` bands, for 64 bytes of channels.
    """

    strips: int
    images: int
    bands: int
    band_rows: int

    def parts(self, problem: DepthwiseProblem) -> int:
        """How many partial sums each channel of an image has."""
        return cdiv(problem.P, self.band_rows) * cdiv(problem.Q, self.strips * STRIP)

    def blocks(self, problem: DepthwiseProblem) -> int:
        groups = cdiv(problem.N, self.images) * cdiv(cdiv(problem.P, self.band_rows), self.bands)
        channels = cdiv(problem.C * problem.dtype.itemsize, PIXEL)
        return groups * channels * cdiv(problem.Q, self.strips * STRIP)


@functools.lru_cache(maxsize=4096)
def cut(problem: DepthwiseProblem, capability: tuple[int, int]) -> Cut:
    """The cut for ``problem``: the bands for which the busiest SM has the fewest rows.

    A band reads K - 1 rows before its first, and a block loads its filter first, which is about the
    time of three rows. An SM needs all its blocks for its full speed. The second kernel, which adds
    the sums of bands, takes about the time of six rows.
    """
    (kernel, stride), sms = (problem.R, problem.stride[0]), sm_count(capability)
    strips, most = _units(problem)

    def with_rows(rows: int) -> Cut:
        images = max(1, min(problem.N, most))
        bands = 1 if problem.P % rows else min(most // images, problem.P // rows)
        return Cut(strips, images, bands, rows)

    def rows_of_an_sm(found: Cut) -> int:
        of_block = found.band_rows + (kernel - 1) // stride + 3
        adding = 6 if problem.squeeze and found.parts(problem) > 1 else 0
        return max(BLOCKS, cdiv(found.blocks(problem), sms)) * of_block + adding

    counts = range(1, min(problem.P, 65535) + 1)
    return min((with_rows(cdiv(problem.P, count)) for count in counts), key=rows_of_an_sm)


def _units(problem: DepthwiseProblem) -> tuple[int, int]:
    """Strips of a unit, and how many units a block has room for: see Tile in kernels.cuh."""
    kernel, stride, size = problem.R, problem.stride[0], problem.dtype.itemsize
    width = 4 if (size, kernel, stride) == (2, 3, 1) else 2
    slots = THREADS * width * size // PIXEL
    columns = slots * ((STRIP - 1) * stride + kernel) if size == 2 else {1: 152, 2: 119}[stride]

    def span(strips: int) -> int:
        return (strips * STRIP - 1) * stride + kernel

    every = cdiv(problem.Q, STRIP)
    widest = max(s for s in range(1, slots + 1) if span(s) <= columns)
    strips = cdiv(every, cdiv(every, widest))
    return strips, min(slots // strips, columns // span(strips))


def lacks(dtype: torch.dtype, kernel: tuple[int, int], stride: tuple, dilation: tuple) -> str:
    """Why there is no such convolution in CUDA C++; empty where there is one."""
    if dtype not in native.DTYPES["cuda"]:
        return f"the CUDA kernel has no {dtype}"
    if kernel not in ((3, 3), (5, 5)) or stride not in ((1, 1), (2, 2)) or dilation != (1, 1):
        return "the CUDA kernel is 3x3 or 5x5 of stride 1 or 2, not dilated"
    return ""


def why_not(problem: DepthwiseProblem, call: Call) -> str:
    """Why the CUDA kernel cannot run the call; empty where it can."""
    if call.device != "cuda":
        return f"the CUDA kernel needs CUDA tensors, got {call.device}"
    filter_size = (problem.R, problem.S)
    if reason := lacks(problem.dtype, filter_size, problem.stride, problem.dilation):
        return reason
    if reason := _why_not_packed(call.x, problem.dtype.itemsize):
        return reason
    blocks = cut(problem, backends.gpu(call.x)[1]).blocks(problem)
    if blocks > INT32_MAX:
        return f"{problem.N} images of {problem.C} channels are more than a launch can index"
    return native.why_not(OP, call.x, "cuda")


def _why_not_packed(x: Tensor, itemsize: int) -> str:
    n, c, h, w = x.stride()
    if c != 1 or any(step * itemsize % PACK for step in (x.shape[1], n, h, w)):
        return (
            f"the CUDA kernel needs channels_last with channels in packs of {PACK // itemsize}, "
            f"got shape {list(x.shape)} with strides {list(x.stride())}"
        )
    if max(h, THREADS * w) * itemsize > INT32_MAX:
        return "the CUDA kernel needs rows of less than 2 GiB"
    return ""


def plan_launch(
    problem: DepthwiseProblem, x: Tensor, weight: Tensor, bias: Tensor | None,
    bn: BatchNormParams | None,
) -> Callable[[Tensor, Tensor, Tensor | None], None]:  # fmt: skip
    """What computes the op into out and sums, as (x, out, sums); weight is [R, S, C] in any order.

    The norm's vectors are read by the kernel. x that does not start at a pack is copied.
    """
    dtype, found = problem.dtype, cut(problem, backends.gpu(x)[1])
    options = (problem.R, problem.stride[0], *problem.padding, code(problem.act), *found)
    vectors, eps = (bn[:4], bn.eps) if bn is not None else ((None,) * 4, 0.0)

    def run(x, out, sums):
        if x.data_ptr() % PACK:
            x = x.clone(memory_format=torch.channels_last)
        read = [readable(v, dtype) for v in (bias, *vectors)]
        convolve(x, weight, *read, eps, *options, out, sums)

    return run


def readable(vector: Tensor | None, dtype: torch.dtype) -> Tensor | None:
    """The vector as the kernel reads it: contiguous, float32 or of x's dtype."""
    if vector is None:
        return None
    if vector.dtype not in (dtype, torch.float32):
        vector = vector.float()
    return vector.contiguous()
