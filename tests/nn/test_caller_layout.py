"""Maps that leave our modules lie in memory as stock's do: callers may view them as stock's."""

import copy

import pytest
import torch
from torch import nn

import cvkernels
from cvkernels.nn.fused.caller_layout import is_sealed
from tests.support.live_twins import each_case, originals
from tests.support.model_checks import Concatenated

LAYOUTS = (torch.contiguous_format, torch.channels_last)


def image(layout=torch.contiguous_format):
    return torch.randn(2, 3, 64, 64).contiguous(memory_format=layout)


def both(case, training):
    return [copy.deepcopy(model).train(training) for model in originals(*case)]


def answer(model, x):
    torch.manual_seed(3)  # of dropout
    return model(x)


def maps(model, x, name):
    """What a hook on the module ``name`` sees: the maps that go in and out."""
    seen = []

    def hook(module, args, out):
        seen.extend(t for t in (*args, out) if isinstance(t, torch.Tensor) and t.dim() == 4)

    handle = model.get_submodule(name).register_forward_hook(hook)
    model(x)
    handle.remove()
    return seen


def strides(tensors):
    """Those that say how a map lies: of sizes above 1."""
    return [[s for s, n in zip(t.stride(), t.shape, strict=True) if n > 1] for t in tensors]


@pytest.mark.few(8)
@pytest.mark.parametrize("layout", LAYOUTS, ids=str)
@pytest.mark.parametrize("training", [False, True], ids=["eval", "train"])
@each_case
def test_a_hook_sees_stocks_layout(case, training, layout):
    """On each child, on each child's first child, and on the last module in it."""
    ours, stock = both(case, training)
    x = image(layout)
    names = {name for name, _ in stock.named_children()}
    for name, child in stock.named_children():
        inner = [f"{name}.{below}" for below, _ in child.named_modules() if below]
        names |= {*inner[:1], *inner[-1:]}
    for name in sorted(names):
        expected = maps(stock, x, name)
        assert strides(maps(ours, x, name)) == strides(expected), name
    assert strides(maps(ours, x, "")) == strides(maps(stock, x, ""))


def stages(model):
    """The children that take and give maps, as people cut a network off before its head."""
    if hasattr(model, "features"):
        return list(model.features)
    kept = []
    for name, child in model.named_children():
        if name in ("avgpool", "global_pool", "aux1", "aux2"):
            break
        kept.append(child)
    return kept


@pytest.mark.parametrize("training", [False, True], ids=["eval", "train"])
@each_case
def test_children_cut_off_and_called_alone(case, training):
    if case[1] == "patched" and case[0] == "efficientnet_b0":
        pytest.skip("timm's stem is no child that can be called without the method around it")
    ours, stock = (stages(model) for model in both(case, training))
    ours_map = stock_map = image()
    for ours_stage, stock_stage in zip(ours, stock, strict=True):
        ours_map, stock_map = ours_stage(ours_map), stock_stage(stock_map)
        assert strides([ours_map]) == strides([stock_map])
        ours_map.view(len(ours_map), -1)
    ours, stock = (nn.Sequential(*stages(model)) for model in both(case, training))
    assert strides([ours(image())]) == strides([stock(image())])


@pytest.mark.parametrize("training", [False, True], ids=["eval", "train"])
@each_case
def test_features_can_be_viewed(case, training):
    ours, stock = both(case, training)
    x = image()
    method = next((m for m in ("forward_features", "features") if hasattr(stock, m)), None)
    if method is None:
        pytest.skip("it has no method or child that computes the last map")
    found, expected = (answer(getattr(model, method), x) for model in (ours, stock))
    torch.testing.assert_close(
        found.view(2, -1), expected.view(2, -1), rtol=1e-3, atol=1e-3 * expected.abs().max().item()
    )


class Attention(nn.Module):
    """As found in research code: it views maps."""

    def forward(self, x):
        n, c, h, w = x.shape
        weights = x.view(n, c, h * w).mean(2).sigmoid()
        return x * weights.view(n, c, 1, 1)


@pytest.mark.parametrize("training", [False, True], ids=["eval", "train"])
@each_case
def test_modules_of_the_callers_between_ours(case, training):
    ours, stock = (Concatenated(model) for model in both(case, training))
    for model in (ours, stock):
        parts = stages(model.model)
        inner = [m for m in parts[-2].modules() if isinstance(m, (nn.ReLU, nn.SiLU, nn.MaxPool2d))]
        (inner[-1] if inner else parts[-1]).register_forward_hook(lambda m, i, y: Attention()(y))
        owner = model.model if parts[1] in model.model._modules.values() else model.model.features
        name = next(name for name, part in owner.named_children() if part is parts[1])
        setattr(owner, name, nn.Sequential(parts[1], Attention()))
    x = image()
    found, expected = answer(ours, x), answer(stock, x)
    torch.testing.assert_close(found, expected, rtol=1e-3, atol=1e-3 * expected.abs().max().item())


def test_whole_networks_keep_their_layout_within():
    model = cvkernels.models.resnet18().eval()
    report = cvkernels.explain(model, image())
    assert is_sealed(model) and "clone" not in str(report)


def test_a_module_is_sealed_as_long_as_nobody_looks_inside():
    model = cvkernels.models.resnet18().eval()
    inside = model.layer2[0].bn1
    assert is_sealed(model) and is_sealed(model.layer2)
    handle = inside.register_forward_hook(lambda *_: None)
    assert not is_sealed(model) and not is_sealed(model.layer2) and is_sealed(model.layer1)
    handle.remove()
    assert is_sealed(model)
    model.layer2[0].relu = Attention()
    assert not is_sealed(model)
    model.layer2[0].relu = nn.ReLU()
    assert is_sealed(model)
    model.layer3[1] = nn.Sequential(model.layer3[1], Attention())
    assert not is_sealed(model) and not is_sealed(model.layer3)
    model.layer3 = nn.Identity()
    assert is_sealed(model)
    inside.forward = inside.forward
    assert not is_sealed(model)
    # A hook on the module itself sees what leaves it, and nothing within.
    model.layer1.register_forward_hook(lambda *_: None)
    assert is_sealed(model.layer1)
