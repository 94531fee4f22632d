"""Static post-training quantisation of a frozen model's graph: what ``freeze`` does for int8."""

from __future__ import annotations

import warnings
from collections.abc import Iterable
from typing import Any, NamedTuple

import torch
from torch import Tensor

from cvkernels.freeze.graph import Graph
from cvkernels.freeze.quantise.calibration import calibrate
from cvkernels.freeze.quantise.guard import Guard

# With fewer images, ranges depend on which they are.
ENOUGH = 64


class Quantised(NamedTuple):
    """How a graph was quantised: on how many images, within which limit, and what it reached on
    them, the signal-to-noise ratios of its outputs in decibels."""

    images: int
    tolerance: float
    decibels: float

    def __str__(self) -> str:
        return f"int8, {self.decibels:.1f} dB on {self.images} images"


def quantise(
    graph: Graph, example: Tensor, calibration: Tensor | Iterable | None, tolerance: float
) -> tuple[Graph, Quantised]:
    """The graph, in float32, with its convolutions in bytes; see :func:`cvkernels.freeze`.

    Raises:
        TypeError: calibration is no tensor and no iterable of batches, or of another dtype.
        ValueError: it is None or empty, holds images of another size than example, or NaN or
            infinity; tolerance is no number.
    """
    tolerance = float(tolerance)
    if tolerance != tolerance:
        raise ValueError("freeze: tolerance must be a number of decibels, got nan")
    images = _images(calibration, example)
    found = calibrate(graph, images)
    quantised, reached = Guard(graph, found, images).search(tolerance)
    return quantised, Quantised(len(images), tolerance, reached)


def _images(calibration: Tensor | Iterable | None, example: Tensor) -> list[Tensor]:
    """Each image, [1, C, H, W] in float32, checked."""
    if calibration is None:
        raise ValueError(
            "freeze: dtype=torch.int8 needs calibration=: some hundred images as the model will "
            "get them, a tensor [N, C, H, W] or an iterable of such batches, such as a DataLoader"
        )
    if not isinstance(calibration, (Tensor, Iterable)):
        raise TypeError(
            f"freeze: calibration must be a tensor or an iterable of batches, got "
            f"{type(calibration).__name__}"
        )
    images: list[Tensor] = []
    for batch in [calibration] if isinstance(calibration, Tensor) else calibration:
        images += _checked(
            batch[0] if isinstance(batch, (tuple, list)) and batch else batch, example
        )
    if not images:
        raise ValueError("freeze: calibration holds no images")
    if len(images) < ENOUGH:
        warnings.warn(
            f"freeze: all {len(images)} calibration images are used, which are few: with fewer "
            f"than {ENOUGH}, the ranges of activations depend on which they are",
            stacklevel=4,
        )
    if len(images) > 1 and all(torch.equal(image, images[0]) for image in images[1:]):
        warnings.warn("freeze: all calibration images are equal", stacklevel=4)
    return images


def _checked(batch: Any, example: Tensor) -> list[Tensor]:
    if not isinstance(batch, Tensor) or not batch.is_floating_point():
        kind = batch.dtype if isinstance(batch, Tensor) else type(batch).__name__
        raise TypeError(
            f"freeze: a calibration batch must be a floating tensor [N, C, H, W], or a pair that "
            f"begins with one, got {kind}"
        )
    if batch.dim() != 4 or batch.shape[1:] != example.shape[1:]:
        raise ValueError(
            f"freeze: calibration images must have the example's size, {list(example.shape[1:])}, "
            f"got a batch {list(batch.shape)}"
        )
    batch = batch.detach().to(example.device, torch.float32)
    if not batch.isfinite().all():
        bad = (~batch.isfinite().flatten(1).all(1)).nonzero().flatten().tolist()
        raise ValueError(
            f"freeze: a calibration batch holds NaN or infinity, in its images {bad[:8]}"
        )
    return list(batch.split(1)) if len(batch) else []
