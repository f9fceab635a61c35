"""A site file that is stricter than the study wins, field by field of `policy` and `patients`."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
from cohorts import Hospital
from hospitals import build, participant, plan_of

from gapweave.client.capability import Capability
from gapweave.client.participant import Participant
from gapweave.server.aggregation import initial_groups
from gapweave.shared.config.site import Patients, Policy
from gapweave.shared.config.study import Study
from gapweave.shared.errors import BudgetExhausted, RefusedError
from gapweave.shared.privacy.ledger import read_ledger

RUN = "run-1"
ASKED = plan_of(private=True, privacy={"delta": 1e-5})
"""Three rounds at epsilon 8, of 24 patients in the tests."""


class Case:
    """A deployed site that approved the study, but for what a test changes.

    Args:
        folder: for its files.
        of: the study.
    """

    def __init__(self, folder: Path, of: Study = ASKED) -> None:
        self.of = of
        self.hospital: Hospital = build(folder, "north")
        self.hospital.update("policy", studies=[of.sha256], epsilon=100.0)
        self.hospital.update("patients", declared=24)

    def site(self, part: str, **keys: Any) -> Participant:
        """The site after a change of its file."""
        self.hospital.update(part, **keys)
        return participant(self.hospital, self.of, simulation=False)

    def prepare(self, part: str, **keys: Any) -> Capability:
        return self.site(part, **keys).prepare(RUN)


def epsilon(folder: Path) -> None:
    """Fewer rounds than the study asks for, and none beyond the cap; none at all when not one fits."""
    assert Case(folder / "wide").prepare("policy", epsilon=100.0).rounds == 3
    site = Case(folder / "narrow").site("policy", epsilon=6.0)
    rounds = site.prepare(RUN).rounds
    assert 1 <= rounds < 3
    start = initial_groups(ASKED)
    for number in range(1, rounds + 1):
        site.train(RUN, number, f"request {number}", start)
    with pytest.raises(BudgetExhausted):
        site.train(RUN, rounds + 1, "one more", start)
    assert read_ledger(site.state).spent() <= 6.0
    with pytest.raises(BudgetExhausted):
        Case(folder / "closed").prepare("policy", epsilon=0.01)


def delta(folder: Path) -> None:
    """The smaller one holds, and costs the study more noise."""
    wide = Case(folder / "wide").prepare("policy", delta=1e-3).plan
    narrow = Case(folder / "narrow").prepare("policy", delta=1e-8).plan
    assert (wide["delta"], narrow["delta"]) == (1e-5, 1e-8)
    assert narrow["noise_multiplier"] > wide["noise_multiplier"]


def upper(folder: Path) -> None:
    """delta <= 1/(10 N), whatever the study says."""
    wide = Case(folder / "wide").prepare("patients", upper=100).plan
    narrow = Case(folder / "narrow").prepare("patients", upper=10_000_000).plan
    assert (wide["delta"], narrow["delta"]) == (1e-5, pytest.approx(1e-8))


def min_patients(folder: Path) -> None:
    Case(folder / "wide").prepare("policy", min_patients=24)
    with pytest.raises(RefusedError, match="fewer than 25"):
        Case(folder / "narrow").prepare("policy", min_patients=25)


def releases(folder: Path) -> None:
    Case(folder / "wide").prepare("policy", releases=["update"])
    case = Case(folder / "narrow")
    for message in (
        lambda site: site.prepare(RUN),
        lambda site: site.train(RUN, 1, "request", initial_groups(ASKED)),
        lambda site: site.finish(RUN, initial_groups(ASKED)),
    ):
        with pytest.raises(RefusedError, match="no model updates"):
            message(case.site("policy", releases=["counts"]))


def unnoised(folder: Path) -> None:
    """A study without noise needs the hospital's word in each message; a site's word never takes noise away."""
    bare = plan_of(private=False)
    case = Case(folder / "bare", bare)
    with pytest.raises(RefusedError, match="without noise"):
        case.prepare("policy", unnoised="refuse")
    assert case.prepare("policy", unnoised="allow").plan["noise_multiplier"] == 0
    with pytest.raises(RefusedError, match="without noise"):
        case.site("policy", unnoised="refuse").train(RUN, 1, "request", initial_groups(bare))
    assert Case(folder / "private").prepare("policy", unnoised="allow").plan["noise_multiplier"] > 0


def studies(folder: Path) -> None:
    """Approval is of one hash: a study that differs in one number is another one."""
    with pytest.raises(RefusedError, match="not approved"):
        Case(folder / "none").prepare("policy", studies=[])
    with pytest.raises(RefusedError, match="not approved"):
        Case(folder / "another").prepare("policy", studies=[plan_of(private=True, seed=1).sha256])
    Case(folder / "this").prepare("policy", studies=[ASKED.sha256])


def declared(folder: Path) -> None:
    """The hospital's number is the one in the plan and the event, however many patients there are."""
    case = Case(folder / "site", plan_of(private=True, training={"batch": 100}))
    site = case.site("patients", declared=400)
    plan = site.prepare(RUN).plan
    assert (plan["n_hat"], plan["sample_rate"]) == (400, 0.25)
    site.train(RUN, 1, "request", initial_groups(case.of))
    (event,) = read_ledger(site.state).events()
    assert (event.n_hat, event.sample_rate) == (400, 0.25)


def max_records(folder: Path) -> None:
    """Further records of a patient are dropped before anything sees them."""
    case = Case(folder / "site")
    case.hospital.records(24, patient=[f"p{row % 6}" for row in range(24)])
    assert case.site("patients", max_records=4).training.patient.bincount().tolist() == [4] * 6
    assert case.site("patients", max_records=3).training.patient.bincount().tolist() == [3] * 6
    assert case.site("patients", max_records=1).training.patient.bincount().tolist() == [1] * 6


FIELDS: dict[str, Callable[[Path], None]] = {
    "policy.epsilon": epsilon,
    "policy.delta": delta,
    "policy.min_patients": min_patients,
    "policy.releases": releases,
    "policy.unnoised": unnoised,
    "policy.studies": studies,
    "patients.declared": declared,
    "patients.upper": upper,
    "patients.max_records": max_records,
}
ELSEWHERE = {"policy.anchor"}
"""Limits no study: where the ledger's head is kept (tests/test_ledger.py)."""


@pytest.mark.parametrize("field", FIELDS)
def test_the_stricter_site_wins(field: str, tmp_path: Path) -> None:
    FIELDS[field](tmp_path)


def test_no_field_is_forgotten() -> None:
    """A new limit of a hospital needs a test here."""
    known = {f"policy.{name}" for name in Policy.model_fields} | {f"patients.{name}" for name in Patients.model_fields}
    assert FIELDS.keys() | ELSEWHERE == known
