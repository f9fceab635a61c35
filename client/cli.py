"""`gapweave site ...` and `gapweave predict`: what a hospital types."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Annotated

import typer

from gapweave.client import deployment_cli
from gapweave.client.deployment_cli import DataOption, SiteArgument
from gapweave.shared.commands import command_group

site = command_group("Set up, check and run a hospital's part.", "gapweave site check hospital.yaml --study study.yaml")


@site.command("init")
def init(
    path: Annotated[Path, typer.Argument(help="File to write.", metavar="SITE.yaml")] = Path("site.yaml"),
    study: Annotated[
        Path | None, typer.Option("--study", help="Study whose modalities and variables are written out.")
    ] = None,
    name: Annotated[str | None, typer.Option("--name", help="Name of the site [default: the file's].")] = None,
    connection: Annotated[
        Path | None, typer.Option("--connection", help="The hub's connection.yaml; without it, for simulations only.")
    ] = None,
) -> None:
    """Write a site file with comments, to be filled in, and a key pair by which the hub will know the site.

    Example: gapweave site init site.yaml --study study.yaml --connection connection.yaml
    """
    import os

    from gapweave.client.keys import make_keys, public_file
    from gapweave.client.template import site_template
    from gapweave.shared.config import load_study
    from gapweave.shared.config.connection import load_connection
    from gapweave.shared.files import write_new

    if connection is not None:
        load_connection(connection)
    hub = None if connection is None else os.path.relpath(connection, path.parent)
    key = path.with_suffix(".key")
    write_new(path, site_template(name or path.stem, load_study(study) if study else None, hub, key.name))
    public = public_file(key) if key.exists() else make_keys(key)
    typer.echo(f"wrote {path}; fill it in, then: gapweave site check {path}")
    typer.echo(f"{key} never leaves this machine; give {public} to the hub if the site shall join one")


@site.command("check")
def check(
    path: SiteArgument,
    study: Annotated[Path | None, typer.Option("--study", help="Study to check the data against.")] = None,
    data: DataOption = None,
    as_json: Annotated[bool, typer.Option("--json", help="Print JSON.")] = False,
) -> None:
    """Find what is wrong with data, machine, network and budget before a run does.

    Exits 6 when there is a problem with the data, else 5 with database or hub, else 2, or 3 with ledger and budget.

    Example: gapweave site check hospital.yaml --study study.yaml
    """
    from gapweave.client import checks
    from gapweave.shared.config import load_site, load_study
    from gapweave.shared.errors import UsageError

    try:
        findings = checks.check_site(load_study(study) if study else None, load_site(path), path, data)
    except UsageError as error:
        if as_json:
            problem = checks.Finding(
                id="file", status="problem", where=error.where or str(path), message=error.what, remedy=error.remedy
            )
            typer.echo(json.dumps(checks.as_json([problem]), indent=1))
        raise
    if as_json:
        typer.echo(json.dumps(checks.as_json(findings), indent=1))
    else:
        for finding in findings:
            remedy = f" -> {finding.remedy}" if finding.remedy else ""
            typer.echo(f"{finding.status:<8} {finding.where}: {finding.message}{remedy}")
    code = checks.exit_code(findings)
    if code:
        raise typer.Exit(code)


for command in (deployment_cli.approve, deployment_cli.start, deployment_cli.status, deployment_cli.budget):
    site.command(command.__name__)(command)
site.command("stop")(deployment_cli.stop)
site.command("report")(deployment_cli.report)


@site.command("recover")
def recover(
    path: SiteArgument,
    assume_spent: Annotated[
        float, typer.Option("--assume-spent", help="Epsilon of everything that the remaining ledger does not show.")
    ],
    state: Annotated[Path | None, typer.Option("--state", help="State folder in place of the site file's.")] = None,
) -> None:
    """Declare what a lost, restored or changed ledger no longer shows, so that the site can go on.

    It only ever raises what counts as spent. If nobody knows, assume the whole cap: nothing more is released then.

    Example: gapweave site recover hospital.yaml --assume-spent 6.5
    """
    from gapweave.client.recovery import recover as declare
    from gapweave.shared.config import load_site
    from gapweave.shared.report.wording import budget

    hospital = load_site(path)
    anchor = path.parent / hospital.policy.anchor if hospital.policy.anchor else None
    view = declare(state or path.parent / hospital.state, hospital, anchor, assume_spent)
    bound, cap = budget(view.bound()), hospital.policy.epsilon
    typer.echo(f"{hospital.name}: epsilon {bound} counts as spent, of a cap of {cap:g}")


def predict(
    run: Annotated[Path, typer.Argument(help="Run directory, or STATE/runs/<run> at a hospital.", metavar="RUN")],
    site_file: Annotated[
        Path, typer.Option("--site", help="Site file with the records to predict.", resolve_path=True)
    ],
    out: Annotated[Path, typer.Option("--out", help="CSV file to write.")] = Path("predictions.csv"),
    data: DataOption = None,
    model: Annotated[
        str,
        typer.Option(
            "--model",
            help="best (the joining check's choice; without the check the fine-tuned copy if the site's own patients "
            "prefer it, else federated), federated, finetuned, local (the site's own strongest), or blend.",
        ),
    ] = "best",
    calibrated: Annotated[
        bool,
        typer.Option(
            "--calibrated",
            help="Probabilities as risks: log-odds with the slope and shift that suit the site's training patients, "
            "which the joining check found.",
        ),
    ] = False,
) -> None:
    """Predict with a site's finished model; the server is not needed, and labels are not read.

    Example: gapweave predict runs/first --site sites/north.yaml --out predictions.csv
    """
    from gapweave.client.calibration import Calibrated, calibration_of
    from gapweave.client.mixture import Predictor, choose, load_mixture
    from gapweave.client.predict import find_model, load_site_model, predict_file
    from gapweave.client.sources.findings import Finding, warnings_of
    from gapweave.shared.config import load_site
    from gapweave.shared.joining import found_worse

    hospital = load_site(site_file)
    file = find_model(run, hospital.name, "finetuned" if model == "finetuned" else "model")
    name, shares = choose(file.parent, model)
    kept = load_site_model(file)
    findings: list[Finding] = []
    predictor: Predictor = load_mixture(file.parent, shares, kept.study)
    if calibrated:
        found = calibration_of(file.parent, name)
        predictor = Calibrated(predictor=predictor, calibration=found, kind=kept.study.task.kind)
    if found_worse(file.parent, name):
        worse = f"{name} is worse than the site's own on its held-out patients, as the joining check found"
        typer.echo(f"warning: {worse}. Consider --model local", err=True)
    records = predict_file(kept, predictor, hospital, site_file, data, out, findings)
    for finding in warnings_of(findings):
        typer.echo(f"{finding.status}: {finding.where}: {finding.message}. {finding.remedy}".rstrip(" ."), err=True)
    typer.echo(f"{records} records: {out} (model: {name}{', calibrated' if calibrated else ''})")
