"""Comma- and tab-separated text, also compressed with gzip."""

from __future__ import annotations

import csv
import gzip
import re
from pathlib import Path

import polars as pl

from gapweave.client.sources import SOURCES
from gapweave.shared.errors import DataError

LONGEST_CELL = 2**31 - 1
"""Characters of a cell, a long report say; Python's own reader stops at 131,072."""
START = 1024
"""Bytes of a file that are looked at for another encoding."""


class Separated:
    """Separated text in UTF-8. Every column is read as text, so that the id 001 stays 001.

    Args:
        separator: the character between two cells.
    """

    def __init__(self, separator: str) -> None:
        self._separator = separator

    def names(self, path: Path) -> list[str]:
        """See `TableFormat`.

        Raises:
            DataError: for another encoding or separator. Neither is left to fail later: the message would show
                the first line, which is a patient's where the header is missing.
        """
        _refuse_other_text(path)
        header = pl.read_csv(path, separator=self._separator, infer_schema=False, n_rows=0, glob=False).columns
        if len(header) == 1:
            self._refuse_separators(path, header[0])
        return [_as_written(name, header) for name in header]

    def _refuse_separators(self, path: Path, line: str) -> None:
        known = {",": "commas", ";": "semicolons", "\t": "tabs", "|": "vertical bars"}
        for sign, name in known.items():
            if sign in line:
                raise DataError(
                    f"the file has a single column: its cells are separated by {name}, not {known[self._separator]}",
                    where=str(path),
                    remedy="Separate cells by commas (.csv) or tabs (.tsv), and write decimals with a point",
                )

    def read(self, path: Path, columns: list[str]) -> pl.DataFrame:
        """See `TableFormat`."""
        # All columns are parsed: with fewer, polars does not notice a row whose cells have shifted.
        frame = pl.read_csv(path, separator=self._separator, infer_schema=False, glob=False)
        if frame.width > 1 and frame.to_series(-1).null_count():
            self._refuse_short_rows(path, frame.width)
            frame = frame.filter(~pl.all_horizontal(pl.all().is_null()))  # blank lines
        return frame.select(columns)

    def _refuse_short_rows(self, path: Path, width: int) -> None:
        """Refuse rows that end early, as in a file that was cut off: polars fills them up with empty cells."""
        csv.field_size_limit(LONGEST_CELL)
        read = gzip.open if is_gzip(path) else open
        with read(path, "rt", encoding="utf-8", newline="") as file:
            rows = csv.reader(file, delimiter=self._separator)
            short = [rows.line_num for row in rows if 0 < len(row) < width]
        if short:
            raise DataError(
                f"{len(short)} rows have fewer cells than the header (the first: line {short[0]})",
                where=str(path),
                remedy="Export the file again in full; write empty cells as empty, up to the last column",
            )


def _as_written(name: str, header: list[str]) -> str:
    """The name in the file: polars gives a column's second occurrence one of its own."""
    written = re.sub(r"_duplicated_\d+$", "", name)
    return written if written in header else name


def is_gzip(path: Path) -> bool:
    """Whether a file is compressed, whatever it is called."""
    with path.open("rb") as file:
        return file.read(2) == b"\x1f\x8b"


def _refuse_other_text(path: Path) -> None:
    """Refuse text of two or four bytes a character, which has zero bytes, and lines that end as on old Macintoshes."""
    with gzip.open(path) if is_gzip(path) else path.open("rb") as file:
        start = file.read(START)
    if b"\0" in start or start.startswith((b"\xff\xfe", b"\xfe\xff")):
        raise DataError("the file is not UTF-8 text", where=str(path), remedy="Save it as UTF-8")
    if b"\r" in start[:-1] and b"\n" not in start:
        raise DataError(
            "lines end with a carriage return alone",
            where=str(path),
            remedy="Save it with the line ends of Unix or Windows",
        )


SOURCES.register("csv")(Separated(","))
SOURCES.register("tsv")(Separated("\t"))
