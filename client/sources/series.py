"""Series: a variable's values by hour."""

from __future__ import annotations

import numpy as np
from numpy.typing import NDArray

from gapweave.client.sources.records import Reading
from gapweave.client.sources.values import note_presence, numeric, read_cells
from gapweave.shared.config.modalities import SeriesModality
from gapweave.shared.config.sources import ColumnsSource, MeasurementSource
from gapweave.shared.errors import UsageError
from gapweave.shared.features import series as features


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
    for name, cells in found.items():
        value = numeric(cells, name, spec.columns[name], reading)
        hour = cells.rows.hour
        assert hour is not None
        result[name] = features.Events(record=cells.rows.record, hour=hour, value=value)
    note_presence(found, {name: np.isfinite(event.value) for name, event in result.items()}, reading)
    return result
