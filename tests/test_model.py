"""The model: what it may depend on, which parameter belongs to which group, and which groups leave a site."""

from __future__ import annotations

from dataclasses import replace

import pytest
import torch
from batches import EVERY_KIND, PAIRS, TRIPLES, blank, four_kinds, patterns, random_batch, random_model
from hypothesis import given, settings
from hypothesis import strategies as st

from gapweave.client.gradients import GradientEngine
from gapweave.client.gradients.opacus import OpacusEngine
from gapweave.client.gradients.plain import PlainEngine
from gapweave.shared.config.study import Study
from gapweave.shared.constants import Constants, Rescaling
from gapweave.shared.fusion import FUSIONS
from gapweave.shared.model import MultimodalModel, Outputs, group_of, groups, load_groups, shared_groups
from gapweave.shared.objective import record_losses
from gapweave.shared.schema import Batch, Features

few = settings(derandomize=True, deadline=None, max_examples=10)
FILLS = [float("nan"), 1e30, "random"]
FILLED = [*((*pair, FILLS[0]) for pair in PAIRS), *(("concat", "cra", fill) for fill in FILLS[1:])]
MOVED = Rescaling(values=(0,), flags=(1,), centers=(0.3,), scales=(0.5,))
RESCALED = Constants(rescaling={"labs": MOVED, "vitals": MOVED}, offset=(0.7,))


def run(model: MultimodalModel, batch: Batch, used: torch.Tensor | None = None) -> Outputs:
    with torch.no_grad():
        return model(batch.inputs, batch.present, batch.present if used is None else used)


def assert_same_outputs(one: Outputs, other: Outputs, tolerance: float = 0.0) -> None:
    for name in ("logits", "modality_logits", "embeddings", "imputed", "weights"):
        left, right = getattr(one, name), getattr(other, name)
        if left is None:
            assert right is None
            continue
        assert torch.isfinite(left).all(), name
        torch.testing.assert_close(left, right, rtol=0, atol=tolerance, msg=lambda text, name=name: f"{name}: {text}")


def engine_of(name: str, study: Study) -> GradientEngine:
    model = random_model(study)
    return PlainEngine(model, "binary") if name == "plain" else OpacusEngine(model, "binary", bound=0.5)


# What the model may depend on.


@pytest.mark.parametrize(("fusion", "imputer", "fill"), FILLED, ids=str)
def test_content_of_an_absent_modality_changes_no_output(fusion: str, imputer: str, fill: float | str) -> None:
    study = four_kinds(fusion, imputer)
    batch = random_batch(study, [1, 2, 3, 1, 2])
    assert not batch.present.all(), "without gaps there is nothing to test"
    model = random_model(study)
    assert_same_outputs(run(model, batch), run(model, blank(batch, study.order, fill)))


@pytest.mark.parametrize("engine", ["plain", "opacus"])
@pytest.mark.parametrize(("fusion", "imputer", "fill"), FILLED, ids=str)
def test_content_of_an_absent_modality_changes_no_gradient(
    fusion: str, imputer: str, engine: str, fill: float | str
) -> None:
    study = four_kinds(fusion, imputer)
    batch = random_batch(study, [1, 2, 3, 1, 2])
    used = batch.present & (torch.rand(batch.present.shape, generator=torch.Generator().manual_seed(3)) < 0.7)
    measured = engine_of(engine, study)
    clean, filled = measured.sum(batch, used), measured.sum(blank(batch, study.order, fill), used)
    assert any(tensor.any() for tensor in clean.values())
    for name, tensor in clean.items():
        assert torch.isfinite(tensor).all(), name
        torch.testing.assert_close(filled[name], tensor, rtol=0, atol=0, msg=name)


@pytest.mark.parametrize("fill", [0.0, *FILLS], ids=str)
@pytest.mark.parametrize("constants", [Constants(), RESCALED], ids=["public", "rescaled"])
def test_features_taken_once_for_all_records_give_the_same_outputs(constants: Constants, fill: float | str) -> None:
    """Bit for bit, for any part of the records, and with absent rows never read."""
    study = four_kinds("late", "cra")
    batch = random_batch(study, [1, 2, 3, 1, 2])
    model = random_model(study)
    model.constants = constants
    filled = blank(batch, study.order, fill)
    ready = replace(filled, inputs=model.features(filled.inputs, filled.present))
    assert_same_outputs(run(model, ready), run(model, batch))
    some = torch.tensor([1, 2, 4])
    assert isinstance(ready.of_patients(some).inputs, Features)
    assert_same_outputs(run(model, ready.of_patients(some)), run(model, batch.of_patients(some)))
    assert_same_outputs(run(model, ready.to(torch.device("cpu"))), run(model, batch))


@pytest.mark.parametrize(("fusion", "imputer"), PAIRS)
def test_a_modality_hidden_on_purpose_does_not_inform_the_prediction(fusion: str, imputer: str) -> None:
    study = four_kinds(fusion, imputer)
    batch = random_batch(study, present=torch.ones(6, 4, dtype=torch.bool))
    used = batch.present.clone()
    used[:, 1] = False
    other = replace(batch, inputs={**batch.inputs, "labs": batch.inputs["labs"] + 100})
    model = random_model(study)
    assert torch.equal(run(model, batch, used).logits, run(model, other, used).logits)
    assert not torch.equal(run(model, batch).logits, run(model, other).logits)


@pytest.mark.parametrize(("fusion", "imputer"), PAIRS)
def test_each_record_is_independent_of_the_others(fusion: str, imputer: str) -> None:
    study = four_kinds(fusion, imputer)
    model, batch = random_model(study), random_batch(study, [1] * 5)
    strangers = random_batch(study, [1] * 5, seed=77)
    together = run(model, batch)
    for row in range(5):
        at = torch.arange(5) == row
        mixed = replace(
            batch,
            inputs={
                name: torch.where(at.view(-1, *[1] * (rows.ndim - 1)), rows, 50 * strangers.inputs[name])
                for name, rows in batch.inputs.items()
            },
            present=torch.where(at.unsqueeze(1), batch.present, strangers.present),
        )
        alone = run(model, batch.rows(torch.tensor([row])))
        among = run(model, mixed)
        for name in ("logits", "modality_logits", "embeddings", "imputed"):
            expected = getattr(together, name)[row]
            torch.testing.assert_close(getattr(among, name)[row], expected, rtol=0, atol=1e-6, msg=name)
            torch.testing.assert_close(getattr(alone, name)[0], expected, rtol=1e-5, atol=1e-5, msg=name)


@few
@given(order=st.permutations(range(8)))
def test_the_order_of_records_changes_nothing_but_the_order(order: list[int]) -> None:
    study = four_kinds("concat")
    model, batch = random_model(study), random_batch(study, [1] * 8)
    rows = torch.tensor(order)
    straight, shuffled = run(model, batch), run(model, batch.rows(rows))
    torch.testing.assert_close(shuffled.logits, straight.logits[rows], rtol=0, atol=1e-6)
    torch.testing.assert_close(shuffled.imputed, straight.imputed[rows], rtol=0, atol=1e-6)


@pytest.mark.parametrize(("fusion", "imputer", "task"), TRIPLES)
def test_every_pattern_of_modalities_predicts_and_trains(fusion: str, imputer: str, task: str) -> None:
    study = four_kinds(fusion, imputer, task)
    present = patterns(study.order)
    assert len(present) == 15
    batch = random_batch(study, [1] * 15, present=present)
    model = random_model(study)
    outputs = model(batch.inputs, batch.present, batch.present)
    assert outputs.logits.shape == (15, study.task.outputs)
    assert torch.isfinite(outputs.logits).all()
    assert torch.equal(outputs.embeddings.abs().sum(-1) > 0, present)
    for row, loss in enumerate(record_losses(outputs, batch.target, batch.label_mask, study.task.kind)):
        gradient = torch.autograd.grad(loss, list(model.parameters()), retain_graph=True, allow_unused=True)
        by_name = dict(zip(dict(model.named_parameters()), gradient, strict=True))
        for name, values in by_name.items():
            if values is None:
                continue
            assert torch.isfinite(values).all()
            group, modality = group_of(name)[0].partition("/")[::2]
            if group == "encoder" and values.any():
                assert present[row, study.order.index(modality)], f"{name} learns from a record that lacks it"
        for modality in present[row].nonzero()[:, 0].tolist():
            head = [values for name, values in by_name.items() if name.startswith(f"heads.{study.order[modality]}.")]
            assert all(values.any() for values in head)


def test_a_site_predicts_without_the_encoders_that_it_lacks() -> None:
    study = four_kinds("concat")
    batch = random_batch(study, held=["labs", "note"])
    model = random_model(study, ["note", "labs"])
    outputs = run(model, batch)
    assert model.held == ("labs", "note")
    assert torch.isfinite(outputs.logits).all()
    assert not outputs.embeddings[:, [0, 3]].any()
    assert not outputs.modality_logits[:, [0, 3]].any()


def test_a_record_without_any_modality_gives_a_finite_answer() -> None:
    study = four_kinds()
    batch = random_batch(study, [1] * 3, present=torch.zeros(3, 4, dtype=torch.bool))
    for fusion in FUSIONS:
        assert torch.isfinite(run(random_model(four_kinds(fusion)), batch).logits).all()


# Parameter groups.


@pytest.mark.parametrize(("fusion", "imputer"), PAIRS)
def test_every_trained_tensor_is_in_exactly_one_group(fusion: str, imputer: str) -> None:
    study = four_kinds(fusion, imputer)
    model = MultimodalModel(study, study.order)
    placed = [tensor.data_ptr() for part in groups(model).values() for tensor in part.values()]
    trained = [parameter.data_ptr() for parameter in model.parameters() if parameter.requires_grad]
    assert len(placed) == len(set(placed))
    assert sorted(placed) == sorted(trained)
    encoders = {f"encoder/{name}" for name in study.order}
    heads = {f"head/{name}" for name in study.order}
    assert groups(model).keys() - {"imputer", "fusion"} == encoders | heads


def test_groups_share_memory_with_the_model_and_load_back() -> None:
    study = four_kinds()
    source, target = random_model(study), MultimodalModel(study, study.order)
    load_groups(target, groups(source))
    batch = random_batch(study)
    assert torch.equal(run(source, batch).logits, run(target, batch).logits)
    with pytest.raises(KeyError):
        load_groups(MultimodalModel(study, ["labs"]), groups(source))


def test_a_site_has_no_group_of_a_modality_that_it_lacks() -> None:
    study = four_kinds("concat", sharing={"policy": "all"})
    names = groups(MultimodalModel(study, ["labs", "vitals"])).keys()
    assert names == {"encoder/labs", "encoder/vitals", "head/labs", "head/vitals", "imputer", "fusion"}
    assert shared_groups(study, names) == sorted(names)


@pytest.mark.parametrize(("fusion", "imputer"), PAIRS)
def test_a_group_starts_the_same_at_every_site(fusion: str, imputer: str) -> None:
    study = four_kinds(fusion, imputer, seed=3)
    whole = groups(MultimodalModel(study, study.order))
    torch.manual_seed(99)
    for held in (["labs"], ["cxr", "vitals"], ["note", "labs"]):
        for group, tensors in groups(MultimodalModel(study, held)).items():
            assert tensors.keys() == whole[group].keys()
            for name, tensor in tensors.items():
                assert torch.equal(tensor, whole[group][name]), f"{group} {name} at a site with {held}"


def test_the_seed_decides_initial_values_and_nothing_else_does() -> None:
    one, again, other = (groups(MultimodalModel(four_kinds(seed=seed), EVERY_KIND)) for seed in (1, 1, 2))
    assert torch.equal(one["encoder/labs"]["wide.weight"], again["encoder/labs"]["wide.weight"])
    assert not torch.equal(one["encoder/labs"]["wide.weight"], other["encoder/labs"]["wide.weight"])
    assert not torch.equal(one["head/labs"]["weight"], one["head/note"]["weight"])


def test_building_a_model_leaves_the_global_generator_alone() -> None:
    before = torch.random.get_rng_state()
    MultimodalModel(four_kinds(), EVERY_KIND)
    assert torch.equal(torch.random.get_rng_state(), before)


ALL_GROUPS = ["encoder/labs", "encoder/note", "fusion", "head/labs", "head/note", "imputer"]


@pytest.mark.parametrize(
    ("policy", "leaves"),
    [
        ("heads", ["fusion", "head/labs", "head/note"]),
        ("heads+imputer", ["fusion", "head/labs", "head/note", "imputer"]),
        ("all", ALL_GROUPS),
        ({"encoder/labs": "holders"}, ["encoder/labs", "fusion", "head/labs", "head/note"]),
        ({"head/note": "local", "imputer": "shared"}, ["fusion", "head/labs", "imputer"]),
        ({"*": "local"}, []),
        ({"encoder/*": "holders", "encoder/note": "local"}, ["encoder/labs", "fusion", "head/labs", "head/note"]),
        ({"encoder/note": "local", "encoder/*": "holders"}, ["encoder/labs", "fusion", "head/labs", "head/note"]),
    ],
    ids=str,
)
def test_a_sharing_policy_says_which_groups_leave(policy: object, leaves: list[str]) -> None:
    study = four_kinds(sharing={"policy": policy})
    assert shared_groups(study, ALL_GROUPS) == leaves


def test_a_site_reads_the_sharing_map_that_the_server_sent() -> None:
    # Believed: the order in which a map is written survives the wire. True: the canonical form sorts its keys, and
    # an encoder declared local would have left the site.
    sent = four_kinds(sharing={"policy": {"encoder/labs": "local", "encoder/*": "holders"}})
    received = Study.model_validate_json(sent.canonical())
    assert shared_groups(received, ALL_GROUPS) == shared_groups(sent, ALL_GROUPS)
    assert "encoder/labs" not in shared_groups(received, ALL_GROUPS)
