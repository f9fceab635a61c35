"""What a check found: one line each, never with a patient's value."""

from __future__ import annotations

from collections.abc import Iterable
from dataclasses import dataclass
from typing import Literal

from gapweave.shared.errors import DataError

Status = Literal["ok", "warning", "problem"]


@dataclass(frozen=True, kw_only=True)
class Finding:
    """One line of `gapweave site check`.

    Attributes:
        id: the check, for machines.
        status: ok, warning (training goes on), or problem (training is refused).
        where: file:column or file:key.
        message: what was found; counts and column names only.
        remedy: what to do; empty when nothing is to be done.
    """

    id: str
    status: Status
    where: str
    message: str
    remedy: str = ""


def warnings_of(findings: Iterable[Finding]) -> list[Finding]:
    """Those that a person should look at, problems first."""
    return sorted((one for one in findings if one.status != "ok"), key=lambda one: one.status != "problem")


def refuse_problems(findings: Iterable[Finding]) -> None:
    """Refuse to train on data that `site check` calls wrong.

    Raises:
        DataError: the first problem, with the number of further ones.
    """
    problems = [finding for finding in findings if finding.status == "problem"]
    if problems:
        more = f" ({len(problems) - 1} more: see `gapweave site check`)" if len(problems) > 1 else ""
        raise DataError(problems[0].message + more, where=problems[0].where, remedy=problems[0].remedy)
