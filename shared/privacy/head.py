"""The head of a ledger, as somebody outside its folder remembers it.

A hash chain shows edits, but not that the last entries are gone: an old copy of a ledger is a ledger. Only what is
kept elsewhere shows it: a file of the hospital's own (`policy.anchor`), and what the server heard last.
"""

from __future__ import annotations

import json
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

from gapweave.shared.errors import RefusedError
from gapweave.shared.files import write_atomically


@dataclass(frozen=True, kw_only=True)
class Head:
    """Where a ledger stood.

    Attributes:
        site: whose ledger it is.
        length: number of its entries.
        hash: of the last entry, which fixes all before it.
    """

    site: str
    length: int
    hash: str

    def to_dict(self) -> dict[str, Any]:
        """As stored and sent."""
        return asdict(self)

    @classmethod
    def from_dict(cls, content: Any) -> Head | None:
        """Read it; None for anything else than a head."""
        if not isinstance(content, dict) or content.keys() != {"site", "length", "hash"}:
            return None
        site, length, digest = content["site"], content["length"], content["hash"]
        if not (isinstance(site, str) and type(length) is int and isinstance(digest, str)):
            return None
        return cls(site=site, length=length, hash=digest)


def read_anchor(path: Path) -> Head | None:
    """The head that an anchor file holds; None when there is no file.

    Raises:
        RefusedError: when the file holds something else.
    """
    try:
        text = path.read_text(encoding="utf-8")
    except FileNotFoundError:
        return None
    except (OSError, UnicodeDecodeError):
        raise _unreadable(path) from None
    try:
        head = Head.from_dict(json.loads(text))
    except ValueError:
        head = None
    if head is None:
        raise _unreadable(path)
    return head


def write_anchor(path: Path, head: Head) -> None:
    """Replace an anchor file, durably."""
    write_atomically(path, json.dumps(head.to_dict()).encode())


def _unreadable(path: Path) -> RefusedError:
    return RefusedError(
        "the anchor cannot be read", where=str(path), remedy="Restore it, or see `gapweave site recover --help`"
    )
