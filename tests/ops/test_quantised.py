"""The ops on bytes: by PyTorch as written down, by each instruction set, in whole numbers exact."""

import itertools
from dataclasses import replace

import pytest
import torch
import torch.nn.functional as F

from cvkernels import extension
from cvkernels.ops.quantised import convolution, depthwise, maps
from cvkernels.ops.quantised.quantisation import LARGEST, Quantisation, quantise_weight
from tests.support.surroundings import assert_bits_do_not_depend_on_threads, each_instruction_set

SETS = ("baseline", "avx2", "avx_vnni", "avx512_vnni")
instruction_set = each_instruction_set(*SETS)
compiled = pytest.mark.skipif(not extension.has("cpu"), reason="the compiled extension is missing")
channels_last = torch.channels_last

# C, K, kernel, stride, padding, dilation
CONVS = {
    "1x1": (64, 40, 1, 1, 0, 1), "1x1-stride-2": (32, 100, 1, 2, 0, 1),
    "3x3": (16, 64, 3, 1, 1, 1), "3x3-dilated": (20, 24, 3, 1, 2, 2), "5x5": (8, 17, 5, 2, 2, 1),
    "image": (4, 64, 7, 2, 3, 1), "three-channels": (3, 64, 7, 2, 3, 1),
    "not-whole-quads": (18, 33, 3, 1, 1, 1), "few-channels": (5, 16, 1, 1, 0, 1),
    "two-by-two": (2, 16, 2, 1, 0, 1), "one-channel": (1, 8, 3, 1, 1, 1),
}  # fmt: skip
# act, residual, output gates, affine, input gates, float32 out
AROUND = {
    "plain": ("none", 0, 0, 0, 0, 0), "relu": ("relu", 1, 0, 0, 0, 0),
    "gates": ("relu", 1, 1, 0, 0, 0), "silu": ("silu", 0, 0, 0, 0, 0),
    "affine": ("relu", 0, 0, 1, 0, 0), "input-gates": ("none", 1, 0, 0, 1, 0),
    "wide": ("relu6", 0, 0, 0, 0, 1), "wide-silu": ("silu", 1, 0, 0, 0, 1),
}  # fmt: skip
DEPTHWISE = list(itertools.product((1, 20, 48, 100), ((3, 1, 1), (3, 2, 0), (5, 1, 2), (5, 2, 4))))


def byte_map(*size, layout=channels_last):
    return torch.randint(0, 256, size, dtype=torch.uint8).contiguous(memory_format=layout)


def like(size, wide):
    dtype = torch.float32 if wide else torch.uint8
    return torch.zeros(size, dtype=dtype).contiguous(memory_format=channels_last)


def conv_of(shape, around):
    """A convolution, and what it is called with after x and out."""
    torch.manual_seed(0)
    C, K, kernel, stride, padding, dilation = shape
    act, residual, gated, affine, input_gated, wide = around
    zero = 0 if act in ("relu", "relu6") else 9
    operand = None
    if affine or input_gated:
        operand = Quantisation(0.05, 0) if affine else Quantisation(0.015, 11)
    conv = convolution.Convolution(
        torch.randint(-LARGEST, LARGEST + 1, (K, C, kernel, kernel), dtype=torch.int8),
        torch.rand(K) * 2e-4 + 1e-5, torch.randn(K) / 10, (stride, stride), (padding, padding),
        (dilation, dilation), act, Quantisation(0.02, 7),
        None if wide else Quantisation(0.03, zero), operand,
        Quantisation(0.011, 120) if residual else None,
        torch.stack([torch.randn(C) / 2, torch.randn(C) * 40]) if affine else None, bool(gated),
    )  # fmt: skip
    x = byte_map(2, C, 13, 11)
    size = conv.size(x.shape)
    rest = (
        byte_map(*size) if residual else None,
        torch.rand(2, C) if input_gated else None,
        torch.rand(2, K) if gated else None,
    )
    return conv, x, size, rest


@pytest.mark.parametrize("around", AROUND)
@pytest.mark.parametrize("shape", CONVS)
def test_convolutions_are_those_that_pytorch_computes(shape, around, instruction_set):
    conv, x, size, rest = conv_of(CONVS[shape], AROUND[around])
    wide = conv.out is None
    expected = convolution._reference(conv)(x, like(size, wide), *rest)
    actual = convolution.convolve(conv)(x, like(size, wide), *rest)
    if wide:
        torch.testing.assert_close(actual, expected, rtol=1e-3, atol=2e-3)
        return
    # What is all but half-way between two bytes may become either.
    apart = (actual.int() - expected.int()).abs()
    assert apart.max() <= 1
    assert (apart > 0).double().mean() < 0.02


@compiled
@pytest.mark.parametrize("around", AROUND)
@pytest.mark.parametrize("shape", CONVS)
def test_convolutions_have_one_result_on_all_processors(shape, around):
    conv, x, size, rest = conv_of(CONVS[shape], AROUND[around])
    results = []
    for name in set(SETS[1:]) & set(extension.instruction_sets()):
        with extension.limited_to(name):
            results.append(convolution.convolve(conv)(x, like(size, conv.out is None), *rest))
    assert all(torch.equal(other, results[0]) for other in results)


@pytest.mark.parametrize("shape", CONVS)
def test_sums_are_exact(shape, instruction_set):
    conv, x, size, _ = conv_of(CONVS[shape], AROUND["wide"])
    ones = torch.ones_like(conv.weight_scale)
    small = conv.weight // 16  # so that the sums are exact in float32, too
    conv = replace(
        conv, weight=small, weight_scale=ones, bias=0 * ones, act="none", x=Quantisation(1.0, 7)
    )
    u, padding = x.double() - 7, conv.padding
    expected = F.conv2d(u, small.double(), None, conv.stride, padding, conv.dilation)
    assert torch.equal(convolution.convolve(conv)(x, like(size, True)), expected.float())


@pytest.mark.parametrize("sign", [-1, 1])
def test_the_largest_products_fit_their_sums(sign, instruction_set):
    weight = torch.full((16, 256, 3, 3), sign * LARGEST, dtype=torch.int8)
    ones = torch.ones(16)
    conv = convolution.Convolution(
        weight, ones, 0 * ones, (1, 1), (1, 1), (1, 1), "none", Quantisation(1.0, 0), None
    )
    x = torch.full((1, 256, 3, 3), 255, dtype=torch.uint8).contiguous(memory_format=channels_last)
    middle = convolution.convolve(conv)(x, like((1, 16, 3, 3), True))[0, :, 1, 1]
    assert torch.equal(middle, ones * sign * 255 * LARGEST * 256 * 9)


def test_slices_of_buffers_are_read_and_written(instruction_set):
    conv, _, _, _ = conv_of(CONVS["3x3"], AROUND["relu"])
    x, residual = byte_map(2, 48, 9, 9)[:, 16:32], byte_map(2, 100, 9, 9)[:, 5:69]
    buffer = byte_map(2, 100, 9, 9)
    before = buffer.clone()
    convolution.convolve(conv)(x, buffer[:, 20:84], residual)
    dense = [t.contiguous(memory_format=channels_last) for t in (x, residual)]
    expected = convolution.convolve(conv)(dense[0], like((2, 64, 9, 9), False), dense[1])
    assert torch.equal(buffer[:, 20:84], expected)
    for untouched in (slice(0, 20), slice(84, 100)):
        assert torch.equal(buffer[:, untouched], before[:, untouched])


def depthwise_of(case, act):
    torch.manual_seed(0)
    C, (kernel, stride, padding) = case
    zero = 0 if act in ("relu", "relu6") else 13
    weight = torch.randint(-LARGEST, LARGEST + 1, (C, 1, kernel, kernel), dtype=torch.int8)
    conv = depthwise.Depthwise(
        weight, torch.rand(C) * 2e-3, torch.randn(C), (stride, stride), (padding, padding), act,
        Quantisation(0.03, 17), Quantisation(0.05, zero),
    )  # fmt: skip
    x = byte_map(2, C, 33, 61)
    P, Q = ((n + 2 * padding - kernel) // stride + 1 for n in x.shape[2:])
    return conv, x, (2, C, P, Q)


@pytest.mark.parametrize("act", ["none", "relu", "relu6", "silu"])
@pytest.mark.parametrize("case", DEPTHWISE, ids=str)
def test_depthwise_convolutions_are_those_that_pytorch_computes(case, act, instruction_set):
    conv, x, size = depthwise_of(case, act)
    out, sums = like(size, False), torch.zeros(size[:2])
    depthwise.convolve(conv)(x, out, sums)
    expected, expected_sums = like(size, False), torch.zeros(size[:2])
    depthwise._reference(conv)(x, expected, expected_sums)
    apart = (out.int() - expected.int()).abs()
    assert apart.max() <= 1
    assert (apart > 0).double().mean() < 0.02
    scale = expected_sums.abs().max().item()
    torch.testing.assert_close(sums, expected_sums, rtol=2e-3, atol=2e-3 * scale)


@compiled
@pytest.mark.parametrize("act", ["none", "silu"])
@pytest.mark.parametrize("case", DEPTHWISE, ids=str)
def test_depthwise_convolutions_have_one_result_on_all_processors(case, act):
    conv, x, size = depthwise_of(case, act)
    results = []
    for name in set(SETS[1:]) & set(extension.instruction_sets()):
        with extension.limited_to(name):
            out, sums = like(size, False), torch.zeros(size[:2])
            results.append((depthwise.convolve(conv)(x, out, sums), sums))
    for others in results:
        assert all(map(torch.equal, others, results[0]))


@pytest.mark.parametrize("C", [1, 3, 16])
def test_numbers_become_the_nearest_bytes_in_every_layout(C):
    # All numbers are exact, those half-way between two bytes among them.
    x, to = torch.randint(-300, 300, (2, C, 5, 37)) / 8, Quantisation(0.25, 100)
    expected = to.quantise(x)
    nhwc = x.contiguous(memory_format=channels_last)
    for image in (x, nhwc, x.repeat_interleave(2, 3)[..., ::2], nhwc.mT.contiguous().mT):
        out = like((2, C, 5, 37), False)
        assert torch.equal(maps.quantise(image, to, out), expected)
        whole = byte_map(2, C + 1, 5, 37)
        maps.quantise(image, to, whole)
        assert torch.equal(whole[:, :C], expected)
        assert (whole[:, C:] == to.zero).all()
    back = maps.dequantise(expected, to, like(x.shape, True))
    torch.testing.assert_close(back, to.dequantise(expected))


def test_pools_and_means():
    x, of = byte_map(2, 70, 13, 11), Quantisation(0.03, 40)
    window = ((3, 3), (2, 2), (1, 1), (1, 1), True)
    pooled = F.max_pool2d(x.float(), 3, 2, 1, ceil_mode=True).byte()
    assert torch.equal(maps.max_pool(x, window, like(pooled.shape, False)), pooled)

    window = ((2, 2), (2, 2), (0, 0), (1, 1), False)
    average = F.avg_pool2d(x.float(), 2).round().byte()
    assert torch.equal(
        maps.avg_pool(x, window, True, None, None, like(average.shape, False)), average
    )

    affine = torch.stack([torch.randn(70), torch.randn(70) * 50])
    scale, shift = affine.view(2, -1, 1, 1)
    u = (x * scale + shift).clamp_min(0)
    average = F.avg_pool2d(u, 2).round().clamp(0, 255)
    out = maps.avg_pool(x, window, True, None, affine, like(average.shape, False))
    assert (out.float() - average).abs().max() <= 1

    mean = torch.zeros(2, 70)
    torch.testing.assert_close(maps.mean(x, of, None, mean), of.dequantise(x).mean((2, 3)))
    torch.testing.assert_close(maps.mean(x, of, affine, mean), u.mean((2, 3)))


@compiled
def test_no_bit_depends_on_the_number_of_threads():
    conv, x, size, rest = conv_of(CONVS["3x3"], AROUND["gates"])
    thin, y, thin_size = depthwise_of((100, (5, 1, 2)), "silu")

    def run():
        sums, mean = torch.zeros(2, 100), torch.zeros(2, 100)
        yield convolution.convolve(conv)(x, like(size, False), *rest)
        yield depthwise.convolve(thin)(y, like(thin_size, False), sums)
        yield sums
        yield maps.mean(y, thin.x, None, mean)

    assert_bits_do_not_depend_on_threads(run)


def test_weights_have_a_scale_for_each_filter_and_no_smallest_byte():
    torch.manual_seed(0)
    weight = torch.randn(6, 8, 3, 3) * torch.logspace(-3, 2, 6).view(-1, 1, 1, 1)
    weight[2] = 0
    rounded, scale = quantise_weight(weight)
    assert rounded.dtype == torch.int8
    assert rounded.min() >= -LARGEST
    error = (rounded * scale.view(-1, 1, 1, 1) - weight).flatten(1).norm(dim=1)
    assert (error <= 0.01 * weight.flatten(1).norm(dim=1)).all()
    assert (rounded[2] == 0).all()
    assert scale.isfinite().all()
    assert (scale > 0).all()


@pytest.mark.parametrize("low, high", [(0, 0), (-1, 0), (0, 3), (-0.3, 6), (2, 5), (0, 1e-42)])
def test_zero_is_a_byte_of_every_range(low, high):
    q = Quantisation.of_range(low, high)
    assert 0 <= q.zero <= 255
    assert q.scale > 0
    assert q.dequantise(q.quantise(torch.zeros(1))).item() == 0
    ends = torch.tensor([float(low), float(high)])
    assert (q.dequantise(q.quantise(ends)) - ends).abs().max() <= q.scale


@compiled
def test_what_does_not_fit_is_refused():
    conv, x, size, _ = conv_of(CONVS["3x3"], AROUND["plain"])
    run = convolution.convolve(conv)
    for wrong in (x.float(), x[:, :11], x.permute(0, 1, 3, 2)):
        with pytest.raises(RuntimeError, match="conv_bn_act_quantised"):
            run(wrong, like(size, False))
    with pytest.raises(RuntimeError, match="out must"):
        run(x, like(size, False).double())
    with pytest.raises(RuntimeError, match="output_gate must"):
        run(x, like(size, False), None, None, torch.rand(2, 64).double())
    with pytest.raises(RuntimeError, match="out must have"):
        maps.quantise(torch.rand(1, 3, 4, 4), Quantisation(1.0, 0), like((1, 2, 4, 4), False))
    with pytest.raises(RuntimeError, match="uint8"):
        maps.mean(torch.rand(1, 3, 4, 4), Quantisation(1.0, 0), None, torch.zeros(1, 3))
