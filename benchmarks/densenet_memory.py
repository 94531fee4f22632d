"""What autograd keeps of a DenseNet's training pass: ``python -m benchmarks.densenet_memory``.

MB per image of 224 x 224 in bfloat16, distinct storages, parameters and buffers aside; counted on
the meta device, so that nothing is computed. The stock column needs torchvision.
"""

from __future__ import annotations

import importlib.util

from autograd_memory import megabytes_per_image

from cvkernels import models
from cvkernels.tables import text_table

LAYERS = {"densenet121": 58, "densenet169": 82, "densenet201": 98}


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
