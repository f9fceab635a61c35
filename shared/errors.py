"""The one tree of errors.

    GapweaveError            1  internal error
    +- UsageError            2  wrong usage or configuration
    +- RefusedError          3  privacy budget, site policy, or a ledger that is not intact
    |  +- BudgetExhausted
    |  +- NotApproved           the hospital has not approved the study
    |  +- NotIntact             a ledger that was changed, or lost entries
    +- LedgerBusy            3  another process holds the ledger: try again
    +- TooFewSites           4  quorum lost
    +- Unreachable           5  site or server unreachable
    +- DataError             6  a problem in a site's data

Every error is one line: what, where (file:key), and the remedy. Texts never hold a patient's value: they may
be shown on a screen and are written to logs.
"""


class GapweaveError(Exception):
    """An error that a person can act on.

    Args:
        what: what is wrong, without a full stop.
        where: the file, and after a colon the key or column, that it was seen in.
        remedy: what to do about it.
    """

    exit_code = 1

    def __init__(self, what: str, *, where: str = "", remedy: str = "") -> None:
        super().__init__(what)
        self.what = what
        self.where = where
        self.remedy = remedy

    def __str__(self) -> str:
        """The one line: where, what, remedy."""
        line = f"{self.where}: {self.what}" if self.where else self.what
        return f"{line}. {self.remedy}" if self.remedy else line


class UsageError(GapweaveError):
    """Wrong usage or configuration: refused before any work."""

    exit_code = 2


class RefusedError(GapweaveError):
    """A site's policy, budget or ledger does not allow the work."""

    exit_code = 3


class BudgetExhausted(RefusedError):
    """The site's cap leaves no room for the release that was asked for."""


class NotApproved(RefusedError):
    """The hospital has not approved the study that it is asked to work for."""


class NotIntact(RefusedError):
    """A site's ledger was changed, or lacks entries that somebody remembers."""


class LedgerBusy(GapweaveError):
    """Another process holds a site's ledger; unlike a refusal, this passes."""

    exit_code = 3


class TooFewSites(GapweaveError):
    """Fewer sites than the quorum, or than an aggregation rule needs."""

    exit_code = 4


class Unreachable(GapweaveError):
    """A site or the server does not answer."""

    exit_code = 5


class DataError(GapweaveError):
    """A problem in a site's data."""

    exit_code = 6
