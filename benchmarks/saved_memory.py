"""``python -m benchmarks memory``: what autograd keeps of a training pass, ours and stock.

MB per image of 224 x 224 in bfloat16, distinct storages, parameters and buffers aside; counted on
the meta device, so that nothing is computed. Stock columns need torchvision, and timm for SENet.
"""

from __future__ import annotations

import importlib
import importlib.util
import warnings
from collections.abc import Callable

from torch import nn

from cvkernels import models
from cvkernels.tables import text_table
from tests.support.autograd_memory import megabytes_per_image

DENSENETS = ("densenet121", "densenet169", "densenet201")
NETWORKS = ("googlenet", "resnet50", *DENSENETS, "seresnet50", "efficientnet_b0")


def stock_of(name: str) -> Callable[..., nn.Module] | None:
    """The stock builder of a network; None where its library is missing."""
    library = "timm" if name.startswith("se") else "torchvision"
    if importlib.util.find_spec(library) is None:
        return None
    if library == "timm":
        return lambda **kwargs: importlib.import_module("timm").create_model(name, **kwargs)
    return getattr(importlib.import_module("torchvision").models, name)


def table() -> str:
    rows = []
    for name in NETWORKS:
        for kwargs in ({}, {"memory_efficient": True}) if name in DENSENETS else ({},):
            with warnings.catch_warnings():
                warnings.simplefilter("ignore", FutureWarning)  # GoogLeNet's default initialisation
                kept = megabytes_per_image(getattr(models, name)(**kwargs))
                stock = stock_of(name)
                theirs = None if stock is None else megabytes_per_image(stock(**kwargs))
            texts = ("", "") if theirs is None else (f"{theirs:.2f}", f"{kept / theirs:.2f}x")
            rows.append((name, "".join(kwargs), f"{kept:.2f}", *texts))
    return text_table(("network", "option", "cvkernels", "stock", "share"), rows)
