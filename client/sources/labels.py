"""Targets from the records' label columns."""

from __future__ import annotations

from dataclasses import dataclass

import numpy as np
import polars as pl
from numpy.typing import NDArray

from gapweave.client.sources.cells import LIST_ALL, code_text, merged, missing, recode, refuse_codes
from gapweave.client.sources.files import Files
from gapweave.client.sources.place import read_source
from gapweave.client.sources.records import Records
from gapweave.shared.config.site import Site
from gapweave.shared.config.sources import LabelColumn, Rows
from gapweave.shared.config.study import Task
from gapweave.shared.errors import DataError, UsageError

NO_YES = ["0", "1"]
"""Codes of a label that a record has or has not."""
BOOLEANS = {**dict.fromkeys(("false", "False", "FALSE"), "0"), **dict.fromkeys(("true", "True", "TRUE"), "1")}
"""As Parquet, pandas, R and databases write these, where a site file says nothing else."""


@dataclass(frozen=True, kw_only=True)
class Targets:
    """What is to be predicted.

    Attributes:
        value: [R, K] float32: 0/1, one-hot for multiclass; 0 where unknown.
        known: [R, K] which targets are known.
    """

    value: NDArray[np.float32]
    known: NDArray[np.bool_]


def unlabelled(task: Task, records: int) -> Targets:
    """Targets of records whose labels nobody knows yet."""
    shape = (records, task.outputs)
    return Targets(value=np.zeros(shape, np.float32), known=np.zeros(shape, np.bool_))


def read_targets(task: Task, site: Site, files: Files, records: Records) -> Targets:
    """Read the study's labels; an empty cell is an unknown label.

    Raises:
        UsageError: when the site file maps no column to a label, or a code to none of the study's.
        DataError: for a missing column, or a value that is none of the study's codes.
    """
    allowed = task.class_names if task.kind == "multiclass" else NO_YES
    columns = [_codes(label, allowed, site, files, records) for label in task.labels]
    if task.kind == "multiclass":
        value = (columns[0][:, None] == np.arange(len(allowed))).astype(np.float32)
        known = np.repeat(columns[0][:, None] >= 0, len(allowed), axis=1)
    else:
        codes = np.stack(columns, axis=1)
        value, known = (codes == 1).astype(np.float32), codes >= 0
    return Targets(value=value, known=known)


def _codes(label: str, allowed: list[str], site: Site, files: Files, records: Records) -> NDArray[np.int64]:
    """Position of each record's code among the allowed ones, -1 where unknown."""
    column = site.data.records.label.get(label)
    if column is None:
        mapped = ", ".join(site.data.records.label) or "none"
        raise UsageError(
            f"the site file maps no column to the study's label {label!r} (mapped: {mapped})",
            where=files.key("data.records.label"),
            remedy=f"Add `{label}: <column>`",
        )
    refuse_codes(column.codes, allowed, files.key(f"data.records.label.{label}.codes"))
    raw, where = _raw(label, column, files, records)
    local, mapping = code_text(raw), column.codes or (BOOLEANS if allowed == NO_YES else None)
    if both := merged(local, mapping):
        raise DataError(both, where=files.key(f"data.records.label.{label}.codes"), remedy=LIST_ALL)
    codes = recode(local, mapping)
    result = np.full(len(codes), -1, np.int64)
    for at, code in enumerate(allowed):
        result[(codes == code).fill_null(False).to_numpy()] = at
    # A class may be called as a missing value is written: None is then the class none in another spelling.
    spelled = codes.str.strip_chars().str.to_lowercase().is_in([code.lower() for code in allowed]).fill_null(False)
    strange = int(((result < 0) & (~missing(codes) | spelled).to_numpy()).sum())
    if strange:
        raise DataError(
            f"{strange} rows hold a label that is not one of {', '.join(allowed)}",
            where=where,
            remedy="Map the codes by `label: {column: ..., codes: {local: code}}`; leave unknown ones empty",
        )
    return result


def _raw(label: str, column: LabelColumn, files: Files, records: Records) -> tuple[pl.Series, str]:
    """The label of each record as the site has it, and where it is from."""
    key = files.key(f"data.records.label.{label}")
    if column.conditions is not None:
        from gapweave.client.sources.omop import read_conditions

        return read_conditions(column.conditions, files, records, f"{key}.conditions")
    assert column.column is not None
    if column.query is None:
        return records.table.column(column.column), records.table.where(column.column)
    table = read_source(Rows(query=column.query), [records.id_column, column.column], files, key)
    rows, found = records.rows_of(table.column(records.id_column)), table.column(column.column)
    ours = pl.DataFrame({"row": rows, "label": found}).filter(pl.col("row") >= 0)
    if ours["row"].is_duplicated().any():
        raise DataError(
            f"{int(ours['row'].is_duplicated().sum())} rows give a record more than one label",
            where=table.where(records.id_column),
            remedy="Let the query give one row a record",
        )
    every = pl.DataFrame({"row": np.arange(len(records))})
    return every.join(ours, on="row", how="left", maintain_order="left")["label"], table.where(column.column)


def class_counts(task: Task, targets: Targets) -> str:
    """How many records have each class, or each label, for whoever knows what to expect."""
    having = ((targets.value > 0) & targets.known).sum(axis=0).tolist()
    if task.kind == "multiclass":
        return ", ".join(f"{count} {name}" for name, count in zip(task.class_names, having, strict=True))
    known = targets.known.sum(axis=0).tolist()
    counts = zip(task.labels, having, known, strict=True)
    return ", ".join(f"{count} of {of} {name}" for name, count, of in counts)


def check_classes(task: Task, targets: Targets, training: NDArray[np.bool_], where: str) -> None:
    """Refuse training records from which nothing can be learned.

    Args:
        task: the study's task.
        targets: of all records.
        training: [R] records that are trained on.
        where: file and column, for messages.

    Raises:
        DataError: when no training record has a label, or all have the same one.
    """
    value, known = targets.value[training], targets.known[training]
    if not known.any():
        raise DataError(
            "no training record has a label and data",
            where=where,
            remedy="Check the label column, the modalities and the split",
        )
    if task.kind == "multiclass":
        varied = value[known[:, 0]].any(axis=0).sum() > 1
    else:
        ones, zeros = ((value > 0) & known).any(axis=0), ((value == 0) & known).any(axis=0)
        varied = (ones & zeros).any()
    if not varied:
        raise DataError(
            "one-class site: all training records have the same label",
            where=where,
            remedy="Check the label's column and codes, or leave the site out of this study",
        )
