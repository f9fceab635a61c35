"""FLamby's Heart-Disease curve of accuracy against epsilon, with the epsilon that its training really had.

Believed: 15 rounds with a nominal epsilon cost that epsilon. True: the noise was calibrated for 15 passes over a
hospital's data, and a round is 100 updates, however few batches a hospital has (docs/flamby.md).
"""

from __future__ import annotations

import math
import re
from pathlib import Path

import pytest
from ledgers import event
from opacus.accountants.utils import get_noise_multiplier

from gapweave.shared.privacy.accountant import epsilon

PATIENTS = {"Cleveland": 199, "Hungary": 172, "Switzerland": 30, "Long Beach": 85}
ROUNDS, UPDATES, BATCH, DELTA = 15, 100, 4, 1e-4

PUBLISHED = [
    (1, "Cleveland", 2.109, 1.30),
    (1, "Hungary", 2.266, 1.41),
    (1, "Switzerland", 5.0, 3.73),
    (1, "Long Beach", 3.086, 2.06),
    (5, "Cleveland", 0.826, 6.24),
    (5, "Hungary", 0.857, 6.82),
    (5, "Switzerland", 1.450, 20.3),
    (5, "Long Beach", 1.028, 10.3),
    (10, "Cleveland", 0.639, 12.3),
    (10, "Hungary", 0.657, 13.5),
    (10, "Switzerland", 0.970, 42.4),
    (10, "Long Beach", 0.751, 20.6),
]
"""(nominal epsilon, hospital, the sigma that it implies, the epsilon of what was trained)."""


def batches(hospital: str) -> int:
    """Batches of one pass; its inverse is the sampling rate that Opacus assumes."""
    return math.ceil(PATIENTS[hospital] / BATCH)


def of(sigma: float, hospital: str, steps: int) -> float:
    """Epsilon by PLD, granting the Poisson sampling that the shuffled batches did not have."""
    return epsilon([event("dp_sgd", sigma, 1 / batches(hospital), steps)], DELTA)


@pytest.mark.long
@pytest.mark.filterwarnings("ignore:Optimal order is the:UserWarning")
@pytest.mark.parametrize(("nominal", "hospital", "sigma", "true"), PUBLISHED)
def test_a_nominal_epsilon_is_not_the_one_of_the_training(
    nominal: float, hospital: str, sigma: float, true: float
) -> None:
    found = get_noise_multiplier(
        target_epsilon=nominal,
        target_delta=DELTA,
        sample_rate=1 / batches(hospital),
        epochs=ROUNDS,
        accountant="rdp",
    )
    assert found == pytest.approx(sigma, rel=0.005)
    counted = of(found, hospital, ROUNDS * batches(hospital))
    assert 0.85 * nominal < counted < nominal, "the accountant itself was right, for the steps that it was told of"
    assert of(found, hospital, ROUNDS * UPDATES) == pytest.approx(true, rel=0.01)


def test_the_smallest_hospital_is_off_most() -> None:
    """Its pass has 8 batches: 120 of 1500 steps were counted."""
    counted = {hospital: ROUNDS * batches(hospital) for hospital in PATIENTS}
    assert counted == {"Cleveland": 750, "Hungary": 645, "Switzerland": 120, "Long Beach": 330}
    factors = {hospital: true / nominal for nominal, hospital, _, true in PUBLISHED if nominal == 10}
    assert max(factors, key=lambda hospital: factors[hospital]) == "Switzerland"
    assert factors["Switzerland"] > 4


def test_the_page_shows_these_numbers() -> None:
    page = (Path(__file__).parents[1] / "docs" / "flamby.md").read_text(encoding="utf-8")
    rows = [re.split(r"\s*\|\s*", line.strip("| \n")) for line in page.splitlines() if line.startswith("| ")]
    shown = {row[0]: row[4:] for row in rows if row[0] in PATIENTS}
    for hospital in PATIENTS:
        assert shown[hospital] == [f"{true:.3g}" for _, name, _, true in PUBLISHED if name == hospital]
