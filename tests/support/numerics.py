"""The one tolerance rule: twice stock PyTorch's error against float64, plus one rounding."""

import copy

import torch
from torch import Tensor, nn

from cvkernels.verify import rounding


def max_error(actual: Tensor, exact: Tensor) -> float:
    """Largest absolute difference in float64; NaN where only one side has one."""
    actual, exact = (t.detach().double().to(exact.device) for t in (actual, exact))
    difference = (actual - exact).abs()
    # Equal infinities differ by NaN, and a NaN that the exact answer has too is right.
    same = (actual == exact) | (actual.isnan() & exact.isnan())
    return torch.where(same, torch.zeros_like(difference), difference).max().item()


def assert_close_as_eager(
    actual: Tensor, eager: Tensor, exact: Tensor, factor: float = 2.0, slack: float = 0.0
) -> None:
    """actual is about as close to the float64 answer as stock PyTorch is in actual's dtype; by
    ``slack`` it may be further away."""
    assert (actual.shape, actual.dtype) == (eager.shape, eager.dtype)
    if exact.numel() == 0:
        return
    finite = exact[exact.isfinite()]
    largest = finite.abs().max().item() if finite.numel() else 0.0
    allowed = factor * max_error(eager, exact) + rounding(actual) * largest + slack
    error = max_error(actual, exact)
    assert error <= allowed, f"max error {error:.3e}, allowed {allowed:.3e}"


def map_floats(function, value):
    """value with function applied to every floating tensor in it; tuples may be named tuples."""
    if isinstance(value, Tensor):
        return function(value) if value.is_floating_point() else value
    if isinstance(value, tuple):
        parts = [map_floats(function, part) for part in value]
        return type(value)(*parts) if hasattr(value, "_fields") else tuple(parts)
    if isinstance(value, dict):
        return {key: map_floats(function, part) for key, part in value.items()}
    return value


def tensors_in(value) -> list[Tensor]:
    if isinstance(value, Tensor):
        return [value]
    if isinstance(value, (tuple, list)):
        return [tensor for part in value for tensor in tensors_in(part)]
    if isinstance(value, dict):
        return tensors_in(list(value.values()))
    return []


def assert_all_close_as_eager(actual, eager, exact, factor: float = 2.0) -> None:
    """The rule for each of several results; those that are None are no results."""
    triples = zip(tensors_in(actual), tensors_in(eager), tensors_in(exact), strict=True)
    for ours, theirs, truth in triples:
        assert_close_as_eager(ours, theirs, truth, factor)


def assert_matches(op, reference, args, kwargs=None, factor: float = 2.0) -> None:
    """op(*args) against reference(*args) in the same dtype and in float64."""
    kwargs = kwargs or {}
    exact = reference(*map_floats(Tensor.double, args), **map_floats(Tensor.double, kwargs))
    actual, eager = op(*args, **kwargs), reference(*args, **kwargs)
    assert_all_close_as_eager(actual, eager, exact, factor)


def assert_same_numbers(actual: Tensor, expected: Tensor) -> None:
    """Equal, and NaN in the same places."""
    torch.testing.assert_close(actual, expected, rtol=0, atol=0, equal_nan=True)


def cotangents_of(results) -> list[Tensor]:
    """Random numbers for each tensor of ``results``, the same in each call."""
    generator = torch.Generator().manual_seed(1)
    return [
        torch.randn(t.shape, generator=generator, dtype=torch.float64).to(t)
        for t in tensors_in(results)
    ]


def gradients(function, args, kwargs=None) -> list[Tensor]:
    """Gradients of <function(*args), fixed cotangent> in every tensor that requires one."""
    results = tensors_in(function(*args, **(kwargs or {})))
    inputs = [t for t in tensors_in([args, kwargs]) if t.requires_grad]
    return list(torch.autograd.grad(results, inputs, cotangents_of(results)))


def assert_matches_grad(op, reference, args, kwargs=None, factor: float = 2.0) -> None:
    """Gradients of op against those of reference in the same dtype and in float64."""
    kwargs = kwargs or {}

    def leaf(tensor):
        return tensor.detach().requires_grad_(tensor.requires_grad)

    def double_leaf(tensor):
        return tensor.detach().double().requires_grad_(tensor.requires_grad)

    exact = gradients(reference, map_floats(double_leaf, args), map_floats(double_leaf, kwargs))
    eager = gradients(reference, map_floats(leaf, args), map_floats(leaf, kwargs))
    actual = gradients(op, map_floats(leaf, args), map_floats(leaf, kwargs))
    assert_all_close_as_eager(actual, eager, exact, factor)


def run_with_input_grad(model: nn.Module, x: Tensor) -> tuple[Tensor, Tensor]:
    """The output, and the gradient of <output, fixed cotangent> in the input."""
    x = x.detach().requires_grad_()
    out = model(x)
    (grad,) = torch.autograd.grad(out, x, cotangents_of(out))
    return out.detach(), grad


def assert_matches_module(
    ours: nn.Module, stock: nn.Module, x: Tensor, grad: bool = True, factor: float = 2.0
) -> None:
    """ours(x) and its input gradient against stock, and against a float64 copy of stock.

    Stock's error is the larger of its two memory layouts': by the few outputs of a network, one
    alone may seem all but exact. Each run starts from the same random state, so that dropout draws
    the same numbers.
    """

    def run(model: nn.Module, image: Tensor) -> tuple[Tensor, ...]:
        torch.manual_seed(2)
        if grad:
            return run_with_input_grad(model, image)
        with torch.no_grad():
            return (model(image),)

    exact_model, other = copy.deepcopy(stock).double(), copy.deepcopy(stock)
    actual, eager, exact = run(ours, x), run(stock, x), run(exact_model, x.double())
    for place, truth in enumerate(exact):
        try:
            assert_close_as_eager(actual[place], eager[place], truth, factor)
        except AssertionError:
            again = run(*_in_other_layout(other, x))[place]
            assert_close_as_eager(actual[place], again, truth, factor)


def _in_other_layout(model: nn.Module, x: Tensor) -> tuple[nn.Module, Tensor]:
    nhwc = x.is_contiguous(memory_format=torch.channels_last)
    layout = torch.contiguous_format if nhwc else torch.channels_last
    return model.to(memory_format=layout), x.contiguous(memory_format=layout)
