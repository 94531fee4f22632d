"""DenseNet's blocks; mirror torchvision.models.densenet's layer, block and transition.

Huang et al. 2017, arXiv:1608.06993; checkpointing: Pleiss et al. 2017, arXiv:1707.06990.
"""

from __future__ import annotations

from collections.abc import MutableMapping

import torch
import torch.nn.functional as F
from torch import Tensor, nn
from torch.utils.checkpoint import checkpoint

from cvkernels.nn.fusion import FusedModule
from cvkernels.nn.sequential import FusedSequential


class DenseLayer(FusedModule):
    """``conv2(relu2(norm2(conv1(relu1(norm1(cat(inputs)))))))``: ``growth_rate`` new channels.

    In eval conv1 (1x1) runs with norm2 and relu2 as one op, and on CUDA with norm1 and relu1 too;
    conv2 is the 3x3.

    Args:
        num_input_features: channels of the inputs together.
        growth_rate: channels of the output.
        bn_size: conv1 has ``bn_size * growth_rate`` outputs.
        drop_rate: of the dropout behind conv2, in training.
        memory_efficient: where an input requires a gradient, compute up to conv1 again in the
            backward pass and keep nothing of it until then.
    """

    def __init__(
        self,
        num_input_features: int,
        growth_rate: int,
        bn_size: int,
        drop_rate: float,
        memory_efficient: bool = False,
    ) -> None:
        super().__init__()
        width = bn_size * growth_rate
        self.norm1 = nn.BatchNorm2d(num_input_features)
        self.relu1 = nn.ReLU(inplace=True)
        self.conv1 = nn.Conv2d(num_input_features, width, kernel_size=1, stride=1, bias=False)
        self.norm2 = nn.BatchNorm2d(width)
        self.relu2 = nn.ReLU(inplace=True)
        self.conv2 = nn.Conv2d(width, growth_rate, kernel_size=3, stride=1, padding=1, bias=False)
        self.drop_rate = float(drop_rate)
        self.memory_efficient = memory_efficient

    def bn_function(self, inputs: list[Tensor]) -> Tensor:
        """The part that ``memory_efficient`` computes twice."""
        return self.conv1(self.relu1(self.norm1(torch.cat(inputs, 1))))

    def any_requires_grad(self, inputs: list[Tensor]) -> bool:
        return any(tensor.requires_grad for tensor in inputs)

    def call_checkpoint_bottleneck(self, inputs: list[Tensor]) -> Tensor:
        return checkpoint(lambda *parts: self.bn_function(parts), *inputs, use_reentrant=False)

    def forward(self, input: Tensor | list[Tensor]) -> Tensor:
        inputs = [input] if isinstance(input, Tensor) else input
        if self.memory_efficient and self.any_requires_grad(inputs):
            bottleneck = self.relu2(self.norm2(self.call_checkpoint_bottleneck(inputs)))
        else:
            bottleneck = self.fused(
                torch.cat(inputs, 1),
                self.conv1,
                self.norm2,
                self.relu2,
                input_bn=(self.norm1, self.relu1),
            )
        new_features = self.fused(bottleneck, self.conv2)
        if self.drop_rate > 0:
            new_features = F.dropout(new_features, p=self.drop_rate, training=self.training)
        return new_features

    def rename_old_keys(self, state_dict: MutableMapping[str, Tensor], prefix: str = "") -> None:
        """Give entries with the names of old checkpoints ("norm.1.weight") those of today."""
        for name in (*dict(self.named_parameters()), *dict(self.named_buffers())):
            old = f"{prefix}{name[:4]}.{name[4:]}"  # "norm1.weight" was "norm.1.weight"
            if old in state_dict and prefix + name not in state_dict:
                state_dict[prefix + name] = state_dict.pop(old)

    def _load_from_state_dict(self, state_dict, prefix, *args, **kwargs) -> None:
        self.rename_old_keys(state_dict, prefix)
        super()._load_from_state_dict(state_dict, prefix, *args, **kwargs)


class DenseBlock(nn.ModuleDict):
    """``num_layers`` dense layers; each takes the block's input and the outputs of all before it.

    Returns them concatenated: ``num_input_features + num_layers * growth_rate`` channels.
    """

    _version = 2

    def __init__(
        self,
        num_layers: int,
        num_input_features: int,
        bn_size: int,
        growth_rate: int,
        drop_rate: float,
        memory_efficient: bool = False,
    ) -> None:
        super().__init__()
        for index in range(num_layers):
            self[f"denselayer{index + 1}"] = DenseLayer(
                num_input_features + index * growth_rate,
                growth_rate,
                bn_size,
                drop_rate,
                memory_efficient,
            )

    def forward(self, init_features: Tensor) -> Tensor:
        features = [init_features]
        for layer in self.values():
            features.append(layer(features))
        return torch.cat(features, 1)


class Transition(FusedSequential):
    """Between two blocks: ``pool(conv(relu(norm(x))))``, half the height and width.

    On CUDA norm and relu are the convolution's prologue in eval.
    """

    def __init__(self, num_input_features: int, num_output_features: int) -> None:
        super().__init__()
        self.norm = nn.BatchNorm2d(num_input_features)
        self.relu = nn.ReLU(inplace=True)
        self.conv = nn.Conv2d(
            num_input_features, num_output_features, kernel_size=1, stride=1, bias=False
        )
        self.pool = nn.AvgPool2d(kernel_size=2, stride=2)
