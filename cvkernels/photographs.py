"""The photographs that scikit-image and scikit-learn carry, and images to calibrate with."""

from __future__ import annotations

import importlib.util
from collections.abc import Iterable
from importlib import resources
from pathlib import Path

import torch
from torch import Tensor

PHOTOGRAPHS = {
    "skimage.data": (
        "astronaut.png", "chelsea.png", "coffee.png", "horse.png", "motorcycle_left.png",
        "rocket.jpg",
    ),
    "sklearn.datasets.images": ("china.jpg", "flower.jpg"),
}  # fmt: skip


def photographs(packages: Iterable[str] = tuple(PHOTOGRAPHS)) -> list[Path]:
    """The files of those packages that are installed.

    Raises:
        ImportError: none is; the message has the command that installs them.
    """
    found = []
    for package in packages:
        names = PHOTOGRAPHS[package]
        if importlib.util.find_spec(package.partition(".")[0]) is not None:
            folder = Path(str(resources.files(package)))
            found += [folder / name for name in names if (folder / name).is_file()]
    if not found:
        raise ImportError(
            "no photographs: they are scikit-image's and scikit-learn's; install them "
            "(pip install scikit-image scikit-learn), or give image files"
        )
    return found


def shifted(images: Tensor, count: int) -> Tensor:
    """``count`` images: the given ones over and over, each time shifted by some pixels."""
    rounds = range(-(-count // len(images)))
    return torch.cat([images.roll((7 * i, 5 * i), (2, 3)) for i in rounds])[:count]
