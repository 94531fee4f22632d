"""freeze: the frozen model computes what the model does, refuses what it cannot, and is copied."""

import copy
import io
import subprocess
import sys
from concurrent.futures import ThreadPoolExecutor

import pytest
import torch
from torch import nn

import cvkernels
from cvkernels.freeze import plan, tune
from cvkernels.freeze.capture import CaptureError
from cvkernels.freeze.frozen import CAPACITY
from cvkernels.ops.conv_bn_act import native
from tests.support.model_checks import calibrated
from tests.support.numerics import assert_matches_module
from tests.support.pairs import image


@pytest.fixture(scope="module")
def resnet():
    return calibrated(cvkernels.models.resnet18, num_classes=10)


@pytest.fixture(scope="module")
def frozen(resnet):
    return cvkernels.freeze(resnet, image(2))


# Numbers


def test_other_batches_and_sizes_and_layouts(resnet, frozen):
    for x in (image(1), image(3), image(1, size=97), image(2, size=64)[:, :, ::2, 1:]):
        assert_matches_module(frozen, resnet, x, grad=False)
    nhwc = image(2).contiguous(memory_format=torch.channels_last)
    assert torch.equal(frozen(nhwc), frozen(nhwc.contiguous()))
    assert frozen(image(0)).shape == (0, 10)


def test_bfloat16(resnet):
    frozen = cvkernels.freeze(resnet, image(2), dtype=torch.bfloat16)
    x = image(2, dtype=torch.bfloat16)
    assert frozen(x).dtype == torch.bfloat16
    assert_matches_module(frozen, copy.deepcopy(resnet).bfloat16(), x, grad=False)
    assert cvkernels.verify(frozen).ok


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16], ids=str)
def test_images_in_float32_are_answered_in_float32(resnet, dtype, memory_format):
    frozen = cvkernels.freeze(resnet, image(2), dtype=dtype)
    x = image(2).contiguous(memory_format=memory_format)
    y = frozen(x)
    assert y.dtype == torch.float32 and torch.equal(y, frozen(x.to(dtype)).float())
    assert frozen(x[:0]).dtype == torch.float32 and frozen(x[:0]).shape == (0, y.shape[1])
    assert cvkernels.explain(frozen, x).totals["kernels"] > 0 and cvkernels.verify(frozen).ok
    for other in (torch.float64, torch.float16 if dtype == torch.bfloat16 else torch.bfloat16):
        with pytest.raises(TypeError, match=f"the input must be {dtype}, got {other}"):
            frozen(x.to(other))
    with pytest.raises(TypeError, match="the input must be torch.float32, got torch.bfloat16"):
        cvkernels.freeze(resnet, image(2))(x.bfloat16())


def test_structures_of_results_are_converted_too():
    class Several(nn.Module):
        def __init__(self):
            super().__init__()
            self.conv = nn.Conv2d(3, 8, 3)

        def forward(self, x):
            y = self.conv(x)
            return {"maps": [y, y.relu()], "size": y.shape[2]}

    frozen = cvkernels.freeze(Several().eval(), image(1, size=9), dtype=torch.bfloat16)
    found = frozen(image(1, size=9))
    assert [t.dtype for t in found["maps"]] == [torch.float32] * 2 and found["size"] == 7


@pytest.mark.skipif(not cvkernels.extension.has("cpu"), reason="the extension is missing")
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16], ids=str)
def test_all_steps_of_a_resnet_are_native(resnet, dtype):
    """The classifier, a 1x1 convolution of means, too."""
    if reason := native.left_to_onednn(dtype):
        pytest.skip(reason)
    plan = cvkernels.freeze(resnet, image(2), dtype=dtype).plan_for(image(2))
    others = [step.op.name for step, run in plan.steps if run and plan.backends[step] != "native"]
    assert others == ["flatten"]
    (classifier,) = [s for s, _ in plan.steps if s.layer == "fc" and s.op.name == "conv"]
    assert classifier.backend == "native"


def test_float64(resnet):
    # Folding rounds, so that the rule, of which float64 itself is the truth, cannot judge.
    frozen = cvkernels.freeze(resnet, image(2), dtype=torch.float64)
    x = image(2, dtype=torch.float64)
    expected = copy.deepcopy(resnet).double()(x)
    assert torch.allclose(frozen(x), expected, rtol=1e-12, atol=1e-12)


class Embedding(nn.Module):
    """A network inside a larger model, with a head that returns several tensors."""

    def __init__(self, backbone):
        super().__init__()
        self.backbone = backbone
        self.head = nn.Sequential(nn.Linear(10, 8), nn.LayerNorm(8), nn.Tanh())
        self.scale = nn.Parameter(torch.tensor(1.5))

    def forward(self, x, flag=False):
        logits = self.backbone(x * self.scale)
        assert not flag
        y = self.head(logits)
        return {"logits": logits, "parts": (y, y.view(y.size(0), 2, -1)), "size": x.shape[0]}


def test_a_model_that_embeds_a_network(resnet):
    model = Embedding(copy.deepcopy(resnet)).eval()
    x = image(2)
    frozen = cvkernels.freeze(model, x)
    got, expected = frozen(x), model(x)
    assert list(got) == list(expected) and got["size"] == 2
    assert isinstance(got["parts"], tuple)
    assert cvkernels.verify(frozen).ok
    for actual, wanted in zip(got["parts"], expected["parts"], strict=True):
        assert actual.shape == wanted.shape and torch.allclose(actual, wanted, atol=1e-4)


def test_a_bad_image_gives_no_plausible_logits(frozen):
    x = image(2)
    clean = frozen(x)
    x[1, 0, 3, 3] = float("nan")
    logits = frozen(x)
    assert logits[1].isnan().all() and torch.allclose(logits[0], clean[0])


# The model stays what it is


def test_later_changes_of_the_model_do_not_matter(device):
    model = calibrated(cvkernels.models.resnet18, num_classes=10).to(device)
    state = {key: value.clone() for key, value in model.state_dict().items()}
    x = image(2, device=device)
    frozen = cvkernels.freeze(model, x)
    assert all(torch.equal(value, state[key]) for key, value in model.state_dict().items())
    expected = frozen(x)
    with torch.no_grad():
        for tensor in (*model.parameters(), *model.buffers()):
            tensor.zero_()
    assert torch.equal(frozen(x), expected)
    with pytest.raises(ValueError, match="parameters of the model have changed"):
        cvkernels.verify(frozen)


def test_outputs_are_ordinary_tensors(frozen):
    x = image(2)
    with torch.inference_mode():
        inside = frozen(x[:1])
    outside = frozen(x[:1])
    assert not outside.is_inference() and torch.equal(inside, outside)
    assert not outside.requires_grad and outside.add_(1) is outside
    with torch.autocast("cpu", torch.bfloat16):
        assert torch.equal(frozen(x), frozen(x)) and frozen(x).dtype == torch.float32


# Copies


@pytest.mark.parametrize("how", ["deepcopy", "torch.save"])
def test_copies_compute_the_same(frozen, how):
    x = image(2)
    if how == "deepcopy":
        twin = copy.deepcopy(frozen)
    else:
        file = io.BytesIO()
        torch.save(frozen, file)
        file.seek(0)
        twin = torch.load(file, weights_only=False)
    assert torch.equal(twin(x), frozen(x)) and not twin.training
    with pytest.raises(ValueError, match="original=model"):
        cvkernels.verify(twin)


def test_a_file_of_plain_types_is_loaded_in_a_new_process(frozen, resnet, tmp_path):
    x = image(2)
    frozen.save(tmp_path / "frozen.pt")
    torch.save((x, frozen(x)), tmp_path / "expected.pt")
    code = (
        "import sys, torch, cvkernels\n"
        "frozen = cvkernels.load_frozen(sys.argv[1] + '/frozen.pt')\n"
        "x, expected = torch.load(sys.argv[1] + '/expected.pt')\n"
        "assert torch.equal(frozen(x), expected)\n"
    )
    subprocess.run([sys.executable, "-c", code, str(tmp_path)], check=True)
    twin = cvkernels.load_frozen(tmp_path / "frozen.pt")
    assert cvkernels.verify(twin, x, original=resnet).ok
    with pytest.raises(TypeError, match="give an example"):
        cvkernels.verify(twin, original=resnet)
    torch.save({"format": 0}, tmp_path / "other.pt")
    with pytest.raises(ValueError, match="no frozen model of this version"):
        cvkernels.load_frozen(tmp_path / "other.pt")


def test_what_no_plain_file_can_hold_is_refused(resnet, tmp_path):
    frozen = cvkernels.freeze(Embedding(resnet).eval(), image(1))
    with pytest.raises(ValueError, match=r"torch\.save\(frozen, path\)"):
        frozen.save(tmp_path / "frozen.pt")
    assert not list(tmp_path.iterdir())


# Calls


def test_threads_get_the_bits_of_one(frozen):
    images = [image(1 + number % 2) for number in range(4)]
    expected = [frozen(x) for x in images]

    def right(first):
        return all(
            torch.equal(frozen(images[which % 4]), expected[which % 4])
            for which in range(first, first + 60)
        )

    with ThreadPoolExecutor(4) as threads:
        assert all(threads.map(right, range(4)))


def test_nothing_grows(resnet):
    resource = pytest.importorskip("resource")
    head = nn.Sequential(resnet.conv1, resnet.bn1, resnet.relu, resnet.maxpool).eval()
    x = image(1, size=16)
    frozen = cvkernels.freeze(head, x)
    for _ in range(500):
        frozen(x)
    before = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
    for _ in range(10_000):
        frozen(x)
    assert resource.getrusage(resource.RUSAGE_SELF).ru_maxrss - before < 4096  # KiB
    for size in range(16, 16 + 2 * CAPACITY):
        frozen(image(1, size=size))
    assert len(frozen._plans) == len(frozen._used) == CAPACITY
    assert frozen.report().shape == (1, 3, size, size)


# Refusals


def test_wrong_inputs_are_refused(frozen, device):
    for x, kind, message in (
        (image()[0], ValueError, r"batch of one with x\[None\]"),
        (image()[:, :2], ValueError, r"shape \[N, 3, H, W\]"),
        (image(dtype=torch.float64), TypeError, r"freeze the model with dtype=torch.float64"),
        (image(device="meta"), ValueError, "freeze the model on meta"),
        (image().requires_grad_(), RuntimeError, r"x\.detach\(\)"),
        (image().numpy(), TypeError, "must be a tensor"),
    ):
        with pytest.raises(kind, match=message):
            frozen(x)
    with torch.no_grad():
        frozen(image().requires_grad_())
    googlenet = cvkernels.freeze(nn.Sequential(nn.Conv2d(3, 4, 5), nn.ReLU()).eval(), image())
    with pytest.raises(RuntimeError, match=r"layer '0' \(conv\) takes a larger map"):
        googlenet(image(size=4))


def test_training_moving_and_gradients_are_refused(frozen):
    with pytest.raises(RuntimeError, match="freeze that again"):
        frozen.train()
    with pytest.raises(RuntimeError, match="no gradients"):
        frozen.requires_grad_()
    with pytest.raises(RuntimeError, match="freeze that again"):
        frozen.double()
    assert frozen.eval() is frozen and frozen.float() is frozen
    assert not frozen.state_dict()


def test_wrong_models_and_examples_are_refused(resnet, frozen):
    class Deciding(nn.Module):
        def forward(self, x):
            return x if x.mean() > 0 else -x

    x = image()
    for arguments, kind, message in (
        ((Deciding().eval(), x), CaptureError, "Deciding.forward cannot be captured"),
        ((nn.Sequential(nn.Dropout()), x), ValueError, "the model is in training mode"),
        ((resnet, x[0]), ValueError, r"example\[None\]"),
        ((resnet, (x,)), TypeError, "wrap a model of several inputs"),
        ((resnet, x.to("meta")), ValueError, "that hold data"),
        ((resnet, x.long()), TypeError, "example must be float32"),
        ((frozen, x), TypeError, "frozen already"),
        ((resnet.forward, x), TypeError, "must be an nn.Module"),
        ((copy.deepcopy(resnet).to("meta"), x), ValueError, "on the model's device"),
    ):
        with pytest.raises(kind, match=message):
            cvkernels.freeze(*arguments)
    partly = copy.deepcopy(resnet)
    partly.layer2[0].bn1.train()
    with pytest.raises(ValueError, match=r"'layer2.0.bn1' is in training mode"):
        cvkernels.freeze(partly, x)
    with pytest.raises(TypeError, match="table must be"):
        cvkernels.freeze(resnet, x, table=3)


def test_out_of_memory_while_planning_leaves_the_model(resnet, monkeypatch):
    def full(nbytes, device):
        raise RuntimeError("DefaultCPUAllocator: can't allocate memory: you tried to allocate")

    expected = resnet(image(1, size=32).fill_(1))
    monkeypatch.setattr(plan, "new_arena", full)
    with pytest.raises(MemoryError, match="the model is unchanged"):
        cvkernels.freeze(resnet, image())
    assert torch.equal(resnet(image(1, size=32).fill_(1)), expected)


# Reports


def test_explain_and_report_agree(frozen):
    x = image(2).contiguous(memory_format=torch.channels_last)
    explanation, report = cvkernels.explain(frozen, x), frozen.report()
    assert explanation.totals["kernels"] == report.kernels
    assert {row.layer for row in explanation.rows} == {row.layer for row in report.rows}
    moved = explanation.totals["bytes_read"] + explanation.totals["bytes_written"]
    assert moved == report.bytes_moved
    assert 0 < report.arena_bytes <= report.live_bytes
    assert report.seconds_to_first_batch > 0 and "first batch after" in str(report)


def test_verify_finds_a_wrong_weight(resnet):
    frozen = cvkernels.freeze(resnet, image(2))
    assert cvkernels.verify(frozen).ok
    conv = next(node for node in frozen.graph.nodes if node.op.name == "conv")
    with torch.no_grad():
        conv.op.weight[0] += 1e-2
    assert not cvkernels.verify(copy.deepcopy(frozen), image(2), original=resnet).ok
    with pytest.raises(TypeError, match="original= is for a frozen model"):
        cvkernels.verify(resnet, image(2), original=resnet)


def test_a_tile_that_is_too_large_for_the_gpu_is_no_choice(monkeypatch):
    errors = pytest.importorskip("triton.runtime.errors")
    runner = tune._runner

    def refused():
        raise errors.OutOfResources(232448, 101376, "shared memory")

    def some(conv, problem, backend, device):
        run = runner(conv, problem, backend, device)
        return refused if backend.name == "onednn" else run

    monkeypatch.setattr(tune, "_runner", some)
    model = nn.Sequential(nn.Conv2d(24, 16, 1)).eval()
    choices = cvkernels.tune(model, torch.randn(2, 24, 9, 9))
    assert choices and all("onednn" not in seconds for seconds in choices.seconds.values())


def test_tuned_choices_are_kept_and_taken(tmp_path):
    model = nn.Sequential(nn.Conv2d(24, 16, 1), nn.ReLU(), nn.Conv2d(16, 8, 3)).eval()
    x = torch.randn(2, 24, 40, 40)
    choices = cvkernels.tune(model, x)
    names = {"onednn", "native", "native direct", "native F(2x2)", "native F(2x4)"}
    assert choices and set(choices.values()) <= names
    for shape, backend in choices.items():
        assert choices.seconds[shape][backend] == min(choices.seconds[shape].values())
    for backend in next(iter(choices.seconds.values())):
        choices[next(iter(choices))] = backend
        choices.save(tmp_path / "choices.json")
        frozen = cvkernels.freeze(model, x, table=tmp_path / "choices.json")
        assert frozen.report().rows[0].backend == backend
        assert cvkernels.verify(frozen).ok
