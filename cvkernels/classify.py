"""``python -m cvkernels classify``: the classes of image files, by a frozen network."""

from __future__ import annotations

import csv
import json
import os
import sys
import time
import warnings
from collections import deque
from collections.abc import Callable, Iterator, Sequence
from concurrent.futures import Future, ThreadPoolExecutor
from contextlib import ExitStack
from pathlib import Path
from typing import TYPE_CHECKING, Any, NamedTuple

import torch
from torch import Tensor

from cvkernels.freeze.frozen import Frozen, freeze
from cvkernels.freeze.progress import progress
from cvkernels.images import UnreadableImage, files_of
from cvkernels.photographs import shifted
from cvkernels.tables import fitted_table, terminal_columns
from cvkernels.trained import Trained, class_names, trained

if TYPE_CHECKING:
    import argparse

PRECISIONS = {"fp32": torch.float32, "bf16": torch.bfloat16, "int8": torch.int8}
# Images that int8 is calibrated on: at most, and shifted ones included, at least.
CALIBRATION, LEAST_CALIBRATION = 128, 64
# Threads that decode images.
READERS = min(4, os.cpu_count() or 1)
COLUMNS = ("image", "rank", "class", "probability")


class Classified(NamedTuple):
    """An image's likeliest classes and their probabilities, the likeliest first."""

    image: str
    predictions: list[tuple[str, float]]

    def as_dict(self) -> dict[str, Any]:
        answers = [{"class": name, "probability": round(p, 6)} for name, p in self.predictions]
        return {"image": self.image, "predictions": answers}

    def cells(self) -> list[tuple[str, int, str, str]]:
        """A line for each class, under :data:`COLUMNS`."""
        return [
            (self.image, rank, name, f"{p:.6f}")
            for rank, (name, p) in enumerate(self.predictions, 1)
        ]


class Output:
    """Where the rows go: to CSV and JSON lines as they come, else into a table at the end."""

    def __init__(self, table: Path | None, lines: Path | None, stack: ExitStack) -> None:
        if table is not None and table == lines:
            raise ValueError(f"--csv and --jsonl are to go to different places, got {table} twice")
        self.rows: list[Classified] = []
        self.files = [None if p is None else _opened(p, stack) for p in (table, lines)]
        if self.files[0] is not None:
            csv.writer(self.files[0], lineterminator="\n").writerow(COLUMNS)
            self.files[0].flush()

    def write(self, rows: Sequence[Classified]) -> None:
        table, lines = self.files
        if table is None and lines is None:
            self.rows += rows
        if table is not None:
            writer = csv.writer(table, lineterminator="\n")
            writer.writerows(line for row in rows for line in row.cells())
            table.flush()
        if lines is not None:
            lines.writelines(f"{json.dumps(row.as_dict())}\n" for row in rows)
            lines.flush()

    def end(self) -> None:
        if not self.rows:
            return
        cells = [line for row in self.rows for line in row.cells()]
        # An image's name once, on the first of its lines.
        shown = [line if line[1] == 1 else ("", *line[1:]) for line in cells]
        print(fitted_table(COLUMNS, [(*line[:3], f"{float(line[3]):.2%}") for line in shown],
                           terminal_columns()))  # fmt: skip


def likeliest(
    images: Sequence[str], logits: Tensor, classes: Sequence[str], top: int
) -> list[Classified]:
    """Of each image the ``top`` classes, by a network's logits."""
    found = logits.float().softmax(1).topk(min(top, len(classes)))
    rows = zip(images, found.indices.tolist(), found.values.tolist(), strict=True)
    return [
        Classified(image, [(classes[i], p) for i, p in zip(indices, values, strict=True)])
        for image, indices, values in rows
    ]


def tensors_of(
    files: Sequence[Path], prepare: Callable[[Path], Tensor], ahead: int
) -> Iterator[tuple[Path, Tensor | UnreadableImage]]:
    """Each file's image in order, or why it has none; threads decode up to ``ahead`` of them."""
    pool = ThreadPoolExecutor(READERS)
    waiting: deque[tuple[Path, Future[Tensor]]] = deque()
    left = iter(files)
    try:
        while True:
            while len(waiting) <= ahead and (file := next(left, None)) is not None:
                waiting.append((file, pool.submit(prepare, file)))
            if not waiting:
                return
            file, future = waiting.popleft()
            try:
                yield file, future.result()
            except UnreadableImage as error:
                yield file, error
    finally:
        pool.shutdown(cancel_futures=True)


def classify(options: argparse.Namespace) -> int:
    """What the command line asks for; the exit status is 1 where a file cannot be read."""
    files = files_of(options.images)
    network = sized(trained(options.model, options.weights), options.size)
    with warnings.catch_warnings(), ExitStack() as stack:
        warnings.filterwarnings("ignore", module="PIL")  # odd metadata of readable images
        output = Output(options.csv, options.jsonl, stack)
        frozen = _frozen(network, files, options)
        start = time.perf_counter()
        unreadable = _run(frozen, network.preparation.of_file, files, options, output)
        seconds = time.perf_counter() - start
    output.end()
    sys.stdout.flush()
    for error in unreadable:
        _say(f"unreadable, left out: {error}")
    done = len(files) - len(unreadable)
    if not done:
        raise ValueError(f"none of {len(files)} images can be read")
    rate = f"{done} images in {seconds:.2f} s: {done / seconds:.1f} images/s"
    _say(f"{rate}; {network.about}, {options.precision}")
    return 1 if unreadable else 0


def sized(network: Trained, size: int | None) -> Trained:
    """The network for images of another size, of which as much of the middle is taken."""
    if size is None:
        return network
    usual = network.preparation
    resized = round(usual.resized * size / usual.size)
    return network._replace(preparation=usual._replace(size=size, resized=resized))


def _frozen(network: Trained, files: Sequence[Path], options: argparse.Namespace) -> Frozen:
    size = network.preparation.size
    example = torch.zeros(min(options.batch, len(files)), 3, size, size, device=options.device)
    model = network.model.to(options.device)
    calibration = None
    if options.precision == "int8":
        calibration = _calibration(network, files, options.calibration)
    elif options.calibration is not None:
        raise ValueError("--calibration is for --precision int8")
    dtype = PRECISIONS[options.precision]
    return freeze(model, example, dtype=dtype, calibration=calibration, tolerance=options.tolerance)


def _calibration(network: Trained, files: Sequence[Path], folder: str | None) -> Tensor:
    """Images of the folder; without one, those that are to be classified."""
    source = files if folder is None else files_of([folder])
    chosen = source[:: -(-len(source) // CALIBRATION)]
    found = [x for _, x in tensors_of(chosen, network.preparation.of_file, READERS)]
    images = [x for x in found if isinstance(x, Tensor)]
    if not images:
        raise ValueError(f"none of {len(found)} images to calibrate int8 on can be read")
    whose = f"of {folder}" if folder else "of the images themselves (--calibration FOLDER: others)"
    count = max(len(images), LEAST_CALIBRATION)
    copies = f", shifted to make {count}" if count > len(images) else ""
    _say(f"int8 is calibrated on {len(images)} {whose}{copies}")
    return shifted(torch.stack(images), count)


def _run(
    frozen: Frozen,
    prepare: Callable[[Path], Tensor],
    files: Sequence[Path],
    options: argparse.Namespace,
    output: Output,
) -> list[UnreadableImage]:
    unreadable: list[UnreadableImage] = []
    batch: list[tuple[str, Tensor]] = []
    classes: list[str] = []

    def finish() -> None:
        if batch:
            names, images = zip(*batch, strict=True)
            logits = frozen(torch.stack(images).to(options.device))
            if not classes:
                classes.extend(class_names(logits.shape[1], options.classes))
            output.write(likeliest(names, logits, classes, options.top))
            batch.clear()

    with progress("classifying", len(files)) as advance:
        for file, image in tensors_of(files, prepare, 2 * options.batch):
            if isinstance(image, Tensor):
                batch.append((str(file), image))
            else:
                unreadable.append(image)
            if len(batch) == options.batch:
                finish()
            advance()
        finish()
    return unreadable


def _opened(path: Path, stack: ExitStack) -> Any:
    if str(path) == "-":
        return sys.stdout
    return stack.enter_context(
        path.open("w", encoding="utf-8", errors="surrogateescape", newline="")
    )


def _say(line: str) -> None:
    print(line, file=sys.stderr)
