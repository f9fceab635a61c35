"""Asking sites: messages out, answers as they come, until all are in or the deadline passes."""

from __future__ import annotations

import math
import re
import time
from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from typing import Any

from flwr.app import Message, RecordDict
from flwr.common.constant import ErrorCode
from flwr.serverapp import Grid

from gapweave.server.handshake import LONGEST_TEXT
from gapweave.shared import wire
from gapweave.shared.tensorfile import Arrays

POLL_S = 0.2
"""Seconds between two looks for replies of sites in other processes."""
LONGEST_POLL_S = 1.5
"""What they grow to while nobody answers: five looks a second kept a SuperLink busy for half of one core."""
MOST_BYTES = 200_000_000
"""Of answers that are fetched at once: Flower holds them all, twice. Large ones come one by one."""
GRACE_S = 60.0
"""How much longer than the deadline a message may live: a retry then finds the stored reply."""
LONGEST_HEADER = 2**20
"""Characters of an answer's header: it stands in every checkpoint; a plan with a thousand looks takes 300,000."""


@dataclass(kw_only=True)
class Answer:
    """One site's reply: a header with its status, and arrays."""

    node: int
    header: dict[str, Any]
    arrays: Arrays


def ask(grid: Grid, kind: str, requests: Mapping[int, RecordDict], seconds: float) -> Iterator[Answer]:
    """Send to each node and give answers as they come.

    A reply is matched by the message that it answers: error replies of dead nodes carry another id.

    Args:
        grid: Flower's view of the sites.
        kind: message type.
        requests: content by node.
        seconds: deadline; infinite where sites answer in turn.
    """
    lifetime = None if math.isinf(seconds) else seconds + GRACE_S
    messages = [
        Message(content, dst_node_id=node, message_type=kind, ttl=lifetime, group_id=kind)
        for node, content in requests.items()
    ]
    # Sites in this process give one answer at a time.
    few = len(requests) if math.isinf(seconds) else _few(requests)
    pending = dict(zip(grid.push_messages(messages), requests, strict=True))
    deadline, wait = time.monotonic() + seconds, POLL_S
    while pending and time.monotonic() < deadline:
        before, asked = len(pending), list(pending)
        for at in range(0, len(asked), few):
            for reply in grid.pull_messages(asked[at : at + few]):
                node = pending.pop(reply.metadata.reply_to_message_id, None)
                if node is not None:
                    yield _read(node, reply)
        answered = len(pending) < before
        wait = POLL_S if answered else min(1.5 * wait, LONGEST_POLL_S)
        if pending and not answered:
            time.sleep(wait)


def _few(requests: Mapping[int, RecordDict]) -> int:
    """How many answers are fetched at once."""
    largest = max(map(_bytes, requests.values()), default=0)
    return max(1, MOST_BYTES // max(1, largest))


def _bytes(content: RecordDict) -> int:
    """Bytes of a message's arrays; its answer has as many."""
    return sum(len(array.data) for record in content.array_records.values() for array in record.values())


def _transport(reply: Message) -> str:
    """What an error of Flower's says; the one that a site's guard writes names the versions of both sides."""
    if reply.error.code == ErrorCode.NODE_UNAVAILABLE:
        return "is no longer connected"
    if reply.error.code == ErrorCode.INVALID_FAB and re.fullmatch(r"[\w.,:; ]{1,200}", reply.error.reason or ""):
        return str(reply.error.reason)
    return f"error {reply.error.code} in transport"


def _read(node: int, reply: Message) -> Answer:
    """A reply as status and arrays; what cannot be read is a failed site, not a failed run."""
    if reply.has_error():
        # A site that is cut off is late, whether the deadline or the hub's own watch on its nodes tells so first.
        status = "late" if reply.error.code == ErrorCode.NODE_UNAVAILABLE else "failed"
        return Answer(node=node, header={"status": status, "text": _transport(reply)}, arrays={})
    try:
        header, arrays = wire.unpack(reply.content, LONGEST_HEADER)
    except wire.ProtocolError as error:
        return Answer(node=node, header={"status": "failed", "text": str(error)}, arrays={})
    if header.get("status") not in ("ok", "refused", "failed"):
        header = {"status": "failed", "text": "an answer without a status"}
    if "text" in header:
        header = {**header, "text": str(header["text"])[:LONGEST_TEXT]}
    return Answer(node=node, header=header, arrays=arrays)
