"""Fixtures of several test files."""

import os
from pathlib import Path

import pytest


@pytest.fixture(scope="session")
def real_data() -> Path:
    """The folder of real data sets; without it the test is skipped, except in CI, where that is a failure."""
    folder = os.environ.get("GAPWEAVE_DATA")
    if folder:
        return Path(folder)
    if os.environ.get("CI"):
        pytest.fail("GAPWEAVE_DATA is not set: CI must run the tests on real data")
    pytest.skip("GAPWEAVE_DATA is not set: no real data sets here")
