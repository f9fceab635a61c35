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
        site: at which it was made; empty where the file does not say.
        study: of which.
    """

    passed: bool
    parts: tuple[AuditPart, ...]
    sha256: str
    site: str = ""
    study: str = ""


def read_audit(path: Path, site: str | None = None) -> AuditResult:
    """Read what `gapweave privacy audit --json` printed.

    A part that failed fails the audit, whatever the file says of the whole.

    Args:
        path: of the file.
        site: whose audit it has to be; None for anybody's.

    Raises:
        UsageError: when the file is not there, is no such result, or is of another site.
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
    whose, study = str(content.get("site", "")), str(content.get("study", ""))
    if site and whose and whose != site:
        raise UsageError(f"this audit is of site {whose!r}, not {site!r}", where=str(path), remedy="Give its own")
    return AuditResult(passed=passed, parts=parts, sha256=hashlib.sha256(text).hexdigest(), site=whose, study=study)
