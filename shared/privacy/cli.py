"""`gapweave privacy plan | verify | report`: what a study would cost, and what a site's ledger says was spent."""

from __future__ import annotations

import json
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any

import typer
from click import FloatRange

from gapweave.shared.commands import command_group

if TYPE_CHECKING:
    from gapweave.shared.privacy.ledger import LedgerView

app = command_group(
    "Plan a study's privacy; report and verify what a site's ledger says was spent.",
    "gapweave privacy plan study.yaml --patients 400",
)

PathArgument = Annotated[
    Path, typer.Argument(metavar="PATH", help="A site's state folder (in a simulation RUN/sites/NAME), or its ledger.")
]
NOT_INTACT = 3
"""Exit code for a ledger that was changed."""


@app.command()
def plan(
    study: Annotated[Path, typer.Argument(metavar="STUDY", help="Study file.")],
    patients: Annotated[int, typer.Option("--patients", min=1, help="Training patients of a site.")],
    epsilon: Annotated[
        float | None,
        typer.Option("--epsilon", help="Target in place of the study's.", click_type=FloatRange(0, min_open=True)),
    ] = None,
    rounds: Annotated[int | None, typer.Option("--rounds", min=1, help="Rounds in place of the study's.")] = None,
    delta: Annotated[
        float | None,
        typer.Option("--delta", help="Delta in place of the study's.", click_type=FloatRange(0, 1, True, True)),
    ] = None,
    cap: Annotated[float | None, typer.Option("--cap", help="The site's cap (default: a site file's, 10).")] = None,
    as_json: Annotated[bool, typer.Option("--json", help="Print all figures as JSON.")] = False,
) -> None:
    """Say what noise a study needs at a site, what it costs, and what other schedules would.

    Example: gapweave privacy plan study.yaml --patients 1300 --epsilon 3
    """
    from gapweave.shared.config import load_study, naming_study
    from gapweave.shared.privacy.plan import USUAL_DELTA
    from gapweave.shared.privacy.plan_report import DEFAULT_CAP, plan_lines, plan_report

    given = {"privacy.epsilon": epsilon, "privacy.delta": delta, "training.rounds": rounds}
    chosen = load_study(study, {key: value for key, value in given.items() if value is not None})
    with naming_study(study):
        limit = DEFAULT_CAP if cap is None else cap
        found = plan_report(chosen, patients, limit, USUAL_DELTA if delta is None else delta)
    if as_json:
        typer.echo(json.dumps(found.to_dict(), indent=1))
        return
    typer.echo("\n".join(plan_lines(found)))


@app.command()
def verify(
    path: PathArgument,
    as_json: Annotated[bool, typer.Option("--json", help="Print the ledger's summary as JSON.")] = False,
) -> None:
    """Check that a ledger was not changed since it was written; exit 3 if it was.

    Example: gapweave privacy verify state
    """
    from gapweave.shared.report.ledger_report import broken_text
    from gapweave.shared.report.ledger_text import chain_words, spent_words

    view, summary = _verified(path, as_json)
    if as_json:
        typer.echo(json.dumps(summary, indent=1))
    elif view.intact:
        typer.echo(f"{summary['site']}: {summary['entries']} entries, {spent_words(summary)}")
        typer.echo(f"ledger {chain_words(summary)}")
    else:
        typer.echo(f"{path}: {broken_text(view)}")
    if summary["intact"] is False:
        raise typer.Exit(NOT_INTACT)


def _verified(path: Path, as_json: bool) -> tuple[LedgerView, dict[str, Any]]:
    """A ledger and its summary; of one of which nothing can be read, JSON says so before the error does."""
    from gapweave.shared.errors import RefusedError
    from gapweave.shared.privacy.ledger import read_ledger
    from gapweave.shared.report.ledger_report import UNREADABLE, verified

    try:
        view = read_ledger(path)
        return view, verified(view)
    except RefusedError:
        if as_json:
            typer.echo(json.dumps(UNREADABLE, indent=1))
        raise


@app.command()
def report(
    path: PathArgument,
    as_json: Annotated[bool, typer.Option("--json", help="Print all figures as JSON.")] = False,
    out: Annotated[Path | None, typer.Option("--out", help="Write a page for an ethics board (HTML) here.")] = None,
    audit: Annotated[
        Path | None, typer.Option("--audit", help="Show this result of `gapweave privacy audit --json`, too.")
    ] = None,
) -> None:
    """Say what left a site, what was spent and is left, and what the guarantee covers.

    Example: gapweave privacy report state --out privacy.html
    """
    from gapweave.shared.report.audit_result import read_audit
    from gapweave.shared.report.ledger_page import ledger_page
    from gapweave.shared.report.ledger_report import ledger_facts
    from gapweave.shared.report.ledger_text import ledger_lines

    view, summary = _verified(path, as_json)
    if as_json and not view.intact:
        typer.echo(json.dumps(summary, indent=1))
        raise typer.Exit(NOT_INTACT)
    facts = ledger_facts(view, None if audit is None else read_audit(audit, view.opening.get("site")))
    if as_json:
        typer.echo(json.dumps(facts.to_dict(), indent=1))
    elif out is None:
        typer.echo("\n".join(ledger_lines(facts)))
    if out is not None:
        out.write_text(ledger_page(facts), encoding="utf-8")
        typer.echo(f"report: {out}", err=as_json)
