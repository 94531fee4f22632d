"""Image files as networks take them: found in folders and by patterns, decoded, cropped, scaled."""

from __future__ import annotations

import contextlib
import glob
import threading
from collections.abc import Iterable, Iterator
from pathlib import Path
from typing import TYPE_CHECKING, Any, NamedTuple

import torch
from torch import Tensor

if TYPE_CHECKING:
    from PIL.Image import Image

# Of ImageNet, which the published weights of most networks were trained with.
MEAN, STD = (0.485, 0.456, 0.406), (0.229, 0.224, 0.225)
SUFFIXES = (".jpg", ".jpeg", ".png", ".bmp", ".webp", ".ppm", ".tif", ".tiff", ".gif")
# An image of more pixels is decoded smaller where its format can (JPEG), and one at a time.
LARGE = 2**24
# More pixels are refused: decoded, they are half a gigabyte and more.
MOST = 2**27
# The longer side over the shorter; what is beyond the middle so much would not be taken.
LONGEST = 16
ORIENTATION = 0x0112  # an EXIF tag

_one_large_image = threading.Lock()
_pillows_limit = threading.Lock()


class UnreadableImage(ValueError):
    """A file that is no image, only a part of one, or too large."""


class Preparation(NamedTuple):
    """What a network's weights were trained to see of an image: its middle, scaled and normalised.

    The shorter side is scaled to ``resized`` pixels, and of that the middle ``size`` x ``size``
    taken, as torchvision's and timm's transforms do.
    """

    size: int = 224
    resized: int = 256
    interpolation: str = "bilinear"
    mean: tuple[float, ...] = MEAN
    std: tuple[float, ...] = STD

    def __call__(self, image: Image) -> Tensor:
        """Tensor[3, size, size], float32."""
        pixels = torch.frombuffer(bytearray(self.cropped(image).tobytes()), dtype=torch.uint8)
        x = pixels.view(self.size, self.size, 3).permute(2, 0, 1) / 255
        mean, std = (torch.tensor(values)[:, None, None] for values in (self.mean, self.std))
        return (x - mean) / std

    def cropped(self, image: Image) -> Image:
        """The middle, scaled."""
        from PIL.Image import Resampling

        width, height = image.size
        if max(width, height) > LONGEST * min(width, height):
            image = _middle(image, min(width, LONGEST * height), min(height, LONGEST * width))
            width, height = image.size
        scale = self.resized / min(width, height)
        sides = max(1, int(width * scale)), max(1, int(height * scale))
        scaled = image.resize(sides, Resampling[self.interpolation.upper()])
        return _middle(scaled, self.size, self.size)

    def of_file(self, path: Path) -> Tensor:
        """:func:`read`, and prepared."""
        return self(read(path, self.resized))


def _middle(image: Image, width: int, height: int) -> Image:
    left, top = round((image.width - width) / 2), round((image.height - height) / 2)
    return image.crop((left, top, left + width, top + height))


def files_of(words: Iterable[str]) -> list[Path]:
    """The files that the words name: files, folders (all images below them) and patterns.

    Raises:
        ValueError: a word names nothing, or a folder without images.
    """
    found: list[Path] = []
    for word in words:
        path = Path(word)
        paths = [path] if path.exists() else [Path(name) for name in _matches(word)]
        if not paths:
            raise ValueError(f"{word!r} is no file, no folder and matches none")
        files = [file for p in paths for file in (image_files(p) if p.is_dir() else [p])]
        if not files:
            raise ValueError(f"{word!r} holds no images ({' '.join(SUFFIXES)})")
        found += files
    return list(dict.fromkeys(found))


def _matches(pattern: str) -> list[str]:
    return sorted(glob.glob(pattern, recursive=True)) if glob.has_magic(pattern) else []


def image_files(folder: Path) -> list[Path]:
    """All images below a folder, sorted."""
    return sorted(
        path for path in folder.rglob("*") if path.suffix.lower() in SUFFIXES and path.is_file()
    )


def read(path: str | Path, side: int | None = None) -> Image:
    """The image in RGB, turned as its EXIF tag says; the first one of several.

    16-bit images keep their high bytes. ``side``: its shorter side will be scaled to that, so one
    of more than :data:`LARGE` pixels may come smaller, at least twice as large.

    Raises:
        UnreadableImage: the message names the file and the cause.
    """
    from PIL import Image, ImageOps

    # What pillow raises for files that are no image, or only a part of one.
    causes = (OSError, SyntaxError, ValueError, EOFError, Image.DecompressionBombError)
    try:
        with _opened(path) as image:
            large = image.width * image.height > LARGE
            if large and side is not None:
                shrink = 2 * side / min(image.size)
                image.draft(None, (round(image.width * shrink), round(image.height * shrink)))
            if (count := image.width * image.height) > MOST:
                raise ValueError(f"{image.width} x {image.height} pixels, more than {MOST:,}")
            with _one_large_image if count > LARGE else contextlib.nullcontext():
                rgb = _in_rgb(image if side is None else _reduced(image, side))
                if image.getexif().get(ORIENTATION, 1) != 1:
                    rgb = ImageOps.exif_transpose(rgb)
                return rgb
    except causes as error:
        raise UnreadableImage(f"{path}: {_cause(error)}") from error


@contextlib.contextmanager
def _opened(path: str | Path) -> Iterator[Image]:
    """Without pillow's limit, which is of the size in the file and not of what is decoded."""
    from PIL import Image

    with _pillows_limit:
        limit, Image.MAX_IMAGE_PIXELS = Image.MAX_IMAGE_PIXELS, None
        try:
            image = Image.open(path)
        finally:
            Image.MAX_IMAGE_PIXELS = limit
    with image:
        yield image


def _reduced(image: Image, side: int) -> Image:
    """A large image smaller, before a copy in RGB or turned is made of it."""
    factor = min(image.size) // (2 * side)
    averaged = image.mode in ("L", "RGB", "RGBA", "CMYK")
    if factor < 2 or not averaged or image.width * image.height <= LARGE:
        return image
    return image.reduce(factor)


def _in_rgb(image: Image) -> Image:
    if image.mode.startswith("I;16"):
        return image.convert("I").point(lambda value: value * (1 / 256)).convert("L").convert("RGB")
    if image.mode in ("I", "F"):
        # Of unknown range: by its largest value, if that is no byte.
        largest: Any = image.getextrema()[1]
        scale = 255 / largest if largest > 255 else 1.0
        return image.point(lambda value: value * scale).convert("L").convert("RGB")
    if image.mode == "P" and "transparency" in image.info:
        image = image.convert("RGBA")
    if image.mode != "RGB":
        return image.convert("RGB")
    image.load()
    return image


def _cause(error: Exception) -> str:
    from PIL import UnidentifiedImageError

    if isinstance(error, UnidentifiedImageError):
        return "no image that pillow can read"
    if isinstance(error, OSError) and error.strerror:
        return error.strerror
    return str(error).splitlines()[0] if str(error) else type(error).__name__
