"""The shipped site files over the real data sets, whose README files say what must come out."""

from __future__ import annotations

import os
import re
import time
from pathlib import Path

import pytest

from gapweave.client.checks import check_site
from gapweave.client.data import load_cohort
from gapweave.shared.config import load_site, load_study

pytestmark = pytest.mark.data

EXAMPLES = Path(__file__).parent.parent / "sites"
HEART = ["cleveland", "hungarian", "long_beach_va", "switzerland"]
EICU = sorted(path.stem for path in (EXAMPLES / "eicu_demo" / "sites").glob("*.yaml"))
AVAILABILITY = ["labs", "ts_bp", "ts_resp", "ts_io", "ts_infusion", "ts_exam", "note"]


@pytest.fixture
def data() -> Path:
    folder = os.environ.get("GAPWEAVE_DATA")
    if not folder:
        message = "GAPWEAVE_DATA names no folder of data sets: real data are not tested"
        (pytest.fail if os.environ.get("CI") else pytest.skip)(message)
    assert folder
    return Path(folder)


def readme_table(readme: Path, header: str) -> dict[str, list[str]]:
    """Rows of the README's table with this header, by first cell."""
    lines = readme.read_text(encoding="utf-8").split("\n")
    start = next(at for at, line in enumerate(lines) if line.startswith(header)) + 2
    rows = {}
    for line in lines[start:]:
        if not line.startswith("|"):
            break
        cells = [cell.strip() for cell in line.strip("|").split("|")]
        rows[cells[0]] = cells[1:]
    return rows


@pytest.mark.parametrize("name", HEART)
def test_heart_disease(data: Path, name: str) -> None:
    counts = readme_table(data / "heart_disease" / "README.md", "| site | n | positives")[name]
    path = EXAMPLES / "heart_disease" / "sites" / f"{name}.yaml"
    cohort = load_cohort(
        load_study(EXAMPLES / "heart_disease" / "study.yaml"), load_site(path), site_file=path, data_dir=data
    )
    assert [len(cohort.batch), int(cohort.batch.target.sum())] == [int(count) for count in counts[:2]]
    assert cohort.batch.patients == len(cohort.batch)


@pytest.mark.parametrize("name", EICU)
def test_eicu(data: Path, name: str) -> None:
    readme = data / "eicu_demo" / "README.md"
    stays, _, positives = map(int, readme_table(readme, "| site | hospitals")[name][4:7])
    shares = map(int, readme_table(readme, "| site | labs_aps")[name])
    path = EXAMPLES / "eicu_demo" / "sites" / f"{name}.yaml"
    site = load_site(path)
    # The cap on a patient's records is lifted: the README counts all stays.
    site = site.model_copy(update={"patients": site.patients.model_copy(update={"max_records": 1000})})
    study = load_study(EXAMPLES / "eicu_demo" / "study.yaml")
    batch = load_cohort(study, site, site_file=path, data_dir=data).batch
    assert (len(batch), int(batch.target.sum())) == (stays, positives)
    present = batch.present.float().mean(0) * 100
    for modality, share in zip(AVAILABILITY, shares, strict=True):
        if modality in site.data.modalities:
            # The study may count other variables to a modality than the README does.
            assert float(present[study.order.index(modality)]) == pytest.approx(share, abs=3), modality


@pytest.mark.parametrize("folder", ["heart_disease", "eicu_demo", "covid_cxr"])
def test_shipped_site_files_have_no_problem(data: Path, folder: str) -> None:
    study = load_study(EXAMPLES / folder / "study.yaml")
    for path in sorted((EXAMPLES / folder / "sites").glob("*.yaml")):
        findings = check_site(study, load_site(path), path, data)
        assert not [finding for finding in findings if finding.status == "problem"], path.stem
        assert not [finding for finding in findings if finding.id in ("unit", "numbers", "ids")], path.stem


def test_no_message_holds_a_patients_id(data: Path) -> None:
    path = EXAMPLES / "eicu_demo" / "sites" / "south_noresp.yaml"
    study = load_study(EXAMPLES / "eicu_demo" / "study.yaml")
    text = " ".join(finding.message for finding in check_site(study, load_site(path), path, data))
    assert not re.search(r"\d{3}-\d+|\d{6}", text)


def test_a_site_is_read_in_well_under_a_second(data: Path) -> None:
    path = EXAMPLES / "eicu_demo" / "sites" / "south_noresp.yaml"
    study, site = load_study(EXAMPLES / "eicu_demo" / "study.yaml"), load_site(path)
    seconds = []
    for _ in range(3):  # seconds of work, and the least of them: other tests run at the same time
        start = time.process_time()
        load_cohort(study, site, site_file=path, data_dir=data)
        seconds.append(time.process_time() - start)
    assert min(seconds) < 1.0
