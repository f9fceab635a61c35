"""Predictions of several of a site's kept models as one: the weighted mean of their logits."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import numpy as np
from numpy.typing import NDArray

from gapweave.client.classical import Classical
from gapweave.client.predict import Predictions, load_site_model
from gapweave.client.state import read_model
from gapweave.shared.config import Study
from gapweave.shared.errors import UsageError
from gapweave.shared.joining import read_joining
from gapweave.shared.objective import TaskKind
from gapweave.shared.paired import SMALLEST
from gapweave.shared.schema import Batch

Predictor = Callable[[Batch], Predictions]
Weights = Mapping[str, float]
"""Kept model -> its share; the shares add up to 1."""

Array = NDArray[np.float64]

MODELS = ("best", "federated", "finetuned", "local", "blend")
"""Values of `predict --model`."""


def mix(probabilities: Sequence[Array], shares: Sequence[float], kind: TaskKind) -> Array:
    """The weighted mean of logits, as probabilities.

    Args:
        probabilities: [R, classes] of each model; for binary both classes. NaN for a label of which a model says
            nothing: the others have its share.
        shares: of each model.
        kind: of the task.
    """
    clipped = [np.clip(values, SMALLEST, 1 - SMALLEST) for values in probabilities]
    if kind == "multilabel":
        return _mixed_labels(np.stack(clipped), np.reshape(shares, (-1, 1, 1)))
    for_it = np.exp(sum(share * np.log(values) for share, values in zip(shares, clipped, strict=True)))
    return np.asarray(for_it / for_it.sum(1, keepdims=True))


def _mixed_labels(probabilities: Array, shares: Array) -> Array:
    """[models, R, labels] and [models, 1, 1] to [R, labels]; NaN where no model says anything."""
    from scipy.special import expit, logit

    silent = np.isnan(probabilities)
    heard = np.where(silent, 0.0, shares).sum(0)
    logits = np.where(silent, 0.0, shares * logit(probabilities)).sum(0)
    scale = np.divide(shares.sum(), heard, out=np.full_like(heard, np.nan), where=heard > 0)
    return np.asarray(expit(logits * scale))


@dataclass(frozen=True, kw_only=True)
class Mixture:
    """Several predictors with their shares.

    Attributes:
        parts: each with its share, the one whose votes and weights are shown first.
        kind: of the task.
    """

    parts: tuple[tuple[Predictor, float], ...]
    kind: TaskKind

    def __call__(self, batch: Batch) -> Predictions:
        """Predictions; votes and weights are those of the first part."""
        found = [(part(batch), share) for part, share in self.parts]
        if len(found) == 1:
            return found[0][0]
        mixed = mix([answer.probabilities for answer, _ in found], [share for _, share in found], self.kind)
        return replace(found[0][0], probabilities=mixed)


def kept_model(folder: Path, name: str, study: Study) -> Predictor:
    """One of the models in a site's STATE/runs/<run>.

    Args:
        folder: of the run.
        name: of the model: `model`, `finetuned`, or one that the site trained alone.
        study: of the run.
    """
    file = folder / f"{name}.safetensors"
    _, card = read_model(file)
    return Classical.parse(file.read_bytes(), study) if "classical" in card else load_site_model(file)


def load_mixture(folder: Path, weights: Weights, study: Study) -> Mixture:
    """A mixture of kept models; those without a share are not opened."""
    parts = tuple((kept_model(folder, name, study), share) for name, share in weights.items() if share > 0)
    return Mixture(parts=parts, kind=study.task.kind)


def base_of(folder: Path) -> tuple[str, dict[str, Any] | None]:
    """The site's federated model, or its fine-tuned copy where that passed the gate; and the gate's result.

    Args:
        folder: STATE/runs/<run>.
    """
    file = folder / "finetuned.safetensors"
    gate: dict[str, Any] | None = read_model(file)[1].get("gate") if file.exists() else None
    return ("finetuned" if gate and gate["kept"] else "federated"), gate


def choose(folder: Path, model: str) -> tuple[str, Weights]:
    """The model that a person asks for, and the kept ones that it is made of.

    Args:
        folder: STATE/runs/<run>.
        model: of `MODELS`. best: what the joining check chose; before the check the fine-tuned copy where that passed
            the gate, else the federated model.

    Raises:
        UsageError: for another name, or one that needs the joining check before it was made.
    """
    if model not in MODELS:
        raise UsageError(f"no model is called {model!r}", where="--model", remedy=f"Known: {', '.join(MODELS)}")
    joining = read_joining(folder)
    if joining is None and model in ("local", "blend"):
        raise UsageError(
            "the joining check, which trains the site's own models, was not made for this run",
            where=str(folder),
            remedy="Make it with `gapweave site report`, or simulate with `--joining`",
        )
    single = {"federated": {"model": 1.0}, "finetuned": {"finetuned": 1.0}}
    if joining is None:
        name = base_of(folder)[0] if model == "best" else model
        return name, single[name]
    name = {"best": joining["used"], "local": joining["strongest"]}.get(model, model)
    return name, single.get(name) or joining["mixtures"][name]
