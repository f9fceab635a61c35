"""`gapweave simulate | resume | report`: thin commands over `run.py`."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Annotated, Any

import typer

from gapweave.sites.simulate.compare_cli import compare
from gapweave.sites.simulate.options import (
    BaselinesOption,
    ContinueOption,
    DataOption,
    EngineOption,
    JoiningOption,
    RoundsOption,
    SetOption,
    SitesOption,
    StateOption,
    StudyArgument,
)


def simulate(
    study: StudyArgument = None,
    sites: SitesOption = None,
    data: DataOption = None,
    out: Annotated[
        Path | None, typer.Option("--out", help="Run directory to create [default: runs/<study>-<time>].")
    ] = None,
    state: StateOption = None,
    engine: EngineOption = "inline",
    rounds: RoundsOption = None,
    seed: Annotated[int | None, typer.Option("--seed", help="Same as --set seed=N.")] = None,
    continue_without: ContinueOption = False,
    baselines: BaselinesOption = "local",
    joining: JoiningOption = False,
    assignments: SetOption = None,
    as_json: Annotated[bool, typer.Option("--json", help="Print summary.json instead of a table.")] = False,
) -> None:
    """Run a study on one machine.

    Example: gapweave simulate study.yaml --out runs/first --baselines local,pooled --set epsilon=3
    """
    from gapweave.sites.simulate import commands

    overrides = commands.read_assignments(assignments or [], rounds=rounds, seed=seed)
    commands.check_engine(engine)
    summary, directory = commands.start(
        study,
        overrides,
        commands.Places(sites=sites, data=data, out=out, state=state),
        baselines=commands.read_baselines(baselines),
        continue_without=continue_without,
        engine=engine,
        joining=joining,
    )
    _show(summary, directory, as_json)


def resume(
    run: Annotated[str, typer.Argument(metavar="RUN", help="Run directory of a simulation, or RUN_ID on a hub.")],
    server: Annotated[
        str | None, typer.Option("--server", metavar="NAME", help="Name or folder of the hub that RUN_ID is on.")
    ] = None,
    as_json: Annotated[
        bool, typer.Option("--json", help="Print summary.json instead of a table; on a hub, how the run stands.")
    ] = False,
) -> None:
    """Continue a run from its last checkpoint; budgets go on from where they were.

    Example: gapweave resume runs/first
    """
    if server is not None:
        from gapweave.server import runs
        from gapweave.server.hub import Hub

        hub = Hub.find(server)
        runs.resume(hub, run)
        if as_json:
            typer.echo(json.dumps(runs.state_of(hub, run).to_dict(), indent=1))
        else:
            typer.echo(f"{run} goes on; see gapweave runs --server {server}")
        return
    from gapweave.sites.simulate import commands

    summary, directory = commands.resume(Path(run))
    _show(summary, directory, as_json)


def report(run: Annotated[Path, typer.Argument(help="Run directory.")]) -> None:
    """Rebuild report.html from the run's files.

    Example: gapweave report runs/first
    """
    from gapweave.shared.report.run_report import write_report
    from gapweave.shared.rundir import RunDirectory

    directory = RunDirectory.open(run)
    write_report(directory)
    typer.echo(f"report: {directory.report}")


def _show(summary: dict[str, Any], directory: Path, as_json: bool) -> None:
    if as_json:
        typer.echo(json.dumps(summary, indent=1))
        return
    from rich.console import Console

    from gapweave.sites.simulate.progress import joining_lines, result_tables

    console = Console()
    console.print(*result_tables(summary), sep="\n")
    for line in joining_lines(summary):
        typer.echo(line)
    typer.echo(f"report: {directory / 'report.html'}")


__all__ = ["compare", "report", "resume", "simulate"]
