"""What `site check` calls a problem stops training, and is said wherever people predict."""

from __future__ import annotations

import json
from pathlib import Path

import pytest
import yaml
from commandline import OPEN, QUICK, done, hospitals, run


@pytest.fixture
def study(tmp_path: Path) -> Path:
    """Little hospitals."""
    return hospitals(tmp_path / "demo", patients=60)


def mistype(study: Path) -> Path:
    """Birch keeps its labs in long form: misspell one item code, so that its variable is never there."""
    birch = study.parent / "sites" / "birch.yaml"
    text = birch.read_text(encoding="utf-8")
    assert "column: CREA\n" in text
    birch.write_text(text.replace("column: CREA\n", "column: CREATI\n"), encoding="utf-8")
    return birch


def test_a_problem_stops_training_before_anything_is_written(study: Path, tmp_path: Path) -> None:
    mistype(study)
    refused = run("simulate", study, "--out", tmp_path / "run", *QUICK, *OPEN, code=6)
    assert "birch" in refused.error
    assert "CREATI" in refused.error
    assert "--continue-without" in refused.error
    assert not (tmp_path / "run").exists()


def test_more_patients_than_delta_was_made_for_stop_training_and_not_predicting(study: Path, tmp_path: Path) -> None:
    birch = study.parent / "sites" / "birch.yaml"
    text = birch.read_text(encoding="utf-8")
    done("simulate", study, "--out", tmp_path / "before", *QUICK, *OPEN)
    content = yaml.safe_load(text)
    content["patients"]["upper"] = 30
    birch.write_text(yaml.safe_dump(content), encoding="utf-8")
    refused = run("simulate", study, "--out", tmp_path / "run", *QUICK, *OPEN, code=6)
    assert "patients.upper" in refused.error
    assert not (tmp_path / "run").exists()
    predicted = done("predict", tmp_path / "before", "--site", birch, "--out", tmp_path / "birch.csv")
    assert "patients.upper" not in predicted.err


def test_the_others_go_on_without_a_site_that_has_one(study: Path, tmp_path: Path) -> None:
    mistype(study)
    done("simulate", study, "--out", tmp_path / "run", *QUICK, *OPEN, "--continue-without")
    sites = json.loads((tmp_path / "run" / "summary.json").read_text(encoding="utf-8"))["sites"]
    assert sites["birch"]["status"] == "failed"
    assert {site["status"] for name, site in sites.items() if name != "birch"} == {"ok"}


def test_predicting_goes_on_and_says_it(study: Path, tmp_path: Path) -> None:
    done("simulate", study, "--out", tmp_path / "run", *QUICK, *OPEN)
    predicted = done("predict", tmp_path / "run", "--site", mistype(study), "--out", tmp_path / "birch.csv")
    assert any(line.startswith("problem: ") and "CREATI" in line for line in predicted.err.splitlines())
