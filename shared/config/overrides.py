"""`--set` and `--vary`: dotted paths into the study file, short aliases, and presets: methods and recipes."""

from __future__ import annotations

import copy
from typing import Any

import yaml

from gapweave.shared.config.base import nearest, unknown_key
from gapweave.shared.config.recipes import RECIPES
from gapweave.shared.config.study import Study
from gapweave.shared.errors import UsageError

ALIASES = {
    "fusion": "model.fusion",
    "imputer": "model.imputer",
    "scheme": "scheme.name",
    "sharing": "sharing.policy",
    "missing_rate": "simulation.missing_rate",
    "attack": "simulation.attack",
    "epsilon": "privacy.epsilon",
    "label": "task.label",
}
"""Short names of study keys; `method` and `recipe` are presets of several (see `PRESETS`)."""

READING = ("concat", "dwfuse", "se_gate")
"""Fusions that read what an imputer put into a slot: as methods they are trained with one."""

MASKED = (
    "attention", "autoencoder", "cross_attention", "daft", "denoising_autoencoder", "flex_moe", "gated", "hypermm",
    "late", "low_rank_tensor", "majority", "max", "mean", "medfuse", "mmtm", "product", "prototypes", "qmf", "shaspec",
    "stacking", "sum", "tensor", "variational_autoencoder", "weighted",
)  # fmt: skip
"""Fusions that read no imputed slot: as methods they are trained without an imputer, which could only cost budget."""

TRAINED = (
    "attribution", "curriculum", "distill", "g_blend", "modality_dropout", "ogm_ge", "pmr", "tla", "unimodal_first",
)  # fmt: skip
"""Schemes: as methods they train concat without an imputer, so that they differ by the scheme alone."""


def _preset(fusion: str, imputer: str = "none", scheme: str = "none", **settings: Any) -> dict[str, Any]:
    return {
        "model.fusion": fusion,
        "model.imputer": imputer,
        "scheme.name": scheme,
        **{f"scheme.settings.{key}": value for key, value in settings.items()},
    }


METHODS: dict[str, dict[str, Any]] = {
    **{name: _preset(name, "cra") for name in READING},
    **{name: _preset(name) for name in MASKED},
    "embracenet": _preset("embracenet", scheme="modality_dropout"),
    **{name: _preset("concat", scheme=name) for name in TRAINED},
    "omnifuse": _preset("dwfuse", "cra_cycle", "tla"),
    "omnifuse_no_imputer": _preset("dwfuse", "none", "tla"),
    "omnifuse_no_backward": _preset("dwfuse", "cra", "tla"),
    "omnifuse_no_dwfuse": _preset("concat", "cra_cycle", "tla"),
    "omnifuse_no_tla": _preset("dwfuse", "cra_cycle", "modality_dropout"),
    "omnifuse_no_dropout": _preset("dwfuse", "none", "tla", hide=0.0),
}
"""Named presets of model and scheme: one for each method of the catalogue, and OmniFuse less each of its parts. All of
them set fusion, imputer and scheme, so that nothing of a study file's own choice stays beside them."""

PRESETS: dict[str, dict[str, dict[str, Any]]] = {"recipe": RECIPES, "method": METHODS}
"""Short names that stand for several keys: a key that is given beside them counts, in whatever order."""


def parse_assignment(text: str) -> tuple[str, Any]:
    """Split "key=value"; the value is read as YAML.

    >>> parse_assignment("training.lr=1e-3")
    ('training.lr', '1e-3')
    >>> parse_assignment("privacy.enabled=false")
    ('privacy.enabled', False)
    """
    key, sign, value = text.partition("=")
    if not sign or not key.strip():
        raise UsageError(f"{text!r} is not key=value", where="--set", remedy="Write for example training.rounds=10")
    try:
        return key.strip(), yaml.safe_load(value)
    except yaml.YAMLError:
        raise UsageError(f"the value of {key!r} cannot be read", where="--set", remedy="Quote it as YAML") from None


def parse_variation(text: str) -> tuple[str, list[Any]]:
    """Split "key=v1,v2" into the key and its values, each read as YAML.

    >>> parse_variation("fusion=late,concat")
    ('fusion', ['late', 'concat'])
    """
    key, values = text.partition("=")[::2]
    if not key.strip() or not values.strip():
        raise UsageError(f"{text!r} is not key=v1,v2", where="--vary", remedy="Write for example fusion=late,concat")
    return key.strip(), [parse_assignment(f"{key}={value}")[1] for value in values.split(",")]


def expand(key: str, value: Any) -> dict[str, Any]:
    """The dotted paths behind an alias or a preset.

    Raises:
        UsageError: for an unknown preset, or a key that no study has.
    """
    if key in PRESETS:
        if not isinstance(value, str) or value not in PRESETS[key]:
            remedy = nearest(str(value), PRESETS[key])
            raise UsageError(f"no {key} is called {value!r}", where="--set, --vary", remedy=remedy)
        return PRESETS[key][value]
    path = ALIASES.get(key, key)
    known = [*ALIASES, *PRESETS, *Study.model_fields]
    if path.split(".")[0] not in known:
        raise UsageError(unknown_key(key, known), where="--set, --vary", remedy="See docs/reference.md")
    return {path: value}


def apply(content: dict[str, Any], overrides: dict[str, Any]) -> dict[str, Any]:
    """A copy of the study file's content with the overrides written into it.

    Raises:
        UsageError: when a path runs through something that is no mapping.
    """
    result = copy.deepcopy(content)
    given = sorted(overrides.items(), key=lambda pair: [*PRESETS, pair[0]].index(pair[0]))
    asked = [pair for option in given for pair in expand(*option).items()]
    for path, value in (pair for one in asked for pair in _each(content, *one)):
        *parents, last = path.split(".")
        node = result
        for parent in parents:
            if node.get(parent) is None:
                node[parent] = {}
            node = node[parent]
            if not isinstance(node, dict):
                raise UsageError(f"{path!r} is no path in the study", where="--set", remedy="See docs/reference.md")
        node[last] = value
    return result


def _each(content: dict[str, Any], path: str, value: Any) -> list[tuple[str, Any]]:
    """A path for each modality that it means: `modalities.*.encoder` is one for each that is no public score."""
    if not path.startswith("modalities.*."):
        return [(path, value)]
    modalities, key = content.get("modalities"), path.removeprefix("modalities.*.")
    specs = modalities if isinstance(modalities, dict) else {}
    encoded = [name for name, spec in specs.items() if isinstance(spec, dict) and spec.get("kind") != "public_score"]
    return [(f"modalities.{name}.{key}", value) for name in encoded]
