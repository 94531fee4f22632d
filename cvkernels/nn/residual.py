"""The residual blocks; mirror torchvision.models.resnet.BasicBlock and Bottleneck.

In training autograd keeps the convolutions' outputs alone, see :mod:`cvkernels.nn.training`.
"""

from __future__ import annotations

from collections.abc import Callable

from torch import nn

from cvkernels.nn.fused.branch import Branch, FusedBlock, Layer


def conv3x3(
    in_planes: int, out_planes: int, stride: int = 1, groups: int = 1, dilation: int = 1
) -> nn.Conv2d:
    """3x3 convolution that keeps the map's size at stride 1, without bias."""
    return nn.Conv2d(
        in_planes, out_planes, 3, stride, dilation, dilation=dilation, groups=groups, bias=False
    )


def conv1x1(in_planes: int, out_planes: int, stride: int = 1) -> nn.Conv2d:
    return nn.Conv2d(in_planes, out_planes, 1, stride, bias=False)


class _Residual(FusedBlock):
    """The constructor of both blocks; ``_build`` makes their layers."""

    def __init__(
        self, inplanes: int, planes: int, stride: int = 1, downsample: nn.Module | None = None,
        groups: int = 1, base_width: int = 64, dilation: int = 1,
        norm_layer: Callable[..., nn.Module] | None = None,
    ) -> None:  # fmt: skip
        super().__init__()
        norm = norm_layer or nn.BatchNorm2d
        self._build(inplanes, planes, stride, groups, base_width, dilation, norm)
        self.downsample = downsample
        self.stride = stride


class BasicBlock(_Residual):
    """Two 3x3 convolutions and a shortcut: ``relu(bn2(conv2(relu(bn1(conv1(x))))) + shortcut(x))``.

    Two ops in eval, three with a downsampling shortcut. He et al. 2016, arXiv:1512.03385, figure 5
    left.
    """

    expansion: int = 1

    def _build(self, inplanes, planes, stride, groups, base_width, dilation, norm) -> None:
        if groups != 1 or base_width != 64:
            raise ValueError(
                f"BasicBlock only supports groups=1 and base_width=64, got groups={groups} and "
                f"base_width={base_width}; Bottleneck supports both"
            )
        if dilation > 1:
            raise NotImplementedError("Dilation > 1 not supported in BasicBlock")
        self.conv1 = conv3x3(inplanes, planes, stride)
        self.bn1 = norm(planes)
        self.relu = nn.ReLU(inplace=True)
        self.conv2 = conv3x3(planes, planes)
        self.bn2 = norm(planes)

    def branch(self) -> Branch:
        steps = Layer(self.conv1, self.bn1, self.relu), Layer(self.conv2, self.bn2)
        return Branch(steps, adds=True, downsample=self.downsample, act=self.relu)


class Bottleneck(_Residual):
    """1x1 to ``width``, 3x3, 1x1 to ``4 * planes``, and a shortcut; the stride sits in the 3x3.

    Three ops in eval, four with a downsampling shortcut. He et al. 2016, arXiv:1512.03385, figure 5
    right; stride in conv2 is the "V1.5" variant; ``groups`` and ``base_width`` give ResNeXt (Xie et
    al. 2017, arXiv:1611.05431) and Wide ResNet (Zagoruyko and Komodakis 2016, arXiv:1605.07146).
    """

    expansion: int = 4

    def _build(self, inplanes, planes, stride, groups, base_width, dilation, norm) -> None:
        width = int(planes * (base_width / 64.0)) * groups
        self.conv1 = conv1x1(inplanes, width)
        self.bn1 = norm(width)
        self.conv2 = conv3x3(width, width, stride, groups, dilation)
        self.bn2 = norm(width)
        self.conv3 = conv1x1(width, planes * self.expansion)
        self.bn3 = norm(planes * self.expansion)
        self.relu = nn.ReLU(inplace=True)

    def branch(self) -> Branch:
        steps = (
            Layer(self.conv1, self.bn1, self.relu),
            Layer(self.conv2, self.bn2, self.relu),
            Layer(self.conv3, self.bn3),
        )
        return Branch(steps, adds=True, downsample=self.downsample, act=self.relu)
