"""Parity: the same study gives the same global model in one process and over Flower's real parts."""

from __future__ import annotations

import json
from pathlib import Path

import numpy as np
import pytest
import yaml
from loopback import hub_with, run_card

from gapweave.server.aggregation import initial_groups
from gapweave.shared import tensorfile
from gapweave.shared.cli import _run
from gapweave.shared.config import load_study
from gapweave.shared.tensorfile import Arrays
from gapweave.sites.demo import write_demo

SETTINGS = {
    "privacy.enabled": False,
    "training.rounds": 4,
    "training.local_steps": 20,
    "training.lr": 0.5,
    "sharing": "all",
}


def shared_model(run: Path) -> Arrays:
    return tensorfile.parse((run / "model" / "shared.safetensors").read_bytes())[0]


def distance(one: Arrays, other: Arrays) -> float:
    assert one.keys() == other.keys()
    return max(float(np.abs(one[group][name] - other[group][name]).max()) for group in one for name in one[group])


def inline(study: Path, out: Path) -> Arrays:
    settings = [word for key, value in SETTINGS.items() for word in ("--set", f"{key}={json.dumps(value)}")]
    assert _run(["simulate", str(study), "--out", str(out), *settings], debug=True) == 0
    return shared_model(out)


@pytest.fixture(scope="module")
def hospitals(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Two hospitals that approve the study and, for this test on synthetic data, training without noise."""
    study = write_demo(tmp_path_factory.mktemp("hospitals") / "demo", hospitals=2, patients=300)
    approved = load_study(study, SETTINGS).sha256
    for file in (study.parent / "sites").glob("*.yaml"):
        content = yaml.safe_load(file.read_text())
        content["policy"] = {"unnoised": "allow", "studies": [approved]}
        file.write_text(yaml.safe_dump(content))
    return study


def test_inline_twice_and_deployed_give_one_model(hospitals: Path, tmp_path: Path) -> None:
    first = inline(hospitals, tmp_path / "first")
    second = inline(hospitals, tmp_path / "second")
    assert distance(first, second) == 0

    study = load_study(hospitals, SETTINGS)
    deployed = tmp_path / "deployed"
    with hub_with(tmp_path / "hub", sorted((hospitals.parent / "sites").glob("*.yaml"))) as hub:
        log = hub.run(run_card(tmp_path / "card", study, deployed, "parity"), seconds=400)
    assert (deployed / "model" / "shared.safetensors").exists(), log
    assert distance(first, shared_model(deployed)) <= 1e-6

    assert distance(first, initial_groups(study)) > 1e-2
    summary = json.loads((tmp_path / "first" / "summary.json").read_text())
    assert summary["mean"]["auroc"] > 0.6
    assert summary["guarantee"] == "none"
    # Every hospital keeps its whole model: it predicts when the hub is gone.
    for file in sorted((hospitals.parent / "sites").glob("*.yaml")):
        state = file.parent / yaml.safe_load(file.read_text())["state"]
        out = tmp_path / f"{file.stem}.csv"
        assert (
            _run(["predict", str(state / "runs" / "parity"), "--site", str(file), "--out", str(out)], debug=True) == 0
        )
        assert out.read_text().count("\n") > 100
