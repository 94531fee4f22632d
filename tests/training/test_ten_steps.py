"""Ten optimiser steps of the five networks, in the ways that people train: stock's results.

In float64, and with small steps, so that no rounding is amplified beyond the tolerance.
"""

import copy

import pytest
import torch
import torch.nn.functional as F
from torch import nn
from torch.optim.swa_utils import AveragedModel, get_ema_multi_avg_fn
from torch.utils.checkpoint import checkpoint

from cvkernels.models import googlenet_loss
from tests.support.model_checks import builders

pytest.importorskip("torchvision")
timm = pytest.importorskip("timm")

STEPS, CLASSES = 10, 7
SIZE = 48
RATE = 3e-5  # larger ones make ten steps of untrained networks chaotic, in float64 too
STAGES = {
    "googlenet": "inception4a", "resnet18": "layer2", "densenet121": "features.denseblock2",
    "seresnet18": "layer2", "efficientnet_b0": "features.3",
}  # fmt: skip


class Run:
    """A network, its optimiser and ten batches; ``step`` is what a way of training replaces."""

    def __init__(self, name, model):
        self.name, self.model = name, model
        for module in model.modules():
            if isinstance(module, nn.Dropout):
                module.p = 0.0
        self.optimizer = None
        self.losses = []

    def loss(self, images, labels):
        return googlenet_loss(self.model(images), labels)

    def backward(self, images, labels):
        loss = self.loss(images, labels)
        loss.backward()
        return loss.detach()

    def step(self, images, labels):
        loss = self.backward(images, labels)
        self.optimizer.step()
        return loss

    def results(self):
        """Losses, parameters and running statistics."""
        generator = torch.Generator().manual_seed(1)
        self.model.train()
        needing = [p for p in self.model.parameters() if p.requires_grad]
        self.optimizer = torch.optim.SGD(needing, RATE, momentum=0.9, weight_decay=1e-4)
        for _ in range(STEPS):
            images = torch.randn(4, 3, SIZE, SIZE, generator=generator, dtype=torch.float64)
            labels = torch.randint(CLASSES, (4,), generator=generator)
            torch.manual_seed(len(self.losses))  # stochastic depth
            self.optimizer.zero_grad()
            self.losses.append(self.step(images, labels))
        return [torch.stack(self.losses), *self.model.parameters(), *self.model.buffers()]


class Accumulated(Run):
    def step(self, images, labels):
        losses = [self.backward(images[part], labels[part]) for part in ([0, 1], [2, 3])]
        self.optimizer.step()
        return sum(losses)


class Scaled(Run):
    """A scaler whose fourth step overflows."""

    def step(self, images, labels):
        if not self.losses:
            self.scaler = torch.amp.GradScaler("cpu", init_scale=2.0**8)
        loss = self.loss(images, labels)
        factor = float("inf") if len(self.losses) == 3 else 1.0
        self.scaler.scale(loss * factor).backward()
        self.scaler.step(self.optimizer)
        self.scaler.update()
        return loss.detach()


class Averaged(Run):
    """Exponential moving averages of weights and statistics are results, too."""

    def step(self, images, labels):
        if not self.losses:
            average = get_ema_multi_avg_fn(0.5)
            self.average = AveragedModel(self.model, multi_avg_fn=average, use_buffers=True)
        loss = super().step(images, labels)
        self.average.update_parameters(self.model)
        return loss

    def results(self):
        found = super().results()
        averaged = self.average.module.eval()
        with torch.no_grad():
            logits = averaged(torch.linspace(-1, 1, 3 * SIZE**2).double().view(1, 3, SIZE, SIZE))
        return [*found, *averaged.state_dict().values(), logits]


class Frozen(Run):
    """The first half of the parameters, and all norms, stay as they are."""

    def step(self, images, labels):
        if not self.losses:
            parameters = list(self.model.parameters())
            for parameter in parameters[: len(parameters) // 2]:
                parameter.requires_grad_(False)
            for module in self.model.modules():
                if isinstance(module, nn.BatchNorm2d):
                    module.eval()
        return super().step(images, labels)


class WithNewHead(Run):
    def __init__(self, name, model):
        super().__init__(name, model)
        torch.manual_seed(2)
        model.fc = nn.Linear(model.fc.in_features, 3, dtype=torch.float64)

    def loss(self, images, labels):
        return F.cross_entropy(self.model(images), labels % 3)


class Checkpointed(Run):
    """A stage is run again in backward."""

    def __init__(self, name, model):
        super().__init__(name, model)
        stage = model.get_submodule(STAGES[name])
        run = stage.forward
        stage.forward = lambda x: checkpoint(run, x, use_reentrant=False)


WAYS = {
    **{f"plain-{name}": (Run, name) for name in STAGES},
    "accumulated": (Accumulated, "seresnet18"),
    "scaled": (Scaled, "resnet18"),
    "averaged": (Averaged, "resnet18"),
    "frozen": (Frozen, "seresnet18"),
    "new-head": (WithNewHead, "resnet18"),
    "checkpointed": (Checkpointed, "googlenet"),
}


@pytest.mark.full
@pytest.mark.parametrize(("kind", "name"), WAYS.values(), ids=WAYS.keys())
def test_ten_steps(kind, name):
    ours, stock = (
        build(num_classes=CLASSES, **({"init_weights": True} if name == "googlenet" else {}))
        for build in builders(name)
    )
    ours.load_state_dict(stock.state_dict())
    runs = [kind(name, model.double()) for model in (ours, stock)]
    before = copy.deepcopy(list(stock.parameters()))
    results = [run.results() for run in runs]
    for actual, expected in zip(*results, strict=True):
        torch.testing.assert_close(actual, expected, rtol=1e-6, atol=1e-7)
    after = list(stock.parameters())
    moved = [old for old, new in zip(before, after, strict=True) if not torch.equal(old, new)]
    assert len(moved) > len(before) // 4
