"""summary.json of a simulation; its keys are a contract."""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from typing import TYPE_CHECKING, Any

from gapweave.client import app as client_app
from gapweave.client.mixture import Predictor
from gapweave.client.predict import load_site_model
from gapweave.client.sources.findings import warnings_of
from gapweave.client.state import RunFolder
from gapweave.server.strategy import RoundLoop
from gapweave.server.summary import FROM_TABLES, released_facts, run_facts, unasked
from gapweave.shared.config import Study
from gapweave.shared.privacy.ledger import LEDGER_FILE, read_ledger
from gapweave.sites.simulate.attacks import bad_names
from gapweave.sites.simulate.evaluate import PARTS, evaluate, evaluate_parts, labelled, mean_metrics, metrics_of

if TYPE_CHECKING:
    from gapweave.sites.simulate.run import VirtualSite

Baselines = Mapping[str, Mapping[str, Predictor]]


def summarise(
    study: Study,
    sites: Sequence[VirtualSite],
    loop: RoundLoop,
    baselines: Baselines,
    engine: str,
    joined: Mapping[str, Mapping[str, Any]],
) -> dict[str, Any]:
    """The content of summary.json.

    Args:
        study: of the run.
        sites: all virtual sites, also those left out.
        loop: the finished round loop.
        baselines: fitted, by model and site.
        engine: that ran it.
        joined: the joining check of each site that made it.
    """
    scores = {name: _scores(study, sites, predictors) for name, predictors in baselines.items()}
    rows = {
        entry.site.name: {**_site(study, entry, loop, scores), "joining": joined.get(entry.site.name)}
        for entry in sites
    }
    bad = bad_names(study, [entry.site.name for entry in sites if entry.error is None])
    for name in bad:
        role = f"a bad site ({study.simulation.attack}), not counted in the mean"
        rows[name]["reason"] = "; ".join(filter(None, [rows[name]["reason"], role]))
    metrics = {name: row["metrics"] for name, row in rows.items() if row["metrics"] is not None and name not in bad}
    means = {name: mean_metrics(list(by_site.values())) for name, by_site in scores.items()}
    defined = {name: value["auroc"] for name, value in metrics.items() if value["auroc"] is not None}
    worst = min(defined, key=lambda name: defined[name], default=None)
    return {
        **run_facts(study, loop, engine),
        "metrics_are": "exact (simulation)",
        "sites": rows,
        "mean": mean_metrics(list(metrics.values())),
        "worst": {"site": worst, **(metrics[worst] if worst else {})},
        "pooled_baseline": means.get("pooled"),
        "released": {"metrics_are": FROM_TABLES, **released_facts(loop.released)},
        "baselines": {name: {"mean": means[name], "sites": by_site} for name, by_site in scores.items()},
    }


def _scores(study: Study, sites: Sequence[VirtualSite], predictors: Mapping[str, Predictor]) -> dict[str, Any]:
    result = {}
    for entry in sites:
        if entry.site.name in predictors:
            test = entry.participant.cohort.testing()
            result[entry.site.name] = metrics_of(predictors[entry.site.name](test), test, study)
    return result


def _site(study: Study, entry: VirtualSite, loop: RoundLoop, scores: Mapping[str, Any]) -> dict[str, Any]:
    name, participant = entry.site.name, entry.participant
    if entry.error is not None:
        return _absent(participant.held, "failed", str(entry.error.what))
    if name not in loop.peers:
        return _absent(participant.held, "left", "")
    peer = loop.peers[name]
    folder = RunFolder(participant.state, loop.state.run).path
    final, tuned = folder / "model.safetensors", folder / "finetuned.safetensors"
    model = load_site_model(final).model if final.exists() else None
    cohort = participant.cohort
    return {
        "status": peer.status,
        "reason": client_app.details.get(name, peer.reason) if peer.status != "ok" else unasked(peer, loop),
        "modalities": participant.held,
        "warnings": [f"{finding.where}: {finding.message}" for finding in warnings_of(participant.findings)],
        "patients": {"train": cohort.training().patients, "test": cohort.testing().patients},
        "records": {
            "train": int((cohort.training().weight > 0).sum()),
            "test": int(labelled(cohort.testing().label_mask.numpy())),
        },
        "rounds": peer.last_round,
        **(evaluate_parts(model, cohort, study) if model else dict.fromkeys(PARTS)),
        "fine_tuned": evaluate(load_site_model(tuned).model, cohort, study) if tuned.exists() else None,
        "local_only": scores.get("local", {}).get(name),
        "released": loop.released[name].to_dict() if name in loop.released else None,
        "privacy": _privacy(participant.state),
    }


def _absent(held: list[str], status: str, reason: str) -> dict[str, Any]:
    nothing = dict.fromkeys((*PARTS, "fine_tuned", "local_only", "released", "privacy"))
    return {
        "status": status,
        "reason": reason,
        "modalities": held,
        "warnings": [],
        "patients": {"train": None, "test": None},
        "records": {"train": None, "test": None},
        "rounds": 0,
        **nothing,
    }


def _privacy(state: Any) -> dict[str, Any] | None:
    """What the site's ledger says, over all its runs."""
    if not (state / LEDGER_FILE).exists():
        return None
    view = read_ledger(state)
    if not (view.entries and view.intact):
        return None
    content = view.summary()
    kept = {key: content[key] for key in ("unit", "epsilon", "epsilon_filter", "delta", "cap", "releases")}
    return {**kept, "epsilon": _finite(kept["epsilon"]), "epsilon_filter": _finite(kept["epsilon_filter"])}


def _finite(value: float | None) -> float | None:
    return None if value is None or math.isinf(value) else value
