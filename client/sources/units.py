"""Local units into the study's: every conversion is a factor and an offset."""

from __future__ import annotations

import math
import re
from contextlib import suppress
from functools import cache
from typing import Any

import numpy as np
from numpy.typing import NDArray

from gapweave.shared.config.modalities import Range
from gapweave.shared.config.sources import ValueColumn
from gapweave.shared.errors import UsageError
from gapweave.shared.features.ranges import scale

COMMON = ("mmol/L", "umol/L", "mg/dL", "g/dL", "g/L", "mg/L", "kPa", "mmHg", "degF", "lb", "inch", "m", "L", "1/uL")
"""Units that hospitals write."""

UCUM = {"mm[Hg]": "mmHg", "mm Hg": "mmHg", "Cel": "degC", "[degF]": "degF", "[in_i]": "inch", "[lb_av]": "lb"}
"""Spellings that pint does not know."""

_AMBIGUOUS = re.compile(r"\b10[eE]\d|\d\s+\d")
"""10E9 is ten times 10^9 to who computes, and 10^9 to many laboratories."""

FITTING = 0.75
"""A median so near to the public centre, in public scales, is as usual as one gets."""


def to_study_unit(values: NDArray[np.float64], column: ValueColumn, card: Range, where: str) -> NDArray[np.float64]:
    """Convert local values.

    Args:
        values: any shape, in the local unit.
        column: what the site file says of them: a factor, a unit, both if they agree, or neither (already the study's
            unit).
        card: what the study says of them.
        where: key of the site file, for messages.

    Raises:
        UsageError: for a unit that is unknown, or that does not measure the same quantity, or that another factor
            brings to the study's.
    """
    factor, offset = 1.0 if column.factor is None else column.factor, column.offset
    if column.unit is not None and column.factor is not None:
        _agree(column.unit, column, card, where)
    elif column.unit is not None and column.unit != card.unit:
        if card.unit is None:
            raise UsageError(
                f"the unit {column.unit!r} cannot be converted: the study gives no unit for this variable",
                where=where,
                remedy="Use `factor` and `offset`, or add `unit` to the study",
            )
        scale, shift = _to_study(column.unit, card, where)
        # The site's own offset is in the study's unit: it is added last, as with a factor.
        factor, offset = scale, shift + column.offset
    return values * factor + offset


def _agree(unit: str, column: ValueColumn, card: Range, where: str) -> None:
    """Refuse a unit and a factor that say two things; a unit that cannot be converted leaves it to the factor."""
    if card.unit is None:
        return
    try:
        said = _to_study(unit, card, where)
    except UsageError:
        return
    given = (column.factor or 0.0, column.offset)
    if not np.allclose(given, said, rtol=0.02, atol=1e-6 * abs(said[0])):
        raise UsageError(
            f"{unit} to the study's {card.unit} is a factor of {said[0]:.6g} and an offset of {said[1]:.6g}, "
            f"and the site file says {given[0]:g} and {given[1]:g}",
            where=where,
            remedy="Leave out the unit, or factor and offset",
        )


def likely_unit(values: NDArray[np.float64], card: Range) -> str | None:
    """The one of `COMMON` in which these values would be usual: their median nearest to the public centre.

    Args:
        values: observed ones, in a unit that is in doubt.
        card: the variable's; it names unit and centre, else nothing is known.
    """
    if card.unit is None or card.center is None or card.scale is None:
        return None
    away, median = {}, np.median(values, keepdims=True)
    for unit in (*COMMON, *card.other_units):
        with suppress(UsageError):  # measures something else
            factor, offset = _to_study(unit, card, unit)
            away[unit] = abs(float(scale(median * factor + offset, card)[0]))
    best = min(away, key=away.__getitem__, default=None)
    return best if best is not None and away[best] <= FITTING and best != card.unit else None


def _to_study(unit: str, card: Range, where: str) -> tuple[float, float]:
    """Factor and offset from a unit to that of a variable that has one."""
    assert card.unit is not None
    return card.other_units.get(unit) or conversion(unit, card.unit, card.molar_mass, where)


@cache
def conversion(local: str, study: str, molar_mass: float | None, where: str) -> tuple[float, float]:
    """Factor and offset from the local to the study's unit.

    Args:
        local: unit of the site.
        study: unit of the study.
        molar_mass: g/mol; allows mass <-> amount of substance.
        where: key of the site file, for messages.

    Raises:
        UsageError: naming both units.
    """
    source, target = _parse(local, where), _parse(study, where)
    try:
        zero, one, two = (_convert(source, target, value, molar_mass) for value in (0.0, 1.0, 2.0))
    except Exception:  # pint raises its own errors, and arithmetic ones for logarithmic units
        hint = "" if molar_mass else ", or add `molar_mass` to the study if one is a mass and the other an amount"
        raise UsageError(
            f"{local!r} cannot be converted to the study's unit {study!r}",
            where=where,
            remedy=f"Correct the unit, use `factor` and `offset`{hint}",
        ) from None
    if not math.isclose(two - one, one - zero, rel_tol=1e-9):
        raise UsageError(
            f"{local!r} to {study!r} is not a conversion by factor and offset",
            where=where,
            remedy="Convert the column before Gapweave reads it",
        )
    return one - zero, zero


@cache
def _registry() -> Any:
    # Importing pint costs as much as reading a site: only sites that name a unit pay for it.
    import pint

    return pint.UnitRegistry()


def _parse(unit: str, where: str) -> Any:
    """A quantity of 1 unit. UCUM's 10*9/L, its own spellings and a bare /min are understood."""
    text = UCUM.get(unit.strip(), unit.strip())
    text = re.sub(r"\b10\*(?=\d)", "10**", text)
    text = f"1{text}" if text.startswith("/") else text
    try:
        if _AMBIGUOUS.search(text):
            raise ValueError(text)
        return _registry().Quantity(1, text) if not re.search(r"\d", text) else _registry()(text)
    except Exception:  # an arbitrary text can fail anywhere in pint's parser
        raise UsageError(
            f"the unit {unit!r} is not known",
            where=where,
            remedy="Write it as in mg/dL, mmol/L or 10*9/L, or use `factor`",
        ) from None


def _convert(source: Any, target: Any, value: float, molar_mass: float | None) -> float:
    registry = _registry()
    quantity = registry.Quantity(value * source.magnitude, source.units)
    if quantity.is_compatible_with(target.units) or molar_mass is None:
        converted = quantity.to(target.units)
    else:
        converted = quantity.to(target.units, "chemistry", mw=registry.Quantity(molar_mass, "g/mol"))
    return float(converted.magnitude) / float(target.magnitude)
