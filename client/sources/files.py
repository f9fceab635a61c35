"""From a path in a site file to a table in memory, with errors that a site's operator can act on."""

from __future__ import annotations

import difflib
import gzip
import os
import re
import zlib
from collections.abc import Iterable
from dataclasses import dataclass, replace
from functools import lru_cache
from pathlib import Path

import platformdirs
import polars as pl
from polars.exceptions import NoDataError, PolarsError

from gapweave.client.sources import SOURCES
from gapweave.client.sources.csv import is_gzip
from gapweave.shared.config.sources import Database
from gapweave.shared.errors import DataError

LONGEST_NAME = 40
"""Longer column names are not shown: they may be a note in a file without a header."""

_VALUE = re.compile(r"^[-+]?[\d.,]|\d{1,4}[-./]\d{1,2}[-./]\d{1,4}")
"""What a number, a date or a code that starts with a digit looks like, and the name of a column seldom does."""


@dataclass(frozen=True, kw_only=True)
class Files:
    """Where a site's relative paths are looked up.

    Attributes:
        site_file: the site file; its folder is searched.
        data_dir: the folder of data sets, searched first; None: the user's data folder, searched last.
        database: the site's, if any.
    """

    site_file: Path
    data_dir: Path | None = None
    database: Database | None = None

    def find(self, path: str, key: str | None = None) -> Path:
        """The first existing candidate.

        Args:
            path: as the site file has it.
            key: the entry that names it, for messages; None: the site file.

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
        folders = " and ".join(os.path.normpath(candidate.parent) for candidate in candidates)
        raise DataError(
            f"there is no {path}; looked in {folders}",
            where=key or str(self.site_file),
            remedy="Correct the path in the site file, or say with --data where the data sets are",
        )

    def find_folder(self, path: str, key: str) -> Path:
        """As `find`, for a folder.

        Raises:
            DataError: when there is none, or it is a file.
        """
        found = self.find(path, key)
        if not found.is_dir():
            raise DataError("this is a file, not a folder", where=str(found), remedy="Name the folder of the images")
        return found

    def key(self, key: str) -> str:
        """A key of the site file, for messages."""
        return f"{self.site_file}:{key}"


@dataclass(frozen=True, kw_only=True)
class Table:
    """Some columns of a file, or of what a database gives.

    Attributes:
        place: the file, or the key of the site file that names table or query; for messages.
        names: all columns that there are.
        wanted: those that were asked for.
        frame: those that were asked for and exist.
        rows: how many there were before some of them were dropped while they were read.
        named: whether the names are surely names (a database's), and no first row of data.
    """

    place: str
    names: tuple[str, ...]
    wanted: frozenset[str]
    frame: pl.DataFrame
    rows: int
    named: bool = False

    def where(self, column: str) -> str:
        """A column, for messages."""
        return f"{self.place}:{column}"

    def column(self, name: str) -> pl.Series:
        """One column.

        Raises:
            DataError: when the file lacks it or has it twice, or it holds neither text, numbers nor times.
        """
        if name not in self.names:
            others = sorted(self.wanted.difference(self.names, [name])) if self._headed() else []
            also = f" (nor {', '.join(map(repr, others))})" if others else ""
            raise DataError(f"there is no column {name!r}{also}", where=self.where(name), remedy=self._instead_of(name))
        if self.names.count(name) > 1:
            times = "twice" if self.names.count(name) == 2 else f"{self.names.count(name)} times"
            raise DataError(
                f"the column {name!r} occurs {times}",
                where=self.where(name),
                remedy="Rename or remove the ones that are not meant",
            )
        series = self.frame[name]
        if series.dtype.is_nested() or series.dtype in (pl.Binary, pl.Object):
            raise DataError(
                f"the column holds {series.dtype}, not text, numbers or times",
                where=self.where(name),
                remedy="Write one plain value a cell",
            )
        return series.cast(pl.String) if isinstance(series.dtype, pl.Categorical | pl.Enum) else series

    def take(self, rows: pl.Series) -> Table:
        """The given rows (positions), in the given order."""
        return replace(self, frame=self.frame[rows])

    def _headed(self) -> bool:
        """Whether the names are names, so that showing them shows no patient's row.

        A first row may hold a word that is a column's name here; it then stands in the rows below it, too.
        """
        if self.named:
            return True
        texts = [name for name, type_ in self.frame.schema.items() if type_ == pl.String]
        return _trusted(self.names, self.wanted) and not any((self.frame[name] == name).any() for name in texts)

    def _instead_of(self, name: str) -> str:
        """What to do about a column that is not there."""
        if not self._headed():
            count = "1 column" if len(self.names) == 1 else f"{len(self.names)} columns"
            return f"It has {count}; has the file a header line?"
        known = [one for one in self.names if one.strip() and len(one) <= LONGEST_NAME]
        close = difflib.get_close_matches(name, known, n=1)
        if close:
            return f"Did you mean {close[0]!r}?"
        return f"Its columns are: {', '.join(known[:12])}{', ...' if len(known) > 12 else ''}"


def _trusted(names: Iterable[str], wanted: frozenset[str]) -> bool:
    """Whether a file's first line is a header: it has half of the wanted names or more, and nothing like a value."""
    filled = [name.strip() for name in names if name.strip()]
    known = len(wanted.intersection(filled))
    return known > 0 and 2 * known >= len(wanted) and not any(_VALUE.search(name) for name in filled)


def read_table(path: Path, wanted: Iterable[str]) -> Table:
    """Read those of the wanted columns that the file has.

    A wanted column that is missing becomes an error when it is used (`Table.column`), so that a check can
    name all of them.

    Raises:
        DataError: for a folder, an unknown extension, or a file that cannot be read.
    """
    if path.is_dir():
        raise DataError("this is a folder, not a file", where=str(path), remedy="Name a file in it")
    asked = frozenset(wanted)
    suffixes = [suffix.lower().lstrip(".") for suffix in path.suffixes]
    extension = next((suffix for suffix in reversed(suffixes) if suffix != "gz"), "")
    if extension not in set(SOURCES):
        raise DataError(
            f"no reader for files of the type {extension!r}",
            where=str(path),
            remedy=f"Known types: {', '.join(SOURCES)}",
        )
    try:
        now = path.stat()
        return _read(path, (now.st_ino, now.st_mtime_ns, now.st_size), extension, asked)
    except (PolarsError, OSError, EOFError, ValueError) as error:
        raise _unreadable(path, error) from None


@lru_cache(maxsize=16)
def _read(path: Path, version: tuple[int, ...], extension: str, asked: frozenset[str]) -> Table:
    """Read a file once for all sites of a simulation that have it in common; a changed file is another version."""
    source = SOURCES[extension]
    names = tuple(source.names(path))
    frame = source.read(path, list(dict.fromkeys(name for name in names if name in asked)))
    return Table(place=str(path), names=names, wanted=asked, frame=frame, rows=len(frame))


def forget_files() -> None:
    """Drop what was read."""
    _read.cache_clear()


def _unreadable(path: Path, error: Exception) -> DataError:
    """The reader's own text may quote a cell, so only its kind is told."""
    text = str(error).lower()
    if "utf-8" in text or "utf8" in text:
        return DataError("the file is not UTF-8 text", where=str(path), remedy="Save it as UTF-8")
    if isinstance(error, NoDataError):
        return DataError("the file is empty", where=str(path), remedy="Write a header line and one row a record")
    if isinstance(error, PermissionError):
        return DataError("the file cannot be opened", where=str(path), remedy="Check that it may be read")
    if _cut_gzip(path):
        return DataError("the compressed file is damaged or incomplete", where=str(path), remedy="Copy it again")
    if path.suffix.lower() not in (".csv", ".tsv", ".gz"):
        kind = path.suffix.lower().lstrip(".")
        return DataError(f"the file is damaged or no {kind}", where=str(path), remedy="Copy or export it again")
    return DataError(
        "the file is damaged or malformed",
        where=str(path),
        remedy="Check that every row has as many cells as the header, and that the file is complete",
    )


def _cut_gzip(path: Path) -> bool:
    """Whether a file is compressed and cannot be decompressed."""
    try:
        if not is_gzip(path):
            return False
        with gzip.open(path) as packed:
            while packed.read(1 << 20):
                pass
    except (OSError, EOFError, zlib.error):
        return True
    return False
