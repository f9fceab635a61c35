"""Text: a record's notes as one text."""

from __future__ import annotations

import numpy as np
import polars as pl
from numpy.typing import NDArray

from gapweave.client.sources.cells import missing
from gapweave.client.sources.records import Reading
from gapweave.client.sources.values import Rows, read_rows
from gapweave.shared.config.modalities import TextModality
from gapweave.shared.config.sources import ClinicalSource, TextSource
from gapweave.shared.errors import UsageError
from gapweave.shared.features import text as features


def read(
    spec: TextModality, source: TextSource | ClinicalSource, reading: Reading
) -> tuple[NDArray[np.float32], NDArray[np.bool_]]:
    """Read a text modality: the columns in their order, the rows by time, or as the file has them.

    Returns:
        inputs [R, width]; present [R].

    Raises:
        UsageError: for a time without prediction time, or without the study's transformer.
        DataError: for a file or column that is missing or unreadable.
    """
    rows, names = _rows(spec, source, reading)
    columns = []
    for at, name in enumerate(names):
        cells = rows.table.column(name).cast(pl.String)
        empty = missing(cells)  # what stands for an empty cell is no word of a note
        columns.append(cells.set(empty, "").alias(str(at)))
        if len(rows.record) and empty.all():
            reading.warn(
                "empty",
                rows.table.where(name),
                f"the column is empty in all {len(rows.record)} rows of the site's records",
                "Correct the column, or remove it if the site does not have it",
            )
    joined = pl.DataFrame(columns).select(text=pl.concat_str(pl.all(), separator=" "))["text"]
    frame = pl.DataFrame({"record": rows.record, "text": joined})
    if rows.hour is not None:
        frame = frame.with_columns(hour=pl.Series(rows.hour)).sort("hour", maintain_order=True)
    by_record = frame.group_by("record", maintain_order=True).agg(pl.col("text").str.join(" "))
    texts = np.full(len(reading.records), "", object)
    texts[by_record["record"].to_numpy()] = by_record["text"].to_list()
    if spec.vectors is None:
        return features.encode(texts.tolist(), spec.buckets)
    if source.encoder is None:
        raise UsageError(
            "the study asks for vectors of a transformer, and the site file names none",
            where=reading.key(".encoder"),
            remedy="Add `encoder: <folder>`",
        )
    from gapweave.client.sources import vectors

    return vectors.encode(texts.tolist(), spec.vectors, source.encoder, reading)


def _rows(spec: TextModality, source: TextSource | ClinicalSource, reading: Reading) -> tuple[Rows, list[str]]:
    """The rows, and which of their columns are text."""
    if isinstance(source, TextSource):
        return read_rows(source, source.columns, spec.hours, reading), source.columns
    from gapweave.client.sources.omop import read_texts

    return read_texts(source, spec.hours, reading)
