"""The SuperLink, Flower's server process: how it is started, and the calls of its control side.

The one place on the server's side that uses names of Flower's which are not documented; test_hub.py and the long
tests' federations fail when they move.
"""

from __future__ import annotations

import contextlib
import hashlib
import os
import sqlite3
import sys
import threading
from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from gapweave.server import room
from gapweave.server.hub import Hub
from gapweave.server.proxy import nginx
from gapweave.shared.errors import GapweaveError, Unreachable, UsageError
from gapweave.shared.ports import healthy, is_free, shows
from gapweave.shared.service import Child, direct

LOOK_S = 1.0
"""How often a running hub looks for sites that were added or removed."""
MOST_RUNS = 2**31 - 1
"""Runs that are asked for: Flower tells the 20 newest by itself, and an older one that still goes on looks lost."""
LOCKED_S = 120
"""Seconds in which the database may be busy with other sites' messages. Flower waits for 5, then the run ends: ten
sites that answer 100 MB at once take longer on a small machine."""


def children(hub: Hub, *, proxy: bool) -> list[Child]:
    """The processes of a hub, the SuperLink on loopback and the reverse proxy, with certificates that are good.

    Raises:
        Unreachable: when another program has one of its ports.
    """
    _require_free_ports(hub, proxy=proxy)
    hub.renew()
    config = hub.config
    superlink = Child(
        name="superlink",
        command=(
            *(sys.executable, "-m", "gapweave.server.superlink"),
            *("--host", "127.0.0.1", "--port", str(config.control_port)),
            *("--ssl-ca-certfile", str(hub.ca), "--ssl-certfile", str(hub.certificate)),
            *("--ssl-keyfile", str(hub.key), "--enable-supernode-auth", "--database", str(hub.database)),
            *("--health-server-address", f"127.0.0.1:{config.health_port}"),
            "--disable-runtime-dependency-installation",
        ),
        environment={"FLWR_HOME": str(hub.folder / "flower")},
    )
    if not proxy:
        return [superlink]
    command = (nginx(), "-p", f"{hub.folder}/", "-c", str(hub.proxy), "-e", "stderr")
    return [superlink, Child(name="proxy", command=command)]


def _require_free_ports(hub: Hub, *, proxy: bool) -> None:
    """Refuse to start where another program has a port: its answers would be taken for the hub's.

    Raises:
        Unreachable: naming the port.
    """
    config = hub.config
    ports = {"control_port": config.control_port, "health_port": config.health_port}
    if proxy:
        ports["port" if config.listen_port is None else "listen_port"] = hub.listens
    for name, port in ports.items():
        if not is_free(port):
            raise Unreachable(
                f"another program listens on port {port}",
                where=f"{hub.folder / 'hub.yaml'}:{name}",
                remedy="End it, or choose another port there (hospitals know the public one by connection.yaml)",
            )


def silent(hub: Hub) -> str | None:
    """The process of a hub, as its service names it, that does not serve; None where all do.

    That one answers is not enough: it has to show the hub's own certificate.
    """
    config = hub.config
    if not (healthy(config.health_port) and shows(config.control_port, hub.ca)):
        return "superlink"
    kept = hub.service.status()["processes"]
    return "proxy" if "proxy" in kept and not shows(hub.listens, hub.ca) else None


def keep_registered(hub: Hub, over: threading.Event) -> None:
    """Let the SuperLink know the hub's sites, and only these, until the hub is stopped."""
    done: dict[str, int] | None = None
    said = ""
    while not over.wait(LOOK_S):
        try:
            wanted = {file.name: file.stat().st_mtime_ns for file in hub.keys.glob("*.pub")}
            if wanted != done and healthy(hub.config.health_port):
                with Control(hub) as control:
                    control.register(over)
                done = wanted
        except (Unreachable, OSError):
            pass  # it starts, or is going
        except Exception as error:  # whatever it is: without this thread nobody is let in or shut out any more
            told = str(error) if isinstance(error, GapweaveError) else type(error).__name__
            if told != said:
                said = told
                print(f"not all sites are registered: {said}", flush=True)


@dataclass(frozen=True, kw_only=True)
class FlowerRun:
    """A run as Flower knows it.

    Attributes:
        number: Flower's own.
        status: pending, starting, running, completed, failed or stopped.
    """

    number: int
    status: str


class Control:
    """The SuperLink's control side, over TLS on loopback.

    Args:
        hub: whose.
    """

    def __init__(self, hub: Hub) -> None:
        self._hub = hub

    def __enter__(self) -> Control:
        os.environ.update(direct(os.environ))
        from flwr.cli.cli_client_interceptor import CliClientHttpInterceptor
        from flwr.supercore.control import ControlHttpClient
        from flwr.supercore.interceptors import RuntimeVersionHttpInterceptor

        self._client = ControlHttpClient.from_server_address(
            server_address=f"127.0.0.1:{self._hub.config.control_port}",
            insecure=False,
            root_certificates=self._hub.ca.read_bytes(),
            interceptors=[CliClientHttpInterceptor(), RuntimeVersionHttpInterceptor(component_name="flwr CLI")],
        )
        return self

    def __exit__(self, *_: object) -> None:
        self._client.close()

    @contextlib.contextmanager
    def _asking(self) -> Iterator[None]:
        """An error of the transport as one of ours."""
        import httpx

        try:
            yield
        except httpx.TransportError:
            room.require(self._hub.folder)
            raise Unreachable(
                f"the hub {self._hub.config.name} does not answer",
                where=str(self._hub.folder),
                remedy="Start it with `gapweave server start`",
            ) from None
        except httpx.HTTPStatusError as error:
            if error.response.is_server_error:
                room.require(self._hub.folder)
                raise Unreachable(
                    f"the hub {self._hub.config.name} cannot answer ({error.response.status_code})",
                    where=str(self._hub.service.log_file("superlink")),
                    remedy="Look at that log",
                ) from None
            raise UsageError(
                f"the hub refuses ({error.response.status_code})",
                where=str(self._hub.folder),
                remedy="Look at its log with `gapweave server status`",
            ) from None

    def sites(self) -> dict[int, dict[str, Any]]:
        """Registered sites by number: `name`, `key` and `online`."""
        from flwr.proto.control_pb2 import ListNodesRequest

        with self._asking():
            answer = self._client.ListNodes(ListNodesRequest())
        return {
            node.node_id: {"name": node.name, "key": node.public_key, "online": node.status == "online"}
            for node in answer.nodes_info
            if node.status != "unregistered"
        }

    def register(self, over: threading.Event | None = None) -> None:
        """Make the SuperLink's sites those of the hub's folder, and note their numbers there.

        Raises:
            UsageError: for a file that holds no key, once all others are seen to.
        """
        from cryptography.exceptions import UnsupportedAlgorithm
        from flwr.proto.control_pb2 import RegisterNodeRequest, UnregisterNodeRequest
        from flwr.supercore.primitives.asymmetric import public_key_to_bytes

        wanted, broken = {}, []
        for name in self._hub.sites():
            try:
                wanted[name] = public_key_to_bytes(_public_key(self._hub, name))
            except (ValueError, TypeError, AttributeError, UnsupportedAlgorithm):
                broken.append(name)
        found = {site["key"]: number for number, site in self.sites().items()}
        for key, number in found.items():
            if key not in wanted.values():
                with self._asking():
                    self._client.UnregisterNode(UnregisterNodeRequest(node_id=number))
        for name, key in wanted.items():
            if key not in found and not (over and over.is_set()):
                free_key(self._hub.database, key)
                with self._asking():
                    found[key] = self._client.RegisterNode(RegisterNodeRequest(public_key=key, name=name)).node_id
        numbers = {name: found[key] for name, key in wanted.items() if key in found}
        if numbers != self._hub.registered():
            self._hub.write_registered(numbers)
        if broken:
            raise UsageError(
                "the file holds no public key",
                where=str(self._hub.keys / f"{broken[0]}.pub"),
                remedy=f"gapweave server remove-site {broken[0]}, and add it again with its site.pub",
            )

    def start(self, config: Mapping[str, str]) -> int:
        """Start a run of the card of this version.

        Args:
            config: of the run, see `card.CONFIG`.

        Returns:
            Flower's number of the run.
        """
        from flwr.common.serde import fab_to_proto, user_config_to_proto
        from flwr.proto.control_pb2 import StartRunRequest
        from flwr.supercore.fab import Fab

        from gapweave.shared.card import install_card, run_card

        install_card(self._hub.folder / "flower")
        bundle = run_card()
        request = StartRunRequest(
            fab=fab_to_proto(Fab(hashlib.sha256(bundle).hexdigest(), bundle, {})),
            override_config=user_config_to_proto(dict(config)),
        )
        with self._asking():
            answer = self._client.StartRun(request)
        if not answer.HasField("run_id"):
            raise UsageError("the hub started no run", where=str(self._hub.folder), remedy="Look at its log")
        return int(answer.run_id)

    def runs(self) -> dict[int, FlowerRun]:
        """All runs by Flower's number."""
        from flwr.proto.control_pb2 import ListRunsRequest

        with self._asking():
            answer = self._client.ListRuns(ListRunsRequest(limit=MOST_RUNS))
        return {number: FlowerRun(number=number, status=_status(run.status)) for number, run in answer.run_dict.items()}

    def stop(self, number: int) -> bool:
        """End a run; whether it was still going."""
        from flwr.proto.control_pb2 import StopRunRequest

        with self._asking():
            return bool(self._client.StopRun(StopRunRequest(run_id=number)).success)

    def logs(self, number: int) -> Iterator[str]:
        """What a run writes, until it is over."""
        from flwr.proto.control_pb2 import StreamLogsRequest

        with self._asking():
            for part in self._client.StreamLogs(StreamLogsRequest(run_id=number, after_timestamp=0.0)):
                yield part.log_output


def _status(status: Any) -> str:
    """`completed`, `failed` or `stopped` of a finished run, else where it is."""
    return str(status.sub_status if status.status == "finished" else status.status)


def _public_key(hub: Hub, name: str) -> Any:
    from cryptography.hazmat.primitives.serialization import load_ssh_public_key

    return load_ssh_public_key((hub.keys / f"{name}.pub").read_bytes())


def free_key(database: Path, key: bytes) -> None:
    """Let a key that was shut out be registered again: Flower keeps it for good, and refuses it from then on.

    Args:
        database: of the SuperLink, which may be running.
        key: as Flower knows it.

    Raises:
        GapweaveError: when the database cannot be written.
    """
    freed = "UPDATE node SET public_key = CAST('shut out ' || node_id AS BLOB) WHERE public_key = ? AND status = ?"
    try:
        with contextlib.closing(sqlite3.connect(database, timeout=LOCKED_S)) as connection, connection:
            connection.execute(freed, (key, "unregistered"))
    except sqlite3.Error as error:
        raise GapweaveError(
            f"Flower's database cannot be written ({error})", where=str(database), remedy="Check the disk"
        ) from None


def wait_for_database() -> None:
    """Let this process wait longer for its database."""
    from flwr.supercore import sql_mixin

    # Later settings of a connection replace earlier ones.
    sql_mixin.SQLITE_PRAGMAS = (*sql_mixin.SQLITE_PRAGMAS, ("busy_timeout", str(1000 * LOCKED_S)))


def main() -> None:
    """Run the SuperLink in this process, with the arguments of Flower's own command, while its disk has room."""
    from flwr.superlink.cli.flower_superlink import flower_superlink

    wait_for_database()
    room.keep(Path(os.environ["FLWR_HOME"]))
    flower_superlink()


if __name__ == "__main__":
    main()
