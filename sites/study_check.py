"""Does a study fit this installation, and itself? Asked before any work."""

from __future__ import annotations

from typing import Any

from gapweave.server.aggregators import AGGREGATORS
from gapweave.shared.config import Study
from gapweave.shared.encoders import ENCODERS
from gapweave.shared.errors import UsageError
from gapweave.shared.fusion import FUSIONS
from gapweave.shared.imputers import IMPUTERS
from gapweave.shared.registry import Registry
from gapweave.shared.schemes import SCHEMES


def check_names(study: Study) -> None:
    """Resolve every registered name of a study before any work.

    Raises:
        UsageError: naming the key and the installed names.
    """
    named: list[tuple[str, str | None, Registry[Any]]] = [
        ("model.fusion", study.model.fusion, FUSIONS),
        ("model.imputer", study.model.imputer, IMPUTERS),
        ("scheme.name", study.scheme.name, SCHEMES),
        ("aggregation.default", study.aggregation.default, AGGREGATORS),
        *((f"aggregation.{key}", rule, AGGREGATORS) for key, rule in study.aggregation.rules.items()),
        *((f"modalities.{name}.encoder", spec.encoder, ENCODERS) for name, spec in study.modalities.items()),
    ]
    for key, name, registry in named:
        if name is None:
            continue
        try:
            registry[name]
        except UsageError as error:
            raise UsageError(error.what, where=f"study:{key}", remedy=error.remedy) from None
