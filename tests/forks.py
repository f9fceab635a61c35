"""The fork server of `kills.py`, for several test files."""

from __future__ import annotations

import json
import os
import shutil
import subprocess
import sys
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import pytest


def require_strace() -> None:
    """Skip where there is no strace, except in CI, where that is a failure."""
    if shutil.which("strace") is None:
        assert not os.environ.get("CI"), "CI must have strace (packages.txt)"
        pytest.skip("there is no strace")


class Server:
    """The fork server, in a process of its own."""

    def __init__(self, folder: Path) -> None:
        folder.mkdir()
        self.folder = folder
        program = [sys.executable, str(Path(__file__).with_name("kills.py")), str(folder)]
        inherited = {name: value for name, value in os.environ.items() if not name.startswith("COVERAGE_")}
        self._process = subprocess.Popen(
            program,
            stdin=subprocess.PIPE,
            stdout=subprocess.PIPE,
            stderr=subprocess.DEVNULL,
            text=True,
            # Neither torch's threads nor a GPU's context outlive a fork.
            env={**inherited, "OMP_NUM_THREADS": "1", "CUDA_VISIBLE_DEVICES": ""},
        )
        self._answer()

    def _answer(self) -> dict[str, Any]:
        assert self._process.stdout is not None
        line = self._process.stdout.readline()
        assert line, "the fork server ended"
        answer: dict[str, Any] = json.loads(line)
        return answer

    def perform(self, job: str, **how: Any) -> dict[str, Any]:
        """One process of a job, as `kills.perform` and `kills.serve` describe."""
        assert self._process.stdin is not None
        self._process.stdin.write(json.dumps({"name": job, **how}) + "\n")
        self._process.stdin.flush()
        return self._answer()

    def close(self) -> None:
        self._process.communicate(timeout=60)


@contextmanager
def fork_server(folder: Path) -> Iterator[Server]:
    """A fork server in a new folder."""
    require_strace()
    running = Server(folder)
    try:
        yield running
    finally:
        running.close()
