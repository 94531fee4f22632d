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
from cvkernels.ops.common import native
from cvkernels.ops.common.activation import code
from cvkernels.ops.common.derived_weights import DerivedWeights, derived
from cvkernels.ops.common.dispatch import Call
from cvkernels.ops.common.layout import is_pixel_matrix, new_channels_last
from cvkernels.ops.common.norm import fold, scale_shift, sources_of
from cvkernels.ops.common.recycled import maker
from cvkernels.ops.conv_bn_act import onednn
from cvkernels.ops.conv_bn_act.problem import Parameters, Problem

PANEL = 16  # output channels that lie together in packed weights

library = torch.library.Library("cvkernels", "FRAGMENT")
library.define(
    "conv_bn_act_native(Tensor x, Tensor weight, Tensor shift, Tensor(a!) out, Tensor? residual, "
    "Tensor? input_affine, Tensor? input_gate, Tensor? output_gate, int kernel_h, int kernel_w, "
    "int stride_h, int stride_w, int padding_h, int padding_w, int dilation_h, "
    "int dilation_w, int act, int algorithm) -> ()"
)
library.define(
    "conv_bn_act_native_filters(Tensor weight, bool reversed, int algorithm, Tensor(a!) points) "
    "-> ()"
)
library.define(
    "conv_bn_act_native_weight_gradient(Tensor grad, Tensor x, int padding_h, int padding_w, "
    "int algorithm, Tensor(a!) out) -> ()"
)
extension.load()

convolution = torch.ops.cvkernels.conv_bn_act_native.default
to_points = torch.ops.cvkernels.conv_bn_act_native_filters.default
weight_gradient = torch.ops.cvkernels.conv_bn_act_native_weight_gradient.default

for _name in ("", "_filters", "_weight_gradient"):
    native.writes(library, f"conv_bn_act_native{_name}")

# The algorithms: a direct sum of products of floats, of pairs of bfloat16, or of AMX tiles of them,
# and Winograd's by the width of its tiles, which are 2 high. csrc/conv_bn_act/cpu.cpp counts them
# so, too.
DIRECT, PAIRS, TILES, WINOGRAD = 0, 1, 3, (2, 4)
INSTRUCTIONS = {PAIRS: "avx512_bf16", TILES: "amx"}  # without these, plain C++ stands in
DTYPES = (torch.float32, torch.bfloat16, torch.float16)

# A model of the time that a convolution takes on one core, in nanoseconds, for the choice between
# the algorithms alone: products at 44 per nanosecond, weights at 12 bytes, and the transforms of a
# tile per point and channel. Measured with AVX2; the ratios are what matters.
PRODUCTS, BYTES = 44.0, 12.0
TRANSFORM = {2: 0.17, 4: 0.36}
PRODUCTS_OF_PAIRS, PRODUCTS_OF_TILES = 88.0, 600.0  # where the processor multiplies them

TILE = 32  # numbers that a tile multiplies at once
FEW = 16  # channels, so few of which are gathered with all taps for that


def algorithms(problem: Problem) -> tuple[int, ...]:
    """Those that can run ``problem``."""
    found = [DIRECT]
    if problem.dtype == torch.bfloat16:
        found += PAIRS, TILES
    kind = (problem.R, problem.S, *problem.stride, *problem.dilation)
    if kind == (3, 3, 1, 1, 1, 1) and not problem.has_prologue and problem.C >= PANEL:
        found += WINOGRAD
    return tuple(found)


def algorithm_of(problem: Problem) -> int:
    """The one of :func:`algorithms` that takes the least time, by a model of it."""
    if not problem.bytes_written:
        return DIRECT
    taps = problem.R * problem.S
    possible = [algorithm for algorithm in algorithms(problem) if not lacks_instructions(algorithm)]
    pixels = problem.N * problem.P * problem.Q

    def cost(algorithm: int) -> float:
        """Time per pair of an input and an output channel."""
        if algorithm == DIRECT:
            return taps * (pixels / PRODUCTS + 4 / BYTES)
        if algorithm == PAIRS:
            return taps * (pixels / PRODUCTS_OF_PAIRS + 2 / BYTES)
        if algorithm == TILES:
            depth = rows_of_tiles(problem.C, taps) * TILE
            return depth / problem.C * (pixels / PRODUCTS_OF_TILES + 2 / BYTES)
        tiles = problem.N * -(-problem.P // 2) * -(-problem.Q // algorithm)
        points = 4 * (algorithm + 2)
        transforms = TRANSFORM[algorithm] * (1 / problem.C + 1 / problem.K)
        return points * (tiles * (1 / PRODUCTS + transforms) + 4 / BYTES)

    return min(possible, key=cost)


def lacks_instructions(algorithm: int) -> str:
    """Why plain C++ would stand in for an algorithm's instructions; empty where it does not."""
    name = INSTRUCTIONS.get(algorithm)
    if name is None or name in extension.instruction_sets():
        return ""
    return f"the processor or the operating system has no {name}"


def rows_of_tiles(C: int, taps: int) -> int:
    """Tiles that hold the taps of a filter: each tap has its own but where channels are few."""
    return -(-taps * C // TILE) if C < FEW else taps * -(-C // TILE)


def lacks(dtype: torch.dtype, groups: int) -> str:
    """Why there is no such native convolution; empty where there is one."""
    if dtype not in DTYPES:
        return f"the native convolution computes in float32, bfloat16 and float16, got {dtype}"
    if groups != 1:
        return f"the native convolution has no groups, got {groups}"
    return "" if extension.has("cpu") else extension.status()["cpu"].reason


def why_not(problem: Problem) -> str:
    """Why the compiled op cannot run ``problem`` on CPU tensors; empty where it can."""
    if problem.projection is not None:
        return "the compiled convolution adds its residual without a projection"
    return lacks(problem.dtype, problem.groups)


@functools.cache
def left_to_onednn(dtype: torch.dtype) -> str:
    """Why "auto" leaves convolutions in ``dtype`` to oneDNN; empty where it does not."""
    # Processors with AMX multiply float16, too, and the native convolution widens it to float32.
    half = dtype == torch.float16 and torch.cpu._is_amx_tile_supported()
    return "oneDNN multiplies float16 as it is here" if half and not onednn.lacks(dtype) else ""


def converts(x: Tensor) -> bool:
    """Whether x is made channels_last before it is convolved: its channels lie apart."""
    return x.stride(1) != 1 and x.shape[1] > 1


def plan(
    problem: Problem, call: Call, parameters: Parameters,
    like: tuple[Tensor | None, ...], cache: DerivedWeights | None,
    algorithm: int | None = None,
) -> Callable[..., Tensor]:  # fmt: skip
    """What runs the problem, as (x, residual=None, input_gate=None, out=None, output_gate=None).

    ``like`` are examples of all but x; ``algorithm`` overrides
    :func:`algorithm_of`.
    """
    algorithm = algorithm_of(problem) if algorithm is None else algorithm
    packed, shift, affine = packed_of(problem, parameters, cache, algorithm)
    geometry = (problem.R, problem.S, *problem.stride, *problem.padding, *problem.dilation)
    options = (*geometry, code(problem.act), algorithm)
    size, dtype = (problem.N, problem.K, problem.P, problem.Q), problem.dtype

    def run(x, residual=None, input_gate=None, out=None, output_gate=None):
        if converts(x):
            x = x.contiguous(memory_format=torch.channels_last)
        if residual is not None and not is_pixel_matrix(residual):
            residual = residual.contiguous(memory_format=torch.channels_last)
        if input_gate is not None:
            input_gate = input_gate.to(dtype).contiguous()
        if output_gate is not None:
            output_gate = output_gate.to(dtype).contiguous()
        y = out
        if out is None or not is_pixel_matrix(out):
            y = new_channels_last(x, size)
        convolution(x, packed, shift, y, residual, affine, input_gate, output_gate, *options)
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
    gates = [t for t in (gate, output_gate) if t is not None]
    if not all(t.is_contiguous() and t.dtype == problem.dtype for t in gates):
        return run
    layout, nchw = torch.channels_last, converts(x)
    x = x.contiguous(memory_format=layout) if nchw else x
    y = out
    if out is None:
        size = (problem.N, problem.K, problem.P, problem.Q)
        y = new_channels_last(x, size)
    work = native.direct(lambda: run(x, residual, gate, y, output_gate))
    weight, shift, affine = (0 if t is None else t.data_ptr() for t in held)
    new_result = maker(y)

    def run_directly(x, residual=None, input_gate=None, out=None, output_gate=None):
        if nchw:
            x = x.contiguous(memory_format=layout)
        y = new_result() if out is None else out
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
    problem: Problem, parameters: Parameters, cache: DerivedWeights | None, algorithm: int
) -> tuple[Tensor, Tensor, Tensor | None]:
    """The folded and packed weight, its shift, and scale and shift of the prologue's norm."""
    weight, bias, bn, input_bn = parameters[:4]

    def build() -> tuple[Tensor, Tensor]:
        folded, shift = fold(weight, bias, bn, torch.float32)
        return pack(folded, algorithm, pairs, bands), F.pad(shift, (0, -shift.shape[0] % PANEL))

    def scale_and_shift() -> Tensor:
        like = torch.empty(problem.C, 0, device="cpu")
        return torch.cat(scale_shift(None, input_bn, like, torch.float64)).detach().float()

    # Rows of an image get a channel more.
    pairs = problem.dtype == torch.bfloat16
    bands = problem.C < 16 and not problem.has_prologue and problem.dilation[1] == 1
    sources = sources_of(weight, bias, bn)
    form = ("native", algorithm, pairs, bands, bn and bn.eps)
    packed, shift = derived(cache, form, sources, build)
    if input_bn is None:
        return packed, shift, None
    key = ("native input", input_bn.eps)
    return packed, shift, derived(cache, key, input_bn[:4], scale_and_shift)


def pack(weight: Tensor, algorithm: int, pairs: bool = False, bands: bool = False) -> Tensor:
    """weight[K, C, R, S] as [K/16, R, S, C, 16], or at Winograd's points [points, K/16, C, 16].

    In pairs as [K/16, R * S * C / 2, 16, 2] in bfloat16, which is given as floats of as many bits;
    with ``bands`` each tap has whole pairs, or for products of floats each row of taps, and for
    tiles each tap, or each filter of few channels, whole rows of them. Channels past K are zero,
    and so is what completes pairs and rows.
    """
    with torch.no_grad():
        if algorithm in WINOGRAD:
            points = weight.new_empty(shape_at_points(weight, algorithm))
            to_points(weight, False, algorithm, points)
            return points
        K, C = weight.shape[:2]
        whole = F.pad(weight, (0, 0, 0, 0, 0, 0, 0, -K % PANEL)) if K % PANEL else weight
        panels = whole.unflatten(0, (-1, PANEL))  # [K/16, 16, C, R, S]
        if algorithm == DIRECT and not pairs:
            return panels.permute(0, 3, 4, 2, 1).contiguous()
        taps = panels.bfloat16().permute(0, 3, 4, 2, 1)  # [K/16, R, S, C, 16]
        step = TILE if algorithm == TILES else 2
        # From which dimension on, [R, S, C] are taken together and completed.
        whole_taps = bands and algorithm == PAIRS or C >= FEW and algorithm == TILES
        together = 3 if whole_taps else 2 if bands and algorithm == DIRECT else 1
        rows = taps.flatten(together, 3)
        rows = F.pad(rows, (0, 0, 0, -rows.shape[-2] % step)).flatten(1, -2)
        return rows.unflatten(1, (-1, 2)).transpose(2, 3).contiguous().view(torch.float32)


def shape_at_points(weight: Tensor, algorithm: int) -> tuple[int, ...]:
    """That of weight[K, C, 3, 3] at Winograd's points: [points, K/16, C, 16]."""
    K, C = weight.shape[:2]
    return 4 * (algorithm + 2), -(-K // PANEL), C, PANEL
