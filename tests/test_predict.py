"""`gapweave predict`: binary, multiclass and multilabel studies, end to end, with and without the run."""

from __future__ import annotations

import json
import shutil
from pathlib import Path

import numpy as np
import polars as pl
import pytest
from commandline import LABEL, OPEN, QUICK, done, edit, gapweave, hospitals, records, site_file, summary_of
from numpy.typing import NDArray

from gapweave.client.predict import find_model
from gapweave.shared.errors import UsageError

ORDER = ("labs", "note", "scan", "vitals")
SITES = ("alder", "cedar")
CLASSES = {"binary": ("0", "1"), "multiclass": ("low", "middle", "high"), "multilabel": ("worse", "male")}
BARE = "bare-record"
"""A new record without any modality."""


def with_task(study: Path, kind: str) -> Path:
    """The demo under another task, with label columns made from the records' own true probabilities and sex."""
    risk = pl.col("oracle_p")
    tier = pl.when(risk < 0.1).then(pl.lit("low")).when(risk < 0.5).then(pl.lit("middle")).otherwise(pl.lit("high"))
    male = (pl.col("sex") == "M").cast(pl.Int64)
    for name in SITES:
        records(study, name, lambda frame: frame.with_columns(tier=tier, worse=pl.col(LABEL), male=male))
    tasks = {
        "binary": ({"kind": "binary", "label": LABEL}, [LABEL]),
        "multiclass": ({"kind": "multiclass", "label": "tier", "classes": ["low", "middle", "high"]}, ["tier"]),
        "multilabel": ({"kind": "multilabel", "label": ["worse", "male"]}, ["worse", "male"]),
    }
    task, labels = tasks[kind]
    edit(study, task=task)
    for name in SITES:
        edit(site_file(study, name), data={"records": {"label": {LABEL: None, **{label: label for label in labels}}}})
    return study


@pytest.fixture(scope="module", params=list(CLASSES))
def trained(request: pytest.FixtureRequest, tmp_path_factory: pytest.TempPathFactory) -> tuple[str, Path, Path]:
    """(kind of task, study, finished run). Private for multiclass: every kind of loss is clipped somewhere."""
    kind = request.param
    folder = tmp_path_factory.mktemp(kind)
    study = with_task(hospitals(folder / "demo"), kind)
    birch = site_file(study, "birch")
    birch.unlink()
    private = () if kind == "multiclass" else OPEN
    done("simulate", study, "--out", folder / "run", *QUICK, *private, "--baselines", "lr")
    return kind, study, folder / "run"


@pytest.fixture
def new_patients(trained: tuple[str, Path, Path], tmp_path: Path) -> Path:
    """Alder's site file over records without labels, one of them without any modality."""
    _, study, _ = trained
    shutil.copytree(study.parent, tmp_path / "new")
    copy = tmp_path / "new" / study.name

    def change(frame: pl.DataFrame) -> pl.DataFrame:
        frame = frame.select("record_id", "patient_id", "scan_file")
        bare = pl.DataFrame({"record_id": [BARE], "patient_id": ["bare-patient"], "scan_file": [None]}, frame.schema)
        return pl.concat([frame, bare])

    records(copy, "alder", change)
    return site_file(copy, "alder")


def probabilities(frame: pl.DataFrame, kind: str) -> NDArray[np.float64]:
    return frame.select(f"p_{name}" for name in CLASSES[kind]).to_numpy()


def test_the_columns_of_the_contract(trained: tuple[str, Path, Path], new_patients: Path, tmp_path: Path) -> None:
    kind, _, run = trained
    out = tmp_path / "predictions.csv"
    outcome = done("predict", run, "--site", new_patients, "--out", out)
    frame = pl.read_csv(out)
    assert f"{len(frame)} records" in outcome.out
    assert frame.columns == [
        "record_id", "patient_id", *(f"p_{name}" for name in CLASSES[kind]), "present", "imputed",
        *(f"weight_{name}" for name in ORDER), *(f"vote_{name}" for name in ORDER), "unseen_pattern",
    ]  # fmt: skip
    told = pl.read_csv(new_patients.parent.parent / "data" / "alder" / "records.csv")
    assert frame["record_id"].to_list() == told["record_id"].to_list()
    assert frame["patient_id"].to_list() == told["patient_id"].to_list()


def test_probabilities_are_probabilities(trained: tuple[str, Path, Path], new_patients: Path, tmp_path: Path) -> None:
    kind, _, run = trained
    done("predict", run, "--site", new_patients, "--out", tmp_path / "p.csv")
    frame = pl.read_csv(tmp_path / "p.csv")
    values = probabilities(frame, kind)
    assert values.min() >= 0
    assert values.max() <= 1
    if kind != "multilabel":
        np.testing.assert_allclose(values.sum(axis=1), 1, atol=1e-6)
    assert len(np.unique(values[:, 0])) > 10
    weights = frame.filter(pl.col("record_id") != BARE).select(f"weight_{name}" for name in ORDER).to_numpy()
    np.testing.assert_allclose(weights.sum(axis=1), 1, atol=1e-5)


@pytest.mark.parametrize("model", ["federated", "best"])
def test_a_site_file_without_a_modality_is_one_where_no_record_has_it(
    trained: tuple[str, Path, Path], new_patients: Path, tmp_path: Path, model: str
) -> None:
    """It was refused, by what is made for any missing pattern."""
    kind, _, run = trained
    command = ("predict", run, "--site", new_patients, "--model", model)
    done(*command, "--out", tmp_path / "all.csv")
    edit(new_patients, data={"labs": None})
    told = done(*command, "--out", tmp_path / "fewer.csv").err
    assert "the model reads labs, which the site file does not name: no record has it" in told
    before, after = (pl.read_csv(tmp_path / name) for name in ("all.csv", "fewer.csv"))
    assert not any("labs" in (pattern or "") for pattern in after["present"])
    without = [pattern is None or "labs" not in pattern for pattern in before["present"]]
    assert 0 < sum(without) < len(before)
    same, changed = (
        np.abs(probabilities(after, kind) - probabilities(before, kind)).max(axis=1)[np.array(without) == absent]
        for absent in (True, False)
    )
    assert same.max() < 1e-6
    assert changed.max() > 1e-3


def test_absent_modalities_do_not_vote(trained: tuple[str, Path, Path], new_patients: Path, tmp_path: Path) -> None:
    kind, _, run = trained
    done("predict", run, "--site", new_patients, "--out", tmp_path / "p.csv")
    frame = pl.read_csv(tmp_path / "p.csv", infer_schema=False)
    votes = {"binary": None, "multiclass": {"low", "middle", "high"}, "multilabel": {"", "worse", "male", "worse+male"}}
    assert frame["present"].n_unique() > 2
    for row in frame.iter_rows(named=True):
        here = set((row["present"] or "").split("+")) - {""}
        for name in ORDER:
            vote = row[f"vote_{name}"]
            if name not in here:
                assert vote in (None, "")
                assert float(row[f"weight_{name}"] or 0) == 0
            elif votes[kind] is None:
                assert 0 <= float(vote) <= 1
            else:
                assert (vote or "") in votes[kind]


def test_a_patient_without_any_modality_gets_the_prior(
    trained: tuple[str, Path, Path], new_patients: Path, tmp_path: Path
) -> None:
    kind, study, run = trained
    done("predict", run, "--site", new_patients, "--out", tmp_path / "p.csv")
    frame = pl.read_csv(tmp_path / "p.csv")
    bare = frame.filter(pl.col("record_id") == BARE)
    assert bare["unseen_pattern"].to_list() == [1]
    assert bare["present"].to_list() in ([None], [""])
    prior = probabilities(bare, kind)[0]
    told = pl.read_csv(study.parent / "data" / "alder" / "records.csv")
    share = {
        "binary": [1 - told[LABEL].mean(), told[LABEL].mean()],
        "multiclass": [(told["tier"] == name).mean() for name in CLASSES["multiclass"]],
        "multilabel": [told["worse"].mean(), told["male"].mean()],
    }[kind]
    np.testing.assert_allclose(prior, np.array(share, float), atol=0.15)
    assert frame.filter(pl.col("record_id") != BARE)["unseen_pattern"].max() == 0


def test_a_pattern_never_trained_on_is_marked(
    trained: tuple[str, Path, Path], new_patients: Path, tmp_path: Path
) -> None:
    """No patient of alder's training had labs alone: it holds everything and loses little."""
    _, _, run = trained
    data = new_patients.parent.parent / "data" / "alder"
    labs = pl.read_csv(data / "labs.csv")
    labs.with_columns(pl.lit(BARE).alias("record_id")).head(1).vstack(labs).write_csv(data / "labs.csv")
    done("predict", run, "--site", new_patients, "--out", tmp_path / "p.csv")
    row = pl.read_csv(tmp_path / "p.csv").filter(pl.col("record_id") == BARE)
    assert row["present"].to_list() == ["labs"]
    assert row["unseen_pattern"].to_list() == [1]


def test_the_site_needs_nothing_but_its_own_folder(
    trained: tuple[str, Path, Path], new_patients: Path, tmp_path: Path
) -> None:
    _, _, run = trained
    done("predict", run, "--site", new_patients, "--out", tmp_path / "whole.csv")
    moved = tmp_path / "moved"
    shutil.copytree(run, moved)
    done("predict", moved, "--site", new_patients, "--out", tmp_path / "moved.csv")
    (kept,) = moved.glob("sites/alder/runs/*")
    kept.rename(tmp_path / "kept")
    shutil.rmtree(moved)
    done("predict", tmp_path / "kept", "--site", new_patients, "--out", tmp_path / "alone.csv")
    results = [(tmp_path / f"{name}.csv").read_text(encoding="utf-8") for name in ("whole", "moved", "alone")]
    assert results[0] == results[1] == results[2]


def test_the_run_predicts_from_its_own_state(trained: tuple[str, Path, Path], tmp_path: Path) -> None:
    """A moved run that kept the folder it was made in would read the other run's sites."""
    _, study, run = trained
    moved = tmp_path / "moved"
    shutil.copytree(run, moved)
    shutil.rmtree(moved / "sites")
    outcome = gapweave("predict", moved, "--site", site_file(study, "alder"), "--out", tmp_path / "p.csv")
    assert outcome.code == 2


def test_a_state_folder_that_outlives_runs_lends_an_unfinished_one_no_model(tmp_path: Path) -> None:
    """The last model of any run was taken for its own."""
    run, state = tmp_path / "run", tmp_path / "state" / "alder"
    for name in ("0", "1"):
        (state / "runs" / name).mkdir(parents=True)
        (state / "runs" / name / "model.safetensors").touch()
    (run / "checkpoint").mkdir(parents=True)
    (run / "checkpoint" / "simulation.json").write_text(json.dumps({"state": "../state"}))
    with pytest.raises(UsageError, match="there is no model of site 'alder'"):
        find_model(run, "alder", "model")
    (run / "summary.json").write_text(json.dumps({"run": "0"}))
    assert find_model(run, "alder", "model").parent.name == "0"


def test_the_metrics_of_a_task(trained: tuple[str, Path, Path]) -> None:
    _, _, run = trained
    summary = summary_of(run)
    for row in [*summary["sites"].values(), *summary["baselines"]["lr_local"]["sites"].values()]:
        metrics = row.get("metrics", row)
        assert all(metrics[name] is not None and 0 <= metrics[name] <= 1 for name in ("auroc", "auprc", "brier", "ece"))
    assert (run / "report.html").stat().st_size > 1000


def test_refusals(trained: tuple[str, Path, Path], new_patients: Path, tmp_path: Path) -> None:
    _, _, run = trained
    out = tmp_path / "p.csv"
    out.write_text("mine", encoding="utf-8")
    bad = {
        "the output file exists": (run, new_patients, out),
        "there is no such folder": (run, new_patients, tmp_path / "no" / "p.csv"),
        "there is no model of site": (tmp_path / "nothing", new_patients, tmp_path / "q.csv"),
        "there is no site file": (run, tmp_path / "nothing.yaml", tmp_path / "q.csv"),
    }
    for text, (where, site, target) in bad.items():
        outcome = gapweave("predict", where, "--site", site, "--out", target)
        assert outcome.code == 2
        assert text in outcome.error
    outcome = gapweave("predict", run, "--site", new_patients, "--out", tmp_path / "q.csv", "--model", "finetuned")
    assert outcome.code == 2
    assert "there is no fine-tuned model of site 'alder'" in outcome.error
    assert out.read_text(encoding="utf-8") == "mine"
    assert not (tmp_path / "q.csv").exists()
