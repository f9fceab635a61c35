"""The Flower ServerApp: one run of one study on whatever grid it is given."""

from __future__ import annotations

import json
from collections.abc import Callable
from pathlib import Path

from flwr.app import Context
from flwr.serverapp import Grid, ServerApp

from gapweave.server import room
from gapweave.server.model_card import save_model
from gapweave.server.peers import Peer
from gapweave.server.strategy import Observer, RoundLoop
from gapweave.server.summary import summarise_deployment
from gapweave.shared.config.study import Study, study_from_json
from gapweave.shared.errors import GapweaveError
from gapweave.shared.report.run_report import write_report
from gapweave.shared.rundir import RunDirectory

app = ServerApp()


@app.main()  # type: ignore[untyped-decorator]
def main(grid: Grid, context: Context) -> None:
    """Run the study of the run configuration: see `card.CONFIG`."""
    config = {key: str(value) for key, value in context.run_config.items()}
    study = study_from_json(config["study"])
    out = Path(config["out"])
    directory = RunDirectory(out) if (out / "study.yaml").exists() else RunDirectory.create(out, study)
    try:
        run_study(grid, study, directory, config["run"], Room(out), names=_names(config.get("sites", "")))
    except GapweaveError as error:
        directory.write_json(directory.failure.name, {"error": str(error), "exit_code": error.exit_code})
        raise


class Room(Observer):
    """Ends a run before a round that the hub's disk has no room for: no site pays for what cannot be kept.

    Args:
        folder: of the run.
    """

    def __init__(self, folder: Path) -> None:
        self._folder = folder

    def starting(self, number: int, sent: int) -> None:
        """What is sent lies in Flower's database, what comes back too, each also in its log; then the checkpoint."""
        room.require(self._folder, 5 * sent)


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
