"""DenseNet's blocks; mirror torchvision.models.densenet's layer, block and transition.

Huang et al. 2017, arXiv:1608.06993; checkpointing: Pleiss et al. 2017, arXiv:1707.06990.
"""

from __future__ import annotations

import contextlib
from collections.abc import Callable, MutableMapping, Sequence

import torch
import torch.nn.functional as F
from torch import Tensor, nn
from torch.nn.modules.batchnorm import _BatchNorm
from torch.utils.checkpoint import checkpoint

from cvkernels import record
from cvkernels.functional import avg_pool, dense_concat
from cvkernels.nn.fused.caller_layout import in_layout_of_input, like_input
from cvkernels.nn.fused.match import (
    fused_act,
    pooled_shape,
    why_not_batch_norm,
    why_not_in_place,
    why_not_layer,
    why_not_norm_relu,
    why_not_same_map,
)
from cvkernels.nn.fused.module import FusedModule, Step, affine_of, run_step
from cvkernels.nn.fused.plan_cache import guard_of
from cvkernels.nn.fused.watched import why_altered, why_not_called
from cvkernels.nn.sequential import ConcatBlock, ConcatBuffer, FusedSequential
from cvkernels.nn.training.batch_norm import Statistics, shared_norm_act
from cvkernels.nn.training.dense_block import run_block
from cvkernels.nn.training.match import (
    why_not_one_group,
    why_not_train,
    why_not_train_conv,
    why_not_train_norm_relu,
)
from cvkernels.nn.training.norm_relu_pool import norm_relu_avg_pool
from cvkernels.ops.common.layout import (
    channels_last_view,
    format_of,
    gives_channels_last,
    new_channels_last,
)
from cvkernels.ops.common.recycled import maker
from cvkernels.ops.conv_bn_act.op import supports_prologue_and_slices


class AppendingLayer(FusedModule):
    """A dense layer that can read a prefix of its block's buffer and write the channels behind it.

    Its parts are norm1, relu1, conv1, norm2, relu2 and conv2; the ReLUs may be inside the norms.
    """

    def parts(self) -> tuple[nn.Module | None, ...]:
        names = ("norm1", "relu1", "conv1", "norm2", "relu2", "conv2")
        return tuple(self._modules.get(name) for name in names)

    def why_not_append(self) -> str:
        """Why the layer has to be called; empty where :meth:`append` computes the same."""
        norm1, relu1, conv1, norm2, relu2, conv2 = self.parts()
        return (
            self._why_more()
            or why_not_norm_relu(norm1, relu1)
            or why_not_layer(conv1, norm2, fused_act(norm2, relu2)[0])
            or why_not_layer(conv2, None, None)
            or why_not_same_map(conv1)
            or why_not_same_map(conv2)
        )

    def why_not_train(self, x: Tensor, channels: int, first: nn.Module) -> str:
        """Why the layer has to be called in training, where ``channels`` are there before it and
        ``first`` is its block's first norm."""
        norm1, relu1, conv1, norm2, relu2, conv2 = self.parts()
        return (
            self._why_more()
            or why_not_one_group(first, norm1, norm2)
            or why_not_train_norm_relu(x, channels, norm1, relu1)
            or why_not_train_conv(x, channels, conv1)
            or why_not_train_norm_relu(x, conv1.weight.shape[0], norm2, relu2)
            or why_not_train_conv(x, conv1.weight.shape[0], conv2)
        )

    def _why_more(self) -> str:
        """Why the parts are not all that the layer computes."""
        return "dropout is active" if self.drops() else why_altered(self)

    def drops(self) -> bool:
        return self.training and self.drop_rate > 0

    def dropped(self, features: Tensor, x: Tensor) -> Tensor:
        """Dropout of the layer's output, for x the input of its block."""
        if self.drop_rate == 0:
            return features
        if self.drops() and type(features) is Tensor:
            # It draws its numbers in memory order: in the layout that stock's convolutions give.
            weights = (getattr(conv, "weight", None) for conv in (self.conv1, self.conv2))
            tensors = (x, *(w for w in weights if isinstance(w, Tensor)))
            layout = format_of(any(map(gives_channels_last, tensors)))
            features = features.contiguous(memory_format=layout)
        return F.dropout(features, p=self.drop_rate, training=self.training)

    def recomputes(self) -> bool:
        """Whether conv1's output is to be computed again in the backward pass."""
        return self.memory_efficient

    def append(
        self, buffer: Tensor, channels: int, scratch: Tensor | None, lasting: bool
    ) -> Callable[[Tensor, Tensor | None], object] | None:
        """Write the layer's output behind the ``channels`` that there are.

        Where no kernel normalises a convolution's input, ``scratch`` takes the normalised prefix.
        Returns, for ``lasting``, what does the same to other buffers like this one; None where that
        has no plan. For layers that :meth:`why_not_append` has nothing against.
        """
        norm1, relu1, conv1, norm2, relu2, conv2 = self.parts()
        stop = channels + conv2.weight.shape[0]
        features, out = buffer[:, :channels], buffer[:, channels:stop]
        if scratch is None:
            u, normalise = features, None
            reduce = self.layer_step(
                u, conv1, norm2, relu2, input_bn=(norm1, relu1), lasting=lasting
            )
        else:
            u, bn = channels_last_view(scratch, features.shape), affine_of(norm1)
            normalise = dense_concat.plan(u, features, 0, bn, relu=True).run if lasting else None
            run_step(Step(norm1, "", lambda: dense_concat(u, features, 0, bn, relu=True)))
            reduce = self.layer_step(u, conv1, norm2, relu2, lasting=lasting)
        bottleneck = run_step(reduce, u)
        extend = self.layer_step(bottleneck, conv2, None, None, out=out, lasting=lasting)
        run_step(extend, bottleneck, None, None, out)
        if not (reduce.lasting and extend.lasting):
            return None
        shape, reduce, extend = features.shape, reduce.run, extend.run

        def run(buffer: Tensor, scratch: Tensor | None) -> None:
            u = features = buffer[:, :channels]
            if scratch is not None:
                u = channels_last_view(scratch, shape)
                normalise(u, features)
            extend(reduce(u), None, None, buffer[:, channels:stop])

        return run


class _Untracked:
    """``norm`` leaves its running statistics as they are; autograd saves what it saved.

    A context that is entered at each recomputation: a second derivative asks for two.
    """

    def __init__(self, norm: nn.Module) -> None:
        self.norm = norm if isinstance(norm, _BatchNorm) else None

    def __enter__(self) -> None:
        if self.norm is not None:
            self.kept = self.norm.momentum, self.norm.num_batches_tracked
            self.norm.momentum, self.norm.num_batches_tracked = 0.0, None

    def __exit__(self, *error: object) -> None:
        if self.norm is not None:
            self.norm.momentum, self.norm.num_batches_tracked = self.kept


class DenseLayer(AppendingLayer):
    """``conv2(relu2(norm2(conv1(relu1(norm1(cat(inputs)))))))``: ``growth_rate`` new channels.

    In eval conv1 (1x1) runs with norm2 and relu2 as one op, and with norm1 and relu1 too where a
    kernel has that prologue; conv2 is the 3x3.

    Args:
        num_input_features: channels of the inputs together.
        growth_rate: channels of the output.
        bn_size: conv1 has ``bn_size * growth_rate`` outputs.
        drop_rate: of the dropout behind conv2, in training.
        memory_efficient: where an input requires a gradient, compute up to conv1 again in the
            backward pass and keep nothing of it until then. Running statistics are updated in the
            forward pass alone; torchvision updates norm1's twice a step.
    """

    def __init__(
        self, num_input_features: int, growth_rate: int, bn_size: int, drop_rate: float,
        memory_efficient: bool = False,
    ) -> None:  # fmt: skip
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
        def contexts() -> tuple[contextlib.AbstractContextManager, ...]:
            return contextlib.nullcontext(), _Untracked(self.norm1)

        # torch.compile takes no such contexts, and repeats no write to a buffer.
        again = {} if torch.compiler.is_compiling() else {"context_fn": contexts}
        return checkpoint(
            lambda *parts: self.bn_function(parts), *inputs, use_reentrant=False, **again
        )

    @in_layout_of_input
    def forward(self, input: Tensor | list[Tensor]) -> Tensor:
        inputs = [input] if isinstance(input, Tensor) else input
        if self.memory_efficient and self.any_requires_grad(inputs):
            bottleneck = self.relu2(self.norm2(self.call_checkpoint_bottleneck(inputs)))
        else:
            features, input_bn = torch.cat(inputs, 1), (self.norm1, self.relu1)
            bottleneck = self.fused(features, self.conv1, self.norm2, self.relu2, input_bn=input_bn)
        return self.dropped(self.fused(bottleneck, self.conv2), inputs[0])

    def rename_old_keys(self, state_dict: MutableMapping[str, Tensor], prefix: str = "") -> None:
        """Give entries with the names of old checkpoints ("norm.1.weight") those of today."""
        for name in (*dict(self.named_parameters()), *dict(self.named_buffers())):
            old = f"{prefix}{name[:4]}.{name[4:]}"  # "norm1.weight" was "norm.1.weight"
            if old in state_dict and prefix + name not in state_dict:
                state_dict[prefix + name] = state_dict.pop(old)

    def _load_from_state_dict(self, state_dict, prefix, *args, **kwargs) -> None:
        self.rename_old_keys(state_dict, prefix)
        super()._load_from_state_dict(state_dict, prefix, *args, **kwargs)


class DenseBlock(nn.ModuleDict, ConcatBlock):
    """``num_layers`` dense layers; each takes the block's input and the outputs of all before it.

    Returns them concatenated: ``num_input_features + num_layers * growth_rate`` channels. In eval
    without gradients they share one channels_last buffer: each layer reads a prefix of it and
    writes the channels behind, and nothing is concatenated. In training the same buffer, the
    outputs of the conv1s (nothing with ``memory_efficient``) and batch statistics are all that
    autograd keeps: see :mod:`cvkernels.nn.training.dense_block`. Callers get a copy of the buffer,
    which they may write; in :class:`FusedSequential` a transition or norm behind the block reads
    the buffer itself.
    """

    _version = 2

    def __init__(
        self, num_layers: int, num_input_features: int, bn_size: int, growth_rate: int,
        drop_rate: float, memory_efficient: bool = False,
    ) -> None:  # fmt: skip
        super().__init__()
        for index in range(num_layers):
            channels = num_input_features + index * growth_rate
            self[f"denselayer{index + 1}"] = DenseLayer(
                channels, growth_rate, bn_size, drop_rate, memory_efficient
            )

    @in_layout_of_input
    def forward(self, init_features: Tensor) -> Tensor:
        buffer = self.concat_buffer(init_features, init_features.shape)
        if buffer is not None:
            dense_concat(buffer.tensor, init_features, 0)
            return buffer.fill()
        reason = self._why_not_append(init_features)
        if self._normalises_batches():
            reason = self.why_not_train(init_features)
            if not reason:
                # The caller may write its output in place, and autograd has saved the buffer.
                return self.train_append(init_features)[0].clone()
        features = [init_features]
        for layer in self.values():
            features.append(layer(features))
        if (recorder := record.active()) is None:
            return torch.cat(features, 1)
        with recorder.fallback(reason):
            return torch.cat(features, 1)

    def drops(self) -> bool:
        return any(isinstance(layer, AppendingLayer) and layer.drops() for layer in self.values())

    def _normalises_batches(self) -> bool:
        norm = getattr(next(iter(self.values()), None), "norm1", None)
        return norm is not None and norm.training

    def why_not_train(self, x: Tensor) -> str:
        """Why the layers have to be called one by one on x in training.

        Hooks on the block itself, such as ``fully_shard``'s, are no reason for its ``forward``.
        """
        first = next(iter(self.values())).norm1
        return why_not_train(x, first) or self._why_not_layers(
            x, lambda layer, channels: layer.why_not_train(x, channels, first)
        )

    def _why_not_layers(self, x: Tensor, why_not: Callable[[AppendingLayer, int], str]) -> str:
        """The first reason of a layer, from it and the number of channels that it reads."""
        channels = x.shape[1]
        for layer in self.values():
            if not isinstance(layer, AppendingLayer):
                return f"{type(layer).__name__} is no dense layer of cvkernels"
            if reason := why_not(layer, channels):
                return reason
            channels += layer.conv2.weight.shape[0]
        return ""

    def train_append(self, x: Tensor) -> tuple[Tensor, Statistics]:
        """The output in training and its statistics; :meth:`why_not_train` has been asked."""
        layers = list(self.values())
        parts = [(layer.norm1, layer.conv1, layer.norm2, layer.conv2) for layer in layers]
        return run_block(x, parts, [layer.recomputes() for layer in layers])

    def with_consumer(self, x: Tensor, layers: list[nn.Module]) -> Tensor | None:
        consumer = layers[0] if layers else None
        if not self._normalises_batches() or why_not_called(x, self, consumer):
            return None
        pools = isinstance(consumer, Transition)
        if not pools and why_not_batch_norm(consumer) or self.why_not_train(x):
            return None
        layers.pop(0)
        features, statistics = self.train_append(x)
        norm = consumer.norm if pools else consumer
        if why_not_one_group(next(iter(self.values())).norm1, norm):
            statistics = None
        if not pools:
            y = shared_norm_act(features, norm, statistics)
            return consumer(features) if y is None else y
        if consumer.why_not_train(features):
            return consumer(like_input(x, features.clone()))
        return consumer.train_forward(features, statistics)

    def _why_not_append(self, x: Tensor) -> str:
        """Why the layers have to be called one by one on x; empty where they share a buffer."""
        return why_not_in_place(x, self) or self._why_not_layers(
            x, lambda layer, _: layer.why_not_append()
        )

    def concat_buffer(self, x: Tensor, shape: Sequence[int]) -> ConcatBuffer | None:
        plans = self.plans_of(x, self)
        if plans is not None and (plan := plans.get(x, (tuple(shape),))) is not None:
            new_buffer, append = plan
            return ConcatBuffer(new_buffer(), shape[1], append)
        if self._why_not_append(x):
            return None
        guard = None if plans is None else guard_of(x, list(self.modules()))

        def fill(buffer: Tensor) -> Tensor:
            repeat = self._append(buffer, shape[1], guard is not None)
            if repeat is not None:
                plans.keep(guard, (maker(buffer), repeat), x, (tuple(shape),))
            return buffer

        return ConcatBuffer(self._new_buffer(x, shape), shape[1], fill)

    def _new_buffer(self, x: Tensor, shape: Sequence[int]) -> Tensor:
        N, channels, H, W = shape
        channels += sum(layer.conv2.weight.shape[0] for layer in self.values())
        return new_channels_last(x, (N, channels, H, W))

    def _append(
        self, buffer: Tensor, channels: int, lasting: bool
    ) -> Callable[[Tensor], Tensor] | None:
        """Let all layers append to the buffer; what repeats that, where it lasts."""
        needs_scratch, count = not supports_prologue_and_slices(buffer), buffer.numel()
        scratch = buffer.new_empty(count) if needs_scratch else None
        repeats = []
        for layer in self.values():
            repeats.append(layer.append(buffer, channels, scratch, lasting))
            channels += layer.conv2.weight.shape[0]
        if None in repeats:
            return None

        def run(buffer: Tensor) -> Tensor:
            scratch = buffer.new_empty(count) if needs_scratch else None
            for repeat in repeats:
                repeat(buffer, scratch)
            return buffer

        return run


class Transition(FusedSequential):
    """Between two blocks: ``pool(conv(relu(norm(x))))``, half the height and width.

    In eval without gradients the map is pooled before the convolution, which commutes with it, in
    one pass with norm and relu: the convolution has a quarter of the pixels. So it is in training,
    where autograd keeps the input, its batch statistics and the pooled map. Elsewhere norm and relu
    are the convolution's prologue where a kernel has one, in eval.
    """

    def __init__(self, num_input_features: int, num_output_features: int) -> None:
        super().__init__()
        self.norm = nn.BatchNorm2d(num_input_features)
        self.relu = nn.ReLU(inplace=True)
        self.conv = nn.Conv2d(
            num_input_features, num_output_features, kernel_size=1, stride=1, bias=False
        )
        self.pool = nn.AvgPool2d(kernel_size=2, stride=2)

    @in_layout_of_input
    def forward(self, x: Tensor) -> Tensor:
        if not self._why_not_pool_first(x):
            return self.write(x, None)
        return super().forward(x) if self.why_not_train(x) else self.train_forward(x)

    def why_not_train(self, x: Tensor) -> str:
        """Why x is not pooled first in training."""
        norm, relu, conv, pool = self._parts()
        return (
            why_not_train(x, norm)
            or self._why_not_norm_conv_pool()
            or why_not_train_norm_relu(x, x.shape[1], norm, relu)
            or why_not_train_conv(x, x.shape[1], conv)
            or why_altered(pool)
        )

    def train_forward(self, x: Tensor, statistics: Statistics | None = None) -> Tensor:
        """The output in training; :meth:`why_not_train` has been asked."""
        return self.conv(norm_relu_avg_pool(x, self.norm, self.pool, statistics))

    def output_shape(self, x: Tensor) -> Sequence[int] | None:
        if self._why_not_pool_first(x):
            return None
        N, _, P, Q = pooled_shape(x, self.pool)
        return N, self.conv.weight.shape[0], P, Q

    def write(self, x: Tensor, out: Tensor | None) -> Tensor:
        pool, bn = self.pool, affine_of(self.norm)
        window = (pool.kernel_size, pool.stride, 0, pool.ceil_mode)
        pooled = run_step(Step(self.norm, "", lambda: avg_pool(x, *window, input_bn=bn)))
        return self.fused(pooled, self.conv, out=out)

    def _why_not_pool_first(self, x: Tensor) -> str:
        norm, relu, conv, pool = self._parts()
        return (
            why_not_in_place(x, self)
            or self._why_not_norm_conv_pool()
            or why_not_norm_relu(norm, relu)
            or why_not_layer(conv, None, None)
            or why_not_same_map(conv)
            or why_altered(pool)
        )

    def _parts(self) -> tuple[nn.Module | None, ...]:
        return tuple(self._modules.get(name) for name in ("norm", "relu", "conv", "pool"))

    def _why_not_norm_conv_pool(self) -> str:
        names = [name for name in self._modules if name != "relu"]
        if names != ["norm", "conv", "pool"] or type(self.pool) is not nn.AvgPool2d:
            return "it is no norm, 1x1 convolution and average pool"
        conv, pool = self.conv, self.pool
        if pool.padding not in (0, (0, 0)) or pool.divisor_override is not None:
            return "the average is not over pixels of the map alone"
        if type(conv) is nn.Conv2d and (*conv.kernel_size, *conv.stride) != (1, 1, 1, 1):
            return "the convolution is not 1x1"
        return ""
