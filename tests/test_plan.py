"""`gapweave privacy plan`: what a site would do, what that costs, and what else could be done."""

from __future__ import annotations

import json
from pathlib import Path

import pytest
from commandline import done, edit, gapweave

from gapweave.shared.config.study import load_study
from gapweave.shared.privacy.accountant import epsilon
from gapweave.shared.privacy.events import PrivacyEvent
from gapweave.shared.privacy.plan import make_plan
from gapweave.shared.privacy.plan_report import noise, plan_report
from gapweave.shared.report.wording import left_figure


@pytest.fixture
def study(tmp_path: Path) -> Path:
    """The template's study: 30 rounds of 5 steps, batches of 64, epsilon 8."""
    file = tmp_path / "study.yaml"
    done("study", "init", file)
    return file


def planned(study: Path, *words: object) -> dict:
    return json.loads(done("privacy", "plan", study, "--json", *words).out)


def test_the_plan_is_the_one_that_a_site_makes(study: Path) -> None:
    found, of = planned(study, "--patients", 640), load_study(study)
    plan = make_plan(of, 640, of.privacy.delta)
    assert (found["sigma"], found["epsilon"], found["delta"]) == (plan.noise_multiplier, plan.epsilon, 1e-5)
    assert (found["steps"], found["sample_rate"], found["batch"], found["rounds"]) == (150, 0.1, 64, 30)
    assert found.keys() >= {"sigma", "steps", "sample_rate", "epsilon", "delta", "releases", "alternatives"}


def test_its_releases_recompute_to_its_epsilon(study: Path) -> None:
    edit(study, training={"finetune": True, "finetune_steps": 7})
    found = planned(study, "--patients", 900)
    assert found["steps"] == 157
    assert sum(line["releases"] for line in found["releases"]) == 31, "30 rounds and fine-tuning"
    events = [
        PrivacyEvent(
            released="",
            **{key: line[key] for key in ("kind", "noise_multiplier", "sample_rate", "max_grad_norm", "steps")},
        )
        for line in found["releases"]
    ]
    assert epsilon(events, found["delta"]) == found["epsilon"]


def test_options_stand_in_for_the_study(study: Path) -> None:
    found = planned(study, "--patients", 2000, "--epsilon", 3, "--rounds", 10, "--delta", "1e-6")
    assert (found["steps"], found["delta"]) == (50, 1e-6)
    assert 2.9 < found["epsilon"] <= 3


def test_the_noise_is_sigma_times_the_clip_over_the_expected_batch(study: Path) -> None:
    edit(study, privacy={"max_grad_norm": 0.5})
    found = planned(study, "--patients", 640)
    assert found["noise"] == pytest.approx(found["sigma"] * 0.5 / 64)


def test_alternatives_keep_the_target_with_less_noise(study: Path) -> None:
    found = planned(study, "--patients", 640)
    others = {other["change"]: other for other in found["alternatives"]}
    assert list(others) == ["half the rounds", "twice the batch", "full batch"]
    assert (others["half the rounds"]["rounds"], others["half the rounds"]["steps"]) == (15, 75)
    assert others["twice the batch"]["sample_rate"] == 0.2
    assert others["full batch"]["sample_rate"] == 1
    for other in others.values():
        assert 0.97 * 8 < other["epsilon"] <= 8
        assert other["noise"] < found["noise"]


def test_alternatives_that_change_nothing_are_left_out(study: Path) -> None:
    assert planned(study, "--patients", 60, "--rounds", 1)["alternatives"] == []
    assert [other["change"] for other in planned(study, "--patients", 100)["alternatives"]] == [
        "half the rounds",
        "full batch",
    ]


def test_alternatives_that_cannot_reach_the_target_are_left_out(study: Path) -> None:
    found = planned(study, "--patients", 640, "--epsilon", 0.005)
    assert found["epsilon"] <= 0.005
    assert [other["change"] for other in found["alternatives"]] == ["half the rounds"]


@pytest.mark.parametrize(("patients", "target", "warned"), [(500, 8, True), (90_000, 8, False), (90_000, 1, True)])
def test_too_few_patients_are_said_plainly(study: Path, patients: int, target: float, warned: bool) -> None:
    edit(study, training={"batch": 90_000})
    found = planned(study, "--patients", patients, "--epsilon", target, "--cap", 20)
    assert ("cannot be expected to help" in " ".join(found["warnings"])) is warned


def test_a_cap_below_the_plan_ends_it_early(study: Path) -> None:
    found = planned(study, "--patients", 2000, "--cap", 5)
    allowed = found["rounds_allowed"]
    assert 0 < allowed < 30
    assert f"room for {allowed} of the 30 rounds" in found["warnings"][0]
    plan = plan_report(load_study(study), 2000, 5).plan
    assert epsilon([plan.event("", 5 * allowed)], plan.delta) <= 5
    assert epsilon([plan.event("", 5 * (allowed + 1))], plan.delta) > 5
    (only_study, outlook) = planned(study, "--patients", 2000, "--cap", 8)["warnings"]
    assert "only as a site's first" in only_study
    assert planned(study, "--patients", 2000, "--cap", 12)["warnings"] == [outlook]


def test_a_delta_that_no_site_has_is_not_planned_with(study: Path) -> None:
    usual = planned(study, "--patients", 300)
    edit(study, privacy={"delta": 0.5})
    found = planned(study, "--patients", 300)
    assert (found["delta"], found["sigma"]) == (usual["delta"], usual["sigma"]) == (1e-5, found["sigma"])
    assert found["warnings"][0] == "The study's delta of 0.5 is not used: a site's smaller one wins."
    assert planned(study, "--patients", 300, "--delta", 1e-3)["delta"] == 1e-3, "asked for"
    assert "warning  delta: sites plan with their own delta, 1e-05 or less" in done("study", "check", study).out


def test_the_text_says_the_same_in_eighty_columns(study: Path) -> None:
    out = done("privacy", "plan", study, "--patients", 300, "--cap", 9).out
    figures = plan_report(load_study(study), 300, 9)
    assert max(map(len, out.splitlines())) <= 80
    for text in (
        f"sigma          {figures.plan.noise_multiplier:.4g} ",
        f"({figures.plan.epsilon / 9:.1%} of a cap of 9)",
        f"noise of sd {noise(figures.plan):.3g}",
        f"({left_figure(9 - figures.epsilon_filter)} left of the cap)",
        "full batch",
        "cannot be expected to help",
    ):
        assert text in " ".join(out.split("\n"))


@pytest.mark.parametrize(
    ("words", "text"),
    [
        (["--patients", 0], "--patients"),
        ([], "--patients"),
        (["--patients", 300, "--epsilon", -1], "'--epsilon'"),
        (["--patients", 300, "--rounds", 0], "'--rounds'"),
        (["--patients", 300, "--delta", 1], "'--delta'"),
        (["--patients", 300, "--cap", 0], "has room for nothing"),
        (["--patients", 64, "--epsilon", "1e-6"], "cannot be reached with 150 steps"),
    ],
)
def test_what_cannot_be_planned_is_one_line_and_exit_2(study: Path, words: list[object], text: str) -> None:
    outcome = gapweave("privacy", "plan", study, *words)
    assert outcome.code == 2
    assert text in outcome.error


def test_a_study_without_privacy_has_nothing_to_plan(study: Path) -> None:
    edit(study, privacy={"enabled": False})
    outcome = gapweave("privacy", "plan", study, "--patients", 300)
    assert outcome.code == 2
    assert "privacy.enabled" in outcome.error


def test_a_missing_study_is_named(tmp_path: Path) -> None:
    outcome = gapweave("privacy", "plan", tmp_path / "none.yaml", "--patients", 300)
    assert outcome.code == 2
    assert "none.yaml" in outcome.error
