"""The Flower ServerApp: one run of one study on whatever grid it is given."""

from __future__ import annotations

import json
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any

from flwr.app import Context
from flwr.serverapp import Grid, ServerApp

from gapweave.server import room
from gapweave.server.model_card import save_model
from gapweave.server.peers import Peer
from gapweave.server.strategy import Observer, RoundLoop
from gapweave.server.summary import summarise_deployment
from gapweave.shared.config.study import Study, study_from_json
from gapweave.shared.errors import GapweaveError
from gapweave.shared.files import alone
from gapweave.shared.report.run_report import write_report
from gapweave.shared.rundir import RunDirectory
from gapweave.shared.tensorfile import Arrays

app = ServerApp()

STOPPED_S = 60
"""Seconds in which a process whose run was stopped ends: Flower tells it when it next asks, or by a heartbeat in 30."""


@app.main()  # type: ignore[untyped-decorator]
def main(grid: Grid, context: Context) -> None:
    """Run the study of the run configuration: see `card.CONFIG`."""
    config = {key: str(value) for key, value in context.run_config.items()}
    study = study_from_json(config["study"])
    out = Path(config["out"])
    directory = RunDirectory(out) if (out / "study.yaml").exists() else RunDirectory.create(out, study)
    try:
        with alone(directory.path, patience_s=STOPPED_S):
            directory.failure.unlink(missing_ok=True)  # of the process that went before
            watch = Watch(directory, study)
            run_study(grid, study, directory, config["run"], watch, names=_names(config.get("sites", "")))
    except GapweaveError as error:
        print(f"error: {error}", flush=True)
        directory.write_json(directory.failure.name, {"error": str(error), "exit_code": error.exit_code})
        raise


class Watch(Observer):
    """Prints a line a round, for `gapweave logs`, and ends a run before a round that the hub's disk has no room for.

    No site pays for what cannot be kept.

    Args:
        directory: of the run.
        study: that it trains.
    """

    def __init__(self, directory: RunDirectory, study: Study) -> None:
        self._directory, self._rounds = directory, study.training.rounds

    def prepared(self, peers: dict[str, Peer]) -> None:
        """Who is there, and who is not."""
        print(f"handshake: {_listed({name: vars(peer) for name, peer in peers.items()})}", flush=True)

    def starting(self, number: int, sent: int) -> None:
        """What is sent lies in Flower's database, what comes back too, each also in its log; then the checkpoint."""
        room.require(self._directory.path, 5 * sent)

    def round_done(self, number: int, current: Arrays) -> None:
        """Who took part in it, and what was wrong."""
        *_, line = self._directory.rounds()
        wrong = [
            f"{group}: {site} left out ({reason})"
            for group, of in line["groups"].items()
            for site, reason in of["screened"].items()
        ]
        wrong += [
            f"{group} left alone ({of['left_alone']})" for group, of in line["groups"].items() if "left_alone" in of
        ]
        told = "; ".join([_listed(line["sites"]), *wrong])
        print(f"round {number} of {self._rounds}, {line['seconds']:.1f} s: {told}", flush=True)


def _listed(sites: Mapping[str, Mapping[str, Any]]) -> str:
    """Sites that are well, then the others with status and reason."""
    well = [name for name, site in sorted(sites.items()) if site["status"] == "ok"]
    others = [
        f"{name} {site['status']} ({site.get('reason')})" for name, site in sorted(sites.items()) if name not in well
    ]
    return "; ".join([", ".join(well) or "no site", *others])


def _names(registry: str) -> Callable[[int], str | None] | None:
    """By which name a hub let a node in: the one word about who it is that the node does not have itself."""
    if not registry:
        return None

    def name(node: int) -> str | None:
        numbers = json.loads(Path(registry).read_text(encoding="utf-8"))
        return next((site for site, number in numbers.items() if number == node), None)

    return name


def run_study(
    grid: Grid,
    study: Study,
    directory: RunDirectory,
    run: str,
    observer: Observer | None = None,
    names: Callable[[int], str | None] | None = None,
) -> tuple[RoundLoop, dict[str, Peer]]:
    """Run or resume a study, keep its model, and write what it may say.

    Returns:
        The finished loop and the sites by name.
    """
    loop = RoundLoop(grid, study, directory, run, observer, names=names)
    peers = loop.run()
    save_model(directory, study, loop.final, peers)
    directory.write_json("summary.json", summarise_deployment(study, loop))
    write_report(directory)
    return loop, peers
