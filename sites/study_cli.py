"""`gapweave study init | check | cards | scores`."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Annotated

import typer

from gapweave.shared.commands import command_group

app = command_group(
    "Write or check a study file; list what is public of variables and scores.", "gapweave study check study.yaml"
)

TEMPLATE = """# What all sites agree on. Every key: docs/reference.md
version: 1
name: my-study
task: {kind: binary, label: outcome}       # multiclass: classes: [...]; multilabel: label: [a, b]
modalities:
  labs:
    kind: table
    columns:                               # public plausible ranges, the same at every site
      sodium: {card: sodium}               # a card of the library: gapweave study cards
      lactate: {card: lactate, high: 30}   # what stands beside a card wins
      troponin: {low: 1, high: 100000, center: 15, scale: 1.2, log: true, unit: ng/L}
      sex: {categories: [0, 1]}
  vitals:
    kind: series
    hours: 24                              # nothing later is ever read
    columns:
      heart_rate: {card: heart_rate}
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
    from gapweave.shared.config import load_site, load_study, naming_study
    from gapweave.shared.errors import UsageError
    from gapweave.sites.simulate.commands import read_assignments
    from gapweave.sites.simulate.run import find_sites
    from gapweave.sites.study_check import check_study, describe, foretell

    hospitals = []
    try:
        with naming_study(path):
            study = load_study(path, read_assignments(assignments or []))
            if sites is not None or any((path.parent / "sites").glob("*.yaml")):
                hospitals = [load_site(file) for file in find_sites(path, sites)]
            for alone in check_study(study, hospitals):
                raise alone
    except UsageError as error:
        if as_json:
            problem = {"id": "study", "status": "problem", "where": error.where or str(path)}
            _print_json([{**problem, "message": error.what, "remedy": error.remedy}])
        raise
    found = [("ok", name, text) for name, text in describe(study).items()] + list(foretell(study, hospitals))
    if as_json:
        of = {"where": str(path), "remedy": ""}
        _print_json([{"id": name, "status": status, **of, "message": text} for status, name, text in found])
        return
    for status, name, text in found:
        typer.echo(f"{status:<8} {name}: {text}")


@app.command("cards")
def cards(as_json: Annotated[bool, typer.Option("--json", help="Print JSON.")] = False) -> None:
    """List the range cards that a study may name, in the study's unit.

    Example: gapweave study cards
    """
    from gapweave.shared.config import library

    if as_json:
        typer.echo(json.dumps({"cards": library.cards(), "sources": library.sources()}, indent=1))
        return
    typer.echo(f"{'card':22}{'unit':9}{'plausible':>16}{'normal':>14}  source of normal")
    for name, card in library.cards().items():
        plausible, normal = f"{card['low']:g} to {card['high']:g}", card.get("normal")
        interval = f"{normal[0]:g} to {normal[1]:g}" if normal else ""
        typer.echo(
            f"{name:22}{card.get('unit', ''):9}{plausible:>16}{interval:>14}  {card['source'] if normal else ''}"
        )
    for name, text in library.sources().items():
        typer.echo(f"{name}: {text}")


@app.command("scores")
def scores(as_json: Annotated[bool, typer.Option("--json", help="Print JSON.")] = False) -> None:
    """List the published scores that a study may name, with their variables.

    Example: gapweave study scores
    """
    from gapweave.shared.config import library

    if as_json:
        typer.echo(json.dumps({"scores": library.scores()}, indent=1))
        return
    for name, score in library.scores().items():
        typer.echo(f"{name}: {score['source']}")
        for variable, meaning in score["means"].items():
            typer.echo(f"  {variable:24}{meaning}")


def _print_json(checks: list[dict[str, str]]) -> None:
    typer.echo(json.dumps({"ok": all(check["status"] != "problem" for check in checks), "checks": checks}, indent=1))
