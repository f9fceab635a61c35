"""Order statistics of many columns at once, by a sorting network over rows.

A comparator is one minimum and one maximum of two rows, which numpy does many columns at a time; a sort by column would
touch each number by itself. Comparators that the wanted ranks do not need are left out.

Reference: Batcher 1968 (odd-even merge sort), AFIPS Spring Joint Computer Conference, p. 307.
"""

from __future__ import annotations

from functools import lru_cache

import numpy as np
from numpy.typing import NDArray

Rows = NDArray[np.float32]


def mean_of_ranks(rows: Rows, low: int, high: int) -> Rows:
    """The mean of the values of ranks low to high - 1 in each column.

    Args:
        rows: [n, b], overwritten.
        low: first rank that counts, from 0.
        high: one more than the last.

    Returns:
        [b]
    """
    places, spare = list(rows), np.empty(rows.shape[1], rows.dtype)
    for first, second, smaller, larger in _network(len(rows), low, high):
        a, b = places[first], places[second]
        if smaller and larger:
            np.minimum(a, b, out=spare)
            np.maximum(a, b, out=b)
            places[first], spare = spare, a
        elif smaller:
            np.minimum(a, b, out=a)
        else:
            np.maximum(a, b, out=b)
    total = places[low].astype(np.float64)
    for row in places[low + 1 : high]:
        total += row
    mean: Rows = (total / (high - low)).astype(np.float32)
    return mean


Comparator = tuple[int, int, bool, bool]
"""Two rows, and whether the smaller and the larger value are needed afterwards."""


@lru_cache(maxsize=64)
def _network(n: int, low: int, high: int) -> tuple[Comparator, ...]:
    """A network after which rows low to high - 1 hold the values of these ranks, in any order among themselves.

    Read from its end: a comparator of two rows that nothing reads any more, and that both count or both do not, changes
    nothing.
    """
    counted = [low <= row < high for row in range(n)]
    read = [False] * n
    kept: list[Comparator] = []
    for first, second in reversed(_batcher(n)):
        touched = read[first] or read[second]
        if not touched and counted[first] == counted[second]:
            continue
        kept.append((first, second, read[first] or counted[first], read[second] or counted[second]))
        read[first] = read[second] = True
    return tuple(reversed(kept))


def _batcher(n: int) -> list[tuple[int, int]]:
    """Comparators of the odd-even merge sort for any n."""
    result = []
    merged = 1
    while merged < n:
        step = merged
        while step >= 1:
            for start in range(step % merged, n - step, 2 * step):
                for row in range(start, min(start + step, n - step)):
                    if row // (2 * merged) == (row + step) // (2 * merged):
                        result.append((row, row + step))
            step //= 2
        merged *= 2
    return result
