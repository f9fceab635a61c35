"""Visits of an OMOP CDM (5.4) as records; their measurements, notes and conditions as modalities and labels.

A time is that of the value's `_datetime`. Where a note or condition has only a date, it counts from the end of
that day on: nothing is read earlier than it may have been known.
"""

from __future__ import annotations

from collections.abc import Iterable
from dataclasses import dataclass, field
from typing import TYPE_CHECKING

import numpy as np
import polars as pl
from numpy.typing import NDArray

from gapweave.client.sources import cdm, sql
from gapweave.client.sources.files import Files, Table
from gapweave.client.sources.records import Reading, Records
from gapweave.client.sources.times import MICROSECONDS, moments
from gapweave.client.sources.units import to_study_unit
from gapweave.client.sources.values import Cells, Rows
from gapweave.shared.config.modalities import Categories, Range
from gapweave.shared.config.sources import (
    ClinicalSource,
    LabelConditions,
    Measured,
    MeasurementSource,
    ValueColumn,
    Window,
)
from gapweave.shared.errors import DataError, UsageError

if TYPE_CHECKING:
    from collections.abc import Mapping


DAY = 24 * MICROSECONDS

PAIR = ("ancestor_concept_id", "descendant_concept_id")
CONCEPTS = ("concept", "unit_concept_id")
"""Columns of concepts: whole numbers in every CDM."""


@dataclass
class _Within:
    """Which rows belong to a record and lie in a window; counts those whose time is not known."""

    records: Records
    window: tuple[float, float]
    unknown: int = 0
    seen: set[int] = field(default_factory=set)

    def __call__(self, part: pl.DataFrame) -> pl.Series:
        self.seen.update(part["concept"].drop_nulls().unique().to_list())
        record, hour = self.records.rows_of(part["key"]), hours(part)
        self.unknown += int((np.isnan(hour) & (record >= 0)).sum())
        low, high = self.window
        return pl.Series((record >= 0) & (hour >= low) & (hour < high))


def hours(events: pl.DataFrame) -> NDArray[np.float64]:
    """Hours since the start of each event's visit, NaN where unknown."""
    (start, _), (at, _), (day, _) = (moments(events[name]) for name in ("start", "at", "day"))
    hour: NDArray[np.float64] = (np.where(np.isnan(at), day + DAY, at) - start) / MICROSECONDS
    return hour


def _read(
    events: cdm.Events, window: tuple[float, float], files: Files, records: Records, where: str
) -> tuple[Rows, _Within]:
    key = records.id_column if records.id_column in cdm.VISIT_IDS else cdm.VISIT_IDS[0]
    within = _Within(records, window)
    names = ["key", "at", "day", "concept", "value", "start", *events.more]
    table = sql.run(lambda: cdm.select_events(events, key, files), names, files, where, within, CONCEPTS)
    rows = Rows(table=table, record=records.rows_of(table.frame["key"]), hour=hours(table.frame))
    return rows, within


def _window(window: Window, hours: int | None, reading: Reading) -> tuple[float, float]:
    """The site's window, which never ends after the study's prediction time."""
    low, high = window
    ends = [end for end in (high, hours) if end is not None]
    if not ends:
        raise UsageError(
            "neither the study nor the site sets an end to the hours that are read",
            where=reading.key(".hours"),
            remedy=f"Add `hours: [from, before]`, or `hours` to the study's {reading.modality!r}",
        )
    return -np.inf if low is None else low, min(ends)


def _expanded(sets: Mapping[str, tuple[Iterable[int], bool]], files: Files, where: str) -> dict[str, frozenset[int]]:
    """Concepts by name, with their descendants where asked for."""
    ancestors = sorted({concept for concepts, below in sets.values() if below for concept in concepts})
    pairs: list[tuple[int, int]] = []
    if ancestors:
        pairs = sql.run(lambda: cdm.descendants(ancestors, files), PAIR, files, where, whole=PAIR).frame.rows()
    return {
        name: frozenset(concepts) | {low for high, low in pairs if below and high in set(concepts)}
        for name, (concepts, below) in sets.items()
    }


def _of_measurements(source: MeasurementSource, wanted: Iterable[int]) -> cdm.Events:
    return cdm.Events(
        table="measurement", at="measurement_datetime", day=None, concepts=("measurement_concept_id",),
        value="value_as_number", more=("unit_concept_id",), link=source.link, wanted=frozenset(wanted),
    )  # fmt: skip


def read_measurements(
    source: MeasurementSource, cards: Mapping[str, Range | Categories], hours: int | None, reading: Reading
) -> dict[str, Cells]:
    """The values of each variable, in the study's unit.

    Raises:
        UsageError: without an end of the window, for a variable that is no number, or units that are missing or
            cannot be converted.
        DataError: for values in a unit that the site file does not give, and as `sql.run`.
    """
    where = reading.key(".omop")
    sets = {name: (column.concepts, column.descendants) for name, column in source.columns.items()}
    wanted = _expanded(sets, reading.files, where)
    window = _window(source.hours, hours, reading)
    events = _of_measurements(source, frozenset().union(*wanted.values()))
    rows, within = _read(events, window, reading.files, reading.records, where)
    if within.unknown:
        reading.warn(
            "time", where, f"{within.unknown} measurements have no measurement_datetime and are not read", "Fill it in"
        )
    cells = {}
    for name, column in source.columns.items():
        card = cards[name]
        key = reading.key(f".columns.{name}")
        if isinstance(card, Categories):
            raise UsageError("measurements are numbers, the variable is a code", where=key, remedy="Use a query")
        if not wanted[name] & within.seen:
            remedy = "Look the concepts up in the measurement table; `descendants: true` adds those below them"
            reading.problem("absent_item", key, "no measurement of a visit has one of its concepts", remedy)
        chosen = rows.only(rows.table.frame["concept"].is_in(sorted(wanted[name])).fill_null(False).to_numpy())
        values = pl.Series("value", _in_study_unit(chosen.table, column, card, key))
        cells[name] = Cells(
            where=f"{where}[{name}]", rows=chosen, raw=values.fill_nan(None), column=ValueColumn(column=name),
            take=column.take or source.take,
        )  # fmt: skip
    return cells


def _in_study_unit(table: Table, column: Measured, card: Range, key: str) -> NDArray[np.float64]:
    values = table.frame["value"].cast(pl.Float64, strict=False).fill_null(float("nan")).to_numpy(writable=True)
    if not column.units and card.unit is None:
        return values
    unit = table.frame["unit_concept_id"].cast(pl.Int64).fill_null(0)
    foreign = unit.filter(~unit.is_in(list(column.units)) & pl.Series(~np.isnan(values)))
    if len(foreign):
        concepts = ", ".join(str(concept) for concept in foreign.unique().sort()[:5])
        raise DataError(
            f"{len(foreign)} of {len(values)} values are in units that the site file does not give "
            f"(unit_concept_id {concepts})",
            where=f"{key}.units",
            remedy=f"Add them as in `units: {{{foreign[0]}: mg/dL}}`, or with a factor to the study's {card.unit}",
        )
    for concept, given in column.units.items():
        form = {"unit": given} if isinstance(given, str) else {"factor": given}
        rows = (unit == concept).to_numpy()
        local = ValueColumn.model_validate({"column": key, **form})
        values[rows] = to_study_unit(values[rows], local, card, f"{key}.units.{concept}")
    return values


def _of_texts(source: ClinicalSource, wanted: frozenset[int]) -> cdm.Events:
    if source.omop == "notes":
        return cdm.Events(
            table="note", at="note_datetime", day="note_date", value="note_text", link=source.link, wanted=wanted,
            concepts=("note_type_concept_id", "note_class_concept_id"),
        )  # fmt: skip
    return _of_conditions(source.link, wanted, "concept_name")


def _of_conditions(link: str, wanted: frozenset[int], value: str = "condition_concept_id") -> cdm.Events:
    return cdm.Events(
        table="condition_occurrence", at="condition_start_datetime", day="condition_start_date",
        concepts=("condition_concept_id",), value=value, link=link, wanted=wanted,
    )  # fmt: skip


def read_texts(source: ClinicalSource, hours: int | None, reading: Reading) -> tuple[Rows, list[str]]:
    """Notes, or names of conditions, and the column that holds them.

    Raises:
        UsageError: without an end of the window.
        DataError: as `sql.run`.
    """
    where = reading.key(".omop")
    wanted = _expanded({"": (source.concepts, source.descendants)}, reading.files, where)[""]
    window = _window(source.hours, hours, reading)
    return _read(_of_texts(source, wanted), window, reading.files, reading.records, where)[0], ["value"]


def read_conditions(conditions: LabelConditions, files: Files, records: Records, where: str) -> tuple[pl.Series, str]:
    """For each record whether it has one of the conditions, and where that is from.

    Raises:
        DataError: as `sql.run`.
    """
    wanted = _expanded({"": (conditions.concepts, conditions.descendants)}, files, where)[""]
    low, high = conditions.hours
    window = (-np.inf if low is None else low, np.inf if high is None else high)
    rows, _ = _read(_of_conditions(conditions.link, wanted), window, files, records, where)
    found = np.zeros(len(records), np.int64)
    found[rows.record] = 1
    return pl.Series("label", found), where


def count(source: MeasurementSource | ClinicalSource, files: Files, where: str) -> int:
    """How many rows of visits there are, of the concepts themselves; for a check without a study.

    Raises:
        DataError: as `sql.run`.
    """
    if isinstance(source, MeasurementSource):
        events = _of_measurements(source, {one for column in source.columns.values() for one in column.concepts})
    else:
        events = _of_texts(source, frozenset(source.concepts))
    none = sql.run(
        lambda: cdm.select_events(events, cdm.VISIT_IDS[0], files), ["key"], files, f"{where}.omop",
        lambda part: pl.repeat(False, len(part), eager=True),
    )  # fmt: skip
    return none.rows
