"""Early stop: what is looked at, what it costs and where that is refused, when a run ends, and what is kept of it."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from flwr.app import Context, Message
from hospitals import Wire, build, participant, plan_of, publish
from pretence import Pretence, Pretender, loop

from gapweave.client import app as client_app
from gapweave.client.participant import Participant
from gapweave.server.aggregation import initial_groups
from gapweave.server.app import run_study
from gapweave.server.evaluation import Released
from gapweave.server.peers import Peer
from gapweave.server.stopping import UNRANKED, EarlyStop, seen_of
from gapweave.server.strategy import Observer, RoundLoop
from gapweave.server.summary import summarise_deployment
from gapweave.shared import wire
from gapweave.shared.config.study import Study
from gapweave.shared.config.training import Training
from gapweave.shared.errors import BudgetExhausted, RefusedError
from gapweave.shared.privacy.accountant import epsilon, fixed_epsilon, renyi_epsilon
from gapweave.shared.privacy.ledger import read_ledger
from gapweave.shared.privacy.once import NO_LOOK, NO_NOISE, NOT_ALLOWED, TOO_FEW, look_scale
from gapweave.shared.privacy.plan import make_plan
from gapweave.shared.privacy.plan_report import plan_lines, plan_report
from gapweave.shared.rundir import RunDirectory
from gapweave.shared.tables import BINS, ScoreTable
from gapweave.shared.tensorfile import Arrays
from gapweave.sites.simulate.commands import Places, start
from gapweave.sites.study_check import describe

pytestmark = pytest.mark.usefixtures("fresh_sites")

RUN = "run-1"
MANY = 6000
"""Declared patients: enough for two looks at a quarter of epsilon 8."""


def study_of(private: bool = True, rounds: int = 7, stop: dict[str, Any] | None = None, **keys: Any) -> Study:
    """Looks after rounds 2, 4 and 6."""
    asked = {"every": 2, "patience": 1, "epsilon": 2.0, **(stop or {})}
    kept = {"evaluation": {"test_fraction": 0.5}, "aggregation": {"quorum": 2, "deadline_s": 5}, **keys}
    return plan_of(private=private, training={"rounds": rounds, "early_stop": asked}, **kept)


# When a run ends.


@pytest.mark.parametrize(
    ("patience", "aurocs", "ends"),
    [
        (1, [0.6, 0.7, 0.65], 3),
        (2, [0.6, 0.7, 0.65, 0.69], 4),
        (2, [0.6, 0.7, 0.65, 0.71, 0.70, 0.71], 6),  # as good is not better
        (2, [0.7, None, 0.6, None, 0.6], 5),
        (1, [None, None, None], None),
        (3, [0.7, 0.6, 0.6], None),
    ],
    ids=str,
)
def test_a_run_ends_after_so_many_looks_without_a_better_one(
    patience: int, aurocs: list[float | None], ends: int | None
) -> None:
    training = Training.model_validate({"rounds": 99, "early_stop": {"every": 1, "patience": patience}})
    stop, found = EarlyStop(training, []), None
    for number, auroc in enumerate(aurocs, start=1):
        assert stop.due(number)
        look = stop.add(number, {"a": auroc}, {})
        assert not stop.due(number)
        assert look["ends_run"] == stop.reached
        found = found or (number if stop.reached else None)
    assert found == ends
    assert EarlyStop(training, stop.looks).reached == stop.reached, "also from a checkpoint"


AT_ONCE = Training.model_validate({"rounds": 99, "early_stop": {"every": 1, "patience": 1}})


def test_what_most_sites_gained_decides() -> None:
    """One that changes its story moves the median of what they say, and ended a run in which all others gained."""
    stop = EarlyStop(AT_ONCE, [])
    assert stop.add(1, {"a": 0.7, "b": 0.6, "c": 0.8}, {})["auroc"] == 0.7
    assert stop.add(2, {"a": 0.72, "b": 0.62, "c": 0.0}, {"d": TOO_FEW}) == {
        "round": 2, "auroc": 0.62, "sites": {"a": 0.72, "b": 0.62, "c": 0.0}, "reasons": {"d": TOO_FEW},
        "ends_run": False,
    }  # fmt: skip
    assert stop.add(3, {"a": 0.71, "b": 0.61, "c": 1.0}, {})["ends_run"]


def test_sites_come_and_go_between_looks() -> None:
    stop = EarlyStop(AT_ONCE, [])
    for number, seen in enumerate([{"a": 0.7}, {"b": 0.6}, {"b": 0.65, "a": 0.1}, {}], start=1):
        assert not stop.add(number, seen, {})["ends_run"], "who was not there before has nothing to be compared with"
    assert stop.add(5, {"a": 0.1, "b": 0.65}, {})["ends_run"]


def test_looks_are_before_the_last_round() -> None:
    def looks(rounds: int, every: int) -> tuple[int, ...]:
        return Training.model_validate({"rounds": rounds, "early_stop": {"every": every}}).looks

    assert looks(10, 5) == (5,)
    assert looks(11, 5) == (5, 10)
    with pytest.raises(ValueError, match=r"early_stop\.every=5 must be below rounds=5"):
        looks(5, 5)
    with pytest.raises(ValueError, match="may never reach"):
        study_of(aggregation={"average_last": 0.5})


# What it costs.


def test_looks_are_part_of_the_plan_and_together_cost_what_the_study_says() -> None:
    of = study_of()
    plan = make_plan(of, MANY, 1e-5)
    assert [event.released for event in plan.looks] == [
        f"scores of the test patients after round {number}" for number in (2, 4, 6)
    ]
    assert epsilon(plan.looks, 1e-9) == pytest.approx(2.0, abs=0.02)
    assert look_scale(of) == pytest.approx(3 / 2.0)
    assert all(event in plan.schedule() for event in plan.looks)
    assert plan.epsilon is not None
    assert plan.epsilon <= 8
    assert fixed_epsilon(plan.schedule(), 1e-5) == pytest.approx(plan.epsilon, abs=0.02)
    without = make_plan(plan_of(private=True, training={"rounds": 7}, evaluation={"test_fraction": 0.5}), MANY, 1e-5)
    assert plan.noise_multiplier > without.noise_multiplier, "training pays for them"
    capped = make_plan(study_of(stop={"epsilon": 50.0}), MANY, 1e-5)
    assert epsilon(capped.looks, 1e-9) == pytest.approx(2.0, abs=0.02), "a quarter of 8 at most"


@pytest.mark.parametrize(
    ("of", "n_hat", "counts", "reason"),
    [
        (study_of(), MANY, True, ""),
        (study_of(), MANY, False, NOT_ALLOWED),
        (study_of(), 1499, True, TOO_FEW),  # three looks at 2/3 each, of as many test patients
        (study_of(), 1501, True, ""),
        (study_of(private=False), MANY, True, NO_NOISE),
        (plan_of(private=True, evaluation={"test_fraction": 0.5}), MANY, True, NO_LOOK),
    ],
)
def test_why_a_site_is_not_looked_at(of: Study, n_hat: int, counts: bool, reason: str) -> None:
    plan = make_plan(of, n_hat, 1e-5, tables=counts)
    assert plan.no_looks == reason
    assert len(plan.looks) == (0 if reason else 3)
    assert plan.scores(2) == (reason or plan.looks[0])
    assert plan.scores(3) == (reason or NO_LOOK)


def test_plan_and_check_foretell_it() -> None:
    of = study_of()
    lines = "\n".join(plan_lines(plan_report(of, MANY)))
    assert "Epsilon 2 of it buys: the same on the way, 3 times; the run may end early." in lines
    few = "\n".join(plan_lines(plan_report(of, 200)))
    assert f"No look at the scores on the way, and so no early stop by this site: {TOO_FEW}." in few
    assert describe(of)["schedule"] == "7 rounds of 1 steps, or fewer: 3 looks at the scores, epsilon 2 in all"


# At a site.


def ready(folder: Path, of: Study, name: str = "north", **policy: Any) -> Participant:
    hospital = build(folder / name, name, patients=60)
    hospital.update("policy", **{"epsilon": 40.0, **policy})
    hospital.update("patients", declared=MANY)
    return participant(hospital, of)


def trained(folder: Path, of: Study, rounds: int = 2, **policy: Any) -> Participant:
    site = ready(folder, of, **policy)
    site.prepare(RUN)
    for number in range(1, rounds + 1):
        site.train(RUN, number, f"request {number}", initial_groups(of))
    return site


def charged(site: Participant) -> list[str]:
    return [entry.body["event"]["released"] for entry in read_ledger(site.state).entries if entry.kind == "charge"]


def test_each_look_is_reserved_before_the_first_round_and_charged_once(tmp_path: Path) -> None:
    of = study_of()
    site = ready(tmp_path, of)
    capability = site.prepare(RUN)
    assert [event["released"] for event in capability.plan["looks"]] == [
        f"scores of the test patients after round {number}" for number in (2, 4, 6)
    ]
    reserved = read_ledger(site.state).reservation(RUN)
    assert reserved is not None
    assert [event for event in reserved["events"] if event in capability.plan["looks"]] == capability.plan["looks"]
    groups = initial_groups(of)
    for number in (1, 2):
        site.train(RUN, number, f"request {number}", groups)
    first = site.evaluate(RUN, "look", groups, 2)
    assert np.shape(first["table"]) == (1, 2, BINS)
    assert first["event"] == capability.plan["looks"][0]
    assert json.dumps(dict(site.evaluate(RUN, "look", groups, 2))) == json.dumps(dict(first))
    site.evaluate(RUN, "final", groups)
    assert charged(site)[2:] == ["scores of the test patients after round 2", "scores of the test patients"]
    other = {group: {name: value + 1 for name, value in part.items()} for group, part in groups.items()}
    with pytest.raises(RefusedError, match="was charged for another request"):
        site.evaluate(RUN, "another look", other, 2)
    assert site.evaluate(RUN, "no look", groups, 3) == {"table": None, "reason": NO_LOOK}
    assert len(charged(site)) == 4


def test_a_site_that_releases_no_counts_is_not_looked_at(tmp_path: Path) -> None:
    of = study_of()
    site = trained(tmp_path, of, releases=["update"])
    assert site.evaluate(RUN, "look", initial_groups(of), 2) == {"table": None, "reason": NOT_ALLOWED}
    assert charged(site) == ["update of round 1", "update of round 2"]


def test_a_cap_that_is_spent_on_rounds_leaves_no_look(tmp_path: Path) -> None:
    of = study_of()
    site = trained(tmp_path, of, rounds=2, epsilon=5.0)
    with pytest.raises(BudgetExhausted):
        site.evaluate(RUN, "look", initial_groups(of), 2)
    assert charged(site) == ["update of round 1", "update of round 2"]
    assert read_ledger(site.state).bound() <= 5


def test_a_look_and_the_final_table_after_one_round_are_two_requests(tmp_path: Path) -> None:
    """After an early stop the final model is the one that was looked at: its table has its own noise and charge."""
    of = study_of()
    hospital = build(tmp_path / "a", "north", patients=60)
    hospital.update("policy", studies=[of.sha256], epsilon=40.0)
    hospital.update("patients", declared=MANY)
    grid, groups = Wire([hospital], simulation=False), initial_groups(of)
    grid.ask(wire.PREPARE, wire.pack({"run": RUN, "study": of.canonical()}, {}))
    header = {"run": RUN, "study": of.sha256, "round": 1}
    grid.ask(wire.TRAIN, wire.pack(header, groups))
    header["round"] = 2
    grid.ask(wire.TRAIN, wire.pack(header, groups))
    look, final = (
        wire.unpack(grid.ask(wire.EVALUATE, wire.pack({**header, **more}, groups)).content)[0]
        for more in ({"look": True}, {})
    )
    assert look["event"]["released"] == "scores of the test patients after round 2"
    assert final["event"]["released"] == "scores of the test patients"
    odd, _ = wire.unpack(grid.ask(wire.EVALUATE, wire.pack({**header, "look": 1}, groups)).content)
    assert odd["status"] == "failed"


@pytest.mark.parametrize("looked", [True, False])
def test_a_run_that_may_stop_counts_as_its_whole_schedule_or_as_the_filter_says(tmp_path: Path, looked: bool) -> None:
    """Ending because of a score is not in a schedule that is fixed in advance: the part alone would be too little.

    It was believed that this is so where the site itself was looked at; others' scores are of a model with its updates.
    """
    of = study_of()
    site = trained(tmp_path, of)
    plan = make_plan(of, MANY, read_ledger(site.state).delta)
    if looked:
        site.evaluate(RUN, "look", initial_groups(of), 2)
        site.evaluate(RUN, "final", initial_groups(of))
    site.finish(RUN, initial_groups(of))
    view = read_ledger(site.state)
    part = epsilon(view.events(), view.delta)
    whole = epsilon(plan.schedule(), view.delta)
    rest = renyi_epsilon(view.events(), view.delta, view.order)
    assert view.spent() == pytest.approx(min(whole, rest))
    assert part < view.spent() <= whole


# In a run.


def table_of(apart: float) -> list[list[list[int]]]:
    """A table of 2,000 patients whose positives are the more apart, the larger the number."""
    weights = np.exp(apart * np.linspace(-1, 1, BINS))
    rows = [1000 * side / side.sum() for side in (weights[::-1], weights)]
    return [[[int(cell) for cell in row] for row in rows]]


class Scored(Pretence):
    """Sites whose tables a test writes: by round and site, how far apart positives and negatives are."""

    def __init__(self, *sites: Pretender, apart: dict[int, dict[str, float]], plan: dict[str, Any]) -> None:
        super().__init__(*sites)
        self.apart = apart
        self.looked: list[tuple[int, str]] = []
        for site in sites:
            site.hello = {"plan": plan}

    def answer(self, message: Message, context: Context) -> Message:
        header, _ = wire.unpack(message.content)
        site = self.sites[context.node_id]
        if message.metadata.message_type != wire.EVALUATE or not header.get("look"):
            return super().answer(message, context)
        self.looked.append((header["round"], site.name))
        apart = self.apart[header["round"]][site.name]
        return Message(wire.pack({"status": "ok", "table": table_of(apart)}, {}), reply_to=message)


def scored(of: Study, *values: dict[str, float]) -> Scored:
    plan = make_plan(of, MANY, 1e-5)
    noise = {"noise_multiplier": plan.noise_multiplier, "sample_rate": plan.sample_rate, "n_hat": plan.n_hat}
    stated = {**noise, "looks": [event.to_dict() for event in plan.looks], "no_table": "none"}
    apart = dict(zip(of.training.looks, values, strict=False))
    return Scored(*[Pretender(name) for name in sorted(values[0])], apart=apart, plan=stated)


def test_a_run_ends_when_its_scores_do_and_says_so(tmp_path: Path) -> None:
    of = study_of()
    grid = scored(of, {"a": 1, "b": 1, "c": 1}, {"a": 2, "b": 2, "c": 2}, {"a": 1, "b": 1, "c": 1})
    run = loop(tmp_path, of, grid)
    run.run()
    assert run.state.round == 6, "round 7 is not played"
    assert [number for number, _ in grid.looked] == [2, 2, 2, 4, 4, 4, 6, 6, 6]
    looks = {line["round"]: line["look"] for line in run.directory.rounds() if "look" in line}
    assert looks.keys() == {2, 4, 6}
    assert looks[2]["auroc"] < looks[4]["auroc"]
    assert [look["ends_run"] for look in looks.values()] == [False, False, True]
    assert {kind for kind, _, number in grid.asked if number == 6} >= {wire.TRAIN, wire.FINISH}


def test_a_table_that_ranks_nobody_is_named_as_that() -> None:
    """It was paid for, and nothing said why it gave no figure."""
    alike = np.zeros((2, BINS))
    alike[:, 7] = 1000
    apart = np.array(table_of(2.0)[0], float)
    tables = {
        name: Released(tables=(ScoreTable(counts=counts, scale=1.0),))
        for name, counts in {"a": alike, "b": apart}.items()
    }
    aurocs, reasons = seen_of({**tables, "c": Released(reason=TOO_FEW)})
    assert aurocs["a"] is aurocs["c"] is None
    assert aurocs["b"] is not None
    assert aurocs["b"] > 0.6
    assert reasons == {"a": UNRANKED, "b": "", "c": TOO_FEW}


def test_a_minority_does_not_end_a_run(tmp_path: Path) -> None:
    of = study_of()
    grid = scored(of, {"a": 1, "b": 1, "c": 4}, {"a": 2, "b": 2, "c": -4}, {"a": 3, "b": 3, "c": -4})
    run = loop(tmp_path, of, grid)
    run.run()
    assert run.state.round == 7
    assert not any(look["ends_run"] for look in run.stopping.looks)


class Interrupt(BaseException):
    """The power fails."""


class Cut(Observer):
    """Fails when a round is aggregated."""

    def __init__(self, number: int) -> None:
        self.number = number

    def round_done(self, number: int, current: Arrays) -> None:
        if number == self.number:
            raise Interrupt


def fail(*_: object) -> None:
    raise Interrupt


@pytest.mark.parametrize(
    ("place", "before", "ends"), [("round 5", [2, 4], 6), ("look 2", [], 6), ("after the stop", [2, 4], 4)]
)
def test_a_resumed_run_remembers_what_it_saw(
    tmp_path: Path, place: str, before: list[int], ends: int, monkeypatch: pytest.MonkeyPatch
) -> None:
    of, worse = study_of(), {"a": 1, "b": 1}
    better = {"a": 2, "b": 2}
    grid = scored(of, *([better, worse] if place == "after the stop" else [worse, better, worse]))
    run = loop(tmp_path, of, grid)
    with monkeypatch.context() as patch:
        if place == "round 5":
            run.observer = Cut(5)
        elif place == "look 2":
            patch.setattr(EarlyStop, "add", fail)
        else:
            patch.setattr(RoundLoop, "_evaluate", fail)
        with pytest.raises(Interrupt):
            run.run()
    resumed = loop(tmp_path, of, grid)
    assert [look["round"] for look in resumed.stopping.looks] == before
    resumed.run()
    assert resumed.state.round == ends
    lines = list(resumed.directory.rounds())
    assert [line["round"] for line in lines] == list(range(1, ends + 1))
    assert [line["round"] for line in lines if "look" in line] == list(range(2, ends + 1, 2))
    assert resumed.stopping.looks[-1]["ends_run"]


def test_without_a_figure_a_run_goes_on(tmp_path: Path) -> None:
    """A deployment without privacy: no site tells, nobody else knows."""
    run = loop(tmp_path, study_of(private=False), Pretence(Pretender("a"), Pretender("b")))
    run.run()
    assert run.state.round == 7
    assert [look["auroc"] for look in run.stopping.looks] == [None] * 3


def test_an_exact_simulation_stops_and_the_report_says_so(tmp_path: Path) -> None:
    """With a learning rate of next to nothing no look is better than the first: the run ends at the second."""
    of = study_of(private=False)
    slow = of.model_copy(update={"training": of.training.model_copy(update={"lr": 1e-12})})
    (tmp_path / "study.yaml").write_text(slow.to_yaml(), encoding="utf-8")
    (tmp_path / "sites").mkdir()
    for name in ("east", "north"):
        hospital = build(tmp_path / "sites" / name, name, patients=60)
        (tmp_path / "sites" / f"{name}.yaml").write_text(
            publish(hospital).read_text(encoding="utf-8").replace("file: ", f"file: {name}/"), encoding="utf-8"
        )
    places = Places(sites=None, data=None, out=tmp_path / "run", state=None)
    summary, path = start(tmp_path / "study.yaml", {}, places, baselines=(), continue_without=False)
    assert summary["rounds"] == 4
    looks = [line["look"] for line in RunDirectory.open(path).rounds() if "look" in line]
    assert [look["round"] for look in looks] == [2, 4]
    assert looks[0]["sites"].keys() == {"east", "north"}
    exact = [summary["sites"][name]["metrics"]["auroc"] for name in ("east", "north")]
    assert looks[-1]["auroc"] == pytest.approx(np.median(exact), abs=1e-6)
    page = (path / "report.html").read_text(encoding="utf-8")
    assert "The run ended after round 4" in page
    assert "4 of 7" in page


def test_a_deployed_run_charges_its_looks_and_states_what_they_cost(tmp_path: Path) -> None:
    of = study_of(rounds=4, stop={"every": 1, "patience": 1})
    hospitals = []
    for name, releases in (("east", ["update", "counts"]), ("north", ["update", "counts"]), ("west", ["update"])):
        hospital = build(tmp_path / name, name, patients=60)
        hospital.update("policy", studies=[of.sha256], epsilon=40.0, releases=releases)
        hospital.update("patients", declared=MANY)
        hospitals.append(hospital)
    directory = RunDirectory.create(tmp_path / "run", of)
    run, _ = run_study(Wire(hospitals, simulation=False), of, directory, RUN)
    looks = [line["look"] for line in directory.rounds() if "look" in line]
    seen = [look["round"] for look in looks]
    assert seen == list(range(1, min(run.state.round, 3) + 1))
    assert all(look["reasons"]["west"] == NOT_ALLOWED for look in looks)
    for hospital in hospitals[:2]:
        view = read_ledger(hospital.folder / "state")
        names = [event.released for event in view.events()]
        assert [name for name in names if "after round" in name] == [
            f"scores of the test patients after round {number}" for number in seen
        ]
        assert view.spent() <= 8
        stated = directory.read_json("summary.json")["sites"][hospital.content["name"]]["privacy"]
        assert view.spent() - 1e-9 <= stated["epsilon"] <= 8
    west = [event.released for event in read_ledger(hospitals[2].folder / "state").events()]
    assert not [name for name in west if "scores" in name]
    stated = directory.read_json("summary.json")["sites"]["west"]["privacy"]
    assert stated["epsilon"] >= read_ledger(hospitals[2].folder / "state").spent() - 1e-9, "others' looks count"
    client_app.forget()


@pytest.mark.parametrize("looks", ["abc", 7, [3], [{"kind": "other"}], {"kind": 1}])
def test_a_strange_plan_leaves_a_summary_without_a_figure(tmp_path: Path, looks: Any) -> None:
    of = study_of(private=False)
    run = loop(tmp_path, of, Pretence(Pretender("a"), Pretender("b")))
    run.run()
    run.peers["a"] = Peer(site="a", groups=["fusion"], last_round=1, plan={"looks": looks, "table": looks})
    assert summarise_deployment(of, run)["sites"]["a"]["privacy"] is None
