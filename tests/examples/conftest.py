import importlib
import sys
from pathlib import Path

import pytest
import torch

EXAMPLES = Path(__file__).resolve().parents[2] / "examples"


@pytest.fixture
def example(monkeypatch):
    """Imports a script of examples/, which stands beside its modules."""
    if not EXAMPLES.is_dir():
        pytest.skip("the tests run without the repository")
    for package in ("PIL", "torchvision"):
        pytest.importorskip(package)
    monkeypatch.syspath_prepend(str(EXAMPLES))
    yield importlib.import_module
    for name in ("train", "serve", "data", "checkpoint", "plots", "progress"):
        sys.modules.pop(name, None)


@pytest.fixture
def folder(tmp_path):
    """Three classes, noise in three colours: eight images of each to train on, three others."""
    image = pytest.importorskip("PIL.Image")
    generator = torch.Generator().manual_seed(0)
    for part, count in (("train", 8), ("val", 3)):
        for label, name in enumerate(("blue", "green", "red")):
            target = tmp_path / "images" / part / name
            target.mkdir(parents=True)
            for index in range(count):
                pixels = torch.randint(0, 80, (20, 24, 3), generator=generator, dtype=torch.uint8)
                pixels[..., 2 - label] += 150
                image.fromarray(pixels.numpy()).save(target / f"{index}.png")
    return tmp_path / "images"
