"""Fixtures of several test files."""

import os
from collections.abc import Iterator
from pathlib import Path

# Before torch is imported: a fork waits for ever for the OpenMP threads of the process that it is a copy of.
os.environ.setdefault("OMP_NUM_THREADS", "1")

import pytest
from databases import Postgres, running_postgres
from forks import Server, fork_server, require_strace


@pytest.fixture(scope="session")
def real_data() -> Path:
    """The folder of real data sets; without it the test is skipped, except in CI, where that is a failure."""
    folder = os.environ.get("GAPWEAVE_DATA")
    if folder:
        return Path(folder)
    if os.environ.get("CI"):
        pytest.fail("GAPWEAVE_DATA is not set: CI must run the tests on real data")
    pytest.skip("GAPWEAVE_DATA is not set: no real data sets here")


@pytest.fixture(scope="session")
def postgres() -> Iterator[Postgres]:
    """A PostgreSQL cluster of this test run."""
    with running_postgres() as cluster:
        yield cluster


@pytest.fixture(scope="module")
def server() -> Server:
    """Forks of a process that has everything imported and read, under strace."""
    require_strace()
    return fork_server()


@pytest.fixture
def fresh_sites() -> Iterator[None]:
    """The client app keeps participants by file; with this, every test has its own."""
    from gapweave.client import app

    app.forget()
    yield
    app.forget()
