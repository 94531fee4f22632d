"""freeze in int8: calibrated, guarded, saved, and refused where it cannot be."""

import copy
import warnings
from concurrent.futures import ThreadPoolExecutor

import pytest
import torch
from torch import nn

import cvkernels
from cvkernels import extension
from cvkernels.freeze import quantise
from cvkernels.freeze.quantise.calibration import BINS, Observed
from cvkernels.freeze.quantise.guard import decibels
from tests.support.model_checks import calibrated
from tests.support.pairs import image, seen
from tests.support.surroundings import other_defaults

NETWORKS = ("googlenet", "resnet18", "densenet121", "seresnet50", "efficientnet_b0")
ALL = float("-inf")


@pytest.fixture(autouse=True)
def few_images_are_enough(monkeypatch):
    monkeypatch.setattr(quantise, "ENOUGH", 1)


def model_of(name):
    options = {"init_weights": False} if name == "googlenet" else {}
    return calibrated(getattr(cvkernels.models, name), num_classes=10, **options)


def in_int8(model, images, tolerance=ALL):
    return cvkernels.freeze(
        model, images[:1], dtype=torch.int8, calibration=images, tolerance=tolerance
    )


@pytest.fixture(scope="module")
def images():
    return seen(4)


@pytest.fixture(scope="module")
def resnet():
    return model_of("resnet18")


def ops_of(frozen):
    return [node.op.name for node in frozen.graph.nodes]


@pytest.mark.parametrize("name", NETWORKS)
def test_networks_compute_in_bytes(name, images):
    model = model_of(name)
    frozen = in_int8(model, images)
    names = ops_of(frozen)
    assert "conv" not in names
    # The logits alone, and where a mean stands before the classifier, become numbers again.
    assert names.count("quantise") <= 2
    assert names.count("dequantise") <= 1
    with torch.no_grad():
        exact = copy.deepcopy(model).double()(images.double())
    # A deep untrained network amplifies what its first layers round; a wrong scale leaves none.
    assert decibels([frozen(images)], [exact]) > 5
    assert frozen.quantised.images == len(images)


@pytest.mark.parametrize("name", NETWORKS)
def test_the_guard_keeps_its_limit(name, images):
    model = model_of(name)
    frozen = in_int8(model, images, 30.0)
    assert frozen.quantised.decibels >= 30.0
    with torch.no_grad():
        exact = copy.deepcopy(model).double()(images.double())
    assert decibels([frozen(images)], [exact]) > 29.9
    kept = [row for row in frozen.report().rows if "alone in int8" in row.note]
    assert len(kept) == sum(node.op.name == "conv" for node in frozen.graph.nodes)


def test_the_guard_says_what_each_layer_costs(resnet, images):
    frozen = in_int8(resnet, images, 45.0)
    assert frozen.quantised.decibels >= 45.0
    explained = str(cvkernels.explain(frozen, images[:1]))
    assert "float32: alone in int8 it leaves the outputs" in explained
    assert all(name == "conv" for name in ops_of(in_int8(resnet, images, 1e9)) if "conv" in name)


def test_all_layouts_sizes_and_calls_agree(resnet, images):
    frozen = in_int8(resnet, images)
    expected = frozen(images)
    for x in (images.contiguous(memory_format=torch.channels_last), images.mT.contiguous().mT):
        assert torch.equal(frozen(x), expected)
    for part in (slice(1), slice(1, 3)):
        assert torch.equal(frozen(images[part]), expected[part])
    smaller = image(2, size=48)
    with torch.no_grad():
        exact = resnet(smaller)
    assert decibels([frozen(smaller)], [exact]) > 10


def test_threads_share_a_frozen_model(resnet, images):
    frozen = in_int8(resnet, images)
    expected = frozen(images[:2])
    with ThreadPoolExecutor(4) as pool:
        results = pool.map(frozen, [images[:2]] * 40)
        assert all(torch.equal(result, expected) for result in results)


@pytest.mark.parametrize("name", NETWORKS)
def test_processors_with_fused_multiply_adds_give_equal_bits(name, images):
    frozen = in_int8(model_of(name), images)
    expected = frozen(images)
    for instructions in set(extension.instruction_sets()) - {"baseline"}:
        with extension.limited_to(instructions):
            assert torch.equal(frozen(images), expected)


@pytest.mark.parametrize("name", ["resnet18", "efficientnet_b0", "densenet121"])
def test_a_saved_model_is_the_same(name, images, tmp_path):
    frozen = in_int8(model_of(name), images)
    frozen.save(tmp_path / "model.pt")
    loaded = cvkernels.load_frozen(tmp_path / "model.pt")
    assert torch.equal(loaded(images), frozen(images))
    assert loaded.quantised == frozen.quantised
    assert f"{len(images)} images" in repr(loaded)


def test_a_file_has_a_quarter_of_the_bytes(tmp_path):
    model = calibrated(cvkernels.models.resnet50)
    x = image(1)
    for kind in (torch.int8, torch.float32):
        options = {"calibration": x, "tolerance": ALL} if kind == torch.int8 else {}
        cvkernels.freeze(model, x, dtype=kind, **options).save(tmp_path / str(kind))
    sizes = [(tmp_path / str(kind)).stat().st_size for kind in (torch.int8, torch.float32)]
    assert sizes[0] <= 0.27 * sizes[1]


def test_without_the_compiled_ops_it_computes_the_same(resnet, images, monkeypatch):
    expected = in_int8(resnet, images)(images)
    monkeypatch.setattr(extension, "has", lambda half: False)
    frozen = in_int8(resnet, images)
    assert "reference" in {row.backend for row in frozen.report().rows}
    assert decibels([frozen(images)], [expected]) > 25


class Odd(nn.Module):
    """What quantising has to leave in float32, and layers of zeros and of constants."""

    def __init__(self):
        super().__init__()
        self.stem = nn.Conv2d(3, 16, 3, padding=1)
        self.grouped = nn.Conv2d(16, 16, 3, padding=1, groups=4)
        self.dilated = nn.Conv2d(16, 16, 3, padding=2, dilation=2, groups=16)
        self.zeros = nn.Conv2d(16, 16, 1)
        self.last = nn.Conv2d(16, 4, 3, padding=1)
        nn.init.zeros_(self.zeros.weight)
        nn.init.constant_(self.zeros.bias, 0.5)

    def forward(self, x):
        y = self.stem(x).relu()
        y = self.dilated(self.grouped(y)).sigmoid() * y
        return self.last(y + self.zeros(y)).mean((2, 3))


def test_layers_that_cannot_be_quantised_stay_and_are_listed(images):
    torch.manual_seed(0)
    model = Odd().eval()
    frozen = in_int8(model, images)
    notes = {row.layer: row.note for row in frozen.report().rows if row.op != "dequantise"}
    assert "groups" in notes["grouped"]
    assert "depthwise" in notes["dilated"]
    assert ops_of(frozen).count("conv_int8") == 3
    with torch.no_grad():
        assert decibels([frozen(images)], [model(images)]) > 25


def test_images_with_nan_give_nan(resnet, images):
    frozen = in_int8(resnet, images)
    bad = images.clone()
    bad[1, 0, 3, 4] = float("nan")
    bad[2, 1, 3, 4] = float("inf")
    out = frozen(bad)
    assert out[1:3].isnan().all()
    assert torch.equal(out[3:], frozen(images)[3:])


def test_calibration_takes_batches_and_pairs_with_labels(resnet, images):
    expected = in_int8(resnet, images)(images)
    for batches in (
        [images[:3], images[3:]], [(images, torch.zeros(4))], (part for part in images.split(2)),
        torch.utils.data.DataLoader(torch.utils.data.TensorDataset(images, torch.zeros(4)), 4),
    ):  # fmt: skip
        frozen = cvkernels.freeze(
            resnet, images[:1], dtype=torch.int8, calibration=batches, tolerance=ALL
        )
        assert torch.equal(frozen(images), expected)


def test_what_is_no_calibration_is_refused(resnet, images):
    def freeze(calibration, example=images[:1], **options):
        return cvkernels.freeze(
            resnet, example, dtype=torch.int8, calibration=calibration, **options
        )

    with pytest.raises(ValueError, match="needs calibration="):
        freeze(None)
    for empty in ([], images[:0], iter(())):
        with pytest.raises(ValueError, match="holds no images"):
            freeze(empty)
    with pytest.raises(
        ValueError, match=r"the example's size, \[3, .*got a batch \[4, 3, 20, 20\]"
    ):
        freeze(image(4, size=20))
    with pytest.raises(ValueError, match="the example's size"):
        freeze(images[0])
    bad = images.clone()
    bad[2, 0, 0, 0] = float("inf")
    with pytest.raises(ValueError, match=r"NaN or infinity, in its images \[2\]"):
        freeze(bad)
    for wrong in (images.byte(), [images.byte()], [3], ["cat"]):
        with pytest.raises(TypeError, match="floating tensor"):
            freeze(wrong)
    with pytest.raises(TypeError, match="iterable of batches, got int"):
        freeze(3)
    with pytest.raises(ValueError, match="number of decibels"):
        freeze(images, tolerance=float("nan"))
    with pytest.raises(ValueError, match=r"is for dtype=torch\.int8"):
        cvkernels.freeze(resnet, images[:1], calibration=images)


def test_poor_calibration_is_warned_of(resnet, images, monkeypatch):
    monkeypatch.setattr(quantise, "ENOUGH", 64)
    with pytest.warns(UserWarning, match="all 4 calibration images are used, which are few"):
        in_int8(resnet, images)
    monkeypatch.setattr(quantise, "ENOUGH", 1)
    with pytest.warns(UserWarning, match="all calibration images are equal"):
        frozen = in_int8(resnet, images[:1].repeat(3, 1, 1, 1))
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        blank = in_int8(resnet, torch.zeros(1, *images.shape[1:]))
    for model in (frozen, blank):
        assert model(images).isfinite().all()


def test_defaults_of_pytorch_do_not_matter(images):
    model = model_of("densenet121")
    expected = in_int8(model, images)(images)
    with other_defaults():
        assert torch.equal(in_int8(model, images)(images), expected)


def test_ranges_cut_off_what_is_rare():
    torch.manual_seed(0)
    observed = Observed()
    values = torch.randn(100_000).pow(3).relu()
    observed.widen(values)
    observed.count(values)
    low, high = observed.range()
    assert low == 0
    assert observed.counts.sum() == len(values)
    assert len(observed.counts) == BINS

    def error(high):
        scale = high / 255
        return ((values / scale).round().clamp(0, 255) * scale - values).square().mean().item()

    largest = values.max().item()
    assert error(high) < 1.03 * min(error(largest * n / 200) for n in range(2, 201))
    assert high < largest


def test_decibels():
    exact = [torch.tensor([3.0, 4.0])]
    assert decibels([torch.tensor([3.0, 4.5])], exact) == pytest.approx(20.0)
    assert decibels(exact, exact) == float("inf")
    assert decibels([torch.ones(1)], [torch.zeros(1)]) == float("-inf")


def test_verify_tells_agreement_beside_that_of_float32(resnet, images):
    frozen = in_int8(resnet, images, 25.0)
    found = cvkernels.verify(frozen, images)
    with torch.no_grad():
        exact = copy.deepcopy(resnet).double()(images.double())
    assert found.ok
    assert found.agreement.decibels == pytest.approx(decibels([frozen(images)], [exact]))
    assert found.agreement.decibels >= 25.0
    assert found.stock.decibels > 100
    assert found.agreement.top1 <= found.agreement.top5 <= 1 == found.stock.top1
    assert "frozen to keep 25.0 dB: ok" in str(found)
