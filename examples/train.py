"""Train one of the five networks, on one CPU or on many GPUs.

    python examples/train.py digits --model resnet18 --size 32 --epochs 5
    torchrun --nproc-per-node 8 examples/train.py IMAGENET --model resnet50 --amp bf16 --ema 0.9999

DATA is a folder with train/CLASS/*.jpg and val/CLASS/*.jpg, or "digits" (scikit-learn's) or
"photographs" (crops of scikit-image's and scikit-learn's), which need no download. The network is
cvkernels' own; --stock takes torchvision's or timm's of that name, --patch patches that.

OUT gets checkpoint.pt (go on with --resume), best.pt, log.jsonl (a line per epoch) and
training.svg. What a step draws (images, their augmentation, dropout) follows from the seed and the
step alone: a run that was interrupted ends with the weights of one that was not.
"""

from __future__ import annotations

import argparse
import contextlib
import datetime
import functools
import json
import math
import os
import resource
import sys
import time
from collections.abc import Iterator
from pathlib import Path
from typing import Any, NamedTuple

import checkpoint
import data
import torch
import torch.distributed as dist
import torch.nn.functional as F
from plots import plot
from progress import Progress
from torch import Tensor, nn
from torch.distributed.fsdp import FSDPModule, fully_shard
from torch.nn.parallel import DistributedDataParallel
from torch.optim.swa_utils import AveragedModel, get_ema_avg_fn, get_ema_multi_avg_fn
from torchvision.transforms import v2

import cvkernels
from cvkernels.models import googlenet_loss

AMP = {"bf16": torch.bfloat16, "fp16": torch.float16}


class Stopped(Exception):
    """Why the run cannot go on, in a line for the user."""


def arguments(words: list[str] | None = None) -> argparse.Namespace:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    add = parser.add_argument
    add("data", metavar="DATA")
    add("--model", default="resnet50", help="a builder of cvkernels.models, or with --stock and "
        "--patch a model of torchvision or timm")  # fmt: skip
    kind = parser.add_mutually_exclusive_group()
    kind.add_argument("--stock", action="store_true", help="without cvkernels")
    kind.add_argument("--patch", action="store_true", help="the stock model, patched")
    add("--out", type=Path, default=Path("runs/train"))
    add("--size", type=int, default=224, help="of images, in pixels")
    add("--epochs", type=int, default=90)
    add("--batch", type=int, default=64, help="images of a process in one pass")
    add("--accumulate", type=int, default=1, metavar="K", help="passes of one optimiser step")
    add("--optimizer", choices=("sgd", "adamw"), default="sgd")
    add("--lr", type=float, default=None, help="at its largest; 0.1 or 0.001 per 256 images a step")
    add("--weight-decay", type=float, default=None, help="1e-4 for sgd, 0.05 for adamw")
    add("--warmup", type=float, default=1.0, help="epochs")
    add("--label-smoothing", type=float, default=0.0)
    add("--mixup", type=float, default=0.0, metavar="ALPHA")
    add("--ema", type=float, default=0.0, metavar="DECAY", help="also average the weights")
    add("--clip", type=float, default=0.0, metavar="NORM", help="gradients to this norm")
    add("--amp", choices=AMP)
    add("--sync-bn", action="store_true", help="batch norm over the batches of all processes")
    add("--fsdp", action="store_true", help="shard parameters over processes (FSDP2)")
    add("--find-unused-parameters", action="store_true")
    add("--contiguous", action="store_true", help="images and weights not in channels_last")
    add("--nonfinite", choices=("stop", "skip"), default="stop", help="at a NaN or infinite loss")
    add("--workers", type=int, default=min(4, os.cpu_count() or 1), help="that load images")
    add("--seed", type=int, default=0)
    add("--save-every", type=int, default=0, metavar="STEPS", help="beside each epoch's end")
    add("--resume", action="store_true", help="go on from OUT/checkpoint.pt, if it is there")
    add("--timeout", type=float, default=600, help="seconds to wait for another process")
    add("--quiet", action="store_true", help="no progress bar")
    options = parser.parse_args(words)
    for name in ("size", "epochs", "batch", "accumulate"):
        if getattr(options, name) < 1:
            parser.error(f"--{name} must be at least 1")
    return options


class Place(NamedTuple):
    """Where this process computes, and among which others."""

    device: torch.device
    rank: int = 0
    world: int = 1

    @classmethod
    def of(cls, timeout: float) -> Place:
        """As torchrun's variables say, if it started this process."""
        cuda = torch.cuda.is_available()
        local = int(os.environ.get("LOCAL_RANK", 0))
        device = torch.device("cuda", local) if cuda else torch.device("cpu")
        if cuda:
            torch.cuda.set_device(device)
        if "RANK" not in os.environ:
            return cls(device)
        limit = datetime.timedelta(seconds=timeout)
        dist.init_process_group("nccl" if cuda else "gloo", timeout=limit)
        return cls(device, dist.get_rank(), dist.get_world_size())

    def sum(self, values: Tensor) -> Tensor:
        """Added up over all processes."""
        if self.world > 1:
            moved = values.to(self.device)  # NCCL takes nothing else
            dist.all_reduce(moved)
            return moved.to(values.device)
        return values


def new_model(options: argparse.Namespace, classes: int) -> nn.Module:
    if not (options.stock or options.patch):
        return cvkernels.models.create_model(options.model, num_classes=classes)
    import timm
    import torchvision

    if options.model in torchvision.models.list_models():
        model = torchvision.models.get_model(options.model, weights=None, num_classes=classes)
    elif timm.is_model(options.model):
        model = timm.create_model(options.model, num_classes=classes)
    else:
        raise ValueError(f"neither torchvision nor timm has a model {options.model!r}")
    if options.patch:
        cvkernels.patch(model)
    return model


def with_shared_norms(model: nn.Module) -> nn.Module:
    """The model with SyncBatchNorm, as PyTorch or, for norms with an activation, timm converts."""
    if any(type(module).__name__ == "BatchNormAct2d" for module in model.modules()):
        from timm.layers import convert_sync_batchnorm

        return convert_sync_batchnorm(model)
    return nn.SyncBatchNorm.convert_sync_batchnorm(model)


def sharded(model: nn.Module) -> nn.Module:
    """Each block on its own, so that the parameters of one are whole at a time."""
    for child in model.children():
        blocks = child.children() if isinstance(child, nn.Sequential) else (child,)
        for block in blocks:
            if list(block.children()):  # a single layer stays with the model
                with contextlib.suppress(ValueError, NotImplementedError):  # takes no container
                    fully_shard(block)
    return fully_shard(model)


class Position(NamedTuple):
    """How far a run has come: whole epochs, images of the next one, optimiser steps."""

    epoch: int = 0
    images: int = 0
    steps: int = 0


class Training:
    """A model and what trains it."""

    def __init__(self, options: argparse.Namespace, place: Place, split: data.Split) -> None:
        self.options, self.place, self.split = options, place, split
        torch.manual_seed(options.seed)
        model = new_model(options, len(split.classes))
        if options.sync_bn:
            model = with_shared_norms(model)
        self.format = torch.contiguous_format if options.contiguous else torch.channels_last
        # FSDP shards no weights in channels_last.
        kept = torch.contiguous_format if options.fsdp else self.format
        model = model.to(place.device, memory_format=kept)
        self.ema = None
        if options.ema:
            # Of shards one by one: all at once they may not be mixed with buffers.
            average = {"avg_fn": get_ema_avg_fn(options.ema)}
            if not options.fsdp:
                average = {"multi_avg_fn": get_ema_multi_avg_fn(options.ema)}
            self.ema = AveragedModel(model, **average, use_buffers=True)
        self.model: Any = model
        if place.world > 1 and options.fsdp:
            self.model = sharded(model)
            if self.ema is not None:
                sharded(self.ema.module)
        elif place.world > 1:
            self.model = DistributedDataParallel(
                model, find_unused_parameters=options.find_unused_parameters
            )
        self.optimizer = self._new_optimizer()
        self.scaler = torch.amp.GradScaler(place.device.type, enabled=options.amp == "fp16")
        self.position, self.best, self.skipped = Position(), 0.0, 0
        self.unreadable: set[str] = set()
        smoothing = options.label_smoothing
        self.loss = functools.partial(F.cross_entropy, label_smoothing=smoothing)

    @property
    def step_images(self) -> int:
        """Images of one optimiser step, of all processes."""
        return self.options.batch * self.options.accumulate * self.place.world

    def _new_optimizer(self) -> torch.optim.Optimizer:
        """Without weight decay for biases and norms."""
        options, sgd = self.options, self.options.optimizer == "sgd"
        decay = options.weight_decay
        if decay is None:
            decay = 1e-4 if sgd else 0.05
        parameters = list(self.model.parameters())
        groups = [
            {"params": [p for p in parameters if p.dim() > 1], "weight_decay": decay},
            {"params": [p for p in parameters if p.dim() <= 1], "weight_decay": 0.0},
        ]
        rate = options.lr
        if rate is None:
            rate = (0.1 if sgd else 0.001) * self.step_images / 256
        self.largest_rate = rate
        if sgd:
            return torch.optim.SGD(groups, rate, momentum=0.9, nesterov=True)
        return torch.optim.AdamW(groups, rate)

    def rate(self) -> float:
        """Warm-up in a straight line, then half a cosine to zero."""
        passed = self.position.epoch + self.position.images / len(self.split.train)
        warmup, epochs = self.options.warmup, self.options.epochs
        if passed < warmup:
            part = (self.position.images + self.step_images) / len(self.split.train)
            return self.largest_rate * min(1.0, (self.position.epoch + part) / warmup)
        left = (passed - warmup) / max(epochs - warmup, 1e-9)
        return self.largest_rate * 0.5 * (1 + math.cos(math.pi * min(left, 1.0)))

    def train_epoch(self, bar: Progress) -> dict[str, float]:
        """Train to the epoch's end; its mean loss, accuracy and images a second."""
        options, place = self.options, self.place
        self.model.train()
        batches = data.Batches(
            len(self.split.train), options.batch, rank=place.rank, world=place.world,
            seed=options.seed * 10_007 + self.position.epoch, skipped=self.position.images,
        )  # fmt: skip
        steps = len(batches) // options.accumulate
        sums, start = torch.zeros(3, dtype=torch.float64), time.monotonic()
        bar.start(f"epoch {self.position.epoch + 1}/{options.epochs}", steps)
        passes = iter(data.loader(self.split.train, batches, options.workers))
        for _ in range(steps):
            sums += self.step(passes)
            seen = self.position.images + self.step_images
            self.position = Position(self.position.epoch, seen, self.position.steps + 1)
            bar.advance()
            if options.save_every and self.position.steps % options.save_every == 0:
                self.save()
        sums = place.sum(sums)
        seconds = time.monotonic() - start
        self.position = Position(self.position.epoch + 1, 0, self.position.steps)
        loss, right, count = sums.tolist()
        count = max(count, 1)
        return {"loss": loss / count, "top1": right / count, "images_per_s": count / seconds}

    def step(self, passes: Iterator[data.Batch]) -> Tensor:
        """One optimiser step; the sums of loss, right answers and images of this process."""
        options, place = self.options, self.place
        # Dropout and stochastic depth draw by the step, not by what ran before.
        torch.manual_seed((options.seed * 1_009 + self.position.steps) * 8_191 + place.rank)
        for group in self.optimizer.param_groups:
            group["lr"] = self.rate()
        self.optimizer.zero_grad()
        skips = options.nonfinite == "skip"
        buffers = [buffer.clone() for buffer in self.model.buffers()] if skips else []
        sums, finite = torch.zeros(3, dtype=torch.float64), True
        for index in range(options.accumulate):
            batch = next(passes)
            self.name_unreadable(batch)
            with self.synchronising(index == options.accumulate - 1):
                loss, found = self.forward(batch)
                if not math.isfinite(loss.item()):
                    finite = False
                    self.name_nonfinite(batch)
                # Other processes wait for these gradients, whatever they are.
                self.scaler.scale(loss / options.accumulate).backward()
            sums += found
        if place.sum(torch.tensor([0.0 if finite else 1.0])).item():
            if not skips:
                raise Stopped("a loss was not finite: stopped (--nonfinite skip goes on)")
            return self.skip(buffers)
        self.scaler.unscale_(self.optimizer)
        if options.clip:
            nn.utils.clip_grad_norm_(self.model.parameters(), options.clip)
        self.scaler.step(self.optimizer)
        self.scaler.update()
        if self.ema is not None:
            self.ema.update_parameters(getattr(self.model, "module", self.model))
        return sums

    @torch.no_grad()
    def skip(self, buffers: list[Tensor]) -> Tensor:
        """Leave a step out, whose images may have moved running statistics; its sums."""
        self.skipped += 1
        self.optimizer.zero_grad()
        for buffer, kept in zip(self.model.buffers(), buffers, strict=True):
            buffer.copy_(kept)
        return torch.zeros(3, dtype=torch.float64)

    def forward(self, batch: data.Batch) -> tuple[Tensor, Tensor]:
        """The loss, and its sum, the right answers and the images that could be read."""
        options, place = self.options, self.place
        images, labels = batch.images, batch.labels
        readable = labels != data.NO_LABEL
        some = bool(readable.any())
        if some and not readable.all():
            images, labels = images[readable], labels[readable]
        images = images.to(place.device, memory_format=self.format, non_blocking=True)
        labels = labels.to(place.device, non_blocking=True)
        target = labels
        if options.mixup and some:
            mix = v2.MixUp(alpha=options.mixup, num_classes=len(self.split.classes))
            images, target = mix(images, labels)
        with self.autocast():
            outputs = self.model(images)
            logits = outputs if isinstance(outputs, Tensor) else outputs[0]
            # Other processes wait for the gradients of a batch that has no image, too.
            loss = googlenet_loss(outputs, target, self.loss) if some else 0 * logits.sum()
        right, count = (logits.argmax(1) == labels).sum(), len(labels) * some
        return loss, torch.stack([loss.detach() * count, right, right.new_tensor(count)]).cpu()

    def autocast(self) -> torch.autocast:
        dtype = AMP.get(self.options.amp)
        return torch.autocast(self.place.device.type, dtype, enabled=dtype is not None)

    @contextlib.contextmanager
    def synchronising(self, last: bool) -> Iterator[None]:
        """Add the gradients of processes up in the last pass of a step alone."""
        if isinstance(self.model, FSDPModule):
            self.model.set_requires_gradient_sync(last)
        elif isinstance(self.model, DistributedDataParallel) and not last:
            with self.model.no_sync():
                yield
            return
        yield

    @torch.no_grad()
    def test(self, model: nn.Module) -> dict[str, float]:
        """Mean loss and accuracy over all test images, each counted once."""
        samples, place = self.split.test, self.place
        batches = data.Batches(len(samples), self.options.batch, rank=place.rank, world=place.world)
        model.eval()
        sums = torch.zeros(3, dtype=torch.float64)
        # With FSDP every process runs every layer: as many batches as the one that has most.
        most = len(data.Batches(len(samples), self.options.batch, rank=0, world=place.world))
        passes = iter(data.loader(samples, batches, self.options.workers))
        empty = data.Batch.of([(torch.zeros(3, samples.size, samples.size), data.NO_LABEL, "")])
        for _ in range(most):
            batch = next(passes, None)
            if batch is not None:
                self.name_unreadable(batch)
            images, labels, *_ = batch or empty
            labels = labels.to(place.device)
            with self.autocast():
                logits = model(images.to(place.device, memory_format=self.format))
            count = (labels != data.NO_LABEL).sum()
            loss = F.cross_entropy(logits.float(), labels, reduction="sum")
            right = (logits.argmax(1) == labels).sum()
            sums += torch.stack([loss, right, count]).double().cpu()
        loss, right, count = place.sum(sums).tolist()
        return {"loss": loss / max(count, 1), "top1": right / max(count, 1)}

    def name_unreadable(self, batch: data.Batch) -> None:
        for name in batch.unreadable:
            if name not in self.unreadable:
                self.unreadable.add(name)
                print(f"unreadable, left out: {name}", file=sys.stderr, flush=True)

    def name_nonfinite(self, batch: data.Batch) -> None:
        """The images that are not finite themselves, or else all of the batch."""
        whole = batch.images.flatten(1).isfinite().all(1).tolist()
        names = [name for name, fine in zip(batch.names, whole, strict=True) if not fine]
        what = "images that are not finite" if names else "a loss that is not finite, of"
        names = names or batch.names
        more = f" and {len(names) - 8} more" if len(names) > 8 else ""
        where = f"step {self.position.steps}, process {self.place.rank}"
        print(f"{where}: {what} {', '.join(names[:8])}{more}", file=sys.stderr, flush=True)

    # Checkpoints

    def save(self, name: str = "checkpoint.pt") -> bool:
        """Whether it was written; a failure is told, and the run goes on."""
        about = {
            "model": self.options.model, "classes": self.split.classes, "size": self.options.size,
            "position": list(self.position), "best": self.best, "skipped": self.skipped,
            "scaler": self.scaler.state_dict(),
        }  # fmt: skip
        whole = name == "checkpoint.pt"
        ema, optimizer = (self.ema, self.optimizer) if whole else (None, None)
        model = self.model if whole or self.ema is None else self.ema.module
        try:
            checkpoint.save(self.options.out / name, about, model, optimizer, ema)
        except checkpoint.CheckpointError as error:
            print(f"{error}; the run goes on", file=sys.stderr, flush=True)
            return False
        return True

    def resume(self, path: Path) -> None:
        """Go on where the checkpoint was written."""
        content = checkpoint.read(path)
        about = content["about"]
        for key, own in (("model", self.options.model), ("classes", self.split.classes)):
            if about[key] != own:
                raise checkpoint.CheckpointError(
                    f"{path} is of {key} {about[key]}, this run of {own}"
                )
        if ("ema" in content) != (self.ema is not None):
            raise checkpoint.CheckpointError(
                f"{path} is of a run {'with' if 'ema' in content else 'without'} --ema"
            )
        checkpoint.load_model(self.model, content["model"])
        checkpoint.load_optimizer(self.model, self.optimizer, content["optimizer"])
        if self.ema is not None:
            checkpoint.load_model(self.ema, content["ema"])
        self.scaler.load_state_dict(about["scaler"])
        self.position, self.best = Position(*about["position"]), about["best"]
        self.skipped = about["skipped"]


def peak_megabytes(place: Place) -> float:
    """On a GPU what was allocated at once, else the memory of the process."""
    if place.device.type == "cuda":
        return torch.cuda.max_memory_allocated() / 2**20
    return resource.getrusage(resource.RUSAGE_SELF).ru_maxrss / 2**10


def run(options: argparse.Namespace, place: Place) -> None:
    options.out.mkdir(parents=True, exist_ok=True)
    if place.rank > 0:
        dist.barrier()  # the first process may be making a folder of images
    split = data.split_of(options.data, options.size, options.out)
    if place.rank == 0 and place.world > 1:
        dist.barrier()
    if len(split.train) < options.batch * options.accumulate * place.world:
        raise Stopped(f"{len(split.train)} training images are too few for one step")
    training = Training(options, place, split)
    path, log = options.out / "checkpoint.pt", options.out / "log.jsonl"
    rows: list[dict[str, Any]] = []
    if options.resume and path.is_file():
        training.resume(path)
        lines = log.read_text().splitlines() if log.is_file() else []
        rows = [json.loads(line) for line in lines][: training.position.epoch]
    written = True
    with Progress(place.rank == 0 and not options.quiet) as bar:
        while training.position.epoch < options.epochs:
            rate = training.rate()
            trained = training.train_epoch(bar)
            tested = training.test(training.model)
            row = {
                "epoch": training.position.epoch, "lr": rate,
                **{f"train_{key}": value for key, value in trained.items()},
                **{f"val_{key}": value for key, value in tested.items()},
                "peak_mb": peak_megabytes(place), "skipped_steps": training.skipped,
                "unreadable": len(training.unreadable),
            }  # fmt: skip
            top1 = tested["top1"]
            if training.ema is not None:
                top1 = row["val_ema_top1"] = training.test(training.ema.module)["top1"]
            better = top1 > training.best
            training.best = max(training.best, top1)
            if better:
                training.save("best.pt")
            written = training.save()
            rows.append(row)
            if place.rank == 0:
                log.write_text("".join(f"{json.dumps(row)}\n" for row in rows))
                plot(rows, options.out / "training.svg", options.model)
                bar.say(
                    f"epoch {row['epoch']}: loss {row['train_loss']:.4f}, test loss "
                    f"{row['val_loss']:.4f}, top-1 {top1:.2%}, "
                    f"{row['train_images_per_s']:.0f} images/s, {row['peak_mb']:.0f} MB"
                )
    if not written:
        raise Stopped("the last checkpoint could not be written")


def main(words: list[str] | None = None) -> int:
    options = arguments(words)
    place = Place.of(options.timeout)
    try:
        run(options, place)
    except (Stopped, checkpoint.CheckpointError, ValueError) as error:
        print(f"train: {error}", file=sys.stderr, flush=True)
        return 1
    except KeyboardInterrupt:
        print("interrupted; --resume goes on from the last checkpoint", file=sys.stderr)
        return 130
    finally:
        if dist.is_initialized() and sys.exc_info()[0] is None:
            dist.destroy_process_group()
    return 0


if __name__ == "__main__":
    sys.exit(main())
