"""Images to train on and to classify: folders, and two sets that need no download.

Every sample is drawn by a key (index, seed), so that what a step sees depends on neither the number
of workers nor on what ran before it: an interrupted training goes on with the same images.
"""

from __future__ import annotations

import functools
import shutil
from collections.abc import Callable, Iterator, Sequence
from pathlib import Path
from typing import Any, NamedTuple

import torch
from PIL import Image
from torch import Tensor
from torch.utils.data import DataLoader, Dataset, Sampler
from torchvision.transforms import v2

from cvkernels.images import MEAN, STD, SUFFIXES, UnreadableImage, image_files, read

# The label of an image that could not be read; F.cross_entropy ignores it.
NO_LABEL = -100
Key = tuple[int, int]


class Batch(NamedTuple):
    """Images of one step, where they come from, and which could not be read.

    An unreadable image is zeros, and its label is NO_LABEL.
    """

    images: Tensor  # [N, 3, H, W], float32, normalised
    labels: Tensor  # [N]
    names: list[str]
    unreadable: list[str]

    @classmethod
    def of(cls, samples: Sequence[tuple[Tensor, int, str]]) -> Batch:
        images, labels, names = zip(*samples, strict=True)
        unreadable = [name for name, label in zip(names, labels, strict=True) if label == NO_LABEL]
        return cls(torch.stack(images), torch.tensor(labels), list(names), unreadable)


class Samples(Dataset):
    """(name, label) pairs, and how to make an image of each."""

    def __init__(
        self, items: Sequence[tuple[str, int]], load: Callable[[int], Any], transform: Callable,
        size: int,
    ) -> None:  # fmt: skip
        self.items, self.load, self.transform, self.size = items, load, transform, size

    def __len__(self) -> int:
        return len(self.items)

    def __getitem__(self, key: Key) -> tuple[Tensor, int, str]:
        index, seed = key
        name, label = self.items[index]
        try:
            image = self.load(index)
        except UnreadableImage:
            return torch.zeros(3, self.size, self.size), NO_LABEL, name
        with torch.random.fork_rng(devices=[]):
            torch.manual_seed(seed)
            return self.transform(image), label, name


class Split(NamedTuple):
    """What there is to train on and to test with, and the names of the classes."""

    train: Samples
    test: Samples
    classes: list[str]


def split_of(data: str, size: int, out: Path) -> Split:
    """The images that ``data`` names: "digits", "photographs" or a folder.

    Raises:
        ValueError: the folder has no ``train`` and ``val`` with one folder per class in each.
    """
    if data == "digits":
        return digits(size)
    folder = photographs(out / "photographs") if data == "photographs" else Path(data)
    train, val = folder / "train", folder / "val"
    if not train.is_dir() or not val.is_dir():
        raise ValueError(
            f"{folder} must hold the folders train and val, each with a folder of images per class"
        )
    classes = sorted(path.name for path in train.iterdir() if path.is_dir())
    if not classes:
        raise ValueError(f"{train} holds no folder: it must have one per class")
    sets = []
    for part, transform in ((train, augmented(size)), (val, plain(size))):
        items = [
            (str(path), label)
            for label, name in enumerate(classes)
            for path in image_files(part / name)
        ]
        if not items:
            raise ValueError(f"{part} holds no images ({' '.join(SUFFIXES)})")
        sets.append(Samples(items, opener(items), transform, size))
    return Split(*sets, classes)


def opener(items: Sequence[tuple[str, int]]) -> Callable[[int], Image.Image]:
    """Opens the file that an item names."""
    return functools.partial(_open, items)


def _open(items: Sequence[tuple[str, int]], index: int) -> Image.Image:
    return read(items[index][0])


def _tensors() -> list[Callable]:
    return [v2.ToImage(), v2.ToDtype(torch.float32, scale=True), v2.Normalize(MEAN, STD)]


def augmented(size: int) -> Callable:
    crop = v2.RandomResizedCrop(size, scale=(0.35, 1.0), antialias=True)
    return v2.Compose([crop, v2.RandomHorizontalFlip(), *_tensors()])


def plain(size: int) -> Callable:
    resize = v2.Resize(round(size / 0.875), antialias=True)
    return v2.Compose([resize, v2.CenterCrop(size), *_tensors()])


def digits(size: int) -> Split:
    """scikit-learn's 1,797 handwritten digits of 8 x 8; every fifth is a test image."""
    from sklearn.datasets import load_digits

    found = load_digits()
    images = torch.tensor(found.images / 16.0, dtype=torch.float32)[:, None].expand(-1, 3, -1, -1)
    labels = found.target.tolist()
    normalise = v2.Normalize((0.5,) * 3, (0.5,) * 3)
    resize = v2.Resize((size, size), antialias=True)
    shift = v2.RandomAffine(degrees=10, translate=(0.08, 0.08))
    sets = []
    for chosen, transform in ((lambda i: i % 5 > 0, [shift]), (lambda i: i % 5 == 0, [])):
        own = [index for index in range(len(labels)) if chosen(index)]
        items = [(f"digit {index}", labels[index]) for index in own]
        load = functools.partial(_take, images, own)
        sets.append(Samples(items, load, v2.Compose([resize, *transform, normalise]), size))
    return Split(*sets, [str(digit) for digit in range(10)])


def _take(images: Tensor, own: Sequence[int], index: int) -> Tensor:
    return images[own[index]]


def photographs(folder: Path, crops: int = 96, size: int = 128) -> Path:
    """A folder of crops from photographs that scikit-image and scikit-learn carry.

    Each photograph is a class. Its left three quarters are for training, the rest for testing, so
    that no pixel is in both.
    """
    if folder.is_dir():
        return folder
    import numpy
    import skimage.data
    from sklearn.datasets import load_sample_images

    names = ("astronaut", "chelsea", "coffee", "rocket")
    pictures = {name: getattr(skimage.data, name)() for name in names}
    pictures |= dict(zip(("temple", "flower"), load_sample_images().images, strict=True))
    random = numpy.random.default_rng(0)
    new = folder.with_name(f"{folder.name}.new")
    shutil.rmtree(new, ignore_errors=True)
    for part, share in (("train", (0.0, 0.75)), ("val", (0.75, 1.0))):
        for name, pixels in pictures.items():
            height, width = pixels.shape[:2]
            left, right = (int(width * edge) for edge in share)
            side = min(size, right - left, height)
            target = new / part / name
            target.mkdir(parents=True)
            for index in range(crops if part == "train" else crops // 3):
                y = random.integers(0, height - side + 1)
                x = left + random.integers(0, right - left - side + 1)
                crop = Image.fromarray(pixels[y : y + side, x : x + side])
                crop.save(target / f"{index:03d}.jpg", quality=92)
    return new.rename(folder)


class Batches(Sampler):
    """Keys of the batches of one process in one epoch.

    All processes draw one order and take turns. ``skipped`` images of it were seen before an
    interruption. In training the last images, too few for all, are left out; in testing each image
    comes once, and a process may have one batch fewer than another.
    """

    def __init__(
        self, count: int, batch: int, *, rank: int = 0, world: int = 1, seed: int | None = None,
        skipped: int = 0,
    ) -> None:  # fmt: skip
        self.count, self.batch, self.rank, self.world = count, batch, rank, world
        self.seed, self.skipped = seed, skipped

    def __len__(self) -> int:
        left, together = self.count - self.skipped, self.batch * self.world
        if self.seed is not None:
            return max(0, left // together)
        own = (left - self.rank + self.world - 1) // self.world
        return -(-own // self.batch)

    def __iter__(self) -> Iterator[list[Key]]:
        if self.seed is None:
            own = [(index, 0) for index in range(self.skipped, self.count)][self.rank :: self.world]
            yield from (own[i : i + self.batch] for i in range(0, len(own), self.batch))
            return
        generator = torch.Generator().manual_seed(self.seed)
        order = torch.randperm(self.count, generator=generator).tolist()
        together = self.batch * self.world
        for step in range(len(self)):
            start = self.skipped + step * together + self.rank * self.batch
            own = order[start : start + self.batch]
            yield [(index, self.seed * 1_000_003 + index) for index in own]


def loader(samples: Samples, batches: Batches, workers: int) -> DataLoader:
    return DataLoader(
        samples, batch_sampler=batches, num_workers=workers, collate_fn=Batch.of,
        pin_memory=torch.cuda.is_available(),
    )  # fmt: skip
