"""Arguments, by name, of every registered op on one map: what torch.library and checks ask."""

import functools
import math

import torch
from torch import Tensor

from tests.support.cases.conv_bn_act import make_bn


def registered_calls(x: Tensor, norm: bool = True) -> dict[str, dict]:
    """By op, arguments that are right; ``norm``: with a batch norm where there may be one."""
    bn = make_bn(x.shape[1], device=x.device) if norm else (None, None, None, None, 0.0)
    vectors = dict(zip(("weight", "bias", "mean", "var", "eps"), bn, strict=True))
    return {
        **_pools(x, vectors),
        **_convolutions(x, vectors),
        **_quantised(x),
        **_squeeze_excite(x),
        **_batch_norm(x, vectors),
    }


def _pools(x: Tensor, norm: dict) -> dict[str, dict]:
    window = {"kernel_size": (3, 3), "stride": (1, 1), "padding": (1, 1), "ceil_mode": False}
    largest = {"x": x, **window, "dilation": (1, 1)}
    mean = {"x": x, **window, "count_include_pad": False, "divisor_override": None, **norm}
    out, buffer = {"out": torch.zeros_like(x)}, torch.cat((x, x), 1)
    return {
        "max_pool": largest,
        "max_pool_out": largest | out,
        "avg_pool": mean,
        "avg_pool_out": mean | out,
        "dense_concat": {"buffer": buffer, "src": x, "start": x.shape[1], **norm, "relu": True},
    }


def _convolutions(x: Tensor, norm: dict) -> dict[str, dict]:
    N, C, H, W = x.shape
    padded = -(-C // 16) * 16  # channels, as the compiled ops have them in memory
    new, groups = functools.partial(torch.randn, dtype=x.dtype, device=x.device), math.gcd(C, 2)
    same = {
        "x": x, "bias": new(C), **{f"bn_{name}": value for name, value in norm.items()},
        "stride": [1, 1], "padding": [1, 1], "dilation": [1, 1], "act": "relu", "backend": "auto",
    }  # fmt: skip
    dense = same | {
        "weight": new(C, C // groups, 3, 3), "groups": groups, "residual": x + 1,
        **{f"in_{name}": value for name, value in norm.items()}, "gate": new(N, C),
    }  # fmt: skip
    depthwise = same | {"weight": new(C, 1, 3, 3)}
    out = torch.zeros_like(x, memory_format=torch.channels_last)
    pointwise = {
        "x": x, "weight": new(C * padded), "shift": new(padded), "out": out, "act": 1,
        "algorithm": 0,
        **dict.fromkeys(("residual", "input_affine", "input_gate", "output_gate")),
        **dict.fromkeys(("padding_h", "padding_w"), 0),
    }  # fmt: skip
    for option in ("kernel", "stride", "dilation"):
        pointwise |= {f"{option}_h": 1, f"{option}_w": 1}
    filters = {
        "weight": new(C, C, 3, 3), "reversed": True, "algorithm": 2,
        "points": new(16 * padded * C),
    }  # fmt: skip
    gradient = {
        "grad": x + 1, "x": x, "padding_h": 1, "padding_w": 1, "algorithm": 4,
        "out": new(C, C, 3, 3),
    }  # fmt: skip
    packed = {
        "x": x, "weight": new(9 * padded), "affine": new(2 * padded), "kernel": 3, "stride": 1,
        "padding_h": 1, "padding_w": 1, "spread": 1, "act": 3, "out": new(N, H, W, C),
        "sums": new(N, C),
    }  # fmt: skip
    gradient_of_taps = {
        "grad": new(N, H, W, C), "x": x, "kernel": 3, "stride": 1, "padding_h": 1, "padding_w": 1,
        "out": new(C, 1, 3, 3),
    }  # fmt: skip
    return {
        "conv_bn_act": dense,
        "conv_bn_act_out": dense | {"backend": "reference", "out": out},
        "conv_bn_act_native": pointwise,
        "conv_bn_act_native_filters": filters,
        "conv_bn_act_native_weight_gradient": gradient,
        "depthwise_conv_bn_act": depthwise,
        "depthwise_conv_bn_act_squeeze": depthwise,
        "depthwise_conv_bn_act_native": packed,
        "depthwise_conv_bn_act_native_weight_gradient": gradient_of_taps,
    }


def _quantised(x: Tensor) -> dict[str, dict]:
    """On bytes, and on the CPU alone."""
    x = (x.cpu() * 20 + 100).clamp(0, 255).byte()
    N, C, H, W = x.shape
    padded, channels = -(-C // 16) * 16, -(-C // 4) * 4
    out = torch.zeros_like(x, memory_format=torch.channels_last)
    dense = {
        "x": x, "weight": torch.randint(0, 9, (padded * channels,), dtype=torch.uint8).view(
            torch.float32
        ), "vectors": torch.rand(3 * padded) * 1e-9, "out": out, "residual": x.clone(),
        "input_affine": None, "input_gate": torch.rand(N, C), "output_gate": torch.rand(N, C),
        **dict.fromkeys(("padding_h", "padding_w"), 0), "act": 1, "zero": 3, "x_zero": 2.0,
        "gate_scale": 1.0, "offset": 1.0, "residual_scale": 0.5, "low": 1.0, "high": 255.0,
        "out_scale": 1.0, "out_zero": 0.0,
    }  # fmt: skip
    for option in ("kernel", "stride", "dilation"):
        dense |= {f"{option}_h": 1, f"{option}_w": 1}
    quads = torch.zeros(padded * 3 + padded)
    depthwise = {
        "x": x, "weight": torch.randint(-9, 9, (9 * padded,)).float(),
        "affine": torch.rand(2 * padded), "kernel": 3, "stride": 1, "padding_h": 1,
        "padding_w": 1, "act": 3, "x_zero": 3, "out_scale": 2.0, "out_zero": 9,
        "out": torch.zeros(N, H, W, C, dtype=torch.uint8), "sums": torch.zeros(N, C),
        "quads": quads,
    }  # fmt: skip
    line = {"x": x, "scale": 0.5, "shift": 3.0}
    return {
        "conv_bn_act_quantised": dense,
        "depthwise_conv_bn_act_quantised": depthwise,
        "quantised_map": line | {"fill": 3.0, "out": out},
        "quantised_mean": line | {"affine": torch.rand(2 * C), "out": torch.zeros(N, C)},
    }


def _squeeze_excite(x: Tensor) -> dict[str, dict]:
    N, C, _, _ = x.shape
    gate, *layers = (
        torch.randn(shape, dtype=x.dtype, device=x.device)
        for shape in ((N, C), (4, C), (4,), (C, 4), (C,))
    )
    layers = dict(zip(("weight1", "bias1", "weight2", "bias2"), layers, strict=True))
    sums = torch.zeros_like(gate)
    excite = {"pooled": gate, **layers, "sigmoid": True, "count": 0}
    scale, out = {"x": x, "gate": gate, "residual": x + 1}, {"out": torch.zeros_like(x)}
    block, auto = {"x": x, **layers, "residual": x + 1}, {"backend": "auto"}
    backward = {"grad": x + 1, "residual": x, "out": x, "act": "silu", "input_grad": True}
    return {
        "squeeze": {"x": x} | auto,
        "squeeze_native": {"x": x},
        "squeeze_native_out": {"x": x, "out": torch.zeros_like(gate)},
        "excite": excite | {"act": "relu"} | auto,
        "excite_native": excite | {"act": 2},
        "se_scale": scale | {"act": "silu"} | auto,
        "se_scale_shifted": {"x": x, "gate": gate, "shift": gate} | auto,
        "se_scale_backward": scale | backward | auto,
        "se_scale_native_out": scale | {"act": 1} | out,
        "se_scale_native_shifted": {"x": x, "scale": gate, "shift": gate} | out,
        "se_scale_native_sums": {"grad": x, "x": x, "out": x, "masked": out["out"], "sums": sums},
        "squeeze_excite": block | {"act": "silu", "out_act": "relu"} | auto,
        "squeeze_excite_native_out": block | {"act": 1, "out_act": 2} | out,
    }


def _batch_norm(x: Tensor, norm: dict) -> dict[str, dict]:
    C, out, ending = x.shape[1], {"out": torch.zeros_like(x)}, {"eps": 1e-5, "act": 1}
    rows = torch.rand(11, C, device=x.device)
    mean, var, slope, offset, d_weight, d_bias, running_mean = rows[:7].clone().unbind()
    given = norm | {"mean": mean, "var": var} | ending
    sums = {"d_weight": d_weight, "d_bias": d_bias, "slope": slope, "offset": offset}
    affine = {"weight": norm["weight"], "bias": norm["bias"]}
    running = {"running_mean": running_mean, "running_var": var.clone(), "factor": 0.1}
    vectors = {"x": x, "vectors": rows[7:].clone(), **ending}
    joined = {"output": x, "grad_residual": torch.zeros_like(x), "results": rows[:4].clone()}
    ops = {
        "statistics": {"x": x, "mean": mean, "var": var},
        "apply": {"x": x, **given, **out},
        "reduce": {"grad": x + 1, "x": x, **given, "total": torch.zeros_like(x), **sums},
        "input_gradient": {"grad": x + 1, "x": x, "mean": mean, "slope": slope, "offset": offset}
        | out,
        "forward": vectors | affine | running | {"residual": x + 1} | out,
        "recompute": vectors | {"residual": x + 1} | out,
        "backward": vectors | {"grad": x + 1} | joined | out,
        "finish": vectors | {"grad": x + 1, "results": rows[:4].clone()} | out,
    }
    return {f"batch_norm_act_{name}": arguments for name, arguments in ops.items()}
