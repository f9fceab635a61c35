"""The example studies on real data, end to end and private, through the command line."""

from __future__ import annotations

import json
import re
import time
from pathlib import Path
from typing import Any

import pytest
from dicoms import as_dicom

from gapweave.shared.cli import _run

ROOT = Path(__file__).parents[1]
# Eligible ICU stays by group of hospitals, from the data set's README.
EICU_STAYS = {
    "midwest_noresp": 168,
    "midwest_resp_inf": 252,
    "midwest_resp_noinf": 88,
    "northeast": 103,
    "south_noresp": 229,
    "south_resp_inf": 175,
    "south_resp_noinf": 99,
    "unknown_region": 136,
    "west_other": 107,
    "west_resp_inf": 250,
}
COVID_RECORDS = {"eurorad": 71, "hannover_mhh": 92, "journals_other": 117, "radiopaedia": 48, "sirm_italy": 21}
HEART_PATIENTS = {"cleveland": 303, "hungarian": 294, "long_beach_va": 200, "switzerland": 123}

pytestmark = [pytest.mark.data, pytest.mark.long]


def simulate(name: str, data: Path, out: Path, *options: str) -> dict[str, Any]:
    study = ROOT / "sites" / name / "study.yaml"
    assert _run(["simulate", str(study), "--data", str(data), "--out", str(out), *options], debug=True) == 0
    content: dict[str, Any] = json.loads((out / "summary.json").read_text())
    return content


def counted(summary: dict[str, Any], what: str) -> dict[str, int]:
    return {name: row[what]["train"] + row[what]["test"] for name, row in summary["sites"].items()}


def assert_private(summary: dict[str, Any]) -> None:
    for row in summary["sites"].values():
        assert row["status"] == "ok"
        assert 0 < row["privacy"]["epsilon"] <= row["privacy"]["cap"]
        assert row["privacy"]["unit"] == "patient"


def test_ten_groups_of_hospitals_with_eight_kinds_of_data(real_data: Path, tmp_path: Path) -> None:
    summary = simulate("eicu_demo", real_data, tmp_path / "run")
    assert counted(summary, "records") == EICU_STAYS
    assert_private(summary)
    held = [set(row["modalities"]) for row in summary["sites"].values()]
    assert len(set.union(*held)) >= 7
    assert any(one != other for one in held for other in held), "hospitals hold different kinds of data"
    assert summary["mean"]["auroc"] > 0.55


def test_four_hospitals_with_blocks_of_columns(real_data: Path, tmp_path: Path) -> None:
    summary = simulate("heart_disease", real_data, tmp_path / "run", "--baselines", "local,lr")
    assert counted(summary, "patients") == HEART_PATIENTS
    assert_private(summary)
    blocks = {"clinical", "vitals_labs", "exercise_ecg", "imaging"}
    assert all(set(row["modalities"]) == blocks for row in summary["sites"].values())
    assert summary["mean"]["auroc"] > 0.65
    assert all(row["local_only"]["brier"] is not None for row in summary["sites"].values())


def test_five_contributors_of_images_values_and_notes(real_data: Path, tmp_path: Path) -> None:
    """Well under 5 minutes on two cores; the data are too few for a bound on the result (six test patients a site)."""
    start = time.monotonic()
    summary = simulate("covid_cxr", real_data, tmp_path / "run")
    assert time.monotonic() - start < 300
    assert counted(summary, "records") == COVID_RECORDS
    assert_private(summary)
    lacking = {
        name: {"clinical", "labs", "cxr", "note"} - set(row["modalities"]) for name, row in summary["sites"].items()
    }
    assert {name: held for name, held in lacking.items() if held} == {"sirm_italy": {"cxr"}, "hannover_mhh": {"note"}}


def test_x_rays_as_dicom_give_the_same_model(real_data: Path, tmp_path: Path) -> None:
    table = (real_data / "covid_cxr" / "covid_cxr.csv").read_text(encoding="utf-8")
    data = tmp_path / "data"
    as_dicom(real_data / "covid_cxr" / "images", data / "covid_cxr" / "images")
    table = re.sub(r"\b(cxr_\d+)\.png\b", r"\1.dcm", table)
    (data / "covid_cxr" / "covid_cxr.csv").write_text(table, encoding="utf-8")
    options = ("--set", "privacy.enabled=false", "--rounds", "3")
    png = simulate("covid_cxr", real_data, tmp_path / "png", *options)
    dicom = simulate("covid_cxr", data, tmp_path / "dicom", *options)
    assert {name: row["metrics"] for name, row in png["sites"].items()} == {
        name: row["metrics"] for name, row in dicom["sites"].items()
    }
    assert "cxr" in png["sites"]["eurorad"]["modalities"]
    models = [sorted((tmp_path / kind / "model").glob("*.safetensors")) for kind in ("png", "dicom")]
    assert models[0]
    assert [file.read_bytes() for file in models[0]] == [file.read_bytes() for file in models[1]]
