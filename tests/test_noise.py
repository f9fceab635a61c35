"""Single random numbers: their law, their grid, their secrecy.

Every test that draws secret numbers says how often it may fail by chance. All together: below 5e-5 a run.
"""

from __future__ import annotations

import math
import os
import subprocess
import sys
from fractions import Fraction

import numpy as np
import pytest
import torch
from mpmath import mp
from normals import Z, sd_is
from scipy import stats

from gapweave.shared.privacy.draws import SecretDraws, SeededDraws, discrete_laplace
from gapweave.shared.privacy.noise import BLOCK, grid_of, normals, on_grid
from gapweave.shared.privacy.precision import numerical_epsilon

# The law of single draws.


def test_normal_numbers_are_normal() -> None:
    """False alarms: mean, sd, Kolmogorov-Smirnov, 4 tails, correlation: 8e-6."""
    size = 400_000
    drawn = SecretDraws().normal(size)
    assert drawn.dtype == np.float64
    assert abs(drawn.mean()) < Z / math.sqrt(size)
    assert sd_is(drawn, 1.0)
    assert not sd_is(drawn, 2 / 3)
    assert not sd_is(drawn, 3 / 2)
    assert stats.kstest(drawn, "norm").pvalue > 1e-6
    for bound in (2.0, 4.0):
        tail = stats.norm.sf(bound)
        low, high = stats.binom.ppf([5e-7, 1 - 5e-7], size, tail)
        assert low <= (drawn > bound).sum() <= high
        assert low <= (drawn < -bound).sum() <= high
    # Box-Muller makes pairs: neither they nor neighbours are correlated.
    assert abs((drawn[: size // 2] * drawn[size // 2 :]).mean()) < Z / math.sqrt(size / 2)


EVERY_BIT = 2**64 - 1
"""A word of ones."""


def exact_normals(high: int, low: int, turn: int) -> tuple[mp.mpf, mp.mpf]:
    """The pair that the transform should give, in 60 digits."""
    with mp.workdps(60):
        uniform = (mp.mpf(high) * 2**64 + low + mp.mpf(1) / 2) / mp.mpf(2) ** 128
        radius = mp.sqrt(-2 * mp.log(uniform))
        angle = 2 * mp.pi * (turn >> 11) / mp.mpf(2) ** 53
        return radius * mp.cos(angle), radius * mp.sin(angle)


@pytest.mark.parametrize("turn", [0, 1 << 61, 1 << 62, 1 << 63, 3 << 62, 0x0123456789ABCDEF, EVERY_BIT])
@pytest.mark.parametrize("low", [0, 1, 1 << 40, EVERY_BIT])
@pytest.mark.parametrize(
    "high", [0, 1, 2**10, 2**20, 2**40, 2**52, 2**60, 2**63, 3 << 62, EVERY_BIT - 2**53, EVERY_BIT]
)
def test_the_transform_of_chosen_bits_is_right_to_the_last_digits(high: int, low: int, turn: int) -> None:
    """The error stays below 2^-51 of the radius; near a radius of 0, where 1 - U has no digits, below 2^-26."""
    found = normals(np.array([high, low, turn], np.uint64))
    assert np.isfinite(found).all()
    expected = exact_normals(high, low, turn)
    radius = float(mp.sqrt(expected[0] ** 2 + expected[1] ** 2))
    near_one = high >= 2**63
    for value, right in zip(found, expected, strict=True):
        assert abs(value - float(right)) <= (2**-26 if near_one and radius < 1e-3 else radius * 2**-51)


def test_the_transform_of_random_bits_is_right_to_the_last_digits() -> None:
    """To 2^-51 of the radius; of its inverse where 1 - U has few digits. One vector of bits, one by one exact."""
    words = np.random.default_rng(3).integers(0, 2**64, (3, 500), np.uint64)
    for *bits, cosine, sine in zip(*words, *normals(words.ravel()).reshape(2, 500), strict=True):
        expected = exact_normals(*map(int, bits))
        radius = float(mp.hypot(*expected))
        for value, right in zip((cosine, sine), expected, strict=True):
            assert abs(value - float(right)) <= (radius + 1 / radius) * 2**-51


def test_extreme_bits_reach_the_far_tail_and_stay_finite() -> None:
    """The believed defect of float sampling: 53-bit radii end at 8.6 sigma, and zero bits give infinity."""
    zeros, ones = (normals(np.full(3, bits, np.uint64)) for bits in (0, EVERY_BIT))
    assert zeros[0] == pytest.approx(math.sqrt(2 * 129 * math.log(2)))
    assert zeros[0] > 11
    assert list(np.abs(ones)) == [0, 0]
    every_byte = np.frombuffer(b"".join(bytes([byte]) * 24 for byte in range(256)), np.uint64)
    assert np.isfinite(normals(every_byte.reshape(-1, 3).T.ravel())).all()


def test_quantiles_of_the_radius_are_those_of_its_law() -> None:
    """P(R > r) = exp(-r^2/2), from the bulk to where 2^-120 of the probability is left."""
    for halvings in range(1, 121):
        uniform = 2**128 >> halvings
        word = np.array([uniform >> 64, uniform & EVERY_BIT, 0], np.uint64)
        expected = mp.sqrt(2 * halvings * mp.log(2))
        assert normals(word)[0] == pytest.approx(float(expected), rel=2.0 ** (halvings - 129) + 1e-15)


def test_any_number_of_normal_numbers_is_that_many_and_no_block_repeats() -> None:
    """False alarms: two of 70,000 numbers of 53 bits are equal with probability 3e-7."""
    for size in (0, 1, 2, 7, 2 * BLOCK - 1, 2 * BLOCK, 2 * BLOCK + 1, 4 * BLOCK + 3):
        drawn = SecretDraws().normal(size)
        assert len(drawn) == len(set(drawn)) == size


def test_uniform_numbers_are_uniform_and_below_one() -> None:
    """False alarms: 1e-6."""
    drawn = SecretDraws().uniform(400, 500)
    assert drawn.shape == (400, 500)
    assert drawn.min() >= 0
    assert drawn.max() < 1
    assert stats.kstest(drawn.ravel(), "uniform").pvalue > 1e-6
    assert SecretDraws().uniform(0, 5).shape == (0, 5)


def test_secret_draws_never_repeat() -> None:
    """False alarms: two of 60,000 numbers of 53 bits are equal with probability 2e-7."""
    drawn = np.concatenate([SecretDraws().uniform(10_000) for _ in range(3)] + [(one := SecretDraws()).uniform(30_000)])
    assert len(np.unique(drawn)) == len(drawn)
    assert not np.array_equal(one.normal(4), one.normal(4))
    assert not vars(one), "nothing is kept that a fork could copy"


def test_a_seed_does_not_reach_the_secret_draws() -> None:
    """False alarms: below 1e-60."""

    def draw() -> np.ndarray:
        np.random.seed(1)
        torch.manual_seed(1)
        return SecretDraws().normal(4)

    assert not np.array_equal(draw(), draw())


def test_seeded_draws_repeat_for_one_key_only() -> None:
    first = SeededDraws(7, "north", 3).normal(5)
    assert np.array_equal(first, SeededDraws(7, "north", 3).normal(5))
    for key in [(8, "north", 3), (7, "south", 3), (7, "north", 4)]:
        assert not np.array_equal(first, SeededDraws(*key).normal(5))


def laplace_law(scale: float) -> tuple[np.ndarray, np.ndarray]:
    """Probabilities of -cut..cut, where the ends take all that lies beyond."""
    ratio = math.exp(-1 / scale)
    cut = max(1, math.ceil(3 * scale))
    support = np.arange(-cut, cut + 1)
    law = (1 - ratio) / (1 + ratio) * ratio ** np.abs(support)
    law[[0, -1]] = ratio**cut / (1 + ratio)
    return support, law


@pytest.mark.parametrize("scale", [0.4, 2.5, 20.0])
def test_discrete_laplace_has_its_law(scale: float) -> None:
    """False alarms: 1e-6 each."""
    size, draws = 12_000, SecretDraws()
    drawn = np.array([discrete_laplace(scale, draws) for _ in range(size)])

    def p_value(assumed: float) -> float:
        support, law = laplace_law(assumed)
        clipped = np.clip(drawn, support[0], support[-1])
        found = np.array([(clipped == value).sum() for value in support])
        return float(stats.chisquare(found, size * law / law.sum()).pvalue)

    assert p_value(scale) > 1e-6
    assert p_value(scale * 2 / 3) < 1e-6
    assert p_value(scale * 3 / 2) < 1e-6


@pytest.mark.parametrize("scale", [1e-3, 0.02, 1e6])
def test_discrete_laplace_at_extreme_scales(scale: float) -> None:
    """False alarms: exp(-50) at scale 0.02; at 1e6 the sum of 100 is 0 with probability below 1e-6."""
    drawn = [discrete_laplace(scale, SecretDraws()) for _ in range(100)]
    assert all(isinstance(value, int) for value in drawn)
    assert any(drawn) == (scale > 1)


# The grid.


@pytest.mark.parametrize("sd", [1e-6, 0.3, 0.5, 1.0, 1.7, 3e5])
def test_a_grid_is_the_power_of_two_below_a_4096th_of_the_noise(sd: float) -> None:
    grid = grid_of(sd)
    assert math.frexp(grid)[0] == 0.5
    assert grid <= sd / 4096 < 2 * grid


@pytest.mark.parametrize("sd", [1e-6, 0.91, 1.7, 3e5])
def test_every_release_is_a_whole_multiple_of_the_grid(sd: float) -> None:
    size = 50_000
    total = torch.linspace(-1000 * sd, 1000 * sd, size, dtype=torch.float64)
    released = on_grid(total, torch.from_numpy(SecretDraws().normal(size)), sd)
    cells = (released / grid_of(sd)).numpy()
    assert (cells == np.round(cells)).all()
    assert not (np.signbit(cells) & (cells == 0)).any(), "the sign of a zero would be one more bit"


def test_rounding_is_that_of_exact_arithmetic() -> None:
    """A sum of 10^6 sigma takes no digits from the noise: compared with fractions."""
    sd, size = 0.7, 2000
    total = torch.linspace(-1e6, 1e6, size, dtype=torch.float64)
    noise = torch.from_numpy(SecretDraws().normal(size))
    for sum_, z, got in zip(total.tolist(), noise.tolist(), on_grid(total, noise, sd).tolist(), strict=True):
        grid = Fraction(grid_of(sd))
        cells = (Fraction(sum_) + Fraction(sd) * Fraction(z)) / grid
        assert abs(Fraction(got) / grid - cells) <= Fraction(1, 2) + Fraction(1, 2**30)


def test_noise_on_the_grid_keeps_its_law() -> None:
    """False alarms: sd and Kolmogorov-Smirnov, 2e-6; a grid of sd/4096 shifts the latter by less than 2^-13."""
    size, sd = 200_000, 1.3
    released = on_grid(torch.full((size,), 17.3), torch.from_numpy(SecretDraws().normal(size)), sd).numpy() - 17.3
    for factor, right in ((1.0, True), (2 / 3, False), (3 / 2, False)):
        assert sd_is(released, sd * factor) == right
    uniform = np.random.default_rng(0).random(size)
    smoothed = released + (uniform - 0.5) * grid_of(sd)
    assert stats.kstest(smoothed / sd, "norm").pvalue > 1e-6


def test_the_numerical_cost_follows_the_written_formula() -> None:
    eta, count = 2.0**-32, 2_000_000 * 1000
    cost = numerical_epsilon(2_000_000, 1000)
    assert cost.epsilon == pytest.approx(2 * (eta * math.sqrt(2 * count * math.log(1e10)) + count * eta**2))
    assert 1e-5 < cost.epsilon < 2e-4
    assert 2e-10 <= cost.delta < 3e-10
    assert numerical_epsilon(10, 1).epsilon < 1e-7


# No repetition.

CHILDREN = """
import os
from gapweave.shared.privacy.draws import SecretDraws
kept = SecretDraws()
kept.normal(3)
for child in range(3):
    if os.fork() == 0:
        break
    os.wait()
print(*[value.hex() for value in [*kept.normal(40), *SecretDraws().normal(40), *kept.uniform(40)]], flush=True)
"""


def test_rounds_instances_forks_and_restarts_repeat_nothing() -> None:
    """False alarms: about 1000 numbers of 53 bits: 1e-10. A key kept by the process would be copied by the fork."""
    lines: list[str] = []
    for _ in range(2):
        run = subprocess.run([sys.executable, "-c", CHILDREN], check=True, capture_output=True, text=True, timeout=60)
        lines += run.stdout.splitlines()
    assert len(lines) == 8
    numbers = " ".join(lines).split()
    assert len(numbers) == len(set(numbers)) == 8 * 120


def test_every_call_and_every_block_has_its_own_key(monkeypatch: pytest.MonkeyPatch) -> None:
    asked: list[bytes] = []

    def urandom(size: int, original=os.urandom) -> bytes:
        asked.append(original(size))
        return asked[-1]

    monkeypatch.setattr(os, "urandom", urandom)
    draws = SecretDraws()
    for _ in range(5):
        draws.normal(10)
    assert [len(part) for part in asked] == [32, 16] * 5
    assert len(set(asked)) == 10
    draws.normal(4 * BLOCK + 1)
    assert [len(part) for part in asked[10:]] == [32, 16] * 3
    assert len(set(asked)) == 16
