"""When depthwise_conv_bn_act runs in CUDA C++, how it is cut, and SiLU by tanh.

The kernel itself runs in tests/build/test_cuda_on_host.py.
"""

from dataclasses import replace

import pytest
import torch

from cvkernels import backend, record
from cvkernels.backend import BackendError
from cvkernels.functional import depthwise_conv_bn_act
from cvkernels.ops.depthwise_conv_bn_act import cuda
from tests.support.cases.depthwise_conv_bn_act import NETWORKS, problem_of

CAPABILITIES = [(8, 0), (9, 0), (10, 0)]


def on_meta(shape, dtype=torch.bfloat16, memory_format=torch.channels_last):
    x = torch.empty(shape, dtype=dtype, device="meta").contiguous(memory_format=memory_format)
    return x, torch.empty(shape[1], 1, 3, 3, dtype=dtype, device="meta")


def planned(x, weight, **options):
    with record.recording(record.Recorder()):
        return depthwise_conv_bn_act.plan(x, weight, padding=1, **options)


def test_auto_prefers_it_where_the_layout_fits():
    pytest.importorskip("triton")
    assert planned(*on_meta((2, 24, 9, 9))).backend == "cuda"
    assert planned(*on_meta((2, 24, 9, 9), torch.float32)).backend == "cuda"
    for other in (
        on_meta((2, 20, 9, 9)),
        on_meta((2, 24, 9, 9), memory_format=torch.contiguous_format),
    ):
        assert planned(*other).backend == "triton"
    x, weight = on_meta((2, 24, 9, 9))
    assert planned(x, weight, stride=3).backend == "triton"
    assert planned(x, weight, dilation=2).backend == "triton"
    assert planned(x, weight, backend="triton").backend == "triton"
    wide, weight = on_meta((2, 48, 9, 9))
    assert planned(wide[:, 8:32], weight[:24]).backend == "cuda"


@pytest.mark.parametrize(
    ("shape", "options", "reason"),
    [
        ((2, 20, 9, 9), {}, "channels in packs of 8, got shape"),
        ((2, 24, 9, 9), {"dilation": 2}, "not dilated"),
        ((2, 24, 9, 9), {"stride": 3}, "stride 1 or 2"),
    ],
)
def test_says_why_it_cannot(shape, options, reason):
    with pytest.raises(BackendError, match=f"backend 'cuda' cannot run this call: .*{reason}"):
        planned(*on_meta(shape), backend="cuda", **options)


def test_needs_a_gpu():
    x = torch.randn(1, 8, 4, 4).contiguous(memory_format=torch.channels_last)
    with pytest.raises(BackendError, match="the CUDA kernel needs CUDA tensors, got cpu"):
        depthwise_conv_bn_act(x, torch.randn(8, 1, 3, 3), backend="cuda")
    assert "cuda" in backend.NAMES


@pytest.mark.parametrize(("batch", "kernels"), [(128, 1), (1, 2)])
def test_traffic_counts_the_parts_of_sums(batch, kernels):
    """The bands of one image are added by a second kernel, those of many maps are whole."""
    x, weight = on_meta((batch, 672, 14, 14))
    squeezing, plain = (planned(x, weight, squeeze=s).traffic for s in (True, False))
    assert (squeezing.kernels, plain.kernels) == (kernels, 1)
    parts = squeezing.bytes_read - plain.bytes_read
    assert plain.bytes_read == x.nbytes + weight.nbytes and (parts > 0) == (kernels == 2)
    assert squeezing.bytes_written - plain.bytes_written == 4 * batch * 672 + parts


@pytest.mark.parametrize("capability", CAPABILITIES, ids=str)
@pytest.mark.parametrize("batch", [1, 3, 128])
@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float32], ids=str)
@pytest.mark.parametrize("shape", NETWORKS.values(), ids=str)
def test_blocks_have_room_and_cover_the_map(shape, dtype, batch, capability):
    problem = problem_of(shape, batch, dtype)
    cut = cuda.cut(problem, capability)
    strips, images, bands, rows = cut
    slots = 16 if dtype == torch.float32 or (shape.kernel, shape.stride) == (3, 1) else 8
    assert 0 < strips * images * bands <= slots and 0 < rows <= problem.P
    assert bands == 1 or problem.P % rows == 0
    # No strip lies outside of the map, and at most every fifth of its columns.
    assert 7 * strips * cut.parts(problem) // -(-problem.P // rows) < problem.Q + 7 * strips
    if shape.size in (112, 56, 28, 14, 7):
        assert problem.Q % 7 == 0 and -(-problem.Q // 7) % strips == 0


@pytest.mark.parametrize("shape", NETWORKS.values(), ids=str)
def test_a_large_batch_keeps_every_sm_busy(shape):
    """Blocks are cut until the busiest SM has little more than the others."""
    problem = replace(problem_of(shape, 128), squeeze=False)
    blocks = cuda.cut(problem, (9, 0)).blocks(problem)
    of_busiest = -(-blocks // 132)
    assert of_busiest >= 3 and blocks / (132 * of_busiest) >= 0.75


def silu_by_tanh(z, error):
    """As fast_act.cuh has it, with the largest error of tanh.approx in one direction."""
    half = z.float() / 2
    return half * (torch.tanh(half) * (1 + error)) + half


@pytest.mark.parametrize("error", [2.0**-11, -(2.0**-11)])
@pytest.mark.parametrize(
    ("dtype", "lowest", "keeps"),
    [
        (torch.bfloat16, -8.0, True),
        (torch.bfloat16, -30.0, True),
        (torch.float16, -30.0, False),
    ],
    ids=str,
)
def test_silu_by_tanh_keeps_the_rule_in_bfloat16_alone(dtype, lowest, keeps, error):
    """The largest result being 1, z from `lowest` on: far below 0 h * tanh(h) and h cancel."""
    z = torch.linspace(lowest, 1.28, 200001)
    exact = torch.nn.functional.silu(z.double())
    eager = torch.nn.functional.silu(z.to(dtype)).double()
    ours = silu_by_tanh(z, error).to(dtype).double()
    largest = exact.abs().max().item()
    allowed = 2 * (eager - exact).abs().max().item() + torch.finfo(dtype).eps * largest
    within = (ours - exact).abs().max().item() <= allowed
    assert within == keeps
