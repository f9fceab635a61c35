"""Unequal numbers of local steps: where they come from, what they do to a mean, and that FedNova undoes it."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import numpy as np
import pytest
from hospitals import Wire, build, participant, plan_of

from gapweave.server.aggregation import GroupAggregation, initial_groups
from gapweave.server.app import run_study
from gapweave.server.fednova import path
from gapweave.server.screening import noise_sd
from gapweave.shared.config.study import Study
from gapweave.shared.config.training import MOST_STEPS, Training
from gapweave.shared.privacy.ledger import read_ledger
from gapweave.shared.privacy.plan import make_plan
from gapweave.shared.rundir import RunDirectory

pytestmark = pytest.mark.usefixtures("fresh_sites")

FEW, MANY = 20, 80
"""Patients of two sites: with a batch of 20 they make 1 and 4 steps a pass."""
OPTIMA = {FEW: 8.0, MANY: -8.0}
"""Where the losses (x - b)^2 / 2 of the two sites are least."""


def study_of(rule: Any = "mean", weights: str = "uniform", **training: Any) -> Study:
    return plan_of(
        private=False,
        training={"passes": 1, "batch": 20, **training},
        aggregation={"default": rule, "weights": weights},
    )


def aggregate(of: Study, moves: dict[str, float], patients: dict[str, int]) -> float:
    """By how much the fusion moves when each site's update is one number all over."""
    start = {"fusion": initial_groups(of)["fusion"]}
    combine = GroupAggregation(of, start)
    for site, move in moves.items():
        update = {name: np.full_like(value, move) for name, value in start["fusion"].items()}
        combine.add(site, {"fusion": update}, patients[site])
    after, _ = combine.finish()
    name = next(iter(start["fusion"]))
    return float((after["fusion"][name] - start["fusion"][name]).ravel()[0])


def test_a_site_makes_as_many_steps_as_its_public_number_of_patients_says() -> None:
    training = Training(passes=2, batch=20)
    assert [training.steps_for(patients) for patients in (1, 5, 20, 55, 10**15)] == [1, 1, 2, 6, MOST_STEPS]
    assert Training(local_steps=7).steps_for(55) == 7
    plan = make_plan(plan_of(private=True, training={"passes": 2, "batch": 20, "rounds": 3}), 55, 1e-5)
    assert plan.steps == 6
    assert [event.steps for event in plan.schedule()] == [6] * 3, "each site's own steps are what it reserves"


@pytest.mark.parametrize(
    ("weights", "expected"),
    [
        # lr 1/2 from 0: one step moves by half of 8, four steps by 15/16 of -8; a step: 4 and -7.5 / 4
        ("uniform", (4 - 7.5 / 4) / 2 * (1 + 4) / 2),
        ("patients", (0.2 * 4 - 0.8 * 7.5 / 4) * (0.2 * 1 + 0.8 * 4)),
    ],
)
def test_a_round_by_hand(weights: str, expected: float) -> None:
    moves, patients = {"few": 4.0, "many": -7.5}, {"few": FEW, "many": MANY}
    assert aggregate(study_of(weights=weights), moves, patients) == pytest.approx(expected, rel=1e-5)
    plain = plan_of(private=False, aggregation={"default": "mean", "weights": weights})
    shares = {"uniform": 0.5, "patients": 0.2}
    assert aggregate(plain, moves, patients) == pytest.approx(
        shares[weights] * 4 - (1 - shares[weights]) * 7.5, rel=1e-5
    ), "without passes all sites make equally many steps, and nothing is changed"


def test_the_proximal_term_shortens_a_path() -> None:
    training = Training(passes=1, batch=20, lr=0.5, proximal=0.4)
    assert path(training, MANY) == pytest.approx(1 + 0.8 + 0.64 + 0.512)
    with pytest.raises(ValueError, match="lr \\* proximal"):
        Training(lr=0.5, proximal=2)


def fixed_point(of: Study) -> float:
    """Where rounds of exact gradient steps on the two quadratics end."""
    lr, x = of.training.lr, 0.0
    for _ in range(400):
        moves = {}
        for patients, optimum in OPTIMA.items():
            local = x
            for _ in range(Training(passes=1, batch=20).steps_for(patients)):
                local -= lr * (local - optimum)
            moves[str(patients)] = local - x
        x += aggregate(of, moves, {str(patients): patients for patients in OPTIMA})
    return x


@pytest.mark.no_cover
def test_more_steps_pull_a_mean_to_their_site_and_do_not_with_fednova() -> None:
    biased = fixed_point(plan_of(private=False, aggregation={"default": "mean"}, training={"lr": 0.05}))
    pulls = {patients: 1 - 0.95 ** (patients / 20) for patients in OPTIMA}
    assert biased == pytest.approx(sum(pulls[n] * OPTIMA[n] for n in OPTIMA) / sum(pulls.values()), abs=1e-3)
    assert biased < -4
    assert abs(fixed_point(study_of(lr=0.05))) < 0.35, "to first order in the learning rate, the least mean loss"
    assert abs(fixed_point(study_of(lr=0.01))) < 0.35 / 4


def test_a_site_that_states_a_huge_number_does_not_stretch_a_robust_step() -> None:
    moves = dict.fromkeys("abcde", 4.0)
    honest = dict.fromkeys("abcde", MANY)
    lying = {**honest, "e": 10**12}
    assert aggregate(study_of("median"), moves, honest) == pytest.approx(4.0, rel=1e-6)
    assert aggregate(study_of("median"), moves, lying) == pytest.approx(4.0, rel=1e-6)


def test_a_long_path_is_no_fault_of_scale_and_a_long_step_is() -> None:
    """A site of 100 times the patients makes 100 times the steps: its update may be that long, and no longer."""
    patients = {**dict.fromkeys("abc", FEW), "d": 100 * FEW}
    of = study_of("median")
    start = {"fusion": initial_groups(of)["fusion"]}
    for move, screened in ((100.0, []), (4000.0, ["d"])):
        combine = GroupAggregation(of, start)
        for site, number in patients.items():
            size = move if site == "d" else 1.0
            update = {name: np.full_like(value, size) for name, value in start["fusion"].items()}
            combine.add(site, {"fusion": update}, number)
        assert list(combine.finish()[1]["fusion"]["screened"]) == screened


def test_the_expected_noise_counts_a_sites_own_steps() -> None:
    of = plan_of(private=True, training={"passes": 1, "batch": 20, "lr": 0.5})
    plan = {"noise_multiplier": 2.0, "sample_rate": 0.25, "n_hat": MANY}
    assert noise_sd(of, plan) == pytest.approx(0.5 * 4**0.5 * 2.0 / 20)


def test_two_hospitals_of_unequal_size_make_a_pass_each(tmp_path: Path) -> None:
    """Their updates by themselves, combined by hand, are what the run does; ledgers tell of 1 and of 4 steps."""
    of = study_of(rounds=1, lr=0.3)
    start, moves = initial_groups(of), {}
    for name, patients in (("east", FEW), ("west", MANY)):
        hospital = build(tmp_path / "alone" / name, name, patients=patients)
        hospital.update("patients", declared=patients)
        site = participant(hospital, of)
        site.prepare("run")
        moves[name] = site.train("run", 1, "request", start).reply
        assert read_ledger(site.state).events()[-1].steps == patients // 20
    hospitals = []
    for name, patients in (("east", FEW), ("west", MANY)):
        hospital = build(tmp_path / name, name, patients=patients)
        hospital.update("patients", declared=patients)
        hospitals.append(hospital)
    directory = RunDirectory.create(tmp_path / "run", of)
    finished, _ = run_study(Wire(hospitals), of, directory, "run")
    for group, part in start.items():
        for name, value in part.items():
            expected = value + 2.5 * (moves["east"][group][name] + moves["west"][group][name] / 4) / 2
            np.testing.assert_allclose(finished.state.groups[group][name], expected, rtol=0, atol=1e-6)
    steps = {
        name: row["privacy"]["releases"][0]["steps"]
        for name, row in directory.read_json("summary.json")["sites"].items()
    }
    assert steps == {"east": 1, "west": 4}
