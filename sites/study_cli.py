"""`gapweave study init | check`."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Annotated

import typer

from gapweave.shared.commands import command_group

app = command_group("Write or check a study file.")

TEMPLATE = """# What all sites agree on. Every key: docs/reference.md
version: 1
name: my-study
task: {kind: binary, label: outcome}       # multiclass: classes: [...]; multilabel: label: [a, b]
modalities:
  labs:
    kind: table
    columns:                               # public plausible ranges, the same at every site
      sodium: {low: 100, high: 180, center: 140, scale: 5, unit: mmol/L}
      lactate: {low: 0.2, high: 30, center: 1.5, scale: 0.5, log: true, unit: mmol/L, molar_mass: 90.08}
      sex: {categories: [0, 1]}
  vitals:
    kind: series
    hours: 24                              # nothing later is ever read
    columns:
      heart_rate: {low: 20, high: 250, center: 85, scale: 18, unit: 1/min}
model: {embedding: 16, fusion: late, imputer: cra}
sharing: {policy: all}                     # heads | heads+imputer | all
training: {rounds: 30, local_steps: 5, batch: 64, lr: 0.5}
aggregation: {default: auto, quorum: 2}
privacy: {enabled: true, epsilon: 8, delta: 1.0e-5, max_grad_norm: 1.0}
seed: 0
evaluation: {test_fraction: 0.2, split_seed: 0}
"""


@app.command("init")
def init(path: Annotated[Path, typer.Argument(help="File to write.", metavar="STUDY")] = Path("study.yaml")) -> None:
    """Write a study file with comments, to be changed.

    Example: gapweave study init study.yaml
    """
    from gapweave.shared.files import write_new

    write_new(path, TEMPLATE)
    typer.echo(f"wrote {path}; change it, then: gapweave study check {path}")


@app.command("check")
def check(
    path: Annotated[Path, typer.Argument(help="Study file.", metavar="STUDY")],
    sites: Annotated[
        Path | None,
        typer.Option("--sites", help="Folder of site files [default: sites/ beside STUDY, if any]."),
    ] = None,
    assignments: Annotated[list[str] | None, typer.Option("--set", help="key=value, as in simulate.")] = None,
    as_json: Annotated[bool, typer.Option("--json", help="Print JSON.")] = False,
) -> None:
    """Check a study file and say what it would send; exits 2 when it is wrong.

    Example: gapweave study check study.yaml
    """
    from gapweave.shared.config import load_site, load_study
    from gapweave.shared.errors import UsageError
    from gapweave.sites.simulate.commands import read_assignments
    from gapweave.sites.simulate.run import find_sites
    from gapweave.sites.study_check import check_holders, check_names, describe

    try:
        study = load_study(path, read_assignments(assignments or []))
        check_names(study)
        if sites is not None or (path.parent / "sites").is_dir():
            check_holders(study, [load_site(file) for file in find_sites(path, sites)])
    except UsageError as error:
        if as_json:
            problem = {"id": "study", "status": "problem", "where": error.where or str(path)}
            _print_json([{**problem, "message": error.what, "remedy": error.remedy}])
        raise
    lines = describe(study)
    if as_json:
        ok = {"status": "ok", "where": str(path), "remedy": ""}
        _print_json([{"id": name, **ok, "message": text} for name, text in lines.items()])
        return
    for name, text in lines.items():
        typer.echo(f"ok       {name}: {text}")


def _print_json(checks: list[dict[str, str]]) -> None:
    typer.echo(json.dumps({"ok": all(check["status"] == "ok" for check in checks), "checks": checks}, indent=1))
