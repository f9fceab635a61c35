"""What a useless and a tiny site cost six others beside them, and what those two are told."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path
from typing import TYPE_CHECKING, Any

from populations import TINY, USELESS

if TYPE_CHECKING:
    from results import Judged

    from gapweave.sites.simulate.compare_intervals import Draws


def planted(models: list[Judged], draws: Draws | None, told: Callable[[], list[str]]) -> str:
    """The section's text.

    Args:
        models: of the cohort, with the two (recipe "planted") and without (recipe "honest").
        draws: resamples of its patients; None if nothing is finished.
        told: gives what the two are told.
    """
    by = {(entry.recipe, entry.model): entry for entry in models}
    pairs = [(by.get(("honest", model)), by.get(("planted", model))) for model in ("federated", "best")]
    lost = [_lost(draws, alone, beside) for alone, beside in pairs if draws and alone and beside]
    if len(lost) < len(pairs):
        return "Not run."
    lines = "\n".join(f"- {line}" for line in told())
    return (
        f"A hospital with shuffled labels and one with 20 patients beside six others, worlds: {len(models[0].auroc)}. "
        f"The others lose {lost[0]}, and {lost[1]} of what `predict` takes. "
        f"In the first world the two are told:\n\n{lines}"
    )


def _lost(draws: Draws, alone: Judged, beside: Judged) -> str:
    """What the six have less of a model beside the others; only they are in both."""
    found = draws.difference(alone.cell, alone.model, beside.cell, beside.model)
    mean, (low, high) = (0.0, (0.0, 0.0)) if found is None else (found.mean, found.interval or (0.0, 0.0))
    return f"{mean:+.3f} AUROC ({low:+.3f} to {high:+.3f})"


def told_lines(run: Path, study: Path, overrides: dict[str, Any], smoke: bool) -> list[str]:
    """What the joining check tells the planted sites; simulated once, then kept in `run`."""
    from gapweave.shared.joining import lines
    from gapweave.shared.rundir import RunDirectory
    from gapweave.sites.simulate import commands

    if not (run / "summary.json").exists():
        places = commands.Places(sites=study.parent / "sites", data=None, state=None, out=run)
        asked = {**overrides, **({"training.rounds": 2} if smoke else {})}
        commands.start(study, asked, places, baselines=(), continue_without=False, joining=True)
    sites = RunDirectory(run).read_json("summary.json")["sites"]
    return [f"{name}: {line}" for name in (USELESS, TINY) for line in lines(sites[name]["joining"])]
