"""Parity: the same study gives the same global model in one process and over Flower's real parts."""

from __future__ import annotations

import json
import random
import signal
import subprocess
import threading
import time
from pathlib import Path
from typing import Any

import pytest
import yaml
from federation import distance, shared_model
from loopback import BIN, Hub, hub_with, run_card

from gapweave.server.aggregation import initial_groups
from gapweave.shared.cli import _run
from gapweave.shared.config import load_study
from gapweave.shared.privacy.ledger import read_ledger
from gapweave.shared.tensorfile import Arrays
from gapweave.sites.demo import write_demo

STARTING_S = 60
"""Until `flwr run` has started its processes."""
TROUBLED = {
    "privacy.enabled": False,
    "training.rounds": 6,
    "training.local_steps": 1,
    "aggregation.quorum": 1,
    "aggregation.deadline_s": 30,
}
SETTINGS = {
    "privacy.enabled": False,
    "training.rounds": 4,
    "training.local_steps": 20,
    "training.lr": 0.5,
    "sharing": "all",
}


def words(settings: dict[str, object]) -> list[str]:
    return [word for key, value in settings.items() for word in ("--set", f"{key}={json.dumps(value)}")]


def inline(study: Path, out: Path, settings: dict[str, object] = SETTINGS) -> Arrays:
    assert _run(["simulate", str(study), "--out", str(out), *words(settings)], debug=True) == 0
    return shared_model(out)


def federation(folder: Path, number: int, settings: dict[str, object]) -> Path:
    """Hospitals that approve the study and, for this test on synthetic data, training without noise."""
    study = write_demo(folder / "demo", hospitals=number, patients=300)
    approved = load_study(study, settings).sha256
    for file in (study.parent / "sites").glob("*.yaml"):
        content = yaml.safe_load(file.read_text())
        content["policy"] = {"unnoised": "allow", "studies": [approved]}
        file.write_text(yaml.safe_dump(content))
    return study


@pytest.fixture(scope="module")
def hospitals(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return federation(tmp_path_factory.mktemp("hospitals"), 2, SETTINGS)


@pytest.mark.long
@pytest.mark.federation
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


LONG = {**SETTINGS, "training.rounds": 2, "aggregation.server_optimizer": "adam", "aggregation.server_lr": 0.05}
"""Server Adam, all groups shared, and the default chain, which mixes and trims among five holders."""


def on_ray(study: Path, out: Path) -> Arrays:
    """In a process of its own, as a user starts it: Ray changes the process that it runs in."""
    command = [str(BIN / "gapweave"), "simulate", str(study), "--engine", "ray", "--out", str(out)]
    done = subprocess.run([*command, *words(LONG)], check=False, timeout=300, capture_output=True, text=True)
    assert done.returncode == 0, done.stderr
    return shared_model(out)


@pytest.mark.long
@pytest.mark.federation
def test_ctrl_c_ends_a_run_on_ray(tmp_path: Path) -> None:
    """Its round loop ran on in a thread of its own, and every further round was charged."""
    study, out = federation(tmp_path, 3, LONG), tmp_path / "ray"
    command = [str(BIN / "gapweave"), "simulate", str(study), "--engine", "ray", "--out", str(out), "--rounds", "500"]
    rounds = out / "rounds.jsonl"
    with subprocess.Popen([*command, "--set", "privacy.epsilon=8"], stderr=subprocess.PIPE, text=True) as running:
        deadline = time.monotonic() + 120
        while not (rounds.exists() and rounds.read_text().count("\n") >= 2):
            assert running.poll() is None, running.stderr and running.stderr.read()
            assert time.monotonic() < deadline
            time.sleep(0.1)
        running.send_signal(signal.SIGINT)
        before = rounds.read_text().count("\n")
        assert running.wait(timeout=60) == 130
    done = rounds.read_text().count("\n")
    assert done <= before + 2
    for ledger in (out / "sites").glob("*"):
        assert sum("round" in event.released for event in read_ledger(ledger).events()) <= done + 1


@pytest.mark.long
@pytest.mark.federation
def test_inline_ray_and_deployed_give_one_model(tmp_path: Path) -> None:
    study = federation(tmp_path, 5, LONG)
    first = inline(study, tmp_path / "inline", LONG)
    assert distance(first, initial_groups(load_study(study, LONG))) > 1e-2
    line = json.loads((tmp_path / "inline" / "rounds.jsonl").read_text().splitlines()[0])
    assert "nnm+trimmed_mean" in {group["rule"] for group in line["groups"].values()}
    assert distance(first, on_ray(study, tmp_path / "ray")) <= 1e-6
    assert json.loads((tmp_path / "ray" / "summary.json").read_text())["engine"] == "ray"
    deployed = tmp_path / "deployed"
    with hub_with(tmp_path / "hub", sorted((study.parent / "sites").glob("*.yaml"))) as hub:
        log = hub.run(run_card(tmp_path / "card", load_study(study, LONG), deployed, "parity"), seconds=500)
    assert (deployed / "model" / "shared.safetensors").exists(), log
    assert distance(first, shared_model(deployed)) <= 1e-6


def rounds_in(out: Path) -> list[dict[str, Any]]:
    """What rounds.jsonl holds; before the first round, one line without sites."""
    file = out / "rounds.jsonl"
    lines = file.read_text().splitlines(keepends=True) if file.exists() else []
    return [json.loads(line) for line in lines if line.endswith("\n")] or [{"sites": {}}]


@pytest.mark.long
@pytest.mark.federation
def test_sites_that_are_killed_stalled_and_slow_do_not_hold_up_a_run(tmp_path: Path) -> None:
    study = federation(tmp_path, 4, TROUBLED)
    plan, out = load_study(study, TROUBLED), tmp_path / "run"
    chance, over = random.Random(0), threading.Event()

    def trouble(hub: Hub) -> None:
        """One site dies, one is stalled for more than a round, one is slow now and then; the fourth is left alone."""
        while len(rounds_in(out)[-1]["sites"]) < len(sites):
            if over.wait(0.1):
                return
        hub.signal("birch", "KILL")
        hub.signal("cedar", "STOP")
        stalled = time.monotonic()
        while not over.wait(chance.uniform(0.5, 3)):
            hub.signal("elm", "STOP")
            over.wait(chance.uniform(0.5, 3))
            hub.signal("elm", "CONT")
            if time.monotonic() - stalled > 1.5 * plan.aggregation.deadline_s:
                hub.signal("cedar", "CONT")

    sites = sorted((study.parent / "sites").glob("*.yaml"))
    with hub_with(tmp_path / "hub", sites) as hub:
        thread = threading.Thread(target=trouble, args=(hub,))
        thread.start()
        begun = time.monotonic()
        try:
            log = hub.run(run_card(tmp_path / "card", plan, out, "trouble"), seconds=600)
        finally:
            over.set()
            thread.join()
    seconds = time.monotonic() - begun
    assert (out / "model" / "shared.safetensors").exists(), log
    lines = rounds_in(out)
    assert [line["round"] for line in lines] == list(range(1, plan.training.rounds + 1))
    # The handshake, the rounds and the last message each wait for the deadline at most.
    assert seconds < (plan.training.rounds + 2) * plan.aggregation.deadline_s + STARTING_S
    assert all(line["sites"]["alder"]["status"] == "ok" for line in lines)
    missing = [(site, entry) for line in lines for site, entry in line["sites"].items() if entry["status"] != "ok"]
    assert {"birch", "cedar"} <= {site for site, _ in missing}
    assert all(entry["status"] in ("late", "failed") and entry["reason"] for _, entry in missing), missing
    report = (out / "report.html").read_text()
    assert "no answer before the deadline" in report
    assert "birch" in report
