"""What a site is told of whether joining paid: the verdict's rules, and its words.

The content of joining.json stays at the site. This module makes it readable there, and in a simulation's report.
"""

from __future__ import annotations

import json
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from gapweave.shared.files import intact
from gapweave.shared.judging import FEWEST

JOINING_FILE = "joining.json"

MARGIN = 0.05
"""AUROC that a model may lose at most, by the interval of the difference, to be called no worse."""

VERDICTS = {
    "better": "better than alone",
    "no worse": "no worse than alone",
    "worse": "worse than alone: use your own model",
    "unclear": "too few patients to tell",
}
"""What a site is told, by verdict."""

LABELS = {
    "federated": "federated",
    "finetuned": "federated, fine-tuned",
    "blend": "blend of federated and local",
    "local": "the same network, local only",
    "lr_local": "logistic regression, local only",
    "gbm_local": "gradient boosting, local only",
    "score_local": "public score with the best local model",
}
"""What a reader calls a model, by its key in joining.json."""

JOINED = ("federated", "finetuned", "blend")
"""Models that hold something of other sites: each gets a verdict."""

Interval = tuple[float, float] | None


def verdict(difference: Interval, rarer: int) -> str:
    """What the difference to the strongest local model says, of `VERDICTS`.

    An interval that holds 0 is no proof of "no worse": only one that ends above -`MARGIN` is.

    >>> verdict((0.01, 0.09), 30), verdict((-0.02, 0.09), 30), verdict((-0.2, 0.2), 30), verdict((0.01, 0.09), 7)
    ('better', 'no worse', 'unclear', 'unclear')

    Args:
        difference: 95 % interval of the AUROC minus that of the strongest local model; None where undefined.
        rarer: held-out patients of the rarer class.
    """
    if difference is None or rarer < FEWEST:
        return "unclear"
    low, high = difference
    if low > 0:
        return "better"
    if high < 0:
        return "worse"
    return "no worse" if low > -MARGIN else "unclear"


def guessing(*intervals: Interval) -> bool:
    """Whether none of the AUROCs is known to be above that of guessing."""
    return all(interval is None or interval[0] <= 0.5 for interval in intervals)


def verdict_text(found: str, patients: int, rarer: int) -> str:
    """A verdict in words, with the number of patients where there are too few."""
    detail = f" ({patients} held out, {rarer} of the rarer class)" if found == "unclear" else ""
    return f"{VERDICTS[found]}{detail}"


def lines(joining: Mapping[str, Any]) -> list[str]:
    """What a person at the site must know, most important first.

    Args:
        joining: the content of joining.json.
    """
    patients, rarer = joining["patients"], joining["rarer"]
    used, models = joining["used"], joining["models"]
    joined = [key for key in dict.fromkeys((used, "federated")) if key in JOINED]
    result = [] if used in JOINED else [f"the best model here is the site's own: {LABELS[used]}"]
    result += [f"{LABELS[key]}: {verdict_text(models[key]['verdict'], patients, rarer)}" for key in joined]
    if joining["guessing"] and rarer >= FEWEST:
        result.append("no model here is known to be better than guessing: look at the labels and the data")
    return result


def harmed(joining: Mapping[str, Any]) -> bool:
    """Whether what the site would use, or the federated model as it is, is worse than its own."""
    models = joining["models"]
    return "worse" in (models[joining["used"]]["verdict"], models["federated"]["verdict"])


def found_worse(folder: Path, model: str) -> bool:
    """Whether the joining check found a model worse than the site's own, on patients whom neither had seen.

    Args:
        folder: STATE/runs/<run>.
        model: its name in joining.json.
    """
    joining = read_joining(folder)
    return joining is not None and joining["models"].get(model, {}).get("verdict") == "worse"


def read_joining(folder: Path) -> dict[str, Any] | None:
    """What joining.json in STATE/runs/<run> holds, if the check was made."""
    file = folder / JOINING_FILE
    if not file.exists():
        return None
    with intact(file):
        content: dict[str, Any] = json.loads(file.read_text(encoding="utf-8"))
    return content
