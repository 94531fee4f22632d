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
from cvkernels.functional import BatchNormParams, dense_concat, max_pool
from cvkernels.nn.fused.caller_layout import in_layout_of_input
from cvkernels.nn.fused.match import (
    relu_,
    why_not_in_place,
    why_not_layer,
    why_not_max_pool,
    why_not_same_map,
)
from cvkernels.nn.fused.module import FusedModule, Step, affine_of, conv_step, run_step
from cvkernels.nn.fused.plan_cache import guard_of
from cvkernels.nn.fused.watched import why_altered, why_not_called
from cvkernels.nn.sequential import FusedSequential
from cvkernels.nn.training.concat_and_pool import concatenated
from cvkernels.nn.training.conv_bn_act import siblings
from cvkernels.nn.training.match import why_not_one_group, why_not_train_conv_bn_act
from cvkernels.ops.common.layout import new_channels_last
from cvkernels.ops.common.recycled import maker
from cvkernels.ops.conv_bn_act.op import IMPLEMENTATIONS, supports_prologue_and_slices

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

    @in_layout_of_input
    def forward(self, x: Tensor) -> Tensor:
        return self.fused(x, self.conv, self.bn, relu_)


class Inception(FusedModule):
    """Four branches side by side, concatenated by channel; figure 2b of the paper.

    ::

        x -+- 1x1 ---------------- ch1x1     -+
           +- 1x1 ch3x3red - 3x3 - ch3x3     -+
           +- 1x1 ch5x5red - 3x3 - ch5x5     -+- cat
           +- max pool 3x3 - 1x1 - pool_proj -+

    The three 1x1 that read x run as one convolution, in training and in eval on the CPU. In eval
    without gradients every branch writes its channels of the output in place. Where the kernels
    write channel slices (on CUDA, and in float32 on CPU) the output is a slice of a channels_last
    buffer, which the maps between the convolutions share.

    Args:
        in_channels: of x.
        ch1x1, ch3x3red, ch3x3, ch5x5red, ch5x5, pool_proj: outputs of the convolutions above.
        conv_block: called as ``conv_block(in, out, kernel_size=..., ...)``; BasicConv2d by default.
    """

    def __init__(
        self, in_channels: int, ch1x1: int, ch3x3red: int, ch3x3: int, ch5x5red: int,
        ch5x5: int, pool_proj: int, conv_block: Callable[..., nn.Module] | None = None,
    ) -> None:  # fmt: skip
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
        reason = _why_not_blocks(blocks, lambda *parts: why_not_train_conv_bn_act(x, *parts))
        return (
            reason
            or _why_not_one_convolution([block.conv for block in blocks])
            or why_not_one_group(*(block.bn for block in blocks))
        )

    @in_layout_of_input
    def forward(self, x: Tensor) -> Tensor:
        plans = self.plans_of(x, self)
        if plans is not None and (plan := plans.get(x)) is not None:
            return plan(self, x)
        reason = why_not_in_place(x, self) or self._why_not_in_place(x)
        if not reason:
            guard = None if plans is None else guard_of(x, list(self.modules()))
            branches = _InPlace(self, x, lasting=guard is not None)
            y = branches(self, x)
            if branches.lasting:
                plans.keep(guard, branches, x)
            return y
        branches = self._branches(x)
        if (recorder := record.active()) is None:
            return concatenated(branches)
        with recorder.fallback(reason):
            return torch.cat(branches, 1)

    def _why_not_in_place(self, x: Tensor) -> str:
        """Why the branches have to be called, one by one."""
        branches = (self.branch1, self.branch2, self.branch3, self.branch4)
        if reason := why_altered(*branches) or _why_not_pairs(branches[1:]):
            return reason
        one, (reduce3, conv3), (reduce5, conv5), (pool, projection) = branches
        reason = (
            _why_not_blocks((one, reduce3, conv3, reduce5, conv5, projection), why_not_layer)
            or why_not_max_pool(x, pool)
            or why_not_same_map(pool)
            or _why_not_siblings([one, reduce3, reduce5])
        )
        if reason:
            return reason
        requested = backend.requested("auto", IMPLEMENTATIONS)
        if x.is_cpu or supports_prologue_and_slices(x) or requested == "reference":
            return ""
        return "no backend here writes channel slices"

    def merged(self, blocks: Sequence[BasicConv2d]) -> tuple[Tensor, None, BatchNormParams]:
        """Weight, bias and norm of the one convolution that 1x1 blocks on one input are."""
        norms = [affine_of(block.bn) for block in blocks]
        sources = [block.conv.weight for block in blocks] + [v for bn in norms for v in bn[:4]]

        def merge() -> tuple[Tensor, BatchNormParams]:
            with torch.no_grad(), record.paused():
                weight = torch.cat([block.conv.weight for block in blocks])
                vectors = [torch.cat(parts) for parts in list(zip(*norms, strict=True))[:4]]
            return weight, BatchNormParams(*vectors, norms[0].eps)

        weight, bn = self.weights_of(self).get("merged", sources, merge)
        return weight, None, bn


class _InPlace:
    """The branches of an Inception block for maps like x, each writing its part of the output.

    In this order the first branch's output ends that of the convolutions on x and begins the
    block's: where kernels write channel slices, both are slices of one buffer. Called with the
    block, which is not held: it holds this as a plan.
    """

    def __init__(self, block: Inception, x: Tensor, lasting: bool) -> None:
        one, (reduce3, conv3), (reduce5, conv5) = block.branch1, block.branch2, block.branch3
        self.lasting = lasting
        self.pool, projection = block.branch4
        self.siblings = (reduce3, reduce5, one)
        self.following = (conv3, conv5, projection)
        self.shares = supports_prologue_and_slices(x)  # oneDNN and cuDNN write no channel slices
        self.reduced3 = reduce3.conv.weight.shape[0]
        self.reduced = self.reduced3 + reduce5.conv.weight.shape[0]
        self.first = one.conv.weight.shape[0]
        widths = [layer.conv.weight.shape[0] for layer in self.following]
        starts = [self.first + sum(widths[:index]) for index in range(len(widths))]
        self.slices = [(a, a + width) for a, width in zip(starts, widths, strict=True)]
        total = self.first + sum(widths) + (self.reduced if self.shares else 0)
        self.new_buffer = maker(self._new(x, total))
        self.runs: dict[object, Callable[..., Tensor]] = {}

    def __call__(self, block: Inception, x: Tensor) -> Tensor:
        end = self.reduced + self.first
        if self.shares:
            shared = self.new_buffer()
            merged, buffer = shared[:, :end], shared[:, self.reduced :]
            self._siblings(block, x, merged)
        else:
            merged, buffer = self._siblings(block, x, None), self.new_buffer()
            dense_concat(buffer, merged[:, self.reduced :], 0)
        reduced3, reduced5 = merged[:, : self.reduced3], merged[:, self.reduced3 : self.reduced]
        inputs = (reduced3, reduced5, self._pooled(x))
        for features, layer, (start, stop) in zip(inputs, self.following, self.slices, strict=True):
            self._convolved(block, features, layer, buffer[:, start:stop])
        return buffer

    def _new(self, x: Tensor, channels: int) -> Tensor:
        return new_channels_last(x, (x.shape[0], channels, *x.shape[2:]))

    def _run(self, key: object, step: Callable[[], Step], *data: Tensor | None) -> Tensor:
        """What was kept for ``key``, or the step, on data; a lasting one is kept."""
        if (run := self.runs.get(key)) is not None:
            return run(*data)
        chosen = step()
        self.lasting = self.lasting and chosen.lasting
        if self.lasting:
            self.runs[key] = chosen.run
        return run_step(chosen, *data)

    def _siblings(self, block: Inception, x: Tensor, out: Tensor | None) -> Tensor:
        """The outputs of the 1x1 convolutions on x side by side, on the CPU as one convolution."""
        if not x.is_cpu:
            out = self._new(x, self.reduced + self.first) if out is None else out
            start = 0
            for layer in self.siblings:
                stop = start + layer.conv.weight.shape[0]
                self._convolved(block, x, layer, out[:, start:stop])
                start = stop
            return out

        def merged() -> Step:
            tensors, owner = block.merged(self.siblings), self.siblings[-1].conv
            options = {"act": "relu", "cache": block.weights_of(block)}
            return conv_step(x, owner, tensors, options, (None, None, out), self.lasting)

        return self._run("siblings", merged, x, None, None, out)

    def _convolved(self, block: Inception, x: Tensor, layer: BasicConv2d, out: Tensor) -> Tensor:
        def step() -> Step:
            return block.layer_step(x, layer.conv, layer.bn, relu_, out=out, lasting=self.lasting)

        return self._run(layer, step, x, None, None, out)

    def _pooled(self, x: Tensor) -> Tensor:
        def step() -> Step:
            p = self.pool
            window = (p.kernel_size, p.stride, p.padding, p.dilation, p.ceil_mode)
            if not self.lasting:
                return Step(p, "", lambda x: max_pool(x, *window))
            plan = max_pool.plan(x, *window)
            return Step(p, "", plan.run, plan.backend != "reference")

        return self._run("pool", step, x)


def _why_not_blocks(blocks: Sequence[nn.Module], why_not: Callable[..., str]) -> str:
    """The first reason of a block, by its convolution, norm and activation, to call it."""
    for block in blocks:
        if type(block).forward is not BasicConv2d.forward:
            return f"{type(block).__name__} is no convolution block of cvkernels"
        reason = why_altered(block) or why_not(block.conv, block.bn, relu_)
        if reason := reason or why_not_same_map(block.conv):
            return reason
    return ""


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
        self, in_channels: int, num_classes: int,
        conv_block: Callable[..., nn.Module] | None = None, dropout: float = 0.7,
    ) -> None:  # fmt: skip
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
