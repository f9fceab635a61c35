"""`gapweave server ...`, and what a consortium types to run a study on a hub."""

from __future__ import annotations

import json
import time
from pathlib import Path
from typing import Annotated, Any

import typer

from gapweave.shared.commands import command_group

server = command_group("Run the hub of a federation.", "gapweave server init --host hub.example.org")

HubOption = Annotated[
    Path | None, typer.Option("--dir", help="The hub's folder [default: $GAPWEAVE_HUB, or hub].", metavar="HUB")
]
ServerOption = Annotated[
    str | None,
    typer.Option("--server", metavar="NAME", help="Name or folder of a hub [default: $GAPWEAVE_HUB, or hub]."),
]
RunArgument = Annotated[str, typer.Argument(metavar="RUN_ID", help="As `submit` and `runs` print it.")]
JsonOption = Annotated[bool, typer.Option("--json", help="Print JSON.")]
STARTING_S = 60.0
FOLLOW_S = 2.0


def _hub(folder: Path | None) -> Any:
    from gapweave.server.hub import Hub

    return Hub.find(None if folder is None else str(folder), "--dir")


@server.command("init")
def init(
    hosts: Annotated[
        list[str] | None,
        typer.Option("--host", help="Name or address of this machine; the first is what sites connect to."),
    ] = None,
    folder: HubOption = None,
    name: Annotated[str | None, typer.Option("--name", help="Name of the hub [default: its folder's].")] = None,
    port: Annotated[int, typer.Option("--port", min=1, max=65533, help="Port that sites connect to.")] = 9092,
    listen_port: Annotated[
        int | None,
        typer.Option(
            "--listen-port",
            min=1,
            max=65533,
            help="Port that nginx listens on, where a router or load balancer brings --port there [default: --port].",
        ),
    ] = None,
) -> None:
    """Make a hub: its own certificate authority, a certificate, configuration, and the file for the hospitals.

    Example: gapweave server init --host hub.example.org
    """
    import os
    import socket

    from gapweave.server.hub import Hub, folder_called

    place = folder or Path(os.environ.get("GAPWEAVE_HUB", "hub"))
    called = name or place.resolve().name
    earlier = folder_called(called)
    hub = Hub.create(place, called, hosts or [socket.getfqdn()], port, listen_port)
    if earlier is not None:
        typer.echo(f"warning: --server {called} meant {earlier} before; give that hub's folder from now on", err=True)
    typer.echo(f"made the hub {hub.config.name} in {place}; sites will connect to {hub.config.hosts[0]}:{port}")
    typer.echo(
        f"give {hub.connection} to every hospital, and add its site.pub: gapweave server add-site NAME --key FILE"
    )


@server.command("add-site")
def add_site(
    name: Annotated[str, typer.Argument(metavar="NAME", help="Name of the site, as in its site file.")],
    key: Annotated[Path, typer.Option("--key", help="The site's public key, site.pub.")],
    folder: HubOption = None,
) -> None:
    """Let a site in, known by its public key.

    Example: gapweave server add-site st_mary --key st_mary.pub
    """
    hub = _hub(folder)
    hub.add_site(name, key)
    typer.echo(f"{name} is let in; sites: {', '.join(hub.sites())}")


@server.command("remove-site")
def remove_site(
    name: Annotated[str, typer.Argument(metavar="NAME", help="Name of the site.")], folder: HubOption = None
) -> None:
    """Let a site in no more; what it sent stays in what was aggregated.

    Example: gapweave server remove-site st_mary
    """
    hub = _hub(folder)
    hub.remove_site(name)
    typer.echo(f"{name} is let in no more; sites: {', '.join(hub.sites()) or 'none'}")


@server.command("start")
def start(
    folder: HubOption = None,
    foreground: Annotated[
        bool, typer.Option("--foreground", help="Stay until stopped: for systemd and containers.")
    ] = False,
    proxy: Annotated[bool, typer.Option("--proxy/--no-proxy", help="Start nginx as the reverse proxy, too.")] = True,
) -> None:
    """Start the hub: the SuperLink on loopback, and before it the reverse proxy that sites connect to.

    Example: gapweave server start
    """
    from functools import partial

    from gapweave.server import room
    from gapweave.server.proxy import nginx
    from gapweave.server.superlink import children, keep_registered, silent
    from gapweave.shared.errors import Unreachable

    hub = _hub(folder)
    room.require(hub.folder)
    if proxy:
        nginx()
    if foreground:
        hub.service.run(partial(children, hub, proxy=proxy), partial(keep_registered, hub))
        return
    words = ["server", "start", "--foreground", "--dir", str(hub.folder), "--proxy" if proxy else "--no-proxy"]
    if not hub.service.start(words, lambda: silent(hub) is None, STARTING_S):
        raise Unreachable(
            "the hub does not begin to serve",
            where=str(hub.service.log_file(silent(hub) or "superlink")),
            remedy="Look at that log; `gapweave server stop` ends it",
        )
    typer.echo(f"the hub {hub.config.name} serves at {hub.config.hosts[0]}:{hub.config.port}")


@server.command("status")
def status(folder: HubOption = None, as_json: JsonOption = False) -> None:
    """Say how the hub is, and which sites are connected; exits 5 when it does not serve.

    Example: gapweave server status
    """
    from gapweave.server import room
    from gapweave.server.certificates import days_left
    from gapweave.server.superlink import Control, silent
    from gapweave.shared.errors import Unreachable

    hub = _hub(folder)
    full = room.lacking(hub.folder)
    found = {"name": hub.config.name, **hub.service.status(), "serves": (missing := silent(hub)) is None}
    found["certificate_days"] = round(days_left(hub.certificate))
    found["free_bytes"] = room.free(hub.folder)
    found["sites"] = dict.fromkeys(hub.sites(), "unknown")
    if missing != "superlink":
        with Control(hub) as control:
            online = {site["name"]: site["online"] for site in control.sites().values()}
        found["sites"] = {name: "online" if online.get(name) else "offline" for name in hub.sites()}
    if as_json:
        typer.echo(json.dumps(found, indent=1))
    else:
        typer.echo(f"{found['name']}: {'serves' if missing is None else f'does not serve: {missing}'}")
        for name, process in found["processes"].items():
            typer.echo(f"  {name:<12} {process['state']} since {process['since']}, restarts: {process['restarts']}")
        typer.echo(f"  certificate  {found['certificate_days']} days left")
        typer.echo(f"  disk         {found['free_bytes'] / 1e9:.1f} GB free")
        for name, state in found["sites"].items():
            typer.echo(f"  site         {name}: {state}")
    if full is not None:
        raise full
    if not found["serves"]:
        raise typer.Exit(Unreachable.exit_code)


@server.command("stop")
def stop_server(folder: HubOption = None) -> None:
    """Stop the hub; runs that were going can be resumed.

    Example: gapweave server stop
    """
    hub = _hub(folder)
    typer.echo(f"the hub {hub.config.name} {'is stopped' if hub.service.stop() else 'did not run'}")


def submit(
    study: Annotated[Path, typer.Argument(metavar="STUDY", help="Study file.")],
    name: ServerOption = None,
    assignments: Annotated[
        list[str] | None, typer.Option("--set", metavar="KEY=VALUE", help="Override a key of the study; repeatable.")
    ] = None,
    wait: Annotated[bool, typer.Option("--wait", help="Show progress until the run is over.")] = False,
    as_json: JsonOption = False,
) -> None:
    """Start a study on a hub; the sites must have approved its hash.

    Example: gapweave submit study.yaml --server hub --wait
    """
    from gapweave.server import runs
    from gapweave.server.hub import Hub
    from gapweave.shared.config import load_study, naming_study
    from gapweave.shared.config.overrides import parse_assignment

    hub = Hub.find(name)
    chosen = load_study(study, dict(parse_assignment(text) for text in assignments or []))
    with naming_study(study):
        run = runs.submit(hub, chosen)
    if as_json and not wait:
        typer.echo(json.dumps({"run": run, "study": chosen.name, "sha256": chosen.sha256}, indent=1))
        return
    # Whoever stops waiting needs its name; JSON is alone on the standard output.
    typer.echo(f"submitted {run}; the study's hash is {chosen.sha256}", err=as_json)
    if wait:
        _follow(hub, run, as_json)


def _follow(hub: Any, run: str, as_json: bool) -> None:
    """A progress bar until a run is over; exits with its code."""
    from rich.console import Console
    from rich.progress import Progress

    from gapweave.server import runs

    console = Console(stderr=True)
    with Progress(console=console, transient=True) as progress:
        task = progress.add_task(run, total=None)
        while True:
            state = runs.state_of(hub, run)
            progress.update(task, completed=state.round, total=state.rounds, description=f"{run}: {state.status}")
            if state.status not in runs.GOING:
                break
            time.sleep(FOLLOW_S)
    if as_json:
        typer.echo(json.dumps(state.to_dict(), indent=1))
    else:
        typer.echo(_line(state))
        if state.status == "completed":
            typer.echo(f"report: {hub.runs / run / 'report.html'}")
    if state.exit_code:
        raise typer.Exit(state.exit_code)


def runs(name: ServerOption = None, as_json: JsonOption = False) -> None:
    """List the runs of a hub, and how each of them stands.

    Example: gapweave runs --server hub
    """
    from gapweave.server.hub import Hub
    from gapweave.server.runs import states

    found = states(Hub.find(name))
    if as_json:
        typer.echo(json.dumps([state.to_dict() for state in found], indent=1))
        return
    for state in found:
        typer.echo(_line(state))
    if not found:
        typer.echo("no runs yet: gapweave submit STUDY")


def _line(state: Any) -> str:
    reason = f": {state.reason}" if state.reason else ""
    return f"{state.run}  {state.status}, round {state.round} of {state.rounds}{reason}"


def stop(run: RunArgument, name: ServerOption = None) -> None:
    """Stop a run; `gapweave resume RUN_ID --server NAME` continues it.

    Example: gapweave stop eicu-los-20260101-120000-a1b2 --server hub
    """
    from gapweave.server.hub import Hub
    from gapweave.server.runs import stop as end

    typer.echo(f"{run} {'is stopped' if end(Hub.find(name), run) else 'was over'}")


def logs(run: RunArgument, name: ServerOption = None) -> None:
    """Print what a run writes, until it is over.

    Example: gapweave logs eicu-los-20260101-120000-a1b2 --server hub
    """
    from gapweave.server.hub import Hub
    from gapweave.server.runs import number_of
    from gapweave.server.superlink import Control

    hub = Hub.find(name)
    number = number_of(hub, run)
    with Control(hub) as control:
        for part in control.logs(number):
            typer.echo(part, nl=False)


def pull(
    run: RunArgument,
    name: ServerOption = None,
    out: Annotated[Path | None, typer.Option("--out", help="Folder to create [default: RUN_ID].")] = None,
) -> None:
    """Copy a run's directory from the hub: shared model, report, summary. What sites keep is not among it.

    Example: gapweave pull eicu-los-20260101-120000-a1b2 --server hub --out results
    """
    from gapweave.server.hub import Hub
    from gapweave.server.runs import pull as copy

    copy(Hub.find(name), run, out or Path(run))
    typer.echo(f"run directory: {out or run}")
