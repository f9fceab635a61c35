"""Apache Parquet."""

from __future__ import annotations

from pathlib import Path

import polars as pl

from gapweave.client.sources import SOURCES


class Parquet:
    """Parquet files; only the columns asked for are read from the disk."""

    def names(self, path: Path) -> list[str]:
        """See `TableFormat`."""
        # A path would be expanded as a pattern; an open file is not.
        with path.open("rb") as file:
            return list(pl.read_parquet_schema(file))

    def read(self, path: Path, columns: list[str]) -> pl.DataFrame:
        """See `TableFormat`."""
        return pl.read_parquet(path, columns=columns, glob=False).select(columns)


SOURCES.register("parquet")(Parquet())
