"""Wrong arguments and images raise the stock library's exception in every family, or say more."""

import functools

import pytest
import torch
from torch import nn

import cvkernels
from cvkernels.models.timm_builder import REFUSED
from tests.support.model_checks import assert_same_error, builders, twins

torchvision = pytest.importorskip("torchvision")
pytest.importorskip("timm")

OF_TORCHVISION = ["googlenet", "resnet50", "densenet121", "efficientnet_b0", "efficientnet_v2_s"]
BUILDERS = [*OF_TORCHVISION, "seresnet50", "legacy_seresnet50"]


def raised(function, *args, **kwargs):
    with pytest.raises(Exception) as caught:  # noqa: PT011, B017 - whatever stock raises
        function(*args, **kwargs)
    return caught.value


WRONG_CLASSES = [
    *((name, "10") for name in BUILDERS),
    *((name, -1) for name in OF_TORCHVISION),  # to timm, less than one class is none
]


@pytest.mark.parametrize(("name", "num_classes"), WRONG_CLASSES)
@pytest.mark.filterwarnings("ignore:The default weight initialization:FutureWarning")
def test_wrong_classes(name, num_classes):
    with torch.device("meta"):
        actual, expected = (raised(builder, num_classes=num_classes) for builder in builders(name))
    assert isinstance(actual, type(expected)), repr(actual)


@pytest.mark.parametrize("name", OF_TORCHVISION)
def test_weights_of_no_kind_are_refused_before_any_download(name):
    with pytest.raises(TypeError, match="Invalid Weight class provided; .* received int"):
        getattr(cvkernels.models, name)(weights=3)


ENUMS = torchvision.models
OTHERS = dict(weights="bogus"), dict(unknown_keyword=3)
BAD_CALLS = {
    "googlenet": [
        *OTHERS,
        dict(weights="IMAGENET1K_V1", aux_logits=False),
        dict(weights="IMAGENET1K_V1", init_weights=True),
        dict(weights="IMAGENET1K_V1", num_classes=10),
        dict(weights=ENUMS.ResNet18_Weights.DEFAULT),
        dict(blocks=[nn.Conv2d, nn.Conv2d], init_weights=False),
    ],
    "resnet50": [
        *OTHERS,
        dict(replace_stride_with_dilation=[True]),
        dict(weights=ENUMS.ResNet18_Weights.DEFAULT),
        dict(weights="IMAGENET1K_V2", num_classes=10),
    ],
    "resnext50_32x4d": [dict(width_per_group=16)],
    "wide_resnet50_2": [dict(width_per_group=16)],
    "densenet121": [
        *OTHERS,
        dict(growth_rate=16),
        dict(block_config=(1, 1, 1, 1)),
        dict(weights="IMAGENET1K_V1", num_classes=10),
        dict(weights=ENUMS.ResNet18_Weights.DEFAULT),
    ],
    "efficientnet_b0": [
        *OTHERS,
        dict(last_channel=8),
        dict(weights="DEFAULT", num_classes=3),
        dict(dropout=1.5),
    ],
    "efficientnet_b1": [dict(weights=ENUMS.EfficientNet_B0_Weights.DEFAULT)],
    "efficientnet_b5": [dict(norm_layer=nn.BatchNorm2d)],
    "efficientnet_b7": [dict(norm_layer=None)],
    "efficientnet_v2_s": [
        *OTHERS,
        dict(norm_layer=nn.BatchNorm2d),
        dict(weights="DEFAULT", num_classes=3),
        dict(weights=ENUMS.EfficientNet_V2_M_Weights.DEFAULT),
    ],
}


@pytest.mark.parametrize(
    ("name", "kwargs"),
    [(name, kwargs) for name, calls in BAD_CALLS.items() for kwargs in calls],
    ids=lambda value: value if isinstance(value, str) else "-".join(value),
)
@pytest.mark.filterwarnings("ignore:The default weight initialization:FutureWarning")
def test_wrong_arguments_raise_torchvisions_errors(name, kwargs):
    assert_same_error(*builders(name), **kwargs)


# What the builders say, by the builder and the arguments
SAID = {
    "resnet18": [
        (dict(groups=2), ValueError, "BasicBlock"),
        (dict(replace_stride_with_dilation=[True, False, False]), NotImplementedError, "ilation"),
    ],
    "efficientnet_b6": [
        (dict(norm_layer=nn.BatchNorm2d), TypeError, "multiple values for keyword .*'norm_layer'"),
    ],
    "efficientnet": [
        (dict(width=0), ValueError, "width must be a positive factor"),
        (dict(depth=-1.0), ValueError, "depth must be a positive factor"),
        (dict(width=float("nan")), ValueError, "width must be a positive factor"),
        (dict(resolution=0), ValueError, "resolution must be a positive integer"),
        (dict(resolution=224.0), ValueError, "resolution must be a positive integer"),
    ],
    "seresnet18": [
        (dict(output_stride=4), ValueError, "output_stride must be 8, 16 or 32"),
        (dict(global_pool="fast"), ValueError, "global_pool must be 'avg'"),
        (dict(act_layer="bogus"), ValueError, "act_layer must be one of relu"),
        (dict(stem_type="wide"), ValueError, "stem_type must be"),
        (dict(cardinality=2), ValueError, "SEBottleneck supports both"),
        *(
            ({keyword: True}, TypeError, rf"seresnet18\(\) does not support {keyword}=: \w+")
            for keyword in REFUSED
        ),
    ],
    "seresnet50": [(dict(depth=3), TypeError, "unexpected keyword argument 'depth'")],
    "legacy_seresnet18": [(dict(act_layer=nn.SiLU), TypeError, "argument 'act_layer'")],
    "resnet17": [({}, ValueError, "Unknown model resnet17; did you mean .*resnet18")],
    "legacy_seresnet51": [({}, ValueError, "did you mean .*legacy_seresnet50")],
}  # fmt: skip


@pytest.mark.parametrize(
    ("name", "kwargs", "error", "message"),
    [(name, *call) for name, calls in SAID.items() for call in calls],
    ids=lambda value: "-".join(f"{k}={v}" for k, v in value.items()) if isinstance(value, dict)
    else getattr(value, "__name__", None),
)  # fmt: skip
def test_refusals_say_why(name, kwargs, error, message):
    builder = getattr(cvkernels.models, name, functools.partial(cvkernels.create_model, name))
    with pytest.raises(error, match=message):
        builder(**kwargs)


# Images


def rand(*shape, dtype=torch.float32):
    return torch.rand(shape, generator=torch.Generator().manual_seed(1)).to(dtype)


IMAGES = {
    "one-pixel": rand(1, 3, 1, 1),
    "seven-pixels": rand(1, 3, 7, 7),
    "sixteen-pixels": rand(1, 3, 16, 16),
    "one-row": rand(1, 3, 1, 64),
    "no-rows": rand(1, 3, 0, 64),
    "no-images": rand(0, 3, 64, 64),
    "one-channel": rand(1, 1, 64, 64),
    "no-batch": rand(3, 64, 64),
    "two-dimensions": rand(64, 64),
    "five-dimensions": rand(1, 1, 3, 64, 64),
    "float64": rand(1, 3, 64, 64, dtype=torch.float64),
    "uint8": rand(1, 3, 64, 64, dtype=torch.uint8),
    "no-tensor": [[0.0]],
}


@pytest.fixture(scope="module", params=BUILDERS)
def models(request):
    """(ours, stock) of one family."""
    kwargs = dict(init_weights=False, aux_logits=False) if request.param == "googlenet" else {}
    return twins(request.param, **kwargs)


@pytest.mark.parametrize("training", [False, True], ids=["eval", "train"])
@pytest.mark.parametrize("x", IMAGES.values(), ids=IMAGES.keys())
@torch.no_grad()
def test_wrong_images(models, x, training):
    """Where stock refuses an image, so do we, in a way that ``except`` cannot tell apart."""
    ours, stock = (model.train(training) for model in models)
    try:
        expected = stock(x)
    except Exception as error:
        assert isinstance(raised(ours, x), type(error))
        return
    actual = ours(x)
    assert actual.shape == expected.shape
    if not training:
        assert torch.allclose(actual, expected, rtol=1e-3, atol=1e-3)
