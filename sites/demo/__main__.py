"""Write the demo's hospitals: `python -m gapweave.sites.demo --out DIR`."""

from pathlib import Path
from typing import Annotated

import typer

from gapweave.shared.errors import GapweaveError
from gapweave.sites.demo import MODALITIES, hospital_names, write_demo

app = typer.Typer(add_completion=False)


@app.command()
def main(
    out: Annotated[Path, typer.Option(help="A new or empty folder.")],
    hospitals: Annotated[int, typer.Option(help="How many hospitals.")] = 6,
    seed: Annotated[int, typer.Option(help="Of patients, devices and case mix.")] = 0,
    all_hold: Annotated[bool, typer.Option("--all-hold", help="Every hospital holds every modality.")] = False,
    patients: Annotated[int | None, typer.Option(help="Of each hospital (default: 250 to 800).")] = None,
) -> None:
    """Write synthetic hospitals with known ground truth.

    Example: python -m gapweave.sites.demo --out demo --hospitals 9 --all-hold
    """
    try:
        holds = {name: MODALITIES for name in hospital_names(hospitals)} if all_hold else None
        study = write_demo(out, seed=seed, hospitals=hospitals, holds=holds, patients=patients)
    except GapweaveError as error:
        typer.echo(str(error), err=True)
        raise typer.Exit(error.exit_code) from None
    typer.echo(str(study))


if __name__ == "__main__":
    app()
