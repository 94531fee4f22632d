"""What the docstrings do not allow, drawn at random: an error that they list refuses it, and begins
with the op's name and names the argument; alike on every backend, with nothing written."""

import pytest
import torch
from hypothesis import given, note
from hypothesis import strategies as st

from cvkernels import backend, functional
from tests.support.invalid_calls import InvalidCall, invalid_call
from tests.support.numerics import tensors_in
from tests.support.random_calls import CALLS

BACKENDS = ("auto", "native", "onednn", "triton", "reference")


def backends_of(call: InvalidCall) -> list[str]:
    """Those that run the call before it is spoiled; none where no window fits."""
    found = []
    for name in BACKENDS:
        try:
            backend.chosen(call.op, **call.valid | {"backend": name})
        except (ValueError, backend.BackendError):
            continue
        found.append(name)
    return found


def contents(value) -> list[torch.Tensor]:
    """Copies of the tensors that could be written."""
    return [
        t.detach().clone()
        for t in tensors_in(value)
        if t.is_cpu and t.layout is torch.strided and not t.is_neg()
    ]


def assert_refused(call: InvalidCall, name: str) -> str:
    """What the error says."""
    arguments = call.arguments if call.spoiled == "backend" else call.arguments | {"backend": name}
    before = contents(list(arguments.values()))
    with pytest.raises((ValueError, TypeError)) as caught:
        getattr(functional, call.op)(**arguments)
    message = str(caught.value)
    assert message.startswith(f"{call.op}: ")
    assert call.spoiled.partition(".")[0] in message
    after = contents(list(arguments.values()))
    for old, new in zip(before, after, strict=True):
        torch.testing.assert_close(new, old, rtol=0, atol=0, equal_nan=True)
    return message


@pytest.mark.parametrize("op", CALLS)
@given(data=st.data())
def test_invalid_calls(op, data):
    call = data.draw(invalid_call(op), label="call")
    names = backends_of(call)
    note(f"{call.spoiled}: {call.how}, on {names}")
    assert len({assert_refused(call, name) for name in names}) <= 1
