"""Which model does how well at which site, and whether joining paid."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, field
from typing import Any

Metrics = Mapping[str, float | None]

LABELS = {
    "local": "local-only",
    "pooled": "pooled",
    "lr_local": "logistic regression, local",
    "lr_pooled": "logistic regression, pooled",
    "gbm_local": "gradient boosting, local",
    "gbm_pooled": "gradient boosting, pooled",
    "federated": "federated",
    "fine_tuned": "fine-tuned",
}


@dataclass(frozen=True, kw_only=True)
class Model:
    """One column of the main table.

    Attributes:
        key: a baseline's name, `federated` or `fine_tuned`.
        mean: over sites where it is defined.
        sites: metrics by site; a site without any is left out.
    """

    key: str
    mean: Metrics = field(default_factory=dict)
    sites: Mapping[str, Metrics]

    @property
    def label(self) -> str:
        """What a reader calls it."""
        return LABELS.get(self.key, self.key.replace("_", " "))

    def auroc(self, site: str) -> float | None:
        """AUROC at a site, or None."""
        return self.sites.get(site, {}).get("auroc")

    @property
    def scored(self) -> frozenset[str]:
        """Sites where the AUROC is defined."""
        return frozenset(site for site in self.sites if self.auroc(site) is not None)


@dataclass(frozen=True, kw_only=True)
class Comparison:
    """The federated model against another, site by site.

    Attributes:
        other: the model that it is compared with.
        gains: federated minus other AUROC, at the sites where both are defined.
        means: both mean AUROCs over these sites: federated, other.
    """

    other: Model
    gains: Mapping[str, float]
    means: tuple[float, float]

    @property
    def better(self) -> list[str]:
        """Sites where the federated model wins."""
        return [site for site, gain in self.gains.items() if gain > 0]

    @property
    def worse(self) -> list[str]:
        """Sites where it loses."""
        return [site for site, gain in self.gains.items() if gain < 0]


def models(summary: Mapping[str, Any]) -> dict[str, Model]:
    """All models that the summary has metrics of, in the order of the main table."""
    rows, baselines = summary["sites"], summary.get("baselines") or {}
    result = [_of_rows("local", rows, "local_only", (baselines.get("local") or {}).get("mean"))]
    result += [
        Model(key=key, mean=content["mean"] or {}, sites=content["sites"])
        for key, content in baselines.items()
        if key != "local"
    ]
    if "pooled" not in baselines and summary.get("pooled_baseline"):
        result.append(Model(key="pooled", mean=summary["pooled_baseline"], sites={}))
    result.append(_of_rows("federated", rows, "metrics", summary.get("mean")))
    result.append(_of_rows("fine_tuned", rows, "fine_tuned", None))
    return {model.key: model for model in result if model.sites or model.mean or model.key == "federated"}


def _of_rows(key: str, rows: Mapping[str, Any], field_name: str, mean: Metrics | None) -> Model:
    sites = {site: row[field_name] for site, row in rows.items() if row.get(field_name)}
    return Model(key=key, mean=_mean(list(sites.values())) if mean is None else mean, sites=sites)


def _mean(metrics: list[Metrics]) -> Metrics:
    """Mean of each metric where it is defined."""
    names = {name: None for entry in metrics for name in entry}
    values = {name: [value for entry in metrics if (value := entry.get(name)) is not None] for name in names}
    return {name: sum(found) / len(found) if found else None for name, found in values.items()}


def compare(federated: Model | None, other: Model | None) -> Comparison | None:
    """Set the federated model beside another; None when no site has both."""
    if federated is None or other is None:
        return None
    pairs = {
        site: (ours, theirs)
        for site in federated.sites
        if (ours := federated.auroc(site)) is not None and (theirs := other.auroc(site)) is not None
    }
    if not pairs:
        return None
    ours, theirs = (sum(values) / len(pairs) for values in zip(*pairs.values(), strict=True))
    gains = {site: ours - theirs for site, (ours, theirs) in pairs.items()}
    return Comparison(other=other, gains=gains, means=(ours, theirs))


FINDINGS = {
    "local": ("Joining pays", "Joining does not pay"),
    "lr_local": (
        "The federated model beats logistic regression on the site's own data",
        "Logistic regression on the site's own data beats the federated model",
    ),
    "gbm_local": (
        "The federated model beats gradient boosting on the site's own data",
        "Gradient boosting on the site's own data beats the federated model",
    ),
    "fine_tuned": ("Joining and then fine-tuning pays", "Even joining and then fine-tuning does not pay"),
}
"""What is said when the federated model wins, and when it loses."""


def verdicts(found: Mapping[str, Model]) -> list[tuple[bool, str, str]]:
    """Whether joining paid: (good news, the finding, the means behind it)."""
    comparisons = {key: compare(found["federated"], found.get(key)) for key in ("local", "lr_local", "gbm_local")}
    comparisons["fine_tuned"] = compare(found.get("fine_tuned"), found.get("local"))
    return [_verdict(key, comparison) for key, comparison in comparisons.items() if comparison is not None]


def _verdict(key: str, comparison: Comparison) -> tuple[bool, str, str]:
    total, worse, better = len(comparison.gains), comparison.worse, comparison.better
    ours, theirs = comparison.means
    wins, loses = FINDINGS[key]
    detail = f"Mean AUROC {ours:.3f} against {theirs:.3f} of {comparison.other.label}."
    if worse:
        return False, f"{loses} at {len(worse)} of {total} sites in this run.", f"At {', '.join(worse)}. {detail}"
    equal = "" if len(better) == total else " It is even at the others."
    return True, f"{wins} at {len(better)} of {total} sites in this run.", f"{detail}{equal}"
