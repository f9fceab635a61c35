"""Series: a variable's values by hour."""

from __future__ import annotations

import numpy as np
from numpy.typing import NDArray

from gapweave.client.sources.records import Reading
from gapweave.client.sources.values import Cells, note_presence, numeric, read_cells
from gapweave.shared.config.modalities import SeriesModality
from gapweave.shared.config.sources import ColumnsSource, MeasurementSource
from gapweave.shared.errors import UsageError
from gapweave.shared.features import series as features

EARLY = 0.5
"""A larger share of a file's values before the index time, where no window begins, looks like another index time."""


def read(
    spec: SeriesModality, source: ColumnsSource | MeasurementSource, reading: Reading
) -> tuple[NDArray[np.float32], NDArray[np.bool_]]:
    """Read a series modality.

    Returns:
        inputs [R, T, 2V]; present [R]: any value inside the window.

    Raises:
        UsageError, DataError: as `events`.
    """
    return features.encode(spec.columns, spec.hours, events(spec, source, reading), len(reading.records))


def events(
    spec: SeriesModality, source: ColumnsSource | MeasurementSource, reading: Reading
) -> dict[str, features.Events]:
    """All measurements before the prediction time, by variable that the site has.

    Raises:
        UsageError: for a source without time, a variable that the study lacks, or a unit that cannot be
            converted.
        DataError: for a file or column that is missing or unreadable.
    """
    if isinstance(source, ColumnsSource) and source.time is None:
        raise UsageError(
            "a series needs the time of its values",
            where=reading.key(".time"),
            remedy="Name the column with hours, or the timestamps and their `index`",
        )
    result = {}
    found = read_cells(source, spec.columns, spec.hours, reading)
    _note_early(found, reading)
    for name, cells in found.items():
        value = numeric(cells, name, spec.columns[name], reading)
        hour = cells.rows.hour
        assert hour is not None
        result[name] = features.Events(record=cells.rows.record, hour=hour, value=value)
    note_presence(found, {name: np.isfinite(event.value) for name, event in result.items()}, reading)
    return result


def _note_early(found: dict[str, Cells], reading: Reading) -> None:
    """Note if most values lie before the index time; variables of one wide file stand in the same rows."""
    files = list({id(cells.rows): cells.rows for cells in found.values()}.values())
    hours = np.concatenate([rows.hour for rows in files if rows.hour is not None])
    early = int((hours < 0).sum())
    if early > EARLY * len(hours):
        reading.warn(
            "time",
            files[0].table.place,
            f"{early} of {len(hours)} values lie before the record's index time, and are not read",
            "Compare the times with the index time, and write hours (minutes / 60): a series begins there",
        )
