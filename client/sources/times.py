"""Hours between a record's index time and its values, given as hours or as timestamps."""

from __future__ import annotations

import datetime

import numpy as np
import polars as pl
from numpy.typing import NDArray

from gapweave.client.sources.cells import missing, numbers
from gapweave.client.sources.files import Table
from gapweave.client.sources.records import Reading
from gapweave.shared.errors import DataError

MICROSECONDS = 3.6e9
"""Of an hour."""
DAY = 24 * MICROSECONDS

_DATE = r"\d{4}-\d{2}-\d{2}"
_ZONE = r"(Z|[+-]\d{2}:?\d{2})$"
_MIDNIGHT = rf"^{_DATE}[ T]00:00(:00(\.0+)?)?{_ZONE[:-1]}?$"
_FORMATS = ("%Y-%m-%d %H:%M:%S%.f", "%Y-%m-%d %H:%M")


def hours_of(
    table: Table, time: str, index: str | None, rows: NDArray[np.int64], reading: Reading
) -> NDArray[np.float64]:
    """Hours since the index time of the record that a row belongs to.

    Args:
        table: the file of values.
        time: its time column: hours, or timestamps when there is an index column; a date alone counts from its end.
        index: records column with the index time; a date alone counts from its beginning.
        rows: [E] the record of each row, -1 for none of the site's.
        reading: the modality; unreadable times of the site's records are noted in it.

    Returns:
        [E], NaN where the time is not known: such a value is never read.

    Raises:
        DataError: when the columns hold no times, or only one of them names a time zone.
    """
    series = table.column(time)
    if index is None:
        hour = _numeric(series, table.where(time))
    else:
        at, zoned = _timestamps(series, table.where(time))
        days = dates_alone(series)
        at = at + np.where(days, DAY, 0.0)  # when on that day nobody knows: it must not be read too early
        starts, starts_zoned = _timestamps(reading.records.table.column(index), reading.records.table.where(index))
        if zoned != starts_zoned:
            raise DataError(
                "of the time and the index column only one names a time zone",
                where=table.where(time),
                remedy=f"Write both with a time zone, or both without (index: {index!r})",
            )
        hour = (at - starts[np.maximum(rows, 0)]) / MICROSECONDS
        if (dated := int((days & (rows >= 0)).sum())) > 0:
            reading.warn(
                "time",
                table.where(time),
                f"{dated} of {int((rows >= 0).sum())} rows have a date alone, and count from the end of that day",
                "Write timestamps such as 2024-05-01 13:00 if the time is known",
            )
        begun = np.isnan(starts[np.maximum(rows, 0)]) & (rows >= 0)
        if begun.any():
            records = len(np.unique(rows[begun]))
            where = reading.records.table.where(index)
            message = f"{records} records have no readable index time: none of their {int(begun.sum())} rows are read"
            reading.warn("time", where, message, "Fill in the index times")
            rows = np.where(begun, -1, rows)
    unknown = int((np.isnan(hour) & (rows >= 0)).sum())
    if unknown:
        reading.warn(
            "time",
            table.where(time),
            f"{unknown} of {int((rows >= 0).sum())} rows have no readable time and are not read",
            "Fill in hours, or timestamps such as 2024-05-01 13:00",
        )
    return hour


def _numeric(series: pl.Series, where: str) -> NDArray[np.float64]:
    if series.dtype.is_temporal():
        hour, unreadable = np.empty(0), len(series)
    else:
        hour, unreadable = numbers(series)
    if unreadable and unreadable == len(series) - series.null_count():
        raise DataError(
            "the time column does not hold numbers (hours)",
            where=where,
            remedy="For timestamps, give `index`: the records column with the index time",
        )
    return np.where(np.isfinite(hour), hour, np.nan)


def dates_alone(series: pl.Series) -> NDArray[np.bool_]:
    """Which cells of a column of timestamps are a date without a time of day.

    A column that says midnight throughout is one of dates, written as timestamps by the system that it came from.
    """
    if series.dtype == pl.Date:
        return np.full(len(series), True)
    if isinstance(series.dtype, pl.Datetime):
        return np.full(len(series), bool((series.dt.time() == datetime.time()).all()))
    if series.dtype != pl.String:
        return np.full(len(series), False)
    text = series.str.strip_chars()
    dated: NDArray[np.bool_] = text.str.contains(rf"^{_DATE}$").fill_null(False).to_numpy()
    midnight = text.str.contains(_MIDNIGHT).fill_null(False).to_numpy()
    return dated | midnight if (dated | midnight | missing(text).to_numpy()).all() else dated


def moments(series: pl.Series) -> tuple[NDArray[np.float64], bool]:
    """Microseconds since the epoch (NaN where unknown), and whether the column names a time zone."""
    if series.dtype == pl.Date:
        series = series.cast(pl.Datetime("us"))
    if isinstance(series.dtype, pl.Datetime):
        zoned = series.dtype.time_zone is not None
        found = series.dt.timestamp("us")
    elif series.dtype == pl.String:
        found, zoned = _parsed(series)
    else:
        found, zoned = pl.Series([None] * len(series), dtype=pl.Int64), False
    return found.cast(pl.Float64).fill_null(float("nan")).to_numpy(), zoned


def _timestamps(series: pl.Series, where: str) -> tuple[NDArray[np.float64], bool]:
    found, zoned = moments(series)
    if len(series) and np.isnan(found).all():
        raise DataError(
            "the column does not hold timestamps",
            where=where,
            remedy="Write timestamps such as 2024-05-01 13:00, or hours and no `index`",
        )
    return found, zoned


def _parsed(series: pl.Series) -> tuple[pl.Series, bool]:
    text = series.str.strip_chars().str.replace("T", " ", literal=True)
    text = text.set(missing(text), None)
    zoned = bool(text.str.contains(_ZONE).any())
    text = text.str.replace("Z$", "+00:00").str.replace(rf"^({_DATE})$", "$1 00:00")
    result = pl.Series([None] * len(text), dtype=pl.Int64)
    for layout in _FORMATS:
        found = text.str.to_datetime(layout + ("%:z" if zoned else ""), time_unit="us", strict=False)
        result = result.zip_with(result.is_not_null(), found.dt.timestamp("us"))
    return result, zoned
