"""ConvBNAct; mirrors torchvision.ops.misc.Conv2dNormActivation (children "0", "1", "2")."""

from __future__ import annotations

from collections.abc import Callable

from torch import Tensor, nn
from torch.nn.modules.batchnorm import _BatchNorm

from cvkernels.nn.fused.caller_layout import in_layout_of_input
from cvkernels.nn.fused.module import FusedModule


class ConvBNAct(nn.Sequential, FusedModule):
    """Convolution, batch norm and activation: one op in eval, one function of autograd in training,
    else the three modules.

    Children are numbered as in torchvision's ``Conv2dNormActivation``: "0" the convolution, then
    the norm and the activation where they exist.

    Args:
        in_channels, out_channels, kernel_size, stride, groups, dilation: as for nn.Conv2d.
        padding: in pixels; None keeps the map's size at stride 1.
        norm_layer: called with out_channels; None leaves the norm out.
        activation_layer: None leaves the activation out.
        inplace: passed to the activation; None where the activation does not take it.
        bias: of the convolution; None means only without a norm.
    """

    def __init__(
        self, in_channels: int, out_channels: int, kernel_size: int | tuple[int, int] = 3,
        stride: int | tuple[int, int] = 1, padding: int | tuple[int, int] | None = None,
        groups: int = 1, norm_layer: Callable[..., nn.Module] | None = nn.BatchNorm2d,
        activation_layer: Callable[..., nn.Module] | None = nn.ReLU,
        dilation: int | tuple[int, int] = 1, inplace: bool | None = True,
        bias: bool | None = None,
    ) -> None:  # fmt: skip
        if padding is None:
            padding = _same_padding(kernel_size, dilation)
        bias = norm_layer is None if bias is None else bias
        geometry = (kernel_size, stride, padding, dilation, groups)
        conv = nn.Conv2d(in_channels, out_channels, *geometry, bias=bias)
        layers: list[nn.Module] = [conv]
        if norm_layer is not None:
            layers.append(norm_layer(out_channels))
        if activation_layer is not None:
            layers.append(activation_layer(**({} if inplace is None else {"inplace": inplace})))
        super().__init__(*layers)
        self.out_channels = out_channels

    @in_layout_of_input
    def forward(self, x: Tensor) -> Tensor:
        conv, bn, act = split_conv_bn_act(list(self))
        if conv is None:
            return super().forward(x)
        return self.fused(x, conv, bn, act)


class Conv2dNormActivation(ConvBNAct):
    """ConvBNAct by the name that scripts find it under in torchvision's EfficientNet."""


def split_conv_bn_act(layers: list[nn.Module]) -> tuple:
    """(conv, bn, act) of a sequence conv [+ norm] [+ act], absent ones None; else all None."""
    if not layers or len(layers) > 3 or not isinstance(layers[0], nn.Conv2d):
        return None, None, None
    if len(layers) == 2 and not isinstance(layers[1], _BatchNorm):
        return layers[0], None, layers[1]
    return (*layers, None, None)[:3]


def _same_padding(kernel_size, dilation) -> int | tuple[int, int]:
    if isinstance(kernel_size, int) and isinstance(dilation, int):
        return (kernel_size - 1) // 2 * dilation
    kernel = (kernel_size,) * 2 if isinstance(kernel_size, int) else kernel_size
    dilated = (dilation,) * 2 if isinstance(dilation, int) else dilation
    return tuple((k - 1) // 2 * d for k, d in zip(kernel, dilated, strict=True))
