"""Which implementation runs: tests that take ``device`` run there, the others on CPU."""

import pytest
import torch

from cvkernels import backend, extension


def skip_without_native(request, device=None):
    if device is None:
        on_device = "device" in request.fixturenames
        device = request.getfixturevalue("device").type if on_device else "cpu"
    if not extension.has(device):
        pytest.skip(extension.status()[device].reason)


@pytest.fixture(params=["native", "reference"])
def implementation(request):
    if request.param == "native":
        skip_without_native(request)
    return request.param


@pytest.fixture
def native(request):
    skip_without_native(request)


@pytest.fixture
def where(request, device):
    """Where the tensors of a call are, whose op the backend of the parameter runs.

    What is native runs on the CPU, and so does Triton's interpreter without a GPU.
    """
    if request.param == "native":
        skip_without_native(request, "cpu")
    if request.param == "triton":
        pytest.importorskip("triton")
    with backend.use(request.param):
        yield device if request.param == "triton" else torch.device("cpu")
