"""A label that a site has never recorded: what its own models, blends and calibrations say of it is nothing."""

from __future__ import annotations

import json
from pathlib import Path

import numpy as np
import pytest
from cohorts import Hospital, study

from gapweave.client.calibration import Calibration, calibrate
from gapweave.client.local_models import fit_local
from gapweave.client.mixture import mix
from gapweave.shared.paired import Truth


def test_a_model_that_knows_nothing_of_a_label_leaves_it_to_the_others() -> None:
    ours, own = np.array([[0.6, 0.3]]), np.array([[0.2, np.nan]])
    assert mix([ours, own], [0.5, 0.5], "multilabel")[0, 1] == pytest.approx(0.3)
    assert np.isnan(mix([own, own], [0.5, 0.5], "multilabel")[0]).tolist() == [False, True]
    assert mix([ours], [2.0], "multilabel")[0, 1] == pytest.approx(0.09 / (0.09 + 0.49)), "a slope is no share"


def test_a_label_that_a_site_never_recorded_is_not_one_that_never_happens(tmp_path: Path) -> None:
    """Its own models said so, with a risk of one in a million; a blend and a calibration halved the federated ones."""
    cohort = Hospital(tmp_path)
    random = np.random.default_rng(0)
    cohort.records(60, y=(random.random(60) < 0.4).astype(int).tolist(), z=[None] * 60)
    cohort.write("labs.csv", {"id": [f"r{row}" for row in range(60)], "na": random.normal(140, 5, 60).tolist()})
    cohort.add("labs", file="labs.csv", columns={"sodium": "na"})
    cohort.update("records", label={"seen": "y", "never": "z"})
    of = study(
        {"labs": {"kind": "table", "columns": {"sodium": {"low": 100, "high": 180}}}},
        task={"kind": "multilabel", "label": ["seen", "never"]},
        training={"rounds": 2},
        privacy={"enabled": False},
    )
    data = cohort.load(of).batch
    for name, model in fit_local(of, data, "north").items():
        said = model(data).probabilities
        assert np.isfinite(said[:, 0]).all(), name
        assert np.isnan(said[:, 1]).all(), name
    truth = Truth.of(data, "multilabel")
    found = calibrate(np.full((60, 2), 0.4), truth)
    assert found.shift[0] is not None
    assert found.shift[1] is None
    assert Calibration.from_dict(json.loads(json.dumps(found.to_dict()))) == found
    assert (found(np.full((5, 2), 0.4), "multilabel")[:, 1] == 0.4).all(), "the federated model's word stands"
