"""Statements on the tables of an OMOP CDM 5.4."""

from __future__ import annotations

from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

from gapweave.client.sources.files import Files

if TYPE_CHECKING:
    from collections.abc import Collection

    from sqlalchemy import BindParameter, FromClause, Select, TableClause

_TABLES = {
    "person": (
        "person_id", "person_source_value", "gender_concept_id", "race_concept_id", "ethnicity_concept_id",
        "year_of_birth",
    ),
    "visit_occurrence": (
        "visit_occurrence_id", "visit_source_value", "person_id", "visit_concept_id", "visit_start_datetime",
        "visit_end_datetime", "care_site_id",
    ),
    "measurement": (
        "person_id", "visit_occurrence_id", "measurement_concept_id", "measurement_datetime", "value_as_number",
        "unit_concept_id",
    ),
    "condition_occurrence": (
        "person_id", "visit_occurrence_id", "condition_concept_id", "condition_start_datetime", "condition_start_date",
    ),
    "note": (
        "person_id", "visit_occurrence_id", "note_type_concept_id", "note_class_concept_id", "note_datetime",
        "note_date", "note_text",
    ),
    "concept": ("concept_id", "concept_name"),
    "concept_ancestor": ("ancestor_concept_id", "descendant_concept_id"),
}  # fmt: skip


def _table(name: str, files: Files) -> TableClause:
    from sqlalchemy import column, table

    assert files.database is not None
    return table(name, *(column(one) for one in _TABLES[name]), schema=files.database.cdm)


VISIT_COLUMNS = (*_TABLES["visit_occurrence"], *(name for name in _TABLES["person"] if name != "person_id"), "age")
"""What may be asked of a visit and its person; `age` is the year of the visit's start less the year of birth."""


def visits(files: Files, wanted: Collection[str]) -> Select[tuple[object, ...]]:
    """The wanted ones of `VISIT_COLUMNS`, for every visit."""
    from sqlalchemy import extract, literal, select

    visit, person = _table("visit_occurrence", files), _table("person", files)
    age = extract("year", visit.c.visit_start_datetime) - person.c.year_of_birth
    columns = {**person.c, **visit.c, "age": age.label("age")}
    join = visit.join(person, visit.c.person_id == person.c.person_id)
    chosen: list[Any] = [columns[name] for name in VISIT_COLUMNS if name in wanted]
    return select(*(chosen or [literal(1)])).select_from(join)


def select_visits(files: Files) -> Select[tuple[object, ...]]:
    """Number, name, person and start of every visit."""
    from sqlalchemy import select

    visit = _table("visit_occurrence", files).c
    return select(visit.visit_occurrence_id, visit.visit_source_value, visit.person_id, visit.visit_start_datetime)


@dataclass(frozen=True, kw_only=True)
class Events:
    """What is asked of one of the tables of events.

    Attributes:
        table: its name.
        at: its column with the time.
        day: its column with the date alone, if that is of use.
        concepts: its columns of concepts; the first is read.
        value: its column with the value, or `concept_name`.
        link: whether a visit has its own events, or those of its person.
        wanted: concepts; empty: all.
        more: further columns.
    """

    table: str
    at: str
    day: str | None
    concepts: tuple[str, ...]
    value: str
    link: str
    wanted: frozenset[int]
    more: tuple[str, ...] = ()


def select_events(events: Events, files: Files) -> Select[tuple[object, ...]]:
    """Rows `link` (the visit's or person's id), at, day, concept, value and what more there is.

    Not joined with visits: of a person with many, every event would be sent once for each.
    """
    from sqlalchemy import bindparam, null, or_, select

    event = _table(events.table, files)
    link = event.c["visit_occurrence_id" if events.link == "visit" else "person_id"]
    day = null() if events.day is None else event.c[events.day]
    columns = [link.label("link"), event.c[events.at].label("at"), day.label("day")]
    columns.append(event.c[events.concepts[0]].label("concept"))
    rows: FromClause = event
    if events.value == "concept_name":
        name = _table("concept", files)
        rows = event.outerjoin(name, event.c.condition_concept_id == name.c.concept_id)
        value = name.c.concept_name
    else:
        value = event.c[events.value]
    query = select(*columns, value.label("value"), *(event.c[one] for one in events.more)).select_from(rows)
    query = query.where(link.is_not(None))
    if events.wanted:
        # Written into the statement: drivers limit the number of parameters.
        some: BindParameter[list[int]] = bindparam("some", sorted(events.wanted), expanding=True, literal_execute=True)
        query = query.where(or_(*(event.c[one].in_(some) for one in events.concepts)))
    return query


def descendants(ancestors: list[int], files: Files) -> Select[tuple[object, ...]]:
    """Each of the concepts with every one below it, and itself."""
    from sqlalchemy import bindparam, select

    pairs = _table("concept_ancestor", files)
    some: BindParameter[list[int]] = bindparam("some", ancestors, expanding=True, literal_execute=True)
    return select(*pairs.c).where(pairs.c.ancestor_concept_id.in_(some))
