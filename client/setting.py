"""What a site's ledger says of a run beside its events: all of it is public or decided by the hospital."""

from __future__ import annotations

import hashlib
import json
from collections.abc import Iterable, Sequence
from typing import Any

from gapweave.client.state import Groups
from gapweave.shared import __version__
from gapweave.shared.config import Site


def run_setting(site: Site, held: Sequence[str], shared: Sequence[str], initial: Groups) -> dict[str, Any]:
    """What a report tells an ethics board of a run, and no event holds.

    Args:
        site: the hospital's file.
        held: modalities that the site has, in the study.
        shared: parameter groups that leave.
        initial: the initial parameters of all groups that the site trains.

    Returns:
        Modalities, groups that leave and groups that stay, trained numbers in all groups and in those of one update,
        and what ran under which limits.
    """
    return {
        "modalities": list(held),
        "shared": list(shared),
        "kept": [group for group in initial if group not in shared],
        "parameters": _count(initial, initial),
        "parameters_shared": _count(initial, shared),
        "gapweave_version": __version__,
        "policy": policy_hash(site),
    }


def policy_hash(site: Site) -> str:
    """SHA-256 of what the hospital allows: the blocks `policy` and `patients` of its file as sorted JSON."""
    limits = site.model_dump(mode="json", include={"policy", "patients"})
    return hashlib.sha256(json.dumps(limits, sort_keys=True).encode()).hexdigest()


def _count(groups: Groups, names: Iterable[str]) -> int:
    return sum(value.numel() for name in names for value in groups[name].values())
