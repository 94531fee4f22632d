import pytest
import torch
from torch import nn

import cvkernels
from cvkernels import backend
from cvkernels.models import densenet121, load_checkpoint
from cvkernels.models.densenet import DenseNet, _DenseBlock, _DenseLayer, _Transition
from cvkernels.models.registry import get_builder
from cvkernels.nn import FusedSequential
from tests.support import model_checks as checks
from tests.support.model_checks import build, twins
from tests.support.numerics import assert_matches_module
from tests.support.pairs import calibrate, image

torchvision = pytest.importorskip("torchvision")
stock_module = pytest.importorskip("torchvision.models.densenet")

BUILDERS = ["densenet121", "densenet161", "densenet169", "densenet201"]
# Every kind of layer, in the fewest; the checks that copy or trace a model use it.
TINY = dict(growth_rate=8, block_config=(2, 2, 1, 1), num_init_features=16, num_classes=10)


class Tiny:
    """Builders of the same small network, ours and torchvision's."""

    @staticmethod
    def tiny(**kwargs):
        return torchvision.models.DenseNet(**{**TINY, **kwargs})


@pytest.fixture
def tiny(monkeypatch):
    monkeypatch.setattr(
        cvkernels.models, "tiny", lambda **kwargs: DenseNet(**{**TINY, **kwargs}), raising=False
    )
    return dict(name="tiny", stock=Tiny)


@pytest.mark.parametrize("name", BUILDERS)
def test_state_dict_is_torchvisions(name):
    checks.check_state_dict(name)


def test_eval_output_and_input_gradient_match_stock(device):
    """The other depths, and training, are test_every_builder's."""
    checks.check_eval("densenet121", device)


KEYWORDS = {
    "classes": dict(num_classes=7),
    "bn_size": dict(bn_size=2),
    "growth_rate": dict(growth_rate=12),
    "three_blocks": dict(block_config=(2, 1, 2)),
    "dropout": dict(drop_rate=0.2),
    "memory_efficient": dict(memory_efficient=True),
    "memory_efficient_dropout": dict(memory_efficient=True, drop_rate=0.2),
}


@pytest.mark.parametrize("kwargs", KEYWORDS.values(), ids=KEYWORDS.keys())
def test_keyword_arguments_match_stock(kwargs, device, tiny):
    checks.check_state_dict(**tiny, **kwargs)
    checks.check_eval(device=device, **tiny, **kwargs)
    # Stock's counts the batches of norm1 twice, in the forward pass and in the backward pass.
    kwargs = {key: value for key, value in kwargs.items() if key != "memory_efficient"}
    checks.check_train(device=device, **tiny, **kwargs)


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16], ids=str)
def test_half_precision_matches_stock(dtype, device, tiny):
    checks.check_half(device=device, dtype=dtype, **tiny)


def test_layouts_autocast_and_inference_mode_match_stock(device, tiny):
    checks.check_channels_last("densenet121", device)
    checks.check_autocast_and_inference_mode(device=device, **tiny)


@pytest.mark.parametrize("memory_efficient", [False, True], ids=["plain", "memory_efficient"])
def test_parameter_gradients_match_stock(memory_efficient, device, tiny):
    checks.check_parameter_gradients(device=device, memory_efficient=memory_efficient, **tiny)


def test_memory_efficient_computes_the_plain_networks_gradients():
    plain, efficient = (
        build(cvkernels.models, "densenet121", num_classes=50, memory_efficient=flag)
        for flag in (False, True)
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


# What stays: tracing, copying, pickling, hooks


def test_fx_and_feature_extraction_see_torchvisions_nodes(tiny):
    checks.check_fx("densenet121")
    nodes = ["features.relu0", "features.denseblock1.denselayer2.norm2", "features.denseblock2.cat",
             "features.transition1", "flatten"]  # fmt: skip
    checks.check_feature_extraction(nodes=nodes, **tiny)


def test_export_agrees(tiny):
    checks.check_export(**tiny)


@pytest.mark.parametrize("memory_efficient", [False, True], ids=["plain", "memory_efficient"])
def test_compiles_in_one_graph(memory_efficient, device, tiny):
    checks.check_compiles_in_one_graph(device=device, memory_efficient=memory_efficient, **tiny)


def test_densenet121_compiles_in_one_graph(device):
    checks.check_compiles_in_one_graph("densenet121", device)


def test_jit_trace_agrees(tiny):
    checks.check_jit_trace(**tiny)


@pytest.mark.parametrize("how", ["deepcopy", "pickle", "torch.save"])
def test_copies_carry_no_derived_weights(how, tiny):
    checks.check_copy(how=how, **tiny)


def test_derived_weights_follow_optimiser_steps_and_loads(device, tiny):
    checks.check_steps_and_loads(device=device, **tiny)


@pytest.mark.parametrize(
    "layer",
    ["conv0", "relu0", "pool0", "denseblock1.denselayer2.norm1", "denseblock1.denselayer2.norm2",
     "denseblock2.denselayer1.conv2", "transition1.relu", "transition1.conv"],
)  # fmt: skip
def test_a_hook_runs_that_group_as_modules(layer, tiny):
    checks.check_hook(layer=f"features.{layer}", **tiny)


def test_functional_call_vmap_sync_batchnorm_and_meta(tiny):
    checks.check_functional_call(**tiny)
    checks.check_runs_as_modules(**tiny)
    checks.check_meta(name="tiny", classes=10)


def test_features_is_a_sequential_like_any():
    ours, stock = (model.eval().features for model in twins("densenet121"))
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
    ours, stock = (model.eval() for model in twins("densenet121"))
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
    model = DenseNet(**TINY)
    calibrate(model)
    return model.eval()


@pytest.mark.parametrize("how", ["load_state_dict", "load_checkpoint", "file", "submodule"])
def test_old_keys_load(how, trained, tmp_path):
    old = old_keys(trained.state_dict())
    assert not set(old) & {k for k in trained.state_dict() if "denselayer" in k}
    model = DenseNet(**TINY).eval()
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
    model = DenseNet(**TINY).eval()
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


# Builders

BAD_CALLS = {
    "growth-rate": dict(growth_rate=16),
    "block-config": dict(block_config=(1, 1, 1, 1)),
    "classes-with-weights": dict(weights="IMAGENET1K_V1", num_classes=10),
    "unknown-weights": dict(weights="bogus"),
    "wrong-enum": dict(weights=torchvision.models.ResNet18_Weights.DEFAULT),
    "unknown-keyword": dict(depth=3),
}


@pytest.mark.parametrize("kwargs", BAD_CALLS.values(), ids=BAD_CALLS.keys())
def test_wrong_arguments_raise_torchvisions_errors(kwargs):
    checks.check_same_error("densenet121", **kwargs)


def test_an_image_too_small_is_refused():
    with pytest.raises((RuntimeError, ValueError)), torch.no_grad():
        densenet121().eval()(image(1, 16))


def test_every_builder_is_listed():
    assert set(BUILDERS) <= set(cvkernels.list_models())
    for name in BUILDERS:
        assert hasattr(torchvision.models, get_builder(name).weights_enum)
    assert type(cvkernels.create_model("densenet121", num_classes=3)) is DenseNet
