"""How cells are compared and read: ids, codes, numbers, and what counts as missing."""

from __future__ import annotations

import difflib

import numpy as np
import polars as pl
from numpy.typing import NDArray

from gapweave.shared.config.modalities import category_code
from gapweave.shared.errors import UsageError

MISSING = ("", "na", "n/a", "#n/a", "nan", "null", "none", "?", ".")
"""Texts, in lower case, that stand for an empty cell."""

_WHOLE = r"^(-?\d+)\.0+$"
"""A whole number that was stored as a fraction."""

EXACT = 2.0**53
"""Below it a float holds every whole number exactly."""


CELL = pl.col("cell")
"""The column of a query on one series: each step of a series by itself would be a query of its own."""


def missing(text: pl.Series) -> pl.Series:
    """Which texts stand for an empty cell; null does."""
    return _ask(text, _is_missing(CELL))


def _is_missing(text: pl.Expr) -> pl.Expr:
    return text.is_null() | text.str.strip_chars().str.to_lowercase().is_in(MISSING)


def _ask(series: pl.Series, query: pl.Expr) -> pl.Series:
    return series.alias("cell").to_frame().select(cell=query)["cell"].alias(series.name)


def id_text(series: pl.Series) -> pl.Series:
    """Ids as text, null where empty. 12 and 12.0 become "12" as in a text file; "001" stays "001"."""
    if series.dtype.is_float():
        whole = (CELL.round() == CELL) & (CELL.abs() < EXACT)
        integer = pl.when(whole).then(CELL).cast(pl.Int64, strict=False).cast(pl.String)
        text = pl.coalesce(integer, CELL.cast(pl.String))
    else:
        text = CELL.cast(pl.String).str.strip_chars()
    text = text.str.replace(_WHOLE, "$1")
    return _ask(series, pl.when(~_is_missing(text)).then(text))


def code_text(series: pl.Series) -> pl.Series:
    """Codes as `category_code` writes them, null where the cell is null or not a number.

    Each distinct value is converted once.
    """
    if series.dtype.is_float() or series.dtype.is_decimal():
        # By what is written: 0.1 in four bytes is another number than in eight.
        series = (series.cast(pl.String) if series.dtype == pl.Float32 else series).cast(pl.Float64).fill_nan(None)
    elif series.dtype == pl.Boolean:
        series = series.cast(pl.Int8)
    elif not series.dtype.is_integer():
        series = series.cast(pl.String)
    distinct = series.unique().drop_nulls()
    if distinct.is_empty():
        return pl.Series(series.name, [None] * len(series), dtype=pl.String)
    codes = pl.Series([category_code(value) for value in distinct.to_list()], dtype=pl.String)
    return series.replace_strict(distinct, codes, default=None, return_dtype=pl.String)


def is_item(series: pl.Series, code: str) -> pl.Series:
    """Which cells name an item: texts as they are written, or the whole number that was stored as a fraction.

    Unlike a category, an item is none of the study's: 250.0 and 250.00 may be two diseases, 0123 and 123 two drugs.
    """
    if series.dtype.is_numeric():
        return (code_text(series) == category_code(code)).fill_null(False)
    text = series.cast(pl.String).str.strip_chars()
    return ((text == code) | (text.str.replace(_WHOLE, "$1") == code)).fill_null(False)


def recode(codes: pl.Series, mapping: dict[str, str] | None) -> pl.Series:
    """Replace local codes by the study's; a code that the mapping lacks stays as it is."""
    if not mapping:
        return codes
    return codes.replace(list(mapping), list(mapping.values()))


LIST_ALL = "List every local code in `codes`, also those that are written as the study's"
"""The remedy for `merged` codes."""


def merged(codes: pl.Series, mapping: dict[str, str] | None) -> str:
    """What is said of codes of the study that cells stand for both as they are and by the mapping; empty for none.

    A hospital writes 1 for female and 2 for male, and the study 1 for male: `{2: 1}` alone makes everybody male.

    Args:
        codes: local ones.
        mapping: local code -> the study's.
    """
    present = set(codes.drop_nulls().unique().to_list())
    both = {code for local, code in (mapping or {}).items() if local in present and local != code}
    found = sorted(code for code in both & present if code not in (mapping or {}))
    return f"cells stand for {', '.join(found)} both as they are and by `codes`" if found else ""


def numbers(series: pl.Series) -> tuple[NDArray[np.float64], int]:
    """Cells as numbers.

    Returns:
        values [E], NaN where missing or not a number; how many cells hold something that is not a number.
    """
    unreadable = 0
    if series.dtype.is_numeric() or series.dtype == pl.Boolean:
        values = series.cast(pl.Float64)
    else:
        text = series.cast(pl.String)
        values = text.cast(pl.Float64, strict=False)
        if values.null_count() > text.null_count():  # seldom, and a query costs more than a small column's cast
            values = _ask(text, CELL.str.strip_chars().cast(pl.Float64, strict=False))
            unreadable = int((values.is_null() & ~missing(text)).sum())
    result: NDArray[np.float64] = values.to_numpy()  # null becomes NaN
    return result, unreadable


def refuse_codes(mapping: dict[str, str] | None, allowed: list[str] | None, where: str) -> None:
    """Refuse a mapping of local codes to something that the study does not know.

    Args:
        mapping: local code -> the study's; one that stands for an empty cell is allowed.
        allowed: the study's codes; None: numbers.
        where: key of the mapping in the site file.

    Raises:
        UsageError: naming the key, and the nearest of the study's codes.
    """
    for local, code in (mapping or {}).items():
        if code.strip().lower() in MISSING or (_is_number(code) if allowed is None else code in allowed):
            continue
        close = difflib.get_close_matches(code, allowed or [], n=1, cutoff=0.5)
        raise UsageError(
            f"the code {local!r} is mapped to {code!r}, which is "
            + ("no number" if allowed is None else "none of the study's"),
            where=f"{where}.{local}",
            remedy=f"Did you mean {close[0]!r}?" if close else f"Map it to {_choice(allowed)}, or to '' for missing",
        )


def _choice(allowed: list[str] | None) -> str:
    return "a number" if allowed is None else f"one of {', '.join(allowed)}"


def _is_number(text: str) -> bool:
    try:
        float(text)
    except ValueError:
        return False
    return True
