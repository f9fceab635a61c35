"""Rows from wherever a source says that they lie: a file, or a table or query of the site's database."""

from __future__ import annotations

from collections.abc import Callable, Iterable

import polars as pl

from gapweave.client.sources.files import Files, Table, read_table
from gapweave.shared.config.sources import Rows

Keep = Callable[[pl.DataFrame], pl.DataFrame]
"""What of a part is needed."""


def read_source(source: Rows, wanted: Iterable[str], files: Files, key: str, keep: Keep | None = None) -> Table:
    """Read those of the wanted columns that there are.

    Args:
        source: a source of the site file.
        wanted: columns; one that is missing becomes an error when it is used.
        files: where relative paths are looked up, and the database.
        key: of the source in the site file, for messages.
        keep: what of a part is needed; a database's other rows are never held. A file is read whole.

    Raises:
        DataError: for a file or query that cannot be read.
        Unreachable: for a database that cannot be connected.
        UsageError: for a database whose address or driver is wrong.
    """
    if source.file is not None:
        return read_table(files.find(source.file, key), wanted)
    from gapweave.client.sources import sql

    return sql.read(source, wanted, files, key, keep)
