"""The audit passes on the real engine, and fails on every planted fault, in the part that is there to find it.

False alarms: each audit below 1e-5. Faults are found with certainty or with probability above 1 - 1e-6.
"""

from __future__ import annotations

import json
import math
import time
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import yaml
from audit_faults import FAULTS as LISTED
from audit_faults import louder
from audit_faults_rare import RARE_FAULTS
from batches import EVERY_KIND, TASKS
from cohorts import LABS, study
from hospitals import build, plan_of, publish
from sampling import sample
from scipy import stats
from typer import Typer
from typer.testing import CliRunner

from gapweave.client.audit import AuditResult, audit_site, gaussian_epsilon, run_audit, stage
from gapweave.client.audit_box import black_box, mu_bound
from gapweave.client.audit_cli import audit
from gapweave.client.audit_noise import noise_law
from gapweave.client.audit_one_run import ALPHA, ceiling, epsilon_bound, one_run, p_value
from gapweave.client.audit_provenance import provenance, rehearse
from gapweave.client.audit_record import inclusion_faults, record, size_spread
from gapweave.client.audit_sensitivity import sensitivity
from gapweave.client.audit_site import Finding, Scene
from gapweave.client.training import Sgd
from gapweave.shared.config.site import Site
from gapweave.shared.config.study import Study
from gapweave.shared.errors import UsageError

FAULTS = {**LISTED, **RARE_FAULTS}
SCHEDULE = {"batch": 32, "rounds": 3, "local_steps": 2, "momentum": 0.5}
PARTS: dict[str, Callable[[Scene], Finding]] = {
    "sensitivity": sensitivity,
    "noise law": noise_law,
    "black box": lambda scene: black_box(scene)[0],
    "provenance": lambda scene: provenance(scene, rehearse(scene)),
    "record": lambda scene: record(scene, rehearse(scene)),
    "one run": lambda scene: one_run(scene.study, scene.site, scene.folder, 1.0),
}


@pytest.fixture
def scene(tmp_path: Path) -> Scene:
    """A site with three modalities that declares its number of patients."""
    return staged(tmp_path)


def staged(folder: Path, **keys: Any) -> Scene:
    hospital = build(folder / "hospital", "north")
    hospital.update("patients", declared=64)
    return stage(plan_of(private=True, training=SCHEDULE, **keys), hospital.site, folder / "audit")


@pytest.mark.parametrize("factor", [1.0, 1.1])
def test_corrected_steps_are_recomputed_too(tmp_path: Path, monkeypatch: pytest.MonkeyPatch, factor: float) -> None:
    """What the server adds to each step is part of a round; a site that adds something else is found."""
    hospital = build(tmp_path / "hospital", "north")
    hospital.update("patients", declared=64)
    plan = plan_of(private=True, training={**SCHEDULE, "momentum": 0.0, "scaffold": True})
    corrected = stage(plan, hospital.site, tmp_path / "audit")
    real = Sgd.__init__

    def init(self: Sgd, study: Study, buffers: Any, start: Any = None, corrections: Any = None) -> None:
        real(self, study, buffers, start, {name: factor * value for name, value in (corrections or {}).items()})

    monkeypatch.setattr(Sgd, "__init__", init)
    assert provenance(corrected, rehearse(corrected)).passed == (factor == 1)


def test_a_proximal_term_is_recomputed_too(tmp_path: Path) -> None:
    hospital = build(tmp_path / "hospital", "north")
    hospital.update("patients", declared=64)
    pulled = plan_of(private=True, training={**SCHEDULE, "proximal": 0.8, "lr": 0.5})
    scene = stage(pulled, hospital.site, tmp_path / "audit")
    found = provenance(scene, rehearse(scene))
    assert found.passed, found.text


def text(result: AuditResult) -> str:
    return "\n".join(f"{part.part}: {part.text}" for part in result.parts)


@pytest.mark.parametrize("engine", ["fast", pytest.param("opacus", marks=pytest.mark.long)])
def test_the_real_step_passes(tmp_path: Path, engine: str) -> None:
    """Also: what the black box shows comes close to what is claimed, and never above it."""
    started = time.monotonic()
    result = run_audit(staged(tmp_path, privacy={"engine": engine}))
    assert result.passed, text(result)
    assert [part.part for part in result.parts] == list(PARTS)
    assert 0.5 * result.claimed < result.lower_bound < result.claimed
    assert time.monotonic() - started < 90


# A third of them in the fast suite, the others in the long one. Audits repeat their steps so often that to measure
# which lines they reach takes longer than the steps.
@pytest.mark.no_cover
@pytest.mark.parametrize(
    "name", [pytest.param(name, marks=pytest.mark.long if at % 3 else ()) for at, name in enumerate(FAULTS)]
)
def test_the_part_in_charge_finds_a_planted_fault(name: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    scene = staged(tmp_path, sharing={"policy": "heads" if name in RARE_FAULTS else "all"})
    plant, parts = FAULTS[name]
    monkeypatch.setattr("gapweave.client.audit_box.SIDE", 1500)
    monkeypatch.setattr("gapweave.client.audit_noise.VALUES", 500_000)
    plant(monkeypatch)
    for part in parts:
        assert finds(part, replace(scene, folder=scene.folder / part)), part


def finds(part: str, scene: Scene) -> bool:
    """Whether a part fails, or the engine refuses the model before it."""
    try:
        return not PARTS[part](scene).passed
    except UsageError:
        return True


@pytest.mark.long
@pytest.mark.parametrize("name", sample(FAULTS, 6))
def test_the_audit_fails_on_a_planted_fault(name: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """From the site file on, with the plan made by the faulty code. A sample: that each is found by its part is above."""
    hospital = build(tmp_path / "hospital", "north")
    hospital.update("patients", declared=64)
    plant, parts = FAULTS[name]
    plant(monkeypatch)
    # What the server sends replaces initial values: that fault is one in groups that stay at home only.
    keys = {"sharing": {"policy": "heads"}} if name == "initial values from data" else {}
    result = audit_site(plan_of(private=True, training=SCHEDULE, **keys), hospital.site, hospital.site_file)
    assert not result.passed
    assert parts <= {part.part for part in result.parts if not part.passed}, text(result)


def site(*held: str, **keys: Any) -> Site:
    """A hospital whose files do not exist: an audit opens none."""
    source = {
        "cxr": {"folder": "gone", "column": "file"},
        "labs": {"file": "gone.csv", "columns": {"sodium": "na"}},
        "note": {"file": "gone.csv", "columns": ["text"]},
        "vitals": {"file": "gone.csv", "time": "hour", "columns": {"bp": "bp"}},
    }
    records = {"file": "gone.csv", "id": "id", "patient": "patient", "label": {"y": "y"}}
    data = {"records": records, **{name: source[name] for name in held}}
    return Site.model_validate({"version": 1, "name": "north", "data": data, **keys})


SHAPES: dict[str, tuple[Study, Site]] = {
    "all kinds, attentive": (
        study(EVERY_KIND, model={"embedding": 4, "fusion": "concat"}, sharing={"policy": "all"}),
        site("cxr", "labs", "note", "vitals"),
    ),
    "image only, multiclass": (study(EVERY_KIND, task=TASKS["multiclass"]), site("cxr")),
    "multilabel, no imputer": (
        study(EVERY_KIND, task=TASKS["multilabel"], model={"imputer": "none"}),
        site("note", "vitals"),
    ),
    "everyone at every step": (
        study({"labs": LABS}, training={"batch": 50, "rounds": 2}),
        site("labs", patients={"declared": 50}),
    ),
    "much noise, small rate": (
        study({"labs": LABS}, privacy={"epsilon": 0.3, "max_grad_norm": 5.0}, training={"batch": 16, "rounds": 3}),
        site("labs", patients={"declared": 2000}),
    ),
}


@pytest.mark.long
@pytest.mark.parametrize("shape", SHAPES)
def test_other_shapes_pass_without_any_data(shape: str, tmp_path: Path) -> None:
    result = audit_site(*SHAPES[shape], tmp_path / "site.yaml")
    assert result.passed, text(result)
    assert result.lower_bound <= result.claimed


def test_a_study_without_privacy_is_not_audited(tmp_path: Path) -> None:
    with pytest.raises(UsageError, match="without privacy"):
        audit_site(plan_of(private=False), site("labs"), tmp_path / "site.yaml")
    with pytest.raises(UsageError, match="none of the study's modalities"):
        audit_site(study({"labs": LABS}), site("note"), tmp_path / "site.yaml")


def test_an_error_in_a_part_is_a_failed_part(scene: Scene, monkeypatch: pytest.MonkeyPatch) -> None:
    def broken(*_: object) -> None:
        raise ZeroDivisionError("a bug")

    for name in ("sensitivity", "noise_law", "black_box", "rehearse", "one_run"):
        monkeypatch.setattr(f"gapweave.client.audit.{name}", broken)
    result = run_audit(scene)
    assert not result.passed
    assert {part.text for part in result.parts} == {"could not be audited: ZeroDivisionError: a bug"}
    assert result.lower_bound == 0


# The statistics.


def test_the_bound_of_mu_is_below_the_truth_and_not_far() -> None:
    """False alarms: 1e-6 a value of mu."""
    generator = np.random.default_rng(3)
    for mu in (0.1, 0.5, 1.0, 2.0):
        inside, outside = generator.normal(mu, 1, 8000) > mu / 2, generator.normal(0, 1, 8000) > mu / 2
        assert max(0, mu - 0.2) <= mu_bound(inside, outside) <= mu


def test_the_bound_of_mu_without_evidence_is_zero() -> None:
    none, every = np.zeros(50, bool), np.ones(50, bool)
    assert mu_bound(none[:0], none[:0]) == 0
    assert mu_bound(none, none) == mu_bound(every, every) == mu_bound(none, every) == 0
    assert mu_bound(every, none) < 2 * stats.norm.ppf(0.95)


@pytest.mark.parametrize(("mu", "delta"), [(1.0, 1e-5), (0.1, 1e-5), (2.0, 1e-6), (20.0, 1e-6)])
def test_epsilon_of_a_gaussian_mechanism_solves_its_equation(mu: float, delta: float) -> None:
    found = gaussian_epsilon(mu, delta)
    second = math.exp(found + stats.norm.logcdf(-found / mu - mu / 2))
    assert stats.norm.cdf(mu / 2 - found / mu) - second == pytest.approx(delta, rel=1e-6)


def test_epsilon_of_no_and_of_endless_evidence() -> None:
    assert gaussian_epsilon(0.0, 1e-5) == 0
    assert gaussian_epsilon(math.inf, 1e-5) == math.inf


@pytest.mark.parametrize("rate", [1e-3, 0.01, 0.3, 1.0])
def test_poisson_sampling_is_accepted_and_others_are_not(rate: float) -> None:
    """False alarms: 2e-6 a rate at most; by a fixed seed none."""
    steps, patients = 1500, 24
    generator = np.random.default_rng(8)
    poisson = (generator.random((steps, patients)) < rate).astype(float)
    assert list(inclusion_faults(poisson, rate)) == []
    everyone = np.ones((steps, patients))
    kept = np.repeat(poisson[:1], steps, axis=0)
    if rate < 1:
        assert list(inclusion_faults(everyone, rate))
        assert list(inclusion_faults(kept, rate))


@pytest.mark.parametrize("rate", [1e-3, 0.02, 0.4])
def test_the_spread_of_batch_sizes_is_bounded_on_both_sides(rate: float) -> None:
    """5,000 repetitions stay inside bounds of one in a million, which are within 14 deviations."""
    steps, patients = 1500, 24
    low, high = size_spread(patients, rate, steps)
    drawn = np.random.default_rng(4).binomial(patients, rate, (5_000, steps))
    found = np.square(drawn - patients * rate).sum(1)
    assert ((low < found) & (found < high)).all()
    assert high - found.mean() < 14 * found.std()
    assert found.mean() - low < 14 * found.std()


# The one-run audit.


def test_one_run_passes_and_stays_below_what_the_ledger_says(scene: Scene) -> None:
    """False alarms: 5e-7."""
    found = one_run(scene.study, scene.site, scene.folder, 1.0)
    assert found.passed
    assert found.text == "as declared"
    assert found.figures["lower_bound"] < found.figures["claimed"] <= 1.0
    assert found.figures["ceiling"] > 3.5
    assert found.figures["confidence"] == 1 - ALPHA


@pytest.mark.no_cover
@pytest.mark.parametrize("factor", [0.0, 0.05])
def test_one_run_finds_too_little_noise(factor: float, scene: Scene, monkeypatch: pytest.MonkeyPatch) -> None:
    louder(factor)(monkeypatch)
    found = one_run(scene.study, scene.site, scene.folder, 1.0)
    assert not found.passed
    assert found.figures["lower_bound"] > 1.5
    assert "the ledger says 0.999" in found.text


@pytest.mark.no_cover
def test_one_run_says_when_it_proves_nothing(scene: Scene, monkeypatch: pytest.MonkeyPatch) -> None:
    """At epsilon 8 not even a run without noise is contradicted: a pass must not sound like one."""
    louder(0.0)(monkeypatch)
    found = one_run(scene.study, scene.site, scene.folder, 8.0)
    assert found.passed
    assert found.text.startswith("proves nothing at epsilon 7.9")


def test_guesses_of_a_private_run_are_bounded() -> None:
    """Randomised response at epsilon 1 is the best that the guesser can have: the bound comes close from below."""
    generator = np.random.default_rng(2)
    hits = int((generator.random(20_000) < 1 / (1 + math.exp(-1))).sum())
    assert 0.85 < epsilon_bound({20_000: hits}, 1e-12, 20_000) < 1.0
    assert epsilon_bound({100: 50}, 1e-9, 100) == 0


def test_the_p_value_is_the_binomial_tail_and_what_delta_adds() -> None:
    """Theorem 5.2, by hand: three guesses, all right, at epsilon 0."""
    assert p_value(0.0, 3, 3, 0.0, 3) == pytest.approx(1 / 8)
    slope = max(3 / 8, (3 / 8 + 3 / 8) / 2, 7 / 8 / 3)
    assert p_value(0.0, 3, 3, 1e-3, 3) == pytest.approx(1 / 8 + 2 * 3 * 1e-3 * slope)
    assert p_value(5.0, 3, 0, 1e-3, 3) == 1
    assert ceiling(800, 1e-9) > ceiling(400, 1e-9) > ceiling(400, 1e-6)


# The command.


def run(path: Path, *options: str) -> Any:
    app = Typer()
    app.command()(audit)
    return CliRunner().invoke(app, [str(path / "study.yaml"), "--site", str(path / "site.yaml"), *options])


@pytest.mark.no_cover
def test_the_command_prints_the_verdict(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("gapweave.client.audit_box.SIDE", 1000)
    hospital = build(tmp_path / "hospital", "north")
    publish(hospital)
    plan = plan_of(private=True, training=SCHEDULE)
    (hospital.folder / "study.yaml").write_text(yaml.safe_dump(plan.model_dump(mode="json")), encoding="utf-8")
    shown = run(hospital.folder, "--json")
    assert shown.exit_code == 0, shown.output
    verdict = json.loads(shown.output)
    assert verdict["passed"] is True
    assert 0 <= verdict["lower_bound"] <= verdict["claimed"]
    assert [part["part"] for part in verdict["parts"]] == list(PARTS)
    # Any part that fails decides; the others need not be seen to pass again.
    for part in ("sensitivity", "record", "provenance", "one_run"):
        passed = Finding(part=part, passed=True, text="as declared")
        monkeypatch.setattr(f"gapweave.client.audit.{part}", lambda *_, passed=passed: passed)
    FAULTS["noise x 0.75"][0](monkeypatch)
    shown = run(hospital.folder)
    assert shown.exit_code == 3
    assert "FAILED   noise law: noise with patients in the batch is 0.7" in shown.output
    assert "passed   record: as declared" in shown.output
