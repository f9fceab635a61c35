"""How hospitals name things: the plain way, and one hospital's own names, units, codes and forms.

Both are the same data. The second shows what a site file is for: nothing in the code knows these names.
"""

from __future__ import annotations

from collections.abc import Collection, Mapping
from typing import Any

import polars as pl

from gapweave.sites.demo.world import LABEL, LABS, MODALITIES, VITALS

Frames = dict[str, pl.DataFrame]
"""The tables of one hospital: records, and those of vitals, labs and note that it holds."""

_VITALS = {
    "dia_bp": "rr_dia", "heart_rate": "pulse", "resp_rate": "breaths", "spo2": "sat", "sys_bp": "rr_sys",
    "temperature": "temp_f",
}  # fmt: skip
_LABS: dict[str, tuple[str, float | None, str | None]] = {
    "creatinine": ("CREA", 113.12 / 1e4, "mg/dL"),
    "glucose": ("GLU", 180.156 / 10, "mg/dL"),
    "haemoglobin": ("HB", 0.1, "g/dL"),
    "lactate": ("LAC", None, None),
    "sodium": ("NAT", None, None),
    "urea": ("UREA", None, None),
}
"""Variable -> the local code, local units in one of the study's, and the local unit's name."""

_NOT_DONE = -9
"""What this hospital writes for a test that was ordered and not done."""


def plain_sources(name: str, holds: Collection[str]) -> dict[str, Any]:
    """The `data` section of a site file for tables that carry the study's own names."""
    base = f"../data/{name}"
    sources: dict[str, Any] = {
        "records": {
            "file": f"{base}/records.csv", "id": "record_id", "patient": "patient_id",
            "label": {LABEL: LABEL},
        },
        "labs": {"file": f"{base}/labs.csv", "columns": {variable: variable for variable in LABS}},
        "note": {"file": f"{base}/notes.csv", "columns": ["text"]},
        "scan": {"folder": f"{base}/scans", "column": "scan_file"},
        "vitals": {
            "file": f"{base}/vitals.parquet", "time": "hour",
            "columns": {variable: variable for variable in VITALS},
        },
    }  # fmt: skip
    return _held(sources, holds)


def local_sources(name: str, holds: Collection[str]) -> dict[str, Any]:
    """The `data` section of a site file for the tables that `localise` makes."""
    base = f"../data/{name}"
    vitals: dict[str, Any] = dict(_VITALS)
    vitals["spo2"] = {"column": "sat", "factor": 100}
    vitals["temperature"] = {"column": "temp_f", "unit": "degF"}
    labs = {variable: _lab_column(code, unit) for variable, (code, _, unit) in _LABS.items()}
    sources: dict[str, Any] = {
        "records": {
            "file": f"{base}/records.csv", "id": "case", "patient": "pid",
            "label": {LABEL: {"column": "outcome", "codes": {"worse": 1, "stable": 0}}},
        },
        "labs": {"file": f"{base}/labs.csv", "item": "code", "value": "result", "columns": labs},
        "note": {"file": f"{base}/notes.csv", "columns": ["history", "findings"]},
        "scan": {"folder": f"{base}/scans", "column": "film"},
        "vitals": {
            "file": f"{base}/vitals.parquet", "time": "taken_at", "index": "admitted_at", "columns": vitals,
        },
    }  # fmt: skip
    return _held(sources, holds)


def _lab_column(code: str, unit: str | None) -> dict[str, Any]:
    column: dict[str, Any] = {"column": code, "missing": [_NOT_DONE]}
    return column if unit is None else {**column, "unit": unit}


def _held(sources: Mapping[str, Any], holds: Collection[str]) -> dict[str, Any]:
    return {"records": sources["records"], **{name: sources[name] for name in MODALITIES if name in holds}}


def localise(frames: Frames) -> Frames:
    """The same tables under this hospital's own names, units and codes.

    Vitals carry the clock instead of hours since admission, labs come one result a row, a test not done has a
    number that means so, and a note is in two fields.
    """
    change = {"records": _local_records, "vitals": _local_vitals, "labs": _local_labs, "note": _local_notes}
    return {name: change[name](frame) for name, frame in frames.items()}


def _admitted() -> pl.Expr:
    """Admissions seven hours apart, by record."""
    number = pl.col("record_id").str.extract(r"(\d+)$").cast(pl.Int64)
    return pl.datetime(2024, 1, 1) + pl.duration(hours=7 * number)


def _local_records(records: pl.DataFrame) -> pl.DataFrame:
    outcome = pl.when(pl.col(LABEL) == 1).then(pl.lit("worse")).otherwise(pl.lit("stable"))
    return records.select(
        case="record_id", pid="patient_id", gender="sex", admitted_at=_admitted().dt.to_string("iso:strict"),
        outcome=outcome, film="scan_file", oracle_p="oracle_p",
    )  # fmt: skip


def _local_vitals(vitals: pl.DataFrame) -> pl.DataFrame:
    local = {_VITALS[name]: pl.col(name) for name in VITALS}
    local["sat"] = (pl.col("spo2") / 100).round(3)
    local["temp_f"] = (pl.col("temperature") * 1.8 + 32).round(1)
    # Charted some minutes into the hour.
    taken = _admitted() + pl.duration(hours="hour") + pl.duration(minutes=pl.col("hour") * 13 % 60)
    return vitals.select(case="record_id", taken_at=taken, **local)


def _local_labs(labs: pl.DataFrame) -> pl.DataFrame:
    local = {code: pl.col(name) * (factor or 1.0) for name, (code, factor, _) in _LABS.items()}
    wide = labs.select(
        pl.col("record_id").alias("case"), *(value.round(2).alias(code) for code, value in local.items())
    )
    return wide.unpivot(index="case", variable_name="code", value_name="result").fill_null(_NOT_DONE).sort("case")


def _local_notes(notes: pl.DataFrame) -> pl.DataFrame:
    words = pl.col("text").str.split(" ")
    half = words.list.len() // 2
    return notes.select(
        case="record_id", history=words.list.head(half).list.join(" "),
        findings=words.list.slice(half).list.join(" "),
    )  # fmt: skip
