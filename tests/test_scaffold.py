"""SCAFFOLD: it is the paper's algorithm, it removes the drift of local steps, and it costs no privacy."""

from __future__ import annotations

from pathlib import Path
from typing import Any, ClassVar

import numpy as np
import pytest
import torch
from hospitals import Wire, build, participant, plan_of
from pretence import ALL, Answer, Pretence, Pretender, loop

from gapweave.client import learner as learner_module
from gapweave.client.participant import Participant
from gapweave.client.training import Step
from gapweave.server.aggregation import GroupAggregation, initial_groups
from gapweave.server.aggregators import Update
from gapweave.server.agreement import agreements
from gapweave.server.checkpoint import Checkpoint, load_checkpoint, save_checkpoint
from gapweave.server.peers import Peer
from gapweave.server.scaffold import Variates
from gapweave.server.strategy import RoundLoop
from gapweave.shared import tensorfile, wire
from gapweave.shared.config.study import Study
from gapweave.shared.config.training import Training
from gapweave.shared.errors import RefusedError, TooFewSites
from gapweave.shared.messages import as_corrections, split_corrections
from gapweave.shared.model import MultimodalModel, group_of
from gapweave.shared.objective import record_losses
from gapweave.shared.privacy.draws import SeededDraws
from gapweave.shared.privacy.ledger import read_ledger
from gapweave.shared.rundir import RunDirectory
from gapweave.shared.tensorfile import Arrays

pytestmark = pytest.mark.usefixtures("fresh_sites")

STEPS, LR = 20, 0.1
CURVES = {"a": (4.0, 3.0), "b": (0.25, -5.0), "c": (1.0, 0.5), "d": (2.0, 1.0)}
"""By site: curvature k and optimum b of its loss k (x - b)^2 / 2."""


def study_of(scaffold: bool, rounds: int, aggregation: dict[str, Any] | None = None, **keys: Any) -> Study:
    return plan_of(
        private=False,
        training={"rounds": rounds, "local_steps": STEPS, "lr": LR, "scaffold": scaffold},
        aggregation={"default": "mean", "quorum": 2, "deadline_s": 5, **(aggregation or {})},
        **keys,
    )


class Quadratic(Pretender):
    """A site whose loss is a quadratic in each parameter, with exact gradients."""

    def train(self, number: int, arrays: Arrays) -> Answer:
        (curvature, optimum), (shared, corrections) = CURVES[self.name], split_corrections(arrays)
        if self.status.get(number, "ok") != "ok":
            return {"status": self.status[number], "text": "no"}, {}
        update = {}
        for group, part in shared.items():
            update[group] = {}
            for name, start in part.items():
                value = start.astype(np.float64)
                for _ in range(STEPS):
                    gradient = curvature * (value - optimum)
                    value -= LR * (gradient + (corrections[group][name] if group in corrections else 0))
                update[group][name] = (value - start).astype(np.float32)
        return {"status": "ok", "round": number}, self.alter(number, update)


def ends(run: RoundLoop, group: str = "fusion") -> float:
    values = np.concatenate([value.ravel() for value in run.state.groups[group].values()])
    assert np.ptp(values) < 1e-3, "one number all over"
    return float(values.mean())


def least(names: str) -> float:
    """Where the mean of the losses is least."""
    return sum(CURVES[n][0] * CURVES[n][1] for n in names) / sum(CURVES[n][0] for n in names)


def drifted(names: str) -> float:
    """Where FedAvg ends: what each site's steps make of a distance weighs its optimum."""
    pulls = {n: 1 - (1 - LR * CURVES[n][0]) ** STEPS for n in names}
    return sum(pulls[n] * CURVES[n][1] for n in names) / sum(pulls.values())


def test_many_local_steps_bias_fedavg_and_not_scaffold(tmp_path: Path) -> None:
    averaged = loop(tmp_path / "fedavg", study_of(False, 60), Pretence(Quadratic("a"), Quadratic("b")))
    averaged.run()
    assert ends(averaged) == pytest.approx(drifted("ab"), abs=1e-3)
    assert abs(drifted("ab") - least("ab")) > 1.5
    corrected = loop(tmp_path / "scaffold", study_of(True, 60), Pretence(Quadratic("a"), Quadratic("b")))
    corrected.run()
    assert ends(corrected) == pytest.approx(least("ab"), abs=1e-3)


@pytest.mark.no_cover
def test_sites_that_are_drawn_or_fail_are_corrected_by_what_is_known_of_them(tmp_path: Path) -> None:
    """Two of four sites a round, and one that fails at times: still the least mean loss, which FedAvg misses."""
    some = {"sample": 2}
    sites = [Quadratic(name) for name in "abcd"]
    run = loop(tmp_path / "sampled", study_of(True, 120, some), Pretence(*sites))
    run.run()
    assert ends(run) == pytest.approx(least("abcd"), abs=1e-2)
    assert abs(drifted("abcd") - least("abcd")) > 0.5
    failing = [Quadratic("a", status=dict.fromkeys(range(2, 30, 3), "failed")), Quadratic("b"), Quadratic("c")]
    run = loop(tmp_path / "failing", study_of(True, 60), Pretence(*failing))
    run.run()
    assert ends(run) == pytest.approx(least("abc"), abs=1e-2)


def test_each_group_is_corrected_among_its_holders(tmp_path: Path) -> None:
    few = ["fusion", "head/labs"]
    grid = Pretence(Quadratic("a", groups=few), Quadratic("b", groups=[*few, "head/note"]), Quadratic("c", groups=few))
    run = loop(tmp_path, study_of(True, 80), grid)
    run.run()
    assert ends(run) == pytest.approx(least("abc"), abs=1e-3)
    assert ends(run, "head/note") == pytest.approx(CURVES["b"][1], abs=1e-2)


def test_a_robust_rule_also_combines_the_variates(tmp_path: Path) -> None:
    """A site that turns its update around: with the median neither the model nor the corrections follow it."""

    def turned(number: int, arrays: Arrays) -> Arrays:
        return {group: {name: -20 * value for name, value in part.items()} for group, part in arrays.items()}

    of = study_of(True, 40, {"default": "median"})
    sites = [Quadratic(name) for name in "bcd"] + [Quadratic("a", alter=turned)]
    run = loop(tmp_path, of, Pretence(*sites))
    run.run()
    assert min(CURVES[n][1] for n in "bcd") <= ends(run) <= max(CURVES[n][1] for n in "bcd")
    broken = loop(tmp_path / "mean", study_of(True, 6, {"default": "mean"}), Pretence(*sites))
    broken.run()
    assert abs(ends(broken)) > 100, "with the mean they do"


def test_what_is_screened_is_no_variate(tmp_path: Path) -> None:
    def broken(number: int, arrays: Arrays) -> Arrays:
        if number == 2:
            next(iter(arrays["fusion"].values()))[...] = np.nan
        return arrays

    run = loop(tmp_path, study_of(True, 2), Pretence(Quadratic("a"), Quadratic("b"), Quadratic("c", alter=broken)))
    run.run()
    assert "fusion" not in run.variates.kept["c"]
    assert "head/labs" in run.variates.kept["c"]
    found = run.variates.corrections([Peer(site=name, groups=["fusion", "head/labs"]) for name in "abcd"])
    assert found["a"].keys() == {"fusion", "head/labs"}
    assert found["d"] == {}, "nothing is known of it"
    assert found["c"].keys() == {"head/labs"}


@pytest.mark.parametrize("huge", [9e14, -9e14])
@pytest.mark.parametrize("rule", ["auto", "median", "mean"])
def test_a_variate_beyond_float32_is_none(rule: str, huge: float, tmp_path: Path) -> None:
    """An update in bounds, over a small learning rate, is one out of them: the other site was sent NaN."""

    class Asked(Pretender):
        def train(self, number: int, arrays: Arrays) -> Answer:
            assert all(np.isfinite(value).all() for part in arrays.values() for value in part.values())
            return super().train(number, {group: arrays[group] for group in self.groups})

    training = {"rounds": 3, "scaffold": True, "lr": 0.001, "local_steps": 1}
    of = plan_of(private=False, training=training, aggregation={"default": rule, "quorum": 2, "deadline_s": 5})
    names = "ab" if rule == "auto" else "abc"
    run = loop(tmp_path, of, Pretence(*[Asked(name, 0.01) for name in names[1:]], Asked("a", huge)))
    run.run()
    assert "a" not in run.variates.kept or not run.variates.kept["a"]
    assert run.variates.kept["b"]["fusion"]


def test_the_bytes_of_the_corrections_are_counted(tmp_path: Path) -> None:
    runs = {}
    for scaffold in (False, True):
        runs[scaffold] = loop(tmp_path / str(scaffold), study_of(scaffold, 3), Pretence(Quadratic("a"), Quadratic("b")))
        runs[scaffold].run()
    one = 2 * tensorfile.size(runs[False].state.groups)
    assert [line["bytes_down"] for line in runs[True].directory.rounds()] == [one, 2 * one, 2 * one]
    assert runs[True].state.bytes_up == runs[False].state.bytes_up == 3 * one, "nothing more leaves a site"


def test_a_resumed_run_goes_on_with_its_variates(tmp_path: Path) -> None:
    of = study_of(True, 6)
    whole = loop(tmp_path / "whole", of, Pretence(Quadratic("a"), Quadratic("b")))
    whole.run()
    with pytest.raises(TooFewSites):
        loop(tmp_path, of, Pretence(Quadratic("a"), Quadratic("b", status={4: "failed"}))).run()
    resumed = loop(tmp_path, of, Pretence(Quadratic("a"), Quadratic("b")))
    assert resumed.state.round == 3
    assert resumed.variates.kept.keys() == {"a", "b"}
    resumed.run()
    assert tensorfile.dump(resumed.state.groups, {}) == tensorfile.dump(whole.state.groups, {})


def test_a_resumed_round_asks_as_it_did_before_whoever_is_there(tmp_path: Path) -> None:
    """Sites that had answered it hold their answers to the very same request; another one they refuse."""

    class Recording(Quadratic):
        asked: ClassVar[list[tuple[str, int, Arrays]]] = []

        def train(self, number: int, arrays: Arrays) -> Answer:
            self.asked.append((self.name, number, arrays))
            return super().train(number, arrays)

    of = study_of(True, 6, {"quorum": 3})
    gone = [Recording("c", status={4: "failed"}), Recording("d", status={4: "failed"})]
    with pytest.raises(TooFewSites):
        loop(tmp_path, of, Pretence(Recording("a"), Recording("b"), *gone)).run()
    loop(tmp_path, of, Pretence(Recording("a"), Recording("b"), Recording("c"))).run()
    first, again = [arrays for name, number, arrays in Recording.asked if (name, number) == ("a", 4)]
    assert split_corrections(first)[1].keys() == set(ALL)
    assert wire.request_hash("train", {}, first) == wire.request_hash("train", {}, again)


def test_a_checkpoint_keeps_variates_apart_from_history(tmp_path: Path) -> None:
    one, two = ({"fusion": {"w": np.full(2, value, np.float32)}} for value in (1.0, 2.0))
    kept = Checkpoint(
        run="r", study="s", round=1, groups=one, history={"x/y": two}, variates={"x/y": one, "z": two}, common=two
    )
    save_checkpoint(tmp_path, kept)
    found = load_checkpoint(tmp_path, "s")
    assert found is not None
    assert found.history.keys() == {"x/y"}
    assert found.variates["x/y"]["fusion"]["w"].tolist() == [1, 1]
    assert found.variates["z"]["fusion"]["w"].tolist() == found.common["fusion"]["w"].tolist() == [2, 2]
    assert found.late == {}


# The paper's algorithm on the real model.


def by_the_paper(of: Study, sites: dict[str, Participant]) -> Arrays:
    """Algorithm 1 with option II, as printed: each client keeps its c_i, sends both differences, the server keeps c."""
    training, start = of.training, initial_groups(of)
    model = MultimodalModel(of, of.order)
    x = {
        f"{group}|{name}": torch.from_numpy(value.copy())
        for group, part in start.items()
        for name, value in part.items()
    }
    key = {parameter: "|".join(group_of(parameter)) for parameter, _ in model.named_parameters()}
    c = {name: torch.zeros_like(value) for name, value in x.items()}
    own = {site: {name: torch.zeros_like(value) for name, value in x.items()} for site in sites}
    for _ in range(training.rounds):
        moves, changes = [], []
        for name, site in sites.items():
            y = {at: value.clone() for at, value in x.items()}
            for _ in range(training.local_steps):
                for parameter, value in model.named_parameters():
                    value.data.copy_(y[key[parameter]])
                data = site.training
                outputs = model(data.inputs, data.present, data.present)
                losses = record_losses(outputs, data.target, data.label_mask, of.task.kind)
                model.zero_grad()
                (losses.sum() / data.patients).backward()
                for parameter, value in model.named_parameters():
                    at = key[parameter]
                    gradient = torch.zeros_like(value) if value.grad is None else value.grad
                    y[at] = y[at] - training.lr * (gradient - own[name][at] + c[at])
            new = {at: own[name][at] - c[at] + (x[at] - y[at]) / (training.local_steps * training.lr) for at in x}
            moves.append({at: y[at] - x[at] for at in x})
            changes.append({at: new[at] - own[name][at] for at in x})
            own[name] = new
        x = {at: value + sum(move[at] for move in moves) / len(sites) for at, value in x.items()}
        c = {at: value + sum(change[at] for change in changes) / len(sites) for at, value in c.items()}
    return {group: {name: x[f"{group}|{name}"].numpy() for name in part} for group, part in start.items()}


def of_the_real_model(scaffold: bool = True, private: bool = False, **training: Any) -> Study:
    return plan_of(
        private=private,
        model={"embedding": 4, "imputer": "none"},
        training={"rounds": 4, "local_steps": 5, "lr": 0.3, "scaffold": scaffold, **training},
        aggregation={"default": "mean"},
    )


def test_two_hospitals_follow_the_papers_algorithm(tmp_path: Path) -> None:
    of = of_the_real_model()
    sizes = {"east": 24, "north": 40}
    hospitals = [
        build(tmp_path / name, name, patients=number, seed=at) for at, (name, number) in enumerate(sizes.items())
    ]
    for hospital, number in zip(hospitals, sizes.values(), strict=True):
        hospital.update("patients", declared=number)
    sites = {hospital.content["name"]: participant(hospital, of, tmp_path / "unused") for hospital in hospitals}
    expected = by_the_paper(of, sites)
    run = RoundLoop(Wire(hospitals), of, RunDirectory.create(tmp_path / "run", of), "run")
    run.run()
    plain = RoundLoop(Wire(hospitals), of_the_real_model(False), RunDirectory.create(tmp_path / "plain", of), "plain")
    plain.run()
    moved = 0.0
    for group, part in expected.items():
        for name, value in part.items():
            np.testing.assert_allclose(
                run.state.groups[group][name], value, rtol=0, atol=1e-6, err_msg=f"{group} {name}"
            )
            moved = max(moved, float(np.abs(plain.state.groups[group][name] - value).max()))
    assert moved > 1e-4, "and FedAvg does not"


# Privacy.


def sent(of: Study, value: float) -> Arrays:
    start = initial_groups(of)
    return as_corrections(
        {g: {n: np.full_like(v, value) for n, v in start[g].items()} for g in ("fusion", "head/labs")}
    )


def test_a_correction_is_added_after_the_noise_and_is_charged_nothing(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """With the same draws, one step's update differs by just what the server added; the ledgers are alike."""
    monkeypatch.setattr(learner_module, "SecretDraws", lambda: SeededDraws(0, "north", 1))
    of = of_the_real_model(private=True, local_steps=1)
    start, replies, charged = initial_groups(of), [], []
    for at, corrections in enumerate([{}, sent(of, 1000.0)]):
        hospital = build(tmp_path / str(at), "north")
        hospital.update("patients", declared=24)
        site = participant(hospital, of)
        site.prepare("run")
        replies.append(site.train("run", 1, "request", {**start, **corrections}).reply)
        charged.append(read_ledger(site.state).events())
    assert charged[0] == charged[1]
    for group, part in replies[0].items():
        added = -of.training.lr * 1000.0 if group in ("fusion", "head/labs") else 0.0
        for name, value in part.items():
            np.testing.assert_allclose(replies[1][group][name] - value, added, rtol=1e-5, atol=1e-6)


def test_scaffold_changes_no_entry_of_a_ledger(tmp_path: Path) -> None:
    totals = {}
    for scaffold in (False, True):
        of = of_the_real_model(scaffold, private=True)
        hospitals = [build(tmp_path / str(scaffold) / name, name) for name in ("east", "north")]
        for hospital in hospitals:
            hospital.update("patients", declared=24)
        RoundLoop(Wire(hospitals), of, RunDirectory.create(tmp_path / f"run {scaffold}", of), "run").run()
        views = [read_ledger(hospital.folder / "state") for hospital in hospitals]
        totals[scaffold] = [(view.events(), view.spent(), view.bound()) for view in views]
    assert totals[False] == totals[True]


def test_a_variate_is_the_mean_of_the_rounds_noised_gradients(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """What the server has of a site is a function of its noised steps, of nothing else that it holds."""
    noised: list[dict[str, torch.Tensor]] = []
    real = Step.gradient
    monkeypatch.setattr(Step, "gradient", lambda step, data: noised.append(real(step, data)) or noised[-1])
    of = of_the_real_model(private=True)
    hospital = build(tmp_path / "a", "north")
    hospital.update("patients", declared=24)
    site = participant(hospital, of)
    site.prepare("run")
    start = initial_groups(of)
    other = {name: value + 1 for name, value in start["fusion"].items()}
    variates = Variates(of, {"north": {"fusion": start["fusion"]}, "east": {"fusion": other}})
    peers = [Peer(site=name, groups=site.shared) for name in ("north", "east")]
    variates.settle(peers)
    found = variates.corrections(peers)
    np.testing.assert_allclose(np.concatenate([v.ravel() for v in found["north"]["fusion"].values()]), 0.5, rtol=1e-5)
    reply = site.train("run", 1, "request", {**start, **as_corrections(found["north"])}).reply
    GroupAggregation(of, start, variates=variates).add("north", reply, 24)
    assert len(noised) == of.training.local_steps
    for parameter in noised[0]:
        group, name = group_of(parameter)
        mean = torch.stack([gradient[parameter] for gradient in noised]).mean(0)
        torch.testing.assert_close(torch.from_numpy(variates.kept["north"][group][name]), mean, rtol=1e-4, atol=1e-5)


def test_agreement_is_judged_without_what_the_server_put_in() -> None:
    """Pure noise under one correction: as the updates are all sites agree; as their gradients were none does."""
    of = plan_of(private=True, training={"scaffold": True, "local_steps": 1, "lr": 1.0})
    start, generator = initial_groups(of)["encoder/labs"], np.random.default_rng(0)

    def normal() -> Update:
        return {name: generator.normal(size=value.shape).astype(np.float32) for name, value in start.items()}

    variates, correction = Variates(of), normal()
    updates = {f"site{at}": {n: -v - correction[n] for n, v in normal().items()} for at in range(5)}
    for site, update in updates.items():
        variates._sent[site] = {"fusion": correction}
        variates.take(site, "fusion", update, 24)
    assert min(agreements(updates).values()) > 3
    assert max(map(abs, agreements(variates.uncorrected("fusion", updates)).values())) < 4


# What a site takes.


@pytest.mark.parametrize("wrong", ["shape", "nan", "group", "tensor", "not asked", "private"])
def test_a_correction_of_another_form_is_refused(tmp_path: Path, wrong: str) -> None:
    of = of_the_real_model(scaffold=wrong != "not asked")
    if wrong == "private":
        of = of.model_copy(update={"sharing": of.sharing.model_copy(update={"policy": "heads"})})
    site = participant(build(tmp_path / "a", "north"), of)
    site.prepare("run")
    received = {group: part for group, part in initial_groups(of).items() if group in site.shared}
    corrections = {"fusion": {name: value.copy() for name, value in received["fusion"].items()}}
    name = next(iter(corrections["fusion"]))
    if wrong == "shape":
        corrections["fusion"][name] = np.zeros(1, np.float32)
    elif wrong == "nan":
        corrections["fusion"][name][...] = np.nan
    elif wrong == "group":
        corrections["encoder/other"] = corrections["fusion"]
    elif wrong == "tensor":
        corrections["fusion"]["other"] = corrections["fusion"][name]
    elif wrong == "private":
        encoder = {key: value.numpy() for key, value in site.initial["encoder/labs"].items()}
        corrections["encoder/labs"] = encoder
    with pytest.raises(RefusedError):
        site.train("run", 1, "request", {**received, **as_corrections(corrections)})
    assert all("update" not in event.released for event in read_ledger(site.state).events()), "before any charge"


def test_the_same_request_with_corrections_gives_the_same_bytes(tmp_path: Path) -> None:
    of = of_the_real_model(private=True)
    site = participant(build(tmp_path / "a", "north"), of)
    site.prepare("run")
    received = {**initial_groups(of), **sent(of, 0.1)}
    request = wire.request_hash("train", {"round": 1}, received)
    first = site.train("run", 1, request, received)
    again = participant(build(tmp_path / "b", "north"), of, site.state).train("run", 1, request, received)
    assert tensorfile.dump(first.reply, {}) == tensorfile.dump(again.reply, {})
    assert request != wire.request_hash("train", {"round": 1}, {**received, **sent(of, 0.2)}), (
        "the charge is bound to them"
    )


@pytest.mark.parametrize("other", [{"momentum": 0.5}, {"proximal": 0.1}])
def test_other_steps_are_refused(other: dict[str, float]) -> None:
    with pytest.raises(ValueError, match="scaffold needs plain steps"):
        Training(scaffold=True, **other)


def test_groups_are_kept_apart_from_corrections() -> None:
    parts = {group: {"w": np.zeros(1, np.float32)} for group in ("fusion", "encoder/labs")}
    assert split_corrections({**parts, **as_corrections(parts)}) == (parts, parts)
