"""One site in a study: what it refuses, in which order it works, what leaves it, and what it says of errors."""

from __future__ import annotations

import hashlib
import json
import logging
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from cohorts import Hospital
from hospitals import KINDS, Wire, build, die, participant, plan_of, publish

from gapweave.client import learner as learner_module
from gapweave.client import participant as participant_module
from gapweave.client.app import FIXED_TEXTS
from gapweave.client.deployment_cli import _status_lines
from gapweave.client.local_models import fit_network
from gapweave.client.participant import Participant
from gapweave.client.service import Deployment
from gapweave.client.state import RoundState, RunFolder, read_model
from gapweave.client.supernode import CONTACT
from gapweave.client.training import Sgd
from gapweave.server.aggregation import GroupAggregation, initial_groups
from gapweave.shared import wire
from gapweave.shared.config import load_site
from gapweave.shared.config.study import Study
from gapweave.shared.errors import BudgetExhausted, DataError, RefusedError
from gapweave.shared.model import group_of
from gapweave.shared.privacy.ledger import read_ledger
from gapweave.shared.tensorfile import Arrays
from gapweave.sites.simulate.baselines import pool

RUN = "run-1"


pytestmark = pytest.mark.usefixtures("fresh_sites")


def groups_for(site: Participant) -> Arrays:
    start = initial_groups(site.study)
    return {group: start[group] for group in site.shared}


def train(site: Participant, number: int = 1, request: str | None = None, received: Arrays | None = None) -> RoundState:
    return site.train(RUN, number, request or f"request {number}", groups_for(site) if received is None else received)


def kinds(site: Participant) -> list[str]:
    return [entry.kind for entry in read_ledger(site.state).entries]


def as_bytes(arrays: Arrays) -> dict[tuple[str, str], bytes]:
    return {(group, name): value.tobytes() for group, part in arrays.items() for name, value in part.items()}


# What leaves a site.


def test_a_site_that_lacks_a_modality_neither_gets_nor_sends_its_encoder(tmp_path: Path) -> None:
    of = plan_of(private=True)
    site = participant(build(tmp_path / "a", "north", ["labs", "vitals"]), of)
    capability = site.prepare(RUN)
    groups = ["encoder/labs", "encoder/vitals", "fusion", "head/labs", "head/vitals", "imputer"]
    assert capability.modalities == ["labs", "vitals"]
    assert capability.groups == groups
    assert sorted(train(site).reply) == groups
    with pytest.raises(RefusedError, match="other parameter groups"):
        train(site, 2, received=initial_groups(of))


@pytest.mark.parametrize(
    ("policy", "leaves"),
    [
        ("heads", ["fusion", "head/labs", "head/note"]),
        ("heads+imputer", ["fusion", "head/labs", "head/note", "imputer"]),
        ("all", ["encoder/labs", "encoder/note", "fusion", "head/labs", "head/note", "imputer"]),
        (
            {"encoder/*": "holders", "encoder/note": "local"},
            ["encoder/labs", "fusion", "head/labs", "head/note"],
        ),
    ],
    ids=str,
)
def test_only_shared_groups_leave_and_the_others_are_trained_at_home(
    tmp_path: Path, policy: object, leaves: list[str]
) -> None:
    of = plan_of(private=True, sharing={"policy": policy})
    site = participant(build(tmp_path / "a", "north", ["labs", "note"]), of)
    site.prepare(RUN)
    state = train(site)
    assert sorted(state.reply) == leaves
    everything = {"encoder/labs", "encoder/note", "fusion", "head/labs", "head/note", "imputer"}
    assert state.private.keys() == everything - set(leaves)
    for group, part in state.private.items():
        for name, value in part.items():
            assert not np.array_equal(value, site.initial[group][name].numpy()), f"{group} {name} was not noised"
    for group, part in state.reply.items():
        # Noise lies on a grid of 2^-12 of its deviation: one coordinate in 10,000 is 0, and the imputer has thousands.
        zeros = sum(int((value == 0).sum()) for value in part.values())
        assert zeros <= max(2, sum(value.size for value in part.values()) // 100), f"{group} leaves without noise"


def test_private_groups_and_momentum_go_on_where_the_last_round_ended(tmp_path: Path) -> None:
    of = plan_of(private=False, sharing={"policy": "heads"}, training={"momentum": 0.9})
    hospital = build(tmp_path / "a", "north")
    site = participant(hospital, of)
    site.prepare(RUN)
    train(site, 1)
    first = train(site, 2)
    again = participant(hospital, of, tmp_path / "other")
    again.prepare(RUN)
    train(again, 1)
    after_restart = participant(hospital, of, tmp_path / "other")
    assert as_bytes(train(after_restart, 2).reply) == as_bytes(first.reply)
    fresh = participant(hospital, of, tmp_path / "third")
    fresh.prepare(RUN)
    assert as_bytes(train(fresh, 2).reply) != as_bytes(first.reply)


# One step of all sites is one step on all patients.


def test_one_full_step_with_a_plain_mean_equals_the_pooled_step(tmp_path: Path) -> None:
    """Equal sizes, everyone holds everything, no noise, q = 1, the same masks."""
    of = plan_of(
        private=False,
        training={"rounds": 1, "lr": 0.3},
        model={"embedding": 4, "imputer": "none"},
        aggregation={"default": "mean"},
    )
    sites = [participant(build(tmp_path / name, name), of) for name in ("east", "north", "west")]
    start = initial_groups(of)
    combine = GroupAggregation(of, start)
    for site in sites:
        assert site.training.patients == 24
        site.prepare(RUN)
        combine.add(site.site.name, site.train(RUN, 1, "request", start).reply)
    federated, _ = combine.finish()
    pooled = fit_network(of, pool(of, [site.training for site in sites]), list(of.order), "pooled").model
    moved = 0.0
    for name, parameter in pooled.named_parameters():
        group, key = group_of(name)
        torch.testing.assert_close(
            torch.from_numpy(federated[group][key]), parameter.detach(), rtol=0, atol=1e-6, msg=name
        )
        moved += float((parameter.detach() - torch.from_numpy(start[group][key])).abs().max())
    assert moved > 0.1, "both took a real step"


# Write-ahead.


def test_the_proximal_term_pulls_shared_parameters_only(tmp_path: Path) -> None:
    # By hand: w1 = w0 - lr g; w2 = w1 - lr (g + mu (w1 - w0)), so w2 - w0 = -lr g (2 - lr mu). Private ones: -2 lr g.
    of = plan_of(private=False, training={"lr": 0.5, "proximal": 0.4})
    model = participant(build(tmp_path / "one", "north"), of).learner.model
    start = {name: value.detach().clone() for name, value in model.named.items()}
    sent = {name: value for name, value in start.items() if name.startswith("fusion")}
    assert sent
    sgd = Sgd(of, {}, sent)
    for _ in range(2):
        sgd.step(model, {name: torch.full_like(value, 0.1) for name, value in start.items()})
    for name, value in model.named.items():
        expected = -0.05 * (2 - 0.2) if name in sent else -0.1
        torch.testing.assert_close(value - start[name], torch.full_like(value, expected))

    def moved(proximal: float) -> float:
        of = plan_of(private=False, training={"local_steps": 8, "lr": 0.2, "proximal": proximal})
        update = train(participant(build(tmp_path / str(proximal), "north"), of)).reply["fusion"]
        return float(sum(np.abs(value).sum() for value in update.values()))

    assert moved(3) < 0.7 * moved(0)


@pytest.mark.parametrize("private", [True, False])
def test_a_servers_corrections_lead_no_parameter_out_of_bounds_under_privacy(tmp_path: Path, private: bool) -> None:
    of = plan_of(private=private)
    model = participant(build(tmp_path / "one", "north"), of).learner.model
    pushed = {name: torch.full_like(value, 1e6) for name, value in model.named.items()}
    Sgd(of, {}, corrections=pushed).step(model, {name: torch.zeros_like(value) for name, value in pushed.items()})
    largest = max(float(value.detach().abs().max()) for value in model.named.values())
    assert largest == 1000 if private else largest > 1000


def test_the_charge_is_durable_before_any_work(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    site = participant(build(tmp_path / "a", "north"), plan_of(private=True))
    site.prepare(RUN)
    seen: list[str] = []

    def work(*_: object) -> None:
        seen.extend(kinds(site))
        raise RuntimeError("the machine died")

    monkeypatch.setattr(learner_module, "train", work)
    with pytest.raises(RuntimeError):
        train(site)
    assert seen == ["open", "approve", "charge", "value", "reserve", "charge"], "n_hat, then the round"
    assert read_ledger(site.state).entries[-1].body["request"] == "request 1"
    assert RunFolder(site.state, RUN).load().round == 0


def test_a_round_for_data_that_are_gone_costs_nothing(tmp_path: Path) -> None:
    hospital, of = build(tmp_path / "a", "north"), plan_of(private=True)
    participant(hospital, of).prepare(RUN)
    (hospital.folder / "labs.csv").rename(hospital.folder / "away.csv")
    later = participant(hospital, of)  # a deployed site reads its data for each message
    before = kinds(later)
    with pytest.raises(DataError):
        train(later)
    assert kinds(later) == before
    (hospital.folder / "away.csv").rename(hospital.folder / "labs.csv")
    assert train(participant(hospital, of)).round == 1


def test_a_reply_is_kept_before_it_is_marked_as_released(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    site = participant(build(tmp_path / "a", "north"), plan_of(private=True))
    site.prepare(RUN)
    order: list[str] = []
    save, mark = RunFolder.save, participant_module.Ledger.released
    monkeypatch.setattr(RunFolder, "save", lambda self, state: order.append("saved") or save(self, state))
    monkeypatch.setattr(
        participant_module.Ledger, "released", lambda self, request: order.append("released") or mark(self, request)
    )
    train(site)
    assert order == ["saved", "released"]


def test_the_same_request_again_gives_the_same_bytes_and_costs_nothing(tmp_path: Path) -> None:
    hospital, of = build(tmp_path / "a", "north"), plan_of(private=True)
    site = participant(hospital, of)
    site.prepare(RUN)
    first = train(site)
    before = kinds(site)
    assert before[-2:] == ["charge", "released"]
    assert as_bytes(train(site).reply) == as_bytes(first.reply)
    after_restart = participant(hospital, of)
    assert as_bytes(train(after_restart).reply) == as_bytes(first.reply)
    assert kinds(site) == before


def test_the_same_round_with_another_request_is_refused(tmp_path: Path) -> None:
    """Else two answers on one round's data and noise could be subtracted."""
    site = participant(build(tmp_path / "a", "north"), plan_of(private=True))
    site.prepare(RUN)
    train(site, 1)
    train(site, 2)
    before = kinds(site)
    for number in (1, 2, 0, -1):
        with pytest.raises(RefusedError, match=f"round {number} was answered before"):
            train(site, number, "another request")
    assert kinds(site) == before
    with pytest.raises(RefusedError):
        train(site, 1, "request 1")  # only the last reply is kept


def test_after_a_crash_a_round_is_recomputed_once_and_then_charged_again(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    hospital = build(tmp_path / "a", "north")
    hospital.update("policy", epsilon=20.0)  # room for more than the study's schedule
    site = participant(hospital, plan_of(private=True))
    site.prepare(RUN)

    with monkeypatch.context() as patch:
        patch.setattr(RunFolder, "save", die)
        for _ in range(2):
            with pytest.raises(RuntimeError):
                train(site)
    before = kinds(site)
    assert before[-3:] == ["reserve", "charge", "recompute"]
    train(site)
    assert kinds(site) == [*before, "charge", "released"]


def test_a_crash_after_the_reply_was_kept_repeats_the_bytes(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    site = participant(build(tmp_path / "a", "north"), plan_of(private=True))
    site.prepare(RUN)

    with monkeypatch.context() as patch:
        patch.setattr(participant_module.Ledger, "released", die)
        with pytest.raises(RuntimeError):
            train(site)
    kept = RunFolder(site.state, RUN).load().reply
    assert as_bytes(train(site).reply) == as_bytes(kept)
    assert kinds(site)[-2:] == ["charge", "released"]


def test_a_cap_for_two_rounds_ends_after_two_rounds(tmp_path: Path) -> None:
    hospital, of = build(tmp_path / "a", "north"), plan_of(private=True)
    hospital.update("patients", declared=24)
    hospital.update("policy", epsilon=7.0)
    site = participant(hospital, of)
    capability = site.prepare(RUN)
    assert capability.plan["epsilon"] <= 8
    assert capability.rounds == 2
    train(site, 1)
    train(site, 2)
    with pytest.raises(BudgetExhausted):
        train(site, 3)
    assert read_ledger(site.state).spent() <= 7.0
    assert RunFolder(site.state, RUN).load().round == 2


def test_two_studies_on_one_state_folder_share_one_cap(tmp_path: Path) -> None:
    hospital = build(tmp_path / "a", "north")
    hospital.update("patients", declared=24)
    hospital.update("policy", epsilon=12.0)
    first = participant(hospital, plan_of(private=True))
    assert first.prepare(RUN).rounds == 3
    train(first)
    second = participant(hospital, plan_of(private=True, name="second"))
    assert second.prepare("run-2").rounds < 3, "what the first reserved is taken"
    third = participant(hospital, plan_of(private=True, name="third"))
    with pytest.raises(BudgetExhausted):
        third.prepare("run-3")
    first.finish(RUN, groups_for(first))
    assert third.prepare("run-4").rounds >= 1, "and given back"


# n_hat.


def test_the_number_of_patients_is_released_once_a_study_and_charged(tmp_path: Path) -> None:
    hospital, of = build(tmp_path / "a", "north"), plan_of(private=True)
    hospital.update("policy", epsilon=40.0)
    site = participant(hospital, of)
    first, again = site.prepare(RUN), participant(hospital, of).prepare("run-2")
    counts = [event for event in read_ledger(site.state).events() if event.kind == "noisy_count"]
    assert len(counts) == 1
    assert counts[0].noise_multiplier == pytest.approx(1 / (0.05 * 8))
    assert first.plan["n_hat"] == again.plan["n_hat"]
    train(site)
    (update,) = [event for event in read_ledger(site.state).events() if event.kind == "dp_sgd"]
    assert update.n_hat == first.plan["n_hat"]
    participant(hospital, plan_of(private=True, seed=9)).prepare("run-3")
    counts = [event for event in read_ledger(site.state).events() if event.kind == "noisy_count"]
    assert len(counts) == 2, "another study, another count"


def test_a_declared_number_of_patients_costs_nothing_and_is_the_one_used(tmp_path: Path) -> None:
    hospital = build(tmp_path / "a", "north")
    hospital.update("patients", declared=400)
    site = participant(hospital, plan_of(private=True, training={"batch": 100}))
    capability = site.prepare(RUN)
    assert capability.plan["n_hat"] == 400
    assert capability.plan["sample_rate"] == 0.25
    assert not read_ledger(site.state).events()


def test_delta_is_the_smallest_of_study_policy_and_size(tmp_path: Path) -> None:
    def delta(study_delta: float, policy_delta: float, upper: int) -> float:
        hospital = build(tmp_path / f"{study_delta}{policy_delta}{upper}", "north")
        hospital.update("patients", declared=24, upper=upper)
        hospital.update("policy", delta=policy_delta)
        return participant(hospital, plan_of(private=True, privacy={"delta": study_delta})).prepare(RUN).plan["delta"]

    assert delta(1e-6, 1e-5, 1000) == 1e-6
    assert delta(1e-5, 1e-6, 1000) == 1e-6
    assert delta(1e-5, 1e-5, 1_000_000) == pytest.approx(1e-7)


# Randomness.


def test_with_privacy_off_a_round_repeats_by_seed_site_and_round(tmp_path: Path) -> None:
    """q < 1 and hidden modalities: both draws are at work."""
    keys = {"training": {"batch": 6}}
    hospital = build(tmp_path / "a", "north")

    def reply(of: Study, folder: str, number: int = 1) -> dict[tuple[str, str], bytes]:
        site = participant(hospital, of, tmp_path / folder)
        site.prepare(RUN)
        return as_bytes(train(site, number).reply)

    plain = plan_of(private=False, **keys)
    assert reply(plain, "one") == reply(plain, "two")
    assert reply(plain, "one again", 2) != reply(plain, "two again", 1)
    # The same initial values, another run of draws.
    hospital.content["name"] = "south"
    assert reply(plain, "three") != reply(plain, "four", 2)
    elsewhere = reply(plain, "five")
    hospital.content["name"] = "north"
    assert reply(plain, "six") != elsewhere


def test_with_privacy_on_nothing_repeats(tmp_path: Path) -> None:
    hospital, of = build(tmp_path / "a", "north"), plan_of(private=True)
    hospital.update("patients", declared=24)
    replies = []
    for folder in ("one", "two"):
        site = participant(hospital, of, tmp_path / folder)
        site.prepare(RUN)
        replies.append(as_bytes(train(site).reply))
    assert replies[0].keys() == replies[1].keys()
    assert not [key for key, value in replies[0].items() if replies[1][key] == value]


# Policy.


def test_a_deployed_site_trains_approved_studies_only(tmp_path: Path) -> None:
    hospital, of = build(tmp_path / "a", "north"), plan_of(private=True)
    hospital.update("patients", declared=24)
    with pytest.raises(RefusedError, match=f"hash {of.sha256} is not approved"):
        participant(hospital, of, simulation=False).prepare(RUN)
    with pytest.raises(RefusedError):
        train(participant(hospital, of, simulation=False))
    hospital.update("policy", studies=[of.sha256])
    deployed = participant(hospital, of, simulation=False)
    deployed.prepare(RUN)
    train(deployed)
    altered = plan_of(private=True, training={"lr": 0.51})
    with pytest.raises(RefusedError, match="not approved"):
        participant(hospital, altered, simulation=False).prepare(RUN)


def test_a_deployed_site_refuses_to_train_without_noise_unless_it_says_so(tmp_path: Path) -> None:
    hospital, of = build(tmp_path / "a", "north"), plan_of(private=False)
    hospital.update("policy", studies=[of.sha256])
    with pytest.raises(RefusedError, match="without noise"):
        participant(hospital, of, simulation=False).prepare(RUN)
    hospital.update("policy", unnoised="allow")
    participant(hospital, of, simulation=False).prepare(RUN)


@pytest.mark.parametrize("simulation", [True, False])
def test_a_site_that_releases_no_updates_sends_none(tmp_path: Path, simulation: bool) -> None:
    hospital, of = build(tmp_path / "a", "north"), plan_of(private=True)
    hospital.update("policy", releases=["counts"], studies=[of.sha256])
    with pytest.raises(RefusedError, match="no model updates"):
        participant(hospital, of, simulation=simulation).prepare(RUN)


def test_a_small_cohort_is_refused_without_its_size(tmp_path: Path) -> None:
    for declared in (None, 24):
        hospital = build(tmp_path / f"{declared}", "north", patients=13)
        hospital.update("policy", min_patients=14)
        hospital.update("patients", declared=declared)
        for private in (True, False):
            site = participant(hospital, plan_of(private=private))
            with pytest.raises(RefusedError, match="fewer than 14 training patients") as caught:
                site.prepare(RUN)
            assert "13" not in str(caught.value)
            assert not read_ledger(site.state).events()
    hospital.update("policy", min_patients=13)
    participant(hospital, plan_of(private=True)).prepare(RUN)


@pytest.mark.parametrize("schedule", ["fedavg", "fedsgd"])
def test_a_study_beyond_the_cap_costs_nothing_before_it_is_refused(tmp_path: Path, schedule: str) -> None:
    """The number of patients was released and charged, and the study refused after that: again and again."""
    hospital = build(tmp_path / "a", "north")
    keys = {"schedule": schedule, "rounds": 1, "batch": 8, "lr": 1}
    greedy = plan_of(private=True, training=keys, privacy={"epsilon": 100})
    for _ in range(2):
        site = participant(hospital, greedy)
        with pytest.raises(BudgetExhausted, match="not one round fits"):
            site.prepare(RUN)
        assert not read_ledger(site.state).events()
    participant(hospital, plan_of(private=True, training=keys, privacy={"epsilon": 4})).prepare(RUN)
    assert [event.released for event in read_ledger(site.state).events()] == ["number of training patients"]


def test_what_the_ledger_has_no_room_for_costs_a_declared_site_nothing(tmp_path: Path) -> None:
    """It declares its patients, and the study asks for noised statistics: these were charged first."""
    hospital = build(tmp_path / "a", "north")
    hospital.update("patients", declared=24)
    keys = {"training": {"rounds": 1}, "preparation": {"class_balance": "noisy"}, "privacy": {"epsilon": 100}}
    site = participant(hospital, plan_of(private=True, **keys))
    with pytest.raises(BudgetExhausted, match="not one round fits"):
        site.prepare(RUN)
    assert not read_ledger(site.state).events()


def test_data_that_cannot_be_used_leave_no_reservation_behind(tmp_path: Path) -> None:
    """The hospital mends its file, and the same budget is there for the next run."""
    hospital, of = build(tmp_path / "a", "north"), plan_of(private=True)
    hospital.update("patients", declared=24)
    good = (hospital.folder / "labs.csv").read_text()
    hospital.labs(24, na=["high"] * 24)
    with pytest.raises(DataError, match="not numbers"):
        participant(hospital, of).prepare("broken")
    assert not list(read_ledger(hospital.folder / "state").outstanding())
    (hospital.folder / "labs.csv").write_text(good)
    assert participant(hospital, of).prepare(RUN).rounds == of.training.rounds


# The last message.


def test_the_last_message_keeps_the_whole_model_and_gives_back_the_rest(tmp_path: Path) -> None:
    of = plan_of(private=True, sharing={"policy": "heads"})
    site = participant(build(tmp_path / "a", "north"), of)
    site.prepare(RUN)
    state = train(site)
    final = {group: {name: value + 1 for name, value in part.items()} for group, part in groups_for(site).items()}
    site.finish(RUN, final)
    kept, card = read_model(RunFolder(site.state, RUN).path / "model.safetensors")
    for group, part in {**state.private, **final}.items():
        for name, value in part.items():
            assert np.array_equal(kept[group][name].numpy(), value), f"{group} {name}"
    assert card["modalities"] == ["labs", "note", "vitals"]
    assert card["prior"] == [0.5]
    assert kinds(site)[-1] == "close"


def test_final_groups_of_another_form_are_refused(tmp_path: Path) -> None:
    """Believed: copying checks the shape. True: a row of one number was spread over a whole tensor."""
    site = participant(build(tmp_path / "a", "north"), plan_of(private=True))
    site.prepare(RUN)
    train(site)
    good = groups_for(site)
    narrow = {**good, "fusion": {name: value.reshape(-1)[:1] * 0 + 7 for name, value in good["head/labs"].items()}}
    short = {group: part for group, part in good.items() if group != "fusion"}
    spread = {**good, "head/labs": {**good["head/labs"], "weight": np.full((1, 1), 7, np.float32)}}
    for bad in (narrow, short, spread, {**good, "encoder/other": good["fusion"]}):
        with pytest.raises(RefusedError, match="other parameter groups"):
            site.finish(RUN, bad)
    assert kinds(site)[-1] == "released"
    site.finish(RUN, good)


def test_fine_tuning_is_charged_and_its_copy_stays(tmp_path: Path) -> None:
    of = plan_of(private=True, training={"finetune": True, "finetune_steps": 2})
    hospital = build(tmp_path / "a", "north")
    site = participant(hospital, of)
    site.prepare(RUN)
    before = train(site, 1).reply
    site.finish(RUN, groups_for(site))
    charged = [event.released for event in read_ledger(site.state).events()]
    assert charged[-1] == "fine-tuning"
    tuned, _ = read_model(RunFolder(site.state, RUN).path / "finetuned.safetensors")
    model, _ = read_model(RunFolder(site.state, RUN).path / "model.safetensors")
    assert not torch.equal(tuned["head/labs"]["weight"], model["head/labs"]["weight"])
    # A request that comes late is answered from what was kept; a new round starts from the server's groups.
    assert as_bytes(train(site, 1).reply) == as_bytes(before)
    kept = RunFolder(site.state, RUN).load()
    assert not any(
        np.array_equal(value, tuned[group][name].numpy())
        for group, part in kept.private.items()
        for name, value in part.items()
    )


# Messages, through Flower.


def prepare(grid: Wire, of: Study, run: str = RUN) -> dict[str, Any]:
    header, arrays = wire.unpack(grid.ask(wire.PREPARE, wire.pack({"run": run, "study": of.canonical()}, {})).content)
    assert not arrays
    return header


def ask_to_train(
    grid: Wire, of: Study, number: int = 1, groups: list[str] | None = None
) -> tuple[dict[str, Any], Arrays]:
    start = initial_groups(of)
    chosen = {group: start[group] for group in (start if groups is None else groups)}
    content = wire.pack({"run": RUN, "study": of.sha256, "round": number}, chosen)
    return wire.unpack(grid.ask(wire.TRAIN, content).content)


def test_a_study_by_messages(tmp_path: Path) -> None:
    of = plan_of(private=True)
    grid = Wire([build(tmp_path / "a", "north", ["labs"])])
    capability = prepare(grid, of)
    assert capability["status"] == "ok"
    assert capability["groups"] == ["encoder/labs", "fusion", "head/labs", "imputer"]
    header, first = ask_to_train(grid, of, groups=capability["groups"])
    assert header["status"] == "ok"
    assert header["event"]["released"] == "update of round 1"
    assert sorted(first) == capability["groups"]
    _, again = ask_to_train(grid, of, groups=capability["groups"])
    assert as_bytes(again) == as_bytes(first)
    header, arrays = ask_to_train(grid, of, 2)
    assert (header["status"], arrays) == ("refused", {}), "encoders of others are not for this site"


def test_a_message_holds_nothing_but_what_is_declared(tmp_path: Path) -> None:
    """A whole reply, key by key: nothing else may ever ride along."""
    of = plan_of(private=True)
    grid = Wire([build(tmp_path / "a", "north")])
    capability = prepare(grid, of)
    assert set(capability) == {"protocol", "status", "site", "modalities", "groups", "rounds", "plan", "ledger"}
    assert set(capability["ledger"]) == {"site", "length", "hash"}
    assert set(capability["plan"]) == {
        *("noise_multiplier", "sample_rate", "n_hat", "epsilon", "delta"),
        *("preparation", "looks", "no_looks", "table", "no_table"),
    }
    header, _ = ask_to_train(grid, of)
    assert set(header) == {"protocol", "status", "round", "event", "ledger"}
    assert set(header["ledger"]) == {"site", "length", "hash"}
    assert set(header["event"]) == {
        "kind",
        "released",
        "noise_multiplier",
        "sample_rate",
        "steps",
        "max_grad_norm",
        "n_hat",
        "unit",
        "neighbours",
    }
    last = {"run": RUN, "study": of.sha256, "round": 1}
    finished = wire.unpack(grid.ask(wire.FINISH, wire.pack(last, initial_groups(of))).content)
    assert finished == ({"protocol": 1, "status": "ok"}, {})


def test_a_round_of_a_run_that_was_never_prepared_is_refused(tmp_path: Path) -> None:
    header, _ = ask_to_train(Wire([build(tmp_path / "a", "north")]), plan_of(private=True))
    assert header["status"] == "refused"


def test_a_run_id_cannot_name_another_folder(tmp_path: Path) -> None:
    header = prepare(Wire([build(tmp_path / "a", "north")]), plan_of(private=True), run="../../../escaped")
    assert header["status"] == "refused"
    assert not list(tmp_path.rglob("escaped"))


CANARY = "zq77canary"
ASKED = plan_of(private=True)


def deployed(hospital: Hospital) -> Wire:
    """A site that is no simulation, and approved the study."""
    hospital.update("policy", studies=[ASKED.sha256])
    return Wire([hospital], simulation=False)


def plant_in_data(folder: Path, _: pytest.MonkeyPatch) -> Wire:
    hospital = build(folder, "north", patients=24)
    hospital.records(24, y=[CANARY] * 24)
    return deployed(hospital)


def plant_in_the_work(folder: Path, monkeypatch: pytest.MonkeyPatch) -> Wire:
    def explode(*_: object, **__: object) -> None:
        raise ValueError(f"could not convert {CANARY} of {CANARY}")

    monkeypatch.setattr(participant_module, "load_cohort", explode)
    return deployed(build(folder, "north"))


def plant_in_a_refusal(folder: Path, monkeypatch: pytest.MonkeyPatch) -> Wire:
    def refuse(*_: object, **__: object) -> None:
        raise DataError(f"{CANARY} is wrong", where=f"/home/{CANARY}.csv", remedy=CANARY)

    monkeypatch.setattr(participant_module, "load_cohort", refuse)
    return deployed(build(folder, "north"))


def plant_in_the_paths(folder: Path, _: pytest.MonkeyPatch) -> Wire:
    hospital = build(folder / CANARY, "north")
    (hospital.folder / "records.csv").unlink()
    return deployed(hospital)


@pytest.mark.parametrize(
    ("plant", "status", "error"),
    [
        (plant_in_data, "failed", "DataError"),
        (plant_in_the_work, "failed", "InternalError"),
        (plant_in_a_refusal, "failed", "DataError"),
        (plant_in_the_paths, "failed", "DataError"),
    ],
)
def test_an_error_reply_never_quotes_the_site(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, plant: Any, status: str, error: str
) -> None:
    grid = plant(tmp_path / "a", monkeypatch)
    header = prepare(grid, ASKED)
    assert (header["status"], header["error"], header["site"]) == (status, error, "north")
    fixed = header["text"] in FIXED_TEXTS.values()
    reference = header["text"].removeprefix("internal error at the site, reference ")
    assert fixed or (len(reference) == 12 and int(reference, 16) >= 0)
    for _, _, _, reply in grid.log:
        everything = json.dumps({name: dict(record) for name, record in reply.config_records.items()})
        assert CANARY not in everything
        assert str(tmp_path) not in everything
        assert not reply.array_records


def test_a_deployed_site_says_fixed_texts_only(tmp_path: Path, caplog: pytest.LogCaptureFixture) -> None:
    caplog.set_level(logging.INFO)
    hospital = build(tmp_path / "a", "north")
    hospital.update("policy", studies=[hashlib.sha256(CANARY.encode()).hexdigest()])
    header = prepare(Wire([hospital], simulation=False), plan_of(private=True))
    assert (header["status"], header["error"]) == ("refused", "NotApproved")
    assert header["text"] == "the site has not approved this study: gapweave site approve SITE.yaml --study STUDY"
    assert "is not approved" in caplog.text, "the site's own people can read why"


def test_a_deployed_site_knows_what_it_failed_at_until_it_answers_well(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    of, hospital = plan_of(private=True), build(tmp_path / "a", "north")
    hospital.update("policy", studies=[])
    service = hospital.folder / "state" / "service"
    service.mkdir(parents=True)
    monkeypatch.setenv(CONTACT, str(service / "contact.json"))
    assert prepare(Wire([hospital], simulation=False), of)["status"] == "refused"
    site = Deployment(hospital.site_file, load_site(hospital.site_file))
    found = site.trouble()
    assert found is not None
    assert "is not approved" in found["text"]
    assert "trouble     " in "\n".join(_status_lines({**site.status(), "ledger": None}))
    hospital.update("policy", studies=[of.sha256])
    assert prepare(Wire([hospital], simulation=False), of)["status"] == "ok"
    assert site.trouble() is None


def test_a_deployed_site_keeps_its_state_where_its_file_says(tmp_path: Path) -> None:
    of = plan_of(private=True)
    hospital = build(tmp_path / "a", "north")
    hospital.update("policy", studies=[of.sha256])
    hospital.content["state"] = "ours"
    assert prepare(Wire([hospital], simulation=False), of)["status"] == "ok"
    assert read_ledger(hospital.folder / "ours").intact


def test_an_exhausted_budget_is_a_refusal_by_messages(tmp_path: Path) -> None:
    of = plan_of(private=True)
    hospital = build(tmp_path / "a", "north")
    hospital.update("policy", epsilon=0.001)
    hospital.update("patients", declared=24)
    header = prepare(Wire([hospital]), of)
    assert (header["status"], header["error"]) == ("refused", "BudgetExhausted")
    assert header["text"] == FIXED_TEXTS[BudgetExhausted]


def test_a_server_of_another_version_is_told_both(tmp_path: Path) -> None:
    grid = Wire([build(tmp_path / "a", "north")])
    content = wire.pack({"protocol": 99, "run": RUN, "study": plan_of(private=True).canonical()}, {})
    header, _ = wire.unpack(grid.ask(wire.PREPARE, content).content)
    assert header["error"] == "ProtocolError"
    assert "protocol 99, this one 1" in header["text"]


def test_sites_are_read_again_when_their_file_changes(tmp_path: Path) -> None:
    hospital, of = build(tmp_path / "a", "north"), plan_of(private=True)
    hospital.update("policy", epsilon=20.0)
    grid = Wire([hospital])
    assert prepare(grid, of)["modalities"] == sorted(KINDS)
    del hospital.content["data"]["note"]
    publish(hospital)
    assert prepare(grid, of, "run-2")["modalities"] == ["labs", "vitals"]
