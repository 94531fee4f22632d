import copy
import itertools

import pytest
import torch
from torch import nn

import cvkernels
from cvkernels.nn import Bottleneck, FusedSequential
from tests.support.model_checks import (
    COPIES,
    assert_autocasts_like,
    assert_close,
    assert_follows_parameters,
    assert_same_gradients,
    assert_same_output,
    assert_trains_like,
)
from tests.support.numerics import assert_matches_module
from tests.support.pairs import calibrate, pair, seen
from tests.support.random_networks import check_frozen, check_patched

torchvision = pytest.importorskip("torchvision")
timm = pytest.importorskip("timm")
models = torchvision.models

# One of each kind of block. Stages of repeated blocks are short where the constructor lets them be.
NETWORKS = [
    *(f"torchvision/{name}" for name in (
        "googlenet", "resnet18", "resnext50_32x4d", "densenet121", "efficientnet_b0",
        "efficientnet_v2_s",
    )),
    *(f"timm/{name}" for name in (
        "resnet50", "resnet50d", "seresnet18", "seresnext50_32x4d", "legacy_seresnet18",
        "legacy_seresnet50", "legacy_seresnext50_32x4d", "densenet121", "efficientnet_b0",
        "efficientnetv2_rw_t",
    )),
]  # fmt: skip
SHORT = {
    name: {"layers": (2, 1, 1, 1)} for name in NETWORKS if name.startswith("timm/") and "50" in name
}


def build(name, **kwargs):
    library, _, network = name.partition("/")
    torch.manual_seed(0)
    if network == "googlenet":
        kwargs |= {"init_weights": False}
    return (models.get_model if library == "torchvision" else timm.create_model)(network, **kwargs)


def calibrated(name, **kwargs):
    """(patched, stock) of one state, with norms that have seen data.

    With all their classes: among few logits, the largest error is a matter of luck.
    """
    return patched_pair(build(name, **SHORT.get(name, {}), **kwargs))


def patched_pair(stock):
    return pair(calibrate(stock.eval(), seen(4), only_norms=True))


@pytest.fixture
def stock():
    return calibrated("torchvision/resnet18")[1]


@pytest.fixture
def patched(stock):
    model = copy.deepcopy(stock)
    cvkernels.patch(model)
    return model


@pytest.fixture
def x():
    return seen(2)


@pytest.mark.few(5)
@pytest.mark.parametrize("name", NETWORKS)
def test_patched_equals_stock_and_restored_is_stock(name):
    patched, stock = calibrated(name)
    assert list(patched.state_dict()) == list(stock.state_dict())
    assert patched.state_dict()._metadata == stock.state_dict()._metadata
    assert [n for n, _ in patched.named_modules()] == [n for n, _ in stock.named_modules()]
    assert repr(patched) == repr(stock)
    assert_matches_module(patched, stock, seen(2), grad=False)
    assert_same_gradients(patched, stock, seen(2))
    assert_autocasts_like(patched, stock, seen())
    rows = cvkernels.explain(patched, seen()).rows
    # timm's DenseNet has a norm behind its last block.
    assert sum("batch_norm" in row.op for row in rows) == (name == "timm/densenet121")
    assert sum(row.op == "conv_bn_act" for row in rows) >= 20
    assert cvkernels.restore(patched) is patched
    for ours, theirs in zip(patched.modules(), stock.modules(), strict=True):
        assert type(ours) is type(theirs) and set(ours.__dict__) == set(theirs.__dict__)
    with torch.no_grad():
        assert torch.equal(patched(seen(2)), stock(seen(2)))


# The blocks of these two train as the builders' in test_efficientnet and test_resnet.
TRAINED = [n for n in NETWORKS if not n.endswith(("efficientnet_v2_s", "vision/resnext50_32x4d"))]


@pytest.mark.few(5)
@pytest.mark.parametrize("name", TRAINED)
def test_patched_trains_like_stock(name):
    patched, stock = (model.train() for model in calibrated(name))
    assert_trains_like(patched, stock, seen(4))
    if name == "torchvision/googlenet":
        outputs = [model(seen(2)) for model in (patched, stock)]
        assert type(outputs[0]) is type(outputs[1]) and outputs[0]._fields == outputs[1]._fields


@pytest.mark.parametrize("name", ["torchvision/googlenet", "timm/densenet121", "timm/seresnet18"])
def test_patched_follows_its_parameters(name):
    assert_follows_parameters(*calibrated(name), seen(2))


def test_the_fused_ops_run(patched, x):
    rows = cvkernels.explain(patched, x).rows
    assert sum(row.op == "conv_bn_act" for row in rows) == 20
    assert not any(row.op == "aten.native_batch_norm" for row in rows)


def test_report_names_what_was_replaced_and_what_was_left(stock):
    model = nn.Sequential(nn.Conv2d(3, 3, 1), stock)
    report = cvkernels.patch(model)
    assert report.replaced[0] == ("1", "torchvision.models.resnet.ResNet", "ResNet")
    shortcut = ("1.layer2.0.downsample", "torch.nn.modules.container.Sequential", "FusedSequential")
    assert shortcut in report.replaced
    assert report.left == [("0", "torch.nn.Conv2d", "no block of cvkernels around it")]
    assert "16 module(s) replaced, 1 left" in str(report)


def test_patching_twice_changes_nothing_more(patched):
    classes = [type(module) for module in patched.modules()]
    assert not cvkernels.patch(patched).replaced
    assert [type(module) for module in patched.modules()] == classes


def test_it_is_per_instance(patched, stock):
    assert type(stock) is models.ResNet and type(stock.layer1[0]) is models.resnet.BasicBlock
    assert type(patched) is not type(stock)


def test_isinstance_and_names_keep_their_answers(patched, stock):
    assert isinstance(patched, models.ResNet) and isinstance(patched, cvkernels.models.ResNet)
    assert isinstance(patched.layer1[0], models.resnet.BasicBlock)
    assert isinstance(patched.layer2[0].downsample, FusedSequential)
    assert repr(patched) == repr(stock)


@pytest.mark.parametrize("how", COPIES)
def test_copies_are_patched_and_agree(how, patched, x):
    with torch.no_grad():
        expected, twin = patched(x), COPIES[how](patched)
        assert [type(m) for m in twin.modules()] == [type(m) for m in patched.modules()]
        assert torch.equal(twin(x), expected)
        assert torch.allclose(cvkernels.restore(twin)(x), expected, atol=1e-4)


def test_ema_copies_follow_updates(patched, stock, x):
    averages = [torch.optim.swa_utils.AveragedModel(model) for model in (patched, stock)]
    for average, model in zip(averages, (patched, stock), strict=True):
        with torch.no_grad():
            average.eval()(x)
            for parameter in model.parameters():
                parameter.mul_(1.1)
        average.update_parameters(model)
        average.update_parameters(model)
    assert_matches_module(averages[0].eval(), averages[1].eval(), x, grad=False)


def test_hooks_on_blocks_and_inner_modules_fire(patched, x):
    fired = []
    for layer in ("layer1.0", "layer1.0.conv1", "layer2.0.downsample", "maxpool", "bn1"):
        patched.get_submodule(layer).register_forward_hook(
            lambda module, args, out, layer=layer: fired.append(layer)
        )
    with torch.no_grad():
        patched(x)
    assert sorted(fired) == ["bn1", "layer1.0", "layer1.0.conv1", "layer2.0.downsample", "maxpool"]


@pytest.mark.few(20)
@pytest.mark.parametrize("training", [False, True], ids=["eval", "train"])
@pytest.mark.parametrize("which", ["all", "last"])
@pytest.mark.parametrize("name", [*NETWORKS, "timm/mnasnet_small"])
def test_hooks_see_what_they_see_in_stock_in_its_order(name, which, training):
    patched, stock = (m.double().train(training) for m in calibrated(name))
    x, found = torch.randn(2, 3, 64, 64, dtype=torch.float64), []
    for model in (patched, stock):
        maps: dict[str, list] = {}
        for path, module in model.named_modules():
            if which == "all" or path.endswith(("bn2", "bn3", "block.2.1", "block.3.1", "norm2")):
                # Kept as they are: the block may write to them in place, as stock's does.
                module.register_forward_hook(
                    lambda module, args, out, path=path, maps=maps: maps.setdefault(
                        path, []
                    ).append(out)
                )
        torch.manual_seed(0)
        model(x)
        found.append(maps)
    ours, theirs = found
    assert list(ours) == list(theirs)
    for path, outs in theirs.items():
        for mine, out in zip(ours[path], outs, strict=True):
            if isinstance(out, torch.Tensor):
                torch.testing.assert_close(mine, out, rtol=1e-9, atol=1e-9, msg=path)


def test_fx_feature_extraction_scripting_and_export(patched, stock, x):
    from torchvision.models.feature_extraction import create_feature_extractor

    with torch.no_grad():
        expected = stock(x)
        assert torch.allclose(torch.fx.symbolic_trace(patched)(x), expected, atol=1e-4)
        features = create_feature_extractor(patched, ["layer2.0.add", "layer4"])(x)
        assert features["layer4"].shape == (2, 512, 3, 3)
        assert torch.equal(torch.jit.script(patched)(x), expected)
        exported = torch.export.export(patched, (x,)).module()
        assert torch.allclose(exported(x), expected, atol=1e-4)
    assert isinstance(patched.layer1[0], cvkernels.nn.BasicBlock)


@pytest.mark.few(10)
@pytest.mark.parametrize("name", cvkernels.list_models())
def test_every_builder_of_ours_has_a_stock_model_that_plans_like_it(name):
    """On a GPU: as many kernels and bytes as the builder's, so nothing of ours was missed."""
    if name == "efficientnet":
        pytest.skip("the compound rule at any point has no stock builder")
    library = "torchvision" if hasattr(models, name) else "timm"
    kwargs = {"init_weights": False} if name == "googlenet" else {}
    totals = []
    with torch.device("meta"):
        patched = build(f"{library}/{name}").eval().bfloat16()
        cvkernels.patch(patched)
        for model in (patched, cvkernels.create_model(name, **kwargs).eval().bfloat16()):
            x = torch.empty(8, 3, 224, 224, dtype=torch.bfloat16)
            totals.append(cvkernels.explain(model, x).totals)
    assert totals[0] == totals[1]


def timm_efficientnet():
    from timm.models._efficientnet_builder import decode_arch_def

    stages = [["ds_r1_k3_s1_e1_c16_se0.25"], ["ir_r2_k5_s2_e6_c24_se0.25"]]
    return timm.models.EfficientNet(decode_arch_def(stages), act_layer=nn.SiLU)


# Of few blocks, with one of each kind.
MBCONV = models.efficientnet.MBConvConfig
FAMILIES = {
    "torchvision/googlenet": lambda: build("torchvision/googlenet"),
    "torchvision/densenet": lambda: models.DenseNet(8, (2, 2, 1, 1)),
    "torchvision/efficientnet": lambda: models.EfficientNet(
        [MBCONV(1, 3, 1, 32, 16, 1), MBCONV(6, 5, 2, 16, 24, 2)], 0.2
    ),
    "timm/densenet": lambda: timm.models.DenseNet(8, (2, 2, 1, 1)),
    "timm/efficientnet": timm_efficientnet,
    "timm/seresnet": lambda: build("timm/seresnet18", layers=(1, 1, 1, 1)),
    "timm/legacy_seresnet": lambda: build("timm/legacy_seresnet18", layers=(1, 1, 1, 1)),
}


@pytest.mark.few(2)
@pytest.mark.parametrize("stock", FAMILIES.values(), ids=FAMILIES.keys())
def test_every_family_copies_traces_exports_and_compiles(stock):
    patched, stock = patched_pair(stock())
    assert_same_gradients(patched, stock, seen(2))
    with torch.no_grad():
        twin = COPIES["pickle"](copy.deepcopy(patched))
        assert [type(m) for m in twin.modules()] == [type(m) for m in patched.modules()]
        for model in (
            twin,
            torch.fx.symbolic_trace(patched),
            torch.export.export(patched, (seen(),)).module(),
            torch.compile(patched, fullgraph=True, backend="aot_eager"),
        ):
            assert_same_output(model, stock, seen())


@pytest.mark.parametrize("training", [False, True], ids=["eval", "train"])
def test_memory_efficient_densenet(training):
    stock = models.DenseNet(8, (2, 2, 1, 1), memory_efficient=True)
    patched, stock = (model.train(training) for model in patched_pair(stock))
    assert_same_gradients(patched, stock, seen(4))


@pytest.mark.few(4)
@pytest.mark.parametrize("how", ["builder", "patched"])
@pytest.mark.parametrize("dilate", list(itertools.product([False, True], repeat=3)), ids=str)
def test_dilated_resnets(dilate, how):
    options = dict(layers=[2, 2, 2, 2], replace_stride_with_dilation=list(dilate), num_classes=50)
    stock = models.ResNet(models.resnet.Bottleneck, **options).eval()
    ours = cvkernels.models.ResNet(Bottleneck, **options).eval() if how == "builder" else None
    ours, stock = pair(calibrate(stock, seen(4), only_norms=True), ours)
    assert_same_output(ours, stock, seen())
    ours.avgpool, ours.fc = nn.Identity(), nn.Identity()
    assert ours(seen()).shape == (1, 2048 * (3 * 2 ** sum(dilate)) ** 2)


@pytest.mark.parametrize("name", ["timm/seresnet50", "timm/efficientnet_b0", "timm/densenet121"])
def test_timms_methods_stay(name):
    patched, stock = calibrated(name)
    for model in (patched, stock):
        model.reset_classifier(3)
        nn.init.ones_(model.get_classifier().weight)
        nn.init.zeros_(model.get_classifier().bias)
    with torch.no_grad():
        for method in ("forward_features", "forward"):
            actual, expected = (getattr(m, method)(seen()) for m in (patched, stock))
            assert_close(actual, expected, method, 1e-4 * expected.abs().max())
        ours, theirs = (m.forward_intermediates(seen()) for m in (patched, stock))
        for actual, expected in zip(ours[1], theirs[1], strict=True):
            assert_close(actual, expected, tolerance=1e-4 * expected.abs().max())
    patched.set_grad_checkpointing(), stock.set_grad_checkpointing()
    assert_same_gradients(patched.train(), stock.train(), seen(2))


def test_a_timm_backbone_patches():
    stock = build("timm/resnet18", features_only=True).eval()
    patched = copy.deepcopy(stock)
    cvkernels.patch(patched)
    with torch.no_grad():
        for actual, expected in zip(patched(seen()), stock(seen()), strict=True):
            assert_close(actual, expected)


def test_fully_sharded_wrapping(patched, stock, x):
    import torch.distributed as dist
    from torch.distributed.fsdp import fully_shard

    dist.init_process_group("gloo", store=dist.HashStore(), rank=0, world_size=1)
    try:
        mesh = dist.init_device_mesh("cpu", (1,))
        for layer in (patched.layer1, patched.layer2, patched):
            fully_shard(layer, mesh=mesh)
        with torch.no_grad():
            assert torch.allclose(patched(x), stock(x), atol=1e-4)
        patched.train()(x).sum().backward()
        assert all(p.grad is not None for p in patched.parameters())
    finally:
        dist.destroy_process_group()


def test_sync_batchnorm_conversion(patched, stock, x):
    patched, stock = map(nn.SyncBatchNorm.convert_sync_batchnorm, (patched, stock))
    with torch.no_grad():
        assert_close(patched(x), stock(x))


def test_blocks_inside_other_models_are_found():
    torch.manual_seed(0)
    model = models.segmentation.fcn_resnet50(weights=None, weights_backbone=None).eval()
    x = torch.randn(1, 3, 64, 64)
    with torch.no_grad():
        expected = model(x)["out"]
        cvkernels.patch(model)
        assert isinstance(model.backbone.layer3[1], Bottleneck)
        assert torch.allclose(model(x)["out"], expected, atol=1e-3)


def test_norms_that_are_not_batch_norm_run_as_modules():
    torch.manual_seed(0)
    model = models.resnet18(norm_layer=torchvision.ops.FrozenBatchNorm2d).eval()
    x = torch.randn(1, 3, 64, 64)
    with torch.no_grad():
        expected = model(x)
        cvkernels.patch(model)
        assert torch.allclose(model(x), expected, atol=1e-5)
    reasons = {row.reason for row in cvkernels.explain(model, x).rows}
    assert "FrozenBatchNorm2d is not exactly nn.BatchNorm2d" in reasons


def test_subclasses_and_replaced_forwards_are_left(stock):
    class Mine(models.resnet.BasicBlock):
        def forward(self, x):
            return x

    stock.layer1[0].__class__ = Mine
    stock.layer1[1].forward = lambda x: x
    reasons = {item.name: item.reason for item in cvkernels.patch(stock).left}
    assert reasons["layer1.0"] == "a subclass of BasicBlock may have a forward of its own"
    assert reasons["layer1.1"] == "its forward is replaced on the instance"
    assert type(stock.layer1[0]) is Mine


# Bad input


def test_nothing_of_ours_is_refused():
    model = nn.Sequential(nn.Linear(3, 4), nn.ReLU())
    with pytest.raises(ValueError, match="Sequential holds no block that cvkernels has"):
        cvkernels.patch(model)
    assert type(model) is nn.Sequential


def test_a_scripted_model_is_refused(stock):
    scripted = torch.jit.script(stock)
    with pytest.raises(TypeError, match="is scripted .*patch the model before scripting"):
        cvkernels.patch(scripted)


def test_a_quantised_model_is_refused():
    model = models.quantization.resnet18(quantize=False).eval()
    model.fuse_model()
    before = [type(module) for module in model.modules()]
    with pytest.raises(TypeError, match="ConvReLU2d at 'conv1' is quantised.*before quantising"):
        cvkernels.patch(model)
    assert [type(module) for module in model.modules()] == before


def test_restore_leaves_other_models_alone(stock):
    assert cvkernels.restore(stock) is stock


# Random networks


@pytest.mark.tens_of_networks(4)
def test_random_networks_of_blocks(tens):
    for seed in range(10 * tens, 10 * tens + 10):
        check_patched(seed)
        check_frozen(seed, patched=True)
