"""A site's part in a deployment: its SuperNode, kept running, outbound only."""

from __future__ import annotations

import json
import sys
import time
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any

from gapweave.client.keys import check_key
from gapweave.client.supernode import CONTACT, TROUBLE
from gapweave.shared.config import load_site
from gapweave.shared.config.connection import Connection, load_connection
from gapweave.shared.config.site import Site
from gapweave.shared.errors import UsageError
from gapweave.shared.files import private_folder, write_atomically
from gapweave.shared.ports import free_port, healthy
from gapweave.shared.service import Child, Service

if TYPE_CHECKING:
    from gapweave.client.state import RunFolder

LOST_S = 75.0
"""Without an answer of the hub for so long, a site calls itself disconnected; heartbeats are 30 s apart."""


@dataclass(frozen=True)
class Deployment:
    """A site file and what of it concerns the hub.

    Attributes:
        file: the site file.
        site: its content.
    """

    file: Path
    site: Site

    @classmethod
    def of(cls, file: Path) -> Deployment:
        """Read a site file.

        Raises:
            UsageError: when it cannot be read, or names no hub.
        """
        site = load_site(file)
        if site.server is None:
            raise UsageError(
                "the site file names no hub",
                where=f"{file}:server",
                remedy="Add `server: {connection: connection.yaml, key: site.key}`; the hub gives the first of them",
            )
        return cls(file.resolve(), site)

    @property
    def state(self) -> Path:
        """The site's state folder."""
        return self.file.parent / self.site.state

    @property
    def service(self) -> Service:
        """Lock, status and logs, in the state folder."""
        return Service(self.state / "service", f"the site {self.site.name}")

    @property
    def key(self) -> Path:
        """The private key."""
        assert self.site.server is not None
        return self.file.parent / self.site.server.key

    @property
    def connection_file(self) -> Path:
        """What the hub gave."""
        assert self.site.server is not None
        return self.file.parent / self.site.server.connection

    def connection(self) -> Connection:
        """The hub's address and certificate."""
        return load_connection(self.connection_file)

    @property
    def _ports(self) -> Path:
        return self.state / "service" / "ports.json"

    @property
    def _contact(self) -> Path:
        return self.state / "service" / "contact.json"

    @property
    def _trouble(self) -> Path:
        return self._contact.with_name(TROUBLE)

    def check(self) -> None:
        """Refuse a start that cannot succeed.

        Raises:
            UsageError: when the key or the connection file is not usable.
        """
        self.connection()
        check_key(self.key)

    def child(self, data: Path | None) -> Child:
        """The SuperNode of this site, with the files that it reads; its own interfaces are on loopback.

        Args:
            data: folder of data sets.
        """
        connection = self.connection()
        for noted in (self._contact, self._trouble):
            noted.unlink(missing_ok=True)  # what was heard earlier says nothing about now
        for folder in (self.state, self.state / "service", self.state / "flower"):
            private_folder(folder)
        authority = self.state / "service" / "ca.crt"
        write_atomically(authority, connection.ca.encode())
        ports = {"runtime": free_port(), "health": free_port()}
        write_atomically(self._ports, json.dumps(ports).encode())
        node = {"site": str(self.file), **({"data": str(data.resolve())} if data else {})}
        config = self.state / "service" / "node.toml"
        # TOML reads the strings of JSON.
        lines = [f"{name} = {json.dumps(value, ensure_ascii=False)}\n" for name, value in node.items()]
        write_atomically(config, "".join(lines).encode())
        return Child(
            name="supernode",
            command=(
                *(sys.executable, "-m", "gapweave.client.supernode"),
                *("--superlink", connection.address, "--root-certificates", str(authority)),
                *("--auth-supernode-private-key", str(self.key)),
                *("--host", "127.0.0.1", "--port", str(ports["runtime"])),
                *("--health-server-address", f"127.0.0.1:{ports['health']}"),
                *("--node-config", str(config)),
            ),
            environment={"FLWR_HOME": str(self.state / "flower"), CONTACT: str(self._contact)},
        )

    def up(self) -> bool:
        """Whether the SuperNode says that it serves."""
        return self._ports.exists() and healthy(int(json.loads(self._ports.read_text())["health"]))

    def contact(self) -> float | None:
        """Seconds since the hub answered last; None for never."""
        noted = _noted(self._contact)
        return None if noted is None else max(0.0, time.time() - float(noted["time"]))

    def connected(self) -> bool:
        """Whether the hub answers."""
        contact = self.contact()
        return self.up() and contact is not None and contact < LOST_S

    def trouble(self) -> dict[str, Any] | None:
        """What the site failed at in its last message: `text` and `when`; None where it answered well."""
        if (noted := _noted(self._trouble)) is None:
            return None
        return {"text": noted["text"], "when": time.strftime("%Y-%m-%dT%H:%M:%S%z", time.localtime(noted["time"]))}

    def status(self) -> dict[str, Any]:
        """`running`, `healthy`, `connected`, `contact_s`, `trouble`, and the last run and its round."""
        found = self.service.status()
        contact = self.contact()
        return {
            "site": self.site.name,
            **found,
            "healthy": found["running"] and self.up(),
            "connected": found["running"] and self.connected(),
            "contact_s": None if contact is None or not found["running"] else round(contact, 1),
            "trouble": self.trouble(),
            "last": last_round(self.state),
        }


def _noted(file: Path) -> dict[str, Any] | None:
    """What a file holds that is not synced when it is written: nothing, perhaps, after a power cut."""
    try:
        content: dict[str, Any] = json.loads(file.read_text(encoding="utf-8"))
    except (FileNotFoundError, ValueError):
        return None
    return content


def last_round(state: Path) -> dict[str, Any] | None:
    """The run that the site worked for last: `run`, `study`, `round`, `when`, `finished` and `joining`.

    `joining` is what the joining check said of the run; None where it was not made.
    """
    from gapweave.client.state import RunFolder
    from gapweave.shared.joining import lines, read_joining

    worked = ("study.json", "round.safetensors", "model.safetensors")
    when = {
        folder: max(file.stat().st_mtime for name in worked if (file := folder / name).exists())
        for folder in (state / "runs").glob("*")
        if (folder / "study.json").exists()
    }
    if not when:
        return None
    newest = max(when, key=lambda folder: when[folder])
    folder = RunFolder(state, newest.name)
    joining = read_joining(newest)
    return {
        "run": newest.name,
        "study": json.loads(folder.study() or "{}").get("name"),
        "round": folder.load().round,
        "when": time.strftime("%Y-%m-%dT%H:%M:%S%z", time.localtime(when[newest])),
        "finished": (newest / "model.safetensors").exists(),
        "joining": None if joining is None else lines(joining),
    }


def finished_run(state: Path, run: str | None) -> RunFolder:
    """The folder of a run that the site finished: the last one by default.

    Raises:
        UsageError: when there is none.
    """
    from gapweave.client.state import RunFolder

    found = [file for file in (state / "runs").glob("*/model.safetensors") if run in (None, file.parent.name)]
    if not found:
        raise UsageError(
            "the site finished no run yet" if run is None else f"the site finished no run {run!r}",
            where=str(state / "runs"),
            remedy="Wait for the end of a study, and see `gapweave site status`",
        )
    newest = max(found, key=lambda file: file.stat().st_mtime)
    return RunFolder(state, newest.parent.name)
