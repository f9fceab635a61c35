"""The study's blocks `sharing` and `aggregation`: which parameter groups leave a site, and how they are combined."""

from __future__ import annotations

from collections.abc import Iterable
from fnmatch import fnmatchcase
from typing import Annotated, Any, Literal, Self

from pydantic import BeforeValidator, ConfigDict, Discriminator, Field, Tag, model_serializer, model_validator

from gapweave.shared.config.base import StrictModel, unknown_key

GROUP_FAMILIES = ("encoder/*", "head/*", "imputer", "fusion")
"""Families of parameter groups, as patterns: every trained tensor is in exactly one group of one family."""

Share = Literal["shared", "holders", "local"]


class Sharing(StrictModel):
    """Which parameter groups leave a site."""

    policy: Literal["heads", "heads+imputer", "all"] | dict[str, Share] = Field(
        "heads", description="a policy, or a map from group pattern to shared, holders or local"
    )

    @model_validator(mode="before")
    @classmethod
    def _bare_map(cls, data: Any) -> Any:
        """Accept `sharing: {"encoder/*": holders}` as well as `sharing: {policy: {...}}`."""
        if isinstance(data, dict) and data and all(_is_group_pattern(str(key)) for key in data):
            return {"policy": data}
        return data

    @model_validator(mode="after")
    def _patterns(self) -> Self:
        if isinstance(self.policy, dict):
            for pattern in self.policy:
                if not _is_group_pattern(pattern):
                    raise ValueError(f"{pattern!r} names no parameter group; use {', '.join(GROUP_FAMILIES)}")
        return self

    def of(self, group: str) -> Share:
        """How ``group`` is shared: the most specific pattern decides; without one only the heads leave."""
        families = {
            "heads": ("fusion", "head/*"),
            "heads+imputer": ("fusion", "head/*", "imputer"),
            "all": GROUP_FAMILIES,
        }
        if isinstance(self.policy, str):
            return "holders" if any(fnmatchcase(group, family) for family in families[self.policy]) else "local"
        pattern = _most_specific(group, self.policy)
        if pattern is not None:
            return self.policy[pattern]
        return "holders" if any(fnmatchcase(group, family) for family in families["heads"]) else "local"


def _is_group_pattern(pattern: str) -> bool:
    """Whether a pattern can match a parameter group: "fusion", "encoder/*", "head/labs", "*"."""
    probes = ("encoder/x", "head/x", "imputer", "fusion")
    return pattern.startswith(("encoder/", "head/")) or any(fnmatchcase(probe, pattern) for probe in probes)


def _most_specific(group: str, patterns: Iterable[str]) -> str | None:
    """The longest pattern that matches; the order in which a map is written means nothing, for JSON sorts it."""
    matching = [pattern for pattern in patterns if fnmatchcase(group, pattern)]
    return max(matching, key=lambda pattern: (pattern == group, len(pattern), pattern), default=None)


class Rule(StrictModel):
    """A rule with parameters of its own, as `{rule: trimmed_mean, f: 2}`; the server knows which parameters it has."""

    model_config = ConfigDict(extra="allow")

    rule: str = Field(description="registered stages, as `nnm+trimmed_mean`")

    @classmethod
    def accepts_key(cls, key: str) -> bool:
        """What the stages declare is looked up where they are installed."""
        return True

    @model_validator(mode="after")
    def _of_a_rule(self) -> Self:
        if self.rule == "auto" and self.parameters:
            raise ValueError("auto goes by the number of holders and takes no parameters; name a rule")
        return self

    @property
    def parameters(self) -> dict[str, Any]:
        """All keys but `rule`."""
        return dict(self.model_extra or {})


def _plain(value: Any) -> Any:
    """A rule without parameters is its name: two ways to write it are one study."""
    return value["rule"] if isinstance(value, dict) and value.keys() == {"rule"} else value


def _kind(value: Any) -> str:
    return "parameters" if isinstance(value, dict | Rule) else "name"


AnyRule = Annotated[
    Annotated[str, Tag("name")] | Annotated[Rule, Tag("parameters")], Discriminator(_kind), BeforeValidator(_plain)
]
"""As a study has it: the name of a chain, `nnm+trimmed_mean` say, or that with parameters."""


class Aggregation(StrictModel):
    """The server's rules. Keys that are group patterns ("encoder/*") choose a rule for those groups."""

    default: AnyRule = Field(
        "auto",
        description="rule for groups without their own, as `nnm+trimmed_mean`, or with parameters, as "
        "`{rule: trimmed_mean, f: 2}`; auto: by the number of holders (docs/aggregation.md)",
    )
    rules: dict[str, AnyRule] = Field(default_factory=dict, description="written as flat keys: group pattern -> rule")
    weights: Literal["uniform", "patients"] = Field(
        "uniform", description="what a site counts for in a mean: all the same, or its public number of patients"
    )
    server_optimizer: Literal["none", "momentum", "adam", "yogi", "adagrad"] = Field(
        "none", description="optimiser applied to the aggregate"
    )
    server_lr: float = Field(1.0, gt=0, description="learning rate of the server")
    server_momentum: float = Field(0.9, ge=0, lt=1, description="decay of the server optimiser's first moment")
    server_beta2: float = Field(0.99, ge=0, lt=1, description="decay of the second moment, for adam and yogi")
    server_floor: float = Field(
        1e-3, gt=0, description="added to the root of the second moment: how adaptive adam, yogi and adagrad are"
    )
    history: float | None = Field(
        None,
        ge=0,
        lt=1,
        description="decay of a site's earlier updates in the mean that a robust rule sees; 0: this round's update "
        "only (default: 0.8 under privacy, else 0)",
    )
    average_last: float = Field(
        0.0,
        ge=0,
        le=1,
        description="share of the rounds, the last ones, whose shared parameters are averaged to the final ones; "
        "0: the last round's",
    )
    shrink: bool = Field(
        False,
        description="shrink what was learnt towards the public start, and what a site fine-tunes towards the federated "
        "model, by how much of it may be noise (docs/decisions/0022-shrinkage.md); without noise nothing is shrunk",
    )
    sample: int | None = Field(None, ge=1, description="sites asked in a round (default: all that can take part)")
    sampling: Literal["random", "coverage"] = Field(
        "random",
        description="how these are drawn, by the study's seed: evenly, or with a holder of each parameter group first",
    )
    quorum: int = Field(2, ge=1, description="sites that a round needs")
    strict: bool = Field(False, description="leave a group alone rather than aggregate it unprotected")
    deadline_s: float = Field(600, gt=0, description="seconds that a round waits for its sites")

    @classmethod
    def accepts_key(cls, key: str) -> bool:
        """Group patterns are keys too."""
        return _is_group_pattern(key)

    @model_validator(mode="before")
    @classmethod
    def _collect(cls, data: Any) -> Any:
        if not isinstance(data, dict):
            return data
        rules = {key: value for key, value in data.items() if _is_group_pattern(str(key))}
        rest = {key: value for key, value in data.items() if key not in rules}
        nested = rest.get("rules", {})
        return {**rest, "rules": {**nested, **rules}} if isinstance(nested, dict) else rest

    @model_validator(mode="after")
    def _weighed(self) -> Self:
        if self.sample is not None and self.sample < self.quorum:
            raise ValueError(f"sample={self.sample} asks fewer sites than quorum={self.quorum} needs")
        if self.shrink and self.server_optimizer not in ("none", "momentum"):
            raise ValueError(f"shrink needs to know what becomes of noise; {self.server_optimizer} is not linear in it")
        named = (rule if isinstance(rule, str) else rule.rule for rule in (self.default, *self.rules.values()))
        other = sorted(set(named) - {"auto", "mean"})
        if self.weights == "patients" and other:
            raise ValueError(f"weights: patients needs the rule mean, not {other[0]!r}; robust rules weigh alike")
        return self

    @model_serializer(mode="plain")
    def _flat(self) -> dict[str, Any]:
        fields = {name: getattr(self, name) for name in type(self).model_fields if name != "rules"}
        return {**fields, **self.rules}

    def of(self, group: str) -> AnyRule:
        """The rule for ``group``: that of the most specific pattern, else the default."""
        pattern = _most_specific(group, self.rules)
        return self.default if pattern is None else self.rules[pattern]


def check_patterns(sharing: Sharing, aggregation: Aggregation, modalities: Iterable[str]) -> None:
    """Refuse a pattern that no group matches: a typing error, and what it meant would silently get the default.

    Raises:
        ValueError: naming the block, the pattern and the nearest group.
    """
    groups = [family.replace("*", name) for name in modalities for family in GROUP_FAMILIES if "*" in family]
    groups += [family for family in GROUP_FAMILIES if "*" not in family]
    shared = sharing.policy if isinstance(sharing.policy, dict) else {}
    for where, patterns in (("sharing.policy", shared), ("aggregation", aggregation.rules)):
        for pattern in patterns:
            if not any(fnmatchcase(group, pattern) for group in groups):
                raise ValueError(f"{where}: {unknown_key(pattern, groups, 'parameter group')}")
