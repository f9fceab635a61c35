"""Units, windows and forms of a table: what changes what a model sees, and what does not."""

from __future__ import annotations

import math
import tempfile
from datetime import date, datetime, timedelta
from pathlib import Path
from typing import Any

import numpy as np
import polars as pl
import pytest
import torch
from cohorts import LABS, NOTE, VITALS, Hospital, assert_same, sodium_of, study, value_of
from hypothesis import given, settings
from hypothesis import strategies as st

from gapweave.client.sources.findings import Finding
from gapweave.shared.errors import DataError, UsageError

START = datetime(2024, 5, 1, 13)


@pytest.fixture
def hospital(tmp_path: Path) -> Hospital:
    hospital = Hospital(tmp_path)
    hospital.records()
    return hospital


values_of_eight = st.lists(st.floats(1.5, 39.5), min_size=8, max_size=8)


@settings(deadline=None, max_examples=25)
@given(values_of_eight)
def test_a_record_in_two_units_gives_the_same_input(values: list[float]) -> None:
    with tempfile.TemporaryDirectory() as folder:
        hospital = Hospital(Path(folder))
        hospital.records()
        ids = [f"r{row}" for row in range(8)]
        celsius = [value + 2 for value in values]
        hospital.write("labs.csv", {"id": ids, "glucose": values, "temp": celsius})
        hospital.add("labs", file="labs.csv", columns={"glucose": "glucose", "temperature": "temp"})
        plain = hospital.load(study({"labs": LABS}))
        american = {
            "g": [value * 18.0156 for value in values],
            "t": [value * 9 / 5 + 32 for value in celsius],
        }
        hospital.write("labs.csv", {"id": ids, **american})
        by_unit = {
            "glucose": {"column": "g", "unit": "mg/dL"},
            "temperature": {"column": "t", "unit": "degF"},
        }
        by_factor = {
            "glucose": {"column": "g", "factor": 1 / 18.0156},
            "temperature": {"column": "t", "factor": 5 / 9, "offset": -160 / 9},
        }
        for columns in (by_unit, by_factor):
            hospital.add("labs", file="labs.csv", columns=columns)
            assert_same(hospital.load(study({"labs": LABS})), plain, tolerance=1e-5)


def oddities(hospital: Hospital) -> list[Finding]:
    """What is odd about the values: some of these records have none at all, which is told too."""
    return [finding for finding in hospital.findings(study({"labs": LABS})) if finding.id != "empty_records"]


def test_unit_without_a_unit_in_the_study(hospital: Hospital) -> None:
    hospital.labs()
    hospital.add("labs", file="labs.csv", columns={"sex": "na", "sodium": {"column": "na", "unit": "mg/dL"}})
    bare = {"kind": "table", "columns": {"sodium": {"low": 1, "high": 2}, "sex": {"categories": [0, 1]}}}
    with pytest.raises(UsageError, match="the study gives no unit"):
        hospital.load(study({"labs": bare}))


# --- tables ---


def test_missing_values_of_the_site_file(hospital: Hospital) -> None:
    hospital.labs(na=[0, 140, -9, 141, 0, 142, 143, 144], sex=["u", 0, 1, 1, 1, "u", 0, 0])
    sodium, sex = {"column": "na", "missing": [0, "-9"]}, {"column": "sex", "missing": ["u"]}
    hospital.add("labs", file="labs.csv", columns={"sodium": sodium, "sex": sex})
    cohort = hospital.load(study({"labs": LABS}))
    assert value_of(cohort, "sodium:observed").tolist() == [0, 1, 0, 1, 0, 1, 1, 1]
    assert cohort.batch.present[:, 0].tolist() == [False] + [True] * 7
    assert oddities(hospital) == []


def test_categories_by_codes(hospital: Hospital) -> None:
    hospital.labs(sex=["F", "M", "", "x", "NA", "M ", "F", "F"])
    hospital.add("labs", file="labs.csv", columns={"sex": {"column": "sex", "codes": {"F": 0, "M": 1}}})
    cohort = hospital.load(study({"labs": LABS}))
    assert value_of(cohort, "sex=0").tolist() == [1, 0, 0, 0, 0, 0, 1, 1]
    assert value_of(cohort, "sex=1").tolist() == [0, 1, 0, 0, 0, 1, 0, 0]
    (finding,) = oddities(hospital)
    assert (finding.id, finding.status) == ("codes", "warning")
    assert finding.message.startswith("1 of 8 cells")


def test_numbers_by_codes(hospital: Hospital) -> None:
    hospital.labs(na=["low", "high"] * 4)
    hospital.add("labs", file="labs.csv", columns={"sodium": {"column": "na", "codes": {"low": 120, "high": 150}}})
    assert sodium_of(hospital.load(study({"labs": LABS}))).tolist() == pytest.approx([120, 150] * 4)


def test_repeated_rows_without_time_give_the_first_and_a_warning(hospital: Hospital) -> None:
    hospital.labs(id=["r0", "r0", "r1", "r2", "r3", "r4", "r5", "r5"])
    cohort = hospital.load(study({"labs": LABS}))
    assert sodium_of(cohort).tolist()[:2] == pytest.approx([140, 142])
    (finding,) = oddities(hospital)
    assert (finding.id, finding.status) == ("several_rows", "warning")
    assert finding.message.startswith("2 rows")


TIMED = {**LABS, "hours": 24}


def timed(hospital: Hospital, rows: list[tuple[str, float | None, float | None]]) -> None:
    ids, hours, values = zip(*rows, strict=True)
    hospital.write("timed.parquet", {"id": list(ids), "hour": list(hours), "na": list(values)})
    hospital.add("labs", file="timed.parquet", time="hour", columns={"sodium": "na"})


def test_timed_table_takes_the_last_value_before_the_prediction_time(hospital: Hospital) -> None:
    rows = [
        ("r0", 5.0, 130.0),
        ("r0", 23.9, 135.0),
        ("r0", 24.0, 150.0),
        ("r0", 2.0, 120.0),
        ("r0", 23.95, None),
        ("r0", 23.96, math.inf),
    ]
    timed(hospital, [*rows, ("r1", -9.0, 131.0), ("r2", 25.0, 132.0), ("r3", None, 133.0), ("x", 1.0, 134.0)])
    cohort = hospital.load(study({"labs": TIMED}), labels=False)
    assert cohort.batch.present[:4, 0].tolist() == [True, True, False, False]
    assert sodium_of(cohort).tolist()[:2] == pytest.approx([135, 131])


@pytest.mark.parametrize(("factor", "noted"), [(1, False), (60, True), (3600, True)])
def test_minutes_for_hours_are_noted(hospital: Hospital, factor: int, noted: bool) -> None:
    """All but the first minutes of a stay were dropped, and nobody was told."""
    timed(hospital, [(f"r{row % 4}", factor * row * 0.12, 130.0) for row in range(400)])
    findings: list[Finding] = []
    hospital.load(study({"labs": TIMED}), labels=False, findings=findings)
    found = [one.message for one in findings if one.id == "time"]
    assert bool(found) is noted
    assert all("are 24 hours or later, and not read" in text for text in found)


@pytest.mark.parametrize(("shift", "noted"), [(0, False), (-10, False), (-14, True)])
def test_series_that_end_before_they_begin_are_noted(hospital: Hospital, shift: int, noted: bool) -> None:
    """With a wrong index time nearly everything was dropped, and nobody was told."""
    timed(hospital, [(f"r{row % 4}", row % 24 + shift, 130.0) for row in range(96)])
    findings: list[Finding] = []
    card = {"low": 110, "high": 170}
    series = {"kind": "series", "hours": 24, "columns": {"sodium": card}}
    hospital.load(study({"labs": series}), labels=False, findings=findings)
    found = [one.message for one in findings if one.id == "time"]
    assert found == ([f"{-4 * shift} of 96 values lie before the record's index time, and are not read"] * noted)


def test_time_without_prediction_time_is_refused(hospital: Hospital) -> None:
    timed(hospital, [("r0", 5.0, 130.0)])
    with pytest.raises(UsageError, match="no prediction time"):
        hospital.load(study({"labs": LABS}))


later = st.lists(
    st.tuples(st.integers(0, 7), st.floats(24, 1e6), st.one_of(st.none(), st.floats())),
    min_size=1,
    max_size=6,
)


@settings(deadline=None, max_examples=50)
@given(later)
def test_what_happens_at_or_after_the_prediction_time_changes_nothing(
    events: list[tuple[int, float, float]],
) -> None:
    before = [(f"r{row}", float(row), 110.0 + row) for row in range(6)]
    modalities = {"labs": TIMED, "vitals": VITALS, "note": NOTE}
    with tempfile.TemporaryDirectory() as folder:
        hospital = Hospital(Path(folder))
        hospital.records()

        def load(rows: list[tuple[str, float, float | None]]) -> Any:
            timed(hospital, rows)
            hospital.add("vitals", file="timed.parquet", time="hour", columns={"bp": "na"})
            hospital.add("note", file="timed.parquet", time="hour", columns=["na"])
            return hospital.load(study(modalities), findings=findings)

        findings: list[Any] = []
        plain = load(before)
        assert plain.batch.present[:, 0].tolist() == [True] * 6 + [False] * 2
        mixed = [(f"r{record}", hour, value) for record, hour, value in events]
        assert_same(load([*mixed[:2], *before, *mixed[2:]]), plain)
        assert {finding.message[:6] for finding in findings} == {"2 of 8"}  # without any modality, in both alike
        assert {finding.id for finding in findings} == {"empty_records"}


# --- series ---


def wide(hospital: Hospital) -> None:
    columns = {
        "id": ["r0", "r0", "r1", "r1", "r2", "r2", "r9"],
        "hour": [0.0, 23.0, 1.5, 1.25, 24.0, -1.0, 3.0],
        "bp": [120.0, 130.0, 110.0, 112.0, 90.0, 91.0, 99.0],
        "pulse": [None, 80.0, None, 70.0, None, None, 60.0],
    }
    hospital.write("vitals.csv", columns)
    hospital.add("vitals", file="vitals.csv", time="hour", columns={"bp": "bp", "pulse": "pulse"})


def test_series_by_hour(hospital: Hospital) -> None:
    wide(hospital)
    cohort = hospital.load(study({"vitals": VITALS}))
    inputs = cohort.batch.inputs["vitals"]
    assert inputs.shape == (8, 24, 4)
    assert cohort.batch.present[:, 0].tolist() == [True, True] + [False] * 6
    observed = [(row, hour, at) for row, hour, at in torch.nonzero(inputs[..., 2:]).tolist()]
    assert observed == [(0, 0, 0), (0, 23, 0), (0, 23, 1), (1, 1, 0), (1, 1, 1)]
    assert float(inputs[1, 1, 0]) == pytest.approx((111 - 155) / 62.5)


def test_series_without_time_is_refused(hospital: Hospital) -> None:
    hospital.labs()
    hospital.add("vitals", file="labs.csv", columns={"bp": "na"})
    with pytest.raises(UsageError, match="needs the time"):
        hospital.load(study({"vitals": VITALS}))


@pytest.mark.parametrize("codes", [["bp", "pulse"], [220052, 220045], [220052.0, 220045.0]])
@pytest.mark.parametrize("file", ["long.csv", "long.parquet"])
def test_long_form_equals_wide_form(hospital: Hospital, codes: list[Any], file: str) -> None:
    wide(hospital)
    plain = hospital.load(study({"vitals": VITALS}))
    frame = pl.read_csv(hospital.folder / "vitals.csv").unpivot(["bp", "pulse"], index=["id", "hour"])
    items = frame["variable"].replace_strict(["bp", "pulse"], codes)
    hospital.write(file, {**frame.drop("variable").to_dict(as_series=False), "item": items.to_list()})
    columns = {"bp": codes[0], "pulse": {"column": str(codes[1])}}
    hospital.add("vitals", file=file, time="hour", item="item", value="value", columns=columns)
    assert_same(hospital.load(study({"vitals": VITALS})), plain)


def test_long_form_equals_wide_form_for_tables(hospital: Hospital) -> None:
    hospital.labs(sex=[0, 1] * 4)
    hospital.add("labs", file="labs.csv", columns={"sodium": "na", "sex": "sex"})
    plain = hospital.load(study({"labs": LABS}))
    ids = [f"r{row}" for row in range(8)]
    values = [str(140.0 + row) for row in range(8)] + ["0", "1"] * 4
    hospital.write("long.csv", {"id": ids * 2, "item": ["Na"] * 8 + ["sex"] * 8, "value": values})
    hospital.add("labs", file="long.csv", item="item", value="value", columns={"sodium": "Na", "sex": "sex"})
    assert_same(hospital.load(study({"labs": LABS})), plain)
    assert oddities(hospital) == []


def test_long_codes_and_codes_that_look_like_powers_stay_apart(hospital: Hospital) -> None:
    """Codes of 18 digits were rounded to one, and the ward 2E1 was the ward 20."""
    codes = ["900000000000207008", "900000000000207009", "2E1", "20"]
    hospital.records(8, ward=["2E1", "20"] * 4)
    hospital.labs(8, kind=codes * 2)
    hospital.add("labs", file="labs.csv", columns={"kind": "kind"})
    of = study({"labs": {"kind": "table", "columns": {"kind": {"categories": codes}}}})
    assert hospital.load(of).batch.inputs["labs"].tolist() == np.tile(np.eye(4), (2, 1)).tolist()
    hospital.update("records", where={"ward": "2E1"})
    assert hospital.load(of, labels=False).record_ids == ("r0", "r2", "r4", "r6")


def test_a_category_stands_once() -> None:
    with pytest.raises(ValueError, match="'1' stands twice"):
        study({"labs": {"kind": "table", "columns": {"kind": {"categories": ["1", "01"]}}}})


@pytest.mark.parametrize("kind", ["text", "date", "midnight", "midnight, zoned", "datetime"])
def test_a_date_alone_counts_from_the_end_of_its_day(hospital: Hospital, kind: str) -> None:
    """It was read as midnight: a value of that night could come from after the prediction time.

    Many systems write a date as a timestamp at midnight.
    """
    zone = "+02:00" if "zoned" in kind else ""
    hospital.records(8, start=[f"2024-05-01 23:00{zone}"] * 8)
    days = [date(2024, 5, day) for day in (1, 2, 3)] * 8
    times: dict[str, list[Any]] = {
        "text": [str(day) for day in days],
        "date": list(days),
        "midnight": [f"{day} 00:00:00" for day in days],
        "midnight, zoned": [f"{day}T00:00:00.000{zone}" for day in days],
        "datetime": [datetime.combine(day, datetime.min.time()) for day in days],
    }
    ids = [f"r{row}" for row in range(8) for _ in range(3)]
    hospital.write("vitals.parquet", {"id": ids, "when": times[kind], "bp": [100.0, 200.0, 300.0] * 8})
    hospital.add("vitals", file="vitals.parquet", time="when", index="start", midnight="date", columns={"bp": "bp"})
    true = [f"2024-05-02 00:00{zone}"] * 8 + [f"2024-05-09 13:00{zone}"]  # the last is beyond the window
    only = {"id": [f"r{row}" for row in (*range(8), 0)], "when": true, "bp": [100.0] * 9}
    found = hospital.load(study({"vitals": VITALS}))
    (finding,) = [one for one in hospital.findings(study({"vitals": VITALS})) if "date alone" in one.message]
    assert finding.message.startswith("24 of 24 rows")
    vitals = {"file": "vitals.parquet", "time": "when", "index": "start", "columns": {"bp": "bp"}}
    hospital.add("vitals", **vitals, midnight="time")
    hospital.write("vitals.parquet", only)
    assert_same(found, hospital.load(study({"vitals": VITALS})))


@pytest.mark.parametrize("midnight", ["2024-05-02 00:00:00", "2024-05-02 0:00", "2024-5-2 0:0:0", "2024-05-02  00:00"])
def test_times_that_are_all_midnight_are_refused_until_somebody_says_what_they_are(
    hospital: Hospital, midnight: str
) -> None:
    hospital.records(8, start=["2024-05-01 23:00"] * 8)
    ids = [f"r{row}" for row in range(8) for _ in range(3)]
    hospital.write("vitals.csv", {"id": ids, "when": [midnight] * 24, "bp": [100.0] * 24})
    hospital.add("vitals", file="vitals.csv", time="when", index="start", columns={"bp": "bp"})
    with pytest.raises(DataError, match=r"24 times are midnight throughout.*`midnight: date`.*:data\.vitals"):
        hospital.load(study({"vitals": VITALS}))
    vitals = {"file": "vitals.csv", "time": "when", "index": "start", "columns": {"bp": "bp"}}
    hospital.add("vitals", **vitals, midnight="time")
    assert hospital.load(study({"vitals": VITALS})).batch.present.all()
    hospital.add("vitals", **vitals, midnight="date")
    with pytest.raises(DataError, match="no training record has a label and data"):
        hospital.load(study({"vitals": VITALS}))


def test_a_zone_of_hours_alone_is_one(hospital: Hospital) -> None:
    """As PostgreSQL writes them."""
    hospital.records(8, start=["2024-05-01 23:00:00+02"] * 8)
    when = ["2024-05-01 22:30:00+00", "2024-05-01 23:30:00.5+00"] * 4
    hospital.write("vitals.csv", {"id": [f"r{row}" for row in range(8)], "when": when, "bp": [100.0] * 8})
    hospital.add("vitals", file="vitals.csv", time="when", index="start", columns={"bp": "bp"})
    inputs = hospital.load(study({"vitals": VITALS})).batch.inputs["vitals"]
    hours = [int(row.abs().sum(dim=-1).nonzero()[0]) for row in (inputs[0], inputs[1])]
    assert hours == [1, 2]


@pytest.mark.parametrize(
    ("start", "when"),
    [
        ("2024-05-01 00:00", "2024-05-01 13:30"),
        ("2024-05-01 00:00Z", "2024-05-01 13:30Z"),
        ("2024-05-01 00:00", "2024-05-01 13:30+02:00"),
        ("2024-05-01", "never"),
    ],
)
def test_how_one_patients_times_are_written_changes_no_others_hours(hospital: Hospital, start: str, when: str) -> None:
    hospital.records(8, start=["2024-05-01 00:00"] * 7 + [start])
    ids = [f"r{row}" for row in range(8) for _ in range(3)]
    times = ["2024-05-01 00:00", "2024-05-01 05:00", "2024-05-01"] * 8
    found = []
    for last in (times[-1], when):
        hospital.write("vitals.csv", {"id": ids, "when": [*times[:-1], last], "bp": [100.0, 120.0, 90.0] * 8})
        hospital.add("vitals", file="vitals.csv", time="when", index="start", columns={"bp": "bp"})
        found.append(hospital.load(study({"vitals": VITALS})).batch)
    assert torch.equal(found[0].inputs["vitals"][:7], found[1].inputs["vitals"][:7])
    assert found[1].present[:7].all()


def test_a_missing_index_time_is_told_as_that(hospital: Hospital) -> None:
    """It was the times of the values that were said to be unreadable."""
    hospital.records(8, start=["2024-05-01 23:00", ""] * 4, y=[0, 0, 1, 1] * 2)
    ids = [f"r{row}" for row in range(8) for _ in range(2)]
    times = ["2024-05-02 01:00", "never"] * 8
    hospital.write("vitals.csv", {"id": ids, "when": times, "bp": [100.0] * 16})
    hospital.add("vitals", file="vitals.csv", time="when", index="start", columns={"bp": "bp"})
    found = [(one.where, one.message) for one in hospital.findings(study({"vitals": VITALS})) if one.id == "time"]
    assert found == [
        (
            f"{hospital.folder}/records.csv:start",
            "4 records have no readable index time: none of their 8 rows are read",
        ),
        (f"{hospital.folder}/vitals.csv:when", "4 of 8 rows have no readable time and are not read"),
    ]


@pytest.mark.parametrize(
    "form",
    ["datetime", "%Y-%m-%d %H:%M:%S", "%Y-%m-%dT%H:%M", "%Y-%m-%dT%H:%M:%SZ", "%Y-%m-%d %H:%M:%S+02:00"],
)
def test_timestamps_equal_hours(hospital: Hospital, form: str) -> None:
    wide(hospital)
    plain = hospital.load(study({"vitals": VITALS}))
    starts = [START + timedelta(days=row, minutes=7 * row) for row in range(8)]
    frame = pl.read_csv(hospital.folder / "vitals.csv")
    rows = [int(name[1:]) % 8 for name in frame["id"]]
    times = [starts[row] + timedelta(hours=hour) for row, hour in zip(rows, frame["hour"], strict=True)]

    def written(moments: list[datetime]) -> list[Any]:
        return moments if form == "datetime" else [moment.strftime(form) for moment in moments]

    table = {
        "id": [f"r{row}" for row in range(8)],
        "patient": [f"p{row}" for row in range(8)],
        "y": [0, 1] * 4,
    }
    hospital.write("records.parquet", {**table, "start": written(starts)})
    hospital.update("records", file="records.parquet")
    values = frame.drop("hour").to_dict(as_series=False)
    hospital.write("vitals.parquet", {**values, "when": written(times)})
    columns = {"bp": "bp", "pulse": "pulse"}
    hospital.add("vitals", file="vitals.parquet", time="when", index="start", columns=columns)
    assert_same(hospital.load(study({"vitals": VITALS})), plain)


def test_rows_without_a_readable_time_are_counted_and_not_read(hospital: Hospital) -> None:
    hospital.write("vitals.csv", {"id": ["r0", "r1", "r2", "x"], "hour": ["1", "soon", None, None], "bp": [120] * 4})
    hospital.add("vitals", file="vitals.csv", time="hour", columns={"bp": "bp"})
    findings: list[Any] = []
    cohort = hospital.load(study({"vitals": VITALS}), labels=False, findings=findings)
    assert cohort.batch.present[:, 0].tolist() == [True] + [False] * 7
    assert [finding.id for finding in findings] == ["time"]
    assert findings[0].message.startswith("2 of 3 rows")


# --- text ---


def test_text_columns_are_joined(hospital: Hospital) -> None:
    ids = [f"r{row}" for row in range(8)]
    hospital.write("notes.csv", {"id": ids, "a": ["chest pain"] * 7 + [""], "b": [None, "at rest", *[""] * 6]})
    hospital.add("note", file="notes.csv", columns=["a", "b"])
    joined = hospital.load(study({"note": NOTE}))
    assert joined.batch.present[:, 0].tolist() == [True] * 7 + [False]
    hospital.write("notes.csv", {"id": ids, "a": ["chest pain", "chest pain at rest", *["chest pain"] * 5, ""]})
    hospital.add("note", file="notes.csv", columns=["a"])
    assert_same(hospital.load(study({"note": NOTE})), joined)


def test_what_stands_for_an_empty_cell_is_no_word(hospital: Hospital) -> None:
    """As other programs write notes that are not there; a record with nothing else was trained on the word nan."""
    ids = [f"r{row}" for row in range(8)]
    words = ["nan", "None", "null", "NA", " nan ", "", "pain", "no nan bread"]
    hospital.write("notes.csv", {"id": ids, "a": words, "b": [None, "NaN", *[""] * 6]})
    hospital.add("note", file="notes.csv", columns=["a", "b"])
    assert hospital.load(study({"note": NOTE}), labels=False).batch.present[:, 0].tolist() == [False] * 6 + [True] * 2


def test_blank_lines_are_no_rows(hospital: Hospital) -> None:
    hospital.labs(8, na=[140.0] * 8)
    before = hospital.load(study({"labs": LABS}))
    for name in ("records.csv", "labs.csv"):
        file = hospital.folder / name
        header, *rows = file.read_text().splitlines()
        file.write_text("\n".join([header, *rows[:3], "", *rows[3:], "," * header.count(","), "", ""]) + "\n")
    assert_same(hospital.load(study({"labs": LABS})), before)


def test_timed_texts_are_joined_in_time(hospital: Hospital) -> None:
    hospital.write(
        "notes.csv", {"id": ["r0"] * 3 + ["r1"], "hour": [5, 1, 24, 2], "a": ["rest", "pain at", "died", "x"]}
    )
    hospital.add("note", file="notes.csv", time="hour", columns=["a"])
    timed = hospital.load(study({"note": NOTE}), labels=False)
    hospital.write("notes.csv", {"id": ["r0", "r1"], "a": ["pain at rest", "x"]})
    hospital.add("note", file="notes.csv", columns=["a"])
    assert_same(hospital.load(study({"note": NOTE}), labels=False), timed)


def test_a_unit_and_a_factor_may_stand_together_if_they_agree(hospital: Hospital) -> None:
    """As in the site file of the design: the factor counts, and the unit says what it is from."""
    hospital.labs(8, na=[140.0] * 8, glucose=[5.0] * 8, odd=[5.0] * 8)
    of = study({"labs": {"kind": "table", "columns": {"glucose": {"card": "glucose"}}}})

    def read(**column: Any) -> float:
        hospital.add("labs", file="labs.csv", columns={"glucose": {"column": "glucose", **column}})
        return float(hospital.load(of).batch.inputs["labs"][0, 0])

    assert read(unit="mmol/L", factor=18.0) == pytest.approx(read(unit="mmol/L"), abs=0.01)
    assert read(unit="mM of old", factor=18.0) == read(factor=18.0), "nobody knows that unit"
    for wrong in ({"factor": 2.0}, {"factor": 18.0, "offset": 5.0}):
        with pytest.raises(UsageError, match="is a factor of 18"):
            read(unit="mmol/L", **wrong)


def test_items_are_compared_as_they_are_written(hospital: Hospital) -> None:
    """Codes that differ by zeros alone were read as one item."""
    hospital.records(8)
    rows = [(f"r{row}", item, value) for row in range(8) for item, value in (("250.0", 140.0), ("250.00", 150.0))]
    ids, items, values = zip(*rows, strict=True)
    hospital.write("long.csv", {"id": list(ids), "item": list(items), "value": list(values)})
    long = {"file": "long.csv", "item": "item", "value": "value"}
    found = []
    for item in ("250.0", "250.00", "250"):
        hospital.add("labs", **long, columns={"sodium": item})
        found.append(float(value_of(hospital.load(study({"labs": LABS})), "sodium")[0]))
    assert found[0] == 0
    assert found[1] == pytest.approx(10 / 6)
    assert found[2] in found[:2], "the whole number that both may be"


def test_haemoglobin_a1c_goes_by_the_master_equation(hospital: Hospital) -> None:
    """It was believed that a millimole of a mole is a tenth of a percent: who has diabetes was well."""
    hospital.labs(8, a1c=[48.0] * 8)
    of = study({"labs": {"kind": "table", "columns": {"a1c": {"card": "hba1c"}}}})
    read = []
    for column in ({"unit": "mmol/mol"}, {"factor": 0.09148, "offset": 2.152}, {"factor": 0.1}):
        hospital.add("labs", file="labs.csv", columns={"a1c": {"column": "a1c", **column}})
        read.append(float(hospital.load(of).batch.inputs["labs"][0, 0]))
    assert read[0] == read[1] != read[2]
    assert read[0] == pytest.approx((6.54 - 5.8) / 1.2, abs=0.01)
