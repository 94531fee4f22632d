"""Every family beside its stock twin; what only one family has is in the file of its name."""

import pytest
import torch
from torch import nn

import cvkernels
from cvkernels.models.registry import get_builder
from tests.support.model_checks import (
    COPIES,
    TINY_DENSENET,
    assert_autocasts_like,
    assert_close,
    assert_follows_parameters,
    assert_hook_is_called,
    assert_same_output,
    assert_same_state,
    fresh_twins,
    twins,
)
from tests.support.numerics import assert_matches_module
from tests.support.pairs import seen

torchvision = pytest.importorskip("torchvision")
timm = pytest.importorskip("timm")

# Networks that differ from the builder of their name without arguments.
VARIANTS = {
    "googlenet": ("googlenet", dict(init_weights=False)),
    "googlenet-scaled-input": ("googlenet", dict(init_weights=False, transform_input=True)),
    "densenet": ("DenseNet", TINY_DENSENET),
    "densenet-memory-efficient": ("DenseNet", dict(TINY_DENSENET, memory_efficient=True)),
    "senet154": ("senet154", dict(layers=(1, 1, 1, 1))),
}
FAMILIES = (
    "googlenet", "resnet18", "densenet", "efficientnet_b0", "seresnet18", "legacy_seresnet18",
)  # fmt: skip
# The compound rule at any point has no stock builder.
BUILDERS = [name for name in cvkernels.list_models() if name != "efficientnet"]


def pair(name, device="cpu"):
    """(ours, stock) in eval."""
    builder, kwargs = VARIANTS.get(name, (name, {}))
    return twins(builder, device, **kwargs)


each_family = pytest.mark.parametrize("name", FAMILIES)


# Names, order, shapes, initialisation


@pytest.mark.few(10)
@pytest.mark.parametrize("name", BUILDERS)
@pytest.mark.filterwarnings("ignore:The default weight initialization:FutureWarning")
def test_state_is_stocks(name):
    kwargs = {"init_weights": True} if name == "googlenet" else {}
    ours, stock = fresh_twins(name, **kwargs)
    assert_same_state(ours, stock)
    settings = [
        [
            [getattr(module, name, None) for name in ("eps", "momentum", "p", "drop_prob", "mode")]
            for module in model.modules()
        ]
        for model in (ours, stock)
    ]
    assert settings[0] == settings[1]
    for name in ("num_features", "head_hidden_size", "feature_info", "drop_rate"):  # timm's
        assert getattr(ours, name, None) == getattr(stock, name, None)


@pytest.mark.parametrize(
    "name", ["googlenet", "resnet50", "densenet121", "efficientnet_b0", "seresnet18"]
)
def test_a_builder_is_listed_and_creates_its_class(name):
    kwargs = {"init_weights": False} if name == "googlenet" else {}
    assert name in cvkernels.list_models()
    model = cvkernels.create_model(name, num_classes=3, **kwargs)
    assert type(model) is type(getattr(cvkernels.models, name)(**kwargs))
    assert type(model).__module__.startswith("cvkernels.models")


@pytest.mark.parametrize("name", [name for name in BUILDERS if hasattr(torchvision.models, name)])
def test_a_builders_weights_enum_is_torchvisions(name):
    assert hasattr(torchvision.models, get_builder(name).weights_enum)


@pytest.mark.parametrize("name", [*FAMILIES, "legacy_senet154"])
def test_meta(name):
    builder, kwargs = VARIANTS.get(name, (name, {}))
    with torch.device("meta"):
        model = getattr(cvkernels.models, builder)(**kwargs).eval()
    x = torch.empty(2, 3, 64, 64, device="meta")
    assert model(x).shape == (2, kwargs.get("num_classes", 1000))


# Numbers


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16], ids=str)
@each_family
def test_half_precision_matches_stock(name, dtype, device):
    ours, stock = (model.to(dtype) for model in pair(name, device))
    assert_matches_module(ours, stock, seen(2, device).to(dtype), grad=False)


@pytest.mark.parametrize(
    "name", ["googlenet", "resnet50", "densenet121", "efficientnet_b0", "seresnet18"]
)
def test_channels_last_matches_stock(name, device):
    ours, stock = (model.to(memory_format=torch.channels_last) for model in pair(name, device))
    x = seen(2, device).contiguous(memory_format=torch.channels_last)
    assert_matches_module(ours, stock, x, grad=False)
    with torch.inference_mode():
        assert_matches_module(ours, stock, x, grad=False)


@each_family
def test_autocast_and_inference_mode_match_stock(name, device):
    ours, stock = pair(name, device)
    x = seen(2, device)
    with torch.inference_mode():
        assert_matches_module(ours, stock, x, grad=False)
    assert_autocasts_like(ours, stock, x)


@each_family
def test_eval_follows_steps_loads_and_functional_calls(name, device):
    # Times 1.1, EfficientNet's outputs are of order 1e6, and stock's own are wrong in float32.
    factors = (0.9, 0.99 if name == "efficientnet_b0" else 1.1, 0.98)
    assert_follows_parameters(*pair(name, device), seen(2, device), factors)


# Tracing and compilation


@pytest.mark.parametrize(
    "name",
    [
        "googlenet-scaled-input", "resnet18", "densenet121", "efficientnet_b0",
        "efficientnet_v2_s", "seresnet18", "legacy_seresnet18", "seresnet50", "legacy_seresnet50",
        "senet154",
    ],
)  # fmt: skip
def test_fx_traces_to_stocks_nodes(name):
    """In eval and in training."""
    ours, stock = pair(name)
    for training in (True, False):
        graphs = [torch.fx.symbolic_trace(model.train(training)) for model in (ours, stock)]
        names = [[node.name for node in graph.graph.nodes] for graph in graphs]
        assert names[0] == names[1]
    assert_matches_module(graphs[0], stock, seen(), grad=False)


FEATURES = {
    "googlenet": "conv1.relu inception3a.branch4.0 inception4e.cat maxpool4 flatten",
    "resnet18": "layer1.0.add layer3",
    "densenet": "features.relu0 features.denseblock1.denselayer2.norm2 features.denseblock2.cat"
    " features.transition1 flatten",
    "efficientnet_b0": "features.0 features.2.1.add features.3.0.block.1 features.8 flatten",
}


@pytest.mark.parametrize(("name", "nodes"), FEATURES.items(), ids=FEATURES)
def test_feature_extraction_sees_torchvisions_nodes(name, nodes):
    from torchvision.models.feature_extraction import create_feature_extractor, get_graph_node_names

    ours, stock = pair(name)
    if name != "efficientnet_b0":  # torchvision does not trace into its own ops
        assert get_graph_node_names(ours) == get_graph_node_names(stock)
    actual, expected = (
        create_feature_extractor(model, nodes.split())(seen()) for model in (ours, stock)
    )
    assert list(actual) == list(expected)
    for key, value in expected.items():
        assert_close(actual[key], value, key, 1e-5 if name == "resnet18" else 1e-4)


@each_family
def test_export_agrees(name):
    ours, stock = pair(name)
    exported = torch.export.export(ours, (seen(),))
    assert not any("cvkernels" in str(node.target) for node in exported.graph.nodes)
    assert_same_output(exported.module(), stock, seen())


@pytest.mark.full
@pytest.mark.parametrize("name", [*FAMILIES, "densenet-memory-efficient", "densenet121"])
def test_compiles_in_one_graph(name, device):
    ours, stock = pair(name, device)
    compiled = torch.compile(ours, fullgraph=True, backend="aot_eager")
    assert_same_output(compiled, stock, seen(1, device))


@each_family
def test_jit_trace_agrees(name):
    ours, stock = pair(name)
    traced = torch.jit.trace(ours, seen(), check_trace=name == "resnet18")
    assert_same_output(traced, stock, seen())


# Copies, hooks, other callers


@pytest.mark.parametrize("how", COPIES)
@each_family
def test_copies_carry_no_derived_weights(name, how):
    ours, _ = pair(name)
    with torch.no_grad():
        expected = ours(seen())
        twin = COPIES[how](ours)
        assert not any("_derived" in module.__dict__ for module in twin.modules())
        assert torch.equal(twin(seen()), expected)
    assert list(twin.state_dict()) == list(ours.state_dict())


# Parts of fused groups, then others.
HOOKS = {
    "googlenet": ("conv1.conv inception3b.branch2.1.bn inception4a.branch4.0 maxpool2", ""),
    "resnet18": ("layer1.0.conv1 layer2.0.downsample.1 layer3.1.relu bn1", ""),
    "densenet": (
        "features.conv0 features.relu0 features.pool0 features.denseblock1.denselayer2.norm1"
        " features.denseblock1.denselayer2.norm2 features.denseblock2.denselayer1.conv2"
        " features.transition1.relu features.transition1.conv",
        "",
    ),
    "efficientnet_b0": (
        "features.0.2 features.2.1.block.0.0 features.2.1.block.2.avgpool"
        " features.2.1.block.2.fc1 features.2.1.block.3.1",
        "features.1.0 features.2.1.block features.2.1.block.2 features.2.1.block.2.activation"
        " features.2.1.block.2.scale_activation features.2.1.block.3"
        " features.2.1.stochastic_depth",
    ),
    "seresnet18": (
        "act1 maxpool layer1.0.bn1 layer1.0.se.fc2 layer2.0.downsample.0",
        "layer1 layer1.0.drop_block layer1.0.aa layer1.0.se layer1.0.se.bn layer1.0.se.gate"
        " layer1.0.act2 layer2.0.downsample global_pool.pool",
    ),
    "legacy_seresnet18": (
        "layer0.relu1 pool0 layer1.0.relu layer1.0.se_module.fc1",
        "layer0 layer1.0.se_module",
    ),
    "senet154": ("", "conv1 conv1.1 conv1.6 bn1"),
}


@pytest.mark.few(15)
@pytest.mark.parametrize(
    ("name", "layer", "fused"),
    [
        (name, layer, fused)
        for name, layers in HOOKS.items()
        for fused, part in zip((True, False), layers, strict=True)
        for layer in part.split()
    ],
)
def test_a_hook_sees_what_stock_computes(name, layer, fused):
    """On a part of a fused group it has modules run, and explain says so."""
    ours, stock = pair(name)
    assert_hook_is_called(ours, stock, layer, seen())
    if fused:
        reasons = {row.reason for row in cvkernels.explain(ours, seen()).rows}
        assert any("has a hook" in reason for reason in reasons)


@each_family
def test_vmap_runs_modules_and_sync_batch_norm_in_eval_is_a_batch_norm(name):
    ours, stock = pair(name)
    x = seen(2)
    assert_same_output(torch.vmap(lambda one: ours(one[None])[0]), stock, x)
    before = [row.reason for row in cvkernels.explain(ours.eval(), x).rows]
    converted = nn.SyncBatchNorm.convert_sync_batchnorm(ours).eval()
    assert [row.reason for row in cvkernels.explain(converted, x).rows] == before
    assert_same_output(converted, stock, x)
