"""STATE/runs/<run>/report.html: the joining check, for the people of one hospital."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

from gapweave.shared.joining import LABELS, VERDICTS, harmed, lines
from gapweave.shared.report.render import render


def joining_page(joining: Mapping[str, Any]) -> str:
    """The page; equal content gives an equal page.

    Args:
        joining: the content of joining.json.
    """
    return render("joining.html", joining=joining, lines=lines(joining), bad=harmed(joining), **WORDS)


WORDS: dict[str, Any] = {"labels": LABELS, "verdict_words": VERDICTS}
"""What the table of the check needs beside its content; the report of a simulation has the same table."""


def joining_sections(sites: Mapping[str, Mapping[str, Any]]) -> list[dict[str, Any]]:
    """The checks of a simulation's sites, those first that joining harms.

    Args:
        sites: rows of summary.json by site; those of older runs and of deployments hold no check.
    """
    checks = {site: row["joining"] for site, row in sites.items() if row.get("joining")}
    return [
        {"site": site, "joining": checks[site], "lines": lines(checks[site]), "bad": harmed(checks[site])}
        for site in sorted(checks, key=lambda site: not harmed(checks[site]))
    ]
