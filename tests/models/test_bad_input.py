"""Wrong arguments and images raise the stock library's exception in every family.

What only one family refuses is tried in its own file.
"""

import pytest
import torch
from torch import nn

import cvkernels
from tests.support.model_checks import assert_same_error, builders

torchvision = pytest.importorskip("torchvision")
timm = pytest.importorskip("timm")

BUILDERS = {
    "googlenet": torchvision.models.googlenet,
    "resnet50": torchvision.models.resnet50,
    "densenet121": torchvision.models.densenet121,
    "efficientnet_b0": torchvision.models.efficientnet_b0,
    "efficientnet_v2_s": torchvision.models.efficientnet_v2_s,
    "seresnet50": lambda **kwargs: timm.create_model("seresnet50", **kwargs),
    "legacy_seresnet50": lambda **kwargs: timm.create_model("legacy_seresnet50", **kwargs),
}
OF_TORCHVISION = [name for name in BUILDERS if "seres" not in name]


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
        expected = raised(BUILDERS[name], num_classes=num_classes)
        actual = raised(getattr(cvkernels.models, name), num_classes=num_classes)
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


# Images


IMAGES = {
    "one-pixel": torch.zeros(1, 3, 1, 1),
    "seven-pixels": torch.zeros(1, 3, 7, 7),
    "sixteen-pixels": torch.zeros(1, 3, 16, 16),
    "no-rows": torch.zeros(1, 3, 0, 64),
    "one-channel": torch.zeros(1, 1, 64, 64),
    "no-batch": torch.zeros(3, 64, 64),
    "two-dimensions": torch.zeros(64, 64),
    "five-dimensions": torch.zeros(1, 1, 3, 64, 64),
    "float64": torch.zeros(1, 3, 64, 64, dtype=torch.float64),
    "uint8": torch.zeros(1, 3, 64, 64, dtype=torch.uint8),
    "no-tensor": [[0.0]],
}


@pytest.fixture(scope="module", params=BUILDERS)
def models(request):
    """(ours, stock) of one family."""
    kwargs = dict(init_weights=False, aux_logits=False) if request.param == "googlenet" else {}
    builders = getattr(cvkernels.models, request.param), BUILDERS[request.param]
    return [builder(**kwargs) for builder in builders]


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
    else:
        assert ours(x).shape == expected.shape
