"""After a loss: what the ledger no longer shows is declared as spent, and the site can go on."""

from __future__ import annotations

import math
from datetime import UTC, datetime
from pathlib import Path

from gapweave.client.anchor import REMEMBERED_FILE
from gapweave.client.journal import PUT_ASIDE
from gapweave.client.ledger import Ledger
from gapweave.client.state import kept_heads
from gapweave.shared.config.site import Site
from gapweave.shared.errors import GapweaveError, RefusedError, UsageError
from gapweave.shared.privacy.head import Head, read_anchor
from gapweave.shared.privacy.ledger import LEDGER_FILE, LedgerView, read_ledger


def recover(state: Path, site: Site, anchor: Path | None, assume_spent: float) -> LedgerView:
    """Declare that entries of a site's ledger were lost, and what they may have cost.

    Guarantee: it only ever raises what counts as spent. A ledger that was changed is put aside, not deleted; what its
    entries still say was spent counts at least, whatever is assumed.

    Args:
        state: the site's state folder.
        site: its site file.
        anchor: the file that keeps the ledger's head, if there is one.
        assume_spent: epsilon that everything may have cost that the remaining ledger does not show.

    Returns:
        The ledger afterwards.

    Raises:
        UsageError: for an epsilon that is no number of at least 0.
        RefusedError: when a changed ledger says that something left without noise, which no epsilon covers.
    """
    if not (math.isfinite(assume_spent) and assume_spent >= 0):
        raise UsageError(f"{assume_spent} is no epsilon", where="--assume-spent", remedy="Give a number of at least 0")
    changed = _changed(state)
    undeclared = [state / LEDGER_FILE] if changed else _put_aside_undeclared(state)
    assume_spent = max([assume_spent, *map(_still_said, undeclared)])
    if changed:
        if math.isinf(assume_spent):
            raise RefusedError(
                "the changed ledger says that something left without noise: no epsilon covers that",
                where=str(state),
                remedy="Restore it from the newest backup; other patients need a state folder of their own",
            )
        _put_aside(state)
    remembered = state / REMEMBERED_FILE
    heads = [_head(path) for path in (anchor, remembered) if path is not None]
    with Ledger(state, site, anchor, lost=True) as ledger:
        heads += [head for head in kept_heads(state) if not ledger.view.continues(head)]
        ledger.recover(assume_spent, [head for head in heads if head is not None])
        remembered.unlink(missing_ok=True)
        return ledger.view


def _changed(state: Path) -> bool:
    """Whether there is a ledger that cannot be believed."""
    if not (state / LEDGER_FILE).exists():
        return False
    try:
        return not read_ledger(state).intact
    except RefusedError:
        return True


def _put_aside_undeclared(state: Path) -> list[Path]:
    """Ledgers that a recovery put aside which was killed before it declared anything."""
    ledger = state / LEDGER_FILE
    declared = ledger.exists() and read_ledger(ledger).recovered
    return [] if declared else list(state.glob(f"{PUT_ASIDE}*-{LEDGER_FILE}"))


def _still_said(ledger: Path) -> float:
    """What counts as spent by a changed ledger's entries; 0 where they hold nothing that can be read."""
    try:
        return read_ledger(ledger).bound()
    except (GapweaveError, LookupError, TypeError, ValueError, StopIteration):
        return 0.0


def _put_aside(state: Path) -> None:
    """Rename the ledger with SQLite's own files beside it."""
    mark = f"{datetime.now(UTC):%Y%m%d-%H%M%S}"
    for file in sorted(state.glob(f"{LEDGER_FILE}*")):
        file.rename(file.with_name(f"{PUT_ASIDE}{mark}-{file.name}"))


def _head(path: Path) -> Head | None:
    try:
        return read_anchor(path)
    except RefusedError:
        return None  # what it held is lost too, and assumed
