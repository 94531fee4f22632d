"""Classify the images of a folder by a frozen network, on one processor or on many.

    python examples/serve.py runs/train/best.pt images/ --top 3
    torchrun --nproc-per-node 2 examples/serve.py runs/train/best.pt images/ --out answers.jsonl

CHECKPOINT is a file of train.py, or a builder of cvkernels.models with --weights FILE. One line of
JSON per image goes to standard output, or to --out where processes write there too, in the order of
the files' names; throughput and images that cannot be read go to standard error.
"""

from __future__ import annotations

import argparse
import json
import os
import sys
import time
from pathlib import Path
from typing import Any

import checkpoint
import data
import torch
import torch.distributed as dist
from progress import Progress
from torch import Tensor, nn
from train import Place

import cvkernels
from cvkernels.classify import likeliest
from cvkernels.images import SUFFIXES, image_files

DTYPES = {"fp32": torch.float32, "bf16": torch.bfloat16, "fp16": torch.float16}


def arguments(words: list[str] | None = None) -> argparse.Namespace:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    add = parser.add_argument
    add("checkpoint", metavar="CHECKPOINT")
    add("images", metavar="FOLDER", type=Path)
    add("--weights", type=Path, help="of CHECKPOINT, a builder's name")
    add("--classes", type=int, default=1000, help="of the builder's network")
    add("--size", type=int, default=None, help="of images; the training's, or 224")
    add("--batch", type=int, default=16)
    add("--dtype", choices=DTYPES, default="fp32")
    add("--top", type=int, default=1, help="classes per image")
    add("--out", type=Path, help="a file for the predictions")
    add("--workers", type=int, default=min(4, os.cpu_count() or 1), help="that load images")
    add("--timeout", type=float, default=600, help="seconds to wait for another process")
    add("--quiet", action="store_true", help="no progress bar")
    return parser.parse_args(words)


def network(options: argparse.Namespace) -> tuple[nn.Module, list[str], int]:
    """The model in eval, the names of its classes and the size of its images.

    Raises:
        ValueError: no such checkpoint or builder, or one without weights.
    """
    path = Path(options.checkpoint)
    if not path.is_file():
        if options.weights is None:
            raise ValueError(f"{path} is no file; a builder's name needs --weights")
        model = cvkernels.models.create_model(
            options.checkpoint, weights=str(options.weights), num_classes=options.classes
        )
        classes = [str(index) for index in range(options.classes)]
        return model.eval(), classes, options.size or 224
    content = checkpoint.read(path)
    about = content["about"]
    model = cvkernels.models.create_model(about["model"], num_classes=len(about["classes"]))
    model.load_state_dict(content["model"])
    return model.eval(), about["classes"], options.size or about["size"]


def rows_of(batch: data.Batch, logits: Tensor, classes: list[str], top: int) -> list[dict]:
    """What is printed of a batch's readable images."""
    rows = likeliest(batch.names, logits, classes, top)
    return [row.as_dict() for row in rows if row.image not in batch.unreadable]


def classify(options: argparse.Namespace, place: Place) -> tuple[list[dict], list[str], float]:
    """This process' rows, its unreadable images, and the seconds it took without preparation."""
    model, classes, size = network(options)
    items = [(str(path), 0) for path in image_files(options.images)]
    if not items:
        raise ValueError(f"{options.images} holds no images ({' '.join(SUFFIXES)})")
    samples = data.Samples(items, data.opener(items), data.plain(size), size)
    batches = data.Batches(len(items), options.batch, rank=place.rank, world=place.world)
    example = torch.zeros(options.batch, 3, size, size, device=place.device)
    frozen = cvkernels.freeze(model.to(place.device), example, dtype=DTYPES[options.dtype])
    rows: list[dict] = []
    unreadable: list[str] = []
    if place.world > 1:
        dist.barrier()
    start = time.monotonic()
    with Progress(place.rank == 0 and not options.quiet) as bar:
        bar.start("classifying", len(batches))
        for batch in data.loader(samples, batches, options.workers):
            images = batch.images.to(place.device, memory_format=torch.channels_last)
            rows += rows_of(batch, frozen(images).cpu(), classes, options.top)
            unreadable += batch.unreadable
            bar.advance()
    return rows, unreadable, time.monotonic() - start


def main(words: list[str] | None = None) -> int:
    options = arguments(words)
    place = Place.of(options.timeout)
    try:
        mine = classify(options, place)
    except (ValueError, RuntimeError, checkpoint.CheckpointError) as error:
        print(f"serve: {error}", file=sys.stderr)
        return 1
    shares: list[Any] = [mine]
    if place.world > 1:
        shares = [None] * place.world
        dist.all_gather_object(shares, mine)
        dist.destroy_process_group()
    if place.rank > 0:
        return 0
    rows = sorted((row for share in shares for row in share[0]), key=lambda row: row["image"])
    lines = "".join(f"{json.dumps(row)}\n" for row in rows)
    if options.out is None:
        sys.stdout.write(lines)
    else:
        options.out.write_text(lines)
    for name in sorted(name for share in shares for name in share[1]):
        print(f"unreadable, left out: {name}", file=sys.stderr)
    seconds = max(share[2] for share in shares)
    print(
        f"{len(rows)} images in {seconds:.2f} s with {place.world} processes: "
        f"{len(rows) / seconds:.1f} images/s",
        file=sys.stderr,
    )
    return 0


if __name__ == "__main__":
    sys.exit(main())
