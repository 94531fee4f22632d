"""What torch.fx records otherwise than it runs: containers, attributes, views that are written."""

import collections

import pytest
import torch
from torch import nn

import cvkernels
from tests.support.random_networks import assert_errs_like, tensors_of


class Network(nn.Module):
    """A convolution, and a function of its output."""

    def __init__(self, function) -> None:
        super().__init__()
        self.conv, self.function = nn.Conv2d(8, 8, 1), function
        self.weights = nn.Parameter(torch.rand(8))

    def forward(self, x):
        return self.function(self.conv(x), self)


def frozen_and_stock(network: nn.Module, x: torch.Tensor) -> tuple:
    network.eval()
    with torch.no_grad():
        return cvkernels.freeze(network, x)(x), network(x)


class Lists(nn.Module):
    """Appends to the list that it is given, as DenseNet's layers do."""

    def forward(self, maps):
        if maps[0].sum() > -1e30:  # torch.fx cannot see through it
            maps.append(maps[0] * 2)
        return collections.OrderedDict(sum=sum(maps), maps=maps)


RESULTS = {
    "a named tuple of torch's": lambda f, net: f.topk(2, dim=1),
    "of the largest, with other maps": lambda f, net: (f, f.max(1), {"f": [f[:, 0]]}),
    "containers": lambda f, net: {"mean": f.mean(1), "parts": (f.sum(), [f[:, 0], f[-1:]])},
    "an ordered dict of a module": lambda f, net: net.lists([f, f.relu()]),
    "a slice by a size": lambda f, net: [f[:, : f.size(2) // 2], f[..., : f.shape[3] - 1]],
}


@pytest.mark.parametrize("function", RESULTS.values(), ids=RESULTS.keys())
def test_results_keep_their_kinds(function):
    network = Network(function)
    network.lists = Lists()
    actual, expected = frozen_and_stock(network, torch.randn(2, 8, 6, 6))
    for ours, theirs in tensors_of(actual, expected):
        assert_errs_like(ours, theirs, theirs.double())


def of_attention(f: torch.Tensor) -> torch.Tensor:
    """A map that is contiguous in stock, and channels_last where f is."""
    tokens = f.flatten(2).transpose(1, 2)
    return (tokens + tokens.sigmoid()).transpose(1, 2).view(f.shape)


def _writes_a_view(f, net):
    g = of_attention(f)
    g.view(-1).mul_(0.5)
    return g


def _reads_a_written_view(f, net):
    g = of_attention(f)
    flat = g.view(f.size(0), -1)
    again = flat.view(-1)
    g.mul_(3)
    flat[:, 5].add_(1)
    return flat, again, g


@pytest.mark.parametrize("function", [_writes_a_view, _reads_a_written_view])
def test_what_is_written_through_a_view_is_read(function):
    actual, expected = frozen_and_stock(Network(function), torch.randn(2, 8, 6, 5))
    for ours, theirs in tensors_of(actual, expected):
        assert_errs_like(ours, theirs, theirs.double())


class Iterates(nn.Module):
    """Iterates over a stand-in, which torch.fx cannot, once it has read its argument."""

    def forward(self, x, weights):
        return sum(x * weight for weight in weights)


def test_an_attribute_that_an_untraced_module_reads_first():
    def function(f, net):
        values = f.sort(1).values
        return net.iterates(values, net.weights) + values

    network = Network(function)
    network.iterates = Iterates()
    actual, expected = frozen_and_stock(network, torch.randn(2, 8, 6, 5))
    assert_errs_like(actual, expected, expected.double())


@pytest.mark.parametrize("channels", [1, 8])
def test_a_write_to_an_expanded_map_is_right_or_refused_as_in_stock(channels):
    network = Network(lambda f, net: nn.functional.hardswish(f.expand(-1, 8, -1, -1), True))
    network.conv = nn.Conv2d(8, channels, 1)
    x = torch.randn(2, 8, 6, 5)
    if channels == 8:  # nothing is repeated
        actual, expected = frozen_and_stock(network, x)
        assert_errs_like(actual, expected, expected.double())
        return
    for run in (network, lambda x: cvkernels.freeze(network.eval(), x)(x)):
        with pytest.raises(RuntimeError, match="single memory location"), torch.no_grad():
            run(x)


def test_a_refused_write_is_refused_even_if_nothing_reads_it():
    def function(y, net):
        net.act((y * 2)[:, :1].expand(-1, 8, -1, -1))
        return y.relu()

    network, x = Network(function), torch.randn(2, 8, 4, 4)
    network.act = nn.SiLU(inplace=True)
    network.eval()
    for run in (network, lambda x: cvkernels.freeze(network, x)):
        with pytest.raises(RuntimeError, match="single memory location"), torch.no_grad():
            run(x)
