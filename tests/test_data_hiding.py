"""What a simulation hides of a site's modalities."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
import torch
from cohorts import LABS, Hospital, assert_same, study

from gapweave.client.data import Cohort


def many(folder: Path, name: str = "north", **simulation: Any) -> Cohort:
    """400 records with four modalities each."""
    hospital = Hospital(folder, name)
    hospital.records(400)
    modalities = {f"m{at}": LABS for at in range(4)}
    hospital.labs(400)
    for modality in modalities:
        hospital.add(modality, file="labs.csv", columns={"sodium": "na"})
    return hospital.load(study(modalities, simulation=simulation))


def test_hiding_is_deterministic_and_differs_by_site(tmp_path: Path) -> None:
    first, again = many(tmp_path, missing_rate=0.3), many(tmp_path, missing_rate=0.3)
    assert_same(first, again)
    assert not torch.equal(first.batch.present, many(tmp_path, "south", missing_rate=0.3).batch.present)


def test_hiding_at_random_has_the_rate_and_spares_one(tmp_path: Path) -> None:
    present = many(tmp_path, missing_rate=0.3).batch.present
    assert 0.67 < present.float().mean() < 0.74
    assert many(tmp_path, missing_rate=0.95).batch.present.any(1).all()


def test_hiding_by_label_is_higher_for_positives(tmp_path: Path) -> None:
    batch = many(tmp_path, missing_rate=0.4, missing="mnar").batch
    positive = batch.target[:, 0] == 1
    # The share hidden is a mean of 800 draws: its standard deviation is below 0.018. A record of positives which
    # would lose all four modalities (0.6^4 = 13 %) keeps one, hence a share of 0.57 instead of 0.6.
    assert 1 - batch.present[positive].float().mean() == pytest.approx(0.6 - 0.6**4 / 4, abs=0.06)
    assert 1 - batch.present[~positive].float().mean() == pytest.approx(0.2, abs=0.06)


def test_hidden_values_are_not_left_in_the_inputs(tmp_path: Path) -> None:
    batch = many(tmp_path, missing_rate=0.5).batch
    for at in range(4):
        assert (batch.inputs[f"m{at}"][~batch.present[:, at]] == 0).all()
        assert (batch.inputs[f"m{at}"][batch.present[:, at]] != 0).any(1).all()


def test_nothing_is_hidden_without_a_rate(tmp_path: Path) -> None:
    assert many(tmp_path).batch.present.all()
