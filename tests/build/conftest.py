"""Fixtures of the tests that build the package."""

import pytest

from tests.support.source_builds import copy_of_the_sources, skip_without_compiler


@pytest.fixture
def source(tmp_path):
    return copy_of_the_sources(tmp_path / "source")


@pytest.fixture(scope="session")
def tools():
    """Skips what compiles, where nothing can be compiled."""
    skip_without_compiler()
