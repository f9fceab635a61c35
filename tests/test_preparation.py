"""What a site releases before it trains: its sensitivity, its order, its price, and what the model makes of it."""

from __future__ import annotations

import math
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from hospitals import build, die, participant, plan_of
from hypothesis import given, settings
from hypothesis import strategies as st

from gapweave.client import participant as participant_module
from gapweave.client import preparation
from gapweave.client.audit_site import joined
from gapweave.client.canaries import canaries
from gapweave.client.participant import Participant
from gapweave.client.preparation import (
    column_sums,
    first_records,
    label_counts,
    log_odds,
    noised_counts,
    noised_sums,
    rescaling,
    shares,
)
from gapweave.shared.config.study import Study
from gapweave.shared.constants import Constants, Rescaling
from gapweave.shared.errors import BudgetExhausted, RefusedError
from gapweave.shared.features.numeric import numeric_columns
from gapweave.shared.model import MultimodalModel
from gapweave.shared.privacy.accountant import epsilon
from gapweave.shared.privacy.draws import SecretDraws
from gapweave.shared.privacy.ledger import read_ledger
from gapweave.shared.privacy.once import (
    BALANCE_SHARE,
    STATISTICS_SHARE,
    balance_event,
    statistics_event,
    statistics_sensitivity,
)
from gapweave.shared.privacy.plan import count_event
from gapweave.shared.schema import Batch

RUN = "run-1"
NOISY = {"standardisation": "noisy", "class_balance": "noisy"}
TASKS: dict[str, dict[str, Any]] = {
    "binary": {"kind": "binary", "label": "y"},
    "multiclass": {"kind": "multiclass", "label": "y", "classes": ["a", "b", "c"]},
    "multilabel": {"kind": "multilabel", "label": ["y", "z"]},
}
HELD = ["labs", "note", "vitals"]


def study_of(task: str = "binary", **keys: Any) -> Study:
    return plan_of(private=True, task=TASKS[task], preparation=keys.pop("preparation", NOISY), **keys)


def strange(batch: Batch, value: float, flag: float = 1.0) -> Batch:
    """The same records with every input, flag and target replaced."""
    inputs = {name: torch.full_like(rows, value) for name, rows in batch.inputs.items()}
    for column in numeric_columns(study_of(), HELD):
        inputs[column.modality][..., column.flag] = flag
    return replace(batch, inputs=inputs, target=torch.full_like(batch.target, value))


# Sensitivity: whatever one patient's records hold.

STRANGE = st.sampled_from([0.0, 1.0, -1.0, 5.0, -5.0, 1e30, -1e30, math.nan, math.inf, -math.inf, 1e-30])


@settings(deadline=None)
@given(
    records=st.integers(1, 12),
    value=STRANGE | st.floats(-100, 100),
    flag=STRANGE,
    seed=st.integers(0, 50),
    odd=st.booleans(),
)
def test_one_patient_changes_the_sums_by_at_most_the_declared_bound(
    records: int, value: float, flag: float, seed: int, odd: bool
) -> None:
    of = study_of()
    columns = numeric_columns(of, HELD)
    rest, one = canaries(of, HELD, (1, 2, 3), seed), canaries(of, HELD, (records,), seed + 1)
    if odd:
        one = strange(one, value, flag)
    change = column_sums(columns, joined(rest, one)) - column_sums(columns, rest)
    assert float(change.norm()) <= statistics_event(of, HELD, 1e-5).max_grad_norm + 1e-9


def test_the_declared_bound_of_the_sums_is_reached_but_for_rounding() -> None:
    """Else it is noise for nothing: every column at its bound in every record."""
    of = study_of()
    columns = numeric_columns(of, HELD)
    one = canaries(of, HELD, (3,), 0)
    change = column_sums(columns, strange(one, 5.0))
    assert float(change.norm()) == pytest.approx(statistics_sensitivity(len(columns)), rel=1e-5)
    assert len(columns) == 5, "two kinds of data, and no category"


@pytest.mark.parametrize("task", TASKS)
@settings(deadline=None)
@given(records=st.integers(1, 12), value=STRANGE, seed=st.integers(0, 50), odd=st.booleans())
def test_one_patient_changes_one_cell_of_each_table_of_labels(
    task: str, records: int, value: float, seed: int, odd: bool
) -> None:
    of = study_of(task)
    rest, one = canaries(of, HELD, (1, 2, 3), seed), canaries(of, HELD, (records,), seed + 1)
    if odd and task != "multiclass":
        one = strange(one, value)
    change = label_counts(of, joined(rest, one)) - label_counts(of, rest)
    assert change.shape[0] == balance_event(of).steps
    assert change.abs().sum(1).tolist() == [1] * len(change)


def test_labels_are_counted_once_a_patient_by_the_first_known_one() -> None:
    of = study_of("multilabel")
    batch = canaries(of, HELD, (3, 1, 2), 0)
    target = torch.tensor([[0, 1], [1, 0], [1, 0], [1, 1], [0, 0], [0, 1]]).float()
    known = torch.tensor([[0, 1], [1, 1], [1, 1], [1, 0], [1, 0], [1, 1]]).bool()
    counts = label_counts(of, replace(batch, target=target, label_mask=known))
    assert counts.tolist() == [[1, 2], [0, 2]]
    assert first_records(batch, known[:, 0]).tolist() == [1, 3, 4]
    assert first_records(batch, torch.zeros(6, dtype=torch.bool)).tolist() == []


# What the model makes of it.


def test_sums_give_back_mean_and_spread_and_absent_values_count_as_nothing() -> None:
    of = study_of()
    columns = numeric_columns(of, ["labs", "vitals"])
    generator = torch.Generator().manual_seed(0)
    batch = canaries(of, HELD, (1,) * 4000, 0)
    place, flag = columns[0].value, columns[0].flag
    seen = torch.rand(4000, generator=generator) < 0.5
    labs = torch.zeros_like(batch.inputs["labs"])
    labs[:, place] = torch.where(seen, 0.7 + 0.4 * torch.randn(4000, generator=generator), 0.0)
    labs[:, flag] = seen.float()
    data = replace(batch, inputs={**batch.inputs, "labs": labs})
    found = rescaling(columns, column_sums(columns, data), 0.0)["labs"]
    assert found.centers[0] == pytest.approx(0.7, abs=0.03)
    assert found.scales[0] == pytest.approx(0.4, abs=0.03)
    after = found(labs)
    assert float(after[seen, place].mean()) == pytest.approx(0, abs=0.01)
    assert float(after[seen, place].std()) == pytest.approx(1, abs=0.02)
    assert not after[~seen, place].any()
    torch.testing.assert_close(after[:, flag], labs[:, flag])


@pytest.mark.parametrize(("noise", "expected"), [(0.0, 0.016), (0.2, 0.02), (1.0, 0.0447), (40.0, 0.2)])
def test_a_narrow_column_is_scaled_as_finely_as_noise_lets(noise: float, expected: float) -> None:
    """Of a range alone a quarter counts as 1: values 8 +- 2 of 0 to 500 were five times too small afterwards."""
    columns = numeric_columns(study_of(), ["labs"])[:1]
    number, bound = 4000.0, columns[0].bound
    values = torch.randn(4000, dtype=torch.float64, generator=torch.Generator().manual_seed(0)) * 0.016 + 0.5
    sums = torch.tensor(
        [[number], [float((values / bound).sum())], [float(((values / bound) ** 2).sum() - number / 2)]]
    )
    assert rescaling(columns, sums.double(), noise)["labs"].scales[0] == pytest.approx(expected, rel=0.05)


def test_a_column_that_too_few_patients_have_keeps_the_public_scale() -> None:
    """And whatever noise makes of the sums, center and scale stay sane."""
    columns = numeric_columns(study_of(), ["labs"])[:1]
    for count, first, second in [(30.0, 20.0, 5.0), (-4.0, 3.0, 1.0), (0.0, 0.0, 0.0), (39.0, -300.0, 500.0)]:
        found = rescaling(columns, torch.tensor([[count], [first], [second]]).double(), 5.0)["labs"]
        assert (found.centers, found.scales) == ((0.0,), (1.0,)), "sd of the mean: 5 * bound / 39 > 1/4"
    found = rescaling(columns, torch.tensor([[500.0], [-900.0], [4000.0]]).double(), 5.0)["labs"]
    assert found.centers == (-columns[0].bound,)
    assert 0.2 <= found.scales[0] <= 5.0


@pytest.mark.parametrize(
    ("counts", "kind", "expected"),
    [
        ([[30.0, 10.0]], "binary", [0.25]),
        ([[-3.0, 10.0]], "binary", [1.0]),
        ([[-3.0, -1.0]], "binary", [0.5]),
        ([[10.0, 30.0, -2.0]], "multiclass", [0.25, 0.75, 0.0]),
        ([[-1.0, -1.0, -1.0]], "multiclass", [1 / 3, 1 / 3, 1 / 3]),
        ([[1.0, 3.0], [5.0, 0.0]], "multilabel", [0.75, 0.0]),
    ],
)
def test_noised_counts_become_shares(counts: list[list[float]], kind: str, expected: list[float]) -> None:
    assert shares(np.array(counts), kind) == pytest.approx(expected)


def test_log_odds_predict_the_shares_and_are_never_infinite() -> None:
    assert torch.sigmoid(torch.tensor(log_odds([0.2, 0.6], "multilabel"))).tolist() == pytest.approx([0.2, 0.6])
    assert torch.softmax(torch.tensor(log_odds([0.2, 0.3, 0.5], "multiclass")), 0).tolist() == pytest.approx(
        [0.2, 0.3, 0.5]
    )
    assert log_odds([0.0, 1.0], "multilabel") == pytest.approx([math.log(0.01 / 0.99), math.log(0.99 / 0.01)])


@pytest.mark.parametrize("task", TASKS)
def test_a_model_starts_at_its_prior_in_the_fusion_and_in_every_vote(task: str) -> None:
    of = study_of(task)
    share = {"binary": [0.2], "multiclass": [0.2, 0.3, 0.5], "multilabel": [0.2, 0.6]}[task]
    batch = canaries(of, HELD, (1, 2, 1), 0)
    constants = Constants(offset=log_odds(share, of.task.kind))
    plain, offset = MultimodalModel(of, HELD), MultimodalModel(of, HELD, constants)
    before, after = (model(batch.inputs, batch.present, batch.present) for model in (plain, offset))
    moved = torch.tensor(constants.offset).expand_as(before.logits)
    torch.testing.assert_close(after.logits - before.logits, moved)
    for row, column in batch.present.nonzero().tolist():
        torch.testing.assert_close(after.modality_logits[row, column] - before.modality_logits[row, column], moved[0])
    assert not after.modality_logits[~batch.present].any()


def test_constants_survive_a_model_card() -> None:
    kept = Constants(
        offset=(0.5,), rescaling={"labs": Rescaling(values=(0,), flags=(1,), centers=(0.1,), scales=(2.0,))}
    )
    assert Constants.from_dict(kept.to_dict()) == kept
    assert Constants.from_dict(Constants().to_dict()) == Constants()


# Order and price.


def charged(site: Participant) -> list[str]:
    return [entry.body["event"]["released"] for entry in read_ledger(site.state).entries if entry.kind == "charge"]


def ready(folder: Path, of: Study, **policy: Any) -> Participant:
    hospital = build(folder, "north", patients=60)
    hospital.update("policy", **{"epsilon": 40.0, **policy})
    hospital.update("patients", declared=60)
    return participant(hospital, of)


def test_every_release_is_charged_before_the_data_are_touched_and_kept_before_it_is_used(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    site = ready(tmp_path / "a", study_of())
    seen: dict[str, list[str]] = {}
    real = Participant.training.func  # type: ignore[attr-defined]

    def touch(self: Participant) -> Batch:
        seen["touched"] = [entry.kind for entry in read_ledger(site.state).entries]
        return real(self)  # type: ignore[no-any-return]

    monkeypatch.setattr(participant_module.Participant, "training", property(touch))
    real_offset = preparation.log_odds
    monkeypatch.setattr(
        preparation,
        "log_odds",
        lambda *given: (
            seen.setdefault("used", [entry.kind for entry in read_ledger(site.state).entries]) and real_offset(*given)
        ),
    )
    order = []
    for name in ("label_counts", "column_sums"):
        work = getattr(preparation, name)
        monkeypatch.setattr(
            preparation,
            name,
            lambda *given, work=work, name=name: order.append((name, charged(site)[-1])) or work(*given),
        )
    site.prepare(RUN)
    assert order == [
        ("label_counts", "class balance of the training patients"),
        ("column_sums", "means and spreads of the columns"),
    ]
    assert seen["used"] == ["open", "approve", "charge", "value"]
    assert [entry.kind for entry in read_ledger(site.state).entries] == [
        *("open", "approve", "charge", "value", "charge", "value", "reserve"),
    ]


def test_no_data_are_read_before_the_first_charge(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    site = ready(tmp_path / "a", study_of())
    before: list[list[str]] = []
    real = participant_module.load_cohort
    monkeypatch.setattr(
        participant_module, "load_cohort", lambda *given, **named: before.append(charged(site)) or real(*given, **named)
    )
    site.prepare(RUN)
    assert before == [["class balance of the training patients"]]


def test_values_are_used_again_by_a_restart_and_by_a_second_run_at_no_cost(tmp_path: Path) -> None:
    site = ready(tmp_path / "a", study_of())
    site.prepare(RUN)
    first = site.learner.constants
    assert first.offset
    assert first.rescaling.keys() == {"labs", "vitals"}
    spent = charged(site)
    again = ready(tmp_path / "b", study_of())
    again.state = site.state
    for run in (RUN, "run-2"):
        again.prepare(run)
        assert again.learner.constants == first
    assert charged(site) == spent
    other = ready(tmp_path / "c", study_of(seed=9))
    other.state = site.state
    other.prepare("run-3")
    assert len(charged(site)) == 2 * len(spent), "another study is another release"
    assert other.learner.constants != first


def test_after_a_crash_between_charge_and_value_the_release_is_made_once_more(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    site = ready(tmp_path / "a", study_of(preparation={"class_balance": "noisy"}))

    with monkeypatch.context() as patch:
        patch.setattr(preparation, "label_counts", die)
        for _ in range(2):
            with pytest.raises(RuntimeError):
                site.prepare(RUN)
    site.prepare(RUN)
    kinds = [entry.kind for entry in read_ledger(site.state).entries]
    assert kinds == ["open", "approve", "charge", "recompute", "charge", "value", "reserve"]


def test_noise_is_what_the_event_says() -> None:
    """Two-sided: 4000 numbers of each; their sd is within 10 % but for about one draw in 10^7."""
    of = study_of()
    event = balance_event(of)
    counts = np.array(noised_counts([7] * 4000, event)) - 7
    ratio = math.exp(-1 / event.noise_multiplier)
    assert np.sqrt(np.mean(counts**2)) == pytest.approx(math.sqrt(2 * ratio) / (1 - ratio), rel=0.1)
    assert set(counts % 1) == {0.0}
    sums = np.array(noised_sums(torch.full((4000,), 3.25).double(), 20.0)) - 3.25
    assert np.sqrt(np.mean(sums**2)) == pytest.approx(20.0, rel=0.1)


def test_a_sites_values_have_the_noise_of_their_events(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    of, asked = study_of(), []
    monkeypatch.setattr(preparation, "noised_sums", lambda sums, noise: asked.append(noise) or sums.flatten().tolist())
    monkeypatch.setattr(
        preparation, "discrete_laplace", lambda scale, draws: asked.append((scale, type(draws))) or 1000
    )
    site = ready(tmp_path / "a", of)
    site.prepare(RUN)
    balance, statistics = balance_event(of), statistics_event(of, HELD, 1e-5)
    noise = statistics.noise_multiplier * statistics.max_grad_norm
    assert asked == [*[(balance.noise_multiplier, SecretDraws)] * 2, noise]
    charges = [event for event in read_ledger(site.state).events() if event.kind != "dp_sgd"]
    assert charges == [balance, statistics]
    counts, _ = (entry.body["value"] for entry in read_ledger(site.state).entries if entry.kind == "value")
    assert counts == (label_counts(of, site.training).flatten() + 1000).tolist()


@pytest.mark.parametrize("asked", [{}, {"class_balance": "noisy"}, {"standardisation": "noisy"}, NOISY], ids=str)
def test_the_plan_pays_for_preparation_out_of_the_studys_epsilon(tmp_path: Path, asked: dict[str, str]) -> None:
    of = study_of(preparation=asked)
    site = ready(tmp_path / "a", of)
    capability = site.prepare(RUN)
    plain = ready(tmp_path / "b", study_of(preparation={})).prepare(RUN)
    assert 7.9 < capability.plan["epsilon"] <= 8
    assert (capability.plan["noise_multiplier"] > plain.plan["noise_multiplier"]) == bool(asked)
    assert [event["released"] for event in capability.plan["preparation"]] == charged(site)
    view = read_ledger(site.state)
    assert epsilon([*view.events(), *view.outstanding()], 1e-5) <= 8


def test_each_release_costs_its_share() -> None:
    of = study_of()
    for event, share in [
        (balance_event(of), BALANCE_SHARE),
        (statistics_event(of, HELD, 1e-5), STATISTICS_SHARE),
        (count_event(of), 0.05),
    ]:
        assert share * 8 * 0.97 < epsilon([event], 1e-5) <= share * 8 * 1.005
    assert balance_event(study_of("multilabel")).noise_multiplier == 2 * balance_event(of).noise_multiplier


def test_declared_prevalences_cost_nothing(tmp_path: Path) -> None:
    site = ready(tmp_path / "a", study_of(preparation={"class_balance": 0.3}))
    site.prepare(RUN)
    assert site.learner.constants.offset == pytest.approx((math.log(0.3 / 0.7),))
    assert charged(site) == []


def test_a_site_without_counts_refuses_before_any_charge(tmp_path: Path) -> None:
    site = ready(tmp_path / "a", study_of(), releases=["update"])
    with pytest.raises(
        RefusedError, match="noised statistics of the training patients, and the site releases no counts"
    ):
        site.prepare(RUN)
    assert charged(site) == []


def test_a_cap_without_room_for_preparation_is_a_refusal(tmp_path: Path) -> None:
    site = ready(tmp_path / "a", study_of(), epsilon=0.1)
    with pytest.raises(BudgetExhausted):
        site.prepare(RUN)
    assert charged(site) == []


def test_without_privacy_the_same_values_are_exact_and_the_ledger_says_so(tmp_path: Path) -> None:
    of = plan_of(private=False, preparation=NOISY)
    site = ready(tmp_path / "a", of, unnoised="allow")
    site.prepare(RUN)
    counts, sums = (entry.body["value"] for entry in read_ledger(site.state).entries if entry.kind == "value")
    assert counts == label_counts(of, site.training).flatten().tolist()
    assert sums == column_sums(numeric_columns(of, HELD), site.training).flatten().tolist()
    assert {event.kind for event in read_ledger(site.state).events()} == {"unnoised"}
