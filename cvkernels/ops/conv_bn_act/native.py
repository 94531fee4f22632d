"""The compiled conv_bn_act: csrc/conv_bn_act/cpu.cpp, on the CPU.

A 3x3 convolution of stride 1 runs by Winograd's minimal filtering where that saves time; all others
multiply a block of pixels by panels of weights. Each reads and writes channels_last tensors and
channel slices of them.
"""

from __future__ import annotations

import functools
from collections.abc import Callable

import torch
import torch.nn.functional as F
from torch import Tensor

from cvkernels import extension
from cvkernels.ops.common.activation import ACTIVATIONS
from cvkernels.ops.common.derived_weights import DerivedWeights
from cvkernels.ops.common.norm import BatchNormParams, fold, scale_shift
from cvkernels.ops.conv_bn_act.problem import Problem

TRANSFORMED = 1 << 13  # filters that are transformed at once
PANEL = 16  # output channels that lie together in packed weights

library = torch.library.Library("cvkernels", "FRAGMENT")
library.define(
    "conv_bn_act_native(Tensor x, Tensor weight, Tensor shift, Tensor(a!) out, Tensor? residual, "
    "Tensor? input_affine, Tensor? input_gate, int kernel_h, int kernel_w, int stride_h, "
    "int stride_w, int padding_h, int padding_w, int dilation_h, int dilation_w, int act, int tile)"
    " -> ()"
)
extension.load()

_native = torch.ops.cvkernels.conv_bn_act_native.default


@torch.library.register_fake("cvkernels::conv_bn_act_native", lib=library)
def _(x, weight, shift, out, residual, input_affine, input_gate, *geometry):
    return None


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
    return lacks(problem.dtype, problem.groups)


def converts(x: Tensor) -> bool:
    """Whether x is made channels_last before it is convolved: its channels lie apart."""
    return x.stride(1) != 1 and x.shape[1] > 1


def has_regular_pixels(y: Tensor) -> bool:
    """Whether y is channels_last, or a channel slice of such a tensor: it is used as it is."""
    stride = y.stride()
    return (
        stride[1] == 1
        and stride[2] == y.shape[3] * stride[3]
        and stride[0] == y.shape[2] * stride[2]
    )


def prepared(
    problem: Problem,
    weight: Tensor,
    bias: Tensor | None,
    bn: BatchNormParams | None,
    input_bn: BatchNormParams | None = None,
    cache: DerivedWeights | None = None,
    tile: int | None = None,
) -> Callable[..., Tensor]:
    """What runs ``problem`` as (x, residual=None, out=None, input_gate=None), and checks nothing.

    ``tile`` overrides the choice of :func:`tile_of`.
    """
    tile = tile_of(problem) if tile is None else tile

    def build() -> tuple[Tensor, Tensor]:
        folded, shift = fold(weight, bias, bn)
        past = (0, -shift.shape[0] % PANEL)
        return pack(folded, tile), F.pad(shift.float(), past)

    sources = [weight, bias, *(bn[:4] if bn is not None else ())]
    if cache is None:
        packed, shift = build()
    else:
        packed, shift = cache.get(("native", tile, bn and bn.eps), sources, build)
    affine = None
    if input_bn is not None:

        def scale_and_shift() -> Tensor:
            like = torch.empty(problem.C, 0)
            return torch.cat(scale_shift(None, input_bn, like, torch.float64)).detach().float()

        if cache is None:
            affine = scale_and_shift()
        else:
            affine = cache.get(("native input", input_bn.eps), list(input_bn[:4]), scale_and_shift)
    geometry = (problem.R, problem.S, *problem.stride, *problem.padding, *problem.dilation)
    options = (*geometry, ACTIVATIONS.index(problem.act), tile)
    size = (problem.N, problem.K, problem.P, problem.Q)
    return functools.partial(_run, packed, shift, affine, options, size)


def _run(
    packed: Tensor,
    shift: Tensor,
    affine: Tensor | None,
    options: tuple,
    size: tuple,
    x: Tensor,
    residual: Tensor | None = None,
    out: Tensor | None = None,
    input_gate: Tensor | None = None,
) -> Tensor:
    if converts(x):
        x = x.contiguous(memory_format=torch.channels_last)
    if residual is not None and not has_regular_pixels(residual):
        residual = residual.contiguous(memory_format=torch.channels_last)
    y = out
    if out is None or not has_regular_pixels(out):
        y = torch.empty(size, memory_format=torch.channels_last)
    _native(x, packed, shift, y, residual, affine, input_gate, *options)
    return y if out is None or y is out else out.copy_(y)


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
