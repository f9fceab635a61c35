"""What random numbers must look like."""

from __future__ import annotations

import numpy as np
from scipy import stats

Z = 4.892
"""A standard normal number is further out than this, on either side, with probability 1e-6."""


def sd_is(values: np.ndarray, sd: float) -> bool:
    """Whether values can be normal with mean 0 and this sd; wrongly denied with probability 1e-6."""
    low, high = stats.chi2.ppf([5e-7, 1 - 5e-7], len(values))
    return bool(low < np.square(values / sd).sum() < high)
