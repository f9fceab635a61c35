"""Order statistics of many columns at once, by a sorting network over rows.

A comparator is one minimum and one maximum of two rows, which numpy does many columns at a time; a sort by column would
touch each number by itself. Comparators that the wanted ranks do not need are left out.

Reference: Batcher 1968 (odd-even merge sort), AFIPS Spring Joint Computer Conference, p. 307.
"""

from __future__ import annotations

from collections.abc import Iterator
from functools import lru_cache

import numpy as np
from numpy.typing import NDArray

Rows = NDArray[np.float32]

LINE = 16
"""Numbers of a line of a cache; rows that begin within one are a tenth slower to compare."""


def aligned(m: int, b: int) -> Rows:
    """[m, b], of any values; each row begins with a line of a cache, where b is a number of whole lines."""
    room = np.empty(m * b + LINE, np.float32)
    first = -room.ctypes.data // room.itemsize % LINE
    return room[first : first + m * b].reshape(m, b)


def mean_of_ranks(rows: Rows, low: int, high: int) -> Rows:
    """The mean of the values of ranks low to high - 1 in each column.

    Args:
        rows: [n, b], overwritten.
        low: first rank that counts, from 0.
        high: one more than the last.

    Returns:
        [b]
    """
    places, (spare,) = list(rows), aligned(1, rows.shape[1])
    minimum, maximum = np.minimum, np.maximum
    for first, second, smaller, larger in _network(len(rows), low, high):
        a, b = places[first], places[second]
        if smaller and larger:
            minimum(a, b, out=spare)
            maximum(a, b, out=b)
            places[first], spare = spare, a
        elif smaller:
            minimum(a, b, out=a)
        else:
            maximum(a, b, out=b)
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
    """Comparators of the odd-even merge sort for any n, each half before the next: few rows at a time fit a cache."""
    size = 1 << (n - 1).bit_length()

    def sort(low: int, count: int) -> Iterator[tuple[int, int]]:
        if count > 1:
            half = count // 2
            yield from sort(low, half)
            yield from sort(low + half, half)
            yield from merge(low, count, 1)

    def merge(low: int, count: int, step: int) -> Iterator[tuple[int, int]]:
        if 2 * step >= count:
            yield low, low + step
            return
        yield from merge(low, count, 2 * step)
        yield from merge(low + step, count, 2 * step)
        for row in range(low + step, low + count - step, 2 * step):
            yield row, row + step

    # Rows beyond the last would hold the largest values of all, and stay where they are.
    return [(first, second) for first, second in sort(0, size) if second < n]
