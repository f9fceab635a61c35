"""A site that is asked over a socket, while its system calls are listed; and sites that lack one precaution."""

from __future__ import annotations

import os
import signal
import socket
import sqlite3
import struct
from pathlib import Path
from types import SimpleNamespace
from typing import Any

from flwr.app import Message
from flwr.common.serde import recorddict_from_proto, recorddict_to_proto
from flwr.proto.recorddict_pb2 import RecordDict
from kills import CALLS, Child, Federation, fork, strace

from gapweave.client import app as client_app
from gapweave.client import journal as journal_module
from gapweave.client import ledger as ledger_module
from gapweave.server.aggregation import initial_groups
from gapweave.shared import files, wire
from gapweave.shared.config import load_study
from gapweave.shared.tensorfile import Arrays
from gapweave.sites.simulate.grid import InlineGrid


def send(wire_end: socket.socket, content: bytes) -> None:
    """One message, with its length before it."""
    wire_end.sendall(struct.pack(">I", len(content)) + content)


def receive(wire_end: socket.socket) -> bytes:
    """One message; empty when there will be none."""
    with wire_end.makefile("rb", buffering=0) as stream:
        head = stream.read(4)
        if not head:
            return b""
        (size,), content = struct.unpack(">I", head), b""
        while len(content) < size:
            content += stream.read(size - len(content))
        return content


def answer(folder: Path, wire_end: socket.socket, broken: str) -> None:
    """Answer messages from a socket with the ClientApp, as a site that lacks one of its precautions."""
    if broken:
        BROKEN[broken]()
    config = {"site": str(folder / "sites" / "alder.yaml"), "state": str(folder / "state"), "simulation": True}
    grid = InlineGrid(client_app.app, [{**config, "anchored": True}])
    while request := receive(wire_end):
        kind, content = request.split(b"\n", 1)
        message = Message(recorddict_from_proto(RecordDict.FromString(content)), 1000, kind.decode(), group_id="")
        (reply,) = grid.send_and_receive([message])
        send(wire_end, recorddict_to_proto(reply.content).SerializeToString())


def converse(federation: Federation, wire_end: socket.socket) -> list[dict[str, Any]]:
    """The server's side of a handshake and a round.

    Returns:
        The headers of the answers.
    """
    study, headers = load_study(federation.study, {}), []

    def ask(kind: str, header: dict[str, Any], arrays: Arrays) -> dict[str, Any]:
        content = recorddict_to_proto(wire.pack(header, arrays)).SerializeToString()
        send(wire_end, kind.encode() + b"\n" + content)
        answer, _ = wire.unpack(recorddict_from_proto(RecordDict.FromString(receive(wire_end))))
        headers.append(answer)
        return answer

    asked = ask(wire.PREPARE, {"run": "run", "study": study.canonical()}, {})
    start = initial_groups(study)
    groups = {name: start[name] for name in asked.get("groups", [])}
    ask(wire.TRAIN, {"run": "run", "study": study.sha256, "round": 1}, groups)
    wire_end.close()
    return headers


def no_sync_of_folders() -> None:
    """A name may be lost although the file is there."""
    files.sync_folder = journal_module.sync_folder = lambda folder: None


def no_sync_of_files() -> None:
    """What Python writes may be lost; SQLite syncs by itself."""
    os.fsync = lambda descriptor: None


def no_sync_of_entries() -> None:
    """SQLite syncs its log at checkpoints only."""
    journal_module.sqlite3 = SimpleNamespace(**vars(sqlite3))  # type: ignore[assignment]
    journal_module.sqlite3.connect = lambda *args, **keys: sqlite3.connect(*args, factory=Normal, **keys)


class Normal(sqlite3.Connection):
    """A connection that cannot be made to sync each entry."""

    def execute(self, sql: str, *values: Any) -> sqlite3.Cursor:
        """Run a statement."""
        return super().execute(sql.replace("synchronous=FULL", "synchronous=NORMAL"), *values)


def no_mark() -> None:
    """A reply leaves that the ledger does not call released."""
    ledger_module.Ledger.released = lambda *_: None  # type: ignore[assignment,method-assign]


def late_charge() -> None:
    """The charge of a round is written after its work."""
    charge, released = ledger_module.Ledger.charge, ledger_module.Ledger.released
    waiting: list[Any] = []

    def later(self: Any, run: str, study: str, request: str, event: Any) -> None:
        if event.kind == "dp_sgd":
            waiting.append((self, run, study, request, event))
        else:
            charge(self, run, study, request, event)

    def mark(*args: Any) -> None:
        while waiting:
            charge(*waiting.pop())
        released(*args)

    ledger_module.Ledger.charge = later  # type: ignore[method-assign]
    ledger_module.Ledger.released = mark  # type: ignore[method-assign]


BROKEN: dict[str, Child] = {
    "sync of folders": no_sync_of_folders,
    "sync of files": no_sync_of_files,
    "sync of entries": no_sync_of_entries,
    "mark": no_mark,
    "charge before work": late_charge,
}
"""Precautions that a site may lack: each must be missed by the test of system calls."""


def serve(federation: Federation, job: dict[str, Any]) -> dict[str, Any]:
    """A site in a process of its own, which is asked over a socket while its system calls are listed.

    Args:
        federation: of this server.
        job: `name`; `broken`: of `BROKEN`, or empty.

    Returns:
        `headers` of the answers and `trace`: the file of system calls.
    """
    folder = federation.prepare(job["name"])
    ours, theirs = socket.socketpair()

    def work() -> None:
        ours.close()
        answer(folder, theirs, job["broken"])

    pid = fork(work, folder / "error.txt")
    theirs.close()
    tracer = strace(pid, folder / "trace.txt", "", (*CALLS, "openat", "sendto", "read", "recvfrom", "getrandom"))
    os.kill(pid, signal.SIGCONT)
    headers = converse(federation, ours)
    os.waitpid(pid, 0)
    tracer.communicate()
    return {"headers": headers, "trace": str(folder / "trace.txt")}
