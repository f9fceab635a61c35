"""Scaling by public ranges: the same at every site, never by a site's own statistics."""

from __future__ import annotations

import numpy as np
from numpy.typing import NDArray

from gapweave.shared.config.modalities import Range, Scaling

BOUND = 5.0
"""Scaled values are clipped to [-BOUND, BOUND], so that no public range, however odd, makes an input huge."""


def clip(values: NDArray[np.float64], card: Scaling) -> NDArray[np.float64]:
    """Values inside the plausible range; NaN means missing and stays NaN, and so does an infinite value."""
    clipped: NDArray[np.float64] = np.clip(np.where(np.isfinite(values), values, np.nan), card.low, card.high)
    return clipped


def scale(values: NDArray[np.float64], card: Scaling) -> NDArray[np.float64]:
    """Clip to the plausible range, take logarithms if the card says so, centre and scale.

    Args:
        values: any shape, in the study's unit; NaN means missing and stays NaN, and so does an infinite value.
        card: the variable's public range.

    Returns:
        Values in [-BOUND, BOUND], or NaN.
    """
    clipped = clip(values, card)
    low, high, center = card.low, card.high, card.center
    if card.log:
        clipped, low, high = np.log(clipped), np.log(low), np.log(high)
        center = None if center is None else float(np.log(center))
    middle = (low + high) / 2 if center is None else center
    unit = (high - low) / 4 if card.scale is None else card.scale
    scaled: NDArray[np.float64] = np.clip((clipped - middle) / unit, -BOUND, BOUND)
    return scaled


def implausible(values: NDArray[np.float64], card: Scaling) -> NDArray[np.bool_]:
    """Which observed values are not finite or lie outside the public range.

    NaN counts as missing, not as implausible.
    """
    outside: NDArray[np.bool_] = ~np.isnan(values) & ((values < card.low) | (values > card.high))
    return outside


def hinges(card: Range) -> tuple[float, float] | None:
    """Where the reference interval begins and ends among scaled values; None for a card without one."""
    if card.normal is None:
        return None
    low, high = scale(np.array(card.normal), card)
    return float(low), float(high)
