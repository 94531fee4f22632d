import copy
import io
import pickle

import pytest
import torch
from numerics import assert_matches_module
from torch import nn

import cvkernels
from cvkernels.nn import Bottleneck, ConvBNAct

torchvision = pytest.importorskip("torchvision")
models = torchvision.models

STOCK = {
    "resnet18": lambda: models.resnet18(num_classes=10),
    "resnet50": lambda: models.resnet50(num_classes=10),
    "resnext50_32x4d": lambda: models.resnext50_32x4d(num_classes=10),
}


def stock_model(name, seed=0):
    torch.manual_seed(seed)
    model = STOCK[name]()
    for module in model.modules():
        if isinstance(module, nn.BatchNorm2d):
            nn.init.normal_(module.bias, 0, 0.1)
            module.running_var.uniform_(0.5, 1.5)
    return model


@pytest.fixture
def stock():
    return stock_model("resnet18").eval()


@pytest.fixture
def patched(stock):
    model = copy.deepcopy(stock)
    cvkernels.patch(model)
    return model


@pytest.fixture
def x():
    return torch.randn(2, 3, 64, 64)


@pytest.mark.parametrize("train", [False, True], ids=["eval", "train"])
@pytest.mark.parametrize("name", STOCK)
def test_patched_equals_stock_and_restored_is_stock(name, train, x):
    stock = stock_model(name).train(train)
    model = copy.deepcopy(stock)
    report = cvkernels.patch(model)
    assert report.replaced
    assert list(model.state_dict()) == list(stock.state_dict())
    assert model.state_dict()._metadata == stock.state_dict()._metadata
    assert [n for n, _ in model.named_modules()] == [n for n, _ in stock.named_modules()]
    assert_matches_module(model, stock, x)
    if not train:
        assert_matches_module(model, stock, x, grad=False)
    assert cvkernels.restore(model) is model
    for ours, theirs in zip(model.modules(), stock.modules(), strict=True):
        assert type(ours) is type(theirs) and set(ours.__dict__) == set(theirs.__dict__)
    model.load_state_dict(stock.state_dict())
    torch.manual_seed(3)
    expected = stock(x)
    torch.manual_seed(3)
    assert torch.equal(model(x), expected)


def test_the_fused_ops_run(patched, x):
    rows = cvkernels.explain(patched, x).rows
    assert sum(row.op == "conv_bn_act" for row in rows) == 20
    assert not any(row.op == "aten.native_batch_norm" for row in rows)


def test_report_names_what_was_replaced_and_what_was_left(stock):
    model = nn.Sequential(nn.Conv2d(3, 3, 1), stock)
    report = cvkernels.patch(model)
    assert report.replaced[0] == ("1", "torchvision.models.resnet.ResNet", "ResNet")
    assert ("1.layer2.0.downsample", "torch.nn.modules.container.Sequential", "ConvBNAct") in (
        report.replaced
    )
    assert report.left == [("0", "torch.nn.Conv2d", "no block of cvkernels around it")]
    assert "12 module(s) replaced, 1 left" in str(report)


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
    assert isinstance(patched.layer2[0].downsample, (nn.Sequential, ConvBNAct))
    assert repr(patched) == repr(stock)


@pytest.mark.parametrize("how", ["deepcopy", "pickle", "torch.save"])
def test_copies_are_patched_and_agree(how, patched, x):
    with torch.no_grad():
        expected = patched(x)
        if how == "deepcopy":
            twin = copy.deepcopy(patched)
        elif how == "pickle":
            twin = pickle.loads(pickle.dumps(patched))
        else:
            file = io.BytesIO()
            torch.save(patched, file)
            file.seek(0)
            twin = torch.load(file, weights_only=False)
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


def test_fx_feature_extraction_scripting_and_export(patched, stock, x):
    from torchvision.models.feature_extraction import create_feature_extractor

    with torch.no_grad():
        expected = stock(x)
        assert torch.allclose(torch.fx.symbolic_trace(patched)(x), expected, atol=1e-4)
        features = create_feature_extractor(patched, ["layer2.0.add", "layer4"])(x)
        assert features["layer4"].shape == (2, 512, 2, 2)
        assert torch.equal(torch.jit.script(patched)(x), expected)
        exported = torch.export.export(patched, (x,)).module()
        assert torch.allclose(exported(x), expected, atol=1e-4)
    assert isinstance(patched.layer1[0], cvkernels.nn.BasicBlock)


def test_sync_batchnorm_conversion(patched, stock, x):
    patched, stock = map(nn.SyncBatchNorm.convert_sync_batchnorm, (patched, stock))
    with torch.no_grad():
        assert torch.allclose(patched(x), stock(x), atol=1e-4)


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
        assert torch.equal(model(x), expected)
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
