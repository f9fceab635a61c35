"""An OMOP CDM: the cohorts of the files, concept sets, windows and units."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import sqlalchemy as sa
import torch
from cohorts import assert_same, everything
from databases import PASSWORD, Postgres
from omop import HISTORY, OUTCOME, write_cdm

from gapweave.client.checks import check_site
from gapweave.client.data import Cohort, load_cohort
from gapweave.client.sources.findings import Finding
from gapweave.shared.config import Study, load_site, load_study
from gapweave.shared.config.base import parse
from gapweave.shared.config.modalities import TableModality
from gapweave.shared.config.site import Site
from gapweave.shared.errors import DataError, GapweaveError, UsageError
from gapweave.shared.features.table import names
from gapweave.sites.demo.write import write_demo

LABS = {"sodium": {"low": 100, "high": 180, "unit": "mmol/L"}, "lactate": {"low": 0.01, "high": 300, "unit": "mmol/L"}}
HISTORY_STUDY: dict[str, Any] = {
    "version": 1,
    "name": "little",
    "task": {"kind": "binary", "label": "deteriorated"},
    "modalities": {
        "static": {"kind": "table", "columns": {"age": {"low": 0, "high": 120}, "sex": {"categories": [0, 1]}}},
        "labs": {"kind": "table", "columns": LABS, "hours": 24},
        "history": {"kind": "text", "buckets": 32, "hours": 24},
    },
}


class Cdm:
    """A demo hospital in files and in a CDM."""

    def __init__(self, folder: Path, name: str, engine: sa.Engine, database: dict[str, Any]) -> None:
        self.folder, self.engine = folder, engine
        self.demo = load_study(write_demo(folder / "demo", hospitals=2, patients=32))
        self.path = folder / "demo" / "sites" / f"{name}.yaml"
        self.content = write_cdm(engine, self.path, database.get("cdm"))
        self.data = self.content["data"]
        self.data["database"] = database

    def execute(self, text: str) -> None:
        with self.engine.begin() as connection:
            connection.execute(sa.text(text))

    @property
    def site(self) -> Site:
        return parse(Site, self.content, "site.yaml")

    def load(self, study: Study | None = None, findings: list[Finding] | None = None) -> Cohort:
        site_file = self.folder / "site.yaml"
        return load_cohort(study or self.demo, self.site, site_file=site_file, findings=findings)

    def check(self, study: Study | None) -> list[Finding]:
        return check_site(study, self.site, self.folder / "site.yaml")


def lite(folder: Path, name: str = "alder") -> Cdm:
    engine = sa.create_engine(f"sqlite:///{folder / 'cdm.db'}", poolclass=sa.NullPool)
    return Cdm(folder, name, engine, {"url": "sqlite:///cdm.db"})


def server(folder: Path, name: str, cluster: Postgres) -> Cdm:
    (folder / "password").write_text(PASSWORD)
    (folder / "password").chmod(0o600)
    database = f"cdm_{name}"
    url = cluster.url("reader", database)
    return Cdm(folder, name, cluster.create(database), {"url": url, "password_file": "password", "cdm": "cdm54"})


@pytest.mark.parametrize("name", ["alder", "birch"])
@pytest.mark.parametrize("kind", ["sqlite", "postgresql"])
def test_a_cdm_gives_the_batches_of_the_files(
    request: pytest.FixtureRequest, tmp_path: Path, kind: str, name: str
) -> None:
    """Labs, vitals and notes under the hospital's own units; the outcome is a condition after the first day."""
    cdm = lite(tmp_path, name) if kind == "sqlite" else server(tmp_path, name, request.getfixturevalue("postgres"))
    site = load_site(cdm.path)
    held = {key: source for key, source in site.data.modalities.items() if key in cdm.data}
    site = site.model_copy(update={"data": site.data.model_copy(update={"modalities": held})})
    expected = load_cohort(cdm.demo, site, site_file=cdm.path)
    findings: list[Finding] = []
    found = cdm.load(findings=findings)
    assert findings == []
    assert_same(found, expected)
    for one, other in ((found.training(), expected.training()), (found.testing(), expected.testing())):
        assert one.inputs.keys() == other.inputs.keys() >= {"labs", "vitals"}
        assert all(torch.equal(one.inputs[key], other.inputs[key]) for key in one.inputs)
    assert 0 < int(expected.batch.target.sum()) < len(expected.batch)
    codes = {"8507": "M", "8532": "F"}
    assert [codes[str(code)] for code in found.subgroups["sex"]] == list(expected.subgroups["sex"])
    assert {one.status for one in cdm.check(cdm.demo)} == {"ok"}
    lines = [one.message for one in cdm.check(None) if one.id == "modality"]
    assert all(line.endswith("rows of visits") and not line.startswith("0") for line in lines)


def history(cdm: Cdm) -> Study:
    """Visits, conditions and a label by query, beside the labs."""
    cdm.data.update(
        static={
            "omop": "visits",
            "columns": {"age": "age", "sex": {"column": "gender_concept_id", "codes": {8507: 1, 8532: 0}}},
        },
        history={"omop": "conditions", "hours": [None, 24]},
        labs={
            "omop": "measurements",
            "columns": {
                "sodium": {"concepts": [3019550], "units": {8753: "mmol/L"}, "descendants": True},
                "lactate": {"concepts": [3047181], "units": {8753: "mmol/L", 8840: 0.111, 0: "mmol/L"}},
            },
        },
    )
    return Study.model_validate(HISTORY_STUDY)


def test_persons_conditions_and_a_label_by_query(tmp_path: Path) -> None:
    cdm = lite(tmp_path)
    study = history(cdm)
    cdm.data["records"]["id"] = "visit_occurrence_id"
    expected = cdm.load(study)
    assert expected.batch.present[:, study.order.index("static")].all()
    year = cdm.demo.name and 2024 - 1940 - 1
    columns = names(TableModality.model_validate(HISTORY_STUDY["modalities"]["static"]).columns)
    age = expected.batch.inputs["static"][0, columns.index("age")] * 30 + 60
    assert float(age) == pytest.approx(year)
    texts = expected.batch.present[:, study.order.index("history")]
    # Every third visit has a history, every fifth an early outcome; what comes later is not read.
    number = [int(record) for record in expected.record_ids]
    assert texts.tolist() == [at % 3 == 0 or at % 5 == 0 for at in number]
    after = "(julianday(condition_start_datetime) - julianday(visit_start_datetime)) * 24 >= 24"
    cdm.data["records"]["label"] = {
        "deteriorated": {
            "column": "bad",
            "codes": {"yes": 1, "no": 0},
            "query": f"""SELECT v.visit_occurrence_id, CASE WHEN EXISTS (
                SELECT 1 FROM condition_occurrence c WHERE c.visit_occurrence_id = v.visit_occurrence_id
                AND condition_concept_id = {OUTCOME} AND {after}) THEN 'yes' ELSE 'no' END AS bad
                FROM visit_occurrence v""",
        }
    }
    assert_same(cdm.load(study), expected)
    cdm.data["records"]["label"]["deteriorated"]["query"] += " UNION ALL SELECT 1, 'no'"
    with pytest.raises(DataError, match="2 rows give a record more than one label"):
        cdm.load(study)


def lactates(cdm: Cdm, *rows: tuple[float, float, str]) -> None:
    """The only lactates, all of the first visit: hours after its start, value, unit concept."""
    cdm.execute("DELETE FROM measurement WHERE measurement_concept_id = 3047181")
    for hour, value, unit in rows:
        cdm.execute(
            "INSERT INTO measurement SELECT 0, person_id, visit_occurrence_id, 3047181, "
            f"datetime(visit_start_datetime, '{hour * 60} minutes'), NULL, {value}, {unit} "
            "FROM visit_occurrence WHERE visit_occurrence_id = 1"
        )


ROWS = [(-2.0, 9.0, "8753"), (1.0, 4.0, "8753"), (2.0, 18.0, "8840"), (3.0, 3.0, "NULL"), (24.0, 100.0, "8753")]


@pytest.mark.parametrize(
    ("keys", "value"),
    [
        ({}, 3.0),
        ({"take": "first"}, 9.0),
        ({"take": "min"}, 18.0 * 0.111),
        ({"take": "max"}, 9.0),
        ({"take": "mean"}, (9 + 4 + 18 * 0.111 + 3) / 4),
        ({"take": "max", "hours": [0, 2]}, 4.0),
        ({"take": "first", "hours": [2, 400]}, 18.0 * 0.111),
        ({"take": "max", "hours": [0, 2], "link": "person"}, 4.0),
    ],
)
def test_which_measurement_counts(tmp_path: Path, keys: dict[str, Any], value: float) -> None:
    """Those at or after the prediction time never do, whatever the site says."""
    cdm = lite(tmp_path)
    study = history(cdm)
    lactates(cdm, *ROWS)
    cdm.data["labs"].update(keys)
    cohort = cdm.load(study)
    columns = names(TableModality.model_validate(HISTORY_STUDY["modalities"]["labs"]).columns)
    at = cohort.record_ids.index("alder-r00000")
    lactate = cohort.batch.inputs["labs"][at, columns.index("lactate")]
    assert float(lactate) * (300 - 0.01) / 4 + 150.005 == pytest.approx(value, abs=1e-3)


def test_the_link_by_person_sees_other_visits(tmp_path: Path) -> None:
    cdm = lite(tmp_path)
    study = history(cdm)
    cdm.execute("UPDATE measurement SET visit_occurrence_id = NULL")
    findings: list[Finding] = []
    with pytest.raises(DataError, match="no measurement of a visit has one of its concepts"):
        cdm.load(study, findings)
    assert {"absent_item", "modality"} <= {one.id for one in findings}
    cdm.data["labs"]["link"] = "person"
    assert cdm.load(study).batch.present[:, study.order.index("labs")].float().mean() > 0.5


def test_a_condition_with_a_date_only_is_known_at_the_days_end(tmp_path: Path) -> None:
    cdm = lite(tmp_path)
    study = history(cdm)
    at = study.order.index("history")
    before = int(cdm.load(study).batch.present[:, at].sum())
    cdm.execute(
        f"UPDATE condition_occurrence SET condition_start_datetime = NULL WHERE condition_concept_id = {OUTCOME}"
    )
    assert int(cdm.load(study).batch.present[:, at].sum()) == before
    cdm.data["history"]["hours"] = [None, 4]
    assert int(cdm.load(study).batch.present[:, at].sum()) < before
    cdm.data["history"]["concepts"] = [HISTORY]
    assert int(cdm.load(study).batch.present[:, at].sum()) == len(cdm.load(study).batch) // 3


def without_time(cdm: Cdm) -> None:
    cdm.execute("UPDATE measurement SET measurement_datetime = NULL WHERE measurement_concept_id = 3047181")


def set_lactate(**keys: Any) -> Callable[[Cdm], None]:
    return lambda cdm: cdm.data["labs"]["columns"]["lactate"].update(keys)


@pytest.mark.parametrize(
    ("change", "error", "text"),
    [
        (
            set_lactate(units={8753: "mmol/L"}),
            DataError,
            "2 of 4 values are in units that the site file does not give (unit_concept_id 0, 8840). Add them",
        ),
        (set_lactate(units={}), DataError, "values are in units that the site file does not give"),
        (
            set_lactate(units={8753: "mmHg", 8840: 1, 0: 1}),
            UsageError,
            "data.labs.columns.lactate.units.8753: 'mmHg' cannot be converted to the study's unit 'mmol/L'",
        ),
        (
            lambda cdm: cdm.data["labs"]["columns"].update(lactat={"concepts": [1]}),
            UsageError,
            "the study has no variable 'lactat' in 'labs'. Did you mean 'lactate'?",
        ),
        (
            lambda cdm: cdm.data.update(static=dict(cdm.data["labs"], columns={"age": {"concepts": [1]}})),
            UsageError,
            "data.static.hours: neither the study nor the site sets an end to the hours",
        ),
        (
            lambda cdm: cdm.data.update(
                static=dict(cdm.data["labs"], hours=[0, 1], columns={"sex": {"concepts": [1]}})
            ),
            UsageError,
            "measurements are numbers, the variable is a code",
        ),
        (lambda cdm: cdm.execute("DROP TABLE concept"), DataError, "data.history.omop: the database refused the query"),
        (
            lambda cdm: cdm.data["database"].update(cdm="elsewhere"),
            DataError,
            "data.records.omop: the database refused the query",
        ),
        (
            lambda cdm: cdm.data["records"].update(label={"deteriorated": {"codes": {"a": 1}}}),
            UsageError,
            "a label is a column (of the records or of a query), or conditions",
        ),
    ],
)
def test_what_is_refused(tmp_path: Path, change: Callable[[Cdm], None], error: type[GapweaveError], text: str) -> None:
    cdm = lite(tmp_path)
    study = history(cdm)
    lactates(cdm, *ROWS)
    change(cdm)
    with pytest.raises(GapweaveError) as caught:
        cdm.load(study)
    assert type(caught.value) is error
    assert text in str(caught.value)
    assert caught.value.remedy


@pytest.mark.parametrize(
    ("change", "check", "text"),
    [
        (set_lactate(concepts=[1]), "absent_item", "no measurement of a visit has one of its concepts"),
        (without_time, "time", "measurements have no measurement_datetime and are not read"),
    ],
)
def test_what_the_check_finds(tmp_path: Path, change: Callable[[Cdm], None], check: str, text: str) -> None:
    cdm = lite(tmp_path)
    study = history(cdm)
    change(cdm)
    (finding,) = [one for one in cdm.check(study) if one.id == check]
    assert text in finding.message
    assert finding.remedy


def test_equal_tensors_are_not_empty(tmp_path: Path) -> None:
    """Guards the test above: a CDM without measurements is another cohort."""
    cdm = lite(tmp_path)
    full = everything(cdm.load())
    cdm.execute("DELETE FROM measurement WHERE measurement_id % 7 = 0")
    assert not torch.equal(full["input vitals"], everything(cdm.load())["input vitals"])
