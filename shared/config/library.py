"""What is public of clinical numbers, shipped with Gapweave: range cards of variables, and published scores.

A study that names one is written out when it is read, so a study's hash and a run's study.yaml hold the numbers.
"""

from __future__ import annotations

from functools import cache
from pathlib import Path
from typing import Any

from gapweave.shared.config.base import read_yaml, unknown_key
from gapweave.shared.config.expression import substitute

NOTES = ("source", "means")
"""Keys of an entry that are for people, not for the study."""


@cache
def cards() -> dict[str, dict[str, Any]]:
    """Range cards by name, with their `source`."""
    return dict(sorted(_read("cards")["cards"].items()))


@cache
def scores() -> dict[str, dict[str, Any]]:
    """Published scores by name, with `source` and, by variable, what it `means`."""
    return dict(sorted(_read("scores")["scores"].items()))


@cache
def sources() -> dict[str, str]:
    """What the short names of the cards' sources stand for."""
    return dict(_read("cards")["sources"])


def _read(name: str) -> dict[str, Any]:
    return read_yaml(Path(__file__).with_name(f"{name}.yaml"), "library")


def from_card(given: dict[str, Any]) -> dict[str, Any]:
    """A variable that names a card, written out; what is given beside the card wins.

    Raises:
        ValueError: for an unknown card, or another unit than the card's.
    """
    name, own = given["card"], {key: value for key, value in given.items() if key != "card"}
    card = _entry(name, cards(), "card")
    if own.get("unit", card.get("unit")) != card.get("unit"):
        raise ValueError(
            f"the card {name!r} is in {card.get('unit', 'no unit')}; for {own['unit']!r} write the range without it"
        )
    return {**card, **own}


def from_score(given: dict[str, Any]) -> dict[str, Any]:
    """A modality that names a published score, written out: its variables as the study maps them.

    Raises:
        ValueError: for an unknown score or variable, or an `expression` beside the score.
    """
    own = {key: value for key, value in given.items() if key not in ("score", "variables")}
    if "expression" in own:
        raise ValueError("give an expression or a score, not both")
    score, mapped = _entry(given["score"], scores(), "score"), given.get("variables") or {}
    variables = scores()[given["score"]]["means"]
    for variable in mapped:
        if variable not in variables:
            raise ValueError(unknown_key(str(variable), list(variables), f"variable of {given['score']}"))
    replaced = {name: "None" if text is None else str(text) for name, text in mapped.items()}
    return {**score, "expression": substitute(_complete(score["expression"]), replaced), **own}


def _complete(expression: str) -> str:
    """A formula of the library that names another score of it (a score's logit, say), with that one's formula."""
    return substitute(expression, {name: score["expression"] for name, score in scores().items()})


def _entry(name: Any, entries: dict[str, dict[str, Any]], what: str) -> dict[str, Any]:
    if name not in entries:
        raise ValueError(unknown_key(str(name), list(entries), what))
    return {key: value for key, value in entries[name].items() if key not in NOTES}
