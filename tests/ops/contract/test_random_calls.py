"""What the docstrings allow, drawn at random: it runs on every backend that claims it, is right by
the tolerance rule, and writes all of its result and nothing else."""

import pytest
import torch
from hypothesis import given, note
from hypothesis import strategies as st

from cvkernels import functional
from cvkernels.backend import BackendError
from cvkernels.ops.common.norm import accumulator
from tests.support.cases.every_op import OPS
from tests.support.numerics import assert_close_as_eager, map_floats, tensors_in
from tests.support.random_calls import CALLS, RandomCall

pytestmark = pytest.mark.fast

BACKENDS = ("auto", "native", "onednn", "reference")


def test_every_op_is_drawn():
    assert sorted(CALLS) == OPS


def run(call: RandomCall, backend: str):
    return getattr(functional, call.op)(*call.arguments, **call.options, backend=backend)


def doubled(call: RandomCall) -> RandomCall:
    return RandomCall(
        call.op, map_floats(torch.Tensor.double, call.arguments),
        map_floats(torch.Tensor.double, call.options),
    )  # fmt: skip


def around(written: torch.Tensor) -> torch.Tensor:
    """The whole memory that a tensor lies in, with the tensor's own elements as zeros."""
    storage = written.untyped_storage()
    memory = torch.empty(0, dtype=written.dtype).set_(storage).clone()
    memory.as_strided(written.shape, written.stride(), written.storage_offset()).zero_()
    return memory


def unwritten(call: RandomCall) -> None:
    """Make NaN of what the call has to write."""
    if call.op == "dense_concat":
        buffer, x, start, *_ = call.arguments
        buffer[:, start : start + x.shape[1]] = torch.nan
    elif call.written is not None:
        call.written.fill_(torch.nan)


def slack_of(call: RandomCall, exact: list[torch.Tensor]) -> float:
    """An error that sums in another order may have where they cancel, eager's being none: some
    roundings of the largest products, and of what a norm of the batch divides by their spread."""
    given = [t.double().abs().max().item() for t in tensors_in([call.arguments]) if t.numel()]
    scale = max(1.0, *given) ** 2 if given else 1.0
    if call.op == "batch_norm_act":
        scale *= (exact[2].double() + 1e-5).rsqrt().max().item()
    return 16 * torch.finfo(accumulator(call.arguments[0].dtype)).eps * scale


@pytest.mark.parametrize("op", CALLS)
@given(data=st.data())
def test_random_calls(op, data):
    call = data.draw(CALLS[op], label="call")
    kept = [t.clone() for t in tensors_in([call.arguments, call.options])]
    try:
        exact = run(doubled(call), "reference")
    except ValueError as error:
        assert "fit" in str(error), "a call is refused in which a window fits"
        for backend in BACKENDS:
            with pytest.raises(ValueError, match="fit"):
                run(call, backend)
        return
    slack = slack_of(call, tensors_in(exact))
    eager = [t.clone() for t in tensors_in(run(call, "reference"))]
    written, before = call.written, torch.get_num_threads()
    surroundings = None if written is None else around(written)
    for backend in BACKENDS:
        threads = data.draw(st.sampled_from((1, 2, 3)))
        note(f"{backend} with {threads} threads")
        unwritten(call)
        torch.set_num_threads(threads)
        try:
            actual = run(call, backend)
        except BackendError:
            assert backend != "auto"
            continue
        finally:
            torch.set_num_threads(before)
        for tensor, original in zip(tensors_in([call.arguments, call.options]), kept, strict=True):
            assert tensor is written or torch.equal(tensor, original), "an argument was changed"
        if written is not None:
            assert torch.equal(around(written), surroundings), "something beside was written"
        for ours, theirs, truth in zip(tensors_in(actual), eager, tensors_in(exact), strict=True):
            assert_close_as_eager(ours, theirs, truth, slack=slack)


def a_call(op: str, dtype: torch.dtype, *others, **options) -> RandomCall:
    x = torch.randn(2, 8, 5, 6).to(dtype).contiguous(memory_format=torch.channels_last)
    return RandomCall(op, (x, *others), options)


def strided(count: int, dtype: torch.dtype = torch.float32) -> torch.Tensor:
    return torch.randn(2 * count).to(dtype)[::2]


BF16, FP16 = torch.bfloat16, torch.float16
FOUND = {
    "a grouped sum with a ReLU in 16 bits": lambda: a_call(
        "conv_bn_act", BF16, torch.randn(8, 4, 1, 1).to(BF16), groups=2,
        residual=torch.randn(2, 8, 5, 6).to(BF16),
    ),
    "a bias whose elements lie apart": lambda: a_call(
        "conv_bn_act", BF16, torch.randn(16, 8, 1, 1).to(BF16), strided(16, BF16), act="none"
    ),
    "a dilated kernel of one tap": lambda: RandomCall(
        "conv_bn_act",
        (torch.randn(2, 11, 1, 11).to(BF16).transpose(2, 3), torch.randn(5, 11, 1, 1).to(BF16)),
        {"stride": (1, 3), "padding": 2, "dilation": (1, 2)},
    ),
    "a gate and vectors of other dtypes": lambda: a_call(
        "conv_bn_act", BF16, torch.randn(3, 8, 3, 3).to(BF16), strided(3).double(),
        functional.BatchNormParams(strided(3), strided(3, FP16), strided(3), strided(3).abs() + 1),
        input_gate=torch.rand(2, 8),
    ),
    "vectors of other dtypes, of a norm of the batch": lambda: a_call(
        "batch_norm_act", torch.float32, strided(8, BF16), strided(8).double()
    ),
}  # fmt: skip


@pytest.mark.parametrize("backend", ["auto", "native", "onednn", "reference"])
@pytest.mark.parametrize("found", FOUND.values(), ids=FOUND.keys())
def test_what_random_calls_have_found(found, backend):
    call = found()
    exact, eager = run(doubled(call), "reference"), run(call, "reference")
    try:
        actual = run(call, backend)
    except BackendError:
        assert backend != "auto"
        return
    slack = slack_of(call, tensors_in(exact))
    results = zip(*map(tensors_in, (actual, eager, exact)), strict=True)
    for ours, theirs, truth in results:
        assert_close_as_eager(ours, theirs, truth, slack=slack)


@pytest.mark.parametrize("op", ["conv_bn_act", "avg_pool"])
def test_a_norm_without_vectors_is_refused(op):
    others = (torch.randn(3, 8, 1, 1),) if op == "conv_bn_act" else (2,)
    call = a_call(op, torch.float32, *others, input_bn=functional.BatchNormParams())
    with pytest.raises(ValueError, match=f"{op}: input_bn has no vector"):
        run(call, "auto")
