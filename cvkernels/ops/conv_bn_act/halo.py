"""The compiled 3x3 convolution for few output channels: csrc/conv_bn_act/kernels.cuh, on CUDA.

A block keeps all weights in shared memory, and brings each patch of the input with its border there
once for all nine taps, where an implicit matrix product reads it nine times. It takes the weights
as a channels_last tensor and the norm's vectors as they are, so that live and frozen models run it
alike. How a problem is cut is chosen here, by a model of the time.
"""

from __future__ import annotations

import functools
import itertools
from collections.abc import Callable, Iterator
from typing import NamedTuple

import torch
from torch import Tensor

from cvkernels import backend as backends
from cvkernels.ops.common import native
from cvkernels.ops.common.activation import code
from cvkernels.ops.common.convolution import new_output
from cvkernels.ops.common.derived_weights import DerivedWeights, derived
from cvkernels.ops.common.dispatch import Call
from cvkernels.ops.common.norm import NO_VECTORS, vectors_of
from cvkernels.ops.common.tiles import INT32_MAX, cdiv, sm_count
from cvkernels.ops.conv_bn_act.problem import OP, Parameters, Problem

DTYPES = (torch.float16, torch.bfloat16)
ALIGNMENT = 16  # bytes, 8 channels
WARPS = 8
STRIP = 8  # pixels of a row of a strip: half the rows of a product
PRODUCT = 16  # channels that one product sums over
MOST_COLUMNS = 128  # output channels

# Shared memory that a block can have, by compute capability; for others, the least of these.
SHARED_MEMORY = {(8, 0): 163 << 10, (8, 7): 163 << 10, (9, 0): 227 << 10, (10, 0): 227 << 10}
LEAST_SHARED_MEMORY = 99 << 10

# A model of the time, in clocks of a multiprocessor; nothing in it was measured. mma.sync
# multiplies and adds so many pairs a clock on an H100, half of what wgmma does; shared memory and
# L2 move so many bytes, these not before LATENCY clocks. Beside the products a thread issues so
# many instructions for 16 bytes that it copies and for an output. A tile and a launch cost so many
# clocks more, and products wait for their operands now and then.
PAIRS, SHARED_BYTES, L2_BYTES, LATENCY = 1024, 128, 30, 1100
COPY_ISSUES, OUTPUT_ISSUES, ISSUES = 45, 10, 4 * 0.65
TILE_CLOCKS, LAUNCH_CLOCKS, UTILISATION = 500, 3000, 0.85
MEASURED = 4  # tiles that cvkernels.tune measures
# At most so often the bytes of x and of the output come from L2, if there is a tile that does so.
MOST_READ = 1.6

library = torch.library.Library("cvkernels", "FRAGMENT")
library.define(
    "conv_bn_act_halo(Tensor x, Tensor weight, Tensor(a!) out, Tensor? bias, Tensor? bn_weight, "
    "Tensor? bn_bias, Tensor? bn_mean, Tensor? bn_var, float bn_eps, int act, int rows, "
    "int columns, int strips_h, int strips_w, int patches, int warps_n, int warps_c, int slices, "
    "int stages) -> ()"
)
native.writes(library, "conv_bn_act_halo")
_halo = torch.ops.cvkernels.conv_bn_act_halo.default


class Tile(NamedTuple):
    """How a problem is cut, in the words of csrc/conv_bn_act/halo.h.

    A patch is ``strips_h`` x ``strips_w`` strips, each ``rows`` high, and a border of one pixel;
    a block multiplies ``patches`` of them at once. A warp has two strips and 8 * ``columns`` output
    channels. ``slices`` times 16 input channels are copied together, into one of ``stages``.
    """

    rows: int
    columns: int
    strips_h: int
    strips_w: int
    patches: int
    warps_n: int
    warps_c: int
    slices: int
    stages: int

    @property
    def name(self) -> str:
        """What tells it from the others of a problem; a table of ``cvkernels.tune`` has it."""
        patch = f"{self.patches}x{self.strips_h}x{self.strips_w}"
        return f"halo {self.rows}x{self.columns} {patch} c{self.warps_c}"

    @property
    def size(self) -> tuple[int, int]:
        """Outputs of a patch, down and across."""
        return self.strips_h * self.rows, self.strips_w * STRIP

    @property
    def all_columns(self) -> int:
        """Output channels with their padding."""
        return self.warps_n * self.columns * 8

    @property
    def stage_bytes(self) -> int:
        height, width = self.size
        octets, pixels = 2 * self.slices, self.patches * (height + 2) * (width + 2)
        plane = pixels + (max(1, 8 // octets) - pixels) % 8
        sums = WARPS // 2 * self.rows * self.columns * 32 if self.warps_c > 1 else 0
        return 16 * max(octets * plane, sums)


def weight_bytes(problem: Problem, tile: Tile) -> int:
    """Of the weights in shared memory."""
    return 9 * cdiv(problem.C, PRODUCT) * PRODUCT * tile.all_columns * 2


def shared_bytes(problem: Problem, tile: Tile) -> int:
    """Shared memory of a block: the weights, the stages, and a scale and a shift of each output."""
    return weight_bytes(problem, tile) + tile.stages * tile.stage_bytes + 8 * tile.all_columns


def patches_of_image(problem: Problem, tile: Tile) -> tuple[int, int]:
    """Patches down and across."""
    height, width = tile.size
    return cdiv(problem.H, height), cdiv(problem.W, width)


def map_bytes(problem: Problem, tile: Tile) -> int:
    """What L2 gives and takes of x and the output: every patch's part of the image, once."""

    def read(size: int, step: int) -> int:
        starts = range(0, size, step)
        return sum(min(start + step + 1, size) - max(start - 1, 0) for start in starts)

    height, width = tile.size
    pixels = problem.N * read(problem.H, height) * read(problem.W, width)
    return problem.dtype.itemsize * pixels * problem.C + problem.bytes_written


def tiles_of(problem: Problem, tile: Tile) -> int:
    down, across = patches_of_image(problem, tile)
    return cdiv(problem.N * down * across, tile.patches)


class Clocks(NamedTuple):
    """What a tile takes of a multiprocessor: its matrix units, shared memory, L2, issue slots."""

    products: float
    shared: float
    l2: float
    issues: float


def clocks(problem: Problem, tile: Tile) -> Clocks:
    rows, columns, slices = tile.rows, tile.columns, cdiv(problem.C, PRODUCT)
    whole, rest = divmod(slices, tile.slices)
    steps = WARPS * (whole * cdiv(tile.slices, tile.warps_c) + cdiv(rest, tile.warps_c))
    products = steps * 9 * rows * columns
    loads = steps * 3 * (rows + 2 + 3 * columns // 2)  # 512 bytes each
    copied = cdiv(slices, tile.slices) * tile.stage_bytes
    moved = map_bytes(problem, tile) / max(1, tiles_of(problem, tile))
    ahead = (tile.stages - 1) * tile.stage_bytes
    issues = products + loads + copied / 512 * COPY_ISSUES
    issues += WARPS * rows * columns * 4 * OUTPUT_ISSUES
    return Clocks(
        products * (16 * 8 * PRODUCT) / PAIRS,
        (loads * 512 + copied) / SHARED_BYTES,
        moved / min(L2_BYTES, ahead / LATENCY),
        issues / ISSUES,
    )


def launch_clocks(problem: Problem, tile: Tile, multiprocessors: int) -> float:
    """The model's time of a launch."""
    each = clocks(problem, tile)
    # Half of the warps write their sums for the other half, then half of these, and so on.
    summed = 2 * (tile.warps_c - 1) * tile.rows * tile.columns * WARPS / tile.warps_c * 512
    of_tile = max(each.products / UTILISATION, each.shared, each.l2, each.issues)
    of_tile += summed / SHARED_BYTES + TILE_CLOCKS
    # What a block waits for before its first product.
    weights = weight_bytes(problem, tile) / cdiv(cdiv(problem.C, PRODUCT), tile.slices)
    start = LAUNCH_CLOCKS + (weights + tile.stage_bytes) / L2_BYTES
    return start + cdiv(tiles_of(problem, tile), multiprocessors) * of_tile


def _tiles(problem: Problem, memory: int) -> Iterator[Tile]:
    """All that fit into so much shared memory, each with as many stages as fit."""
    all_slices = cdiv(problem.C, PRODUCT)
    # Two slices are 64 bytes of a pixel, which DRAM gives at once.
    slices = [n for n in (1, 2, 4, 8) if min(2, all_slices) <= n < 2 * all_slices]
    powers = (1, 2, 4, 8, 16)
    for rows, columns in itertools.product((4, 7), (2, 4)):
        warps_n = next(n for n in powers if n * columns * 8 >= problem.K)
        for warps_c, down, across, count in itertools.product(powers, powers, powers, slices):
            strips = 2 * WARPS // (warps_n * warps_c)
            if strips < 2 or down * across > strips or count < warps_c:
                continue
            cut = (rows, columns, down, across, strips // (down * across), warps_n, warps_c, count)
            deepest = (Tile(*cut, stages) for stages in (4, 3, 2))
            yield from [t for t in deepest if shared_bytes(problem, t) <= memory][:1]


@functools.lru_cache(maxsize=4096)
def tiles(problem: Problem, capability: tuple[int, int]) -> tuple[Tile, ...]:
    """Those that may be the fastest, each of another kernel or split, that of the rule first."""
    memory = SHARED_MEMORY.get(capability, LEAST_SHARED_MEMORY)
    multiprocessors = sm_count(capability)
    compulsory = problem.dtype.itemsize * problem.N * problem.H * problem.W * problem.C
    compulsory += problem.bytes_written

    def cost(tile: Tile) -> tuple[float, ...]:
        excess = max(0.0, map_bytes(problem, tile) / max(compulsory, 1) - MOST_READ)
        return excess, launch_clocks(problem, tile, multiprocessors)

    best: dict[tuple, Tile] = {}
    for tile in sorted(_tiles(problem, memory), key=cost):
        best.setdefault((tile.rows, tile.columns, tile.warps_c), tile)
    return tuple(best.values())[:MEASURED]


def tile_of(problem: Problem, capability: tuple[int, int]) -> Tile | None:
    """The tile of the least time, by the model of it; None where none fits."""
    return next(iter(tiles(problem, capability)), None)


def unfit(problem: Problem) -> str:
    """Why the kernel cannot run ``problem`` on any GPU; empty where it can."""
    p = problem
    if p.dtype not in DTYPES:
        return f"the halo kernel computes in float16 and bfloat16, got {p.dtype}"
    if (p.R, p.S, *p.stride, *p.padding, *p.dilation, p.groups) != (3, 3, 1, 1, 1, 1, 1, 1, 1):
        return "the halo kernel is for 3x3 taps, stride, padding and dilation 1, and one group"
    if p.has_prologue or p.has_output_gate or p.has_residual or p.projection is not None:
        return "the halo kernel has no prologue (input_bn, input_gate), no gates and no residual"
    if p.C % 8 or p.K % 8 or p.K > MOST_COLUMNS:
        return (
            f"the halo kernel needs channels in multiples of 8, and at most {MOST_COLUMNS} of the "
            f"output, got C = {p.C} and K = {p.K}"
        )
    if max(p.H, p.W) >= 1 << 20 or p.N * p.H * p.W > INT32_MAX:
        return "the halo kernel counts pixels in 31 bits; split the batch"
    return ""


def why_not(problem: Problem, x: Tensor) -> str:
    """Why the kernel cannot run ``problem`` on the GPU of ``x``; empty where it can."""
    if reason := unfit(problem) or native.why_not(OP, x, "cuda"):
        return reason
    if tile_of(problem, backends.gpu(x)[1]) is None:
        sizes = f"C = {problem.C} and K = {problem.K}"
        return f"the weights of {sizes} do not fit into this GPU's shared memory"
    return ""


def packed(map_: Tensor) -> bool:
    """Whether every pixel's channels are whole units of 16 bytes."""
    each = ALIGNMENT // map_.element_size()
    size, stride = map_.shape, map_.stride()
    steps = [map_.storage_offset(), *(stride[d] for d in (0, 2, 3) if size[d] > 1)]
    return bool(stride[1] == 1 and all(step % each == 0 for step in steps))


def _aligned(tensor: Tensor) -> bool:
    return tensor.data_ptr() % ALIGNMENT == 0


def _laid_out(map_: Tensor) -> Tensor:
    if packed(map_) and _aligned(map_):
        return map_
    return map_.clone(memory_format=torch.channels_last)


def _dense(weight: Tensor) -> Tensor:
    if weight.is_contiguous(memory_format=torch.channels_last) and _aligned(weight):
        return weight
    return weight.clone(memory_format=torch.channels_last)


def plan(
    problem: Problem, call: Call, parameters: Parameters, like: tuple,
    cache: DerivedWeights | None, tile: Tile | None = None,
) -> Callable[..., Tensor]:  # fmt: skip
    """What runs the problem, as (x, residual=None, input_gate=None, out=None, output_gate=None).

    ``tile`` overrides :func:`tile_of`.
    """
    weight, bias, bn = parameters[:3]
    tile = tile or tile_of(problem, backends.gpu(call.x)[1])
    assert tile is not None  # see why_not
    weight = derived(cache, "halo", [weight], lambda: _dense(weight.detach()))
    options = (code(problem.act), *tile)
    kinds = (problem.dtype, torch.float32)

    def run(x, residual=None, input_gate=None, out=None, output_gate=None):
        x = _laid_out(x)
        writes = out is not None and packed(out) and _aligned(out)
        y = out if writes else new_output(problem, x.device)
        added = bias if bias is None or bias.dtype in kinds else bias.float()
        norm = NO_VECTORS if bn is None else vectors_of(bn, x)
        _halo(x, weight, y, added, *norm, *options)
        return y if out is None or writes else out.copy_(y)

    return run
