"""From a path in a site file to a table in memory, with errors that a site's operator can act on."""

from __future__ import annotations

import difflib
from collections.abc import Iterable
from dataclasses import dataclass, replace
from pathlib import Path

import platformdirs
import polars as pl
from polars.exceptions import NoDataError, PolarsError

from gapweave.client.sources import SOURCES
from gapweave.shared.errors import DataError


@dataclass(frozen=True, kw_only=True)
class Files:
    """Where a site's relative paths are looked up.

    Attributes:
        site_file: the site file; its folder is searched.
        data_dir: the folder of data sets, searched first; None: the user's data folder, searched last.
    """

    site_file: Path
    data_dir: Path | None = None

    def find(self, path: str) -> Path:
        """The first existing candidate.

        Raises:
            DataError: when there is none.
        """
        beside = self.site_file.parent / path
        if Path(path).is_absolute():
            candidates = [Path(path)]
        elif self.data_dir is not None:
            candidates = [self.data_dir / path, beside]
        else:
            candidates = [beside, platformdirs.user_data_path("gapweave") / path]
        for candidate in candidates:
            if candidate.exists():
                return candidate
        folders = " and ".join(str(candidate.parent) for candidate in candidates)
        raise DataError(
            f"there is no {path}; looked in {folders}",
            where=str(self.site_file),
            remedy="Correct the path in the site file, or say with --data where the data sets are",
        )

    def key(self, key: str) -> str:
        """A key of the site file, for messages."""
        return f"{self.site_file}:{key}"


@dataclass(frozen=True, kw_only=True)
class Table:
    """Some columns of a file.

    Attributes:
        path: the file.
        names: all columns that the file has.
        frame: those that were asked for and exist.
    """

    path: Path
    names: tuple[str, ...]
    frame: pl.DataFrame

    def where(self, column: str) -> str:
        """A column, for messages."""
        return f"{self.path}:{column}"

    def column(self, name: str) -> pl.Series:
        """One column.

        Raises:
            DataError: when the file lacks it, or it holds neither text, numbers nor times.
        """
        if name not in self.names:
            raise DataError(
                f"the file has no column {name!r}", where=self.where(name), remedy=_nearest(name, self.names)
            )
        series = self.frame[name]
        if series.dtype.is_nested() or series.dtype in (pl.Binary, pl.Object):
            raise DataError(
                f"the column holds {series.dtype}, not text, numbers or times",
                where=self.where(name),
                remedy="Write one plain value a cell",
            )
        return series

    def take(self, rows: pl.Series) -> Table:
        """The given rows (positions), in the given order."""
        return replace(self, frame=self.frame[rows])


def _nearest(name: str, known: tuple[str, ...]) -> str:
    close = difflib.get_close_matches(name, known, n=1, cutoff=0.5)
    if close:
        return f"Did you mean {close[0]!r}?"
    if len(known) == 1:
        return "It has a single column: separate cells by commas (.csv) or tabs (.tsv)"
    shown = ", ".join(known[:12]) + (", ..." if len(known) > 12 else "")
    return f"Its columns are: {shown}"


def read_table(path: Path, wanted: Iterable[str]) -> Table:
    """Read those of the wanted columns that the file has.

    A wanted column that is missing becomes an error when it is used (`Table.column`), so that a check can
    name all of them.

    Raises:
        DataError: for an unknown extension, or a file that cannot be read.
    """
    suffixes = [suffix.lower().lstrip(".") for suffix in path.suffixes]
    extension = next((suffix for suffix in reversed(suffixes) if suffix != "gz"), "")
    if extension not in set(SOURCES):
        raise DataError(
            f"no reader for files of the type {extension!r}",
            where=str(path),
            remedy=f"Known types: {', '.join(SOURCES)}",
        )
    source = SOURCES[extension]
    try:
        names = tuple(source.names(path))
        frame = source.read(path, [name for name in names if name in set(wanted)])
    except (PolarsError, OSError, EOFError, ValueError) as error:
        raise _unreadable(path, error) from None
    return Table(path=path, names=names, frame=frame)


def _unreadable(path: Path, error: Exception) -> DataError:
    """The reader's own text may quote a cell, so only its kind is told."""
    text = str(error).lower()
    if "utf-8" in text or "utf8" in text:
        return DataError("the file is not UTF-8 text", where=str(path), remedy="Save it as UTF-8")
    if isinstance(error, NoDataError):
        return DataError("the file is empty", where=str(path), remedy="Write a header line and one row a record")
    if isinstance(error, PermissionError | IsADirectoryError):
        return DataError("the file cannot be opened", where=str(path), remedy="Check that it is a readable file")
    return DataError(
        "the file is damaged or malformed",
        where=str(path),
        remedy="Check that every row has as many cells as the header, and that the file is complete",
    )
