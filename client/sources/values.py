"""A site's variables: which rows hold them, for which record, when; and their cells as numbers or codes."""

from __future__ import annotations

import difflib
from collections.abc import Mapping
from dataclasses import dataclass, replace
from typing import Any

import numpy as np
import polars as pl
from numpy.typing import NDArray

from gapweave.client.sources.cells import (
    LIST_ALL,
    code_text,
    is_item,
    merged,
    missing,
    numbers,
    recode,
    refuse_codes,
)
from gapweave.client.sources.files import Table
from gapweave.client.sources.place import read_source
from gapweave.client.sources.records import Reading
from gapweave.client.sources.times import hours_of
from gapweave.client.sources.units import likely_unit, to_study_unit
from gapweave.shared.config.modalities import Categories, Range
from gapweave.shared.config.sources import ColumnsSource, MeasurementSource, Take, TextSource, ValueColumn
from gapweave.shared.errors import UsageError
from gapweave.shared.features.ranges import implausible, scale

SUSPICIOUS = 0.2
"""A larger share of a variable's values outside the public range looks like another unit."""

LATE = 0.98
"""A larger share of a file's times at or after the prediction time looks like minutes in place of hours: a stay of a
month that is predicted after its first day has 0.97."""

FEW = 10
"""Filled-in cells of a variable below which it is no surprise that none of them can be read."""

ONE_VALUE = 0.5
"""A larger share of the values outside the public range that are all the same looks like a code for missing."""

UNUSUAL, ODD, ENOUGH = 3.0, 1.5, 20
"""A median of so many values or more that is farther from the public centre, in public scales, looks like another unit:
no variable of the ten eICU groups is as far. So does an odd one that would be usual in a unit that hospitals write."""

RARE = 0.05
"""A variable that a smaller share of the modality's records has is noted."""


@dataclass(frozen=True, kw_only=True)
class Rows:
    """Rows of a file that belong to the site's records and lie before the prediction time.

    Attributes:
        table: [E] the rows.
        record: [E] the record of each.
        hour: [E] hours since its index time; None when the source has no time.
    """

    table: Table
    record: NDArray[np.int64]
    hour: NDArray[np.float64] | None

    def only(self, keep: NDArray[np.bool_]) -> Rows:
        """Some of the rows."""
        return replace(
            self,
            table=self.table.take(pl.Series(np.flatnonzero(keep))),
            record=self.record[keep],
            hour=None if self.hour is None else self.hour[keep],
        )


@dataclass(frozen=True, kw_only=True)
class Cells:
    """The cells of one variable.

    Attributes:
        where: file:column, for messages.
        rows: [E] the rows that they stand in.
        raw: [E] as the file holds them.
        column: what the site file says of them.
        take: which of a record's counts in a table; None: the last in time, or the first in the file.
    """

    where: str
    rows: Rows
    raw: pl.Series
    column: ValueColumn
    take: Take | None = None


def read_rows(source: ColumnsSource | TextSource, columns: list[str], hours: int | None, reading: Reading) -> Rows:
    """Read the site's rows of a file.

    Args:
        source: the modality's entry in the site file.
        columns: value columns to read.
        hours: the study's prediction time; rows at or after it are dropped here, before anything looks at
            them.
        reading: the modality.

    Raises:
        UsageError: when the source has a time and the study no prediction time.
        DataError: for a file or column that is missing or unreadable.
    """
    if source.time is not None and hours is None:
        raise UsageError(
            "the values carry a time, but the study sets no prediction time for this modality",
            where=reading.key(".time"),
            remedy=f"Add `hours` to the study's {reading.modality!r}, or remove `time`",
        )
    key = source.id if source.id is not None else reading.records.id_column

    def ours(part: pl.DataFrame) -> pl.DataFrame:
        return part.filter(reading.records.rows_of(part[key]) >= 0) if key in part.columns else part

    wanted = [key, *columns, *([source.time] if source.time else [])]
    table = read_source(source, wanted, reading.files, reading.key(), keep=ours)
    record = reading.records.rows_of(table.column(key))
    if table.rows and not (record >= 0).any():
        note = reading.problem if len(reading.records) >= FEW else reading.warn
        note(
            "ids",
            table.where(key),
            "no row belongs to one of the site's records",
            "Compare the ids with those of the records; `id` names the column of record ids",
        )
    keep, hour = record >= 0, None
    if source.time is not None and hours is not None:
        hour = hours_of(table, source.time, source.index, source.midnight, record, reading)
        _note_late(hour[keep & ~np.isnan(hour)], hours, table.where(source.time), reading)
        keep &= hour < hours
    return Rows(table=table, record=record, hour=hour).only(keep)


def _note_late(hour: NDArray[np.float64], hours: int, where: str, reading: Reading) -> None:
    """Note times [E] that are so late that they are probably no hours."""
    late = int((hour >= hours).sum())
    if late > LATE * len(hour):
        message = f"{late} of {len(hour)} times are {hours} hours or later, and not read: probably no hours"
        reading.warn("time", where, message, "Write hours (minutes / 60); for timestamps, compare those of `index`")


def read_cells(
    source: ColumnsSource | MeasurementSource,
    cards: Mapping[str, Range | Categories],
    hours: int | None,
    reading: Reading,
) -> dict[str, Cells]:
    """The cells of each variable, from one column a variable or from long form.

    Args:
        source: the modality's entry in the site file.
        cards: the study's variables.
        hours: the study's prediction time.
        reading: the modality.

    Raises:
        UsageError: for a variable that the study lacks (and as `read_rows`).
        DataError: as `read_rows`.
    """
    for name in source.columns:
        if name not in cards:
            close = difflib.get_close_matches(name, cards, n=1, cutoff=0.5)
            raise UsageError(
                f"the study has no variable {name!r} in {reading.modality!r}",
                where=reading.key(f".columns.{name}"),
                remedy=f"Did you mean {close[0]!r}?" if close else f"Its variables: {', '.join(cards)}",
            )
    if isinstance(source, MeasurementSource):
        from gapweave.client.sources.omop import read_measurements

        return read_measurements(source, cards, hours, reading)
    if source.item is not None and source.value is not None:
        return _long(source, source.item, source.value, hours, reading)
    rows = read_rows(source, [column.column for column in source.columns.values()], hours, reading)
    return {
        name: Cells(
            where=rows.table.where(column.column), rows=rows, raw=rows.table.column(column.column), column=column
        )
        for name, column in source.columns.items()
    }


def _long(source: ColumnsSource, item: str, value: str, hours: int | None, reading: Reading) -> dict[str, Cells]:
    rows = read_rows(source, [item, value], hours, reading)
    items = rows.table.column(item)
    result = {}
    for name, column in source.columns.items():
        chosen = rows.only(is_item(items, column.column).to_numpy())
        where = f"{rows.table.where(value)}[{name}]"
        result[name] = Cells(where=where, rows=chosen, raw=chosen.table.column(value), column=column)
    _note_absent([name for name, cells in result.items() if cells.raw.is_empty()], source, item, reading)
    return result


def _note_absent(names: list[str], source: ColumnsSource, item: str, reading: Reading) -> None:
    """Note the variables, of those without a row of the site's, whose item has no row of anybody's."""
    if not names:
        return
    table = read_source(source, [item], reading.files, reading.key())
    known = table.column(item).unique()
    for name in names:
        code = source.columns[name].column
        if not is_item(known, code).any():
            reading.problem(
                "absent_item",
                reading.key(f".columns.{name}"),
                f"no row has item {code!r}",
                f"Write the item's code as the column {item!r} does, or remove the variable",
            )


def note_presence(cells: dict[str, Cells], seen: dict[str, NDArray[np.bool_]], reading: Reading) -> None:
    """Note how often each variable is there; warn of those that no or hardly any record has.

    Args:
        cells: of each variable.
        seen: which of its cells [E] hold a value.
        reading: the modality.
    """
    count = len(reading.records)
    having = {name: np.bincount(cells[name].rows.record[seen[name]], minlength=count) > 0 for name in cells}
    anything = int(np.any(list(having.values()), axis=0).sum())
    for name, has in having.items():
        records = int(has.sum())
        reading.shares[name] = records / max(1, anything)
        raw = cells[name].raw
        if not records and len(raw) and missing(raw.cast(pl.String)).all():
            reading.warn(
                "empty",
                cells[name].where,
                f"{name!r} is empty in all {len(raw)} rows of the site's records",
                "Correct the column, or remove the variable if the site does not have it",
            )
        elif 0 < records < RARE * anything:
            reading.warn(
                "rare",
                cells[name].where,
                f"{records} of {anything} records with {reading.modality!r} have {name!r}",
                "Check the column, the ids and the times if that is fewer than the hospital measures",
            )


def numeric(cells: Cells, name: str, card: Range, reading: Reading) -> NDArray[np.float64]:
    """Cells as numbers in the study's unit, NaN where missing.

    The cells that are not numbers, and the values outside the public range, are counted in the findings.

    Raises:
        UsageError: for a unit that cannot be converted, or codes that are not mapped to numbers.
    """
    column = cells.column
    refuse_codes(column.codes, None, reading.key(f".columns.{name}.codes"))
    raw = _without_missing(cells.raw, column)
    local, unreadable = numbers(recode(code_text(raw), column.codes) if column.codes else raw)
    values = to_study_unit(local, column, card, reading.key(f".columns.{name}.unit"))
    remedy = "Write plain numbers with a decimal point (no comma), or map codes by `codes`"
    if unreadable >= FEW and np.isnan(local).all():
        reading.problem("numbers", cells.where, f"{_all(unreadable)} not numbers", remedy)
    elif unreadable:
        message = f"{unreadable} of {len(raw)} cells are not numbers and count as missing"
        reading.warn("numbers", cells.where, message, remedy)
    _check_range(values, cells.where, card, reading, as_stated=column.unit is None and column.factor is None)
    return values


def _all(cells: int) -> str:
    return f"all {cells} cells that are filled in are"


def _without_missing(raw: pl.Series, column: ValueColumn) -> pl.Series:
    """Null where a cell holds one of the values that mean missing at this site."""
    if not column.missing:
        return raw
    return raw.set(code_text(raw).is_in(column.missing).fill_null(False), None)


def _check_range(values: NDArray[np.float64], where: str, card: Range, reading: Reading, *, as_stated: bool) -> None:
    """Note values that are implausible, or unusual together.

    Args:
        values: in the study's unit, if the site file is right; NaN where missing.
        where: column of the file.
        card: the variable's.
        reading: the modality.
        as_stated: whether the file holds these very numbers.
    """
    observed = values[~np.isnan(values)]
    strange, away = observed[implausible(observed, card)], _away(observed, card)
    outside, suspicious = len(strange), len(strange) > SUSPICIOUS * len(observed)
    likely = likely_unit(observed, card) if as_stated and (suspicious or away > ODD) else None
    perhaps = f", perhaps {likely}" if likely else ""
    if not suspicious and (away > UNUSUAL or likely):
        text = f"the middle value is {away:.1f} times the usual spread away from the usual {card.center:g}"
        remedy = "Set `unit:` or `factor:` for this column, unless that is so here"
        reading.warn("unit", where, f"{text}: another unit{perhaps}?", remedy)
        return
    if not outside:
        return
    text = f"{outside} of {len(observed)} values lie outside [{card.low:g}, {card.high:g}] {card.unit or ''}".rstrip()
    often = int(np.unique(strange[np.isfinite(strange)], return_counts=True)[1].max(initial=0))
    if outside >= FEW and often > ONE_VALUE * outside:
        message = f"{text}, and {often} of them are one value: probably a code for missing"
        remedy = "List it under `missing:` for this column; it is clipped and read as measured"
        reading.warn("missing", where, message, remedy)
    elif suspicious:
        message = f"{text}: probably another unit{perhaps}"
        reading.warn("unit", where, message, "Set `unit:` or `factor:` for this column")
    else:
        reading.warn("range", where, f"{text} and are clipped", "Look at these rows; infinite ones count as missing")


def _away(observed: NDArray[np.float64], card: Range) -> float:
    """How far the middle value is from the usual one, in public scales; 0 where too little is known."""
    scaled = scale(observed[np.isfinite(observed)], card)
    known = card.center is not None and card.scale is not None and len(scaled) >= ENOUGH
    return abs(float(np.median(scaled))) if known else 0.0


def categorical(cells: Cells, name: str, card: Categories, reading: Reading) -> NDArray[Any]:
    """Cells as the study's codes, None where missing; codes that the study lacks are counted.

    Raises:
        UsageError: for codes that are mapped to a category that the study lacks.
    """
    column = cells.column
    refuse_codes(column.codes, card.categories, reading.key(f".columns.{name}.codes"))
    local = code_text(_without_missing(cells.raw, column))
    if both := merged(local, column.codes):
        reading.problem("codes", reading.key(f".columns.{name}.codes"), both, LIST_ALL)
    codes = recode(local, column.codes)
    known = codes.is_in(card.categories).fill_null(False)
    unknown = int((~known & ~missing(codes)).sum())
    remedy = f"Map them by `codes`; the study knows {', '.join(card.categories)}"
    if unknown >= FEW and not known.any():
        reading.problem("codes", cells.where, f"{_all(unknown)} codes that the study does not know", remedy)
    elif unknown:
        message = f"{unknown} of {len(codes)} cells hold a code that the study does not know, and count as missing"
        reading.warn("codes", cells.where, message, remedy)
    result: NDArray[Any] = codes.set(~known, None).to_numpy(allow_copy=True).astype(object)
    return result
