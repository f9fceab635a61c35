"""What `site check` calls a problem is said wherever people train or predict, not only to those who asked."""

from __future__ import annotations

import json
from pathlib import Path

import pytest
from commandline import OPEN, QUICK, done, hospitals


@pytest.fixture
def mistyped(tmp_path: Path) -> Path:
    """Birch keeps its labs in long form; one item code is misspelt, so its variable is never there."""
    study = hospitals(tmp_path / "demo", patients=60)
    birch = study.parent / "sites" / "birch.yaml"
    text = birch.read_text(encoding="utf-8")
    assert "column: CREA\n" in text
    birch.write_text(text.replace("column: CREA\n", "column: CREATI\n"), encoding="utf-8")
    return study


def test_training_and_predicting_say_that_an_item_is_nowhere(mistyped: Path, tmp_path: Path) -> None:
    run, birch = tmp_path / "run", mistyped.parent / "sites" / "birch.yaml"
    trained = done("simulate", mistyped, "--out", run, *QUICK, *OPEN)
    said = [line for line in trained.err.splitlines() if "CREATI" in line]
    assert len(said) == 1
    assert said[0].startswith("problem: birch: ")
    summary = json.loads((run / "summary.json").read_text(encoding="utf-8"))
    assert any("CREATI" in text for text in summary["sites"]["birch"]["warnings"])
    assert not any("CREATI" in text for text in summary["sites"]["alder"]["warnings"])
    predicted = done("predict", run, "--site", birch, "--out", tmp_path / "birch.csv")
    assert any(line.startswith("problem: ") and "CREATI" in line for line in predicted.err.splitlines())
