"""`gapweave site approve | start | status | budget | stop`: a hospital's part in a deployment."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Annotated, Any

import typer

SiteArgument = Annotated[Path, typer.Argument(help="Site file.", metavar="SITE.yaml", resolve_path=True)]
"""What a site file names lies beside the file itself, wherever links to it lie."""
DataOption = Annotated[
    Path | None,
    typer.Option("--data", envvar="GAPWEAVE_DATA", help="Folder that holds data sets, one sub-folder a set."),
]
JsonOption = Annotated[bool, typer.Option("--json", help="Print JSON.")]
STARTING_S = 60.0


def _deployment(path: Path) -> Any:
    from gapweave.client.service import Deployment

    return Deployment.of(path)


def approve(
    path: SiteArgument,
    study: Annotated[Path, typer.Option("--study", help="Study to approve.")],
    assignments: Annotated[
        list[str] | None, typer.Option("--set", metavar="KEY=VALUE", help="As `submit` was given it; repeatable.")
    ] = None,
    show: Annotated[bool, typer.Option("--show", help="Say what it would do, and approve nothing.")] = False,
) -> None:
    """Say what a study would do and spend here, and record the hospital's approval in policy.studies.

    Example: gapweave site approve site.yaml --study study.yaml
    """
    from gapweave.client.approval import approve as record
    from gapweave.client.approval import in_plain_words
    from gapweave.client.service import Deployment
    from gapweave.shared.config import load_site, load_study
    from gapweave.shared.config.overrides import parse_assignment

    chosen = load_study(study, dict(parse_assignment(text) for text in assignments or []))
    deployment = Deployment(path.resolve(), load_site(path))
    typer.echo("\n".join(in_plain_words(chosen, deployment)))
    if show:
        return
    new = record(chosen, deployment)
    typer.echo(f"\n{'approved' if new else 'was approved already'}: {path}, policy.studies")


def start(
    path: SiteArgument,
    data: DataOption = None,
    foreground: Annotated[
        bool, typer.Option("--foreground", help="Stay until stopped: for systemd and containers.")
    ] = False,
) -> None:
    """Start the site's part: it connects to the hub and waits for approved studies. Nothing comes in from outside.

    Example: gapweave site start site.yaml
    """
    deployment = _deployment(path)
    deployment.check()
    if foreground:
        deployment.service.run(lambda: [deployment.child(data)])
        return
    words = ["site", "start", str(deployment.file), "--foreground", *(["--data", str(data)] if data else [])]
    ready = deployment.service.start(words, deployment.connected, STARTING_S)
    name, address = deployment.site.name, deployment.connection().address
    if ready:
        typer.echo(f"{name} is connected to {address}")
    else:
        typer.echo(f"{name} runs, and is not connected to {address} yet; it goes on trying", err=True)
        typer.echo(
            f"find out why: gapweave site check {path}, and {deployment.service.log_file('supernode')}", err=True
        )
    if not deployment.site.policy.studies:
        typer.echo(f"it takes part in nothing yet: gapweave site approve {path} --study STUDY", err=True)


def status(path: SiteArgument, as_json: JsonOption = False) -> None:
    """Say how the site's part is: process, health, connection, last round, ledger.

    Exits 3 when the ledger was changed, else 5 when the site is not connected.

    Example: gapweave site status site.yaml
    """
    from gapweave.shared.errors import NotIntact, Unreachable
    from gapweave.shared.privacy.ledger import LEDGER_FILE, read_ledger
    from gapweave.shared.report.ledger_report import verified

    deployment = _deployment(path)
    found = deployment.status()
    there = (deployment.state / LEDGER_FILE).exists()
    found["ledger"] = verified(read_ledger(deployment.state)) if there else None
    if as_json:
        typer.echo(json.dumps(found, indent=1))
    else:
        for line in _status_lines(found):
            typer.echo(line)
    if there and found["ledger"]["intact"] is False:
        raise typer.Exit(NotIntact.exit_code)
    if not found["connected"]:
        raise typer.Exit(Unreachable.exit_code)


def _status_lines(found: dict[str, Any]) -> list[str]:
    lines = [f"{found['site']}: {'runs' if found['running'] else 'does not run'}"]
    for name, process in found["processes"].items():
        last = "" if process.get("last_exit") is None else f", ended with code {process['last_exit']} before"
        lines.append(f"  {name:<11} {process['state']} since {process['since']}, restarts: {process['restarts']}{last}")
    if found["running"]:
        contact = "never heard" if found["contact_s"] is None else f"heard {found['contact_s']:.0f} s ago"
        lines.append(f"  hub         {'connected' if found['connected'] else 'not connected'}, {contact}")
    if found["trouble"]:
        lines.append(f"  trouble     {found['trouble']['text']} ({found['trouble']['when']})")
    if found["last"]:
        last = found["last"]
        lines.append(f"  last run    {last['run']}, round {last['round']}{', finished' if last['finished'] else ''}")
        lines += [f"  joining     {line}" for line in last["joining"] or []]
        if last["finished"] and last["joining"] is None:
            lines.append("  joining     not looked at yet: gapweave site report SITE.yaml")
    ledger = found["ledger"]
    return [*lines, f"  ledger      {_ledger_line(ledger) if ledger else 'none yet'}"]


def _ledger_line(ledger: dict[str, Any]) -> str:
    from gapweave.shared.report.wording import budget

    figure = ledger["epsilon_filter"]
    spent = "no guarantee" if figure is None else f"epsilon {budget(figure)}"
    return f"{spent} of {ledger['cap']:g}, intact: {ledger['intact']}"


def report(
    path: SiteArgument,
    run: Annotated[str | None, typer.Option("--run", help="Id of the run [default: the last finished].")] = None,
    data: DataOption = None,
    as_json: JsonOption = False,
) -> None:
    """Was it worth joining? Train models on the site's own patients, and set the federated one beside them.

    Writes STATE/runs/RUN/report.html and joining.json. They are for the hospital alone, and nothing of them leaves.

    Example: gapweave site report site.yaml
    """
    from gapweave.client.data import load_cohort
    from gapweave.client.joining import joining_check
    from gapweave.client.predict import load_site_model
    from gapweave.client.service import finished_run
    from gapweave.shared.config import load_site
    from gapweave.shared.joining import lines

    hospital = load_site(path)
    folder = finished_run(path.parent / hospital.state, run)
    study = load_site_model(folder.path / "model.safetensors").study
    joining = joining_check(study, load_cohort(study, hospital, site_file=path, data_dir=data), folder)
    if as_json:
        typer.echo(json.dumps(joining, indent=1))
        return
    for line in lines(joining):
        typer.echo(line)
    typer.echo(f"report: {folder.path / 'report.html'}")


def budget(
    path: SiteArgument,
    close: Annotated[
        str | None,
        typer.Option(
            "--close",
            metavar="RUN_ID",
            help="Give back what a run holds that will not go on; the site takes no further part in it.",
        ),
    ] = None,
    folder: Annotated[Path | None, typer.Option("--state", help="State folder in place of the site file's.")] = None,
    as_json: JsonOption = False,
) -> None:
    """Say what the site has spent of its privacy budget, on which studies, what open runs hold, and what is left.

    Example: gapweave site budget site.yaml
    """
    from gapweave.shared.config import load_site
    from gapweave.shared.privacy.ledger import LEDGER_FILE, read_ledger
    from gapweave.shared.report.ledger_report import ledger_facts
    from gapweave.shared.report.ledger_text import ledger_lines

    site = load_site(path)
    state = folder or path.parent / site.state
    if close is not None:
        _give_up(site, path, state, close)
        typer.echo(f"{site.name} takes no further part in {close}", err=as_json)
    if not (state / LEDGER_FILE).exists():
        nothing = {"site": site.name, "epsilon": 0.0, "epsilon_filter": 0.0, "cap": site.policy.epsilon, "releases": 0}
        typer.echo(
            json.dumps(nothing, indent=1)
            if as_json
            else f"{site.name}: nothing is spent of a cap of epsilon {site.policy.epsilon:g}"
        )
        return
    facts = ledger_facts(read_ledger(state).under(site.policy.epsilon), None)
    typer.echo(json.dumps(facts.to_dict(), indent=1) if as_json else "\n".join(ledger_lines(facts)))


def _give_up(site: Any, path: Path, state: Path, run: str) -> None:
    from gapweave.client.ledger import Ledger
    from gapweave.shared.errors import UsageError
    from gapweave.shared.privacy.ledger import LEDGER_FILE

    if not (state / LEDGER_FILE).exists():
        raise UsageError("there is no ledger yet", where=str(state), remedy="No run holds a part of the budget")
    anchor = None if site.policy.anchor is None else path.parent / site.policy.anchor
    with Ledger(state, site, anchor) as ledger:
        ledger.give_up(run)


def stop(path: SiteArgument) -> None:
    """Stop the site's part. What it has released and spent stays in its ledger.

    Example: gapweave site stop site.yaml
    """
    deployment = _deployment(path)
    typer.echo(f"{deployment.site.name} {'is stopped' if deployment.service.stop() else 'did not run'}")
