"""Whole runs on ledgers that were put back, forked or shared: each is found out, by whoever remembers."""

from __future__ import annotations

import json
import re
import shutil
from collections import Counter
from pathlib import Path
from typing import Any

import pytest
from commandline import QUICK, done, edit, gapweave, hospitals, process, site_file, summary_of

from gapweave.client.participant import Participant
from gapweave.shared.privacy.ledger import read_ledger

SITES = ("alder", "birch")
ROUNDS = 3
STUDY = ("--rounds", str(ROUNDS), "--set", "training.local_steps=1")
PATIENCE = 300.0
"""Seconds in which two runs at once must end."""


@pytest.fixture
def study(tmp_path: Path) -> Path:
    written = hospitals(tmp_path / "demo", holds={"alder": ["labs"], "birch": ["labs"]}, patients=40)
    for name in SITES:
        edit(site_file(written, name), policy={"epsilon": 60.0})
    return written


@pytest.fixture
def anchored(study: Path, tmp_path: Path) -> Path:
    """The same hospitals, each with an anchor outside its state."""
    (tmp_path / "safe").mkdir()
    for name in SITES:
        edit(site_file(study, name), policy={"anchor": str(tmp_path / "safe" / f"{name}.json")})
    return study


def verify(state: Path) -> tuple[int, Any]:
    """What `privacy verify` says: its exit code, and whether the ledger is intact."""
    outcome = gapweave("privacy", "verify", state, "--json")
    return outcome.code, json.loads(outcome.out)["intact"]


def charged(state: Path) -> Counter[str]:
    return Counter(event.released for event in read_ledger(state).events())


class Stopped:
    """A run of three rounds that was stopped in the last one; the sites' state was copied in the round before."""

    def __init__(self, study: Path, folder: Path, monkeypatch: pytest.MonkeyPatch) -> None:
        self.run, self.state, self.copy = folder / "run", folder / "state", folder / "copy"
        trained = Participant.train

        def train(site: Participant, identity: str, number: int, *rest: Any) -> Any:
            if number == ROUNDS:
                raise KeyboardInterrupt
            if number == ROUNDS - 1 and not self.copy.exists():
                shutil.copytree(self.state, self.copy)
            return trained(site, identity, number, *rest)

        with monkeypatch.context() as patch:
            patch.setattr(Participant, "train", train)
            assert gapweave("simulate", study, "--out", self.run, "--state", self.state, *STUDY).code == 130

    def put_back(self, *names: str) -> None:
        """Replace sites' state by the older copy."""
        for name in names:
            shutil.rmtree(self.state / name)
            shutil.copytree(self.copy / name, self.state / name)


def entries(state: Path, name: str) -> int:
    return len(read_ledger(state / name).entries)


# An old copy.


def test_the_servers_echo_stops_a_resume_on_old_copies(
    study: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    stopped = Stopped(study, tmp_path, monkeypatch)
    stopped.put_back(*SITES)
    before = {name: entries(stopped.state, name) for name in SITES}
    outcome = gapweave("resume", stopped.run)
    assert outcome.code == 3
    found = re.findall(r"(\w+)/ledger.sqlite: the server has seen (\d+) entries, the ledger has (\d+)", outcome.error)
    assert {name: int(length) for name, _, length in found} == before
    assert all(int(seen) > int(length) for _, seen, length in found)
    assert {name: entries(stopped.state, name) for name in SITES} == before, "and nothing was written"
    assert "an old copy was restored" in outcome.error
    assert "gapweave site recover" in outcome.error


def test_one_site_on_an_old_copy_is_left_out_and_recovers(
    study: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    stopped = Stopped(study, tmp_path, monkeypatch)
    stopped.put_back("birch")
    assert gapweave("resume", stopped.run).code == 4, "one of two sites is below the quorum"
    edit(site_file(study, "birch"), state=str(stopped.state / "birch"))
    done("site", "recover", site_file(study, "birch"), "--assume-spent", "3")
    done("resume", stopped.run)
    summary = summary_of(stopped.run)
    assert {name: row["status"] for name, row in summary["sites"].items()} == dict.fromkeys(SITES, "ok")
    assert summary["sites"]["birch"]["privacy"]["epsilon"] >= summary["sites"]["alder"]["privacy"]["epsilon"]


def test_an_anchor_stops_any_run_on_an_old_copy(anchored: Path, tmp_path: Path) -> None:
    state, copy = tmp_path / "state", tmp_path / "copy"
    done("simulate", anchored, "--out", tmp_path / "one", "--state", state, *QUICK)
    assert verify(state / "alder") == (0, True)
    shutil.copytree(state, copy)
    done("simulate", anchored, "--out", tmp_path / "two", "--state", state, *QUICK)
    shutil.rmtree(state)
    copy.rename(state)
    assert verify(state / "alder") == (3, False)
    outcome = gapweave("simulate", anchored, "--out", tmp_path / "three", "--state", state, *QUICK)
    assert outcome.code == 3
    assert outcome.error.count("its anchor") == 2
    assert "an old copy was restored" in outcome.error


@pytest.mark.long
def test_with_neither_nobody_can_tell_and_verify_says_so(study: Path, tmp_path: Path) -> None:
    state, copy = tmp_path / "state", tmp_path / "copy"
    done("simulate", study, "--out", tmp_path / "one", "--state", state, *QUICK)
    shutil.copytree(state, copy)
    done("simulate", study, "--out", tmp_path / "two", "--state", state, *QUICK)
    shutil.rmtree(state)
    copy.rename(state)
    done("simulate", study, "--out", tmp_path / "three", "--state", state, *QUICK)
    assert verify(state / "alder") == (0, "unanchored")


@pytest.mark.long
def test_a_fork_of_both_sites_is_refused(anchored: Path, tmp_path: Path) -> None:
    """Two copies that are both used: whichever comes second has entries that the anchor has not seen."""
    one, other = tmp_path / "state", tmp_path / "fork"
    done("simulate", anchored, "--out", tmp_path / "one", "--state", one, *QUICK)
    shutil.copytree(one, other)
    done("simulate", anchored, "--out", tmp_path / "two", "--state", one, *QUICK)
    outcome = gapweave("simulate", anchored, "--out", tmp_path / "three", "--state", other, *QUICK)
    assert outcome.code == 3
    assert outcome.error.count("its anchor") == 2


# Two at once.


@pytest.mark.long
def test_two_runs_at_once_on_one_state_add_up(anchored: Path, tmp_path: Path) -> None:
    state = tmp_path / "state"
    runs = [process("simulate", anchored, "--out", tmp_path / f"run{at}", "--state", state, *STUDY) for at in (0, 1)]
    for at, run in enumerate(runs):
        _, errors = run.communicate(timeout=PATIENCE)
        assert run.returncode == 0, errors
        assert all(row["status"] == "ok" for row in summary_of(tmp_path / f"run{at}")["sites"].values())
    for name in SITES:
        assert charged(state / name) == {f"update of round {number}": 2 for number in range(1, ROUNDS + 1)}
        assert verify(state / name) == (0, True)
        kinds = Counter(entry.kind for entry in read_ledger(state / name).entries)
        assert (kinds["open"], kinds["reserve"], kinds["released"], kinds["close"]) == (1, 2, 2 * ROUNDS, 2)
