"""docs/methods.md, generated from the docstrings of the registered parts (`make docs`)."""

from __future__ import annotations

import inspect
import json
import re
import sys
from collections.abc import Iterable, Mapping
from pathlib import Path
from typing import Any, TypedDict

from gapweave.shared.config.overrides import METHODS
from gapweave.shared.errors import UsageError
from gapweave.shared.fusion import FUSIONS, Fusion
from gapweave.shared.imputers import IMPUTERS
from gapweave.shared.registry import Registry
from gapweave.shared.schemes import SCHEMES

AGAINST, BEHIND = "late", 0.03
"""The method that others are measured against, and the AUROC below it from which docs/methods.md says so."""

MEASURED = "methods.json"
"""File beside the page: how each method did on the demo (`make methods-measured`)."""


class Measured(TypedDict):
    """How a method did on the demo at missing rate 0, of the pairs of site and seed that `AGAINST` has, too."""

    auroc: float
    difference: float
    seeds: int
    sites: int


SECTIONS = ("Reference", "Form", "Couples")
"""What each part's docstring says: the paper, what is built, and what of the original couples patients."""

HEAD = """# Methods

Generated from the code (`make docs`); a test keeps it current. Each name can be set alone (`--set fusion=gated`), or
as a preset of fusion, imputer and scheme under its own name (`--set method=gated`, `--vary method=late,gated`).
Whatever is chosen, a record's prediction and loss are a function of that record and of public parameters, modalities
in any pattern may be missing, and the guarantee is the same.

In the formulas v^m is the embedding of modality m, g a head with a linear path and a hidden layer, *used* the
modalities that a record has and that inform the prediction.

In `predictions.csv` a fusion's shares are `weight_<m>`: they add up to 1 over the modalities that the record has, are 0
for the others and for a record without any, and are left empty by a fusion that has none. `vote_<m>` is what the
modality's own head says, empty where the modality is absent: an imputed slot never votes. `imputed` lists the absent
modalities whose slots the fusion reads, and `unseen_pattern` is 1 when no training record of the site had just these.
"""

SETTINGS = "Settings of each {family}, under `{key}`:\n"

PRESETS = f"""## Presets

Methods are comparable: each sets fusion, imputer and scheme. A fusion that reads imputed slots is trained with the
imputer `cra`, one that reads none without an imputer, which would only cost budget; `modality_dropout` and the other
schemes train `concat` without an imputer (compare them with `fusion=concat imputer=none scheme=none`). `omnifuse` is
the whole of it, each `omnifuse_no_...` is it less one part, so that `--vary method=omnifuse,omnifuse_no_imputer,...` is
the paper's ablation; without modality dropout there is nothing for the imputer to learn from, and
`omnifuse_no_dropout` has none. Settings of fusion, imputer and scheme stay as the study has them. The last column
names methods that were more than {BEHIND} AUROC below `{AGAINST}` on the demo.
"""


def described(part: object) -> dict[str, str]:
    """First line and sections of a part's docstring, each on one line.

    Raises:
        UsageError: when a section is missing.
    """
    text = inspect.getdoc(part) or ""
    found = {"Summary": text.partition("\n")[0]}
    for section in SECTIONS:
        match = re.search(rf"^{section}: (.+(?:\n +.+)*)", text, re.MULTILINE)
        if match is None:
            name = getattr(part, "__name__", part)
            raise UsageError(f"the docstring of {name} has no section {section!r}", remedy=f"Add '{section}: ...'")
        found[section] = " ".join(match[1].split())
    return found


def read_measured(folder: Path) -> dict[str, Measured]:
    """What was measured of the methods; nothing before the first time."""
    file = folder / MEASURED
    content: dict[str, Measured] = json.loads(file.read_text(encoding="utf-8")) if file.exists() else {}
    return content


def markdown(measured: Mapping[str, Measured]) -> str:
    """The whole page; foreign plug-ins are left out.

    Args:
        measured: by method.
    """
    own = [name for name in FUSIONS if _is_own(FUSIONS[name])]
    return "\n".join(
        [
            HEAD,
            "## Fusions: what they are given and what they give\n",
            _table(
                ("fusion", "stage", "reads imputed slots", "shares of modalities", "several labels", "settings"),
                (_abilities(name, FUSIONS[name]) for name in own),
            ),
            "## Fusions: origin and form\n",
            _origins("fusion", FUSIONS),
            "## Imputers\n",
            _origins("imputer", IMPUTERS),
            SETTINGS.format(family="imputer", key="model.imputer_settings"),
            _table(("imputer", "settings"), _settings_rows(IMPUTERS)),
            "## Training schemes\n",
            _origins("scheme", SCHEMES),
            SETTINGS.format(family="scheme", key="scheme.settings"),
            _table(("scheme", "settings"), _settings_rows(SCHEMES)),
            PRESETS,
            _table(
                ("method", "sets", "on the demo"),
                (
                    (
                        f"`{name}`",
                        ", ".join(f"`{key}={value}`" for key, value in preset.items()),
                        _remark(name, measured),
                    )
                    for name, preset in METHODS.items()
                ),
            ),
        ]
    )


def _remark(name: str, measured: Mapping[str, Measured]) -> str:
    """That a method falls behind, or nothing."""
    if name not in measured:
        return "not measured"
    found = measured[name]
    if found["difference"] >= -BEHIND:
        return ""
    return (
        f"{-found['difference']:.3f} AUROC below `{AGAINST}` ({found['auroc']:.3f} against "
        f"{found['auroc'] - found['difference']:.3f}, {found['sites']} sites, {found['seeds']} seeds, nothing missing)"
    )


def _abilities(name: str, fusion: type[Fusion]) -> tuple[str, ...]:
    return (
        f"`{name}`",
        fusion.stage,
        "yes" if fusion.reads_slots else "no",
        "yes" if fusion.gives_shares else "no",
        "yes" if fusion.instead is None else f"no: `{fusion.instead}` can",
        _settings(fusion),
    )


def _settings(part: Any) -> str:
    settings = part.Settings()
    said = (
        f"`{key}: {getattr(settings, key)}` ({field.description})" for key, field in part.Settings.model_fields.items()
    )
    return ", ".join(said) or "none"


def _settings_rows(registry: Registry[Any]) -> Iterable[tuple[str, str]]:
    return ((f"`{name}`", _settings(registry[name])) for name in registry if _is_own(registry[name]))


def _origins(family: str, registry: Registry[Any]) -> str:
    parts = [(name, described(registry[name])) for name in registry if _is_own(registry[name])]
    rows = ((f"`{name}`", *(part[key] for key in ("Summary", *SECTIONS))) for name, part in parts)
    return _table((family, "what it does", "paper", "what is built", "what couples patients in the original"), rows)


def _is_own(part: object) -> bool:
    return str(getattr(part, "__module__", "")).startswith("gapweave.")


def _table(columns: Iterable[str], rows: Iterable[Iterable[str]]) -> str:
    columns = list(columns)
    lines = [" | ".join(cell.replace("|", "\\|") for cell in row) for row in rows]
    head = [" | ".join(columns), " | ".join("---" for _ in columns)]
    return "\n".join(f"| {line} |" for line in [*head, *lines]) + "\n"


if __name__ == "__main__":
    print(markdown(read_measured(Path(sys.argv[1]))))
