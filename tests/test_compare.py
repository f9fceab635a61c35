"""`gapweave compare`: rows as the contract has them, seeds, folds, resuming, refusals, and numbers that agree."""

import csv
import json
import math
import shutil

import numpy as np
import pytest
import yaml
from sklearn.linear_model import LogisticRegression
from sklearn.pipeline import make_pipeline
from sklearn.preprocessing import StandardScaler

from gapweave.client.classical import CLASSICAL
from gapweave.client.data import load_cohort
from gapweave.shared.cli import main
from gapweave.shared.config import load_site, load_study
from gapweave.shared.config.overrides import METHODS
from gapweave.shared.errors import RefusedError
from gapweave.shared.files import alone
from gapweave.sites.demo import write_demo
from gapweave.sites.simulate import baselines, compare_unit
from gapweave.sites.simulate import compare as work
from gapweave.sites.simulate.compare_unit import load_scores

HOLDS = {"alder": ["labs"], "birch": ["labs", "note"], "cedar": ["note"]}
ROW = ["cell", "model", "seed", "fold", "site", "n_test", "positives", "metrics", "epsilon"]


@pytest.fixture(scope="module", autouse=True)
def quick_regression():
    """An untuned logistic regression: the comparison is tested here, not the baselines."""
    with pytest.MonkeyPatch.context() as patch:
        patch.setitem(
            CLASSICAL,
            "lr",
            lambda x, y, patient: make_pipeline(StandardScaler(), LogisticRegression(max_iter=500)).fit(x, y),
        )
        yield


@pytest.fixture(scope="module")
def study_file(tmp_path_factory):
    """A demo of three hospitals without series and images: a unit of it takes a second."""
    file = write_demo(tmp_path_factory.mktemp("demo") / "hospitals", holds=HOLDS, patients=60)
    content = yaml.safe_load(file.read_text())
    content["modalities"] = {name: content["modalities"][name] for name in ("labs", "note")}
    content["modalities"]["note"]["buckets"] = 16
    content["training"] = {"rounds": 2, "local_steps": 1}
    content["privacy"]["enabled"] = False
    file.write_text(yaml.safe_dump(content))
    return file


def run(study_file, out, *options):
    with pytest.raises(SystemExit) as done:
        main(["compare", *([str(study_file)] if study_file else []), "--out", str(out), *options])
    return done.value.code


def rows_in(out):
    return json.loads((out / "results.json").read_text())


def studies_in(out):
    return [load_study(file) for file in out.glob("cells/*/study.yaml")]


@pytest.fixture(scope="module")
def varied(study_file, tmp_path_factory):
    out = tmp_path_factory.mktemp("varied") / "out"
    assert run(study_file, out, "--vary", "method=late,concat", "--seeds", "0,1", "--baselines", "lr") == 0
    return out


@pytest.fixture(scope="module")
def folded(study_file, tmp_path_factory):
    out = tmp_path_factory.mktemp("folded") / "out"
    assert (
        run(study_file, out, "--vary", "missing_rate=0,0.5", "--seeds", "3", "--folds", "3", "--baselines", "lr") == 0
    )
    return out


# Rows


def test_rows_have_the_keys_of_the_contract(varied):
    rows = rows_in(varied)
    assert all(list(row) == ROW for row in rows)
    assert all(list(row["metrics"]) == ["auroc", "auprc", "brier", "ece"] for row in rows)
    found = {(row["cell"]["method"], row["model"], row["seed"], row["site"]) for row in rows}
    models = ("federated", "lr_local", "lr_pooled")
    assert found == {(m, n, s, h) for m in ("late", "concat") for n in models for s in (0, 1) for h in HOLDS}
    assert len(rows) == len(found)
    assert all(row["fold"] is None and row["epsilon"] is None for row in rows)


def test_rows_repeat_what_the_simulation_says(varied):
    summaries = [json.loads(file.read_text()) for file in varied.glob("cells/*/summary.json")]
    said = sorted(site["metrics"]["brier"] for summary in summaries for site in summary["sites"].values())
    assert said == sorted(row["metrics"]["brier"] for row in rows_in(varied) if row["model"] == "federated")


def test_a_site_has_the_same_held_out_records_for_every_model(varied):
    sizes = {}
    for row in rows_in(varied):
        sizes.setdefault((row["seed"], row["site"]), set()).add((row["n_test"], row["positives"]))
    assert all(len(values) == 1 for values in sizes.values())


def test_the_csv_says_what_the_json_says(varied):
    with (varied / "results.csv").open(newline="") as file:
        lines = list(csv.DictReader(file))
    rows = rows_in(varied)
    assert len(lines) == len(rows)
    for line, row in zip(lines, rows, strict=True):
        flat = {f"cell.{key}": value for key, value in row["cell"].items()} | row | row["metrics"]
        expected = {key: value for key, value in flat.items() if key not in ("cell", "metrics")}
        assert line == {key: "" if value is None else str(value) for key, value in expected.items()}


def test_finetuned_models_and_spent_epsilon(study_file, tmp_path):
    options = ["--seeds", "0", "--set", "privacy.enabled=true", "--set", "epsilon=4", "--rounds", "1"]
    options += ["--set", "training.finetune=true", "--set", "training.finetune_steps=1", "--baselines", "lr"]
    assert run(study_file, tmp_path / "out", *options) == 0
    rows = rows_in(tmp_path / "out")
    assert {row["model"] for row in rows} == {"federated", "federated_finetuned", "lr_local", "lr_pooled"}
    for row in rows:
        assert row["cell"] == {}
        assert (row["epsilon"] is None) == row["model"].startswith("lr")
        assert row["epsilon"] is None or 0 < row["epsilon"] <= 4


def test_with_a_state_folder_budgets_add_up(study_file, tmp_path):
    private = ["--set", "privacy.enabled=true", "--set", "epsilon=2", "--rounds", "1"]
    for name in ("first", "second"):
        assert run(study_file, tmp_path / name, *private, "--seed", "0", "--state", str(tmp_path / "states")) == 0
    first, second = ({row["site"]: row["epsilon"] for row in rows_in(tmp_path / name)} for name in ("first", "second"))
    assert first.keys() == second.keys() == HOLDS.keys()
    assert all(0 < first[site] < second[site] for site in HOLDS)
    assert (tmp_path / "states" / "alder" / "ledger.sqlite").exists()


# Seeds


def test_a_seed_sets_training_and_split(varied):
    studies = studies_in(varied)
    assert len(studies) == 4
    assert sorted((study.seed, study.evaluation.split_seed) for study in studies) == [(0, 0), (0, 0), (1, 1), (1, 1)]
    assert {study.model.fusion for study in studies} == {"late", "concat"}


# Folds


def test_folds_hold_out_each_patient_once(folded, study_file):
    study = load_study(study_file)
    files = {file.parent.name: load_scores(file) for file in folded.glob("cells/*/scores.npz")}
    studies = {file.parent.name: load_study(file) for file in folded.glob("cells/*/study.yaml")}
    for rate in (0, 0.5):
        units = [files[name] for name, of in studies.items() if of.simulation.missing_rate == rate]
        assert len(units) == 3
        for site in HOLDS:
            file = study_file.parent / "sites" / f"{site}.yaml"
            cohort = load_cohort(study, load_site(file), site_file=file)
            usable = np.isin(cohort.batch.patient, cohort.batch.patient[cohort.batch.weight > 0])
            assert sorted(np.concatenate([unit[site].record for unit in units])) == list(np.flatnonzero(usable))
            row = next(r for r in rows_in(folded) if r["site"] == site and r["cell"] == {"missing_rate": rate})
            assert row["n_test"] == usable.sum()
            assert row["positives"] == cohort.batch.target[usable].sum()


def test_folds_are_pooled_into_one_row(folded):
    rows = rows_in(folded)
    assert len(rows) == 2 * 3 * len(HOLDS)
    assert all(row["fold"] is None and row["seed"] == 3 for row in rows)
    for row in (row for row in rows if row["model"] == "lr_local"):
        studies = {file.parent.name: load_study(file) for file in folded.glob("cells/*/study.yaml")}
        names = [name for name, of in studies.items() if of.simulation.missing_rate == row["cell"]["missing_rate"]]
        scores = [load_scores(folded / "cells" / name / "scores.npz")[row["site"]] for name in names]
        given = np.concatenate([score.models["lr_local"][:, 1] for score in scores])
        target = np.concatenate([score.target[:, 0] for score in scores])
        assert math.isclose(row["metrics"]["brier"], np.mean((given - target) ** 2))


def test_a_split_column_must_cover_the_folds(study_file, tmp_path, capsys):
    hospitals = shutil.copytree(study_file.parent, tmp_path / "hospitals")
    site = hospitals / "sites" / "alder.yaml"
    site.write_text(yaml.safe_dump({**yaml.safe_load(site.read_text()), "split": {"column": "fold"}}))
    records = hospitals / "data" / "alder" / "records.csv"
    head, *lines = records.read_text().splitlines()
    patient = head.split(",").index("patient_id")
    folds = [int(line.split(",")[patient][-1]) % 3 for line in lines]
    records.write_text("\n".join([head + ",fold", *(f"{line},{at}" for line, at in zip(lines, folds, strict=True))]))
    assert run(hospitals / "study.yaml", tmp_path / "out", "--folds", "2", "--seeds", "0") == 6
    assert "folds 0 to 1" in capsys.readouterr().err
    assert not (tmp_path / "out").exists()
    assert run(hospitals / "study.yaml", tmp_path / "out", "--folds", "3", "--seeds", "0") == 0


# Resuming


def test_an_interrupted_comparison_goes_on_where_it_stopped(study_file, tmp_path, monkeypatch):
    options = ["--seeds", "0,1,2", "--baselines", "lr"]
    calls = []

    def counted(study, *arguments):
        calls.append(study.seed)
        if len(calls) == 2:
            raise KeyboardInterrupt
        return compare_unit_simulate(study, *arguments)

    compare_unit_simulate = compare_unit.simulate
    monkeypatch.setattr(compare_unit, "simulate", counted)
    out = tmp_path / "out"
    assert run(study_file, out, *options) == 130
    assert not (out / "results.json").exists()
    (first,) = out.glob("cells/*/rows.json")
    written = first.stat().st_mtime_ns
    assert len(list(out.glob("cells/*"))) == 2
    assert run(study_file, out, *options) == 0
    assert calls == [0, 1, 1, 2]
    assert first.stat().st_mtime_ns == written
    assert sorted({row["seed"] for row in rows_in(out)}) == [0, 1, 2]
    before = (out / "results.json").read_bytes()
    assert run(study_file, out, *options) == 0
    assert len(calls) == 4
    assert (out / "results.json").read_bytes() == before


def test_a_comparison_goes_on_with_the_same_data_only(study_file, tmp_path, capsys):
    """Folds of two data sets were joined as one: patients of the one were judged by models that knew the other."""
    hospitals, out = tmp_path / "hospitals", tmp_path / "out"
    shutil.copytree(study_file.parent, hospitals)
    options = ["--folds", "2", "--seeds", "0", "--baselines", "none"]
    assert run(hospitals / "study.yaml", out, *options) == 0
    shutil.rmtree(next(out.glob("cells/*")))
    site = yaml.safe_load((hospitals / "sites" / "alder.yaml").read_text())
    labs = hospitals / "sites" / site["data"]["labs"]["file"]
    before = labs.read_text()
    labs.write_text("".join(before.splitlines(keepends=True)[:-20]))
    assert run(hospitals / "study.yaml", out, *options) == 6
    assert "the data of alder changed since the comparison began" in capsys.readouterr().err
    labs.write_text(before)
    assert run(hospitals / "study.yaml", out, *options) == 0


def test_one_process_at_a_time_works_in_a_folder(varied, study_file, capsys):
    """The second removed what the first was writing."""
    options = ["--vary", "method=late,concat", "--seeds", "0,1", "--baselines", "lr"]
    with alone(varied):
        assert run(study_file, varied, *options) == 2
    assert "another process works in this folder" in capsys.readouterr().err
    assert run(study_file, varied, *options) == 0


def test_without_privacy_a_comparison_repeats_itself(varied, study_file, tmp_path):
    out = tmp_path / "again"
    assert run(study_file, out, "--vary", "method=late,concat", "--seeds", "0,1", "--baselines", "lr") == 0
    for name in ("results.json", "results.csv", "auroc.svg", "paired.svg"):
        assert (out / name).read_bytes() == (varied / name).read_bytes(), name


def test_units_keep_no_state_of_the_sites(varied, folded):
    for out in (varied, folded):
        for folder in out.glob("cells/*"):
            assert not {"sites", "checkpoint", "model"} & {path.name for path in folder.iterdir()}
    assert not list(varied.rglob("*.npz"))


def test_another_comparison_is_refused(varied, study_file, capsys):
    before = (varied / "compare.json").read_bytes()
    options = ["--vary", "method=late,concat", "--baselines", "lr"]
    assert run(study_file, varied, *options, "--seeds", "0,2") == 2
    assert "another comparison" in capsys.readouterr().err
    assert run(study_file, varied, *options, "--seeds", "0,1", "--set", "training.lr=0.1") == 2
    assert (varied / "compare.json").read_bytes() == before


def test_a_folder_that_holds_something_else_is_refused(study_file, tmp_path):
    (tmp_path / "notes.txt").write_text("mine")
    assert run(study_file, tmp_path) == 2
    assert [path.name for path in tmp_path.iterdir()] == ["notes.txt"]


def test_a_refused_cell_does_not_stop_the_others(study_file, tmp_path, monkeypatch, capsys):
    simulate = compare_unit.simulate

    def refuse_late(study, *arguments):
        if study.model.fusion == "late":
            raise RefusedError("all sites refused")
        return simulate(study, *arguments)

    monkeypatch.setattr(compare_unit, "simulate", refuse_late)
    out = tmp_path / "out"
    assert run(study_file, out, "--vary", "method=late,concat", "--seeds", "0") == 3
    assert "all sites refused" in capsys.readouterr().err
    assert {row["cell"]["method"] for row in rows_in(out)} == {"concat"}
    assert "method=late seed 0: all sites refused" in (out / "summary.md").read_text()


def test_a_site_that_is_left_out_stands_in_the_summary_with_the_reason(study_file, tmp_path):
    """Its rows were missing, and a line on the terminal alone had said why."""
    folder = shutil.copytree(study_file.parent, tmp_path / "hospitals")
    file = sorted((folder / "sites").glob("*.yaml"))[0]
    file.write_text(yaml.safe_dump({**yaml.safe_load(file.read_text()), "policy": {"min_patients": 10_000}}))
    out = tmp_path / "out"
    assert run(folder / study_file.name, out, "--seeds", "0,1") == 0
    text = (out / "summary.md").read_text()
    assert f"- {file.stem}: left out of 2 of 2 simulations: refused, " in text
    assert file.stem not in {row["site"] for row in rows_in(out)}


# Refusals before any work


@pytest.mark.parametrize(
    "options",
    [
        ["--baselines", "oracle"],
        ["--vary", "method=late,nonsense"],
        ["--vary", "fusion=late,nonsense"],
        ["--vary", "missing_rate=0,1.5"],
        ["--vary", "missing_rate=0,0.5,1.5", "--smoke"],
        ["--vary", "no.such.key=1,2"],
        ["--vary", "fusion"],
        ["--vary", "fusion=late,late"],
        ["--vary", "epsilon=1,1.0"],
        ["--vary", "fusion=late", "--vary", "fusion=concat"],
        ["--vary", "fusion=late,concat", "--vary", "method=late,concat"],
        ["--vary", "seed=0,1"],
        ["--vary", "evaluation.fold=0,1"],
        ["--set", "seed=4"],
        ["--seeds", "0,x"],
        ["--seeds", "1,1"],
        ["--seeds", ""],
        ["--seed", "1", "--seeds", "1"],
        ["--state", __file__],
        ["--folds", "1"],
        ["--rounds", "0"],
        ["--engine", "cloud"],
        ["--sites", "nowhere"],
    ],
    ids=" ".join,
)
def test_bad_options_write_nothing(study_file, tmp_path, options, capsys):
    assert run(study_file, tmp_path / "out", *options) == 2
    error = capsys.readouterr().err
    assert error.startswith("error: ")
    assert error.count("\n") == 1
    assert not (tmp_path / "out").exists()


def test_a_problem_in_the_data_writes_nothing(study_file, tmp_path, capsys):
    hospitals = shutil.copytree(study_file.parent, tmp_path / "hospitals")
    (hospitals / "data" / "cedar" / "notes.csv").unlink()
    options = ["--vary", "missing_rate=0,0.1", "--seeds", "0"]
    assert run(hospitals / "study.yaml", tmp_path / "out", *options) == 6
    assert "cedar" in capsys.readouterr().err
    assert not (tmp_path / "out").exists()
    assert run(hospitals / "study.yaml", tmp_path / "out", *options, "--continue-without") == 0
    assert {row["site"] for row in rows_in(tmp_path / "out")} == {"alder", "birch"}


# Smoke, demo, baselines


def test_smoke_is_small(study_file, tmp_path):
    out = tmp_path / "out"
    vary = ["--vary", "missing_rate=0,0.2,0.4", "--vary", "training.lr=1e-2,0.1,1"]
    assert run(study_file, out, *vary, "--folds", "5", "--rounds", "9", "--seeds", "7,8", "--smoke") == 0
    studies = studies_in(out)
    assert len(studies) == 2 * 2 * 2
    assert {study.training.rounds for study in studies} == {2}
    assert {study.seed for study in studies} == {7}
    assert {study.evaluation.folds for study in studies} == {2}
    assert {study.simulation.missing_rate for study in studies} == {0, 0.2}
    assert {row["cell"]["training.lr"] for row in rows_in(out)} == {0.01, 0.1}
    assert "epsilon" not in (out / "auroc.svg").read_text()


def test_the_demo_is_kept_once(study_file, tmp_path, monkeypatch):
    written = []

    def small_demo(folder):
        written.append(folder)
        file = write_demo(folder, holds=HOLDS, patients=60)
        file.write_text(study_file.read_text())
        return file

    monkeypatch.setattr("gapweave.sites.demo.write_demo", small_demo)
    out = tmp_path / "out"
    assert run(None, out, "--smoke") == 0
    assert (out / "hospitals" / "study.yaml").exists()
    assert run(None, out, "--smoke") == 0
    assert len(written) == 1


def test_baselines_are_fitted_once_for_cells_that_share_them(study_file, tmp_path, monkeypatch):
    fits = []
    fit = compare_unit.fit_baselines

    def counted(study, cohorts, names, **alone):
        fits.append((names[0], study.model.fusion, study.sharing.policy))
        return fit(study, cohorts, names, **alone)

    monkeypatch.setattr(compare_unit, "fit_baselines", counted)
    vary = ["--vary", "fusion=late,concat", "--vary", "sharing=heads,all"]
    assert run(study_file, tmp_path / "out", *vary, "--seeds", "0", "--baselines", "local,lr") == 0
    assert fits == [("local", "late", "heads"), ("lr", "late", "heads"), ("local", "concat", "heads")]
    assert len(rows_in(tmp_path / "out")) == 4 * 4 * len(HOLDS)


def test_a_baseline_that_trains_by_another_server_is_fitted_again(study_file, tmp_path, monkeypatch):
    """The first cell's scores stood in all: a network alone is trained with the study's server optimiser."""
    fitted, fit = [], compare_unit.fit_baselines

    def counted(study, cohorts, names, **options):
        fitted.extend((name, study.aggregation.server_lr) for name in names)
        return fit(study, cohorts, names, **options)

    monkeypatch.setattr(compare_unit, "fit_baselines", counted)
    vary = ["--vary", "aggregation.server_lr=0.5,2.0", "--vary", "aggregation.default=mean,norm_bound"]
    assert run(study_file, tmp_path / "out", *vary, "--seeds", "0", "--baselines", "local,lr") == 0
    assert sorted(fitted) == [("local", 0.5), ("local", 2.0), ("lr", 0.5)]


def test_with_the_joining_check_local_baselines_are_what_sites_trained_for_it(study_file, tmp_path, monkeypatch):
    words, local = ["--seeds", "0", "--baselines", "local,lr"], ("local", "lr_local")
    assert run(study_file, tmp_path / "plain", *words) == 0
    monkeypatch.setattr(baselines, "fit_network", lambda *asked: pytest.fail("trained twice"))
    assert run(study_file, tmp_path / "joining", *words, "--joining") == 0
    first, second = (
        [row for row in rows_in(tmp_path / name) if row["model"] in local] for name in ("plain", "joining")
    )
    assert len(first) == 2 * len(HOLDS)
    assert first == second


def test_cells_that_come_down_to_one_study_run_once(study_file, tmp_path, monkeypatch):
    monkeypatch.setitem(METHODS, "twin", METHODS["late"])
    assert run(study_file, tmp_path / "out", "--vary", "method=late,twin", "--seeds", "0") == 0
    assert len(studies_in(tmp_path / "out")) == 1
    assert [row["cell"]["method"] for row in rows_in(tmp_path / "out")] == ["late"] * 3 + ["twin"] * 3


def test_keys_beside_a_recipe_count_also_those_of_smoke(study_file, tmp_path):
    words = ["--vary", "recipe=none,small", "--vary", "imputer=cra", "--seeds", "0", "--set", "training.lr=0.25"]
    assert run(study_file, tmp_path / "out", *words, "--smoke") == 0
    plain, small = sorted(studies_in(tmp_path / "out"), key=lambda study: study.training.schedule)
    assert (plain.training.schedule, small.training.schedule) == ("fedavg", "fedsgd")
    for study in (plain, small):
        assert study.training.rounds == 2, "as smoke has it"
        assert study.training.lr == 0.25
        assert study.model.imputer == "cra"


def test_results_can_be_printed_as_json(varied, study_file, capsys):
    assert run(study_file, varied, "--vary", "method=late,concat", "--seeds", "0,1", "--baselines", "lr", "--json") == 0
    printed = json.loads(capsys.readouterr().out)
    assert [entry["model"] for entry in printed["means"][:3]] == ["federated", "lr_local", "lr_pooled"]


def test_the_terminal_names_the_results(varied, study_file, capsys):
    assert run(study_file, varied, "--vary", "method=late,concat", "--seeds", "0,1", "--baselines", "lr") == 0
    printed = capsys.readouterr().out
    assert f"results: {varied / 'results.json'}" in printed
    assert "method=concat" in printed
    assert work.SPEC == "compare.json"
