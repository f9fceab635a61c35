"""Metrics, against values worked out by hand and against their definitions."""

from __future__ import annotations

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from gapweave.shared.metrics import METRICS, exact_metrics, metrics_by_output


def binary(score: list[float], label: list[int]) -> dict[str, float | None]:
    positive = np.array(score)
    known = np.ones((len(label), 1), np.bool_)
    return exact_metrics(
        np.stack([1 - positive, positive], axis=1), np.array(label, np.float64)[:, None], known, "binary"
    )


def test_a_ranking_worked_out_by_hand() -> None:
    """Three of the four pairs are in order; precision is 1 at the first positive and 2/3 at the second."""
    found = binary([0.1, 0.4, 0.35, 0.8], [0, 0, 1, 1])
    assert found["auroc"] == pytest.approx(0.75)
    assert found["auprc"] == pytest.approx((1 + 2 / 3) / 2)
    assert found["brier"] == pytest.approx((0.1**2 + 0.4**2 + 0.65**2 + 0.2**2) / 4)
    assert found["ece"] == pytest.approx((0.1 + 0.4 + 0.65 + 0.2) / 4), "one record a bin"


def test_ties_count_half() -> None:
    assert binary([0.5, 0.5, 0.5, 0.5], [0, 1, 0, 1])["auroc"] == pytest.approx(0.5)


def test_perfect_and_reversed() -> None:
    assert binary([0.1, 0.2, 0.8, 0.9], [0, 0, 1, 1])["auroc"] == 1
    assert binary([0.9, 0.8, 0.2, 0.1], [0, 0, 1, 1])["auroc"] == 0


def test_calibration_compares_means_of_equal_mass_bins() -> None:
    """Twenty records, two a bin: where one of two is positive at 0.5, nothing is wrong."""
    assert binary([0.5] * 20, [0, 1] * 10)["ece"] == pytest.approx(0.0)
    assert binary([0.8] * 20, [0, 1] * 10)["ece"] == pytest.approx(0.3)
    assert binary([0.2] * 10 + [0.9] * 10, [0] * 10 + [1] * 10)["ece"] == pytest.approx(0.15)


@settings(derandomize=True, deadline=None, max_examples=15)
@given(seed=st.integers(0, 10_000), size=st.integers(5, 200), grid=st.sampled_from([3, 1000]))
def test_ranks_follow_their_definitions(seed: int, size: int, grid: int) -> None:
    generator = np.random.default_rng(seed)
    score = generator.integers(0, grid, size) / grid
    label = generator.integers(0, 2, size)
    label[:2] = [0, 1]
    found = binary(score.tolist(), label.tolist())
    apart = score[label == 1][:, None] - score[label == 0][None, :]
    assert found["auroc"] == pytest.approx(((apart > 0) + 0.5 * (apart == 0)).mean())
    precision = {cut: label[score >= cut].mean() for cut in score}
    recall = {cut: (label * (score >= cut)).sum() / label.sum() for cut in score}
    cuts = sorted(set(score), reverse=True)
    gained = np.diff([0.0, *[recall[cut] for cut in cuts]])
    assert found["auprc"] == pytest.approx(float(sum(gained * [precision[cut] for cut in cuts])))


def test_one_class_has_no_ranking_but_an_error() -> None:
    found = binary([0.3, 0.6], [1, 1])
    assert found["auroc"] is None
    assert found["auprc"] is None
    assert found["brier"] == pytest.approx((0.7**2 + 0.4**2) / 2)


def test_no_record_no_number() -> None:
    assert exact_metrics(np.zeros((0, 2)), np.zeros((0, 1)), np.zeros((0, 1), np.bool_), "binary") == dict.fromkeys(
        METRICS
    )


def test_records_without_a_known_label_do_not_count() -> None:
    score = np.array([0.1, 0.4, 0.35, 0.8, 0.99])
    known = np.array([[True]] * 4 + [[False]])
    target = np.array([0, 0, 1, 1, 0], np.float64)[:, None]
    found = exact_metrics(np.stack([1 - score, score], axis=1), target, known, "binary")
    assert found == binary([0.1, 0.4, 0.35, 0.8], [0, 0, 1, 1])


def test_multilabel_is_the_mean_over_labels_that_are_defined() -> None:
    scores = np.array([[0.1, 0.2], [0.4, 0.9], [0.35, 0.1], [0.8, 0.3]])
    target = np.array([[0, 1], [0, 1], [1, 1], [1, 1]], np.float64)
    found = exact_metrics(scores, target, np.ones((4, 2), np.bool_), "multilabel")
    first = binary([0.1, 0.4, 0.35, 0.8], [0, 0, 1, 1])
    second = binary([0.2, 0.9, 0.1, 0.3], [1, 1, 1, 1])
    assert found["auroc"] == first["auroc"], "the second label has one class only"
    assert found["brier"] == pytest.approx((first["brier"] + second["brier"]) / 2)


def test_each_label_by_itself_with_its_counts() -> None:
    scores = np.array([[0.1, 0.2], [0.4, 0.9], [0.35, 0.1], [0.8, 0.3]])
    target = np.array([[0, 1], [0, 1], [1, 1], [1, 1]], np.float64)
    known = np.array([[True, True], [True, False], [True, True], [True, True]])
    first, second = metrics_by_output(scores, target, known, "multilabel")
    assert first == {"records": 4, "positives": 2, **binary([0.1, 0.4, 0.35, 0.8], [0, 0, 1, 1])}
    assert second == {"records": 3, "positives": 3, **binary([0.2, 0.1, 0.3], [1, 1, 1])}
    assert second["auroc"] is None


def test_multiclass_is_the_mean_of_one_against_the_rest() -> None:
    scores = np.array([[0.7, 0.2, 0.1], [0.1, 0.8, 0.1], [0.3, 0.3, 0.4], [0.5, 0.3, 0.2]])
    target = np.eye(3)[[0, 1, 2, 1]]
    found = exact_metrics(scores, target, np.ones((4, 3), np.bool_), "multiclass")
    each = [binary(scores[:, k].tolist(), target[:, k].astype(int).tolist()) for k in range(3)]
    for name in METRICS:
        assert found[name] == pytest.approx(np.mean([one[name] for one in each]))


def test_the_order_of_records_of_equal_score_makes_no_calibration_error() -> None:
    """A constant prediction that is right, whatever the order; two values, each right."""
    for label in ([1] * 30 + [0] * 70, [0] * 70 + [1] * 30):
        assert binary([0.3] * 100, label)["ece"] == pytest.approx(0)
    label = [1] * 10 + [0] * 40 + [1] * 40 + [0] * 10
    assert binary([0.2] * 50 + [0.8] * 50, label)["ece"] == pytest.approx(0)
