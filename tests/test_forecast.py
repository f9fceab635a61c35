"""What training takes of a machine, before a run: the arithmetic by hand, and what is said of it."""

from __future__ import annotations

import itertools
from pathlib import Path

import pytest
from commandline import done, edit, hospitals
from hospitals import plan_of

from gapweave.client import forecast as module
from gapweave.client.forecast import forecast
from gapweave.shared.errors import UsageError


@pytest.fixture
def slow_clock(monkeypatch: pytest.MonkeyPatch) -> None:
    """Between two looks at the clock 3 seconds pass: no second step is taken."""
    monkeypatch.setattr(module.time, "perf_counter", itertools.count(0, 3).__next__)


@pytest.mark.usefixtures("slow_clock")
def test_all_steps_count(monkeypatch: pytest.MonkeyPatch) -> None:
    of = plan_of(private=True, training={"rounds": 7, "local_steps": 2, "batch": 10, "finetune": True})
    assert forecast(of, 100).seconds == 3 * (7 * 2 + of.training.finetune_steps)
    assert forecast(plan_of(private=False, training={"rounds": 4, "schedule": "fedsgd"}), 100).seconds == 3 * 4
    monkeypatch.setattr(module, "MOST_NUMBERS", 0)
    assert forecast(of, 100).seconds == 3 * (7 * 2 + of.training.finetune_steps) * 10, "one of ten patients was tried"


def test_a_hundred_times_the_rounds_take_longer() -> None:
    of = plan_of(private=True, training={"rounds": 10, "local_steps": 5, "batch": 50})
    few, many = forecast(of, 200), forecast(plan_of(private=True, training={"rounds": 1000, "local_steps": 5}), 200)
    assert 0 < few.seconds < 10
    assert many.seconds > 10 * few.seconds
    assert 100e6 < few.memory < 5e9
    assert few.device in ("CPU", "CUDA")


def test_study_check_foretells_time_memory_and_bytes(tmp_path: Path) -> None:
    study = hospitals(tmp_path / "demo")
    lines = done("study", "check", study).out.splitlines()
    (cost,) = [line for line in lines if line.startswith("ok       cost: ")]
    assert "second" in cost
    assert " MB of memory" in cost
    assert any("MB in all" in line for line in lines)


def test_a_target_that_no_noise_reaches_has_no_cost(tmp_path: Path) -> None:
    with pytest.raises(UsageError):
        forecast(plan_of(private=True, privacy={"epsilon": 1e-6}), 100)
    study = hospitals(tmp_path / "demo")
    for file in study.parent.glob("sites/*.yaml"):
        edit(file, patients={"declared": None})
    assert "cost: " not in done("study", "check", study, "--set", "epsilon=1e-6").out
