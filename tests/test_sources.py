"""File formats, cells and units."""

from __future__ import annotations

import gzip
from pathlib import Path

import numpy as np
import polars as pl
import pytest
from cohorts import Hospital
from hypothesis import given, settings
from hypothesis import strategies as st

from gapweave.client.sources import SOURCES
from gapweave.client.sources.cells import code_text, id_text, numbers
from gapweave.client.sources.files import Files, read_table
from gapweave.client.sources.units import conversion
from gapweave.shared.config.modalities import category_code
from gapweave.shared.errors import DataError, UsageError

# --- formats: every registered one keeps this contract ---


@pytest.mark.parametrize("extension", list(SOURCES))
def test_every_format_reads_named_columns_in_file_order(tmp_path: Path, extension: str) -> None:
    hospital = Hospital(tmp_path)
    path = hospital.write(f"table.{extension}", {"a": ["x", "y", None], "b": [1.5, None, 3.0], "c": ["1", "2", "3"]})
    table = read_table(path, ["c", "b", "absent"])
    assert table.names == ("a", "b", "c")
    assert table.frame.columns == ["b", "c"]
    values, unreadable = numbers(table.column("b"))
    np.testing.assert_array_equal(values, [1.5, np.nan, 3.0])
    assert unreadable == 0
    assert id_text(table.column("c")).to_list() == ["1", "2", "3"]
    with pytest.raises(DataError, match="no column 'absent'"):
        table.column("absent")


def test_compressed_csv(tmp_path: Path) -> None:
    path = tmp_path / "TABLE.CSV.GZ"
    path.write_bytes(gzip.compress(b"a,b\n001,2\n"))
    assert read_table(path, ["a"]).column("a").to_list() == ["001"]


def test_byte_order_mark_is_no_part_of_the_first_name(tmp_path: Path) -> None:
    path = tmp_path / "excel.csv"
    path.write_bytes("\ufeffid,b\n1,2\n".encode())
    assert read_table(path, ["id"]).names == ("id", "b")


def test_paths_with_pattern_characters_are_plain_names(tmp_path: Path) -> None:
    for name in ("a[1].csv", "a[1].parquet"):
        Hospital(tmp_path).write(name, {"a": [1]})
        assert len(read_table(tmp_path / name, ["a"]).frame) == 1


def test_paths_are_looked_up_in_the_data_folder_then_beside_the_site_file(tmp_path: Path) -> None:
    data, beside = tmp_path / "data", tmp_path / "site"
    for folder in (data, beside):
        folder.mkdir()
        (folder / "both.csv").touch()
    (beside / "one.csv").touch()
    files = Files(site_file=beside / "site.yaml", data_dir=data)
    assert files.find("both.csv") == data / "both.csv"
    assert files.find("one.csv") == beside / "one.csv"
    assert files.find(str(beside / "both.csv")) == beside / "both.csv"
    assert Files(site_file=beside / "site.yaml").find("both.csv") == beside / "both.csv"
    with pytest.raises(DataError, match="there is no two"):
        files.find("two.csv")


def test_users_data_folder_is_the_last_resort(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("platformdirs.user_data_path", lambda name: tmp_path / name)
    (tmp_path / "gapweave").mkdir()
    (tmp_path / "gapweave" / "set.csv").touch()
    assert Files(site_file=tmp_path / "site" / "x.yaml").find("set.csv") == tmp_path / "gapweave" / "set.csv"


# --- cells ---


@settings(deadline=None)
@given(st.lists(st.one_of(st.none(), st.floats(), st.integers(-(10**9), 10**9)), max_size=8))
def test_codes_are_those_of_the_study_file(values: list[float | int | None]) -> None:
    series = pl.Series(values, dtype=pl.Float64, strict=False)
    expected = [None if value is None or value != value else category_code(float(value)) for value in values]
    assert code_text(series).to_list() == expected


@settings(deadline=None)
@given(st.lists(st.one_of(st.none(), st.text(max_size=6)), max_size=8))
def test_codes_of_texts_are_those_of_the_study_file(values: list[str | None]) -> None:
    expected = [None if value is None else category_code(value) for value in values]
    assert code_text(pl.Series(values, dtype=pl.String)).to_list() == expected


@settings(deadline=None)
@given(st.integers(-(2**53) + 1, 2**53 - 1))
def test_a_whole_number_is_the_same_id_in_every_type(number: int) -> None:
    series = [
        pl.Series([number]),
        pl.Series([float(number)]),
        pl.Series([str(number)]),
        pl.Series([f" {number}.0"]),
    ]
    assert {id_text(one)[0] for one in series} == {str(number)}


def test_numbers_and_what_is_missing() -> None:
    values, unreadable = numbers(pl.Series(["1", " 2.5 ", "", "NA", "nan", None, "inf", "high", "1,5", "n/a"]))
    np.testing.assert_array_equal(values[:2], [1, 2.5])
    assert np.isinf(values[6])
    assert np.isnan(np.delete(values, [0, 1, 6])).all()
    assert unreadable == 2
    assert numbers(pl.Series([True, None]))[0].tolist()[0] == 1


@pytest.mark.parametrize("kind", [pl.Float32, pl.Float64, pl.String])
def test_a_code_is_the_same_in_every_width(kind: type[pl.DataType]) -> None:
    """It was believed that a float is a float: -99.9 in four bytes was no code for missing, and was read as measured."""
    cells = pl.Series(["-99.9", "0.1", "5", None]).cast(kind)
    assert code_text(cells).to_list() == ["-99.9", "0.1", "5", None]


# --- units ---


@pytest.mark.parametrize(
    ("local", "target", "molar_mass", "value", "expected"),
    [
        ("mg/dL", "mmol/L", 180.156, 90.0, 4.9957),
        ("mmol/L", "mg/dL", 180.156, 5.0, 90.078),
        ("degF", "degC", None, 98.6, 37.0),
        ("°F", "°C", None, 98.6, 37.0),
        ("K", "degC", None, 310.15, 37.0),
        ("kPa", "mmHg", None, 1.0, 7.50062),
        ("10*3/uL", "10*9/L", None, 7.0, 7.0),
        ("10^9/L", "1/nL", None, 7.0, 7.0),
        ("/min", "1/min", None, 60.0, 60.0),
        ("percent", "1", None, 21.0, 0.21),
        ("lb", "kg", None, 100.0, 45.3592),
        ("mm[Hg]", "mmHg", None, 120.0, 120.0),
        ("Cel", "degF", None, 37.0, 98.6),
    ],
)
def test_conversions(local: str, target: str, molar_mass: float | None, value: float, expected: float) -> None:
    factor, offset = conversion(local, target, molar_mass, "site.yaml:x")
    assert value * factor + offset == pytest.approx(expected, rel=1e-4)


@pytest.mark.parametrize(
    ("local", "target", "named"),
    [
        ("mg/dL", "mmol/L", ["'mg/dL'", "'mmol/L'", "molar_mass"]),
        ("cm", "kg", ["'cm'", "'kg'"]),
        ("dB", "1", ["'dB'"]),
    ],
)
def test_incompatible_units_name_both(local: str, target: str, named: list[str]) -> None:
    with pytest.raises(UsageError) as caught:
        conversion(local, target, None, "site.yaml:x")
    assert all(text in str(caught.value) for text in named)


@pytest.mark.parametrize("unit", ["furlongs/fortnigth", "mg//dL", "", "__import__('os')", "10E9/L", "10 9/L"])
def test_unknown_unit(unit: str) -> None:
    with pytest.raises(UsageError, match=r"is not known|cannot be converted"):
        conversion(unit, "kg", None, "site.yaml:x")
