"""Comma- and tab-separated text, also compressed with gzip."""

from __future__ import annotations

from pathlib import Path

import polars as pl

from gapweave.client.sources import SOURCES


class Separated:
    """Separated text in UTF-8. Every column is read as text, so that the id 001 stays 001.

    Args:
        separator: the character between two cells.
    """

    def __init__(self, separator: str) -> None:
        self._separator = separator

    def names(self, path: Path) -> list[str]:
        """See `TableFormat`."""
        header = pl.read_csv(path, separator=self._separator, infer_schema=False, n_rows=0, glob=False)
        return header.columns

    def read(self, path: Path, columns: list[str]) -> pl.DataFrame:
        """See `TableFormat`."""
        # All columns are parsed: with fewer, polars does not notice a row whose cells have shifted.
        frame = pl.read_csv(path, separator=self._separator, infer_schema=False, glob=False)
        return frame.select(columns)


SOURCES.register("csv")(Separated(","))
SOURCES.register("tsv")(Separated("\t"))
