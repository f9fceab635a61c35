"""Visits of an OMOP CDM (5.4) as records; their measurements, notes and conditions as modalities and labels.

A time is that of the value's `_datetime`. Where a note or condition has only a date, it counts from the end of
that day on: nothing is read earlier than it may have been known.
"""

from __future__ import annotations

from collections.abc import Iterable
from dataclasses import dataclass, field
from typing import TYPE_CHECKING, Literal

import numpy as np
import polars as pl
from numpy.typing import NDArray

from gapweave.client.sources import cdm, sql
from gapweave.client.sources.cells import id_text, numbers
from gapweave.client.sources.files import Files, Table
from gapweave.client.sources.records import Reading, Records
from gapweave.client.sources.times import DAY, MICROSECONDS, SEVERAL, at_midnight, dates_alone, moments
from gapweave.client.sources.units import to_study_unit
from gapweave.client.sources.values import Cells, Rows
from gapweave.client.sources.visits import Visits
from gapweave.shared.config.modalities import Categories, Range
from gapweave.shared.config.sources import (
    ClinicalSource,
    LabelConditions,
    Measured,
    MeasurementSource,
    Midnight,
    ValueColumn,
    Window,
)
from gapweave.shared.errors import DataError, UsageError

if TYPE_CHECKING:
    from collections.abc import Mapping


PAIR = ("ancestor_concept_id", "descendant_concept_id")
CONCEPTS = ("concept", "unit_concept_id")
"""Columns of concepts: whole numbers in every CDM."""


@dataclass
class _Within:
    """Of a part of the events: those of the records' visits that lie in a window, with `record` and `hour`.

    Attributes:
        visits: the records'.
        link: what the events have in common with a visit.
        window: hours, from the first up to before the last.
        midnight: what that time of day means; None where the site file does not say.
        untimed: whether events stay whose time is not known, with an hour of NaN.
        seen: concepts of all events.
        unknown: events whose time is not known though their visit's start is.
        timed, dated, midnights, alike: events with a time, those of them that are a date alone, those at midnight, and
            those that name a time zone or none as the start does.
    """

    visits: Visits
    link: Literal["visit", "person"]
    window: tuple[float, float]
    midnight: Midnight | None
    untimed: bool = False
    seen: set[int] = field(default_factory=set)
    unknown: int = 0
    timed: int = 0
    dated: int = 0
    midnights: int = 0
    alike: int = 0

    def __call__(self, part: pl.DataFrame) -> pl.DataFrame:
        self.seen.update(part["concept"].drop_nulls().unique().to_list())
        events = part.with_columns(link=id_text(part["link"])).join(
            self.visits.frame, left_on="link", right_on=self.link, how="inner", maintain_order="left"
        )
        hour = self._hours(events)
        low, high = self.window
        within = (hour >= low) & (hour < high)
        if self.untimed:
            within |= np.isnan(hour)
        return events.with_columns(hour=pl.Series(hour, dtype=pl.Float64)).filter(pl.Series(within, dtype=pl.Boolean))

    def _hours(self, events: pl.DataFrame) -> NDArray[np.float64]:
        """[E] since the start of each event's visit, NaN where unknown."""
        start, start_zoned = (events[name].to_numpy() for name in ("start", "zoned"))
        at, zoned = moments(events["at"])
        day, _ = moments(events["day"])
        at_midnights = at_midnight(events["at"]) & ~np.isnan(at)
        dated = dates_alone(events["at"]) & ~np.isnan(at)
        self.timed += int((~np.isnan(at)).sum())
        self.dated += int(dated.sum())
        self.midnights += int(at_midnights.sum())
        self.alike += int(((zoned == start_zoned) | dated)[~np.isnan(at)].sum())
        timed = np.where((zoned == start_zoned) & ~dated, at, np.nan)
        if self.midnight == "date":
            timed = np.where(at_midnights, timed + DAY, timed)
        # A date has no zone: beside a start that has one, it is over everywhere half a day later.
        dates = np.where(dated, at, np.where(np.isnan(at), day, np.nan)) + DAY + np.where(start_zoned, DAY / 2, 0.0)
        hour: NDArray[np.float64] = (np.where(np.isnan(timed), dates, timed) - start) / MICROSECONDS
        self.unknown += int((np.isnan(hour) & ~np.isnan(start)).sum())
        return hour

    def refuse(self, events: cdm.Events, where: str) -> None:
        """Refuse times that cannot be compared with the visits' starts.

        Raises:
            DataError: where only one side has time zones, or all times are midnight.
        """
        if self.timed and not self.alike:
            raise DataError(
                f"of {events.at} and visit_start_datetime only one names a time zone",
                where=where,
                remedy="Give both columns of the CDM the same type",
            )
        if self.midnight is None and self.timed >= SEVERAL and self.timed - self.dated == self.midnights > 0:
            raise DataError(
                f"the {self.timed} times ({events.at}) are midnight throughout, which may mean dates",
                where=where,
                remedy="Write `midnight: date` (they count from the end of the day) or `midnight: time` beside `omop`",
            )


def _read(events: cdm.Events, within: _Within, files: Files, where: str) -> Rows:
    names = ["link", "at", "day", "concept", "value", *events.more]
    table = sql.run(lambda: cdm.select_events(events, files), names, files, where, within, CONCEPTS)
    within.refuse(events, where)
    frame = table.frame
    return Rows(table=table, record=frame["record"].to_numpy().astype(np.int64), hour=frame["hour"].to_numpy())


def _within(
    source: MeasurementSource | ClinicalSource | LabelConditions, records: Records, window: tuple[float, float]
) -> _Within:
    assert records.visits is not None
    return _Within(records.visits, source.link, window, source.midnight)


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
    within = _within(source, reading.records, window)
    rows = _read(events, within, reading.files, where)
    _note_unknown(within, "measurements", events.at, reading, where)
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
        if unreadable := numbers(chosen.table.frame["value"])[1]:
            message = f"{unreadable} of {len(chosen.record)} values are not numbers and count as missing"
            reading.warn("numbers", key, message, "Store value_as_number as a number")
        values = pl.Series("value", _in_study_unit(chosen.table, column, card, key))
        cells[name] = Cells(
            where=f"{where}[{name}]", rows=chosen, raw=values.fill_nan(None), column=ValueColumn(column=name),
            take=column.take or source.take,
        )  # fmt: skip
    return cells


def _note_unknown(within: _Within, what: str, at: str, reading: Reading, where: str) -> None:
    if within.unknown:
        remedy = "Fill it in, with a time zone where visit_start_datetime has one"
        reading.warn("time", where, f"{within.unknown} {what} have no readable {at} and are not read", remedy)


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
    within, events = _within(source, reading.records, window), _of_texts(source, wanted)
    rows = _read(events, within, reading.files, where)
    _note_unknown(within, source.omop, events.at, reading, where)
    return rows, ["value"]


def read_conditions(conditions: LabelConditions, files: Files, records: Records, where: str) -> tuple[pl.Series, str]:
    """For each record whether it has one of the conditions, and where that is from.

    Unknown where it has one of which nobody knows whether it was in the window.

    Raises:
        DataError: as `sql.run`.
    """
    wanted = _expanded({"": (conditions.concepts, conditions.descendants)}, files, where)[""]
    low, high = conditions.hours
    within = _within(conditions, records, (-np.inf if low is None else low, np.inf if high is None else high))
    within.untimed = True
    rows = _read(_of_conditions(conditions.link, wanted), within, files, where)
    assert rows.hour is not None
    surely = ~np.isnan(rows.hour) | (low is None and high is None)
    found = np.zeros(len(records))
    found[rows.record[~surely]] = np.nan
    found[rows.record[surely]] = 1.0
    return pl.Series("label", found).fill_nan(None), where


def count(source: MeasurementSource | ClinicalSource, files: Files, where: str) -> int:
    """How many rows there are of the concepts themselves; for a check without a study.

    Raises:
        DataError: as `sql.run`.
    """
    if isinstance(source, MeasurementSource):
        events = _of_measurements(source, {one for column in source.columns.values() for one in column.concepts})
    else:
        events = _of_texts(source, frozenset(source.concepts))
    none = sql.run(
        lambda: cdm.select_events(events, files), ["link"], files, f"{where}.omop", lambda part: part.clear(),
    )  # fmt: skip
    return none.rows
