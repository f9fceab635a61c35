"""summary.json: what every run writes, and what a deployed run may say; its keys are a contract."""

from __future__ import annotations

import math
from typing import Any

from gapweave.server.evaluation import TOO_MANY, UNREADABLE, Released, mean_metrics, pooled_metrics, worst_site
from gapweave.server.peers import Peer
from gapweave.server.strategy import RoundLoop
from gapweave.shared import __version__
from gapweave.shared.config.study import Study
from gapweave.shared.errors import GapweaveError
from gapweave.shared.privacy.accountant import fixed_epsilon
from gapweave.shared.privacy.events import PrivacyEvent
from gapweave.shared.privacy.ledger import folded

FROM_TABLES = "from noised count tables"


def run_facts(study: Study, loop: RoundLoop, engine: str) -> dict[str, Any]:
    """What is the same for a simulation and a deployment.

    Args:
        study: of the run.
        loop: the finished round loop.
        engine: that ran it.
    """
    return {
        "study": study.name,
        "study_sha256": study.sha256,
        "gapweave_version": __version__,
        "engine": engine,
        "run": loop.state.run,
        "seed": study.seed,
        "rounds": loop.state.round,
        "wall_s": round(loop.state.seconds, 3),
        "bytes_up": loop.state.bytes_up,
        "bytes_down": loop.state.bytes_down,
        "guarantee": guarantee(study),
    }


def guarantee(study: Study) -> str:
    """The promise in one line."""
    if not study.privacy.enabled:
        return "none"
    return (
        "patient-level (epsilon, delta) differential privacy at each site, add/remove neighbours; "
        "figures under sites.<name>.privacy"
    )


def released_facts(released: dict[str, Released]) -> dict[str, Any]:
    """Mean over sites, worst site, and all patients together, from tables only."""
    return {
        "mean": mean_metrics(released.values()),
        "worst": worst_site(released),
        "pooled": pooled_metrics(released.values()),
    }


def summarise_deployment(study: Study, loop: RoundLoop) -> dict[str, Any]:
    """The content of a deployed run's summary.json: public facts, and what came out of the sites' ledgers."""
    return {
        **run_facts(study, loop, "deployed"),
        "metrics_are": FROM_TABLES,
        "sites": {name: _site(study, peer, loop) for name, peer in sorted(loop.peers.items())},
        **released_facts(loop.released),
        "pooled_baseline": None,
    }


def _site(study: Study, peer: Peer, loop: RoundLoop) -> dict[str, Any]:
    released = loop.released.get(peer.site, Released())
    total = sum(float(table.counts.sum()) for table in released.tables[:1])
    return {
        "status": peer.status,
        "reason": peer.reason or unasked(peer, loop),
        "modalities": peer.modalities,
        "patients": {"train": _counted(peer), "test": max(0, round(total)) if released.tables else None},
        "rounds": peer.last_round,
        "metrics": released.metrics(),
        "fine_tuned": None,
        "local_only": None,
        "released": released.to_dict(),
        "privacy": _privacy(study, peer, released),
    }


def unasked(peer: Peer, loop: RoundLoop) -> str:
    """What is said of a site that is well, and that `aggregation.sample` drew for no round; empty for all others."""
    drawn = peer.last_round > 0 or loop.study.aggregation.sample is None or not loop.state.round
    return "" if drawn or peer.status != "ok" else "was not asked in any round"


def _counted(peer: Peer) -> int | None:
    """The noised number of training patients; a declared one is an order of magnitude, not a count."""
    kinds = [event["kind"] for event in _stated(peer, "preparation")]
    return peer.plan.get("n_hat") if "noisy_count" in kinds else None


def _stated(peer: Peer, key: str) -> list[dict[str, Any]]:
    """Events of a site's plan; what is none is left out."""
    stated = peer.plan.get(key)
    events = stated if isinstance(stated, list) else [stated]
    return [event for event in events if isinstance(event, dict) and "kind" in event]


def _privacy(study: Study, peer: Peer, released: Released) -> dict[str, Any] | None:
    """What this study's releases cost at a site, recomputed from what it stated; its ledger may hold other studies."""
    try:
        left = released.tables or released.reason in (UNREADABLE, TOO_MANY)
        looks, table = _stated(peer, "looks"), _stated(peer, "table") if left else []
        # A run that looks at scores may end because of them, also others': what counts is its whole schedule.
        may_stop = study.training.early_stop is not None and peer.last_round > 0
        rounds = study.training.rounds if may_stop else peer.last_round
        stated = [*_stated(peer, "preparation"), *_updates(study, peer, rounds), *looks, *table]
        events = [PrivacyEvent.from_dict(event) for event in stated]
        delta = float(peer.plan["delta"])
        cost = fixed_epsilon(events, delta)
    except (GapweaveError, KeyError, TypeError, ValueError, ArithmeticError, MemoryError):
        return None
    return {
        "unit": "patient",
        "epsilon": cost if math.isfinite(cost) else None,
        "delta": delta,
        "cap": None,
        "releases": folded(events),
    }


def _updates(study: Study, peer: Peer, rounds: int) -> list[dict[str, Any]]:
    """The events of so many rounds; one that a site answered and nobody heard is not in them."""
    one = {
        "kind": "dp_sgd" if study.privacy.enabled else "unnoised",
        "released": "update",
        "noise_multiplier": peer.plan["noise_multiplier"],
        "sample_rate": peer.plan["sample_rate"],
        "steps": study.training.steps_for(peer.patients),
        "max_grad_norm": study.privacy.max_grad_norm,
        "unit": "patient",
        "neighbours": "add_remove",
    }
    return [one] * rounds
