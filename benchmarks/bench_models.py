"""The five networks in eval: stock PyTorch, its compilers, other runtimes, and ours, in one run.

``python -m benchmarks models [--network NAME] [--batch N] [--dtype NAME]`` prints the table
(``--help``: options). Each network has seeded random weights and the batch statistics of the
photographs that it is run on. Times are latencies, as the caller sees them.
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
from benchmarks.harness.case import Case
from cvkernels.demo import NETWORKS, load_photos, stock_and_ours

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
    photos = photographs()
    rounds = range(-(-batch // len(photos)))
    images = torch.cat([photos.roll((7 * i, 5 * i), (2, 3)) for i in rounds])[:batch]
    x = images.to(device, dtype).contiguous()
    return (x, x.contiguous(memory_format=torch.channels_last)), {}


def of_nchw(function: Callable[[Tensor], Tensor]) -> Callable[[Tensor, Tensor], Tensor]:
    return lambda nchw, nhwc: function(nchw)


def of_nhwc(function: Callable[[Tensor], Tensor]) -> Callable[[Tensor, Tensor], Tensor]:
    return lambda nchw, nhwc: function(nhwc)


def case_of(name: str, batch: int, dtype: torch.dtype, device: torch.device) -> Case:
    networks = functools.partial(networks_of, name, dtype, device)

    def reference(nchw: Tensor, nhwc: Tensor) -> Tensor:
        stock, _, exact, _ = networks()
        return (exact if nhwc.dtype == torch.float64 else stock)(nhwc)

    def inputs() -> tuple[tuple, dict]:
        networks()  # made before any variant, none of which pays for it
        peers.warm_up()
        return inputs_of(batch, dtype, device)

    def on_stock(peer: Callable, layout: Callable = of_nhwc) -> Callable[[], Callable]:
        def make() -> Callable:
            examples = inputs_of(batch, dtype, device)[0]
            model = networks().stock if layout is of_nhwc else networks().stock_nchw
            return layout(peer(model, examples[layout is of_nhwc]))

        return make

    def on_ours(deploy: Callable) -> Callable[[], Callable]:
        return lambda: of_nhwc(deploy(networks().ours, inputs_of(batch, dtype, device)[0][1]))

    variants = {
        "eager channels_last": on_stock(_live),
        "eager NCHW": on_stock(_live, of_nchw),
        "compile": on_stock(peers.compiled),
        "compile freezing": on_stock(peers.frozen),
    }
    if device.type == "cuda":
        variants["compile max-autotune"] = on_stock(peers.autotuned)
        variants["eager graph"] = on_stock(peers.graphed)
        if importlib.util.find_spec("torch_tensorrt"):
            variants["tensorrt"] = on_stock(peers.tensorrt)
    else:
        variants["openvino"] = on_stock(peers.openvino, of_nchw)
        variants["onnxruntime"] = on_stock(peers.onnxruntime, of_nchw)
    variants["cvkernels"] = on_ours(_live)
    if device.type == "cuda":
        variants["cvkernels graph"] = on_ours(peers.graphed)
    if hasattr(cvkernels, "freeze"):
        variants["cvkernels freeze"] = on_ours(cvkernels.freeze)
    return Case(
        op=name,
        name=f"batch {batch}",
        shape=f"{batch}x3x224x224",
        dtype=dtype,
        inputs=inputs,
        reference=reference,
        variants=variants,
        part="inference",
        network=True,
    )


def _live(model: nn.Module, example: Tensor) -> nn.Module:
    return model


def cases(
    device: torch.device,
    dtypes: Iterable[torch.dtype],
    batches: Iterable[int],
    networks: Iterable[str] = tuple(NETWORKS),
) -> list[Case]:
    return [
        case_of(name, batch, dtype, device)
        for name in networks
        for dtype in dtypes
        for batch in batches
    ]
