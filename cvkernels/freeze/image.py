"""How a GPU's plan lays out images of three channels: with a fourth, a border, and pixels in pairs.

A pixel of three 16-bit channels is 6 bytes, which a thread reads in three accesses of 2 bytes.
Images are copied into memory of the plan in any case, so that what the first convolution would have
to do for every tap is done once: a channel of zeros makes a pixel 8 bytes; a border of zeros is the
convolution's padding, whose bounds then need no checks; and where the convolution has stride 2, two
neighbouring pixels are one of eight channels and 16 bytes, its filter as wide as it has pairs::

    conv 7x7, stride 2, padding 3    of 3 channels, 224 x 224
    conv 7x4, stride (2, 1)          of 8 channels, 230 x 115

The taps that this adds have weights of zero.
"""

from __future__ import annotations

from collections import defaultdict
from dataclasses import replace

import torch
import torch.nn.functional as F
from torch import Tensor

from cvkernels.freeze.graph import Graph, Node
from cvkernels.freeze.ops import Affine, Conv, Input

CHANNELS, PADDED = 3, 4


def lay_out_image(graph: Graph) -> None:
    """Choose the images' layout, if all that reads them are convolutions without groups.

    A scale and a shift of the images' channels may come before these: then there is no border,
    which they would change.
    """
    readers: dict[Node, list[Node]] = defaultdict(list)
    for node in graph.nodes:
        for source in node.inputs:
            readers[source].append(node)
    image = graph.nodes[0]
    affines = [node for node in readers[image] if isinstance(node.op, Affine)]
    convolutions = [n for source in (image, *affines) for n in readers[source] if n not in affines]
    padded = {image, *affines}
    if not convolutions or padded & set(graph.results):
        return
    if not all(_reads_image(node, padded) for node in convolutions):
        return
    for node in affines:
        # zeros stay zeros
        scale, shift = (F.pad(v, (0, PADDED - CHANNELS)) for v in (node.op.scale, node.op.shift))
        node.op = replace(node.op, scale=scale, shift=shift)
    for node in convolutions:
        node.op = replace(node.op, weight=_resized(node.op.weight, PADDED, node.op.weight.shape[3]))
    image.op = Input(PADDED)
    if len(convolutions) == 1 and not affines:
        _put_border_around(image, convolutions[0])


def _reads_image(node: Node, images: set[Node]) -> bool:
    """Whether a node is a convolution of three channels that reads images in its first place."""
    op = node.op
    if not isinstance(op, Conv) or op.groups != 1 or op.weight.shape[1] != CHANNELS:
        return False
    plain = op.input_affine is None and "gate" not in op.roles
    return plain and node.inputs[0] in images and not images & set(node.inputs[1:])


def _put_border_around(image: Node, node: Node) -> None:
    """Make the padding of the one convolution part of the images, and its pixels pairs."""
    conv = node.op
    assert isinstance(conv, Conv)
    (top, left), width = conv.padding, conv.weight.shape[3]
    taps = width + width % 2
    in_pairs = conv.stride[1] == 2 and tuple(conv.dilation) == (1, 1) and left + taps > width
    taps = taps if in_pairs else width
    image.op = Input(PADDED, (top, top), (left, left + taps - width), in_pairs)
    weight = _resized(conv.weight, PADDED, taps)
    stride = conv.stride
    if in_pairs:
        K, C, R, _ = weight.shape
        pairs = weight.permute(0, 2, 3, 1).reshape(K, R, taps // 2, 2 * C)
        weight, stride = pairs.permute(0, 3, 1, 2), (stride[0], 1)
    node.op = replace(conv, weight=weight, padding=(0, 0), stride=stride)


def _resized(weight: Tensor, channels: int, width: int) -> Tensor:
    """The weight in channels_last, with zeros in further channels and columns."""
    K, C, R, S = weight.shape
    resized = weight.new_zeros(K, channels, R, width)
    resized = resized.contiguous(memory_format=torch.channels_last)
    resized[:, :C, :, :S] = weight
    return resized
