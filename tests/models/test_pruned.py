"""Channels cut off by hand: parameters are replaced, the modules' own sizes stay as they were."""

import pytest
import torch
from torch import nn

import cvkernels
from tests.support.model_checks import calibrated, counterpart

torchvision = pytest.importorskip("torchvision")
timm = pytest.importorskip("timm")


def keep(module, places, axis=0):
    """Leave these filters of a convolution, input channels (axis 1), or channels of a norm."""
    for tensors in (module._parameters, module._buffers):
        for name, tensor in tensors.items():
            if tensor is None or not tensor.dim() or (axis and name != "weight"):
                continue
            left = tensor.detach().index_select(axis, torch.tensor(places))
            tensors[name] = nn.Parameter(left) if isinstance(tensor, nn.Parameter) else left


def keep_between(count, conv, norm, following):
    """Leave so many channels of the map between two convolutions."""
    places = list(range(count))
    keep(conv, places)
    keep(norm, places)
    keep(following, places, axis=1)


def prune_densenet(net):
    block = net.features.denseblock1
    first, *later = block.values()
    keep_between(100, first.conv1, first.norm2, first.conv2)
    keep(first.conv2, range(24))
    transition = net.features.transition1
    for norm, conv in [(layer.norm1, layer.conv1) for layer in later] + [
        (transition.norm, transition.conv)
    ]:
        places = [c for c in range(norm.weight.numel()) if not 64 + 24 <= c < 64 + 32]
        keep(norm, places)
        keep(conv, places, axis=1)


def prune_googlenet(net):
    block, following = net.inception3a, net.inception3b
    for branch, count in ((block.branch2, 80), (block.branch3, 12)):
        keep_between(count, branch[0].conv, branch[0].bn, branch[1].conv)
    keep(block.branch1.conv, range(60))
    keep(block.branch1.bn, range(60))
    places = [c for c in range(256) if not 60 <= c < 64]
    readers = (following.branch1, following.branch2[0], following.branch3[0], following.branch4[1])
    for reader in readers:
        keep(reader.conv, places, axis=1)


def prune_resnet(net):
    block = net.layer1[0]
    keep_between(48, block.conv1, block.bn1, block.conv2)


def prune_efficientnet(net):
    block = net.blocks[1][0] if hasattr(net, "blocks") else net.features[2][0].block
    if hasattr(net, "blocks"):
        expand, norm, depthwise, norm2 = block.conv_pw, block.bn1, block.conv_dw, block.bn2
        fc1, fc2, project = block.se.conv_reduce, block.se.conv_expand, block.conv_pwl
    else:
        (expand, norm, _), (depthwise, norm2, _), se, (project, _) = block
        fc1, fc2 = se.fc1, se.fc2
    for module in (expand, norm, depthwise, norm2, fc2):
        keep(module, range(80))
    for module in (fc1, project):
        keep(module, range(80), axis=1)
    depthwise.groups = 80


PRUNE = {
    "densenet121": prune_densenet,
    "googlenet": prune_googlenet,
    "resnet18": prune_resnet,
    "seresnet18": prune_resnet,
    "efficientnet_b0": prune_efficientnet,
}


def pruned_pair(name, how):
    """(ours, stock), cut alike."""
    options = {"aux_logits": False, "init_weights": False} if name == "googlenet" else {}
    of_timm = name == "seresnet18" or (name == "efficientnet_b0" and how == "patched")
    stock = calibrated(getattr(timm.models if of_timm else torchvision.models, name), **options)
    ours = counterpart(stock, name, how, **options)
    for net in (ours, stock):
        PRUNE[name](net)
    return ours, stock


@pytest.mark.parametrize("how", ["drop_in", "patched"])
@pytest.mark.parametrize("name", PRUNE)
def test_pruned_networks(name, how):
    ours, stock = pruned_pair(name, how)
    x = torch.randn(2, 3, 64, 64)
    with torch.no_grad():
        expected = stock(x)
        frozen = cvkernels.freeze(ours, x)
        for answer in (ours(x), ours(x), frozen(x)):
            torch.testing.assert_close(answer, expected, rtol=1e-4, atol=1e-4)
    grads = []
    for net in (ours.double().train(), stock.double().train()):
        for module in net.modules():
            if type(module).__name__ in ("Dropout", "StochasticDepth", "DropPath"):
                module.eval()
        net(x.double()).square().mean().backward()
        grads.append([p.grad for p in net.parameters()])
    for grad, other in zip(*grads, strict=True):
        torch.testing.assert_close(grad, other, rtol=1e-7, atol=1e-9)
