"""A table's input.

Per numeric variable the scaled value and an observed flag, and with a reference interval how far the value lies above
and below it; per category one flag a code.
"""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

import numpy as np
from numpy.typing import NDArray

from gapweave.shared.config.modalities import Categories, Column
from gapweave.shared.features.ranges import hinges, scale


def width(columns: Mapping[str, Column]) -> int:
    """Number of inputs: 2 a numeric variable, 4 with a reference interval, one a code of a categorical one."""
    return len(names(columns))


def names(columns: Mapping[str, Column]) -> list[str]:
    """Names of the inputs, in their order."""
    result: list[str] = []
    for name in sorted(columns):
        card = columns[name]
        if isinstance(card, Categories):
            result += [f"{name}={code}" for code in card.categories]
        else:
            result += [name, f"{name}:observed"]
            result += [] if card.normal is None else [f"{name}:above", f"{name}:below"]
    return result


def is_flag(name: str) -> bool:
    """Whether the input of that name is 0 or 1."""
    return name.endswith(":observed") or "=" in name


def encode(
    columns: Mapping[str, Column], values: Mapping[str, NDArray[Any]], records: int
) -> tuple[NDArray[np.float32], NDArray[np.bool_]]:
    """Encode a table.

    Args:
        columns: the study's variables.
        values: per variable that the site has: [R] float64 with NaN for missing (numeric), or [R] object with
            code strings and None (categorical; a code that the study does not know counts as missing).
        records: R.

    Returns:
        inputs [R, width], 0 where missing; present [R]: any variable observed.
    """
    inputs = np.zeros((records, width(columns)), np.float32)
    present = np.zeros(records, np.bool_)
    at = 0
    for name in sorted(columns):
        card = columns[name]
        if isinstance(card, Categories):
            for code in card.categories:
                if name in values:
                    inputs[:, at] = values[name] == code
                    present |= inputs[:, at] > 0
                at += 1
            continue
        if name in values:
            scaled = scale(values[name], card)
            observed = ~np.isnan(scaled)
            inputs[:, at] = np.where(observed, scaled, 0.0)
            inputs[:, at + 1] = observed
            present |= observed
            limits = hinges(card)
            if limits is not None:
                inputs[:, at + 2] = np.where(observed, np.maximum(scaled - limits[1], 0), 0.0)
                inputs[:, at + 3] = np.where(observed, np.maximum(limits[0] - scaled, 0), 0.0)
        at += width({name: card})
    return inputs, present
