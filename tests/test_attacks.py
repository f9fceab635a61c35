"""Bad sites of a simulation: what they send, whom they know, and that robust rules hold where the mean does not."""

from __future__ import annotations

from dataclasses import replace
from pathlib import Path
from types import SimpleNamespace

import numpy as np
import pytest
import torch
from batches import random_batch
from cohorts import study
from hospitals import KINDS, build, plan_of, publish

from gapweave.server.aggregators import combine
from gapweave.server.rules import bad_sites, resolve
from gapweave.shared.config.simulation import LABEL_ATTACKS, UPDATE_ATTACKS
from gapweave.shared.rundir import RunDirectory
from gapweave.sites.simulate.attacks import bad_names, lie, mislabelled
from gapweave.sites.simulate.compare_unit import Silent
from gapweave.sites.simulate.run import Setup, simulate

pytestmark = pytest.mark.usefixtures("fresh_sites")

OWN = np.array([1.0, 2.0, -1.0], np.float32)
BEFORE = np.array([5.0, 5.0, 5.0], np.float32)
HONEST = np.array([[1, 0, 0], [3, 0, 1], [2, 0, 2], [2, 3, 1], [2, -3, 1]], np.float32)


def told(attack: str, honest: np.ndarray = HONEST, rule: str = "auto", bad: int = 1) -> list[float]:
    return lie(attack, OWN, honest, BEFORE, rule, bad).tolist()


def test_plain_lies_by_hand() -> None:
    assert told("sign_flip") == [-1, -2, 1]
    assert told("times_100") == [100, 200, -100]
    assert told("zero") == [0, 0, 0]
    assert told("stale") == [5, 5, 5]
    assert told("inner_product") == [-2, 0, -1]
    assert told("mimic") == [1, 0, 0]
    assert np.isnan(told("nan")).all()
    assert np.isinf(told("inf")).all()


def test_min_max_is_no_farther_from_anybody_than_they_are_from_each_other() -> None:
    point = np.array(told("min_max"))
    reach = max(np.linalg.norm(a - b) for a in HONEST for b in HONEST)
    assert max(np.linalg.norm(HONEST - point, axis=1)) == pytest.approx(reach, rel=1e-5)


@pytest.mark.parametrize("attack", ["alie", "adaptive"])
@pytest.mark.parametrize("rule", ["median", "nnm+trimmed_mean", "mean"])
def test_an_attacker_that_knows_the_rule_moves_it_farther_than_a_fixed_lie(attack: str, rule: str) -> None:
    """It knows its strength too: among those that it tries, none would move the result farther."""
    generator = np.random.default_rng(0)
    honest = generator.normal(1, 1, (5, 40)).astype(np.float32)
    mean, spread = honest.mean(0), honest.std(0)

    def moved(point: np.ndarray) -> float:
        rows = np.concatenate([honest, point[None].astype(np.float32)])
        return float(np.linalg.norm(combine(rows, resolve(rule), bad_sites(6)) - mean))

    found = moved(lie(attack, honest[0], honest, honest[0], rule, 1))
    assert found >= max(moved(mean - z * spread) for z in (0.1, 1.0, 10.0)) - 1e-6
    assert found > moved(mean)


def test_a_bad_site_that_is_alone_still_lies() -> None:
    for attack in UPDATE_ATTACKS:
        told(attack, honest=HONEST[:0])


def test_flipped_and_swapped_labels() -> None:
    classes = torch.eye(3)[[0, 1, 2, 1]]
    batch = SimpleNamespace(target=classes, label_mask=torch.ones(4, 3, dtype=torch.bool))
    real = replace(random_batch(study(KINDS), [1] * 4), target=classes, label_mask=batch.label_mask)
    task = SimpleNamespace(kind="multiclass")
    flipped = mislabelled(real, task, "label_flip").target
    assert not (flipped * classes).any(), "no label is right"
    assert torch.equal(flipped.sum(1), torch.ones(4))
    swapped = mislabelled(real, task, "swap_labels").target
    assert swapped.argmax(1).tolist() == [1, 0, 2, 0]
    task = SimpleNamespace(kind="binary")
    assert torch.equal(mislabelled(real, task, "swap_labels").target, 1 - classes)
    task = SimpleNamespace(kind="multilabel")
    assert torch.equal(mislabelled(real, task, "swap_labels").target, classes[:, [1, 0, 2]])
    assert torch.equal(mislabelled(real, task, "label_flip").target, 1 - classes)


def test_which_sites_are_bad_follows_seed_and_names_only() -> None:
    names = [f"s{at}" for at in range(9)]
    of = plan_of(private=False, simulation={"attack": "zero", "bad_sites": 2})
    assert bad_names(of, names) == bad_names(of, names[::-1])
    assert len(bad_names(of, names)) == 2
    drawn = {bad_names(of.model_copy(update={"seed": seed}), names) for seed in range(20)}
    assert len(drawn) > 5
    assert not bad_names(plan_of(private=False, simulation={"bad_sites": 2}), names)


def test_an_attack_has_a_bad_site() -> None:
    assert plan_of(private=False, simulation={"attack": "zero"}).simulation.bad_sites == 1
    assert plan_of(private=False, simulation={"attack": "none"}).simulation.bad_sites == 0
    with pytest.raises(ValueError, match="nobody attacks"):
        plan_of(private=False, simulation={"attack": "zero", "bad_sites": 0})


def run(folder: Path, attack: str, rule: str = "auto", private: bool = False) -> dict:
    of = plan_of(
        private=private,
        training={"rounds": 3},
        aggregation={"default": rule},
        evaluation={"test_fraction": 0.3},
        simulation={"attack": attack, "bad_sites": 1},
    )
    sites = tuple(publish(build(folder / name, name, patients=40)) for name in "abcdef")
    directory = RunDirectory.create(folder / "run", of)
    setup = Setup(sites=sites, data=None, state=folder / "state")
    summary = simulate(of, setup, directory, Silent())
    return {**summary, "lines": list(directory.rounds()), "bad": next(iter(bad_names(of, "abcdef")))}


@pytest.mark.no_cover
@pytest.mark.parametrize("attack", ["absent", *UPDATE_ATTACKS, *LABEL_ATTACKS])
def test_a_run_goes_on_under_every_attack(tmp_path: Path, attack: str) -> None:
    result = run(tmp_path, attack)
    assert result["rounds"] == 3
    honest = [row["metrics"]["auroc"] for name, row in result["sites"].items() if name != result["bad"]]
    assert result["mean"]["auroc"] == pytest.approx(np.mean(honest)), "bad sites' scores are not counted"
    assert result["mean"]["auroc"] > 0.75
    fusion = result["lines"][0]["groups"]["head/labs"]
    if attack in ("nan", "inf"):
        assert list(fusion["screened"]) == [result["bad"]]
    assert (result["bad"] in result["lines"][0]["sites"]) == (attack != "absent")
    assert {name for name, row in result["sites"].items() if "a bad site" in row["reason"]} == {result["bad"]}


def test_the_plain_mean_collapses(tmp_path: Path) -> None:
    """Under a lie that the screen of norms lets pass, and that the default rule survives."""
    assert run(tmp_path, "adaptive", rule="mean")["mean"]["auroc"] < 0.75


def test_a_private_run_under_attack_is_charged_as_any_other(tmp_path: Path) -> None:
    result = run(tmp_path, "sign_flip", private=True)
    spent = [row["privacy"]["epsilon"] for row in result["sites"].values()]
    assert min(spent) > 0
    assert max(spent) <= 8
