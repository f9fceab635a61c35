"""Hours between a record's index time and its values, given as hours or as timestamps."""

from __future__ import annotations

import datetime
from typing import TYPE_CHECKING

import numpy as np
import polars as pl
from numpy.typing import NDArray

from gapweave.client.sources.cells import missing, numbers
from gapweave.client.sources.files import Table
from gapweave.shared.config.sources import Midnight
from gapweave.shared.errors import DataError

if TYPE_CHECKING:
    from gapweave.client.sources.records import Reading

MICROSECONDS = 3.6e9
"""Of an hour."""
DAY = 24 * MICROSECONDS

SEVERAL = 20
"""Times that do not all happen to be midnight."""

# Spreadsheets write 2024-5-1 0:00, PostgreSQL's export a zone of hours alone.
_DATE = r"\d{4}-\d{1,2}-\d{1,2}"
_ZONE = r"(Z|[+-]\d{2}:?\d{2})$"
_HOUR_ZONE = r"(:\d{1,2}(?:\.\d+)?)([+-]\d{2})$"
_MIDNIGHT = rf"^{_DATE}(T|\s+)0?0:0?0(:0?0(\.0+)?)?(Z|[+-]\d{{2}}(:?\d{{2}})?)?$"
_FORMATS = ("%Y-%m-%d %H:%M:%S%.f", "%Y-%m-%d %H:%M")


def hours_of(
    table: Table,
    time: str,
    index: str | None,
    midnight: Midnight | None,
    rows: NDArray[np.int64],
    reading: Reading,
) -> NDArray[np.float64]:
    """Hours since the index time of the record that a row belongs to.

    Each cell is read by itself: what one patient's cell holds changes no other's hour.

    Args:
        table: the file of values.
        time: its time column: hours, or timestamps when there is an index column; a date alone counts from its end.
        index: records column with the index time; a date alone counts from its beginning.
        midnight: what that time of day means in the time column; None where the site file does not say.
        rows: [E] the record of each row, -1 for none of the site's.
        reading: the modality; unreadable times of the site's records are noted in it.

    Returns:
        [E], NaN where the time is not known, or only one of a row's two times names a zone: it is never read.

    Raises:
        DataError: when the columns hold no times, no row has two of one kind, or midnight throughout may mean both.
    """
    series = table.column(time)
    if index is None:
        hour = _numeric(series, table.where(time))
    else:
        at, zoned = _timestamps(series, table.where(time))
        days = dates_alone(series) | (at_midnight(series) if midnight == "date" else False)
        _refuse_only_midnight(series, midnight, table.where(time), reading)
        at = at + np.where(days, DAY, 0.0)  # when on that day nobody knows: it must not be read too early
        starts, starts_zoned = _timestamps(reading.records.table.column(index), reading.records.table.where(index))
        record = np.maximum(rows, 0)
        alike = zoned == starts_zoned[record]
        if not alike.any() and len(alike):
            raise DataError(
                "of the time and the index column only one names a time zone",
                where=table.where(time),
                remedy=f"Write both with a time zone, or both without (index: {index!r})",
            )
        hour = np.where(alike, at - starts[record], np.nan) / MICROSECONDS
        if (dated := int((days & (rows >= 0)).sum())) > 0:
            reading.warn(
                "time",
                table.where(time),
                f"{dated} of {int((rows >= 0).sum())} rows have a date alone, and count from the end of that day",
                "Write timestamps such as 2024-05-01 13:00 if the time is known",
            )
        begun = np.isnan(starts[record]) & (rows >= 0)
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
            "Fill in hours, or timestamps such as 2024-05-01 13:00, with a time zone where the index time has one",
        )
    return hour


def _refuse_only_midnight(series: pl.Series, midnight: Midnight | None, where: str, reading: Reading) -> None:
    """Refuse a column of midnights that may be dates: read as times they would be known a day too early."""
    dated = dates_alone(series)
    if midnight is None and not dated.all() and len(series) >= SEVERAL and (dated | at_midnight(series)).all():
        raise DataError(
            f"the {len(series)} times are midnight throughout, which may mean dates",
            where=where,
            remedy=f"Write `midnight: date` (they count from the end of the day) or `midnight: time` at "
            f"{reading.key()}",
        )


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
    """Which cells of a column of timestamps are a date without a time of day."""
    if series.dtype != pl.String:
        return np.full(len(series), series.dtype == pl.Date)
    dated: NDArray[np.bool_] = series.str.strip_chars().str.contains(rf"^{_DATE}$").fill_null(False).to_numpy()
    return dated


def at_midnight(series: pl.Series) -> NDArray[np.bool_]:
    """Which cells of a column of timestamps say midnight; those that are missing do."""
    if isinstance(series.dtype, pl.Datetime):
        said = series.dt.time() == datetime.time()
    elif series.dtype == pl.String:
        text = series.str.strip_chars()
        said = text.str.contains(_MIDNIGHT) | missing(text)
    else:
        return np.full(len(series), False)
    result: NDArray[np.bool_] = said.fill_null(True).to_numpy()
    return result


def moments(series: pl.Series) -> tuple[NDArray[np.float64], NDArray[np.bool_]]:
    """Microseconds since the epoch (NaN where unknown), and which cells name a time zone."""
    if series.dtype == pl.Date:
        series = series.cast(pl.Datetime("us"))
    if isinstance(series.dtype, pl.Datetime):
        zoned = np.full(len(series), series.dtype.time_zone is not None)
        found = series.dt.timestamp("us")
    elif series.dtype == pl.String:
        found, zoned = _parsed(series)
    else:
        found, zoned = pl.Series([None] * len(series), dtype=pl.Int64), np.full(len(series), False)
    return found.cast(pl.Float64).fill_null(float("nan")).to_numpy(), zoned


def _timestamps(series: pl.Series, where: str) -> tuple[NDArray[np.float64], NDArray[np.bool_]]:
    found, zoned = moments(series)
    if len(series) and np.isnan(found).all():
        raise DataError(
            "the column does not hold timestamps",
            where=where,
            remedy="Write timestamps such as 2024-05-01 13:00, or hours and no `index`",
        )
    return found, zoned


def _parsed(series: pl.Series) -> tuple[pl.Series, NDArray[np.bool_]]:
    text = series.str.strip_chars().str.replace("T", " ", literal=True).str.replace(_HOUR_ZONE, "${1}${2}:00")
    text = text.set(missing(text), None)
    zoned = text.str.contains(_ZONE).fill_null(False)
    text = text.str.replace("Z$", "+00:00").str.replace(rf"^({_DATE})$", "$1 00:00")
    result = pl.Series([None] * len(text), dtype=pl.Int64)
    for layout in _FORMATS:
        for zone, cells in (("", ~zoned), ("%:z", zoned)):
            found = text.set(~cells, None).str.to_datetime(layout + zone, time_unit="us", strict=False)
            result = result.zip_with(result.is_not_null(), found.dt.timestamp("us"))
    return result, zoned.to_numpy()
