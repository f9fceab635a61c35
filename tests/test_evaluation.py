"""How well a model does, told by a deployed site: of which model, at which price, in which order, and what of it."""

from __future__ import annotations

import json
import subprocess
import sys
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from hospitals import build, die, participant, plan_of
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor

from gapweave.client import participant as participant_module
from gapweave.client import preparation
from gapweave.client.audit_site import joined
from gapweave.client.canaries import canaries
from gapweave.client.evaluation import ReleasedModel, _blocks, score_table
from gapweave.client.joining import joining_check
from gapweave.client.participant import Participant
from gapweave.client.predict import load_site_model
from gapweave.client.preparation import noised_counts
from gapweave.client.recovery import recover
from gapweave.client.state import RoundState, RunFolder
from gapweave.server.aggregation import initial_groups
from gapweave.shared.config.study import Study
from gapweave.shared.constants import Constants
from gapweave.shared.errors import BudgetExhausted, RefusedError
from gapweave.shared.model import MultimodalModel
from gapweave.shared.privacy.accountant import epsilon
from gapweave.shared.privacy.draws import SecretDraws
from gapweave.shared.privacy.ledger import LEDGER_FILE, LedgerView, read_ledger
from gapweave.shared.privacy.once import NO_NOISE, NOT_ALLOWED, NOT_ASKED, TOO_FEW, table_event, table_scale
from gapweave.shared.privacy.plan import make_plan
from gapweave.shared.tables import BINS
from gapweave.shared.tensorfile import Arrays

RUN = "run-1"
HELD = ["labs", "note", "vitals"]
TASKS: dict[str, dict[str, Any]] = {
    "binary": {"kind": "binary", "label": "y"},
    "multiclass": {"kind": "multiclass", "label": "y", "classes": ["a", "b", "c"]},
    "multilabel": {"kind": "multilabel", "label": ["y", "z"]},
}


pytestmark = pytest.mark.usefixtures("fresh_sites")


def study_of(task: str = "binary", **keys: Any) -> Study:
    """Half of the patients are held out; epsilon 2 and 600 declared patients are enough for a table."""
    kept = {"evaluation": {"test_fraction": 0.5, "epsilon": 2.0}, **keys}
    return plan_of(private=True, task=TASKS[task], **kept)


def ready(folder: Path, of: Study, declared: int | None = 600, **policy: Any) -> Participant:
    hospital = build(folder, "north", patients=60)
    hospital.update("policy", **{"epsilon": 40.0, **policy})
    hospital.update("patients", declared=declared)
    return participant(hospital, of)


def shared_of(site: Participant) -> Arrays:
    start = initial_groups(site.study)
    return {group: start[group] for group in site.shared}


def trained(folder: Path, of: Study, **keys: Any) -> Participant:
    """A site after one round."""
    site = ready(folder, of, **keys)
    site.prepare(RUN)
    site.train(RUN, 1, "request 1", shared_of(site))
    return site


def kinds(site: Participant) -> list[str]:
    return [entry.kind for entry in read_ledger(site.state).entries]


def charged(site: Participant) -> list[str]:
    return [entry.body["event"]["released"] for entry in read_ledger(site.state).entries if entry.kind == "charge"]


def released_model(of: Study, held: list[str] | None = None) -> ReleasedModel:
    """A released model without a site: a ledger that holds everything."""

    class Everything:
        view = type("View", (), {"charged": staticmethod(lambda request: True)})

    initial = {
        group: {name: torch.from_numpy(value) for name, value in part.items()}
        for group, part in initial_groups(of).items()
    }
    return ReleasedModel(
        of,
        initial=initial,
        trained=RoundState(),
        received={},
        constants=Constants(),
        ledger=Everything(),  # type: ignore[arg-type]
    )


# One patient, one cell.

STRANGE = st.sampled_from([0.0, 1.0, -1.0, 1e30, -1e30, float("nan"), float("inf"), -float("inf")])


@pytest.mark.parametrize("task", TASKS)
@settings(deadline=None, max_examples=25)
@given(records=st.integers(1, 6), value=STRANGE, seed=st.integers(0, 30), odd=st.booleans(), last=st.booleans())
def test_one_patient_changes_one_cell_of_each_table_of_scores(
    task: str, records: int, value: float, seed: int, odd: bool, last: bool
) -> None:
    of = study_of(task)
    model = released_model(of)
    rest, one = canaries(of, HELD, (1, 2, 3), seed), canaries(of, HELD, (records,), seed + 1)
    if odd:
        one = replace(one, inputs={name: torch.full_like(rows, value) for name, rows in one.inputs.items()})
    together = joined(rest, one) if last else joined(one, rest)
    change = score_table(model, together) - score_table(model, rest)
    assert change.shape == (of.task.outputs, 2, BINS)
    assert np.abs(change).sum((1, 2)).tolist() == [1] * of.task.outputs
    assert (change >= 0).all()


def test_the_index_record_is_the_first_with_data_and_its_labels_do_not_choose_it() -> None:
    of = study_of("multilabel")
    model = released_model(of)
    batch = canaries(of, HELD, (3, 2), 0)
    present, known = batch.present.clone(), batch.label_mask.clone()
    present[0] = False
    known[1, 0] = False
    counts = score_table(model, replace(batch, present=present, label_mask=known))
    assert counts.sum((1, 2)).tolist() == [1, 2], "the second record counts, and has only the second label"
    alone = score_table(model, replace(batch, present=present, label_mask=known).of_patients(torch.tensor([0])))
    row = batch.rows(torch.tensor([1]))
    place = int(
        np.searchsorted([0.05, 0.1, 0.2, 0.3, 0.4, 0.5, 0.6, 0.75, 0.9], float(model.scores(row)[0, 1]), "right")
    )
    assert alone[1, int(batch.target[1, 1]), place] == 1
    nobody = score_table(model, replace(batch, present=torch.zeros_like(present)))
    assert nobody.sum() == 0, "a patient without data has no score: a fallback prior would be un-noised"


def test_a_score_does_not_depend_on_who_else_is_there() -> None:
    """Else a score at a bin's edge could change with a patient more, and sensitivity would not be 1."""
    of = study_of()
    model, batch = released_model(of), canaries(of, HELD, (1,) * 300, 0)
    seen: list[int] = []
    real = model.scores

    def bits(patients: list[int]) -> dict[int, bytes]:
        found = {}
        for block in _blocks(batch, patients):
            scores = real(batch.rows(block.clamp(min=0))).numpy()
            found |= {row: scores[at].tobytes() for at, row in enumerate(block.tolist()) if row >= 0}
        return found

    everybody = bits(list(range(300)))
    assert len(everybody) == 300
    generator = np.random.default_rng(0)
    for share in (0.01, 0.1, 0.5, 0.99):
        some = bits(np.flatnonzero(generator.random(300) < share).tolist())
        assert some == {row: everybody[row] for row in some}
    model.scores = lambda records: seen.append(len(records)) or real(records)  # type: ignore[method-assign, func-returns-value]
    score_table(model, batch)
    assert set(seen) == {16}


def test_cells_get_the_noise_of_the_event(monkeypatch: pytest.MonkeyPatch) -> None:
    event = table_event(study_of("multiclass"), 5000)
    assert not isinstance(event, str)
    assert (event.kind, event.steps, event.noise_multiplier) == ("count_table", 3, 3 / 2.0)
    asked = []
    monkeypatch.setattr(preparation, "discrete_laplace", lambda scale, draws: asked.append((scale, type(draws))) or -9)
    assert noised_counts([4] * 60, event) == [-5.0] * 60
    assert asked == [(1.5, SecretDraws)] * 60


# Only a released model.

SNIPPET = """
from gapweave.client.evaluation import ReleasedModel, score_table
from gapweave.client.predict import SiteModel
from gapweave.shared.model import MultimodalModel
from gapweave.shared.schema import Batch


def tables(released: ReleasedModel, kept: SiteModel, local: MultimodalModel, test: Batch) -> None:
    score_table(released, test)
    score_table(kept, test)
    score_table(local, test)
    score_table(kept.model, test)
"""


@pytest.mark.long
def test_the_type_checker_refuses_a_table_of_any_other_model(tmp_path: Path) -> None:
    """Site models (fine-tuned ones too) and networks of baselines are other types."""
    root = Path(__file__).parents[1]
    for name in ("client", "server", "shared", "sites"):
        (tmp_path / "gapweave").mkdir(exist_ok=True)
        (tmp_path / "gapweave" / name).symlink_to(root / name)
    (tmp_path / "snippet.py").write_text(SNIPPET)
    command = [sys.executable, "-m", "mypy", "--config-file", str(root / "pyproject.toml"), "--namespace-packages"]
    found = subprocess.run(
        [*command, "--explicit-package-bases", "--follow-imports=silent", "snippet.py"],
        cwd=tmp_path,
        capture_output=True,
        text=True,
        check=False,
    ).stdout
    lines = {line.split(":")[1] for line in found.splitlines() if "arg-type" in line}
    assert lines == {"10", "11", "12"}, found
    assert found.count("error:") == 3, found


def test_a_table_of_any_other_model_fails_when_it_is_made(tmp_path: Path) -> None:
    of = study_of()
    batch = canaries(of, HELD, (1,), 0)
    for other in (MultimodalModel(of, HELD), object()):
        with pytest.raises(TypeError, match="only a released model"):
            score_table(other, batch)  # type: ignore[arg-type]


def test_a_model_that_the_ledger_did_not_pay_for_is_no_released_model(tmp_path: Path) -> None:
    site = trained(tmp_path / "a", study_of())
    with site.ledger() as ledger:
        stray = replace(RunFolder(site.state, RUN).load(), request="of another site")
        with pytest.raises(RefusedError, match="does not hold the training"):
            site._released(ledger, stray, shared_of(site))


def test_the_scored_model_is_the_final_one_and_not_the_fine_tuned_one(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    of = study_of(training={"finetune": True, "finetune_steps": 2})
    site = trained(tmp_path / "a", of)
    monkeypatch.setattr(LedgerView, "closed", lambda ledger, run: False)
    site.finish(RUN, shared_of(site))
    scored: list[ReleasedModel] = []
    real = score_table
    monkeypatch.setattr(
        participant_module, "score_table", lambda model, test: scored.append(model) or real(model, test)
    )
    site.evaluate(RUN, "evaluate", shared_of(site))
    folder = RunFolder(site.state, RUN).path
    final, tuned = (load_site_model(folder / f"{name}.safetensors").model for name in ("model", "finetuned"))
    records = site.cohort.testing()

    def score(model: MultimodalModel) -> Tensor:
        with torch.no_grad():
            return torch.sigmoid(model(records.inputs, records.present, records.present).logits).double().flatten()

    def apart(one: MultimodalModel, other: MultimodalModel) -> float:
        """Over all records: how far noise moves a single one is chance."""
        return float((score(one) - score(other)).abs().max())

    scores = scored[0].scores(records).double().flatten()
    torch.testing.assert_close(scores, score(final), rtol=0, atol=1e-6)
    assert apart(final, tuned) > 1e-4
    assert apart(final, site.learner.model) > 1e-4, "the site's own object was fine-tuned in place"


def test_no_release_opens_what_stays_at_the_site(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Fine-tuned weights, kept models and scores of baselines: read by people who predict, never by a reply."""
    of = study_of(training={"finetune": True, "finetune_steps": 2})
    site = trained(tmp_path / "a", of)
    site.evaluate(RUN, "evaluate", shared_of(site))
    site.finish(RUN, shared_of(site))
    folder = RunFolder(site.state, RUN).path
    assert (folder / "finetuned.safetensors").exists()
    joining_check(of, site.cohort, RunFolder(site.state, RUN))
    own = {file.name for file in folder.iterdir()} - {"round.safetensors", "study.json"}
    assert own >= {"joining.json", "report.html", "local.safetensors", "lr_local.safetensors", "gbm_local.safetensors"}
    opened: list[str] = []
    reads = Path.read_bytes, Path.read_text, Path.open
    for name, real in zip(("read_bytes", "read_text", "open"), reads, strict=True):
        monkeypatch.setattr(
            Path, name, lambda self, *given, real=real, **named: opened.append(self.name) or real(self, *given, **named)
        )
    fresh = ready(tmp_path / "b", of)
    fresh.state = site.state
    for run in (RUN, "run-2"):
        fresh.prepare(run)
        if run == "run-2":
            fresh.train(run, 1, "request 2", shared_of(fresh))
        fresh.evaluate(run, "evaluate" if run == RUN else "evaluate 2", shared_of(fresh))
    assert "round.safetensors" in opened
    assert not own & set(opened)


# Order, price, repetition.


def test_a_table_is_charged_before_the_test_patients_are_read_and_kept_before_it_leaves(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    of = study_of()
    before = trained(tmp_path / "a", of)
    site = ready(tmp_path / "b", of)
    site.state = before.state
    at_reading: list[str] = []
    real = participant_module.load_cohort
    monkeypatch.setattr(
        participant_module,
        "load_cohort",
        lambda *given, **named: at_reading.extend(kinds(site)) or real(*given, **named),
    )
    site.evaluate(RUN, "evaluate", shared_of(site))
    assert at_reading == ["open", "approve", "reserve", "charge", "released", "charge"]
    assert kinds(site) == [*at_reading, "value", "released"]
    assert charged(site)[-1] == "scores of the test patients"


def test_a_model_that_the_ledger_does_not_know_costs_nothing(tmp_path: Path) -> None:
    """After a declared loss each request for a table was charged, and refused then."""
    site = trained(tmp_path / "a", study_of())
    (site.state / LEDGER_FILE).unlink()
    recover(site.state, site.site, None, 2.0)
    for _ in range(2):
        with pytest.raises(RefusedError, match="does not hold the training of this model"):
            site.evaluate(RUN, "evaluate", shared_of(site))
    assert "charge" not in kinds(site)


def test_the_same_request_again_gives_the_same_table_and_no_event_also_after_a_restart(tmp_path: Path) -> None:
    of = study_of()
    site = trained(tmp_path / "a", of)
    first = site.evaluate(RUN, "evaluate", shared_of(site))
    entries = kinds(site)
    restarted = ready(tmp_path / "b", of)
    restarted.state = site.state
    for again in (site, restarted):
        assert json.dumps(dict(again.evaluate(RUN, "evaluate", shared_of(site)))) == json.dumps(dict(first))
    site.finish(RUN, shared_of(site))
    assert site.evaluate(RUN, "evaluate", shared_of(site)) == first
    assert kinds(site) == [*entries, "close"]
    assert np.shape(first["table"]) == (1, 2, BINS)


def test_a_second_table_of_a_run_is_refused(tmp_path: Path) -> None:
    site = trained(tmp_path / "a", study_of())
    site.evaluate(RUN, "evaluate", shared_of(site))
    before = kinds(site)
    other = {group: {name: value + 1 for name, value in part.items()} for group, part in shared_of(site).items()}
    with pytest.raises(RefusedError, match="was charged for another request"):
        site.evaluate(RUN, "evaluate another", other)
    assert kinds(site) == before


def test_after_a_crash_between_charge_and_table_it_is_made_once_more(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    site = trained(tmp_path / "a", study_of())

    with monkeypatch.context() as patch:
        patch.setattr(participant_module, "score_table", die)
        for _ in range(2):
            with pytest.raises(RuntimeError):
                site.evaluate(RUN, "evaluate", shared_of(site))
    site.evaluate(RUN, "evaluate", shared_of(site))
    assert kinds(site)[-5:] == ["charge", "recompute", "charge", "value", "released"]


def test_a_run_that_trained_nothing_or_is_over_gives_no_table(tmp_path: Path) -> None:
    site = ready(tmp_path / "a", study_of())
    site.prepare(RUN)
    with pytest.raises(RefusedError, match="trained nothing here"):
        site.evaluate(RUN, "evaluate", shared_of(site))
    site.train(RUN, 1, "request 1", shared_of(site))
    site.finish(RUN, shared_of(site))
    with pytest.raises(RefusedError, match="this run is over"):
        site.evaluate(RUN, "evaluate", shared_of(site))
    with pytest.raises(RefusedError, match="other parameter groups"):
        site.evaluate(RUN, "evaluate", {})
    assert "scores of the test patients" not in charged(site)


def test_the_plan_pays_for_the_table_out_of_the_studys_epsilon(tmp_path: Path) -> None:
    of, without = study_of(), study_of(evaluation={"test_fraction": 0.5, "epsilon": None})
    plan, bare = (make_plan(each, 5000, 1e-5) for each in (of, without))
    assert plan.table is not None
    assert plan.noise_multiplier > bare.noise_multiplier
    assert 7.9 < epsilon(plan.schedule(), 1e-5) <= 8
    site = trained(tmp_path / "a", of)
    site.evaluate(RUN, "evaluate", shared_of(site))
    view = read_ledger(site.state)
    assert epsilon([*view.events(), *view.outstanding()], 1e-5) <= 8
    assert table_event(of, 5000).noise_multiplier == table_scale(of) == 1 / 2.0  # type: ignore[union-attr]


def test_a_table_costs_at_most_a_quarter_of_the_studys_epsilon() -> None:
    event = table_event(study_of(privacy={"epsilon": 1.0}), 100_000)
    assert not isinstance(event, str)
    assert epsilon([event], 1e-5) <= 0.25


def test_a_cap_that_is_spent_on_rounds_leaves_no_table(tmp_path: Path) -> None:
    site = ready(tmp_path / "a", study_of(), epsilon=7.0)
    site.prepare(RUN)
    site.train(RUN, 1, "request 1", shared_of(site))
    for number in (2, 3):
        try:
            site.train(RUN, number, f"request {number}", shared_of(site))
        except BudgetExhausted:
            break
    with pytest.raises(BudgetExhausted):
        site.evaluate(RUN, "evaluate", shared_of(site))


# Who gives none.


@pytest.mark.parametrize(
    ("of", "n_hat", "reason"),
    [
        (study_of(), 499, TOO_FEW),
        (study_of(evaluation={"test_fraction": 0.2, "epsilon": 2.0}), 1999, TOO_FEW),
        (study_of(evaluation={"folds": 5, "epsilon": 2.0}), 1999, TOO_FEW),
        (study_of(evaluation={"test_fraction": 0.0}), 10**9, TOO_FEW),
        (study_of(evaluation={"test_fraction": 0.5, "epsilon": None}), 10**6, NOT_ASKED),
        (plan_of(private=False, evaluation={"test_fraction": 0.5}), 10**6, NO_NOISE),
    ],
)
def test_why_a_site_gives_no_table(of: Study, n_hat: int, reason: str) -> None:
    assert table_event(of, n_hat) == reason
    assert make_plan(of, n_hat, 1e-5).no_table == reason
    if reason == TOO_FEW and n_hat < 10**9:
        assert not isinstance(table_event(of, n_hat + 1), str)


def test_too_few_patients_charge_nothing_and_say_so(tmp_path: Path) -> None:
    site = trained(tmp_path / "a", study_of(), declared=60)
    before = kinds(site)
    assert site.evaluate(RUN, "evaluate", shared_of(site)) == {
        "table": None,
        "reason": "too few patients for this privacy level",
    }
    assert kinds(site) == before


def test_a_site_that_releases_updates_only_trains_and_gives_no_table(tmp_path: Path) -> None:
    site = trained(tmp_path / "a", study_of(), releases=["update"])
    assert site.evaluate(RUN, "evaluate", shared_of(site)) == {"table": None, "reason": NOT_ALLOWED}
    assert charged(site) == ["update of round 1"]
    assert (
        read_ledger(site.state).events()[0].noise_multiplier
        == make_plan(study_of(), 600, 1e-5, tables=False).noise_multiplier
    ), "nor does its plan pay for one"


def test_a_site_that_releases_updates_only_must_declare_its_patients(tmp_path: Path) -> None:
    site = ready(tmp_path / "a", study_of(), declared=None, releases=["update"])
    with pytest.raises(RefusedError) as refused:
        site.prepare(RUN)
    assert str(refused.value) == (
        "north:policy.releases: `patients.declared` is not set: the number of patients would be counted, and the site "
        "releases no counts. Add `counts`, or declare patients.declared and take part in studies with public values only"
    )
    assert charged(site) == []
    with pytest.raises(RefusedError, match="releases no model updates"):
        ready(tmp_path / "b", study_of(), releases=["counts"]).prepare(RUN)
