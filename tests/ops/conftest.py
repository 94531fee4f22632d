"""Which implementation runs: tests that take ``device`` run there, the others on CPU."""

import pytest

from cvkernels import extension


def skip_without_native(request):
    device = request.getfixturevalue("device").type if "device" in request.fixturenames else "cpu"
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
