"""The list of records: which rows of the records file take part, and whose they are."""

from __future__ import annotations

from dataclasses import dataclass, field
from functools import cached_property

import numpy as np
import polars as pl
from numpy.typing import NDArray

from gapweave.client.sources.cells import code_text, id_text
from gapweave.client.sources.files import Files, Table
from gapweave.client.sources.findings import Finding
from gapweave.client.sources.place import read_source
from gapweave.client.sources.visits import KNOWN, NUMBER, Visits, has_events, read_visits
from gapweave.shared.config.modalities import category_code
from gapweave.shared.config.site import Site
from gapweave.shared.config.sources import ColumnsSource, ImageSource, TextSource
from gapweave.shared.errors import DataError


@dataclass(frozen=True, kw_only=True)
class Records:
    """The records in use; those of one patient are together.

    Attributes:
        table: [R] rows of the records file.
        id_column: its column of record ids, the default in the site's other files.
        line: [R] number of each row in the file, the first below the header being 1.
        ids: [R] record ids.
        patient: [R] position of the record's patient.
        patient_ids: [P] patient ids, by first appearance in the file.
        visits: those that the records are, where the site file asks for what an OMOP CDM knows of them.
    """

    table: Table
    id_column: str
    line: NDArray[np.int64]
    ids: tuple[str, ...]
    patient: NDArray[np.int64]
    patient_ids: tuple[str, ...]
    visits: Visits | None = None

    def __len__(self) -> int:
        return len(self.ids)

    @cached_property
    def _positions(self) -> pl.DataFrame:
        # Where ids repeat (only a check lives to see it) the join must not multiply rows.
        return pl.DataFrame({"id": self.ids, "row": np.arange(len(self.ids))}).unique("id", keep="first")

    def rows_of(self, ids: pl.Series) -> NDArray[np.int64]:
        """Position of each id among the records, -1 for an id that is none of theirs."""
        asked = pl.DataFrame({"id": id_text(ids)})
        found = asked.join(self._positions, on="id", how="left", maintain_order="left")["row"]
        rows: NDArray[np.int64] = found.fill_null(-1).to_numpy().astype(np.int64)
        return rows


@dataclass(frozen=True, kw_only=True)
class Reading:
    """What the reader of one modality works with.

    Attributes:
        modality: its name.
        files: where relative paths are looked up.
        records: the site's records.
        findings: where oddities are noted.
        shares: by variable, how many of the records with the modality have it; filled by its reader.
    """

    modality: str
    files: Files
    records: Records
    findings: list[Finding] = field(default_factory=list)
    shares: dict[str, float] = field(default_factory=dict)

    def key(self, rest: str = "") -> str:
        """A key of the modality's entry in the site file, for messages."""
        return self.files.key(f"data.{self.modality}{rest}")

    def warn(self, check: str, where: str, message: str, remedy: str) -> None:
        """Note something that a person should look at, and that does not stop training."""
        self.findings.append(Finding(id=check, status="warning", where=where, message=message, remedy=remedy))

    def problem(self, check: str, where: str, message: str, remedy: str) -> None:
        """Note that the site file is very probably wrong: training is refused, prediction of a few patients goes on."""
        self.findings.append(Finding(id=check, status="problem", where=where, message=message, remedy=remedy))


def read_records(site: Site, files: Files, findings: list[Finding], *, capped: bool = True) -> Records:
    """Read the records file: filter its rows, check its ids, cap the records of a patient, group by patient.

    Args:
        site: the site file.
        files: where relative paths are looked up.
        findings: the number of dropped records is noted here.
        capped: whether a patient's records count up to the site's cap only; not where nothing is learnt from them.

    Raises:
        DataError: for a file or column that is missing or unreadable, no row after filtering, or an empty
            id.
    """
    table = read_source(site.data.records, _wanted(site), files, files.key("data.records"))
    if table.column(site.data.records.id).is_empty():
        raise DataError("the list of records has no rows", where=table.place, remedy="Write one row a record")
    line = pl.Series("line", np.arange(1, len(table.frame) + 1))
    kept = _matching(table, site)
    table, line = table.take(kept), line[kept]
    record = _ids(table, site.data.records.id)
    patient = _ids(table, site.data.records.patient)
    order = _grouped(patient, site.patients.max_records if capped else len(line), table, site, findings)
    names = patient[order].unique(maintain_order=True)
    if cases := len(names) - names.str.to_lowercase().n_unique():
        message = f"{cases} patients' ids differ from another's in nothing but case, and count as other patients"
        where, remedy = table.where(site.data.records.patient), "Write each patient's id one way"
        findings.append(Finding(id="patients", status="warning", where=where, message=message, remedy=remedy))
    number = pl.DataFrame({"id": patient[order]}).join(
        pl.DataFrame({"id": names, "at": np.arange(len(names))}), on="id", how="left", maintain_order="left"
    )["at"]
    ids = record[order].to_list()
    kept_once = dict(zip(ids, ids, strict=True))  # where a patient is a record, many sites in one process notice
    table = table.take(order)
    return Records(
        table=table,
        id_column=site.data.records.id,
        line=line[order].to_numpy().astype(np.int64),
        ids=tuple(ids),
        patient=number.to_numpy().astype(np.int64),
        patient_ids=tuple(kept_once.get(name, name) for name in names.to_list()),
        visits=read_visits(site, table, ids, files, findings) if has_events(site) else None,
    )


def refuse_repeats(records: Records) -> None:
    """Refuse records that share an id: values could not be told apart.

    Raises:
        DataError: with their number.
    """
    twice = len(records) - len(set(records.ids))
    if twice:
        raise DataError(
            f"{twice} rows repeat the record id of another row",
            where=records.table.where(records.id_column),
            remedy="Give every record its own id, or filter the rows by `where`",
        )


def _wanted(site: Site) -> list[str]:
    """Every column of the list of records that some part of the site file names, the id first."""
    records = site.data.records
    wanted = {*records.where, *site.subgroups.values()}
    wanted |= {label.column for label in records.label.values() if label.column is not None and label.query is None}
    if site.split.column is not None:
        wanted.add(site.split.column)
    if has_events(site):
        wanted |= {NUMBER, *(KNOWN if records.omop else ())}
    for source in site.data.modalities.values():
        if isinstance(source, ImageSource):
            wanted.add(source.column)
        elif isinstance(source, ColumnsSource | TextSource) and source.index is not None:
            wanted.add(source.index)
    return [records.id, records.patient, *sorted(wanted - {records.id, records.patient})]


def _matching(table: Table, site: Site) -> pl.Series:
    """Positions of the rows that fulfil every condition of `where`."""
    keep = pl.Series([True]).new_from_index(0, len(table.frame))
    for column, value in site.data.records.where.items():
        codes = [category_code(one) for one in (value if isinstance(value, list) else [value])]
        keep &= code_text(table.column(column)).is_in(codes).fill_null(False)
    if not keep.any():
        raise DataError(
            f"none of {len(keep)} rows fulfils `where`",
            where=table.where(",".join(site.data.records.where)),
            remedy="Compare the values under `where` with those of the column",
        )
    return keep.arg_true()


def _ids(table: Table, column: str) -> pl.Series:
    ids = id_text(table.column(column))
    if ids.null_count():
        raise DataError(
            f"{ids.null_count()} rows have no id",
            where=table.where(column),
            remedy="Fill in the id of every row",
        )
    return ids


def _grouped(patient: pl.Series, cap: int, table: Table, site: Site, findings: list[Finding]) -> pl.Series:
    """Positions of the records that are kept, patient by patient, each patient's in the file's order."""
    frame = (
        pl.DataFrame({"patient": patient})
        .with_row_index("at")
        .with_columns(first=pl.col("at").min().over("patient"), nth=pl.col("at").cum_count().over("patient"))
    )
    kept = frame.filter(pl.col("nth") <= cap).sort("first", "at")
    dropped = len(frame) - len(kept)
    if dropped:
        findings.append(
            Finding(
                id="record_cap",
                status="warning",
                where=table.where(site.data.records.patient),
                message=f"{dropped} of {len(frame)} records are dropped: patients with more than "
                f"{cap} records keep their first ones",
                remedy="Raise patients.max_records to use more",
            )
        )
    return kept["at"]
