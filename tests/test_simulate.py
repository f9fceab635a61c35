"""`gapweave simulate`, through the command line: the run directory, summary.json, and what was spent."""

from __future__ import annotations

import json
import math
import shutil
import sqlite3
from contextlib import closing
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from commandline import DECLARED, OPEN, QUICK, done, edit, gapweave, hospitals, rounds_of, site_file, summary_of
from ledgers import filter_cap

from gapweave.client.predict import load_site_model
from gapweave.server.aggregation import initial_groups
from gapweave.shared import __version__, tensorfile
from gapweave.shared.config import load_study
from gapweave.shared.model import groups
from gapweave.shared.privacy.accountant import epsilon
from gapweave.shared.privacy.ledger import read_ledger
from gapweave.shared.privacy.plan import Plan, make_plan
from gapweave.shared.tensorfile import Arrays

SITES = ("alder", "birch", "cedar")
METRICS = {"auroc", "auprc", "brier", "ece"}


@pytest.fixture(scope="module")
def study(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return hospitals(tmp_path_factory.mktemp("hospitals") / "demo")


@pytest.fixture
def copy(study: Path, tmp_path: Path) -> Path:
    """The study again, for tests that change its files."""
    shutil.copytree(study.parent, tmp_path / "copy")
    return tmp_path / "copy" / study.name


@pytest.fixture(scope="module")
def counted(tmp_path_factory: pytest.TempPathFactory) -> tuple[Path, dict[str, Any]]:
    """A private run with all baselines at hospitals that release their number of patients with noise."""
    folder = tmp_path_factory.mktemp("counted")
    study = hospitals(folder / "demo", patients=[90, 60, 70])
    for name in SITES:
        edit(site_file(study, name), patients={"declared": None})
    done("simulate", study, "--out", folder / "run", *QUICK, "--baselines", "local,pooled,lr,gbm")
    return folder / "run", summary_of(folder / "run")


@pytest.fixture(scope="module")
def without_noise(study: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    out = tmp_path_factory.mktemp("open") / "run"
    done("simulate", study, "--out", out, *QUICK, *OPEN)
    return out


def shared(run: Path) -> Arrays:
    return tensorfile.parse((run / "model" / "shared.safetensors").read_bytes())[0]


def distance(one: Arrays, other: Arrays) -> float:
    assert {group: part.keys() for group, part in one.items()} == {group: part.keys() for group, part in other.items()}
    return max(float(np.abs(one[group][name] - other[group][name]).max()) for group in one for name in one[group])


def plan_of(study: Path, **overrides: Any) -> Plan:
    """What every little hospital plans: the number of patients is declared."""
    return make_plan(load_study(study, overrides), DECLARED, 1e-5)


def cost(plan: Plan, rounds: int) -> float:
    return epsilon([plan.event("update", plan.steps * rounds)], plan.delta)


def spent(run: Path) -> dict[str, float]:
    return {name: row["privacy"]["epsilon"] for name, row in summary_of(run)["sites"].items()}


def test_the_run_directory_has_the_files_of_the_contract(counted: tuple[Path, dict[str, Any]]) -> None:
    run, _ = counted
    assert {path.name for path in run.iterdir()} == {
        "study.yaml", "summary.json", "rounds.jsonl", "curve.jsonl", "model", "report.html", "checkpoint", "sites",
    }  # fmt: skip
    assert {path.name for path in (run / "model").iterdir()} == {"shared.safetensors", "README.md", "study.yaml"}
    assert {path.name for path in (run / "sites").iterdir()} == set(SITES)
    assert load_study(run / "study.yaml") == load_study(run / "model" / "study.yaml")
    page = (run / "report.html").read_text(encoding="utf-8")
    assert "<svg" in page
    assert 'src="http' not in page


def test_nothing_is_pickled(counted: tuple[Path, dict[str, Any]]) -> None:
    run, _ = counted
    for file in [*(run / "model").glob("*"), *(run / "checkpoint").glob("*"), *run.glob("sites/*/runs/*/*")]:
        if file.suffix == ".safetensors":
            tensorfile.parse(file.read_bytes())  # the length of its header may begin with a pickle's first byte
        else:
            file.read_text(encoding="utf-8")


def test_the_keys_of_summary_json(counted: tuple[Path, dict[str, Any]]) -> None:
    _, summary = counted
    assert summary["study"] == "demo"
    assert summary["gapweave_version"] == __version__
    assert (summary["engine"], summary["seed"], summary["rounds"]) == ("inline", 0, 2)
    assert summary["wall_s"] > 0
    assert isinstance(summary["bytes_up"], int)
    assert summary["bytes_up"] > 0
    assert summary["bytes_down"] > 0
    assert "patient-level" in summary["guarantee"]
    assert summary["metrics_are"] == "exact (simulation)"
    assert set(summary["sites"]) == set(SITES)
    assert set(summary["mean"]) == METRICS
    assert set(summary["worst"]) == {"site", *METRICS}
    assert summary["worst"]["auroc"] == min(row["metrics"]["auroc"] for row in summary["sites"].values())
    assert set(summary["pooled_baseline"]) == METRICS


def test_every_site_in_summary_json(counted: tuple[Path, dict[str, Any]]) -> None:
    _, summary = counted
    for row in summary["sites"].values():
        assert row["status"] == "ok"
        assert set(row["patients"]) == {"train", "test"}
        assert row["patients"]["train"] > row["patients"]["test"] > 0
        assert row["fine_tuned"] is None
        for metrics in (row["metrics"], row["local_only"]):
            assert set(metrics) == METRICS
            assert all(0 <= value <= 1 for value in metrics.values())
        privacy = row["privacy"]
        assert set(privacy) == {"unit", "epsilon", "epsilon_filter", "delta", "cap", "releases"}
        assert privacy["epsilon"] <= privacy["epsilon_filter"] <= privacy["cap"]
        assert privacy["unit"] == "patient"
        assert 0 < privacy["epsilon"] <= privacy["cap"] == 10
        assert privacy["epsilon"] <= 8
        assert 0 < privacy["delta"] <= 1e-5
        assert {release["kind"] for release in privacy["releases"]} == {"dp_sgd", "noisy_count"}
    assert summary["sites"]["cedar"]["modalities"] == ["note", "vitals"]


def test_subgroups_share_out_the_test_records(counted: tuple[Path, dict[str, Any]]) -> None:
    """Each held-out record is in one subgroup of its site, and the whole is not a copy of a part."""
    _, summary = counted
    for site in summary["sites"].values():
        by_sex = site["subgroups"]["sex"]
        assert len(by_sex) == 2
        assert sum(part["records"] for part in by_sex.values()) == site["records"]["test"]
        brier = sum(part["records"] * part["brier"] for part in by_sex.values()) / site["records"]["test"]
        assert brier == pytest.approx(site["metrics"]["brier"])


def test_the_one_output_of_a_binary_task_has_its_counts(counted: tuple[Path, dict[str, Any]]) -> None:
    _, summary = counted
    for site in summary["sites"].values():
        ((label, found),) = site["outputs"].items()
        assert label == "deteriorated"
        assert 0 < found["positives"] < found["records"] <= site["records"]["test"]
        assert {name: found[name] for name in METRICS} == site["metrics"]


def test_the_baselines_in_summary_json(counted: tuple[Path, dict[str, Any]]) -> None:
    _, summary = counted
    assert set(summary["baselines"]) == {"local", "pooled", "lr_local", "lr_pooled", "gbm_local", "gbm_pooled"}
    for model in summary["baselines"].values():
        assert set(model["mean"]) == METRICS
        assert set(model["sites"]) == set(SITES)
    assert summary["pooled_baseline"] == summary["baselines"]["pooled"]["mean"]
    for name, row in summary["sites"].items():
        assert row["local_only"] == summary["baselines"]["local"]["sites"][name]


def test_a_line_of_rounds_jsonl_for_every_round(counted: tuple[Path, dict[str, Any]]) -> None:
    run, summary = counted
    lines = rounds_of(run)
    assert [line["round"] for line in lines] == [1, 2]
    for line in lines:
        assert {name: site["status"] for name, site in line["sites"].items()} == dict.fromkeys(SITES, "ok")
        assert line["seconds"] > 0
        assert line["groups"]["encoder/note"]["holders"] == ["alder", "cedar"]
        for group in line["groups"].values():
            assert group["rule"]
            assert set(group["norms"]) == set(group["holders"])
            assert all(math.isfinite(value) and value > 0 for value in group["norms"].values())
            assert group["screened"] == {}
    assert sum(line["bytes_up"] for line in lines) == summary["bytes_up"]


def test_the_ledgers_of_a_run_verify(counted: tuple[Path, dict[str, Any]]) -> None:
    run, summary = counted
    for name, row in summary["sites"].items():
        content = json.loads(done("privacy", "verify", run / "sites" / name, "--json").out)
        assert content["site"] == name
        assert content["cohort"] == "demo"
        assert content["intact"] is not False
        assert {key: content[key] for key in row["privacy"]} == row["privacy"]


def test_two_open_runs_with_one_seed_are_one_model(study: Path, without_noise: Path, tmp_path: Path) -> None:
    done("simulate", study, "--out", tmp_path / "again", *QUICK, *OPEN)
    again = (tmp_path / "again" / "model" / "shared.safetensors").read_bytes()
    assert again == (without_noise / "model" / "shared.safetensors").read_bytes()
    assert distance(shared(without_noise), initial_groups(load_study(without_noise / "study.yaml"))) > 1e-2
    one, other = summary_of(without_noise), summary_of(tmp_path / "again")
    assert one["run"] != other["run"]
    assert [row["metrics"] for row in one["sites"].values()] == [row["metrics"] for row in other["sites"].values()]


def test_another_seed_is_another_model(study: Path, without_noise: Path, tmp_path: Path) -> None:
    done("simulate", study, "--out", tmp_path / "run", *QUICK, *OPEN, "--seed", 1)
    assert summary_of(tmp_path / "run")["seed"] == 1
    assert distance(shared(tmp_path / "run"), shared(without_noise)) > 1e-3


def test_an_open_run_promises_nothing(without_noise: Path) -> None:
    summary = summary_of(without_noise)
    assert summary["guarantee"] == "none"
    for row in summary["sites"].values():
        assert row["privacy"]["epsilon"] is None
        assert [release["kind"] for release in row["privacy"]["releases"]] == ["unnoised"]


def raise_caps(study: Path, epsilon: float = 50.0) -> None:
    for name in SITES:
        edit(site_file(study, name), policy={"epsilon": epsilon})


def test_two_private_runs_on_one_state_add_up(copy: Path, tmp_path: Path) -> None:
    raise_caps(copy)
    for name in ("first", "second"):
        done("simulate", copy, "--out", tmp_path / name, "--state", tmp_path / "state", *QUICK)
        assert not (tmp_path / name / "sites").exists()
    assert distance(shared(tmp_path / "first"), shared(tmp_path / "second")) > 1e-3
    runs = {summary_of(tmp_path / name)["run"] for name in ("first", "second")}
    plan = plan_of(copy, **{"training.rounds": 2, "training.local_steps": 2})
    for name in SITES:
        assert spent(tmp_path / "first")[name] == pytest.approx(cost(plan, 2))
        assert spent(tmp_path / "second")[name] == pytest.approx(cost(plan, 4))
        view = read_ledger(tmp_path / "state" / name)
        assert {entry.body["run"] for entry in view.entries if entry.kind == "charge"} == runs
        assert len(view.events()) == 4


def test_a_run_beyond_every_cap_is_refused(copy: Path, tmp_path: Path) -> None:
    plan = plan_of(copy, **{"training.rounds": 2, "training.local_steps": 2})
    raise_caps(copy, filter_cap([plan.event("update", 4 * plan.steps)], plan.delta))
    options = ("--state", tmp_path / "state", *QUICK)
    for name in ("first", "second"):
        done("simulate", copy, "--out", tmp_path / name, *options)
    outcome = gapweave("simulate", copy, "--out", tmp_path / "third", *options)
    assert outcome.code == 3
    assert "every site refused" in outcome.error
    assert not (tmp_path / "third" / "summary.json").exists()
    for name in SITES:
        assert len(read_ledger(tmp_path / "state" / name).events()) == 4


def test_a_site_whose_anchor_has_no_folder_is_left_out_and_named(copy: Path, tmp_path: Path) -> None:
    # Believed: an error at a site is an error of the site. True: its empty ledger ended the whole run.
    edit(site_file(copy, "birch"), policy={"anchor": "nowhere/birch.json"})
    done("simulate", copy, "--out", tmp_path / "run", "--state", tmp_path / "state", *QUICK)
    sites = summary_of(tmp_path / "run")["sites"]
    assert {name: row["status"] for name, row in sites.items()} == {"alder": "ok", "birch": "failed", "cedar": "ok"}
    assert sites["birch"]["privacy"] is None
    assert not (tmp_path / "state" / "birch" / "ledger.sqlite").exists()


def test_a_site_whose_ledger_is_lost_is_refused_and_named(copy: Path, tmp_path: Path) -> None:
    edit(site_file(copy, "birch"), policy={"anchor": str(tmp_path / "birch.json")})
    state = ("--state", tmp_path / "state", *QUICK)
    done("simulate", copy, "--out", tmp_path / "one", *state, "--set", "epsilon=1")
    shutil.rmtree(tmp_path / "state" / "birch")
    done("simulate", copy, "--out", tmp_path / "two", *state, "--set", "epsilon=1", "--set", "name=another")
    row = summary_of(tmp_path / "two")["sites"]["birch"]
    assert row["status"] == "refused"
    assert "ledger" in row["reason"]


def test_a_site_stops_at_its_cap_and_the_others_go_on(copy: Path, tmp_path: Path) -> None:
    plan = plan_of(copy, **{"training.rounds": 10, "training.local_steps": 1})
    edit(site_file(copy, "birch"), policy={"epsilon": (cost(plan, 3) + cost(plan, 4)) / 2})
    run = tmp_path / "run"
    done("simulate", copy, "--out", run, "--rounds", 10, "--set", "training.local_steps=1")
    summary = summary_of(run)
    assert {name: row["status"] for name, row in summary["sites"].items()} == {
        "alder": "ok", "birch": "refused", "cedar": "ok",
    }  # fmt: skip
    birch = summary["sites"]["birch"]
    assert birch["rounds"] == 3
    assert birch["privacy"]["epsilon"] == pytest.approx(cost(plan, 3))
    assert birch["metrics"]["auroc"] is not None
    took_part = [[name for name, site in line["sites"].items() if site["status"] == "ok"] for line in rounds_of(run)]
    assert took_part == 3 * [list(SITES)] + 7 * [["alder", "cedar"]]
    assert spent(run)["alder"] == pytest.approx(cost(plan, 10))


def test_all_sites_capped_out_from_the_start(copy: Path, tmp_path: Path) -> None:
    raise_caps(copy, 0.01)
    outcome = gapweave("simulate", copy, "--out", tmp_path / "run", *QUICK)
    assert outcome.code == 3
    assert "every site refused" in outcome.error
    assert all(name in outcome.error for name in SITES)


def test_a_refusal_below_the_quorum(copy: Path, tmp_path: Path) -> None:
    edit(site_file(copy, "birch"), policy={"epsilon": 0.01})
    outcome = gapweave("simulate", copy, "--out", tmp_path / "run", *QUICK, "--set", "aggregation.quorum=3")
    assert outcome.code == 4
    assert "quorum is 3" in outcome.error
    assert "birch" in outcome.error


def test_a_quorum_beyond_the_sites_is_refused_at_once(study: Path, tmp_path: Path) -> None:
    """It was believed that the handshake would say so: it waited for more sites until the deadline."""
    outcome = gapweave("simulate", study, "--out", tmp_path / "run", *QUICK, "--set", "aggregation.quorum=4")
    assert outcome.code == 4
    assert "3 sites" in outcome.error
    assert not (tmp_path / "run").exists()


def test_a_site_that_releases_no_updates_is_left_out(copy: Path, tmp_path: Path) -> None:
    edit(site_file(copy, "birch"), policy={"releases": ["counts"]})
    done("simulate", copy, "--out", tmp_path / "run", *QUICK)
    birch = summary_of(tmp_path / "run")["sites"]["birch"]
    assert birch["status"] == "refused"
    assert birch["metrics"] is None
    assert birch["rounds"] == 0


def test_a_bad_site_is_left_out_when_asked(copy: Path, tmp_path: Path) -> None:
    (copy.parent / "data" / "birch" / "vitals.parquet").unlink()
    outcome = gapweave("simulate", copy, "--out", tmp_path / "run", *QUICK)
    assert outcome.code == 6
    assert "--continue-without" in outcome.error
    assert not (tmp_path / "run").exists()
    done("simulate", copy, "--out", tmp_path / "run", *QUICK, "--continue-without", "--baselines", "pooled")
    summary = summary_of(tmp_path / "run")
    assert summary["sites"]["birch"]["status"] == "failed"
    assert "vitals.parquet" in summary["sites"]["birch"]["reason"]
    assert summary["sites"]["alder"]["status"] == "ok"
    assert set(rounds_of(tmp_path / "run")[0]["sites"]) == {"alder", "cedar"}


def test_a_bad_site_is_not_left_out_below_the_quorum(copy: Path, tmp_path: Path) -> None:
    (copy.parent / "data" / "birch" / "vitals.parquet").unlink()
    arguments = ("--continue-without", "--set", "aggregation.quorum=3")
    outcome = gapweave("simulate", copy, "--out", tmp_path / "run", *QUICK, *arguments)
    assert outcome.code == 6
    assert "vitals.parquet" in outcome.error
    assert not (tmp_path / "run").exists()


def test_overrides_are_written_out(study: Path, tmp_path: Path) -> None:
    texts = ("method=concat", "missing_rate=0.2", "training.batch=16", "epsilon=3", "sharing=heads")
    settings = [word for text in texts for word in ("--set", text)]
    run = tmp_path / "run"
    outcome = done("simulate", study, "--out", run, *QUICK, "--seed", 7, "--json", *settings)
    resolved = load_study(run / "study.yaml")
    assert (resolved.model.fusion, resolved.scheme.name, resolved.sharing.policy) == ("concat", "none", "heads")
    assert (resolved.training.rounds, resolved.training.batch, resolved.seed) == (2, 16, 7)
    assert resolved.simulation.missing_rate == 0.2
    assert resolved.privacy.epsilon == 3
    assert json.loads(outcome.out) == summary_of(run)
    assert max(spent(run).values()) <= 3


def test_fine_tuning_is_charged_within_the_target(study: Path, tmp_path: Path) -> None:
    run = tmp_path / "run"
    settings = ("--set", "training.finetune=true", "--set", "training.finetune_steps=3")
    outcome = done("simulate", study, "--out", run, *QUICK, *settings)
    (mean,) = (line.split() for line in outcome.out.splitlines() if line.strip().startswith("mean"))
    assert len(mean) == 1 + len(("local", "federated", "fine-tuned"))
    for name, row in summary_of(run)["sites"].items():
        assert set(row["fine_tuned"]) == METRICS
        assert 0 < row["privacy"]["epsilon"] <= 8
        steps = sum(release["steps"] for release in row["privacy"]["releases"])
        assert steps == 2 * 2 + 3
        events = read_ledger(run / "sites" / name).events()
        assert [event.released for event in events] == ["update of round 1", "update of round 2", "fine-tuning"]
    (tuned,) = run.glob("sites/alder/runs/*/finetuned.safetensors")
    assert tuned.read_bytes() != tuned.with_name("model.safetensors").read_bytes()

    # Stopped just before the end, the run repeats its last message: that trains nobody again.
    copy, before = tuned.read_bytes(), spent(run)
    (run / "summary.json").unlink()
    done("resume", run)
    assert tuned.read_bytes() == copy
    assert spent(run) == before
    assert not [entry for entry in read_ledger(run / "sites" / "alder").entries if entry.kind == "recompute"]


POLICIES = {
    "heads": {"fusion", "head"},
    "heads+imputer": {"fusion", "head", "imputer"},
    "all": {"fusion", "head", "imputer", "encoder"},
    '{"encoder/*": holders, imputer: local}': {"fusion", "head", "encoder"},
}


@pytest.mark.parametrize("policy", POLICIES)
def test_only_the_shared_groups_leave(study: Path, tmp_path: Path, policy: str) -> None:
    run = tmp_path / "run"
    done("simulate", study, "--out", run, *QUICK, *OPEN, "--set", f"sharing={policy}", "--set", "fusion=concat")
    left = {group.partition("/")[0] for group in shared(run)}
    assert left == POLICIES[policy]
    for line in rounds_of(run):
        assert {group.partition("/")[0] for group in line["groups"]} == POLICIES[policy]
    (kept,) = run.glob("sites/cedar/runs/*/model.safetensors")
    own = groups(load_site_model(kept).model)
    assert {"encoder/note", "encoder/vitals", "head/note", "head/vitals", "imputer", "fusion"} == set(own)
    for group, part in shared(run).items():
        for name, value in part.items():
            if group in own:
                np.testing.assert_array_equal(own[group][name].numpy(), value)
    if "encoder" not in POLICIES[policy]:
        (other,) = run.glob("sites/alder/runs/*/model.safetensors")
        theirs = groups(load_site_model(other).model)
        assert any(not theirs["encoder/note"][name].equal(value) for name, value in own["encoder/note"].items())


def test_a_changed_ledger_keeps_its_site_out(copy: Path, tmp_path: Path) -> None:
    raise_caps(copy)
    options = ("--state", tmp_path / "state", *QUICK)
    done("simulate", copy, "--out", tmp_path / "first", *options)
    file = tmp_path / "state" / "birch" / "ledger.sqlite"
    with closing(sqlite3.connect(file, isolation_level=None)) as connection:
        connection.execute("DROP TRIGGER entries_remain")
        connection.execute("DELETE FROM entries WHERE kind = 'charge' AND sequence < 5")
    done("simulate", copy, "--out", tmp_path / "second", *options)
    assert summary_of(tmp_path / "second")["sites"]["birch"]["status"] == "refused"
    assert summary_of(tmp_path / "second")["sites"]["alder"]["status"] == "ok"
    assert gapweave("privacy", "verify", tmp_path / "state" / "birch").code == 3


@pytest.mark.long
def test_the_demo_without_arguments(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(tmp_path)
    outcome = done("simulate")
    (run,) = (tmp_path / "runs").iterdir()
    assert str(run) in outcome.out.replace("\n", "")
    summary = summary_of(run)
    assert len(summary["sites"]) == 6
    assert summary["mean"]["auroc"] > 0.6
    assert 0 < max(spent(run).values()) <= 8
    assert all(row["local_only"]["auroc"] for row in summary["sites"].values())  # beside the federated model, unasked


@pytest.mark.parametrize("choice", ["default=trimmed_mean", "strict=true"])
def test_a_study_that_would_train_nothing_jointly_is_refused_before_it_costs(
    study: Path, tmp_path: Path, choice: str
) -> None:
    """It spent the budget, left every group alone, and ended with 0."""
    (tmp_path / "sites").mkdir()
    for name in SITES[:2]:
        shutil.copy(site_file(study, name), tmp_path / "sites")
    words = ("simulate", study, "--sites", tmp_path / "sites", "--out", tmp_path / "run", "--state", tmp_path / "state")
    outcome = gapweave(*words, *QUICK, "--set", f"aggregation.{choice}")
    assert outcome.code == 2
    assert "of 2 sites" in outcome.err or "2 holders cannot protect" in outcome.err
    assert not (tmp_path / "run").exists()
    assert not (tmp_path / "state").exists()


def test_baselines_can_be_left_out(study: Path, tmp_path: Path) -> None:
    done("simulate", study, "--out", tmp_path / "run", *QUICK, *OPEN, "--baselines", "none")
    summary = summary_of(tmp_path / "run")
    assert summary["baselines"] == {}
    assert all(row["local_only"] is None for row in summary["sites"].values())


def test_where_nobody_is_held_out_there_is_no_learning_curve(tmp_path: Path) -> None:
    study, run = hospitals(tmp_path / "demo", patients=60), tmp_path / "run"
    kept = ("--set", "evaluation.test_fraction=0")
    done("simulate", study, "--out", run, *QUICK, *OPEN, *kept)
    assert not (run / "curve.jsonl").exists()
    assert (run / "report.html").exists()
