import pytest
import torch
from torch.utils._python_dispatch import TorchDispatchMode

import cvkernels
from cvkernels import record
from cvkernels.models import ResNet, densenet121, googlenet, resnet18, resnet50, seresnet50
from cvkernels.nn import Bottleneck
from cvkernels.nn.sequential import FusedSequential

# MB per image in bf16 at batch 128 and kernels of ResNet-50 with every epilogue fused, in eval.
FUSED_KERNELS, FUSED_MB = 56, 57.2
# The same of SE-ResNet-50, with scale, addition and ReLU in one pass.
SE_FUSED_KERNELS, SE_FUSED_MB = 120, 90.5


@pytest.fixture(scope="module")
def planned():
    model = resnet50().eval()
    return cvkernels.explain(
        model, torch.empty(128, 3, 224, 224, dtype=torch.bfloat16, device="meta")
    )


def test_resnet50_plan_meets_the_fused_floor(planned):
    totals = planned.totals
    per_image = (totals["bytes_read"] + totals["bytes_written"]) / 128 / 1e6
    assert totals["kernels"] <= FUSED_KERNELS
    assert 0.9 * FUSED_MB <= per_image <= 1.05 * FUSED_MB


def test_seresnet50_plan_meets_the_fused_floor():
    example = torch.empty(128, 3, 224, 224, dtype=torch.bfloat16, device="meta")
    plan = cvkernels.explain(seresnet50().eval(), example)
    per_image = (plan.totals["bytes_read"] + plan.totals["bytes_written"]) / 128 / 1e6
    assert plan.totals["kernels"] <= SE_FUSED_KERNELS
    assert 0.9 * SE_FUSED_MB <= per_image <= 1.05 * SE_FUSED_MB
    blocks = [row for row in plan.rows if row.op == "squeeze_excite"]
    # On layer4's maps one program makes an image.
    assert [row.kernels for row in blocks] == [3] * 13 + [1] * 3
    assert blocks[0].layer == "layer1.0.se"


# Likewise, with what is concatenated written in place: MB per image, kernels, convolutions.
# A live GoogLeNet on CUDA runs its 57 one by one: merged weights are derived ones, and not kept.
CONCATENATING = {
    "densenet121": (densenet121, 47.7, 126, 120),
    "googlenet": (lambda: googlenet(init_weights=False), 24.6, 72, 57),
}


@pytest.mark.parametrize(
    ("build", "mb", "kernels", "convolutions"), CONCATENATING.values(), ids=CONCATENATING.keys()
)
def test_concatenating_networks_copy_nothing(build, mb, kernels, convolutions):
    example = torch.empty(128, 3, 224, 224, dtype=torch.bfloat16, device="meta")
    plan = cvkernels.explain(build().eval(), example)
    per_image = (plan.totals["bytes_read"] + plan.totals["bytes_written"]) / 128 / 1e6
    assert plan.totals["kernels"] <= kernels
    assert 0.8 * mb <= per_image <= 1.05 * mb
    ops = [row.op for row in plan.rows]
    assert ops.count("conv_bn_act") == convolutions
    assert set(ops) <= {"conv_bn_act", "max_pool", "avg_pool", "aten.addmm", "aten.mean"}


def test_plan_names_a_kernel_for_every_convolution(planned):
    convs = [row for row in planned.rows if row.op == "conv_bn_act"]
    assert len(convs) == 53 and {row.backend for row in convs} <= {"triton", "cudnn"}
    assert [row.layer for row in convs][:3] == ["conv1", "layer1.0.conv1", "layer1.0.conv2"]
    assert all(row.reason and row.kernels == 1 for row in convs)


def test_plan_moves_the_bytes_of_its_tensors(planned):
    row = next(row for row in planned.rows if row.layer == "layer1.0.conv3")
    x, weight, residual = 128 * 64 * 56 * 56, 256 * 64, 128 * 256 * 56 * 56
    assert row.bytes_read == 2 * (x + weight + residual) + 4 * 4 * 256
    assert row.bytes_written == 2 * residual


def test_strided_pointwise_reads_only_the_pixels_it_needs(planned):
    row = next(row for row in planned.rows if row.layer == "layer2.0.downsample.0")
    assert row.bytes_read == 2 * (128 * 256 * 28 * 28 + 512 * 256) + 4 * 4 * 512


def test_plan_needs_no_memory_and_no_run_on_a_meta_model():
    with torch.device("meta"):
        model = resnet50().eval()
    plan = cvkernels.explain(
        model, torch.empty(128, 3, 224, 224, dtype=torch.bfloat16, device="meta")
    )
    assert plan.totals["kernels"] <= FUSED_KERNELS


class AtenLaunches(TorchDispatchMode):
    """Counts calls that compute without Triton: no allocation, no view of an argument."""

    def __init__(self, launches, launching):
        super().__init__()
        self.count, self.launches, self.launching = 0, launches, launching

    @property
    def recorder(self):
        """The running explain's: any other mode would make the blocks call their modules."""
        return record.active()

    def __torch_dispatch__(self, func, types, args=(), kwargs=None):
        before = len(self.launches)
        out = func(*args, **(kwargs or {}))
        by_triton = self.launching() or len(self.launches) > before
        first = out[0] if isinstance(out, (tuple, list)) else out
        allocation = "empty" in func.__name__ or "as_strided" in func.__name__
        view = isinstance(first, torch.Tensor) and any(
            isinstance(a, torch.Tensor)
            and a.untyped_storage()._cdata == first.untyped_storage()._cdata
            for a in args
        )
        if not (allocation or view or by_triton):
            self.count += 1
        return out


def test_launches_equal_those_that_run(monkeypatch):
    """Independent counts, by Triton's own launcher and the dispatcher, while the forward runs."""
    from triton.runtime import interpreter, jit

    launches, depth = [], [0]

    def count_calls(cls, method):
        original = getattr(cls, method)

        def launch(self, *args, **kwargs):
            launches.append(self)
            depth[0] += 1
            try:
                return original(self, *args, **kwargs)
            finally:
                depth[0] -= 1

        monkeypatch.setattr(cls, method, launch)

    count_calls(interpreter.GridExecutor, "__call__")
    count_calls(jit.JITFunction, "run")
    device = "cuda" if torch.cuda.is_available() else "cpu"
    # Weights that need no copy into the kernel's layout, which would happen once, before launches.
    # ResNet-50's stem, blocks and head; more blocks of a kind would launch what these do.
    model = ResNet(Bottleneck, [2, 1, 1, 1], num_classes=10).eval()
    model.to(device, memory_format=torch.channels_last)
    x = torch.randn(1, 3, 32, 32, device=device)
    with cvkernels.backend.use("triton"), AtenLaunches(launches, lambda: depth[0] > 0) as aten:
        explained = cvkernels.explain(model, x)
    assert len(launches) >= 1 + 5 * 3 + 4
    assert explained.totals["kernels"] == len(launches) + aten.count


def test_fallbacks_carry_their_reason():
    model = resnet18().eval()
    model.layer2[0].bn1.train()
    rows = [
        r
        for r in cvkernels.explain(model, torch.randn(1, 3, 32, 32)).rows
        if r.layer.startswith("layer2.0.")
    ]
    reasons = {row.reason for row in rows if row.backend == "reference"}
    assert reasons == {"batch norm normalises with batch statistics"}


def test_training_mode_is_explained_and_changes_nothing():
    model = resnet18().train()
    before = {key: value.clone() for key, value in model.state_dict().items()}
    explained = cvkernels.explain(model, torch.randn(2, 3, 32, 32))
    assert all(torch.equal(value, before[key]) for key, value in model.state_dict().items())
    assert any(row.op == "aten.native_batch_norm" for row in explained.rows)


def test_prints_as_a_table_with_its_totals():
    explained = cvkernels.explain(resnet18().eval(), torch.randn(1, 3, 32, 32))
    lines = str(explained).splitlines()
    assert lines[0].split()[:4] == ["layer", "op", "backend", "kernels"]
    assert lines[-1].startswith("total") and str(explained.totals["kernels"]) in lines[-1]
    assert len(lines) == len(explained.rows) + 3


def test_a_failed_run_leaves_no_hook_behind():
    from torch.nn.modules import module

    with pytest.raises(ValueError, match="x must have shape"):
        cvkernels.explain(resnet18().eval(), torch.randn(1, 3, 2))
    assert not module._global_forward_pre_hooks and cvkernels.record.active() is None


def test_example_without_a_tensor_is_refused():
    with pytest.raises(TypeError, match="example must be a tensor or a tuple, got list"):
        cvkernels.explain(resnet18(), [])


def test_a_prologue_that_no_kernel_has_leaves_the_rest_fused():
    """The native convolution takes a norm along, and has no groups: oneDNN's runs behind it."""
    norm, conv = torch.nn.BatchNorm2d(16), torch.nn.Conv2d(16, 16, 3, padding=1, groups=4)
    layers = FusedSequential(norm, torch.nn.ReLU(), conv, torch.nn.BatchNorm2d(16)).eval()
    rows = cvkernels.explain(layers, torch.randn(1, 16, 8, 8)).rows
    assert [row.op for row in rows if row.backend == "onednn"] == ["conv_bn_act"]
    assert {row.layer for row in rows if row.backend == "reference"} == {"0", "1"}
