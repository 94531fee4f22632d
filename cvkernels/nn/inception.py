"""GoogLeNet's blocks; mirror torchvision.models.googlenet's, names and order.

Szegedy et al. 2015, arXiv:1409.4842, with the batch norms of Ioffe and Szegedy 2015,
arXiv:1502.03167.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from cvkernels import backend, record
from cvkernels.functional import BatchNormParams, DerivedWeights, conv_bn_act, dense_concat
from cvkernels.nn.fused.growing import Verdict
from cvkernels.nn.fused.match import (
    relu_,
    why_not_called,
    why_not_conv_bn_act,
    why_not_in_place,
    why_not_max_pool,
    why_not_same_map,
)
from cvkernels.nn.fused.module import FusedModule, affine_of, run_group
from cvkernels.nn.sequential import FusedSequential
from cvkernels.nn.training.concat_and_pool import concatenated
from cvkernels.nn.training.conv_bn_act import siblings
from cvkernels.nn.training.match import why_not_train_conv_bn_act
from cvkernels.ops.conv_bn_act.op import IMPLEMENTATIONS, fuses_prologue
from cvkernels.ops.conv_bn_act.prepared import prepared

SEQUENCES = (nn.Sequential.forward, FusedSequential.forward)


class BasicConv2d(FusedModule):
    """``relu(bn(conv(x)))``; ``kwargs`` are nn.Conv2d's.

    One op in eval. In training autograd keeps the convolution's output alone, see
    :mod:`cvkernels.nn.training`.
    """

    def __init__(self, in_channels: int, out_channels: int, **kwargs: Any) -> None:
        super().__init__()
        self.conv = nn.Conv2d(in_channels, out_channels, bias=False, **kwargs)
        self.bn = nn.BatchNorm2d(out_channels, eps=0.001)

    def forward(self, x: Tensor) -> Tensor:
        return self.fused(x, self.conv, self.bn, relu_)


class Inception(FusedModule):
    """Four branches side by side, concatenated by channel; figure 2b of the paper.

    ::

        x -+- 1x1 ---------------- ch1x1     -+
           +- 1x1 ch3x3red - 3x3 - ch3x3     -+
           +- 1x1 ch5x5red - 3x3 - ch5x5     -+- cat
           +- max pool 3x3 - 1x1 - pool_proj -+

    The three 1x1 that read x run as one convolution, in eval and in training. In eval without
    gradients every branch writes its channels of the output in place. Where the kernels write
    channel slices (on CUDA, and in float32 on CPU) the output is a slice of a channels_last buffer,
    which the maps between the convolutions share.

    Args:
        in_channels: of x.
        ch1x1, ch3x3red, ch3x3, ch5x5red, ch5x5, pool_proj: outputs of the convolutions above.
        conv_block: called as ``conv_block(in, out, kernel_size=..., ...)``; BasicConv2d by default.
    """

    def __init__(
        self,
        in_channels: int,
        ch1x1: int,
        ch3x3red: int,
        ch3x3: int,
        ch5x5red: int,
        ch5x5: int,
        pool_proj: int,
        conv_block: Callable[..., nn.Module] | None = None,
    ) -> None:
        super().__init__()
        conv_block = conv_block or BasicConv2d
        self.branch1 = conv_block(in_channels, ch1x1, kernel_size=1)
        self.branch2 = nn.Sequential(
            conv_block(in_channels, ch3x3red, kernel_size=1),
            conv_block(ch3x3red, ch3x3, kernel_size=3, padding=1),
        )
        self.branch3 = nn.Sequential(
            conv_block(in_channels, ch5x5red, kernel_size=1),
            # 3x3 where the paper has 5x5: the published checkpoints were trained so
            # (github.com/pytorch/vision/issues/906).
            conv_block(ch5x5red, ch5x5, kernel_size=3, padding=1),
        )
        self.branch4 = FusedSequential(
            nn.MaxPool2d(kernel_size=3, stride=1, padding=1, ceil_mode=True),
            conv_block(in_channels, pool_proj, kernel_size=1),
        )

    def _forward(self, x: Tensor) -> list[Tensor]:
        return [self.branch1(x), self.branch2(x), self.branch3(x), self.branch4(x)]

    def _branches(self, x: Tensor) -> list[Tensor]:
        if self._why_not_train_siblings(x):
            return self._forward(x)
        one, (reduce3, conv3), (reduce5, conv5) = self.branch1, self.branch2, self.branch3
        blocks = [(block.conv, block.bn) for block in (one, reduce3, reduce5)]
        one, reduced3, reduced5 = siblings(x, blocks)
        return [one, conv3(reduced3), conv5(reduced5), self.branch4(x)]

    def _why_not_train_siblings(self, x: Tensor) -> str:
        """Why the first convolutions of the branches are not trained as one."""
        branches = (self.branch1, self.branch2, self.branch3)
        if reason := why_not_called(x, *branches) or _why_not_pairs(branches[1:]):
            return reason
        blocks = [branches[0], branches[1][0], branches[2][0]]
        for block in blocks:
            if type(block).forward is not BasicConv2d.forward:
                return f"{type(block).__name__} is no convolution block of cvkernels"
            reason = why_not_called(x, block)
            reason = reason or why_not_train_conv_bn_act(x, block.conv, block.bn, relu_)
            if reason := reason or why_not_same_map(block.conv):
                return reason
        return _why_not_one_convolution([block.conv for block in blocks])

    def forward(self, x: Tensor) -> Tensor:
        reason = why_not_in_place(x, self) or self._verdict().why_not(
            self, lambda: self._why_not_in_place(x)
        )
        if not reason and not x.is_cpu and not _shares_buffers(x):
            requested = backend.requested("auto", IMPLEMENTATIONS)
            reason = "" if requested == "reference" else "no backend here writes channel slices"
        if not reason:
            return self._in_place(x)
        branches = self._branches(x)
        if (recorder := record.active()) is None:
            return concatenated(branches)
        with recorder.fallback(reason):
            return torch.cat(branches, 1)

    def _verdict(self) -> Verdict:
        derived = self.__dict__.setdefault("_derived", {})
        return derived.get(Verdict) or derived.setdefault(Verdict, Verdict())

    def _why_not_in_place(self, x: Tensor) -> str:
        """Why the branches have to be called, one by one."""
        branches = (self.branch1, self.branch2, self.branch3, self.branch4)
        if reason := why_not_called(x, *branches):
            return reason
        if reason := _why_not_pairs(branches[1:]):
            return reason
        convolutions = [branches[0], *branches[1], *branches[2], branches[3][1]]
        for block in convolutions:
            if type(block).forward is not BasicConv2d.forward:
                return f"{type(block).__name__} is no convolution block of cvkernels"
            reason = why_not_called(x, block) or why_not_conv_bn_act(x, block.conv, block.bn, relu_)
            if reason := reason or why_not_same_map(block.conv):
                return reason
        pool = branches[3][0]
        if reason := why_not_max_pool(x, pool) or why_not_same_map(pool):
            return reason
        return _why_not_siblings([branches[0], branches[1][0], branches[2][0]])

    def _in_place(self, x: Tensor) -> Tensor:
        one, (reduce3, conv3), (reduce5, conv5) = self.branch1, self.branch2, self.branch3
        pool, projection = self.branch4
        reduced3 = reduce3.conv.out_channels
        reduced = reduced3 + reduce5.conv.out_channels
        width = one.conv.out_channels
        following = (conv3, conv5, projection)
        total = width + sum(block.conv.out_channels for block in following)
        # In this order the first branch's output ends the siblings' and begins the block's.
        siblings = (reduce3, reduce5, one)
        if not _shares_buffers(x):
            merged = self._merged(x, siblings)
            buffer = _channels_last(x, total)
            dense_concat(buffer, merged[:, reduced:], 0)
        else:
            shared = _channels_last(x, reduced + total)
            merged = self._merged(x, siblings, out=shared[:, : reduced + width])
            buffer = shared[:, reduced:]
        inputs = (merged[:, :reduced3], merged[:, reduced3:reduced], self.pooled(x, pool))
        for features, block in zip(inputs, following, strict=True):
            stop = width + block.conv.out_channels
            block.fused(features, block.conv, block.bn, relu_, out=buffer[:, width:stop])
            width = stop
        return buffer

    def _merged(
        self, x: Tensor, blocks: tuple[BasicConv2d, ...], out: Tensor | None = None
    ) -> Tensor:
        """The outputs of 1x1 convolution blocks on one input, side by side, as one convolution."""
        verdict = self._verdict()
        if (run := verdict.recall(x)) is not None:
            return run(x, None, out)
        derived = self.__dict__["_derived"]
        merged, packed = derived.setdefault("siblings", (DerivedWeights(), DerivedWeights()))
        norms = [affine_of(block.bn) for block in blocks]
        sources = [block.conv.weight for block in blocks] + [v for bn in norms for v in bn[:4]]

        def merge() -> tuple[Tensor, BatchNormParams]:
            with torch.no_grad(), record.unseen():
                weight = torch.cat([block.conv.weight for block in blocks])
                vectors = [torch.cat(parts) for parts in list(zip(*norms, strict=True))[:4]]
            return weight, BatchNormParams(*vectors, norms[0].eps)

        weight, bn = merged.get("merged", sources, merge)

        def as_op() -> Tensor:
            return conv_bn_act(x, weight, None, bn, act="relu", out=out, cache=packed)

        y = run_group(blocks[-1].conv, "", as_op, None)
        geometry = ((1, 1), (0, 0), (1, 1), 1)
        verdict.keep(x, lambda: prepared(x, weight, None, bn, geometry, "relu", None, packed))
        return y


def _shares_buffers(x: Tensor) -> bool:
    """Whether convolutions read and write channel slices; oneDNN's and cuDNN's do not."""
    return fuses_prologue(x)


def _channels_last(x: Tensor, channels: int) -> Tensor:
    """An empty map as large as x, with ``channels`` channels."""
    shape = (x.shape[0], channels, *x.shape[2:])
    return torch.empty(shape, dtype=x.dtype, device=x.device, memory_format=torch.channels_last)


def _why_not_pairs(branches: Sequence[nn.Module]) -> str:
    if any(type(b).forward not in SEQUENCES or len(b) != 2 for b in branches):
        return "a branch is no sequence of two"
    return ""


def _why_not_one_convolution(convolutions: Sequence[nn.Conv2d]) -> str:
    for conv in convolutions:
        if conv.kernel_size != (1, 1) or conv.groups != 1 or conv.bias is not None:
            return "a first convolution of a branch is not 1x1, or has groups or a bias"
    return ""


def _why_not_siblings(blocks: list[BasicConv2d]) -> str:
    """Why these blocks on one input are not one convolution with more outputs."""
    if reason := _why_not_one_convolution([block.conv for block in blocks]):
        return reason
    for block in blocks:
        bn = block.bn
        if bn.weight is None or bn.bias is None or bn.eps != blocks[0].bn.eps:
            return "the norms behind the first convolutions differ in their form"
    return ""


class InceptionAux(nn.Module):
    """The auxiliary classifier: average pool to 4x4, 1x1 convolution, two linear layers.

    The paper pools 5x5 with stride 3, which gives the same 4x4 on the 14x14 maps of 224 pixels.
    """

    def __init__(
        self,
        in_channels: int,
        num_classes: int,
        conv_block: Callable[..., nn.Module] | None = None,
        dropout: float = 0.7,
    ) -> None:
        super().__init__()
        conv_block = conv_block or BasicConv2d
        self.conv = conv_block(in_channels, 128, kernel_size=1)
        self.fc1 = nn.Linear(2048, 1024)
        self.fc2 = nn.Linear(1024, num_classes)
        self.dropout = nn.Dropout(p=dropout)

    def forward(self, x: Tensor) -> Tensor:
        x = F.adaptive_avg_pool2d(x, (4, 4))
        x = self.conv(x)
        x = torch.flatten(x, 1)
        x = F.relu(self.fc1(x), inplace=True)
        x = self.dropout(x)
        return self.fc2(x)
