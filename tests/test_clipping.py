"""Each group of a patient's gradient clipped on its own, and what is left of the declared slack."""

from __future__ import annotations

import math
from dataclasses import replace
from pathlib import Path

import pytest
import torch
from batches import flat, four_kinds, length, random_batch, random_model
from commandline import QUICK, done, hospitals
from test_audit import staged
from test_gradients import cancelling, double, hide_some, one_patient
from torch import Tensor

from gapweave.client.audit import run_audit
from gapweave.client.gradients import Gradient
from gapweave.client.gradients.clipping import by_part, grouped, together
from gapweave.client.gradients.fast import SLACK, FastEngine
from gapweave.client.gradients.opacus import OpacusEngine
from gapweave.client.training import build_engine
from gapweave.server.aggregation import initial_groups
from gapweave.shared import tensorfile
from gapweave.shared.config import load_study
from gapweave.shared.config.study import Study
from gapweave.shared.fusion import FUSIONS
from gapweave.shared.model import MultimodalModel
from gapweave.shared.privacy.ledger import read_ledger
from gapweave.shared.schema import Batch

BOUND = 0.5
WITHIN = (1 + SLACK) * (1 + 1e-6)
ENGINES = pytest.mark.parametrize("private", [FastEngine, OpacusEngine], ids=["fast", "opacus"])
Private = type[FastEngine] | type[OpacusEngine]


def groups_of(model: MultimodalModel) -> list[list[str]]:
    return grouped(dict(model.named_parameters()), by_part)


def lengths(found: Gradient, groups: list[list[str]]) -> list[float]:
    return [length(flat({name: found[name] for name in names})) for names in groups]


def naive(model: MultimodalModel, of: Study, batch: Batch, used: Tensor) -> Tensor:
    """Sum over patients of gradients, each group clipped; a patient who is not finite somewhere counts as zero."""
    sizes = {name: value.numel() for name, value in model.named_parameters()}
    groups = groups_of(model)
    total = torch.zeros(sum(sizes.values()), dtype=torch.float64)
    for patient in range(batch.patients):
        gradient = one_patient(model, of, batch, used, patient)
        if not torch.isfinite(gradient).all():
            continue
        parts = dict(zip(sorted(sizes), gradient.split([sizes[name] for name in sorted(sizes)]), strict=True))
        for names in groups:
            norm = math.sqrt(sum(length(parts[name]) ** 2 for name in names))
            for name in names:
                parts[name] = parts[name] * min(1.0, BOUND / math.sqrt(len(groups)) / max(norm, 1e-12))
        total += flat(parts)
    return total


@ENGINES
@pytest.mark.no_cover
@pytest.mark.parametrize("records", [(1, 1, 1, 1), (3, 1, 5, 2)], ids=str)
@pytest.mark.parametrize("fusion", list(FUSIONS))
def test_the_sum_equals_a_loop_over_patients_and_groups(
    private: Private, fusion: str, records: tuple[int, ...]
) -> None:
    of = four_kinds(fusion, "cra")
    batch = random_batch(of, records)
    used = hide_some(batch)
    expected = naive(random_model(of).double(), of, double(batch), used)
    exact = flat(private(random_model(of).double(), "binary", BOUND, by_part).sum(double(batch), used))
    torch.testing.assert_close(exact, expected, rtol=1e-9, atol=1e-11)
    single = flat(private(random_model(of), "binary", BOUND, by_part).sum(batch, used))
    assert length(single - expected) <= 1e-6 * max(1.0, length(expected)) + BOUND * 1e-5
    joint = flat(private(random_model(of).double(), "binary", BOUND, together).sum(double(batch), used))
    assert length(exact - joint) > 0.01 * BOUND, "the groups make a difference"


@ENGINES
@pytest.mark.parametrize("size", [1e-3, 1.0, 1e3, 1e18])
def test_each_group_and_all_of_them_stay_within_their_bounds(private: Private, size: float) -> None:
    """A patient whose every group is too long is as long as the whole bound.

    Each of the patient's records hides another modality, so that the imputer has a gradient and so has every head.
    """
    of = four_kinds("concat", "cra")
    batch = random_batch(of, [2, 3, 2], present=torch.ones(7, 4, dtype=torch.bool))
    batch = replace(batch, inputs={name: size * values for name, values in batch.inputs.items()})
    hidden = torch.arange(7).unsqueeze(1) % 4 == torch.arange(4)
    groups = groups_of(random_model(of))
    for bound in (1e-4, BOUND):
        engine = private(random_model(of), "binary", bound, by_part)
        for patient in range(batch.patients):
            alone = batch.of_patients(torch.tensor([patient]))
            found = engine.sum(alone, ~hidden[batch.patient == patient])
            assert max(lengths(found, groups)) <= bound / math.sqrt(len(groups)) * WITHIN
            assert length(flat(found)) <= bound * WITHIN
            if bound == 1e-4 and size == 1.0:
                assert length(flat(found)) == pytest.approx(bound, rel=1e-3)


@ENGINES
def test_a_broken_group_leaves_the_patient_out_of_all(private: Private) -> None:
    """One infinite laboratory value saturates its encoder: of all groups, only that encoder's is not finite."""
    of = four_kinds("late", "cra")
    batch = random_batch(of, [1, 2, 1], present=torch.ones(4, 4, dtype=torch.bool))
    values = batch.inputs["labs"].clone()
    values[1, 0] = math.inf
    bad = replace(batch, inputs={**batch.inputs, "labs": values})
    names = sorted(dict(random_model(of).named_parameters()))
    sizes = [dict(random_model(of).named_parameters())[name].numel() for name in names]
    gradients = one_patient(random_model(of), of, bad, bad.present, 1).split(sizes)
    broken = {by_part(name) for name, value in zip(names, gradients, strict=True) if not torch.isfinite(value).all()}
    assert broken == {"encoder/labs"}
    rest = batch.of_patients(torch.tensor([0, 2]))
    found = private(random_model(of), "binary", BOUND, by_part).sum(bad, bad.present)
    expected = private(random_model(of), "binary", BOUND, by_part).sum(rest, rest.present)
    torch.testing.assert_close(flat(found), flat(expected), rtol=0, atol=1e-6)


@ENGINES
def test_patients_who_cancel_are_clipped_by_group_before_they_cancel(private: Private) -> None:
    of, model, batch = cancelling()
    engine = private(model, of.task.kind, 0.1, by_part)
    assert length(flat(engine.sum(batch, batch.present))) < 1e-6
    groups = groups_of(model)
    for patient in (0, 1):
        alone = batch.of_patients(torch.tensor([patient]))
        found = lengths(engine.sum(alone, alone.present), groups)
        assert max(found) == pytest.approx(0.1 / math.sqrt(len(groups)), rel=1e-6)


def test_a_site_counts_its_own_groups_only() -> None:
    """Their number follows from what the site holds, not from the study and not from its patients."""
    of = four_kinds("late", "cra")
    named = ["encoder/labs", "encoder/note", "head/labs", "head/note", "imputer", "fusion"]
    model = random_model(of, ["labs", "note"])
    assert [by_part(names[0]) for names in groups_of(model)] == named
    assert grouped(dict(model.named_parameters()), together) == [list(dict(model.named_parameters()))]


@pytest.mark.parametrize("engine", ["fast", "opacus"])
@pytest.mark.parametrize("clipping", ["flat", "group"])
def test_the_study_chooses_what_is_clipped_together(clipping: str, engine: str) -> None:
    of = four_kinds("concat", privacy={"clipping": clipping, "engine": engine, "max_grad_norm": 1e-3})
    batch = random_batch(of, [1], present=torch.ones(1, 4, dtype=torch.bool))
    model = random_model(of)
    groups = groups_of(model)
    found = lengths(build_engine(model, of).sum(batch, batch.present), groups)
    assert (max(found) <= 1e-3 / math.sqrt(len(groups)) * WITHIN) == (clipping == "group")


@pytest.mark.long
def test_the_audit_passes_with_clipping_by_group(tmp_path: Path) -> None:
    """False alarms below 1e-5. The black box has as many canaries as ever, each as long as a group's bound."""
    result = run_audit(staged(tmp_path, privacy={"clipping": "group"}))
    assert result.passed, [part.text for part in result.parts]
    assert next(part for part in result.parts if part.part == "black box").figures["canaries"] == 32
    assert result.lower_bound > 0.1 * result.claimed


def test_a_private_run_trains_with_it_at_the_same_cost(tmp_path: Path) -> None:
    """The ledger has the same event, the model has moved."""
    study = hospitals(tmp_path / "demo")
    spent = {}
    for clipping in ("flat", "group"):
        run = tmp_path / clipping
        done("simulate", study, "--out", run, *QUICK, "--set", f"privacy.clipping={clipping}")
        event = read_ledger(run / "sites" / "alder").events()[0]
        spent[clipping] = (event.noise_multiplier, event.max_grad_norm, event.sample_rate, event.steps)
    assert spent["flat"] == spent["group"]
    trained = tensorfile.parse((tmp_path / "group" / "model" / "shared.safetensors").read_bytes())[0]
    start = initial_groups(load_study(tmp_path / "group" / "study.yaml"))
    moved = [abs(trained[group][name] - start[group][name]).max() for group in trained for name in trained[group]]
    assert min(moved) > 1e-3


# What is left of the declared slack.


def agreeing(fusion: str, patients: int) -> tuple[Study, Batch]:
    """Copies of one patient."""
    of = four_kinds(fusion, "cra")
    one = random_batch(of, [1], present=torch.ones(1, 4, dtype=torch.bool))
    copies = one.rows(torch.zeros(patients, dtype=torch.int64))
    return of, replace(copies, patient=torch.arange(patients), patients=patients)


@pytest.mark.parametrize("fusion", ["late", "concat"])
def test_a_float32_sum_over_patients_who_agree_is_close_to_the_exact_one(fusion: str) -> None:
    """Added one by one, they lose at most u C (1 + 2 + ... + B); measured, a seventh of it."""
    count, bound = 512, 0.01
    of, batch = agreeing(fusion, count)
    engine = FastEngine(random_model(of), "binary", bound)
    one = batch.of_patients(torch.tensor([0]))
    exact = count * flat(engine.sum(one, one.present))
    lost = length(flat(engine.sum(batch, batch.present)) - exact)
    assert lost <= bound * count * (count + 1) / 2 * torch.finfo(torch.float32).eps / 2
    assert lost <= 0.02 * SLACK * bound * count, "a fiftieth of the slack for each patient"


def test_a_float32_sum_over_patients_of_alternating_sign_is_close_to_zero() -> None:
    of, model, two = cancelling()
    batch = two.rows(torch.arange(2).repeat(256))
    batch = replace(batch, patient=torch.arange(512), patients=512)
    engine = FastEngine(model, of.task.kind, 0.01)
    assert length(flat(engine.sum(batch.of_patients(torch.tensor([0])), batch.present[:1]))) > 0.0099
    assert length(flat(engine.sum(batch, batch.present))) <= 0.01 * SLACK * 0.01


@pytest.mark.parametrize("fusion", ["late", "concat"])
@pytest.mark.parametrize("count", [32, 256, 512])
def test_one_patient_among_many_who_agree_uses_little_of_the_slack(fusion: str, count: int) -> None:
    """Last or first, so that all others stand elsewhere in the sum; agreeing, or with the other label."""
    bound = 0.01
    of, batch = agreeing(fusion, count)
    engine = FastEngine(random_model(of), "binary", bound)
    without = batch.of_patients(torch.arange(count - 1))
    before = flat(engine.sum(without, without.present))
    other = batch.target.clone()
    other[0] = 0
    for bigger in (batch, replace(batch, target=other)):
        change = length(flat(engine.sum(bigger, bigger.present)) - before)
        assert change <= bound * (1 + 0.2 * SLACK)
