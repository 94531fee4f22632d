"""Launches the Triton kernels of ``conv_bn_act``: one per call, two where it splits a reduction."""

from __future__ import annotations

import functools
import math
from dataclasses import replace
from typing import Any, NamedTuple

import torch
from torch import Tensor

from cvkernels import backend as backends
from cvkernels.ops.common.norm import BatchNormParams
from cvkernels.ops.common.tiles import INT32_MAX, cdiv, power_of_two
from cvkernels.ops.common.triton_launch import (
    INTERPRETED,
    Launch,
    activation,
    has_dependent_launch,
    norm_operands,
)
from cvkernels.ops.conv_bn_act import tiles, tuning
from cvkernels.ops.conv_bn_act.problem import Problem
from cvkernels.ops.conv_bn_act.tiles import Config
from cvkernels.ops.conv_bn_act.triton_kernels import (
    conv_bn_act_1x1_kernel,
    conv_bn_act_filter_row_kernel,
    conv_bn_act_finish_kernel,
    conv_bn_act_spatial_kernel,
)

_KERNELS = {
    "1x1": conv_bn_act_1x1_kernel,
    "spatial": conv_bn_act_spatial_kernel,
    "filter_row": conv_bn_act_filter_row_kernel,
}

# The place of the parts among a launch's operands.
_PARTS = 17
# Pixels and channels of a program that adds the parts of a split reduction.
_FINISH = (8, 64)


class Planned(NamedTuple):
    """A planned call, for any tensors with the strides that it was planned for."""

    launch: Launch
    # What adds the sums of a split reduction, and their shape [SPLIT_K, M, K]; None without.
    finish: Launch | None = None
    parts: tuple[int, int, int] | None = None

    def operands(
        self,
        x: Tensor, weight: Tensor, bias: Tensor | None, bn: BatchNormParams | None,
        residual: Tensor | None, input_bn: BatchNormParams | None, input_gate: Tensor | None,
        out: Tensor, projection: Tensor | None = None, output_gate: Tensor | None = None,
    ) -> tuple[Tensor | float | None, ...]:  # fmt: skip
        """The arguments in the order of the kernels' first parameters, with room for parts."""
        norm, input_norm = norm_operands(bn), norm_operands(input_bn)
        projected, added = (None, residual) if projection is None else (residual, None)
        operands = (x, weight, out, bias, *norm, added, *input_norm, input_gate, output_gate)
        if "SPLIT_K" not in self.launch.meta:
            return operands
        parts = self.parts and x.new_empty(self.parts, dtype=torch.float32)
        if "PROJECTED" not in self.launch.meta:
            return (*operands, parts)
        return (*operands, parts, projected, projection)

    def launches(self, *arguments: Any) -> list[tuple[Launch, tuple]]:
        """Each launch with its operands; takes what :meth:`operands` takes."""
        operands = self.operands(*arguments)
        made: list[tuple[Launch, tuple]] = [(self.launch, operands)]
        if self.finish is not None:
            out, bias_to_residual, output_gate = operands[2], operands[3:10], operands[_PARTS - 1]
            made.append((self.finish, (operands[_PARTS], out, *bias_to_residual, output_gate)))
        return made

    def __call__(self, *arguments: Any) -> None:
        """Compute the op; takes what :meth:`operands` takes."""
        if self.finish is None:
            self.launch(*self.operands(*arguments))
            return
        for launch, operands in self.launches(*arguments):
            launch(*operands)


def run(problem: Problem, *operands: Any, precision: str, config: Config | None = None) -> None:
    """Compute the op into its output, without a launch if that is empty.

    Takes what :meth:`Planned.operands` takes, checked by the op; the rest is as of
    :func:`plan_launch`.
    """
    x, weight, _, _, residual, _, gate, out, *others = operands
    if out.numel():
        like = (problem, x, weight, residual, gate, out)
        projection, output_gate = (*others, None, None)[:2]
        planned = plan_launch(
            *like, precision=precision, config=config, input_bn=operands[5],
            projection=projection, output_gate=output_gate,
        )  # fmt: skip
        planned(*operands)


def plan_launch(
    problem: Problem,
    x: Tensor, weight: Tensor, residual: Tensor | None, input_gate: Tensor | None, out: Tensor, *,
    precision: str, config: Config | None = None, capability: tuple[int, int] | None = None,
    input_bn: BatchNormParams | None = None, projection: Tensor | None = None,
    output_gate: Tensor | None = None,
) -> Planned:  # fmt: skip
    """The call for tensors with these strides, which may be on the meta device.

    ``precision`` is "ieee" or "tf32", for float32; ``config`` is :func:`tuning.choose`'s if None,
    ``capability`` that of x's device. ``input_bn`` tells which vectors the input's norm has: with
    more than a scale and a shift, a program takes 32 channels at once.

    Raises:
        ValueError: more output pixels than a launch can index.
    """
    name, found = backends.gpu(x)
    capability = capability or found
    config = config or tuning.choose(problem, name, capability)
    if problem.has_input_bn and (input_bn is None or input_bn.var is not None):
        config = replace(config, block_k=min(config.block_k, 32))
    of_residual = None if residual is None else residual.stride()
    of_gates = [(0, 0) if gate is None else gate.stride() for gate in (input_gate, output_gate)]
    strides = Strides(x.stride(), weight.stride(), out.stride(), of_residual, *of_gates)
    if projection is not None:
        strides = strides._replace(
            residual=None, projected=of_residual, projection=projection.stride()
        )
    return _plan(problem, config, precision, strides, capability)


class Strides(NamedTuple):
    """Those of a call's tensors, in elements."""

    x: tuple[int, ...]
    weight: tuple[int, ...]
    out: tuple[int, ...]
    residual: tuple[int, ...] | None
    gate: tuple[int, ...]
    output_gate: tuple[int, ...]
    projected: tuple[int, ...] | None = None
    projection: tuple[int, ...] | None = None


@functools.lru_cache(maxsize=4096)
def _plan(
    problem: Problem, config: Config, precision: str, strides: Strides, capability: tuple[int, int]
) -> Planned:
    p, name = problem, tiles.kernel(problem)
    programs, pixels = tiles.programs(problem, config), p.N * p.P * p.Q
    if pixels > INT32_MAX - config.block_m or programs > INT32_MAX:
        raise ValueError(
            f"conv_bn_act: out may have at most 2^31 pixels N * P * Q for the Triton kernels, "
            f"got {p.N} * {p.P} * {p.Q}; split the batch"
        )
    lanes, shapes = 16 // p.dtype.itemsize, _shapes(p)
    x_vec = _vec(lanes, shapes.x, strides.x)
    weight_vec = _vec(lanes, shapes.weight, strides.weight)
    out_vec = _vec(lanes, shapes.out, strides.out, strides.residual)
    after = _after(problem, strides, out_vec, has_dependent_launch(capability))
    meta: dict[str, Any] = {
        "STRIDE_H": p.stride[0], "STRIDE_W": p.stride[1], "PRECISION": precision,
        "INPUT_BN": p.has_input_bn, "X_VEC": x_vec, "WEIGHT_VEC": weight_vec,
        "PACKED": p.dtype.itemsize == 2 and not INTERPRETED, **after, "BLOCK_M": config.block_m,
        "BLOCK_N": config.block_n, "BLOCK_K": config.block_k,
        "num_warps": config.num_warps, "num_stages": config.num_stages,
        **_of_kernel(problem, config, strides),
    }  # fmt: skip
    # float32 gathers hoist loads until they spill where they are given registers
    gathers = name == "filter_row" and p.dtype.itemsize == 4
    if not gathers and not tiles.alone(config.block_m, config.block_n):
        meta["maxnreg"] = tiles.registers(config.num_warps, p.dtype.itemsize, capability)
    channels = () if name == "filter_row" else (p.C // x_vec,)
    size = () if name == "1x1" else (p.H, p.W)
    of_weight = _packs(strides.weight, weight_vec)
    of_out = _packs(strides.out, out_vec)
    of_residual = _packs(strides.residual or (0, 0, 0, 0), out_vec)
    fixed = (
        pixels, *channels, p.K // out_vec, *size, p.P, p.Q, *_packs(strides.x, x_vec),
        *(of_weight[:2] if name == "1x1" else of_weight), *of_out, *of_residual,
        *strides.gate, *strides.output_gate,
        *(_of_projection(problem, config, strides)[0] if name == "1x1" else ()),
    )  # fmt: skip
    grid = (programs,) if config.split_k == 1 else (programs, config.split_k)
    launch = Launch(_KERNELS[name], grid, fixed, meta)
    if config.split_k == 1:
        return Planned(launch)
    block_m, block_n = _FINISH
    meta = {**after, "SPLIT_K": config.split_k, "BLOCK_M": block_m, "BLOCK_N": block_n}
    fixed = (pixels, p.K // out_vec, p.P, p.Q, *of_out, *of_residual, *strides.output_gate)
    grid = (cdiv(pixels, block_m) * cdiv(p.K, block_n),)
    finish = Launch(conv_bn_act_finish_kernel, grid, fixed, {**meta, "num_warps": 2})
    return Planned(launch, finish, (config.split_k, pixels, p.K))


def _of_kernel(problem: Problem, config: Config, strides: Strides) -> dict[str, Any]:
    """The constants that the kernel of the problem has beside those of all."""
    p, name = problem, tiles.kernel(problem)
    even = p.groups == 1 and p.C % config.block_k == 0
    if name == "1x1":
        # Of a wider tile it would take the registers of a second program.
        narrow = config.block_n <= 64 and config.num_warps == 8 and p.dtype.itemsize == 2
        return {
            "SPLIT_K": config.split_k, "EVEN_C": even, "PER_IMAGE": p.has_input_gate,
            "FLAT_X": p.stride == (1, 1) and _flat(strides.x, p.H, p.W),
            "EARLY_RESIDUAL": p.has_residual and narrow and config.split_k == 1,
            **_of_projection(problem, config, strides)[1],
        }  # fmt: skip
    window = {
        "R": p.R, "S": p.S, "PADDING_H": p.padding[0], "PADDING_W": p.padding[1],
        "DILATION_H": p.dilation[0], "DILATION_W": p.dilation[1],
    }  # fmt: skip
    if name == "filter_row":
        row = power_of_two(max(p.S * p.C, 16))
        inner = strides.x[1] <= strides.x[3]
        return {**window, "C": p.C, "CHANNELS_INNER": inner, "BLOCK_K": row}
    return {
        **window, "SPLIT_K": config.split_k, "EVEN_C": even, "C_GROUP": p.C // p.groups,
        "K_GROUP": p.K // p.groups if p.groups > 1 else 0,
        "C_STEPS": cdiv(tiles.group_span(p, config.block_n), config.block_k),
    }  # fmt: skip


def _of_projection(
    problem: Problem, config: Config, strides: Strides
) -> tuple[tuple[int, ...], dict[str, Any]]:
    """The last sizes and strides of the 1x1 kernel, and its constants, of the projection."""
    projection, shapes = problem.projection, _shapes(problem)
    x_vec = weight_vec = 1
    sizes: tuple[int, ...] = (0,) * 7
    if projection is not None and shapes.projected is not None and shapes.projection is not None:
        assert strides.projected is not None and strides.projection is not None
        lanes = 16 // problem.dtype.itemsize
        x_vec = _vec(lanes, shapes.projected, strides.projected)
        weight_vec = _vec(lanes, shapes.projection, strides.projection)
        of_weight = _packs(strides.projection, weight_vec)[:2]
        sizes = (projection.C // x_vec, *_packs(strides.projected, x_vec), *of_weight)
    step_h, step_w = (1, 1) if projection is None else projection.stride
    return sizes, {
        "PROJECTED": projection is not None, "PROJECTED_STRIDE_H": step_h,
        "PROJECTED_STRIDE_W": step_w, "PROJECTED_VEC": x_vec, "PROJECTION_VEC": weight_vec,
        "PROJECTED_EVEN_C": projection is not None and projection.C % config.block_k == 0,
    }  # fmt: skip


def _after(problem: Problem, strides: Strides, vec: int, dependent: bool) -> dict[str, Any]:
    """The constants of what follows the products, in this launch or the second one."""
    p = problem
    # strides of a residual that is not there count as flat
    flat = _flat(strides.out, p.P, p.Q)
    flat = flat and (strides.residual is None or _flat(strides.residual, p.P, p.Q))
    last = max(map(_last, _shapes(p), strides))
    meta = {"ACT": activation(p.act, p.dtype), "FLAT_OUT": flat, "OUT_VEC": vec}
    # with room for what is computed and not read: a tile's rows past the end
    meta["INT64"] = last + 512 * p.K > INT32_MAX
    return {**meta, "PDL": dependent, **({"launch_pdl": True} if dependent else {})}


def _shapes(problem: Problem) -> Strides:
    p = problem
    out = (p.N, p.K, p.P, p.Q)
    filters = (p.K, p.C // p.groups, p.R, p.S)
    shapes = Strides((p.N, p.C, p.H, p.W), filters, out, out, (p.N, p.C), (p.N, p.K))
    if (projection := p.projection) is None:
        return shapes
    # as much of it as is read
    height, width = ((n - 1) * s + 1 for n, s in zip((p.P, p.Q), projection.stride, strict=True))
    projected = (p.N, projection.C, height, width)
    return shapes._replace(projected=projected, projection=(p.K, projection.C, 1, 1))


def _vec(lanes: int, shape: tuple[int, ...], *strides: tuple[int, ...] | None) -> int:
    """Elements, up to ``lanes``, that every pixel of tensors with these strides starts at a
    multiple of, and has a multiple of; 1 where channels are not neighbours."""
    steps = [shape[1]]
    for of_tensor in strides:
        if of_tensor is not None:
            used = [s for n, s in zip(shape, of_tensor, strict=True) if n > 1]
            if shape[1] > 1:
                if of_tensor[1] != 1:
                    return 1
                used.remove(1)
            steps += used
    return math.gcd(lanes, *steps)


def _last(shape: tuple[int, ...] | None, strides: tuple[int, ...] | None) -> int:
    """The offset of a tensor's last element, 0 where there is none."""
    if shape is None or strides is None:
        return 0
    return sum((size - 1) * stride for size, stride in zip(shape, strides, strict=True))


def _packs(strides: tuple[int, ...], vec: int) -> tuple[int, ...]:
    """All but the channels' in packs of ``vec`` elements."""
    n, c, *spatial = strides
    return (n // vec, c, *(stride // vec for stride in spatial))


def _flat(strides: tuple[int, ...], height: int, width: int) -> bool:
    """Whether the pixels of a whole batch, row by row, lie at one common stride."""
    return strides[2] == width * strides[3] and strides[0] == height * strides[2]
