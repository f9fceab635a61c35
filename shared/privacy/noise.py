"""Gaussian noise that can be defended: its bits, its transform, and the coarse grid that it is released on.

Guarantee: with a standard normal Z, a release is round((sum + sd Z) / g) g. Rounding is post-processing, so it
costs no privacy; and because g is thousands of times coarser than the resolution of the float64 sampler, every
grid point gets its probability up to a relative error, which precision.py turns into what a report adds to epsilon
and delta. Bits come from AES-256 in counter mode under a key from the operating system, made for
one block of one call and dropped after it: neither a fork, a restart nor a restored snapshot can repeat a release.

Assumes: the operating system's random numbers are secret, and AES is a pseudo-random function. Sampling time does
not depend on what is released.

Edge cases: the smallest radius is 0 and the largest 13.4; no bits give an infinite or undefined number.

Reference: Box and Muller 1958; Mironov 2012 (why un-rounded float noise is no mechanism); Balle and Wang 2018,
arXiv 1805.06530 (the exact cost of Z itself); docs/decisions/0007.
"""

from __future__ import annotations

import math
import os

import numpy as np
import torch
from cryptography.hazmat.primitives.ciphers import Cipher, algorithms, modes
from numpy.typing import NDArray
from torch import Tensor

FINENESS = 2.0**-12
"""Grid width as a share of the noise's standard deviation, before it is rounded down to a power of two."""
WORDS = 3
"""64-bit words for two normal numbers: 128 bits of radius and 53 bits of angle."""
BLOCK = 2**13
"""Pairs of numbers worked on at a time: they stay in the cache, and no large memory is asked for."""


def secret_normals(size: int) -> NDArray[np.float64]:
    """Independent standard normal numbers, [size], from keys that live for a block of this call only."""
    result = np.empty(size)
    for start in range(0, size, 2 * BLOCK):
        part = result[start : start + 2 * BLOCK]
        pairs = (len(part) + 1) // 2
        part[:] = normals(np.frombuffer(_secret_bytes(8 * WORDS * pairs), np.uint64))[: len(part)]
    return result


def _secret_bytes(size: int) -> memoryview:
    """Bytes of AES-256-CTR under a fresh key: 15 times faster than asking the operating system for all of them."""
    encryptor = Cipher(algorithms.AES(os.urandom(32)), modes.CTR(os.urandom(16))).encryptor()
    buffer = memoryview(bytearray(size + 15))  # update_into wants room for one more block, less a byte
    encryptor.update_into(buffer[:size], buffer)  # zeros, encrypted where they lie
    return buffer[:size]


def normals(words: NDArray[np.uint64]) -> NDArray[np.float64]:
    """Random bits to standard normal numbers, by Box and Muller in float64.

    Args:
        words: [3 P] random 64-bit words: P high and P low words of the radii, P words of the angles.

    Returns:
        [2 P]: the cosines, then the sines.
    """
    high, low, turn = words.reshape(WORDS, -1)
    # torch's logarithm, sine and cosine use the vector unit.
    radius = torch.from_numpy(_uniform(high, low)).log_().mul_(-2.0).abs_().sqrt_()
    # Signed: an angle in [-pi, pi) has a smaller rounding error than one in [0, 2 pi).
    angle = torch.from_numpy((turn.view(np.int64) >> 11) * (2.0**-53 * 2.0 * np.pi))
    result = torch.empty(2, len(radius), dtype=torch.float64)
    torch.cos(angle, out=result[0]).mul_(radius)
    torch.sin(angle, out=result[1]).mul_(radius)
    return result.view(-1).numpy()


def _uniform(high: NDArray[np.uint64], low: NDArray[np.uint64]) -> NDArray[np.float64]:
    """Uniform in (0, 1] in steps of 2^-128, of which a small number keeps all: that is where the tail comes from.

    By halves of words, which are exact in float64 and fast to convert; 64-bit words are neither.
    """
    (first, second), (third, fourth) = (_halves(high), _halves(low))
    uniform = fourth.astype(np.float64)
    uniform += 0.5
    for half in (third, second, first):
        uniform *= 2.0**-32
        uniform += half
    uniform *= 2.0**-32
    return uniform


def _halves(words: NDArray[np.uint64]) -> tuple[NDArray[np.uint32], NDArray[np.uint32]]:
    """The upper and the lower 32 bits of each word."""
    pairs = words.astype("<u8", copy=False).view("<u4").reshape(-1, 2)
    return pairs[:, 1], pairs[:, 0]


def grid_of(sd: float) -> float:
    """Width of the grid of noise of this standard deviation: a power of two, so that scaling by it is exact."""
    return math.ldexp(1.0, math.frexp(FINENESS * sd)[1] - 1)


def on_grid(total: Tensor, noise: Tensor, sd: float) -> Tensor:
    """Add noise and round to the grid.

    Args:
        total: [D] what is to be released; finite.
        noise: [D] standard normal numbers, float64; the result takes their place.
        sd: standard deviation of the noise, sigma times the sensitivity.

    Returns:
        [D] float64, whole multiples of `grid_of(sd)`.
    """
    grid = grid_of(sd)
    for part, result in zip(torch.split(total, 2 * BLOCK), torch.split(noise, 2 * BLOCK), strict=True):
        cells = part.double() * (1.0 / grid)
        # Whole cells are exact integers; only the rest meets the noise, so a large sum costs the noise no digits.
        # Adding zero takes the sign from a zero.
        whole = cells.floor().add_(0.0)
        result.mul_(sd / grid).add_(cells.sub_(whole)).round_().add_(whole).mul_(grid)
    return noise
