"""Ten optimiser steps of the five networks, in the ways that people train: stock's results.

In float64, and with small steps, so that no rounding is amplified beyond the tolerance; in float32
by the rule of the tolerance.
"""

import copy

import pytest
import torch
import torch.distributed as dist
import torch.nn.functional as F
from torch import nn
from torch.distributed.fsdp import fully_shard
from torch.nn.parallel import DistributedDataParallel
from torch.optim.swa_utils import AveragedModel, get_ema_multi_avg_fn
from torch.utils.checkpoint import checkpoint

from cvkernels.models import googlenet_loss
from tests.support.model_checks import builders
from tests.support.numerics import assert_close_as_eager, max_error

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

    size, dtype = SIZE, torch.float64

    def __init__(self, name, model):
        self.name, self.model = name, model
        for module in model.modules():
            if isinstance(module, nn.Dropout):
                module.p = 0.0
        self.optimizer = None
        self.losses = []

    def batches(self):
        generator = torch.Generator().manual_seed(1)
        for _ in range(STEPS):
            images = torch.randn(4, 3, self.size, self.size, generator=generator).to(self.dtype)
            yield images, torch.randint(CLASSES, (4,), generator=generator)

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
        self.model.train()
        needing = [p for p in self.model.parameters() if p.requires_grad]
        self.optimizer = torch.optim.SGD(needing, RATE, momentum=0.9, weight_decay=1e-4)
        for images, labels in self.batches():
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


def pair_of(name):
    """Ours and stock, of the same weights."""
    ours, stock = (
        build(num_classes=CLASSES, **({"init_weights": True} if name == "googlenet" else {}))
        for build in builders(name)
    )
    ours.load_state_dict(stock.state_dict())
    return ours, stock


@pytest.mark.full
@pytest.mark.parametrize(("kind", "name"), WAYS.values(), ids=WAYS.keys())
def test_ten_steps(kind, name):
    ours, stock = pair_of(name)
    runs = [kind(name, model.double()) for model in (ours, stock)]
    before = copy.deepcopy(list(stock.parameters()))
    results = [run.results() for run in runs]
    for actual, expected in zip(*results, strict=True):
        torch.testing.assert_close(actual, expected, rtol=1e-6, atol=1e-7)
    after = list(stock.parameters())
    moved = [old for old, new in zip(before, after, strict=True) if not torch.equal(old, new)]
    assert len(moved) > len(before) // 4


class InFloat32(Run):
    """Of maps that the native convolutions are chosen for."""

    size, dtype = 96, torch.float32


class OfTheSameBatches(InFloat32):
    """In float64, for the error of float32."""

    def step(self, images, labels):
        return super().step(images.double(), labels)


def together(run):
    """Losses, all parameters and all running statistics, each as one vector: a rounding that lets a
    ReLU pass moves single ones by more than roundings."""
    losses, *_ = run.results()
    kinds = (run.model.parameters(), run.model.buffers())
    floats = ([t.detach().flatten() for t in kind if t.is_floating_point()] for kind in kinds)
    return [losses, *map(torch.cat, floats)]


@pytest.mark.full
@pytest.mark.parametrize("name", STAGES)
def test_ten_steps_in_float32(name):
    torch.manual_seed(0)
    ours, stock = pair_of(name)
    exact, planar = copy.deepcopy(stock).double(), copy.deepcopy(stock)
    truth = together(OfTheSameBatches(name, exact))
    actual = together(InFloat32(name, ours))
    # Stock's error is the larger of its two layouts'.
    layouts = [planar, stock.to(memory_format=torch.channels_last)]
    eager = [together(InFloat32(name, model)) for model in layouts]
    for found, *others, exactly in zip(actual, *eager, truth, strict=True):
        worse = max(others, key=lambda other: max_error(other, exactly))
        assert_close_as_eager(found, worse, exactly)


class Shared(Run):
    """Half of each batch, in one of two processes.

    Of larger images: norms of two values amplify roundings, layer by layer.
    """

    size = 64

    def __init__(self, name, model, wrap=lambda model: model):
        super().__init__(name, model)
        for module in model.modules():
            if type(module).__name__ == "StochasticDepth":
                module.p = 0.0  # draws a number for each image of a process
        self.wrapped = wrap(model)

    def loss(self, images, labels):
        own = slice(2 * dist.get_rank(), 2 * dist.get_rank() + 2)
        return googlenet_loss(self.wrapped(images[own]), labels[own])

    def results(self):
        return [t.full_tensor() if hasattr(t, "full_tensor") else t for t in super().results()]


class Joined(Shared):
    """The losses are means of the whole batch's."""

    def results(self):
        losses, *others = super().results()
        dist.all_reduce(losses)
        return [losses / 2, *others]


class Whole(Shared):
    """All of each batch in one process."""

    def loss(self, images, labels):
        return Run.loss(self, images, labels)


def sharded(model):
    mesh = dist.init_device_mesh("cpu", (2,))
    for child in getattr(model, "features", model).children():
        if list(child.children()) and not isinstance(child, nn.ModuleDict):
            fully_shard(child, mesh=mesh)
    fully_shard(model, mesh=mesh)
    return model


def joined(model):
    return sharded(nn.SyncBatchNorm.convert_sync_batchnorm(model))


def finding(model):
    return DistributedDataParallel(model, find_unused_parameters=True)


# Whose blocks differ most in what a pass over the graph, or a shard's owner, has to find.
ALSO_FINDING, ALSO_SHARDED = ("googlenet", "densenet121"), ("densenet121", "seresnet18")


def train_in_two_processes(rank, path):
    torch.set_num_threads(1)
    dist.init_process_group("gloo", store=dist.FileStore(path, 2), rank=rank, world_size=2)
    for name in STAGES:
        torch.manual_seed(0)  # one network in both processes
        ours, stock = pair_of(name)
        models = [model.double() for model in (ours, stock)]
        whole = Whole(name, copy.deepcopy(stock)).results()
        ways = [(Joined, joined, whole)]
        if name in ALSO_SHARDED:
            # Each process keeps its own running statistics if it is sharded.
            own = Shared(name, copy.deepcopy(stock), sharded).results()
            ways.append((Shared, sharded, own))
        expected = Shared(name, stock, DistributedDataParallel).results()
        ways.append((Shared, DistributedDataParallel, expected))
        if name in ALSO_FINDING:
            ways.append((Shared, finding, expected))
        for kind, wrap, results in ways:
            actual = kind(name, copy.deepcopy(models[0]), wrap).results()
            label = f"{name}, {wrap.__name__}"
            for found, right in zip(actual, results, strict=True):
                torch.testing.assert_close(
                    found, right, rtol=1e-6, atol=1e-7, msg=lambda m, label=label: f"{label}: {m}"
                )
    dist.destroy_process_group()


@pytest.mark.full
@pytest.mark.long
def test_ten_steps_in_two_processes(tmp_path):
    """Under DistributedDataParallel, sharded, and with norms that share the batch."""
    torch.multiprocessing.spawn(train_in_two_processes, (str(tmp_path / "store"),), nprocs=2)
