"""Training one small network, and what is kept of it."""

from __future__ import annotations

import functools
import math
import time
from collections.abc import Callable
from dataclasses import asdict, dataclass, field
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn
from torch.utils.flop_counter import FlopCounterMode

from cvkernels.models import googlenet_loss

BATCH = 64
SIZE = 32


@dataclass(frozen=True)
class Trial:
    """A network to train: ``make(**options)`` under one seed.

    Attributes:
        question: which one it belongs to.
        label: what it is called there.
        size: height and width of the images.
        rate: the largest learning rate.
        auxiliary: weight of the losses of GoogLeNet's auxiliary classifiers.
    """

    question: str
    label: str
    make: Callable[..., nn.Module]
    options: dict[str, Any] = field(default_factory=dict)
    seed: int = 0
    epochs: int = 10
    size: int = SIZE
    rate: float = 0.1
    auxiliary: float = 0.3


@dataclass
class Outcome:
    """What became of a trial; gradients are norms of those in each convolution's weight, in order
    from the image on, of the first batch."""

    question: str
    label: str
    seed: int
    parameters: int
    mflops: float
    epochs: int
    seconds: float = 0.0
    train_loss: list[float] = field(default_factory=list)  # of each epoch
    train_error: float = math.nan  # at the end, with running statistics
    test_error: float = math.nan
    gradients: dict[str, list[float]] = field(default_factory=dict)

    def as_dict(self) -> dict[str, Any]:
        return asdict(self)


@functools.cache
def digits(size: int) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    """Images and labels to train on, and those to test with: every fifth of scikit-learn's."""
    from sklearn.datasets import load_digits

    found = load_digits()
    images = torch.tensor(found.images, dtype=torch.float32)[:, None] / 8 - 1
    images = F.interpolate(images, size=(size, size), mode="bilinear", antialias=True)
    images = images.expand(-1, 3, -1, -1).contiguous(memory_format=torch.channels_last)
    labels = torch.tensor(found.target)
    test = torch.arange(len(labels)) % 5 == 0
    return images[~test], labels[~test], images[test], labels[test]


def run(trial: Trial) -> Outcome:
    torch.manual_seed(trial.seed)
    model = trial.make(**trial.options).to(memory_format=torch.channels_last)
    images, labels, *test = digits(trial.size)
    outcome = Outcome(
        trial.question, trial.label, trial.seed,
        sum(p.numel() for p in model.parameters()), _mflops(model, images[:1]), trial.epochs,
    )  # fmt: skip
    start = time.monotonic()
    loss_of = functools.partial(googlenet_loss, weight=trial.auxiliary)
    outcome.gradients["initial"] = _gradients(model, images[:BATCH], labels[:BATCH], loss_of)
    optimizer = torch.optim.SGD(
        model.parameters(), trial.rate, momentum=0.9, nesterov=True, weight_decay=1e-4
    )
    steps = len(images) // BATCH
    schedule = torch.optim.lr_scheduler.CosineAnnealingLR(optimizer, steps * trial.epochs)
    for epoch in range(trial.epochs):
        model.train()
        total = 0.0
        order = torch.randperm(len(images))
        for chosen in order[: steps * BATCH].split(BATCH):
            optimizer.zero_grad()
            outputs = model(images[chosen])
            loss_of(outputs, labels[chosen]).backward()
            optimizer.step()
            schedule.step()
            logits = outputs if isinstance(outputs, Tensor) else outputs[0]
            total += F.cross_entropy(logits.detach(), labels[chosen]).item()
        outcome.train_loss.append(total / steps)
        if epoch == 0:
            after = _gradients(model, images[:BATCH], labels[:BATCH], loss_of)
            outcome.gradients["after an epoch"] = after
    outcome.train_error = _error(model, images, labels)
    outcome.test_error = _error(model, *test)
    outcome.seconds = time.monotonic() - start
    return outcome


def _gradients(
    model: nn.Module, images: Tensor, labels: Tensor, loss_of: Callable[[Any, Tensor], Tensor]
) -> list[float]:
    """Of a training pass that leaves nothing behind."""
    buffers = {name: buffer.clone() for name, buffer in model.named_buffers()}
    state = torch.random.get_rng_state()
    model.train()
    loss_of(model(images), labels).backward()
    weights = [m.weight for m in model.modules() if isinstance(m, nn.Conv2d)]
    norms = [0.0 if w.grad is None else w.grad.norm().item() for w in weights]
    model.zero_grad()
    torch.random.set_rng_state(state)
    for name, buffer in model.named_buffers():
        buffer.copy_(buffers[name])
    return norms


@torch.no_grad()
def _error(model: nn.Module, images: Tensor, labels: Tensor) -> float:
    model.eval()
    right = sum(
        (model(part).argmax(1) == own).sum().item()
        for part, own in zip(images.split(256), labels.split(256), strict=True)
    )
    return 1 - right / len(labels)


def _mflops(model: nn.Module, image: Tensor) -> float:
    """Of one image in inference, in millions; a multiply-add is two."""
    with FlopCounterMode(display=False) as counter, torch.no_grad():
        model.eval()(image)
    return counter.get_total_flops() / 1e6
