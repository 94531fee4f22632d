"""PyTorch's counter of operations counts fused ops, alone and in frozen networks, as stock's."""

import pytest
import torch
import torch.nn.functional as F
from torch.utils.flop_counter import FlopCounterMode

import cvkernels
from cvkernels import extension
from cvkernels import functional as ops

NETWORKS = ("googlenet", "resnet18", "densenet121", "seresnet18", "efficientnet_b0")


def counted(function, *args):
    with FlopCounterMode(display=False) as counter, torch.no_grad():
        function(*args)
    return counter.get_total_flops()


def model_of(name):
    options = {"init_weights": False} if name == "googlenet" else {}
    return cvkernels.create_model(name, num_classes=10, **options).eval()


@pytest.mark.parametrize("calls", [0, 3], ids=["first", "fourth"])
@pytest.mark.parametrize("name", NETWORKS)
def test_frozen_networks_count_as_live_ones(name, calls):
    model, x = model_of(name), torch.rand(2, 3, 64, 64)
    frozen = cvkernels.freeze(model, x)
    expected = frozen(x)
    for _ in range(calls):
        frozen(x)
    saved = 0
    if name == "densenet121":  # a transition pools before its convolution, of a quarter the pixels
        transitions = ((16, 256, 128), (8, 512, 256), (4, 1024, 512))
        saved = sum(2 * 2 * size**2 * C * K * 3 // 4 for size, C, K in transitions)
    assert counted(frozen, x) == counted(model, x) - saved > 0
    assert torch.equal(frozen(x), expected)


@pytest.mark.skipif(not extension.has("cpu"), reason="the compiled extension is missing")
@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.int8])
def test_16_bits_and_bytes_count_alike(dtype):
    model, x = model_of("efficientnet_b0"), torch.rand(2, 3, 64, 64)
    options = {}
    if dtype == torch.int8:
        calibration = torch.rand(32, 3, 64, 64)
        options = {"calibration": calibration, "tolerance": float("-inf")}
    stock = counted(model, x)
    frozen = cvkernels.freeze(model, x, dtype=dtype, **options)
    # In bytes an image has a fourth channel.
    stem = 2 * 2 * 32 * 32 * 32 * 3 * 9
    assert stock <= counted(frozen, x) <= stock + (stem // 3 + 1) * (dtype == torch.int8)


@pytest.mark.parametrize("grad", [False, True], ids=["", "grad"])
@pytest.mark.parametrize("backend", ["auto", "reference"])
def test_ops_alone(backend, grad):
    x, weight = torch.rand(2, 8, 12, 10), torch.rand(16, 8, 3, 3, requires_grad=grad)
    depthwise = torch.rand(8, 1, 5, 5, requires_grad=grad)
    first, second = torch.rand(4, 8, requires_grad=grad), torch.rand(8, 4, requires_grad=grad)
    for _ in range(2):  # a plan that is kept, too
        with FlopCounterMode(display=False) as counter:
            y = ops.conv_bn_act(x, weight, padding=1, stride=(2, 1), backend=backend)
        assert counter.get_total_flops() == 2 * y.numel() * 8 * 9
        with FlopCounterMode(display=False) as counter:
            y = ops.depthwise_conv_bn_act(x, depthwise, padding=2, backend=backend)
        assert counter.get_total_flops() == 2 * y.numel() * 25
        with FlopCounterMode(display=False) as counter:
            ops.squeeze_excite(x, first, None, second, None, backend=backend)
        assert counter.get_total_flops() == 2 * 2 * 2 * 8 * 4


def test_other_modes_see_each_step():
    from torch.utils._python_dispatch import TorchDispatchMode

    seen = []

    class Log(TorchDispatchMode):
        def __torch_dispatch__(self, func, types, args=(), kwargs=None):
            seen.append(str(func))
            return func(*args, **(kwargs or {}))

    x = torch.rand(1, 3, 64, 64)
    frozen = cvkernels.freeze(model_of("resnet18"), x)
    for _ in range(3):
        frozen(x)
    with Log():
        frozen(x)
    convolutions = sum("conv" in name for name in seen)
    assert convolutions >= 20
    assert counted(F.conv2d, x, torch.rand(4, 3, 1, 1)) == 2 * 4 * 3 * 64 * 64
