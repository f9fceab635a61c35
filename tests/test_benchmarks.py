"""The benchmarks run and print what they promise; the figures themselves are for a quiet machine."""

from __future__ import annotations

import json
import subprocess
import sys
from pathlib import Path

import pytest

ROOT = Path(__file__).parents[1]


@pytest.mark.long
def test_the_cost_of_a_private_step() -> None:
    done = subprocess.run(
        [sys.executable, "benchmarks/privacy.py", "--smoke"], cwd=ROOT, capture_output=True, text=True, check=True
    )
    cells = [json.loads(line) for line in done.stdout.splitlines()]
    assert [(cell["model"], cell["batch"]) for cell in cells] == [("gru", 32), ("attention", 32), ("cnn", 8)]
    for cell in cells:
        assert 0 < cell["fast"] <= cell["fast_with_noise"] * 1.5
        assert cell["opacus"] == "refused" or cell["opacus"] > cell["fast"], "Opacus is the slower of the two"
