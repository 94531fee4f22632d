"""What autograd keeps of a forward pass for its backward; the benchmarks count by it too."""

from collections.abc import Callable, Iterable

import torch
from torch import Tensor, nn


def saved_bytes(
    model: nn.Module, *args, run: Callable | None = None, owned: Iterable[Tensor] = ()
) -> int:
    """Bytes of the distinct storages that autograd keeps of ``model(*args)``, or ``run(*args)``.

    Without those of the model's parameters and buffers, and of ``owned``.
    """
    own = {t.untyped_storage()._cdata for t in (*model.parameters(), *model.buffers(), *owned)}
    kept = {}

    def pack(tensor: Tensor) -> Tensor:
        kept[tensor.untyped_storage()._cdata] = tensor  # alive: no other takes its address
        return tensor

    with torch.autograd.graph.saved_tensors_hooks(pack, lambda tensor: tensor):
        (run or model)(*args)
    return sum(t.untyped_storage().nbytes() for key, t in kept.items() if key not in own)


def megabytes_per_image(model: nn.Module, batch: int = 8) -> float:
    """Of 224 x 224 in bfloat16; on the meta device, so that nothing is computed."""
    model = model.to(device="meta", dtype=torch.bfloat16).train()
    x = torch.empty(batch, 3, 224, 224, dtype=torch.bfloat16, device="meta")
    return saved_bytes(model, x) / batch / 1e6
