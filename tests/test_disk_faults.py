"""A disk that is full or broken: nothing leaves, one line says so, and the next attempt works."""

from __future__ import annotations

import pytest
from forks import Server
from test_kills import calls_of, check_end, check_midway, find, left, number_of

FAULTS: dict[str, tuple[str, int, str, str]] = {
    # name: which call, which of them, the error, what is said
    "the ledger's log, not synced": (r"fdatasync\(.*birch/ledger.sqlite-wal", 7, "EIO", "the ledger cannot be written"),
    "the state, full": (r"write\(.*birch.*round.safetensors", 1, "ENOSPC", "the site's state cannot be written"),
    "the anchor, full": (r"write\(.*anchors/.alder", 8, "ENOSPC", "the anchor cannot be written"),
}
RARE_FAULTS: dict[str, tuple[str, int, str, str]] = {
    "the ledger's log, full": (r"pwrite64\(.*birch/ledger.sqlite-wal", -30, "ENOSPC", "the ledger cannot be written"),
    "the first ledger's journal": (r"pwrite64\(.*sqlite-journal", 0, "ENOSPC", "the ledger cannot be written"),
    "the first ledger's folder": (r"fsync\(.*state/alder>", 0, "EIO", "the ledger cannot be written"),
    "a new folder": (r"mkdir\(.*state/birch\"", 0, "ENOSPC", "the ledger cannot be written"),
    "the state, not synced": (r"fsync\(.*alder.*round.safetensors", 0, "EIO", "the site's state cannot be written"),
    "the state, not renamed": (r"rename\(.*alder.*round.safetensors", 2, "EIO", "the site's state cannot be written"),
    "the anchor, not synced": (r"fsync\(.*anchors>", 12, "EIO", "the anchor cannot be written"),
    "the checkpoint, full": (r"write\(.*server.safetensors", 3, "ENOSPC", "server.safetensors'"),
    "the log of rounds, full": (r"write\(.*rounds.jsonl>", 1, "ENOSPC", "rounds.jsonl'"),
}


@pytest.fixture(scope="module")
def undisturbed(server: Server) -> list[str]:
    """The system calls of a run that nobody disturbed, one a line."""
    return calls_of(server.perform("a good disk", trace=True))


def fail_and_resume(server: Server, calls: list[str], fault: str) -> None:
    """Let one call of a run fail, look at what left, and resume to the end."""
    pattern, which, error, said = {**FAULTS, **RARE_FAULTS}[fault]
    name, number = number_of(calls, find(calls, pattern, which))
    outcome = server.perform(fault, inject=f"{name}:error={error}:when={number}")
    assert outcome["code"] == 1
    assert said in outcome["error"].splitlines()[-1], "in the error's one line"
    folder = server.folder / fault
    check_midway(folder, server.folder / "copy")
    for line in left(folder):
        if line["header"]["status"] != "ok":
            assert line["header"].keys() == {"protocol", "status", "error", "text", "site"}, "and nothing else left"
    assert not list(folder.rglob("*.tmp")), "no half-written file stays"
    outcome = server.perform(fault)
    assert outcome["code"] == 0, outcome["error"]
    check_end(folder, {})


@pytest.mark.parametrize("fault", FAULTS)
def test_after_a_fault_of_the_disk_the_next_attempt_works(server: Server, undisturbed: list[str], fault: str) -> None:
    fail_and_resume(server, undisturbed, fault)


@pytest.mark.long
@pytest.mark.parametrize("fault", RARE_FAULTS)
def test_after_a_rare_fault_of_the_disk_too(server: Server, undisturbed: list[str], fault: str) -> None:
    fail_and_resume(server, undisturbed, fault)
