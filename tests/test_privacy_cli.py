"""`gapweave privacy verify | report` on real ledgers, and on ledgers that somebody edited."""

import json
import re
import sqlite3
from contextlib import closing

import pytest

from gapweave.client.ledger import Ledger
from gapweave.shared.cli import _run
from gapweave.shared.config.base import parse
from gapweave.shared.config.site import Site
from gapweave.shared.privacy.events import PrivacyEvent
from gapweave.shared.privacy.ledger import LEDGER_FILE, entry_hash, read_ledger
from gapweave.shared.privacy.room import further_epsilon
from gapweave.shared.report.ledger_report import POINTS, ledger_facts
from gapweave.shared.report.ledger_text import left_figure
from gapweave.shared.report.wording import rounded_up

SITE = {
    "version": 1,
    "name": "north",
    "cohort": "icu-2014",
    "data": {
        "records": {"file": "r.csv", "id": "id", "patient": "p", "label": {"died": "died"}},
        "labs": {"file": "l.csv", "columns": {"na": "na"}},
    },
    "policy": {"epsilon": 10},
}
COUNT = PrivacyEvent(kind="noisy_count", released="number of training patients", noise_multiplier=2.5)


def update(number, **changes):
    fields = {"kind": "dp_sgd", "noise_multiplier": 1.3, "sample_rate": 0.1, "steps": 5, "n_hat": 640} | changes
    return PrivacyEvent(released=f"update of round {number}", **fields)


@pytest.fixture
def state(tmp_path):
    """A ledger of two studies: 8 updates and a count, and 1 of 3 reserved updates of a run that is not closed."""
    folder = tmp_path / "north"
    with Ledger(folder, parse(Site, SITE, "site.yaml")) as ledger:
        ledger.approve("a" * 64, "sepsis", "officer")
        ledger.once("run-1", "a" * 64, COUNT, lambda: [640.0])
        ledger.reserve("run-1", "a" * 64, [update(number) for number in range(1, 9)])
        for number in range(1, 9):
            ledger.charge("run-1", "a" * 64, f"request-{number}", update(number))
            ledger.released(f"request-{number}")
        ledger.finish("run-1")
        ledger.approve("b" * 64, "<b>los</b>", "officer")
        ledger.reserve("run-2", "b" * 64, [update(number, noise_multiplier=2.0) for number in (1, 2, 3)])
        ledger.charge("run-2", "b" * 64, "request-x", update(1, noise_multiplier=2.0))
    return folder


def edit(state, statement, *values):
    """Change the file behind the ledger's back."""
    with closing(sqlite3.connect(state / LEDGER_FILE, isolation_level=None)) as connection:
        connection.execute("DROP TRIGGER IF EXISTS entries_stay")
        connection.execute("DROP TRIGGER IF EXISTS entries_remain")
        connection.execute(statement, values)


def gapweave(capsys, *words):
    code = _run([str(word) for word in words], False)
    output = capsys.readouterr()
    return code, output.out, output.err


def test_an_unchanged_ledger_passes_and_says_what_an_anchor_would_add(state, capsys):
    code, out, _ = gapweave(capsys, "privacy", "verify", state)
    assert code == 0
    assert "unanchored: every entry follows from the one before" in out
    view = read_ledger(state)
    assert (
        f"epsilon {rounded_up(view.bound()):.2f} of a cap of 10, whoever planned which study after seeing what" in out
    )
    assert f"epsilon {rounded_up(view.spent()):.2f} for schedules fixed in advance; delta 1e-5" in out


def test_verify_prints_the_contract_as_json(state, capsys):
    code, out, _ = gapweave(capsys, "privacy", "verify", state, "--json")
    content = json.loads(out)
    assert code == 0
    assert content.items() >= read_ledger(state).summary().items()
    assert content.keys() >= {
        "site",
        "cohort",
        "unit",
        "epsilon",
        "epsilon_filter",
        "delta",
        "cap",
        "releases",
        "intact",
    }
    assert (content["site"], content["cohort"], content["cap"], content["intact"]) == (
        "north",
        "icu-2014",
        10,
        "unanchored",
    )


def test_the_ledger_file_itself_is_a_path_too(state, capsys):
    assert gapweave(capsys, "privacy", "verify", state / LEDGER_FILE)[0] == 0


@pytest.mark.parametrize("command", ["verify", "report"])
@pytest.mark.parametrize("as_json", [False, True])
def test_an_edited_entry_is_named_and_refused(state, capsys, as_json, command):
    """Somebody halves what a round cost."""
    body = json.loads(_body(state, 6))
    body["event"]["steps"] = 2
    edit(state, "UPDATE entries SET body = ? WHERE sequence = 6", json.dumps(body, sort_keys=True))
    code, out, err = gapweave(capsys, "privacy", command, state, *(["--json"] if as_json else []))
    assert code == 3
    if as_json:
        assert (json.loads(out)["intact"], json.loads(out)["broken_at"]) == (False, 6)
    elif command == "report":
        assert "breaks at entry 6" in err
    else:
        assert "breaks at entry 6" in out
        assert out.count("\n") == 1


def _body(state, sequence):
    with closing(sqlite3.connect(state / LEDGER_FILE)) as connection:
        return connection.execute("SELECT body FROM entries WHERE sequence = ?", (sequence,)).fetchone()[0]


def test_an_edit_with_a_fresh_hash_breaks_the_entry_after_it(state, capsys):
    """The hash of one entry can be forged; the next entry still holds the old one."""
    with closing(sqlite3.connect(state / LEDGER_FILE)) as connection:
        time, kind, before = connection.execute(
            "SELECT time, kind, previous FROM entries WHERE sequence = 5"
        ).fetchone()
    forged = entry_hash(5, time, kind, "{}", before)
    edit(state, "UPDATE entries SET body = '{}', hash = ? WHERE sequence = 5", forged)
    code, out, _ = gapweave(capsys, "privacy", "verify", state)
    assert code == 3
    assert "breaks at entry 6" in out


@pytest.mark.parametrize("body", ["{}", "[]", "not json", "null", '{"event": {"kind": "magic"}}'])
@pytest.mark.parametrize("sequence", [1, 3])
def test_whatever_an_entry_was_changed_to_the_answer_is_json(state, capsys, sequence, body):
    edit(state, "UPDATE entries SET body = ? WHERE sequence = ?", body, sequence)
    code, out, _ = gapweave(capsys, "privacy", "verify", state, "--json")
    assert code == 3
    content = json.loads(out)
    assert (content["intact"], content["broken_at"]) == (False, sequence)
    assert content.keys() >= {"site", "cohort", "unit", "epsilon", "delta", "cap", "releases"}


@pytest.mark.parametrize("content", [b"", b"no database"])
@pytest.mark.parametrize("command", ["verify", "report"])
def test_of_a_ledger_that_cannot_be_read_the_answer_is_json(state, capsys, command, content):
    for file in state.glob("ledger.sqlite*"):
        file.write_bytes(content)
    code, out, err = gapweave(capsys, "privacy", command, state, "--json")
    assert code == 3
    assert err.startswith("error: ")
    answer = json.loads(out)
    assert answer["intact"] is False
    assert answer.keys() >= {"site", "cohort", "unit", "epsilon", "delta", "cap", "releases"}


def test_a_removed_entry_in_the_middle_is_found(state, capsys):
    edit(state, "DELETE FROM entries WHERE sequence = 7")
    code, out, _ = gapweave(capsys, "privacy", "verify", state)
    assert code == 3
    assert "breaks at entry 7" in out


def test_a_removed_last_entry_is_what_unanchored_warns_of(state, capsys):
    """The chain of what is left holds: only a copy of the head kept elsewhere can tell. It must never say true."""
    edit(state, "DELETE FROM entries WHERE sequence = (SELECT max(sequence) FROM entries)")
    code, out, _ = gapweave(capsys, "privacy", "verify", state, "--json")
    assert code == 0
    assert json.loads(out)["intact"] == "unanchored"


def test_an_emptied_ledger_is_refused(state, capsys):
    edit(state, "DELETE FROM entries")
    code, _, err = gapweave(capsys, "privacy", "verify", state)
    assert code == 3
    assert "holds no entries" in err


def test_no_ledger_is_a_usage_error_and_no_database_a_refusal(tmp_path, capsys):
    assert gapweave(capsys, "privacy", "verify", tmp_path)[0] == 2
    (tmp_path / LEDGER_FILE).write_text("this is no database, but long enough to look at" * 30)
    assert gapweave(capsys, "privacy", "verify", tmp_path)[0] == 3


def test_the_report_in_words(state, capsys):
    code, out, _ = gapweave(capsys, "privacy", "report", state)
    assert code == 0
    view = read_ledger(state)
    assert "Site north, cohort icu-2014" in out
    assert f"spent      epsilon {rounded_up(view.bound()):.2f} of a cap of 10" in out
    assert f"left       a further study of epsilon up to {left_figure(further_epsilon(view))} fits" in out
    assert "Study sepsis (aaaaaaaaaaaa), 1 run" in out
    text = re.sub(r"\s+", " ", out)
    assert f"epsilon {rounded_up(view.spent()):.2f} for schedules fixed in advance; delta 1e-5" in text
    assert "updates of shared model parameters, 8 times: 40 steps, sigma 1.3, q 0.1, clip 1, for 640 patients" in text
    assert "number of training patients, noised, once: discrete Laplace noise of scale 2.5" in text
    assert "What it does not cover:" in out


def test_the_report_as_json_adds_studies_and_reservations(state, capsys):
    _, out, _ = gapweave(capsys, "privacy", "report", state, "--json")
    content = json.loads(out)
    assert [study["name"] for study in content["studies"]] == ["sepsis", "<b>los</b>"]
    assert content["left"] == further_epsilon(read_ledger(state))
    assert content["epsilon_filter"] < content["reserved_filter"] < 10
    assert max(study["epsilon"] for study in content["studies"]) < content["epsilon"] < content["reserved"] < 10
    assert content["curve"][-1] == [10, pytest.approx(content["epsilon"])]
    assert content["curve_filter"][-1] == [10, pytest.approx(content["epsilon_filter"])]
    assert content["entries"] == len(read_ledger(state).entries)


def test_the_page_for_a_board_stands_alone(state, tmp_path, capsys):
    out = tmp_path / "board.html"
    assert gapweave(capsys, "privacy", "report", state, "--out", out)[0] == 0
    page = out.read_text()
    assert "&lt;b&gt;los&lt;/b&gt;" in page
    assert "<b>los" not in page
    assert not re.findall(r"""(?:src|href|action)\s*=\s*["'](?!#)|@import|<(?:script|link|img|iframe)\b""", page)
    assert page.count("<svg ") == 1
    for text in (
        "Privacy report of north",
        "1.3",
        "640",
        "What the guarantee means",
        read_ledger(state).entries[-1].hash,
    ):
        assert text in page, text
    assert gapweave(capsys, "privacy", "report", state, "--out", out)[0] == 0
    assert out.read_text() == page


def test_json_stays_json_when_a_page_is_written_too(state, tmp_path, capsys):
    _, out, _ = gapweave(capsys, "privacy", "report", state, "--json", "--out", tmp_path / "board.html")
    assert json.loads(out)["site"] == "north"


def test_a_changed_ledger_gets_no_report(state, tmp_path, capsys):
    edit(state, "DELETE FROM entries WHERE sequence = 7")
    code, _, err = gapweave(capsys, "privacy", "report", state, "--out", tmp_path / "board.html")
    assert code == 3
    assert "breaks at entry 7" in err
    assert not (tmp_path / "board.html").exists()


def test_a_release_without_noise_ends_the_guarantee(state, tmp_path, capsys):
    with Ledger(state, parse(Site, SITE, "site.yaml")) as ledger:
        ledger.charge("run-3", "c" * 64, "request-u", update(1, kind="unnoised", noise_multiplier=0.0))
    code, out, _ = gapweave(capsys, "privacy", "report", state)
    assert code == 0
    assert "no guarantee: something was released without noise" in out
    assert "WITHOUT NOISE" in out
    assert "left       no private study: something was released without noise" in out
    facts = ledger_facts(read_ledger(state))
    assert (facts.left, facts.reserved, facts.studies[-1].epsilon, facts.studies[-1].name) == (None, None, None, "")
    gapweave(capsys, "privacy", "report", state, "--out", tmp_path / "board.html")
    assert "does not hold" in (tmp_path / "board.html").read_text()


def test_a_ledger_before_its_first_release(tmp_path, capsys):
    with Ledger(tmp_path / "new", parse(Site, SITE, "site.yaml")):
        pass
    assert gapweave(capsys, "privacy", "report", tmp_path / "new", "--out", tmp_path / "board.html")[0] == 0
    assert gapweave(capsys, "privacy", "report", tmp_path / "new")[1].count("Nothing was released.") == 1
    assert "<svg" not in (tmp_path / "board.html").read_text()


def test_a_long_ledger_has_a_curve_of_few_points(tmp_path):
    """Each point is an accounting of its own."""
    with Ledger(tmp_path / "long", parse(Site, SITE, "site.yaml")) as ledger:
        for number in range(1, 101):
            ledger.charge("run-1", "a" * 64, f"request-{number}", update(number, noise_multiplier=40.0))
    facts = ledger_facts(read_ledger(tmp_path / "long"))
    assert len(facts.curve) == POINTS + 1
    assert facts.curve[0] == (0, 0.0)
    assert facts.curve[-1] == (100, pytest.approx(facts.summary["epsilon"]))
    assert all(before <= after + 0.01 for (_, before), (_, after) in zip(facts.curve, facts.curve[1:], strict=False))


PARTS = [
    {"part": "sensitivity", "passed": True, "text": "at most 1.0", "figures": {}},
    {"part": "noise law", "passed": True, "text": "sd <1.001>", "figures": {}},
]


def test_the_result_of_an_audit_is_shown_beside_the_ledger(state, tmp_path, capsys):
    result = tmp_path / "audit.json"
    result.write_text(json.dumps({"claimed": 1.0, "lower_bound": 0.5, "passed": True, "parts": PARTS}))
    page = tmp_path / "board.html"
    code, out, _ = gapweave(capsys, "privacy", "report", state, "--audit", result, "--json", "--out", page)
    assert code == 0
    content = json.loads(out)["audit"]
    assert content["passed"] is True
    assert [part["part"] for part in content["parts"]] == ["sensitivity", "noise law"]
    assert content["sha256"] in page.read_text()
    assert "sd &lt;1.001&gt;" in page.read_text()
    assert "Passed:" in page.read_text()
    assert "trains: passed" in gapweave(capsys, "privacy", "report", state, "--audit", result)[1]


def test_a_failed_part_fails_the_audit_whatever_the_file_says(state, tmp_path, capsys):
    result = tmp_path / "audit.json"
    result.write_text(json.dumps({"passed": True, "parts": [PARTS[0], {**PARTS[1], "passed": False}]}))
    gapweave(capsys, "privacy", "report", state, "--audit", result, "--out", tmp_path / "board.html")
    assert "FAILED:" in (tmp_path / "board.html").read_text()
    _, out, _ = gapweave(capsys, "privacy", "report", state, "--audit", result)
    assert "trains: FAILED (noise law)" in out


def test_an_audit_of_another_site_is_refused(state, capsys, tmp_path):
    file = tmp_path / "audit.json"
    parts = [{"part": "noise", "passed": True, "text": "as declared"}]
    for site, code in (("north", 0), ("south", 2)):
        file.write_text(json.dumps({"passed": True, "parts": parts, "site": site, "study": "sepsis"}), encoding="utf-8")
        found, out, error = gapweave(capsys, "privacy", "report", state, "--audit", file)
        assert found == code
        assert ("passed, with study 'sepsis'" in out) is (code == 0)
        assert ("of site 'south', not 'north'" in error) is (code == 2)


@pytest.mark.parametrize("text", ["", "[]", "{}", '{"passed": true, "parts": [1]}', None])
def test_what_is_no_audit_is_refused(state, tmp_path, capsys, text):
    result = tmp_path / "audit.json"
    if text is not None:
        result.write_text(text)
    code, out, err = gapweave(capsys, "privacy", "report", state, "--audit", result)
    assert (code, out) == (2, "")
    assert "this is no result of an audit" in err


def test_without_an_audit_the_report_claims_none(state, tmp_path, capsys):
    gapweave(capsys, "privacy", "report", state, "--out", tmp_path / "board.html")
    assert "No result of an audit was given to this report: none is claimed" in (tmp_path / "board.html").read_text()
    assert json.loads(gapweave(capsys, "privacy", "report", state, "--json")[1])["audit"] is None
