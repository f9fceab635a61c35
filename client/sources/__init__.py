"""Reading a site's files.

`SOURCES` is the seam: file formats of tables, by extension; a foreign package adds one by registering it.
What a study asks of the tables (variables, units, windows, labels) is the same for every format and lives in
this folder too, one module a question.
"""

from __future__ import annotations

from pathlib import Path
from typing import Protocol

import polars as pl

from gapweave.shared.registry import Registry


class TableFormat(Protocol):
    """A file format of tables. Either method may raise polars' errors or `OSError` for a damaged file."""

    def names(self, path: Path) -> list[str]:
        """Names of all columns, in the file's order, one as often as it occurs; the values are not read."""
        ...

    def read(self, path: Path, columns: list[str]) -> pl.DataFrame:
        """The given columns, all of which exist, and every row in the file's order."""
        ...


SOURCES: Registry[TableFormat] = Registry("source", "gapweave.client.sources")
"""Formats by the extension that they read."""
