"""Tables: one value a variable and record."""

from __future__ import annotations

from typing import Any

import numpy as np
from numpy.typing import NDArray

from gapweave.client.sources.records import Reading
from gapweave.client.sources.values import Cells, categorical, note_presence, numeric, read_cells
from gapweave.shared.config.modalities import Categories, TableModality
from gapweave.shared.config.sources import ColumnsSource, MeasurementSource
from gapweave.shared.features import table as features


def read(
    spec: TableModality, source: ColumnsSource | MeasurementSource, reading: Reading
) -> tuple[NDArray[np.float32], NDArray[np.bool_]]:
    """Read a table modality.

    With a time, a record's value is the last one before the prediction time; without, the file's first. Measurements
    of an OMOP CDM may say otherwise.

    Returns:
        inputs [R, width]; present [R].

    Raises:
        UsageError, DataError: as `values`.
    """
    return features.encode(spec.columns, values(spec, source, reading), len(reading.records))


def values(spec: TableModality, source: ColumnsSource | MeasurementSource, reading: Reading) -> dict[str, NDArray[Any]]:
    """The value of each record, by variable that the site has.

    Returns:
        [R] a variable, in the study's unit: float64 with NaN for missing, or codes with None.

    Raises:
        UsageError: for a variable that the study lacks, a unit that cannot be converted, or a time without
            prediction time.
        DataError: for a file or column that is missing or unreadable.
    """
    cells = read_cells(source, spec.columns, spec.hours, reading)
    _note_repeats(cells, source, reading)
    records = len(reading.records)
    result: dict[str, NDArray[Any]] = {}
    seen: dict[str, NDArray[np.bool_]] = {}
    for name, raw in cells.items():
        card = spec.columns[name]
        if isinstance(card, Categories):
            codes = categorical(raw, name, card, reading)
            seen[name] = codes.astype(np.bool_)
            result[name] = _one_each(codes, seen[name], raw, np.full(records, None, object))
        else:
            found = numeric(raw, name, card, reading)
            seen[name] = np.isfinite(found)
            result[name] = _one_each(found, seen[name], raw, np.full(records, np.nan))
    note_presence(cells, seen, reading)
    return result


def _one_each(values: NDArray[Any], seen: NDArray[np.bool_], cells: Cells, result: NDArray[Any]) -> NDArray[Any]:
    """The value of each record that counts; ``result`` where there is none."""
    at, rows = np.flatnonzero(seen), cells.rows
    if cells.take == "mean":
        count = np.bincount(rows.record[at], minlength=len(result))
        total = np.bincount(rows.record[at], values[at], minlength=len(result))
        result[count > 0] = total[count > 0] / count[count > 0]
        return result
    # numpy keeps the last of several assignments to one place; ties go to the later row.
    if cells.take in ("min", "max"):
        at = at[np.argsort(values[at], kind="stable")]
    elif rows.hour is not None:
        at = at[np.argsort(rows.hour[at], kind="stable")]
    backwards = rows.hour is None if cells.take is None else cells.take in ("min", "first")
    at = at[::-1] if backwards else at
    result[rows.record[at]] = values[at]
    return result


def _note_repeats(cells: dict[str, Cells], source: ColumnsSource | MeasurementSource, reading: Reading) -> None:
    if isinstance(source, MeasurementSource) or source.time is not None:
        return
    repeats = {
        name: len(one.rows.record) - np.count_nonzero(np.bincount(one.rows.record)) for name, one in cells.items()
    }
    # In wide form every variable stands in the same rows: count them once.
    count = sum(repeats.values()) if source.item is not None else max(repeats.values())
    if count:
        reading.warn(
            "several_rows",
            next(iter(cells.values())).rows.table.place,
            f"{count} rows repeat a record that has a row already; the first value is used",
            "Give one row a record, or name the column with their `time`",
        )
