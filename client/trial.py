"""One sum of gradients of synthetic patients: parts of a model that do not fit, or couple patients, cost no budget."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import torch

from gapweave.client.canaries import canaries
from gapweave.client.network import Network
from gapweave.shared.config.study import Study
from gapweave.shared.encoders import ENCODERS
from gapweave.shared.errors import GapweaveError, UsageError
from gapweave.shared.fusion import FUSIONS
from gapweave.shared.imputers import IMPUTERS
from gapweave.shared.registry import Registry
from gapweave.shared.schemes import SCHEMES, Moment, build_scheme

PATIENTS = (1, 2)
"""Records of the synthetic patients."""


def try_model(study: Study, held: Sequence[str], device: torch.device | None = None) -> None:
    """Train no step, but do all that a step does before its noise.

    Args:
        study: what all sites agree on.
        held: modalities of a site.
        device: where it trains; None for the CPU.

    Raises:
        UsageError: naming what the engine does not know, that patients are coupled, or the foreign parts in which an
            error came up.
    """
    device = device or torch.device("cpu")
    batch = canaries(study, held, PATIENTS).to(device)
    try:
        scheme = build_scheme(study)
        network = Network(study, held, device)
        network.engine.sum(batch, batch.present, lambda model, some, used: scheme.losses(model, some, used, Moment()))
    except GapweaveError:
        raise
    except Exception as error:
        foreign = foreign_parts(study)
        if not foreign:
            raise
        said = " ".join(str(error).split())[:200]
        raise UsageError(
            f"a step on synthetic patients fails: {type(error).__name__}: {said}",
            where="study:model",
            remedy=f"Mend {', '.join(foreign)}; the contract tests in tests/test_families.py say what is wrong",
        ) from error


def foreign_parts(study: Study) -> list[str]:
    """The parts that a study names and that other packages brought, as in "fusion 'mine'"."""
    named: list[tuple[Registry[Any], str]] = [
        (FUSIONS, study.model.fusion),
        (IMPUTERS, study.model.imputer),
        (SCHEMES, study.scheme.name),
        *((ENCODERS, spec.encoder) for spec in study.modalities.values() if spec.encoder is not None),
    ]
    return [
        f"{registry.family} {name!r}"
        for registry, name in dict.fromkeys(named)
        if not str(getattr(registry[name], "__module__", "")).startswith("gapweave.")
    ]
