"""Freezing, calling and training over and over holds no more memory in the end."""

import copy
import math

import pytest
import torch

import cvkernels
from cvkernels.memory_use import resident_memory
from tests.support.five_families import FiveFamilies
from tests.support.pairs import calibrate, image

CPU = torch.device("cpu")
WARM_UP = 20
# Bytes after all calls. An arena more after each of 40 makes 25 MB, the rest of a plan 10 MB.
GROWTH = 4 << 20
COUNTS = [40, pytest.param(1000, marks=pytest.mark.full)]

pytestmark = pytest.mark.skipif(math.isnan(resident_memory(CPU)), reason="nothing tells memory")


def growth(function, count: int) -> float:
    """How much more memory is resident after ``count`` calls of the function than before."""
    for _ in range(WARM_UP):
        function()
    before = resident_memory(CPU)
    for _ in range(count):
        function()
    return resident_memory(CPU) - before


def network() -> FiveFamilies:
    model = FiveFamilies()
    calibrate(model, image(4, 12))
    return model.eval()


@pytest.mark.parametrize("count", COUNTS)
def test_frozen_models_that_are_dropped_leave_nothing(count):
    model, x = network(), torch.randn(1, 3, 64, 64)
    assert growth(lambda: cvkernels.freeze(model, x)(x), count) < GROWTH


@pytest.mark.parametrize("count", COUNTS)
def test_plans_that_make_room_for_others_leave_nothing(count):
    frozen = cvkernels.freeze(network(), torch.randn(1, 3, 64, 64))
    sizes = iter(range(10**6))

    def call():
        frozen(torch.randn(1, 3, 64, 48 + 2 * (next(sizes) % 12)))

    assert growth(call, count) < GROWTH


@pytest.mark.parametrize("count", COUNTS)
def test_live_networks_that_are_dropped_leave_nothing(count):
    model, x = network(), torch.randn(1, 3, 64, 64)

    @torch.no_grad()
    def call():
        twin = copy.deepcopy(model)
        twin(x), twin(x)

    assert growth(call, count) < GROWTH


@pytest.mark.parametrize("count", COUNTS)
def test_training_steps_leave_nothing(count):
    model, x = network().train(), torch.randn(4, 3, 32, 32)
    optimiser = torch.optim.SGD(model.parameters(), 1e-3)

    def step():
        optimiser.zero_grad()
        model(x).square().mean().backward()
        optimiser.step()

    assert growth(step, count) < GROWTH
