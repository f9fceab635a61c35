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
    assert all(line.endswith("rows of these concepts") and not line.startswith("0") for line in lines)


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
        (without_time, "time", "measurements have no readable measurement_datetime and are not read"),
    ],
)
def test_what_the_check_finds(tmp_path: Path, change: Callable[[Cdm], None], check: str, text: str) -> None:
    cdm = lite(tmp_path)
    study = history(cdm)
    change(cdm)
    (finding,) = [one for one in cdm.check(study) if one.id == check]
    assert text in finding.message
    assert finding.remedy


def test_a_condition_that_is_label_and_input_in_the_same_hours_is_noted(tmp_path: Path) -> None:
    cdm = lite(tmp_path)
    study = history(cdm)

    def noted() -> list[Finding]:
        return [one for one in cdm.check(study) if one.id == "label"]

    assert not noted(), "the label's hours begin where the text's end"
    conditions = cdm.data["records"]["label"]["deteriorated"]["conditions"]
    conditions["hours"] = [None, None]
    (finding,) = noted()
    assert finding.status == "warning"
    assert "may hold the conditions that are the label 'deteriorated'" in finding.message
    cdm.data["history"]["concepts"] = [HISTORY]
    assert not noted()
    conditions["descendants"] = True
    assert noted(), "what lies below is not looked up"


def test_equal_tensors_are_not_empty(tmp_path: Path) -> None:
    """Guards the test above: a CDM without measurements is another cohort."""
    cdm = lite(tmp_path)
    full = everything(cdm.load())
    cdm.execute("DELETE FROM measurement WHERE measurement_id % 7 = 0")
    assert not torch.equal(full["input vitals"], everything(cdm.load())["input vitals"])


VISITS = (
    "visit_occurrence_id, visit_source_value, person_id, visit_concept_id, visit_start_datetime, visit_start_date, "
    "visit_end_datetime, care_site_id"
)


def later_visits(cdm: Cdm) -> None:
    """A month later everybody comes again, as an outpatient under the same case number; labs, a note and an outcome."""
    cdm.execute(
        f"INSERT INTO visit_occurrence ({VISITS}) SELECT visit_occurrence_id + 10000, visit_source_value, person_id, "
        "9202, datetime(visit_start_datetime, '30 days'), date(visit_start_date, '30 days'), NULL, NULL "
        "FROM visit_occurrence"
    )
    cdm.execute(
        "INSERT INTO measurement SELECT measurement_id + 100000, person_id, visit_occurrence_id + 10000, "
        "measurement_concept_id, datetime(measurement_datetime, '30 days'), NULL, value_as_number * 2, unit_concept_id "
        "FROM measurement"
    )


def test_of_visits_with_one_case_number_each_record_has_its_own_values(tmp_path: Path) -> None:
    """It was believed that a case number finds the visit: the values of a later one were read as this one's."""
    cdm = lite(tmp_path)
    cdm.data["records"]["where"] = {"visit_concept_id": [9201]}
    by_visit = cdm.load()
    cdm.data["labs"]["link"] = cdm.data["vitals"]["link"] = "person"
    by_person = cdm.load()
    later_visits(cdm)
    assert_same(cdm.load(), by_person)
    cdm.data["labs"]["link"] = cdm.data["vitals"]["link"] = "visit"
    assert_same(cdm.load(), by_visit)


def as_file(cdm: Cdm, *columns: str) -> None:
    """The records from a file with some columns of the visits."""
    with cdm.engine.connect() as connection:
        rows = connection.execute(sa.text(f"SELECT {', '.join(columns)}, person_id AS who FROM visit_occurrence"))
        text = "\n".join(",".join(map(str, row)) for row in [list(rows.keys()), *rows])
        name = next(iter(rows.keys()))
    (cdm.folder / "records.csv").write_text(text + "\n")
    cdm.data["records"].pop("omop", None)
    cdm.data["records"].update(file=str(cdm.folder / "records.csv"), id=name, patient="who")
    cdm.content.pop("subgroups", None)


def test_a_case_number_of_a_file_finds_the_visit_unless_several_have_it(tmp_path: Path) -> None:
    cdm = lite(tmp_path)
    expected = cdm.load()
    as_file(cdm, "visit_source_value")
    assert torch.equal(cdm.load().batch.inputs["labs"], expected.batch.inputs["labs"])
    later_visits(cdm)
    with pytest.raises(DataError, match=f"{len(expected.batch)} records have a visit_source_value that stands for"):
        cdm.load()


def test_records_with_ids_of_their_own_name_their_visit_in_a_column(tmp_path: Path) -> None:
    """It was believed that any id is a visit's number: records were given the values of strangers."""
    cdm = lite(tmp_path)
    expected = cdm.load()
    as_file(cdm, "visit_occurrence_id + 7 AS id", "visit_occurrence_id")
    assert torch.equal(cdm.load().batch.inputs["labs"], expected.batch.inputs["labs"])
    as_file(cdm, "visit_occurrence_id + 7 AS id")
    with pytest.raises(UsageError, match="the records do not say which visits they are \\('id'\\)"):
        cdm.load()


def known_labels(cohort: Cohort) -> dict[str, float]:
    """Of the records whose label is known."""
    labels = zip(cohort.record_ids, cohort.batch.target[:, 0].tolist(), cohort.batch.label_mask[:, 0], strict=True)
    return {record: value for record, value, known in labels if known}


def test_without_a_visits_start_nothing_of_it_has_a_time(tmp_path: Path) -> None:
    """It was believed that who has no condition in the window has none: visits without a start were healthy."""
    cdm = lite(tmp_path)
    before = cdm.load()
    cdm.execute("UPDATE visit_occurrence SET visit_start_datetime = NULL WHERE visit_occurrence_id % 2 = 0")
    findings: list[Finding] = []
    after = cdm.load(findings=findings)
    (finding,) = [one for one in findings if one.id == "time"]
    assert "visits have no visit_start_datetime: nothing with a time is read for them" in finding.message
    had, known = known_labels(before), known_labels(after)
    assert known.items() <= had.items()
    assert 0 < len(known) < len(had)


def shift_to_midnight(cdm: Cdm, form: str) -> None:
    cdm.execute(f"UPDATE measurement SET measurement_datetime = strftime('{form}', measurement_datetime)")


@pytest.mark.parametrize("form", ["%Y-%m-%d", "%Y-%m-%d 00:00:00"])
def test_a_date_counts_from_its_end_also_as_midnight(tmp_path: Path, form: str) -> None:
    cdm = lite(tmp_path)
    study = history(cdm)
    lactates(cdm, (1.0, 4.0, "8753"))
    seen = study.order.index("labs")
    assert cdm.load(study).batch.present[:, seen].any()
    shift_to_midnight(cdm, form)
    if "00" in form:
        with pytest.raises(DataError, match="are midnight throughout, which may mean dates"):
            cdm.load(study)
        cdm.data["labs"]["midnight"] = "time"
        timed = cdm.load(study).batch.present[:, seen]
        cdm.data["labs"]["midnight"] = "date"
    # Visits start at 7 in the morning or later: the end of any day on which something is measured is at most 17 hours
    # away from the start, or after the prediction time.
    dated = cdm.load(study).batch.present[:, seen]
    assert "00" not in form or int(dated.sum()) < int(timed.sum()) or not torch.equal(dated, timed)
    cdm.data["labs"]["hours"] = [0, 1]
    assert not cdm.load(study).batch.present[:, seen].any()


def test_zones_on_one_side_only_are_refused(tmp_path: Path) -> None:
    cdm = lite(tmp_path)
    cdm.execute("UPDATE measurement SET measurement_datetime = measurement_datetime || '+02:00'")
    with pytest.raises(DataError, match="of measurement_datetime and visit_start_datetime only one names a time zone"):
        cdm.load()
