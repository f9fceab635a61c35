"""Replies of a site that lies in form: refused or screened by name, in bounded memory, nothing written elsewhere."""

from __future__ import annotations

import io
import json
import pickle
import tracemalloc
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from flwr.app import Array, ArrayRecord, ConfigRecord, Message, RecordDict
from hospitals import plan_of
from pretence import ALL, Answer, Pretence, Pretender, loop, study_of

from gapweave.server.model_card import save_model
from gapweave.server.summary import summarise_deployment
from gapweave.shared import PROTOCOL_VERSION, wire
from gapweave.shared.errors import TooFewSites
from gapweave.shared.report.run_report import write_report
from gapweave.shared.tables import BINS, read_tables
from gapweave.shared.tensorfile import Arrays, dump

pytestmark = pytest.mark.usefixtures("fresh_sites")

HONEST = ("a", "b", "d", "e", "f")
ROUND = 2
"""In which the bad site answers otherwise."""
MOST_BYTES = 8 << 20
"""What the server may take beyond what it was sent; the little model has 0.1 MB."""

Hostile = Callable[[Arrays], Any]


def honest(arrays: Arrays, **header: Any) -> RecordDict:
    return wire.pack({"status": "ok", "round": ROUND, **header}, arrays)


def with_array(arrays: Arrays, array: Array) -> RecordDict:
    """An honest reply but for one array."""
    content = honest(arrays)
    group = sorted(arrays)[0]
    content[group] = ArrayRecord(dict.fromkeys(content.array_records[group], array))
    return content


def of_form(change: Callable[[np.ndarray], np.ndarray]) -> Hostile:
    return lambda arrays: honest(
        {group: {name: change(value) for name, value in part.items()} for group, part in arrays.items()}
    )


def npy(shape: tuple[int, ...], data: bytes = b"\0" * 64) -> bytes:
    file = io.BytesIO()
    np.lib.format.write_array_header_1_0(file, {"descr": "<f4", "fortran_order": False, "shape": shape})
    return file.getvalue() + data


class Bomb:
    """Runs when unpickled."""

    def __reduce__(self) -> Any:
        return (Path.touch, (Path("unpickled"),))


def objects() -> bytes:
    file = io.BytesIO()
    np.save(file, np.array([Bomb()], dtype=object), allow_pickle=True)
    return file.getvalue()


def header_of(text: str) -> Hostile:
    def reply(arrays: Arrays) -> RecordDict:
        content = honest(arrays)
        content["header"] = ConfigRecord({"json": text})
        return content

    return reply


GIGABYTES = (1 << 30,)

CASES: dict[str, tuple[Hostile, str]] = {
    "one number less": (of_form(lambda value: value.ravel()[:-1]), "has shape"),
    "one axis more": (of_form(lambda value: value[None]), "has shape"),
    "ten times as long": (of_form(lambda value: np.concatenate([value] * 10)), "has shape"),
    "ten times as many keys": (
        lambda arrays: honest(
            {
                group: part | {f"{name}.{at}": value for name, value in part.items() for at in range(9)}
                for group, part in arrays.items()
            }
        ),
        "other keys than the group has",
    ),
    "ten times as many groups": (
        lambda arrays: honest(
            arrays | {f"{group}{at}": part for group, part in arrays.items() for at in range(9)},
        ),
        "other parameter groups",
    ),
    "groups named as files": (
        lambda arrays: honest(arrays | {"../../outside": {"/tmp/outside": np.zeros(3, np.float32)}}),
        "other parameter groups",
    ),
    "a header of four gigabytes": (
        lambda arrays: with_array(arrays, Array("float32", GIGABYTES, "numpy.ndarray", npy(GIGABYTES))),
        "cannot be read",
    ),
    "four gigabytes declared, another header": (
        lambda arrays: with_array(arrays, Array("float32", GIGABYTES, "numpy.ndarray", npy((16,)))),
        "cannot be read",
    ),
    "four gigabytes in the file's header only": (
        lambda arrays: with_array(arrays, Array("float32", (16,), "numpy.ndarray", npy(GIGABYTES))),
        "cannot be read",
    ),
    "a pickle": (
        lambda arrays: with_array(arrays, Array("object", (1,), "numpy.ndarray", objects())),
        "cannot be read",
    ),
    "a pickle called numbers": (
        lambda arrays: with_array(arrays, Array("float32", (1,), "numpy.ndarray", pickle.dumps(Bomb()))),
        "cannot be read",
    ),
    "doubles": (of_form(lambda value: value.astype(np.float64)), "type float64"),
    "another protocol": (
        header_of(json.dumps({"protocol": PROTOCOL_VERSION + 1, "status": "ok", "round": ROUND})),
        "protocol",
    ),
    "no protocol": (header_of(json.dumps({"status": "ok", "round": ROUND})), "protocol"),
    "a header that is no JSON": (header_of("{" * 100_000), "without a Gapweave header"),
    "a header nested beyond end": (header_of("[" * 100_000 + "]" * 100_000), "without a Gapweave header"),
    "another round": (lambda arrays: honest(arrays, round=ROUND - 1), "an answer for another round"),
    "a later round": (lambda arrays: honest(arrays, round=ROUND + 1), "an answer for another round"),
    "no round": (lambda arrays: honest(arrays, round=None), "an answer for another round"),
    "no header at all": (lambda arrays: RecordDict(), "without a Gapweave header"),
}


class Hostiles(Pretender):
    """Honest but in one round."""

    def __init__(self, hostile: Hostile) -> None:
        super().__init__("c")
        self.hostile = hostile

    def train(self, number: int, arrays: Arrays) -> Answer:
        answer = super().train(number, arrays)
        return self.hostile(answer[1]) if number == ROUND else answer


def files_in(folder: Path) -> set[Path]:
    return set(folder.rglob("*"))


@pytest.mark.no_cover
@pytest.mark.parametrize("name", CASES)
def test_a_hostile_reply_costs_its_sender_one_round(tmp_path: Path, name: str, monkeypatch: pytest.MonkeyPatch) -> None:
    hostile, reason = CASES[name]
    monkeypatch.chdir(tmp_path)
    of = study_of(training={"rounds": 3}, aggregation={"default": "auto"})
    sites = [Pretender(site) for site in HONEST]
    run = loop(tmp_path, of, Pretence(*sites, Hostiles(hostile)))
    before = files_in(tmp_path)
    tracemalloc.start()
    run.run()
    peak = tracemalloc.get_traced_memory()[1]
    tracemalloc.stop()
    assert peak < MOST_BYTES
    line = list(run.directory.rounds())[ROUND - 1]
    said = line["sites"]["c"].get("reason", "")
    screened = {group: entry["screened"].get("c", "") for group, entry in line["groups"].items()}
    assert reason in said or all(reason in text for text in screened.values()), (said, screened)
    assert all("c" not in entry["holders"] for entry in line["groups"].values())
    assert [entry["sites"]["c"]["status"] for entry in run.directory.rounds()][::2] == ["ok", "ok"]
    new = {path for path in files_in(tmp_path) - before if not path.is_relative_to(tmp_path / "run")}
    assert not new, "something was written outside the run directory"

    class Away(Pretender):
        def train(self, number: int, arrays: Arrays) -> Answer:
            return ({"status": "failed"}, {}) if number == ROUND else super().train(number, arrays)

    other = loop(tmp_path / "other", of, Pretence(*[Pretender(site) for site in HONEST], Away("c")))
    other.run()
    assert dump(run.state.groups, {}) == dump(other.state.groups, {}), "as if it had not answered"


class Twice(Pretence):
    """Every reply comes twice, the second time with another content."""

    def pull_messages(self, message_ids: Any) -> list[Message]:
        replies = super().pull_messages(message_ids)
        return replies + [
            Message(honest({group: {} for group in ALL}), reply_to=self._first)
            for reply in replies
            if reply.metadata.message_type == wire.TRAIN
        ]

    def _answer(self, message: Message) -> Message:
        self._first = message
        return super()._answer(message)


def test_of_two_replies_to_one_message_the_first_counts(tmp_path: Path) -> None:
    of = study_of(training={"rounds": 2}, aggregation={"default": "auto"})
    once = loop(tmp_path / "once", of, Pretence(*[Pretender(site) for site in HONEST]))
    twice = loop(tmp_path / "twice", of, Twice(*[Pretender(site) for site in HONEST]))
    once.run()
    twice.run()
    assert dump(once.state.groups, {}) == dump(twice.state.groups, {})
    assert all(site["status"] == "ok" for line in twice.directory.rounds() for site in line["sites"].values())


@pytest.mark.parametrize(
    "name", ["../../outside", "/outside", "a\0b", "x" * 100_000, "a:b/c:d", "history/a", "a|b", ""]
)
def test_a_name_is_no_path(tmp_path: Path, name: str, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(tmp_path)
    of = study_of(training={"rounds": 2}, aggregation={"default": "auto", "history": 0.5})
    run = loop(tmp_path, of, Pretence(*[Pretender(site) for site in HONEST], Pretender(name)))
    before = files_in(tmp_path)
    run.run()
    assert all(path.is_relative_to(tmp_path / "run") for path in files_in(tmp_path) - before)
    again = loop(tmp_path, of, Pretence())
    assert dump(again.state.groups, {}) == dump(run.state.groups, {}), "the checkpoint is read back"
    assert again.state.history.keys() == run.history.sums.keys()


GOOD = {"noise_multiplier": 1.0, "sample_rate": 0.5, "n_hat": 100, "delta": 1e-5}


@pytest.mark.parametrize(
    "stated",
    [
        {"n_hat": 10**400},
        {"n_hat": 0},
        {"noise_multiplier": 1e-6},
        {"noise_multiplier": -1.0},
        {"sample_rate": 2.0},
        {"delta": 2.0},
        {"delta": 0.0},
        {"preparation": [{"kind": "noisy_count", "noise_multiplier": 1.0, "steps": 10**9}]},
        {"preparation": [{"kind": "dp_sgd", "noise_multiplier": 0.16, "sample_rate": 0.5, "steps": 10**4}]},
        {"preparation": [{"kind": "noisy_count", "noise_multiplier": 1.0, "steps": 1001}]},
        {"looks": [{"kind": "count_table", "noise_multiplier": 100.0 + at} for at in range(51)]},
        {"table": {"kind": "count_table", "noise_multiplier": "1"}},
        {"no_table": "x" * 1000},
    ],
    ids=str,
)
def test_an_absurd_plan_is_refused_at_the_door(tmp_path: Path, stated: dict[str, Any]) -> None:
    """Each ended a run, its summary, or filled the hub's memory: sums and figures met the number later."""
    of = study_of(training={"rounds": 2}, aggregation={"default": "mean", "weights": "patients"})
    sites = [Pretender(site, hello={"plan": GOOD}) for site in HONEST]
    run = loop(tmp_path, of, Pretence(*sites, Pretender("c", hello={"plan": {**GOOD, **stated}})))
    run.run()
    assert (run.peers["c"].status, run.peers["c"].reason) == ("failed", "a handshake of another form")
    assert {run.peers[site].status for site in HONEST} == {"ok"}


def nest(depth: int) -> Any:
    return json.loads("[" * depth + "]" * depth)


GOOD = {"noise_multiplier": 1.0, "sample_rate": 0.5, "n_hat": 100, "delta": 1e-5}


@pytest.mark.no_cover
@pytest.mark.parametrize(
    "hello",
    [
        {"plan": {**GOOD, "more": nest(900)}},
        {"ledger": {"hash": nest(900)}},
        {"plan": {**GOOD, "no_table": "\ud800"}},
        {"modalities": ["labs\n# Approved"]},
        {"modalities": ["labs", "x" * 10_000]},
        {"plan": {**GOOD, "more": "x" * 2_000_000}},
        {"groups": [*ALL, ALL[0]]},
        {"groups": ["x" * 100_000]},
        {"plan": {}},
        {"plan": {**GOOD, "noise_multiplier": 0.0}},
        {"plan": {**GOOD, "preparation": [{"kind": "count_table", "released": "x", "noise_multiplier": 1e-6}]}},
        {"plan": {**GOOD, "preparation": [{"kind": "dp_sgd", "released": "x", "noise_multiplier": 0.01}]}},
    ],
    ids=[
        "deep plan",
        "deep ledger",
        "half a character",
        "markup",
        "long name",
        "huge",
        "group twice",
        "foreign group",
        "no plan",
        "no noise",
        "free table",
        "free step",
    ],
)
def test_a_handshake_that_would_end_the_run_or_swell_its_files_is_left_out(tmp_path: Path, hello: Any) -> None:
    of = plan_of(private=True, training={"rounds": 2}, aggregation={"quorum": 2, "deadline_s": 5, "shrink": True})
    sites = [Pretender(name, hello={"plan": GOOD}) for name in HONEST]
    run = loop(tmp_path, of, Pretence(*sites, Pretender("c", hello={"plan": GOOD, **hello})))
    run.run()
    assert {peer.status for name, peer in run.peers.items() if name not in HONEST} == {"failed"}
    assert all(run.peers[name].last_round == 2 for name in HONEST)
    summary = summarise_deployment(of, run)
    run.directory.write_json("summary.json", summary)
    save_model(run.directory, of, run.final, run.peers)
    write_report(run.directory)
    kept = sum(file.stat().st_size for file in run.directory.path.rglob("*") if file.is_file())
    assert len(json.dumps(summary)) < 20_000
    assert kept < 1_000_000
    assert "Approved" not in (run.directory.path / "model" / "README.md").read_text()


@pytest.mark.parametrize("greets", [{}, {"status": "refused"}], ids=["ok", "refused"])
def test_who_took_part_and_comes_back_with_foreign_groups_is_left_out(greets: Any, tmp_path: Path) -> None:
    """It ended in a bare KeyError after the last round, and again at every resume."""
    of = study_of()
    stops = [Pretender("a"), *(Pretender(name, status={2: "failed"}) for name in "bc")]
    with pytest.raises(TooFewSites):
        loop(tmp_path, of, Pretence(*stops)).run()
    back = Pretender("c", hello={"groups": ["x"], **greets})
    run = loop(tmp_path, of, Pretence(Pretender("a"), Pretender("b"), back))
    run.run()
    assert run.peers["c"].last_round == 1
    assert "declares groups that the study does not share" in run.peers["c"].reason
    assert run.state.round == of.training.rounds


@pytest.mark.parametrize("bad", ["bc", "abc"])
def test_sites_whose_updates_cannot_be_used_do_not_make_a_quorum(bad: str, tmp_path: Path) -> None:
    """A run that had diverged was paid for to its last round; one that one site alone made had its quorum."""

    def broken(number: int, arrays: Arrays) -> Arrays:
        for part in arrays.values():
            next(iter(part.values()))[...] = np.nan
        return arrays

    of = study_of(quorum=2)
    sites = [Pretender(name, **({"alter": broken} if name in bad else {})) for name in "abc"]
    with pytest.raises(TooFewSites, match=r"sent what can be used in round 1.*b: .* is not finite") as caught:
        loop(tmp_path, of, Pretence(*sites)).run()
    assert caught.value.exit_code == 4
    run = loop(tmp_path, of, Pretence(*map(Pretender, "abc")))
    assert run.state.round == 0
    run.run()


def test_half_a_character_in_an_excuse_ends_no_run(tmp_path: Path) -> None:
    class Excuse(Pretender):
        def train(self, number: int, arrays: Arrays) -> Answer:
            return {"status": "failed", "text": "\ud800", "round": number}, {}

    of = study_of()
    run = loop(tmp_path, of, Pretence(*map(Pretender, HONEST), Excuse("c")))
    run.run()
    run.directory.write_json("summary.json", summarise_deployment(of, run))
    write_report(run.directory)
    assert "a message without a Gapweave header" in (run.directory.path / "rounds.jsonl").read_text()


def test_a_long_excuse_is_cut(tmp_path: Path) -> None:
    """Twenty megabytes a round stood in the log and in the report."""

    class Talks(Pretender):
        def train(self, number: int, arrays: Arrays) -> Answer:
            return {"status": "failed", "text": "x" * 1_000_000}, {}

    run = loop(tmp_path, study_of(training={"rounds": 1}), Pretence(*[Pretender(site) for site in HONEST], Talks("c")))
    run.run()
    (line,) = run.directory.rounds()
    assert line["sites"]["c"] == {"status": "failed", "reason": "x" * 500}


@pytest.mark.parametrize("count", [2**62, -(2**63), 10**10])
def test_a_table_of_impossible_counts_is_none(count: int) -> None:
    tables = np.zeros((1, 2, BINS), np.int64)
    assert read_tables(tables.tolist(), 1, 1.0) is not None
    tables[0, 1, 3] = count
    assert read_tables(tables.tolist(), 1, 1.0) is None
