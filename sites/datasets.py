"""`gapweave data`: the data sets of the shipped example studies, which are not shipped themselves.

A set is whole or not there: files are gathered in a temporary folder, every one is checked against the
SHA-256 that comes with Gapweave, and only then does the folder get its name.
"""

from __future__ import annotations

import json
from dataclasses import dataclass
from pathlib import Path
from typing import Annotated

import typer

from gapweave.shared.commands import command_group
from gapweave.shared.config.base import nearest
from gapweave.shared.errors import DataError, UsageError

SUMS = "SHA256SUMS"


@dataclass(frozen=True, kw_only=True)
class DataSet:
    """A data set that shipped site files name.

    Attributes:
        name: folder below the data folder.
        title: what it is.
        licence: under which it may be used.
        source: repository and commit that its files were made from.
        citation: what publications name.
    """

    name: str
    title: str
    licence: str
    source: str
    citation: str

    def sums(self) -> dict[str, str]:
        """SHA-256 of every file, by its path below the set's folder."""
        from importlib.resources import files

        text = (files("gapweave.sites") / self.name / SUMS).read_text(encoding="utf-8")
        lines = (line.split(maxsplit=1) for line in text.splitlines())
        return {path.strip(): digest for digest, path in lines}


_SETS = (
    DataSet(
        name="covid_cxr",
        title="COVID-19 Image Data Collection: chest X-rays, table and notes of five contributors",
        licence="CC BY-NC-SA 4.0 (non-commercial); each image has its own licence, see its column `license`",
        source="github.com/ieee8023/covid-chestxray-dataset as of 2020-06-22, through "
        "hida6/covid-chestxray-dataset @ 584034aa7fbf06496741f11008d72fd791c8e443",
        citation="Cohen et al., arXiv:2006.11988 and arXiv:2003.11597",
    ),
    DataSet(
        name="eicu_demo",
        title="eICU Collaborative Research Database Demo 2.0: ICU stays at 186 hospitals",
        licence="Open Database License (ODbL) 1.0",
        source="github.com/eth-mds/eicu-demo @ 6666c2b89714101f93b49c644ca95966182cd157",
        citation="Johnson et al., PhysioNet, doi 10.13026/4mxk-na84; Pollard et al., Sci Data 5:180178 "
        "(2018); Goldberger et al., Circulation 101:e215 (2000)",
    ),
    DataSet(
        name="heart_disease",
        title="UCI Heart Disease: patients of four hospitals",
        licence="CC BY 4.0",
        source="github.com/RenHongJia/ProbabilisticGraphModels @ 29ee0d6454adc131e7ccbbebb809f825d3c3da39",
        citation="Janosi, Steinbrunn, Pfisterer, Detrano (1988), UCI ML Repository, doi 10.24432/C52P4X",
    ),
)

DATA_SETS = {entry.name: entry for entry in _SETS}
"""The known sets by name."""


def data_set(name: str) -> DataSet:
    """The set called `name`.

    Raises:
        UsageError: for an unknown name; it says which are known.
    """
    if name in DATA_SETS:
        return DATA_SETS[name]
    raise UsageError(f"no data set is called {name!r}", remedy=nearest(name, DATA_SETS))


def data_folder(chosen: Path | None = None) -> Path:
    """The folder that holds data sets: the one chosen, or the user's, where site files are looked up too."""
    if chosen is not None:
        return chosen
    from platformdirs import user_data_path

    return user_data_path("gapweave")


def verify(entry: DataSet, folder: Path) -> None:
    """Check every file of a set that is there.

    Raises:
        DataError: naming the first file that is missing or differs.
    """
    from gapweave.sites.datasets_fetch import sha256

    remedy = f"Remove {folder} and fetch the set again"
    for name, digest in entry.sums().items():
        path = folder / name
        if not path.is_file():
            raise DataError(f"{name} is missing from the data set {entry.name}", where=str(path), remedy=remedy)
        if sha256(path) != digest:
            raise DataError(f"{name} differs from the published file (SHA-256)", where=str(path), remedy=remedy)


def status(entry: DataSet, folder: Path) -> str:
    """Whether a set is "verified", "damaged" or "absent"."""
    if not folder.exists():
        return "absent"
    try:
        verify(entry, folder)
    except DataError:
        return "damaged"
    return "verified"


app = command_group("The data sets of the example studies.", "gapweave data list")

_Data = Annotated[
    Path | None,
    typer.Option("--data", envvar="GAPWEAVE_DATA", help="Folder of data sets (default: the user's data folder)."),
]


@app.command("list")
def list_sets(
    data: _Data = None,
    as_json: Annotated[bool, typer.Option("--json", help="For machines.")] = False,
) -> None:
    """List the known data sets: licence, where each is, whether its files are as published.

    Example: gapweave data list --json
    """
    base = data_folder(data)
    rows = [
        {
            "name": entry.name, "title": entry.title, "licence": entry.licence, "source": entry.source,
            "citation": entry.citation, "folder": str(base / entry.name),
            "status": status(entry, base / entry.name),
        }
        for entry in DATA_SETS.values()
    ]  # fmt: skip
    if as_json:
        typer.echo(json.dumps(rows, indent=2))
        return
    from rich.console import Console
    from rich.table import Table

    table = Table("Name", "What", "Licence", "Here")
    for row in rows:
        here = "not there" if row["status"] == "absent" else f"{row['status']}: {row['folder']}"
        table.add_row(row["name"], row["title"], row["licence"], here)
    Console().print(table)


@app.command("fetch")
def fetch(
    name: Annotated[str, typer.Argument(help="Name of the set, as `gapweave data list` gives it.")],
    source: Annotated[
        str | None,
        typer.Option("--from", metavar="DIR|URL", help="Folder, or address, below which the set's files lie."),
    ] = None,
    data: _Data = None,
) -> None:
    """Put a data set into the data folder, every file checked against its published SHA-256.

    Example: gapweave data fetch heart_disease --from ~/downloads/heart_disease
    """
    from gapweave.sites.datasets_fetch import gather

    entry = data_set(name)
    folder = data_folder(data) / entry.name
    if folder.exists():
        verify(entry, folder)
        typer.echo(f"{entry.name} is already there, and verified: {folder}")
        return
    if source is None:
        raise UsageError(
            f"{entry.name} has no public address in this form; it was made from {entry.source} "
            f"(licence: {entry.licence})",
            remedy=f"Name what holds its files: gapweave data fetch {entry.name} --from DIR",
        )
    try:
        gather(entry, source, folder)
    except OSError as error:
        raise DataError(
            f"the set cannot be stored ({error.strerror})",
            where=str(folder),
            remedy="Choose another folder with --data",
        ) from None
    typer.echo(f"{entry.name}: {len(entry.sums())} files, verified: {folder}")
    typer.echo(f"Licence: {entry.licence}. Please cite: {entry.citation}.")
