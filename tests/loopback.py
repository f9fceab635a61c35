"""A hub and hospitals on loopback: Flower's own SuperLink, SuperNodes and `flwr run`, every message a new process."""

from __future__ import annotations

import os
import socket
import subprocess
import sys
import time
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from pathlib import Path

import tomli_w

from gapweave.shared.config import Study
from gapweave.shared.ports import free_port

BIN = Path(sys.executable).parent
CONNECTION = "loopback"


def wait_for_port(port: int, process: subprocess.Popen[bytes], seconds: float = 60) -> None:
    deadline = time.monotonic() + seconds
    while time.monotonic() < deadline:
        assert process.poll() is None, "the server ended early"
        with socket.socket() as probe:
            if probe.connect_ex(("127.0.0.1", port)) == 0:
                return
        time.sleep(0.2)
    raise TimeoutError(f"nothing listens on port {port}")


def run_card(folder: Path, study: Study, out: Path, run: str) -> Path:
    """A bundle without code: it names the installed apps and carries the study."""
    folder.mkdir()
    components = {"serverapp": "gapweave.server.app:app", "clientapp": "gapweave.client.app:app"}
    config = {"study": study.canonical(), "out": str(out), "run": run}
    card = {
        "build-system": {"requires": ["setuptools"], "build-backend": "setuptools.build_meta"},
        "project": {"name": "run-card", "version": "1.0.0", "description": "x", "license": "Apache-2.0"},
        "tool": {"flwr": {"app": {"publisher": "gapweave", "components": components, "config": config}}},
    }
    card["project"]["dependencies"] = []
    (folder / "pyproject.toml").write_text(tomli_w.dumps(card))
    return folder


class Hub:
    """A running SuperLink, to which SuperNodes are connected."""

    def __init__(self, folder: Path) -> None:
        self.folder = folder
        self.port = free_port()
        self._processes: list[subprocess.Popen[bytes]] = []
        self._nodes: dict[str, subprocess.Popen[bytes]] = {}
        home = folder / "flwr"
        home.mkdir(parents=True)
        connection = {"address": f"127.0.0.1:{self.port}", "insecure": True}
        (home / "config.toml").write_text(tomli_w.dumps({"superlink": {"default": CONNECTION, CONNECTION: connection}}))
        # Coverage, as it starts in a process, takes modules out of sys.modules again; once Flower's loader was importing
        # one of ours at that moment, and the ServerApp died of a KeyError.
        inherited = {name: value for name, value in os.environ.items() if not name.startswith("COVERAGE_")}
        self.environment = {
            **inherited,
            "PATH": f"{BIN}{os.pathsep}{os.environ['PATH']}",
            "FLWR_HOME": str(home),
            "FLWR_TELEMETRY_ENABLED": "0",
            "FLWR_DISABLE_UPDATE_CHECK": "1",
            "FLWR_DISABLE_RUNTIME_DEPENDENCY_INSTALLATION": "1",
            "OMP_NUM_THREADS": "1",
        }

    def _start(self, name: str, *command: str) -> subprocess.Popen[bytes]:
        with (self.folder / f"{name}.log").open("wb") as log:
            process = subprocess.Popen(
                [str(BIN / command[0]), *command[1:]],
                env=self.environment,
                stdout=log,
                stderr=log,
                start_new_session=True,
            )
        self._processes.append(process)
        return process

    def open(self) -> None:
        where = ("--host", "127.0.0.1", "--port", str(self.port))
        server = self._start(
            "superlink", "flower-superlink", "--insecure", *where, "--disable-runtime-dependency-installation"
        )
        wait_for_port(self.port, server)

    def connect(self, site_file: Path) -> None:
        runtime = ("--host", "127.0.0.1", "--port", str(free_port()))
        hub = ("--superlink", f"127.0.0.1:{self.port}")
        self._nodes[site_file.stem] = self._start(
            site_file.stem, "flower-supernode", "--insecure", *hub, *runtime, "--node-config", f'site="{site_file}"'
        )

    def signal(self, site: str, name: str) -> None:
        """Send a signal to a node and to all that it started."""
        subprocess.run(["pkill", f"-{name}", "-s", str(self._nodes[site].pid)], check=False)

    def run(self, card: Path, seconds: float) -> str:
        """`flwr run --stream`: returns when the run is over."""
        finished = subprocess.run(
            [str(BIN / "flwr"), "run", str(card), CONNECTION, "--stream"],
            env=self.environment,
            stdout=subprocess.PIPE,
            stderr=subprocess.STDOUT,
            timeout=seconds,
            check=False,
        )
        return finished.stdout.decode(errors="replace")

    def close(self) -> None:
        for site in self._nodes:
            self.signal(site, "CONT")
        for process in self._processes:
            # Each was started in a session of its own, and starts further processes.
            subprocess.run(["pkill", "-TERM", "-s", str(process.pid)], check=False)
        for process in self._processes:
            try:
                process.wait(timeout=10)
            except subprocess.TimeoutExpired:
                subprocess.run(["pkill", "-KILL", "-s", str(process.pid)], check=False)
                process.wait(timeout=10)


@contextmanager
def hub_with(folder: Path, site_files: Sequence[Path]) -> Iterator[Hub]:
    hub = Hub(folder)
    try:
        hub.open()
        for file in site_files:
            hub.connect(file)
        yield hub
    finally:
        hub.close()
