"""Command line options that `simulate` and `compare` share."""

from __future__ import annotations

from pathlib import Path
from typing import Annotated

import typer

from gapweave.shared.config.overrides import ALIASES, PRESETS

ALIAS_HELP = "aliases: " + ", ".join([*PRESETS, *ALIASES])

StudyArgument = Annotated[Path | None, typer.Argument(help="Study file; without it, the built-in demo.")]
SitesOption = Annotated[
    Path | None, typer.Option("--sites", help="Folder of site files [default: sites/ beside STUDY].")
]
DataOption = Annotated[
    Path | None,
    typer.Option("--data", envvar="GAPWEAVE_DATA", help="Folder that holds data sets, one sub-folder a set."),
]
SetOption = Annotated[
    list[str] | None,
    typer.Option("--set", help=f"key=value: a dotted path of the study file, or an alias ({ALIAS_HELP})."),
]
BaselinesOption = Annotated[str, typer.Option("--baselines", help="Comma list of local, pooled, lr, gbm; or none.")]
JoiningOption = Annotated[
    bool,
    typer.Option("--joining", help="Let each site check if joining paid: own models, blend, intervals, verdict."),
]
StateOption = Annotated[
    Path | None,
    typer.Option(
        "--state", help="Folder of the sites' ledgers and private models [default: RUN/sites, new in each run]."
    ),
]
EngineOption = Annotated[
    str,
    typer.Option(
        "--engine", help="inline: all sites in this process; ray: on Ray (RAY_ADDRESS, or a cluster of its own)."
    ),
]
RoundsOption = Annotated[int | None, typer.Option("--rounds", help="Same as --set training.rounds=N.")]
ContinueOption = Annotated[
    bool, typer.Option("--continue-without", help="Go on without sites whose data cannot be used.")
]
