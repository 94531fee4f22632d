"""A clock that calls move, and cases of a toy op, for the tests of the benchmarks."""

import torch

from benchmarks.harness.case import Case
from benchmarks.harness.machine import Settings

CPU = torch.device("cpu")
FEW = Settings(rounds=6, seconds=60.0, least=6)


class FakeClock:
    """A clock that calls move; reading it takes next to no time, but some."""

    def __init__(self):
        self.now = 0.0

    def __call__(self):
        self.now += 1e-15
        return self.now

    def spending(self, *seconds):
        """A call that takes these seconds in turn, over and over."""
        calls = iter(())

        def call(*args, **kwargs):
            nonlocal calls
            spent = next(calls, None)
            if spent is None:
                calls = iter(seconds)
                spent = next(calls)
            self.now += spent
            return args[0] if args else None

        return call


def doubled(x):
    return x * 2


def make_case(variants, name="double", inputs=None, **options):
    options = {"bytes": 1000, "flops": 10**6, **options}
    return Case(
        op="double",
        name=name,
        shape="4x4",
        dtype=torch.float32,
        inputs=inputs or (lambda: ((torch.randn(4, 4),), {})),
        reference=doubled,
        variants={key: (lambda function=function: function) for key, function in variants.items()},
        **options,
    )


def slow(clock, *seconds):
    """``doubled`` that takes these seconds in turn, when the harness times it."""
    spend = clock.spending(*seconds)

    def call(x):
        spend()
        return x * 2

    return call
