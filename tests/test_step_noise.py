"""The noise of a training step is what its event says, in every tensor; and who is sampled.

Every test that draws secret numbers says how often it may fail by chance. All together: below 1e-4 a run.
"""

from __future__ import annotations

import math
from dataclasses import dataclass, replace

import numpy as np
import pytest
import torch
from batches import flat, four_kinds, random_batch, random_model
from normals import Z, sd_is
from scipy import stats
from torch import Tensor

from gapweave.client.gradients import Gradient
from gapweave.client.training import Step, build_engine
from gapweave.shared.config.study import Study
from gapweave.shared.model import group_of
from gapweave.shared.privacy.draws import SecretDraws, SeededDraws
from gapweave.shared.privacy.noise import grid_of
from gapweave.shared.privacy.plan import Plan
from gapweave.shared.schema import Batch


def plan(sigma: float, rate: float = 0.5, n_hat: int = 40, bound: float = 0.7) -> Plan:
    return Plan(
        noise_multiplier=sigma,
        sample_rate=rate,
        n_hat=n_hat,
        steps=1,
        rounds=1,
        finetune_steps=0,
        max_grad_norm=bound,
        epsilon=1.0,
        delta=1e-5,
    )


def clipped(fusion: str = "late") -> Study:
    return four_kinds(fusion, privacy={"max_grad_norm": 0.7})


def unlabelled(batch: Batch) -> Batch:
    """The same patients, of whom nothing can be learned: their gradient is exactly zero."""
    return replace(batch, label_mask=torch.zeros_like(batch.label_mask), weight=torch.zeros_like(batch.weight))


def noise_of(sigma: float, of, data: Batch, repeats: int = 1) -> dict[str, np.ndarray]:
    """What a step of the real engine gives for patients without a gradient, by parameter, over several steps."""
    step = Step(study=of, plan=plan(sigma), engine=build_engine(random_model(of), of), draws=SecretDraws())
    steps = [step.gradient(unlabelled(data)) for _ in range(repeats)]
    return {name: torch.cat([one[name].flatten() for one in steps]).double().numpy() for name in steps[0]}


SIGMA = 1.3
EXPECTED = SIGMA * 0.7 / (0.5 * 40)
"""sigma C / (q n_hat)."""


def test_the_noise_of_a_step_is_sigma_c_over_q_n_hat() -> None:
    """With 50 times as many patients as n_hat says: the true number enters nothing. False alarms: 2e-6."""
    of = clipped("concat")
    for patients in (3, 2000):
        noise = np.concatenate(list(noise_of(SIGMA, of, random_batch(of, [1] * patients), repeats=6).values()))
        assert len(noise) > 10_000
        assert sd_is(noise, EXPECTED)
        assert not sd_is(noise, EXPECTED * 2 / 3)
        assert not sd_is(noise, EXPECTED * 3 / 2)


@pytest.mark.parametrize("lacking", [None, "cxr", "labs", "note", "vitals"])
def test_every_tensor_of_every_group_is_noised_whoever_is_in_the_batch(lacking: str | None) -> None:
    """Also when no patient has the modality. False alarms: 1e-6 a tensor, 6e-5 in all."""
    of = clipped("concat")
    present = torch.ones(6, 4, dtype=torch.bool)
    if lacking is not None:
        present[:, of.order.index(lacking)] = False
    noise = noise_of(SIGMA, of, random_batch(of, present=present), repeats=25)
    model = random_model(of)
    assert noise.keys() == dict(model.named_parameters()).keys()
    assert {group_of(name)[0] for name in noise} >= {f"encoder/{name}" for name in of.order} | {"imputer", "fusion"}
    for name, values in noise.items():
        assert sd_is(values, EXPECTED), name
        # Neighbours meet on the grid with probability 1e-4; 30 % of at least 24 pairs never do.
        assert (values[1:] == values[:-1]).mean() < 0.3, f"{name}: one number for several entries"


def test_an_empty_sample_is_an_ordinary_noised_step() -> None:
    """False alarms: 1e-6."""
    of = clipped()
    engine = build_engine(random_model(of), of)
    step = Step(study=of, plan=plan(SIGMA), engine=engine, draws=SecretDraws())
    empty = random_batch(of).of_patients(torch.zeros(0, dtype=torch.int64))
    assert sd_is(np.concatenate([flat(step.gradient(empty)).numpy() for _ in range(4)]), EXPECTED)


def test_steps_restarts_and_tensors_share_no_noise() -> None:
    """False alarms: 3 correlations, 3e-6."""
    of = clipped()
    data = random_batch(of)
    first, second = noise_of(SIGMA, of, data, repeats=4), noise_of(SIGMA, of, data, repeats=4)
    one, other = (np.concatenate(list(noise.values())) / EXPECTED for noise in (first, second))
    assert abs((one * other).mean()) < Z / math.sqrt(len(one))
    left, right = first["encoders.cxr.hidden.weight"], first["encoders.vitals.hidden.weight"]
    shorter = min(len(left), len(right))
    assert abs((left[:shorter] * right[:shorter]).mean()) < Z / math.sqrt(shorter) * EXPECTED**2
    half = len(left) // 2
    assert abs((left[:half] * left[half : 2 * half]).mean()) < Z / math.sqrt(half) * EXPECTED**2


def test_without_noise_a_step_is_the_clipped_mean_over_n_hat() -> None:
    of = clipped()
    data = random_batch(of, [1, 2, 1])
    engine = build_engine(random_model(of), of)
    step = Step(study=of, plan=plan(0.0, rate=1.0, n_hat=40), engine=engine, draws=SeededDraws(1))
    model_scheme = replace(step, study=of.model_copy(update={"model": of.model.model_copy(update={"imputer": "none"})}))
    expected = flat(engine.sum(data, data.present)) / 40
    torch.testing.assert_close(flat(model_scheme.gradient(data)), expected, rtol=1e-5, atol=1e-8)


def test_a_step_releases_points_of_the_grid() -> None:
    """q n_hat is a power of two here, so that the division shows the grid as it is."""
    of = clipped()
    step = Step(study=of, plan=plan(SIGMA, n_hat=32), engine=build_engine(random_model(of), of), draws=SecretDraws())
    cells = flat(step.gradient(random_batch(of))) * 16 / grid_of(SIGMA * 0.7)
    assert torch.equal(cells, cells.round())
    assert cells.abs().max() > 4096


# Who is sampled.


@dataclass
class Witness:
    """An engine that only remembers who was in each mini-batch; patients are told apart by their target."""

    seen: list[list[int]]
    sensitivity: float = 1.0

    def sum(self, batch: Batch, used: Tensor, objective: object = None) -> Gradient:
        self.seen.append(batch.target[:, 0].int().tolist())
        return {"x": torch.zeros(1)}


def test_patients_enter_a_step_independently_with_probability_q() -> None:
    """False alarms: 40 inclusion rates, the sizes' mean and variance, one correlation: 5e-5."""
    patients, steps, rate = 40, 3000, 0.3
    of = clipped()
    data = random_batch(of, [1] * patients)
    data = replace(data, target=torch.arange(patients).float().unsqueeze(1))
    witness = Witness([])
    step = Step(study=of, plan=plan(SIGMA, rate=rate, n_hat=7), engine=witness, draws=SecretDraws())
    for _ in range(steps):
        step.gradient(data)
    entered = np.zeros((steps, patients))
    for at, who in enumerate(witness.seen):
        entered[at, who] = 1
    low, high = stats.binom.ppf([5e-7, 1 - 5e-7], steps, rate)
    assert ((low <= entered.sum(0)) & (entered.sum(0) <= high)).all()
    sizes = entered.sum(1)
    spread = patients * rate * (1 - rate)
    assert abs(sizes.mean() - patients * rate) < Z * math.sqrt(spread / steps)
    # A shuffled or fixed-size batch has no variance; sampling with replacement or by record has more.
    ratio = sizes.var() / spread
    assert abs(ratio - 1) < 1.1 * Z * math.sqrt(2 / steps)
    consecutive = np.corrcoef(entered[:-1].ravel(), entered[1:].ravel())[0, 1]
    assert abs(consecutive) < Z / math.sqrt((steps - 1) * patients)


def test_all_records_of_a_sampled_patient_come_along() -> None:
    of = clipped()
    data = random_batch(of, [3, 1, 5, 2])
    data = replace(data, target=data.patient.float().unsqueeze(1))
    witness = Witness([])
    step = Step(study=of, plan=plan(SIGMA), engine=witness, draws=SeededDraws(4))
    for _ in range(40):
        step.gradient(data)
    for who in witness.seen:
        assert who == sorted(patient for patient in set(who) for _ in range([3, 1, 5, 2][patient]))
    assert len({tuple(who) for who in witness.seen}) > 5
