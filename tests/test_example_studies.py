"""The shipped example studies: their files agree with each other and, where the data are there, with the data."""

import shutil
from pathlib import Path

import pytest
import torch
import yaml
from typer.testing import CliRunner

import gapweave.sites.covid_cxr
import gapweave.sites.eicu_demo
import gapweave.sites.heart_disease
from gapweave.client.data import load_cohort
from gapweave.shared.config import load_site, load_study
from gapweave.shared.config.modalities import Categories
from gapweave.shared.config.sources import ColumnsSource
from gapweave.shared.errors import UsageError
from gapweave.sites import study_cli

FOLDERS = {
    "heart_disease": Path(gapweave.sites.heart_disease.__path__[0]),
    "eicu_demo": Path(gapweave.sites.eicu_demo.__path__[0]),
    "covid_cxr": Path(gapweave.sites.covid_cxr.__path__[0]),
}

HEART = {"cleveland": (303, 139), "hungarian": (294, 106), "long_beach_va": (200, 149), "switzerland": (123, 115)}
"""Patients and positives, as published with the data."""

EICU = {
    "midwest_noresp": (168, 43, 7),
    "midwest_resp_inf": (252, 81, 25),
    "midwest_resp_noinf": (88, 25, 2),
    "northeast": (103, 57, 14),
    "south_noresp": (229, 74, 17),
    "south_resp_inf": (175, 55, 18),
    "south_resp_noinf": (99, 43, 7),
    "unknown_region": (136, 48, 16),
    "west_other": (107, 40, 10),
    "west_resp_inf": (250, 76, 25),
}
"""Eligible stays, those of more than three days, and deaths, as published with the data."""

COVID = {
    "eurorad": (84, 38, 35),
    "hannover_mhh": (92, 44, 46),
    "journals_other": (219, 78, 126),
    "radiopaedia": (162, 44, 83),
    "sirm_italy": (71, 13, 51),
}
"""Records, those of a severe course, and patients, as published with the data."""

SITES = [(folder, path) for folder in FOLDERS for path in sorted((FOLDERS[folder] / "sites").glob("*.yaml"))]


def study_of(folder, **overrides):
    return load_study(FOLDERS[folder] / "study.yaml", overrides)


@pytest.mark.parametrize("folder", FOLDERS)
def test_the_study_is_valid_and_private(folder):
    study = study_of(folder)
    assert study.privacy.enabled
    assert study.privacy.epsilon == 8
    assert study.sharing.policy == "all"


def test_every_site_has_a_file():
    for folder, expected in (("heart_disease", HEART), ("eicu_demo", EICU), ("covid_cxr", COVID)):
        assert {path.stem for name, path in SITES if name == folder} == set(expected)


@pytest.mark.parametrize(("folder", "path"), SITES, ids=lambda value: getattr(value, "stem", value))
def test_a_site_declares_only_what_the_study_knows(folder, path):
    study, site = study_of(folder), load_site(path)
    assert site.name == path.stem
    assert set(site.data.modalities) <= set(study.modalities)
    assert set(study.task.labels) <= set(site.data.records.label)
    for name, source in site.data.modalities.items():
        if isinstance(source, ColumnsSource):
            # Contributors of X-rays measured different things.
            compare = set.issubset if folder == "covid_cxr" else set.__eq__
            assert compare(set(source.columns), set(study.modalities[name].columns))


@pytest.mark.parametrize(("folder", "path"), SITES, ids=lambda value: getattr(value, "stem", value))
def test_nothing_that_is_known_later_is_an_input(folder, path):
    forbidden = {"num", "label", "los_icu_h", "label_hosp_mortality", "label_icu_mortality", "label_los_gt_3d"}
    if folder == "covid_cxr":
        forbidden |= {"label_severe", "label_covid", "finding", "survival", "intubated", "went_icu", "in_icu", "view"}
    data = yaml.safe_load(path.read_text())["data"]
    inputs = str({name: source for name, source in data.items() if name != "records"})
    assert not [name for name in forbidden if f"'{name}'" in inputs]


def test_every_number_has_a_center_a_scale_and_a_place_inside_its_range():
    for folder in FOLDERS:
        for spec in study_of(folder).modalities.values():
            for card in getattr(spec, "columns", {}).values():
                if not isinstance(card, Categories):
                    assert card.low <= card.center <= card.high
                    assert card.scale is not None


def load(folder, path, data, **overrides):
    findings = []
    study, site = study_of(folder, **overrides), load_site(path)
    cohort = load_cohort(study, site, site_file=path, data_dir=data, findings=findings)
    return study, cohort, findings


@pytest.mark.data
@pytest.mark.parametrize("name", HEART)
def test_heart_disease_loads_with_the_published_counts(real_data, name):
    path = FOLDERS["heart_disease"] / "sites" / f"{name}.yaml"
    study, cohort, findings = load("heart_disease", path, real_data)
    assert (len(cohort.record_ids), int(cohort.batch.target.sum())) == HEART[name]
    assert findings == []
    at = study.order.index("imaging")
    assert (cohort.batch.present[:, at].float().mean() > 0.9) == (name == "cleveland")


@pytest.mark.data
def test_a_cholesterol_of_zero_is_missing_not_low(real_data):
    path = FOLDERS["heart_disease"] / "sites" / "switzerland.yaml"
    _, cohort, _ = load("heart_disease", path, real_data)
    assert int(cohort.batch.inputs["vitals_labs"][:, 1].sum()) == 0  # cholesterol:observed, the second input


@pytest.mark.data
@pytest.mark.parametrize("name", EICU)
def test_eicu_loads_with_the_published_counts(real_data, name):
    path = FOLDERS["eicu_demo"] / "sites" / f"{name}.yaml"
    stays, long, deaths = EICU[name]
    study, cohort, findings = load("eicu_demo", path, real_data)
    assert (len(cohort.record_ids), int(cohort.batch.target.sum())) == (stays, long)
    assert {finding.id for finding in findings} <= {"range", "codes", "rare", "empty"}
    held = cohort.batch.present.any(dim=0)
    lacking = {study.order[at] for at in torch.nonzero(~held)[:, 0].tolist()}
    assert lacking == ({"ts_infusion"} if name in ("midwest_resp_noinf", "south_resp_noinf") else set())
    if deaths > 2:
        _, cohort, _ = load("eicu_demo", path, real_data, **{"task.label": "label_hosp_mortality"})
        assert int(cohort.batch.target.sum()) == deaths


@pytest.mark.data
@pytest.mark.parametrize("name", COVID)
def test_covid_loads_with_the_published_counts(real_data, name):
    path = FOLDERS["covid_cxr"] / "sites" / f"{name}.yaml"
    study, cohort, findings = load("covid_cxr", path, real_data)
    assert (len(cohort.record_ids), int(cohort.batch.target.sum()), len(cohort.patient_ids)) == COVID[name]
    assert {finding.id for finding in findings} <= {"unlabelled", "rare"}
    held = cohort.batch.present.any(dim=0)
    lacking = {study.order[at] for at in torch.nonzero(~held)[:, 0].tolist()}
    assert lacking == {"sirm_italy": {"cxr"}, "hannover_mhh": {"note"}}.get(name, set())


@pytest.mark.parametrize(
    ("setting", "text"),
    [
        ("aggregation.default=bulyan", "bulyan of 'encoder/clinical' is not safe with 1 bad of 4 sites"),
        ("aggregation.head/imaging=multi_krum", "multi_krum of 'head/imaging' is not safe"),
        ("aggregation.default=nnm", "no chain"),
    ],
)
def test_a_rule_that_holders_are_too_few_for_is_refused_with_its_group(setting: str, text: str) -> None:
    result = CliRunner().invoke(
        study_cli.app, ["check", str(FOLDERS["heart_disease"] / "study.yaml"), "--set", setting]
    )
    assert isinstance(result.exception, UsageError)
    assert text in str(result.exception)


def test_strict_with_two_holders_is_refused_with_the_group(tmp_path: Path) -> None:
    study, files = FOLDERS["heart_disease"] / "study.yaml", sorted((FOLDERS["heart_disease"] / "sites").glob("*.yaml"))
    for file in files[:2]:
        shutil.copy(file, tmp_path)
    command = ["check", str(study), "--sites", str(tmp_path), "--set", "aggregation.strict=true"]
    refused = CliRunner().invoke(study_cli.app, command)
    assert isinstance(refused.exception, UsageError)
    assert "strict leaves 'encoder/clinical' alone: 2 holders" in str(refused.exception)
    assert CliRunner().invoke(study_cli.app, command[:4]).exit_code == 0
