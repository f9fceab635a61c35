"""A run that is killed or interrupted goes on: nothing is spent twice, nothing is forgotten, the model is the same."""

from __future__ import annotations

import json
import os
import random
import shutil
import signal
import sqlite3
import subprocess
import time
from collections.abc import Callable
from contextlib import closing
from pathlib import Path
from typing import Any

import pytest
import yaml
from commandline import OPEN, done, edit, gapweave, hospitals, process, rounds_of, site_file, summary_of

from gapweave.client.participant import Participant
from gapweave.shared.files import alone
from gapweave.shared.privacy.ledger import LedgerView, read_ledger

SITES = ("alder", "birch", "cedar")
ROUNDS = 4
STUDY = ("--rounds", str(ROUNDS), "--set", "training.local_steps=8", "--set", "training.momentum=0.9")
PATIENCE = 300.0
"""Seconds in which a run must reach a point."""


@pytest.fixture(scope="module")
def study(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return hospitals(tmp_path_factory.mktemp("hospitals") / "demo")


@pytest.fixture(scope="module")
def private(study: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A private run that nobody disturbed."""
    out = tmp_path_factory.mktemp("private") / "run"
    done("simulate", study, "--out", out, *STUDY)
    return out


def spent(run: Path) -> dict[str, float]:
    return {name: row["privacy"]["epsilon"] for name, row in summary_of(run)["sites"].items()}


def entries(run: Path, site: str, kind: str) -> int:
    """Entries of one kind in a site's ledger, which may not be there yet."""
    file = run / "sites" / site / "ledger.sqlite"
    try:
        with closing(sqlite3.connect(f"file:{file}?mode=ro", uri=True)) as connection:
            return int(connection.execute("SELECT count(*) FROM entries WHERE kind = ?", (kind,)).fetchone()[0])
    except sqlite3.OperationalError:
        return 0


def lines(run: Path) -> int:
    file = run / "rounds.jsonl"
    return file.read_bytes().count(b"\n") if file.exists() else 0


def stop(child: subprocess.Popen[str], when: Callable[[], bool], how: signal.Signals) -> bool:
    """Send a signal as soon as the run is at a point.

    Returns:
        Whether it was reached before the run ended.
    """
    deadline = time.monotonic() + PATIENCE
    while child.poll() is None and not when():
        assert time.monotonic() < deadline, "the run does not get there"
        time.sleep(0.001)
    reached = child.poll() is None
    if reached:
        os.kill(child.pid, how)
    child.communicate(timeout=PATIENCE)
    return reached


def check_ledgers(run: Path, undisturbed: Path, kills: int) -> None:
    """Every round is charged, once and once more at most for each kill after the first; the chain holds."""
    assert {name: row["status"] for name, row in summary_of(run)["sites"].items()} == dict.fromkeys(SITES, "ok")
    assert [line["round"] for line in rounds_of(run)] == list(range(1, ROUNDS + 1))
    least = spent(undisturbed)
    for name in SITES:
        view = read_ledger(run / "sites" / name)
        assert view.intact
        assert spent(run)[name] >= least[name]
        released = [event.released for event in view.events()]
        assert set(released) == {f"update of round {number}" for number in range(1, ROUNDS + 1)}
        assert len(released) <= ROUNDS + max(0, kills - 1)
        assert answered(view) == {entry.body["request"] for entry in view.entries if entry.kind == "charge"}
        if kills == 1:
            assert spent(run)[name] == least[name]


def answered(view: LedgerView) -> set[str]:
    return {entry.body["request"] for entry in view.entries if entry.kind == "released"}


POINTS: dict[str, Callable[[Path], bool]] = {
    "while the second site trains": lambda run: entries(run, "birch", "charge") == 2,
}
RARE_POINTS: dict[str, Callable[[Path], bool]] = {
    "between two rounds": lambda run: lines(run) == 2,
    "before the first round": lambda run: entries(run, "alder", "reserve") == 1,
    "while the first site trains": lambda run: entries(run, "alder", "charge") == 1,
    "after the last site's charge": lambda run: entries(run, "cedar", "charge") == ROUNDS,
    "after the last round": lambda run: lines(run) == ROUNDS,
    "while models are kept": lambda run: any(run.glob("sites/*/runs/*/model.safetensors")),
    "after the study was written": lambda run: (run / "checkpoint" / "simulation.json").exists(),
}


def kill_and_resume(study: Path, private: Path, run: Path, point: Callable[[Path], bool]) -> None:
    reached = stop(process("simulate", study, "--out", run, *STUDY), lambda: point(run), signal.SIGKILL)
    assert reached
    assert not (run / "summary.json").exists()
    done("resume", run)
    check_ledgers(run, private, kills=1)
    assert (run / "report.html").exists()


@pytest.mark.parametrize("point", POINTS)
def test_killed_and_resumed(study: Path, private: Path, tmp_path: Path, point: str) -> None:
    kill_and_resume(study, private, tmp_path / "run", POINTS[point])


@pytest.mark.long
@pytest.mark.parametrize("point", RARE_POINTS)
def test_killed_and_resumed_elsewhere(study: Path, private: Path, tmp_path: Path, point: str) -> None:
    kill_and_resume(study, private, tmp_path / "run", RARE_POINTS[point])


@pytest.mark.long
@pytest.mark.parametrize("repetition", range(4))
def test_killed_again_and_again_at_random(study: Path, private: Path, tmp_path: Path, repetition: int) -> None:
    run, chance, kills = tmp_path / "run", random.Random(repetition), 0
    child = process("simulate", study, "--out", run, *STUDY)
    for _ in range(3):
        goal, delay = written(run) + chance.randrange(1, 12), chance.random() / 5

        def there(goal: int = goal, delay: float = delay) -> bool:
            return written(run) >= goal and not time.sleep(delay)

        kills += stop(child, there, signal.SIGKILL)
        if (run / "summary.json").exists():
            break
        child = process("resume", run)
    child.communicate(timeout=PATIENCE)
    assert child.returncode == 0
    check_ledgers(run, private, kills)


def written(run: Path) -> int:
    """Charges, reservations, recomputations and releases in all ledgers."""
    return sum(entries(run, name, kind) for name in SITES for kind in ("reserve", "charge", "recompute", "released"))


@pytest.mark.long
def test_killed_twice_in_one_round_is_charged_again(study: Path, private: Path, tmp_path: Path) -> None:
    """Noise drawn twice is a second release: only one crash may be taken for no release."""
    run = tmp_path / "run"
    start = process("simulate", study, "--out", run, *STUDY)
    assert stop(start, lambda: entries(run, "alder", "charge") == 2, signal.SIGKILL)
    assert stop(process("resume", run), lambda: entries(run, "alder", "recompute") == 1, signal.SIGKILL)
    done("resume", run)
    check_ledgers(run, private, kills=2)
    assert spent(run)["alder"] > spent(private)["alder"]
    assert spent(run)["birch"] == spent(private)["birch"]


@pytest.fixture(scope="module")
def without_noise(study: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    out = tmp_path_factory.mktemp("open") / "run"
    done("simulate", study, "--out", out, *STUDY, *OPEN)
    return out


@pytest.mark.parametrize(
    ("how", "code"),
    [
        (signal.SIGINT, 130),
        pytest.param(signal.SIGKILL, -signal.SIGKILL, marks=pytest.mark.long),
    ],
)
def test_an_open_run_resumes_to_the_same_model(
    study: Path, without_noise: Path, tmp_path: Path, how: signal.Signals, code: int
) -> None:
    run = tmp_path / "run"
    child = process("simulate", study, "--out", run, *STUDY, *OPEN)
    assert stop(child, lambda: entries(run, "birch", "charge") == 3, how)
    assert child.returncode == code
    done("resume", run)
    for pattern in ("model/shared.safetensors", "sites/*/runs/*/model.safetensors"):
        resumed, undisturbed = ([file.read_bytes() for file in sorted(of.glob(pattern))] for of in (run, without_noise))
        assert resumed == undisturbed
    one, other = summary_of(run), summary_of(without_noise)
    for name in SITES:
        assert one["sites"][name]["metrics"] == other["sites"][name]["metrics"]
    assert (one["bytes_up"], one["bytes_down"]) == (other["bytes_up"], other["bytes_down"])
    curves = [(of / "curve.jsonl").read_text(encoding="utf-8") for of in (run, without_noise)]
    assert curves[0] == curves[1]


def test_interrupting_says_how_to_go_on(study: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    run, trained = tmp_path / "run", Participant.train

    def interrupted(self: Participant, identity: str, number: int, *rest: Any) -> Any:
        if number == 2:
            raise KeyboardInterrupt
        return trained(self, identity, number, *rest)

    with monkeypatch.context() as patch:
        patch.setattr(Participant, "train", interrupted)
        outcome = gapweave("simulate", study, "--out", run, *STUDY, *OPEN)
    assert outcome.code == 130
    assert f"`gapweave resume {run}` goes on" in outcome.err
    assert "Traceback" not in outcome.err
    moved = tmp_path / "elsewhere"
    run.rename(moved)
    done("resume", moved)
    assert not run.exists()
    assert [event.kind for event in read_ledger(moved / "sites" / "alder").events()] == ["unnoised"] * ROUNDS


def test_a_finished_run_is_not_resumed(private: Path) -> None:
    before = {file: file.stat().st_mtime_ns for file in private.rglob("*") if file.is_file()}
    outcome = gapweave("resume", private)
    assert outcome.code == 2
    assert "this run is done" in outcome.error
    assert {file: file.stat().st_mtime_ns for file in private.rglob("*") if file.is_file()} == before


def test_what_is_no_run_is_not_resumed(study: Path, tmp_path: Path) -> None:
    for path in (tmp_path, tmp_path / "nothing", study):
        outcome = gapweave("resume", path)
        assert outcome.code == 2
        assert "no run directory" in outcome.error
    outcome = gapweave("resume", study.parent)
    assert outcome.code == 2
    assert "not simulated here" in outcome.error


def test_a_changed_study_is_not_resumed(study: Path, private: Path, tmp_path: Path) -> None:
    run = tmp_path / "run"
    shutil.copytree(private, run)
    (run / "summary.json").unlink()
    edit(run / "study.yaml", training={"rounds": 9})
    outcome = gapweave("resume", run)
    assert outcome.code == 2
    assert "another study" in outcome.error


def test_a_run_whose_data_changed_is_not_resumed(study: Path, private: Path, tmp_path: Path) -> None:
    """Columns that were swapped, another extract, another split: the rest was trained on it without a word."""
    run, site = shutil.copytree(private, tmp_path / "run"), study.parent / "sites" / "birch.yaml"
    (run / "summary.json").unlink()
    before = site.read_text(encoding="utf-8")
    content = yaml.safe_load(before)
    (first, one), (second, other), *_ = content["data"]["labs"]["columns"].items()
    content["data"]["labs"]["columns"] |= {first: other, second: one}
    site.write_text(yaml.safe_dump(content), encoding="utf-8")
    try:
        outcome = gapweave("resume", run)
        assert outcome.code == 6
        assert "the data or the site file of birch changed since the run began" in outcome.error
    finally:
        site.write_text(before, encoding="utf-8")
    done("resume", run)


def test_a_run_that_goes_on_elsewhere_is_not_resumed(private: Path, tmp_path: Path) -> None:
    """Two that resumed it wrote each round twice."""
    run = shutil.copytree(private, tmp_path / "run")
    (run / "summary.json").unlink()
    with alone(run):
        outcome = gapweave("resume", run)
    assert outcome.code == 2
    assert "another process works in this folder" in outcome.error
    done("resume", run)


def test_a_run_without_its_data_waits_for_them(study: Path, private: Path, tmp_path: Path) -> None:
    run, copy = tmp_path / "run", tmp_path / "demo"
    shutil.copytree(private, run)
    shutil.copytree(study.parent, copy)
    (run / "summary.json").unlink()
    setup = json.loads((run / "checkpoint" / "simulation.json").read_text(encoding="utf-8"))
    setup["sites"] = [str(site_file(copy / study.name, name)) for name in SITES]
    (run / "checkpoint" / "simulation.json").write_text(json.dumps(setup), encoding="utf-8")
    labs = copy / "data" / "alder" / "labs.csv"
    labs.rename(labs.with_suffix(".away"))
    assert gapweave("resume", run).code == 6
    labs.with_suffix(".away").rename(labs)
    done("resume", run)
    assert spent(run) == spent(private)


@pytest.mark.long
def test_fine_tuning_survives_a_kill(study: Path, tmp_path: Path) -> None:
    """It was believed that a cap of exactly the target suffices: the resumed run counted the fine-tuning twice."""
    copy = tmp_path / "demo"
    shutil.copytree(study.parent, copy)
    for name in SITES:
        edit(site_file(copy / study.name, name), policy={"epsilon": 8.0})
    run = tmp_path / "run"
    settings = ("--set", "training.finetune=true", "--set", "training.finetune_steps=40")
    child = process("simulate", copy / study.name, "--out", run, *STUDY, *settings)
    assert stop(child, lambda: entries(run, "birch", "charge") == ROUNDS + 1, signal.SIGKILL)
    done("resume", run)
    for row in summary_of(run)["sites"].values():
        assert row["fine_tuned"] is not None
        assert 0 < row["privacy"]["epsilon"] <= 8
