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

EXACT = 2.0**53
"""Below it a float holds every whole number exactly."""


def missing(text: pl.Series) -> pl.Series:
    """Which texts stand for an empty cell; null does."""
    cell = pl.col("cell")  # one query: each step of a series by itself would be one
    query = cell.is_null() | cell.str.strip_chars().str.to_lowercase().is_in(MISSING)
    return text.alias("cell").to_frame().select(query)["cell"].alias(text.name)


def id_text(series: pl.Series) -> pl.Series:
    """Ids as text, null where empty. 12 and 12.0 become "12" as in a text file; "001" stays "001"."""
    if series.dtype.is_float():
        whole = (series == series.round()) & (series.abs() < EXACT)
        integer = series.set(~whole.fill_null(False), None).cast(pl.Int64, strict=False).cast(pl.String)
        text = integer.zip_with(integer.is_not_null(), series.cast(pl.String))
    else:
        text = series.cast(pl.String).str.strip_chars()
    text = text.str.replace(r"^(-?\d+)\.0+$", "$1")
    return text.set(missing(text), None)


def code_text(series: pl.Series) -> pl.Series:
    """Codes as `category_code` writes them, null where the cell is null or not a number.

    Each distinct value is converted once.
    """
    if series.dtype.is_float() or series.dtype.is_decimal():
        series = series.cast(pl.Float64).fill_nan(None)
    elif series.dtype == pl.Boolean:
        series = series.cast(pl.Int8)
    elif not series.dtype.is_integer():
        series = series.cast(pl.String)
    distinct = series.unique().drop_nulls()
    if distinct.is_empty():
        return pl.Series(series.name, [None] * len(series), dtype=pl.String)
    codes = pl.Series([category_code(value) for value in distinct.to_list()], dtype=pl.String)
    return series.replace_strict(distinct, codes, default=None, return_dtype=pl.String)


def recode(codes: pl.Series, mapping: dict[str, str] | None) -> pl.Series:
    """Replace local codes by the study's; a code that the mapping lacks stays as it is."""
    if not mapping:
        return codes
    return codes.replace(list(mapping), list(mapping.values()))


def numbers(series: pl.Series) -> tuple[NDArray[np.float64], int]:
    """Cells as numbers.

    Returns:
        values [E], NaN where missing or not a number; how many cells hold something that is not a number.
    """
    unreadable = 0
    if series.dtype.is_numeric() or series.dtype == pl.Boolean:
        values = series.cast(pl.Float64)
    else:
        text = series.cast(pl.String).str.strip_chars()
        values = text.cast(pl.Float64, strict=False)
        if values.null_count():
            unreadable = int((values.is_null() & ~missing(text)).sum())
    result: NDArray[np.float64] = values.fill_null(float("nan")).to_numpy()
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
