"""How numbers are written in pages and on screens."""

from __future__ import annotations

import math

NOTHING = "–"  # noqa: RUF001 - an en dash stands for "no value"
MINUS = "−"  # noqa: RUF001 - as wide as a plus
UNITS = ("bytes", "kB", "MB", "GB", "TB")


def number(value: float | None, digits: int = 3) -> str:
    """A number with fixed digits; a dash for none."""
    return NOTHING if value is None else f"{value:.{digits}f}"


def signed(value: float | None, digits: int = 3) -> str:
    """A difference with its sign."""
    if value is None:
        return NOTHING
    text = f"{abs(value):.{digits}f}"
    return text if float(text) == 0 else f"{'+' if value > 0 else MINUS}{text}"


def short(value: float | None) -> str:
    """A setting or a small probability: as few digits as it needs."""
    return NOTHING if value is None else f"{value:.4g}".replace("e-0", "e-")


def rounded_up(epsilon: float) -> float:
    """To two digits, never below: a budget may not look smaller than it is.

    >>> rounded_up(7.9912), rounded_up(8.0)
    (8.0, 8.0)
    """
    return math.ceil(epsilon * 100 - 1e-9) / 100


def budget(value: float | None) -> str:
    """An epsilon that was spent; none means that something left without noise."""
    return "no guarantee" if value is None or math.isinf(value) else f"{rounded_up(value):.2f}"


def left_figure(left: float) -> str:
    """An epsilon that there is room for, never above the truth.

    >>> left_figure(6.919), left_figure(0.0)
    ('6.91', '0.00')
    """
    return f"{math.floor(left * 100) / 100:.2f}"


def size(count: float | None) -> str:
    """A number of bytes in words.

    >>> size(13422640), size(12)
    ('13.4 MB', '12 bytes')
    """
    if count is None:
        return NOTHING
    unit = 0
    while count >= 1000 and unit < len(UNITS) - 1:
        count, unit = count / 1000, unit + 1
    return f"{count:.1f} {UNITS[unit]}" if unit else f"{count:.0f} bytes"


def duration(seconds: float | None) -> str:
    """A time in words.

    >>> duration(14.3), duration(3700)
    ('14.3 s', '1 h 2 min')
    """
    if seconds is None:
        return NOTHING
    if seconds < 60:
        return f"{seconds:.1f} s"
    minutes = round(seconds / 60)
    return f"{minutes} min" if minutes < 60 else f"{minutes // 60} h {minutes % 60} min"
