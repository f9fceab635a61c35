"""The SuperNode, Flower's process at a site, with a guard: it runs no bundle but the run card of this version.

Beside it a worker, which has all imported and forks a process for each message: to start a program costs 3 s of a core.

The one place on the client's side that uses names of Flower's which are not documented; test_supernode.py fails when
they move. Flower itself would run whatever code the server ships, or trust whoever holds a signing key.
"""

from __future__ import annotations

import importlib
import json
import logging
import os
import signal
import subprocess
import sys
import threading
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager, suppress
from pathlib import Path
from typing import Any

from gapweave.shared.card import install_card, refusal
from gapweave.shared.files import write_atomically
from gapweave.shared.service import own_environment

log = logging.getLogger("gapweave")

CONTACT = "GAPWEAVE_CONTACT"
"""Environment variable: the file in which the SuperNode notes when it last heard of its hub."""
TROUBLE = "trouble.json"
"""Name of the file beside it in which a message's process notes what it failed at."""
CONTACT_S = 5.0
"""Seconds between two notes."""


BUSY_POLL_S, RUN_S = 0.5, 60.0
"""How often a site asks its hub after it worked for it, and how long."""
ITSELF, WORKER = "gapweave.client.supernode", "worker"
POLL, POLL_S = "FLWR_SUPEREXEC_TASK_POLL_INTERVAL", 0.25
"""How often the worker asks its SuperNode for messages, by Flower's variable."""


class Guard:
    """What stands between the hub's messages and this machine.

    Args:
        contact: file for the last contact, if anybody looks.
        home: where Flower unpacks bundles.
    """

    def __init__(self, contact: Path | None = None, home: Path | None = None) -> None:
        self._contact, self._home = contact, home
        self._noted = 0.0
        self._in_a_run = False
        self.refused: str | None = None

    def get_fab(self, get: Callable[[str, int], Any]) -> Callable[[str, int], Any]:
        """Fetch a bundle and remember why it must not run, before anything of it is unpacked."""

        def checked(fab_hash: str, run_id: int) -> Any:
            bundle = get(fab_hash, run_id)
            self.refused = refusal(bundle.content) or self._unpacked()
            if self.refused is not None:
                log.error("refused: %s", self.refused)
            # Without these Flower refuses before it asks `verify`.
            bundle.verifications = {"valid_license": "gapweave"}
            return bundle

        return checked

    def _unpacked(self) -> str | None:
        """Unpack the card; what is wrong if the disk does not take it."""
        try:
            if self._home is not None:
                install_card(self._home)
        except OSError as error:
            log.error("the run card cannot be unpacked: %s", error.strerror)
            return "the site cannot unpack the run card: its disk is full or closed"
        return None

    def receive(self, receive: Callable[[], Any]) -> Callable[[], Any]:
        """Ask for a message, and note that the hub answered. Flower asks every 3 s; in a run a site asks more often."""

        def noted() -> Any:
            worked = time.monotonic()
            while True:
                message = receive()
                self.heard()
                if message is not None:
                    self._in_a_run = True
                    return message
                if not self._in_a_run:
                    return None
                self._in_a_run = time.monotonic() - worked < RUN_S
                time.sleep(BUSY_POLL_S)

        return noted

    def heard(self) -> None:
        """Note the time of the last contact."""
        if self._contact is None or time.monotonic() - self._noted < CONTACT_S:
            return
        self._noted = time.monotonic()
        with suppress(OSError):  # a full disk must not end the site's part
            write_atomically(self._contact, json.dumps({"time": time.time()}).encode(), durable=False)


def install(guard: Guard) -> Callable[..., None]:
    """Put the guard into Flower.

    Returns:
        Flower's loop of a SuperNode, which asks the guard.
    """
    import flwr.supernode.start_client_internal as flower
    from flwr.app import Error
    from flwr.supernode.fleet_http_client import FleetHttpClient

    def verify(fab: Any, trusted: Any) -> bool:
        """Asked of every bundle, since the loop below is given a trusted entity."""
        if guard.refused is not None:
            flower.FAB_VERIFICATION_ERROR = Error(flower.FAB_VERIFICATION_ERROR.code, guard.refused)
        return guard.refused is None

    connect, loop = flower._init_connection, flower.start_client_internal

    @contextmanager
    def guarded(*args: Any, **keywords: Any) -> Iterator[tuple[Any, ...]]:
        with connect(*args, **keywords) as connection:
            node, receive, send, get_run, get_fab, *rest = connection
            guard.heard()
            yield (node, guard.receive(receive), send, get_run, guard.get_fab(get_fab), *rest)

    beat = FleetHttpClient.SendNodeHeartbeat

    def heard(client: Any, request: Any) -> Any:
        """A site that trains for long asks for nothing meanwhile; its heartbeats go on."""
        answer = beat(client, request)
        guard.heard()
        return answer

    FleetHttpClient.SendNodeHeartbeat = heard
    flower._init_connection = guarded
    flower._verify_fab = verify

    def start(**keywords: Any) -> None:
        start_worker(keywords["runtime_api_address"])
        # Isolation by process: Flower starts no program for messages of its own.
        loop(**{**keywords, "trusted_entities": {"gapweave": "the run card"}, "isolation": "process"})

    return start


def start_worker(address: str) -> None:
    """Start the process that forks for messages; neither it nor this one outlives the other.

    Args:
        address: of this SuperNode's own interface, on loopback.
    """
    command = [sys.executable, "-m", "gapweave.shared.tether", sys.executable, "-m", ITSELF, WORKER, address]
    environment = {**own_environment(), "GAPWEAVE_SUPERVISOR": str(os.getpid()), POLL: str(POLL_S)}
    process = subprocess.Popen(command, env=environment)

    def watch() -> None:
        log.error("the worker ended with code %s", process.wait())
        logging.shutdown()
        os._exit(1)

    threading.Thread(target=watch, daemon=True).start()


def work(address: str) -> None:
    """Be the worker: Flower's loop that takes a SuperNode's messages, with a fork in place of a new program.

    What a message leaves in memory ends with its process, as before.
    """
    from flwr.supercore.superexec.executor.subprocess_executor import SubprocessExecutor
    from flwr.supercore.superexec.run_superexec import run_superexec

    preload()
    signal.signal(signal.SIGCHLD, signal.SIG_IGN)  # nobody waits for the children
    SubprocessExecutor.launch = fork
    run_superexec(runtime_api_address=address, insecure=True, parent_pid=None)


def preload() -> None:
    """Import what every message needs and takes long: Flower's part and torch. A process that forks has one thread.

    So polars is left to the messages: it starts threads when it is imported.
    """
    for name in ("flwr.supernode.runtime.run_clientapp", "gapweave.client.network", "gapweave.client.evaluation"):
        importlib.import_module(name)


def fork(_: Any, spec: Any) -> Any:
    """Handle one message in a process of its own."""
    from flwr.supercore.superexec.executor import LaunchResult
    from flwr.supernode.runtime.run_clientapp import run_clientapp

    if os.fork():
        return LaunchResult.accepted()
    signal.signal(signal.SIGCHLD, signal.SIG_DFL)
    try:
        run_clientapp(spec.runtime_api_address, spec.token, spec.insecure, parent_pid=spec.parent_pid)
    except BaseException as error:  # also what ends a process: the rest of this one is the parent's
        log.info("a message is done: %s", error)
    finally:
        logging.shutdown()
        sys.stdout.flush()
        os._exit(0)


def known_to_hub(address: str, authority: bytes, key: bytes) -> bool:
    """Whether a hub lets a site in now, by its key: not while another process is connected with it.

    Args:
        address: of the hub.
        authority: its certificate, PEM.
        key: the site's private key in OpenSSH's format.
    """
    import httpx
    from cryptography.hazmat.primitives.serialization import load_ssh_private_key
    from flwr.proto.fleet_pb2 import ActivateNodeRequest, DeactivateNodeRequest
    from flwr.supercore.interceptors import RuntimeVersionHttpInterceptor
    from flwr.supercore.primitives.asymmetric import public_key_to_bytes
    from flwr.supernode.fleet_http_client import FleetHttpClient
    from flwr.supernode.node_auth_http_interceptor import NodeAuthHttpInterceptor

    private: Any = load_ssh_private_key(key, password=None)
    public = private.public_key()
    with FleetHttpClient.from_server_address(
        address,
        False,
        authority,
        interceptors=[
            RuntimeVersionHttpInterceptor(component_name="SuperNode"),
            NodeAuthHttpInterceptor(private, public),
        ],
    ) as client:
        try:
            request = ActivateNodeRequest(public_key=public_key_to_bytes(public), heartbeat_interval=30)
            client.DeactivateNode(DeactivateNodeRequest(node_id=client.ActivateNode(request).node_id))
        except httpx.HTTPStatusError:
            return False
    return True


def main() -> None:
    """Run a SuperNode in this process, with the arguments of Flower's own command, or its worker."""
    if sys.argv[1:2] == [WORKER]:
        work(sys.argv[2])
        return
    # By name: the package has a function called as the module is.
    command: Any = importlib.import_module("flwr.supernode.cli.flower_supernode")
    contact, home = os.environ.get(CONTACT), os.environ.get("FLWR_HOME")
    command.start_client_internal = install(Guard(Path(contact) if contact else None, Path(home) if home else None))
    command.flower_supernode()
    # Its loop ends at an error that it does not retry, an expired certificate say, and a server of its own in a
    # thread keeps the process there, deaf. Whoever watches over it must see it end.
    log.error("the SuperNode gave up")
    logging.shutdown()
    os._exit(1)


if __name__ == "__main__":
    main()
