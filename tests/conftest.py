"""Fixtures of all tests. Without a GPU, Triton kernels run in its interpreter on CPU tensors."""

import os

import torch

if not torch.cuda.is_available():
    # Triton reads it when it is first imported.
    os.environ["TRITON_INTERPRET"] = "1"

import pytest

from tests.support import tiers

RANDOM_CALLS = 60  # of each random test, where no other number is asked for


def pytest_addoption(parser):
    parser.addoption("--full", action="store_true", help="all tests, not only the default tier")
    parser.addoption(
        "--fuzz",
        type=int,
        default=RANDOM_CALLS,
        help="random calls of each fuzzed test; more networks are drawn as well",
    )
    parser.addoption(
        "--tsan", action="store_true", help="build and run the CPU ops under ThreadSanitizer, too"
    )


def pytest_generate_tests(metafunc):
    """``tens``: which ten random networks a test is of, so many tens as the test's marker says."""
    if "tens" not in metafunc.fixturenames:
        return
    asked = metafunc.config.getoption("--fuzz")
    (count,) = metafunc.definition.get_closest_marker("tens_of_networks").args
    metafunc.parametrize("tens", range(max(count, count * asked // RANDOM_CALLS)))


def pytest_configure(config):
    """Random tests draw the same in each run, but where more are asked for."""
    try:
        import hypothesis
    except ImportError:  # a machine that runs other tests, as first_light does
        return
    count = config.getoption("--fuzz")
    hypothesis.settings.register_profile(
        "cvkernels", max_examples=count, derandomize=count <= RANDOM_CALLS, deadline=None,
        database=None, suppress_health_check=list(hypothesis.HealthCheck), print_blob=True,
    )  # fmt: skip
    hypothesis.settings.load_profile("cvkernels")


@pytest.hookimpl(tryfirst=True)
def pytest_cmdline_main(config):
    tiers.use_all_cores(config)


def pytest_collection_modifyitems(config, items):
    if not torch.cuda.is_available():
        for item in items:
            if item.get_closest_marker("gpu"):
                item.add_marker(pytest.mark.skip(reason="needs a CUDA device"))
    if not any("::" in argument for argument in config.args):
        deselect(config, items, tiers.beyond_pairs(items))
        if not config.getoption("full"):
            deselect(config, items, tiers.left_out(items))
    items[:] = tiers.longest_first(items)


def deselect(config, items, out):
    if out:
        config.hook.pytest_deselected(items=[item for item in items if item in out])
        items[:] = [item for item in items if item not in out]


@pytest.fixture(scope="session")
def device():
    return torch.device("cuda" if torch.cuda.is_available() else "cpu")


@pytest.fixture(params=[torch.contiguous_format, torch.channels_last], ids=["nchw", "nhwc"])
def memory_format(request):
    return request.param


@pytest.fixture(autouse=True)
def poisoned_memory():
    """torch.empty* returns NaN, so an output that a kernel forgot to write fails the test."""
    torch.use_deterministic_algorithms(True, warn_only=True)
    yield
    torch.use_deterministic_algorithms(False)


@pytest.fixture(autouse=True)
def seeded():
    torch.manual_seed(0)


@pytest.fixture(autouse=True)
def ieee_float32():
    """The eager side of a comparison must not carry TF32's error."""
    allowed = torch.backends.cudnn.allow_tf32
    torch.backends.cudnn.allow_tf32 = False
    yield
    torch.backends.cudnn.allow_tf32 = allowed
