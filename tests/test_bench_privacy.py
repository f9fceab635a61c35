"""The benchmark of a private step prints what it promises, and the costs that were promised hold."""

from __future__ import annotations

import json
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest

ROOT = Path(__file__).parents[1]
RATIOS = ["fast", "fast_with_noise", "opacus", "ghost", "vmap"]
SHARES = ["forward_backward", "norms", "noise", "update"]
MEMORY = [f"mb_{name}" for name in ["plain", *RATIOS]]
MARGIN = 1.25
"""A machine that does other things at the same time is off by up to a quarter."""


def bench(*options: str) -> list[dict[str, Any]]:
    command = [sys.executable, "benchmarks/privacy.py", *options]
    done = subprocess.run(command, cwd=ROOT, capture_output=True, text=True, check=True)
    return [json.loads(line) for line in done.stdout.splitlines()]


@pytest.mark.long
def test_each_cell_is_a_line_with_every_engine() -> None:
    (cell,) = bench("--smoke")
    assert list(cell) == ["model", "batch", "plain_ms", *RATIOS, *SHARES, *MEMORY]
    assert (cell["model"], cell["batch"]) == ("cnn", 2)
    assert cell["plain_ms"] > 0
    for name in [*RATIOS, *MEMORY]:
        assert cell[name] in ("refused", "oom") or cell[name] > 0, name
    assert cell["ghost"] == "refused", "Opacus' ghost norms want an Embedding's indices in one piece of memory"
    for name in ["fast", "fast_with_noise", "opacus", "vmap", *SHARES, "mb_plain", "mb_fast"]:
        assert isinstance(cell[name], float), name


@pytest.mark.long
@pytest.mark.measures
@pytest.mark.parametrize(
    ("cell", "fast", "complete"),
    [("gru:32", 1.45, 1.9), ("gru:256", 1.35, 1.5), ("attention:128", 1.35, 1.5), ("cnn:16", 1.45, 1.9)],
)
def test_a_private_step_costs_what_was_promised(cell: str, fast: float, complete: float) -> None:
    """Targets over a plain step, without and with noise, for each model; memory at most 2.5 times.

    In one of three runs: four of one cell in a row had 1.43 to 1.82 for the same code, where memory was busy elsewhere.
    """
    for _ in range(3):
        (line,) = bench("--only", cell)
        if line["fast"] <= fast * MARGIN and line["fast_with_noise"] <= complete * MARGIN:
            break
    assert line["fast"] <= fast * MARGIN
    assert line["fast_with_noise"] <= complete * MARGIN
    assert line["mb_fast"] <= 2.5 * line["mb_plain"]
    for name in ("opacus", "ghost", "vmap"):
        assert line[name] in ("refused", "oom") or line[name] > line["fast"], name
