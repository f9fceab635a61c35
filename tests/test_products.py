"""Inner products of updates in machine code, against float64."""

import numpy as np
import pytest
from numpy.typing import NDArray

from gapweave.server.aggregators import gram_of
from gapweave.server.products import BLOCK, PANEL, products_around


def expected(rows: NDArray[np.float32], middle: int) -> NDArray[np.float64]:
    whole = np.concatenate([rows, np.zeros((1, rows.shape[1]), np.float32)]).astype(np.float64)
    moved = whole - whole[middle]
    return moved @ moved.T


@pytest.mark.parametrize("n", [1, 2, 3, 4, 5, 8, 50, 101])
@pytest.mark.parametrize("d", [1, 7, BLOCK - 1, BLOCK, BLOCK + 3, PANEL + BLOCK + 5])
def test_products_equal_those_in_float64(n: int, d: int) -> None:
    rows = np.random.default_rng(n * d).normal(3.0, 1.0, (n, d)).astype(np.float32)
    products = products_around(rows, n // 2)
    np.testing.assert_allclose(products, expected(rows, n // 2), rtol=2e-6, atol=2e-6 * 10 * d)
    np.testing.assert_array_equal(products, products.T)


def test_rows_may_be_part_of_longer_ones() -> None:
    whole = np.random.default_rng(0).normal(size=(6, 3000)).astype(np.float32)
    part = whole[:, 5:2000]
    np.testing.assert_array_equal(products_around(part, 1), products_around(part.copy(), 1))


def test_updates_that_hardly_differ_keep_their_distances() -> None:
    """Lengths a hundred thousand times the differences: without the move nothing would be left of these."""
    generator = np.random.default_rng(0)
    common = generator.normal(size=20_000)
    rows = (common + 1e-5 * generator.normal(size=(7, 20_000))).astype(np.float32)
    distances = ((rows[:, None].astype(np.float64) - rows[None]) ** 2).sum(-1)
    np.testing.assert_allclose(gram_of(rows).distances(), distances, rtol=1e-5, atol=1e-12)


def test_a_huge_update_leaves_the_distances_of_the_others() -> None:
    rows = np.random.default_rng(0).normal(size=(6, 5000)).astype(np.float32)
    rows[2] *= 1e12
    others = np.delete(rows, 2, 0).astype(np.float64)
    distances = np.delete(np.delete(gram_of(rows).distances(), 2, 0), 2, 1)
    np.testing.assert_allclose(distances, ((others[:, None] - others[None]) ** 2).sum(-1), rtol=1e-5, atol=1e-6)
