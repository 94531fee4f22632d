import pytest
import torch
from torch import nn

import cvkernels
from cvkernels import backend
from cvkernels.models import densenet121, load_checkpoint
from cvkernels.models.densenet import DenseNet, _DenseBlock, _DenseLayer, _Transition
from cvkernels.nn import FusedSequential
from tests.support.model_checks import (
    TINY_DENSENET,
    build,
    twins,
)
from tests.support.numerics import assert_matches_module
from tests.support.pairs import calibrate, image

torchvision = pytest.importorskip("torchvision")
stock_module = pytest.importorskip("torchvision.models.densenet")


def test_memory_efficient_computes_the_plain_networks_gradients():
    plain, efficient = (
        build(densenet121, num_classes=50, memory_efficient=flag) for flag in (False, True)
    )
    x = image(2)
    losses = []
    for model in (plain, efficient):
        losses.append(model(x).sum())
        losses[-1].backward()
    assert torch.allclose(*losses, atol=1e-4)
    expected = dict(plain.named_parameters())
    for key, parameter in efficient.named_parameters():
        assert torch.allclose(parameter.grad, expected[key].grad, rtol=1e-3, atol=1e-4), key


def test_memory_efficient_checkpoints_only_where_an_input_needs_a_gradient(monkeypatch):
    layer = _DenseLayer(8, 4, 2, 0.0, memory_efficient=True)
    calls = []
    stock = _DenseLayer.call_checkpoint_bottleneck
    monkeypatch.setattr(
        _DenseLayer,
        "call_checkpoint_bottleneck",
        lambda self, inputs: calls.append(1) or stock(self, inputs),
    )
    layer([torch.randn(2, 8, 4, 4)])
    assert not calls
    layer([torch.randn(2, 4, 4, 4), torch.randn(2, 4, 4, 4, requires_grad=True)])
    assert calls


def test_features_is_a_sequential_like_any():
    ours, stock = (model.features for model in twins("densenet121"))
    assert isinstance(ours, nn.Sequential) and list(ours._modules) == list(stock._modules)
    x = image()
    with torch.no_grad():
        for part in (slice(0, 4), slice(3, 7), slice(-3, None)):
            assert list(ours[part]._modules) == list(stock[part]._modules)
        assert torch.allclose(ours[:6](x), stock[:6](x), atol=1e-4)
        assert torch.allclose(ours[-1](ours[:-1](x)), stock(x), atol=1e-4)
        expected = stock(x)
        for layer in ours:
            x = layer(x)
        assert torch.allclose(x, expected, atol=1e-4)


def test_what_is_put_into_features_runs():
    ours, stock = twins("densenet121")
    for model in (ours, stock):
        model.features.relu0 = nn.Hardswish()
        model.features.transition1.add_module("scale", nn.Softplus())
        model.features.norm5 = nn.Identity()
    assert_matches_module(ours, stock, image(2), grad=False)


# Fusion


def test_every_convolution_runs_fused_on_cpu():
    ours, _ = twins("densenet121")
    rows = cvkernels.explain(ours.eval(), image()).rows
    assert sum(row.op == "conv_bn_act" for row in rows) == 120
    assert sum(row.op == "max_pool" for row in rows) == 1
    assert sum(row.op == "avg_pool" for row in rows) == 3 + 1  # transitions, and the last pool
    assert {row.op for row in rows} == {"conv_bn_act", "max_pool", "avg_pool", "aten.addmm"}


def test_the_prologue_is_planned_into_the_convolution_on_cuda():
    plan = cvkernels.explain(
        densenet121().eval(), torch.empty(8, 3, 224, 224, device="meta", dtype=torch.float16)
    )
    assert not [row for row in plan.rows if "norm" in row.op]
    assert sum(row.op == "conv_bn_act" for row in plan.rows) == 120


@pytest.mark.parametrize("block", ["layer", "transition"])
def test_the_prologue_in_triton_matches_stock(block):
    if block == "layer":
        kinds, arguments = (_DenseLayer, stock_module._DenseLayer), (12, 4, 2, 0.0)
    else:
        kinds, arguments = (_Transition, stock_module._Transition), (12, 6)
    ours, stock = (kind(*arguments).eval() for kind in kinds)
    with torch.no_grad():
        for buffer in stock.buffers():
            if buffer.is_floating_point():
                buffer.uniform_(0.5, 1.5)
    ours.load_state_dict(stock.state_dict())
    pytest.importorskip("triton")
    x = torch.randn(2, 12, 6, 6)
    if torch.cuda.is_available():
        ours, stock, x = ours.cuda(), stock.cuda(), x.cuda()
    with backend.use("triton"):
        rows = cvkernels.explain(ours, x).rows
        assert_matches_module(ours, stock, x, grad=False)
    assert "triton" in {row.backend for row in rows}
    assert not [row for row in rows if "norm" in row.op or "clamp" in row.op or "relu" in row.op]


@pytest.mark.parametrize("hooked", ["norm1", "relu1", "conv1", "norm2", "relu2", "conv2"])
def test_a_hook_on_one_part_leaves_the_rest_of_a_layer_fused(hooked):
    layer = _DenseLayer(12, 4, 2, 0.0).eval()
    x = torch.randn(2, 12, 6, 6)
    with torch.no_grad():
        expected = layer(x)
        calls = []
        layer.get_submodule(hooked).register_forward_hook(lambda *_: calls.append(1))
        rows = cvkernels.explain(layer, x).rows
        assert calls and torch.allclose(layer(x), expected, atol=1e-5)
    fused = sum(row.op == "conv_bn_act" for row in rows)
    assert fused == (2 if hooked in ("norm1", "relu1") else 1)


def test_a_layer_takes_a_tensor_or_a_list():
    stock = stock_module._DenseLayer(12, 4, 2, 0.0).eval()
    ours = _DenseLayer(12, 4, 2, 0.0).eval()
    ours.load_state_dict(stock.state_dict())
    x = torch.randn(2, 12, 6, 6)
    with torch.no_grad():
        assert torch.allclose(ours(x), stock(x), atol=1e-5)
        parts = list(x.split([4, 8], 1))
        assert torch.allclose(ours(parts), stock(parts), atol=1e-5)
        assert len(parts) == 2
    block = _DenseBlock(3, 12, 2, 4, 0.0).eval()
    assert isinstance(block, nn.ModuleDict) and block._version == 2
    assert block(x).shape == (2, 24, 6, 6)


def test_fused_sequential_keeps_every_other_layer():
    layers = [
        nn.Conv2d(3, 4, 3), nn.Sigmoid(), nn.BatchNorm2d(4), nn.ReLU(), nn.MaxPool2d(2),
        nn.BatchNorm2d(4), nn.ReLU(), nn.Conv2d(4, 4, 1), nn.SiLU(), nn.Flatten(),
    ]  # fmt: skip
    ours, stock = FusedSequential(*layers).eval(), nn.Sequential(*layers).eval()
    assert_matches_module(ours, stock, torch.randn(2, 3, 12, 12))
    assert_matches_module(FusedSequential(), nn.Sequential(), torch.randn(1))


# Checkpoints with the keys of old releases


def old_keys(state):
    """state with the names of torchvision's published files, whose norms count nothing."""
    return {
        key.replace("norm1", "norm.1").replace("norm2", "norm.2")
        .replace("conv1", "conv.1").replace("conv2", "conv.2"): value.clone()
        for key, value in state.items()
        if not key.endswith("num_batches_tracked")
    }  # fmt: skip


@pytest.fixture
def trained():
    model = DenseNet(**TINY_DENSENET)
    calibrate(model)
    return model.eval()


@pytest.mark.parametrize("how", ["load_state_dict", "load_checkpoint", "file", "submodule"])
def test_old_keys_load(how, trained, tmp_path):
    old = old_keys(trained.state_dict())
    assert not set(old) & {k for k in trained.state_dict() if "denselayer" in k}
    model = DenseNet(**TINY_DENSENET).eval()
    keys = list(old)
    if how == "load_state_dict":
        model.load_state_dict(old)
    elif how == "load_checkpoint":
        load_checkpoint(model, old)
    elif how == "file":
        torch.save(old, tmp_path / "old.pth")
        load_checkpoint(model, tmp_path / "old.pth")
    else:
        detector = nn.ModuleDict({"backbone": model})
        nested = {f"backbone.{key}": value for key, value in old.items()}
        detector.load_state_dict(nested)
        load_checkpoint(detector, nested)
    assert list(old) == keys, "the caller's dict changed"
    x = image()
    assert torch.equal(model(x), trained(x))


def test_weights_with_old_keys_build_what_torchvision_builds(monkeypatch):
    stock = torchvision.models.densenet121()
    calibrate(stock)
    old = old_keys(stock.state_dict())
    enum = torchvision.models.DenseNet121_Weights
    monkeypatch.setattr(enum, "get_state_dict", lambda *args, **kwargs: dict(old))
    models = [
        m.densenet121(weights="DEFAULT").eval() for m in (cvkernels.models, torchvision.models)
    ]
    assert_matches_module(*models, image(2), grad=False)


def test_new_keys_with_batch_counts_and_odd_mixtures(trained):
    old = {
        key.replace("norm1", "norm.1"): value for key, value in trained.state_dict().items()
    }  # norm2 has its name of today, and norm.1 counts batches
    model = DenseNet(**TINY_DENSENET).eval()
    model.load_state_dict(old)
    x = image()
    assert torch.equal(model(x), trained(x))
    twice = dict(trained.state_dict())
    twice["features.denseblock1.denselayer1.norm.1.weight"] = torch.ones(16)
    with pytest.raises(RuntimeError, match=r"Unexpected key.*denselayer1.norm.1.weight"):
        model.load_state_dict(twice)
    missing = dict(old)
    del missing["features.denseblock1.denselayer1.norm.1.weight"]
    with pytest.raises(
        RuntimeError, match=r"1 missing key\(s\): features.*denselayer1.norm1.weight"
    ):
        load_checkpoint(model, missing)
