"""Small networks for images of 32 x 32: three stages of one kind of block."""

from __future__ import annotations

import functools
from collections.abc import Callable, Sequence

from torch import Tensor, nn

from cvkernels.nn import BasicBlock, DenseBlock, FusedSequential, SEBasicBlock, Transition

CLASSES = 10
WIDTHS = (8, 16, 32)


def conv_bn_relu(inputs: int, outputs: int, stride: int = 1) -> FusedSequential:
    conv = nn.Conv2d(inputs, outputs, 3, stride, 1, bias=False)
    return FusedSequential(conv, nn.BatchNorm2d(outputs), nn.ReLU(inplace=True))


def plain_block(inputs: int, outputs: int, stride: int) -> nn.Module:
    """The layers of a residual block, without its shortcut."""
    return nn.Sequential(conv_bn_relu(inputs, outputs, stride), conv_bn_relu(outputs, outputs))


def _with_shortcut(kind: type[nn.Module], inputs: int, outputs: int, stride: int) -> nn.Module:
    if stride == 1 and inputs == outputs:
        return kind(inputs, outputs)
    projection = nn.Conv2d(inputs, outputs, 1, stride, bias=False)
    return kind(inputs, outputs, stride, FusedSequential(projection, nn.BatchNorm2d(outputs)))


residual_block = functools.partial(_with_shortcut, BasicBlock)
se_block = functools.partial(_with_shortcut, SEBasicBlock)


class Classifier(nn.Module):
    """Features, global average pool and a linear layer; He et al.'s initialisation."""

    def __init__(self, features: nn.Module, channels: int) -> None:
        super().__init__()
        self.features, self.fc = features, nn.Linear(channels, CLASSES)
        for module in self.modules():
            if isinstance(module, nn.Conv2d):
                nn.init.kaiming_normal_(module.weight, mode="fan_out", nonlinearity="relu")

    def forward(self, x: Tensor) -> Tensor:
        return self.fc(self.features(x).mean((2, 3)))


def staged(
    block: Callable[[int, int, int], nn.Module], blocks: int, widths: Sequence[int] = WIDTHS
) -> Classifier:
    """A stem of stride 2 and three stages: ``6 * blocks + 2`` layers with weights."""
    layers: list[nn.Module] = [conv_bn_relu(3, widths[0], 2)]
    inputs = widths[0]
    for stage, width in enumerate(widths):
        for index in range(blocks):
            stride = 2 if stage and not index else 1
            layers.append(block(inputs, width, stride))
            inputs = width
    return Classifier(nn.Sequential(*layers), inputs)


def dense(layers: int, growth: int = 8) -> Classifier:
    """Three dense blocks with transitions between them; norm and ReLU behind the last."""
    channels = 2 * growth
    parts: list[nn.Module] = [conv_bn_relu(3, channels, 2)]
    for stage in range(3):
        parts.append(DenseBlock(layers, channels, bn_size=4, growth_rate=growth, drop_rate=0.0))
        channels += layers * growth
        if stage < 2:
            parts.append(Transition(channels, channels // 2))
            channels //= 2
    parts += [nn.BatchNorm2d(channels), nn.ReLU(inplace=True)]
    return Classifier(FusedSequential(*parts), channels)


def parameters(model: nn.Module) -> int:
    return sum(parameter.numel() for parameter in model.parameters())


def residual_of(budget: int, blocks: int) -> Classifier:
    """The residual network of so many blocks whose parameters are nearest to the budget."""
    widths = [(width, 2 * width, 4 * width) for width in range(4, 65)]
    models = (staged(residual_block, blocks, own) for own in widths)
    return min(models, key=lambda model: abs(parameters(model) - budget))
