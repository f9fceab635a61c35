"""What a small cohort learns with: a linear path to the logits, hidden features, a ridge, one gradient a round."""

from __future__ import annotations

import math
from pathlib import Path

import numpy as np
import pytest
import torch
from batches import EVERY_KIND, LINEAR, TASKS, flat, four_kinds, random_batch, random_model
from cohorts import study
from hospitals import build, participant, plan_of
from torch import Tensor

from gapweave.client.calibration import log_loss
from gapweave.client.gradients.plain import PlainEngine
from gapweave.client.local_models import LocalNetwork, fit_network, keep
from gapweave.client.predict import load_site_model
from gapweave.client.state import RunFolder, to_arrays
from gapweave.client.training import Sgd, Step
from gapweave.server.aggregation import GroupAggregation, initial_groups
from gapweave.shared.config.base import parse
from gapweave.shared.config.study import Study
from gapweave.shared.errors import UsageError
from gapweave.shared.features.flat import flat as flat_features
from gapweave.shared.features.flat import of_norm, width
from gapweave.shared.late import add_late, late_mean
from gapweave.shared.model import MultimodalModel, group_of, groups
from gapweave.shared.objective import loss_terms, mean_over
from gapweave.shared.optimizers import ServerOptimizer
from gapweave.shared.paired import Truth
from gapweave.shared.privacy.draws import SeededDraws
from gapweave.shared.privacy.plan import make_plan
from gapweave.shared.schema import Batch
from gapweave.shared.schemes import WHOLE, build_scheme

# The linear path.


def votes_of(model: MultimodalModel, batch: Batch) -> Tensor:
    with torch.no_grad():
        return model(batch.inputs, batch.present, batch.present).modality_logits


def test_the_linear_path_adds_a_linear_function_of_the_features_and_nothing_at_the_start() -> None:
    of = four_kinds(LINEAR, "none")
    batch, model = random_batch(of), MultimodalModel(of, of.order)
    at_start = votes_of(model, batch)
    weights = {name: torch.randn(1, width(spec)) for name, spec in of.modalities.items()}
    for name, weight in weights.items():
        assert not model.heads[name].wide.weight.any()
        model.heads[name].wide.weight.data = weight
    added = votes_of(model, batch) - at_start
    for at, name in enumerate(of.order):
        here = batch.present[:, at]
        expected = flat_features(of.modalities[name], batch.inputs[name])[here] @ weights[name][0]
        torch.testing.assert_close(added[here, at, 0], expected, rtol=1e-4, atol=1e-5)
        assert not added[~here, at].any()


def test_without_an_encoder_a_modality_votes_by_a_linear_function_alone() -> None:
    of = study({"labs": {**EVERY_KIND["labs"], "encoder": "none"}}, model={"imputer": "none", "linear_path": True})
    model, batch = random_model(of), random_batch(of, present=torch.ones(6, 1, dtype=torch.bool))
    assert not any(group.startswith("encoder/") for group in groups(model))
    with torch.no_grad():
        head = model.heads["labs"]
        expected = flat_features(of.modalities["labs"], batch.inputs["labs"]) @ head.wide.weight.T + head.deep.bias
    torch.testing.assert_close(votes_of(model, batch)[:, 0], expected)


def test_a_study_chooses_the_statistics_that_linear_models_read() -> None:
    every = EVERY_KIND["vitals"]
    few = {**every, "statistics": ["mean", "count"]}
    whole, part = (study({"vitals": spec}).modalities["vitals"] for spec in (every, few))
    inputs = random_batch(study({"vitals": every})).inputs["vitals"]
    values = flat_features(whole, inputs)
    assert values.shape == (6, width(whole)) == (6, 16)
    # last, mean, min, max, slope, count, since, observed of bp and pulse.
    torch.testing.assert_close(flat_features(part, inputs), values[:, [2, 3, 10, 11]])
    assert width(part) == 4


def test_flags_and_shares_are_centred() -> None:
    of = study({"labs": EVERY_KIND["labs"], "vitals": EVERY_KIND["vitals"]})
    nothing = {name: torch.zeros(1, *shape) for name, shape in (("labs", (6,)), ("vitals", (6, 4)))}
    # lactate and its flag, two codes of sex, sodium and its flag.
    found = flat_features(of.modalities["labs"], nothing["labs"])
    assert found.tolist() == [[0, -0.5, -0.5, -0.5, 0, -0.5]]
    # Never observed: no hours (count), a whole window since (1), no flag.
    found = flat_features(of.modalities["vitals"], nothing["vitals"])
    assert found.tolist() == [[0] * 10 + [-0.5, -0.5, 0.5, 0.5, -0.5, -0.5]]


SCORE = {"kind": "public_score", "expression": "labs.sodium / 10", "low": 0, "high": 20, "center": 14, "scale": 2}


@pytest.mark.parametrize("norm", [None, 10.0])
def test_a_public_score_votes_before_anything_is_learned(norm: float | None) -> None:
    of = study(
        {"labs": EVERY_KIND["labs"], "risk": {**SCORE, "start": 1.5}},
        model={"imputer": "none", "linear_path": True, "feature_norm": norm},
    )
    head = MultimodalModel(of, of.order).heads["risk"]
    torch.testing.assert_close(head.wide.weight.detach(), torch.tensor([[1.5 / (norm or 1), 0.0]]))


def test_linear_paths_read_rows_of_one_norm_and_a_score_as_it_is() -> None:
    model = {"imputer": "none", "linear_path": True, "feature_norm": 10.0}
    of = study(
        {**{name: {**EVERY_KIND[name], "encoder": "none"} for name in ("labs", "vitals")}, "risk": SCORE}, model=model
    )
    batch = random_batch(of)
    plain = of.model_copy(update={"model": of.model.model_copy(update={"feature_norm": None})})
    found, before = (MultimodalModel(it, it.order).features(batch.inputs, batch.present) for it in (of, plain))
    for at, name in enumerate(of.order):
        here = batch.present[:, at]
        rows, unscaled = found[f"{name}/flat"][here], before[f"{name}/flat"][here]
        lengths = unscaled.norm(dim=1, keepdim=True)
        torch.testing.assert_close(rows, 10 * (unscaled if name == "risk" else unscaled / lengths))
    nothing = of_norm(of.modalities["labs"], torch.zeros(1, 4), 10.0)
    assert not nothing.any()


def test_a_norm_without_linear_paths_is_refused() -> None:
    with pytest.raises(ValueError, match="feature_norm needs linear_path"):
        study({"labs": EVERY_KIND["labs"]}, model={"feature_norm": 1.0})


@pytest.mark.parametrize("but", [{"model": {"linear_path": False}}, {"task": TASKS["multilabel"]}], ids=str)
def test_a_score_that_cannot_begin_is_refused(but: dict[str, object]) -> None:
    keys: dict[str, object] = {"model": {"linear_path": True}, **but}
    with pytest.raises(ValueError, match=r"risk.start needs"):
        study({"labs": EVERY_KIND["labs"], "risk": {**SCORE, "start": 1.0}}, **keys)


# Hidden features and the weight of votes.


def step_of(of: Study, seed: int = 0) -> Step:
    model = random_model(of)
    plan = make_plan(of, 6, 1e-5)
    return Step(study=of, plan=plan, engine=PlainEngine(model, "binary"), draws=SeededDraws(seed))


def with_scheme(**settings: float) -> Study:
    return four_kinds(LINEAR, "none", scheme={"settings": settings}, privacy={"enabled": False})


def test_hidden_features_are_zero_at_the_rate_asked_for_and_the_others_make_up_for_them() -> None:
    of = with_scheme(hide_features=0.3)
    batch = random_batch(of, [1] * 400)
    shown = step_of(of).shown(batch)
    for name, before in batch.inputs.items():
        after = shown.inputs[name]
        kept = after != 0
        torch.testing.assert_close(after[kept], before[kept] / 0.7)
        rate = float((~kept & (before != 0)).sum() / (before != 0).sum())
        assert abs(rate - 0.3) < 6 * math.sqrt(0.3 * 0.7 / int((before != 0).sum())), name
    other = step_of(of, seed=1).shown(batch)
    assert not torch.equal(other.inputs["labs"], shown.inputs["labs"])


def test_nothing_is_hidden_unless_a_study_says_so() -> None:
    of = with_scheme()
    batch = random_batch(of)
    assert step_of(of).shown(batch) is batch


def test_votes_count_as_much_as_the_study_says() -> None:
    of = with_scheme(vote_weight=6.0)
    model, batch = random_model(of), random_batch(of)
    outputs = model(batch.inputs, batch.present, batch.present)
    terms = loss_terms(outputs, batch.target, batch.label_mask, "binary")
    expected = terms.joint + 6 * mean_over(terms.votes, batch.present) + terms.rest
    found = build_scheme(of).losses(model, batch, batch.present, WHOLE)
    torch.testing.assert_close(found, expected)


# The ridge.


@pytest.mark.parametrize(
    ("balance", "variance"), [("none", 0.25), ("noisy", 0.25), (0.1, 0.09), ([0.34], 0.2244)], ids=str
)
def test_the_ridge_follows_the_public_prevalence(balance: object, variance: float) -> None:
    of = four_kinds(training={"ridge": 0.4, "weight_decay": 0.01}, preparation={"class_balance": balance})
    assert of.shrinkage == pytest.approx(0.01 + 0.4 * variance)


def test_a_step_shrinks_all_parameters_by_the_ridge() -> None:
    of = four_kinds(training={"ridge": 0.4, "lr": 0.5}, preparation={"class_balance": 0.1})
    model = random_model(of)
    before = {name: value.detach().clone() for name, value in model.named.items()}
    Sgd(of, {}).step(model, {name: torch.zeros_like(value) for name, value in before.items()})
    for name, value in model.named.items():
        torch.testing.assert_close(value.detach(), before[name] * (1 - 0.5 * 0.4 * 0.09))


# One gradient a round.


FEDSGD = {"schedule": "fedsgd", "rounds": 3, "lr": 1.0, "batch": 5}


def fedsgd(**keys: object) -> Study:
    content = {
        "version": 1,
        "name": "one-gradient",
        "task": {"kind": "binary", "label": "y"},
        "modalities": {"labs": {"kind": "table", "columns": {"na": {"low": 100, "high": 180}}}},
        "training": {**FEDSGD, **keys},
    }
    return parse(Study, content, "study")


def test_fedsgd_takes_every_patient_and_one_step() -> None:
    of = fedsgd()
    plan = make_plan(of, 100, 1e-5)
    assert (plan.steps, plan.sample_rate) == (1, 1.0)
    assert parse(Study, of.model_dump(mode="json"), "again") == of


@pytest.mark.parametrize("more", [{"local_steps": 5}, {"passes": 1.0}], ids=str)
def test_fedsgd_refuses_more_steps(more: dict[str, float]) -> None:
    with pytest.raises(UsageError, match="fedsgd is one step"):
        fedsgd(**more)


def test_fedsgd_weighed_by_patients_is_the_gradient_of_all_patients_together(tmp_path: Path) -> None:
    """Two hospitals of different size: what the server steps along is the pooled gradient."""
    of = plan_of(
        private=False,
        training={"schedule": "fedsgd", "lr": 1.0, "local_steps": 1},
        model={"imputer": "none", "linear_path": True},
        aggregation={"default": "mean", "weights": "patients"},
    )
    every = ["labs", "note", "vitals"]
    sizes = {"north": 24, "south": 60}
    begin = initial_groups(of)
    combine, batches = GroupAggregation(of, begin), []
    for name, patients in sizes.items():
        site = participant(build(tmp_path / name, name, every, patients=patients), of, tmp_path / f"state-{name}")
        plan = site.prepare("run-1").plan
        state = site.train("run-1", 1, "0" * 64, {group: begin[group] for group in site.shared})
        combine.add(name, state.reply, plan["n_hat"])
        batches.append(site.training)
    after, _ = combine.finish()
    model = MultimodalModel(of, of.order)
    engine = PlainEngine(model, "binary")
    total = [engine.sum(batch, batch.present) for batch in batches]
    pooled = {name: sum(one[name] for one in total) / sum(sizes.values()) for name in total[0]}
    moved = {
        name: torch.from_numpy(np.asarray(begin[group][key] - after[group][key]))
        for name in pooled
        for group, key in [group_of(name)]
    }
    torch.testing.assert_close(flat(moved), flat(pooled), rtol=1e-4, atol=1e-7)


def test_a_network_trained_alone_has_what_the_run_tells_a_sites_model(tmp_path: Path) -> None:
    """Its inputs were left as they came where the federated model's were scaled: joining looked better than it was."""
    hospital = build(tmp_path / "north", "north", ["labs", "note"], patients=60)
    asked = {"standardisation": "noisy", "class_balance": "noisy"}
    of = plan_of(private=True, preparation=asked, training={"rounds": 2, "local_steps": 1})
    cohort = hospital.load(of)
    data = cohort.training()
    network = fit_network(of, data, ["labs", "note"], "north")
    rescaled = network.model.constants.rescaling["labs"]
    place = rescaled.values[0]
    after = rescaled(data.inputs["labs"])[data.present[:, of.order.index("labs")], place]
    assert float(after.mean()) == pytest.approx(0, abs=1e-3)
    share = float(data.target.mean())
    assert network.model.constants.offset == pytest.approx([math.log(share / (1 - share))])
    folder = RunFolder(tmp_path / "state", "run-1")
    keep(folder, {"local": network}, {"study": of.model_dump(mode="json"), "modalities": ["labs", "note"]})
    kept = load_site_model(folder.path / "local.safetensors")
    assert kept.model.constants == network.model.constants


def alone_at(server_lr: float, folder: Path) -> tuple[LocalNetwork, Batch]:
    """A network of a study whose gradients are clipped short, on labels that nothing tells."""
    of = plan_of(
        private=True,
        training={"schedule": "fedsgd", "lr": 1.0, "local_steps": 1, "rounds": 15},
        model={"imputer": "none", "linear_path": True},
        aggregation={"server_lr": server_lr},
        privacy={"max_grad_norm": 0.01},
    )
    hospital = build(folder / "north", "north", ["labs", "note", "vitals"], patients=200)
    hospital.records(200, y=np.random.default_rng(0).integers(0, 2, 200).tolist())
    data = hospital.load(of).training()
    return fit_network(of, data, ["labs", "note", "vitals"], "north"), data


@pytest.mark.parametrize("server_lr", [1.0, 20.0])
def test_a_rate_that_suits_clipped_gradients_does_not_spoil_a_baseline(server_lr: float, tmp_path: Path) -> None:
    """Unclipped it diverged, said 0 of everybody, and joining looked better than it was."""
    network, data = alone_at(server_lr, tmp_path)
    assert log_loss(network(data).probabilities, Truth.of(data, "binary")) < math.log(2) + 0.02


def test_a_baseline_that_diverges_either_way_ends_no_run(tmp_path: Path) -> None:
    network, data = alone_at(1e30, tmp_path)
    assert np.isnan(network(data).probabilities).any()


def test_a_network_trained_alone_is_a_federation_of_one(tmp_path: Path) -> None:
    # Believed: so many steps are what a run takes. True: without the server's optimiser a study that leans on it trained
    # a weak network to compare with, and joining looked better than it was.
    of = plan_of(
        private=False,
        training={"schedule": "fedsgd", "lr": 1.0, "local_steps": 1, "rounds": 4},
        model={"imputer": "none", "linear_path": True},
        aggregation={"default": "mean", "server_optimizer": "adam", "server_lr": 0.1, "average_last": 0.5},
    )
    site = participant(build(tmp_path / "north", "north", ["labs", "note", "vitals"]), of, tmp_path / "state")
    site.prepare("run-1")
    current, optimizer, late = initial_groups(of), ServerOptimizer(of.aggregation), {}
    for number in range(1, 5):
        state = site.train("run-1", number, f"{number:064}", current)
        combine = GroupAggregation(of, current, optimizer)
        combine.add("north", state.reply)
        current, _ = combine.finish()
        late = add_late(of, number, late, current)
    expected = late_mean(of, late)
    assert expected is not None
    alone = to_arrays(groups(fit_network(of, site.training, ["labs", "note", "vitals"], "north").model))
    assert alone.keys() == expected.keys()
    for group, part in expected.items():
        for name, value in part.items():
            np.testing.assert_allclose(alone[group][name], value, rtol=1e-5, atol=1e-6)
