"""The result of `gapweave privacy audit --json`, as a privacy report shows it."""

from __future__ import annotations

import hashlib
import json
from dataclasses import dataclass
from pathlib import Path

from gapweave.shared.errors import UsageError


@dataclass(frozen=True, kw_only=True)
class AuditPart:
    """One part of an audit.

    Attributes:
        part: its name.
        passed: whether the code did what its events say.
        text: what was found.
    """

    part: str
    passed: bool
    text: str


@dataclass(frozen=True, kw_only=True)
class AuditResult:
    """An audit of the code that trains.

    Attributes:
        passed: whether every part passed.
        parts: in the order of the audit.
        sha256: of the file that the result was read from: the ledger does not vouch for it.
    """

    passed: bool
    parts: tuple[AuditPart, ...]
    sha256: str


def read_audit(path: Path) -> AuditResult:
    """Read what `gapweave privacy audit --json` printed.

    A part that failed fails the audit, whatever the file says of the whole.

    Raises:
        UsageError: when the file is not there, or is no such result.
    """
    try:
        text = path.read_bytes()
        content = json.loads(text)
        parts = tuple(
            AuditPart(part=str(part["part"]), passed=part["passed"] is True, text=str(part["text"]))
            for part in content["parts"]
        )
        passed = content["passed"] is True and bool(parts) and all(part.passed for part in parts)
    except (OSError, ValueError, KeyError, TypeError):
        raise UsageError(
            "this is no result of an audit",
            where=str(path),
            remedy="Give what `gapweave privacy audit STUDY --site SITE.yaml --json` printed",
        ) from None
    return AuditResult(passed=passed, parts=parts, sha256=hashlib.sha256(text).hexdigest())
