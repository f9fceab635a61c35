"""`gapweave privacy audit`: let a hospital test the code that is about to train on its patients."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Annotated

import typer

from gapweave.client.deployment_cli import DataOption


def audit(
    study: Annotated[Path, typer.Argument(help="Study file.", metavar="STUDY.yaml")],
    site: Annotated[Path, typer.Option("--site", help="Site file; its data are not opened.", resolve_path=True)],
    data: DataOption = None,
    claim: Annotated[
        float, typer.Option("--one-run", min=0.05, help="Epsilon that the training run on canaries claims.")
    ] = 1.0,
    as_json: Annotated[bool, typer.Option("--json", help="Print JSON.")] = False,
) -> None:
    """Test on synthetic patients that the private step does what its events say; exits 3 when it does not.

    Example: gapweave privacy audit study.yaml --site hospital.yaml
    """
    from gapweave.client.audit import audit_site
    from gapweave.shared import __version__
    from gapweave.shared.config import load_site, load_study
    from gapweave.shared.errors import RefusedError

    planned, hospital = load_study(study), load_site(site)
    result = audit_site(planned, hospital, site, data, claim)
    if as_json:
        whose = {"site": hospital.name, "study": planned.name, "study_sha256": planned.sha256, "version": __version__}
        typer.echo(json.dumps({**result.to_dict(), **whose}, indent=1))
    else:
        for part in result.parts:
            typer.echo(f"{'passed' if part.passed else 'FAILED':<8} {part.part}: {part.text}")
        typer.echo(f"epsilon of one step: claimed {result.claimed:.3g}, at least {result.lower_bound:.3g} was shown")
    if not result.passed:
        raise typer.Exit(RefusedError.exit_code)
