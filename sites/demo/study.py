"""The demo's study file."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

import yaml

from gapweave.sites.demo.world import LABEL, LABS, VITALS, Variable, World

_HEADER = """\
# The demo: synthetic hospitals, no patient. `gapweave simulate` runs it.
# Ranges: what is plausible, the usual value (center) and its usual spread (scale; of the logarithm with log).
"""


def study_text(world: World) -> str:
    """The demo's study file as YAML."""
    study: dict[str, Any] = {
        "version": 1,
        "name": "demo",
        "task": {"kind": "binary", "label": LABEL},
        "modalities": {
            "vitals": {"kind": "series", "hours": world.hours, "columns": _ranges(VITALS)},
            "scan": {"kind": "image", "size": world.scan_size, "channels": 1},
            "note": {"kind": "text", "buckets": 512},
            "labs": {"kind": "table", "columns": _ranges(LABS)},
        },
        "model": {"embedding": 16, "fusion": "late", "imputer": "cra"},
        "scheme": {"name": "none"},
        "sharing": {"policy": "all"},
        "training": {"rounds": 20, "local_steps": 5, "batch": 64, "lr": 0.5},
        "privacy": {"enabled": True, "epsilon": 8, "delta": 1e-5},
        "evaluation": {"test_fraction": 0.2, "split_seed": 0},
    }
    return _HEADER + yaml.safe_dump(study, sort_keys=False, default_flow_style=None, width=110)


def _ranges(table: Mapping[str, Variable]) -> dict[str, dict[str, Any]]:
    return {name: _range(card) for name, card in table.items()}


def _range(card: Variable) -> dict[str, Any]:
    text = {"low": card.low, "high": card.high, "center": card.center, "scale": card.scale, "unit": card.unit}
    if card.log:
        text["log"] = True
    if card.molar_mass is not None:
        text["molar_mass"] = card.molar_mass
    return text
