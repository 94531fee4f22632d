"""The compiled conv_bn_act: csrc/conv_bn_act/cpu.cpp, on the CPU.

A 3x3 convolution of stride 1 runs by Winograd's minimal filtering where that saves time; all others
multiply a block of pixels by panels of weights. Each reads and writes channels_last tensors and
channel slices of them.
"""

from __future__ import annotations

from collections.abc import Callable

import torch
import torch.nn.functional as F
from torch import Tensor

from cvkernels import extension
from cvkernels.ops.common import native
from cvkernels.ops.common.activation import code
from cvkernels.ops.common.derived_weights import DerivedWeights, derived
from cvkernels.ops.common.dispatch import Call
from cvkernels.ops.common.layout import is_pixel_matrix
from cvkernels.ops.common.norm import fold, scale_shift, sources_of
from cvkernels.ops.conv_bn_act.problem import Parameters, Problem

TRANSFORMED = 1 << 13  # filters that are transformed at once
PANEL = 16  # output channels that lie together in packed weights

library = torch.library.Library("cvkernels", "FRAGMENT")
library.define(
    "conv_bn_act_native(Tensor x, Tensor weight, Tensor shift, Tensor(a!) out, Tensor? residual, "
    "Tensor? input_affine, Tensor? input_gate, Tensor? output_gate, int kernel_h, int kernel_w, "
    "int stride_h, int stride_w, int padding_h, int padding_w, int dilation_h, "
    "int dilation_w, int act, int tile) -> ()"
)
extension.load()

_native = torch.ops.cvkernels.conv_bn_act_native.default


native.writes(library, "conv_bn_act_native")

# Winograd's G by the side of a tile of outputs: a filter of 3 taps at the points 0, 1, -1 and
# infinity, or 0, +-sqrt(1/2), +-sqrt(2) and infinity. csrc/conv_bn_act/winograd.h has the rest.
FILTER_POINTS = {
    2: [[1, 0, 0], [0.5, 0.5, 0.5], [0.5, -0.5, 0.5], [0, 0, 1]],
    4: [[1, 0, 0]]
    + [[c, c * p, c * p * p] for c, p in ((-2 / 3, 0.5**0.5), (-2 / 3, -(0.5**0.5)))]
    + [[c, c * p, c * p * p] for c, p in ((1 / 6, 2**0.5), (1 / 6, -(2**0.5)))]
    + [[0, 0, 1]],
}


# A model of the time that a convolution takes on one core, in nanoseconds, for the choice between
# the algorithms alone: products at 44 per nanosecond, weights at 12 bytes, and the transforms of a
# tile per point and channel. Measured with AVX2; the ratios are what matters.
PRODUCTS, BYTES = 44.0, 12.0
TRANSFORM = {2: 0.17, 4: 0.43}


def tiles(problem: Problem) -> tuple[int, ...]:
    """The algorithms for ``problem``: 0 is direct, 2 or 4 the width of Winograd's tiles, 2 high."""
    if (problem.R, problem.S, *problem.stride, *problem.dilation) != (3, 3, 1, 1, 1, 1):
        return (0,)
    return (0,) if problem.has_prologue or problem.C < PANEL else (0, 2, 4)


def tile_of(problem: Problem) -> int:
    """The one of :func:`tiles` that takes the least time, by a model of it."""
    if not problem.bytes_written:
        return 0

    def cost(tile: int) -> float:
        """Time per pair of an input and an output channel."""
        if not tile:
            return 9 * problem.N * problem.P * problem.Q / PRODUCTS + 4 * 9 / BYTES
        tiles = problem.N * -(-problem.P // 2) * -(-problem.Q // tile)
        points = 4 * (tile + 2)
        transforms = TRANSFORM[tile] * (1 / problem.C + 1 / problem.K)
        return points * (tiles * (1 / PRODUCTS + transforms) + 4 / BYTES)

    return min(tiles(problem), key=cost)


def lacks(dtype: torch.dtype, groups: int) -> str:
    """Why there is no such native convolution; empty where there is one."""
    if dtype != torch.float32:
        return f"the native convolution computes in float32, got {dtype}"
    if groups != 1:
        return f"the native convolution has no groups, got {groups}"
    return "" if extension.has("cpu") else extension.status()["cpu"].reason


def why_not(problem: Problem) -> str:
    """Why the compiled op cannot run ``problem`` on CPU tensors; empty where it can."""
    if problem.projection is not None:
        return "the compiled convolution adds its residual without a projection"
    return lacks(problem.dtype, problem.groups)


def converts(x: Tensor) -> bool:
    """Whether x is made channels_last before it is convolved: its channels lie apart."""
    return x.stride(1) != 1 and x.shape[1] > 1


def plan(
    problem: Problem, call: Call, parameters: Parameters,
    like: tuple[Tensor | None, ...], cache: DerivedWeights | None,
    tile: int | None = None,
) -> Callable[..., Tensor]:  # fmt: skip
    """What runs the problem, as (x, residual=None, input_gate=None, out=None, output_gate=None).

    ``like`` are examples of all but x; ``tile`` overrides :func:`tile_of`.
    """
    tile = tile_of(problem) if tile is None else tile
    packed, shift, affine = packed_of(problem, parameters, cache, tile)
    geometry = (problem.R, problem.S, *problem.stride, *problem.padding, *problem.dilation)
    options = (*geometry, code(problem.act), tile)
    size = (problem.N, problem.K, problem.P, problem.Q)

    def run(x, residual=None, input_gate=None, out=None, output_gate=None):
        if converts(x):
            x = x.contiguous(memory_format=torch.channels_last)
        if residual is not None and not is_pixel_matrix(residual):
            residual = residual.contiguous(memory_format=torch.channels_last)
        if input_gate is not None:
            input_gate = input_gate.contiguous()
        if output_gate is not None:
            output_gate = output_gate.contiguous()
        y = out
        if out is None or not is_pixel_matrix(out):
            y = torch.empty(size, memory_format=torch.channels_last)
        _native(x, packed, shift, y, residual, affine, input_gate, output_gate, *options)
        return y if out is None or y is out else out.copy_(y)

    if not native.directs(call):
        return run
    return _direct(run, problem, call.x, like, (packed, shift, affine))


def _direct(
    run: Callable[..., Tensor], problem: Problem, x: Tensor, like: tuple, held: tuple
) -> Callable[..., Tensor]:
    """``run`` past the dispatcher, for tensors like these; run itself where it would copy some."""
    residual, gate, out, output_gate = like
    if not all(t is None or is_pixel_matrix(t) for t in (residual, out)):
        return run
    if not all(t is None or t.is_contiguous() for t in (gate, output_gate)):
        return run
    layout, nchw = torch.channels_last, converts(x)
    x = x.contiguous(memory_format=layout) if nchw else x
    y = out
    if out is None:
        y = torch.empty((problem.N, problem.K, problem.P, problem.Q), memory_format=layout)
    work = native.direct(lambda: run(x, residual, gate, y, output_gate))
    weight, shift, affine = (0 if t is None else t.data_ptr() for t in held)
    result, fresh = native.template(y), torch.empty_like

    def run_directly(x, residual=None, input_gate=None, out=None, output_gate=None):
        if nchw:
            x = x.contiguous(memory_format=layout)
        y = fresh(result) if out is None else out
        work(
            x.data_ptr(), weight, shift, y.data_ptr(),
            0 if residual is None else residual.data_ptr(), affine,
            0 if input_gate is None else input_gate.data_ptr(),
            0 if output_gate is None else output_gate.data_ptr(),
        )  # fmt: skip
        return y

    run_directly.held = held  # type: ignore[attr-defined]  # the memory at its addresses
    return run_directly


def packed_of(
    problem: Problem, parameters: Parameters, cache: DerivedWeights | None, tile: int
) -> tuple[Tensor, Tensor, Tensor | None]:
    """The folded and packed weight, its shift, and scale and shift of the prologue's norm."""
    weight, bias, bn, input_bn = parameters[:4]

    def build() -> tuple[Tensor, Tensor]:
        folded, shift = fold(weight, bias, bn)
        return pack(folded, tile), F.pad(shift.float(), (0, -shift.shape[0] % PANEL))

    def scale_and_shift() -> Tensor:
        like = torch.empty(problem.C, 0)
        return torch.cat(scale_shift(None, input_bn, like, torch.float64)).detach().float()

    sources = sources_of(weight, bias, bn)
    packed, shift = derived(cache, ("native", tile, bn and bn.eps), sources, build)
    if input_bn is None:
        return packed, shift, None
    key = ("native input", input_bn.eps)
    return packed, shift, derived(cache, key, input_bn[:4], scale_and_shift)


def pack(weight: Tensor, tile: int) -> Tensor:
    """weight[K, C, R, S] as [K/16, R, S, C, 16], or at Winograd's points [points, K/16, C, 16].

    The filters are transformed in float64. Channels past K are zero.
    """
    with torch.no_grad():
        K, C = weight.shape[:2]
        whole = F.pad(weight, (0, 0, 0, 0, 0, 0, 0, -K % PANEL)) if K % PANEL else weight
        panels = whole.unflatten(0, (-1, PANEL))  # [K/16, 16, C, R, S]
        if not tile:
            return panels.permute(0, 3, 4, 2, 1).contiguous()
        down, along = (torch.tensor(FILTER_POINTS[side], dtype=torch.float64) for side in (2, tile))
        transform = torch.kron(down, along)  # [points, 9]
        taps = panels.permute(3, 4, 0, 2, 1).reshape(9, -1)
        points = taps.new_empty(len(transform), taps.shape[1])
        # By parts that stay in the cache: fresh memory costs more than the products.
        for start in range(0, taps.shape[1], TRANSFORMED):
            part = slice(start, start + TRANSFORMED)
            points[:, part] = transform @ taps[:, part].double()
        return points.view(len(transform), -1, C, PANEL)
