"""`gapweave study init | check` and `gapweave site init | check`."""

from __future__ import annotations

import json
import shutil
from pathlib import Path

import polars as pl
import pytest
from commandline import LABEL, done, edit, gapweave, hospitals, records, site_file

from gapweave.shared.config import load_site, load_study

CHECK = {"id", "status", "where", "message", "remedy"}


@pytest.fixture(scope="module")
def original(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return hospitals(tmp_path_factory.mktemp("hospitals") / "demo", patients=40)


@pytest.fixture
def study(original: Path, tmp_path: Path) -> Path:
    shutil.copytree(original.parent, tmp_path / "demo")
    return tmp_path / "demo" / original.name


def test_a_new_study_file_is_good(tmp_path: Path) -> None:
    file = tmp_path / "study.yaml"
    outcome = done("study", "init", file)
    assert f"gapweave study check {file}" in outcome.out
    assert load_study(file).name == "my-study"
    assert done("study", "check", file).out.startswith("ok ")


@pytest.mark.parametrize("kind", ["study", "site"])
def test_no_file_is_overwritten(tmp_path: Path, kind: str) -> None:
    file = tmp_path / "mine.yaml"
    file.write_text("mine", encoding="utf-8")
    outcome = gapweave(kind, "init", file)
    assert outcome.code == 2
    assert "the file exists" in outcome.error
    assert file.read_text(encoding="utf-8") == "mine"
    outcome = gapweave(kind, "init", tmp_path / "no" / "folder.yaml")
    assert outcome.code == 2
    assert "cannot write" in outcome.error


def test_study_check_for_a_machine(study: Path) -> None:
    content = json.loads(done("study", "check", study, "--json", "--set", "epsilon=3").out)
    assert content["ok"] is True
    assert all(set(check) == CHECK for check in content["checks"])
    told = {check["id"]: check["message"] for check in content["checks"]}
    assert told["hash"] == load_study(study, {"epsilon": 3}).sha256
    assert told["hash"] != load_study(study).sha256
    assert "scan [1, 16, 16]" in told["inputs"]


@pytest.mark.parametrize(("quorum", "warned"), [(3, False), (4, True)])
def test_study_check_counts_the_site_files(study: Path, quorum: int, warned: bool) -> None:
    lines = done("study", "check", study, "--set", f"aggregation.quorum={quorum}").out.splitlines()
    found = [
        line for line in lines if line.startswith("warning  quorum: a round needs 4 sites, and there are 3 site files")
    ]
    assert bool(found) is warned


def test_study_check_says_what_leaves(study: Path) -> None:
    lines = done("study", "check", study, "--set", "sharing=heads").out.splitlines()
    shared = next(line for line in lines if "shared:" in line)
    local = next(line for line in lines if "local:" in line)
    assert "head/labs" in shared
    assert "encoder/" not in shared
    assert "encoder/labs" in local
    assert "MB" in shared
    assert any(
        "OFF" in line for line in done("study", "check", study, "--set", "privacy.enabled=false").out.splitlines()
    )


def test_a_bad_study_does_not_pass(study: Path) -> None:
    edit(study, model={"fusion": "lat"})
    outcome = gapweave("study", "check", study)
    assert outcome.code == 2
    assert "did you mean 'late'" in outcome.error


def test_a_new_site_file_fits_its_study(study: Path, tmp_path: Path) -> None:
    file = tmp_path / "north.yaml"
    done("site", "init", file, "--study", study)
    site = load_site(file)
    assert site.name == "north"
    assert set(site.data.modalities) == set(load_study(study).order)
    assert set(site.data.records.label) == {LABEL}
    outcome = gapweave("site", "check", file, "--study", study)
    assert outcome.code == 6
    assert "problem" in outcome.out


def test_a_new_site_file_without_a_study(tmp_path: Path) -> None:
    done("site", "init", tmp_path / "north.yaml")
    assert load_site(tmp_path / "north.yaml").policy.unnoised == "refuse"


def test_a_new_site_file_over_the_data_that_it_names(study: Path, tmp_path: Path) -> None:
    """The shortest way into a study: init, put the files beside it, check."""
    file = tmp_path / "north.yaml"
    done("site", "init", file, "--study", study)
    data = study.parent / "data" / "alder"
    shutil.copytree(data / "scans", tmp_path / "scan")
    shutil.copy(data / "labs.csv", tmp_path / "labs.csv")
    shutil.copy(data / "notes.csv", tmp_path / "note.csv")
    pl.read_parquet(data / "vitals.parquet").write_csv(tmp_path / "vitals.csv")
    told = pl.read_csv(data / "records.csv")
    told.write_csv(tmp_path / load_site(file).data.records.file)
    outcome = gapweave("site", "check", file, "--study", study)
    assert "problem" not in outcome.out, outcome.out
    assert outcome.code == 0


def test_site_check_of_every_hospital(study: Path) -> None:
    for name in ("alder", "birch", "cedar"):
        outcome = done("site", "check", site_file(study, name), "--study", study)
        assert all(line.startswith(("ok ", "warning ")) for line in outcome.out.splitlines())
        assert done("site", "check", site_file(study, name)).out


def test_site_check_for_a_machine(study: Path) -> None:
    content = json.loads(done("site", "check", site_file(study, "alder"), "--study", study, "--json").out)
    assert content["ok"] is True
    assert all(set(check) == CHECK for check in content["checks"])
    assert {check["status"] for check in content["checks"]} <= {"ok", "warning"}
    (study.parent / "data" / "alder" / "labs.csv").unlink()
    outcome = gapweave("site", "check", site_file(study, "alder"), "--study", study, "--json")
    assert outcome.code == 6
    content = json.loads(outcome.out)
    assert content["ok"] is False
    (problem,) = [check for check in content["checks"] if check["status"] == "problem"]
    assert "labs.csv" in problem["message"] + problem["where"]
    assert problem["remedy"]


def test_site_check_counts_and_never_quotes(study: Path) -> None:
    records(study, "alder", lambda frame: frame.with_columns(pl.lit("zq77x").alias("patient_id")))
    outcome = gapweave("site", "check", site_file(study, "alder"), "--study", study)
    assert outcome.code == 6
    assert "zq77x" not in outcome.out + outcome.err


def test_no_site_file(tmp_path: Path) -> None:
    outcome = gapweave("site", "check", tmp_path / "nothing.yaml")
    assert outcome.code == 2
    assert "there is no site file" in outcome.error


@pytest.mark.parametrize("command", ["study", "site"])
def test_a_wrong_file_is_json_too(command: str, tmp_path: Path) -> None:
    """A program that reads the checks gets them also when the file itself is wrong."""
    wrong = tmp_path / "wrong.yaml"
    wrong.write_text("version: 1\nnam: x\n")
    outcome = gapweave(command, "check", wrong, "--json")
    assert outcome.code == 2
    content = json.loads(outcome.out)
    assert content["ok"] is False
    assert [check["status"] for check in content["checks"]] == ["problem"]
    assert "'name'" in content["checks"][0]["message"]
    assert content["checks"][0]["message"] in outcome.err
