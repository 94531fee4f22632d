"""Scripts in the manner of public code, which alter a network between its calls.

Each runs on stock, drop-in and patched networks; what it leaves is then frozen, too.
"""

import copy
import functools

import pytest
import torch
import torch.nn.functional as F
from torch import nn
from torch.nn.utils import parametrizations, parametrize, prune
from torch.nn.utils.fusion import fuse_conv_bn_eval

import cvkernels
from tests.support.model_checks import TINY_DENSENET, calibrated, counterpart

torchvision = pytest.importorskip("torchvision")
timm = pytest.importorskip("timm")

NETWORKS = {
    "resnet18": (torchvision.models, {"num_classes": 10}),
    "DenseNet": (torchvision.models, TINY_DENSENET),
    "googlenet": (
        torchvision.models, {"num_classes": 10, "aux_logits": False, "init_weights": False}
    ),
    "efficientnet_b0": (torchvision.models, {"num_classes": 10}),
    "seresnet18": (timm.models, {"num_classes": 10}),
}  # fmt: skip


def convolutions(model):
    return [module for module in model.modules() if isinstance(module, nn.Conv2d)]


def children(model, kinds):
    """(parent, name, child) of every child of these kinds."""
    return [
        (parent, name, child)
        for parent in list(model.modules())
        for name, child in list(parent.named_children())
        if isinstance(child, kinds)
    ]


def prunes_filters(model, x):
    convs = [conv for conv in convolutions(model)[1:5] if conv.groups == 1]
    for conv in convs:
        prune.ln_structured(conv, "weight", amount=0.4, n=1, dim=0)
    yield model(x)
    for conv in convs:
        prune.remove(conv, "weight")


def folds_norms_by_hand(model, x):
    yield model(x)
    for parent in list(model.modules()):
        names = list(parent._modules)
        for first, second in zip(names, names[1:], strict=False):
            conv, norm = parent._modules[first], parent._modules[second]
            if isinstance(conv, nn.Conv2d) and isinstance(norm, nn.BatchNorm2d):
                if conv.out_channels == norm.num_features:
                    setattr(parent, first, fuse_conv_bn_eval(conv, norm))
                    setattr(parent, second, nn.Identity())


class LowRank(nn.Module):
    def __init__(self, weight):
        super().__init__()
        self.down = nn.Parameter(torch.full((weight.shape[0], 1), 0.05))
        self.up = nn.Parameter(torch.linspace(-1, 1, weight[0].numel())[None])

    def forward(self, weight):
        return weight + (self.down @ self.up).view_as(weight)


def adapts_by_low_rank(model, x):
    convs = convolutions(model)[1:4]
    for conv in convs:
        parametrize.register_parametrization(conv, "weight", LowRank(conv.weight))
    yield model(x)
    with torch.no_grad():
        for conv in convs:
            conv.parametrizations.weight[0].up.mul_(1.5)
    yield model(x)
    for conv in convs:
        parametrize.remove_parametrizations(conv, "weight")


def normalises_weights(model, x):
    for conv in convolutions(model)[:3]:
        parametrizations.weight_norm(conv)
    yield model(x)
    with torch.no_grad():
        for conv in convolutions(model)[:3]:
            conv.parametrizations.weight.original0.mul_(1.1)


class Standardised(nn.Conv2d):
    def forward(self, x):
        mean = self.weight.mean((1, 2, 3), keepdim=True)
        weight = (self.weight - mean) / (self.weight.std((1, 2, 3), keepdim=True) + 1e-3)
        return self._conv_forward(x, weight * self.weight.std(), self.bias)


def standardises_weights(model, x):
    yield model(x)
    for conv in convolutions(model)[1:3]:
        conv.__class__ = Standardised


def takes_grey_images(model, x):
    yield model(x)
    parent, name, stem = children(model, nn.Conv2d)[0]
    grey = nn.Conv2d(1, stem.out_channels, stem.kernel_size, stem.stride, stem.padding, bias=False)
    grey.weight = nn.Parameter(stem.weight.sum(1, keepdim=True))
    setattr(parent, name, nn.Sequential(Grey(), grey))


class Grey(nn.Module):
    def forward(self, x):
        return x.mean(1, keepdim=True)


def changes_norms(model, x):
    yield model(x)
    for parent, name, norm in children(model, nn.BatchNorm2d)[::2]:
        setattr(parent, name, nn.GroupNorm(4, norm.num_features))


def dilates(model, x):
    yield model(x)
    for conv in convolutions(model)[-6:]:
        if (conv.kernel_size, conv.stride) == ((3, 3), (1, 1)):
            conv.dilation = conv.padding = (2, 2)


def quantises_weights(model, x):
    yield model(x)
    with torch.no_grad():
        for conv in convolutions(model):
            scale = conv.weight.abs().max() / 127
            conv.weight.copy_(
                torch.fake_quantize_per_tensor_affine(conv.weight, scale, 0, -128, 127)
            )


def clamps_maps(model, x):
    convs = convolutions(model)
    convs[2].register_forward_hook(lambda module, args, out: out.clamp(-1, 1))
    convs[4].register_forward_pre_hook(lambda module, args: (args[0] * 0.5,))
    yield model(x)


def adapts_statistics(model, x):
    norms = [module for module in model.modules() if isinstance(module, nn.BatchNorm2d)]
    for norm in norms:
        norm.train()
    yield model(x)
    for norm in norms:
        norm.eval()


def loads_another_state(model, x):
    yield model(x)
    changed = {
        key: value * 1.1 if key.endswith("running_var") else value.clone()
        for key, value in model.state_dict().items()
    }
    model.load_state_dict(changed, assign=True)


SCRIPTS = [
    prunes_filters, folds_norms_by_hand, adapts_by_low_rank, normalises_weights,
    standardises_weights, takes_grey_images, changes_norms, dilates, quantises_weights,
    clamps_maps, adapts_statistics, loads_another_state,
]  # fmt: skip


@functools.cache
def models_of(name):
    """Stock, drop-in and patched, in eval with one state."""
    library, options = NETWORKS[name]
    stock = calibrated(getattr(library, name), **options)
    return [stock, *(counterpart(stock, name, how, **options) for how in ("drop_in", "patched"))]


@pytest.mark.few(12)
@pytest.mark.parametrize("script", SCRIPTS, ids=lambda script: script.__name__)
@pytest.mark.parametrize("name", NETWORKS)
@torch.no_grad()
def test_scripts(name, script):
    x, answers = torch.randn(2, 3, 64, 64), []
    for model in copy.deepcopy(models_of(name)):
        torch.manual_seed(1)
        answers.append([*script(model, x), model(x), model(x * 0.5)])
        frozen = cvkernels.freeze(model.eval(), x)
        answers.append([*answers[-1][:-2], frozen(x), frozen(x * 0.5)])
    expected = answers[0]
    for found in answers[1:]:
        for actual, truth in zip(found, expected, strict=True):
            allowed = 2e-3 * truth.abs().max()
            assert (actual - truth).abs().max() <= allowed


def attribution(model, x):
    """Grad-CAM's maps and gradients, and the image's gradient."""
    seen = []
    last = convolutions(model)[-1]
    last.register_forward_hook(lambda module, args, out: seen.append(out.detach()))
    last.register_full_backward_hook(lambda module, inputs, outputs: seen.append(outputs[0]))
    image = x.clone().requires_grad_()
    model(image)[:, 3].sum().backward()
    return [*seen, image.grad]


def clipped_steps(model, x):
    """Gradients are clipped as they come, summed over two batches; some parts are frozen."""
    for parameter in list(model.parameters())[::3]:
        parameter.requires_grad_(False)
    trained = [parameter for parameter in model.parameters() if parameter.requires_grad]
    for parameter in trained:
        parameter.register_hook(lambda grad: grad.clamp(-1e-3, 1e-3))
    optimiser = torch.optim.SGD(trained, 0.1)
    for scale in (1, 2):
        model(x * scale).square().mean().backward()
    optimiser.step()
    return list(model.state_dict().values())


def distillation(model, x):
    with torch.no_grad():
        target = copy.deepcopy(model).eval()(x).softmax(1)
    F.kl_div(model(x).log_softmax(1), target, reduction="batchmean").backward()
    return [parameter.grad for parameter in model.parameters()]


@pytest.mark.parametrize("script", [attribution, clipped_steps, distillation])
@pytest.mark.parametrize("name", NETWORKS)
def test_scripts_with_gradients(name, script):
    results = []
    for model in copy.deepcopy(models_of(name)):
        model.double().train(script is not attribution)
        for module in model.modules():
            if type(module).__name__ in ("Dropout", "StochasticDepth", "DropPath"):
                module.eval()
        x = torch.randn(2, 3, 48, 48, generator=torch.Generator().manual_seed(1)).double()
        results.append([tensor.double() for tensor in script(model, x)])
    expected = results[0]
    largest = max(truth.abs().max() for truth in expected)
    for found in results[1:]:
        for actual, truth in zip(found, expected, strict=True):
            assert (actual - truth).abs().max() <= 1e-7 * truth.abs().max() + 1e-11 * largest
