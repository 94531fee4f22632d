import copy

import pytest
import torch
from torch import nn

import cvkernels
from cvkernels.models.registry import get_builder
from tests.support import model_checks as checks
from tests.support.model_checks import build, twins
from tests.support.numerics import assert_matches_module
from tests.support.pairs import image

torchvision = pytest.importorskip("torchvision")

BUILDERS = [
    "resnet18", "resnet34", "resnet50", "resnet101", "resnet152", "resnext50_32x4d",
    "resnext101_32x8d", "resnext101_64x4d", "wide_resnet50_2", "wide_resnet101_2",
]  # fmt: skip
# One of every kind of block; test_every_builder has the outputs of all.
BLOCKS = ["resnet18", "resnet50", "resnext50_32x4d"]


@pytest.mark.parametrize("name", BUILDERS)
def test_state_dict_is_torchvisions(name):
    checks.check_state_dict(name)


@pytest.mark.parametrize("name", BLOCKS)
def test_eval_output_and_input_gradient_match_stock(name, device):
    checks.check_eval(name, device)


@pytest.mark.parametrize("name", BLOCKS)
def test_train_output_and_input_gradient_match_stock(name, device):
    ours, stock = (model.train().to(device) for model in twins(name))
    exact, x = copy.deepcopy(stock).double(), image(4, device=device)
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
    x = image(2)
    assert_matches_module(ours.eval(), stock.eval(), x, grad=False)


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16], ids=str)
def test_half_precision_matches_stock(dtype, device):
    checks.check_half("resnet18", device, dtype)


def test_channels_last_model_and_input_match_stock(device):
    checks.check_channels_last("resnet50", device)


def test_inference_mode_and_autocast_match_stock(device):
    checks.check_autocast_and_inference_mode("resnet18", device)


# What stays: tracing, copying, pickling, hooks, checkpoints


def test_fx_traces_to_torchvisions_nodes():
    checks.check_fx("resnet18")


def test_feature_extraction_sees_torchvisions_nodes():
    checks.check_feature_extraction("resnet18", ["layer1.0.add", "layer3"])


def test_export_agrees():
    checks.check_export("resnet18")


def test_compiles_in_one_graph(device):
    checks.check_compiles_in_one_graph("resnet18", device)


def test_jit_trace_agrees():
    ours, stock = (model.eval() for model in twins("resnet18"))
    x = image()
    assert torch.allclose(torch.jit.trace(ours, x)(x), stock(x), atol=1e-4)


def test_jit_script_is_refused_with_the_way_out():
    with pytest.raises(NotImplementedError, match="use torch.export or torch.jit.trace"):
        torch.jit.script(cvkernels.models.resnet18())


@pytest.mark.parametrize("how", ["deepcopy", "pickle", "torch.save"])
def test_copies_carry_no_derived_weights(how):
    checks.check_copy("resnet18", how)


def test_derived_weights_follow_optimiser_steps_and_loads(device):
    checks.check_steps_and_loads("resnet18", device)


def test_train_drops_derived_weights():
    ours, _ = twins("resnet18")
    with torch.no_grad():
        ours.eval()(image())
        assert "_derived" in ours.layer1[0].__dict__
        ours.layer1[0].conv1.weight.data.mul_(0)
    ours.train()
    assert not any("_derived" in module.__dict__ for module in ours.modules())


@pytest.mark.parametrize(
    "layer", ["layer1.0.conv1", "layer2.0.downsample.1", "layer3.1.relu", "bn1"]
)
def test_a_hook_runs_that_group_as_modules(layer):
    checks.check_hook("resnet18", layer)


def test_functional_call_uses_the_given_parameters():
    ours, stock = (model.eval() for model in twins("resnet18"))
    x = image()
    with torch.no_grad():
        ours(x)
        for seed in (1, 2, 3):
            state = build(torchvision.models, "resnet18", seed).state_dict()
            actual = torch.func.functional_call(ours, state, x)
            assert torch.allclose(actual, torch.func.functional_call(stock, state, x), atol=1e-3)
            del state


def test_sync_batchnorm_conversion_and_vmap_run_as_modules():
    checks.check_runs_as_modules("resnet18")


def test_frozen_parameters_and_threads_do_not_matter():
    ours, stock = (model.eval().requires_grad_(False) for model in twins("resnet18"))
    x = image(2)
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
    checks.check_same_error("resnet50", **kwargs)


@pytest.mark.parametrize("name", ["resnext50_32x4d", "wide_resnet50_2"])
def test_prescribed_arguments_cannot_be_changed(name):
    checks.check_same_error(name, width_per_group=16)


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
