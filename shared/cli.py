"""The root command. Each side's commands load when they are asked for, so that `gapweave --help` is quick."""

from __future__ import annotations

import importlib
import os
import sys
import traceback
from typing import Any

import typer
import typer.core
from typer.core import TyperGroup

from gapweave.shared import __version__

# With rich, typer escapes brackets in plain help and leaves stray backslashes there.
typer.core.HAS_RICH = False

COMMANDS: dict[str, tuple[str, str]] = {
    "simulate": ("gapweave.sites.simulate.cli:simulate", "Run a study on one machine; without STUDY, the demo."),
    "compare": ("gapweave.sites.simulate.cli:compare", "Vary a study and tabulate the results, with baselines."),
    "resume": ("gapweave.sites.simulate.cli:resume", "Continue a run from its last checkpoint."),
    "report": ("gapweave.sites.simulate.cli:report", "Rebuild a run's report.html from its files."),
    "server": ("gapweave.server.cli:server", "Run the hub of a federation."),
    "submit": ("gapweave.server.cli:submit", "Start a study on a hub."),
    "runs": ("gapweave.server.cli:runs", "List the runs of a hub."),
    "stop": ("gapweave.server.cli:stop", "Stop a run on a hub."),
    "logs": ("gapweave.server.cli:logs", "Print what a run on a hub writes."),
    "pull": ("gapweave.server.cli:pull", "Copy a run's directory from a hub."),
    "predict": ("gapweave.client.cli:predict", "Predict with a site's finished model, without the server."),
    "study": ("gapweave.sites.study_cli:app", "Write or check a study file; list range cards and published scores."),
    "site": ("gapweave.client.cli:site", "Set up, check and run a hospital's part."),
    "privacy": ("gapweave.shared.privacy.cli:app", "Plan, audit, report and verify what a site spends."),
    "data": ("gapweave.sites.datasets:app", "List and fetch public data sets."),
}
"""Command -> (module:attribute, one line of help)."""

INTERRUPTED = 130
"""Exit code of a command that Ctrl-C stopped."""

HELP = """Federated training across hospitals that hold different kinds of data about different patients.

Start: `gapweave simulate` runs a demo of six synthetic hospitals in under two minutes.
With your own study: `gapweave simulate study.yaml --out runs/first`; the site files lie in sites/ beside it.

A study file (YAML) needs: version, name, task (kind and label) and modalities (kind and public ranges); everything
else has a default. `gapweave study init` writes one with comments; `gapweave site init` does so for a hospital.

A run directory holds: study.yaml (resolved), summary.json (metrics and privacy by site), rounds.jsonl (who took
part, what was aggregated), report.html (tables and curves), model/ (shared parameters, safetensors), checkpoint/
(what `gapweave resume` needs) and, in simulations, sites/<name>/ (each hospital's ledger and private model).

Exit codes: 0 done, 1 internal error, 2 wrong usage, 3 refused by budget or policy, 4 too few sites,
5 unreachable, 6 data problem, 130 interrupted (resumable)."""


class LazyGroup(TyperGroup):
    """A group whose commands are imported when they are called or asked for help."""

    def list_commands(self, ctx: Any) -> list[str]:
        """All commands, in the order of a person's path through them."""
        return list(COMMANDS)

    def get_command(self, ctx: Any, cmd_name: str) -> Any:
        """One command; for the root's own help a stand-in with its line of help."""
        if cmd_name not in COMMANDS:
            return None
        target, line = COMMANDS[cmd_name]
        if getattr(ctx, "gapweave_listing", False):
            return typer.main.get_command(_stand_in(line))
        module, _, attribute = target.partition(":")
        command = getattr(importlib.import_module(module), attribute)
        if not isinstance(command, typer.Typer):
            command = _single(cmd_name, command)
        built: Any = typer.main.get_command(command)
        built.name = cmd_name
        if cmd_name == "privacy":
            # The audit runs the site's own step; the rest of the group needs the ledger only.
            audit = importlib.import_module("gapweave.client.audit_cli").audit
            built.add_command(typer.main.get_command(_single("audit", audit)), "audit")
        return built

    def format_help(self, ctx: Any, formatter: Any) -> None:
        """List the commands without importing them."""
        ctx.gapweave_listing = True
        super().format_help(ctx, formatter)


def _single(name: str, function: Any) -> typer.Typer:
    app = typer.Typer(add_completion=False, rich_markup_mode=None)
    app.command(name)(function)
    return app


def _stand_in(line: str) -> typer.Typer:
    def command() -> None:
        """Never called."""

    command.__doc__ = line
    return _single("command", command)


# Typer's own tracebacks show local variables, which may be patients' values.
root = typer.Typer(
    cls=LazyGroup,
    help=HELP,
    no_args_is_help=True,
    rich_markup_mode=None,
    add_completion=False,
    pretty_exceptions_enable=False,
)


def _version(value: bool) -> None:
    if value:
        typer.echo(f"gapweave {__version__}")
        raise typer.Exit


@root.callback()
def _options(
    version: bool = typer.Option(False, "--version", callback=_version, is_eager=True, help="Print the version."),
    debug: bool = typer.Option(False, "--debug", help="Show a traceback for an error."),
) -> None:
    pass


def main(arguments: list[str] | None = None) -> None:
    """Run a command and exit with the code that its outcome has.

    Args:
        arguments: without the program's name; by default those of the process.
    """
    given = sys.argv[1:] if arguments is None else arguments
    debug = "--debug" in given
    given = ["--debug", *(word for word in given if word != "--debug")] if debug else given
    sys.exit(_run(given, debug))


def _run(arguments: list[str], debug: bool) -> int:
    from gapweave.shared.errors import GapweaveError

    try:
        result = root(arguments, standalone_mode=False, prog_name="gapweave")
        if result == INTERRUPTED:  # typer turns Ctrl-C into this code
            raise KeyboardInterrupt
        return result if isinstance(result, int) else 0
    except GapweaveError as error:
        if debug:
            traceback.print_exc()
        typer.echo(f"error: {error}", err=True)
        return error.exit_code
    except (KeyboardInterrupt, typer.Abort):
        typer.echo("interrupted", err=True)
        return INTERRUPTED
    except BrokenPipeError:  # `gapweave runs | head`: nobody reads on
        os.dup2(os.open(os.devnull, os.O_WRONLY), sys.stdout.fileno())
        return 1
    except OSError as error:
        if debug:
            traceback.print_exc()
        if not error.filename:
            typer.echo(f"error: {error.strerror or type(error).__name__}. Check the disk and the network", err=True)
            return 1
        typer.echo(f"error: {error.filename}: {error.strerror}. Check the path and its permissions", err=True)
        return 2
    except Exception as error:
        if hasattr(error, "format_message") and hasattr(error, "exit_code"):
            if type(error).__name__ == "NoArgsIsHelpError":  # its message is the help; older clicks have no such class
                typer.echo(error.format_message(), err=True)
                return 2
            # A usage error of click: an unknown option, a missing argument.
            context = getattr(error, "ctx", None)
            hint = f" Try `{context.command_path} --help`." if context else ""
            typer.echo(f"error: {error.format_message()}{hint}", err=True)
            return 2
        if debug:
            raise
        typer.echo(f"error: internal error ({type(error).__name__}). Run again with --debug and report it", err=True)
        return 1


if __name__ == "__main__":
    main()
