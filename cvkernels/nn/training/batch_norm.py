"""Batch norm in training: the statistics of a batch, and the running ones that they move."""

from __future__ import annotations

from typing import NamedTuple

import torch
from torch import Tensor, nn

from cvkernels.ops.batch_norm_act import passes


class Statistics(NamedTuple):
    """Mean and biased variance of each channel of a map."""

    mean: Tensor
    var: Tensor


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
def update_running(norm: nn.Module, batch: Statistics, pixels: int) -> None:
    """What ``norm.forward`` does to its buffers in training."""
    if (running := count_batch(norm)) is None:
        return
    unbiased = batch.var * (pixels / (pixels - 1))
    for old, new in ((running.mean, batch.mean), (running.var, unbiased)):
        if old.dtype == new.dtype:
            old.lerp_(new, running.factor)
        else:
            old.copy_(torch.lerp(old.to(new.dtype), new, running.factor))
