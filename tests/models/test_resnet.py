import copy
import io
import pickle

import pytest
import torch
from torch import nn

import cvkernels
from cvkernels.models.registry import get_builder
from tests.support.numerics import assert_matches_module

torchvision = pytest.importorskip("torchvision")

BUILDERS = [
    "resnet18", "resnet34", "resnet50", "resnet101", "resnet152", "resnext50_32x4d",
    "resnext101_32x8d", "resnext101_64x4d", "wide_resnet50_2", "wide_resnet101_2",
]  # fmt: skip
# One of every kind of block; test_every_builder has the outputs of all.
BLOCKS = ["resnet18", "resnet50", "resnext50_32x4d"]


def build(module, name, seed=0, **kwargs):
    torch.manual_seed(seed)
    return getattr(module, name)(**kwargs)


def pair(name, **kwargs):
    """(ours, stock) from one seed, batch norms with statistics that are not the initial ones."""
    ours = build(cvkernels.models, name, **kwargs)
    stock = build(torchvision.models, name, **kwargs)
    randomise_norms(stock)
    ours.load_state_dict(stock.state_dict())
    return ours, stock


def randomise_norms(model):
    for module in model.modules():
        if isinstance(module, nn.BatchNorm2d):
            with torch.no_grad():
                module.weight.uniform_(0.5, 1.0)
                module.bias.normal_(0, 0.1)
                module.running_mean.normal_(0, 0.1)
                module.running_var.uniform_(0.5, 1.5)


def state_bytes(model):
    return {key: (value.dtype, value.clone()) for key, value in model.state_dict().items()}


def assert_same_state(model, before):
    after = model.state_dict()
    assert list(after) == list(before)
    for key, (dtype, value) in before.items():
        assert after[key].dtype == dtype and torch.equal(after[key], value), key


@pytest.mark.parametrize("name", BUILDERS)
def test_state_dict_is_torchvisions(name):
    ours, stock = build(cvkernels.models, name), build(torchvision.models, name)
    assert list(ours.state_dict()) == list(stock.state_dict())
    assert ours.state_dict()._metadata == stock.state_dict()._metadata
    assert [n for n, _ in ours.named_modules()] == [n for n, _ in stock.named_modules()]
    for key, value in stock.state_dict().items():
        assert torch.equal(ours.state_dict()[key], value), key
    assert [n for n, p in ours.named_parameters()] == [n for n, p in stock.named_parameters()]


@pytest.mark.parametrize("name", BLOCKS)
def test_eval_output_and_input_gradient_match_stock(name, device):
    ours, stock = (model.eval().to(device) for model in pair(name))
    x = torch.randn(2, 3, 64, 64, device=device)
    before = state_bytes(ours)
    assert_matches_module(ours, stock, x, grad=False)
    assert_matches_module(ours, stock, x)
    assert_same_state(ours, before)


@pytest.mark.parametrize("name", BLOCKS)
def test_train_output_and_input_gradient_match_stock(name, device):
    ours, stock = (model.train().to(device) for model in pair(name))
    exact, x = copy.deepcopy(stock).double(), torch.randn(4, 3, 64, 64, device=device)
    assert_matches_module(ours, stock, x)
    exact(x.double())
    moved = []
    for key, value in stock.state_dict().items():
        if key.endswith(("running_mean", "running_var")):
            moved.append([model.state_dict()[key].double() for model in (ours, stock, exact)])
        else:
            assert torch.equal(ours.state_dict()[key], value), key
    # All together: what one deep channel errs by is a matter of luck.
    actual, eager, truth = (torch.cat(parts) for parts in zip(*moved, strict=True))
    assert (actual - truth).norm() <= 2 * (eager - truth).norm() + 1e-7 * truth.norm()


@pytest.mark.parametrize(
    "kwargs",
    [
        {"num_classes": 7},
        {"zero_init_residual": True},
        {"replace_stride_with_dilation": [False, True, True]},
        {"norm_layer": lambda c: nn.GroupNorm(8, c)},
        {"groups": 4, "width_per_group": 16},
    ],
    ids=["num_classes", "zero_init", "dilated", "group_norm", "groups"],
)
def test_keyword_arguments_match_stock(kwargs):
    ours, stock = (
        build(cvkernels.models, "resnet50", **kwargs),
        build(torchvision.models, "resnet50", **kwargs),
    )
    for (key, value), (name, expected) in zip(
        ours.state_dict().items(), stock.state_dict().items(), strict=True
    ):
        assert key == name and torch.equal(value, expected)
    x = torch.randn(2, 3, 64, 64)
    assert_matches_module(ours.eval(), stock.eval(), x, grad=False)


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16], ids=str)
def test_half_precision_matches_stock(dtype, device):
    ours, stock = (model.eval().to(device, dtype) for model in pair("resnet18"))
    assert_matches_module(
        ours, stock, torch.randn(2, 3, 64, 64, device=device, dtype=dtype), grad=False
    )


def test_channels_last_model_and_input_match_stock(device):
    ours, stock = (m.eval().to(device, memory_format=torch.channels_last) for m in pair("resnet50"))
    x = torch.randn(2, 3, 64, 64, device=device).contiguous(memory_format=torch.channels_last)
    assert_matches_module(ours, stock, x, grad=False)


def test_inference_mode_and_autocast_match_stock(device):
    ours, stock = (model.eval().to(device) for model in pair("resnet18"))
    x = torch.randn(2, 3, 64, 64, device=device)
    with torch.inference_mode():
        assert_matches_module(ours, stock, x, grad=False)
    with torch.autocast(device.type, torch.bfloat16), torch.no_grad():
        actual, expected = ours(x), stock(x)
    assert actual.dtype == expected.dtype
    assert (actual - expected).abs().max() <= 0.1


# What stays: tracing, copying, pickling, hooks, checkpoints


def test_fx_traces_to_torchvisions_nodes():
    ours, stock = pair("resnet18")
    graphs = [torch.fx.symbolic_trace(model.eval()) for model in (ours, stock)]
    names = [{node.name for node in graph.graph.nodes} for graph in graphs]
    assert names[0] == names[1]
    x = torch.randn(1, 3, 64, 64)
    assert_matches_module(graphs[0], stock, x, grad=False)


def test_feature_extraction_sees_torchvisions_nodes():
    from torchvision.models.feature_extraction import create_feature_extractor, get_graph_node_names

    ours, stock = (model.eval() for model in pair("resnet18"))
    assert sorted(get_graph_node_names(ours)[1]) == sorted(get_graph_node_names(stock)[1])
    x = torch.randn(1, 3, 64, 64)
    features = [create_feature_extractor(m, ["layer1.0.add", "layer3"])(x) for m in (ours, stock)]
    for key, value in features[1].items():
        assert torch.allclose(features[0][key], value, atol=1e-5), key


def test_export_agrees():
    ours, stock = (model.eval() for model in pair("resnet18"))
    x = torch.randn(1, 3, 64, 64)
    exported = torch.export.export(ours, (x,))
    assert not any("cvkernels" in str(node.target) for node in exported.graph.nodes)
    assert torch.allclose(exported.module()(x), stock(x), atol=1e-4)


def test_compiles_in_one_graph(device):
    ours, stock = (model.eval().to(device) for model in pair("resnet18"))
    x = torch.randn(1, 3, 64, 64, device=device)
    compiled = torch.compile(ours, fullgraph=True, backend="aot_eager")
    with torch.no_grad():
        assert torch.allclose(compiled(x), stock(x), atol=1e-4)


def test_jit_trace_agrees():
    ours, stock = (model.eval() for model in pair("resnet18"))
    x = torch.randn(1, 3, 64, 64)
    assert torch.allclose(torch.jit.trace(ours, x)(x), stock(x), atol=1e-4)


def test_jit_script_is_refused_with_the_way_out():
    with pytest.raises(NotImplementedError, match="use torch.export or torch.jit.trace"):
        torch.jit.script(cvkernels.models.resnet18())


@pytest.mark.parametrize("copied", ["deepcopy", "pickle", "torch.save"])
def test_copies_carry_no_derived_weights(copied):
    ours, _ = pair("resnet18")
    x = torch.randn(1, 3, 64, 64)
    with torch.no_grad():
        expected = ours.eval()(x)
        if copied == "deepcopy":
            twin = copy.deepcopy(ours)
        elif copied == "pickle":
            twin = pickle.loads(pickle.dumps(ours))
        else:
            file = io.BytesIO()
            torch.save(ours, file)
            plain = io.BytesIO()
            torch.save(copy.deepcopy(ours), plain)
            assert file.tell() == pytest.approx(plain.tell(), rel=1e-3)
            file.seek(0)
            twin = torch.load(file, weights_only=False)
        assert not any("_derived" in module.__dict__ for module in twin.modules())
        assert torch.equal(twin(x), expected)


def test_derived_weights_follow_optimiser_steps_and_loads(device):
    ours, stock = (model.eval().to(device) for model in pair("resnet18"))
    x = torch.randn(2, 3, 64, 64, device=device)
    for model in (ours, stock):
        with torch.no_grad():
            model(x)
        optimiser = torch.optim.SGD(model.parameters(), lr=0.01)
        model(x).square().mean().backward()
        optimiser.step()
    assert_matches_module(ours, stock, x, grad=False)
    randomise_norms(stock)
    ours.load_state_dict(stock.state_dict())
    assert_matches_module(ours, stock, x, grad=False)
    ours.load_state_dict(
        {k: v.clone() for k, v in build(torchvision.models, "resnet18", 5).state_dict().items()},
        assign=True,
    )
    assert_matches_module(
        ours, build(torchvision.models, "resnet18", 5).eval().to(device), x, grad=False
    )


def test_train_drops_derived_weights():
    ours, _ = pair("resnet18")
    with torch.no_grad():
        ours.eval()(torch.randn(1, 3, 64, 64))
        assert "_derived" in ours.layer1[0].__dict__
        ours.layer1[0].conv1.weight.data.mul_(0)
    ours.train()
    assert not any("_derived" in module.__dict__ for module in ours.modules())


@pytest.mark.parametrize(
    "layer", ["layer1.0.conv1", "layer2.0.downsample.1", "layer3.1.relu", "bn1"]
)
def test_a_hook_runs_that_group_as_modules(layer):
    ours, stock = (model.eval() for model in pair("resnet18"))
    seen = {}
    for key, model in (("ours", ours), ("stock", stock)):
        model.get_submodule(layer).register_forward_hook(
            lambda module, args, out, key=key: seen.update({key: out.clone()})
        )
    x = torch.randn(1, 3, 64, 64)
    with torch.no_grad():
        assert torch.allclose(ours(x), stock(x), atol=1e-4)
    assert torch.allclose(seen["ours"], seen["stock"], atol=1e-4)
    reasons = {row.reason for row in cvkernels.explain(ours, x).rows}
    assert any("has a hook" in reason for reason in reasons)


def test_functional_call_uses_the_given_parameters():
    ours, stock = (model.eval() for model in pair("resnet18"))
    x = torch.randn(1, 3, 64, 64)
    with torch.no_grad():
        ours(x)
        for seed in (1, 2, 3):
            state = build(torchvision.models, "resnet18", seed).state_dict()
            actual = torch.func.functional_call(ours, state, x)
            assert torch.allclose(actual, torch.func.functional_call(stock, state, x), atol=1e-3)
            del state


def test_sync_batchnorm_conversion_and_vmap_run_as_modules():
    ours, stock = (model.eval() for model in pair("resnet18"))
    x = torch.randn(2, 3, 32, 32)
    batched = torch.vmap(lambda image: ours(image[None])[0])(x)
    with torch.no_grad():
        assert torch.allclose(batched, stock(x), atol=1e-4)
    converted = nn.SyncBatchNorm.convert_sync_batchnorm(ours)
    rows = cvkernels.explain(converted.eval(), x).rows
    assert any("SyncBatchNorm is not exactly nn.BatchNorm2d" in row.reason for row in rows)


def test_frozen_parameters_and_threads_do_not_matter():
    ours, stock = (model.eval().requires_grad_(False) for model in pair("resnet18"))
    x = torch.randn(2, 3, 64, 64)
    assert_matches_module(ours, stock, x)
    threads = torch.get_num_threads()
    try:
        torch.set_num_threads(1)
        assert_matches_module(ours, stock, x)
    finally:
        torch.set_num_threads(threads)


def test_meta_and_deferred_construction():
    with torch.device("meta"):
        model = cvkernels.models.resnet18()
    assert model(torch.empty(2, 3, 64, 64, device="meta")).shape == (2, 1000)


# Builders


def test_every_builder_is_listed_and_created():
    assert set(BUILDERS) <= set(cvkernels.list_models())
    assert type(cvkernels.create_model("resnet18", num_classes=3)) is cvkernels.models.ResNet
    with pytest.raises(ValueError, match="Unknown model resnet17; did you mean .*resnet18"):
        cvkernels.create_model("resnet17")


BAD_CALLS = {
    "stride-list": dict(replace_stride_with_dilation=[True]),
    "unknown-keyword": dict(depth=3),
    "unknown-weights": dict(weights="bogus"),
    "wrong-enum": dict(weights=torchvision.models.ResNet18_Weights.DEFAULT),
    "classes-with-weights": dict(weights="IMAGENET1K_V2", num_classes=10),
}


@pytest.mark.parametrize("kwargs", BAD_CALLS.values(), ids=BAD_CALLS.keys())
def test_wrong_arguments_raise_torchvisions_errors(kwargs):
    with pytest.raises(Exception) as stock:  # noqa: PT011, B017 - whatever torchvision raises
        torchvision.models.resnet50(**kwargs)
    with pytest.raises(type(stock.value)) as ours:
        cvkernels.models.resnet50(**kwargs)
    if "keyword" not in str(stock.value):
        assert str(ours.value) == str(stock.value)


@pytest.mark.parametrize("name", ["resnext50_32x4d", "wide_resnet50_2"])
def test_prescribed_arguments_cannot_be_changed(name):
    kwargs = {"width_per_group": 16}
    with pytest.raises(ValueError) as stock:
        getattr(torchvision.models, name)(**kwargs)
    with pytest.raises(ValueError) as ours:
        getattr(cvkernels.models, name)(**kwargs)
    assert str(ours.value) == str(stock.value)


@pytest.mark.parametrize(
    ("kwargs", "error"),
    [
        ({"groups": 2}, ValueError),
        ({"replace_stride_with_dilation": [True, False, False]}, NotImplementedError),
    ],
    ids=["groups", "dilation"],
)
def test_basic_block_refuses_what_it_cannot(kwargs, error):
    with pytest.raises(error):
        cvkernels.models.resnet18(**kwargs)


def test_deprecated_arguments_still_work():
    with pytest.warns(UserWarning, match="'pretrained' is deprecated"):
        cvkernels.models.resnet18(pretrained=False)
    with pytest.warns(UserWarning, match="positional"):
        cvkernels.models.resnet18(None, False)
    with pytest.raises(TypeError, match="multiple values for argument 'weights'"):
        cvkernels.models.resnet18(None, weights=None)


def test_every_weight_enum_exists_in_torchvision():
    for name in BUILDERS:
        assert hasattr(torchvision.models, get_builder(name).weights_enum)
