"""What both SENet families share: timm's methods of a classifier in stages."""

from __future__ import annotations

from collections.abc import Sequence

import torch
from torch import Tensor, nn
from torch.nn import functional as F
from torch.utils.checkpoint import checkpoint

from cvkernels.models.timm_networks import TimmNetwork
from cvkernels.nn.fused.caller_layout import in_layout_of_input
from cvkernels.nn.global_pool import GlobalPool

STAGES = ("layer1", "layer2", "layer3", "layer4")


class TimmClassifier(TimmNetwork):
    """Stem, stem pool, ``layer1`` to ``layer4``, global pool, dropout, linear classifier.

    A subclass implements :meth:`_stem` and :meth:`_stem_pool`, names the linear layer in
    ``classifier_name``, and ends its constructor with :meth:`_add_head`.
    """

    classifier_name: str
    grad_checkpointing: bool = False

    def __init__(self, num_classes: int, in_chans: int, drop_rate: float) -> None:
        super().__init__()
        self.num_classes = num_classes
        self.in_chans = in_chans
        self.drop_rate = drop_rate

    def _add_head(self, num_features: int, global_pool: str) -> None:
        self.num_features = num_features
        self.reset_classifier(self.num_classes, global_pool)

    def reset_classifier(self, num_classes: int, global_pool: str | None = None) -> None:
        """Replace the classifier by a new one; 0 classes remove it.

        ``global_pool`` as for :class:`cvkernels.nn.GlobalPool`; None keeps the present one.
        """
        weight = next(self.parameters())
        pool = GlobalPool(self.global_pool.pool_type if global_pool is None else global_pool)
        self.head_hidden_size = self.num_features * pool.feat_mult()
        classifier = nn.Identity()
        if num_classes > 0:
            classifier = nn.Linear(
                self.head_hidden_size, num_classes, device=weight.device, dtype=weight.dtype
            )
        self.num_classes = num_classes
        self.global_pool = pool.train(self.training)
        setattr(self, self.classifier_name, classifier.train(self.training))

    def get_classifier(self, name_only: bool = False) -> str | nn.Module:
        """The linear layer before the logits, or its name."""
        name = self.classifier_name
        return name if name_only else getattr(self, name)

    def set_grad_checkpointing(self, enable: bool = True) -> None:
        """Recompute each block in backward instead of keeping what is inside it."""
        self.grad_checkpointing = enable

    @in_layout_of_input
    def forward_features(self, x: Tensor) -> Tensor:
        """The last stage's output, Tensor[N, num_features, H/32, W/32]."""
        x = self._stem_pool(self._stem(x))
        for name in STAGES:
            x = self._stage(name, x)
        return x

    def forward_head(self, x: Tensor, pre_logits: bool = False) -> Tensor:
        """Logits of the last stage's output, or what would enter the classifier."""
        x = self.global_pool(x)
        if self.drop_rate:
            x = F.dropout(x, p=float(self.drop_rate), training=self.training)
        return x if pre_logits else self.get_classifier()(x)

    def forward_intermediates(
        self,
        x: Tensor,
        indices: int | Sequence[int] | None = None,
        norm: bool = False,
        stop_early: bool = False,
        output_fmt: str = "NCHW",
        intermediates_only: bool = False,
    ) -> list[Tensor] | tuple[Tensor, list[Tensor]]:
        """(the last stage's output, some of the five features: before the stem pool, each stage's).

        Args:
            indices: of the features, all if None, the last n if a number; negative from the end.
            norm: accepted and without effect: the features have no norm of their own.
            stop_early: do not run the stages after the last feature asked for.
            output_fmt: "NCHW".
            intermediates_only: return the features alone.

        Raises:
            ValueError: another output_fmt, or there are no such features.
        """
        if output_fmt != "NCHW":
            raise ValueError(f"output_fmt must be 'NCHW', got {output_fmt!r}")
        count = 1 + len(STAGES)
        wanted = [*range(count)] if indices is None else indices
        if isinstance(wanted, int):
            if not 0 < wanted <= count:
                raise ValueError(f"indices must be 1 to {count} last features, got {wanted}")
            wanted = [*range(count - wanted, count)]
        if not all(-count <= index < count for index in wanted):
            raise ValueError(f"indices must be of the {count} features, got {list(wanted)}")
        wanted = {index % count for index in wanted}
        stages = STAGES[: max(wanted)] if stop_early else STAGES
        x = self._stem(x)
        intermediates = [x] if 0 in wanted else []
        x = self._stem_pool(x)
        for index, name in enumerate(stages, 1):
            x = self._stage(name, x)
            if index in wanted:
                intermediates.append(x)
        return intermediates if intermediates_only else (x, intermediates)

    def _stage(self, name: str, x: Tensor) -> Tensor:
        stage = getattr(self, name)
        if not self.grad_checkpointing or not torch.is_grad_enabled():
            return stage(x)
        for block in stage.children():
            x = checkpoint(block, x, use_reentrant=False)
        return x

    def _stem(self, x: Tensor) -> Tensor:
        raise NotImplementedError

    def _stem_pool(self, x: Tensor) -> Tensor:
        raise NotImplementedError
