"""The five networks in eval: stock PyTorch, its compilers, other runtimes, and ours, in one run.

``python -m benchmarks models [--network NAME] [--batch N] [--dtype NAME]`` prints the table
(``--help``: options). Each network has seeded random weights and the batch statistics of the
photographs that it is run on. Times are latencies, as the caller sees them. With ``--dtype int8``
others and we quantise each network on the same images, and how far answers agree stands beside.
"""

from __future__ import annotations

import copy
import functools
import importlib.util
from collections.abc import Callable, Iterable
from typing import NamedTuple

import torch
from torch import Tensor, nn

import cvkernels
from benchmarks.harness import peers
from benchmarks.harness.case import Case, network_case
from benchmarks.harness.command_line import Refused
from cvkernels.demo import NETWORKS, load_photos, stock_and_ours
from cvkernels.photographs import shifted

BATCHES = {"cpu": (1, 16), "cuda": (1, 128)}


class Networks(NamedTuple):
    """One network, in eval, with the same weights: ``stock`` and ``exact`` in channels_last."""

    stock: nn.Module
    stock_nchw: nn.Module
    exact: nn.Module
    ours: nn.Module


@functools.lru_cache(maxsize=1)
def networks_of(name: str, dtype: torch.dtype, device: torch.device) -> Networks:
    """The last one is kept: its batch sizes and variants follow one another."""
    stock, ours = stock_and_ours(name, None, photographs().to(device))
    stock, ours = stock.to(dtype), ours.to(dtype)
    nchw = copy.deepcopy(stock).to(memory_format=torch.contiguous_format)
    return Networks(stock, nchw, copy.deepcopy(stock).double(), ours)


@functools.cache
def photographs() -> Tensor:
    return load_photos(())


def inputs_of(batch: int, dtype: torch.dtype, device: torch.device) -> tuple[tuple, dict]:
    """The batch in both layouts, so that no variant converts it: (NCHW, channels_last).

    The photographs over and over, each time shifted by some pixels.
    """
    images = shifted(photographs(), batch)
    x = images.to(device, dtype).contiguous()
    return (x, x.contiguous(memory_format=torch.channels_last)), {}


def of_nchw(function: Callable[[Tensor], Tensor]) -> Callable[[Tensor, Tensor], Tensor]:
    return lambda nchw, nhwc: function(nchw)


def of_nhwc(function: Callable[[Tensor], Tensor]) -> Callable[[Tensor, Tensor], Tensor]:
    return lambda nchw, nhwc: function(nhwc)


def live(model: nn.Module, example: Tensor) -> nn.Module:
    return model


def peers_on(device: torch.device) -> dict[str, tuple[Callable, Callable]]:
    """What stock runs as on this device, and the layout that it takes."""
    found = {
        "eager channels_last": (live, of_nhwc),
        "eager NCHW": (live, of_nchw),
        "compile": (peers.compiled, of_nhwc),
        "compile freezing": (peers.frozen, of_nhwc),
    }
    if device.type == "cuda":
        found["compile max-autotune"] = (peers.autotuned, of_nhwc)
        found["eager graph"] = (peers.graphed, of_nhwc)
        if importlib.util.find_spec("torch_tensorrt"):
            found["tensorrt"] = (peers.tensorrt, of_nhwc)
    else:
        found["openvino"] = (peers.openvino, of_nchw)
        found["onnxruntime"] = (peers.onnxruntime, of_nchw)
    return found


def ours_on(device: torch.device) -> dict[str, Callable]:
    graphed = {"cvkernels graph": peers.graphed} if device.type == "cuda" else {}
    return {"cvkernels": live, **graphed, "cvkernels freeze": cvkernels.freeze}


def case_of(name: str, batch: int, dtype: torch.dtype, device: torch.device) -> Case:
    networks = functools.partial(networks_of, name, dtype, device)

    def reference(nchw: Tensor, nhwc: Tensor) -> Tensor:
        return (networks().exact if nhwc.dtype == torch.float64 else networks().stock)(nhwc)

    def inputs() -> tuple[tuple, dict]:
        networks()  # made before any variant, none of which pays for it
        peers.warm_up()
        return inputs_of(batch, dtype, device)

    def made(deploy: Callable, layout: Callable, network: str) -> Callable:
        nchw, nhwc = inputs_of(batch, dtype, device)[0]
        return layout(deploy(getattr(networks(), network), nhwc if layout is of_nhwc else nchw))

    variants = {
        variant: functools.partial(
            made, peer, layout, "stock" if layout is of_nhwc else "stock_nchw"
        )
        for variant, (peer, layout) in peers_on(device).items()
    }
    for variant, deploy in ours_on(device).items():
        variants[variant] = functools.partial(made, deploy, of_nhwc, "ours")
    return network_case(
        name, batch, dtype, "inference", inputs=inputs, reference=reference, variants=variants
    )


# Images that a network is quantised on: the photographs over and over, each time shifted.
CALIBRATION = 128


def int8_case_of(name: str, batch: int, device: torch.device) -> Case:
    """A network in float32, and quantised by others and by us, on the same images."""
    networks = functools.partial(networks_of, name, torch.float32, device)

    def reference(nchw: Tensor, nhwc: Tensor) -> Tensor:
        return (networks().exact if nhwc.dtype == torch.float64 else networks().stock)(nhwc)

    def inputs() -> tuple[tuple, dict]:
        networks()
        return inputs_of(batch, torch.float32, device)

    def made(deploy: Callable, network: str, *images: Tensor) -> Callable:
        example = inputs_of(batch, torch.float32, device)[0][0]
        return of_nchw(deploy(getattr(networks(), network), example, *images))

    def quantised(deploy: Callable, network: str) -> Callable:
        return made(deploy, network, inputs_of(CALIBRATION, torch.float32, device)[0][0])

    def in_int8(tolerance: float) -> Callable:
        def freeze(model: nn.Module, example: Tensor, images: Tensor) -> nn.Module:
            return cvkernels.freeze(
                model, example, dtype=torch.int8, calibration=images, tolerance=tolerance
            )

        return freeze

    variants = {
        "eager channels_last": functools.partial(made, live, "stock"),
        "openvino int8": functools.partial(quantised, peers.openvino_int8, "stock_nchw"),
        "onnxruntime int8": functools.partial(quantised, peers.onnxruntime_int8, "stock_nchw"),
        "compile int8": functools.partial(quantised, peers.inductor_int8, "stock_nchw"),
        "cvkernels freeze": functools.partial(made, cvkernels.freeze, "ours"),
        "cvkernels int8": functools.partial(quantised, in_int8(float("-inf")), "ours"),
        "cvkernels int8, 30 dB": functools.partial(quantised, in_int8(30.0), "ours"),
    }
    return network_case(
        name, batch, torch.int8, "inference", inputs=inputs, reference=reference,
        variants=variants, rounds=True,
    )  # fmt: skip


def cases(
    device: torch.device,
    dtypes: Iterable[torch.dtype],
    batches: Iterable[int],
    networks: Iterable[str] = tuple(NETWORKS),
) -> list[Case]:
    if device.type != "cpu" and torch.int8 in dtypes:
        raise Refused("networks in int8 are for CPUs; leave out --dtype int8, or add --device cpu")
    return [
        int8_case_of(name, batch, device)
        if dtype == torch.int8
        else case_of(name, batch, dtype, device)
        for name in networks
        for dtype in dtypes
        for batch in batches
    ]
