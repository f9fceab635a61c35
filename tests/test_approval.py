"""A hospital's yes to a study: in plain words before, in its own site file after."""

from __future__ import annotations

from pathlib import Path

import pytest
import yaml
from commandline import run

from gapweave.client.ledger import Ledger
from gapweave.shared.config import load_site, load_study
from gapweave.shared.privacy.events import PrivacyEvent
from gapweave.shared.report.wording import budget
from gapweave.sites.demo import write_demo


@pytest.fixture
def study(tmp_path: Path) -> Path:
    return write_demo(tmp_path / "demo", hospitals=2, patients=40)


def test_it_says_what_the_study_would_do_and_leaves_the_rest_of_the_file(study: Path) -> None:
    file = study.parent / "sites" / "alder.yaml"
    text = "# of the hospital\n" + file.read_text() + "policy:  # by the board\n  epsilon: 9   # for a year\n"
    file.write_text(text)
    shown = run("site", "approve", str(file), "--study", str(study), "--show").out
    assert file.read_text() == text
    sha = load_study(study).sha256
    for part in (
        sha,
        "each time it is run",
        "training patients (counted, with noise)",
        "how many had which score, with noise\n",
        "leaves        encoder/" if "encoder/" in shown else "leaves ",
        "epsilon 8",
        "for all runs together is 9",
        "records",
    ):
        assert part in shown
    assert "approved: " in run("site", "approve", str(file), "--study", str(study)).out
    assert load_site(file).policy.studies == [sha]
    after = file.read_text()
    assert all(comment in after for comment in ("# of the hospital", "# by the board", "# for a year"))
    assert yaml.safe_load(after) == {**yaml.safe_load(text), "policy": {"epsilon": 9, "studies": [sha]}}
    assert "was approved already" in run("site", "approve", str(file), "--study", str(study)).out
    assert file.read_text() == after
    other = run("site", "approve", str(file), "--study", str(study), "--set", "training.rounds=3")
    assert load_study(study, {"training.rounds": 3}).sha256 in other.out
    assert len(load_site(file).policy.studies) == 2


def test_looks_on_the_way_leave_too_and_nothing_counted_where_the_site_releases_none(study: Path) -> None:
    file = study.parent / "sites" / "alder.yaml"
    looks = ("--study", str(study), "--set", "training.early_stop={every: 5, epsilon: 1}", "--show")
    assert "which score, with noise, also after 3 of the rounds" in run("site", "approve", str(file), *looks).out
    file.write_text(file.read_text() + "policy: {releases: [update]}\npatients: {declared: 900}\n")
    shown = run("site", "approve", str(file), *looks).out
    assert "training patients (declared)" in shown
    assert "which score" not in shown


def test_declared_patients_give_the_plan(study: Path) -> None:
    file = study.parent / "sites" / "alder.yaml"
    file.write_text(file.read_text() + "patients: {declared: 900}\n")
    assert "sampling rate" in run("site", "approve", str(file), "--study", str(study), "--show").out


def test_what_is_not_approved(study: Path) -> None:
    file = study.parent / "sites" / "alder.yaml"
    before = file.read_text()
    plain = ("--study", str(study), "--set", "privacy.enabled=false")
    shown = run("site", "approve", str(file), *plain, code=3)
    assert "NONE: updates leave without noise" in shown.out
    assert "trains without noise" in shown.err
    assert file.read_text() == before
    content = yaml.safe_load(before)
    content["data"] = {"records": content["data"]["records"]}
    file.write_text(yaml.safe_dump(content))
    assert "none of the study's modalities" in run("site", "approve", str(file), "--study", str(study), code=2).err


def test_a_site_without_a_hub_is_not_started(study: Path) -> None:
    file = str(study.parent / "sites" / "alder.yaml")
    for verb in ("start", "stop", "status"):
        assert "names no hub" in run("site", verb, file, code=2).err
    assert "nothing is spent" in run("site", "budget", file).out


def test_what_is_spent_and_reserved_counts_in_the_plan(study: Path) -> None:
    """It was that of an empty ledger, with modalities and a table that the site does not have or give."""
    file = study.parent / "sites" / "alder.yaml"
    file.write_text(file.read_text() + "policy: {epsilon: 9, releases: [update]}\npatients: {declared: 900}\n")
    command = ("site", "approve", str(file), "--study", str(study), "--show")
    empty = run(*command).out
    assert "0.00 is spent or reserved" in empty
    assert "No table of scores leaves the site" in empty
    assert "What other runs leave" not in empty
    site = load_site(file)
    event = PrivacyEvent(kind="dp_sgd", released="update of round 1", noise_multiplier=3.0)
    with Ledger(file.parent / site.state, site) as ledger:
        ledger.reserve("run", "other", [event])
        held = ledger.view.filtered([event])
    shown = run(*command).out
    assert f"{budget(held)} is spent or reserved" in shown
    assert "with what is spent and reserved; beyond the cap" in shown
    assert "What other runs leave of a cap of 9 has room for" in shown
