"""A method that falls behind `late` on the demo gets a remark in docs/methods.md, from a comparison's results."""

from __future__ import annotations

import importlib.util
import json
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest

from gapweave.shared import catalogue
from gapweave.shared.errors import UsageError

FILE = Path(__file__).parent.parent / "benchmarks" / "methods_measured.py"


def module() -> Any:
    spec = importlib.util.spec_from_file_location("methods_measured", FILE)
    loaded = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(loaded)
    return loaded


def row(method: str, auroc: float | None, seed: int = 0, site: str = "a", rate: float = 0, model: str = "federated"):
    cell = {"method": method, "missing_rate": rate}
    return {"cell": cell, "model": model, "seed": seed, "site": site, "metrics": {"auroc": auroc}}


ROWS = [
    row("late", 0.80), row("late", 0.70, seed=1), row("late", 0.90, site="b"), row("late", 0.50, rate=0.5),
    row("late", 0.10, model="lr_local"),
    row("concat", 0.75), row("concat", 0.65, seed=1), row("concat", None, site="b"), row("concat", 0.99, rate=0.5),
    row("gated", 0.78), row("gated", 0.67, seed=1), row("gated", 0.86, site="b"),
    row("mean", 0.78), row("mean", 0.68, seed=1), row("mean", 0.86, site="b"),
]  # fmt: skip


def test_differences_are_paired_and_only_what_was_measured_counts() -> None:
    found = module().measured(ROWS)
    assert found == {
        # Site b has no score of concat: its .90 does not count against it.
        "concat": {"auroc": 0.7, "difference": -0.05, "seeds": 2, "sites": 1},
        "gated": {"auroc": 0.77, "difference": -0.03, "seeds": 2, "sites": 2},
        "late": {"auroc": 0.8, "difference": 0.0, "seeds": 2, "sites": 2},
        "mean": {"auroc": 0.7733, "difference": -0.0267, "seeds": 2, "sites": 2},
    }


def test_the_page_names_who_is_behind_and_who_was_not_measured(tmp_path: Path) -> None:
    results = tmp_path / "results.json"
    results.write_text(json.dumps(ROWS), encoding="utf-8")
    command = [sys.executable, str(FILE), str(results), "--out", str(tmp_path / catalogue.MEASURED)]
    subprocess.run(command, check=True, timeout=120)
    page = catalogue.markdown(catalogue.read_measured(tmp_path))
    presets = page[page.index("## Presets") :].splitlines()
    remarks = {line.split("`")[1]: line.split(" | ")[2].strip(" |") for line in presets if line.startswith("| `")}
    said = "0.050 AUROC below `late` (0.700 against 0.750, 1 sites, 2 seeds, nothing missing)"
    assert remarks["concat"] == said
    assert remarks["mean"] == remarks["late"] == remarks["gated"] == ""
    assert remarks["qmf"] == "not measured"
    assert remarks.keys() == catalogue.METHODS.keys()


@pytest.mark.parametrize(
    ("rows", "text"),
    [
        ([row("concat", 0.7)], "no row of late"),
        ([row("late", 0.7, rate=0.5)], "no row of late"),
        ([row("late", 0.7), row("magic", 0.7)], "no method 'magic'"),
        ([row("late", 0.7), row("mean", 0.7, seed=1)], "no site and seed in common"),
    ],
)
def test_results_that_do_not_fit_are_refused(rows: list[dict[str, Any]], text: str) -> None:
    with pytest.raises(UsageError, match=text) as caught:
        module().measured(rows)
    assert caught.value.remedy
