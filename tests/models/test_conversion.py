"""Checkpoints of one library's network in another's: exact, or refused."""

import pytest
import torch
from torch import nn

import cvkernels
from cvkernels.models import convert_checkpoint
from cvkernels.models.checkpoint_names import BUILDERS, LOOKALIKES, Network, timm_efficientnet_key
from cvkernels.models.registry import get_builder
from tests.support.pairs import calibrate

torchvision = pytest.importorskip("torchvision")
timm = pytest.importorskip("timm")

SHARED = [name for name in BUILDERS["torchvision"] if name in BUILDERS["timm"]]
LIBRARIES = ("torchvision", "timm")
# Small enough for two copies in float64; the others differ in width and depth alone.
RUN = [
    *("resnet18", "resnet34", "resnet50", "resnext50_32x4d", "densenet121", "densenet169"),
    *(f"efficientnet_b{i}" for i in range(5)),
]
CADENE = BUILDERS["cadene"]


def stock(network, **kwargs):
    """The network as its own library builds it."""
    if network.library == "timm":
        return timm.create_model(network.name, **kwargs)
    return torchvision.models.get_model(network.name, **kwargs)


def on_meta(network, **kwargs):
    with torch.device("meta"):
        return stock(network, **kwargs)


def layers(model):
    """What no state dict shows: strides and paddings, eps and momentum, the pools; in order."""
    rows = []
    for module in model.modules():
        if isinstance(module, nn.Conv2d):
            same = "Same" in type(module).__name__
            rows.append(
                (module.kernel_size, module.stride, module.padding, module.dilation, same)
                + (module.groups, module.padding_mode, module.bias is not None)
            )
        elif isinstance(module, nn.BatchNorm2d):
            rows.append((module.eps, module.momentum, module.track_running_stats))
        elif isinstance(module, nn.MaxPool2d | nn.AvgPool2d):
            rows.append((module.kernel_size, module.stride, module.padding, module.ceil_mode))
    return rows


def shapes(state):
    return {key: value.shape for key, value in state.items()}


# What converts


@pytest.mark.parametrize(
    ("source", "target"), [LIBRARIES, LIBRARIES[::-1]], ids=["to-timm", "to-torchvision"]
)
@pytest.mark.parametrize("name", SHARED)
def test_keys_order_and_shapes_are_the_targets(name, source, target):
    state = on_meta(Network(source, name), num_classes=7).state_dict()
    expected = on_meta(Network(target, name), num_classes=7).state_dict()
    converted = convert_checkpoint(state, f"{source}/{name}", f"{target}/{name}")
    assert list(converted) == list(expected)
    assert shapes(converted) == shapes(expected)


@pytest.mark.parametrize("name", SHARED)
def test_layers_are_the_same_in_both_libraries(name):
    """A release of timm or torchvision that changes one of them must not convert silently."""
    ours, theirs = (on_meta(Network(library, name)) for library in LIBRARIES)
    assert layers(ours) == layers(theirs)


@pytest.mark.parametrize("name", RUN)
def test_outputs_are_the_same(name):
    torch.manual_seed(0)
    trained, twin = (stock(Network(library, name), num_classes=7) for library in LIBRARIES)
    calibrate(trained)
    state = trained.state_dict()
    there = convert_checkpoint(state, f"torchvision/{name}", f"timm/{name}")
    back = convert_checkpoint(there, f"timm/{name}", f"torchvision/{name}")
    assert all(back[key] is value for key, value in state.items())
    twin.load_state_dict(there)
    assert_same_output(twin, trained)


def assert_same_output(model, expected):
    """In float64, where only rounding may differ."""
    x = torch.randn(2, 3, 64, 64, dtype=torch.float64)
    with torch.no_grad():
        actual, expected = (each.double().eval()(x) for each in (model, expected))
    assert (actual - expected).abs().max() <= 1e-10 * expected.abs().max()


def test_a_timm_checkpoint_runs_in_our_network(tmp_path):
    trained = timm.create_model("efficientnet_b0", num_classes=7)
    calibrate(trained)
    torch.save({"state_dict": trained.state_dict()}, tmp_path / "timm.pth")
    state = convert_checkpoint(
        tmp_path / "timm.pth", "timm/efficientnet_b0.ra_in1k", "torchvision/efficientnet_b0"
    )
    model = cvkernels.models.efficientnet_b0(weights=state, num_classes=7)
    assert_same_output(model, trained)


@pytest.mark.parametrize(("name", "legacy"), CADENE.items(), ids=CADENE)
def test_cadenes_names_are_timms_legacy_ones(name, legacy):
    state = on_meta(Network("timm", legacy), num_classes=7).state_dict()
    there = convert_checkpoint(state, f"timm/{legacy}", f"cadene/{name}")
    back = convert_checkpoint(there, f"cadene/{name}", f"timm/{legacy}")
    assert list(there) == list(back) == list(state)
    assert name in ("senet154", legacy.replace("legacy_seres", "se_res"))


@pytest.mark.parametrize(
    ("name", "renamed"),
    [("efficientnet_b0", timm_efficientnet_key), ("resnet18", str)],
    ids=["other-names", "identical-names"],
)
def test_tensors_are_shared_and_the_state_stays(name, renamed):
    state = stock(Network("torchvision", name)).state_dict()
    before = list(state), state._metadata
    converted = convert_checkpoint(state, f"torchvision/{name}", f"timm/{name}")
    assert (list(state), state._metadata) == before
    assert converted is not state and not hasattr(converted, "_metadata")
    assert all(converted[renamed(key)] is value for key, value in state.items())


def old_densenet_key(key):
    return key.replace("norm1", "norm.1").replace("conv2", "conv.2")


@pytest.mark.parametrize(
    ("source", "target", "old"),
    [
        ("timm/efficientnet_b0", "torchvision/efficientnet_b0", str),
        ("torchvision/densenet121", "timm/densenet121", old_densenet_key),
    ],
    ids=["efficientnet", "old-densenet-keys"],
)
def test_norms_that_count_no_batches_convert(source, target, old):
    state = stock(Network(*source.split("/"))).state_dict()
    state = {k: v for k, v in state.items() if not k.endswith("num_batches_tracked")}
    renamed = {old(key): value for key, value in state.items()}
    converted = convert_checkpoint(renamed, source, target)
    assert len(converted) == len(state)
    assert old is str or list(converted) == list(state)
    stock(Network(*target.split("/"))).load_state_dict(converted)


def test_neither_library_is_needed(monkeypatch):
    import sys

    state = cvkernels.models.efficientnet_b0().state_dict()
    for module in ("timm", "torchvision", "torchvision.models"):
        monkeypatch.setitem(sys.modules, module, None)
    convert_checkpoint(state, "torchvision/efficientnet_b0", "timm/efficientnet_b0")


def test_every_builder_has_its_networks():
    names = set(cvkernels.list_models()) - {"googlenet"}
    of_torchvision = {name for name in names if hasattr(get_builder(name), "weights_enum")}
    assert set(BUILDERS["torchvision"].values()) == of_torchvision
    assert set(BUILDERS["timm"].values()) >= names - of_torchvision
    assert set(CADENE.values()) <= names
    assert all(timm.is_model(name) for name in (*BUILDERS["timm"], *LOOKALIKES))


# What is refused


SENETS = [name for name in BUILDERS["timm"] if f"legacy_{name}" in BUILDERS["timm"]]
LOOKALIKE_PAIRS = [
    *((f"timm/{name}", f"torchvision/{twin}") for name, twin in LOOKALIKES.items()),
    *((f"timm/legacy_{name}", f"timm/{name}") for name in SENETS),
    ("timm/tf_efficientnet_b0", "timm/efficientnet_b0"),
]


@pytest.mark.parametrize(("source", "target"), LOOKALIKE_PAIRS)
def test_lookalikes_are_refused_and_differ(source, target):
    for one, other in ((source, target), (target, source)):
        with pytest.raises(ValueError, match=f"{one} cannot become {other}: they are different"):
            convert_checkpoint({}, one, other)
    models = [on_meta(Network(*name.split("/"))) for name in (source, target)]
    assert layers(models[0]) != layers(models[1])


@pytest.mark.parametrize(
    ("source", "target", "reason"),
    [
        ("timm/legacy_seresnet50", "timm/seresnet50", "strides in conv1, not in conv2"),
        ("cadene/se_resnet50", "timm/seresnet50", "pools without padding and the legacy block"),
        ("timm/seresnet18", "timm/legacy_seresnet18", "ReLU before the squeeze .*C // 16"),
        ("timm/senet154", "cadene/senet154", "pools without padding; .*models.senet154"),
        ("timm/efficientnet_b5", "torchvision/efficientnet_b5", "eps 1e-5, torchvision's 1e-3"),
        ("torchvision/efficientnet_b7", "timm/efficientnet_b7", "eps .*models.efficientnet_b7"),
        ("timm/efficientnetv2_s", "torchvision/efficientnet_v2_s", "eps 1e-5"),
        ("timm/tf_efficientnet_b0", "torchvision/efficientnet_b0", "\"SAME\".*timm.create_model"),
        ("timm/tf_efficientnetv2_m", "torchvision/efficientnet_v2_m", '"SAME"'),
        ("timm/resnet50", "torchvision/resnet101", "different architectures"),
        ("timm/resnet50", "torchvision/efficientnet_v2_s", "different architectures"),
        ("timm/tf_efficientnet_b0", "timm/tf_efficientnet_b0", "load as they are"),
        ("torchvision/googlenet", "timm/googlenet", "timm has none"),
        ("torchvision/resnet50", "timm/resnet51", "did you mean timm/resnet50"),
        ("torchvision/seresnet50", "timm/seresnet50", "no conversion knows torchvision/seresnet50"),
        ("resnet50", "timm/resnet50", "named as 'torchvision/NAME'.*got 'resnet50'"),
        ("timm/resnet50", "keras/resnet50", "got 'keras/resnet50'"),
    ],
)  # fmt: skip
def test_refusals_name_the_reason(source, target, reason):
    with pytest.raises(ValueError, match=f"^convert_checkpoint: .*{reason}"):
        convert_checkpoint({}, source, target)


def test_renamed_legacy_weights_compute_something_else():
    """Why the legacy family is refused: renamed, its weights load strictly."""
    torch.manual_seed(0)
    legacy = timm.create_model("legacy_seresnet50", num_classes=7)
    calibrate(legacy)
    renamed = {
        key.replace("layer0.", "").replace("se_module", "se").replace("last_linear", "fc"): value
        for key, value in legacy.state_dict().items()
    }
    new = timm.create_model("seresnet50", num_classes=7)
    new.load_state_dict(renamed)
    x = torch.randn(2, 3, 64, 64)
    with torch.no_grad():
        expected = legacy.eval()(x)
        assert (new.eval()(x) - expected).abs().max() > 0.01 * expected.abs().max()


@pytest.mark.parametrize("change", ["missing", "unexpected", "shape", "value"])
def test_a_state_that_is_not_the_sources_names_the_keys(change):
    state = timm.create_model("efficientnet_b0").state_dict()
    if change == "missing":
        del state["blocks.1.0.conv_pwl.weight"]
    elif change == "unexpected":
        state["extra.weight"] = torch.zeros(1)
    else:
        state["conv_stem.weight"] = torch.zeros(32, 1, 3, 3) if change == "shape" else 3
    message = {
        "missing": r"1 missing key\(s\): blocks.1.0.conv_pwl.weight",
        "unexpected": r"1 unexpected key\(s\): extra.weight",
        "shape": r"conv_stem.weight has shape \[32, 1, 3, 3\], timm/efficientnet_b0's has",
        "value": "conv_stem.weight is a int, timm/efficientnet_b0's has",
    }[change]
    with pytest.raises(RuntimeError, match=f"of timm/efficientnet_b0; nothing is(.|\n)*{message}"):
        convert_checkpoint(state, "timm/efficientnet_b0", "torchvision/efficientnet_b0")


def test_a_source_taken_for_the_target_is_told():
    state = timm.create_model("efficientnet_b0").state_dict()
    with pytest.raises(RuntimeError, match="timm's names; .*'timm/efficientnet_b0'"):
        convert_checkpoint(state, "torchvision/efficientnet_b0", "timm/efficientnet_b0")


# What the builders say


@pytest.mark.parametrize(
    ("builder", "given", "message"),
    [
        ("efficientnet_b0", "efficientnet_b0",
         r"convert_checkpoint\(state, 'timm/efficientnet_b0', 'torchvision/efficientnet_b0'\)"),
        ("efficientnet_b5", "efficientnet_b5", "timm/efficientnet_b5 cannot become .*eps 1e-5"),
        ("efficientnet_v2_s", "efficientnetv2_s", "timm/efficientnetv2_s cannot become .*eps 1e-5"),
        ("seresnet50", "legacy_seresnet50",
         "different networks .*conv1, not in conv2.*Load them into .*models.legacy_seresnet50"),
        ("legacy_seresnet18", "seresnet18",
         "different networks .*ReLU before the squeeze.*Load them into .*models.seresnet18"),
        ("legacy_senet154", "senet154", "Load them into cvkernels.models.senet154"),
    ],
)  # fmt: skip
def test_builders_name_the_way_out_for_another_librarys_checkpoint(builder, given, message):
    state = on_meta(Network("timm", given)).state_dict()
    with pytest.raises(RuntimeError, match=f"unexpected key(.|\n)*{message}"):
        with torch.device("meta"):
            cvkernels.create_model(builder, weights=state)


@pytest.mark.parametrize(
    ("builder", "given", "message"),
    [
        ("efficientnet_b0", "efficientnet_b0", r"convert_checkpoint\(state, 'timm/NAME', "),
        ("seresnet18", "legacy_seresnet18", "Load them into cvkernels.models.legacy_NAME"),
    ],
)
def test_load_checkpoint_names_the_way_out(builder, given, message):
    with torch.device("meta"):
        model = cvkernels.create_model(builder)
    with pytest.raises(RuntimeError, match=message):
        cvkernels.models.load_checkpoint(model, on_meta(Network("timm", given)).state_dict())
