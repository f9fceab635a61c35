"""Metrics from noised tables, beside exact ones on the same synthetic scores.

Scores follow a two-normal model: a patient's score is the log-odds of the outcome, shifted where a test wants a
model that is not calibrated. All draws are seeded: a test that passes passes again, and what it claims is a bound
that another seed would miss with the probability that stands beside it.
"""

from __future__ import annotations

from typing import Any

import numpy as np
import pytest
from numpy.typing import NDArray
from sklearn.metrics import average_precision_score, roc_auc_score

from gapweave.shared.errors import GapweaveError
from gapweave.shared.metrics import METRICS
from gapweave.shared.tables import (
    BINS,
    EDGES,
    ScoreTable,
    add_tables,
    bin_of,
    laplace_noise,
    mean_table_metrics,
    nonnegative,
    pooled,
    read_tables,
    table_metrics,
)

Floats = NDArray[np.float64]
Generator = np.random.Generator


def patients(
    n: int, generator: Generator, prevalence: float = 0.3, apart: float = 0.9, shift: float = 0.0
) -> tuple[NDArray[np.bool_], Floats]:
    """Labels and probabilities; without a shift the probabilities are calibrated."""
    label = generator.random(n) < prevalence
    value = generator.normal(size=n) + apart * label
    odds = apart * value - apart**2 / 2 + np.log(prevalence / (1 - prevalence)) + shift
    return label, 1 / (1 + np.exp(-odds))


def counted(label: NDArray[np.bool_], score: Floats) -> Floats:
    place = bin_of(score)
    rows = [np.bincount(place[label == value], minlength=BINS) for value in (False, True)]
    return np.array(rows, np.float64)


def noised(label: NDArray[np.bool_], score: Floats, eps: float, sites: int, generator: Generator) -> ScoreTable:
    """The sum of so many sites' tables, each with noise of its own."""
    where = generator.integers(sites, size=len(label))
    tables = []
    for site in range(sites):
        counts = counted(label[where == site], score[where == site])
        tables.append(ScoreTable(counts=counts + laplace_noise(1 / eps, counts.shape, generator), scale=1 / eps))
    return add_tables(tables)


def exact(label: NDArray[np.bool_], score: Floats) -> dict[str, float]:
    place = bin_of(score)
    gaps = [abs(score[place == bin].sum() - label[place == bin].sum()) for bin in range(BINS)]
    return {
        "auroc": roc_auc_score(label, score),
        "auprc": average_precision_score(label, score),
        "brier": float(np.mean((score - label) ** 2)),
        "ece": float(np.sum(gaps) / len(label)),
    }


# Without noise only the bins are in the way.


@pytest.mark.parametrize("prevalence", [0.1, 0.3, 0.5])
@pytest.mark.parametrize("apart", [0.75, 1.2])
def test_a_table_without_noise_gives_the_exact_metrics_but_for_its_bins(prevalence: float, apart: float) -> None:
    label, score = patients(200_000, np.random.default_rng(0), prevalence, apart, shift=0.4)
    found = table_metrics([ScoreTable(counts=counted(label, score), scale=0.0)])
    truth = exact(label, score)
    assert found["auroc"] == pytest.approx(truth["auroc"], abs=0.006)
    assert found["auprc"] == pytest.approx(truth["auprc"], abs=0.012)
    assert found["brier"] == pytest.approx(truth["brier"], abs=0.002)
    assert found["ece"] == pytest.approx(truth["ece"], abs=0.005)


def test_the_slope_within_a_bin_takes_most_of_the_binning_error_away() -> None:
    """Ties counted half, as a plain table would, are 0.013 off where outcomes are rare."""
    label, score = patients(200_000, np.random.default_rng(1), 0.1, 1.2)
    counts = counted(label, score)
    negative, positive = counts
    ties_half = float((positive * (np.cumsum(negative) - negative / 2)).sum() / negative.sum() / positive.sum())
    truth = exact(label, score)["auroc"]
    assert truth - ties_half > 0.01
    assert abs(table_metrics([ScoreTable(counts=counts, scale=0.0)])["auroc"] - truth) < 0.005


def test_a_score_at_an_edge_belongs_to_the_bin_above_and_none_is_lost() -> None:
    assert bin_of(np.array([0.0, *EDGES, 1.0])).tolist() == [0, *range(1, BINS), BINS - 1]
    assert bin_of(np.array([np.nan, np.inf, -np.inf])).tolist() == [BINS - 1, BINS - 1, 0]


# With noise.


@pytest.mark.no_cover
@pytest.mark.parametrize(
    ("n", "eps", "measured"),
    [
        (1000, 0.5, 0.022),
        *(
            pytest.param(n, eps, measured, marks=pytest.mark.long)
            for n, eps, measured in [(500, 0.5, 0.034), (500, 1.0, 0.022), (1000, 1.0, 0.013), (2000, 0.5, 0.012)]
        ),
        (2000, 1.0, 0.008),
    ],
)
def test_pooled_auroc_is_as_near_as_the_trial_measured(n: int, eps: float, measured: float) -> None:
    """Noise added at each of five sites, against the trial's figures (design page 07).

    Measured here: .039, .021, .013, .007 for 500/.5, 1000/.5, 2000/.5, 2000/1. The sd over 150 draws is itself off by
    6 % (one sd): at 500/.5, the nearest to the bound, another seed would miss it once in 1900.
    """
    generator = np.random.default_rng(int(n * eps))
    errors = []
    for seed in range(150):
        label, score = patients(n, generator)
        errors.append(
            table_metrics([noised(label, score, eps, 5, generator)], seed)["auroc"] - exact(label, score)["auroc"]
        )
    assert 0.2 * measured < float(np.std(errors)) < 1.35 * measured
    assert abs(float(np.mean(errors))) < measured


@pytest.mark.parametrize(
    ("n", "eps", "sites", "prevalence", "apart"),
    [
        pytest.param(1000, 1.0, 10, 0.3, 0.9, marks=pytest.mark.long),
        pytest.param(2000, 0.5, 10, 0.3, 0.9, marks=pytest.mark.long),
        (2000, 1.0, 1, 0.1, 1.2),
    ],
)
def test_intervals_cover_what_they_say(n: int, eps: float, sites: int, prevalence: float, apart: float) -> None:
    """Nominal 95 %, accepted 92-99 %. At a true 95 %, 400 draws fall below 92 % once in 270 seeds and above 99 % once
    in 450,000; intervals that truly cover 80 % pass with probability 3e-11.
    """
    generator = np.random.default_rng(7)
    truth = exact(*patients(1_000_000, generator, prevalence, apart, shift=0.5))
    hits = dict.fromkeys(METRICS, 0)
    for seed in range(400):
        label, score = patients(n, generator, prevalence, apart, shift=0.5)
        found = table_metrics([noised(label, score, eps, sites, generator)], seed)
        for name in METRICS:
            low, high = found[f"{name}_interval"]
            assert low <= found[name] <= high
            hits[name] += low <= truth[name] <= high
    assert {name: 0.92 <= count / 400 <= 0.99 for name, count in hits.items()} == dict.fromkeys(METRICS, True), hits


def test_a_calibrated_models_interval_reaches_zero_although_noise_makes_an_error() -> None:
    """At a true 97.5 % fewer than 89 of 100 intervals begin at 0 with probability 1e-5."""
    generator = np.random.default_rng(3)
    from_zero = []
    for seed in range(100):
        found = table_metrics([noised(*patients(1000, generator), 1.0, 5, generator)], seed)
        assert found["ece"] > 0
        from_zero.append(found["ece_interval"][0] == 0)
    assert np.mean(from_zero) > 0.88
    shifted = table_metrics([noised(*patients(2000, generator, shift=1.0), 1.0, 1, generator)])
    assert shifted["ece_interval"][0] > 0.1


@pytest.mark.no_cover
@pytest.mark.parametrize("sites", [6, 20])
def test_the_mean_of_many_sites_is_not_surer_of_what_all_get_wrong(sites: int) -> None:
    """Noise makes a calibration error at every site: of 20 means with intervals in squares, none held the true 0.

    AUROC: at a true 95 % fewer than 33 of 40 intervals hold the truth with probability 1e-3.
    """
    generator = np.random.default_rng(11)
    truth = exact(*patients(1_000_000, generator))
    hits = dict.fromkeys(("ece", "auroc"), 0)
    for _ in range(40):
        found = mean_table_metrics([[noised(*patients(1000, generator), 1.0, 1, generator)] for _ in range(sites)])
        hits["ece"] += found["ece_interval"][0] == 0
        hits["auroc"] += found["auroc_interval"][0] <= truth["auroc"] <= found["auroc_interval"][1]
    assert hits["ece"] >= 33
    assert hits["auroc"] >= 33


def test_a_label_given_four_times_is_known_no_better() -> None:
    """As labels that go together are; their intervals in squares would be half as wide."""
    generator = np.random.default_rng(12)
    table = noised(*patients(1500, generator), 1.0, 1, generator)
    once, often = table_metrics([table]), table_metrics([table] * 4)
    for name in METRICS:
        assert np.diff(often[f"{name}_interval"]) == pytest.approx(np.diff(once[f"{name}_interval"]), rel=0.15)


# Edge cases.


def test_projection_keeps_sums_and_is_the_nearest() -> None:
    rows = np.array([[5.0, -3.0, 4.0, -1.0], [2.0, 0.0, 1.0, 3.0], [-2.0, -1.0, 0.0, 1.0]])
    kept = nonnegative(rows)
    assert (kept >= 0).all()
    assert kept.sum(-1).tolist() == pytest.approx([5.0, 6.0, 0.0])
    np.testing.assert_allclose(kept[1], rows[1])
    np.testing.assert_allclose(kept[0], [3.0, 0.0, 2.0, 0.0], atol=1e-12)


@pytest.mark.parametrize(
    ("negatives", "positives", "scale", "undefined"),
    [
        (0, 0, 0.0, METRICS),
        (20, 20, 0.0, METRICS),
        (100, 0, 0.0, ("auroc", "auprc")),
        (0, 100, 0.0, ("auroc", "auprc")),
        (100, 9, 0.0, ("auroc", "auprc")),
        (100, 10, 0.0, ()),
        # Noise of scale 20 has an sd of 28 a cell, 89 a row: 100 events could be none.
        (900, 100, 20.0, ("auroc", "auprc")),
        (100, 100, 20.0, METRICS),
    ],
)
def test_what_too_few_patients_cannot_tell_is_none(
    negatives: int, positives: int, scale: float, undefined: tuple[str, ...]
) -> None:
    counts = np.zeros((2, BINS))
    counts[0, :2], counts[1, 3:5] = negatives / 2, positives / 2
    found = table_metrics([ScoreTable(counts=counts, scale=scale)])
    for name in METRICS:
        assert (found[name] is None) == (name in undefined), name
        assert (found[f"{name}_interval"] is None) == (name in undefined), name


def test_a_table_whose_scores_share_a_bin_cannot_rank_and_does_not_try() -> None:
    """A model of an AUROC of 1 whose probabilities are all between 0.41 and 0.49 would have been called a coin."""
    counts = np.zeros((2, BINS))
    counts[:, 5] = 500, 500
    found = table_metrics([ScoreTable(counts=counts, scale=1.0)])
    assert found["auroc"] is found["auprc"] is None
    assert found["brier"] == pytest.approx(0.2525, abs=0.002)
    counts[0, 3], counts[1, 7] = 1000, 1000
    assert table_metrics([ScoreTable(counts=counts, scale=1.0)])["auroc"] > 0.8


def test_several_problems_are_averaged_as_the_exact_metrics_are() -> None:
    generator = np.random.default_rng(5)
    tables = [ScoreTable(counts=counted(*patients(3000, generator, apart=apart)), scale=0.0) for apart in (0.5, 1.5)]
    each = [table_metrics([table]) for table in tables]
    assert table_metrics(tables)["auroc"] == pytest.approx((each[0]["auroc"] + each[1]["auroc"]) / 2)
    empty = ScoreTable(counts=np.zeros((2, BINS)), scale=0.0)
    assert table_metrics([tables[0], empty])["auroc"] == pytest.approx(each[0]["auroc"])


def test_sites_are_pooled_problem_by_problem_with_all_their_noise() -> None:
    one, two = (ScoreTable(counts=np.full((2, BINS), value), scale=2.0) for value in (1.0, 2.0))
    together = pooled([[one, two], [two, two], [one, one]])
    assert [float(table.counts[0, 0]) for table in together] == [4.0, 5.0]
    assert together[0].draws == 3
    assert together[0].noise_sd == pytest.approx(np.sqrt(3) * one.noise_sd)
    assert one.noise_sd == pytest.approx(
        float(np.std(laplace_noise(2.0, (200_000,), np.random.default_rng(0)))), rel=0.02
    )
    with pytest.raises(GapweaveError, match="equal noise"):
        add_tables([one, ScoreTable(counts=one.counts, scale=1.0)])


@pytest.mark.parametrize(
    "content",
    [
        None,
        "table",
        {},
        [[1, 2]],
        [[[0.5] * BINS] * 2],
        [[[True] * BINS] * 2],
        [[[1] * BINS] * 3],
        [[[1] * BINS] * 2] * 2,
        [[[10**30] * BINS] * 2],
        [[["1"] * BINS] * 2],
        [[[1] * BINS, [1] * (BINS - 1)]],
        [[[float("nan")] * BINS] * 2],
    ],
    ids=str,
)
def test_a_server_reads_tables_of_whole_numbers_and_nothing_else(content: Any) -> None:
    assert read_tables([[[-3] * BINS, [4] * BINS]], 1, 2.0) is not None
    assert read_tables(content, 1, 2.0) is None
