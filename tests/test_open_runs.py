"""A run that will never go on holds a part of a site's budget: the hospital sees which, and can have it back."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest
import yaml
from cohorts import Hospital
from commandline import run
from hospitals import build, participant, plan_of, publish
from ledgers import filter_cap

from gapweave.client.ledger import Ledger
from gapweave.client.participant import Participant
from gapweave.server.aggregation import initial_groups
from gapweave.shared.config.site import Site
from gapweave.shared.errors import BudgetExhausted, RefusedError, UsageError
from gapweave.shared.privacy.accountant import epsilon
from gapweave.shared.privacy.events import PrivacyEvent
from gapweave.shared.privacy.ledger import OpenRun, read_ledger
from gapweave.shared.privacy.room import further_epsilon
from gapweave.shared.report.ledger_page import ledger_page
from gapweave.shared.report.ledger_report import ledger_facts
from gapweave.shared.report.ledger_text import ledger_lines

DELTA = 1e-5


def updates(count: int) -> list[PrivacyEvent]:
    """Full-batch steps: one costs 0.19, four 0.42, at delta 1e-5."""
    numbers = range(1, count + 1)
    return [PrivacyEvent(kind="dp_sgd", released=f"update of round {at}", noise_multiplier=20.0) for at in numbers]


def hospital(cap: float) -> Site:
    records = {"file": "records.csv", "id": "id", "patient": "patient"}
    return Site.model_validate(
        {"version": 1, "name": "north", "data": {"records": records}, "policy": {"epsilon": cap}}
    )


@pytest.fixture
def ledger(tmp_path: Path) -> Any:
    """Room for four updates by the filter; a run that charged one of all which it reserved."""
    with Ledger(tmp_path, hospital(filter_cap(updates(4), DELTA))) as opened:
        opened.approve("study", "sepsis", "officer")
        opened.reserve("abandoned", "study", updates(4))
        opened.charge("abandoned", "study", "1", updates(1)[0])
        yield opened


def test_what_an_abandoned_run_holds_is_named_and_comes_back(ledger: Ledger) -> None:
    (held,) = ledger.view.open_runs
    assert held == OpenRun(run="abandoned", name="sepsis", since=held.since, planned=4, left=3, returns=True)
    with pytest.raises(BudgetExhausted, match="give up runs that will not go on"):
        ledger.reserve("again", "other", updates(1))
    ledger.give_up("abandoned")
    assert ledger.view.open_runs == []
    assert not list(ledger.view.outstanding())
    assert ledger.reserve("again", "study", updates(4)) == 3


def test_only_a_run_that_holds_something_can_be_given_up(ledger: Ledger) -> None:
    for name in ("unknown", ""):
        with pytest.raises(UsageError, match="Runs that do: abandoned"):
            ledger.give_up(name)
    ledger.give_up("abandoned")
    with pytest.raises(UsageError, match="Runs that do: none"):
        ledger.give_up("abandoned")
    assert [entry.kind for entry in ledger.view.entries].count("close") == 1


def test_to_give_up_a_run_may_depend_on_what_was_seen(ledger: Ledger) -> None:
    """So its part alone is no schedule that was fixed in advance: the whole one counts, or the filter's figure."""
    before = ledger.view.spent()
    assert before == epsilon(updates(1), DELTA)
    ledger.give_up("abandoned")
    assert ledger.view.spent() == min(epsilon(updates(4), DELTA), ledger.view.filtered()) > before


def test_the_exact_figure_of_a_first_study_gives_nothing_back(tmp_path: Path) -> None:
    with Ledger(tmp_path, hospital(epsilon(updates(20), DELTA) + 1e-6)) as ledger:
        ledger.reserve("first", "study", updates(20))
        assert ledger.view.granted
        ledger.charge("first", "study", "1", updates(1)[0])
        ledger.give_up("first")
        assert len(list(ledger.view.outstanding())) == 19
        assert ledger.view.bound() <= ledger.view.opening["cap"]


def test_what_does_not_come_back_is_not_promised(tmp_path: Path) -> None:
    with Ledger(tmp_path, hospital(epsilon(updates(20), DELTA) + 1e-6)) as ledger:
        ledger.reserve("first", "study", updates(20))
        assert "--close" in " ".join(ledger_lines(ledger_facts(ledger.view)))
        ledger.charge("first", "study", "1", updates(1)[0])
        facts = ledger_facts(ledger.view)
    for told in (" ".join(ledger_lines(facts)), ledger_page(facts)):
        assert "not come back" in told
        assert "--close" not in told


@pytest.mark.parametrize("study", ["study", "its next version"])
def test_a_first_run_that_never_began_leaves_the_exact_figure_to_the_next(tmp_path: Path, study: str) -> None:
    """The page said that the whole cap was left, and the site granted 17 of 20 rounds."""
    with Ledger(tmp_path, hospital(epsilon(updates(20), DELTA) + 1e-6)) as ledger:
        assert ledger.reserve("first", "study", updates(20)) == 20
        ledger.give_up("first")
        assert further_epsilon(ledger.view) == ledger.view.opening["cap"]
        assert ledger.reserve("second", study, updates(20)) == 20
        ledger.charge("second", study, "1", updates(1)[0])
        assert ledger.view.granted


def test_a_run_that_began_leaves_only_the_filter(tmp_path: Path) -> None:
    with Ledger(tmp_path, hospital(epsilon(updates(20), DELTA) + 1e-6)) as ledger:
        ledger.reserve("first", "study", updates(20))
        ledger.charge("first", "study", "1", updates(1)[0])
        ledger.give_up("first")
        with pytest.raises(BudgetExhausted):
            ledger.reserve("second", "study", updates(20))


def test_a_study_alone_costs_no_less_than_the_ledger_that_holds_nothing_else(tmp_path: Path) -> None:
    """Where a run was given up, or may have stopped, its row was the cost of the part alone."""
    with Ledger(tmp_path, hospital(40.0)) as ledger:
        ledger.approve("study", "sepsis", "officer")
        ledger.reserve("run", "study", updates(20))
        for number, event in enumerate(updates(5)):
            ledger.charge("run", "study", f"{number}", event)
        ledger.give_up("run")
        facts = ledger_facts(ledger.view)
    (study,) = facts.studies
    assert facts.summary["epsilon"] > epsilon(updates(5), DELTA)
    assert study.epsilon == study.planned == study.cumulative == facts.curve[-1][1] == facts.summary["epsilon"]


def test_the_cap_is_that_of_the_site_file(site: tuple[Hospital, Participant]) -> None:
    """After it was lowered, the page told the old one until the site's next message."""
    place, one = site
    place.update("policy", epsilon=5.0)
    publish(place)
    facts = json.loads(run("site", "budget", str(place.site_file), "--state", str(one.state), "--json").out)
    assert facts["cap"] == 5.0
    assert facts["left"] < 5.0
    assert facts["entries"] == len(read_ledger(one.state).entries)


def test_a_link_to_the_site_file_finds_its_ledger(site: tuple[Hospital, Participant], tmp_path: Path) -> None:
    """Beside the link there was none: nothing seemed spent, and a loss was declared where no site reads it."""
    place, _ = site
    link = tmp_path / "etc" / "site.yaml"
    link.parent.mkdir()
    link.symlink_to(place.site_file)
    direct, linked = (run("site", "budget", str(file)).out for file in (place.site_file, link))
    assert direct == linked
    assert "nothing is spent" not in linked
    run("site", "recover", str(link), "--assume-spent", "1")
    assert [*link.parent.iterdir()] == [link]


def test_what_a_run_that_may_stop_holds_is_planned_once(tmp_path: Path) -> None:
    """It was counted as reserved, and again as what the run may skip."""
    with Ledger(tmp_path, hospital(40.0)) as ledger:
        ledger.reserve("run", "study", updates(20), may_stop=True)
        ledger.charge("run", "study", "1", updates(1)[0])
        assert ledger_facts(ledger.view).reserved == epsilon(updates(20), DELTA)


# At a hospital.

RUN = "run-1"


@pytest.fixture
def site(tmp_path: Path, fresh_sites: None) -> tuple[Hospital, Participant]:
    """A private study of three rounds, stopped after the first."""
    place = build(tmp_path / "a", "north")
    place.update("patients", declared=24)
    place.update("policy", epsilon=12.0)
    publish(place)
    one = participant(place, plan_of(private=True))
    one.prepare(RUN)
    one.train(RUN, 1, "request 1", shared(one))
    return place, one


def shared(site: Participant) -> Any:
    start = initial_groups(site.study)
    return {group: start[group] for group in site.shared}


def test_the_hospital_has_its_budget_back_and_takes_no_further_part(site: tuple[Hospital, Participant]) -> None:
    place, one = site
    file = str(place.site_file)
    participant(place, plan_of(private=True, name="second")).prepare("run-2")  # which takes the rest of the cap
    other = participant(place, plan_of(private=True, name="other"))
    with pytest.raises(BudgetExhausted):
        other.prepare("run-3")
    state = ("--state", str(one.state))
    told = run("site", "budget", file, *state)
    assert f"open       {RUN} since" in told.out
    assert "2 of 3 releases left" in told.out
    assert "Runs that do: run-1, run-2" in run("site", "budget", file, *state, "--close", "run-9", code=2).err
    done = run("site", "budget", file, *state, "--close", RUN, "--json")
    facts = json.loads(done.out)
    assert [held["run"] for held in facts["open_runs"]] == ["run-2"]
    assert "takes no further part in run-1" in done.err
    assert other.prepare("run-3").rounds >= 1
    for late in (lambda: one.train(RUN, 2, "request 2", shared(one)), lambda: one.finish(RUN, shared(one))):
        with pytest.raises(RefusedError, match="this run is over"):
            late()


def test_a_site_without_a_ledger_holds_nothing(site: tuple[Hospital, Participant], tmp_path: Path) -> None:
    empty = tmp_path / "empty"
    command = ("site", "budget", str(site[0].site_file), "--state", str(empty), "--close", RUN)
    assert "no ledger yet" in run(*command, code=2).err
    assert not empty.exists()


def test_the_anchor_keeps_up_with_a_run_that_is_given_up(site: tuple[Hospital, Participant], tmp_path: Path) -> None:
    place, one = site
    content = yaml.safe_load(place.site_file.read_text())
    content["policy"]["anchor"] = str(tmp_path / "elsewhere" / "north.json")
    (tmp_path / "elsewhere").mkdir()
    place.site_file.write_text(yaml.safe_dump(content))
    run("site", "budget", str(place.site_file), "--state", str(one.state), "--close", RUN)
    assert read_ledger(one.state).standing() is True


def test_the_page_names_open_runs(ledger: Ledger) -> None:
    page = ledger_page(ledger_facts(ledger.view))
    assert "abandoned (since" in page
    ledger.give_up("abandoned")
    assert "Open runs" not in ledger_page(ledger_facts(ledger.view))
