"""What a person sees of a running simulation: bars for rounds and sites, and a table at the end."""

from __future__ import annotations

from typing import Any, Literal

from rich import box
from rich.console import Console
from rich.progress import BarColumn, MofNCompleteColumn, Progress, TextColumn, TimeElapsedColumn, TimeRemainingColumn
from rich.table import Table

from gapweave.shared.joining import harmed, lines
from gapweave.shared.report.wording import rounded_up
from gapweave.sites.simulate.evaluate import mean_metrics


def progress_bars(console: Console) -> Progress:
    """Bars with time passed and left; they go away at the end, and are not drawn where there is no terminal."""
    return Progress(
        TextColumn("{task.description:<28}"),
        BarColumn(),
        MofNCompleteColumn(),
        TimeElapsedColumn(),
        TimeRemainingColumn(),
        console=console,
        transient=True,
        disable=not console.is_terminal,
    )


def say(line: str) -> None:
    """A warning or a hint, beside the progress bars."""
    Console(stderr=True, highlight=False, soft_wrap=True).print(line, markup=False)


class Bars:
    """A `Watcher` that draws progress bars; use it as a context manager.

    Args:
        console: where to draw; bars go away when it is no terminal.
    """

    def __init__(self, console: Console) -> None:
        self._progress = progress_bars(console)
        self._reading = self._progress.add_task("reading sites", total=None)
        self._rounds = self._progress.add_task("rounds", total=None, visible=False)
        self._sites = self._progress.add_task("sites", total=None, visible=False)
        self._auroc = ""

    def __enter__(self) -> Bars:
        self._progress.start()
        return self

    def __exit__(self, *exception: object) -> None:
        self._progress.stop()

    def reading(self, site: str) -> None:
        """A site's data are being read."""
        self._progress.update(self._reading, description=f"reading {site}", advance=1)

    def prepared(self, sites: int, rounds: int, done: int) -> None:
        """The handshake is over."""
        self._progress.update(self._reading, visible=False)
        self._progress.update(self._rounds, total=rounds, completed=done, visible=True)
        self._progress.update(self._sites, total=sites, visible=True)

    def replied(self, number: int, site: str) -> None:
        """A site answered."""
        self._progress.update(self._sites, description=site, advance=1)

    def round_done(self, number: int, auroc: float | None) -> None:
        """A round is over."""
        if auroc is not None:
            self._auroc = f"  AUROC {auroc:.3f}"
        self._progress.update(self._rounds, description=f"round {number}{self._auroc}", completed=number)
        self._progress.update(self._sites, completed=0)

    def baseline(self, name: str) -> None:
        """A baseline is being fitted."""
        self._progress.update(self._sites, description=f"baseline {name}", total=None)


MODELS_BESIDE_SITES = 4
"""More columns of models than this get a table of their own: 80 columns hold no more."""


def result_tables(summary: dict[str, Any]) -> list[Table]:
    """AUROC by site and model, and what each site is and spent."""
    baselines = summary["baselines"]
    fine_tuned = [row["fine_tuned"] for row in summary["sites"].values() if row["fine_tuned"]]
    models = [*baselines, "federated", *(["fine-tuned"] if fine_tuned else [])]
    title = f"{summary['study']}: AUROC on held-out patients, {summary['metrics_are']}"
    scores = _table(title, ["site", *models])
    facts = _table("sites", ["site", *FACTS]) if len(models) > MODELS_BESIDE_SITES else None
    if facts is None:
        scores = _table(title, ["site", *models, *FACTS])
    for site, row in summary["sites"].items():
        found = [*(baselines[name]["sites"].get(site) for name in baselines), row["metrics"], row["fine_tuned"]]
        cells = [_auroc(metrics) for metrics in found[: len(models)]]
        scores.add_row(site, *cells, *([] if facts else _facts(row)))
        if facts:
            facts.add_row(site, *_facts(row))
    scores.add_section()
    means = [*(baselines[name]["mean"] for name in baselines), summary["mean"]]
    means += [mean_metrics(fine_tuned)] if fine_tuned else []
    scores.add_row("mean", *[_auroc(metrics) for metrics in means])
    return [scores, *([facts] if facts else [])]


def joining_lines(summary: dict[str, Any]) -> list[str]:
    """What each site's joining check says, those first that joining harms."""
    checks = {site: row["joining"] for site, row in summary["sites"].items() if row["joining"] is not None}
    first = sorted(checks, key=lambda site: not harmed(checks[site]))
    return [f"{site}: {line}" for site in first for line in lines(checks[site])]


FACTS = ("patients train/test", "epsilon exact counted/cap", "status")


def _facts(row: dict[str, Any]) -> list[str]:
    patients = row["patients"]
    sizes = "-" if patients["train"] is None else f"{patients['train']}/{patients['test']}"
    reason = f": {row['reason']}" if row["reason"] else ""
    return [sizes, _spent(row["privacy"]), f"{row['status']}{reason}"]


def _table(title: str, columns: list[str]) -> Table:
    table = Table(title=title, title_justify="left", box=box.SIMPLE_HEAD, padding=(0, 1, 0, 0), pad_edge=False)
    for name in columns:
        words = name.replace("_", "\n").replace(" ", "\n")
        side: Literal["left", "right"] = "left" if name in ("site", "status") else "right"
        table.add_column(words, justify=side, style="bold" if name == "federated" else "", overflow="fold")
    return table


def _auroc(metrics: dict[str, float | None] | None) -> str:
    value = None if metrics is None else metrics.get("auroc")
    return "-" if value is None else f"{value:.3f}"


def _spent(privacy: dict[str, Any] | None) -> str:
    if privacy is None:
        return "-"
    if privacy["epsilon"] is None:
        return f"no guarantee/{privacy['cap']:g}"
    return f"{rounded_up(privacy['epsilon']):.2f} {rounded_up(privacy['epsilon_filter']):.2f}/{privacy['cap']:g}"
