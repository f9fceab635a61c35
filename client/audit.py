"""The audit of a site's private step: does the code do what its privacy event says?

Six parts, all through the real participant, step, engine, draws and ledger, on synthetic patients: sensitivity, noise
law, black box, provenance and record of a step of the study's shapes, and one whole run on canaries at a small claimed
epsilon (docs/decisions/0008).

Guarantee: a site whose code does what its events say fails with probability below 1e-5 a run; there is no seed to
choose. A pass says that none of the known kinds of fault was seen, not that there is none.

Assumes: nothing of the site's data; only its site file is read.

Edge cases: an error in a part is a failed part: what cannot be audited does not pass.
"""

from __future__ import annotations

import dataclasses
import math
import tempfile
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from scipy import optimize, stats

from gapweave.client.audit_box import black_box
from gapweave.client.audit_noise import noise_law
from gapweave.client.audit_one_run import one_run
from gapweave.client.audit_provenance import provenance, rehearse
from gapweave.client.audit_record import record
from gapweave.client.audit_sensitivity import sensitivity
from gapweave.client.audit_site import RECORDS, RUN, CanarySite, Finding, Scene, audit_copy
from gapweave.client.canaries import canaries
from gapweave.client.ledger import Ledger
from gapweave.shared.config.site import Site
from gapweave.shared.config.study import Study
from gapweave.shared.errors import UsageError

PATIENTS = 24
"""Synthetic patients."""
ONE_RUN = 1.0
"""Epsilon that the one-run audit claims: small enough that right guesses can contradict it."""


@dataclass(frozen=True, kw_only=True)
class AuditResult:
    """What an audit found.

    Attributes:
        claimed: epsilon, at the site's delta, of one step for a patient who takes part in it, by its event.
        lower_bound: the same from what an attacker could tell apart; with probability 1 - 1e-6 not above the truth.
        passed: whether every part passed.
        parts: sensitivity, noise law, black box, provenance, record, one run.
    """

    claimed: float
    lower_bound: float
    passed: bool
    parts: tuple[Finding, ...]

    def to_dict(self) -> dict[str, Any]:
        """For JSON; an infinite figure becomes null."""
        parts = [dataclasses.asdict(part) for part in self.parts]
        for part in parts:
            part["figures"] = {key: _finite(value) for key, value in part["figures"].items()}
        return {
            "claimed": _finite(self.claimed),
            "lower_bound": _finite(self.lower_bound),
            "passed": self.passed,
            "parts": parts,
        }


def _finite(value: float) -> float | None:
    return value if math.isfinite(value) else None


def audit_site(
    study: Study, site: Site, site_file: Path, data_dir: Path | None = None, claim: float = ONE_RUN
) -> AuditResult:
    """Audit the code that a site would train a study with.

    Args:
        study: with privacy.
        site: the hospital's file; its modalities and public numbers are used, its data are never opened.
        site_file: where it was read from, for messages.
        data_dir: not opened either.
        claim: epsilon of the one-run audit.

    Raises:
        UsageError: for a study without privacy, or a site that has none of its modalities.
    """
    del data_dir
    if not study.privacy.enabled:
        raise UsageError(
            "a study without privacy claims nothing that could be audited",
            where="study:privacy.enabled",
            remedy="Enable privacy",
        )
    if not site.held(study):
        raise UsageError("the site has none of the study's modalities", where=str(site_file), remedy="Add one")
    with tempfile.TemporaryDirectory(prefix="gapweave-audit-") as folder:
        return run_audit(stage(study, site, Path(folder)), claim)


def stage(study: Study, site: Site, folder: Path) -> Scene:
    """Synthetic patients, a public copy of the site file, and the plan that the real code makes of them."""
    records = (RECORDS * PATIENTS)[:PATIENTS]
    copy = audit_copy(study, site, PATIENTS)
    patients = canaries(study, site.held(study), records)
    draft = CanarySite(study, copy, state=folder / "plan", batch=patients)
    with Ledger(draft.state, copy) as ledger:
        plan = draft._plan(ledger, RUN)
    return Scene(study=study, site=copy, folder=folder, patients=patients.to(draft.device), plan=plan)


def run_audit(scene: Scene, claim: float = ONE_RUN) -> AuditResult:
    """All parts."""
    mu = 0.0

    def box() -> Finding:
        nonlocal mu
        found, mu = black_box(scene)
        return found

    parts = [
        _guarded("sensitivity", lambda: sensitivity(scene)),
        _guarded("noise law", lambda: noise_law(scene)),
        _guarded("black box", box),
    ]
    try:
        rehearsal = rehearse(scene)
    except Exception as error:
        parts += [_broken(name, error) for name in ("provenance", "record")]
    else:
        parts.append(_guarded("provenance", lambda: provenance(scene, rehearsal)))
        parts.append(_guarded("record", lambda: record(scene, rehearsal)))
    parts.append(_guarded("one run", lambda: one_run(scene.study, scene.site, scene.folder, claim)))
    return AuditResult(
        claimed=gaussian_epsilon(1 / scene.plan.noise_multiplier, scene.plan.delta),
        lower_bound=gaussian_epsilon(mu, scene.plan.delta),
        passed=all(part.passed for part in parts),
        parts=tuple(parts),
    )


def _guarded(name: str, part: Callable[[], Finding]) -> Finding:
    """A part's finding; an error is a fault, since an audit that cannot run has shown nothing."""
    try:
        return part()
    except Exception as error:
        return _broken(name, error)


def _broken(name: str, error: Exception) -> Finding:
    return Finding(part=name, passed=False, text=f"could not be audited: {type(error).__name__}: {error}")


def gaussian_epsilon(mu: float, delta: float) -> float:
    """Epsilon of a Gaussian mechanism of sensitivity over sd mu, exactly.

    Reference: Balle and Wang 2018, arXiv 1805.06530, theorem 8.
    """

    def excess(epsilon: float) -> float:
        second = math.exp(epsilon + stats.norm.logcdf(-epsilon / mu - mu / 2))
        return float(stats.norm.cdf(mu / 2 - epsilon / mu) - second - delta)

    if mu <= 0 or excess(0.0) <= 0:
        return 0.0
    if not math.isfinite(mu):
        return math.inf
    return float(optimize.brentq(excess, 0.0, mu * mu / 2 + mu * 40))
