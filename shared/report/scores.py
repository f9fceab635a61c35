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


def compare(federated: Model, other: Model | None) -> Comparison | None:
    """Set the federated model beside another; None when no site has both."""
    if other is None:
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


def verdicts(found: Mapping[str, Model]) -> list[tuple[bool, str]]:
    """Whether joining paid, in sentences: (good news, text)."""
    federated = found["federated"]
    result = [_against(compare(federated, found.get("local")), "Joining")]
    result += [
        _against(compare(federated, model), "The federated network")
        for key, model in found.items()
        if key in ("lr_local", "gbm_local")
    ]
    if "fine_tuned" in found:
        result.append(_against(compare(found["fine_tuned"], found.get("local")), "Joining and fine-tuning"))
    return [verdict for verdict in result if verdict is not None]


def _against(comparison: Comparison | None, subject: str) -> tuple[bool, str] | None:
    if comparison is None:
        return None
    total, worse, better = len(comparison.gains), comparison.worse, comparison.better
    ours, theirs = comparison.means
    alone = comparison.other.key == "local"
    what = "" if alone else f" in comparison with {comparison.other.label}"
    means = f"Mean AUROC {ours:.3f} against {theirs:.3f} of {comparison.other.label}."
    if worse:
        where = f"{len(worse)} of {total} sites in this run ({', '.join(worse)})"
        return False, f"{subject} does not pay at {where}{what}. {means}"
    if len(better) < total:
        return True, f"{subject} pays at {len(better)} of {total} sites{what}, and costs nothing at the others. {means}"
    return True, f"{subject} pays at all {total} sites{what}. {means}"
