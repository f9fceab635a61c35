"""Probabilities as risks: the slope and shift of a site are found, ranks stay, and nothing is invented where few are."""

from __future__ import annotations

import json
import math
from pathlib import Path
from typing import Any

import numpy as np
import polars
import pytest
import torch
from commandline import OPEN, QUICK, done, gapweave, hospitals, site_file
from hospitals import build, plan_of

from gapweave.client.calibration import Calibrated, Calibration, calibrate, enough, log_loss, to_prevalence
from gapweave.client.predict import Predictions
from gapweave.shared.judging import FEWEST
from gapweave.shared.metrics import exact_metrics
from gapweave.shared.objective import TaskKind
from gapweave.shared.paired import Truth


def truth_of(target: np.ndarray, kind: TaskKind = "binary") -> Truth:
    rows = len(target)
    known = np.ones(target.shape, np.bool_)
    return Truth(target=target, known=known, patient=np.arange(rows), patients=rows, kind=kind)


def both(logits: np.ndarray) -> np.ndarray:
    positive = 1 / (1 + np.exp(-logits))
    return np.stack([1 - positive, positive], 1)


def test_a_quiet_and_shifted_model_gets_its_slope_and_shift() -> None:
    random = np.random.default_rng(0)
    logits = random.normal(size=4000)
    target = (random.random(4000) < 1 / (1 + np.exp(-(2 * logits - 1)))).astype(float)[:, None]
    of = truth_of(target)
    found = calibrate(both(logits), of)
    assert found.slope in (2 * 2**-0.25, 2, 2 * 2**0.25), "one step of the grid at most"
    assert found.shift == (pytest.approx(-1, abs=0.15),)
    again = random.normal(size=4000)
    truly = (random.random(4000) < 1 / (1 + np.exp(-(2 * again - 1)))).astype(float)[:, None]
    before, after = (
        exact_metrics(said, truly, np.ones((4000, 1), bool), "binary")
        for said in (both(again), found(both(again), "binary"))
    )
    assert before["ece"] is not None
    assert after["ece"] is not None
    assert before["ece"] > 0.1
    assert after["ece"] < 0.03, "on patients that it was not found on"
    assert after["auroc"] == pytest.approx(before["auroc"]), "ranks stay"


def test_calibrating_what_is_calibrated_changes_little() -> None:
    random = np.random.default_rng(1)
    logits = random.normal(size=4000)
    of = truth_of((random.random(4000) < 1 / (1 + np.exp(-logits))).astype(float)[:, None])
    found = calibrate(both(logits), of)
    assert np.abs(found(both(logits), "binary") - both(logits)).max() < 0.06


@pytest.mark.parametrize("kind", ["multiclass", "multilabel"])
def test_classes_and_labels_each_get_their_shift(kind: TaskKind) -> None:
    random = np.random.default_rng(2)
    logits = random.normal(size=(3000, 3))
    moved = 1.5 * logits + np.array([1.0, 0.0, -1.0])
    if kind == "multiclass":
        shares = np.exp(moved) / np.exp(moved).sum(1, keepdims=True)
        target = np.eye(3)[[random.choice(3, p=row) for row in shares]]
        said = np.exp(logits) / np.exp(logits).sum(1, keepdims=True)
    else:
        target = (random.random((3000, 3)) < 1 / (1 + np.exp(-moved))).astype(float)
        said = 1 / (1 + np.exp(-logits))
    of = truth_of(target, kind)
    found = calibrate(said, of)
    shift = np.array(found.shift)
    assert found.slope == pytest.approx(1.5, rel=0.2)
    np.testing.assert_allclose(np.diff(shift), [-1, -1], atol=0.3)
    changed = found(said, kind)
    shifted = Calibration(slope=1.0, shift=to_prevalence(said, of))(said, kind)
    assert log_loss(changed, of) < log_loss(shifted, of) < log_loss(said, of)
    if kind == "multiclass":
        np.testing.assert_allclose(changed.sum(1), 1)


def test_a_class_that_no_patient_has_stays_finite() -> None:
    said = np.random.default_rng(3).dirichlet([1, 1, 1], 40)
    of = truth_of(np.eye(3)[[0, 1] * 20], "multiclass")
    found = calibrate(said, of)
    assert all(map(math.isfinite, (found.slope, *found.shift)))
    assert found(said, "multiclass")[:, 2].max() < 0.01
    assert Calibration.from_dict(found.to_dict()) == found


def test_a_class_that_the_site_hardly_has_is_not_made_impossible() -> None:
    """The federated model knows it from others; the calibration said 0 of whomever it was named for."""
    assert not enough(truth_of(np.eye(3)[[0, 1] * 20 + [2] * (FEWEST - 1)], "multiclass"))
    assert enough(truth_of(np.eye(3)[[0, 1] * 20 + [2] * FEWEST], "multiclass"))
    said = np.random.default_rng(3).uniform(0.1, 0.9, (40, 3))
    labels = truth_of(np.stack([[0, 1] * 20, [0] * 40, [1] * 38 + [0] * 2], 1).astype(float), "multilabel")
    assert enough(labels)
    found = calibrate(said, labels)
    assert [shift is None for shift in found.shift] == [False, True, True]
    changed = found(said, "multilabel")
    np.testing.assert_array_equal(changed[:, 1:], said[:, 1:])
    assert np.abs(changed[:, 0] - said[:, 0]).max() > 0.01
    alone = calibrate(said[:, :1], truth_of(labels.target[:, :1], "multilabel"))
    assert found.slope == alone.slope, "what is left as it is has no say in the slope"


def test_a_record_without_any_modality_keeps_the_prevalence(tmp_path: Path) -> None:
    batch = build(tmp_path / "a", "north", ["labs"], 30).load(plan_of(private=False)).batch
    batch.present[0] = False
    votes = np.full((len(batch), batch.present.shape[1], 2), np.nan)

    def says(batch: Any) -> Predictions:
        return Predictions(probabilities=np.full((len(batch), 2), [0.7, 0.3]), votes=votes, weights=None)

    calibration = Calibration(slope=1.0, shift=(math.log(2),))
    found = Calibrated(predictor=says, calibration=calibration, kind="binary")(batch).probabilities
    np.testing.assert_allclose(found[0], [0.7, 0.3])
    here = torch.any(batch.present, 1).numpy()
    np.testing.assert_allclose(found[here, 1] / found[here, 0], 2 * 0.3 / 0.7)
    assert not here.all()


def test_predict_calibrates_after_the_check_only(tmp_path: Path) -> None:
    study = hospitals(tmp_path / "demo")
    run, checked, site = tmp_path / "run", tmp_path / "checked", site_file(study, "alder")
    done("simulate", study, "--out", run, *QUICK, *OPEN, "--baselines", "none")
    refused = gapweave("predict", run, "--site", site, "--calibrated", "--out", tmp_path / "no.csv")
    assert refused.code == 2
    assert "gapweave site report" in refused.err
    assert not (tmp_path / "no.csv").exists()
    done("simulate", study, "--out", checked, *QUICK, *OPEN, "--joining")
    told = done(
        "predict", checked, "--site", site, "--model", "federated", "--calibrated", "--out", tmp_path / "yes.csv"
    )
    assert "(model: federated, calibrated)" in told.out
    done("predict", checked, "--site", site, "--model", "federated", "--out", tmp_path / "as-is.csv")
    plain, changed = (polars.read_csv(tmp_path / name)["p_1"].to_numpy() for name in ("as-is.csv", "yes.csv"))
    assert np.abs(plain - changed).max() > 0.01
    np.testing.assert_array_equal(np.argsort(plain, kind="stable"), np.argsort(changed, kind="stable"))
    # What the check found worse than the site's own predicts, if it was chosen, and says so.
    assert "Consider --model local" not in told.err
    (file,) = (checked / "sites" / "alder").glob("runs/*/joining.json")
    content = json.loads(file.read_text())
    content["models"]["federated"]["verdict"] = "worse"
    file.write_text(json.dumps(content))
    told = done("predict", checked, "--site", site, "--model", "federated", "--out", tmp_path / "worse.csv")
    assert "federated is worse than the site's own on its held-out patients" in told.err
