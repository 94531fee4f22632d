"""A small network with a block of each family, and the ways of using it."""

import copy

import torch
from torch import Tensor, nn

import cvkernels
from cvkernels.nn import Bottleneck, DenseBlock, Inception, MBConv, MBConvConfig, SEBasicBlock
from tests.support.pairs import calibrate, image


class FiveFamilies(nn.Module):
    """On small maps a call of it is mostly the calls in it."""

    def __init__(self) -> None:
        super().__init__()
        widen = nn.Sequential(nn.Conv2d(8, 16, 1, bias=False), nn.BatchNorm2d(16))
        mbconv = MBConvConfig(2, 3, 1, 24, 24, 1)
        self.features = nn.Sequential(
            nn.Conv2d(3, 8, 3, 2, 1, bias=False),
            nn.BatchNorm2d(8),
            nn.ReLU(),
            Bottleneck(8, 4, downsample=widen),
            SEBasicBlock(16, 16),
            DenseBlock(2, 16, bn_size=2, growth_rate=4, drop_rate=0.0),
            MBConv(mbconv, 0.0, norm_layer=nn.BatchNorm2d),
            nn.MaxPool2d(2),
            Inception(24, 8, 8, 8, 8, 8, 8),
        )
        self.fc = nn.Linear(32, 10)

    def forward(self, x: Tensor) -> Tensor:
        return self.fc(self.features(x).mean((2, 3)))


class Uses:
    """The network in eval, an image, and each way of using it as a function without arguments.

    Each gives the same bits in every call, and leaves the network as it is.
    """

    def __init__(self, batch: int = 2, size: int = 12) -> None:
        torch.manual_seed(0)
        self.network = FiveFamilies()
        calibrate(self.network, image(4, 12))
        self.network.eval()
        self.x = image(batch, size, seed=1)
        self._frozen = cvkernels.freeze(self.network, self.x)

    def live(self) -> list[Tensor]:
        with torch.no_grad():
            return [self.network(self.x)]

    def frozen(self) -> list[Tensor]:
        return [self._frozen(self.x)]

    def freeze(self) -> list[Tensor]:
        return [cvkernels.freeze(self.network, self.x)(self.x)]

    def train(self) -> list[Tensor]:
        network = copy.deepcopy(self.network).train()
        x = self.x.clone().requires_grad_()
        y = network(x)
        gradients = torch.autograd.grad(y.square().sum(), [x, *network.parameters()])
        return [y.detach(), *gradients]

    def all(self) -> dict[str, list[Tensor]]:
        return {use: getattr(self, use)() for use in USES}

    def inference(self) -> dict[str, list[Tensor]]:
        return {use: getattr(self, use)() for use in ("live", "frozen")}


USES = ("live", "frozen", "freeze", "train")


def assert_same_bits(ours: dict[str, list[Tensor]], others: dict[str, list[Tensor]]) -> None:
    for use in ours:
        assert len(ours[use]) == len(others[use])
        assert all(map(torch.equal, ours[use], others[use])), use
