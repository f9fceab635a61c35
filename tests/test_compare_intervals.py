"""Intervals of a comparison: the same patients for every model, cell and seed; sites too small to judge are left out."""

import numpy as np
import pytest
from sklearn.metrics import roc_auc_score

from gapweave.sites.simulate.compare_intervals import Draws
from gapweave.sites.simulate.compare_unit import Scores

CELL = {"epsilon": 1}


def scores_of(seed, patients=60, order=None, **models):
    """A site with one record a patient, its records in any order."""
    rng = np.random.default_rng(seed)
    target = (rng.random(patients) < 0.4).astype(float)
    order = np.arange(patients) if order is None else order
    informative = target + rng.normal(0, 1, patients)
    found = {name: 1 / (1 + np.exp(-strength * informative)) for name, strength in models.items()}
    return Scores(
        record=order,
        patient=order,
        target=target[order, None],
        known=np.ones((patients, 1), bool),
        models={name: np.stack([1 - of[order], of[order]], 1) for name, of in found.items()},
    )


def test_the_first_value_is_the_auroc_of_the_patients_as_they_are():
    draws, site = Draws("binary"), scores_of(0, good=2.0)
    means = draws.add(CELL, {"north": site})
    expected = roc_auc_score(site.target[:, 0], site.models["good"][:, 1])
    assert means == {"good": pytest.approx(expected)}
    assert draws.sites(CELL, "good")["north"][0] == pytest.approx(expected)


def test_the_order_in_which_folds_hold_records_out_does_not_matter():
    draws = Draws("binary")
    for seed, order in enumerate((np.arange(60), np.random.default_rng(5).permutation(60))):
        draws.add({"seed": seed}, {"north": scores_of(0, order=order, good=2.0)})
    first, second = (draws.sites({"seed": seed}, "good")["north"] for seed in (0, 1))
    np.testing.assert_allclose(first, second)


def test_models_that_rank_alike_differ_by_nothing_in_every_resample():
    draws = Draws("binary")
    draws.add(CELL, {"north": scores_of(0, loud=3.0, quiet=0.3)})
    assert draws.difference(CELL, "loud", CELL, "quiet") == (0.0, 0.0)


def test_a_model_that_ranks_backwards_is_told_apart():
    draws = Draws("binary")
    draws.add(CELL, {"north": scores_of(0, good=2.0, bad=-2.0), "south": scores_of(1, good=2.0, bad=-2.0)})
    low, high = draws.difference(CELL, "good", CELL, "bad")
    assert 0 < low < high


def test_a_site_with_seven_patients_of_a_class_is_left_out():
    small = scores_of(0, good=2.0)
    positives = np.flatnonzero(small.target[:, 0])
    small.target[positives[7:]] = 0
    draws = Draws("binary")
    draws.add(CELL, {"small": small, "north": scores_of(1, good=2.0)})
    assert list(draws.sites(CELL, "good")) == ["north"]
    small.target[positives[7]] = 1
    draws.add({"epsilon": 2}, {"small": small})
    assert list(draws.sites({"epsilon": 2}, "good")) == ["small"]


def test_seeds_are_averaged_and_sites_weigh_alike():
    draws = Draws("binary")
    for seed in (0, 1):
        draws.add(CELL, {"north": scores_of(seed, good=2.0), "south": scores_of(seed + 10, 100, good=1.0)})
    assert draws.sites(CELL, "good")["north"].shape == (1001,)
    assert draws.difference(CELL, "good", CELL, "never run") is None


def test_resamples_take_whole_patients():
    """Two records of a patient that say the same add nothing: the interval is that of one record each."""
    single = scores_of(0, good=2.0)
    twice = Scores(
        record=np.arange(120),
        patient=np.repeat(single.patient, 2),
        target=np.repeat(single.target, 2, 0),
        known=np.repeat(single.known, 2, 0),
        models={"good": np.repeat(single.models["good"], 2, 0)},
    )
    draws = Draws("binary")
    draws.add({"records": 1}, {"north": single})
    draws.add({"records": 2}, {"north": twice})
    first, second = (draws.sites({"records": number}, "good")["north"] for number in (1, 2))
    np.testing.assert_allclose(first, second)
