"""A fork server for `kills.py` and `served.py`: what takes long, imports and data, is done once for many processes."""

from __future__ import annotations

import atexit
import json
import os
import shutil
import subprocess
import sys
import tempfile
from functools import cache
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
        program = [sys.executable, str(Path(__file__)), str(folder)]
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
        """One process of a job, as `kills.perform` and `served.serve` describe."""
        assert self._process.stdin is not None
        self._process.stdin.write(json.dumps({"name": job, **how}) + "\n")
        self._process.stdin.flush()
        return self._answer()

    def close(self) -> None:
        self._process.communicate(timeout=60)


@cache
def fork_server() -> Server:
    """The fork server of this process, which is started once."""
    folder = Path(tempfile.mkdtemp(prefix="gapweave-forks-"))
    running = Server(folder / "jobs")

    def end() -> None:
        running.close()
        shutil.rmtree(folder)

    atexit.register(end)
    return running


def main(folder: Path) -> None:
    """Answer jobs, one a line, until the input ends."""
    from kills import Federation, perform
    from served import serve

    federation = Federation(folder)
    federation.patch()
    federation.work("first")  # imports what only a run needs, and plans the noise
    print(json.dumps({"ready": True}), flush=True)
    for line in sys.stdin:
        job = json.loads(line)
        print(json.dumps((serve if "broken" in job else perform)(federation, job)), flush=True)


if __name__ == "__main__":
    main(Path(sys.argv[1]))
