"""Which rule a study asks for: its stages and their parameters, what it promises, and whether a group allows it."""

from __future__ import annotations

from collections.abc import Mapping
from functools import cache
from typing import Any

from gapweave.server.aggregators import (
    AGGREGATORS,
    Accumulator,
    Gathered,
    Mixer,
    Property,
    Stage,
    Sum,
)
from gapweave.shared.config.base import parse, unknown_key
from gapweave.shared.config.sharing import Aggregation, AnyRule
from gapweave.shared.errors import TooFewSites, UsageError

MOST_HOLDERS = 200
"""Holders of a group up to which a rule's quorum is looked for."""


def bad_sites(sites: int, rule: AnyRule = "auto") -> int:
    """How many bad ones of so many sites a rule is prepared for: as the study says, else floor((h - 1) / 4).

    >>> bad_sites(4), bad_sites(9)
    (1, 2)
    """
    said = None if isinstance(rule, str) else rule.parameters.get("f")
    return max(1, (sites - 1) // 4) if said is None else int(said)


def rule_for(rule: AnyRule, sites: int) -> AnyRule:
    """What `auto` means for a group that so many sites hold: nothing protects two, three or four survive one bad site.

    >>> rule_for("auto", 2), rule_for("auto", 4), rule_for("auto", 5), rule_for("mean", 5)
    ('norm_bound', 'median', 'nnm+trimmed_mean', 'mean')
    """
    if rule != "auto":
        return rule
    return "norm_bound" if sites < 3 else "median" if sites < 5 else "nnm+trimmed_mean"


def rule_of(aggregation: Aggregation, group: str, holders: int) -> AnyRule:
    """The rule of a group that so many sites hold."""
    named = aggregation.of(group)
    # Robust rules weigh all sites alike.
    return "mean" if named == "auto" and aggregation.weights == "patients" else rule_for(named, holders)


def written(rule: AnyRule) -> str:
    """A rule in one line, for logs and messages, as `trimmed_mean (f=2)`."""
    name, parameters = _read(rule)
    given = ", ".join(f"{key}={value}" for key, value in parameters.items())
    return f"{name} ({given})" if given else name


def promises(rule: AnyRule) -> frozenset[Property]:
    """What a chain promises: what all of its stages do."""
    return frozenset[Property].intersection(*(stage.properties for stage in resolve(rule)))


def protection(rule: AnyRule, sites: int) -> str:
    """What a rule promises among so many sites, for the round log."""
    if "breakdown" not in promises(rule) or sites < 3:
        return "none"
    return "weak: survives one bad site at some loss" if sites < 5 else f"{bad_sites(sites, rule)} bad of {sites}"


@cache
def quorum_of(rule: AnyRule) -> int | None:
    """The fewest holders among whom a rule is safe; None where it never is, as some chains are."""
    return next((sites for sites in range(1, MOST_HOLDERS) if _is_safe(rule, sites)), None)


def _is_safe(rule: AnyRule, sites: int) -> bool:
    try:
        start(rule_for(rule, sites), "", sites)
    except TooFewSites:
        return False
    return True


def resolve(rule: AnyRule) -> tuple[Stage, ...]:
    """The installed stages behind a rule: pre-aggregators, and one rule at the end.

    Each stage gets those of the rule's parameters that it declares; one that no stage declares is an error.

    Raises:
        UsageError: for a stage that is not installed, or that stands where it cannot, and for a parameter that none of
            them has or that is out of its bounds.
    """
    name, parameters = _read(rule)
    stages = tuple(AGGREGATORS[part.strip()] for part in name.split("+"))
    if isinstance(stages[-1], Mixer) or not all(isinstance(stage, Mixer) for stage in stages[:-1]):
        raise UsageError(
            f"{name!r} is no chain of pre-aggregators with one rule at its end",
            remedy="Write for example nnm+trimmed_mean",
        )
    known = list(dict.fromkeys(key for stage in stages for key in stage.Parameters.model_fields))
    for key in parameters:
        if key not in known:
            hint = unknown_key(key, known) if known else f"unknown key {key!r}; {name} has no parameters"
            raise UsageError(hint, remedy="See docs/aggregation.md")
    return tuple(_given(stage, parameters) for stage in stages)


def _given(stage: Stage, parameters: dict[str, Any]) -> Stage:
    mine = {key: value for key, value in parameters.items() if key in stage.Parameters.model_fields}
    return type(stage)(parse(stage.Parameters, mine, "")) if mine else stage


def _read(rule: AnyRule) -> tuple[str, dict[str, Any]]:
    return (rule, {}) if isinstance(rule, str) else (rule.rule, rule.parameters)


def left_alone(aggregation: Aggregation, held: Mapping[str, int]) -> dict[str, TooFewSites]:
    """Groups that no round would change, and why: their holders, or those that a round asks, are too few.

    Args:
        aggregation: names the rules, and how many sites a round asks.
        held: of each group, the number of its holders.
    """
    found = {}
    for group, holders in held.items():
        asked = holders if aggregation.sample is None else min(holders, aggregation.sample)
        try:
            begin(aggregation, group, asked)
        except TooFewSites as error:
            of = (
                f" (aggregation.sample: {aggregation.sample} of {holders} holders in a round)"
                if asked < holders
                else ""
            )
            found[group] = TooFewSites(f"{error.what}{of}", where=error.where, remedy=error.remedy)
    return found


def begin(aggregation: Aggregation, group: str, sites: int) -> Accumulator:
    """Begin the aggregation of one group by its own rule.

    Args:
        aggregation: of the study.
        group: its name.
        sites: number of updates that will come.

    Raises:
        TooFewSites: as `start`; also for fewer than three where the study is strict.
        UsageError: as `resolve`.
    """
    if aggregation.strict and sites < 3:
        raise TooFewSites(
            f"strict leaves {group!r} alone: {sites} holders cannot protect each other",
            where="study:aggregation.strict",
            remedy="Keep the group at the sites (sharing), find three holders, or set strict to false",
        )
    return start(rule_of(aggregation, group, sites), group, sites)


def start(rule: AnyRule, group: str, sites: int) -> Accumulator:
    """Begin the aggregation of one group by any rule.

    Args:
        rule: of the study, for example `nnm+trimmed_mean`.
        group: its name, for messages.
        sites: number of updates that will come.

    Raises:
        TooFewSites: when a condition of the rule does not hold for so few.
        UsageError: as `resolve`.
    """
    stages, f = resolve(rule), bad_sites(sites, rule)
    if sites < 1:
        raise TooFewSites(f"no site sent {group!r}", remedy="Wait for a site that holds it")
    rows = sites
    for stage in stages:
        if rows < stage.needs(f):
            raise TooFewSites(
                f"{written(rule)} of {group!r} is not safe with {f} bad of {sites} sites",
                where=f"study:aggregation.{group}",
                remedy="Wait for more sites that hold it, or choose a smaller f or a rule for fewer",
            )
        rows = stage.rows(rows) if isinstance(stage, Mixer) else rows
    if len(stages) == 1 and getattr(stages[0], "streams", False):
        return Sum()
    return Gathered(stages, sites, f)
