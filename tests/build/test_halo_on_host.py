"""The halo kernel of conv_bn_act compiled for the CPU, see cuda_on_host: what it computes."""

import pytest
import torch

from cvkernels import extension
from cvkernels.functional import BatchNormParams
from cvkernels.ops.common.dispatch import Call
from cvkernels.ops.conv_bn_act import halo
from cvkernels.ops.conv_bn_act.halo import Tile
from cvkernels.ops.conv_bn_act.problem import Parameters, problem_of
from cvkernels.ops.conv_bn_act.reference import conv_bn_act_reference
from tests.support import cuda_on_host
from tests.support.cases.conv_bn_act import make_bn
from tests.support.cuda_on_host import ROOT, HostLibrary
from tests.support.made_once import shared_folder
from tests.support.numerics import assert_matches

pytestmark = [
    pytest.mark.skipif(bool(cuda_on_host.missing()), reason=cuda_on_host.missing()),
    pytest.mark.skipif(not extension.has("cpu"), reason="the overridden ops are not there"),
]
SOURCE = ROOT / "csrc/conv_bn_act/cuda.cu"
# N, C, H, W, K
SHAPES = {
    "nothing-divides": (3, 48, 9, 9, 24),
    "densenet-7": (2, 128, 7, 7, 32),
    "inception-14": (2, 24, 14, 14, 64),
    "wide": (1, 16, 3, 41, 40),
    "one-pixel": (5, 8, 1, 1, 8),
    "most-outputs": (2, 32, 5, 7, 128),
}
TILES = {
    "seven-rows": Tile(7, 4, 2, 2, 4, 1, 1, 1, 3),
    "wide-patch": Tile(7, 4, 1, 8, 1, 2, 1, 1, 2),
    "high-patch": Tile(4, 4, 4, 1, 1, 4, 1, 1, 4),
    "two-columns": Tile(7, 2, 2, 2, 2, 2, 1, 2, 4),
    "two-parts": Tile(7, 2, 1, 2, 2, 2, 2, 2, 3),
    "four-parts": Tile(4, 4, 1, 2, 2, 1, 4, 4, 2),
    "eight-parts": Tile(4, 2, 2, 1, 1, 1, 8, 8, 2),
    "many-patches": Tile(4, 2, 1, 1, 8, 2, 1, 1, 3),
}


@pytest.fixture
def library(tmp_path_factory):
    return cuda_on_host.library_of(SOURCE, shared_folder(tmp_path_factory))


@pytest.fixture(autouse=True)
def no_undefined_behaviour(capfd):
    yield
    assert "runtime error" not in capfd.readouterr().err


def convolve(x, weight, bias=None, bn=None, act="none", out=None):
    """The op by the halo kernel, on CPU tensors that stand for a GPU's."""
    problem = problem_of(x, weight, bias, bn, 1, 1, 1, 1, act, out=out)
    assert not halo.unfit(problem)
    parameters, call = Parameters(weight, bias, bn), Call(x, "cuda", "halo", once=True)
    return halo.plan(problem, call, parameters, (None, None, out), None)(x, out=out)


def reference(x, weight, bias=None, bn=None, act="none"):
    bias = None if bias is None else bias.to(x.dtype)  # the tests' biases are of 16 bits
    return conv_bn_act_reference(x, weight, bias, bn, (1, 1), (1, 1), (1, 1), 1, act)


def inputs(shape, dtype=torch.bfloat16):
    N, C, H, W, K = shape
    x = torch.randn(N, C, H, W).to(dtype).contiguous(memory_format=torch.channels_last)
    weight = (torch.randn(K, C, 3, 3) / (9 * C) ** 0.5).to(dtype)
    return x, weight, torch.randn(K).to(dtype), make_bn(K)


def use_tile(monkeypatch, tile):
    monkeypatch.setattr(halo, "tile_of", lambda *_: tile)


@pytest.mark.parametrize("dtype", halo.DTYPES, ids=str)
@pytest.mark.parametrize("shape", SHAPES.values(), ids=SHAPES.keys())
def test_matches_reference_by_the_tiles_of_every_gpu(shape, dtype, library, monkeypatch):
    args = (*inputs(shape, dtype), "relu")
    problem = problem_of(*args[:4], 1, 1, 1, 1, "relu")
    tiles = {halo.tile_of(problem, capability) for capability in ((8, 0), (8, 6), (9, 0))}
    for tile in tiles - {None}:
        use_tile(monkeypatch, tile)
        with library.in_place_of_the_cpu_ops():
            assert_matches(convolve, reference, args)


@pytest.mark.few(3)
@pytest.mark.parametrize("tile", TILES.values(), ids=TILES.keys())
def test_every_cut_in_both_orders_of_threads(tile, library, monkeypatch):
    """What a missing barrier, a copy read too early or two writers of one element would change."""
    use_tile(monkeypatch, tile)
    args, results = (*inputs((3, 40, 10, 13, 16), torch.float16), "relu6"), []
    for reverse in (False, True):
        with library.in_place_of_the_cpu_ops(reverse):
            assert_matches(convolve, reference, args)
            results.append(convolve(*args))
    assert torch.equal(*results)


@pytest.mark.parametrize("act", ["none", "relu", "relu6", "silu"])
@pytest.mark.parametrize("vectors", [torch.float32, torch.bfloat16], ids=str)
def test_live_norms_and_biases(vectors, act, library):
    x, weight, bias, _ = inputs((2, 16, 5, 6, 16))
    bn, bias = make_bn(16, vectors), bias.to(vectors)
    with library.in_place_of_the_cpu_ops():
        for given in ((None, None), (bias, None), (None, bn), (bias, bn)):
            assert_matches(convolve, reference, (x, weight, *given, act))
        affine = BatchNormParams(bn.weight, bn.bias)
        assert_matches(convolve, reference, (x, weight, None, affine, act))
        bn.bias.add_(1)  # in place, as an optimiser does
        assert_matches(convolve, reference, (x, weight, None, bn, act))


def test_vectors_of_other_dtypes_are_converted(library):
    x, weight, bias, bn = inputs((2, 16, 5, 6, 16))
    wide = BatchNormParams(*(v.double() for v in bn[:4]), bn.eps)
    mixed = bn._replace(mean=bn.mean.to(torch.bfloat16))
    rounded = bn._replace(mean=mixed.mean.float())
    with library.in_place_of_the_cpu_ops():
        expected = convolve(x, weight, bias, bn)
        assert torch.equal(convolve(x, weight, bias.double(), wide), expected)
        expected = convolve(x, weight, bias, rounded)
        assert torch.equal(convolve(x, weight, bias, mixed), expected)


@pytest.mark.parametrize("start", [0, 8, 3], ids=["first", "aligned", "misaligned"])
def test_channel_slices(start, library):
    """Nothing outside of the output's slice is written; x and it may lie in one buffer."""
    _, weight, bias, bn = inputs((3, 24, 9, 7, 16))
    buffer = (
        torch.randn(3, 64, 9, 7).to(torch.bfloat16).contiguous(memory_format=torch.channels_last)
    )
    before, x = buffer.clone(), buffer[:, start : start + 24]
    out = buffer[:, start + 32 : start + 48]
    with library.in_place_of_the_cpu_ops():
        alone = convolve(x.clone(memory_format=torch.channels_last), weight, bias, bn)
        assert convolve(x, weight, bias, bn, out=out) is out
    assert torch.equal(out, alone)
    out.copy_(before[:, start + 32 : start + 48])
    assert torch.equal(buffer, before)


def test_other_layouts_of_x_and_weight(library):
    x, weight, bias, bn = inputs((2, 16, 6, 5, 24))
    wide = torch.zeros(2, 16, 6, 10, dtype=x.dtype).contiguous(memory_format=torch.channels_last)
    wide[..., ::2] = x
    with library.in_place_of_the_cpu_ops():
        expected = convolve(x, weight, bias, bn)
        for other in (x.contiguous(), x.transpose(2, 3).contiguous().transpose(2, 3)):
            assert torch.equal(convolve(other, weight, bias, bn), expected)
        assert torch.equal(convolve(wide[..., ::2], weight, bias, bn), expected)
        nhwc = weight.contiguous(memory_format=torch.channels_last)
        assert torch.equal(convolve(x, nhwc, bias, bn), expected)
        part = torch.cat((nhwc, nhwc), 1)[:, 16:]
        assert torch.equal(convolve(x, part, bias, bn), expected)
        shared = x[:1].expand(2, -1, -1, -1)
        assert torch.equal(convolve(shared, weight, bias, bn)[1], expected[0])


def test_nan_and_infinity_stay_where_their_windows_are(library):
    x, weight, bias, _ = inputs((1, 16, 9, 8, 8))
    x[0, 3, 4, 2], x[0, 5, 0, 7] = float("nan"), float("inf")
    with library.in_place_of_the_cpu_ops():
        for act in ("none", "relu", "relu6", "silu"):
            assert_matches(convolve, reference, (x, weight, bias, None, act))


def test_an_empty_batch(library):
    x, weight, bias, bn = inputs((0, 16, 9, 8, 8))
    with library.in_place_of_the_cpu_ops():
        assert convolve(x, weight, bias, bn).shape == (0, 8, 9, 8)


def launched(library, tile, K=32, **given):
    x, weight, *_ = inputs((1, 128, 8, 8, K))
    x, weight = given.get("x", x), given.get("weight", weight)
    weight = weight.contiguous(memory_format=torch.channels_last)
    out = given.get("out", torch.empty(1, K, 8, 8, dtype=x.dtype))
    out = out.contiguous(memory_format=torch.channels_last)
    none = (None,) * 5
    with library.in_place_of_the_cpu_ops():
        torch.ops.cvkernels.conv_bn_act_halo(x, weight, out, *none, 0.0, 0, *tile)


@pytest.mark.parametrize("name", TILES)
def test_shared_memory_is_what_the_plan_counts(name, library):
    """Four stages of 128 channels do not fit beside the weights: the message has the sum."""
    tile = TILES[name]._replace(stages=4, slices=8)
    given = inputs((1, 2048, 8, 8, tile.all_columns))
    problem = problem_of(*given[:2], None, None, 1, 1, 1, 1, "none")
    needed = halo.shared_bytes(problem, tile)
    out = torch.empty(1, tile.all_columns, 8, 8, dtype=torch.bfloat16)
    with pytest.raises(RuntimeError, match=f"needs {needed} bytes of shared memory"):
        launched(library, tile, x=given[0], weight=given[1], out=out)


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"rows": 5}, "does not give each of 8 warps two strips"),
        ({"patches": 2}, "does not give each of 8 warps two strips"),
        ({"slices": 3}, "does not give each of 8 warps two strips"),
        ({"columns": 2}, "the tile has 16 output channels, and out 32"),
    ],
)
def test_tiles_that_the_kernel_refuses(change, message, library):
    with pytest.raises(RuntimeError, match=message):
        launched(library, TILES["seven-rows"]._replace(**change))


def test_tensors_that_the_kernel_refuses(library):
    tile = TILES["seven-rows"]
    x, weight, *_ = inputs((1, 128, 8, 8, 32))
    for given, message in (
        ({"x": x.float(), "weight": weight.float()}, "float16 and bfloat16"),
        ({"x": x.contiguous()}, "x must have channels in multiples of 8"),
        ({"weight": weight[:, :64]}, r"weight must have shape \[32, 128, 3, 3\]"),
        ({"out": torch.empty(1, 32, 7, 8, dtype=x.dtype)}, "the images and pixels of x"),
    ):
        with pytest.raises(RuntimeError, match=message):
            launched(library, tile, **given)


BROKEN = {
    "no barrier behind a wait": ("stages - 2);\n      __syncthreads();", "stages - 2);"),
    "a wait for one group too few": (
        "wait_for_all_but(problem.stages - 2)", "wait_for_all_but(problem.stages - 1)"
    ),
    "no barrier before parts are written": ("half /= 2) {\n    __syncthreads();", "half /= 2) {"),
    "no barrier before parts are read": ("    __syncthreads();\n    if (part < half)",
                                         "    if (part < half)"),
}  # fmt: skip


@pytest.mark.full
@pytest.mark.parametrize("name", BROKEN)
def test_finds_a_missing_barrier_and_a_missing_wait(name, tmp_path, monkeypatch):
    """The looking itself: a kernel that holds such an error gives wrong answers here."""
    folder = tmp_path / "conv_bn_act"
    folder.mkdir()
    text = (SOURCE.parent / "kernels.cuh").read_text()
    right, wrong = BROKEN[name]
    assert text.count(right) == 1
    (folder / "kernels.cuh").write_text(text.replace(right, wrong))
    (folder / "cuda.cu").write_text(SOURCE.read_text())
    library = HostLibrary(folder / "cuda.cu", tmp_path, f"broken_{list(BROKEN).index(name)}")
    use_tile(monkeypatch, TILES["two-parts"])
    args, wrong_answers = inputs((3, 64, 15, 13, 16)), 0
    exact = reference(*(t.double() for t in args[:3]))
    for reverse in (False, True):
        with library.in_place_of_the_cpu_ops(reverse):
            error = (convolve(*args[:3]).double() - exact).abs().max()
        wrong_answers += not error < 0.1
    assert wrong_answers
