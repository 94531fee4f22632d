"""The native sample of contents, and the work of an op on the memory at given addresses."""

import itertools

import pytest
import torch

from cvkernels import extension

if not extension.has("cpu"):
    pytest.skip(extension.status()["cpu"].reason, allow_module_level=True)

import cvkernels.functional  # noqa: F401  registers the ops
from cvkernels import _C

pytestmark = pytest.mark.fast

ops = torch.ops.cvkernels
NO_NORM = (None, None, None, None, 1e-5)


def sample(*tensors, whole=True):
    return _C.Sample(
        [(t.data_ptr(), t.element_size(), tuple(t.shape), t.stride(), whole) for t in tensors]
    )


def flip(element):
    """Another bit pattern in a tensor of one element, NaN or not."""
    bits = element.view({1: torch.uint8, 2: torch.int16, 4: torch.int32, 8: torch.int64}[
        element.element_size()
    ])  # fmt: skip
    bits.bitwise_xor_(1)


@pytest.mark.parametrize(
    "dtype", [torch.int8, torch.float16, torch.bfloat16, torch.float32, torch.float64]
)
@pytest.mark.parametrize("size", [1, 7, 64, 1029])
@pytest.mark.parametrize("strided", [False, True])
def test_every_element_of_a_vector_counts(dtype, size, strided):
    vector = torch.arange(2 * size).to(dtype)[:: 2 if strided else 1][:size]
    other = torch.ones(3)
    digest = sample(other, vector).digest
    before, seen = digest(), set()
    for i in range(size):
        flip(vector[i : i + 1])
        seen.add(digest())
        flip(vector[i : i + 1])
    assert len(seen) == size and before not in seen and digest() == before


@pytest.mark.parametrize(
    "shape", [(8, 3, 3, 3), (3, 8, 1, 1), (70, 70, 7, 7), (5, 9), (6, 1, 5, 5)]
)
@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float32, torch.float64])
@pytest.mark.parametrize("layout", ["dense", "channels_last", "slice"])
def test_every_filter_and_every_channel_counts(shape, dtype, layout):
    weight = torch.randn(shape).to(dtype)
    if layout == "channels_last" and weight.dim() == 4:
        weight = weight.contiguous(memory_format=torch.channels_last)
    if layout == "slice":
        weight = torch.randn(shape[0], 2 * shape[1], *shape[2:]).to(dtype)[:, ::2]
    digest = sample(weight, whole=False).digest
    before = digest()
    for axis, size in enumerate(weight.shape[:2]):
        for i in range(size):
            kept = weight.select(axis, i).clone()
            weight.select(axis, i).add_(1)
            assert digest() != before
            weight.select(axis, i).copy_(kept)
            assert digest() == before


def test_taps_of_a_weight_count():
    weight = torch.zeros(64, 16, 3, 5)
    digest = sample(weight, whole=False).digest
    before = digest()
    for r, s in itertools.product(range(3), range(5)):
        weight[:, :, r, s] = 1
        assert digest() != before
        weight.zero_()


def test_order_counts_and_empty_tensors_may_be_sampled():
    first, second = torch.tensor([1.0, 2.0, 3.0, 4.0, 5.0]), torch.tensor([5.0, 2.0, 3.0, 4.0, 1.0])
    assert sample(first).digest() != sample(second).digest()
    assert sample(first, second).digest() != sample(second, first).digest()
    assert sample(torch.empty(0)).digest() == sample().digest() == sample().digest()
    sample(torch.empty(0, 3, 3, 3), torch.empty(2, 0), whole=False).digest()


def test_sample_refuses_what_it_cannot_read():
    with pytest.raises(ValueError, match="1, 2, 4 or 8 bytes"):
        sample(torch.zeros(2, dtype=torch.complex128))
    with pytest.raises(ValueError, match="strides"):
        sample(torch.zeros(2), whole=False)


def nhwc(*shape):
    return torch.randn(shape).contiguous(memory_format=torch.channels_last)


def vectors(C):
    return torch.randn(C), torch.randn(C), torch.randn(C), torch.rand(C) + 0.5, 1e-5


LAYERS = (torch.randn(4, 8), torch.randn(4), torch.randn(8, 4), None)
CALLS = {
    "max_pool_out": lambda: (nhwc(2, 8, 6, 6), [3, 3], [2, 2], [1, 1], [1, 1], False,
                             nhwc(2, 8, 3, 3)),
    "avg_pool_out": lambda: (nhwc(2, 8, 6, 6), [2, 2], [2, 2], [0, 0], False, True, None,
                             *vectors(8), nhwc(2, 8, 3, 3)),
    "dense_concat": lambda: (nhwc(2, 16, 4, 4), nhwc(2, 8, 4, 4), 4, *vectors(8), True),
    "dense_concat of bits": lambda: (nhwc(2, 16, 4, 4), nhwc(2, 8, 4, 4), 8, *NO_NORM, False),
    "conv_bn_act_native": lambda: (nhwc(2, 16, 5, 5), torch.randn(2 * 9 * 16 * 16),
                                   torch.randn(32), nhwc(2, 32, 5, 5), nhwc(2, 32, 5, 5), None,
                                   None, torch.rand(2, 32), 3, 3, 1, 1, 1, 1, 1, 1, 1, 0),
    "conv_bn_act_native of an affine": lambda: (
        nhwc(1, 16, 5, 5), torch.randn(16 * 16), torch.randn(16), nhwc(1, 16, 5, 5), None,
        torch.randn(2, 16), torch.rand(1, 16), None, 1, 1, 1, 1, 0, 0, 1, 1, 0, 0),
    "depthwise_conv_bn_act_native": lambda: (
        nhwc(2, 16, 30, 5), torch.randn(9 * 16), torch.randn(2, 16), 3, 1, 1, 1, 1, 3,
        torch.randn(2, 30, 5, 16), torch.randn(2, 16)),
    "excite_native": lambda: (torch.randn(2, 8), *LAYERS, 1, True, 0),
    "squeeze_native_out": lambda: (nhwc(2, 8, 5, 5), torch.randn(2, 8)),
    "se_scale_native_out": lambda: (nhwc(2, 8, 5, 5), torch.randn(2, 8), nhwc(2, 8, 5, 5), 1,
                                    nhwc(2, 8, 5, 5)),
    "squeeze_excite_native_out": lambda: (nhwc(2, 8, 5, 5), *LAYERS, 1, None, 0,
                                          nhwc(2, 8, 5, 5)),
}  # fmt: skip


def addresses_of(op, arguments, result):
    kinds = [str(argument.type) for argument in op._schema.arguments]
    given = [t for t, kind in zip(arguments, kinds, strict=True) if "Tensor" in kind]
    given += [] if result is None else [result]
    return tuple(0 if t is None else t.data_ptr() for t in given)


@pytest.mark.parametrize("name", CALLS)
def test_a_direct_call_is_its_op_on_other_memory(name):
    op = getattr(ops, name.split()[0]).default
    first = CALLS[name]()
    kept = [t.clone() if isinstance(t, torch.Tensor) else t for t in first]
    results = []
    direct = _C.direct(lambda: results.append(op(*first)))
    for before, after in zip(kept, first, strict=True):  # nothing was written
        assert not isinstance(before, torch.Tensor) or torch.equal(before, after)
    result = results[0]
    assert direct.addresses == addresses_of(op, first, result)
    assert direct.count == len(direct.addresses)

    other, expected = CALLS[name](), None
    copies = [t.clone() if isinstance(t, torch.Tensor) else t for t in other]
    expected = op(*copies)
    written = None if expected is None else torch.empty_like(expected)
    assert direct(*addresses_of(op, other, written)) is None
    if expected is not None:
        assert torch.equal(written, expected)
    for ours, theirs in zip(other, copies, strict=True):
        assert not isinstance(ours, torch.Tensor) or torch.equal(ours, theirs)

    assert direct(*direct.addresses) is None
    assert op(*kept) is None or torch.equal(result, op(*kept))
    for ours, theirs in zip(first, kept, strict=True):
        assert not isinstance(ours, torch.Tensor) or torch.equal(ours, theirs)


def test_a_direct_call_takes_as_many_addresses_as_its_op_has_tensors():
    x, out = nhwc(1, 8, 1, 1), nhwc(1, 8, 1, 1)
    direct = _C.direct(lambda: ops.squeeze_native_out(x, out.view(1, 8)))
    for addresses in ((), direct.addresses[:1], (*direct.addresses, 0)):
        with pytest.raises(TypeError, match="2 addresses"):
            direct(*addresses)
    with pytest.raises(TypeError):
        direct(*direct.addresses, count=2)
    with pytest.raises(TypeError):
        direct(x, out)


def test_a_direct_call_is_of_one_op():
    x = nhwc(1, 8, 1, 1)
    with pytest.raises(RuntimeError, match="one CPU op"):
        _C.direct(lambda: None)
    with pytest.raises(RuntimeError, match="one CPU op"):
        _C.direct(lambda: (ops.squeeze_native(x), ops.squeeze_native(x)))
    with pytest.raises(RuntimeError, match="recording already"):
        _C.direct(lambda: _C.direct(lambda: None))
    with pytest.raises(TypeError):
        _C.DirectCall()
