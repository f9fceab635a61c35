"""Random numbers of a site: secret under privacy, reproducible without it.

Under privacy every draw (who is sampled, which modalities are hidden, the noise) comes from the operating
system's CSPRNG, is never published and never derived from a study's seed. With privacy off, draws derive from
(seed, site, round), so that a run can be repeated.
"""

from __future__ import annotations

import hashlib
import os
from typing import Protocol

import numpy as np
from numpy.typing import NDArray

from gapweave.shared.privacy.noise import secret_normals


class Draws(Protocol):
    """A source of random numbers."""

    def uniform(self, *shape: int) -> NDArray[np.float64]:
        """Independent uniform numbers in [0, 1)."""
        ...

    def normal(self, size: int) -> NDArray[np.float64]:
        """Independent standard normal numbers."""
        ...


class SecretDraws:
    """From the operating system's CSPRNG; nothing is kept, so a fork or a restart repeats nothing."""

    def uniform(self, *shape: int) -> NDArray[np.float64]:
        """53 random bits a number."""
        size = int(np.prod(shape))
        words = np.frombuffer(os.urandom(8 * size), np.uint64)
        numbers: NDArray[np.float64] = ((words >> np.uint64(11)) * np.float64(2.0**-53)).reshape(shape)
        return numbers

    def normal(self, size: int) -> NDArray[np.float64]:
        """Under a key of their own (shared/privacy/noise.py)."""
        return secret_normals(size)


class SeededDraws:
    """Reproducible draws for runs without privacy.

    Args:
        key: what the draws belong to, for example (seed, site, round).
    """

    def __init__(self, *key: object) -> None:
        digest = hashlib.sha256("/".join(map(str, key)).encode()).digest()
        self._generator = np.random.Generator(np.random.PCG64(int.from_bytes(digest, "big")))

    def uniform(self, *shape: int) -> NDArray[np.float64]:
        """Uniform numbers in [0, 1)."""
        numbers: NDArray[np.float64] = self._generator.random(shape)
        return numbers

    def normal(self, size: int) -> NDArray[np.float64]:
        """Standard normal numbers."""
        return self._generator.standard_normal(size)


def discrete_laplace(scale: float, draws: Draws) -> int:
    """One integer with P(k) proportional to exp(-|k| / scale), as the difference of two geometric numbers."""
    first, second = np.floor(-scale * np.log(1.0 - draws.uniform(2)))
    return int(first - second)
