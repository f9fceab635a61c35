"""Order statistics by a sorting network, against numpy's sort."""

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

from gapweave.server.selection import mean_of_ranks


@pytest.mark.parametrize("n", [*range(1, 14), 31, 50, 64])
def test_every_range_of_ranks_equals_a_sort(n: int) -> None:
    rows = np.random.default_rng(n).normal(size=(n, 40)).astype(np.float32)
    rows[:, 0] = 1.0  # ties
    rows[:, 1] = np.round(rows[:, 1])
    ranked = np.sort(rows, axis=0)
    # Each range is a network of its own, to be compiled.
    for low in range(0, n, max(1, n // 4)):
        for high in range(low + 1, n + 1, max(1, n // 3)):
            found = mean_of_ranks(rows.copy(), low, high)
            np.testing.assert_allclose(found, ranked[low:high].mean(0, dtype=np.float64), rtol=1e-6, atol=1e-6)


@pytest.mark.parametrize("b", [1, 7, 8, 9, 16, 1001])
def test_every_column_counts_once_and_the_rows_stay(b: int) -> None:
    whole = np.random.default_rng(b).normal(size=(9, b + 3)).astype(np.float32)
    rows = whole[:, 3:]  # rows that do not lie one after another
    before = whole.copy()
    np.testing.assert_array_equal(mean_of_ranks(rows, 4, 5), np.median(rows, axis=0))
    np.testing.assert_array_equal(whole, before)


@given(st.integers(1, 20), st.data())
def test_every_zero_one_input_is_sorted(n: int, data: st.DataObject) -> None:
    """The zero-one principle: a network that ranks all of these ranks everything."""
    bits = np.array(data.draw(st.lists(st.booleans(), min_size=n, max_size=n)), np.float32)
    rank = data.draw(st.integers(0, n - 1))
    assert mean_of_ranks(bits[:, None].copy(), rank, rank + 1)[0] == np.sort(bits)[rank]
