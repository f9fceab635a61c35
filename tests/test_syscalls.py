"""What the system is told, in order: everything is on the disk before the first byte of a reply leaves."""

from __future__ import annotations

import re
from dataclasses import dataclass
from pathlib import Path

import pytest
from forks import Server
from served import BROKEN

WRITES, SYNCS = ("write", "pwrite64"), ("fsync", "fdatasync")
LEDGER = re.compile(r"/ledger\.sqlite(-wal)?$")
"""SQLite's third file, the index of the log, is rebuilt after a crash."""
CHARGE = re.compile(r'charge\{\\"event\\": \{[^}]*update of round 1')
RELEASED = re.compile(r'released\{\\"request')


@dataclass(frozen=True)
class Call:
    """One system call: its name, the file that it is about, the new name of a renamed one, and all arguments."""

    name: str
    path: str
    target: str
    text: str


def parse(trace: Path) -> list[Call]:
    """All calls that succeeded, in order: the site is one thread."""
    found = re.finditer(r"^\d+ +(\w+)\((.*)\) += +(\d+)", trace.read_text(encoding="utf-8"), re.MULTILINE)
    calls = []
    for name, text in (match.group(1, 2) for match in found):
        names = re.findall(r'"([^"]*)"', text) if name in ("rename", "mkdir", "unlink", "openat") else []
        handle = re.match(r"\d+<([^>]*)>", text)
        path = handle[1] if handle else next(iter(names), "")
        calls.append(Call(name, path, names[1] if name == "rename" else "", text))
    return calls


def exchanges(calls: list[Call]) -> list[list[Call]]:
    """For each reply, what was done before its first byte and after the request."""
    parts: list[list[Call]] = []
    current: list[Call] = []
    for call in calls:
        if call.name == "sendto":
            parts.append(current)
            current = []
        current.append(call)
    return parts


def synced(calls: list[Call], path: str) -> bool:
    """Whether a file or folder is synced by one of these calls."""
    return any(call.name in SYNCS and call.path == path for call in calls)


def folder_of(path: str) -> str:
    return str(Path(path).parent)


def check_durable(calls: list[Call]) -> None:
    """After these calls the ledger, and every file that got its name, survive a power cut."""
    for at, call in enumerate(calls):
        after = calls[at + 1 :]
        if call.name in WRITES and LEDGER.search(call.path):
            assert synced(after, call.path), "an entry of the ledger is not synced"
        elif call.name == "rename":
            written = [index for index in range(at) if calls[index].name in WRITES and calls[index].path == call.path]
            assert synced(calls[max(written) : at], call.path), "a file is not synced before it gets its name"
            assert synced(after, folder_of(call.target)), "a new name is not synced"
        elif call.name == "mkdir" or ("O_CREAT" in call.text and LEDGER.search(call.path) and call.name == "openat"):
            assert synced(after, folder_of(call.path)), "a new file or folder is not synced"


def check_round(calls: list[Call]) -> None:
    """Charge, work, reply, mark, and each of them on the disk before the next."""
    charged = first(calls, *WRITES, text=CHARGE, what="the charge")
    work = first(calls, "getrandom", what="the draw of patients and noise")
    assert charged < work, "the work begins before the charge"
    assert synced([call for call in calls[charged:work] if call.path.endswith("-wal")], calls[charged].path), (
        "the work begins before the charge is synced"
    )
    check_durable(calls[:work])
    reply = first(calls, "rename", text=re.compile("round.safetensors"), what="the kept reply")
    mark = first(calls, *WRITES, text=RELEASED, what="the mark of its release")
    assert work < reply < mark, "the release is marked before the reply is kept"
    assert synced(calls[reply:mark], folder_of(calls[reply].target)), (
        "the kept reply is not synced before it is released"
    )


def first(calls: list[Call], *names: str, text: re.Pattern[str] = re.compile(""), what: str) -> int:
    """Index of the first such call."""
    found = (at for at, call in enumerate(calls) if call.name in names and text.search(call.text))
    index = next(found, None)
    assert index is not None, f"nothing shows {what}"
    return index


def check_site(server: Server, broken: str) -> None:
    """Ask a site for a round and look at all that it told the system."""
    outcome = server.perform(broken or "whole", broken=broken)
    assert [header["status"] for header in outcome["headers"]] == ["ok", "ok"]
    handshake, training = exchanges(parse(Path(outcome["trace"])))
    check_round(training)
    for calls in (handshake, training):
        assert sum(call.name == "rename" for call in calls) > 1
        assert any(call.name in WRITES and LEDGER.search(call.path) for call in calls)
        check_durable(calls)


def test_everything_is_on_the_disk_before_the_first_byte_of_a_reply(server: Server) -> None:
    check_site(server, broken="")


SEEN_AS = {
    "sync of folders": "not synced",
    "sync of files": "a file is not synced before it gets its name",
    "sync of entries": "the work begins before the charge is synced",
    "mark": "nothing shows the mark",
    "charge before work": "the work begins before the charge",
}


@pytest.mark.parametrize("broken", BROKEN)
def test_a_site_without_a_precaution_is_caught(server: Server, broken: str) -> None:
    with pytest.raises(AssertionError, match=SEEN_AS[broken]):
        check_site(server, broken)
