"""The ledger: what is spent is written first, never lost, never changed, and the cap holds over all runs."""

from __future__ import annotations

import math
import sqlite3
import subprocess
import sys
import textwrap
import time
from contextlib import closing
from pathlib import Path
from typing import Any

import pytest
from ledgers import filter_cap

from gapweave.client.budget import Budget
from gapweave.client.ledger import Ledger
from gapweave.shared.config.site import Site
from gapweave.shared.errors import BudgetExhausted, RefusedError, UsageError
from gapweave.shared.privacy.accountant import epsilon
from gapweave.shared.privacy.events import PrivacyEvent
from gapweave.shared.privacy.ledger import LEDGER_FILE, folded, read_ledger
from gapweave.shared.privacy.plan import longest_prefix

DELTA = 1e-5


def hospital(name: str = "north", **keys: Any) -> Site:
    records = {"file": "records.csv", "id": "id", "patient": "patient"}
    return Site.model_validate({"version": 1, "name": name, "data": {"records": records}, **keys})


def update(number: int, sigma: float = 20.0, study: str = "update") -> PrivacyEvent:
    """A full-batch step: one costs 0.19, four 0.42, at delta 1e-5."""
    return PrivacyEvent(kind="dp_sgd", released=f"{study} of round {number}", noise_multiplier=sigma)


def updates(count: int, sigma: float = 20.0) -> list[PrivacyEvent]:
    return [update(number, sigma) for number in range(1, count + 1)]


def kinds(state: Path) -> list[str]:
    return [entry.kind for entry in read_ledger(state).entries]


def cap_for(count: int, sigma: float = 20.0) -> dict[str, float]:
    """A policy that has room for exactly so many updates."""
    return {"epsilon": epsilon(updates(count, sigma), DELTA) + 1e-6}


def filter_for(count: int, sigma: float = 20.0) -> dict[str, float]:
    """A policy whose Renyi filter has room for exactly so many updates, whoever asks for them."""
    return {"epsilon": filter_cap(updates(count, sigma), DELTA)}


# What is written.


def test_a_new_ledger_says_whose_it_is(tmp_path: Path) -> None:
    with Ledger(tmp_path, hospital(cohort="icu", policy={"epsilon": 3})):
        pass
    view = read_ledger(tmp_path)
    assert view.intact
    facts = {"site": "north", "cohort": "icu", "unit": "patient", "delta": DELTA, "cap": 3.0, "anchor": None}
    assert view.opening == facts
    assert (tmp_path / LEDGER_FILE).stat().st_mode & 0o077 == 0, "for its owner's eyes only"


@pytest.mark.parametrize(
    ("policy_delta", "upper", "delta"), [(1e-5, 10_000, 1e-5), (1e-5, 1_000_000, 1e-7), (1e-8, 1_000, 1e-8)]
)
def test_delta_is_the_smaller_of_policy_and_a_tenth_over_the_upper_size(
    tmp_path: Path, policy_delta: float, upper: int, delta: float
) -> None:
    site = hospital(policy={"delta": policy_delta}, patients={"upper": upper})
    with Ledger(tmp_path, site) as ledger:
        assert ledger.view.delta == pytest.approx(delta, rel=1e-12)
        assert ledger.view.delta <= 1 / (10 * upper) * (1 + 1e-12)


def test_delta_is_fixed_for_the_life_of_the_ledger_and_the_cap_is_not(tmp_path: Path) -> None:
    with Ledger(tmp_path, hospital(policy={"delta": 1e-6, "epsilon": 3})):
        pass
    with Ledger(tmp_path, hospital(policy={"delta": 1e-5, "epsilon": 5})) as ledger:
        assert ledger.view.delta == 1e-6
        assert ledger.view.opening["cap"] == 5
    assert kinds(tmp_path) == ["open", "open"]
    with Ledger(tmp_path, hospital(policy={"delta": 1e-5, "epsilon": 5})):
        pass
    assert kinds(tmp_path) == ["open", "open"], "opening it again changes nothing"


def test_an_entry_is_durable_when_charge_returns(tmp_path: Path) -> None:
    """Read by another connection, with the ledger still open."""
    with Ledger(tmp_path, hospital()) as ledger:
        ledger.charge("run", "study", "request", update(1))
        assert read_ledger(tmp_path).events() == [update(1)]
        assert ledger._connection.execute("PRAGMA synchronous").fetchone() == (2,), "FULL"


def test_spent_is_the_cost_of_all_charges(tmp_path: Path) -> None:
    with Ledger(tmp_path, hospital()) as ledger:
        for event in updates(3):
            ledger.charge("run", "study", event.released, event)
    view = read_ledger(tmp_path)
    assert view.spent() == epsilon(updates(3), DELTA)
    assert view.events("run") == updates(3)
    assert view.events("another run") == []
    summary = view.summary()
    assert summary["epsilon"] == view.spent()
    assert summary["intact"] == "unanchored"
    assert summary["releases"] == [
        {
            "kind": "dp_sgd",
            "noise_multiplier": 20.0,
            "sample_rate": 1.0,
            "max_grad_norm": 1.0,
            "releases": 3,
            "steps": 3,
        }
    ]


def test_folded_mechanisms_cost_what_the_events_cost() -> None:
    events = [*updates(3), *updates(2, 30.0)]
    rebuilt = [
        PrivacyEvent(
            kind=row["kind"],
            released="",
            noise_multiplier=row["noise_multiplier"],
            sample_rate=row["sample_rate"],
            steps=row["steps"],
        )
        for row in folded(events)
    ]
    assert len(rebuilt) == 2
    assert epsilon(rebuilt, DELTA) == epsilon(events, DELTA)


def test_an_approval_is_written_once(tmp_path: Path) -> None:
    with Ledger(tmp_path, hospital()) as ledger:
        for study in ("a", "b", "a"):
            ledger.approve(study, "name", "policy.studies")
    assert kinds(tmp_path) == ["open", "approve", "approve"]


# Requests that come again.


def test_a_request_that_was_never_answered_is_recomputed_once_and_then_charged_again(tmp_path: Path) -> None:
    with Ledger(tmp_path, hospital()) as ledger:
        for _ in range(4):
            ledger.charge("run", "study", "request", update(1))
    assert kinds(tmp_path) == ["open", "charge", "recompute", "charge", "charge"]
    assert len(read_ledger(tmp_path).events()) == 3


def test_a_further_recomputation_needs_room_under_the_cap(tmp_path: Path) -> None:
    with Ledger(tmp_path, hospital(policy=cap_for(1))) as ledger:
        ledger.reserve("run", "study", updates(1))
        ledger.charge("run", "study", "request", update(1))
        ledger.charge("run", "study", "request", update(1))
        with pytest.raises(BudgetExhausted):
            ledger.charge("run", "study", "request", update(1))
    assert read_ledger(tmp_path).spent() <= cap_for(1)["epsilon"]


def test_a_release_is_marked_once(tmp_path: Path) -> None:
    with Ledger(tmp_path, hospital()) as ledger:
        ledger.charge("run", "study", "request", update(1))
        ledger.released("request")
        ledger.released("request")
    assert kinds(tmp_path) == ["open", "charge", "released"]


# The cap.


@pytest.mark.parametrize("room", [1, 3, 9, 10])
def test_the_longest_prefix_that_the_cap_allows_is_reserved(tmp_path: Path, room: int) -> None:
    with Ledger(tmp_path, hospital(policy=cap_for(room))) as ledger:
        assert ledger.reserve("run", "study", updates(10)) == room
        assert ledger.reserve("run", "study", updates(10)) == room, "asking again changes nothing"
        for event in updates(room):
            ledger.charge("run", "study", event.released, event)
        with pytest.raises(BudgetExhausted):
            ledger.charge("run", "study", "one more", update(room + 1))
    assert kinds(tmp_path).count("reserve") == 1
    assert read_ledger(tmp_path).spent() <= cap_for(room)["epsilon"]


def test_a_cap_without_room_for_one_round_refuses_the_run(tmp_path: Path) -> None:
    with Ledger(tmp_path, hospital(policy={"epsilon": 0.01})) as ledger:
        with pytest.raises(BudgetExhausted):
            ledger.reserve("run", "study", updates(10))
        with pytest.raises(BudgetExhausted):
            ledger.charge("run", "study", "request", update(1))
    assert kinds(tmp_path) == ["open"], "nothing was spent by asking"


def test_the_longest_prefix_is_found_in_few_looks() -> None:
    # Believed: a binary search. True: it counted down one by one, half a second each with sampled steps.
    looks: list[int] = []
    assert longest_prefix(updates(500), lambda part: looks.append(len(part)) or len(part) <= 2) == 2
    assert looks[0] == 500, "most studies fit as a whole"
    assert len(looks) <= 11


def test_two_runs_on_one_state_add_up(tmp_path: Path) -> None:
    with Ledger(tmp_path, hospital(policy=filter_for(5))) as ledger:
        assert ledger.reserve("first", "study", updates(3)) == 3
        assert ledger.reserve("second", "other", updates(4)) == 2
        for event in updates(3):
            ledger.charge("first", "study", f"first {event.released}", event)
        for event in updates(2):
            ledger.charge("second", "other", f"second {event.released}", event)
        with pytest.raises(BudgetExhausted):
            ledger.charge("second", "other", "beyond", update(3))
        with pytest.raises(BudgetExhausted):
            ledger.reserve("third", "study", updates(1))
    assert read_ledger(tmp_path).spent() == pytest.approx(epsilon(updates(5), DELTA))


def test_what_a_run_has_reserved_no_other_can_take(tmp_path: Path) -> None:
    with Ledger(tmp_path, hospital(policy=filter_for(3))) as ledger:
        ledger.reserve("first", "study", updates(3))
        assert not Budget(ledger.view).allows([update(1)])
        assert Budget(ledger.view).allows([update(1)], "first")
        with pytest.raises(BudgetExhausted):
            ledger.reserve("second", "study", updates(1))


def test_closing_a_run_gives_back_what_it_did_not_use(tmp_path: Path) -> None:
    with Ledger(tmp_path, hospital(policy=filter_for(3))) as ledger:
        ledger.reserve("first", "study", updates(3))
        ledger.charge("first", "study", "1", update(1))
        ledger.finish("first")
        ledger.finish("first")
        ledger.finish("never reserved")
        assert ledger.reserve("second", "study", updates(3)) == 2
    assert kinds(tmp_path).count("close") == 1


def test_a_closed_run_has_no_reservation_left(tmp_path: Path) -> None:
    # Believed: after the last message nobody asks again. True: a server that went on used what another run had
    # been given since, and the site spent more than its cap.
    with Ledger(tmp_path, hospital(policy=filter_for(3))) as ledger:
        ledger.reserve("first", "study", updates(3))
        ledger.charge("first", "study", "first 1", update(1))
        ledger.finish("first")
        assert ledger.reserve("second", "study", updates(2)) == 2
        with pytest.raises(BudgetExhausted):
            ledger.charge("first", "study", "first 2", update(2))
        for event in updates(2):
            ledger.charge("second", "study", f"second {event.released}", event)
        with pytest.raises(BudgetExhausted):
            ledger.charge("first", "study", "first 3", update(3))
    assert read_ledger(tmp_path).spent() <= filter_for(3)["epsilon"]


def test_a_cap_lowered_during_a_run_counts_at_once(tmp_path: Path) -> None:
    with Ledger(tmp_path, hospital(policy=cap_for(4))) as ledger:
        assert ledger.reserve("run", "study", updates(4)) == 4
        ledger.charge("run", "study", "1", update(1))
    with Ledger(tmp_path, hospital(policy=cap_for(2))) as ledger:
        ledger.charge("run", "study", "2", update(2))
        with pytest.raises(BudgetExhausted):
            ledger.charge("run", "study", "3", update(3))
    assert read_ledger(tmp_path).spent() <= cap_for(2)["epsilon"]


def test_an_event_is_covered_by_its_own_reservation_only(tmp_path: Path) -> None:
    """A cheaper reservation does not pay for a dearer event."""
    with Ledger(tmp_path, hospital(policy=cap_for(3))) as ledger:
        ledger.reserve("run", "study", updates(3))
        with pytest.raises(BudgetExhausted):
            ledger.charge("run", "study", "dear", update(1, sigma=5.0))
        ledger.charge("run", "study", "planned", update(1))
        with pytest.raises(RefusedError, match="charged for another request"):
            ledger.charge("run", "study", "the same again under another request", update(1))


UNNOISED = PrivacyEvent(kind="unnoised", released="update of round 1", noise_multiplier=0.0)


def test_after_a_release_without_noise_nothing_private_is_left_to_promise(tmp_path: Path) -> None:
    with Ledger(tmp_path, hospital(policy={"unnoised": "allow", "epsilon": 1000})) as ledger:
        assert ledger.reserve("test", "open study", [UNNOISED]) == 1
        ledger.charge("test", "open study", "request", UNNOISED)
        with pytest.raises(BudgetExhausted):
            ledger.reserve("real", "private study", updates(1, sigma=1000.0))
        with pytest.raises(BudgetExhausted):
            ledger.charge("real", "private study", "another", update(1, sigma=1000.0))
    view = read_ledger(tmp_path)
    assert view.spent() == math.inf
    assert view.summary()["epsilon"] is None, "JSON has no infinity"


def test_a_number_released_for_a_study_is_kept_for_that_study(tmp_path: Path) -> None:
    event = PrivacyEvent(kind="noisy_count", released="number of training patients", noise_multiplier=4.0)
    with Ledger(tmp_path, hospital()) as ledger:
        assert ledger.once("run", "study", event, lambda: [57.0]) == [57.0]
    with Ledger(tmp_path, hospital()) as ledger:
        assert ledger.once("another run", "study", event, pytest.fail) == [57.0]
        assert ledger.once("run 3", "another study", event, lambda: [58.0]) == [58.0]
    assert kinds(tmp_path) == ["open", "charge", "value", "charge", "value"]


def test_what_a_study_releases_once_is_charged_before_it_is_computed(tmp_path: Path) -> None:
    event = PrivacyEvent(kind="noisy_count", released="number of training patients", noise_multiplier=4.0)

    def compute() -> list[float]:
        assert kinds(tmp_path)[-1] == "charge"
        return [57.0]

    with Ledger(tmp_path, hospital()) as ledger:
        ledger.once("run", "study", event, compute)


# Tampering.


def open_file(state: Path) -> closing[sqlite3.Connection]:
    return closing(sqlite3.connect(state / LEDGER_FILE, isolation_level=None))


@pytest.fixture
def kept(tmp_path: Path) -> Path:
    """A ledger with a few entries."""
    with Ledger(tmp_path, hospital()) as ledger:
        for event in updates(3):
            ledger.charge("run", "study", event.released, event)
    return tmp_path


@pytest.mark.parametrize("statement", ["UPDATE entries SET body = '{}'", "DELETE FROM entries WHERE sequence = 2"])
def test_the_file_itself_refuses_changes(kept: Path, statement: str) -> None:
    with open_file(kept) as connection, pytest.raises(sqlite3.IntegrityError, match="append-only"):
        connection.execute(statement)
    assert read_ledger(kept).intact


TAMPERING = {
    "a cheaper event": "UPDATE entries SET body = replace(body, '20.0', '90.0') WHERE sequence = 3",
    "another kind": "UPDATE entries SET kind = 'note' WHERE sequence = 3",
    "another time": "UPDATE entries SET time = '2020-01-01T00:00:00' WHERE sequence = 2",
    "a deleted row": "DELETE FROM entries WHERE sequence = 3",
    "a deleted opening": "DELETE FROM entries WHERE sequence = 1",
    "no JSON": "UPDATE entries SET body = 'x' WHERE sequence = 4",
    "no mapping": "UPDATE entries SET body = '[1]' WHERE sequence = 4",
    "a renumbered row": "UPDATE entries SET sequence = 9 WHERE sequence = 4",
    "an inserted row": "INSERT INTO entries VALUES (5, 'now', 'close', '{\"run\": \"run\"}', 'x', 'y')",
    "no rows": "DELETE FROM entries WHERE sequence < 4",
}


@pytest.mark.parametrize("statement", TAMPERING.values(), ids=TAMPERING.keys())
def test_a_changed_ledger_is_seen_and_the_writer_refuses(kept: Path, statement: str) -> None:
    with open_file(kept) as connection:
        connection.execute("DROP TRIGGER entries_stay")
        connection.execute("DROP TRIGGER entries_remain")
        assert connection.execute(statement).rowcount > 0
    view = read_ledger(kept)
    assert not view.intact
    assert view.broken_at is not None
    with pytest.raises(RefusedError, match="changed"):
        Ledger(kept, hospital())
    with pytest.raises(RefusedError, match="changed"):
        Ledger(kept, hospital())  # and the lock was given back


def test_a_file_that_is_no_ledger_is_refused(tmp_path: Path) -> None:
    with pytest.raises(UsageError, match="no ledger"):
        read_ledger(tmp_path)
    (tmp_path / LEDGER_FILE).write_bytes(b"not a data base" * 100)
    with pytest.raises(RefusedError, match="cannot be read"):
        read_ledger(tmp_path)
    with pytest.raises(RefusedError, match="cannot be read"):
        Ledger(tmp_path, hospital())


def test_another_sites_ledger_is_refused(kept: Path) -> None:
    with pytest.raises(RefusedError, match="belongs to site 'north', not 'south'"):
        Ledger(kept, hospital("south"))
    with Ledger(kept, hospital()) as ledger:
        assert len(ledger.view.events()) == 3


# Two processes.

HOLD = textwrap.dedent(
    """
    import sys, time
    from pathlib import Path
    from gapweave.client.ledger import Ledger
    from gapweave.shared.config.site import Site
    from gapweave.shared.privacy.events import PrivacyEvent
    records = {"file": "r.csv", "id": "id", "patient": "patient"}
    site = Site.model_validate({"version": 1, "name": "north", "data": {"records": records}})
    event = PrivacyEvent(kind="dp_sgd", released="the other's", noise_multiplier=20.0)
    with Ledger(Path(sys.argv[1]), site) as ledger:
        print("holding", flush=True)
        time.sleep(1.0)
        ledger.charge("other", "study", "other", event)
    """
)


def test_a_second_process_waits_for_the_first(tmp_path: Path) -> None:
    """It sees what the first one spent, so that both together keep the cap."""
    site = hospital(policy=cap_for(1))
    with subprocess.Popen([sys.executable, "-c", HOLD, str(tmp_path)], stdout=subprocess.PIPE, text=True) as other:
        assert other.stdout is not None
        assert other.stdout.readline() == "holding\n"
        start = time.monotonic()
        with Ledger(tmp_path, site) as ledger:
            waited = time.monotonic() - start
            assert [event.released for event in ledger.view.events()] == ["the other's"]
            with pytest.raises(BudgetExhausted):
                ledger.charge("mine", "study", "mine", update(1))
    assert other.returncode == 0
    assert waited > 0.5
    assert read_ledger(tmp_path).intact
