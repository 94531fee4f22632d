"""Shapes and inputs of squeeze-and-excitation, shared by its tests and its benchmark."""

from typing import NamedTuple

import torch


class Map(NamedTuple):
    """x[N, C, H, W], with R hidden units."""

    N: int
    C: int
    R: int
    H: int
    W: int
    act: str = "relu"


# Every squeeze-and-excitation of the networks at 224 x 224, batch 1.
NETWORKS = {
    "seresnet50.layer1": Map(1, 256, 16, 56, 56),
    "seresnet50.layer2": Map(1, 512, 32, 28, 28),
    "seresnet50.layer3": Map(1, 1024, 64, 14, 14),
    "seresnet50.layer4": Map(1, 2048, 128, 7, 7),
    "efficientnet_b0.1": Map(1, 32, 8, 112, 112, "silu"),
    "efficientnet_b0.2.0": Map(1, 96, 4, 56, 56, "silu"),
    "efficientnet_b0.2.1": Map(1, 144, 6, 56, 56, "silu"),
    "efficientnet_b0.3.0": Map(1, 144, 6, 28, 28, "silu"),
    "efficientnet_b0.3.1": Map(1, 240, 10, 28, 28, "silu"),
    "efficientnet_b0.4.0": Map(1, 240, 10, 14, 14, "silu"),
    "efficientnet_b0.4.1": Map(1, 480, 20, 14, 14, "silu"),
    "efficientnet_b0.5.1": Map(1, 672, 28, 14, 14, "silu"),
    "efficientnet_b0.6.0": Map(1, 672, 28, 7, 7, "silu"),
    "efficientnet_b0.6.1": Map(1, 1152, 48, 7, 7, "silu"),
}
# Small ones, with what no kernel can divide evenly.
SMALL = {
    "seresnet-layer4": Map(2, 128, 8, 7, 7),
    "nine-images": Map(9, 40, 10, 7, 7, "silu"),  # two groups of four and one
    "odd": Map(3, 17, 5, 5, 9),
    "one-channel": Map(2, 1, 1, 5, 5),
    "one-pixel": Map(2, 64, 4, 1, 1),
    "one-row": Map(2, 24, 6, 1, 9, "silu"),
    "one-column": Map(2, 24, 6, 9, 1),
    "empty-batch": Map(0, 64, 4, 7, 7),
    # several tiles, parts and blocks of channels of the Triton kernels
    "several-parts": Map(1, 40, 6, 21, 23, "silu"),
    "several-blocks": Map(2, 144, 20, 9, 9, "silu"),
    "wide": Map(1, 528, 33, 3, 3),
}


def make_map(m, dtype, memory_format, device, scale=1.0):
    x = scale * torch.randn(m.N, m.C, m.H, m.W, device=device)
    return x.to(dtype).contiguous(memory_format=memory_format)


def make_layers(m, dtype, device):
    """weight1, bias1, weight2, bias2, as a checkpoint's 1x1 convolutions."""
    shapes = ((m.R, m.C, 1, 1), (m.R,), (m.C, m.R, 1, 1), (m.C,))
    scales = (m.C**-0.5, 0.5, m.R**-0.5, 0.5)
    return tuple(
        (scale * torch.randn(shape, device=device)).to(dtype)
        for shape, scale in zip(shapes, scales, strict=True)
    )


def of_flat_layers(function, m):
    """function with its four parameters taken from one vector, as its second argument.

    So the tolerance rule sees their gradients as one: on a bias of a few elements PyTorch's own
    error is a matter of luck.
    """
    shapes = ((m.R, m.C), (m.R,), (m.C, m.R), (m.C,))

    def call(x, flat, *arguments, **kwargs):
        parts = flat.split([torch.Size(shape).numel() for shape in shapes])
        layers = [part.view(shape) for part, shape in zip(parts, shapes, strict=True)]
        return function(x, *layers, *arguments, **kwargs)

    return call


def make_flat_layers(m, dtype, device):
    return torch.cat([layer.flatten() for layer in make_layers(m, dtype, device)])
