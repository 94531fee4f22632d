"""Gradients of random calls: those of the reference in float64, where the op is differentiable."""

import pytest
import torch
from hypothesis import given, note
from hypothesis import strategies as st

from cvkernels.backend import BackendError
from tests.ops.contract.test_random_calls import run
from tests.support.numerics import cotangents_of, map_floats, tensors_in
from tests.support.random_calls import CALLS, RandomCall

LEARNING = sorted(set(CALLS) - {"dense_concat"})
STATISTICS = ("mean", "var")


def learning(call: RandomCall, dtype: torch.dtype) -> tuple[RandomCall, list[torch.Tensor]]:
    """The call in ``dtype``, on leaves that require a gradient; norms' statistics require none.

    Values of few bits may meet on the kink of a ReLU, which has no gradient: they are moved a
    little.
    """
    leaves = []

    def leaf(t):
        moved = t.detach().double()
        generator = torch.Generator().manual_seed(len(leaves))
        moved = moved + 1e-3 * torch.rand(t.shape, generator=generator, dtype=torch.float64)
        leaves.append(moved.to(dtype).requires_grad_())
        return leaves[-1]

    def of(value):
        if not hasattr(value, "_fields"):
            return map_floats(leaf, value)
        parts = value._asdict()
        fixed = {k: None if parts[k] is None else parts[k].to(dtype) for k in STATISTICS}
        return type(value)(**{k: fixed[k] if k in fixed else of(v) for k, v in parts.items()})

    arguments = tuple(of(value) for value in call.arguments)
    options = {key: of(value) for key, value in call.options.items() if key != "out"}
    if isinstance(options.get("residual"), torch.Tensor) and len(leaves) % 2:
        x = arguments[0]
        if x.shape == options["residual"].shape:  # one tensor as both
            options["residual"] = x
    return RandomCall(call.op, arguments, options), leaves


def gradients(call: RandomCall, dtype: torch.dtype, backend: str) -> list:
    made, leaves = learning(call, dtype)
    results = [t for t in tensors_in(run(made, backend)) if t.requires_grad]
    return list(torch.autograd.grad(results, leaves, cotangents_of(results), allow_unused=True))


@pytest.mark.parametrize("op", LEARNING)
@given(data=st.data())
def test_random_gradients(op, data):
    call = data.draw(CALLS[op], label="call")
    backend = data.draw(st.sampled_from(("auto", "native")))
    dtype = data.draw(st.sampled_from((torch.float32, torch.float64)))
    note(f"{backend} in {dtype}")
    try:
        exact = gradients(call, torch.float64, "reference")
        actual = gradients(call, dtype, backend)
    except ValueError as error:
        assert "fit" in str(error)
        return
    except BackendError:
        assert backend != "auto"
        return
    scale = max([g.abs().max().item() for g in exact if g is not None and g.numel()], default=0.0)
    # In float32, sums cancel; beside a kink of ReLU's, a rounding moves one product.
    allowed = 1e-9 * scale + 1e-12 if dtype == torch.float64 else 1e-2 * scale + 1e-4
    for ours, truth in zip(actual, exact, strict=True):
        assert (ours is None) == (truth is None)
        if truth is not None and truth.numel():
            assert ours.shape == truth.shape and ours.dtype == dtype
            assert (ours.double() - truth).abs().max() <= allowed
