import functools
from collections import Counter

import pytest
import torch
from torch.utils._python_dispatch import TorchDispatchMode

import cvkernels
from cvkernels import record
from cvkernels.models import ResNet, resnet18
from cvkernels.nn import Bottleneck
from cvkernels.nn.sequential import FusedSequential

BATCH = 128


@functools.cache
def planned(name, on_meta=False):
    """The plan of a network in eval, in bfloat16 on a GPU."""
    kwargs = {"init_weights": False} if name == "googlenet" else {}
    with torch.device("meta" if on_meta else "cpu"):
        model = cvkernels.create_model(name, **kwargs).eval()
    x = torch.empty(BATCH, 3, 224, 224, dtype=torch.bfloat16, device="meta")
    return cvkernels.explain(model, x)


# With every epilogue fused and what is concatenated written in place: kernels, MB per image and
# fused convolutions. The squeeze of EfficientNet takes neither kernels nor bytes; SE-ResNet has
# scale, addition and ReLU in one pass. A live GoogLeNet on CUDA runs its 57 convolutions one by
# one: merged weights are derived ones, and not kept; one of few tiles splits its sums, and a kernel
# adds them.
FLOORS = {
    "resnet50": (56, 57.2, 53),
    "seresnet50": (120, 90.5, 53),
    "densenet121": (126, 47.7, 120),
    "googlenet": (73, 24.6, 57),
    "efficientnet_b0": (99, 32.4, 49),
}


@pytest.mark.parametrize(("name", "floor"), FLOORS.items(), ids=FLOORS.keys())
def test_plans_meet_the_fused_floor(name, floor):
    kernels, mb, convolutions = floor
    totals, ops = planned(name).totals, Counter(row.op for row in planned(name).rows)
    per_image = (totals["bytes_read"] + totals["bytes_written"]) / BATCH / 1e6
    assert totals["kernels"] <= kernels
    least = 0.9 if "resnet" in name else 0.8
    assert least * mb <= per_image <= 1.05 * mb
    assert ops["conv_bn_act"] + ops["depthwise_conv_bn_act"] == convolutions
    if name in ("densenet121", "googlenet"):
        assert set(ops) <= {"conv_bn_act", "max_pool", "avg_pool", "aten.addmm", "aten.mean"}
    assert not [op for op in ops if "norm" in op and "bn" not in op]


def test_squeezes_are_planned_into_few_kernels():
    squeezes = [row for row in planned("seresnet50").rows if row.op == "squeeze_excite"]
    # The two layers of 1024 channels and more are a launch each.
    assert [row.kernels for row in squeezes] == [3] * 7 + [4] * 9
    assert squeezes[0].layer == "layer1.0.se"
    rows = planned("efficientnet_b0").rows
    ops = [row.op for row in rows if row.layer.startswith("features.2.1")]
    assert ops == ["conv_bn_act", "depthwise_conv_bn_act", "excite", "conv_bn_act"]
    # The sums of a depthwise convolution that is cut into bands are added by a second kernel.
    depthwise = {row.kernels for row in rows if row.op == "depthwise_conv_bn_act"}
    assert depthwise <= {1, 2}
    twice = [r for r in rows if r.kernels != 1 and r.op != "depthwise_conv_bn_act"]
    assert [(row.op, row.kernels) for row in twice] == [("excite", 2)] * 4


def test_plan_needs_no_memory_and_no_run_on_a_meta_model():
    assert planned("resnet50", on_meta=True).totals == planned("resnet50").totals


def test_plan_names_a_kernel_for_every_convolution():
    convs = [row for row in planned("resnet50").rows if row.op == "conv_bn_act"]
    assert len(convs) == 53 and {row.backend for row in convs} <= {"triton", "cudnn"}
    assert [row.layer for row in convs][:3] == ["conv1", "layer1.0.conv1", "layer1.0.conv2"]
    assert all(row.reason and row.kernels == 1 for row in convs)


def test_plan_moves_the_bytes_of_its_tensors():
    row = next(row for row in planned("resnet50").rows if row.layer == "layer1.0.conv3")
    x, weight, residual = 128 * 64 * 56 * 56, 256 * 64, 128 * 256 * 56 * 56
    assert row.bytes_read == 2 * (x + weight + residual) + 4 * 4 * 256
    assert row.bytes_written == 2 * residual


def test_strided_pointwise_reads_only_the_pixels_it_needs():
    row = next(row for row in planned("resnet50").rows if row.layer == "layer2.0.downsample.0")
    assert row.bytes_read == 2 * (128 * 256 * 28 * 28 + 512 * 256) + 4 * 4 * 512


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


@pytest.mark.full
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
    # ResNet-50's stem, blocks and head; more stages would launch what these do.
    model = ResNet(Bottleneck, [2, 1, 1, 1], num_classes=10).eval()
    model.layer3 = model.layer4 = torch.nn.Identity()
    model.fc = torch.nn.Linear(512, 10)
    model.to(device, memory_format=torch.channels_last)
    x = torch.randn(1, 3, 32, 32, device=device)
    with cvkernels.backend.use("triton"), AtenLaunches(launches, lambda: depth[0] > 0) as aten:
        explained = cvkernels.explain(model, x)
    assert len(launches) >= 1 + 3 * 3 + 2
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
