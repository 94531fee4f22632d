"""Squeeze-and-excitation, once, under the three namings that checkpoints know.

Hu et al. 2018, arXiv:1709.01507, figure 2: the mean of each channel, two small layers, and a gate
that scales the channel. The two layers are 1x1 convolutions in every checkpoint; on one pixel they
are matrix products, and run as such.
"""

from __future__ import annotations

from collections.abc import Callable

from torch import Tensor, nn
from torch.nn import functional as F

from cvkernels import backend, record
from cvkernels.nn.fusion import FusedModule, why_not_called


def divisible(value: float, divisor: int, least: int | None = None, share: float = 0.9) -> int:
    """The multiple of divisor nearest to value, but at least ``least`` and ``share * value``."""
    rounded = max(least or divisor, int(value + divisor / 2) // divisor * divisor)
    return rounded + divisor if rounded < share * value else rounded


class SqueezeExcite(FusedModule):
    """``x * gate(fc2(act(fc1(mean of x over H and W))))``; the subclasses name the parts.

    ``forward`` takes Tensor[N, C, H, W], any layout, and returns the same shape, never a view of x.
    """

    def forward(self, x: Tensor) -> Tensor:
        reason = self._why_not_matrices(x)
        if not reason:
            return x * self._gate(x)
        if (recorder := record.active()) is None:
            return self.as_modules(x)
        with recorder.fallback(reason):
            return self.as_modules(x)

    def as_modules(self, x: Tensor) -> Tensor:
        """The stock forward: every part called as a module, in the stock order."""
        raise NotImplementedError

    def parts(self) -> tuple[nn.Module | None, nn.Module, tuple, nn.Module, nn.Module]:
        """(the pool or None, fc1, what follows it, fc2, the gate)."""
        raise NotImplementedError

    def _gate(self, x: Tensor) -> Tensor:
        _, fc1, between, fc2, gate = self.parts()
        pixel = (x.shape[0], -1, 1, 1)
        y = F.linear(x.mean((2, 3)), fc1.weight.flatten(1), fc1.bias).view(pixel)
        for module in between:
            y = module(y)
        return gate(F.linear(y.flatten(1), fc2.weight.flatten(1), fc2.bias).view(pixel))

    def _why_not_matrices(self, x: Tensor) -> str:
        """Why the parts have to be called as modules; empty where matrix products do the same."""
        pool, fc1, _, fc2, _ = self.parts()
        if reason := why_not_called(x, pool, fc1, fc2):
            return reason
        if backend.requested("auto", ()) == "reference":
            return "requested"
        if pool is not None and (
            type(pool) is not nn.AdaptiveAvgPool2d or pool.output_size not in (1, (1, 1))
        ):
            return f"{pool} is not a global average pool"
        for fc in (fc1, fc2):
            if not _is_matrix(fc):
                return f"{fc} is not exactly a 1x1 nn.Conv2d"
        return "" if x.dim() == 4 and x.shape[0] > 0 else f"x has shape {list(x.shape)}"


def _is_matrix(fc: nn.Module) -> bool:
    return (
        type(fc) is nn.Conv2d
        and fc.kernel_size == fc.stride == (1, 1)
        and fc.padding == (0, 0)
        and fc.groups == 1
    )


class SqueezeExcitation(SqueezeExcite):
    """Mirrors torchvision.ops.SqueezeExcitation, with its five parts in its order."""

    def __init__(
        self,
        input_channels: int,
        squeeze_channels: int,
        activation: Callable[..., nn.Module] = nn.ReLU,
        scale_activation: Callable[..., nn.Module] = nn.Sigmoid,
    ) -> None:
        super().__init__()
        self.avgpool = nn.AdaptiveAvgPool2d(1)
        self.fc1 = nn.Conv2d(input_channels, squeeze_channels, 1)
        self.fc2 = nn.Conv2d(squeeze_channels, input_channels, 1)
        self.activation = activation()
        self.scale_activation = scale_activation()

    def parts(self) -> tuple:
        return self.avgpool, self.fc1, (self.activation,), self.fc2, self.scale_activation

    def gate_of_sums(self, sums: Tensor, count: int) -> Tensor:
        """The gates [N, C] from the channels' sums over ``count`` pixels."""
        fc1, fc2 = self.fc1, self.fc2
        mean = (sums / count).to(fc1.weight.dtype)
        y = F.linear(mean, fc1.weight.flatten(1), fc1.bias)
        y = self.activation(y[:, :, None, None]).flatten(1)
        y = F.linear(y, fc2.weight.flatten(1), fc2.bias)
        return self.scale_activation(y[:, :, None, None]).flatten(1)

    def as_modules(self, x: Tensor) -> Tensor:
        scale = self.activation(self.fc1(self.avgpool(x)))
        return self.scale_activation(self.fc2(scale)) * x


class _Sigmoid(nn.Module):
    """timm's, whose call torch.fx sees as the function and not as a module."""

    def forward(self, x: Tensor) -> Tensor:
        return x.sigmoid()


class SEModule(SqueezeExcite):
    """Mirrors timm.layers.SEModule: fc1, bn (an identity), act, fc2, gate.

    Args:
        channels: of x.
        rd_ratio: share of the channels that the squeezed layer has, rounded to ``rd_divisor``.
        rd_channels: channels of the squeezed layer, where given.
    """

    def __init__(
        self,
        channels: int,
        rd_ratio: float = 1 / 16,
        rd_channels: int | None = None,
        rd_divisor: int = 8,
    ) -> None:
        super().__init__()
        squeezed = rd_channels or divisible(channels * rd_ratio, rd_divisor, share=0.0)
        self.fc1 = nn.Conv2d(channels, squeezed, kernel_size=1)
        self.bn = nn.Identity()
        self.act = nn.ReLU(inplace=True)
        self.fc2 = nn.Conv2d(squeezed, channels, kernel_size=1)
        self.gate = _Sigmoid()

    def parts(self) -> tuple:
        return None, self.fc1, (self.bn, self.act), self.fc2, self.gate

    def as_modules(self, x: Tensor) -> Tensor:
        squeezed = self.fc1(x.mean((2, 3), keepdim=True))
        return x * self.gate(self.fc2(self.act(self.bn(squeezed))))


class LegacySEModule(SqueezeExcite):
    """Mirrors timm.models.senet.SEModule: fc1, relu, fc2, sigmoid."""

    def __init__(self, channels: int, reduction: int) -> None:
        super().__init__()
        self.fc1 = nn.Conv2d(channels, channels // reduction, kernel_size=1)
        self.relu = nn.ReLU(inplace=True)
        self.fc2 = nn.Conv2d(channels // reduction, channels, kernel_size=1)
        self.sigmoid = nn.Sigmoid()

    def parts(self) -> tuple:
        return None, self.fc1, (self.relu,), self.fc2, self.sigmoid

    def as_modules(self, x: Tensor) -> Tensor:
        squeezed = self.fc1(x.mean((2, 3), keepdim=True))
        return x * self.sigmoid(self.fc2(self.relu(squeezed)))
