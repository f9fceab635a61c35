"""Is a site better off than alone? What it is told, what predicts, and that nothing of it leaves."""

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
from cohorts import Hospital
from commandline import OPEN, QUICK, done, gapweave, hospitals, site_file, summary_of
from hospitals import Wire, build, plan_of, publish
from sklearn.ensemble import HistGradientBoostingClassifier
from typer.testing import CliRunner

from gapweave.client import classical, cli
from gapweave.client.calibration import Calibration, to_prevalence
from gapweave.client.classical import Classical, fit_classical
from gapweave.client.data import Cohort
from gapweave.client.finetuning import fine_tune, judge
from gapweave.client.joining import joining_check
from gapweave.client.local_models import fit_local, fit_network, out_of_fold
from gapweave.client.mixture import MODELS, base_of, choose, load_mixture, mix
from gapweave.client.sources.split import validation_fold
from gapweave.client.state import RunFolder, read_model
from gapweave.client.training import Step, build_engine
from gapweave.server.app import run_study
from gapweave.shared import wire
from gapweave.shared.config.base import parse
from gapweave.shared.config.study import Study
from gapweave.shared.constants import Constants
from gapweave.shared.errors import UsageError
from gapweave.shared.joining import harmed, lines
from gapweave.shared.model import MultimodalModel, groups
from gapweave.shared.paired import Truth, losses
from gapweave.shared.privacy.draws import SeededDraws
from gapweave.shared.privacy.plan import make_plan
from gapweave.shared.report.joining_page import joining_page
from gapweave.shared.rundir import RunDirectory
from gapweave.shared.shrinkage import share_kept

RUN = "run-1"
pytestmark = pytest.mark.usefixtures("fresh_sites")


def study_of(**keys: Any) -> Study:
    return plan_of(private=False, **{"evaluation": {"test_fraction": 0.5}, **keys})


def cohort_of(folder: Path, of: Study, patients: int = 200, labels: list[int] | None = None) -> Cohort:
    """A hospital whose labels one laboratory value tells, or labels of one's own that nothing tells."""
    hospital = build(folder, "north", ["labs"], patients)
    if labels is not None:
        hospital.records(patients, y=labels)
    return hospital.load(of)


def kept(
    folder: Path, model: MultimodalModel, of: Study, cohort: Cohort, held: tuple[str, ...] = ("labs",)
) -> RunFolder:
    """The folder of a run that left this model at the site."""
    run = RunFolder(folder / "state", RUN)
    card = {
        "study": of.model_dump(mode="json"),
        "modalities": list(held),
        "prior": cohort.training().prevalence(),
        "patterns": ["labs"],
        "constants": Constants().to_dict(),
    }
    run.save_model("model", groups(model), card)
    return run


# Classical models without a pickle.


@pytest.mark.parametrize("name", ["lr", "gbm"])
def test_a_kept_classical_model_says_what_scikit_learn_says(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, name: str
) -> None:
    """Trees are read from private names of scikit-learn: this fails when they move."""
    of = study_of()
    training = cohort_of(tmp_path / "a", of, 240).training()
    fitted: list[Any] = []
    real = classical.CLASSICAL[name]
    monkeypatch.setitem(classical.CLASSICAL, name, lambda *given: fitted.append(real(*given)) or fitted[-1])
    model = fit_classical(of, training, name)
    again = Classical.parse(model.dump({}), of)
    expected = fitted[0].predict_proba(classical.flat_features(of, training, ["labs"]))
    assert len(np.unique(expected[:, 1])) > 10
    for found in (model, again):
        np.testing.assert_allclose(found(training).probabilities, expected, rtol=1e-9)
    if name == "gbm":
        assert isinstance(fitted[0][-1], HistGradientBoostingClassifier)


def test_out_of_fold_no_patient_is_judged_by_a_model_that_saw_it(tmp_path: Path) -> None:
    """A patient's own label, turned, does not change what is said of it."""
    of = study_of()
    cohort = cohort_of(tmp_path / "a", of, 80)
    training = cohort.training()
    folds = np.arange(training.patients) % 5
    before = out_of_fold(of, training, folds, "north")
    assert set(before) == {"local", "lr_local", "gbm_local"}
    target = training.target.clone()
    target[3] = 1 - target[3]
    after = out_of_fold(of, replace(training, target=target), folds, "north")
    for name, found in before.items():
        np.testing.assert_array_equal(found[3], after[name][3])
        assert not np.array_equal(found, after[name]), "others' models saw it"


def test_a_mixture_is_the_mean_of_logits() -> None:
    one, other = np.array([[0.2, 0.8]]), np.array([[0.9, 0.1]])
    logit = 0.25 * np.log(0.8 / 0.2) + 0.75 * np.log(0.1 / 0.9)
    positive = 1 / (1 + np.exp(-logit))
    np.testing.assert_allclose(mix([one, other], [0.25, 0.75], "binary"), [[1 - positive, positive]])
    np.testing.assert_allclose(mix([one[:, 1:], other[:, 1:]], [0.25, 0.75], "multilabel"), [[positive]])
    np.testing.assert_allclose(mix([one, other], [0.25, 0.75], "multiclass"), [[1 - positive, positive]])


def at_prevalence(probabilities: np.ndarray, of: Truth) -> np.ndarray:
    return Calibration(slope=1.0, shift=to_prevalence(probabilities, of))(probabilities, of.kind)


def test_a_blend_is_chosen_at_the_sites_own_prevalence() -> None:
    """The shift of the log-odds is the one of a logistic regression with an offset: its mean is the prevalence."""
    random = np.random.default_rng(0)
    logits = random.normal(size=400)
    target = (random.random(400) < 1 / (1 + np.exp(-(logits + 1.5)))).astype(float)
    of = Truth(
        target=target[:, None], known=np.ones((400, 1), np.bool_), patient=np.arange(400), patients=400, kind="binary"
    )
    found = at_prevalence(both(1 / (1 + np.exp(-logits))), of)[:, 1]
    assert found.mean() == pytest.approx(target.mean(), abs=1e-4)
    shifts = np.log(found / (1 - found)) - logits
    assert shifts.std() < 1e-6, "one shift for all"
    other = {shift: np.mean(losses(both(1 / (1 + np.exp(-(logits + shift)))), of)) for shift in np.linspace(0, 3, 301)}
    assert shifts[0] == pytest.approx(min(other, key=lambda shift: other[shift]), abs=0.02)
    classes = random.integers(0, 3, 300)
    votes = random.dirichlet([1, 2, 3], 300)
    three = replace(of, target=np.eye(3)[classes], known=np.ones((300, 3), np.bool_), patient=np.arange(300))
    moved = at_prevalence(votes, replace(three, patients=300, kind="multiclass"))
    np.testing.assert_allclose(moved.mean(0), np.eye(3)[classes].mean(0), atol=1e-3)
    again = at_prevalence(
        votes[:, :2], replace(three, target=np.eye(3)[classes][:, :2], known=three.known[:, :2], kind="multilabel")
    )
    np.testing.assert_allclose(again.mean(0), np.eye(3)[classes].mean(0)[:2], atol=1e-3)


# Fine-tuning and its gate.


def tuning(of: Study, cohort: Cohort) -> tuple[MultimodalModel, Step]:
    model = MultimodalModel(of, ["labs"])
    plan = make_plan(of, cohort.training().patients, 1e-5)
    return model, Step(study=of, plan=plan, engine=build_engine(model, of), draws=SeededDraws(0, "north", "tuning"))


FINETUNE = {"finetune": True, "finetune_steps": 3, "finetune_lr": 0.2, "finetune_pull": 0.5}


def test_validation_patients_take_no_part_in_fine_tuning(tmp_path: Path) -> None:
    """Their labels turned: the same parameters, another gate."""
    of = study_of(training=FINETUNE)
    cohort = cohort_of(tmp_path / "a", of)
    training, ids = cohort.training(), cohort.training_ids()
    validating = torch.tensor([validation_fold(patient, of.evaluation) == 0 for patient in ids])[training.patient]
    assert 10 <= int(validating.sum()) <= len(training) / 3
    turned = torch.where(validating.unsqueeze(1), 1 - training.target, training.target)
    results = []
    for data in (training, replace(training, target=turned)):
        model, step = tuning(of, cohort)
        results.append((fine_tune(model, data, ids, step), groups(model)))
    (gate, one), (other_gate, other) = results
    assert all(torch.equal(value, other[group][name]) for group, part in one.items() for name, value in part.items())
    assert gate.kept
    assert not other_gate.kept
    assert gate.patients == int(validating.sum())
    assert gate.gain is not None
    assert other_gate.gain is not None
    assert gate.gain > 0 > other_gate.gain


def test_fine_tuning_is_pulled_towards_the_federated_parameters(tmp_path: Path) -> None:
    """A second step by hand: w2 = w1 - lr (g(w1) + pull (w1 - w0)); every learning patient is in every step."""
    of = study_of(training={**FINETUNE, "finetune_steps": 2})
    cohort = cohort_of(tmp_path / "a", of)
    training, ids = cohort.training(), cohort.training_ids()
    learning = torch.tensor([validation_fold(patient, of.evaluation) != 0 for patient in ids]).nonzero()[:, 0]
    model, step = tuning(of, cohort)
    start = {name: value.detach().clone() for name, value in model.named.items()}
    size = round(0.8 * step.plan.n_hat)
    assert step.plan.sample_rate == 1
    batch = training.of_patients(learning)
    for _ in range(2):
        total = step.engine.sum(batch, batch.present, step.objective)
        with torch.no_grad():
            for name, value in model.named.items():
                value -= 0.2 * (total[name].float() / size + 0.5 * (value - start[name]))
    expected = {name: value.detach().clone() for name, value in model.named.items()}
    tuned, fresh = tuning(of, cohort)
    fine_tune(tuned, training, ids, fresh)
    for name, value in tuned.named.items():
        torch.testing.assert_close(value.detach(), expected[name], rtol=1e-4, atol=1e-6)


def test_of_fine_tuning_that_is_noise_little_is_kept(tmp_path: Path) -> None:
    """Two steps at a small budget: the change is as long as the noise in it, and shorter by the share that is kept."""
    changes = []
    for shrink in (False, True):
        settings: dict[str, Any] = {"aggregation": {"shrink": shrink}, "privacy": {"enabled": True, "epsilon": 0.05}}
        of = study_of(training={**FINETUNE, "finetune_steps": 2}, **settings)
        cohort = cohort_of(tmp_path / str(shrink), of)
        model, step = tuning(of, cohort)
        start = torch.cat([value.detach().flatten() for value in model.named.values()]).double()
        fine_tune(model, cohort.training(), cohort.training_ids(), step)
        changes.append(torch.cat([value.detach().flatten() for value in model.named.values()]).double() - start)
    whole, kept = changes
    assert step.plan.sample_rate == 1
    sd = 0.2 * step.plan.noise_multiplier * step.engine.sensitivity / round(0.8 * step.plan.n_hat)
    noise, square = len(whole) * sd**2 * (1 + (1 - 0.2 * 0.5) ** 2), float(whole @ whole)
    assert square == pytest.approx(noise, rel=0.3)
    share = share_kept(square, noise, len(whole))
    assert share < 0.6
    torch.testing.assert_close(kept, share * whole, rtol=1e-3, atol=1e-6 * float(whole.abs().max()))


def truth(positives: int, negatives: int) -> Truth:
    target = np.array([1.0] * positives + [0.0] * negatives).reshape(-1, 1)
    count = len(target)
    known = np.ones((count, 1), np.bool_)
    return Truth(target=target, known=known, patient=np.arange(count), patients=count, kind="binary")


def both(positive: Any) -> np.ndarray:
    return np.stack([1 - np.asarray(positive), np.asarray(positive)], axis=1)


def test_the_gate_wants_more_than_one_standard_error() -> None:
    half = both(np.full(20, 0.5))
    right = np.array([0.75] * 8 + [0.25] * 2 + [0.25] * 8 + [0.75] * 2)  # for 16 of 20
    gate = judge(half, both(right), truth(10, 10))
    each = [np.log(1.5)] * 16 + [np.log(0.5)] * 4
    assert gate.gain == pytest.approx(np.mean(each))
    assert gate.error == pytest.approx(np.std(each, ddof=1) / np.sqrt(20))
    assert gate.kept
    less = judge(half, both([0.75] * 7 + [0.25] * 3 + [0.25] * 7 + [0.75] * 3), truth(10, 10))  # for 14 of 20
    assert less.gain is not None
    assert less.gain > 0
    assert not less.kept
    assert not judge(half, half, truth(10, 10)).kept
    few = judge(both(np.full(14, 0.5)), both([0.9] * 4 + [0.1] * 10), truth(4, 10))
    assert not few.kept
    assert "too few" in few.why
    assert not judge(np.zeros((0, 2)), np.zeros((0, 2)), truth(0, 0)).kept


# Verdicts at sites of known worth.


def test_a_good_federated_model_is_better_than_a_small_sites_own(tmp_path: Path) -> None:
    """It was trained on the same law with 20 times the patients."""
    of = study_of(training={"rounds": 60, "lr": 2.0}, evaluation={"test_fraction": 0.85})
    many = cohort_of(tmp_path / "many", study_of(evaluation={"test_fraction": 0.1}), 1500)
    model = fit_network(of, many.training(), ["labs"], "many").model
    cohort = cohort_of(tmp_path / "few", of, 300)
    found = joining_check(of, cohort, kept(tmp_path, model, of, cohort))
    assert found["models"]["federated"]["verdict"] in ("better", "no worse")
    assert not harmed(found)
    assert not found["guessing"]


def test_a_useless_federated_model_is_worse_and_the_site_is_told(tmp_path: Path) -> None:
    of = study_of()
    cohort = cohort_of(tmp_path / "a", of)
    run = kept(tmp_path, MultimodalModel(of, ["labs"]), of, cohort)
    with torch.no_grad():
        model = MultimodalModel(of, ["labs"])
        for value in model.named.values():
            value.zero_()
    run = kept(tmp_path, model, of, cohort)
    found = joining_check(of, cohort, run)
    assert found["models"]["federated"]["auroc"] == 0.5
    assert found["models"]["federated"]["verdict"] == "worse"
    assert harmed(found)
    assert "federated: worse than alone: use your own model" in lines(found)
    assert "worse than alone" in joining_page(found)
    # Its own model is in use: whatever is chosen, the site is not worse off than alone.
    assert found["used"] in (found["strongest"], "blend")
    assert found["models"][found["used"]]["auroc"] > 0.8


def test_a_site_with_random_labels_is_told_that_nothing_predicts(tmp_path: Path) -> None:
    """An interval above 0.5 comes by chance in one of 40 such sites for each of the two models looked at."""
    of = study_of()
    labels = np.random.default_rng(0).integers(0, 2, 200).tolist()
    cohort = cohort_of(tmp_path / "a", of, 200, labels)
    model = fit_network(of, cohort_of(tmp_path / "b", of, 400).training(), ["labs"], "others").model
    found = joining_check(of, cohort, kept(tmp_path, model, of, cohort))
    assert found["guessing"]
    assert "no model here is known to be better than guessing" in lines(found)[-1]


def test_a_site_of_twenty_patients_is_told_that_it_is_too_small(tmp_path: Path) -> None:
    of = study_of(evaluation={"test_fraction": 0.2})
    cohort = cohort_of(tmp_path / "a", of, 20)
    found = joining_check(of, cohort, kept(tmp_path, MultimodalModel(of, ["labs"]), of, cohort))
    assert found["used"] == "federated", "too few to choose by"
    assert found["models"]["federated"]["verdict"] == "unclear"
    (line,) = lines(found)
    assert f"too few patients to tell ({cohort.testing().patients} held out, {found['rarer']} of the" in line
    nobody = cohort_of(tmp_path / "b", study_of(evaluation={"test_fraction": 0.0}), 20)
    found = joining_check(of, nobody, kept(tmp_path / "b", MultimodalModel(of, ["labs"]), of, nobody))
    assert found["models"]["federated"]["auroc"] is None
    assert any("0 held out" in line for line in lines(found))
    assert "Was it worth joining?" in joining_page(found)


def test_what_predicts_and_when(tmp_path: Path) -> None:
    of = study_of()
    cohort = cohort_of(tmp_path / "a", of)
    run = kept(tmp_path, fit_network(of, cohort.training(), ["labs"], "x").model, of, cohort)
    assert choose(run.path, "best") == ("federated", {"model": 1.0})
    for name in ("local", "blend"):
        with pytest.raises(UsageError, match="joining check"):
            choose(run.path, name)
    with pytest.raises(UsageError, match="no model is called"):
        choose(run.path, "lcoal")
    _, card = read_model(run.path / "model.safetensors")
    for kept_, name in ((True, "finetuned"), (False, "federated")):
        run.save_model("finetuned", groups(MultimodalModel(of, ["labs"])), {**card, "gate": {"kept": kept_}})
        assert base_of(run.path)[0] == choose(run.path, "best")[0] == name
    (run.path / "finetuned.safetensors").unlink()
    found = joining_check(of, cohort, run)
    assert choose(run.path, "best")[0] == found["used"]
    assert choose(run.path, "local")[0] == found["strongest"]
    test, alone = cohort.testing(), fit_local(of, cohort.training(), "north")
    for name in ("local", "lr_local", "gbm_local"):
        np.testing.assert_allclose(
            load_mixture(run.path, {name: 1.0}, of)(test).probabilities,
            alone[name](test).probabilities,
            rtol=1e-6,
        )
    assert set(MODELS) == {"best", "federated", "finetuned", "local", "blend"}


# What leaves: nothing.


def test_what_answers_a_server_does_not_even_import_the_check() -> None:
    code = (
        "import sys, gapweave.client.app, gapweave.client.supernode\n"
        "print([name for name in sys.modules if name.split('.')[-1] in "
        "('joining', 'local_models', 'classical', 'mixture', 'calibration', 'joining_page')])"
    )
    found = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True).stdout
    assert found.strip() == "[]"


def deployment(folder: Path, of: Study) -> list[Hospital]:
    result = []
    for name in ("east", "north"):
        hospital = build(folder / name, name, ["labs"], 60)
        hospital.update("policy", studies=[of.sha256], epsilon=60.0)
        hospital.update("patients", declared=30)
        hospital.update("server", connection="connection.yaml", key="site.key")
        publish(hospital)
        result.append(hospital)
    return result


def test_nothing_of_the_check_crosses_the_wire_or_gets_into_the_servers_files(tmp_path: Path) -> None:
    """A run, then the check at each site, then a second run over the same states."""
    of = plan_of(private=True, training=FINETUNE, evaluation={"test_fraction": 0.5, "epsilon": 2.0})
    there = deployment(tmp_path, of)
    run_study(Wire(there, simulation=False), of, RunDirectory.create(tmp_path / "one", of), RUN)
    checks = []
    for hospital in there:
        outcome = CliRunner().invoke(cli.site, ["report", str(hospital.site_file), "--json"])
        assert outcome.exit_code == 0, outcome.output
        checks.append(json.loads(outcome.output))
        kept_here = {file.name for file in (hospital.folder / "state" / "runs" / RUN).iterdir()}
        assert {"joining.json", "report.html", "local.safetensors", "gbm_local.safetensors"} <= kept_here
    grid = Wire(there, simulation=False)
    run_study(grid, of, RunDirectory.create(tmp_path / "two", of), "run-2")
    texts = [repr(wire.unpack(up)[0]) for *_, up in grid.log]
    for folder in ("one", "two"):
        texts += [file.read_bytes().decode("latin-1") for file in (tmp_path / folder).rglob("*") if file.is_file()]
    words = {"gate", "strongest", "lr_local", "gbm_local", "guessing", "joining.json"}
    figures = {
        repr(value)
        for check in checks
        for model in check["models"].values()
        for value in (model["auroc"], model["difference"])
        if value not in (None, 0.0, 0.5, 1.0)
    }
    assert figures
    for text in texts:
        assert not [word for word in words if f'"{word}"' in text or f"'{word}'" in text]
        assert not [figure for figure in figures if len(figure) > 8 and figure in text]


def test_status_and_report_tell_the_site(tmp_path: Path) -> None:
    from gapweave.client.service import finished_run, last_round

    of = plan_of(private=True, evaluation={"test_fraction": 0.5})
    there = deployment(tmp_path, of)
    run_study(Wire(there, simulation=False), of, RunDirectory.create(tmp_path / "one", of), RUN)
    east = there[0]
    state = east.folder / "state"
    before = last_round(state)
    assert before is not None
    assert before["joining"] is None
    outcome = CliRunner().invoke(cli.site, ["status", str(east.site_file)])
    assert "not looked at yet: gapweave site report" in outcome.output
    told = CliRunner().invoke(cli.site, ["report", str(east.site_file), "--run", RUN])
    assert told.exit_code == 0, told.output
    after = last_round(state)
    assert after is not None
    assert after["joining"]
    status = CliRunner().invoke(cli.site, ["status", str(east.site_file)]).output
    for line in after["joining"]:
        assert line in told.output
        assert f"joining     {line}" in status
    with pytest.raises(UsageError, match="finished no run 'other'"):
        finished_run(state, "other")


def test_a_public_score_with_the_best_local_model_is_an_own_model_too(tmp_path: Path) -> None:
    content = study_of().model_dump(mode="json")
    content["modalities"]["risk"] = {
        "kind": "public_score",
        "expression": "labs.sodium - 140",
        "low": -40,
        "high": 40,
    }
    of, held = parse(Study, content, "study"), ("labs", "vitals", "risk")
    cohort = build(tmp_path / "a", "north", ["labs", "vitals"], 120).load(of)
    run = kept(tmp_path, MultimodalModel(of, held), of, cohort, held)
    found = joining_check(of, cohort, run)
    shares = found["mixtures"]["score_local"]
    assert "score" in shares
    assert sum(shares.values()) == pytest.approx(1)
    assert found["models"]["score_local"]["verdict"] is None, "nothing of another site is in it"
    alone = fit_local(of, cohort.training(), "north")["score"]
    assert isinstance(alone, Classical)
    assert alone.read == ("risk",)


def test_a_simulation_makes_it_and_marks_it(tmp_path: Path) -> None:
    study = hospitals(tmp_path / "demo")
    run = tmp_path / "run"
    out = done("simulate", study, "--out", run, *QUICK, *OPEN, "--joining").out
    rows = summary_of(run)["sites"]
    for site, row in rows.items():
        assert row["joining"]["site"] == site
        for line in lines(row["joining"]):
            assert f"{site}: {line}" in out
    page = (run / "report.html").read_text(encoding="utf-8")
    assert "Was it worth joining?" in page
    assert "exact (simulation). At a hospital this page exists for the hospital alone" in page
    before = page
    done("report", run)
    assert (run / "report.html").read_text(encoding="utf-8") == before
    for model in ("best", "local", "blend", "federated"):
        told = done("predict", run, "--site", site_file(study, "alder"), "--model", model, "--out", tmp_path / model)
        assert "(model: " in told.out
    refused = gapweave("predict", run, "--site", site_file(study, "alder"), "--model", "lcoal")
    assert refused.code == 2
