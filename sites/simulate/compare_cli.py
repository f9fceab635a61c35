"""`gapweave compare`: a thin command over `compare.py`."""

from __future__ import annotations

import json
from pathlib import Path
from typing import TYPE_CHECKING, Annotated

import typer

from gapweave.sites.simulate.options import (
    ALIAS_HELP,
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

if TYPE_CHECKING:
    from gapweave.sites.simulate.compare import Result


def compare(
    study: StudyArgument = None,
    vary: Annotated[
        list[str] | None,
        typer.Option("--vary", help=f"key=v1,v2: values of a study key or alias ({ALIAS_HELP}); several multiply."),
    ] = None,
    seeds: Annotated[
        str | None, typer.Option("--seeds", help="Comma list; a seed sets training and split. [default: 0,1,2]")
    ] = None,
    seed: Annotated[int | None, typer.Option("--seed", help="Same as --seeds N.")] = None,
    folds: Annotated[
        int | None, typer.Option("--folds", min=2, max=100, help="Grouped K-fold by patient; each is judged once.")
    ] = None,
    baselines: BaselinesOption = "",
    joining: JoiningOption = False,
    smoke: Annotated[
        bool, typer.Option("--smoke", help="2 rounds, 1 seed, at most 2 folds, 2 values of each --vary.")
    ] = False,
    sites: SitesOption = None,
    data: DataOption = None,
    out: Annotated[
        Path | None,
        typer.Option("--out", help="Folder to write; the same command resumes [default: runs/compare-<study>-<time>]."),
    ] = None,
    state: StateOption = None,
    engine: EngineOption = "inline",
    rounds: RoundsOption = None,
    continue_without: ContinueOption = False,
    assignments: SetOption = None,
    as_json: Annotated[bool, typer.Option("--json", help="Print means and differences as JSON.")] = False,
) -> None:
    """Vary a study, with several seeds, and tabulate the results beside what else one could do.

    Example: gapweave compare study.yaml --vary method=late,concat --seeds 0,1,2 --baselines local,pooled,lr
    """
    from gapweave.shared.errors import UsageError
    from gapweave.sites.simulate import commands
    from gapweave.sites.simulate import compare as work
    from gapweave.sites.simulate.compare_plan import Request, read_seeds, read_variations

    if engine != "inline":
        raise UsageError("compare runs its cells inline", where="--engine", remedy="Leave --engine out")
    overrides = commands.read_assignments(assignments or [], rounds=rounds)
    request = Request(
        study=study,
        overrides=overrides,
        vary=read_variations(vary or []),
        seeds=read_seeds(seeds, seed),
        folds=folds,
        baselines=commands.read_baselines(baselines),
        joining=joining,
        smoke=smoke,
        sites=sites,
        data=commands.data_folder(data),
        out=out.resolve() if out else None,
        state=commands.state_folder(state),
        continue_without=continue_without,
    )
    result = work.compare(request)
    _show(result, as_json)
    if result.failures:
        raise result.failures[0].error


def _show(result: Result, as_json: bool) -> None:
    if as_json:
        typer.echo(json.dumps(result.statistics.to_json(), indent=1))
        return
    from rich.console import Console

    from gapweave.sites.simulate.compare_summary import tables

    console = Console()
    for table in tables(result.statistics):
        console.print(table)
    typer.echo(f"means over sites, AUROC ± sd over seeds; differences: {result.out / 'summary.md'}")
    typer.echo(f"results: {result.out / 'results.json'}")
