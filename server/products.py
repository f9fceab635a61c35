"""Inner products of updates, around one in their midst.

BLAS reaches half of what a processor can do where some fifty rows are multiplied with themselves, after a pass that
moves them. Here a tile of rows by rows keeps its sums in registers, over a block of columns that fits a cache.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator
from functools import cache

import numpy as np
from numpy.typing import NDArray

from gapweave.server.machine_code import FLOAT, FLOATS, INTEGER, LANES, Code, number

Rows = NDArray[np.float32]

BLOCK = 512
"""Columns that are moved at a time: those of fifty rows fit the second cache."""
PANEL = 32 * BLOCK
"""Columns whose products are summed in float32."""
TILE = 3
"""Rows of a tile: its nine sums and what they are made of fit sixteen registers, the fewest that processors have."""


def products_around(rows: Rows, middle: int) -> NDArray[np.float64]:
    """Inner products of the rows and of the origin, all moved so that one row is zero.

    Products of one panel and lane are summed in float32, the rest in float64.

    Args:
        rows: [n, d], finite, each row in one piece.
        middle: the row that becomes zero.

    Returns:
        [n + 1, n + 1], the origin last.
    """
    n = len(rows)
    tiles = -(-(n + 1) // TILE)
    first, second = np.triu_indices(tiles)  # those below the diagonal repeat those above
    begins = np.stack([first, second], 1) * TILE
    moved = _aligned(tiles * TILE, BLOCK)
    panel, sums = np.zeros((len(begins), TILE, TILE, LANES), np.float32), np.zeros((len(begins), TILE, TILE))
    for part in _panels(rows):
        code()(
            part.ctypes.data, part.strides[0] // part.itemsize, part.shape[1] // BLOCK, n, middle, moved.ctypes.data,
            begins.ctypes.data, len(begins), panel.ctypes.data,
        )  # fmt: skip
        sums += panel.sum(-1, dtype=np.float64)
        panel[:] = 0
    products = np.zeros((tiles, TILE, tiles, TILE))
    products[first, :, second] = sums
    products[second, :, first] = sums.swapaxes(1, 2)
    return products.reshape(tiles * TILE, tiles * TILE)[: n + 1, : n + 1]


def _panels(rows: Rows) -> Iterator[Rows]:
    """Whole blocks; the last columns are filled up with zeros."""
    n, d = rows.shape
    whole = d // BLOCK * BLOCK
    yield from (rows[:, at : min(at + PANEL, whole)] for at in range(0, whole, PANEL))
    if whole < d:
        rest = np.zeros((n, BLOCK), np.float32)
        rest[:, : d - whole] = rows[:, whole:]
        yield rest


def _aligned(m: int, b: int, line: int = 16) -> Rows:
    """[m, b] zeros; rows begin with a line of the cache: vectors across two lines take a third longer."""
    room = np.zeros(m * b + line, np.float32)
    first = -room.ctypes.data // room.itemsize % line
    return room[first : first + m * b].reshape(m, b)


@cache
def code() -> Callable[..., None]:
    """Add the products of whole blocks.

    It is called with the address of the rows, numbers between rows, blocks, rows, the middle one, the address of room
    for moved rows, that of the tiles (first row on either side, int64), their number, and the address of the sums
    (float32, [tiles, TILE, TILE, LANES]).
    """
    floats, integers = FLOAT.as_pointer(), INTEGER.as_pointer()
    code = Code([floats, INTEGER, INTEGER, INTEGER, INTEGER, floats, integers, INTEGER, floats])
    build, (rows, stride, blocks, n, middle, moved, tiles, count, sums) = code.builder, code.arguments
    width, parts = number(BLOCK), [number(LANES * part) for part in range(4)]
    totals = [code.variable(FLOATS) for _ in range(TILE * TILE)]
    with code.repeat(blocks) as block:
        begin = build.mul(block, width)
        center = code.place(middle, stride, begin)
        with code.repeat(n) as row:
            source, target = code.place(row, stride, begin), build.mul(row, width)
            with code.repeat(width, len(parts) * LANES) as column:
                for at in (build.add(column, part) for part in parts):
                    value = code.load(rows, build.add(source, at))
                    difference = build.fsub(value, code.load(rows, build.add(center, at)))
                    code.store(difference, moved, build.add(target, at))
        with code.repeat(width, LANES) as column:
            origin = build.fneg(code.load(rows, build.add(center, column)))
            code.store(origin, moved, code.place(n, width, column))
        with code.repeat(count) as tile:
            pair = build.mul(tile, number(2))
            left, right = code.element(tiles, pair), code.element(tiles, build.add(pair, number(1)))
            lefts = [build.mul(build.add(left, number(row)), width) for row in range(TILE)]
            rights = [build.mul(build.add(right, number(row)), width) for row in range(TILE)]
            base = build.mul(tile, number(len(totals) * LANES))
            places = [build.add(base, number(place * LANES)) for place in range(len(totals))]
            for total, place in zip(totals, places, strict=True):
                build.store(code.load(sums, place), total)
            # The next block comes from memory meanwhile, a row with each of the first tiles.
            row = build.select(build.icmp_signed("<", tile, n), tile, number(0))
            ahead = code.place(row, stride, build.add(begin, width))
            with code.repeat(width, LANES) as column:
                code.fetch(rows, build.add(ahead, column))
                values = [code.load(moved, build.add(at, column)) for at in lefts]
                for step, at in enumerate(rights):
                    other = code.load(moved, build.add(at, column))
                    for value, total in zip(values, totals[step::TILE], strict=True):
                        # One instruction for the product and the sum.
                        product = build.fmul(value, other, flags=("contract",))
                        build.store(build.fadd(build.load(total), product, flags=("contract",)), total)
            for total, place in zip(totals, places, strict=True):
                code.store(build.load(total), sums, place)
    return code.compiled()
