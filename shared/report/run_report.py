"""RUN/report.html: what was run, how well each model does at each site, who took part, what was spent.

It is built from the run's files only, so that it can be rebuilt anywhere; equal files give an equal page.
"""

from __future__ import annotations

import hashlib
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

from gapweave.shared.config.study import Study, TaskKind
from gapweave.shared.files import write_atomically
from gapweave.shared.report import events, plots, scores
from gapweave.shared.report.guarantee import guarantee_sentence, meaning, site_budgets, worst_epsilon
from gapweave.shared.report.joining_page import WORDS as JOINING_WORDS
from gapweave.shared.report.joining_page import joining_sections
from gapweave.shared.report.render import render
from gapweave.shared.rundir import RunDirectory

EXACT = "exact (simulation)"


def write_report(directory: RunDirectory) -> None:
    """Build report.html in a finished run's folder.

    Args:
        directory: of the run.

    Raises:
        UsageError: when the run is not finished, or its study cannot be read.
    """
    summary, study = directory.read_json("summary.json"), directory.study()
    rounds, curve = list(directory.rounds()), list(directory.lines("curve.jsonl"))
    found = scores.models(summary)
    page = render(
        "run.html",
        summary=summary,
        study=study,
        exact=summary.get("metrics_are") == EXACT,
        **_results(summary, study, found),
        **_figures(found, list(summary["sites"]), rounds, curve),
        parts=_parts(summary, study.task.kind),
        released=_released(summary),
        joining=joining_sections(summary["sites"]),
        **JOINING_WORDS,
        pooled_scores=summary.get("pooled") or (summary.get("released") or {}).get("pooled"),
        kept=next((line["kept"] for line in reversed(rounds) if "kept" in line), None),
        looks=[line["look"] for line in rounds if "look" in line],
        groups=events.group_table(study, rounds),
        lazy=events.lazy_turns(rounds),
        trouble=[span for span in events.spans(rounds) if span.status != "ok"],
        guarantee=guarantee_sentence(summary),
        meaning=meaning(worst_epsilon(summary)),
        budgets=site_budgets(summary),
        study_text=study.to_yaml(),
        files=_hashes(directory.path),
        study_differs=summary.get("study_sha256", study.sha256) != study.sha256,
    )
    write_atomically(directory.report, page.encode())


def _released(summary: Mapping[str, Any]) -> dict[str, Any]:
    """By site, what left it of how well the model does; empty for runs of a version that asked no site."""
    return {site: row["released"] for site, row in summary["sites"].items() if row.get("released")}


def _parts(summary: Mapping[str, Any], kind: TaskKind) -> dict[str, Any]:
    """Scores by class, label, subgroup and missing pattern: rows of site, part, metrics; nothing of one part in all."""
    rows, named = [], {"multiclass": ["class"], "multilabel": ["label"]}.get(kind, [])
    for site, row in summary["sites"].items():
        outputs = row.get("outputs") or {}
        rows += [(site, name, metrics) for name, metrics in outputs.items() if len(outputs) > 1]
        for subgroup, codes in (row.get("subgroups") or {}).items():
            rows += [(site, f"{subgroup}: {code}", metrics) for code, metrics in codes.items()]
        rows += [(site, f"records with {name}", metrics) for name, metrics in (row.get("patterns") or {}).items()]
    for key, name in (("subgroups", "subgroup"), ("patterns", "missing pattern")):
        named += [name] * any(row.get(key) for row in summary["sites"].values())
    return {"rows": rows, "named": " and ".join(named)} if rows else {}


def _results(summary: Mapping[str, Any], study: Study, found: Mapping[str, scores.Model]) -> dict[str, Any]:
    federated = found["federated"]
    gain = scores.compare(federated, found.get("local"))
    held = {name for row in summary["sites"].values() for name in row["modalities"]}
    means_differ = len({model.scored for model in found.values() if model.sites}) > 1
    return {
        "models": found,
        "gain": gain,
        "verdicts": scores.verdicts(found),
        "modalities": [*study.order, *sorted(held - set(study.order))],
        "means_differ": means_differ,
        "tests": sorted(row["patients"]["test"] for row in summary["sites"].values() if _tested(row)),
    }


def _tested(row: Mapping[str, Any]) -> bool:
    return bool(row["patients"] and row["patients"]["test"])


def _figures(
    found: Mapping[str, scores.Model],
    sites: list[str],
    rounds: Sequence[Mapping[str, Any]],
    curve: Sequence[Mapping[str, Any]],
) -> dict[str, Any]:
    strips = events.spans(rounds)
    everyone = sorted({*sites, *(span.site for span in strips)})
    last = max((line["round"] for line in rounds), default=0)
    return {
        "curve_plot": plots.learning_curve(curve, found),
        "site_plot": plots.site_comparison(found, sites),
        "norm_plot": plots.update_norms(events.norms(rounds)),
        "strip_plot": plots.participation(strips, everyone, last),
    }


def _hashes(path: Path) -> list[tuple[str, str]]:
    """SHA-256 of the run's files."""
    names = ["study.yaml", "summary.json", "rounds.jsonl", "curve.jsonl"]
    files = [path / name for name in names if (path / name).exists()]
    files += sorted((path / "model").glob("*.safetensors"))
    return [(file.relative_to(path).as_posix(), hashlib.sha256(file.read_bytes()).hexdigest()) for file in files]
