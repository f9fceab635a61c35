"""Order statistics of many columns at once, by a sorting network over rows.

A comparator is one minimum and one maximum of two rows, for as many columns as a vector holds. Nothing depends on the
numbers, so that the network of fifty rows is a straight run of some six hundred instructions over registers.
Comparators that the wanted ranks do not need are left out.

Reference: Batcher 1968 (odd-even merge sort), AFIPS Spring Joint Computer Conference, p. 307.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator
from functools import lru_cache

import numpy as np
from numpy.typing import NDArray

from gapweave.server.machine_code import DOUBLES, FLOAT, FLOATS, INTEGER, LANES, Code, number, same

Rows = NDArray[np.float32]


def mean_of_ranks(rows: Rows, low: int, high: int) -> Rows:
    """The mean of the values of ranks low to high - 1 in each column.

    Args:
        rows: [n, b], finite, each row in one piece.
        low: first rank that counts, from 0.
        high: one more than the last.

    Returns:
        [b]
    """
    n, b = rows.shape
    if b < LANES:
        padded = np.zeros((n, LANES), np.float32)
        padded[:, :b] = rows
        return mean_of_ranks(padded, low, high)[:b]
    code, result = _code(n, low, high), np.empty(b, np.float32)
    stride = rows.strides[0] // rows.itemsize
    # What does not fill a vector is taken with some columns before it once more.
    for at, columns in ((0, b), (b - LANES, LANES)) if b % LANES else ((0, b),):
        code(rows[:, at:].ctypes.data, stride, columns // LANES * LANES, result[at:].ctypes.data)
    return result


@lru_cache(maxsize=64)
def _code(n: int, low: int, high: int) -> Callable[[int, int, int, int], None]:
    """The network over n rows: address of the rows, numbers between rows, columns, address of the result."""
    pointer = FLOAT.as_pointer()
    code = Code([pointer, INTEGER, INTEGER, pointer])
    build, (rows, stride, columns, result) = code.builder, code.arguments
    with code.repeat(columns, LANES) as column:
        values = [code.load(rows, code.place(number(row), stride, column)) for row in range(n)]
        for first, second, smaller, larger in _network(n, low, high):
            a, b = values[first], values[second]
            if smaller:
                values[first] = build.select(build.fcmp_ordered("<", a, b), a, b)
            if larger:
                values[second] = build.select(build.fcmp_ordered(">", a, b), a, b)
        total = same(0.0, DOUBLES)
        for value in values[low:high]:
            total = build.fadd(total, build.fpext(value, DOUBLES))
        mean = build.fdiv(total, same(high - low, DOUBLES))
        code.store(build.fptrunc(mean, FLOATS), result, column)
    return code.compiled()


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
