"""Entries that are gone: an old copy, a fork, a lost folder. Somebody outside must remember, and then it is seen."""

from __future__ import annotations

import json
import math
import shutil
import sqlite3
from contextlib import closing, suppress
from pathlib import Path
from typing import Any

import pytest
from commandline import done, gapweave
from ledgers import filter_cap
from test_ledger import DELTA, hospital, kinds, update, updates

from gapweave.client import journal as journal_module
from gapweave.client.ledger import Ledger
from gapweave.client.recovery import recover
from gapweave.client.state import RoundState, RunFolder
from gapweave.shared.errors import BudgetExhausted, GapweaveError, LedgerBusy, RefusedError, UsageError
from gapweave.shared.privacy.accountant import epsilon
from gapweave.shared.privacy.head import Head, read_anchor
from gapweave.shared.privacy.ledger import LEDGER_FILE, read_ledger
from gapweave.shared.report.ledger_page import ledger_page
from gapweave.shared.report.ledger_report import ledger_facts


def spend(state: Path, numbers: range, anchor: Path | None = None, run: str = "run", **keys: Any) -> Head:
    """Charge some updates and say where the ledger stands."""
    with Ledger(state, hospital(**keys), anchor) as ledger:
        for number in numbers:
            ledger.charge(run, "study", f"{run} {number}", update(number))
        return ledger.view.head


@pytest.fixture
def anchor(tmp_path: Path) -> Path:
    (tmp_path / "safe").mkdir()
    return tmp_path / "safe" / "north.json"


@pytest.fixture
def state(tmp_path: Path) -> Path:
    return tmp_path / "state"


@pytest.fixture
def restored(tmp_path: Path, state: Path, anchor: Path) -> Path:
    """An old copy of an anchored ledger, in the place of the newest: three of five updates are forgotten."""
    spend(state, range(1, 3), anchor)
    shutil.copytree(state, tmp_path / "copy")
    spend(state, range(3, 6), anchor)
    shutil.rmtree(state)
    (tmp_path / "copy").rename(state)
    return state


# The anchor.


def test_an_anchor_holds_the_newest_head_and_verify_vouches(state: Path, anchor: Path) -> None:
    assert read_anchor(anchor) is None
    head = spend(state, range(1, 4), anchor)
    assert read_anchor(anchor) == head == read_ledger(state).head
    assert read_ledger(state).summary()["intact"] is True
    assert anchor.stat().st_mode & 0o077 == 0


def test_without_an_anchor_nobody_vouches(state: Path) -> None:
    spend(state, range(1, 4))
    assert read_ledger(state).summary()["intact"] == "unanchored"


def test_a_restored_old_copy_is_refused(restored: Path, anchor: Path) -> None:
    assert read_ledger(restored).intact, "an old copy is a good ledger"
    assert read_ledger(restored).summary()["intact"] is False
    with pytest.raises(RefusedError, match="seen 6 entries, the ledger has 3: an old copy was restored"):
        spend(restored, range(3, 4), anchor)
    assert len(read_ledger(restored).entries) == 3, "and nothing was written"


def test_a_lost_folder_is_refused(restored: Path, anchor: Path) -> None:
    shutil.rmtree(restored)
    with pytest.raises(RefusedError, match="the ledger has 0: an old copy was restored, or entries were lost"):
        spend(restored, range(1, 2), anchor)


def test_truncation_is_refused(state: Path, anchor: Path) -> None:
    spend(state, range(1, 6), anchor)
    with closing(sqlite3.connect(state / LEDGER_FILE, isolation_level=None)) as connection:
        connection.execute("DROP TRIGGER entries_remain")
        connection.execute("DELETE FROM entries WHERE sequence > 3")
    assert read_ledger(state).intact
    assert read_ledger(state).summary()["intact"] is False
    with pytest.raises(RefusedError, match="has 3"):
        spend(state, range(6, 7), anchor)


def test_a_lost_write_ahead_log_is_refused(state: Path, anchor: Path, tmp_path: Path) -> None:
    """The last entries may lie in SQLite's own second file alone."""
    with Ledger(state, hospital(), anchor) as ledger:
        ledger.charge("run", "study", "1", update(1))
        main = (state / LEDGER_FILE).read_bytes()
    (state / LEDGER_FILE).write_bytes(main)
    for file in state.glob(f"{LEDGER_FILE}-*"):
        file.unlink()
    with pytest.raises(RefusedError):
        spend(state, range(2, 3), anchor)


@pytest.mark.parametrize("named", [None, "another"])
def test_an_anchor_that_is_named_no_longer_still_says_what_it_has_seen(
    restored: Path, anchor: Path, tmp_path: Path, named: str | None
) -> None:
    """With another file as policy.anchor an old copy was taken for the newest, and confirmed by that file."""
    other = named and tmp_path / "safe" / named
    with pytest.raises(RefusedError, match="its former anchor"):
        spend(restored, range(3, 4), other)
    recover(restored, hospital(), other, 1.0)
    spend(restored, range(3, 4), other)
    anchor.unlink()
    spend(restored, range(4, 5), anchor)


def test_a_fork_is_refused(tmp_path: Path, state: Path, anchor: Path) -> None:
    """Two copies that were both used: the second has as many entries, but others."""
    spend(state, range(1, 3), anchor)
    shutil.copytree(state, tmp_path / "fork")
    spend(tmp_path / "fork", range(3, 9), run="other")
    spend(state, range(3, 4), anchor)
    with pytest.raises(RefusedError, match="has others: an old copy was restored and used, or there are two copies"):
        spend(tmp_path / "fork", range(9, 10), anchor)


def test_a_crash_before_the_first_entry_or_the_first_anchor_is_no_loss(
    state: Path, anchor: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """It was believed that the anchor may come after the entry that names it: a crash between them looked like a loss."""
    written = journal_module.Anchor.write

    def kill(self: Any, head: Head) -> None:
        if head.length == 1:
            raise KeyboardInterrupt
        written(self, head)

    with monkeypatch.context() as patch:
        patch.setattr(journal_module.Anchor, "write", kill)
        with pytest.raises(KeyboardInterrupt):
            spend(state, range(1, 2), anchor)
    assert kinds(state) == ["open"]
    assert read_ledger(state).summary()["intact"] is True
    head = spend(state, range(1, 2), anchor)
    assert read_anchor(anchor) == head


def test_a_ledger_ahead_of_its_anchor_goes_on(state: Path, anchor: Path) -> None:
    """A crash between the entry and the anchor: nothing is lost."""
    spend(state, range(1, 3), anchor)
    before = anchor.read_bytes()
    spend(state, range(3, 4), anchor)
    anchor.write_bytes(before)
    assert read_anchor(anchor) != read_ledger(state).head
    head = spend(state, range(4, 5), anchor)
    assert read_anchor(anchor) == head


def test_an_anchor_that_is_gone_is_refused_and_verify_does_not_vouch(state: Path, anchor: Path) -> None:
    spend(state, range(1, 3), anchor)
    anchor.unlink()
    assert read_ledger(state).summary()["intact"] is False
    anchor.parent.rmdir()
    assert read_ledger(state).summary()["intact"] == "unanchored", "a copy on another machine"
    anchor.parent.mkdir()
    with pytest.raises(RefusedError, match="anchor is gone"):
        spend(state, range(3, 4), anchor)


@pytest.mark.parametrize("content", ["", "{}", "[1]", '{"site": "north", "length": "6", "hash": "x"}', "\xff"])
def test_an_anchor_that_cannot_be_read_is_refused(state: Path, anchor: Path, content: str) -> None:
    spend(state, range(1, 3), anchor)
    anchor.write_bytes(content.encode("latin-1"))
    with pytest.raises(RefusedError, match="anchor cannot be read"):
        spend(state, range(3, 4), anchor)


def test_two_sites_cannot_share_an_anchor(tmp_path: Path, anchor: Path) -> None:
    spend(tmp_path / "north", range(1, 3), anchor)
    spend(tmp_path / "south", range(1, 3), name="south")
    with pytest.raises(RefusedError, match="belongs to site 'north', not 'south'"):
        spend(tmp_path / "south", range(3, 4), anchor, name="south")


def test_an_anchor_that_cannot_be_written_stops_the_release(state: Path, tmp_path: Path) -> None:
    with pytest.raises(UsageError, match="anchor's folder does not exist"):
        spend(state, range(1, 2), tmp_path / "nowhere" / "north.json")
    assert not state.exists(), "and nothing was made that a later run would stumble over"
    with pytest.raises(UsageError, match="anchor's folder does not exist"):
        recover(state, hospital(), tmp_path / "nowhere" / "north.json", 1.0)
    assert not state.exists(), "nor was anything charged"


def test_an_anchor_in_the_state_folder_vouches_for_nothing(state: Path) -> None:
    with pytest.raises(UsageError, match="lies in the state folder"):
        spend(state, range(1, 2), state / "anchor.json")


# The server's echo.


def test_the_servers_echo_finds_an_old_copy(tmp_path: Path, state: Path) -> None:
    spend(state, range(1, 3))
    shutil.copytree(state, tmp_path / "copy")
    head = spend(state, range(3, 6))
    with Ledger(state, hospital()) as ledger:
        ledger.check_echo(head)
    with Ledger(tmp_path / "copy", hospital()) as ledger, pytest.raises(RefusedError, match="the server has seen 6"):
        ledger.check_echo(head)


def test_an_echo_changes_nothing_but_can_stop_the_site(state: Path) -> None:
    spend(state, range(1, 3))
    before = read_ledger(state)
    with Ledger(state, hospital()) as ledger:
        ledger.check_echo(None)
        ledger.check_echo(Head(site="another", length=99, hash="x"))
        for length in (2, 99):
            with pytest.raises(RefusedError):
                ledger.check_echo(Head(site="north", length=length, hash="invented"))
    assert read_ledger(state) == before


# What the runs in the state folder remember.


def test_a_ledger_that_is_gone_is_noticed_by_the_runs_beside_it(state: Path) -> None:
    """Without an anchor: a site spent its whole cap a second time after the file was deleted."""
    head = spend(state, range(1, 3))
    RunFolder(state, "run").save(RoundState(round=2, request="2", ledger=head.to_dict()))
    spend(state, range(3, 4))
    for file in state.glob("ledger.sqlite*"):
        file.unlink()
    with pytest.raises(RefusedError, match=f"a run in this state folder has seen {head.length} entries, the ledger"):
        spend(state, range(4, 5))
    assert recover(state, hospital(), None, 2.0).spent() >= 2.0
    spend(state, range(4, 5))
    (RunFolder(state, "run").path / "round.safetensors").write_bytes(b"torn")
    spend(state, range(5, 6))


# Recovery.


def test_a_recovered_site_goes_on_with_what_was_assumed(restored: Path, anchor: Path) -> None:
    seen = read_ledger(restored).spent()
    view = recover(restored, hospital(), anchor, 2.5)
    assert view.spent() >= seen + 2.5
    assert view.spent() == 2.5 + epsilon(updates(2), DELTA / 2), "the lost part has had half of delta"
    assert view.filtered() > 2.5
    head = spend(restored, range(3, 4), anchor)
    assert read_anchor(anchor) == head
    assert read_ledger(restored).summary()["intact"] is True


def test_a_declared_loss_is_shown_also_where_nothing_was_assumed(restored: Path, anchor: Path) -> None:
    """A report for the board was that of a ledger which never lost anything."""
    recover(restored, hospital(), anchor, 0.0)
    told = done("privacy", "verify", restored).out
    assert "earlier entries are missing, whose loss was declared" in told
    facts = json.loads(done("privacy", "report", restored, "--json").out)
    assert facts["recovered"] is True
    for page in (done("privacy", "report", restored).out, ledger_page(ledger_facts(read_ledger(restored)))):
        assert "assumed that they cost epsilon 0.00" in " ".join(page.split())


@pytest.mark.parametrize("name", ["SQLITE_BUSY", "SQLITE_CANTOPEN", "SQLITE_IOERR_READ"])
def test_a_ledger_that_cannot_be_read_now_is_not_lost(state: Path, monkeypatch: pytest.MonkeyPatch, name: str) -> None:
    """It was put aside, and what it had spent forgotten."""
    spend(state, range(1, 4))
    before = read_ledger(state).spent()

    def connect(*_: Any, **__: Any) -> None:
        error = sqlite3.OperationalError("not now")
        error.sqlite_errorname = name
        raise error

    with monkeypatch.context() as patch:
        patch.setattr(sqlite3, "connect", connect)
        for attempt in (lambda: recover(state, hospital(), None, 0.5), lambda: read_ledger(state)):
            with pytest.raises(GapweaveError, match="cannot be read now") as error:
                attempt()
            assert "backup" not in error.value.remedy
        with pytest.raises(GapweaveError, match="not now"):
            spend(state, range(4, 5))
    assert read_ledger(state).spent() == before
    assert not list(state.glob("changed-*"))


def test_nobody_writes_while_a_ledger_is_judged(state: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    spend(state, range(1, 4))
    monkeypatch.setattr(journal_module, "PATIENCE_S", 0.1)
    with Ledger(state, hospital()), pytest.raises(LedgerBusy):
        recover(state, hospital(), None, 0.5)


def test_what_is_assumed_counts_against_the_cap(restored: Path, anchor: Path) -> None:
    policy = {"epsilon": filter_cap(updates(5), DELTA) + 1}
    recover(restored, hospital(policy=policy), anchor, 50.0)
    with pytest.raises(BudgetExhausted):
        spend(restored, range(3, 4), anchor, policy=policy)


def test_recovery_from_an_echo_answers_that_echo(tmp_path: Path, state: Path) -> None:
    spend(state, range(1, 3))
    shutil.copytree(state, tmp_path / "copy")
    head = spend(state, range(3, 6))
    copy = tmp_path / "copy"
    with Ledger(copy, hospital()) as ledger, pytest.raises(RefusedError):
        ledger.check_echo(head)
    recover(copy, hospital(), None, 1.0)
    with Ledger(copy, hospital()) as ledger:
        ledger.check_echo(head)
        with pytest.raises(RefusedError):
            ledger.check_echo(Head(site="north", length=head.length, hash="another"))


def test_a_changed_ledger_is_put_aside_and_not_believed(state: Path, anchor: Path) -> None:
    spend(state, range(1, 4), anchor)
    with closing(sqlite3.connect(state / LEDGER_FILE, isolation_level=None)) as connection:
        connection.execute("DROP TRIGGER entries_stay")
        connection.execute("UPDATE entries SET body = replace(body, '20.0', '90.0') WHERE sequence = 3")
    with pytest.raises(RefusedError, match="changed"):
        spend(state, range(4, 5), anchor)
    view = recover(state, hospital(), anchor, 5.0)
    assert view.spent() == 5.0
    assert kinds(state) == ["open", "recover"]
    assert len(list(state.glob(f"changed-*-{LEDGER_FILE}"))) == 1
    spend(state, range(4, 5), anchor, policy={"epsilon": 20.0})


def tampered(state: Path, statement: str) -> None:
    """Three rounds and a changed entry."""
    spend(state, range(1, 4))
    with closing(sqlite3.connect(state / LEDGER_FILE, isolation_level=None)) as connection:
        connection.execute("DROP TRIGGER entries_stay")
        connection.execute(statement)


@pytest.mark.parametrize(
    "statement",
    [
        "UPDATE entries SET time = replace(time, '20', '19') WHERE sequence = 3",
        "UPDATE entries SET body = '{' WHERE sequence = 1",
        "INSERT INTO entries SELECT 99, time, kind, replace(body, 'dp_sgd', 'dp_sge'), previous, 'a' FROM entries "
        "WHERE sequence = 3",
        """INSERT INTO entries SELECT 99, time, kind, '{"event": "none", "run": 1}', previous, 'a' FROM entries
        WHERE sequence = 3""",
    ],
    ids=["a time", "the first entry", "a kind that is none", "an event that is none"],
)
def test_what_a_changed_ledger_still_says_was_spent_counts_at_least(
    state: Path, monkeypatch: pytest.MonkeyPatch, statement: str
) -> None:
    """One letter changed and `--assume-spent 0`: all was forgotten. Also where the first attempt was killed."""
    tampered(state, statement)
    killed_in_recovery(state, None, monkeypatch, 0.0)
    counted = recover(state, hospital(), None, 0.0).assumed
    assert counted > epsilon(updates(3), DELTA / 2), "at the share of delta that is left to what was lost"
    assert recover(state, hospital(), None, 0.5).assumed == pytest.approx(counted + 0.5), "once"


def test_a_ledger_that_is_changed_again_forgets_nothing(state: Path) -> None:
    tampered(state, "UPDATE entries SET time = replace(time, '20', '19') WHERE sequence = 3")
    counted = recover(state, hospital(), None, 0.0).assumed
    (state / LEDGER_FILE).write_bytes(b"no database")
    assert recover(state, hospital(), None, 0.0).assumed >= counted


def test_two_losses_add_up_where_the_first_is_not_declared_any_more(state: Path) -> None:
    """The larger one counted for both."""
    tampered(state, "UPDATE entries SET time = replace(time, '20', '19') WHERE sequence = 3")
    first = recover(state, hospital(), None, 0.0).assumed
    spend(state, range(4, 7), policy={"epsilon": 100.0})
    with closing(sqlite3.connect(state / LEDGER_FILE, isolation_level=None)) as connection:
        connection.execute("DROP TRIGGER entries_stay")
        connection.execute("UPDATE entries SET body = 'gone' WHERE kind = 'recover'")
    (aside,) = state.glob(f"changed-*-{LEDGER_FILE}")
    aside.rename(aside.with_name(f"changed-20200101-000000-{LEDGER_FILE}"))
    assert recover(state, hospital(policy={"epsilon": 100.0}), None, 0.0).assumed > first + epsilon(updates(3), DELTA)


def test_a_declaration_that_is_no_number_any_more_is_no_obstacle(state: Path) -> None:
    recover(state, hospital(), None, 2.5)
    with closing(sqlite3.connect(state / LEDGER_FILE, isolation_level=None)) as connection:
        connection.execute("DROP TRIGGER entries_stay")
        connection.execute("UPDATE entries SET body = replace(body, '2.5', ?)", ["9" * 400])
    assert recover(state, hospital(), None, 3.0).assumed == 3.0


def test_entries_that_say_nothing_any_more_leave_it_to_the_operator(state: Path) -> None:
    tampered(state, "UPDATE entries SET body = 'gone'")
    assert recover(state, hospital(), None, 2.0).spent() == 2.0


def test_no_epsilon_covers_what_left_without_noise(state: Path) -> None:
    tampered(state, "UPDATE entries SET body = replace(body, 'dp_sgd', 'unnoised')")
    assert math.isinf(read_ledger(state).spent())
    with pytest.raises(RefusedError, match="without noise"):
        recover(state, hospital(), None, 2.0)
    assert not list(state.glob("changed-*")), "nothing was touched"


def test_a_lost_folder_recovers_to_what_was_assumed(restored: Path, anchor: Path) -> None:
    shutil.rmtree(restored)
    assert recover(restored, hospital(), anchor, 4.0).spent() == 4.0
    spend(restored, range(1, 2), anchor)


def killed_in_recovery(state: Path, anchor: Path | None, monkeypatch: pytest.MonkeyPatch, assumed: float = 3.0) -> None:
    """`site recover`, killed after it opened the ledger and before it declared anything."""

    def kill(*_: object) -> None:
        raise KeyboardInterrupt

    with monkeypatch.context() as patch:
        patch.setattr(Ledger, "recover", kill)
        with pytest.raises(KeyboardInterrupt):
            recover(state, hospital(), anchor, assumed)


def test_a_recovery_that_was_killed_does_not_make_the_anchor_forget(
    restored: Path, anchor: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """It was believed that a recovery may write the anchor as every opening does: the loss was then forgotten."""
    seen = read_anchor(anchor)
    shutil.rmtree(restored)
    killed_in_recovery(restored, anchor, monkeypatch)
    assert read_anchor(anchor) == seen
    with pytest.raises(RefusedError, match="seen 6 entries"):
        spend(restored, range(1, 2), anchor)
    assert recover(restored, hospital(), anchor, 4.0).spent() == 4.0


def test_a_recovery_that_was_killed_leaves_no_fresh_ledger(state: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """The changed ledger is aside, the new one is empty: without the declaration it would say that nothing was spent."""
    spend(state, range(1, 4))
    with closing(sqlite3.connect(state / LEDGER_FILE, isolation_level=None)) as connection:
        connection.execute("DROP TRIGGER entries_remain")
        connection.execute("DELETE FROM entries WHERE sequence = 2")
    killed_in_recovery(state, None, monkeypatch)
    with pytest.raises(RefusedError, match="put aside, and nobody declared"):
        spend(state, range(1, 2))
    assert recover(state, hospital(), None, 5.0).spent() == 5.0
    spend(state, range(1, 2), policy={"epsilon": 20.0})


@pytest.mark.parametrize("assumed", [-1.0, math.nan, math.inf])
def test_only_an_epsilon_can_be_assumed(state: Path, assumed: float) -> None:
    with pytest.raises(UsageError, match="no epsilon"):
        recover(state, hospital(), None, assumed)
    assert not state.exists()


def test_the_command_recovers(tmp_path: Path) -> None:
    file = tmp_path / "north.yaml"
    content = {**hospital().model_dump(mode="json", include={"version", "name"}), "state": "state"}
    content["data"] = {"records": {"file": "r.csv", "id": "id", "patient": "patient"}}
    content["policy"] = {"anchor": "anchor.json"}
    file.write_text(json.dumps(content), encoding="utf-8")
    head = spend(tmp_path / "state", range(1, 4), tmp_path / "anchor.json")
    shutil.rmtree(tmp_path / "state")
    outcome = gapweave("site", "recover", file, "--assume-spent", "6.5")
    assert outcome.code == 0
    assert "epsilon 6.50 counts as spent, of a cap of 10" in outcome.out
    view = read_ledger(tmp_path / "state")
    assert view.entries[-1].body == {
        "assume_spent": 6.5, "lost": [{"length": head.length, "hash": head.hash}]
    }  # fmt: skip
    assert gapweave("privacy", "verify", tmp_path / "state").code == 0


# Two writers.


def test_a_second_writer_that_waits_too_long_is_told(state: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(journal_module, "PATIENCE_S", 0.1)
    with Ledger(state, hospital()) as first:
        with pytest.raises(LedgerBusy, match="another process holds the ledger"):
            Ledger(state, hospital())
        first.charge("run", "study", "1", update(1))
    spend(state, range(2, 3))


def test_a_writer_past_the_lock_is_found(state: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """A file system without locks: the second of two writers cannot append to what it has not read."""
    monkeypatch.setattr(journal_module.fcntl, "flock", lambda *_: None)
    with Ledger(state, hospital()) as first, Ledger(state, hospital()) as second:
        first.charge("run", "study", "1", update(1))
        with pytest.raises(RefusedError, match="another process wrote"):
            second.charge("run", "study", "2", update(2))
    assert kinds(state) == ["open", "charge"]
    assert read_ledger(state).intact


# One release, one request.


def test_a_retry_with_another_model_is_refused(state: Path) -> None:
    """The first answer may have left: a second one to other parameters would be another release."""
    with Ledger(state, hospital()) as ledger:
        ledger.charge("run", "study", "request", update(1))
        with pytest.raises(RefusedError, match="charged for another request"):
            ledger.charge("run", "study", "the same round, another model", update(1))
        ledger.charge("another run", "study", "its own", update(1))
    assert kinds(state) == ["open", "charge", "charge"]


def test_what_may_have_left_is_never_computed_again_for_nothing(state: Path) -> None:
    """Believed: a charge without a kept reply is a crash. True: the reply may have left, and its file got lost."""
    policy = {"epsilon": epsilon(updates(1), DELTA) + 1e-6}
    with Ledger(state, hospital(policy=policy)) as ledger:
        ledger.charge("run", "study", "request", update(1))
        ledger.released("request")
        with pytest.raises(BudgetExhausted):
            ledger.charge("run", "study", "request", update(1))
    assert kinds(state) == ["open", "charge", "released"]


def test_a_recomputation_is_free_for_the_very_event_only(state: Path) -> None:
    """Believed: the same request means the same work. True: the site's own file may have changed in between."""
    with Ledger(state, hospital()) as ledger:
        ledger.charge("run", "study", "request", update(1, sigma=20.0))
        ledger.charge("run", "study", "request", update(1, sigma=9.0))
    assert kinds(state) == ["open", "charge", "charge"]


def test_what_the_servers_echo_found_is_not_forgotten_at_the_next_message(tmp_path: Path, state: Path) -> None:
    spend(state, range(1, 3))
    shutil.copytree(state, tmp_path / "copy")
    head = spend(state, range(3, 6))
    with Ledger(tmp_path / "copy", hospital()) as ledger, pytest.raises(RefusedError):
        ledger.check_echo(head)
    with pytest.raises(RefusedError, match="the server has seen 6"):
        spend(tmp_path / "copy", range(3, 4))
    recover(tmp_path / "copy", hospital(), None, 1.0)
    spend(tmp_path / "copy", range(3, 4))


# Which figure keeps the cap.


def test_lost_entries_count_against_what_was_reserved_before(state: Path) -> None:
    policy = {"epsilon": filter_cap(updates(20), DELTA) + 0.2}
    with Ledger(state, hospital(policy=policy)) as ledger:
        assert ledger.reserve("run", "study", updates(20)) == 20
        ledger.charge("run", "study", "1", update(1))
    recover(state, hospital(policy=policy), None, 0.4)
    with Ledger(state, hospital(policy=policy)) as ledger:
        granted = 1
        with suppress(BudgetExhausted):
            for number in range(2, 21):
                ledger.charge("run", "study", str(number), update(number))
                granted = number
    assert granted < 20
    assert read_ledger(state).bound() <= policy["epsilon"]


def test_the_exact_figure_pays_for_nothing_beyond_its_schedule(state: Path) -> None:
    """It has no room by the filter, and would have by the exact figure: but that holds for a fixed schedule alone."""
    policy = {"epsilon": epsilon(updates(12), DELTA) + 1e-6}
    assert policy["epsilon"] < filter_cap(updates(11), DELTA)
    with Ledger(state, hospital(policy=policy)) as ledger:
        assert ledger.reserve("run", "study", updates(11)) == 11
        assert ledger.view.reservation("run")["figure"] == "fixed"
        with pytest.raises(BudgetExhausted):
            ledger.charge("run", "study", "more", update(12))
        ledger.charge("run", "study", "1", update(1))


def test_a_request_that_was_charged_for_one_release_pays_for_no_other(state: Path) -> None:
    with Ledger(state, hospital(policy={"epsilon": 1000})) as ledger:
        ledger.charge("run", "study", "request", update(1))
        with pytest.raises(RefusedError, match="was charged already"):
            ledger.charge("run", "study", "request", update(2))


def test_what_nobody_planned_leaves_room_for_what_the_exact_figure_granted(state: Path) -> None:
    policy = {"epsilon": epsilon(updates(6), DELTA) + 1e-6}
    with Ledger(state, hospital(policy=policy)) as ledger:
        assert ledger.reserve("run", "study", updates(6)) == 6
        assert ledger.view.reservation("run")["figure"] == "fixed"
        ledger.charge("run", "study", "1", update(1))
        with pytest.raises(BudgetExhausted):
            ledger.charge("run", "study", "more", update(99))
        for number in range(2, 7):
            ledger.charge("run", "study", str(number), update(number))
    assert read_ledger(state).bound() <= policy["epsilon"]


def test_a_granted_schedule_that_stopped_early_is_not_reported_as_its_prefix(state: Path) -> None:
    cap = epsilon(updates(25), DELTA) + 1e-6
    with Ledger(state, hospital(policy={"epsilon": cap})) as ledger:
        assert ledger.reserve("run", "study", updates(25)) == 25
        for event in updates(3):
            ledger.charge("run", "study", event.released, event)
        ledger.finish("run")
        assert ledger.view.bound() == min(ledger.view.filtered(), epsilon(updates(25), DELTA))
        assert ledger.view.bound() > epsilon(updates(3), DELTA)


def test_a_granted_schedule_that_never_began_is_given_back(state: Path) -> None:
    with Ledger(state, hospital(policy={"epsilon": epsilon(updates(5), DELTA) + 1e-6})) as ledger:
        assert ledger.reserve("first", "study", updates(5)) == 5
        ledger.finish("first")
        assert ledger.reserve("second", "study", updates(1)) == 1


def test_a_first_study_may_use_the_exact_figure_and_then_gives_nothing_back(state: Path) -> None:
    cap = epsilon(updates(5), DELTA) + 1e-6
    assert filter_cap(updates(5), DELTA) > cap, "the filter alone would not grant it"
    policy = {"epsilon": cap}
    with Ledger(state, hospital(policy=policy)) as ledger:
        assert ledger.reserve("first", "study", updates(5)) == 5
        for event in updates(2):
            ledger.charge("first", "study", event.released, event)
        ledger.finish("first")
        with pytest.raises(BudgetExhausted):
            ledger.reserve("second", "other", updates(1))
        assert ledger.view.bound() <= cap


def test_an_earlier_study_leaves_only_the_filter(state: Path) -> None:
    policy = {"epsilon": epsilon(updates(5), DELTA) + 1e-6}
    with Ledger(state, hospital(policy=policy)) as ledger:
        assert ledger.reserve("first", "study", updates(1)) == 1
        assert ledger.reserve("second", "other", updates(4)) < 4


def test_the_cap_binds_the_filter_over_many_studies(state: Path) -> None:
    """Greedy studies, each chosen after the one before: the figure that the cap binds never passes it."""
    with Ledger(state, hospital(policy={"epsilon": 9.0})) as ledger:
        granted = 0
        for number in range(1, 60):
            try:
                granted += ledger.reserve(f"run {number}", f"study {number}", [update(1, 3.0, f"study {number}")])
            except BudgetExhausted:
                break
            ledger.charge(f"run {number}", f"study {number}", str(number), update(1, 3.0, f"study {number}"))
            assert ledger.view.bound() <= 9.0
            assert ledger.view.spent() <= ledger.view.bound()
    assert 3 < granted < 59


def test_a_cap_that_is_raised_before_anything_left_is_as_if_it_had_always_been(state: Path, tmp_path: Path) -> None:
    """The filter's order suits the cap: with that of the first one, a study of a tenth of the new cap did not fit."""
    events = updates(9)
    cap = {"epsilon": filter_cap(events, DELTA)}
    with Ledger(state, hospital(policy={"epsilon": 0.01})) as ledger, pytest.raises(BudgetExhausted):
        ledger.reserve("run", "study", events)
    with Ledger(state, hospital(policy=cap)) as ledger:
        assert ledger.reserve("run", "study", events) == 9
        assert ledger.view.reservation("run")["figure"] == "renyi"
        order = ledger.view.order
        ledger.charge("run", "study", "1", update(1))
    with Ledger(state, hospital(policy={"epsilon": 0.01})) as ledger:
        assert ledger.view.order == order, "and afterwards nothing changes it"
