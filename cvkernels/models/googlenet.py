"""GoogLeNet (Inception v1); mirrors torchvision.models.googlenet, names, order and initialisation.

Szegedy et al. 2015, arXiv:1409.4842.
"""

from __future__ import annotations

import warnings
from collections.abc import Callable
from typing import Any, NamedTuple

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from cvkernels.models.checkpoints import Checkpoint, Pretrained
from cvkernels.models.registry import model_builder, prescribe
from cvkernels.nn.fused.caller_layout import in_layout_of_input
from cvkernels.nn.fused.module import FusedModule
from cvkernels.nn.inception import BasicConv2d, Inception, InceptionAux

# (mean, std) per channel that images of the published checkpoint are normalised with; its
# authors' scale is 0.5 and 0.5.
IMAGENET_STATISTICS = ((0.485, 0.229), (0.456, 0.224), (0.406, 0.225))


class GoogLeNetOutputs(NamedTuple):
    """What training returns; the auxiliary classifier nearer to the logits comes first."""

    logits: Tensor
    aux_logits2: Tensor | None
    aux_logits1: Tensor | None


_GoogLeNetOutputs = GoogLeNetOutputs


def googlenet_loss(
    outputs: GoogLeNetOutputs | Tensor,
    target: Tensor,
    loss: Callable[[Tensor, Tensor], Tensor] = F.cross_entropy,
    weight: float = 0.3,
) -> Tensor:
    """``loss(logits, target) + weight * (loss(aux_logits1, target) + loss(aux_logits2, target))``.

    Args:
        outputs: what GoogLeNet returns, ours or torchvision's: in training the named tuple, in eval
            or without auxiliary classifiers Tensor[N, num_classes], whose loss alone is returned.
            Auxiliary logits that are None count nothing.
        target: what ``loss`` takes beside logits: Tensor[N] of class numbers, or
            Tensor[N, num_classes] of probabilities for ``cross_entropy``.
        loss: of Tensor[N, num_classes] and target.
        weight: of each auxiliary classifier; 0.3 in the paper.

    Returns:
        What ``loss`` returns: of ``cross_entropy`` a scalar, the mean over the batch.

    Raises:
        TypeError: outputs is neither a tensor nor has the fields of :class:`GoogLeNetOutputs`.

    Source: Szegedy et al. 2015, arXiv:1409.4842, section 5.
    """
    if isinstance(outputs, Tensor):
        return loss(outputs, target)
    if getattr(outputs, "_fields", None) != GoogLeNetOutputs._fields:
        raise TypeError(
            f"googlenet_loss: outputs must be a tensor or GoogLeNetOutputs, got "
            f"{type(outputs).__name__}"
        )
    logits, *auxiliary = outputs
    total = loss(logits, target)
    for other in auxiliary:
        if other is not None:
            total = total + weight * loss(other, target)
    return total


class GoogLeNet(FusedModule):
    """Stem, nine Inception blocks, global average pool, classifier; two auxiliary classifiers.

    ``forward`` takes Tensor[N, 3, H, W], any layout, H and W at least 15. In eval it returns logits
    Tensor[N, num_classes], each convolution runs with its norm and ReLU as one op, and the branches
    of a block write into one buffer. In training it returns :class:`GoogLeNetOutputs` where
    ``aux_logits`` is True, and autograd keeps the convolutions' outputs, which all else is computed
    from again (:mod:`cvkernels.nn.training`; once differentiable). The auxiliary classifiers run
    in training alone. They are removed by
    ``model.aux_logits = False; model.aux1 = None; model.aux2 = None``.

    Args:
        num_classes: outputs of each classifier.
        aux_logits: whether to have the auxiliary classifiers.
        transform_input: images are normalised by ImageNet's statistics; renormalise them to mean
            and deviation 0.5.
        init_weights: draw convolutions and linear layers from a truncated normal distribution. None
            means True, with a FutureWarning.
        blocks: [convolution block, Inception block, auxiliary classifier] to build with; by default
            [BasicConv2d, Inception, InceptionAux].
        dropout, dropout_aux: probabilities before the classifier and in the auxiliary ones.

    Raises:
        ValueError: blocks has not three entries.
    """

    def __init__(
        self,
        num_classes: int = 1000,
        aux_logits: bool = True,
        transform_input: bool = False,
        init_weights: bool | None = None,
        blocks: list[Callable[..., nn.Module]] | None = None,
        dropout: float = 0.2,
        dropout_aux: float = 0.7,
    ) -> None:
        super().__init__()
        if init_weights is None:
            warnings.warn(
                "The default weight initialization of GoogLeNet will follow torchvision's when it "
                "changes. Please set init_weights=True to keep the truncated normal distribution, "
                "or init_weights=False for PyTorch's own, which is what a model that loads a "
                "checkpoint needs.",
                FutureWarning,
                stacklevel=2,
            )
            init_weights = True
        blocks = [BasicConv2d, Inception, InceptionAux] if blocks is None else blocks
        if len(blocks) != 3:
            raise ValueError(f"blocks length should be 3 instead of {len(blocks)}")
        conv_block, inception_block, inception_aux_block = blocks

        self.aux_logits = aux_logits
        self.transform_input = transform_input

        self.conv1 = conv_block(3, 64, kernel_size=7, stride=2, padding=3)
        self.maxpool1 = nn.MaxPool2d(3, stride=2, ceil_mode=True)
        self.conv2 = conv_block(64, 64, kernel_size=1)
        self.conv3 = conv_block(64, 192, kernel_size=3, padding=1)
        self.maxpool2 = nn.MaxPool2d(3, stride=2, ceil_mode=True)

        self.inception3a = inception_block(192, 64, 96, 128, 16, 32, 32)
        self.inception3b = inception_block(256, 128, 128, 192, 32, 96, 64)
        self.maxpool3 = nn.MaxPool2d(3, stride=2, ceil_mode=True)

        self.inception4a = inception_block(480, 192, 96, 208, 16, 48, 64)
        self.inception4b = inception_block(512, 160, 112, 224, 24, 64, 64)
        self.inception4c = inception_block(512, 128, 128, 256, 24, 64, 64)
        self.inception4d = inception_block(512, 112, 144, 288, 32, 64, 64)
        self.inception4e = inception_block(528, 256, 160, 320, 32, 128, 128)
        self.maxpool4 = nn.MaxPool2d(2, stride=2, ceil_mode=True)

        self.inception5a = inception_block(832, 256, 160, 320, 32, 128, 128)
        self.inception5b = inception_block(832, 384, 192, 384, 48, 128, 128)

        self.aux1 = self.aux2 = None
        if aux_logits:
            self.aux1 = inception_aux_block(512, num_classes, dropout=dropout_aux)
            self.aux2 = inception_aux_block(528, num_classes, dropout=dropout_aux)

        self.avgpool = nn.AdaptiveAvgPool2d((1, 1))
        self.dropout = nn.Dropout(p=dropout)
        self.fc = nn.Linear(1024, num_classes)
        if init_weights:
            self._initialise()

    def _initialise(self) -> None:
        for m in self.modules():
            if isinstance(m, (nn.Conv2d, nn.Linear)):
                nn.init.trunc_normal_(m.weight, mean=0.0, std=0.01, a=-2, b=2)
            elif isinstance(m, nn.BatchNorm2d):
                nn.init.constant_(m.weight, 1)
                nn.init.constant_(m.bias, 0)

    def _transform_input(self, x: Tensor) -> Tensor:
        if not self.transform_input:
            return x
        channels = [
            torch.unsqueeze(x[:, c], 1) * (std / 0.5) + (mean - 0.5) / 0.5
            for c, (mean, std) in enumerate(IMAGENET_STATISTICS)
        ]
        return torch.cat(channels, 1)

    def _forward(self, x: Tensor) -> tuple[Tensor, Tensor | None, Tensor | None]:
        x = self.conv1(x)
        x = self.pooled(x, self.maxpool1)
        x = self.conv2(x)
        x = self.conv3(x)
        x = self.pooled(x, self.maxpool2)

        x = self.inception3a(x)
        x = self.inception3b(x)
        x = self.pooled(x, self.maxpool3)

        x = self.inception4a(x)
        aux1 = self.aux1(x) if self.training and self.aux1 is not None else None
        x = self.inception4b(x)
        x = self.inception4c(x)
        x = self.inception4d(x)
        aux2 = self.aux2(x) if self.training and self.aux2 is not None else None
        x = self.inception4e(x)
        x = self.pooled(x, self.maxpool4)

        x = self.inception5a(x)
        x = self.inception5b(x)

        x = self.avgpool(x)
        x = torch.flatten(x, 1)
        x = self.dropout(x)
        return self.fc(x), aux2, aux1

    def eager_outputs(
        self, x: Tensor, aux2: Tensor | None, aux1: Tensor | None
    ) -> Tensor | GoogLeNetOutputs:
        return GoogLeNetOutputs(x, aux2, aux1) if self.training and self.aux_logits else x

    @in_layout_of_input
    def forward(self, x: Tensor) -> Tensor | GoogLeNetOutputs:
        return self.eager_outputs(*self._forward(self._transform_input(x)))


def _prepare(
    kwargs: dict[str, Any], source: Pretrained | Checkpoint
) -> Callable[[GoogLeNet], None] | None:
    """torchvision's checkpoint has auxiliary classifiers, untrained ones, and its own scale."""
    if isinstance(source, Checkpoint):
        kwargs.setdefault("init_weights", False)
        return None
    keep_aux = kwargs.get("aux_logits", False)
    kwargs.setdefault("transform_input", True)
    prescribe(kwargs, "aux_logits", True)
    prescribe(kwargs, "init_weights", False)
    return _warn_of_aux if keep_aux else _remove_aux


def _warn_of_aux(model: GoogLeNet) -> None:
    warnings.warn(
        "auxiliary heads in the pretrained googlenet model are NOT pretrained, "
        "so make sure to train them",
        stacklevel=4,
    )


def _remove_aux(model: GoogLeNet) -> None:
    model.aux_logits = False
    model.aux1 = None
    model.aux2 = None


@model_builder("GoogLeNet_Weights", prepare=_prepare)
def googlenet(**kwargs) -> GoogLeNet:
    """GoogLeNet: 6.6 M parameters, 13.0 M with the auxiliary classifiers.

    With torchvision's weights ``transform_input`` is True unless given, and the auxiliary
    classifiers are removed after loading, unless ``aux_logits=True`` is given. A checkpoint file or
    a state dict prescribes nothing: give ``transform_input`` and ``aux_logits`` as it was trained.
    """
    return GoogLeNet(**kwargs)
