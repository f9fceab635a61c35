"""Submitting a study to a hub, and following, stopping and resuming its runs."""

from __future__ import annotations

import json
import secrets
import shutil
import time
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

from gapweave.server import room
from gapweave.server.hub import Hub
from gapweave.server.superlink import Control, FlowerRun
from gapweave.shared.config.simulation import Simulation
from gapweave.shared.config.study import Study
from gapweave.shared.errors import GapweaveError, UsageError
from gapweave.shared.rundir import RunDirectory

GOING = ("pending", "starting", "running")
"""States of a run that is not over."""


@dataclass(frozen=True, kw_only=True)
class RunState:
    """How a run stands.

    Attributes:
        run: our own id, kept by resume.
        study: its name.
        sha256: of the study: what sites approve.
        submitted: when, ISO 8601.
        status: pending, starting, running, completed, failed or stopped.
        round: last round that was aggregated.
        rounds: of the study.
        reason: why it failed, in one line.
        exit_code: that a command which waits for it ends with.
    """

    run: str
    study: str
    sha256: str
    submitted: str
    status: str
    round: int
    rounds: int
    reason: str = ""
    exit_code: int = 0

    def to_dict(self) -> dict[str, Any]:
        """As `runs --json` prints it."""
        return asdict(self)


def submit(hub: Hub, study: Study) -> str:
    """Start a study on a hub.

    Returns:
        The id of its run.

    Raises:
        UsageError: for a study that only a simulation can run.
        Unreachable: when the hub does not run, or its disk is full.
    """
    if study.simulation != Simulation():
        raise UsageError(
            "the study sets what only a simulation may do",
            where="study:simulation",
            remedy="Remove that section: real sites hide no data and tell no lies on request",
        )
    run = f"{study.name[:60]}-{time.strftime('%Y%m%d-%H%M%S')}-{secrets.token_hex(2)}"
    note: dict[str, Any] = {
        "study": study.name,
        "sha256": study.sha256,
        "rounds": study.training.rounds,
        "submitted": time.strftime("%Y-%m-%dT%H:%M:%S%z"),
    }
    with Control(hub) as control:
        number = _start(control, hub, run, study)
        try:
            hub.note(run, {**note, "numbers": [number]})
        except BaseException:
            control.stop(number)  # nobody would know that it goes on
            raise
    return run


def _start(control: Control, hub: Hub, run: str, study: Study) -> int:
    room.require(hub.folder)
    control.register()
    return control.start(
        {"study": study.canonical(), "out": str(hub.runs / run), "run": run, "sites": str(hub.registry)}
    )


def resume(hub: Hub, run: str) -> None:
    """Continue a run from its last checkpoint, as a new run of Flower's; budgets go on from where they were.

    A completed one goes on where a site that trained did not get the model.

    Raises:
        UsageError: when it is still going, completed at all sites, or unknown.
    """
    note = _noted(hub, run)
    state = state_of(hub, run)
    if state.status in GOING:
        raise UsageError(f"{run} is {state.status}", where="RUN_ID", remedy=f"Stop it first: gapweave stop {run}")
    directory = RunDirectory.open(hub.runs / run)
    if state.status == "completed" and not _without_the_model(directory):
        raise UsageError(f"{run} is completed", where="RUN_ID", remedy="There is nothing to resume")
    with Control(hub) as control:
        number = _start(control, hub, run, directory.study())
    hub.note(run, {**note, "numbers": [*note["numbers"], number]})


def _without_the_model(directory: RunDirectory) -> list[str]:
    """Sites of a completed run that trained, and did not confirm the last message, which brings them the model."""
    sites = directory.read_json("summary.json")["sites"]
    return [name for name, site in sites.items() if site["rounds"] and site["status"] in ("late", "failed")]


def stop(hub: Hub, run: str) -> bool:
    """End a run; it can be resumed. Whether it was still going."""
    number = number_of(hub, run)
    with Control(hub) as control:
        known = control.runs().get(number)
        return known is not None and known.status in GOING and control.stop(number)


def states(hub: Hub) -> list[RunState]:
    """All runs of a hub, the oldest first."""
    with Control(hub) as control:
        known = control.runs()
    return [_state(hub, run, note, known) for run, note in hub.noted().items()]


def state_of(hub: Hub, run: str) -> RunState:
    """How one run stands."""
    note = _noted(hub, run)
    with Control(hub) as control:
        return _state(hub, run, note, control.runs())


def number_of(hub: Hub, run: str) -> int:
    """Flower's number of a run, the last one when it was resumed."""
    return int(_noted(hub, run)["numbers"][-1])


def pull(hub: Hub, run: str, out: Path) -> None:
    """Copy a run's directory: model, report, summary.

    Raises:
        UsageError: when the folder exists, or the run has written nothing.
        GapweaveError: when the disk does not take it.
    """
    _noted(hub, run)
    source = hub.runs / run
    if not source.exists():
        raise UsageError(f"{run} has written nothing yet", where="RUN_ID", remedy=f"gapweave logs {run}")
    RunDirectory.require_new(out)
    try:
        shutil.copytree(source, out, ignore=shutil.ignore_patterns("checkpoint", "failure.json"), dirs_exist_ok=True)
    except shutil.Error as error:
        _, file, why = error.args[0][0]
        raise GapweaveError(f"the run cannot be copied ({why})", where=str(file), remedy="Check the disk") from None


def _noted(hub: Hub, run: str) -> dict[str, Any]:
    found = hub.noted()
    if run not in found:
        known = ", ".join(list(found)[-3:]) or "none"
        raise UsageError(
            f"the hub {hub.config.name} has no run {run!r}", where="RUN_ID", remedy=f"Its last runs: {known}"
        )
    return found[run]


def _state(hub: Hub, run: str, note: dict[str, Any], known: dict[int, FlowerRun]) -> RunState:
    flower = known.get(note["numbers"][-1])
    directory = RunDirectory(hub.runs / run)
    # A hub whose database was lost still has its run directories.
    finished = "completed" if (directory.path / "summary.json").exists() else "failed"
    status = flower.status if flower else finished
    done = [line["round"] for line in directory.rounds()]
    reason, code = "", 0
    if status not in GOING and status != "completed":
        reason, code = _failure(directory, status)
    return RunState(
        run=run,
        study=note["study"],
        sha256=note["sha256"],
        submitted=note["submitted"],
        status=status,
        round=max(done, default=0),
        rounds=note["rounds"],
        reason=reason,
        exit_code=code,
    )


def _failure(directory: RunDirectory, status: str) -> tuple[str, int]:
    if status != "stopped" and directory.failure.exists():
        content = json.loads(directory.failure.read_text(encoding="utf-8"))
        return str(content["error"]), int(content["exit_code"])
    return ("stopped by a person", 130) if status == "stopped" else ("the server ended early; resume the run", 1)
