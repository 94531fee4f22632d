"""Images that get a channel of zeros, as on a GPU; the rest of the plans runs on the CPU."""

import pytest
import torch
from torch import nn

import cvkernels
from cvkernels.freeze import frozen as freezing
from cvkernels.freeze.ops import Conv, Input
from tests.support.numerics import assert_close_as_eager


@pytest.fixture(autouse=True)
def padded(monkeypatch):
    """The graphs are those of a GPU."""
    monkeypatch.setattr(freezing, "is_gpu", lambda device: True)


class Stem(nn.Module):
    """A convolution of images, whose other readers are told by ``kind``."""

    def __init__(self, kind="", channels=3, kernel=3, stride=2, padding=1, dilation=1):
        super().__init__()
        groups = 3 if kind == "grouped" else 1
        self.conv = nn.Conv2d(channels, 6, kernel, stride, padding, dilation, groups)
        self.again = nn.Conv2d(channels, 6, 1, stride)
        self.kind = kind

    def forward(self, x):
        y = self.conv(x)
        if self.kind == "two":
            return y + self.again(x)
        if self.kind == "mean":
            return y, x.mean((2, 3))
        return (y, x) if self.kind == "returned" else y


def stem_of(frozen):
    node = next(node for node in frozen.graph.nodes if isinstance(node.op, Conv))
    return frozen.graph.nodes[0].op, node.op.weight


def check(model, x, padded):
    frozen = cvkernels.freeze(model, x)
    image, weight = stem_of(frozen)
    assert image.channels == (4 if padded else None)
    if padded:
        assert weight.shape[1] == image.channels * (1 + image.in_pairs)
        assert weight.is_contiguous(memory_format=torch.channels_last)
    with torch.no_grad():
        eager, exact = model(x), model.double()(x.double())
    for images in (x, x.contiguous(memory_format=torch.channels_last)):
        made, *rest = frozen(images) if isinstance(eager, tuple) else (frozen(images),)
        first = eager[0] if isinstance(eager, tuple) else eager
        assert_close_as_eager(made, first, exact[0] if isinstance(exact, tuple) else exact)
        assert not rest or torch.allclose(rest[0], eager[1])


@pytest.mark.parametrize("kind", ["", "two"])
def test_convolutions_read_images_of_four_channels(kind):
    check(Stem(kind).eval(), torch.randn(2, 3, 17, 19), True)


STEMS = {
    "resnet": (dict(kernel=7, stride=2, padding=3), (8, 7, 4)),
    "efficientnet": (dict(kernel=3, stride=2, padding=1), (8, 3, 2)),
    "even": (dict(kernel=4, stride=2, padding=(0, 1)), (8, 4, 2)),
    "cifar": (dict(kernel=3, stride=1, padding=1), (4, 3, 3)),
    "rows": (dict(kernel=(5, 3), stride=(1, 2), padding=(2, 0)), (8, 5, 2)),
    "columns": (dict(kernel=3, stride=(2, 1), padding=(0, 2)), (4, 3, 3)),
    "dilated": (dict(kernel=3, stride=2, padding=2, dilation=2), (4, 3, 3)),
    "no border": (dict(kernel=2, stride=2, padding=0), (4, 2, 2)),
    "patches": (dict(kernel=4, stride=4, padding=0), (4, 4, 4)),
}


@pytest.mark.parametrize("size", [(17, 19), (18, 22), (7, 8)], ids=str)
@pytest.mark.parametrize(("options", "filters"), STEMS.values(), ids=STEMS)
def test_a_border_is_the_padding(options, filters, size):
    model, x = Stem(**options).eval(), torch.randn(2, 3, *size)
    check(model, x, True)
    frozen = cvkernels.freeze(model.float(), x)
    _, weight = stem_of(frozen)
    assert weight.shape[1:] == filters
    node = next(node for node in frozen.graph.nodes if isinstance(node.op, Conv))
    assert tuple(node.op.padding) == (0, 0)


@pytest.mark.parametrize("kind", ["mean", "returned", "grouped"])
def test_images_that_something_else_reads_stay(kind):
    check(Stem(kind).eval(), torch.randn(2, 3, 17, 19), False)


def test_images_of_other_channels_stay():
    check(Stem(channels=5).eval(), torch.randn(2, 5, 17, 19), False)


@pytest.mark.parametrize("transform_input", [False, True])
def test_googlenet_transforms_padded_images(transform_input):
    model = cvkernels.models.googlenet(
        num_classes=7, transform_input=transform_input, init_weights=False
    )
    check(model.eval(), torch.randn(2, 3, 64, 64), True)


def test_a_plan_takes_images_that_are_staged():
    model, x = Stem().eval(), torch.randn(2, 3, 17, 19)
    plan = cvkernels.freeze(model, x).plan_for(x)
    staged = plan.staged(x)
    assert staged.shape == (2, 8, 19, 11) and plan.staged(staged) is staged
    assert torch.equal(plan.images(staged), x)
    assert staged.count_nonzero() == x.count_nonzero()
    assert torch.equal(plan(x), plan(staged))


def test_files_keep_the_channel(tmp_path):
    model, x = Stem().eval(), torch.randn(2, 3, 17, 19)
    frozen = cvkernels.freeze(model, x)
    frozen.save(tmp_path / "stem.pt")
    loaded = cvkernels.load_frozen(tmp_path / "stem.pt")
    assert isinstance(loaded.graph.nodes[0].op, Input) and stem_of(loaded)[0].channels == 4
    assert torch.equal(loaded(x), frozen(x))
