"""Training steps of the five networks, stock and ours: time, memory, and what backward keeps.

``python -m benchmarks training [--network NAME] [--batch N] [--dtype NAME]`` prints the table
(``--help``: options), with ``--compile`` also of stock compiled, which takes minutes. A step is
forward, cross entropy, backward and SGD with momentum; a half dtype means autocast. Saved bytes are
those of the distinct storages that autograd keeps between forward and backward, without parameters,
buffers and the batch. DenseNets have rows with ``memory_efficient=True``; DenseNet-169 and -201
have rows of memory alone.
"""

from __future__ import annotations

import contextlib
import copy
import functools
from collections.abc import Callable, Iterable, Iterator

import torch
import torch.nn.functional as F
from torch import Tensor, nn

import cvkernels
from benchmarks.bench_models import inputs_of, networks_of
from benchmarks.harness.case import Case, network_case
from cvkernels import demo
from cvkernels.models import googlenet_loss
from tests.support.autograd_memory import saved_bytes

BATCHES = {"cpu": (8,), "cuda": (128,)}
# Of memory alone: bytes per image do not depend on the batch.
DEPTHS = ("densenet169", "densenet201")
NETWORKS = (*demo.NETWORKS, *DEPTHS)
MEMORY_BATCH = 2


class Step:
    """One training step of ``model``, which ``wrap`` makes what is called; see :class:`Case` for
    its other methods."""

    def __init__(
        self,
        model: nn.Module,
        autocast: torch.dtype | None = None,
        wrap: Callable[[nn.Module], Callable] = lambda model: model,
    ) -> None:
        self.model = model.train()
        self.network = wrap(self.model)
        self.autocast = autocast
        self.initial = copy.deepcopy(model.state_dict())
        self.optimizer = torch.optim.SGD(model.parameters(), lr=1e-4, momentum=0.9)

    def losses(self, images: Tensor, labels: Tensor) -> Tensor:
        """Of each image."""
        device, each = images.device.type, functools.partial(F.cross_entropy, reduction="none")
        with torch.autocast(device, self.autocast, enabled=self.autocast is not None):
            return googlenet_loss(self.network(images), labels, each)

    def loss(self, images: Tensor, labels: Tensor) -> Tensor:
        return self.losses(images, labels).mean()

    def __call__(self, images: Tensor, labels: Tensor) -> Tensor:
        self.optimizer.zero_grad(set_to_none=True)
        loss = self.loss(images, labels)
        loss.backward()
        self.optimizer.step()
        return loss.detach()

    def answers(self, images: Tensor, labels: Tensor) -> list[Tensor]:
        """The initial parameters' losses and gradients, all in one vector, without dropout."""
        self.model.load_state_dict(self.initial)
        self.model.zero_grad(set_to_none=True)
        with without_dropout(self.model):
            losses = self.losses(images, labels)
        losses.mean().backward()
        grads = [parameter.grad.flatten() for parameter in self.model.parameters()]
        self.model.zero_grad(set_to_none=True)
        return [losses.detach(), torch.cat(grads)]

    def saved_bytes(self, images: Tensor, labels: Tensor) -> float:
        """Per image."""
        total = saved_bytes(self.model, images, labels, run=self.loss, owned=(images, labels))
        return total / len(images)


@contextlib.contextmanager
def without_dropout(model: nn.Module) -> Iterator[None]:
    """Dropout and stochastic depth draw other numbers in float64, so a check goes without."""
    kept = {m: m.p for m in model.modules() if isinstance(getattr(m, "p", None), float)}
    try:
        for module in kept:
            module.p = 0.0
        yield
    finally:
        for module, p in kept.items():
            module.p = p


class Reference:
    """The stock step in the dtype of its images; every answer from the same parameters."""

    def __init__(self, name: str, dtype: torch.dtype, device: torch.device) -> None:
        self.networks = functools.partial(networks_of, name, torch.float32, device)
        self.autocast = _autocast(dtype)

    def answers(self, images: Tensor, labels: Tensor) -> list[Tensor]:
        stock, _, exact, _ = self.networks()
        if images.dtype == torch.float64:
            return Step(copy.deepcopy(exact)).answers(images, labels)
        return Step(copy.deepcopy(stock), self.autocast).answers(images, labels)


def _autocast(dtype: torch.dtype) -> torch.dtype | None:
    return None if dtype == torch.float32 else dtype


def _memory_efficient(name: str, model: nn.Module, build: Callable) -> nn.Module:
    efficient = build(name, memory_efficient=True)
    efficient.load_state_dict(model.state_dict())
    return efficient.to(next(model.parameters()).device)


def _stock_memory_efficient(name: str, stock: nn.Module) -> nn.Module:
    import torchvision

    efficient = _memory_efficient(name, stock, torchvision.models.get_model)
    return efficient.to(memory_format=torch.channels_last)


def case_of(
    name: str,
    batch: int,
    dtype: torch.dtype,
    device: torch.device,
    part: str = "training",
    compiles: bool = False,
) -> Case:
    networks = functools.partial(networks_of, name, torch.float32, device)

    def inputs() -> tuple[tuple, dict]:
        networks()
        images = inputs_of(batch, torch.float32, device)[0][1]
        return (images, 1 + torch.arange(batch, device=device) % 999), {}

    models: dict[str, Callable[[], nn.Module]] = {
        "eager": lambda: copy.deepcopy(networks().stock),
        "cvkernels": lambda: copy.deepcopy(networks().ours),
    }
    if name.startswith("densenet"):
        models["eager memory_efficient"] = lambda: _stock_memory_efficient(name, networks().stock)
        models["cvkernels memory_efficient"] = lambda: _memory_efficient(
            name, networks().ours, cvkernels.create_model
        )
    variants = {
        variant: lambda model=model: Step(model(), _autocast(dtype))
        for variant, model in models.items()
    }
    if compiles:
        compiled = functools.partial(torch.compile, dynamic=False)
        variants["compile"] = lambda: Step(models["eager"](), _autocast(dtype), compiled)
    reference = Reference(name, dtype, device)
    return network_case(
        name, batch, dtype, part, inputs=inputs, reference=reference, variants=variants
    )


def cases(
    device: torch.device,
    dtypes: Iterable[torch.dtype],
    batches: Iterable[int],
    networks: Iterable[str] = NETWORKS,
    compiles: bool = False,
) -> list[Case]:
    made = []
    for name in networks:
        for dtype in dtypes:
            if name in DEPTHS:
                made.append(case_of(name, MEMORY_BATCH, dtype, device, "memory"))
            else:
                made += [case_of(name, b, dtype, device, compiles=compiles) for b in batches]
    return made
