"""What others remember of a site's ledger: a file of the hospital's own, and the server.

A restored old copy of a ledger is whole and correct; only somebody outside its folder can tell that the last
entries are missing. Neither can change what counts as spent: they can only stop the site.
"""

from __future__ import annotations

from pathlib import Path

from gapweave.shared.errors import NotIntact, UsageError
from gapweave.shared.privacy.head import Head, read_anchor, write_anchor
from gapweave.shared.privacy.ledger import LEDGER_FILE, LedgerView

RECOVER = "declare what was lost with `gapweave site recover`"
REMEMBERED_FILE = "remembered.json"
"""In the state folder: a head that a server remembers and the ledger lacks; `site recover` declares it lost."""


class Anchor:
    """The file outside the state folder that keeps the ledger's head.

    Args:
        path: the file.
        state: the site's state folder.
        site: name of the site.

    Raises:
        UsageError: when its folder does not exist, or is the state folder, whose copies would bring it along.
    """

    def __init__(self, path: Path, state: Path, site: str) -> None:
        self.path, self._where, self._site = path.resolve(), str(state / LEDGER_FILE), site
        if self.path.is_relative_to(state.resolve()):
            raise UsageError(
                "the anchor lies in the state folder: an old copy of one brings the other along",
                where=str(self.path),
                remedy="Name a file elsewhere in policy.anchor, best on another disk",
            )
        if not self.path.parent.is_dir():
            raise UsageError(
                "the anchor's folder does not exist", where=str(self.path), remedy="Create it, or correct policy.anchor"
            )

    def check(self, view: LedgerView) -> None:
        """Refuse a ledger that lacks what the anchor has seen, or whose anchor is gone.

        Raises:
            RefusedError: naming both ways out.
        """
        head = read_anchor(self.path)
        if head is not None and head.site != self._site:
            raise NotIntact(
                f"its anchor {self.path} belongs to site {head.site!r}, not {self._site!r}",
                where=self._where,
                remedy="Give each site an anchor of its own",
            )
        if head is not None:
            check_head(view, head, f"its anchor {self.path}", self._where)
        elif view.opening.get("anchor") == str(self.path):
            raise NotIntact("the ledger's anchor is gone", where=str(self.path), remedy=f"Put it back, or {RECOVER}")

    def write(self, head: Head) -> None:
        """Keep the ledger's head, durably.

        Raises:
            UsageError: when it cannot be written.
        """
        try:
            write_anchor(self.path, head)
        except OSError as error:
            raise UsageError(
                f"the anchor cannot be written ({error.strerror})",
                where=str(self.path),
                remedy="Create its folder, or correct policy.anchor",
            ) from None


def check_former(view: LedgerView, anchor: Anchor | None, where: str) -> None:
    """Refuse a ledger that lacks what its former anchor has seen, where the site file names another one now, or none.

    One that is gone says nothing: a site may have moved to another machine.

    Args:
        view: the ledger.
        anchor: that the site file names.
        where: the ledger lies, for the message.

    Raises:
        RefusedError: until the site declares what was lost.
    """
    former = view.opening.get("anchor")
    if former is None or (anchor is not None and str(anchor.path) == former):
        return
    head = read_anchor(Path(former))
    if head is not None and head.site == view.head.site:
        check_head(view, head, f"its former anchor {former}", where)


def check_remembered(state: Path, view: LedgerView) -> None:
    """Refuse a ledger that lacks what a server once said that it has seen.

    Args:
        state: the site's state folder.
        view: its ledger.

    Raises:
        RefusedError: until the site declares what was lost.
    """
    head = read_anchor(state / REMEMBERED_FILE)
    if head is not None and head.site == view.head.site:
        check_head(view, head, "the server", str(state / LEDGER_FILE))


def check_head(view: LedgerView, head: Head, who: str, where: str) -> None:
    """Refuse to go on when somebody remembers entries that a ledger lacks.

    Args:
        view: the ledger.
        head: what is remembered.
        who: remembers it, in words.
        where: the ledger lies, for the message.

    Raises:
        RefusedError: when the ledger is shorter, or has other entries: an old copy, or a fork.
    """
    if view.continues(head):
        return
    how = "has others: an old copy was restored and used, or there are two copies"
    if len(view.entries) < head.length:
        how = f"has {len(view.entries)}: an old copy was restored, or entries were lost"
    raise NotIntact(
        f"{who} has seen {head.length} entries, the ledger {how}",
        where=where,
        remedy=f"Restore the newest copy, or {RECOVER}",
    )
