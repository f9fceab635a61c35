"""The Flower ServerApp: one run of one study on whatever grid it is given."""

from __future__ import annotations

from pathlib import Path

from flwr.app import Context
from flwr.serverapp import Grid, ServerApp

from gapweave.server.model_card import save_model
from gapweave.server.peers import Peer
from gapweave.server.strategy import Observer, RoundLoop
from gapweave.server.summary import summarise_deployment
from gapweave.shared.config.study import Study, study_from_json
from gapweave.shared.report.run_report import write_report
from gapweave.shared.rundir import RunDirectory

app = ServerApp()


@app.main()  # type: ignore[untyped-decorator]
def main(grid: Grid, context: Context) -> None:
    """Run the study of the run configuration: `study` (JSON), `out` (folder), `run` (our own id)."""
    config = context.run_config
    study = study_from_json(str(config["study"]))
    out = Path(str(config["out"]))
    directory = RunDirectory(out) if (out / "study.yaml").exists() else RunDirectory.create(out, study)
    run_study(grid, study, directory, str(config["run"]))


def run_study(
    grid: Grid, study: Study, directory: RunDirectory, run: str, observer: Observer | None = None
) -> tuple[RoundLoop, dict[str, Peer]]:
    """Run or resume a study, keep its model, and write what it may say.

    Returns:
        The finished loop and the sites by name.
    """
    loop = RoundLoop(grid, study, directory, run, observer)
    peers = loop.run()
    save_model(directory, study, loop.final, peers)
    directory.write_json("summary.json", summarise_deployment(study, loop))
    write_report(directory)
    return loop, peers
