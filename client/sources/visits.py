"""Which visit of an OMOP CDM each record is. What is known of a visit is found by its number, and by nothing else."""

from __future__ import annotations

from dataclasses import dataclass
from typing import TYPE_CHECKING

import numpy as np
import polars as pl

from gapweave.client.sources.cells import id_text
from gapweave.client.sources.findings import Finding
from gapweave.client.sources.times import moments
from gapweave.shared.config.sources import ClinicalSource, MeasurementSource
from gapweave.shared.errors import DataError, UsageError

if TYPE_CHECKING:
    from collections.abc import Iterable

    from gapweave.client.sources.files import Files, Table
    from gapweave.shared.config.site import Site

NUMBER, NAME = "visit_occurrence_id", "visit_source_value"
"""Of a visit in the CDM, and at the hospital: a name may stand for several visits."""

KNOWN = (NUMBER, "person_id", "visit_start_datetime")
"""What events are found and timed by: records that are visits have it themselves."""


@dataclass(frozen=True, kw_only=True)
class Visits:
    """The visits that records are.

    Attributes:
        frame: [V] `visit` and `person` (ids as text), `record` (its position), `start` (microseconds since the epoch,
            NaN where unknown) and `zoned` (whether it names a time zone).
    """

    frame: pl.DataFrame


def has_events(site: Site) -> bool:
    """Whether a site file asks for what an OMOP CDM knows of visits."""
    sources = any(isinstance(one, MeasurementSource | ClinicalSource) for one in site.data.modalities.values())
    return sources or any(label.conditions is not None for label in site.data.records.label.values())


def read_visits(site: Site, table: Table, ids: Iterable[str], files: Files, findings: list[Finding]) -> Visits:
    """Look the records' visits up.

    Args:
        site: the site file.
        table: [R] of the records.
        ids: [R] of the records.
        files: for the database.
        findings: records without a visit or a start are noted here.

    Raises:
        UsageError: where nothing in the records names a visit.
        DataError: for a name that several visits have, and as `sql.run`.
    """
    from gapweave.client.sources import cdm, sql

    key = files.key("data.records.id")
    id_column = site.data.records.id
    if site.data.records.omop:
        found, by = table.frame.select(KNOWN).with_columns(record=pl.int_range(pl.len())), NUMBER
        return _noted(found, len(found), by, files, findings)
    if NUMBER in table.names:
        by, asked = NUMBER, id_text(table.column(NUMBER))
    elif id_column == NAME:
        by, asked = NAME, pl.Series(list(ids), dtype=pl.String)
    else:
        raise UsageError(
            f"parts of the CDM are asked for, and the records do not say which visits they are ({id_column!r})",
            where=key,
            remedy=f"Add a column {NUMBER} to the records, or name it there",
        )
    ours = pl.DataFrame({"asked": asked, "record": np.arange(len(asked))}).drop_nulls()

    def known(part: pl.DataFrame) -> pl.DataFrame:
        return part.with_columns(asked=id_text(part[by])).join(ours, on="asked", how="inner", maintain_order="left")

    found = sql.run(lambda: cdm.select_visits(files), (*KNOWN, NAME), files, files.key("data.records"), known).frame
    if by == NAME and (several := found["record"].n_unique() - len(found.unique("record", keep="none"))):
        raise DataError(
            f"{several} records have a {NAME} that stands for several visits",
            where=key,
            remedy=f"Let the records have a column {NUMBER}",
        )
    return _noted(found, len(asked), by, files, findings)


def _noted(found: pl.DataFrame, records: int, by: str, files: Files, findings: list[Finding]) -> Visits:
    """Visits [V] as they were found, with notes of what is lacking."""
    key, where = files.key("data.records.id"), files.key("data.records")
    start, zoned = moments(found["visit_start_datetime"])
    if records > (visits := found["record"].n_unique()):
        message = f"{records - visits} of {records} records are no visit of the CDM: it knows nothing of them"
        findings.append(
            Finding(id="ids", status="warning", where=key, message=message, remedy=f"Compare the ids with {by}")
        )
    if unknown := int(np.isnan(start).sum()):
        message = f"{unknown} of {len(found)} visits have no visit_start_datetime: nothing with a time is read for them"
        remedy = "Fill it in: midnight of visit_start_date, if no more is known"
        findings.append(Finding(id="time", status="warning", where=where, message=message, remedy=remedy))
    return Visits(
        frame=found.select(
            "record",
            visit=id_text(found[NUMBER]),
            person=id_text(found["person_id"]),
            start=pl.Series(start, dtype=pl.Float64),
            zoned=pl.Series(zoned, dtype=pl.Boolean),
        )
    )
