"""The contract of each family. An entry of a registry is tested here without a new test."""

from __future__ import annotations

from functools import cache
from pathlib import Path

import numpy as np
import pytest
import torch
from batches import (
    EVERY_KIND,
    PAIRS,
    TASKS,
    blank,
    flat,
    four_kinds,
    model_keys,
    patterns,
    random_batch,
    random_model,
    tasks_of,
    wake,
)
from cohorts import Hospital, study
from hospitals import build, participant, plan_of
from numpy.typing import NDArray
from torch import nn

from gapweave.client.data import Cohort
from gapweave.client.gradients.fast import FastEngine
from gapweave.client.gradients.opacus import OpacusEngine
from gapweave.client.gradients.plain import PlainEngine
from gapweave.client.predict import SiteModel, predict, table
from gapweave.client.state import to_arrays, to_tensors
from gapweave.client.training import Step
from gapweave.server.aggregation import initial_groups
from gapweave.server.aggregators import AGGREGATORS
from gapweave.server.rules import start
from gapweave.shared import tensorfile, wire
from gapweave.shared.catalogue import described
from gapweave.shared.config.study import Study
from gapweave.shared.encoders import DEFAULTS, ENCODERS
from gapweave.shared.errors import UsageError
from gapweave.shared.fusion import FUSIONS, Fused, Fusion, Shape
from gapweave.shared.imputers import IMPUTERS
from gapweave.shared.model import MultimodalModel, groups, load_groups
from gapweave.shared.objective import probabilities
from gapweave.shared.registry import Registry
from gapweave.shared.schema import Modality, modalities
from gapweave.shared.schemes import SCHEMES, Moment, Scheme, build_scheme

M, D, K = 4, 6, 3
FAMILIES: list[Registry] = [ENCODERS, IMPUTERS, FUSIONS, SCHEMES, AGGREGATORS]


SCORE = {"kind": "public_score", "expression": "lactate > 4", "low": 0, "high": 1}


def noise(*shape: int, seed: int = 0) -> torch.Tensor:
    return torch.randn(*shape, generator=torch.Generator().manual_seed(seed))


def assert_mixes_no_rows(module: nn.Module, *inputs: torch.Tensor) -> None:
    """Replace one row at a time by another one: all other rows of the output stay as they are."""
    before = module(*inputs)
    before = getattr(before, "logits", before)
    for row in range(len(inputs[0])):
        changed = [values.clone() for values in inputs]
        for values in changed:
            values[row] = values[row - 1]
        after = module(*changed)
        after = getattr(after, "logits", after)
        others = torch.arange(len(before)) != row
        torch.testing.assert_close(after[others], before[others], rtol=0, atol=1e-6)
        torch.testing.assert_close(after[row], after[row - 1], rtol=1e-5, atol=1e-6)


def assert_is_public(module: nn.Module) -> None:
    """Nothing is learned outside the parameters: no running statistics, no tensor that is never noised."""
    assert all(parameter.requires_grad for parameter in module.parameters())
    assert not [name for name, _ in module.named_buffers() if "running" in name]


# Registries.


@pytest.mark.parametrize("registry", FAMILIES, ids=lambda registry: registry.family)
def test_an_unknown_name_is_refused_with_the_installed_ones(registry: Registry) -> None:
    (first, *_) = registry
    with pytest.raises(UsageError, match=f"did you mean '{first}'"):
        registry[first + "x"]
    with pytest.raises(UsageError) as caught:
        registry["no such thing"]
    assert registry.family in str(caught.value)
    assert all(name in caught.value.remedy for name in registry)


def test_two_entries_of_one_name_are_refused() -> None:
    registry: Registry[object] = Registry("thing", "gapweave.shared.fusion")
    registry.register("one")(first := object())
    registry.register("one")(first)
    with pytest.raises(ValueError, match="thing 'one' is registered twice"):
        registry.register("one")(object())


# Encoders.


@cache
def served(encoder: str) -> tuple[Modality, ...]:
    """The kinds of data that an encoder can be built for."""
    found = []
    for modality in modalities(study({**EVERY_KIND, "score": SCORE})):
        module = _try(encoder, modality)
        if module is not None:
            found.append(modality)
    return tuple(found)


def _try(encoder: str, modality: Modality) -> nn.Module | None:
    try:
        module = ENCODERS[encoder](modality, D)
        return module if module(torch.zeros(2, *modality.shape)).shape == (2, D) else None
    except (RuntimeError, ValueError, TypeError, IndexError):
        return None


def test_every_kind_of_data_has_an_encoder() -> None:
    for kind, encoder in DEFAULTS.items():
        assert kind in {modality.spec.kind for modality in served(encoder)}


@pytest.mark.parametrize("name", list(ENCODERS))
def test_an_encoder_serves_some_kind_of_data(name: str) -> None:
    assert served(name)


@pytest.mark.parametrize("name", list(ENCODERS))
def test_an_encoder_maps_records_to_bounded_embeddings_one_by_one(name: str) -> None:
    for modality in served(name):
        module = wake(ENCODERS[name](modality, D))
        assert_is_public(module)
        inputs = noise(5, *modality.shape)
        embedded = module(inputs)
        assert embedded.shape == (5, D)
        assert torch.equal(embedded, module(inputs)), "the same record, the same embedding"
        assert embedded.abs().max() <= 1
        assert module(100 * inputs).abs().max() <= 1
        learns = any(True for _ in module.parameters())
        assert (embedded.std(0) > 0).any() == learns, "the embedding does not depend on the record"
        assert_mixes_no_rows(module, inputs)


@pytest.mark.parametrize("name", list(ENCODERS))
def test_an_encoder_takes_the_blank_row_of_an_absent_modality(name: str) -> None:
    for modality in served(name):
        module = ENCODERS[name](modality, D)
        loss = module(torch.zeros(3, *modality.shape)).square().sum()
        assert torch.isfinite(loss)
        learned = list(module.parameters())
        gradients = torch.autograd.grad(loss, learned, allow_unused=True) if learned else ()
        assert all(gradient is None or torch.isfinite(gradient).all() for gradient in gradients)


@pytest.mark.parametrize("name", list(ENCODERS))
def test_an_encoder_has_per_patient_gradients(name: str) -> None:
    """One engine call over all patients equals the sum of one call a patient: the layers are known and mix nobody."""
    for modality in served(name):
        spec = {**{**EVERY_KIND, "score": SCORE}[modality.name], "encoder": name}
        of = study({modality.name: spec, "other": EVERY_KIND["labs"]}, model={"embedding": 4})
        assert_patients_add_up(MultimodalModel(of, of.order), of)


def assert_patients_add_up(
    model: MultimodalModel, of: Study, private: type[OpacusEngine] | type[FastEngine] = OpacusEngine
) -> None:
    engine = private(wake(model), "binary", bound=0.05)
    batch = random_batch(of, [1, 2, 1])
    together = flat(engine.sum(batch, batch.present))
    each = [flat(engine.sum(part, part.present)) for at in range(3) if (part := batch.of_patients(torch.tensor([at])))]
    assert all(0 < float(gradient.norm()) <= engine.sensitivity * (1 + 1e-6) for gradient in each)
    torch.testing.assert_close(together, torch.stack(each).sum(0), rtol=0, atol=1e-6)


# Imputers.


@pytest.mark.parametrize("name", list(IMPUTERS))
def test_an_imputer_estimates_every_slot_one_record_at_a_time(name: str) -> None:
    imputer = IMPUTERS[name](M, D)
    wake(imputer)
    assert_is_public(imputer)
    used = patterns("abcd")
    embeddings = torch.where(used.unsqueeze(-1), noise(15, M, D), imputer.tokens(15))
    estimate = imputer(embeddings, used)
    assert estimate.shape == (15, M, D)
    assert torch.isfinite(estimate).all()
    assert_mixes_no_rows(imputer, embeddings.detach(), used)


@pytest.mark.parametrize("name", list(IMPUTERS))
def test_an_imputer_starts_from_one_null_token_a_modality(name: str) -> None:
    imputer = IMPUTERS[name](M, D)
    wake(imputer)
    tokens = imputer.tokens(3)
    assert tokens.shape == (3, M, D)
    assert torch.equal(tokens[0], tokens[2])
    assert len({tuple(row.tolist()) for row in tokens[0]}) == M
    assert {name.split(".")[0] for name, _ in imputer.named_parameters()} >= {"null"}


@pytest.mark.parametrize("name", list(IMPUTERS))
def test_an_imputer_that_learns_gets_gradients_from_hidden_modalities(name: str) -> None:
    imputer = wake(IMPUTERS[name](M, D))
    used = torch.tensor([[True, True, False, True]])
    estimate = imputer(torch.where(used.unsqueeze(-1), noise(1, M, D), imputer.tokens(1)), used)
    (estimate[:, 2] - 1).square().sum().backward()
    moved = {key.split(".")[0] for key, value in imputer.named_parameters() if value.grad is not None}
    assert (moved - {"null"} != set()) == getattr(IMPUTERS[name], "learns", False)


@pytest.mark.parametrize("name", list(IMPUTERS))
def test_an_imputer_has_per_patient_gradients(name: str) -> None:
    of = four_kinds("concat", name)
    assert_patients_add_up(MultimodalModel(of, of.order), of)


# Fusions.

USED = patterns("abcd")
VISIBLE = USED.unsqueeze(-1)


def fusion_of(name: str, task: str = "multiclass") -> Fusion:
    shape = Shape(modalities=M, embedding=D, outputs=1 if task == "binary" else K, task=task)
    settings = FUSIONS[name].Settings()
    FUSIONS[name].check(shape, settings)
    return wake(FUSIONS[name](shape, settings))


def votes_for(fusion_task: str, seed: int = 0) -> torch.Tensor:
    return torch.where(VISIBLE, noise(15, M, 1 if fusion_task == "binary" else K, seed=seed), 0.0)


def assert_same(one: Fused, other: Fused) -> None:
    """Bit for bit, and finite."""
    assert torch.isfinite(one.logits).all()
    assert torch.equal(one.logits, other.logits)
    assert (one.weights is None) == (other.weights is None)
    assert one.weights is None or torch.equal(one.weights, other.weights)


@pytest.mark.parametrize("name", list(FUSIONS))
def test_a_fusion_decides_one_record_at_a_time_in_every_pattern(name: str) -> None:
    for task in tasks_of(name):
        fusion, votes = fusion_of(name, task), votes_for(task)
        assert_is_public(fusion)
        fused = fusion(noise(15, M, D), USED, votes)
        assert fused.logits.shape == (15, votes.shape[-1])
        assert torch.isfinite(fused.logits).all()
        assert (fused.logits.std(0) > 0).all()
        assert_mixes_no_rows(fusion, noise(15, M, D), USED, votes)


@pytest.mark.parametrize("name", list(FUSIONS))
def test_a_fusion_gives_shares_to_the_modalities_that_are_there(name: str) -> None:
    for task in tasks_of(name):
        weights = fusion_of(name, task)(noise(15, M, D), USED, votes_for(task)).weights
        assert (weights is not None) == FUSIONS[name].gives_shares
        if weights is None:
            return
        assert weights.shape == (15, M)
        assert not weights[~USED].any()
        assert (weights >= 0).all()
        torch.testing.assert_close(weights.sum(1), torch.ones(15))


@pytest.mark.parametrize("absent", [float("nan"), float("inf"), 1e3])
@pytest.mark.parametrize("name", list(FUSIONS))
def test_a_fusion_never_reads_what_an_absent_modality_says(name: str, absent: float) -> None:
    """Not its vote, and, unless it reads what the imputer puts there, not its slot; nor do its gradients."""
    for task in tasks_of(name):
        fusion, slots, votes = fusion_of(name, task), noise(15, M, D), votes_for(task)
        before = fusion(slots, USED, votes)
        loud_slots = slots if fusion.reads_slots else torch.where(VISIBLE, slots, absent)
        after = fusion(loud_slots, USED, torch.where(VISIBLE, votes, absent))
        assert_same(after, before)
        gradients = torch.autograd.grad(after.logits.sum(), list(fusion.parameters()), allow_unused=True)
        assert all(gradient is None or torch.isfinite(gradient).all() for gradient in gradients)


@pytest.mark.parametrize("name", list(FUSIONS))
def test_a_fusion_answers_for_a_record_without_any_modality(name: str) -> None:
    nothing = torch.zeros(2, M, dtype=torch.bool)
    fused = fusion_of(name)(torch.zeros(2, M, D), nothing, torch.zeros(2, M, K))
    assert torch.isfinite(fused.logits).all()
    assert fused.weights is None or not fused.weights.any()


@pytest.mark.parametrize("name", list(FUSIONS))
def test_a_fusion_says_whether_imputed_slots_can_change_its_answer(name: str) -> None:
    fusion = fusion_of(name)
    slots, votes = noise(15, M, D), votes_for("multiclass")
    other = torch.where(VISIBLE, slots, noise(15, M, D, seed=4))
    before, after = fusion(slots, USED, votes).logits[:-1], fusion(other, USED, votes).logits[:-1]
    assert torch.equal(before, after) != fusion.reads_slots


@pytest.mark.parametrize(
    ("registry", "name"),
    [(registry, name) for registry in (FUSIONS, IMPUTERS, SCHEMES) for name in registry],
    ids=lambda value: getattr(value, "family", value),
)
def test_a_part_says_where_it_comes_from(registry: Registry, name: str) -> None:
    """The sections that docs/methods.md is made from."""
    assert all(described(registry[name]).values())


@pytest.mark.parametrize("name", list(FUSIONS))
def test_a_fusion_that_cannot_do_several_labels_names_one_that_can(name: str) -> None:
    of = two_kinds(name, task=TASKS["multilabel"])
    instead = FUSIONS[name].instead
    if instead is None:
        assert MultimodalModel(of, of.order)
        return
    with pytest.raises(UsageError, match="multilabel") as caught:
        MultimodalModel(of, of.order)
    assert instead in caught.value.remedy
    assert FUSIONS[instead].instead is None


@pytest.mark.parametrize("engine", [OpacusEngine, FastEngine])
@pytest.mark.parametrize("name", list(FUSIONS))
def test_a_fusion_has_per_patient_gradients(name: str, engine: type[OpacusEngine] | type[FastEngine]) -> None:
    of = two_kinds(name)
    assert_patients_add_up(MultimodalModel(of, of.order), of, engine)


def two_kinds(fusion: str = "late", imputer: str = "cra", **keys: object) -> Study:
    """A study of two quick encoders, for what does not depend on the data."""
    kinds = {name: EVERY_KIND[name] for name in ("labs", "note")}
    return study(kinds, model={"embedding": 4, **model_keys(fusion, imputer)}, **keys)


# Both, in a model and in a federation.


@pytest.fixture(scope="module")
def two_hospitals(tmp_path_factory: pytest.TempPathFactory) -> list[Hospital]:
    folder = tmp_path_factory.mktemp("two")
    return [build(folder / "a", "north", ["labs", "note"]), build(folder / "b", "south", ["labs", "vitals"])]


def noised(value: NDArray[np.float32]) -> bool:
    """Whether numbers can be a noised release; on the coarse grid a single one is 0 once in some ten thousand draws."""
    return bool(np.isfinite(value).all() and (value.any() or value.size == 1))


@pytest.mark.parametrize(("fusion", "imputer"), PAIRS)
def test_two_hospitals_train_one_private_round(
    fusion: str, imputer: str, two_hospitals: list[Hospital], tmp_path: Path
) -> None:
    """What leaves is noised, charged, of the model's form, and gives a model for every pattern."""
    of = plan_of(private=True, model=model_keys(fusion, imputer), privacy={"epsilon": 3})
    begin, updates_of = initial_groups(of), {}
    for hospital in two_hospitals:
        site = participant(hospital, of, tmp_path / hospital.content["name"])
        site.prepare("run-1")
        down = {group: begin[group] for group in site.shared}
        sent = wire.unpack(wire.pack({"round": 1}, site.train("run-1", 1, "0" * 64, down).reply))[1]
        for group, part in sent.items():
            assert all(part[name].shape == value.shape for name, value in begin[group].items())
            assert all(noised(value) for value in part.values()), "noise is on every tensor"
            updates_of.setdefault(group, []).append(part)
    assert updates_of.keys() == begin.keys()
    model, result = MultimodalModel(of, of.order), {}
    for group, parts in updates_of.items():
        accumulator = start("mean", group, len(parts))
        for part in parts:
            accumulator.add(part)
        mean = accumulator.finish()
        result[group] = {name: value + mean[name] for name, value in begin[group].items()}
    load_groups(model, to_tensors(result))
    batch = random_batch(of, [1] * 7, present=patterns(of.order))
    with torch.no_grad():
        assert torch.isfinite(model(batch.inputs, batch.present, batch.present).logits).all()


@pytest.mark.no_cover
@pytest.mark.parametrize(("fusion", "imputer"), PAIRS)
def test_a_model_can_learn_its_training_records(fusion: str, imputer: str) -> None:
    """Plain gradient descent halves the loss: no part is cut off from its gradient."""
    of = two_kinds(fusion, imputer)
    model = MultimodalModel(of, of.order)
    engine, batch = PlainEngine(model, "binary"), random_batch(of, [1] * 8)
    before = task_loss(model, batch)
    for _ in range(100):
        gradient = engine.sum(batch, batch.present)
        with torch.no_grad():
            for name, parameter in model.named_parameters():
                parameter.sub_(0.3 * gradient[name] / 8)
    assert task_loss(model, batch) < 0.5 * before


def task_loss(model: MultimodalModel, batch) -> float:
    with torch.no_grad():
        logits = model(batch.inputs, batch.present, batch.present).logits
    return float(torch.nn.functional.binary_cross_entropy_with_logits(logits, batch.target))


@pytest.mark.parametrize(("fusion", "imputer"), PAIRS)
def test_parameters_survive_a_file_and_a_message(fusion: str, imputer: str) -> None:
    """Bit for bit, shapes and all: a scalar parameter stays a scalar."""
    of = two_kinds(fusion, imputer)
    model = random_model(of)
    arrays = to_arrays(groups(model))
    stored, note = tensorfile.parse(tensorfile.dump(arrays, {"a": [1, None, "ü"]}))
    assert note == {"a": [1, None, "ü"]}
    header, sent = wire.unpack(wire.pack({"round": 3}, arrays))
    assert header["round"] == 3
    for received in (stored, sent):
        assert received.keys() == arrays.keys()
        fresh = MultimodalModel(of, of.order)
        load_groups(fresh, to_tensors(received))
        for (name, new), old in zip(fresh.named_parameters(), model.parameters(), strict=True):
            assert torch.equal(new, old), name
        for group, part in arrays.items():
            assert {name: value.shape for name, value in received[group].items()} == {
                name: value.shape for name, value in part.items()
            }


@pytest.mark.parametrize("name", list(FUSIONS))
def test_every_pattern_is_explained_when_it_is_predicted(name: str) -> None:
    """Shares add up to 1, votes come from what is there, and a pattern that training had not is marked."""
    for task in tasks_of(name):
        of = plan_of(private=False, model={"fusion": name}, task=TASKS[task])
        present = torch.cat([patterns(of.order), torch.zeros(1, 3, dtype=torch.bool)])
        batch = random_batch(of, [1] * 8, present=present)
        ids = tuple(f"r{row}" for row in range(8))
        cohort = Cohort(site="a", batch=batch, record_ids=ids, patient_ids=ids, test=present[:, 0], subgroups={})
        seen, names = ["labs", "labs+vitals"], of.task.class_names
        model = random_model(of)
        kept = SiteModel(study=of, model=model, card={"patterns": seen})
        predictions = predict(model, batch, of, [0.25] * of.task.outputs)
        rows = table(kept, cohort, batch, predictions).to_dicts()
        with torch.no_grad():
            alone = probabilities(model(batch.inputs, batch.present, batch.present).modality_logits, of.task.kind)
        assert len(rows) == 8
        for at, row in enumerate(rows):
            there = [modality for modality, here in zip(of.order, present[at].tolist(), strict=True) if here]
            assert row["present"] == "+".join(there)
            absent = [modality for modality in of.order if modality not in there]
            assert row["imputed"] == ("+".join(absent) if FUSIONS[name].reads_slots else "")
            assert row["unseen_pattern"] == (row["present"] not in seen)
            shares = [row[f"weight_{modality}"] for modality in there]
            assert not any(row[f"weight_{modality}"] for modality in absent)
            assert all(row[f"vote_{modality}"] is None for modality in absent)
            if FUSIONS[name].gives_shares:
                assert sum(shares) == pytest.approx(1.0 if there else 0.0, abs=1e-6)
            else:
                assert all(share is None for share in shares)
            for modality in there:
                own = alone[at, of.order.index(modality)]
                if task == "binary":
                    assert row[f"vote_{modality}"] == pytest.approx(float(own[1]))
                elif task == "multiclass":
                    assert row[f"vote_{modality}"] == names[int(own.argmax())]
                else:
                    said = [label for label, value in zip(names, own.tolist(), strict=True) if value >= 0.5]
                    assert row[f"vote_{modality}"] == "+".join(said)
        assert [rows[-1][f"p_{label}"] for label in names] == {
            "binary": [0.75, 0.25], "multiclass": [0.25] * 3, "multilabel": [0.25] * 3
        }[task]  # fmt: skip


# Schemes.

MOMENTS = [Moment(1, 10), Moment(4, 10), Moment(10, 10)]


def uniform(records: int, seed: int = 0) -> torch.Tensor:
    return torch.rand(records, M + 1, generator=torch.Generator().manual_seed(seed))


def scheme_of(name: str, imputer: str = "none", fusion: str = "concat", task: str = "binary") -> tuple[Scheme, Study]:
    of = four_kinds(fusion, imputer, task, scheme={"name": name})
    return build_scheme(of), of


@pytest.mark.parametrize("at", MOMENTS)
@pytest.mark.parametrize("imputer", ["none", "cra"])
@pytest.mark.parametrize("name", list(SCHEMES))
def test_a_scheme_uses_a_non_empty_part_of_what_a_record_has(name: str, imputer: str, at: Moment) -> None:
    present = patterns("abcd").repeat(40, 1)
    scheme, _ = scheme_of(name, imputer)
    used = scheme.used(present, uniform(len(present)), at)
    assert used.dtype == torch.bool
    assert used.shape == present.shape
    assert not (used & ~present).any()
    assert used.any(1).all()
    nothing = torch.zeros(3, M, dtype=torch.bool)
    assert not scheme.used(nothing, uniform(3), at).any()


@pytest.mark.parametrize("at", MOMENTS)
@pytest.mark.parametrize("imputer", ["none", "cra"])
@pytest.mark.parametrize("name", list(SCHEMES))
def test_a_scheme_couples_no_records_and_draws_nothing_itself(name: str, imputer: str, at: Moment) -> None:
    present, draws = patterns("abcd"), uniform(15)
    scheme, _ = scheme_of(name, imputer)
    used = scheme.used(present, draws, at)
    for row in range(15):
        alone = scheme.used(present[[row]], draws[[row]], at)
        assert torch.equal(alone[0], used[row])


@pytest.mark.parametrize("name", list(SCHEMES))
def test_a_scheme_hides_some_modalities_when_the_imputer_has_to_learn(name: str) -> None:
    present = torch.ones(400, M, dtype=torch.bool)
    used = scheme_of(name, "cra")[0].used(present, uniform(400), Moment(10, 10))
    hidden = float((~used).any(1).double().mean())
    assert 0.2 < hidden < 1, "some records are whole, some are not"
    assert (~used).any(0).all(), "every modality is hidden at times"


@pytest.mark.parametrize("task", list(TASKS))
@pytest.mark.parametrize("name", list(SCHEMES))
def test_a_schemes_loss_is_of_one_record_in_every_pattern(name: str, task: str) -> None:
    """Alone and among others, whatever stands in absent slots; an unknown label adds nothing that a known one would."""
    for at in MOMENTS:
        scheme, of = scheme_of(name, "cra", "late" if task == "multilabel" else "concat", task)
        model = random_model(of)
        batch = random_batch(of, [1] * 15, present=patterns(of.order))
        used = scheme.used(batch.present, uniform(15, seed=3), at)
        with torch.no_grad():
            together = scheme.losses(model, batch, used, at)
            loud = scheme.losses(model, blank(batch, of.order, float("nan")), used, at)
            assert torch.isfinite(together).all()
            assert torch.equal(loud, together)
            for row in range(15):
                alone = scheme.losses(model, batch.rows(torch.tensor([row])), used[[row]], at)
                torch.testing.assert_close(alone[0], together[row], rtol=1e-5, atol=1e-6)


@pytest.mark.no_cover
@pytest.mark.parametrize("at", MOMENTS)
@pytest.mark.parametrize("fusion", ["concat", "late", "dwfuse", "denoising_autoencoder"])
@pytest.mark.parametrize("name", list(SCHEMES))
def test_a_schemes_per_patient_gradients_are_those_of_its_loss(name: str, fusion: str, at: Moment) -> None:
    """Both engines without clipping give what autograd gives: no use of a layer is lost, none is paired wrongly."""
    of = two_kinds(fusion, "cra", scheme={"name": name})
    step = Step(study=of, plan=None, engine=None, draws=None, at=at)
    batch = random_batch(of, [1, 2, 1, 1])
    used = step.scheme.used(batch.present, uniform(5, seed=2)[:, :3], at)
    expected = flat(PlainEngine(random_model(of), "binary").sum(batch, used, step.objective))
    for engine in (FastEngine, OpacusEngine):
        found = flat(engine(random_model(of), "binary", 1e6).sum(batch, used, step.objective))
        torch.testing.assert_close(found, expected, rtol=1e-4, atol=1e-6)


@pytest.mark.parametrize("name", list(SCHEMES))
def test_a_scheme_trains_one_private_round(name: str, two_hospitals: list[Hospital], tmp_path: Path) -> None:
    of = plan_of(private=True, model={"fusion": "concat"}, scheme={"name": name}, privacy={"epsilon": 3})
    begin = initial_groups(of)
    for hospital in two_hospitals:
        site = participant(hospital, of, tmp_path / hospital.content["name"])
        site.prepare("run-1")
        down = {group: begin[group] for group in site.shared}
        reply = site.train("run-1", 1, "0" * 64, down).reply
        assert all(noised(value) for part in reply.values() for value in part.values())


@pytest.mark.no_cover
@pytest.mark.parametrize("name", list(SCHEMES))
def test_a_model_learns_its_training_records_under_a_scheme(name: str) -> None:
    of = two_kinds("concat", "none", scheme={"name": name}, training={"lr": 0.3})
    model, scheme = MultimodalModel(of, of.order), build_scheme(of)
    engine, batch = PlainEngine(model, "binary"), random_batch(of, [1] * 8)
    before = task_loss(model, batch)
    for number in range(1, 151):
        at = Moment(number, 150)
        used = scheme.used(batch.present, uniform(8, seed=number)[:, :3], at)
        gradient = engine.sum(batch, used, lambda model, batch, used, at=at: scheme.losses(model, batch, used, at))
        with torch.no_grad():
            for key, parameter in model.named_parameters():
                parameter.sub_(0.3 * gradient[key] / 8)
    assert task_loss(model, batch) < 0.5 * before
