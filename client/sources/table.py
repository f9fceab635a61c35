"""Tables: one value a variable and record."""

from __future__ import annotations

from typing import Any

import numpy as np
from numpy.typing import NDArray

from gapweave.client.sources.records import Reading
from gapweave.client.sources.values import Cells, Rows, categorical, note_presence, numeric, read_cells
from gapweave.shared.config.site import ColumnsSource
from gapweave.shared.config.study import Categories, TableModality
from gapweave.shared.features import table as features


def read(spec: TableModality, source: ColumnsSource, reading: Reading) -> tuple[NDArray[np.float32], NDArray[np.bool_]]:
    """Read a table modality.

    With a time, a record's value is the last one before the prediction time; without, the file's first.

    Returns:
        inputs [R, width]; present [R].

    Raises:
        UsageError: for a variable that the study lacks, a unit that cannot be converted, or a time without
            prediction time.
        DataError: for a file or column that is missing or unreadable.
    """
    cells = read_cells(source, list(spec.columns), spec.hours, reading)
    _note_repeats(cells, source, reading)
    records = len(reading.records)
    values: dict[str, NDArray[Any]] = {}
    seen: dict[str, NDArray[np.bool_]] = {}
    for name, raw in cells.items():
        column, card = source.columns[name], spec.columns[name]
        if isinstance(card, Categories):
            codes = categorical(raw, name, column, card, reading)
            seen[name] = codes.astype(np.bool_)
            values[name] = _one_each(codes, seen[name], raw.rows, np.full(records, None, object))
        else:
            found = numeric(raw, name, column, card, reading)
            seen[name] = np.isfinite(found)
            values[name] = _one_each(found, seen[name], raw.rows, np.full(records, np.nan))
    note_presence(cells, seen, reading)
    return features.encode(spec.columns, values, records)


def _one_each(values: NDArray[Any], seen: NDArray[np.bool_], rows: Rows, result: NDArray[Any]) -> NDArray[Any]:
    """The last value in time of each record, or the first in the file; ``result`` where there is none."""
    at = np.flatnonzero(seen)
    # numpy keeps the last of several assignments to one place; ties in time go to the later row.
    at = at[::-1] if rows.hour is None else at[np.argsort(rows.hour[at], kind="stable")]
    result[rows.record[at]] = values[at]
    return result


def _note_repeats(cells: dict[str, Cells], source: ColumnsSource, reading: Reading) -> None:
    if source.time is not None:
        return
    repeats = {name: len(one.rows.record) - len(np.unique(one.rows.record)) for name, one in cells.items()}
    # In wide form every variable stands in the same rows: count them once.
    count = sum(repeats.values()) if source.item is not None else max(repeats.values())
    if count:
        reading.warn(
            "several_rows",
            next(iter(cells.values())).rows.table.place,
            f"{count} rows repeat a record that has a row already; the first value is used",
            "Give one row a record, or name the column with their `time`",
        )
