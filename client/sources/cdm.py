"""Statements on the tables of an OMOP CDM 5.4."""

from __future__ import annotations

from dataclasses import dataclass
from typing import TYPE_CHECKING

from gapweave.client.sources.files import Files

if TYPE_CHECKING:
    from sqlalchemy import BindParameter, Select, TableClause

VISIT_IDS = ("visit_occurrence_id", "visit_source_value")
"""What may identify a record."""

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


def visits(files: Files) -> Select[tuple[object, ...]]:
    """Every visit with its person; `age` is the year of its start less the year of birth."""
    from sqlalchemy import extract, select

    visit, person = _table("visit_occurrence", files), _table("person", files)
    of_person = [column for column in person.c if column.name != "person_id"]
    age = extract("year", visit.c.visit_start_datetime) - person.c.year_of_birth
    join = visit.join(person, visit.c.person_id == person.c.person_id)
    return select(*visit.c, *of_person, age.label("age")).select_from(join)


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


def select_events(events: Events, key: str, files: Files) -> Select[tuple[object, ...]]:
    """Rows `key`, start, at, day, concept, value and what more there is, of every visit."""
    from sqlalchemy import bindparam, null, or_, select

    event, visit = _table(events.table, files), _table("visit_occurrence", files)
    on = "visit_occurrence_id" if events.link == "visit" else "person_id"
    day = null() if events.day is None else event.c[events.day]
    columns = [visit.c[key].label("key"), visit.c.visit_start_datetime.label("start"), event.c[events.at].label("at")]
    columns += [day.label("day"), event.c[events.concepts[0]].label("concept")]
    join = event.join(visit, event.c[on] == visit.c[on])
    if events.value == "concept_name":
        name = _table("concept", files)
        join = join.outerjoin(name, event.c.condition_concept_id == name.c.concept_id)
        value = name.c.concept_name
    else:
        value = event.c[events.value]
    query = select(*columns, value.label("value"), *(event.c[one] for one in events.more)).select_from(join)
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
