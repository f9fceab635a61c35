"""The hospital's own limits, asked before anything else: the server can only ask."""

from __future__ import annotations

from gapweave.shared.config import Site, Study
from gapweave.shared.errors import NotApproved, RefusedError
from gapweave.shared.privacy.ledger import LedgerView


def check_policy(study: Study, site: Site, *, simulation: bool) -> None:
    """Refuse what the site file does not allow.

    Args:
        study: what is asked.
        site: what the hospital allows.
        simulation: a virtual site approves the study of its own simulation, and un-noised training only when
            that study disables privacy.

    Raises:
        NotApproved: when the hospital has not approved the study.
        RefusedError: naming the key of the site file.
    """
    policy = site.policy
    if not simulation and study.sha256 not in policy.studies:
        raise NotApproved(
            f"study {study.name!r} with hash {study.sha256} is not approved",
            where=f"{site.name}:policy.studies",
            remedy="Read the study, then: gapweave site approve SITE.yaml --study STUDY",
        )
    if not study.privacy.enabled and policy.unnoised != "allow" and not simulation:
        raise RefusedError(
            "the study trains without noise",
            where=f"{site.name}:policy.unnoised",
            remedy="Enable privacy in the study, or allow it for a test on data that need no protection",
        )
    if "update" not in policy.releases:
        raise RefusedError(
            "the site releases no model updates", where=f"{site.name}:policy.releases", remedy="Add `update`"
        )


def check_guarantee(study: Study, site: Site, ledger: LedgerView) -> None:
    """Refuse to end the guarantee of a ledger that has noised releases, unless the hospital allows just that.

    A simulation may train its own study without noise, but not on a ledger that other runs rely on.

    Raises:
        RefusedError: naming the way out.
    """
    noised = any(event.kind != "unnoised" for event in ledger.events())
    if not study.privacy.enabled and noised and site.policy.unnoised != "allow":
        raise RefusedError(
            "training without noise would end the guarantee of a ledger with private releases",
            where=f"{site.name}:policy.unnoised",
            remedy="Use another --state, or a state folder of its own for tests",
        )


def check_counts(site: Site, what: str) -> None:
    """Refuse what needs noised counts or statistics, unless the hospital releases them.

    Args:
        site: what the hospital allows.
        what: is asked, in words.

    Raises:
        RefusedError: naming the key of the site file.
    """
    if "counts" not in site.policy.releases:
        raise RefusedError(
            f"{what}, and the site releases no counts",
            where=f"{site.name}:policy.releases",
            remedy="Add `counts`, or declare patients.declared and take part in studies with public values only",
        )


def check_size(patients: int, site: Site) -> None:
    """Refuse to train on fewer patients than the hospital allows.

    Raises:
        RefusedError: naming the bound, never the number.
    """
    if patients < site.policy.min_patients:
        raise RefusedError(
            f"fewer than {site.policy.min_patients} training patients",
            where=f"{site.name}:policy.min_patients",
            remedy="Lower the limit only if the hospital agrees, or leave the study",
        )
