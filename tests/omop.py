"""A hospital of the demo as an OMOP CDM 5.4, for tests and for demonstrations of a federation."""

from __future__ import annotations

from collections.abc import Iterator
from datetime import datetime, timedelta
from pathlib import Path
from typing import Any

import polars as pl
import sqlalchemy as sa
import yaml
from databases import fill

CONCEPTS = {
    "creatinine": 3016723, "glucose": 3004501, "haemoglobin": 3000963, "lactate": 3047181, "sodium": 3019550,
    "urea": 3013682, "dia_bp": 3012888, "heart_rate": 3027018, "resp_rate": 3024171, "spo2": 40762499,
    "sys_bp": 3004249, "temperature": 3020891,
}  # fmt: skip
UNITS = {
    "mmol/L": 8753, "mg/dL": 8840, "umol/L": 8749, "g/L": 8636, "g/dL": 8713, "mmHg": 8876, "1/min": 8541,
    "degC": 586323, "degF": 9289, "percent": 8554,
}  # fmt: skip
RATIO = 8523
BELOW_SODIUM = 9000001
"""A kind of sodium: every other value is of this concept."""

OUTCOME, HISTORY = 4185932, 316866
NAMES = {OUTCOME: "Ischemic heart disease", HISTORY: "Hypertensive disorder"}
GENDERS = {"M": 8507, "F": 8532}
NOTE_TYPE = 44814645
EMPTY = ("", "NA", "-9", "-9.0")


def write_cdm(engine: sa.Engine, site_file: Path, schema: str | None = None) -> dict[str, Any]:
    """Write the files of a demo hospital (but its images) as a CDM.

    The outcome is a condition that begins 30 hours after the visit; another is known from before.

    Returns:
        The site file's content for that CDM, but for `data.database`.
    """
    site = yaml.safe_load(site_file.read_text(encoding="utf-8"))
    hospital = _Hospital(site_file.parent, site["data"])
    fill(engine, {name: _frame(name, rows) for name, rows in hospital.tables().items()}, schema)
    return {**site, "data": _sources(site["data"]), "subgroups": {"sex": "gender_concept_id"}}


def _sources(data: dict[str, Any]) -> dict[str, Any]:
    """The `data` section of the site file."""
    label = {"conditions": {"concepts": [OUTCOME], "hours": [24, None]}}
    result: dict[str, Any] = {
        "records": {
            "omop": "visits", "id": "visit_source_value", "patient": "person_source_value",
            "label": dict.fromkeys(data["records"]["label"], label),
        },
    }  # fmt: skip
    for name in ("labs", "vitals"):
        if name in data:
            columns = {variable: _column(variable, given) for variable, given in data[name]["columns"].items()}
            result[name] = {"omop": "measurements", "columns": columns}
            if name == "labs":
                result[name]["hours"] = [0, 24]
    if "note" in data:
        result["note"] = {"omop": "notes", "hours": [0, 24], "concepts": [NOTE_TYPE]}
    return result


STUDY_UNITS = {
    "creatinine": "umol/L", "haemoglobin": "g/L", "dia_bp": "mmHg", "sys_bp": "mmHg", "heart_rate": "1/min",
    "resp_rate": "1/min", "spo2": "percent", "temperature": "degC",
}  # fmt: skip


def _unit(variable: str, given: Any) -> tuple[int, str | float]:
    """Concept of a variable's unit at the hospital, and what the site file says of it."""
    given = given if isinstance(given, dict) else {}
    if "factor" in given:
        return RATIO, float(given["factor"])
    unit = given.get("unit", STUDY_UNITS.get(variable, "mmol/L"))
    return UNITS[unit], unit


def _column(variable: str, given: Any) -> dict[str, Any]:
    concept, unit = _unit(variable, given)
    column: dict[str, Any] = {"concepts": [CONCEPTS[variable]], "units": {concept: unit}}
    return {**column, "descendants": True} if variable == "sodium" else column


class _Hospital:
    """The rows of a demo hospital's files, as rows of the CDM's tables."""

    def __init__(self, folder: Path, data: dict[str, Any]) -> None:
        self.folder, self.data = folder, data
        records = data["records"]
        self.records = self._read(records)
        self.visit = {row[records["id"]]: at for at, row in enumerate(self.records, 1)}
        people = dict.fromkeys(row[records["patient"]] for row in self.records)
        self.person = {name: at for at, name in enumerate(people, 1)}
        self.of = {row[records["id"]]: self.person[row[records["patient"]]] for row in self.records}
        self.start = {row[records["id"]]: self._start(row) for row in self.records}

    def _read(self, source: dict[str, Any]) -> list[dict[str, Any]]:
        path = self.folder / source["file"]
        return (pl.read_parquet(path) if path.suffix == ".parquet" else pl.read_csv(path)).to_dicts()

    def _start(self, row: dict[str, Any]) -> datetime:
        if "admitted_at" in row:
            return datetime.fromisoformat(row["admitted_at"])
        return datetime(2024, 1, 1, 7) + timedelta(hours=5 * self.visit[row[self.data["records"]["id"]]])

    def tables(self) -> dict[str, list[dict[str, Any]]]:
        measured = [*self._labs(), *self._vitals()]
        return {
            "person": list(self._people()),
            "visit_occurrence": list(self._visits()),
            "measurement": [{"measurement_id": at, **row} for at, row in enumerate(measured, 1)],
            "condition_occurrence": list(self._conditions()),
            "note": list(self._notes()),
            "concept": [{"concept_id": concept, "concept_name": name} for concept, name in NAMES.items()],
            "concept_ancestor": [
                {"ancestor_concept_id": CONCEPTS["sodium"], "descendant_concept_id": one}
                for one in (CONCEPTS["sodium"], BELOW_SODIUM)
            ],
        }

    def _people(self) -> Iterator[dict[str, Any]]:
        sex = {row[self.data["records"]["patient"]]: row.get("sex", row.get("gender")) for row in self.records}
        for name, at in self.person.items():
            yield {
                "person_id": at, "person_source_value": name, "gender_concept_id": GENDERS[str(sex[name])],
                "race_concept_id": 0, "ethnicity_concept_id": 0, "year_of_birth": 1940 + at % 50,
            }  # fmt: skip

    def _visits(self) -> Iterator[dict[str, Any]]:
        for name, at in self.visit.items():
            start = self.start[name]
            yield {
                "visit_occurrence_id": at, "visit_source_value": name, "person_id": self.of[name],
                "visit_concept_id": 9201, "visit_start_datetime": start, "visit_start_date": start.date(),
                "visit_end_datetime": start + timedelta(days=3), "care_site_id": 1,
            }  # fmt: skip

    def _measurement(self, name: str, variable: str, value: float, at: datetime, unit: int) -> dict[str, Any]:
        concept = CONCEPTS[variable]
        if variable == "sodium" and self.visit[name] % 2:
            concept = BELOW_SODIUM
        return {
            "person_id": self.of[name], "visit_occurrence_id": self.visit[name], "measurement_concept_id": concept,
            "measurement_datetime": at, "measurement_date": at.date(), "value_as_number": float(value),
            "unit_concept_id": unit,
        }  # fmt: skip

    def _labs(self) -> Iterator[dict[str, Any]]:
        source = self.data.get("labs")
        key = self.data["records"]["id"]
        for row in self._read(source) if source else ():
            for variable, given in source["columns"].items():
                local = given["column"] if isinstance(given, dict) else given
                if "item" in source:
                    value = row[source["value"]] if row[source["item"]] == local else None
                else:
                    value = row[local]
                if value is not None and str(value) not in EMPTY:
                    at = self.start[row[key]] + timedelta(minutes=90)
                    yield self._measurement(row[key], variable, value, at, _unit(variable, given)[0])

    def _vitals(self) -> Iterator[dict[str, Any]]:
        source = self.data.get("vitals")
        key = self.data["records"]["id"]
        for row in self._read(source) if source else ():
            time = row[source["time"]]
            at = time if isinstance(time, datetime) else self.start[row[key]] + timedelta(hours=time)
            for variable, given in source["columns"].items():
                value = row[given["column"] if isinstance(given, dict) else given]
                if value is not None:
                    yield self._measurement(row[key], variable, value, at, _unit(variable, given)[0])

    def _conditions(self) -> Iterator[dict[str, Any]]:
        (label,) = self.data["records"]["label"].values()
        column = label["column"] if isinstance(label, dict) else label
        codes = label["codes"] if isinstance(label, dict) else {1: 1}
        for number, row in enumerate(self.records, 1):
            name = row[self.data["records"]["id"]]
            of = {"person_id": self.of[name], "visit_occurrence_id": self.visit[name]}
            times = [(HISTORY, -24.0)] if number % 3 == 0 else []
            # Known on the first day: too early to be the outcome.
            times += [(OUTCOME, 2.0)] if number % 5 == 0 else []
            times += [(OUTCOME, 30.0)] if codes.get(row[column]) == 1 else []
            for concept, after in times:
                at = self.start[name] + timedelta(hours=after)
                yield {
                    "condition_occurrence_id": len(times) * number, **of, "condition_concept_id": concept,
                    "condition_start_datetime": at, "condition_start_date": at.date(),
                }  # fmt: skip

    def _notes(self) -> Iterator[dict[str, Any]]:
        source = self.data.get("note")
        key = self.data["records"]["id"]
        for row in self._read(source) if source else ():
            at = self.start[row[key]] + timedelta(hours=3)
            yield {
                "person_id": self.of[row[key]], "visit_occurrence_id": self.visit[row[key]],
                "note_type_concept_id": NOTE_TYPE, "note_class_concept_id": 0, "note_datetime": at,
                "note_date": at.date(), "note_text": " ".join(row[name] for name in source["columns"]),
            }  # fmt: skip


_EMPTY = {
    "note": {
        "person_id": pl.Int64, "visit_occurrence_id": pl.Int64, "note_type_concept_id": pl.Int64,
        "note_class_concept_id": pl.Int64, "note_datetime": pl.Datetime("us"), "note_date": pl.Date,
        "note_text": pl.String,
    },
}  # fmt: skip


def _frame(name: str, rows: list[dict[str, Any]]) -> pl.DataFrame:
    return pl.DataFrame(rows, infer_schema_length=None) if rows else pl.DataFrame(schema=_EMPTY[name])
