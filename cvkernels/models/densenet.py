"""DenseNet; mirrors torchvision.models.densenet, names, order and initialisation.

Huang et al. 2017, arXiv:1608.06993.
"""

from __future__ import annotations

from collections import OrderedDict

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from cvkernels.functional import avg_pool
from cvkernels.models.registry import model_builder
from cvkernels.nn.dense import DenseBlock, DenseLayer, Transition
from cvkernels.nn.fused.caller_layout import in_layout_of_input
from cvkernels.nn.fused.match import why_not_affine, why_not_in_place
from cvkernels.nn.fused.module import FusedModule, Step, affine_of, run_step
from cvkernels.nn.fused.watched import why_altered
from cvkernels.nn.sequential import FusedSequential

# The names that code written for torchvision imports.
_DenseLayer, _DenseBlock, _Transition = DenseLayer, DenseBlock, Transition


class DenseNet(FusedModule):
    """Stem, dense blocks with transitions between them, global average pool, classifier.

    ``forward`` takes Tensor[N, 3, H, W], any layout, H and W at least 29, and returns logits
    Tensor[N, num_classes]. In eval the stem and each layer's 1x1 run with the norm and ReLU behind
    them as one op, and the layers of a block write into one buffer. ``load_state_dict`` takes
    checkpoints with the keys of before torch 0.4 ("norm.1.weight") too.

    Args:
        growth_rate: channels that each dense layer adds (k in the paper).
        block_config: dense layers per block.
        num_init_features: outputs of the stem.
        bn_size: a dense layer's 1x1 has ``bn_size * growth_rate`` outputs.
        drop_rate: of the dropout behind each dense layer.
        num_classes: outputs of the classifier.
        memory_efficient: compute the first half of each dense layer again in the backward pass
            (Pleiss et al. 2017, arXiv:1707.06990): less memory, more time. Running statistics are
            updated once a step; torchvision's checkpoint updates those of each norm1 twice.
    """

    def __init__(
        self,
        growth_rate: int = 32,
        block_config: tuple[int, int, int, int] = (6, 12, 24, 16),
        num_init_features: int = 64,
        bn_size: int = 4,
        drop_rate: float = 0,
        num_classes: int = 1000,
        memory_efficient: bool = False,
    ) -> None:
        super().__init__()
        stem = nn.Conv2d(3, num_init_features, kernel_size=7, stride=2, padding=3, bias=False)
        self.features = FusedSequential(
            OrderedDict(
                conv0=stem,
                norm0=nn.BatchNorm2d(num_init_features),
                relu0=nn.ReLU(inplace=True),
                pool0=nn.MaxPool2d(kernel_size=3, stride=2, padding=1),
            )
        )
        channels = num_init_features
        for index, layers in enumerate(block_config, start=1):
            block = DenseBlock(layers, channels, bn_size, growth_rate, drop_rate, memory_efficient)
            self.features.add_module(f"denseblock{index}", block)
            channels += layers * growth_rate
            if index < len(block_config):
                self.features.add_module(f"transition{index}", Transition(channels, channels // 2))
                channels //= 2
        self.features.add_module("norm5", nn.BatchNorm2d(channels))
        self.classifier = nn.Linear(channels, num_classes)
        self._initialise()

    def _initialise(self) -> None:
        for m in self.modules():
            if isinstance(m, nn.Conv2d):
                nn.init.kaiming_normal_(m.weight)
            elif isinstance(m, nn.BatchNorm2d):
                nn.init.constant_(m.weight, 1)
                nn.init.constant_(m.bias, 0)
            elif isinstance(m, nn.Linear):
                nn.init.constant_(m.bias, 0)

    @in_layout_of_input
    def forward(self, x: Tensor) -> Tensor:
        if not self._why_not_last_norm_pooled(x):
            *layers, norm = self.features
            x = self.features.run(x, layers)
            bn, size = affine_of(norm), x.shape[2:]
            x = run_step(Step(norm, "", lambda x: avg_pool(x, tuple(size), input_bn=bn)), x)
            return self.classifier(torch.flatten(x, 1))
        x = self.features(x)
        x = F.relu(x, inplace=True)
        x = F.adaptive_avg_pool2d(x, (1, 1))
        x = torch.flatten(x, 1)
        return self.classifier(x)

    def _why_not_last_norm_pooled(self, x: Tensor) -> str:
        """Why norm5, ReLU and global average pool are no single pass."""
        if reason := why_not_in_place(x, self):
            return reason
        if type(self.features).forward is not FusedSequential.forward or not len(self.features):
            return "features is no plain sequence"
        norm = self.features[-1]
        return why_not_affine(norm) or why_altered(self.features, norm)


@model_builder("DenseNet121_Weights")
def densenet121(**kwargs) -> DenseNet:
    """DenseNet-121: 8.0 M parameters."""
    return DenseNet(32, (6, 12, 24, 16), 64, **kwargs)


@model_builder("DenseNet161_Weights")
def densenet161(**kwargs) -> DenseNet:
    """DenseNet-161, growth rate 48: 28.7 M parameters."""
    return DenseNet(48, (6, 12, 36, 24), 96, **kwargs)


@model_builder("DenseNet169_Weights")
def densenet169(**kwargs) -> DenseNet:
    """DenseNet-169: 14.1 M parameters."""
    return DenseNet(32, (6, 12, 32, 32), 64, **kwargs)


@model_builder("DenseNet201_Weights")
def densenet201(**kwargs) -> DenseNet:
    """DenseNet-201: 20.0 M parameters."""
    return DenseNet(32, (6, 12, 48, 32), 64, **kwargs)
