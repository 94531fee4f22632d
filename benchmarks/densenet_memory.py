"""What autograd keeps of a DenseNet's training pass: ``python -m benchmarks.densenet_memory``.

MB per image of 224 x 224 in bfloat16, distinct storages, parameters and buffers aside; counted on
the meta device, so that nothing is computed. The stock column needs torchvision.
"""

from __future__ import annotations

import importlib.util

import torch
from torch import Tensor, nn

from cvkernels import models
from cvkernels.tables import text_table

LAYERS = {"densenet121": 58, "densenet169": 82, "densenet201": 98}


def saved_bytes(model: nn.Module, x: Tensor) -> int:
    """Bytes of the storages that autograd keeps of ``model(x)``, the model's own aside."""
    own = {t.untyped_storage()._cdata for t in (*model.parameters(), *model.buffers())}
    kept = {}

    def pack(tensor: Tensor) -> Tensor:
        kept[tensor.untyped_storage()._cdata] = tensor  # alive: no other takes its address
        return tensor

    with torch.autograd.graph.saved_tensors_hooks(pack, lambda tensor: tensor):
        model(x)
    return sum(t.untyped_storage().nbytes() for key, t in kept.items() if key not in own)


def megabytes_per_image(model: nn.Module, batch: int = 8) -> float:
    model = model.to(device="meta", dtype=torch.bfloat16).train()
    x = torch.empty(batch, 3, 224, 224, dtype=torch.bfloat16, device="meta")
    return saved_bytes(model, x) / batch / 1e6


def table() -> str:
    columns = [lambda name: getattr(models, name)()]
    columns.append(lambda name: getattr(models, name)(memory_efficient=True))
    header = ["network", "layers", "cvkernels", "per layer", "memory_efficient"]
    if importlib.util.find_spec("torchvision"):
        import torchvision

        columns.append(lambda name: getattr(torchvision.models, name)())
        header.append("stock")
    rows = []
    for name, layers in LAYERS.items():
        plain, *others = (megabytes_per_image(build(name)) for build in columns)
        texts = [f"{value:.2f}" for value in (plain, plain / layers, *others)]
        rows.append((name, layers, *texts))
    return text_table(tuple(header), rows)


if __name__ == "__main__":
    print(table())
