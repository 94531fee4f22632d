"""The five networks, with the constructors, parameter names and checkpoints of the stock models."""

from cvkernels.models.checkpoints import load_checkpoint, read_checkpoint
from cvkernels.models.conversion import convert_checkpoint
from cvkernels.models.densenet import (
    DenseNet,
    densenet121,
    densenet161,
    densenet169,
    densenet201,
)
from cvkernels.models.efficientnet import (
    EfficientNet,
    efficientnet,
    efficientnet_b0,
    efficientnet_b1,
    efficientnet_b2,
    efficientnet_b3,
    efficientnet_b4,
    efficientnet_b5,
    efficientnet_b6,
    efficientnet_b7,
    efficientnet_v2_l,
    efficientnet_v2_m,
    efficientnet_v2_s,
)
from cvkernels.models.googlenet import (
    GoogLeNet,
    GoogLeNetOutputs,
    _GoogLeNetOutputs,  # noqa: F401 - the name that older code imports
    googlenet,
    googlenet_loss,
)
from cvkernels.models.legacy_senet import (
    LegacySENet,
    legacy_senet154,
    legacy_seresnet18,
    legacy_seresnet34,
    legacy_seresnet50,
    legacy_seresnet101,
    legacy_seresnet152,
    legacy_seresnext50_32x4d,
    legacy_seresnext101_32x4d,
)
from cvkernels.models.registry import create_model, list_models
from cvkernels.models.resnet import (
    ResNet,
    resnet18,
    resnet34,
    resnet50,
    resnet101,
    resnet152,
    resnext50_32x4d,
    resnext101_32x8d,
    resnext101_64x4d,
    wide_resnet50_2,
    wide_resnet101_2,
)
from cvkernels.models.senet import (
    SEResNet,
    senet154,
    seresnet18,
    seresnet34,
    seresnet50,
    seresnet101,
    seresnet152,
    seresnext50_32x4d,
    seresnext101_32x4d,
    seresnext101_32x8d,
)
from cvkernels.nn import BasicBlock, Bottleneck

__all__ = [
    "BasicBlock", "Bottleneck", "DenseNet", "EfficientNet", "GoogLeNet", "GoogLeNetOutputs",
    "LegacySENet", "ResNet", "SEResNet",
    "convert_checkpoint", "create_model", "googlenet_loss", "list_models", "load_checkpoint",
    "read_checkpoint",
    "densenet121", "densenet161", "densenet169", "densenet201",
    "efficientnet", "efficientnet_b0", "efficientnet_b1", "efficientnet_b2", "efficientnet_b3",
    "efficientnet_b4", "efficientnet_b5", "efficientnet_b6", "efficientnet_b7",
    "efficientnet_v2_l", "efficientnet_v2_m", "efficientnet_v2_s",
    "googlenet",
    "legacy_senet154", "legacy_seresnet18", "legacy_seresnet34", "legacy_seresnet50",
    "legacy_seresnet101", "legacy_seresnet152", "legacy_seresnext50_32x4d",
    "legacy_seresnext101_32x4d",
    "resnet18", "resnet34", "resnet50", "resnet101", "resnet152", "resnext50_32x4d",
    "resnext101_32x8d", "resnext101_64x4d", "wide_resnet50_2", "wide_resnet101_2",
    "senet154", "seresnet18", "seresnet34", "seresnet50", "seresnet101", "seresnet152",
    "seresnext50_32x4d", "seresnext101_32x4d", "seresnext101_32x8d",
]  # fmt: skip
