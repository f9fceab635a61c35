"""What a study would do at this hospital, in plain words, and the hospital's yes to it."""

from __future__ import annotations

from collections.abc import Iterator
from pathlib import Path

from gapweave.client.policy import check_guarantee
from gapweave.client.service import Deployment
from gapweave.shared.config.site import Site
from gapweave.shared.config.study import Study
from gapweave.shared.errors import RefusedError, UsageError
from gapweave.shared.files import write_atomically
from gapweave.shared.model import MultimodalModel, groups, shared_groups
from gapweave.shared.privacy.ledger import LEDGER_FILE, LedgerView, read_ledger
from gapweave.shared.privacy.plan_report import PlanReport, plan_lines, plan_report, weakness
from gapweave.shared.report.wording import budget


def in_plain_words(study: Study, deployment: Deployment) -> Iterator[str]:
    """Lines for the person who decides.

    Args:
        study: what is asked.
        deployment: the site's side.
    """
    site = deployment.site
    held = site.held(study)
    lacking = [name for name in study.order if name not in held]
    leaving = shared_groups(study, groups(MultimodalModel(study, held))) if held else []
    yield f"Study {study.name}, hash {study.sha256}"
    yield f"  predicts      {', '.join(study.task.labels)} ({study.task.kind})"
    yield f"  reads here    {', '.join(held) or 'nothing: this site has none of its modalities'}"
    if lacking:
        yield f"  lacks here    {', '.join(lacking)}; the model does without them"
    yield f"  rounds        {study.training.rounds}"
    yield f"  leaves        {', '.join(leaving) or 'nothing'}: model parameters, never a record"
    yield from (f"                {line}" for line in _leaves_too(study, site))
    yield "  stays         all records, all other parameters, every score of a patient"
    view = _ledger(deployment)
    taken = view.bound([*view.outstanding()]) if view else 0.0
    cap = f"the site's cap for all runs together is {site.policy.epsilon:g}; {budget(taken)} is spent or reserved"
    if study.privacy.enabled:
        target = f"epsilon {study.privacy.epsilon:g} at most each time it is run, at delta {study.privacy.delta:g}"
        yield f"  privacy       {target}"
        yield f"                {cap}"
        if weak := weakness(study.privacy.epsilon):
            yield f"                {weak}"
        if site.patients.declared is None:
            yield "                the number of training patients is not declared: it is released once, with noise;"
            yield "                `gapweave site check` with this study says what the noise means for your patients"
        else:
            report = site_plan(study, site, site.patients.declared, view)
            yield from ("", *(f"  {line}" if line else "" for line in plan_lines(report)))
    else:
        yield "  privacy       NONE: updates leave without noise, and can reveal patients"
        yield f"                {cap}"
        yield "                only for data that need no protection (policy.unnoised: allow)"


def site_plan(study: Study, site: Site, patients: int, view: LedgerView | None) -> PlanReport:
    """The plan of a study at a site as its ledger stands.

    Args:
        study: with privacy.
        site: the site file.
        patients: declared, or about so many.
        view: its ledger; None where there is none yet.
    """
    return plan_report(
        study,
        patients,
        site.policy.epsilon,
        site.delta if view is None else view.delta,
        held=site.held(study),
        tables="counts" in site.policy.releases,
        view=view,
    )


def _leaves_too(study: Study, site: Site) -> Iterator[str]:
    """What leaves beside parameters."""
    counted = "counted, with noise" if study.privacy.enabled else "counted"
    source = counted if site.patients.declared is None else "declared"
    yield f"number of training patients ({source}), modalities, plan of the noise"
    if study.privacy.enabled and "counts" in site.policy.releases:
        looks = f", also after {len(study.training.looks)} of the rounds" if study.training.looks else ""
        if looks or study.evaluation.epsilon is not None:
            yield f"if held-out patients are many: how many had which score, with noise{looks}"


def approve(study: Study, deployment: Deployment) -> bool:
    """Add a study's hash to policy.studies in the site file, whose comments and order stay.

    Returns:
        Whether it was not there before.

    Raises:
        UsageError: when the site has nothing that the study reads.
        RefusedError: for training without noise that the site's policy or ledger does not allow.
    """
    site = deployment.site
    if not site.held(study):
        raise UsageError(
            "the site has none of the study's modalities",
            where=f"{deployment.file}:data",
            remedy=f"The study reads {', '.join(study.order)}",
        )
    if not study.privacy.enabled and site.policy.unnoised != "allow":
        raise RefusedError(
            "the study trains without noise",
            where=f"{deployment.file}:policy.unnoised",
            remedy="Enable privacy in the study, or allow it for a test on data that need no protection",
        )
    view = _ledger(deployment)
    if view is not None:
        check_guarantee(study, site, view)
    if study.sha256 in site.policy.studies:
        return False
    _add(deployment.file, study.sha256)
    return True


def _ledger(deployment: Deployment) -> LedgerView | None:
    return read_ledger(deployment.state) if (deployment.state / LEDGER_FILE).exists() else None


def _add(file: Path, hashed: str) -> None:
    """Write the hash into the file, and leave all else as a person wrote it."""
    import io

    from ruamel.yaml import YAML

    yaml = YAML()
    yaml.preserve_quotes = True
    yaml.width = 1000
    content = yaml.load(file.read_text(encoding="utf-8"))
    policy = content.setdefault("policy", {})
    policy.setdefault("studies", []).append(hashed)
    text = io.StringIO()
    yaml.dump(content, text)
    mode = file.stat().st_mode
    write_atomically(file, text.getvalue().encode())
    file.chmod(mode)
