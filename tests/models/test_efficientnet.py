from functools import partial

import pytest
import torch
from torch import nn

import cvkernels
from cvkernels.models import efficientnet
from cvkernels.models.registry import get_builder
from cvkernels.nn import FusedMBConvConfig, MBConv, MBConvConfig, SqueezeExcitation
from tests.support.model_checks import (
    build,
    check_compiles_in_one_graph,
    check_copy,
    check_export,
    check_fx,
    check_hook,
    check_jit_trace,
    check_meta,
    check_runs_as_modules,
)
from tests.support.numerics import assert_matches_module
from tests.support.pairs import calibrated_pair, image, seen
from tests.support.stock_twin_checks import (
    assert_eval_is_pure,
    assert_every_norm_is_fused,
    assert_follows_parameters,
    assert_hook_is_called,
    assert_same_error,
    assert_same_output,
    assert_same_state,
    assert_trains_like,
)

torchvision = pytest.importorskip("torchvision")
stock_module = pytest.importorskip("torchvision.models.efficientnet")

# The weights' crop size, which the model carries.
RESOLUTIONS = {
    "efficientnet_b0": 224,
    "efficientnet_b1": 240,
    "efficientnet_b2": 288,
    "efficientnet_b3": 300,
    "efficientnet_b4": 380,
    "efficientnet_b5": 456,
    "efficientnet_b6": 528,
    "efficientnet_b7": 600,
    "efficientnet_v2_s": 384,
    "efficientnet_v2_m": 480,
    "efficientnet_v2_l": 480,
}
SMALL = ["efficientnet_b0", "efficientnet_v2_s"]


def calibrated(name="efficientnet_b0", **kwargs):
    libraries = (cvkernels.models, torchvision.models)
    return calibrated_pair(*(build(library, name, **kwargs) for library in libraries))


# The networks


@pytest.mark.parametrize("name", RESOLUTIONS)
def test_builder_is_torchvisions(name):
    ours, stock = build(cvkernels.models, name), build(torchvision.models, name)
    norms = [
        [(m.eps, m.momentum) for m in model.modules() if isinstance(m, nn.BatchNorm2d)]
        for model in (ours, stock)
    ]
    assert norms[0] == norms[1]
    probabilities = [
        [(m.p, m.mode) for m in model.modules() if type(m).__name__ == "StochasticDepth"]
        for model in (ours, stock)
    ]
    assert probabilities[0] == probabilities[1]
    assert ours.classifier[0].p == stock.classifier[0].p
    assert_same_state(ours, stock)


@pytest.mark.parametrize("name", SMALL)
def test_eval_output_and_gradients_match_stock(name, device):
    ours, stock = (model.to(device) for model in calibrated(name))
    assert_eval_is_pure(ours, stock, seen(2, device))


@pytest.mark.parametrize("name", SMALL)
def test_training_matches_stock_down_to_the_random_numbers(name, device):
    ours, stock = (model.train().to(device) for model in calibrated(name))
    assert_trains_like(ours, stock, seen(4, device))


def test_stochastic_depth_draws_in_the_residual_blocks_alone():
    ours = build(cvkernels.models, "efficientnet_b0", dropout=0.0).train()
    blocks = [m for m in ours.modules() if isinstance(m, MBConv)]
    drawing = [m for m in blocks if m.use_res_connect and m.stochastic_depth.p > 0]
    x = image(4)
    torch.manual_seed(1)
    ours(x)
    state = torch.get_rng_state()
    torch.manual_seed(1)
    for _ in drawing:
        torch.empty(4, 1, 1, 1).bernoulli_(0.5)
    assert 0 < len(drawing) < len(blocks) and torch.equal(torch.get_rng_state(), state)


@pytest.mark.parametrize(
    "kwargs",
    [
        {"num_classes": 7},
        {"dropout": 0.6, "stochastic_depth_prob": 0.5},
        {"norm_layer": lambda c: nn.GroupNorm(8, c)},
        {"norm_layer": partial(nn.BatchNorm2d, eps=1e-2, momentum=0.2)},
    ],
    ids=["num_classes", "probabilities", "group_norm", "batch_norm"],
)
def test_keyword_arguments_match_stock(kwargs):
    ours, stock = (
        build(m, "efficientnet_b0", **kwargs) for m in (cvkernels.models, torchvision.models)
    )
    assert_same_state(ours, stock)
    ours, stock = calibrated_pair(ours, stock)
    assert_matches_module(ours, stock, seen(2))
    assert_matches_module(ours.train(), stock.train(), seen(4))


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16], ids=str)
def test_half_precision_matches_stock(dtype, device):
    ours, stock = (model.to(device, dtype) for model in calibrated())
    assert_matches_module(ours, stock, seen(2, device).to(dtype), grad=False)


def test_channels_last_autocast_and_inference_mode_match_stock(device):
    ours, stock = (m.to(device, memory_format=torch.channels_last) for m in calibrated())
    x = seen(2, device).contiguous(memory_format=torch.channels_last)
    with torch.inference_mode():
        assert_matches_module(ours, stock, x, grad=False)
    with torch.autocast(device.type, torch.bfloat16), torch.no_grad():
        actual, expected = ours(x), stock(x)
    assert actual.dtype == expected.dtype
    assert (actual - expected).abs().max() <= 0.1


@pytest.mark.parametrize("shape", [(1, 3, 65, 65), (3, 3, 96, 131), (0, 3, 64, 64)], ids=str)
def test_any_size_matches_stock(shape):
    ours, stock = calibrated()
    x = torch.randn(shape)
    with torch.no_grad():
        actual, expected = ours(x), stock(x)
    assert torch.allclose(actual, expected, atol=1e-3, rtol=1e-3)


@pytest.mark.parametrize("name", SMALL)
def test_every_norm_and_every_linear_shortcut_is_fused(name):
    ours = calibrated(name)[0]
    x = seen()
    assert_every_norm_is_fused(ours, x)
    adds = sum(row.op in ("aten.add", "aten.add_") for row in cvkernels.explain(ours, x).rows)
    # V2's first stage has blocks of one convolution, whose SiLU stands before the shortcut.
    assert adds == {"efficientnet_b0": 0, "efficientnet_v2_s": 2}[name]


def test_b0_plan_meets_the_fused_floor():
    """99 kernels and 32.4 MB per image with every epilogue fused; the squeeze takes neither."""
    example = torch.empty(128, 3, 224, 224, dtype=torch.bfloat16, device="meta")
    plan = cvkernels.explain(build(cvkernels.models, "efficientnet_b0").eval(), example)
    per_image = (plan.totals["bytes_read"] + plan.totals["bytes_written"]) / 128 / 1e6
    assert plan.totals["kernels"] <= 99 and per_image <= 1.05 * 32.4
    ops = [row.op for row in plan.rows if row.layer.startswith("features.2.1")]
    assert ops == ["conv_bn_act", "depthwise_conv_bn_act", "excite", "conv_bn_act"]
    assert {row.kernels for row in plan.rows} == {1}


@pytest.mark.parametrize("part", ["features.2.1.block.1", "features.2.1.block.2.fc1"])
def test_a_watched_squeeze_is_computed_apart(part):
    ours = calibrated()[0]
    ours.get_submodule(part).register_forward_hook(lambda *_: None)
    with torch.no_grad():
        rows = cvkernels.explain(ours, seen()).rows
    assert not any(r.op == "excite" for r in rows if r.layer.startswith("features.2.1"))
    assert any(r.op == "excite" for r in rows if r.layer.startswith("features.2.0"))


def test_verify_agrees():
    report = cvkernels.verify(calibrated()[0], seen())
    assert report.rows[-1].ok and {row.layer for row in report.rows} >= {"features.1.0.block.0.0"}


# What stays: tracing, copying, hooks


@pytest.mark.parametrize("name", SMALL)
def test_fx_traces_to_torchvisions_nodes(name):
    check_fx(name)


def test_feature_extraction_takes_torchvisions_nodes():
    from torchvision.models.feature_extraction import create_feature_extractor

    nodes = ["features.0", "features.2.1.add", "features.3.0.block.1", "features.8", "flatten"]
    x = seen()
    ours, stock = (create_feature_extractor(model, nodes)(x) for model in calibrated())
    for key, value in stock.items():
        assert (ours[key] - value).abs().max() <= 1e-3 * value.abs().max(), key


def test_export_and_jit_trace_agree():
    check_export("efficientnet_b0")
    check_jit_trace("efficientnet_b0")


def test_compiles_in_one_graph(device):
    check_compiles_in_one_graph("efficientnet_b0", device)


@pytest.mark.parametrize("how", ["deepcopy", "pickle", "torch.save"])
def test_copies_carry_no_derived_weights(how):
    check_copy("efficientnet_b0", how)


@pytest.mark.parametrize(
    "layer",
    [
        "features.1.0", "features.2.1.block", "features.2.1.block.2",
        "features.2.1.block.2.activation", "features.2.1.block.2.scale_activation",
        "features.2.1.block.3", "features.2.1.stochastic_depth",
    ],
)  # fmt: skip
def test_a_hook_sees_what_stock_computes(layer):
    ours, stock = calibrated()
    assert_hook_is_called(ours, stock, layer, seen())


@pytest.mark.parametrize(
    "layer",
    [
        "features.0.2", "features.2.1.block.0.0", "features.2.1.block.2.avgpool",
        "features.2.1.block.2.fc1", "features.2.1.block.3.1",
    ],
)  # fmt: skip
def test_a_hook_on_a_fused_part_runs_modules_and_explain_says_so(layer):
    check_hook("efficientnet_b0", layer)


def test_derived_weights_follow_optimiser_steps_and_loads(device):
    ours, stock = (model.to(device) for model in calibrated())
    assert_follows_parameters(ours, stock, seen(2, device))


def test_vmap_sync_batch_norm_and_meta():
    check_runs_as_modules("efficientnet_b0")
    check_meta("efficientnet_b0")


def test_a_block_of_other_parts_runs_them():
    """A replaced projection or squeeze is called, not bypassed."""
    ours, stock = calibrated()
    for model in (ours, stock):
        block = model.features[2][1].block
        block[3] = nn.Sequential(block[3], nn.Tanh())
        block[2].fc1 = nn.Sequential(block[2].fc1)
    assert_same_output(ours, stock, seen())


# Compound scaling


def test_resolution_is_the_weights_crop_size():
    for name, resolution in RESOLUTIONS.items():
        enum = getattr(torchvision.models, get_builder(name).weights_enum)
        assert enum.DEFAULT.transforms().crop_size == [resolution]
        with torch.device("meta"):
            assert get_builder(name)().resolution == resolution
    assert cvkernels.models.EfficientNet([MBConvConfig(1, 3, 1, 32, 16, 1)], 0.2).resolution is None


def test_any_point_of_the_compound_rule():
    ours = build(
        cvkernels.models, "efficientnet", width=1.2, depth=1.4, resolution=300, dropout=0.3
    )
    assert_same_state(ours, build(cvkernels.models, "efficientnet_b3"))
    assert (ours.resolution, ours.classifier[0].p) == (300, 0.3)
    half = efficientnet(0.5, 0.5, 128, num_classes=5, norm_layer=partial(nn.BatchNorm2d, eps=1e-3))
    assert half.features[0][0].out_channels == 16 and half.features[0][1].eps == 1e-3
    assert [len(stage) for stage in half.features[1:8]] == [1, 1, 1, 2, 2, 2, 1]
    assert half.eval()(image(1, 128)).shape == (1, 5)


@pytest.mark.parametrize(
    ("kwargs", "message"),
    [
        ({"width": 0}, "width must be a positive factor"),
        ({"depth": -1.0}, "depth must be a positive factor"),
        ({"width": float("nan")}, "width must be a positive factor"),
        ({"resolution": 0}, "resolution must be a positive integer"),
        ({"resolution": 224.0}, "resolution must be a positive integer"),
    ],
)
def test_points_off_the_rule_are_refused(kwargs, message):
    with pytest.raises(ValueError, match=message):
        efficientnet(**kwargs)


@pytest.mark.parametrize("width", [0.35, 1.0, 1.1, 1.3, 2.0])
def test_configurations_scale_as_torchvisions(width):
    for depth in (0.5, 1.0, 2.2):
        arguments = (6, 5, 2, 24, 40, 3, width, depth)
        ours, stock = MBConvConfig(*arguments), stock_module.MBConvConfig(*arguments)
        ours, stock = vars(ours), vars(stock)
        assert (ours.pop("block"), stock.pop("block").__name__) == (MBConv, "MBConv")
        assert ours == stock
    fused = FusedMBConvConfig(4, 3, 2, 24, 48, 4)
    assert vars(fused) | {"block": None} == vars(
        stock_module.FusedMBConvConfig(4, 3, 2, 24, 48, 4, block=None)
    ) | {"block": None}


def test_squeeze_excitation_matches_stock_with_other_activations():
    stock = torchvision.ops.SqueezeExcitation(12, 5, nn.GELU, nn.Hardsigmoid)
    ours = SqueezeExcitation(12, 5, nn.GELU, nn.Hardsigmoid)
    ours.load_state_dict(stock.state_dict())
    assert_matches_module(ours, stock, torch.randn(3, 12, 5, 7))
    assert torch.allclose(ours(torch.ones(12, 4, 4)), stock(torch.ones(12, 4, 4)))


# Errors


BAD_CALLS = {
    "b0-unknown-keyword": ("efficientnet_b0", {"width_mult": 2.0}),
    "b0-last-channel": ("efficientnet_b0", {"last_channel": 8}),
    "b0-unknown-weights": ("efficientnet_b0", {"weights": "bogus"}),
    "b0-classes-with-weights": ("efficientnet_b0", {"weights": "DEFAULT", "num_classes": 3}),
    "b1-wrong-enum": (
        "efficientnet_b1", {"weights": torchvision.models.EfficientNet_B0_Weights.DEFAULT},
    ),
    "b5-norm": ("efficientnet_b5", {"norm_layer": nn.BatchNorm2d}),
    "b7-norm": ("efficientnet_b7", {"norm_layer": None}),
    "v2_s-norm": ("efficientnet_v2_s", {"norm_layer": nn.BatchNorm2d}),
    "v2_s-unknown-keyword": ("efficientnet_v2_s", {"width_mult": 2.0}),
    "v2_s-unknown-weights": ("efficientnet_v2_s", {"weights": "bogus"}),
    "v2_s-classes-with-weights": ("efficientnet_v2_s", {"weights": "DEFAULT", "num_classes": 3}),
    "v2_s-wrong-enum": (
        "efficientnet_v2_s", {"weights": torchvision.models.EfficientNet_V2_M_Weights.DEFAULT},
    ),
    "b0-dropout": ("efficientnet_b0", {"dropout": 1.5}),
}  # fmt: skip


@pytest.mark.parametrize(("name", "kwargs"), BAD_CALLS.values(), ids=BAD_CALLS.keys())
def test_wrong_arguments_raise_torchvisions_errors(name, kwargs):
    assert_same_error(get_builder(name), getattr(torchvision.models, name), **kwargs)


def test_norm_layer_of_the_large_networks_names_the_argument():
    with pytest.raises(TypeError, match="multiple values for keyword argument 'norm_layer'"):
        cvkernels.models.efficientnet_b6(norm_layer=nn.BatchNorm2d)


@pytest.mark.parametrize("setting", [[], ["conv"], iter([1])], ids=["empty", "strings", "iterator"])
def test_wrong_settings_raise_torchvisions_errors(setting):
    assert_same_error(
        cvkernels.models.EfficientNet,
        torchvision.models.EfficientNet,
        inverted_residual_setting=setting,
        dropout=0.1,
    )


def test_illegal_stride_is_refused():
    with pytest.raises(ValueError, match="illegal stride value"):
        MBConv(MBConvConfig(1, 3, 3, 8, 8, 1), 0.0, nn.BatchNorm2d)
