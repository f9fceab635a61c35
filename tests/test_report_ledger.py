"""What the privacy report says of a ledger, against what really ran."""

from __future__ import annotations

import re
from pathlib import Path
from typing import Any

import pytest
from hospitals import build, participant, plan_of
from scipy.optimize import brentq
from test_participant import RUN, train

from gapweave.client.budget import Budget
from gapweave.client.ledger import Ledger
from gapweave.client.setting import policy_hash
from gapweave.shared import __version__
from gapweave.shared.config.base import parse
from gapweave.shared.config.site import Site
from gapweave.shared.privacy.accountant import epsilon, renyi_epsilon
from gapweave.shared.privacy.events import PrivacyEvent
from gapweave.shared.privacy.ledger import LedgerView, read_ledger
from gapweave.shared.privacy.precision import numerical_epsilon
from gapweave.shared.privacy.room import further_epsilon
from gapweave.shared.report.ledger_page import ledger_page
from gapweave.shared.report.ledger_report import UNKNOWN_PARAMETERS, ledger_facts
from gapweave.shared.report.ledger_text import ledger_lines, left_figure

SITE: dict[str, Any] = {
    "version": 1,
    "name": "north",
    "data": {
        "records": {"file": "r.csv", "id": "id", "patient": "p", "label": {"died": "died"}},
        "labs": {"file": "l.csv", "columns": {"na": "na"}},
    },
}
STUDY = "a" * 64
SETTING = {
    "modalities": ["labs"],
    "shared": ["fusion"],
    "kept": ["encoder/labs"],
    "parameters": 500,
    "parameters_shared": 100,
    "gapweave_version": "0.1.0",
    "policy": "f" * 64,
}


def opened(folder: Path, cap: float = 10.0, anchor: Path | None = None) -> Ledger:
    return Ledger(folder, parse(Site, {**SITE, "policy": {"epsilon": cap}}, "site.yaml"), anchor)


def update(number: int, sigma: float = 1.3) -> PrivacyEvent:
    fields: dict[str, Any] = {"noise_multiplier": sigma, "sample_rate": 0.1, "steps": 5, "n_hat": 640}
    return PrivacyEvent(kind="dp_sgd", released=f"update of round {number}", **fields)


def run(ledger: Ledger, rounds: int, planned: int, setting: dict[str, Any] | None = None) -> None:
    """One run of a study: all planned rounds reserved, some of them charged, released, and not closed."""
    ledger.approve(STUDY, "sepsis", "officer")
    ledger.reserve("run", STUDY, [update(number) for number in range(1, planned + 1)], setting)
    for number in range(1, rounds + 1):
        ledger.charge("run", STUDY, f"request-{number}", update(number))
        ledger.released(f"request-{number}")


def full_batch(target: float, delta: float) -> PrivacyEvent:
    """One Gaussian release over all patients of this epsilon."""

    def event(sigma: float) -> PrivacyEvent:
        return PrivacyEvent(kind="noisy_statistic", released="all", noise_multiplier=sigma)

    return event(float(brentq(lambda sigma: epsilon([event(sigma)], delta) - target, 0.1, 100.0, xtol=1e-9)))


def test_the_ledger_says_what_left_what_stayed_and_under_which_limits(tmp_path: Path) -> None:
    site = participant(build(tmp_path / "a", "north", ["labs", "note"]), plan_of(private=True))
    site.prepare(RUN)
    reply, trained = train(site).reply, site.initial
    setting = next(entry.body["setting"] for entry in read_ledger(site.state).entries if entry.kind == "reserve")
    assert setting["modalities"] == ["labs", "note"]
    assert sorted(setting["shared"]) == sorted(reply)
    assert sorted(setting["kept"] + setting["shared"]) == sorted(trained)
    assert setting["parameters_shared"] == sum(value.size for part in reply.values() for value in part.values())
    assert setting["parameters"] == sum(value.numel() for part in trained.values() for value in part.values())
    assert setting["gapweave_version"] == __version__


def test_another_limit_is_another_policy_hash(tmp_path: Path) -> None:
    site = build(tmp_path / "a", "north").site
    others = [
        site.model_copy(update={"policy": site.policy.model_copy(update={"epsilon": 3.0})}),
        site.model_copy(update={"patients": site.patients.model_copy(update={"max_records": 2})}),
    ]
    assert len({policy_hash(each) for each in (site, *others)}) == 3
    assert policy_hash(site) == policy_hash(site.model_copy(update={"cohort": "another"}))


@pytest.mark.parametrize(("rounds", "planned"), [(4, 4), (8, 20)])
def test_a_study_of_what_is_left_fits_and_a_larger_one_does_not(tmp_path: Path, rounds: int, planned: int) -> None:
    """The cap less what is spent would be too much or too little: the filter starts at a constant, paid once."""
    with opened(tmp_path / "north") as ledger:
        run(ledger, rounds, planned)
        left = further_epsilon(ledger.view)
        assert left is not None
        assert left > 10 - ledger.view.bound() + 1 or planned > rounds
        assert Budget(ledger.view).allows([full_batch(0.99 * left, ledger.view.delta)])
        assert not Budget(ledger.view).allows([full_batch(1.01 * left, ledger.view.delta)])


def test_what_is_reserved_is_not_left(tmp_path: Path) -> None:
    lefts = []
    for planned in (4, 20):
        with opened(tmp_path / str(planned)) as ledger:
            run(ledger, 4, planned)
            lefts.append(further_epsilon(ledger.view))
    assert lefts[1] < lefts[0] - 1


def test_the_ends_of_what_is_left(tmp_path: Path) -> None:
    with opened(tmp_path / "north", cap=8.0) as ledger:
        assert further_epsilon(ledger.view) == 8.0, "a first study may use the exact figure, up to the cap"
        run(ledger, 4, 4)
    with opened(tmp_path / "north", cap=2.0) as ledger:
        assert further_epsilon(ledger.view) == 0.0, "the hospital lowered its cap below what is spent"
        unnoised = PrivacyEvent(kind="unnoised", released="update of round 9", noise_multiplier=0.0)
        ledger.charge("other", "b" * 64, "request-u", unnoised)
        assert further_epsilon(ledger.view) is None


def test_a_first_study_granted_by_the_exact_figure_is_planned_by_it_too(tmp_path: Path) -> None:
    schedule = [update(number, sigma=1.1) for number in range(1, 26)]
    exact = epsilon(schedule, 1e-5)
    with opened(tmp_path / "north", cap=exact + 0.05) as ledger:
        assert ledger.reserve("run", STUDY, schedule) == len(schedule)
        ledger.charge("run", STUDY, "request-1", schedule[0])
        facts = ledger_facts(ledger.view)
        assert Budget(ledger.view).with_more([]) > ledger.view.opening["cap"], "or the filter granted it"
    assert facts.reserved_filter == pytest.approx(exact, abs=0.02)
    assert facts.left == 0.0
    assert "no further study fits" in "\n".join(ledger_lines(facts))


def test_anyone_can_recompute_both_figures_from_the_mechanisms(tmp_path: Path) -> None:
    with opened(tmp_path / "north") as ledger:
        run(ledger, 6, 6)
        ledger.charge(
            "other", "b" * 64, "request-c", PrivacyEvent(kind="count_table", released="x", noise_multiplier=9)
        )
        facts = ledger_facts(ledger.view)
    keys = ("kind", "steps", "noise_multiplier", "sample_rate")
    listed = [
        PrivacyEvent(released="", **{key: getattr(release, key) for key in keys})
        for study in facts.studies
        for release in study.releases
    ]
    assert facts.summary["epsilon"] == epsilon(listed, facts.summary["delta"])
    recomputed = renyi_epsilon(listed, facts.summary["delta"], facts.filter_order)
    assert facts.summary["epsilon_filter"] == pytest.approx(recomputed, rel=1e-12)
    assert facts.studies[-1].cumulative_filter == facts.summary["epsilon_filter"]


@pytest.mark.parametrize(("setting", "parameters"), [(SETTING, 500), (None, UNKNOWN_PARAMETERS)])
def test_finite_precision_counts_every_noised_number(
    tmp_path: Path, setting: dict[str, Any] | None, parameters: int
) -> None:
    with opened(tmp_path / "north") as ledger:
        run(ledger, 3, 6, setting)
        facts = ledger_facts(ledger.view)
    added = numerical_epsilon(parameters, 3 * 5)
    assert (facts.precision.epsilon, facts.precision.delta) == (added.epsilon, added.delta)
    assert facts.precision.assumed == (setting is None)
    assert ("10,000,000 trained numbers" in re.sub(r"\s+", " ", "\n".join(ledger_lines(facts)))) == (setting is None)


def test_only_what_left_is_counted_as_sent(tmp_path: Path) -> None:
    """A crash may leave a charge without a release; fine-tuning stays; a table is as long as its cells."""
    with opened(tmp_path / "north") as ledger:
        run(ledger, 3, 6, SETTING)
        ledger.charge("run", STUDY, "request-4", update(4))
        ledger.charge("run", STUDY, "request-f", PrivacyEvent(**{**update(1).to_dict(), "released": "fine-tuning"}))
        table = PrivacyEvent(kind="count_table", released="scores of the test patients", noise_multiplier=9.0)
        ledger.charge("run", STUDY, "request-t", table)
        ledger.keep("request-t", [1.0] * 40)
        ledger.released("request-t")
        facts = ledger_facts(ledger.view)
    figures = {release.what.split(";")[0]: release for release in facts.studies[0].releases}
    updates, tuned = figures["updates of shared model parameters"], figures["fine-tuning"]
    assert (updates.times, updates.sent, updates.bytes) == (4, 3, 3 * 4 * 100)
    assert (tuned.times, tuned.sent, tuned.bytes) == (1, 0, 0)
    assert figures["tables of scores of the test patients, noised"].bytes == 40 * 8
    out = ledger_page(facts).split("What left the site")[1].split("What is not covered")[0]
    assert "fine-tuning" not in out


def test_a_ledger_of_an_older_version_says_what_it_does_not_know(tmp_path: Path) -> None:
    with opened(tmp_path / "north") as ledger:
        run(ledger, 3, 6)
        facts = ledger_facts(ledger.view)
    assert facts.studies[0].setting is None
    assert facts.studies[0].releases[0].bytes is None
    assert "not recorded by the version that ran it" in ledger_page(facts)


def test_lost_entries_are_named_and_are_part_of_both_figures(tmp_path: Path) -> None:
    with opened(tmp_path / "north") as ledger:
        run(ledger, 3, 3)
        before = ledger_facts(ledger.view)
        ledger.recover(1.5, [])
        facts = ledger_facts(ledger.view)
    for key in ("epsilon", "epsilon_filter"):
        assert facts.summary[key] > before.summary[key] + 1.5
    assert facts.reserved == facts.summary["epsilon"]
    assert facts.left < before.left - 1
    for text in (ledger_page(facts), re.sub(r"\s+", " ", "\n".join(ledger_lines(facts)))):
        assert "entries of this ledger were lost" in text
        assert "cost epsilon 1.50" in text


def test_a_ledger_that_its_anchor_denies_is_shown_as_not_intact(tmp_path: Path) -> None:
    anchor = tmp_path / "safe" / "north.json"
    anchor.parent.mkdir()
    with opened(tmp_path / "north", anchor=anchor) as ledger:
        run(ledger, 3, 3)
    whole = read_ledger(tmp_path / "north")
    assert "✓ intact, anchored" in ledger_page(ledger_facts(whole))
    short = LedgerView(entries=whole.entries[:-1], intact=True)
    page = ledger_page(ledger_facts(short))
    assert "✗ NOT INTACT" in page
    assert "The figures below may be too small" in page


def test_the_newest_limits_and_versions_are_added_not_replaced(tmp_path: Path) -> None:
    with opened(tmp_path / "north") as ledger:
        run(ledger, 2, 2, SETTING)
        ledger.reserve("again", STUDY, [update(1)], {**SETTING, "policy": "e" * 64, "modalities": ["labs", "note"]})
        ledger.charge("again", STUDY, "request-a", update(1))
        setting = ledger_facts(ledger.view).studies[0].setting
    assert setting is not None
    assert (setting.policies, setting.versions) == (("f" * 64, "e" * 64), ("0.1.0",))
    assert setting.modalities == ("labs", "note")


@pytest.mark.parametrize(("left", "text"), [(6.919, "6.91"), (6.91, "6.91"), (0.004, "0.00"), (10.0, "10.00")])
def test_what_is_left_is_never_rounded_up(left: float, text: str) -> None:
    assert left_figure(left) == text
