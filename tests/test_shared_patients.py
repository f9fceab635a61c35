"""Sites of a simulation that read the same patients, as two copies of one site file do."""

from __future__ import annotations

from pathlib import Path

import pytest
from hospitals import build, plan_of, publish

from gapweave.client import app as client_app
from gapweave.client.sources.findings import Finding
from gapweave.sites.simulate.run import Setup, load_sites


@pytest.fixture(autouse=True)
def _sites_are_forgotten() -> None:
    client_app.forget()


def shared(folder: Path, *names: str, **rows: object) -> list[Finding]:
    """What sites are told of that, when the second and further ones read the first one's files."""
    first, *others = (build(folder / name, name) for name in names)
    first.records(24, ward=["a", "a", "b", "b"] * 6)
    for hospital in others:
        hospital.content["data"]["records"] |= {"file": str(first.folder / "records.csv"), **rows}
    files = tuple(publish(hospital) for hospital in (first, *others))
    setup = Setup(sites=files, data=None, state=folder / "state")
    sites = load_sites(plan_of(private=False), setup)
    return [one for site in sites for one in site.participant.findings if one.id == "shared"]


def test_each_site_is_told_of_every_earlier_one(tmp_path: Path) -> None:
    found = shared(tmp_path, "alder", "birch", "cedar")
    assert [one.message for one in found] == [
        "24 of 24 patients are of alder too",
        "24 of 24 patients are of alder too",
        "24 of 24 patients are of birch too",
    ]
    assert found[0].where == f"{tmp_path / 'birch' / 'site.yaml'}:data.records"


def test_a_site_that_reads_some_of_them(tmp_path: Path) -> None:
    (found,) = shared(tmp_path, "alder", "birch", where={"ward": "a"})
    assert found.message == "12 of 12 patients are of alder too"


def test_one_patient_who_moved_is_no_mistake(tmp_path: Path) -> None:
    """As in eICU; both ledgers cover him (docs/privacy.md)."""
    hospitals = [build(tmp_path / name, name) for name in ("alder", "birch")]
    first, people = hospitals[0], [f"p{row}" for row in range(47)]
    first.records(48, patient=[*people, "p0"], ward=[*"ab" * 23, "a", "b"], y=[0, 0, 1, 1] * 12)
    for hospital, ward in zip(hospitals, "ab", strict=True):
        hospital.content["data"]["records"] |= {"file": str(first.folder / "records.csv"), "where": {"ward": ward}}
    setup = Setup(sites=tuple(map(publish, hospitals)), data=None, state=tmp_path / "state")
    sites = load_sites(plan_of(private=False), setup)
    both = [set(site.participant.cohort.patient_ids) for site in sites]
    assert len(both[0] & both[1]) == 1
    assert not [one for site in sites for one in site.participant.findings if one.id == "shared"]


def test_patients_of_the_same_ids_in_files_of_their_own_are_others(tmp_path: Path) -> None:
    assert not shared(tmp_path, "alder")
    files = tuple(publish(build(tmp_path / name, name)) for name in ("dogwood", "elm"))
    sites = load_sites(plan_of(private=False), Setup(sites=files, data=None, state=tmp_path / "state"))
    assert not [one for site in sites for one in site.participant.findings if one.id == "shared"]
