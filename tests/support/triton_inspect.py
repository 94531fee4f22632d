"""Compile a Triton launch for a GPU that is not there, and read what the code needs and uses.

Run as a script it reads cases of the op that its argument names from stdin, a JSON list, and prints
the list of their results. Tests call it so, by triton_compiled, since a process that has
TRITON_INTERPRET set cannot compile.
"""

from __future__ import annotations

import json
import sys

import torch

from benchmarks.machine_code import inspect_launch
from cvkernels.ops.common.norm import BatchNormParams
from cvkernels.ops.common.tiles import sm_count
from cvkernels.ops.conv_bn_act import tiles as conv_tiles
from cvkernels.ops.conv_bn_act import triton as conv_launches
from cvkernels.ops.conv_bn_act import triton_fold, tuning
from cvkernels.ops.conv_bn_act.problem import Problem
from cvkernels.ops.depthwise_conv_bn_act import triton as depthwise_launches
from cvkernels.ops.depthwise_conv_bn_act.tiling import tiling
from cvkernels.ops.squeeze_excite import tiles
from cvkernels.ops.squeeze_excite import triton as se_scale_launches
from tests.support.cases import depthwise_conv_bn_act


def conv_launch(case: dict):
    """Launch and operands of a case: ``problem`` with dtype as a word, ``arch``, and what differs
    from NHWC.

    Optional: ``config`` (the heuristic's), ``precision`` ("ieee"), ``nchw`` (False), ``affine``
    (False: whether the input's norm is only a scale and a shift, as in frozen plans).
    """
    fields = dict(case["problem"], dtype=getattr(torch, case["problem"]["dtype"]))
    for name in ("stride", "padding", "dilation"):
        fields[name] = tuple(fields[name])
    p = Problem(**fields)
    capability = divmod(case["arch"], 10)
    config = case.get("config")
    config = conv_tiles.Config(**config) if config else tuning.heuristic(p, capability)

    def image(*shape, nchw=False):
        layout = torch.contiguous_format if nchw else torch.channels_last
        return torch.empty(shape, dtype=p.dtype, device="meta", memory_format=layout)

    def bn(channels):
        vector = torch.empty(channels, device="meta")
        return BatchNormParams(vector, vector, vector, vector)

    def gate_of(channels):
        return torch.empty(p.N, channels, dtype=p.dtype, device="meta")

    nchw = case.get("nchw", False)
    x = image(p.N, p.C, p.H, p.W, nchw=nchw)
    weight = image(p.K, p.C // p.groups, p.R, p.S, nchw=nchw)
    bias = torch.empty(p.K, device="meta") if p.has_bias else None
    norm, input_norm = bn(p.K) if p.has_bn else None, bn(p.C) if p.has_input_bn else None
    if case.get("affine") and input_norm is not None:
        input_norm = BatchNormParams(*input_norm[:2])
    residual = image(p.N, p.K, p.P, p.Q) if p.has_residual else None
    gate = gate_of(p.C) if p.has_input_gate else None
    output_gate = gate_of(p.K) if p.has_output_gate else None
    out = image(p.N, p.K, p.P, p.Q)
    planned = conv_launches.plan_launch(
        p, x, weight, residual, gate, out, precision=case.get("precision", "ieee"), config=config,
        capability=capability, input_bn=input_norm, output_gate=output_gate,
    )  # fmt: skip
    data = (residual, input_norm, gate, out, None, output_gate)
    return planned.launch, planned.operands(x, weight, bias, norm, *data)


def se_scale_launch(case: dict):
    """Launch and operands of a case: ``kernel``, N, C, R, ``size`` = H = W, ``dtype`` (a word),
    ``act``, ``residual`` and ``nchw``.

    ``kernel`` is "squeeze", "finish", "excite", "hidden" or "out" (the two launches of excite),
    "scale", "shift", "backward" or "reduce", which is the backward that writes no gradient of x.
    """
    N, C, R, size = case["N"], case["C"], case["R"], case["size"]
    dtype, act = getattr(torch, case["dtype"]), case["act"]
    layout = torch.contiguous_format if case["nchw"] else torch.channels_last

    def image():
        return torch.empty(N, C, size, size, dtype=dtype, device="meta", memory_format=layout)

    def empty(*shape, dtype=dtype):
        return torch.empty(shape, dtype=dtype, device="meta")

    x, gate = image(), empty(N, C, dtype=torch.float32)
    residual = image() if case["residual"] else None
    launches, sms = se_scale_launches, sm_count(divmod(case["arch"], 10))
    if case["kernel"] == "squeeze":
        sums = empty(*launches.parts_shape(x, sms), dtype=torch.float32)
        return launches.squeeze_launch(x, 1, sms), (x, sums)
    if case["kernel"] == "finish":
        return launches.finish_launch((N, 4, C)), (
            empty(N, 4, C, dtype=torch.float32), gate, gate,
        )  # fmt: skip
    if case["kernel"] in ("excite", "hidden", "out"):
        weight1, bias1, weight2, bias2 = empty(R, C), empty(R), empty(C, R), empty(C)
        shape = launches.parts_shape(x, sms)
        tile = tiles.excite(*shape, R, C, dtype.itemsize, sms)
        sums = empty(*shape, dtype=torch.float32)
        if case["kernel"] == "excite":
            launch = launches.excite_launch(shape, R, C, "relu", False, size * size, tile)
            return launch, (sums, weight1, bias1, weight2, bias2, gate)
        hidden = empty(tile.splits, N, R, dtype=torch.float32)
        if case["kernel"] == "hidden":
            launch = launches.excite_hidden_launch(shape, R, size * size, tile)
            return launch, (sums, weight1, hidden)
        launch = launches.excite_out_launch(N, R, C, "relu", False, tile)
        return launch, (hidden, bias1, weight2, bias2, gate)
    if case["kernel"] == "scale":
        launch = launches.se_scale_launch(x, residual, act, image())
        return launch, (x, gate, None, residual, image())
    if case["kernel"] == "shift":
        return launches.se_scale_launch(x, None, "none", image()), (x, gate, gate, None, image())
    parts = empty(*launches.parts_shape(x, sms, tiles.BACKWARD), dtype=torch.float32)
    kept = (residual if act == "silu" else None, image() if act == "relu" else None)
    made = (image() if case["kernel"] == "backward" else None, None if act == "none" else image())
    launch = launches.backward_launch(image(), x, *kept, act, sms)
    return launch, (image(), x, gate, *kept, *made, parts)


def depthwise_launch(case: dict):
    """Launch and operands of a case: ``shape`` (C, H = W, kernel, stride), ``batch``, ``dtype``."""
    dtype = getattr(torch, case["dtype"])
    C, size, kernel, _ = case["shape"]
    p = depthwise_conv_bn_act.problem_of(case["shape"], case["batch"], dtype)
    tiles = tiling(p, divmod(case["arch"], 10))

    def image(height, width):
        shape = (p.N, C, height, width)
        return torch.empty(shape, dtype=dtype, device="meta", memory_format=torch.channels_last)

    weight = torch.empty(kernel, kernel, C, dtype=dtype, device="meta")
    bn = BatchNormParams(*(torch.empty(C, device="meta") for _ in range(4)))
    x, out, sums = image(size, size), image(p.P, p.Q), torch.empty(p.N, C, device="meta")
    planned = depthwise_launches.plan_launch(p, x, weight, out, tiles)
    return planned.launch, planned.operands(x, weight, None, bn, out, sums)


def fold_launch(case: dict):
    """Launch and operands of a case: ``shape`` of the weight, ``dtype`` (a word)."""
    weight = torch.empty(*case["shape"], dtype=getattr(torch, case["dtype"]), device="meta")
    vectors = [torch.empty(weight.shape[0], device="meta") for _ in range(4)]
    norm = BatchNormParams(*vectors)
    return triton_fold.plan_launch(weight), triton_fold.operands(weight, None, norm)


LAUNCHES = {
    "conv_bn_act": conv_launch,
    "depthwise_conv_bn_act": depthwise_launch,
    "fold": fold_launch,
    "se_scale": se_scale_launch,
}


def main() -> None:
    plan = LAUNCHES[sys.argv[1]]
    results = []
    for case in json.load(sys.stdin):
        launch, operands = plan(case)
        results.append(inspect_launch(launch, operands, case["arch"]) | {"meta": launch.meta})
    json.dump(results, sys.stdout)


if __name__ == "__main__":
    main()
