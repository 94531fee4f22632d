"""Builders with random arguments build what stock builds, or raise what stock raises."""

import math
from functools import partial

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import nn

import cvkernels
from tests.support.model_checks import builders

torchvision = pytest.importorskip("torchvision")
pytest.importorskip("timm")

pytestmark = pytest.mark.filterwarnings("ignore::FutureWarning", "ignore::UserWarning")

CLASSES = (0, 1, 7, 1000, -1, 2.5, "10", None, True)
RATES = (0.0, 0.2, 1.0, 1.5, -0.1, "0.2", None)
NORMS = (None, nn.BatchNorm2d, partial(nn.BatchNorm2d, eps=1e-3), nn.InstanceNorm2d, nn.Identity, 3)
WHATEVER = (None, 0, 1, -1, 2.5, "x", (), True)
RESNET = {
    "num_classes": CLASSES, "zero_init_residual": (True, False, 1), "groups": (1, 2, 32, 3, 0),
    "width_per_group": (4, 64, 32, 0, 2.5), "norm_layer": NORMS,
    "replace_stride_with_dilation": (None, [False, False, True], [True] * 3, [True], "x", 3),
    "unknown": WHATEVER,
}  # fmt: skip
DENSENET = {
    "num_classes": CLASSES, "bn_size": (1, 2, 4, 0, 2.5), "drop_rate": RATES,
    "memory_efficient": (True, False, None), "growth_rate": (32, 16), "num_init_features": (64, 8),
    "unknown": WHATEVER,
}  # fmt: skip
GOOGLENET = {
    "num_classes": CLASSES, "aux_logits": (True, False), "transform_input": (True, False),
    "dropout": RATES, "dropout_aux": RATES, "blocks": (None, [], 3), "unknown": WHATEVER,
}  # fmt: skip
EFFICIENTNET = {
    "num_classes": CLASSES, "dropout": RATES, "stochastic_depth_prob": RATES, "norm_layer": NORMS,
    "last_channel": (None, 64), "unknown": WHATEVER,
}  # fmt: skip
TIMM = {
    "num_classes": CLASSES, "in_chans": (1, 3, 4, 0, "3", None), "drop_rate": RATES,
    "drop_path_rate": (0.0, 0.2, None), "global_pool": ("avg", "max", "avgmax", "", "fast", None),
    "output_stride": (8, 16, 32, 4, None), "act_layer": ("relu", "silu", nn.SiLU, "bogus", None),
    "stem_type": ("", "deep", "wide"), "zero_init_last": (True, False), "unknown": WHATEVER,
    "cardinality": (1, 2, 32), "base_width": (4, 64), "exportable": (True, None),
}  # fmt: skip
LEGACY = {
    "num_classes": CLASSES, "in_chans": (1, 3, 4, 0, None), "drop_rate": RATES,
    "global_pool": ("avg", "max", "", None), "unknown": WHATEVER,
}  # fmt: skip
# Small networks of each family: the others differ in width and depth alone.
OPTIONS = {
    "resnet18": RESNET, "resnet50": RESNET, "resnext50_32x4d": RESNET, "wide_resnet50_2": RESNET,
    "densenet121": DENSENET, "googlenet": GOOGLENET, "efficientnet_b0": EFFICIENTNET,
    "efficientnet_b5": EFFICIENTNET, "efficientnet_v2_s": EFFICIENTNET, "seresnet18": TIMM,
    "seresnet50": TIMM, "seresnext50_32x4d": TIMM, "legacy_seresnet18": LEGACY,
    "legacy_seresnext50_32x4d": LEGACY, "legacy_senet154": LEGACY,
}  # fmt: skip


def built(builder, arguments):
    """The network, or the error, on the meta device: no memory, no initial values."""
    with torch.device("meta"):
        try:
            return builder(**arguments)
        except Exception as error:  # noqa: BLE001 - stock may raise anything
            return error


def shape_of(model: nn.Module) -> dict:
    return {key: (value.shape, value.dtype) for key, value in model.state_dict().items()}


@st.composite
def arguments_of(draw, name):
    chosen = draw(st.lists(st.sampled_from(list(OPTIONS[name])), max_size=3, unique=True))
    found = {key: draw(st.sampled_from(OPTIONS[name][key])) for key in chosen}
    return found | ({"init_weights": False} if name == "googlenet" else {})


@pytest.mark.few(8)
@pytest.mark.parametrize("name", OPTIONS)
@settings(max_examples=max(1, settings().max_examples // 6))  # a network takes longer than a call
@given(data=st.data())
def test_random_arguments(name, data):
    arguments = data.draw(arguments_of(name), label="arguments")
    ours, stock = (built(builder, arguments) for builder in builders(name))
    says_why = isinstance(ours, (TypeError, ValueError)) and any(k in str(ours) for k in arguments)
    if says_why and OPTIONS[name] in (TIMM, LEGACY):  # which refuse more than timm does
        return
    if isinstance(stock, Exception):
        assert isinstance(ours, type(stock)), f"{ours!r}, and stock raises {stock!r}"
        return
    if isinstance(ours, Exception):
        raise ours
    assert list(ours.state_dict()) == list(stock.state_dict())
    assert shape_of(ours) == shape_of(stock)
    rates = [[m.p for m in net.modules() if isinstance(m, nn.Dropout)] for net in (ours, stock)]
    assert rates[0] == rates[1]


NUMBERS = st.one_of(
    st.floats(0.05, 1.5), st.sampled_from((0, -1.0, math.inf, math.nan, "1", None, 1, True))
)
RESOLUTIONS = st.sampled_from((32, 224, 1, 0, -1, 224.0, "224", None))


@given(width=NUMBERS, depth=NUMBERS, resolution=RESOLUTIONS)
def test_any_point_of_the_compound_rule(width, depth, resolution):
    made = built(
        partial(cvkernels.models.efficientnet, num_classes=3),
        {"width": width, "depth": depth, "resolution": resolution},
    )

    def positive(value):
        return isinstance(value, (int, float)) and 0 < value < math.inf

    valid = type(resolution) is int and resolution > 0
    if not (positive(width) and positive(depth) and valid):
        assert isinstance(made, (ValueError, TypeError)), made
        assert str(made).startswith("efficientnet: "), made
        return
    assert made.resolution == resolution
    stages = [stage for stage in made.features[1:-1]]
    assert [len(stage) for stage in stages] == [
        math.ceil(depth * count) for count in (1, 2, 2, 3, 3, 4, 1)
    ]
    x = torch.empty(2, 3, 64, 64, device="meta")
    assert made.eval()(x).shape == (2, 3)
