"""Killed at any system call, or at any time: nothing is under-reported, nothing leaves twice, and the run goes on."""

from __future__ import annotations

import json
import random
import re
import shutil
from collections import defaultdict
from collections.abc import Callable
from functools import cache, partial
from pathlib import Path
from typing import Any

import pytest
from commandline import rounds_of, summary_of
from forks import Server
from kills import CALLS, COUNTED, ROUNDS, SITES
from ledgers import by_dp_accounting
from sampling import EVERY

from gapweave.shared.privacy.accountant import epsilon
from gapweave.shared.privacy.events import PrivacyEvent
from gapweave.shared.privacy.ledger import LedgerView, read_ledger

ROUNDING = 1e-9
"""What two accountants may differ by where both are exact: sums of floats in another order."""


@pytest.fixture(scope="module")
def undisturbed(server: Server) -> list[str]:
    """The system calls of a run that nobody disturbed, one a line."""
    calls = calls_of(server.perform("undisturbed", trace=True))
    check_end(server.folder / "undisturbed", {})
    return calls


@pytest.fixture(scope="module")
def least(server: Server, undisturbed: list[str]) -> dict[str, float]:
    """What the undisturbed run spent at each site whose plan does not hang on a noised number."""
    states = {name: server.folder / "undisturbed" / "state" / name for name in SITES if name not in COUNTED}
    return {name: read_ledger(state).spent() for name, state in states.items()}


def calls_of(outcome: dict[str, Any]) -> list[str]:
    """The system calls of a run that went well, without the process's number."""
    assert outcome["code"] == 0, outcome["error"]
    found = Path(outcome["trace"]).read_text(encoding="utf-8").splitlines()
    return [line.split(maxsplit=1)[1] for line in found if re.match(rf"\d+ +({'|'.join(CALLS)})\(", line)]


def find(calls: list[str], pattern: str, which: int) -> int:
    """Index of a call, among those that match."""
    return [index for index, line in enumerate(calls) if re.match(pattern, line)][which]


def number_of(calls: list[str], index: int) -> tuple[str, int]:
    """A call's name, and how many of that name there are up to it: strace counts so."""
    name = calls[index].partition("(")[0]
    return name, sum(line.startswith(f"{name}(") for line in calls[: index + 1])


def at(calls: list[str], index: int) -> str:
    """What strace injects: SIGKILL at one call of a run, before it is done."""
    name, number = number_of(calls, index)
    return f"{name}:signal=SIGKILL:when={number}"


# What must hold.


def left(folder: Path) -> list[dict[str, Any]]:
    """Everything that left a site, in order, as its receiver wrote it down."""
    file = folder / "wire.jsonl"
    lines = file.read_text(encoding="utf-8").splitlines() if file.exists() else []
    return [json.loads(line) for line in lines]


def releases(lines: list[dict[str, Any]], site: str) -> dict[str, list[dict[str, Any]]]:
    """Lines of a site that hold a release, by what was released: one entry a reply."""
    found: dict[str, list[dict[str, Any]]] = defaultdict(list)
    for line in lines:
        if line["site"] == site and "event" in line["header"]:
            found[line["header"]["event"]["released"]].append(line)
    return found


def check_wire(lines: list[dict[str, Any]]) -> None:
    """No release has two results."""
    for site in SITES:
        mine = [line for line in lines if line["site"] == site and line["header"]["status"] == "ok"]
        for released, replies in releases(lines, site).items():
            assert len({reply["result"] for reply in replies}) == 1, f"two results of {released!r} left {site}"
        sizes = {line["header"]["plan"]["n_hat"] for line in mine if line["kind"] == "query.prepare"}
        assert len(sizes) <= 1, f"{site} counted its patients twice"


@cache
def lower_bound(events: tuple[PrivacyEvent, ...], delta: float) -> float:
    """Epsilon by another accountant, rounded down."""
    return by_dp_accounting(events, delta, 1e-2, pessimistic=False) if events else 0.0


def cost_of_what_left(lines: list[dict[str, Any]], site: str, delta: float) -> float:
    """Recomputed from what the receiver holds alone."""
    gone = {released: replies[0]["header"]["event"] for released, replies in releases(lines, site).items()}
    for line in lines:
        if line["site"] == site and "plan" in line["header"]:  # its plan follows from these
            gone |= {event["released"]: event for event in line["header"]["plan"]["preparation"]}
    return lower_bound(tuple(PrivacyEvent.from_dict(gone[released]) for released in sorted(gone)), delta)


def check_ledger(folder: Path, lines: list[dict[str, Any]], site: str) -> LedgerView:
    """What left is charged, marked as handed over, and paid for; at any moment."""
    view = read_ledger(folder / "state" / site)
    assert view.intact
    charged = {
        entry.body["event"]["released"]: entry.body["request"] for entry in view.entries if entry.kind == "charge"
    }
    handed_over = {entry.body["request"] for entry in view.entries if entry.kind == "released"}
    for released, replies in releases(lines, site).items():
        for reply in replies:
            assert charged[released] == reply["request"]
            assert reply["request"] in handed_over
    assert view.spent() >= cost_of_what_left(lines, site, view.delta) - ROUNDING
    return view


def of_a_whole_run(lines: list[dict[str, Any]], site: str) -> list[PrivacyEvent]:
    """What a run that nobody disturbed would have charged, from what its server was told."""
    told = next(line["header"]["plan"] for line in lines if line["site"] == site and "plan" in line["header"])
    gone = [replies[0]["header"]["event"] for replies in releases(lines, site).values()]
    finetuning = next(event for event in gone if event["kind"] == "dp_sgd")
    return [PrivacyEvent.from_dict(event) for event in (*told["preparation"], *gone, finetuning)]


def check_midway(folder: Path, copy: Path) -> None:
    """The ledgers as a kill left them: read from a copy, so that nothing of the run is touched."""
    lines = left(folder)
    check_wire(lines)
    shutil.rmtree(copy, ignore_errors=True)
    shutil.copytree(folder, copy)
    for site in {line["site"] for line in lines if line["header"]["status"] == "ok"}:
        check_ledger(copy, lines, site)


def check_end(folder: Path, least: dict[str, float]) -> None:
    """The run is whole, every ledger is vouched for, and nothing is under-reported."""
    run, lines = folder / "run", left(folder)
    check_wire(lines)
    summary = summary_of(run)
    assert {name: row["status"] for name, row in summary["sites"].items()} == dict.fromkeys(SITES, "ok")
    assert [line["round"] for line in rounds_of(run)] == list(range(1, ROUNDS + 1))
    assert (run / "model" / "shared.safetensors").exists()
    for site in SITES:
        view = check_ledger(folder, lines, site)
        assert view.standing() is True, "the anchor vouches for it"
        updates = {f"update of round {number}" for number in range(1, ROUNDS + 1)}
        assert releases(lines, site).keys() == {*updates, "scores of the test patients"}
        assert {*updates, "fine-tuning"} <= {event.released for event in view.events()}
        assert view.spent() >= epsilon(of_a_whole_run(lines, site), view.delta)
        assert view.spent() >= least.get(site, 0.0)
        assert view.entries[-1].kind == "close"
        kept = {file.name for file in (folder / "state" / site).glob("runs/*/*.safetensors")}
        assert kept == {"round.safetensors", "model.safetensors", "finetuned.safetensors"}


def survive(server: Server, job: str, kills: list[dict[str, Any]], least: dict[str, float]) -> int:
    """Kill a run and its resumptions, resume it to the end, and look at everything after each.

    Returns:
        How many of the kills met a living process.
    """
    folder, done = server.folder / job, 0
    for kill in kills:
        outcome = server.perform(job, **kill)
        if outcome["code"] == 0 or "this run is done" in outcome["error"]:  # the kill before came after the last file
            break
        assert outcome["code"] == -9, outcome["error"]
        assert all(line["header"]["status"] == "ok" for line in left(folder)), "no site answered with an error"
        done += 1
        check_midway(folder, server.folder / "copy")
    else:
        outcome = server.perform(job)
        if "this run is done" in outcome["error"]:
            outcome["code"] = 0  # killed after the last file
        assert outcome["code"] == 0, outcome["error"]
    check_end(folder, least)
    shutil.rmtree(folder)
    return done


# Kills at the points that matter, found by what the call does.

POINTS: dict[str, tuple[str, int, int]] = {
    # name: a call, which of those that match, and how many calls after it
    "as the first ledger is created": (r"pwrite64\(.*alder/ledger.sqlite>", 0, 0),
    "between the first entry and the anchor": (r"write\(.*anchors/.alder.*length\W+1,", 0, 0),
    "as the count of patients is written": (r"write\(.*anchors/.birch.*length\W+3,", 0, -2),
    "as a charge is synced": (r"write\(.*anchors/.alder.*length\W+6,", 0, -1),
    "between a charge and the anchor": (r"write\(.*anchors/.birch.*length\W+7,", 0, 0),
    "as a round's state is replaced": (r"rename\(.*birch.*round.safetensors", 1, 0),
    "after a round's state was replaced": (r"rename\(.*alder.*round.safetensors", 1, 1),
    "between the mark and the wire": (r"write\(.*wire.jsonl.*\Wtrain\W", 2, 0),
    "as the checkpoint is replaced": (r"rename\(.*server.safetensors", 3, 0),
    "as the table of scores is kept": (r"write\(.*anchors/.birch.*length\W+14,", 0, 0),
    "as the fine-tuned model is kept": (r"rename\(.*birch.*finetuned", 0, 0),
}


def test_a_run_killed_where_it_matters_goes_on(server: Server, undisturbed: list[str], least: dict[str, float]) -> None:
    for name, (pattern, which, after) in POINTS.items():
        index = find(undisturbed, pattern, which) + after
        assert survive(server, name, [{"inject": at(undisturbed, index)}], least) == 1, name


# Kills everywhere.

NUMBER = 100 if EVERY else 35
"""Runs that are killed at a call, and as many that are killed at a time."""


def duration(server: Server, **how: Any) -> float:
    """Seconds that a run takes that nobody disturbs, at this moment: a busy machine changes its pace within minutes."""
    outcome = server.perform("timed", **how)
    assert outcome["code"] == 0, outcome["error"]
    shutil.rmtree(server.folder / "timed")
    return float(outcome["seconds"])


def moment(chance: random.Random, seconds: float) -> dict[str, Any]:
    """A kill at any time within so many seconds."""
    return {"after": chance.random() * seconds}


def kills_of(first: dict[str, Any], more: Callable[[], dict[str, Any]], chance: random.Random) -> list[dict[str, Any]]:
    """One kill, and in every third run one or two of its resumptions."""
    return [first, *(more() for _ in range(chance.choice([0, 0, 0, 0, 1, 2])))]


@pytest.mark.long
def test_runs_killed_at_calls_all_over_go_on(server: Server, undisturbed: list[str], least: dict[str, float]) -> None:
    chance, kills = random.Random(0), 0
    for number in range(NUMBER):
        index = (2 * number + 1) * len(undisturbed) // (2 * NUMBER)
        plan = kills_of(
            {"inject": at(undisturbed, index)},
            lambda: {"inject": at(undisturbed, chance.randrange(len(undisturbed) // 2))},
            chance,
        )
        kills += survive(server, f"call {index}", plan, least)
    assert kills >= NUMBER


@pytest.mark.long
def test_runs_killed_at_random_times_go_on(server: Server, undisturbed: list[str], least: dict[str, float]) -> None:
    chance, kills, runs = random.Random(1), 0, 0
    while kills < NUMBER:
        seconds = duration(server)
        plan = kills_of(moment(chance, seconds), partial(moment, chance, seconds / 2), chance)
        kills += survive(server, f"time {runs}", plan, least)
        runs += 1
        assert runs < 3 * NUMBER


# A server that is killed, over a longer run.

ADAM = {"privacy.enabled": False, "training.rounds": 20, "aggregation.server_optimizer": "adam",
        "aggregation.server_lr": 0.05, "training.finetune": False}  # fmt: skip
POINTS_OF_A_LONG_RUN = 50 if EVERY else 18


def model_of(folder: Path) -> bytes:
    return (folder / "run" / "model" / "shared.safetensors").read_bytes()


@pytest.mark.long
def test_a_run_with_a_server_optimiser_ends_with_the_same_model_wherever_it_was_killed(server: Server) -> None:
    """Half of the kills at a system call, half at a time; a third of the resumptions are killed too."""
    calls = calls_of(server.perform("adam", trace=True, overrides=ADAM))
    expected, chance, kills = model_of(server.folder / "adam"), random.Random(2), 0
    for number in range(POINTS_OF_A_LONG_RUN):
        job = f"adam-{number}"
        index, seconds = (number + 1) * len(calls) // (POINTS_OF_A_LONG_RUN + 1), duration(server, overrides=ADAM)
        first = {"inject": at(calls, index)} if number % 2 else moment(chance, seconds)
        for kill in kills_of(first, partial(moment, chance, seconds / 2), chance):
            outcome = server.perform(job, overrides=ADAM, **kill)
            assert outcome["code"] in (0, -9), outcome["error"]
            kills += outcome["code"] == -9
            if outcome["code"] == 0 or (server.folder / job / "run" / "summary.json").exists():
                break
        if not (server.folder / job / "run" / "summary.json").exists():
            outcome = server.perform(job, overrides=ADAM)
            assert outcome["code"] == 0, outcome["error"]
        assert model_of(server.folder / job) == expected
        assert [line["round"] for line in rounds_of(server.folder / job / "run")] == list(range(1, 21))
        shutil.rmtree(server.folder / job)
    assert kills >= POINTS_OF_A_LONG_RUN * 4 // 5
