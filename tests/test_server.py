"""The round loop: who takes part, what is taken of whom, what a lost quorum leaves, and how a run goes on."""

from __future__ import annotations

import threading
import time
import types
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from flwr.app import Error, Message, RecordDict
from flwr.common.constant import ErrorCode
from hospitals import Wire, build, plan_of
from pretence import ALL, RUN, Answer, Pretence, Pretender, loop, moved, study_of

from gapweave.client import app as client_app
from gapweave.server import app as server_app
from gapweave.server import mail
from gapweave.server.aggregation import GroupAggregation, initial_groups
from gapweave.server.app import Watch, run_study
from gapweave.server.checkpoint import Checkpoint, load_checkpoint, save_checkpoint
from gapweave.server.screening import norm, reason_to_reject
from gapweave.server.strategy import Observer, RoundLoop
from gapweave.server.summary import unasked
from gapweave.shared import tensorfile, wire
from gapweave.shared.errors import DataError, RefusedError, TooFewSites, Unreachable, UsageError
from gapweave.shared.files import alone
from gapweave.shared.privacy.ledger import read_ledger
from gapweave.shared.rundir import RunDirectory
from gapweave.shared.tensorfile import Arrays

pytestmark = pytest.mark.usefixtures("fresh_sites")


# Aggregation by group.


def test_each_group_is_the_mean_over_those_who_hold_it(tmp_path: Path) -> None:
    """Whoever lacks a group is not in its denominator; whoever holds it alone decides it alone."""
    few = ["fusion", "head/labs", "encoder/labs"]
    of = study_of()
    sites = [Pretender("a", 1.0, few), Pretender("b", 2.0, few), Pretender("c", 6.0, [*few, "head/note"])]
    run = loop(tmp_path, of, Pretence(*sites))
    run.run()
    assert moved(initial_groups(of), run.state.groups) == {
        **dict.fromkeys(ALL, 0.0),
        **dict.fromkeys(few, 9.0),
        "head/note": 18.0,
    }


@pytest.mark.parametrize(("rule", "scale"), [("auto", 10.0), ("median", 10.0), ("mean", 1e3)])
def test_the_order_of_answers_does_not_change_a_bit(rule: str, scale: float) -> None:
    of = study_of(aggregation={"default": rule})
    start, generator = initial_groups(of), np.random.default_rng(0)
    updates = {
        name: {
            group: {key: generator.normal(size=value.shape).astype(np.float32) for key, value in part.items()}
            for group, part in start.items()
        }
        for name in "abcd"
    }
    # Two that cancel.
    huge = {
        group: {key: value * np.float32(scale) for key, value in part.items()} for group, part in updates["b"].items()
    }
    updates["a"] = huge
    updates["e"] = {group: {key: -value for key, value in part.items()} for group, part in huge.items()}
    results = []
    for order in ("abcde", "edcba", "cadbe"):
        combine = GroupAggregation(of, start)
        for name in order:
            combine.add(name, updates[name])
        results.append(tensorfile.dump(combine.finish()[0], {}))
    assert results[0] == results[1] == results[2]


def test_a_strict_study_leaves_a_group_of_two_holders_alone(tmp_path: Path) -> None:
    of = study_of(aggregation={"strict": True})
    two = [group for group in ALL if group != "head/note"]
    sites = [Pretender("a"), Pretender("b"), Pretender("c", groups=two)]
    run = loop(tmp_path, of, Pretence(*sites))
    run.run()
    steps = moved(initial_groups(of), run.state.groups)
    assert steps["head/note"] == 0
    assert steps["fusion"] == 3
    lines = list(run.directory.rounds())
    assert "2 holders" in lines[0]["groups"]["head/note"]["left_alone"]
    assert "left_alone" not in lines[0]["groups"]["fusion"]


# Screening.


def broken(value: float, group: str = "head/labs") -> Callable[[int, Arrays], Arrays]:
    def alter(number: int, arrays: Arrays) -> Arrays:
        arrays[group]["weight"][0, 0] = value
        return arrays

    return alter


@pytest.mark.parametrize("value", [np.nan, np.inf, -np.inf])
def test_an_update_that_is_not_finite_is_screened_by_group_and_named(tmp_path: Path, value: float) -> None:
    of = study_of()
    run = loop(tmp_path, of, Pretence(Pretender("a", 1.0), Pretender("b", 3.0, alter=broken(value))))
    run.run()
    steps = moved(initial_groups(of), run.state.groups)
    assert steps["head/labs"] == 3.0, "the other site's alone"
    assert steps["head/note"] == steps["fusion"] == 6.0, "its other groups count"
    for line in run.directory.rounds():
        assert line["groups"]["head/labs"]["screened"] == {"b": "weight is not finite"}
        assert line["groups"]["head/labs"]["holders"] == ["a"]
        assert line["groups"]["head/note"]["screened"] == {}
        size = 4 + 1
        assert line["groups"]["head/note"]["norms"] == pytest.approx({"a": size**0.5, "b": 3 * size**0.5})
        assert line["groups"]["head/labs"]["norms"].keys() == {"a"}
        assert line["sites"]["b"] == {"status": "ok"}


def test_a_group_of_which_nothing_is_left_stays_as_it_is(tmp_path: Path) -> None:
    of = study_of()
    run = loop(tmp_path, of, Pretence(*[Pretender(name, alter=broken(np.nan)) for name in "ab"]))
    run.run()
    assert moved(initial_groups(of), run.state.groups)["head/labs"] == 0
    line = next(run.directory.rounds())
    assert set(line["groups"]["head/labs"]["screened"]) == {"a", "b"}
    assert "no site sent 'head/labs'" in line["groups"]["head/labs"]["left_alone"]


def reshape(number: int, arrays: Arrays) -> Arrays:
    arrays["head/labs"]["weight"] = arrays["head/labs"]["weight"].T
    return arrays


def rename(number: int, arrays: Arrays) -> Arrays:
    arrays["head/labs"]["gain"] = arrays["head/labs"].pop("weight")
    return arrays


def lose(number: int, arrays: Arrays) -> Arrays:
    return {group: part for group, part in arrays.items() if group != "imputer"}


def add(number: int, arrays: Arrays) -> Arrays:
    return {**arrays, "encoder/other": arrays["fusion"]}


@pytest.mark.parametrize(
    ("alter", "screened", "status"),
    [
        (reshape, "weight has shape (4, 1), the group (1, 4)", {"status": "ok"}),
        (rename, "other keys than the group has", {"status": "ok"}),
        (lose, None, {"status": "failed", "reason": "other parameter groups than were asked for"}),
        (add, None, {"status": "failed", "reason": "other parameter groups than were asked for"}),
    ],
)
def test_an_update_of_another_form_is_left_out_and_named(
    tmp_path: Path, alter: Any, screened: str | None, status: dict[str, str]
) -> None:
    of = study_of()
    run = loop(tmp_path, of, Pretence(Pretender("a"), Pretender("b"), Pretender("c", 10.0, alter=alter)))
    run.run()
    steps = moved(initial_groups(of), run.state.groups)
    assert steps["head/labs"] == 3.0
    assert steps["fusion"] == (3.0 if screened is None else 12.0)
    line = next(run.directory.rounds())
    assert line["sites"]["c"] == status
    assert line["groups"]["head/labs"]["screened"] == ({} if screened is None else {"c": screened})


def test_screening_says_why() -> None:
    current = {"w": np.zeros((2, 3), np.float32)}
    assert reason_to_reject({"w": np.ones((2, 3), np.float32)}, current) is None
    assert reason_to_reject({}, current) == "other keys than the group has"
    assert norm({"w": np.full((2, 2), 3e38, np.float32)}) == pytest.approx(6e38), "no overflow in float32"


# Who takes part.


def test_a_quorum_that_is_lost_in_a_round_leaves_a_run_that_can_go_on(tmp_path: Path) -> None:
    of = study_of()
    whole = loop(tmp_path / "whole", of, Pretence(Pretender("a"), Pretender("b", 2.0)))
    whole.run()
    fails = Pretence(Pretender("a"), Pretender("b", 2.0, status={2: "failed"}))
    with pytest.raises(TooFewSites, match="1 sites answered in round 2, the quorum is 2") as caught:
        loop(tmp_path, of, fails).run()
    assert caught.value.exit_code == 4
    saved = load_checkpoint(tmp_path / "run" / "checkpoint", of.sha256)
    assert saved is not None
    assert (saved.round, saved.run) == (1, RUN)
    mended = loop(tmp_path, of, Pretence(Pretender("a"), Pretender("b", 2.0)), run="run-2")
    assert mended.state.run == RUN, "a resumed run keeps its id: sites know it by that"
    mended.run()
    assert tensorfile.dump(mended.state.groups, {}) == tensorfile.dump(whole.state.groups, {})
    assert [line["round"] for line in mended.directory.rounds()] == [1, 2, 3]


def test_a_run_whose_checkpoint_is_gone_does_not_begin_anew(tmp_path: Path) -> None:
    """It did, and charged the sites a second time under another run's id."""
    of = study_of()
    with pytest.raises(TooFewSites):
        loop(tmp_path, of, Pretence(Pretender("a"), Pretender("b", 2.0, status={2: "failed"}))).run()
    (tmp_path / "run" / "checkpoint" / "server.safetensors").unlink()
    with pytest.raises(DataError, match="checkpoint is gone"):
        loop(tmp_path, of, Pretence(Pretender("a"), Pretender("b", 2.0)))


def test_too_few_sites_at_the_handshake(tmp_path: Path) -> None:
    grid = Pretence(Pretender("a"), Pretender("b", status={0: "refused"}))
    with pytest.raises(TooFewSites, match=r"1 sites can take part, the quorum is 2 \(.*b: text of b") as caught:
        loop(tmp_path, study_of(), grid).run()
    assert "resume" in caught.value.remedy
    assert {kind for kind, _, _ in grid.asked} == {wire.PREPARE}, "nobody trained in vain"


def test_all_sites_refuse(tmp_path: Path) -> None:
    sites = [Pretender(name, status={0: "refused"}) for name in "ab"]
    with pytest.raises(RefusedError, match="every site refused") as caught:
        loop(tmp_path, study_of(), Pretence(*sites)).run()
    assert "a: text of a; b: text of b" in caught.value.remedy


def test_nobody_is_there(tmp_path: Path) -> None:
    with pytest.raises(Unreachable):
        loop(tmp_path, study_of(aggregation={"deadline_s": 0.1}), Pretence()).run()


def test_a_site_answers_under_the_name_by_which_it_was_let_in(tmp_path: Path) -> None:
    """One that calls itself as another does takes no part, also while the other is away; a stranger neither."""
    grid = Pretence(Pretender("a"), Pretender("d"), Pretender("b"), Pretender("e"))
    lines = RoundLoop(
        grid, study_of(), RunDirectory.create(tmp_path / "run", study_of()), RUN,
        names={1000: "a", 1001: "d", 1002: "c"}.get,
    )  # fmt: skip
    peers = lines.run()
    assert {name: peer.status for name, peer in peers.items()} == {
        "a": "ok", "d": "ok", "c": "failed", "node-1003": "failed",
    }  # fmt: skip
    assert "was let in as 'c'" in peers["c"].reason
    assert {site for kind, site, _ in grid.asked if kind == wire.TRAIN} == {"a", "d"}


def test_the_log_of_a_run_says_who_took_part_and_what_was_wrong(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    of = study_of(aggregation={"default": "median"})
    grid = Pretence(*[Pretender(name) for name in "abc"], Pretender("d", 100.0), Pretender("e", status={2: "refused"}))
    directory = RunDirectory.create(tmp_path / "run", of)
    RoundLoop(grid, of, directory, RUN, Watch(directory, of)).run()
    first, *rounds = capsys.readouterr().out.splitlines()
    assert first == "handshake: a, b, c, d, e"
    assert [line.split(",")[0] for line in rounds] == [f"round {at} of 3" for at in (1, 2, 3)]
    assert "fusion: d left out (its norm is over" in rounds[0]
    assert "a, b, c, d; e refused (text of e)" in rounds[1]
    assert "a, b, c, d; " in rounds[2]
    assert " e " not in rounds[2]


def test_a_refusal_is_final_and_a_failure_is_not(tmp_path: Path) -> None:
    refuses, fails = Pretender("b", status={2: "refused"}), Pretender("c", status={2: "failed"})
    grid = Pretence(Pretender("a"), refuses, fails)
    run = loop(tmp_path, study_of(1), grid)
    peers = run.run()
    trained = [(name, number) for kind, name, number in grid.asked if kind == wire.TRAIN]
    assert [number for name, number in trained if name == "b"] == [1, 2]
    assert [number for name, number in trained if name == "c"] == [1, 2, 3]
    assert peers["b"].status == "refused"
    assert peers["b"].reason == "text of b"
    assert (peers["b"].last_round, peers["c"].last_round) == (1, 3)
    second = list(run.directory.rounds())[1]
    assert second["sites"]["b"] == {"status": "refused", "reason": "text of b"}
    finished = [name for kind, name, _ in grid.asked if kind == wire.FINISH]
    assert sorted(finished) == ["a", "b", "c"], "whoever took part gets the model"


@pytest.mark.parametrize(
    ("error", "fails", "asked"),
    [
        ("DataError", {2, 4}, [1, 2]),
        ("InternalError", {2, 3, 4, 5}, [1, 2, 3, 4]),
        ("InternalError", {1, 2, 4, 5}, [1, 2, 3, 4, 5]),
    ],
)
def test_a_site_that_fails_at_its_own_work_does_not_pay_to_the_end(
    tmp_path: Path, error: str, fails: set[int], asked: list[int]
) -> None:
    """Every round of a site whose data were gone was charged, and nothing came of it."""
    broken = Pretender("c", status=dict.fromkeys(fails, "failed"), error=error)
    grid = Pretence(Pretender("a"), Pretender("b"), broken)
    of = study_of(training={"rounds": 5})
    peers = loop(tmp_path, of, grid).run()
    assert [number for kind, name, number in grid.asked if kind == wire.TRAIN and name == "c"] == asked
    assert peers["c"].status == ("ok" if asked[-1] == 5 else "failed")


@pytest.mark.parametrize(
    ("step", "reason"), [(100.0, "its norm"), (2e15, "holds a number above 1e+15"), (-1e30, "holds a number above")]
)
def test_an_update_of_another_scale_is_screened_by_name(tmp_path: Path, step: float, reason: str) -> None:
    of = study_of(aggregation={"default": "median"})
    run = loop(tmp_path, of, Pretence(Pretender("a", step), *[Pretender(name, 1.0) for name in "bcd"]))
    run.run()
    line = next(run.directory.rounds())["groups"]["fusion"]
    assert list(line["screened"]) == ["a"]
    assert reason in line["screened"]["a"]
    assert line["holders"] == ["b", "c", "d"]
    assert moved(initial_groups(of), run.state.groups)["fusion"] == of.training.rounds


def test_of_two_updates_none_is_called_too_long(tmp_path: Path) -> None:
    run = loop(tmp_path, study_of(), Pretence(Pretender("a", 100.0), Pretender("b", 1.0)))
    run.run()
    assert not next(run.directory.rounds())["groups"]["fusion"]["screened"]


def test_an_answer_for_another_round_is_refused(tmp_path: Path) -> None:
    class Stale(Pretender):
        def train(self, number: int, arrays: Arrays) -> Answer:
            return super().train(max(1, number - 1), arrays)

    run = loop(tmp_path, study_of(training={"rounds": 2}), Pretence(Pretender("a"), Pretender("b"), Stale("c")))
    run.run()
    first, second = run.directory.rounds()
    assert first["sites"]["c"]["status"] == "ok"
    assert second["sites"]["c"] == {"status": "failed", "reason": "an answer for another round"}


def test_the_final_groups_are_the_mean_of_the_late_rounds(tmp_path: Path) -> None:
    of = study_of(training={"rounds": 5}, aggregation={"average_last": 0.5})
    run = loop(tmp_path, of, Pretence(Pretender("a"), Pretender("b")))
    run.run()
    assert moved(initial_groups(of), run.state.groups)["fusion"] == 5
    assert moved(initial_groups(of), run.final)["fusion"] == 4, "the mean of 3, 4 and 5"
    again = loop(tmp_path, of, Pretence(Pretender("a"), Pretender("b")))
    assert moved(initial_groups(of), again.final)["fusion"] == 4, "a checkpoint keeps it"


def test_a_round_asks_as_many_sites_as_the_study_says(tmp_path: Path) -> None:
    of = study_of(training={"rounds": 12}, aggregation={"sample": 3})
    runs = [loop(tmp_path / str(at), of, Pretence(*[Pretender(name) for name in "abcdef"])) for at in range(2)]
    for run in runs:
        run.run()
    drawn = [[sorted(line["sites"]) for line in run.directory.rounds()] for run in runs]
    assert drawn[0] == drawn[1], "by the study's seed"
    assert {len(sites) for sites in drawn[0]} == {3}
    assert {site for sites in drawn[0] for site in sites} == set("abcdef")
    assert len({tuple(sites) for sites in drawn[0]}) > 4


def test_who_was_drawn_for_no_round_is_told(tmp_path: Path) -> None:
    of = study_of(training={"rounds": 1}, aggregation={"sample": 2})
    run = loop(tmp_path, of, Pretence(*[Pretender(name) for name in "abc"]))
    assert not any(unasked(peer, run) for peer in run.peers.values())
    run.run()
    (drawn,) = (set(line["sites"]) for line in run.directory.rounds())
    said = {name: unasked(peer, run) for name, peer in run.peers.items()}
    assert said == {name: "" if name in drawn else "was not asked in any round" for name in "abc"}


def test_sampling_by_coverage_leaves_no_rare_group_out(tmp_path: Path) -> None:
    common, rare = ["fusion", "head/labs"], ["fusion", "head/note"]
    sites = [Pretender(name, groups=common) for name in "abcde"] + [Pretender("f", groups=rare)]
    of = study_of(training={"rounds": 8}, aggregation={"sample": 2, "sampling": "coverage"})
    run = loop(tmp_path, of, Pretence(*sites))
    run.run()
    assert all("f" in line["sites"] for line in run.directory.rounds())
    with pytest.raises(ValueError, match="asks fewer sites"):
        study_of(quorum=3, aggregation={"sample": 2})


class Arriving(Pretence):
    """A grid where some sites are there only from a round on."""

    def __init__(self, *sites: Pretender, arrive: dict[str, int]) -> None:
        super().__init__(*sites)
        self.arrive = arrive

    def get_node_ids(self) -> list[int]:
        done = max((number for kind, _, number in self.asked if kind == wire.TRAIN), default=0)
        return [node for node, site in self.sites.items() if self.arrive.get(site.name, 0) <= done + 1]


def test_a_site_joins_with_a_modality_that_nobody_had(tmp_path: Path) -> None:
    few, more = ["fusion", "head/labs"], ["fusion", "head/note", "encoder/note"]
    of = study_of(training={"rounds": 5})
    grid = Arriving(Pretender("a", 1.0, few), Pretender("b", 1.0, few), Pretender("c", 1.0, more), arrive={"c": 3})
    run = loop(tmp_path, of, grid)
    run.run()
    change = moved(initial_groups(of), run.state.groups)
    assert (change["fusion"], change["head/labs"], change["head/note"], change["encoder/note"]) == (5, 5, 3, 3)
    lines = list(run.directory.rounds())
    assert [list(line["sites"]) for line in lines] == [["a", "b"]] * 2 + [["a", "b", "c"]] * 3
    assert [line["groups"]["head/note"].get("left_alone") for line in lines] == ["no site sent 'head/note'"] * 2 + [
        None
    ] * 3
    assert [site for kind, site, _ in grid.asked if kind == wire.PREPARE] == ["a", "b", "c"], "each is greeted once"


def test_a_site_that_starts_anew_under_another_node_comes_back(tmp_path: Path) -> None:
    class Restarted(Pretence):
        """The second node of c comes while the first is still listed, after round 1; that one is gone after round 2."""

        def get_node_ids(self) -> list[int]:
            done = max((number for kind, _, number in self.asked if kind == wire.TRAIN), default=0)
            return {0: [1000, 1001, 1002], 1: [1000, 1001, 1002, 1003]}.get(done, [1000, 1001, 1003])

    grid = Restarted(Pretender("a"), Pretender("b"), Pretender("c"), Pretender("c", step=2.0))
    of = study_of(training={"rounds": 5})
    run = loop(tmp_path, of, grid)
    run.run()
    lines = list(run.directory.rounds())
    assert all(line["sites"]["c"]["status"] == "ok" for line in lines)
    assert run.peers["c"].node == 1003
    assert run.peers.keys() == {"a", "b", "c"}


def test_the_only_holder_of_a_group_leaves_and_the_run_goes_on(tmp_path: Path) -> None:
    few = ["fusion", "head/labs"]
    leaver = Pretender("c", 1.0, ["fusion", "head/note"], status={3: "refused"})
    of = study_of(training={"rounds": 5})
    run = loop(tmp_path, of, Pretence(Pretender("a", 1.0, few), Pretender("b", 1.0, few), leaver))
    run.run()
    change = moved(initial_groups(of), run.state.groups)
    assert (change["fusion"], change["head/note"]) == (5, 2), "the group stays as its only holder left it"
    lines = [line["groups"]["head/note"] for line in run.directory.rounds()]
    assert [line["holders"] for line in lines] == [["c"]] * 2 + [[]] * 3
    assert {line.get("left_alone") for line in lines[2:]} == {"no site sent 'head/note'"}


def test_a_site_that_never_answers_is_late_and_the_round_goes_on(tmp_path: Path) -> None:
    of = study_of(1, aggregation={"deadline_s": 0.3}, training={"rounds": 2})
    grid = Pretence(Pretender("a"), Pretender("b", 5.0), deaf={"b": {1}})
    start = time.monotonic()
    run = loop(tmp_path, of, grid)
    run.run()
    assert time.monotonic() - start < 5
    first, second = run.directory.rounds()
    assert first["sites"]["b"] == {"status": "late", "reason": "no answer before the deadline"}
    assert second["sites"]["b"] == {"status": "ok"}, "it is asked again in the next round"
    assert moved(initial_groups(of), run.state.groups)["fusion"] == 1 + 3


def test_a_late_site_may_cost_the_quorum(tmp_path: Path) -> None:
    of = study_of(2, aggregation={"deadline_s": 0.3})
    with pytest.raises(TooFewSites, match="answered in round 1"):
        loop(tmp_path, of, Pretence(Pretender("a"), Pretender("b"), deaf={"b": {1}})).run()


# Sites that talk nonsense.


@pytest.mark.parametrize(
    "hello",
    [
        {"groups": ["encoder/secret"]},
        {"groups": 5},
        {"groups": [["fusion"]]},
        {"groups": "fusion"},
        {"rounds": "many"},
        {"modalities": {"labs": 1}},
        {"plan": "none"},
        {"status": "excellent"},
    ],
    ids=str,
)
def test_a_strange_handshake_is_a_failed_site_not_a_failed_run(tmp_path: Path, hello: dict[str, Any]) -> None:
    run = loop(tmp_path, study_of(2), Pretence(Pretender("a"), Pretender("b"), Pretender("c", 50.0, hello=hello)))
    peers = run.run()
    strange = next(peer for peer in peers.values() if peer.site not in ("a", "b"))
    assert strange.status == "failed"
    assert strange.reason
    assert moved(initial_groups(run.study), run.state.groups)["fusion"] == 3


def garbage(kind: str) -> Any:
    content = wire.pack({"status": "ok"}, {"fusion": {"x": np.zeros(3, np.float32)}})
    if kind == "nothing":
        return RecordDict()
    if kind == "no array":
        next(iter(content.array_records["fusion"].values())).data = b"garbage"
    if kind == "another protocol":
        return wire.pack({"protocol": 2, "status": "ok"}, {})
    if kind == "a list":
        content.config_records[wire.HEADER]["json"] = "[]"
    return content


@pytest.mark.parametrize("kind", ["nothing", "no array", "another protocol", "a list"])
def test_a_reply_that_cannot_be_read_is_a_failed_site_not_a_failed_run(tmp_path: Path, kind: str) -> None:
    class Babbler(Pretender):
        def train(self, number: int, arrays: Arrays) -> Any:
            return garbage(kind)

    run = loop(tmp_path, study_of(2), Pretence(Pretender("a"), Pretender("b"), Babbler("c")))
    run.run()
    line = next(run.directory.rounds())
    assert line["sites"]["c"]["status"] == "failed"
    assert line["sites"]["c"]["reason"]
    assert line["sites"]["a"] == {"status": "ok"}


def test_a_site_whose_app_breaks_is_a_failed_site(tmp_path: Path) -> None:
    class Breaker(Pretender):
        def train(self, number: int, arrays: Arrays) -> Answer:
            raise MemoryError

    run = loop(tmp_path, study_of(2), Pretence(Pretender("a"), Pretender("b"), Breaker("c")))
    run.run()
    assert next(run.directory.rounds())["sites"]["c"] == {"status": "failed", "reason": "error 2 in transport"}


def test_a_site_that_the_hub_lost_is_late_as_one_that_does_not_answer(tmp_path: Path) -> None:
    # Believed: a site that is cut off is seen at the deadline. True: the SuperLink may answer for it before that.
    class Lost(Pretender):
        def train(self, number: int, arrays: Arrays) -> Any:
            return Error(ErrorCode.NODE_UNAVAILABLE)

    run = loop(tmp_path, study_of(2), Pretence(Pretender("a"), Pretender("b"), Lost("c")))
    run.run()
    assert next(run.directory.rounds())["sites"]["c"] == {"status": "late", "reason": "is no longer connected"}


def test_two_sites_of_one_name_are_not_taken_for_one(tmp_path: Path) -> None:
    # Believed: names are unique. True: a copied site file made the server forget the first of the two, silently.
    run = loop(tmp_path, study_of(1), Pretence(Pretender("a", 1.0), Pretender("a", 7.0), Pretender("b", 3.0)))
    peers = run.run()
    assert peers["a"].status == "ok"
    (other,) = [peer for name, peer in peers.items() if name not in ("a", "b")]
    assert other.status == "failed"
    assert "'a'" in other.reason
    assert moved(initial_groups(run.study), run.state.groups)["fusion"] == 6


def test_a_site_that_is_gone_when_a_run_is_resumed_is_not_asked(tmp_path: Path) -> None:
    # Believed: a site's node stays its node. True: the others get new ones, and one of them may be the old one of
    # the site that is gone, which counted for the quorum all the same.
    of = study_of(2)
    sites = [Pretender("a", 1.0), Pretender("b", 3.0), Pretender("c", 5.0)]
    broken_off = [Pretender(site.name, site.step, status={2: "failed"}) for site in sites]
    with pytest.raises(TooFewSites):
        loop(tmp_path, of, Pretence(*broken_off)).run()
    grid = Pretence(*sites[1:])
    run = loop(tmp_path, of, grid)
    peers = run.run()
    assert (peers["a"].status, peers["a"].last_round) == ("late", 1)
    assert [name for kind, name, number in grid.asked if kind == wire.TRAIN] == ["b", "c", "b", "c"]
    assert moved(initial_groups(of), run.state.groups)["fusion"] == 3 + 4 + 4
    assert [sorted(line["sites"]) for line in run.directory.rounds()] == [["a", "b", "c"], ["b", "c"], ["b", "c"]]


@pytest.mark.parametrize("comes_back", [True, False])
def test_the_last_message_waits_for_who_trained(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, comes_back: bool
) -> None:
    """After a hub's restart sites come back one by one: whoever was not among the first never got the model."""
    of = study_of(2, aggregation={"deadline_s": 1})
    sites = [Pretender(name) for name in "abc"]

    class Dies(BaseException):
        pass

    def die(loop: RoundLoop) -> None:
        raise Dies

    class Returning(Pretence):
        looks = 0

        def get_node_ids(self) -> list[int]:
            self.looks += 1
            found = super().get_node_ids()
            return found if comes_back and self.looks > 6 else found[:2]

    with monkeypatch.context() as patch:
        patch.setattr(RoundLoop, "_finish", die)
        with pytest.raises(Dies):
            loop(tmp_path, of, Pretence(*sites)).run()
    grid = Returning(*sites)
    begun = time.monotonic()
    peers = loop(tmp_path, of, grid).run()
    asked = [name for kind, name, _ in grid.asked if kind == wire.FINISH]
    assert asked == (["a", "b", "c"] if comes_back else ["a", "b"])
    assert peers["c"].status == ("ok" if comes_back else "late")
    assert not [name for kind, name, _ in grid.asked if kind == wire.TRAIN]
    assert time.monotonic() - begun < 10


@pytest.mark.parametrize("ends", [True, False])
def test_a_resumed_run_waits_until_the_stopped_process_has_ended(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, ends: bool
) -> None:
    """Flower tells a process by a heartbeat that its run was stopped: until then it, too, writes into the folder."""
    of = study_of(2)
    directory = RunDirectory.create(tmp_path / "run", of)
    ran: list[RunDirectory] = []
    monkeypatch.setattr(server_app, "STOPPED_S", 0.5)
    monkeypatch.setattr(server_app, "run_study", lambda grid, study, directory, *_, **__: ran.append(directory))
    config = {"study": of.model_dump_json(), "out": str(directory.path), "run": RUN}
    holding = alone(directory.path)
    holding.__enter__()
    ended = threading.Timer(0.2 if ends else 2, lambda: holding.__exit__(None, None, None))
    ended.start()
    context = types.SimpleNamespace(run_config=config)
    if ends:
        server_app.main(Pretence(), context)  # type: ignore[arg-type]
        assert len(ran) == 1
    else:
        with pytest.raises(UsageError, match="another process"):
            server_app.main(Pretence(), context)  # type: ignore[arg-type]
        assert ran == []
        assert directory.read_json(directory.failure.name)["exit_code"] == 2
    ended.join()


# Checkpoints.


def test_a_checkpoint_is_read_back_whole(tmp_path: Path) -> None:
    of = study_of()
    peers = {"a": {"site": "a", "status": "late", "last_round": 2}}
    saved = Checkpoint(run=RUN, study=of.sha256, round=2, groups=initial_groups(of), peers=peers, bytes_up=3)
    save_checkpoint(tmp_path, saved)
    found = load_checkpoint(tmp_path, of.sha256)
    assert found is not None
    assert tensorfile.dump(found.groups, {}) == tensorfile.dump(saved.groups, {})
    assert (found.run, found.round, found.peers, found.bytes_up) == (RUN, 2, peers, 3)
    assert load_checkpoint(tmp_path / "none", of.sha256) is None


def test_a_checkpoint_of_another_study_is_refused(tmp_path: Path) -> None:
    of = study_of()
    loop(tmp_path, of, Pretence(Pretender("a"), Pretender("b"))).run()
    with pytest.raises(UsageError, match="another study"):
        loop(tmp_path, study_of(training={"lr": 0.25}), Pretence())


def test_an_unknown_rule_is_refused_before_anybody_trains(tmp_path: Path) -> None:
    # Believed: the rule's name is read when the loop starts. True: after the first round, which every site paid for.
    grid = Pretence(Pretender("a"), Pretender("b"))
    with pytest.raises(UsageError, match="no aggregation rule is called 'media'"):
        loop(tmp_path, study_of(aggregation={"head/*": "media"}), grid).run()
    assert grid.asked == []


# Real sites, real messages.


def hospitals(tmp_path: Path, held: dict[str, list[str]]) -> list[Any]:
    return [build(tmp_path / name, name, names) for name, names in held.items()]


HELD = {"east": ["labs", "vitals"], "north": ["labs", "note"], "west": ["note", "vitals"]}


def test_an_encoder_travels_among_its_holders_only(tmp_path: Path) -> None:
    """In every message of a private run, both ways, and what it weighs is what is written down."""
    of = plan_of(private=True, training={"rounds": 2}, aggregation={"quorum": 3})
    grid = Wire(hospitals(tmp_path, HELD))
    run, peers = run_study(grid, of, RunDirectory.create(tmp_path / "run", of), RUN)
    kinds = [kind for kind, _, _, _ in grid.log]
    assert kinds == [wire.PREPARE] * 3 + [wire.TRAIN] * 6 + [wire.FINISH] * 3
    for kind, name, down, up in grid.log:
        own = {f"{part}/{modality}" for part in ("encoder", "head") for modality in HELD[name]} | {"imputer", "fusion"}
        assert set(down.array_records) == (set() if kind == wire.PREPARE else own)
        assert set(up.array_records) == (own if kind == wire.TRAIN else set())
    line = next(run.directory.rounds())
    assert line["groups"]["encoder/labs"]["holders"] == ["east", "north"]
    assert line["groups"]["imputer"]["holders"] == ["east", "north", "west"]
    sent = [wire.unpack(up)[1] for kind, _, _, up in grid.log if kind == wire.TRAIN]
    assert line["bytes_up"] == sum(tensorfile.size(arrays) for arrays in sent[:3]) > 0
    assert {peer.status for peer in peers.values()} == {"ok"}
    kept, note = tensorfile.parse((tmp_path / "run" / "model" / "shared.safetensors").read_bytes())
    assert note["study"] == of.sha256
    assert tensorfile.dump(kept, {}) == tensorfile.dump(run.state.groups, {})
    for name in HELD:
        assert read_ledger(tmp_path / name / "state").spent() <= 8


class Interrupt(BaseException):
    """The power fails."""


@dataclass
class PowerCut(Observer):
    """An observer that ends the process after some answer or round."""

    after_round: int = 0
    after_answer: int = 0
    answers: int = 0

    def replied(self, number: int, site: str) -> None:
        self.answers += 1
        if self.answers == self.after_answer:
            raise Interrupt

    def round_done(self, number: int, current: Arrays) -> None:
        if number == self.after_round:
            raise Interrupt


@pytest.mark.parametrize(
    "cut",
    [PowerCut(after_round=1), PowerCut(after_answer=1), PowerCut(after_answer=5)],
    ids=["round", "first", "fifth"],
)
def test_a_resumed_run_ends_as_an_uninterrupted_one(tmp_path: Path, cut: PowerCut) -> None:
    """To the last bit, with momentum and private encoders kept at the sites; rounds.jsonl has every round once."""
    of = plan_of(
        private=False,
        training={"batch": 8, "momentum": 0.5},
        sharing={"policy": {"encoder/labs": "local"}},
        aggregation={"quorum": 3},
    )
    whole, _ = run_study(Wire(hospitals(tmp_path / "a", HELD)), of, RunDirectory.create(tmp_path / "ra", of), RUN)
    sites = hospitals(tmp_path / "b", HELD)
    directory = RunDirectory.create(tmp_path / "rb", of)
    with pytest.raises(Interrupt):
        run_study(Wire(sites), of, directory, RUN, cut)
    client_app.forget()
    resumed, _ = run_study(Wire(sites), of, RunDirectory.open(tmp_path / "rb"), "another id")
    assert tensorfile.dump(resumed.state.groups, {}) == tensorfile.dump(whole.state.groups, {})
    assert [line["round"] for line in resumed.directory.rounds()] == [1, 2, 3]
    for name in HELD:
        models = [tmp_path / side / name / "state" / "runs" / RUN / "model.safetensors" for side in "ab"]
        assert models[0].read_bytes() == models[1].read_bytes(), f"the whole model of {name}"


def test_resuming_a_private_run_charges_no_round_twice(tmp_path: Path) -> None:
    of = plan_of(private=True, aggregation={"quorum": 3})
    sites = hospitals(tmp_path, HELD)
    directory = RunDirectory.create(tmp_path / "run", of)
    with pytest.raises(Interrupt):
        run_study(Wire(sites), of, directory, RUN, PowerCut(after_answer=4))
    client_app.forget()
    run_study(Wire(sites), of, directory, RUN)
    for name in HELD:
        view = read_ledger(tmp_path / name / "state")
        charged = [event.released for event in view.events() if event.kind == "dp_sgd"]
        assert charged == [f"update of round {number}" for number in (1, 2, 3)]
        assert view.spent() <= 8


def test_one_site_runs_out_of_budget_and_the_others_go_on(tmp_path: Path) -> None:
    of = plan_of(private=True, aggregation={"quorum": 2})
    sites = hospitals(tmp_path, HELD)
    sites[0].update("patients", declared=24)
    sites[0].update("policy", epsilon=5.0)
    run, peers = run_study(Wire(sites), of, RunDirectory.create(tmp_path / "run", of), RUN)
    rounds = list(run.directory.rounds())
    assert 1 <= peers["east"].last_round < 3
    assert peers["east"].status == "refused"
    refused = rounds[peers["east"].last_round]["sites"]["east"]
    assert refused["reason"] == "the site's privacy budget does not allow it"
    assert rounds[-1]["sites"].keys() == {"north", "west"} or rounds[-1]["sites"]["east"]["status"] == "refused"
    assert read_ledger(tmp_path / "east" / "state").spent() <= 5.0


def test_large_answers_are_fetched_one_by_one(monkeypatch: pytest.MonkeyPatch) -> None:
    """A hub has the answers of many sites in memory only while they are small."""
    asked: list[int] = []

    class Together(Pretence):
        """As the deployed grid: it gives all answers that there are."""

        def pull_messages(self, message_ids: Any) -> list[Message]:
            asked.append(len(message_ids))
            return [reply for identity in message_ids for reply in super(Together, self).pull_messages([identity])]

    arrays = {"fusion": {"x": np.zeros(100, np.float32)}}
    for most, sizes in ((10**9, [3]), (1100, [2, 1]), (100, [1, 1, 1])):
        grid = Together(*[Pretender(site) for site in "abc"])
        requests = {node: wire.pack({"round": 1}, arrays) for node in grid.get_node_ids()}
        monkeypatch.setattr(mail, "MOST_BYTES", most)
        asked.clear()
        assert len(list(mail.ask(grid, wire.TRAIN, requests, 60.0))) == 3
        assert asked == sizes
