"""The benchmarks run, in little, and what they print is what they promise."""

from __future__ import annotations

import json
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest

pytestmark = [pytest.mark.long, pytest.mark.measures]
FOLDER = Path(__file__).parent.parent / "benchmarks"


def printed(name: str, *words: str) -> str:
    command = [sys.executable, str(FOLDER / f"{name}.py"), *words]
    return subprocess.run(command, check=True, capture_output=True, text=True).stdout


def lines(name: str, *words: str) -> list[dict[str, Any]]:
    return [json.loads(line) for line in printed(name, *words).splitlines()]


def test_the_inline_engine_gives_the_model_of_a_plain_loop() -> None:
    found = lines("simulation", "--sites", "2,4", "--repeats", "1", "--ray", "4")
    assert [(line["sites"], line["engine"]) for line in found] == [
        *((2, engine) for engine in ("floor", "inline")),
        *((4, engine) for engine in ("floor", "inline", "ray")),
    ]
    keys = {"sites", "engine", "s_round", "x_floor", "wall_s", "start_s", "mb", "mb_per_site", "max_diff"}
    assert all(line.keys() == keys for line in found)
    assert all(line["max_diff"] <= 1e-5 for line in found)
    assert len((FOLDER / "floor.py").read_text(encoding="utf-8").splitlines()) <= 80


def test_rules_take_little_memory_beyond_the_updates() -> None:
    found = [line for line in lines("aggregation", "--smoke", "--repeats", "1") if "skipped" not in line]
    assert {line["rule"] for line in found} == {
        *("mean", "median", "trimmed_mean", "multi_krum", "geometric_median", "nnm+trimmed_mean"),
    }
    assert all(line["mb"] <= 5 for line in found)


def test_the_attack_bench_writes_its_page_and_goes_on(tmp_path: Path) -> None:
    words = ("--smoke", "--panels", "one,mean", "--out", str(tmp_path))
    first = printed("attacks", *words)
    page = (tmp_path / "attacks.md").read_text(encoding="utf-8")
    assert "`sign_flip`" in page
    assert (tmp_path / "attacks.svg").exists()
    cells = {file: file.stat().st_mtime_ns for file in tmp_path.rglob("rows.json")}
    assert cells
    assert printed("attacks", *words) == first
    assert {file: file.stat().st_mtime_ns for file in tmp_path.rglob("rows.json")} == cells, "nothing was run again"


def test_private_runs_of_the_attack_bench_draw_the_same_noise(tmp_path: Path) -> None:
    """Else their pairs would differ by luck: two runs of the bench, in places of their own, print the same figures."""
    pages = [printed("attacks", "--smoke", "--panels", "one-private", "--out", str(tmp_path / name)) for name in "ab"]
    assert "`sign_flip`" in pages[0]
    assert pages[0].splitlines()[-5:] == pages[1].splitlines()[-5:]
    rows = [(tmp_path / name / "one-private" / "results.json").read_text(encoding="utf-8") for name in "ab"]
    scores = [[row["metrics"] for row in json.loads(text)] for text in rows]
    assert scores[0] == scores[1]


def test_the_joining_bench_writes_its_section_and_goes_on(tmp_path: Path) -> None:
    words = ("--smoke", "--panels", "planted-200,honest-200,infarction,infarction-private", "--out", str(tmp_path))
    first = printed("results", *words)
    page = (tmp_path / "results.md").read_text(encoding="utf-8")
    assert "<!-- joining -->" in page
    for title in (
        "### Death within a year of an infarction",
        "- Epsilon 8: federated is",
        "- Epsilon 8, foretold from the sites' sizes: joining can be expected to help",
        "useless: ",
        "tiny: federated: too few",
        "The others lose",
    ):
        assert title in page, title
    cells = {file: file.stat().st_mtime_ns for file in tmp_path.rglob("rows.json")}
    assert len(cells) == 10, "two panels of two folds, one of two, one of two budgets"
    assert printed("results", *words) == first
    assert {file: file.stat().st_mtime_ns for file in tmp_path.rglob("rows.json")} == cells, "nothing was run again"


def test_the_methods_bench_writes_its_section_its_plots_and_goes_on(tmp_path: Path) -> None:
    words = ("--smoke", "--panels", "demo,demo-missing", "--out", str(tmp_path))
    first = printed("methods", *words)
    page = (tmp_path / "results.md").read_text(encoding="utf-8")
    for title in ("<!-- methods -->", "| `concat` |", "% hidden", "| `dwfuse` | labs |"):
        assert title in page, title
    for plot in ("missing", "similarity", "projection", "weights"):
        assert (tmp_path / f"results-{plot}-demo.svg").stat().st_size > 2000, plot
    assert json.loads((tmp_path / "methods.json").read_text(encoding="utf-8")).keys() == {"late", "concat"}
    assert printed("methods", *words) == first
