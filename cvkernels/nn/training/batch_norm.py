"""Batch norm in training: the statistics of a batch, and the running ones that they move.

The batch of an ``nn.SyncBatchNorm`` is that of all processes of its group together. Each of them
has a :class:`Share`: forward gathers every process' mean, variance and number of pixels, backward
adds up slope and offset (see :mod:`cvkernels.ops.batch_norm_act.passes`) between its two passes.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import NamedTuple

import torch
import torch.distributed as dist
from torch import Tensor, nn

from cvkernels.nn.fused.match import ACTIVATIONS, fused_act
from cvkernels.ops.batch_norm_act import passes
from cvkernels.ops.batch_norm_act.op import norm_backward
from cvkernels.ops.common.autograd import without_gradient
from cvkernels.ops.common.differentiable import needs_stock
from cvkernels.ops.common.layout import channels_last
from cvkernels.ops.common.norm import BatchNormParams
from cvkernels.ops.common.recycled import new_map


def group_of(norm: nn.Module) -> dist.ProcessGroup | None:
    """The processes whose batches norm normalises as one; None where it is this one alone."""
    if not isinstance(norm, nn.SyncBatchNorm) or not norm.training:
        return None
    if not (dist.is_available() and dist.is_initialized()):
        return None
    group = norm.process_group or dist.group.WORLD
    return group if dist.get_world_size(group) > 1 else None


class Share:
    """This process' part of the batch that norms of one map take their statistics from.

    Attributes:
        pixels: per channel of the part; 0 where another process has them all.
        group: the processes that have parts, None where this one has the whole batch.
        total: pixels of the whole; a tensor from the first :meth:`statistics` of a group on, so
            that no process waits for its device.
    """

    def __init__(self, norm: nn.Module, x: Tensor) -> None:
        self.pixels, self.group = x.numel() // x.shape[1], group_of(norm)
        self.total: int | Tensor = self.pixels

    def statistics(self, x: Tensor, mean: Tensor, var: Tensor) -> None:
        """Write mean and biased variance of the whole batch to mean and var."""
        if self.pixels:
            passes.statistics(x, (mean, var))
        else:
            mean.zero_()
            var.zero_()
        if self.group is None:
            return
        own = torch.cat([mean, var, mean.new_full((1,), self.pixels)])
        parts = [torch.empty_like(own) for _ in range(dist.get_world_size(self.group))]
        dist.all_gather(parts, own, self.group)
        rows = torch.stack(parts).double()
        counts, (means, variances) = rows[:, -1:], rows[:, :-1].chunk(2, 1)
        self.total = counts.sum()
        weights = counts / self.total
        joined = (weights * means).sum(0)
        mean.copy_(joined)
        var.copy_((weights * (variances + (means - joined) ** 2)).sum(0))

    def join(self, sums: Tensor) -> Tensor:
        """Slope and offset [2, C] of the whole batch, from those of this part; in place."""
        sums.mul_(self.pixels / self.total)
        dist.all_reduce(sums, group=self.group)
        return sums

    def joins(self) -> Callable[[Tensor], Tensor] | None:
        """:meth:`join`, where there are other parts."""
        return None if self.group is None else self.join

    def refuse_second_derivatives(self) -> None:
        if self.group is not None:
            raise RuntimeError(
                "nn.SyncBatchNorm over several processes has no second derivatives: call backward "
                "without create_graph"
            )


class Statistics(NamedTuple):
    """Mean and biased variance of each channel of the batch that a map is a share of."""

    mean: Tensor
    var: Tensor
    share: Share

    @classmethod
    def of(cls, norm: nn.Module, x: Tensor) -> Statistics:
        """Those that norm takes of x."""
        found = cls(passes.vector_like(x), passes.vector_like(x), Share(norm, x))
        found.share.statistics(x.detach(), found.mean, found.var)
        return found


def normalise(
    x: Tensor, affine: Sequence[Tensor | None], norm: nn.Module | None, share: Share, eps: float,
    act: str, residual: Tensor | None, vectors: Tensor, out: Tensor,
) -> Tensor:  # fmt: skip
    """:func:`.passes.forward`; a norm that is given counts the batch.

    Where others share the batch, its statistics are in the first two rows of vectors already.
    """
    if share.group is None:
        running = None if norm is None else count_batch(norm)
        return passes.forward(x, *affine, running, eps, act, residual, vectors, out)
    for row, vector, absent in zip(vectors[2:], affine, (1.0, 0.0), strict=True):
        row.fill_(absent) if vector is None else row.copy_(vector)
    if norm is not None:
        update_running(norm, Statistics(vectors[0], vectors[1], share))
    return passes.recompute(x, vectors, eps, act, residual, out)


def count_batch(norm: nn.Module) -> passes.Running | None:
    """Count a batch as ``norm.forward`` does in training; the running statistics to be moved."""
    if not norm.track_running_stats or norm.running_mean is None:
        return None
    factor = norm.momentum
    if norm.num_batches_tracked is not None:
        norm.num_batches_tracked.add_(1)
        if factor is None:
            factor = 1.0 / float(norm.num_batches_tracked)
    return passes.Running(norm.running_mean, norm.running_var, factor or 0.0)


@torch.no_grad()
def update_running(norm: nn.Module, batch: Statistics) -> None:
    """What ``norm.forward`` does to its buffers in training."""
    if (running := count_batch(norm)) is None:
        return
    pixels = batch.share.total
    unbiased = batch.var * (pixels / (pixels - 1))
    for old, new in ((running.mean, batch.mean), (running.var, unbiased)):
        if old.dtype == new.dtype:
            old.lerp_(new, running.factor)
        else:
            old.copy_(torch.lerp(old.to(new.dtype), new, running.factor))


def shared_norm_act(x: Tensor, norm: nn.Module, batch: Statistics | None) -> Tensor | None:
    """``norm(x)``, with the activation inside, where others share norm's batch; else None.

    The statistics are computed where not given. For norms that why_not_batch_norm lets pass.
    """
    inner, _ = fused_act(norm)
    act = "none" if inner is None else ACTIVATIONS.get(type(inner))
    if group_of(norm) is None or act not in passes.ACTS:
        return None
    x = channels_last(x)
    batch = batch or Statistics.of(norm, x)
    y = _SharedNormAct.apply(x, norm.weight, norm.bias, norm.eps, act, batch)
    update_running(norm, batch)
    return y


class _SharedNormAct(torch.autograd.Function):
    """Saves x, weight and bias, and the vectors."""

    @staticmethod
    def forward(ctx, x, weight, bias, eps, act, batch: Statistics):
        ctx.set_materialize_grads(False)
        vectors = passes.vectors_of(BatchNormParams(weight, bias, batch.mean, batch.var), x)
        ctx.save_for_backward(x, weight, bias, vectors)
        ctx.eps, ctx.act, ctx.share = eps, act, batch.share
        return passes.recompute(x, vectors, eps, act, None, new_map(x))

    @staticmethod
    @without_gradient
    def backward(ctx, grad):
        x, weight, bias, vectors = ctx.saved_tensors
        if needs_stock(grad):
            ctx.share.refuse_second_derivatives()
        d_x = new_map(x) if ctx.needs_input_grad[0] else None
        d_vectors, _ = norm_backward(
            grad, x, vectors, ctx.eps, ctx.act, d_x, join=ctx.share.joins()
        )
        grads = (
            None if vector is None else d.to(vector.dtype)
            for d, vector in zip(d_vectors, (weight, bias), strict=False)
        )
        return d_x, *grads, None, None, None
